"""From bytes to a request, and from an answer to bytes.

Bodies are parsed here and nowhere else: form-encoded, at most 16 KiB and 32 parameters, UTF-8,
no parameter twice.  No other format is ever given to a parser.

Source: RFC 6749 §2.3.1 (client credentials), §3.2 (parameters), appendix B (form encoding);
RFC 7617 §2 (Basic); RFC 6750 §2.1 (Bearer); RFC 9110 §15.5.14, §15.5.16 (413, 415).
"""

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_plus

from coatcheck import apikey
from coatcheck.client_address import Address, Network, client_address
from coatcheck.server.oauth.errors import OAuthError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
#: What an Authlib grant or endpoint returns: status, body (bytes are JSON already), headers.
Answer = tuple[int, Mapping[str, object] | bytes, Sequence[tuple[str, str]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES: Final = 16 * 1024
MAX_PARAMETERS: Final = 32

_FORM: Final = b"application/x-www-form-urlencoded"
#: RFC 3986 §2.1.  Python's parser would leave it as it is, and another one might not.
_BROKEN_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
#: RFC 8707 §2 and RFC 8693 §2.1 let these two be repeated; no other parameter may be.
_REPEATABLE: Final = frozenset({"resource", "audience"})
_COMPARED: Final = frozenset(
    {
        *("scope", "client_id", "client_secret", "token", "token_type_hint", "subject_token"),
        *_REPEATABLE,
    }
)
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

    def __init__(self, label: str) -> None:
        #: Its value; reading that of an enumeration takes five times as long.
        self.label = label

    @property
    def challenge_scheme(self) -> str | None:
        """The scheme of `WWW-Authenticate`; None where a challenge would hide our text."""
        if self is Mechanism.FORM:
            return None
        return "Bearer" if self is Mechanism.BEARER else "Basic"


class Credential(NamedTuple):
    """What a request presents as its API key.

    A tuple, as the others here are: a frozen dataclass takes three times as long to make.

    Attributes:
        secret: None when there is none, or what was sent cannot be one.
        client_id: None when none was sent.
        digest: that of the secret, as it is looked up.
    """

    mechanism: Mechanism
    secret: str | None = None
    client_id: str | None = None
    digest: bytes | None = None

    def __repr__(self) -> str:
        return f"Credential({self.mechanism})"


class FormRequest(NamedTuple):
    """A request to one of the OAuth endpoints, read and parsed.

    Attributes:
        form: its parameters; one without value is absent (RFC 6749 §3.2).
        audiences: every `resource` and `audience`.
        address: the caller's; None when it cannot be known.
        now: seconds since the epoch, taken before anything was looked up.
    """

    form: dict[str, str]
    audiences: tuple[str, ...]
    credential: Credential
    address: Address | None
    now: int

    def __repr__(self) -> str:
        return f"FormRequest({self.credential}, address={self.address}, now={self.now})"


class Reply(NamedTuple):
    """An answer, ready to be sent.

    Attributes:
        error, code: what the body says of a failure, for the counts; empty if there was none.
    """

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]]
    error: str = ""
    code: str = ""

    def __repr__(self) -> str:
        return f"Reply({self.status})"

    async def send(self, send: Send) -> None:
        headers = list(self.headers)
        # RFC 9110 §8.6: none where there can be no body.
        if self.status != HTTPStatus.NO_CONTENT:
            headers.append((b"content-length", b"%d" % len(self.body)))
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
    """A JSON answer with the headers that every answer of these endpoints has.

    Args:
        body: what is written as JSON; bytes are JSON already.
    """
    written = body if isinstance(body, bytes) else _to_json(body).encode()
    if not headers:
        return Reply(status, written, _ALWAYS)
    extra = tuple((name.lower().encode(), value.encode()) for name, value in headers)
    return Reply(status, written, _ALWAYS + extra)


