"""Where a command's request goes: to the routes of `/v1` in this process, or to a service's.

A command says what it wants as the management API has it: method, path, query, body.  Without
`--server` the very same routes run here, on the database that the settings name, and for whoever
owns the machine; with it the request travels.  So each command is written once.

Nothing of the service is imported before a command without `--server` runs.
"""

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec, Protocol
from typing import get_args as members_of

import httpx2
import typer

from coatcheck import apikey, ids
from coatcheck.cli import output
from coatcheck.cli.output import Exit
from coatcheck.verifier.http import require_safe

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.manage.api.call import Office

#: Seconds; an answer takes a few milliseconds.
TIMEOUT: Final = 10
#: What one page of a list holds at most.
PAGE: Final = 100

Document = dict[str, Any]
Query = Mapping[str, str | int | None]
P = ParamSpec("P")

_AN_ID: Final = re.compile(rf"(?:{'|'.join(members_of(ids.Kind))})_[0-9A-Za-z]{{{ids.WIDTH}}}")
_NEVER_AN_ARGUMENT: Final = (
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
        except httpx2.HTTPError as error:
            output.fail(
                Exit.UNREACHABLE,
                f"no answer from {self._server} ({type(error).__name__}): check --server and"
                " whether the service runs",
            )
        except ValueError:
            document = None
        if not isinstance(document, dict) or response.is_redirect:
            output.fail(
                Exit.UNREACHABLE,
                f"{self._server} answers {response.status_code}, and not as Coatcheck does: is it"
                " the issuer's URL?",
            )
        told = {name.lower(): value for name, value in response.headers.items()}
        return Answered(response.status_code, document, told)


# --- commands


def command(
    app: typer.Typer, name: str
) -> Callable[[Callable[Concatenate[Target, P], None]], Callable[Concatenate[Target, P], None]]:
    """Make a command of a function whose first argument is what it is asked of.

    The command gets the options that say so: --server, --api-key-file and --api-key-stdin.
    """

    def register(
        do: Callable[Concatenate[Target, P], None],
    ) -> Callable[Concatenate[Target, P], None]:
        signature = inspect.signature(do)
        own = list(signature.parameters.values())[1:]

        @functools.wraps(do)
        def run(
            *,
            server: str | None,
            api_key_file: Path | None,
            api_key_stdin: bool,
            **given: Any,
        ) -> None:
            with open_target(server, api_key_file, from_stdin=api_key_stdin) as target:
                do(target, **given)

        # This is what Typer reads.
        vars(run)["__signature__"] = signature.replace(parameters=[*own, *_WHERE])
        app.command(name)(run)
        return do

    return register


def _where(
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
        remote = RemoteTarget(_checked(server), _api_key(api_key_file, from_stdin=from_stdin))
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
                output.fail(Exit.USAGE, _NEVER_AN_ARGUMENT)
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
    if any(isinstance(value, str) and apikey.looks_like_one(value) for value in (query or {}).values()):
        output.fail(Exit.USAGE, _NEVER_AN_ARGUMENT)
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


def given(**inputs: object) -> Document:
    """The inputs that were given."""
    return {name: value for name, value in inputs.items() if value is not None}


def _give_up(target: Target, answered: Answered) -> "typer.models.NoReturn":
    raise NotImplementedError


def _parameters(query: Query | None) -> dict[str, str]:
    return {name: str(value) for name, value in (query or {}).items() if value is not None}


def _content(body: object) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _headers(body: object, headers: Mapping[str, str] | None) -> dict[str, str]:
    about = {} if body is None else {"content-type": "application/json"}
    return about | dict(headers or {})
