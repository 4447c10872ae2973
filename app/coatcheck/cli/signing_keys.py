"""`coatcheck signing-keys …`: what signs tokens, and what seals it."""

import json as json_format
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from coatcheck.cli import STARTED_AT, output
from coatcheck.cli.output import Exit, Json, Yes

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.signing import Line, Ring, SigningKey

app = typer.Typer(
    help="List, rotate, withdraw, import, export and re-seal signing keys.", no_args_is_help=True
)

Purpose = Annotated[
    str, typer.Option("--for", help="What it signs: token, or feed (of revocations).")
]
AtOnce = Annotated[
    bool, typer.Option("--now", help="Sign with it at once, not only a day from now.")
]


#: One thumbprint in 64 begins as an option does.
MAY_BEGIN_WITH_A_DASH = {"ignore_unknown_options": True}
#: Base64url of SHA-256.
_THUMBPRINT_LENGTH = 43


def _kid(text: str) -> str:
    """The kid, and no option that was misspelled."""
    if text.startswith("--") and len(text) != _THUMBPRINT_LENGTH:
        raise typer.BadParameter(f"there is no option {text}")
    return text


Kid = Annotated[str, typer.Argument(help="The kid, as signing-keys list shows it.", callback=_kid)]


class Format(StrEnum):
    """How a key is written."""

    JWK = "jwk"
    PEM = "pem"


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
    purpose: Purpose = "token",
    now: AtOnce = False,
    json: Json = False,
) -> None:
    """Make the next signing key: published at once, signing once every cache knows it."""
    from coatcheck.cli import local
    from coatcheck.server import sealing, signing

    with local.deployment() as here:
        line = _line(purpose, algorithm)
        sealing_keys = sealing.load(here.settings.keys_dir)
        kid = signing.rotate(
            here.store,
            signing.sealing_key_in_use(here.store, sealing_keys),
            line[1],
            here.actor,
            now=here.now,
            at_once=now,
            purpose=line[0],
            succeeds=signing.newest_before(here.store, line, _ms(STARTED_AT)),
            publication=here.settings.publication,
            detail={signing.MADE_AT_MS: _ms(time.time())},
        )
        _print(here, kid, json)


