"""`coatcheck curl`, `exec` and `credential-helper`: other programs call with a token.

None of them gets to see the API key, and no token stands among arguments, which every user of
the machine can read.

Source: git-credential(1), curl(1), RFC 6750 §2.1.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from coatcheck.caller import HostNotAllowed, api_key_origin
from coatcheck.caller.origin import Reach, origin_of
from coatcheck.cli import caller, output, target
from coatcheck.cli.output import Exit

#: Open files of this process, by number; curl reads one as if it had a name.
_OPEN_FILES: Final = Path("/dev/fd")
#: Bytes that git may send; it sends a few lines.
_MOST_ASKED: Final = 64 * 1024

AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        help="Who gets the token, host or host:port; may repeat.  Default: that of --resource."
    ),
]


def curl(
    url: Annotated[str, typer.Argument(help="What to call.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: anything for curl but another URL.")
    ] = None,
    issuer: caller.Issuer = None,
    scope: caller.Scope = None,
    resource: caller.Resource = None,
    allowed_host: AllowedHost = None,
    api_key_file: caller.ApiKeyFile = None,
    api_key_stdin: caller.ApiKeyStdin = False,
) -> None:
    """Call a URL with a token, by curl: coatcheck curl https://api.example.com/widgets -- -i

    The exit code is curl's.  A redirect to another host is not followed there.
    """
    _require(_reach(allowed_host, resource), url)
    fetched = caller.fetched(issuer, scope, resource, api_key_file, from_stdin=api_key_stdin)
    if not _OPEN_FILES.exists():
        output.fail(Exit.ERROR, f"this machine has no {_OPEN_FILES}, by which curl gets the token")
    reading, writing = os.pipe()
    # It fits into the pipe, so that nobody has to be there to read it.
    os.write(writing, f"Authorization: Bearer {fetched.token}\n".encode())
    os.close(writing)
    os.set_inheritable(reading, True)
    origin = origin_of(url)
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    # Wherever a redirect or a second URL leads: it is this host that is talked to, and one of
    # another name cannot prove that it is that.
    only_there = ("--connect-to", f"::{host}:{origin.port}", "--proto", f"={origin.scheme}")
    header = ("--header", f"@{_OPEN_FILES}/{reading}")
    _become(("curl", *header, *only_there, "--url", url, *(arguments or ())), _environment())


def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.")],
    issuer: caller.Issuer = None,
    scope: caller.Scope = None,
    resource: caller.Resource = None,
    api_key_file: caller.ApiKeyFile = None,
    api_key_stdin: caller.ApiKeyStdin = False,
    name: caller.VariableName = "TOKEN",
) -> None:
    """Run a program with a token in its environment: coatcheck exec -- ./job.sh

    It does not get the API key.  The token is good for ten minutes and is not renewed: a program
    that runs longer fetches its own.  The exit code is the program's.
    """
    name = caller.variable(name)
    fetched = caller.fetched(issuer, scope, resource, api_key_file, from_stdin=api_key_stdin)
    _become(command, {**_environment(), name: fetched.token})


def credential_helper(
    operation: Annotated[str, typer.Argument(help="get; store and erase do nothing.")],
    issuer: caller.Issuer = None,
    scope: caller.Scope = None,
    resource: caller.Resource = None,
    allowed_host: AllowedHost = None,
    api_key_file: caller.ApiKeyFile = None,
) -> None:
    """Answer git, and whoever asks as git does: a token as password, and when it ends.

    Anything but an allowed host gets no answer, so that the next helper is asked.
    """
    if not (allowed_host or resource):
        output.fail(Exit.USAGE, "whose password?  Say --allowed-host or --resource")
    reach = _reach(allowed_host, resource)
    if operation != "get":
        # git-credential(1): unknown operations are ignored.
        return
    asked = _asked()
    url = f"{asked.get('protocol', '')}://{asked.get('host', '')}/"
    if not reach.lets(url):
        return
    began_at = int(time.time())
    fetched = caller.fetched(issuer, scope, resource, api_key_file)
    if "authtype" in asked.get("capability[]", "").split():
        told = {"capability[]": "authtype", "authtype": "Bearer", "credential": fetched.token}
    else:
        told = {"username": asked.get("username") or "token", "password": fetched.token}
    told["password_expiry_utc"] = str(began_at + fetched.expires_in_s)
    for name, value in told.items():
        typer.echo(f"{name}={value}")


def _asked() -> dict[str, str]:
    """What stands on standard input, until an empty line; what repeats is joined by blanks."""
    asked: dict[str, str] = {}
    for line in sys.stdin.buffer.read(_MOST_ASKED).decode(errors="replace").splitlines():
        if not line:
            break
        name, equals, value = line.partition("=")
        if equals:
            asked[name] = f"{asked[name]} {value}" if name in asked else value
    return asked


def _reach(allowed_host: list[str] | None, resource: str | None) -> Reach:
    try:
        return Reach(allowed_host, resource, unsafe_plain_http=target.is_plain_http_allowed())
    except ValueError as error:
        output.fail(Exit.USAGE, f"--allowed-host, --resource: {error}")


def _require(reach: Reach, url: str) -> None:
    try:
        reach.require(url)
    except HostNotAllowed as error:
        output.fail(Exit.USAGE, error.detail.replace("allowed_hosts", "--allowed-host"))


def _environment() -> dict[str, str]:
    """The environment without what leads to the API key."""
    leads = (api_key_origin.VARIABLE, api_key_origin.FILE_VARIABLE)
    return {name: value for name, value in os.environ.items() if name not in leads}


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Go on as another program, whose exit code is the command's."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], list(command), dict(environment))  # noqa: S606 - what was asked for
    except (OSError, ValueError) as error:
        # Only its name: arguments may hold secrets.
        name = Path(command[0]).name
        output.fail(Exit.ERROR, f"cannot run {name}: {type(error).__name__}; is it installed?")
