"""Where a command's request goes: to the routes of `/v1` in this process, or to a service's.

A command says what it wants as the management API has it: method, path, query, body.  Without
`--server` the very same routes run here, on the database that the settings name, and for whoever
owns the machine; with it the request travels.  So each command is written once.

Nothing of the service is imported before a command without `--server` runs.
"""

import functools
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    NoReturn,
    Protocol,
    get_args,
)

import httpx2
import typer

from coatcheck import apikey, ids
from coatcheck.caller import ApiKeyMissing, api_key_origin
from coatcheck.cli import output
from coatcheck.cli.output import Exit
from coatcheck.http import require_safe

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.manage.api.call import Office

#: Seconds; an answer takes a few milliseconds.
TIMEOUT: Final = 10
#: Bytes of standard input; an API key is shorter.
_MOST_READ: Final = 2000
#: What one page of a list holds at most.
PAGE: Final = 100

Document = dict[str, Any]
Query = Mapping[str, str | int | None]

#: Stands for null among options, where None is what was not given.
NOTHING: Final = object()

Org = Annotated[
    str | None,
    typer.Option(help="The organization, org_…; may be left out where there is one, or for yours."),
]
Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]
All = Annotated[bool, typer.Option("--all", help="However many there are.")]
Cursor = Annotated[str | None, typer.Option(help="Go on where a list with the same options ended.")]

_AN_ID: Final = re.compile(rf"(?:{'|'.join(get_args(ids.Kind))})_[0-9A-Za-z]{{{ids.WIDTH}}}")
NEVER_AN_ARGUMENT: Final = (
    "an API key is never an argument, others on this machine can read those, and addresses get"
    " logged: name it by its id (key_…), or find it by keys search -, which reads standard input"
)

#: Status → exit code; others of 4xx: 1, others: 7.
_EXITS: Final[Mapping[int, Exit]] = {
    **dict.fromkeys((400, 413, 415, 422, 428), Exit.USAGE),
    **dict.fromkeys((401, 403), Exit.REFUSED),
    404: Exit.NOT_FOUND,
    **dict.fromkeys((409, 412), Exit.CONFLICT),
    429: Exit.UNREACHABLE,
}

#: Inputs of the API that the command line calls otherwise.
_OPTIONS: Final[Mapping[str, str]] = {
    "organization": "--org",
    "scopes": "--scope",
    "audiences": "--audience",
    "cidrs": "--cidr",
    "models": "--model",
    "expiresAt": "--expires",
    "creditLimit": "--credit-limit",
}
#: Members that every problem has; the others are what is known of the obstacle.
_OF_EVERY_PROBLEM: Final = frozenset(
    {"type", "title", "status", "detail", "code", "errors", "requestId", "instance"}
)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back.

    Attributes:
        document: empty if there was no body.
        headers: by lower-case name.
    """

    status: int
    document: Document = field(repr=False)
    headers: Mapping[str, str]


class Target(Protocol):
    """Something that answers as the management API does."""

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        """The answer to one request, whatever its status.

        Args:
            path: below the management API's root.
            query: what is None is left out.
            body: what JSON can say; None: no body.
        """


class LocalTarget:
    """The routes in this process.  Who owns the database may do everything."""

    def __init__(self, here: "Local") -> None:
        self.here = here
        self._office = _office(here)

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        from coatcheck.server.manage import authority
        from coatcheck.server.manage.api.dispatch import answer
        from coatcheck.server.manage.api.wire import Request

        request = Request(
            method, path, _parameters(query), _headers(body, headers), _content(body) or b""
        )
        done = answer(
            self.here.store,
            self._office,
            request,
            lambda _: authority.local(self.here.actor),
            now=self.here.now,
        )
        document = json.loads(json.dumps(dict(done.body or {})))
        told = {name.lower(): value for name, value in done.headers.items()}
        return Answered(done.status, document, told)


class RemoteTarget:
    """A service, asked over HTTP with an API key.

    Args:
        server: its URL, which is the issuer's.
    """

    def __init__(self, server: str, api_key: str) -> None:
        self._server = server
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}", "Accept": "application/json"},
            timeout=TIMEOUT,
            follow_redirects=False,
        )

    def close(self) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        try:
            response = self._client.request(
                method,
                f"{self._server}/v1{path}",
                params=_parameters(query),
                content=_content(body),
                headers=_headers(body, headers),
            )
            document = response.json() if response.content else {}
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            output.fail(
                Exit.UNREACHABLE,
                f"no answer from {self._server} ({type(error).__name__}): check --server and"
                " whether the service runs",
            )
        except ValueError:
            document = None
        is_problem = response.status_code >= 400  # noqa: PLR2004 - RFC 9110 §15.5
        if (
            not isinstance(document, dict)
            or response.is_redirect
            or (is_problem and "code" not in document)
        ):
            output.fail(
                Exit.UNREACHABLE,
                f"{self._server} answers {response.status_code}, and not as Coatcheck does: is it"
                " the issuer's URL?",
            )
        told = {name.lower(): value for name, value in response.headers.items()}
        return Answered(response.status_code, document, told)


# --- commands


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose first argument is the target that it asks.

    The command gets the options that say which: --server, --api-key-file and --api-key-stdin.
    """

    def register(do: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(do)
        own = list(signature.parameters.values())[1:]

        def run(
            context: typer.Context,
            server: str | None,
            api_key_file: Path | None,
            api_key_stdin: bool,
            **inputs: Any,
        ) -> None:
            if any(map(apikey.looks_like_one, context.args)):
                output.fail(Exit.USAGE, NEVER_AN_ARGUMENT)
            if context.args:
                # Not repeated: it may be another secret.
                output.fail(Exit.USAGE, "there is a word too many: see --help")
            with open_target(server, api_key_file, from_stdin=api_key_stdin) as target:
                do(target, **inputs)

        # Typer reads these.
        run.__doc__ = do.__doc__
        vars(run)["__signature__"] = signature.replace(parameters=[*own, *_WHERE])
        app.command(name, context_settings={"allow_extra_args": True})(run)
        return do

    return register


def _where(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            envvar="COATCHECK_SERVER",
            help="Ask the service at this URL, with an API key.  None: work on the database that"
            " the settings name.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="With --server: the file that holds the API key.  Else COATCHECK_API_KEY or"
            " COATCHECK_API_KEY_FILE."
        ),
    ] = None,
    api_key_stdin: Annotated[
        bool, typer.Option("--api-key-stdin", help="With --server: read it from standard input.")
    ] = False,
) -> None:
    """Only its signature counts: the options that every such command has."""