@app.command("withdraw", context_settings=MAY_BEGIN_WITH_A_DASH)
def withdraw(
    kid: Kid,
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


@app.command("import")
def import_key(
    file: Annotated[
        str, typer.Argument(help="A private key as PEM or JWK; - reads standard input.")
    ],
    purpose: Purpose = "token",
    kid: Annotated[
        str | None,
        typer.Option(help="The kid that tokens out there have; default: its RFC 7638 thumbprint."),
    ] = None,
    now: AtOnce = False,
    json: Json = False,
) -> None:
    """Bring a signing key along: published at once, signing once every cache knows it."""
    from coatcheck.cli import local
    from coatcheck.server import keyfile, sealing, signing

    content = _read(file)
    with local.deployment() as here:
        try:
            pair = keyfile.read(content)
            line = _line(purpose, pair.algorithm)
            sealing_keys = sealing.load(here.settings.keys_dir)
            taken = signing.take_in(
                here.store,
                signing.sealing_key_in_use(here.store, sealing_keys),
                pair,
                here.actor,
                now=here.now,
                at_once=now,
                purpose=line[0],
                kid=kid,
                succeeds=signing.newest_before(here.store, line, _ms(STARTED_AT)),
                publication=here.settings.publication,
                detail={signing.MADE_AT_MS: _ms(time.time())},
            )
        except keyfile.UnfitKey as error:
            output.fail(Exit.REFUSED, f"{file} is not imported: {error}")
        if pair.kid not in (None, taken):
            output.say("coatcheck: the file gives it another kid; --kid would have kept that one")
        _print(here, taken, json)
    if file != "-":
        output.say("coatcheck: remove the file now: the deployment has its own, sealed copy")


@app.command("export", context_settings=MAY_BEGIN_WITH_A_DASH)
def export(
    kid: Kid,
    form: Annotated[
        Format, typer.Option("--format", help="jwk, or pem (SubjectPublicKeyInfo, PKCS #8).")
    ] = Format.JWK,
    private: Annotated[
        bool, typer.Option("--private", help="The private half: whoever has it can sign tokens.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new file for it; the private half needs one.")
    ] = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Write a signing key down: its public half, unless told otherwise."""
    from coatcheck.cli import local
    from coatcheck.server import keyfile, signing

    if private and out is None:
        output.fail(Exit.USAGE, "the private half goes into a new file only: name one with --out")
    if private:
        output.confirm(yes, f"Write the private half of {kid} to {out}? Whoever reads it signs.")
    with local.deployment() as here:
        signing_key = _ring(here).get(kid)
        if signing_key is None:
            raise signing.UnknownSigningKey(kid)
        public_jwk = dict(signing_key.public_jwk)
        if out is None:
            pem = keyfile.public_pem(public_jwk)
            if json:
                output.document(public_jwk if form is Format.JWK else {"kid": kid, "pem": pem})
            else:
                text = json_format.dumps(public_jwk) + "\n" if form is Format.JWK else pem
                sys.stdout.write(text)
            return
        with _new_file(out) as stream:
            if not private:
                jwk, pem = public_jwk, keyfile.public_pem(public_jwk)
            else:
                if signing_key.private is None:
                    output.fail(Exit.ERROR, f"{kid} cannot be exported: {signing_key.fault}")
                jwk = keyfile.private_jwk(signing_key.private, public_jwk)
                pem = keyfile.private_pem(signing_key.private)
                # Before it leaves: what cannot be written down does not happen.
                signing.note_export(here.store, kid, here.actor, now=here.now)
            stream.write(json_format.dumps(jwk) + "\n" if form is Format.JWK else pem)
    if json:
        output.document({"kid": kid, "private": private, "file": str(out)})
    else:
        half = "private" if private else "public"
        output.say(f"coatcheck: the {half} half of {kid} is in {out}")


@app.command("reseal")
def reseal(
    new: Annotated[
        bool, typer.Option("--new", help="Make a new sealing key first, unless one waits.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Only make it: hand it to every node, then run reseal."),
    ] = False,
    to: Annotated[
        str, typer.Option("--to", help="The id of the sealing key to use; default: the newest.")
    ] = "",
    json: Json = False,
) -> None:
    """Seal all signing keys and all copies of secrets with the newest sealing key.

    Running nodes go on.  It can be run again at any time, also after it was killed.
    """
    from coatcheck.cli import local
    from coatcheck.server import resealing, sealing, signing

    if to and (new or prepare):
        output.fail(Exit.USAGE, "--to names a sealing key that is there: leave --new out")
    with local.deployment() as here:
        keys_dir = here.settings.keys_dir
        sealing_keys = sealing.load(keys_dir)
        if new or prepare:
            to = sealing_keys.newest().id
            if to in signing.sealing_keys_in_use(here.store):
                to = sealing.create(keys_dir).id
                sealing_keys = sealing.load(keys_dir)
        successor = sealing_keys.successor(to)
        file = next(str(file.path) for file in sealing_keys.files if file.id == successor.id)
        told: dict[str, object] = {"sealingKey": successor.id, "file": file}
        if not prepare:
            done = resealing.reseal(here.store, sealing_keys, successor, here.actor, now=here.now)
            told["resealed"] = list(done.kids)
            told["left"] = list(done.left)
            told["secrets"] = done.secrets
            told["secretsLeftUnder"] = list(done.copies_left_under)
            told["obsolete"] = [
                str(file.path) for file in sealing_keys.files if file.id not in done.in_use
            ]
    if json:
        output.document(told)
    else:
        output.facts(told)
    if prepare:
        output.say("coatcheck: hand the file to every node, then run coatcheck signing-keys reseal")
        return
    if told["secretsLeftUnder"]:
        output.say(
            "coatcheck: some copies of secrets did not open: put the files of those sealing keys"
            " into COATCHECK_KEYS_DIR and run it again, or do without these copies"
        )
    if told["obsolete"]:
        output.say(
            "coatcheck: once every node has the new file, the obsolete ones can go from the keys"
            " directories; backups of the database made before now still need them"
        )


def _line(purpose: str, algorithm: str) -> "Line":
    from coatcheck.server import signing

    line = next((line for line in signing.LINES if line == (purpose, algorithm)), None)
    if line is None:
        lines = " or ".join(f"--for {one} --algorithm {name}" for one, name in signing.LINES)
        output.fail(Exit.USAGE, f"there is {lines}")
    return line


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _read(file: str) -> bytes:
    """A key file; what is too long for one is not read to its end."""
    from coatcheck.server import keyfile

    if file == "-":
        return sys.stdin.buffer.read(keyfile.MAX_BYTES + 1)
    try:
        with Path(file).open("rb") as stream:
            if stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
                output.say(f"coatcheck: {file} is open to other users of this machine")
            return stream.read(keyfile.MAX_BYTES + 1)
    except OSError as error:
        output.fail(Exit.USAGE, f"{file} cannot be read ({error.strerror})")


@contextmanager
def _new_file(path: Path) -> Iterator[IO[str]]:
    """A file for its owner only, that was not there before; gone again if it is not written."""
    try:
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        output.fail(Exit.USAGE, f"{path} cannot be made ({error.strerror}): name a new file")
    try:
        with os.fdopen(number, "w", encoding="ascii") as stream:
            os.fchmod(number, 0o600)
            yield stream
            stream.flush()
            os.fsync(number)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _ring(here: "Local") -> "Ring":
    from coatcheck.server import sealing, signing

    sealing_keys = sealing.load(here.settings.keys_dir)
    keeper = signing.RingKeeper(here.store, sealing_keys, here.settings.publication)
    return keeper.at(here.store.head())


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
