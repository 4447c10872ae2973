"""Requests that are nearly right, over plain sockets: no 5xx, no trace, no secret in return.

A plan says how a good request is spoilt; secrets stand in it under a name, so that a plan that
was found does the same to the next service.
"""

import base64
import json
import re
import socket
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from fuzz.target import TRACE, Tally, Target, fuzz
from support.wire import DESCRIPTION, FORM, connect

#: Seconds to wait for an answer that may never come, because the request has no end.
IMPATIENCE: Final = 0.05
#: Seconds after which a service that was told that nothing more comes has to be done.
PATIENCE: Final = 5


@dataclass(frozen=True)
class Base:
    """A good request."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    parameters: tuple[tuple[bytes, bytes], ...] = ()


GRANT: Final = (b"grant_type", b"client_credentials")
SECRET: Final = (b"client_secret", b"<KEY>")
BASIC: Final = (b"Authorization", b"Basic <ID>:<KEY>")
BEARER: Final = (b"Authorization", b"Bearer <KEY>")
EXCHANGE: Final = (
    (b"grant_type", b"urn:ietf:params:oauth:grant-type:token-exchange"),
    (b"client_secret", b"<SERVICE>"),
    (b"subject_token", b"<KEY>"),
    (b"subject_token_type", b"<ISSUER>/token-types/api-key"),
    (b"client_address", b"203.0.113.7"),
    (b"presented_in", b"header"),
)
FORM_HEADER: Final = (b"Content-Type", FORM.encode())
PAGES: Final = (
    b"/.well-known/jwks.json",
    b"/.well-known/oauth-authorization-server",
    b"/.well-known/openid-configuration",
    b"/.well-known/coatcheck",
    b"/oauth/revocations?after=0&wait=0",
    b"/oauth/authorize?client_id=x&response_type=code",
    b"/docs",
    b"/healthz",
    b"/readyz",
    b"/",
    b"/nothing",
)
BASES: Final = (
    Base(b"POST", b"/oauth/token", (FORM_HEADER,), (GRANT, SECRET)),
    Base(b"POST", b"/oauth/token", (FORM_HEADER,), (GRANT, (b"client_id", b"<ID>"), SECRET)),
    Base(b"POST", b"/oauth/token", (FORM_HEADER, BASIC), (GRANT, (b"scope", b"widgets:read"))),
    Base(b"POST", b"/oauth/token", (FORM_HEADER, BEARER), (GRANT, (b"scope", b"a@P/Site/42"))),
    Base(b"POST", b"/oauth/token", (FORM_HEADER,), EXCHANGE),
    Base(b"POST", b"/oauth/introspect", (FORM_HEADER,), (SECRET, (b"token", b"<TOKEN>"))),
    Base(b"POST", b"/oauth/introspect", (FORM_HEADER, BEARER), ((b"token", b"<KEY>"),)),
    Base(b"POST", b"/oauth/revoke", (FORM_HEADER, BASIC), ((b"token", b"<KEY>.x.y"),)),
    Base(b"POST", b"/oauth/revoke", (FORM_HEADER,), (SECRET, (b"token", b"garbage"))),
    *(Base(b"GET", page) for page in PAGES),
)

SECRETS: Final = (b"<KEY>", b"<SERVICE>", b"<KEY>x", b"Bearer <KEY>", b"Basic <ID>:<KEY>")
#: Values that have been trouble to somebody.
ODD: Final = (
    *(b"", b" ", b"\0", b"%00", b"%", b"%zz", b"%C0%AF", b"%ED%A0%80", b"\xff", b"+", b"%2B"),
    *(b"%0D%0AX-Evil:%201", b"\r\nX-Evil: 1", b"\n", b";", b"&", b"=", b"a" * 5000, b"9" * 400),
    *(b"-1", b"1e400", b"NaN", b"null", b"true", b"[]", b"{}", b"../../etc/passwd", b"%2e%2e/"),
    *(b"http://evil.example/", b"//evil.example", b"*", b"#", b"a@P/#", b"\xf0\x9f\x94\x91"),
    *(b"' OR '1'='1", b'"', b"\\", b"<script>", b"${x}", b"{{7*7}}", b"%s%n", b"a.b.c", b"..."),
)
HEADERS: Final = (
    *(b"Authorization", b"X-API-Key", b"Cookie", b"X-Forwarded-For", b"Forwarded", b"Host"),
    *(b"X-Forwarded-Host", b"X-Forwarded-Proto", b"X-Original-URL", b"Content-Type", b"Accept"),
    *(b"Content-Encoding", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade"),
    *(b"Expect", b"Range", b"If-None-Match", b"Origin", b"Referer", b"User-Agent", b"TE", b"X"),
    *(b"Proxy-Authorization", b"Trailer", b"Accept-Encoding", b"X-HTTP-Method-Override"),
)
VALUES: Final = (
    *(b"chunked", b"gzip, chunked", b"gzip", b"close", b"keep-alive", b"Upgrade", b"h2c", b"0"),
    *(b"100-continue", b"5", b"1000", b"-1", b"bytes=0-1", b"*", b'"x"', b"127.0.0.1", b"::1"),
    *(FORM.encode(), b"application/json", b"multipart/form-data; boundary=x", b"DELETE", b"GET"),
)
NAMES: Final = (
    *(b"grant_type", b"scope", b"resource", b"audience", b"client_id", b"client_secret", b"token"),
    *(b"subject_token", b"subject_token_type", b"client_address", b"presented_in", b"after"),
    *(b"wait", b"token_type_hint", b"client_assertion", b"client_assertion_type", b"x", b"api_key"),
    *(b"access_token", b"requested_token_type", b"actor_token", b"%67rant_type"),
)
METHODS: Final = (b"GET", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"TRACE", b"PATCH", b"post", b"X")


@dataclass(frozen=True)
class Edit:
    """Something done to one place; `at` is taken modulo the number of places."""

    what: str
    at: int
    name: bytes = b""
    value: bytes = b""


@dataclass(frozen=True)
class Plan:
    """How a good request is spoilt.

    Attributes:
        edits: of parameters and headers.
        length: bytes by which Content-Length is wrong; None sends the body in chunks.
        flips: changes of the bytes that would be sent, each at a thousandth of them.
        pieces: thousandths at which a packet ends.
    """

    base: Base
    edits: tuple[Edit, ...]
    length: int | None
    is_closing: bool
    flips: tuple[Edit, ...]
    pieces: tuple[int, ...]


places = st.integers(0, 999)
texts = st.sampled_from(ODD + SECRETS) | st.binary(max_size=12)
edits = st.one_of(
    st.builds(Edit, st.just("plant"), places, st.sampled_from(NAMES), st.sampled_from(SECRETS)),
    st.builds(
        Edit,
        st.sampled_from(["drop", "double", "swap", "encode"]),
        places,
        st.sampled_from([b"parameter", b"header"]),
    ),
    st.builds(Edit, st.just("set parameter"), places, value=texts),
    st.builds(Edit, st.just("add parameter"), places, st.sampled_from(NAMES) | texts, texts),
    st.builds(
        Edit,
        st.just("add header"),
        places,
        st.sampled_from(HEADERS),
        st.sampled_from(VALUES) | texts,
    ),
    st.builds(Edit, st.just("set header"), places, value=st.sampled_from(VALUES) | texts),
    st.builds(Edit, st.just("add to query"), places, st.sampled_from(NAMES) | texts, texts),
    st.builds(Edit, st.just("add to path"), places, value=texts),
    st.builds(Edit, st.just("set method"), places, value=st.sampled_from(METHODS)),
)
flips = st.builds(
    Edit,
    st.sampled_from(["flip", "insert", "cut", "repeat", "end"]),
    places,
    value=st.binary(min_size=1, max_size=4),
)
plans = st.builds(
    Plan,
    st.sampled_from(BASES),
    st.lists(edits, max_size=3).map(tuple),
    st.just(0) | st.sampled_from([0, 0, None, None, 1, -1, 5000]),
    st.integers(0, 9).map(bool),
    st.just(()) | st.just(()) | st.lists(flips, max_size=3).map(tuple),
    st.just(()) | st.lists(places, max_size=3).map(tuple),
)


# --- from a plan to bytes


def bytes_of(plan: Plan, target: Target) -> list[bytes]:
    """What is sent, packet by packet."""
    method, path = plan.base.method, plan.base.target
    headers, parameters = list(plan.base.headers), list(plan.base.parameters)
    for edit in plan.edits:
        match edit.what:
            case "set method":
                method = edit.value
            case "add to query":
                path += (b"&" if b"?" in path else b"?") + edit.name + b"=" + edit.value
            case "add to path":
                before, question, query = path.partition(b"?")
                path = before + edit.value + question + query
            case _:
                spoil(headers, parameters, edit)
    body = b"&".join(name + b"=" + value for name, value in parameters)
    body = target.filled(body)
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: auth.example.com"]
    lines += [name + b": " + value for name, value in headers]
    if plan.is_closing:
        lines.append(b"Connection: close")
    if plan.length is None:
        lines.append(b"Transfer-Encoding: chunked")
        half = len(body) // 2
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
        body += b"0\r\n\r\n"
    elif body or plan.length:
        lines.append(b"Content-Length: %d" % max(len(body) + plan.length, 0))
    whole = with_basic(target.filled(b"\r\n".join(lines))) + b"\r\n\r\n" + body
    for flip in plan.flips:
        whole = flipped(whole, flip)
    ends = sorted(place * len(whole) // 1000 for place in plan.pieces)
    return [
        whole[begin:end]
        for begin, end in zip([0, *ends], [*ends, len(whole)], strict=True)
        if begin < end
    ]


def spoil(
    headers: list[tuple[bytes, bytes]], parameters: list[tuple[bytes, bytes]], edit: Edit
) -> None:
    if edit.what == "plant":
        # In place of what is there, so that the rest of the request stays good.
        parameters[:] = [pair for pair in parameters if pair[0] != edit.name]
        parameters.append((edit.name, edit.value))
    elif edit.what == "add header":
        headers.insert(edit.at % (len(headers) + 1), (edit.name, edit.value))
    elif edit.what == "add parameter":
        parameters.insert(edit.at % (len(parameters) + 1), (edit.name, edit.value))
    else:
        of_headers = edit.what == "set header" or edit.name == b"header"
        pairs = headers if of_headers else parameters
        if not pairs:
            return
        at = edit.at % len(pairs)
        name, value = pairs[at]
        match edit.what:
            case "drop":
                del pairs[at]
            case "double":
                pairs.append((name, value))
            case "swap":
                pairs[0], pairs[at] = pairs[at], pairs[0]
            case "encode":
                pairs[at] = (name, b"".join(b"%%%02x" % byte for byte in value))
            case _:
                pairs[at] = (name, edit.value)


def with_basic(head: bytes) -> bytes:
    """Basic credentials in base64, which a plan writes plainly."""

    return re.sub(rb"Basic ([^\r\n ]+)", lambda found: b"Basic " + base64.b64encode(found[1]), head)


def flipped(whole: bytes, flip: Edit) -> bytes:
    at = flip.at * len(whole) // 1000
    match flip.what:
        case "flip" if whole:
            return whole[:at] + bytes([whole[at] ^ flip.value[0]]) + whole[at + 1 :]
        case "insert":
            return whole[:at] + flip.value + whole[at:]
        case "cut":
            return whole[:at] + whole[at + flip.value[0] :]
        case "repeat":
            return whole[: at + 20] + whole[at:]
    return whole[:at]


# --- what comes back


def ask(target: Target, pieces: list[bytes]) -> bytes:
    """Everything that is answered; the connection is closed."""
    with closing(connect(target.live, PATIENCE)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
        connection.settimeout(IMPATIENCE)
        received = b""
        is_waiting = True
        while True:
            try:
                part = connection.recv(65_536)
            except ConnectionResetError:
                return received
            except TimeoutError:
                assert is_waiting, "half a request, its end, and the connection stays open"
                is_waiting = False
                # Answered, and the connection is kept: or the request has no end.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                connection.settimeout(PATIENCE)
                continue
            if not part:
                return received
            received += part


KNOWN_HEADERS: Final = frozenset(
    (
        *("content-type", "content-length", "cache-control", "pragma", "connection", "date"),
        *("www-authenticate", "allow", "retry-after", "etag", "location", "vary"),
        *("content-security-policy", "x-content-type-options", "referrer-policy", "x-request-id"),
        "access-control-allow-origin",
    )
)
#: They show code to copy.
PAGES_FOR_PEOPLE: Final = ("text/html; charset=utf-8", "application/yaml")


def look_at_answers(received: bytes, target: Target, tally: Tally) -> None:
    """Take the answers apart and look at each."""
    target.require_no_secret("an answer", received)
    if not received:
        tally.outcomes["nothing"] += 1
    while received:
        head, blank, rest = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z ]+", status_line)
        assert found, received
        assert blank, received
        status = int(found[1])
        tally.outcomes[found[1]] += 1
        if status == 100:
            received = rest
            continue
        named = (line.partition(": ") for line in lines)
        headers = {name.lower(): value for name, _, value in named}
        # The answer to a HEAD has a length and no body.
        length = 0 if rest.startswith(b"HTTP/1.1 ") else int(headers["content-length"])
        look_at_one(status, headers, rest[:length])
        received = rest[length:]


def look_at_one(status: int, headers: dict[str, str], body: bytes) -> None:
    assert status < 500, (status, headers, body)
    assert set(headers) <= KNOWN_HEADERS, headers
    if status >= 400 or headers.get("content-type") not in PAGES_FOR_PEOPLE:
        assert not TRACE.search(body), body
    assert ("www-authenticate" in headers) == (status == 401)
    assert ("allow" in headers) == (status == 405)
    assert headers.get("location", "/docs").endswith("/docs")
    if status >= 400:
        assert headers["cache-control"] == "no-store"
    if status >= 400 and headers["content-type"] == "application/json" and body:
        said = json.loads(body)
        assert set(said) == {"error", "error_description", "code"}
        assert DESCRIPTION.fullmatch(said["error_description"])


def test_fuzz_raw_requests(target: Target, tally: Tally) -> None:
    """Whatever bytes come, each answer is a proper one, and the service goes on as before."""
    target.require_health()

    def look(plan: Plan) -> None:
        look_at_answers(ask(target, bytes_of(plan, target)), target, tally)

    fuzz(tally, plans, look, examples=200, after_each_round=target.require_health)