_WHERE: Final = [
    one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for one in inspect.signature(_where).parameters.values()
]


@contextmanager
def open_target(
    server: str | None, api_key_file: Path | None = None, *, from_stdin: bool = False
) -> Iterator[Target]:
    """What a command asks, until the block ends; failures become sentences and exit codes."""
    if server:
        server = _checked(server)
        key = api_key(api_key_file, from_stdin=from_stdin, issuer=server)
        remote = RemoteTarget(server, key)
        try:
            yield remote
        finally:
            remote.close()
        return
    if api_key_file is not None or from_stdin:
        output.fail(Exit.USAGE, "an API key is for a service: say which one by --server")
    try:
        from coatcheck.cli import local
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("coatcheck"):
            raise
        output.fail(
            Exit.ERROR,
            "say which service by --server; without it the database of this machine is meant, and"
            " that needs: pip install 'coatcheck[server]'",
        )
    with local.deployment() as here:
        yield LocalTarget(here)


def require_local(target: Target, what: str) -> "Local":
    """This machine's deployment, for what only works there."""
    if not isinstance(target, LocalTarget):
        output.fail(Exit.USAGE, f"{what} works on the machine itself only: leave --server out")
    return target.here


# --- requests


def at(path: str, *presented: str) -> str:
    """A path that names things by their ids.

    Anything that is no id ends the command: it may be an API key, and paths get logged.
    """
    for text in presented:
        if _AN_ID.fullmatch(text) is None:
            if apikey.looks_like_one(text):
                output.fail(Exit.USAGE, NEVER_AN_ARGUMENT)
            output.fail(
                Exit.NOT_FOUND,
                "there is nothing of this id: one looks like key_0123456789abcdefABCDEF",
            )
    return path.format(*presented)


