"""A running service, asked over plain sockets: framing, sizes, floods.  RFC 9110, RFC 9112.

Every exchange here is read to its end, so an answer counts only once the connection is closed.
"""

import re
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import jwt
import pytest

from support.live import Live, a_service
from support.wire import (
    PATIENCE,
    Answer,
    answer_of,
    connect,
    exchange,
    head,
    in_chunks,
    of_length,
    read_to_the_end,
    refused_by_framing,
    send,
)

#: What an attacker hides behind a request whose end two parsers see in different places.
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def key(live: Live) -> str:
    """An API key of the running service."""
    made: str = live.api_key("widgets:read")["key"]
    return made


@pytest.fixture
def form(key: str) -> bytes:
    """The body of a good token request."""
    return f"grant_type=client_credentials&client_secret={key}".encode()


# --- T41: size


def endless(size: int, pieces: int = 0) -> Iterator[bytes]:
    """A body of this size, in pieces."""
    length = size // pieces if pieces else 50_000
    for _ in range(0, size, length):
        yield b"a" * length


def announced(size: int) -> Iterator[bytes]:
    yield head(f"Content-Length: {size}")
    yield from endless(size)


def unannounced(size: int) -> Iterator[bytes]:
    yield head("Transfer-Encoding: chunked")
    yield from in_chunks(endless(size))


TOO_LARGE: dict[str, Callable[[], Iterable[bytes]]] = {
    "1 MB": lambda: announced(MEGABYTE),
    "20 MB": lambda: announced(20 * MEGABYTE),
    "1 MB in chunks": lambda: unannounced(MEGABYTE),
    "20 MB in chunks": lambda: unannounced(20 * MEGABYTE),
    "one chunk of 20 MB": lambda: [
        head("Transfer-Encoding: chunked"),
        b"%x\r\n" % (20 * MEGABYTE),
        *endless(20 * MEGABYTE),
    ],
    "20 MB, only announced": lambda: [head(f"Content-Length: {20 * MEGABYTE}")],
    "20 MB, asking first": lambda: [
        head(f"Content-Length: {20 * MEGABYTE}", "Expect: 100-continue")
    ],
    "one byte too many": lambda: [head("Content-Length: 16385"), b"a" * 16_385],
}


