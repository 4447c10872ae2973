"""The management API's wire: requests read, answers and problems written.  No HTTP library.

Bodies are JSON objects without names that nobody knows; problems are RFC 9457 with a stable
`code` and a JSON pointer to each input that is wrong.

Source: RFC 8259 (JSON), RFC 9457 (problems), RFC 6901 (pointers), RFC 9110 §13.1.1 (If-Match),
§8.8.3 (ETag).
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

MAX_BODY_BYTES: Final = 64 * 1024
MAX_LIMIT: Final = 100

_compact: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Request:
    """One request that has arrived as a whole.

    Attributes:
        path: below the management API's root: `/keys/key_…`.
        query: parameters; one that was sent twice was refused before.
        headers: by lower-case name.
        address: the caller's, as text; None: unknown.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    address: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered.

    Attributes:
        body: None: nothing but the status.
        replayed: what is told to who asks again with the same Idempotency-Key; None: the body.
            Whatever shows a secret says here what is told without it.
    """

    status: int
    body: Mapping[str, object] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    replayed: Mapping[str, object] | None = field(default=None, repr=False)


class Problem(Exception):
    """A request that is not done, told as RFC 9457 has it.

    Attributes:
        code: stable name, for programs.
        errors: pairs of JSON pointer and sentence, one for each input that is wrong.
        more: further members of the problem.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: tuple[tuple[str, str], ...] = (),
        *,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}
        self.more = more or {}

    def answer(self, request_id: str | None) -> Answer:
        """The answer that says so."""
        body: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.more,
        }
        if self.errors:
            body["errors"] = [
                {"pointer": pointer, "detail": detail} for pointer, detail in self.errors
            ]
        if request_id is not None:
            body["requestId"] = request_id
        headers = {"Content-Type": "application/problem+json", **self.headers}
        return Answer(self.status, body, headers)


class Body(BaseModel):
    """What a request's body may hold.  A name that is not here is refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
    )


class Query(BaseModel):
    """What a request's query may hold.  A name that is not here is refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, hide_input_in_errors=True
    )


_Body = TypeVar("_Body", bound=Body)
_Query = TypeVar("_Query", bound=Query)


def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The body as values.

    Raises:
        Problem: it is no JSON object, or which of its members are wrong.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.body and media_type not in ("application/json", "application/merge-patch+json"):
        raise Problem(
            415, "unsupported_media_type", "Send the body as JSON: Content-Type: application/json."
        )
    try:
        value = json.loads(
            request.body or b"{}", object_pairs_hook=_members, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        raise Problem(
            400, "malformed_body", "The body is no JSON object, or names a member twice."
        ) from None
    if type(value) is not dict:
        raise Problem(400, "malformed_body", "The body is no JSON object.")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid(_errors(error)) from None


def read_query(request: Request, kind: type[_Query]) -> _Query:
    """The query as values.  Raises Problem: which parameters are wrong."""
    try:
        return kind.model_validate(dict(request.query))
    except ValidationError as error:
        raise invalid(_errors(error)) from None


def invalid(errors: tuple[tuple[str, str], ...]) -> Problem:
    """The problem of inputs that break rules."""
    told = " ".join(f"{pointer.lstrip('/') or 'body'}: {text}." for pointer, text in errors[:3])
    return Problem(400, "invalid_input", told or "An input is wrong.", errors)


def etag_of(told: Mapping[str, object], *, without: tuple[str, ...] = ()) -> str:
    """What changes with each edit of a thing.

    Args:
        without: members that change by themselves, such as counts.
    """
    edited = {name: value for name, value in told.items() if name not in without}
    return f'"{hashlib.sha256(_compact(edited).encode()).hexdigest()[:24]}"'


def require_match(request: Request, current: str) -> None:
    """Do nothing, if whoever edits has seen the thing as it is now.

    Raises:
        Problem: 428 without If-Match, 412 with another one; both tell the current ETag.
    """
    given = request.headers.get("if-match")
    if given is None:
        raise Problem(
            428,
            "precondition_required",
            "Read it first and send its ETag as If-Match, so that nobody's edit is lost.",
            headers={"ETag": current},
        )
    tags = [tag.strip() for tag in given.split(",")]
    if "*" not in tags and current not in tags:
        raise Problem(
            412,
            "precondition_failed",
            "Somebody has changed it since you read it: read it again.",
            headers={"ETag": current},
        )


def cursor(position: str, scope: str) -> str:
    """Where a list goes on.  It is good for the same list only.

    Args:
        scope: what the list is of: its route, organization and filters.
    """
    text = f"{position} {_check_of(position, scope)}"
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode("ascii")


def position_of(text: str | None, scope: str) -> str:
    """The position that `cursor` wrote; empty for the beginning.

    Raises:
        Problem: it is none, or another list's.
    """
    if text is None:
        return ""
    try:
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        decoded = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
        position, check = decoded.rsplit(" ", 1)
    except ValueError:
        position = check = ""
    if not position or check != _check_of(position, scope) or cursor(position, scope) != text:
        raise invalid((("/cursor", "is the nextCursor of the page before, with the same filters"),))
    return position


def page(data: list[dict[str, object]], position: str | None, scope: str) -> Answer:
    """One page of a list.

    Args:
        position: where the next page begins; None: this was the last.
    """
    following = None if position is None else cursor(position, scope)
    body = {"data": data, "nextCursor": following, "hasMore": following is not None}
    return Answer(200, body)


def _check_of(position: str, scope: str) -> str:
    return hashlib.sha256(f"{scope}\0{position}".encode()).hexdigest()[:12]


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


#: pydantic's kinds of errors → what is told; others tell pydantic's own sentence.
_SENTENCES: Final = {
    "extra_forbidden": "there is no such input: check its spelling",
    "missing": "is missing",
}


def _errors(error: ValidationError) -> tuple[tuple[str, str], ...]:
    """Pointers and sentences; never the input, which may be a secret in the wrong place."""
    found = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        is_unknown = problem["type"] == "extra_forbidden"
        # An unknown name is input as well.
        parts = [str(part) for part in problem["loc"]]
        path = parts[:-1] if is_unknown else parts
        named = [part.replace("~", "~0").replace("/", "~1") for part in path]
        if is_unknown and parts and _is_name(parts[-1]):
            named.append(parts[-1])
        told = _SENTENCES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        found.append(("/" + "/".join(named) if named else "", told[:1].lower() + told[1:]))
    return tuple(found)


def _is_name(text: str) -> bool:
    """Whether a text can only be a name that somebody misspelled, and no secret."""
    return text.isidentifier() and text.isascii() and len(text) <= 24  # noqa: PLR2004