def asked(
    target: Target,
    method: str,
    path: str,
    *,
    query: Query | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Answered:
    """The answer to a request that was done; a problem ends the command."""
    if any(apikey.looks_like_one(text) for text in _parameters(query).values()):
        output.fail(Exit.USAGE, NEVER_AN_ARGUMENT)
    answered = target.call(method, path, query=query, body=body, headers=headers)
    if not 200 <= answered.status < 300:  # noqa: PLR2004 - RFC 9110 §15.3
        _give_up(target, answered)
    return answered


def edited(target: Target, path: str, body: Document, query: Query | None = None) -> Answered:
    """The answer to an edit of what it is now: nobody else's edit in between is lost."""
    before = asked(target, "GET", path)
    match = {"if-match": before.headers.get("etag", "*")}
    return asked(target, "PATCH", path, query=query, body=body, headers=match)


def listed(
    target: Target,
    path: str,
    query: Query | None = None,
    *,
    limit: int | None = None,
    cursor: str | None = None,
) -> list[Document]:
    """The items of a list, page after page.

    Args:
        limit: at most so many; None: all of them.
        cursor: where to go on.
    """
    found: list[Document] = []
    while True:
        size = PAGE if limit is None else min(PAGE, limit - len(found))
        paged = {**(query or {}), "limit": size, "cursor": cursor}
        page = asked(target, "GET", path, query=paged).document
        found += page["data"]
        cursor = page.get("nextCursor")
        if cursor is None:
            return found
        if limit is not None and len(found) >= limit:
            output.say(f"coatcheck: there are more: --all, a higher --limit, or --cursor {cursor}")
            return found


# --- what a request says


def given(**inputs: object) -> Document:
    """The inputs that were given; what is NOTHING is told as null."""
    found = {name: value for name, value in inputs.items() if value is not None}
    return {name: None if value is NOTHING else value for name, value in found.items()}


def or_none(option: str, value: object, nothing: bool) -> object:
    """A value, or that there shall be none; both is a mistake."""
    if value is not None and nothing:
        output.fail(Exit.USAGE, f"--{option} and its opposite: say one of them")
    return NOTHING if nothing else value


def words(option: str, values: list[str] | None) -> list[str] | None:
    """Repeated options, each of which may hold several words: the way scopes are written."""
    found = [word for value in values or [] for word in value.split()]
    if values and not found:
        # An unset variable in a script must not become an API key that may do everything.
        output.fail(Exit.USAGE, f"--{option} is empty: name one, or leave the option out")
    return found or None


def amount(option: str, text: str | None) -> int | float | None:
    """A number as JSON writes it."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else _finite(float(text))
    except ValueError:
        output.fail(Exit.USAGE, f"--{option} is a number, such as 100 or 2.5")


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("JSON has no such number")
    return number


def _give_up(target: Target, answered: Answered) -> NoReturn:
    """End the command as the problem says."""
    status, problem = answered.status, answered.document
    code = _EXITS.get(status, Exit.ERROR if status < 500 else Exit.UNREACHABLE)  # noqa: PLR2004
    if code is Exit.UNREACHABLE and isinstance(target, LocalTarget):
        # Nothing is away: something is wrong here.
        code = Exit.ERROR
    lines = [_line(one) for one in problem.get("errors") or () if isinstance(one, dict)]
    if problem.get("code") != "invalid_input" or not lines:
        # That one's detail says the same as its errors.
        detail = problem.get("detail") or f"the answer was {status} {problem.get('title', '')}"
        lines.insert(0, str(detail))
    lines += [
        f"{name}: {value}" for name, value in problem.items() if name not in _OF_EVERY_PROBLEM
    ]
    output.fail(code, "\n  ".join(map(output.plain, lines)))


def _line(error: Document) -> str:
    name = str(error.get("pointer", "")).lstrip("/")
    first, slash, rest = name.partition("/")
    return f"{_OPTIONS.get(first, first)}{slash}{rest}: {error.get('detail', '')}".lstrip(": ")


def _office(here: "Local") -> "Office":
    """What the routes work with, as the service has it."""
    from coatcheck.server import sealing, signing
    from coatcheck.server.manage.api.call import Office

    load = functools.partial(sealing.load, here.settings.keys_dir)

    def ensure_signing_keys() -> None:
        keeper = signing.RingKeeper(here.store, load(), here.settings.publication, load)
        lines = signing.first_lines({one.algorithm for one in here.catalog.audiences.values()})
        signing.begin_lines(keeper, here.store, lines, here.actor, now=here.now)

    return Office(
        here.settings.issuer,
        here.catalog,
        sealing_keys=load,
        seal_with=lambda tx: signing.sealing_key_for_copies(tx, load()),
        ensure_signing_keys=ensure_signing_keys,
    )


def _checked(server: str) -> str:
    """The URL of a service, without a slash at its end; an API key may be sent there."""
    try:
        return require_safe(server.rstrip("/"), unsafe_plain_http=is_plain_http_allowed())
    except ValueError as error:
        output.fail(
            Exit.USAGE,
            f"--server: {error}.  Elsewhere the API key would travel in the clear; a network that"
            " may read it needs COATCHECK_ALLOW_INSECURE_ISSUER=true",
        )


def api_key(path: Path | None, *, from_stdin: bool, issuer: str) -> str:
    """The API key, from where no other user of the machine can read it.

    Args:
        path: of --api-key-file.
        issuer: whose it is; its account in the keychain.
    """
    try:
        if from_stdin:
            given = sys.stdin.buffer.read(_MOST_READ).decode(errors="replace")
            return api_key_origin.checked(given, "standard input")
        return api_key_origin.find(api_key_file=path, issuer=issuer).read()
    except ApiKeyMissing as error:
        is_unreadable = error.code == "api_key_unreadable"
        hint = "" if is_unreadable else "; or use --api-key-file or --api-key-stdin"
        output.fail(Exit.ERROR if is_unreadable else Exit.USAGE, error.detail + hint)


def is_plain_http_allowed() -> bool:
    """Whether an API key may travel in the clear off this machine."""
    return os.environ.get("COATCHECK_ALLOW_INSECURE_ISSUER", "").lower() in ("true", "1")


def _parameters(query: Query | None) -> dict[str, str]:
    return {name: str(value) for name, value in (query or {}).items() if value is not None}


def _content(body: object) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _headers(body: object, headers: Mapping[str, str] | None) -> dict[str, str]:
    about = {} if body is None else {"content-type": "application/json"}
    return about | dict(headers or {})