@pytest.mark.parametrize("request_", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_body_that_is_too_large_is_refused_and_the_connection_closed(
    live: Live, request_: Callable[[], Iterable[bytes]]
) -> None:
    """
    T41: 413 before the body is there; what is still under way must not become a request.

    RFC 9110 §15.5.14.
    """
    answer = exchange(live, [*request_(), SMUGGLED])

    refused_by_framing(answer, 413)


def resident_bytes(live: Live) -> int:
    status = Path(f"/proc/{live.process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory and descriptors are read from /proc"
)


@needs_proc
def test_large_bodies_leave_memory_flat(live: Live) -> None:
    """T41: whoever may send may not fill the memory.  CWE-770."""
    exchange(live, unannounced(20 * MEGABYTE))
    before = resident_bytes(live)

    for _ in range(10):
        exchange(live, announced(20 * MEGABYTE))
        exchange(live, unannounced(20 * MEGABYTE))

    assert resident_bytes(live) - before < 10 * MEGABYTE


GRANT = b"grant_type=client_credentials"


def test_who_asks_whether_to_send_a_body_is_told_to_go_on(live: Live, form: bytes) -> None:
    """T41: `Expect: 100-continue` of a body that is small enough.  RFC 9110 §10.1.1."""
    with closing(connect(live)) as connection:
        connection.sendall(of_length(form, "Expect: 100-continue").removesuffix(form))
        assert connection.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(form)
        answer = answer_of(read_to_the_end(connection))

    assert answer.statuses == (200,)


def test_who_is_refused_before_it_sent_its_body_may_not_go_on(live: Live) -> None:
    """T41: it may send the body or its next request now; nobody can tell.  RFC 9110 §10.1.1."""
    asking = head("Content-Encoding: gzip", "Expect: 100-continue", "Content-Length: 200")

    answer = exchange(live, [asking, SMUGGLED])

    assert answer.statuses == (415,)


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_follows_an_early_answer_is_no_request(live: Live, size: int) -> None:
    """T41: a body that nobody reads is passed over; the connection goes on behind it."""
    request = head(f"Content-Length: {size}", target="/nothing")

    answer = exchange(live, [request, *endless(size, 10), SMUGGLED])

    assert answer.statuses == (404, 200)


def test_a_body_that_nobody_reads_has_an_end(live: Live) -> None:
    """T41: one megabyte of it, then the connection is closed."""
    request = head(f"Content-Length: {20 * MEGABYTE}", target="/nothing")

    answer = exchange(live, [request, *endless(20 * MEGABYTE), SMUGGLED])

    assert answer.statuses == (404,)


# --- T42, T43: framing

CHUNKED: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "one byte a chunk": lambda body: in_chunks(bytes([byte]) for byte in body),
    "one byte a chunk, at once": lambda body: [
        b"".join(in_chunks(bytes([byte]) for byte in body)),
    ],
    "one chunk": lambda body: in_chunks([body]),
    "capital digits and zeros": lambda body: [b"00%X\r\n%b\r\n0\r\n\r\n" % (len(body), body)],
    "an extension": lambda body: [b'%x;a="b;c"\r\n%b\r\n0;z\r\n\r\n' % (len(body), body)],
    "a trailer": lambda body: [b"%x\r\n%b\r\n0\r\nX-A: b\r\n\r\n" % (len(body), body)],
}


@pytest.mark.parametrize("chunks", CHUNKED.values(), ids=CHUNKED)
def test_a_body_in_proper_chunks_is_a_body(
    live: Live, form: bytes, chunks: Callable[[bytes], Iterable[bytes]]
) -> None:
    """T42: streaming clients send so.  RFC 9112 §7.1."""
    answer = exchange(
        live, [head("Transfer-Encoding: chunked", "Connection: close"), *chunks(form)]
    )

    assert answer.statuses == (200,)
    assert answer.json()["token_type"] == "Bearer"


