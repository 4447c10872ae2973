"""`coatcheck token` and `coatcheck verify`: what callers and resource servers do, by hand.

`token` needs the base install and the command line only.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from coatcheck import apikey
from coatcheck.caller import CallerError
from coatcheck.caller import IssuerUnavailable as NoIssuer
from coatcheck.caller.answer import Fetched
from coatcheck.caller.exchange import exchange
from coatcheck.cli import output, target
from coatcheck.cli.output import Exit, Json
from coatcheck.verifier import Verifier, VerifierError
from coatcheck.verifier.errors import IssuerUnavailable

DEFAULT_ISSUER = "http://127.0.0.1:8000"
#: Seconds; a token takes a few milliseconds.
TIMEOUT = 10

Issuer = Annotated[
    str | None, typer.Option(help="The service's URL; default: COATCHECK_ISSUER, then loopback.")
]
Scope = Annotated[list[str] | None, typer.Option(help="What to ask for; may repeat.")]
Resource = Annotated[
    str | None, typer.Option(help="The resource server it is for; default: the usual one.")
]
ApiKeyFile = Annotated[Path | None, typer.Option(help="Read the API key from this file.")]
ApiKeyStdin = Annotated[
    bool, typer.Option("--api-key-stdin", help="Read the API key from standard input.")
]
VariableName = Annotated[str, typer.Option(help="The variable that holds the token.")]

#: POSIX.1-2024 §8.1: what shells take as a name.
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def token(
    extra: Annotated[str | None, typer.Argument(hidden=True)] = None,
    issuer: Issuer = None,
    scope: Scope = None,
    resource: Resource = None,
    api_key_file: ApiKeyFile = None,
    api_key_stdin: ApiKeyStdin = False,
    export: Annotated[
        bool, typer.Option("--export", help="Print a line for a shell: export TOKEN=…")
    ] = False,
    name: VariableName = "TOKEN",
    json: Json = False,
) -> None:
    """Exchange an API key for a token and print it.

    The key comes from --api-key-stdin, --api-key-file, COATCHECK_API_KEY, COATCHECK_API_KEY_FILE
    or the keychain; never from an argument, which every user of the machine can read.
    """
    if extra is not None:
        # Not repeated: it is most likely the API key.
        output.fail(
            Exit.USAGE,
            "an API key is never an argument, others on this machine can read those: use"
            " --api-key-stdin, --api-key-file or COATCHECK_API_KEY",
        )
    if export and json:
        output.fail(Exit.USAGE, "--export and --json: say one of them")
    name = variable(name)
    issued = fetched(issuer, scope, resource, api_key_file, from_stdin=api_key_stdin)
    if json:
        output.document(issued.document)
    elif export:
        typer.echo(f"export {name}={shlex.quote(issued.token)}")
    else:
        typer.echo(issued.token)


def fetched(
    issuer: str | None,
    scope: list[str] | None,
    resource: str | None,
    api_key_file: Path | None,
    *,
    from_stdin: bool = False,
) -> Fetched:
    """A token; failures become sentences and exit codes."""
    issuer = issuer_url(issuer)
    try:
        # A person's own machine: its proxies and certificates count, as for any program there.
        one = exchange(
            issuer,
            scope=scope,
            resource=resource,
            timeout_s=TIMEOUT,
            trust_env=True,
            unsafe_plain_http=target.is_plain_http_allowed(),
        )
    except ValueError as error:
        output.fail(
            Exit.USAGE,
            f"{error}.  A network that may read the API key needs"
            " COATCHECK_ALLOW_INSECURE_ISSUER=true",
        )
    try:
        return one.run(target.api_key(api_key_file, from_stdin=from_stdin, issuer=issuer))
    except NoIssuer as error:
        output.fail(Exit.UNREACHABLE, error.detail)
    except CallerError as error:
        output.fail(Exit.REFUSED, error.detail)


def variable(name: str) -> str:
    """The name of an environment variable, for a shell to read."""
    if not _NAME.fullmatch(name):
        output.fail(Exit.USAGE, "--name: letters, digits and underscores, no digit first")
    return name


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
