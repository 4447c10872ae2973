"""`coatcheck signing-keys …`: what signs tokens."""

from typing import TYPE_CHECKING, Annotated

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.signing import Ring, SigningKey

app = typer.Typer(help="List, rotate and withdraw signing keys.", no_args_is_help=True)


@app.command("list")
def list_keys(json: Json = False) -> None:
    """List signing keys with what they do now."""
    from coatcheck.cli import local

    with local.deployment() as here:
        told = [_told(signing_key, here.now) for signing_key in _ring(here).signing_keys]
    if json:
        output.document(told)
        return
    rows = [[str(value or "") for value in one.values()] for one in told]
    output.table(("KID", "FOR", "ALG", "STATE", "CREATED", "STARTS", "ENDS", "WITHDRAWN"), rows)


@app.command("rotate")
def rotate(
    algorithm: Annotated[str, typer.Option(help="ES256, RS256 or EdDSA.")] = "ES256",
    purpose: Annotated[
        str, typer.Option("--for", help="What it signs: token, or feed (of revocations).")
    ] = "token",
    now: Annotated[
        bool, typer.Option("--now", help="Sign with it at once, not only a day from now.")
    ] = False,
    json: Json = False,
) -> None:
    """Make the next signing key: published at once, signing once every cache knows it."""
    from coatcheck.cli import local
    from coatcheck.server import sealing, signing

    with local.deployment() as here:
        line = next((line for line in signing.LINES if line == (purpose, algorithm)), None)
        if line is None:
            lines = " or ".join(f"--for {one} --algorithm {name}" for one, name in signing.LINES)
            output.fail(Exit.USAGE, f"there is {lines}")
        sealing_key = sealing.load(here.settings.keys_dir).newest()
        kid = signing.rotate(
            here.store,
            sealing_key,
            line[1],
            here.actor,
            now=here.now,
            at_once=now,
            purpose=line[0],
        )
        _print(here, kid, json)


@app.command("withdraw")
def withdraw(
    kid: Annotated[str, typer.Argument(help="The kid, as signing-keys list shows it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Even if no token can be issued afterwards.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Take a signing key out of use for ever: its tokens die with it."""
    from coatcheck.cli import local
    from coatcheck.server import signing

    output.confirm(yes, f"Withdraw {kid}? Every token it signed dies.")
    with local.deployment() as here:
        signing.withdraw(here.store, kid, here.actor, now=here.now, force=force)
        _print(here, kid, json)


def _ring(here: "Local") -> "Ring":
    from coatcheck.server import sealing, signing

    sealing_keys = sealing.load(here.settings.keys_dir)
    return signing.RingKeeper(here.store, sealing_keys).at(here.store.head())


def _print(here: "Local", kid: str, json: bool) -> None:
    signing_key = _ring(here).get(kid)
    assert signing_key is not None  # noqa: S101 - it was written a moment ago
    told = _told(signing_key, here.now)
    if json:
        output.document(told)
    else:
        output.facts(told)


def _told(signing_key: "SigningKey", now: int) -> dict[str, object]:
    from coatcheck.server.manage.forms import rfc3339

    return {
        "kid": signing_key.kid,
        "purpose": signing_key.purpose,
        "algorithm": signing_key.algorithm,
        "state": signing_key.state(now),
        "createdAt": rfc3339(signing_key.created_at),
        "startsAt": rfc3339(signing_key.starts_at),
        "endsAt": rfc3339(signing_key.ends_at),
        "withdrawnAt": rfc3339(signing_key.withdrawn_at),
    }
