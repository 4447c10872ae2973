"""From bytes to a request, and from an answer to bytes.

Bodies are parsed here and nowhere else: form-encoded, at most 16 KiB and 32 parameters, UTF-8,
no parameter twice.  No other format is ever given to a parser.

Source: RFC 6749 §2.3.1 (client credentials), §3.2 (parameters), appendix B (form encoding);
RFC 7617 §2 (Basic); RFC 6750 §2.1 (Bearer); RFC 9110 §15.5.14, §15.5.16 (413, 415).
"""

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_plus

from coatcheck.client_address import Address, Network, client_address
from coatcheck.server.oauth.errors import OAuthError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
#: What an Authlib grant or endpoint returns: status, body, headers.
Answer = tuple[int, Mapping[str, object], Sequence[tuple[str, str]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES: Final = 16 * 1024
MAX_PARAMETERS: Final = 32
#: Seconds from the head of a request to the end of its body.
BODY_TIMEOUT: Final = 10

_FORM: Final = b"application/x-www-form-urlencoded"
#: RFC 3986 §2.1.  Python's parser would leave it as it is, and another one might not.
_BROKEN_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
#: RFC 8707 §2 and RFC 8693 §2.1 let these two be repeated; no other parameter may be.
_REPEATABLE: Final = frozenset({"resource", "audience"})
#: RFC 6749 §2.3.1: credentials never in the URI.  Named so that other query parameters pass.
_SECRET_PARAMETERS: Final = frozenset(
    {
        "client_id",
        "client_secret",
        "client_assertion",
        "api_key",
        "access_token",
        "token",
        "subject_token",
    }
)


class Mechanism(Enum):
    """How a request authenticates."""

    NONE = "none"
    BASIC = "basic"
    BEARER = "bearer"
    FORM = "form"

    @property
    def challenge_scheme(self) -> str | None:
        """The scheme of `WWW-Authenticate`; None where a challenge would hide our text."""
        if self is Mechanism.FORM:
            return None
        return "Bearer" if self is Mechanism.BEARER else "Basic"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a request presents as its API key.

    Attributes:
        secret: None when there is none, or what was sent cannot be one.
        client_id: None when none was sent.
    """

    mechanism: Mechanism
    secret: str | None = field(default=None, repr=False)
    client_id: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class FormRequest:
    """A request to one of the OAuth endpoints, read and parsed.

    Attributes:
        form: its parameters; one without value is absent (RFC 6749 §3.2).
        audiences: every `resource` and `audience`.
        address: the caller's; None when it cannot be known.
        now: seconds since the epoch, taken before anything was looked up.
    """

    form: Mapping[str, str] = field(repr=False)
    audiences: tuple[str, ...]
    credential: Credential
    address: Address | None
    now: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, ready to be sent."""

    status: int
    body: bytes = field(repr=False)
    headers: Sequence[tuple[bytes, bytes]]

    async def send(self, send: Send) -> None:
        length = (b"content-length", b"%d" % len(self.body))
        headers = [*self.headers, length]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


#: RFC 6749 §5.1 asks for both on every answer that holds a token; errors get them as well.
_ALWAYS: Final = (
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"pragma", b"no-cache"),
)
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def json_reply(status: int, body: object, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """A JSON answer with the headers that every answer of these endpoints has."""
    extra = tuple((name.lower().encode(), value.encode()) for name, value in headers)
    return Reply(status, _to_json(body).encode(), _ALWAYS + extra)


async def read(
    scope: Scope, receive: Receive, *, trusted_proxies: Sequence[Network], now: int
) -> FormRequest:
    """Read one request.

    1. The method is POST, nothing secret is in the query.
    2. The body is form-encoded, not compressed, not too long.
    3. Each parameter is there once; no value means absent.
    4. There is one credential, by one mechanism.

    Raises:
        OAuthError: which rule the request breaks, and what to send instead.
    """
    # 1
    if scope["method"] != "POST":
        raise OAuthError.method_not_allowed("POST")
    if scope["query_string"]:
        _refuse_secrets(scope["query_string"])
    headers = _Headers.of(scope["headers"])
    # 2
    if headers.content_encoding:
        raise OAuthError.unsupported_encoding()
    if headers.content_type.partition(b";")[0].strip().lower() != _FORM:
        raise OAuthError.invalid_request(
            "Send the parameters as application/x-www-form-urlencoded in the body."
        )
    body = await _read_body(receive, headers.content_length)
    # 3
    form, audiences = _parse(body)
    # 4
    credential = _credential(headers.authorization, form)
    peer = scope.get("client")
    address = client_address(peer[0] if peer else None, headers.forwarded_for, trusted_proxies)
    return FormRequest(form, audiences, credential, address, now)


@dataclass(slots=True)
class _Headers:
    authorization: list[bytes] = field(default_factory=list)
    forwarded_for: list[str] = field(default_factory=list)
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: bytes = b""

    @classmethod
    def of(cls, headers: Sequence[tuple[bytes, bytes]]) -> "_Headers":
        found = cls()
        for name, value in headers:
            if name == b"authorization":
                found.authorization.append(value)
            elif name == b"content-type":
                found.content_type = value
            elif name == b"content-length":
                found.content_length = value
            elif name == b"content-encoding":
                found.content_encoding = value
            elif name == b"x-forwarded-for":
                found.forwarded_for.append(value.decode("latin-1"))
        return found


async def _read_body(receive: Receive, content_length: bytes) -> bytes:
    if content_length.isdigit() and int(content_length[:20]) > MAX_BODY_BYTES:
        raise OAuthError.too_large()
    body = await _read_whole(receive)
    if len(body) > MAX_BODY_BYTES:
        raise OAuthError.too_large()
    return body


async def _read_whole(receive: Receive) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise OAuthError.invalid_request("The body ended before its announced length.")
                body += message.get("body", b"")
                if not message.get("more_body") or len(body) > MAX_BODY_BYTES:
                    return bytes(body)
    except TimeoutError:
        raise OAuthError.too_slow() from None


def _parse(body: bytes) -> tuple[dict[str, str], tuple[str, ...]]:
    if _BROKEN_PERCENT.search(body):
        raise OAuthError.invalid_request(
            "A percent sign in the body is not followed by two hexadecimal digits; write %25."
        )
    try:
        pairs = parse_qsl(
            body.decode("utf-8"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except UnicodeDecodeError:
        raise OAuthError.invalid_request("The body is not UTF-8.") from None
    except ValueError:
        raise OAuthError.invalid_request(
            f"The body has more than {MAX_PARAMETERS} parameters."
        ) from None
    form: dict[str, str] = {}
    audiences: list[str] = []
    seen: set[str] = set()
    for name, value in pairs:
        if name in _REPEATABLE:
            if value:
                audiences.append(value)
            continue
        if name in seen:
            raise OAuthError.invalid_request("A parameter is sent twice; send each of them once.")
        seen.add(name)
        if value:
            form[name] = value
    return form, tuple(audiences)


def _credential(authorization: list[bytes], form: Mapping[str, str]) -> Credential:
    if len(authorization) > 1:
        raise OAuthError.invalid_request("There are two Authorization headers; send one.")
    form_id = form.get("client_id")
    form_secret = form.get("client_secret")
    asserted = "client_assertion" in form or "client_assertion_type" in form
    if authorization:
        if form_secret is not None or asserted:
            # RFC 6749 §2.3: not more than one authentication method in a request.
            raise OAuthError.invalid_request(
                "The API key is sent twice, in the Authorization header and in the body; send it"
                " once."
            )
        return _from_header(authorization[0], form_id)
    if asserted:
        if form_secret is not None:
            raise OAuthError.invalid_request(
                "There are two credentials, a client_secret and a client_assertion; send the API"
                " key as client_secret."
            )
        # RFC 7523 §2.2 is not supported: the request is authenticated by nothing we know.
        return Credential(Mechanism.FORM, None, form_id)
    if form_secret is None and form_id is None:
        return Credential(Mechanism.NONE)
    return Credential(Mechanism.FORM, form_secret, form_id)


def _from_header(value: bytes, form_id: str | None) -> Credential:
    scheme, _, rest = value.partition(b" ")
    rest = rest.strip(b" ")
    kind = scheme.lower()
    if kind == b"bearer":
        return Credential(Mechanism.BEARER, rest.decode("latin-1"), form_id)
    if kind != b"basic":
        return Credential(Mechanism.BASIC, None, form_id)
    try:
        # RFC 7617 §2: user-id and password are split at the first colon.  RFC 6749 §2.3.1:
        # each half was form-encoded before; several clients encode even "_" and "-".
        user, colon, password = base64.b64decode(rest, validate=True).decode().partition(":")
        user, password = (unquote_plus(half, errors="strict") for half in (user, password))
    except (binascii.Error, UnicodeDecodeError):
        return Credential(Mechanism.BASIC, None, form_id)
    if not colon:
        return Credential(Mechanism.BASIC, None, form_id)
    # `KEY:` is what tools send that know one secret only.
    client_id, secret = (user or None, password) if password else (None, user)
    if form_id is not None and client_id is not None and form_id != client_id:
        raise OAuthError.invalid_request(
            "The client_id in the body differs from the one in the Authorization header."
        )
    return Credential(Mechanism.BASIC, secret, client_id or form_id)


def _refuse_secrets(query: bytes) -> None:
    names = {part.partition(b"=")[0] for part in query.split(b"&")}
    if any(unquote_plus(name.decode("latin-1")) in _SECRET_PARAMETERS for name in names):
        raise OAuthError.invalid_request(
            "Credentials do not belong in the URL, where logs keep them: send them in the body or"
            " in the Authorization header, and rotate this API key."
        )