BAD_CHUNKS = {
    "terminator missing": b"5\r\nabcde0\r\n\r\n",
    "terminator of other letters": b"5\r\nabcdeXX0\r\n\r\n",
    "longer than its size": b"3\r\nabcde\r\n0\r\n\r\n",
    "size of letters": b"zz\r\nabcde\r\n0\r\n\r\n",
    "size below zero": b"-5\r\nabcde\r\n0\r\n\r\n",
    "size with a plus": b"+5\r\nabcde\r\n0\r\n\r\n",
    "size with 0x": b"0x5\r\nabcde\r\n0\r\n\r\n",
    "size with a blank": b" 5\r\nabcde\r\n0\r\n\r\n",
    "size missing": b"\r\nabcde\r\n0\r\n\r\n",
    "size beyond 64 bits": b"10000000000000005\r\nabcde\r\n0\r\n\r\n",
    "lines without CR": b"5\nabcde\n0\n\n",
    "NUL in an extension": b"5;\0\r\nabcde\r\n0\r\n\r\n",
    "trailer that is no field": b"5\r\nabcde\r\n0\r\nabc\r\n\r\n",
    "trailer with a folded line": b"5\r\nabcde\r\n0\r\nX-A: b\r\n c\r\n\r\n",
    "trailer without CR": b"5\r\nabcde\r\n0\r\nX-A: b\n\r\n",
    "quote that does not end": b'5;a="b\r\nabcde\r\n0\r\n\r\n',
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_body_in_bad_chunks_is_refused_and_the_connection_closed(
    live: Live, chunks: bytes
) -> None:
    """T43: a proxy in front may see its end elsewhere.  RFC 9112 §7.1; CVE-2025-43859."""
    answer = exchange(live, head("Transfer-Encoding: chunked") + chunks + SMUGGLED)

    refused_by_framing(answer, 400)


BAD_LENGTHS = {
    "length and chunked": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "chunked and length": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "two lengths": ["Content-Length: 5", "Content-Length: 6"],
    "one length twice": ["Content-Length: 5", "Content-Length: 5"],
    "three lengths": ["Content-Length: 5", "Content-Length: 5", "Content-Length: 6"],
    "a list of lengths": ["Content-Length: 5, 5"],
    "a list of different lengths": ["Content-Length: 5, 6"],
    "a list with nothing": ["Content-Length: 5,"],
    "below zero": ["Content-Length: -1"],
    "plus": ["Content-Length: +5"],
    "a word": ["Content-Length: ten"],
    "hexadecimal": ["Content-Length: 0x5"],
    "a fraction": ["Content-Length: 5.0"],
    "a blank within": ["Content-Length: 1 0"],
    "nothing": ["Content-Length:"],
    "beyond 64 bits": ["Content-Length: 18446744073709551621"],
    "other digits": ["Content-Length: ５"],  # noqa: RUF001
    "blank before the colon": ["Content-Length : 5"],
    "blank before the other colon": ["Transfer-Encoding : chunked"],
    "identity": ["Transfer-Encoding: identity"],
    "almost chunked": ["Transfer-Encoding: xchunked"],
    "chunked with a parameter": ["Transfer-Encoding: chunked;q=1"],
    "chunked in quotes": ['Transfer-Encoding: "chunked"'],
    "chunked behind a vertical tab": ["Transfer-Encoding: \x0bchunked"],
    "not chunked at last": ["Transfer-Encoding: chunked, identity"],
    "nothing at last": ["Transfer-Encoding: chunked,"],
    "no coding": ["Transfer-Encoding:"],
    "chunked twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    "chunked twice in one line": ["Transfer-Encoding: chunked, chunked"],
    "compressed, then chunked": ["Transfer-Encoding: gzip, chunked"],
    "compressed, then chunked, in two lines": [
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked",
    ],
    "compressed only": ["Transfer-Encoding: gzip"],
    "identity, then chunked": ["Transfer-Encoding: identity, chunked"],
    "nothing, then chunked": ["Transfer-Encoding: , chunked"],
}


@pytest.mark.parametrize("lines", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_a_body_without_a_certain_end_is_refused_and_the_connection_closed(
    live: Live, lines: list[str]
) -> None:
    """T43: RFC 9112 §6.1, §6.3 (where a body ends), §5.1 (blanks); GHSA-v9pg-7xvm-68hf."""
    answer = exchange(live, head(*lines) + b"5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED)

    refused_by_framing(answer, 400)


def test_an_http_1_0_request_has_no_chunks(live: Live, form: bytes) -> None:
    """T43: whoever speaks HTTP/1.0 does not know them.  RFC 9112 §6.1."""
    request = head("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0")

    answer = exchange(live, [request, *in_chunks([form])])

    refused_by_framing(answer, 400)


def test_an_http_1_0_request_is_answered_and_the_connection_closed(live: Live, form: bytes) -> None:
    """T42: old proxies and health checks speak it, some without Host.  RFC 9112 §9.3."""
    request = head(f"Content-Length: {len(form)}", "Connection: keep-alive") + form
    old = request.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: auth.example.com\r\n", b"")

    assert exchange(live, old + SMUGGLED).statuses == (200,)


@pytest.mark.parametrize("name", ["Authorization", "X-Forwarded-For", "Content-Type"])
def test_a_trailer_is_no_header(live: Live, key: str, name: str) -> None:
    """
    T43: what a proxy checks or strips in the head may not come in through the back door.

    RFC 9110 §6.5.1.
    """
    value = f"Bearer {key}"
    chunks = b"%x\r\n%b\r\n0\r\n%b: %b\r\n\r\n" % (
        len(GRANT),
        GRANT,
        name.encode(),
        value.encode(),
    )

    answer = exchange(live, head("Transfer-Encoding: chunked", "Connection: close") + chunks)

    assert (answer.statuses, answer.json()["code"]) == ((401,), "missing_credential")


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "chunk extension": (b"5;", b"a"),
    "trailer": (b"5\r\nabcde\r\n0\r\nX-A: ", b"a"),
    "trailers": (b"5\r\nabcde\r\n0\r\n", b"X-A: b\r\n"),
    "zeros of a size": (b"", b"0"),
}


@needs_proc
@pytest.mark.parametrize(("beginning", "rest"), ENDLESS.values(), ids=ENDLESS)
def test_framing_without_end_is_refused_and_leaves_memory_flat(
    live: Live, beginning: bytes, rest: bytes
) -> None:
    """T41, T43: nothing of it is body, so no limit of a body would stop it.  CWE-770."""
    before = resident_bytes(live)
    piece = rest * (50_000 // len(rest))

    answer = exchange(live, [head("Transfer-Encoding: chunked"), beginning, *[piece] * 400])

    refused_by_framing(answer, 400, 413, 431)
    assert resident_bytes(live) - before < 10 * MEGABYTE


UPGRADES = {
    "h2c": ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"],
    "websocket": ["Connection: keep-alive, Upgrade", "Upgrade: websocket"],
    "anything": ["Upgrade: x/1", "Connection: upgrade"],
}


@pytest.mark.parametrize("lines", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("is_apart", [False, True], ids=["at once", "body apart"])
def test_a_request_that_asks_for_another_protocol_is_answered_in_this_one(
    live: Live, form: bytes, lines: list[str], is_apart: bool
) -> None:
    """
    T43: Java's client asks so each time; its body is a body, and never the next request.

    RFC 9110 §7.8.
    """
    request = head(f"Content-Length: {len(form)}", *lines)
    pieces = [request, form, SMUGGLED] if is_apart else [request + form + SMUGGLED]

    answer = exchange(live, slowly(pieces))

    assert answer.statuses == (200, 200)


def test_a_body_behind_an_upgrade_is_never_a_request(live: Live) -> None:
    """T43: a proxy that passes the header on would let a request through unseen."""
    request = head(f"Content-Length: {len(SMUGGLED)}", "Connection: close, Upgrade", "Upgrade: h2c")

    answer = exchange(live, slowly([request, SMUGGLED, SMUGGLED]))

    assert answer.statuses == (400,)
    assert b"grant_type is missing" in answer.body


def slowly(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Each piece in a packet of its own."""
    for piece in pieces:
        yield piece
        time.sleep(0.05)


# --- T43: several requests on one connection

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
#: Is answered after two seconds.
POLL = b"GET /oauth/revocations?after=999999&wait=2 HTTP/1.1\r\nHost: x\r\n\r\n"


def test_requests_that_come_at_once_are_answered_in_order(live: Live, form: bytes) -> None:
    """T43: RFC 9112 §9.3.2.  One that has to wait holds up those behind it."""
    token = of_length(form).replace(b"Connection: close\r\n", b"")
    unknown = GET.replace(b"/healthz", b"/nothing")

    answer = exchange(live, POLL + token + unknown + SMUGGLED)

    assert answer.statuses == (200, 200, 404, 200)
    assert [answer.body.index(part) for part in (b"access_token", b"not_found", b'"ok"')] == sorted(
        answer.body.index(part) for part in (b"access_token", b"not_found", b'"ok"')
    )


def test_an_answer_that_is_due_comes_before_the_refusal_of_what_follows(
    live: Live, form: bytes
) -> None:
    """T43: else a client takes the refusal for the answer, and a token is lost."""
    token = of_length(form).replace(b"Connection: close\r\n", b"")

    answer = exchange(live, token + b"no request\r\n\r\n" + SMUGGLED)

    assert answer.statuses == (200, 400)
    assert b"access_token" in answer.body


@needs_proc
def test_a_flood_of_requests_on_one_connection_is_not_stored(live: Live) -> None:
    """T41: a few may wait for their turn; the client sends the others again.  CWE-770."""
    before = resident_bytes(live)

    answer = exchange(live, [POLL, *[GET * 1000] * 200])

    assert set(answer.statuses) == {200}
    assert len(answer.statuses) < 50
    assert resident_bytes(live) - before < 10 * MEGABYTE


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/revoke"])
def test_a_client_may_end_its_side_as_soon_as_it_has_asked(
    live: Live, form: bytes, path: str
) -> None:
    """T42: netcat and simple clients do; the answer is due all the same.  RFC 9112 §9.6."""
    body = form + b"&token=x"
    request = head(f"Content-Length: {len(body)}", target=path) + body
    with closing(connect(live)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = answer_of(read_to_the_end(connection))

    assert answer.statuses == (200,)


# --- T44: headers

BAD_HEADERS = {
    "NUL in a value": b"X-A: a\0b",
    "NUL in a name": b"X\0A: b",
    "blank before the colon": b"X-A : b",
    "no colon": b"X-A",
    "no name": b": b",
    "a carriage return alone": b"X-A: a\rb",
    "parentheses in a name": b"X(A): b",
    "bytes beyond ASCII in a name": b"X-\xff: b",
    "a line feed alone": b"X-A: a\nX-B: b",
    "a carriage return before the value": b"X-A:\ra",
    "a folded line": b"X-A: a\r\n b",
    "a folded line at the start": b" X-A: a",
    "escape in a value": b"X-A: \x1b[31m",
    "delete in a value": b"X-A: \x7f",
    "a second Host": b"Host: evil.example",
    "a Host with a blank": b"X-A: b\r\nhost: a b",
}


@pytest.mark.parametrize("line", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_malformed_header_is_refused_and_the_connection_closed(
    live: Live, form: bytes, line: bytes
) -> None:
    """T44: a proxy in front may have read it as another one.  RFC 9110 §5.1, §5.5."""
    request = of_length(form).replace(b"Host:", line + b"\r\nHost:", 1)

    answer = exchange(live, request + SMUGGLED)

    refused_by_framing(answer, 400)


HOSTS = {
    "missing": b"",
    "a blank within": b"Host: auth example.com\r\n",
    "a user": b"Host: user@auth.example.com\r\n",
    "a path": b"Host: auth.example.com/x\r\n",
    "non-ASCII": "Host: aüth.example.com\r\n".encode(),
    "a list": b"Host: auth.example.com, evil.example\r\n",
}


@pytest.mark.parametrize("line", HOSTS.values(), ids=HOSTS)
def test_a_request_names_one_host(live: Live, form: bytes, line: bytes) -> None:
    """T44, T47: proxies route by it, so a doubtful one is refused.  RFC 9112 §3.2."""
    request = of_length(form).replace(b"Host: auth.example.com\r\n", line, 1)

    answer = exchange(live, request + SMUGGLED)

    refused_by_framing(answer, 400)


LARGE_HEADERS: dict[str, list[str]] = {
    "one of 1 MB": ["X-A: " + "a" * MEGABYTE],
    "1,000 of 1 kB": [f"X-{number}: " + "a" * 1000 for number in range(1000)],
    "a name of 1 MB": ["X" * MEGABYTE + ": a"],
    "an Authorization of 1 MB": ["Authorization: Bearer " + "a" * MEGABYTE],
}


@pytest.mark.parametrize("lines", LARGE_HEADERS.values(), ids=LARGE_HEADERS)
def test_headers_of_a_megabyte_are_refused(live: Live, form: bytes, lines: list[str]) -> None:
    """T44: without a limit, a head that never ends fills the memory.  RFC 6585 §5."""
    body = b"grant_type=client_credentials" if "Authorization" in lines[0] else form

    refused_by_framing(exchange(live, of_length(body, *lines)), 431)


@pytest.mark.parametrize("size", [31_000, 33_000])
def test_a_head_may_have_32_kib(live: Live, form: bytes, size: int) -> None:
    """T44: exact, in whatever pieces it comes, and the same for a later one.  RFC 6585 §5."""
    padding = f"X-A: {'a' * size}"
    first = of_length(form).replace(b"Connection: close\r\n", b"")
    second = of_length(form, padding)

    together = exchange(live, first + second)
    apart = exchange(live, slowly([first, second[:20_000], second[20_000:]]))

    assert together.statuses == apart.statuses == (200, 200 if size < 32_000 else 431)


def test_a_target_of_a_megabyte_is_refused(live: Live, form: bytes) -> None:
    """T44: RFC 9110 §15.5.15 has a status for it."""
    request = head(
        f"Content-Length: {len(form)}",
        "Connection: close",
        target="/oauth/token?" + "a" * MEGABYTE,
    )

    refused_by_framing(exchange(live, request + form), 414, 431)


# --- T45 to T48: targets and methods

#: Target → the right statuses.
TARGETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "user of another host": ("@evil.example/oauth/token", (400, 404)),
    "no slash": ("oauth/token", (400, 404)),
    "two slashes before": ("//oauth/token", (404,)),
    "two slashes and a host": ("//evil.example/oauth/token", (404,)),
    "backslashes": ("\\\\evil.example\\oauth\\token", (400, 404)),
    "star": ("*", (400, 404)),
    "NUL": ("/oauth/token%00", (404,)),
    "trailing slash": ("/oauth/token/", (404,)),
    "dots": ("/oauth/x/../token", (404,)),
    "a blank": ("/oauth/token /", (400,)),
    "a control": ("/oauth/token\x7f", (400, 404)),
    "non-ASCII": ("/oauth/tokén", (400, 404)),
    "another host and no path": ("http://evil.example", (400, 404)),
    "another scheme": ("ftp://evil.example/oauth/token/", (400, 404)),
}


@pytest.mark.parametrize(("target", "statuses"), TARGETS.values(), ids=TARGETS)
def test_another_target_is_never_the_token_endpoint(
    live: Live, form: bytes, target: str, statuses: tuple[int, ...]
) -> None:
    """T45, T46: nor a redirect to it.  RFC 9112 §3.2; RFC 9700 §4.12; CVE-2026-54282."""
    request = head(f"Content-Length: {len(form)}", "Connection: close", target=target)

    answer = exchange(live, request + form)

    assert len(answer.statuses) == 1
    assert answer.status in statuses
    assert "location" not in answer.headers
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert b"evil" not in answer.body


def test_the_host_of_an_absolute_target_makes_no_difference(live: Live, form: bytes) -> None:
    """T46, T47: proxies send this form.  RFC 9112 §3.2.2."""
    request = head(
        f"Content-Length: {len(form)}",
        "Connection: close",
        target="http://evil.example/oauth/token",
    )

    token = exchange(live, request + form).json()["access_token"]

    assert jwt.decode(token, options={"verify_signature": False})["iss"] == live.issuer


ODD_METHODS = (
    *("__INIT__", "DISPATCH", "post", "POSTS", "P", "PRI", "M-SEARCH", "CONNECT", "(POST)"),
    *("PROPFIND", "QUERY", "GET\0", "POST\tX", "\x7f", "PÖST"),
)


@pytest.mark.parametrize("method", ODD_METHODS)
def test_an_odd_method_is_refused(live: Live, form: bytes, method: str) -> None:
    """T48: never looked up as the name of anything.  RFC 9110 §15.6.2, §15.5.6."""
    request = head(f"Content-Length: {len(form)}", "Connection: close", method=method)

    answer = exchange(live, request + form)

    assert answer.status in (400, 405)
    assert len(answer.statuses) == 1
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


VERSIONS = ("HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/3", "http/1.1", "HTTP/01.1", "ICY", "")


@pytest.mark.parametrize("version", VERSIONS)
def test_another_version_of_http_is_refused(live: Live, form: bytes, version: str) -> None:
    """T48: RFC 9112 §2.3.  A lenient reading would be another one than the proxy's."""
    request = of_length(form).replace(b"HTTP/1.1", version.encode(), 1)

    refused_by_framing(exchange(live, request + SMUGGLED), 400)


def test_http_2_without_asking_is_refused(live: Live) -> None:
    """T48: the preface of RFC 9113 §3.4, as clients with prior knowledge send it."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

    refused_by_framing(exchange(live, preface), 400)


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/introspect", "/oauth/revoke"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_the_form_endpoints_answer_post_only(live: Live, method: str, path: str) -> None:
    """T31: with JSON and Allow; HEAD without a body.  RFC 9110 §15.5.6, §9.3.2."""
    answer = exchange(live, head("Connection: close", method=method, target=path))

    assert (answer.statuses, answer.headers["allow"]) == ((405,), "POST")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    if method == "HEAD":
        assert answer.body == b""
    else:
        assert answer.json()["code"] == "method_not_allowed"


PAGES = (
    *("/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/openapi.yaml"),
    *("/.well-known/coatcheck", "/oauth/revocations", "/docs", "/healthz", "/readyz", "/nothing"),
)


@pytest.mark.parametrize("path", PAGES)
def test_head_is_answered_as_get_is_but_for_the_body(live: Live, path: str) -> None:
    """T31: every server has to know both; monitors ask so.  RFC 9110 §9.1, §9.3.2."""
    whole, only_head = (
        exchange(live, head("Connection: close", method=method, target=path))
        for method in ("GET", "HEAD")
    )

    assert only_head.statuses == whole.statuses
    assert only_head.body == b""
    for name in ("content-type", "cache-control", "content-length"):
        assert only_head.headers.get(name) == whole.headers.get(name)


# --- T49: silence


class Slow(NamedTuple):
    """What is sent at first, what is sent again and again, and what is answered at last."""

    beginning: bytes
    drip: bytes = b""
    statuses: tuple[int, ...] = ()


CHUNKS = head("Transfer-Encoding: chunked")
SLOW = {
    "nothing at all": Slow(b""),
    "line ends before a request": Slow(b"", b"\r\n"),
    "half a request line": Slow(b"POST /oauth"),
    "half a head": Slow(head()[:-20]),
    "a head without end": Slow(head()[:-4] + b"X", b"a"),
    "half a body": Slow(head("Content-Length: 100") + b"grant_type=", statuses=(408,)),
    "a body, byte by byte": Slow(head("Content-Length: 100"), b"a", (408,)),
    "half a chunk": Slow(CHUNKS + b"5\r\nab", statuses=(408,)),
    "a size, byte by byte": Slow(CHUNKS, b"0", (408,)),
    "half a trailer": Slow(CHUNKS + b"0\r\nX-A: ", b"a", (408,)),
    "the body of an answered request": Slow(
        head("Content-Length: 100", target="/nothing"), b"a", (404,)
    ),
    "a keep-alive that is not used": Slow(GET, statuses=(200,)),
    "half a second request": Slow(GET + b"GET /hea", statuses=(200,)),
    "a second request, byte by byte": Slow(GET + head()[:-4] + b"X", b"a", (200,)),
    "half a request behind one that waits": Slow(POLL + b"GET /hea", statuses=(200,)),
    "a body behind one that waits": Slow(POLL + head("Content-Length: 100"), b"a", (200, 408)),
}
#: T49: seconds until whoever says nothing is gone.
AT_MOST_S = 30


def descriptors(live: Live) -> int:
    return len(list(Path(f"/proc/{live.process.pid}/fd").iterdir()))


@needs_proc
def test_whoever_falls_silent_is_left(live: Live) -> None:
    """
    T49: half a request, or an answer that nobody reads, holds its place for 30 s at most.

    All at once, because each of them takes its time.  Meanwhile others are served.
    """
    before = descriptors(live)
    ends_at = time.monotonic() + AT_MOST_S
    received: dict[str, bytes] = dict.fromkeys(SLOW, b"")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(closing(a_deaf_client(live)))
        waiting = {stack.enter_context(closing(connect(live))): name for name in SLOW}
        for connection, name in waiting.items():
            connection.sendall(SLOW[name].beginning)
        while waiting and time.monotonic() < ends_at:
            time.sleep(1)
            for connection in select.select(list(waiting), [], [], 0)[0]:
                if not receive_some(connection, received, waiting[connection]):
                    del waiting[connection]
            for connection, name in waiting.items():
                send(connection, SLOW[name].drip)
            assert exchange(live, SMUGGLED).statuses == (200,)
        while descriptors(live) > before and time.monotonic() < ends_at:
            time.sleep(0.2)

        assert set(waiting.values()) == set()
        assert descriptors(live) <= before
    for name, answers in received.items():
        assert (answer_of(answers).statuses if answers else ()) == SLOW[name].statuses, name


def receive_some(connection: socket.socket, received: dict[str, bytes], name: str) -> bool:
    """Whether there was more; False once the connection is closed."""
    try:
        part = connection.recv(65_536)
    except ConnectionResetError:
        return False
    received[name] += part
    return bool(part)


def a_deaf_client(live: Live) -> socket.socket:
    """Asks for more than the system keeps for it, and reads nothing."""
    page = b"GET /openapi.yaml HTTP/1.1\r\nHost: x\r\n\r\n"
    connection = connect(live)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(12):
        # Not more at a time than may wait for their turn.
        connection.sendall(page * 12)
        time.sleep(0.05)
    return connection


# --- the log


def test_the_log_of_the_service_holds_no_secret(live: Live) -> None:
    """T30: the server below us logs too, and it must not log URLs or what it cannot parse."""
    made = live.api_key("widgets:read")
    text = made["key"]
    body = b"grant_type=client_credentials"
    length = f"Content-Length: {len(body)}"

    in_the_query = head(length, "Connection: close", target=f"/oauth/token?client_secret={text}")
    assert exchange(live, in_the_query + body).status == 400
    assert exchange(live, head(f"X-A : {text}")).status == 400
    assert exchange(live, head("Connection: close", method="GET", target=f"/{text}")).status == 404
    assert exchange(live, of_length(body, f"Authorization: Bearer {text}x")).status == 401
    live.command("keys", "disable", made["id"])
    assert exchange(live, of_length(body, f"Authorization: Bearer {text}")).status == 401

    assert made["id"] in live.log
    assert text not in live.log


# --- T51: the first moment


def test_thirty_two_first_requests_at_once_all_get_a_token(tmp_path: Path) -> None:
    """
    T51: what is loaded at first use is loaded while everybody waits for it.

    Nothing asks this service for a token before they do.
    """
    with a_service(tmp_path) as fresh:
        text = fresh.api_key("widgets:read")["key"]
        body = f"grant_type=client_credentials&client_secret={text}".encode()
        together = Barrier(32)

        def ask(_: int) -> Answer:
            together.wait(timeout=PATIENCE)
            return exchange(fresh, of_length(body))

        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(ask, range(32)))

    assert {answer.status for answer in answers} == {200}
    assert len({answer.json()["access_token"] for answer in answers}) == 32
