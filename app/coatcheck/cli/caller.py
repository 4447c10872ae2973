"""`coatcheck token` and `coatcheck verify`: what callers and resource servers do, by hand.

`token` needs the base install and the command line only.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import httpx2
import typer

from coatcheck import apikey
from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json
from coatcheck.verifier import Verifier, VerifierError
from coatcheck.verifier.errors import IssuerUnavailable

DEFAULT_ISSUER = "http://127.0.0.1:8000"
#: Seconds; a token takes a few milliseconds.
TIMEOUT = 10

Issuer = Annotated[
    str | None, typer.Option(help="The service's URL; default: COATCHECK_ISSUER, then loopback.")
]


def token(
    extra: Annotated[str | None, typer.Argument(hidden=True)] = None,
    issuer: Issuer = None,
    scope: Annotated[list[str] | None, typer.Option(help="What to ask for; may repeat.")] = None,
    resource: Annotated[
        str | None, typer.Option(help="The resource server it is for; default: the usual one.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Read the API key from this file.")
    ] = None,
    api_key_stdin: Annotated[
        bool, typer.Option("--api-key-stdin", help="Read the API key from standard input.")
    ] = False,
    json: Json = False,
) -> None:
    """Exchange an API key for a token and print it.

    The key comes from --api-key-stdin, --api-key-file, COATCHECK_API_KEY or
    COATCHECK_API_KEY_FILE; never from an argument, which every user of the machine can read.
    """
    if extra is not None:
        # Not repeated: it is most likely the API key.
        output.fail(
            Exit.USAGE,
            "an API key is never an argument, others on this machine can read those: use"
            " --api-key-stdin, --api-key-file or COATCHECK_API_KEY",
        )
    form = {
        "grant_type": "client_credentials",
        "client_secret": _api_key(api_key_file, from_stdin=api_key_stdin),
    }
    if scope:
        form["scope"] = " ".join(scope)
    if resource:
        form["resource"] = resource
    url = f"{issuer_url(issuer)}/oauth/token"
    try:
        answer = httpx2.post(url, data=form, timeout=TIMEOUT)
        told = answer.json()
    except (httpx2.HTTPError, ValueError) as error:
        output.fail(
            Exit.UNREACHABLE,
            f"no answer from {url} ({type(error).__name__}): check --issuer and whether the"
            " service runs",
        )
    if answer.status_code >= 500 or answer.status_code == 429:  # noqa: PLR2004
        output.fail(Exit.UNREACHABLE, str(told.get("error_description")))
    if answer.status_code != 200:  # noqa: PLR2004
        output.fail(Exit.REFUSED, f"{told.get('error')}: {told.get('error_description')}")
    if json:
        output.document(told)
    else:
        typer.echo(told["access_token"])


def verify(
    credential: Annotated[
        str, typer.Argument(metavar="TOKEN|KEY", help="What to look at; - reads it from stdin.")
    ],
    issuer: Issuer = None,
    audience: Annotated[
        str | None, typer.Option(help="Whom the token is for; default: COATCHECK_AUDIENCE.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Where it is used from, for a token that is bound to networks."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="The HTTP method it is used with, for a token that has a role.")
    ] = "GET",
    project: Annotated[
        str | None, typer.Option(help="The project that the request names in X-Project-Id.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a token as a resource server would, or look an API key up in the local database.

    Exits 0 if it is good, 3 if it is refused.
    """
    if credential == "-":
        credential = sys.stdin.read().strip()
    elif apikey.looks_like_one(credential):
        output.say("coatcheck: others on this machine can read arguments: use - and stdin")
    if apikey.looks_like_one(credential):
        _verify_api_key(credential, json)
    else:
        use = {"client_address": address, "method": method, "project_id": project}
        _verify_token(credential, issuer_url(issuer), audience, use, json)


def issuer_url(issuer: str | None) -> str:
    """The service to ask, without a slash at its end."""
    return (issuer or os.environ.get("COATCHECK_ISSUER") or DEFAULT_ISSUER).rstrip("/")


def _verify_token(
    token: str, issuer: str, audience: str | None, use: dict[str, str | None], json: bool
) -> None:
    audience = audience or os.environ.get("COATCHECK_AUDIENCE") or issuer
    try:
        with Verifier(issuer, audience) as verifier:
            principal = verifier.verify_jwt(token, **use)
    except IssuerUnavailable as error:
        output.fail(Exit.UNREACHABLE, error.detail)
    except VerifierError as error:
        output.fail(Exit.REFUSED, f"{error.code}: {error.detail}")
    except ValueError as error:
        output.fail(Exit.USAGE, str(error))
    told = dict(principal.claims)
    if json:
        output.document(told)
    else:
        output.facts(told)


def _verify_api_key(key: str, json: bool) -> None:
    try:
        apikey.parse(key)
    except apikey.MalformedApiKey as error:
        output.fail(Exit.REFUSED, f"api_key_malformed: {error}")
    from coatcheck.cli import local
    from coatcheck.server.manage import api_keys
    from coatcheck.server.manage.errors import NotFound

    with local.deployment() as here:
        try:
            found = api_keys.find(here.store, key, now=here.now)
        except NotFound:
            output.fail(Exit.REFUSED, "api_key_unknown: well-formed, and not in this database")
    if json:
        output.document(found.to_json())
    else:
        output.facts(found.to_json())
    if found.status != "active":
        output.fail(Exit.REFUSED, f"api_key_{found.status}")
    if apikey.mask(key) not in [secret.mask for secret in found.secrets]:
        output.fail(Exit.REFUSED, "api_key_expired: a rotation replaced this secret")


def _api_key(path: Path | None, *, from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.read().strip()
    key = os.environ.get("COATCHECK_API_KEY")
    named = os.environ.get("COATCHECK_API_KEY_FILE")
    path = path or (Path(named) if named and not key else None)
    if path is not None:
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            output.fail(Exit.ERROR, f"cannot read {path}: {type(error).__name__}")
    if not key:
        output.fail(Exit.USAGE, "no API key: set COATCHECK_API_KEY, or use --api-key-stdin")
    return key