def read_head(scope: Scope) -> dict[bytes, bytes]:
    """The header fields of a request whose body is worth reading, by name in lower case.

    1. The method is POST, nothing secret is in the query.
    2. The body is form-encoded, not compressed, not announced too long.

    Raises:
        OAuthError: which rule the request breaks, and what to send instead.
    """
    # 1
    if scope["method"] != "POST":
        raise OAuthError.method_not_allowed("POST")
    if scope["query_string"]:
        _refuse_secrets(scope["query_string"])
    headers = _headers(scope["headers"])
    # 2
    if b"content-encoding" in headers:
        raise OAuthError.unsupported_encoding()
    content_type = headers.get(b"content-type", b"")
    if content_type != _FORM and content_type.partition(b";")[0].strip().lower() != _FORM:
        raise OAuthError.invalid_request(
            "Send the parameters as application/x-www-form-urlencoded in the body."
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise OAuthError.too_large()
    return headers


async def read_body(receive: Receive) -> bytes:
    """The body, as far as it is not too long.  How long it may take is the listener's business.

    Raises:
        OAuthError: the client went away before its end.
    """
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise OAuthError.invalid_request("The body ended before its announced length.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES or not message.get("more_body"):
            return body


def read(
    scope: Scope,
    headers: Mapping[bytes, bytes],
    body: bytes,
    *,
    trusted_proxies: Sequence[Network],
    now: int,
) -> FormRequest:
    """A request whose body has arrived.

    3. The body is not too long.
    4. Each parameter is there once; no value means absent.
    5. There is one credential, by one mechanism.

    Args:
        headers: from `read_head`.

    Raises:
        OAuthError: as `read_head`.
    """
    # 3
    if len(body) > MAX_BODY_BYTES:
        raise OAuthError.too_large()
    # 4
    form, audiences = _parse(body)
    # 5
    credential = _credential(headers.get(b"authorization"), form)
    peer = scope.get("client")
    forwarded_for = headers.get(b"x-forwarded-for", b"").decode("latin-1")
    address = client_address(peer[0] if peer else None, forwarded_for, trusted_proxies)
    return FormRequest(form, audiences, credential, address, now)


def _headers(lines: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Header fields by name; lines of one name are joined.

    Raises:
        OAuthError: there are two Authorization headers.

    Source: RFC 9110 §5.3 (joining), §11.6.2 (Authorization is one value).
    """
    headers = dict(lines)
    if len(headers) == len(lines):
        return headers
    joined: dict[bytes, bytes] = {}
    for name, value in lines:
        if name not in joined:
            joined[name] = value
        elif name == b"authorization":
            raise OAuthError.invalid_request("There are two Authorization headers; send one.")
        else:
            joined[name] += b", " + value
    return joined


def _parse(body: bytes) -> tuple[dict[str, str], tuple[str, ...]]:
    form: dict[str, str] = {}
    audiences: tuple[str, ...] = ()
    has_empty = False
    for name, value in _pairs(body):
        if name in form:
            raise OAuthError.invalid_request("A parameter is sent twice; send each of them once.")
        if name in _REPEATABLE:
            audiences += (value,) if value else ()
            continue
        form[name] = value
        has_empty = has_empty or not value
    if has_empty:
        form = {name: value for name, value in form.items() if value}
    return form, audiences


def _pairs(body: bytes) -> Iterable[tuple[str, str]]:
    """Names and values in order, decoded.

    As `urllib.parse.parse_qsl`, which is the oracle in the tests, at a third of its cost.

    Source: URL Standard §5.1 (application/x-www-form-urlencoded parsing).
    """
    if body.count(b"&") >= MAX_PARAMETERS:
        raise OAuthError.invalid_request(f"The body has more than {MAX_PARAMETERS} parameters.")
    try:
        text = body.decode()
        pairs = [part.partition("=")[::2] for part in text.split("&") if part]
        if "%" in text or "+" in text:
            if _BROKEN_PERCENT.search(body):
                raise OAuthError.invalid_request(
                    "A percent sign in the body is not followed by two hexadecimal digits; write"
                    " %25."
                )
            decoded = partial(unquote_plus, errors="strict")
            pairs = [(decoded(name), decoded(value)) for name, value in pairs]
    except UnicodeDecodeError:
        raise OAuthError.invalid_request("The body is not UTF-8.") from None
    if "\0" in text or "%00" in text:
        _refuse_nul(pairs)
    return pairs


def _refuse_nul(pairs: Iterable[tuple[str, str]]) -> None:
    """Whatever is done with a parameter, no text with a NUL gets there.

    Where it is compared with what we know it matches nothing, which is told as such.
    """
    for name, value in pairs:
        if "\0" in name or ("\0" in value and name not in _COMPARED):
            raise OAuthError.invalid_request("A parameter holds a NUL character.")


def _credential(authorization: bytes | None, form: Mapping[str, str]) -> Credential:
    form_id = form.get("client_id")
    form_secret = form.get("client_secret")
    asserted = "client_assertion" in form or "client_assertion_type" in form
    if authorization is not None:
        if form_secret is not None or asserted:
            # RFC 6749 §2.3: not more than one authentication method in a request.
            raise OAuthError.invalid_request(
                "The API key is sent twice, in the Authorization header and in the body; send it"
                " once."
            )
        return _from_header(authorization, form_id)
    if asserted:
        if form_secret is not None:
            raise OAuthError.invalid_request(
                "There are two credentials, a client_secret and a client_assertion; send the API"
                " key as client_secret."
            )
        # RFC 7523 §2.2 is not supported: the request is authenticated by nothing we know.
        return Credential(Mechanism.FORM, None, form_id)
    if form_secret is not None:
        return Credential(Mechanism.FORM, form_secret, form_id, apikey.digest(form_secret))
    return Credential(Mechanism.NONE if form_id is None else Mechanism.FORM, None, form_id)


def _from_header(value: bytes, form_id: str | None) -> Credential:
    scheme, _, rest = value.partition(b" ")
    rest = rest.strip(b" ")
    kind = scheme.lower()
    if kind == b"bearer":
        secret = rest.decode("latin-1")
        return Credential(Mechanism.BEARER, secret, form_id, apikey.digest(secret))
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
    return Credential(Mechanism.BASIC, secret, client_id or form_id, apikey.digest(secret))


def _refuse_secrets(query: bytes) -> None:
    names = {part.partition(b"=")[0] for part in query.split(b"&")}
    if any(unquote_plus(name.decode("latin-1")) in _SECRET_PARAMETERS for name in names):
        raise OAuthError.invalid_request(
            "Credentials do not belong in the URL, where logs keep them: send them in the body or"
            " in the Authorization header, and rotate this API key."
        )
