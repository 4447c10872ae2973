"""`coatcheck keys …`: API keys, on the database that the settings name."""

import gc
import sys
from collections.abc import Iterator
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit
from coatcheck.durations import ROTATION_OVERLAP

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.manage.api_keys import ApiKeyView, Created

app = typer.Typer(help="Create, list and end API keys.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The API key's id, key_…")]

#: What differs among API keys that were made together.
_OF_ONE_KEY = frozenset({"id", "mask", "secrets"})
_COLUMNS = ("ID", "NAME", "STATUS", "ENV", "SCOPES", "KEY", "EXPIRES", "LAST USED")


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="What it is for, such as ci-prod.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="A scope it has, such as widgets:read; may be repeated. None: all."),
    ] = None,
    audience: Annotated[
        list[str] | None,
        typer.Option(help="A resource server it is for; may be repeated. None: the default one."),
    ] = None,
    org: Annotated[
        str | None, typer.Option(help="Its organization; may be left out while there is one.")
    ] = None,
    env: Annotated[str | None, typer.Option(help="Its environment, such as live or test.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="A span (90d) or a date (2027-03-31). None: never.")
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Make so many, all of the same name, as JSON lines.")
    ] = 1,
    json: output.Json = False,
) -> None:
    """Create an API key.  Its secret is shown once, here."""
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys, forms

    with local.deployment() as here:
        now = here.now
        new = api_keys.NewApiKey(
            organization_id=_organization(here, org),
            name=name,
            scopes=_words("scope", scope),
            audiences=_words("audience", audience),
            environment=env,
            expires_at=None if expires is None else forms.moment("expires", expires, now),
        )
        inputs = (here.store, here.catalog, new, here.actor)
        if count > 1:
            made = api_keys.create_many(*inputs, now=now, issuer=here.settings.issuer, count=count)
            _print_many(made, here)
            return
        created = api_keys.create(*inputs, now=now, issuer=here.settings.issuer)
    _show_secret(created, json)
    if not json and not scope:
        output.say("It has every scope; give --scope for less.")


@app.command("list")
def list_keys(
    org: Annotated[str | None, typer.Option(help="Only this organization's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    after: Annotated[str, typer.Option(help="Start behind this id.")] = "",
    json: output.Json = False,
) -> None:
    """List API keys, the oldest first."""
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys

    with local.deployment() as here:
        found = api_keys.list_api_keys(
            here.store, organization_id=org, now=here.now, after=after, limit=limit
        )
    if json:
        output.document([one.to_json() for one in found])
    else:
        output.table(_COLUMNS, map(_row, found))


@app.command("show")
def show(key_id: KeyId, json: output.Json = False) -> None:
    """Show one API key, but for its secret."""
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys

    with local.deployment() as here:
        _print(api_keys.show(here.store, key_id, now=here.now), json)


@app.command("disable")
def disable(key_id: KeyId, json: output.Json = False) -> None:
    """Stop an API key until it is enabled again."""
    _change("disable", key_id, json)


@app.command("enable")
def enable(key_id: KeyId, json: output.Json = False) -> None:
    """Let a disabled API key work again."""
    _change("enable", key_id, json)


@app.command("revoke")
def revoke(key_id: KeyId, yes: output.Yes = False, json: output.Json = False) -> None:
    """End an API key for ever."""
    output.confirm(yes, f"Revoke {key_id}? It will never work again.")
    _change("revoke", key_id, json)


@app.command("rotate")
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        str,
        typer.Option(
            help="How long the old secret goes on working: 24h, 7d, or 0.", show_default="a day"
        ),
    ] = f"{ROTATION_OVERLAP}s",
    json: output.Json = False,
) -> None:
    """Give an API key a new secret, shown once; the id stays."""
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys, forms

    with local.deployment() as here:
        overlap_s = forms.duration("overlap", overlap)
        created = api_keys.rotate(here.store, key_id, here.actor, overlap_s=overlap_s, now=here.now)
    _show_secret(created, json)


def _change(verb: str, key_id: str, json: bool) -> None:
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys

    with local.deployment() as here:
        change: Any = getattr(api_keys, verb)
        _print(change(here.store, key_id, here.actor, now=here.now), json)


def _organization(here: "Local", org: str | None) -> str:
    if org is not None:
        return org
    with here.store.transaction(read_only=True) as tx:
        organizations = tx.organizations()
    if len(organizations) != 1:
        output.fail(Exit.USAGE, "there are several organizations: say which one by --org")
    return organizations[0].id


def _words(option: str, values: list[str] | None) -> list[str]:
    """Repeated options, each of which may hold several words: the way scopes are written."""
    words = [word for value in values or [] for word in value.split()]
    if values and not words:
        # An unset variable in a script must not become a key that may do everything.
        output.fail(Exit.USAGE, f"--{option} is empty: name one, or leave the option out")
    return words


def _show_secret(created: "Created", json: bool) -> None:
    if json:
        output.document(created.to_json())
        return
    output.facts({"id": created.api_key.id, "key": created.key})
    output.say("Keep the key now: it is not shown again.")


def _print_many(made: "Iterator[tuple[str, str]]", here: "Local") -> None:
    """JSON lines: id and key of each, and what they have in common."""
    from coatcheck.server.manage import api_keys

    # A million small objects that all live on: looking for cycles among them is waste.
    gc.disable()
    tail = ""
    for key_id, key in made:
        if not tail:
            first = api_keys.show(here.store, key_id, now=here.now).to_json()
            shared = {name: first[name] for name in first if name not in _OF_ONE_KEY}
            tail = dumps(shared).removeprefix("{")
        sys.stdout.write(f'{{"id": "{key_id}", "key": "{key}", {tail}\n')


def _print(view: "ApiKeyView", json: bool) -> None:
    if json:
        output.document(view.to_json())
    else:
        output.facts(view.to_json())


def _row(view: "ApiKeyView") -> tuple[str, ...]:
    told = view.to_json()
    return (
        view.id,
        view.name,
        view.status,
        view.environment,
        " ".join(view.scopes),
        view.mask,
        str(told["expiresAt"] or "never"),
        str(told["lastUsedAt"] or "never"),
    )
