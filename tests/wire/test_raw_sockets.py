"""A running service, asked over plain sockets: framing, sizes, floods.  RFC 9110, RFC 9112.

Every exchange here is read to its end, so an answer counts only once the connection is closed.
"""

import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest

from support.live import Live, a_service

CRLF = b"\r\n"
#: Seconds until a connection that is not closed counts as left open.
PATIENCE = 5
#: What an attacker hides behind a request whose end two parsers see in different places.
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back until the connection was closed; `answers` counts status lines."""

    status: int
    headers: dict[str, str]
    body: bytes
    answers: int

    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        return body


def exchange(live: Live, pieces: bytes | Iterable[bytes]) -> Answer:
    """Send all of it, as far as the service listens, and read until it closes."""
    url = urlsplit(live.issuer)
    assert url.hostname is not None
    with socket.create_connection((url.hostname, url.port or 80), timeout=PATIENCE) as connection:
        # Who is refused early goes on sending: the answer is there all the same.
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                connection.sendall(piece)
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                received += part
    assert received, "closed without an answer"
    head, _, body = received.partition(CRLF * 2)
    status_line, *lines = head.decode("latin-1").split("\r\n")
    named = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in named}
    return Answer(int(status_line.split(" ")[1]), headers, body, len(STATUS_LINE.findall(received)))


STATUS_LINE = re.compile(rb"HTTP/1\.[01] \d{3} ")


def head(*lines: str, method: str = "POST", target: str = "/oauth/token") -> bytes:
    """The head of a token request, with these header lines at its end."""
    all_lines = (
        f"{method} {target} HTTP/1.1",
        "Host: auth.example.com",
        "Content-Type: application/x-www-form-urlencoded",
        *lines,
    )
    return "\r\n".join(all_lines).encode() + CRLF * 2


def of_length(body: bytes, *lines: str) -> bytes:
    return head(f"Content-Length: {len(body)}", "Connection: close", *lines) + body


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


def endless(size: int) -> Iterator[bytes]:
    """A body of this size, in pieces."""
    for _ in range(0, size, 50_000):
        yield b"a" * 50_000


def in_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


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

    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["error"] == "invalid_request"
    assert answer.answers == 1


def resident_bytes(live: Live) -> int:
    status = Path(f"/proc/{live.process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_large_bodies_leave_memory_flat(live: Live) -> None:
    """T41: whoever may send may not fill the memory.  CWE-770."""
    exchange(live, unannounced(20 * MEGABYTE))
    before = resident_bytes(live)

    for _ in range(10):
        exchange(live, announced(20 * MEGABYTE))
        exchange(live, unannounced(20 * MEGABYTE))

    assert resident_bytes(live) - before < 10 * MEGABYTE


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

    assert (answer.status, answer.answers) == (200, 1)
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
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_body_in_bad_chunks_is_refused_and_the_connection_closed(
    live: Live, chunks: bytes
) -> None:
    """T43: a proxy in front may see its end elsewhere.  RFC 9112 §7.1; CVE-2025-43859."""
    answer = exchange(live, head("Transfer-Encoding: chunked") + chunks + SMUGGLED)

    assert (answer.status, answer.answers) == (400, 1)


BAD_LENGTHS = {
    "length and chunked": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "chunked and length": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "two lengths": ["Content-Length: 5", "Content-Length: 6"],
    "one length twice": ["Content-Length: 5", "Content-Length: 5"],
    "a list of lengths": ["Content-Length: 5, 5"],
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
    "not chunked at last": ["Transfer-Encoding: chunked, identity"],
    "chunked twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
}


@pytest.mark.parametrize("lines", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_a_body_without_a_certain_end_is_refused_and_the_connection_closed(
    live: Live, lines: list[str]
) -> None:
    """T43: RFC 9112 §6.1, §6.3 (where a body ends), §5.1 (blanks); GHSA-v9pg-7xvm-68hf."""
    answer = exchange(live, head(*lines) + b"5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED)

    assert (answer.status, answer.answers) == (400, 1)


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
}


@pytest.mark.parametrize("line", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_malformed_header_is_refused_and_the_connection_closed(
    live: Live, form: bytes, line: bytes
) -> None:
    """T44: a proxy in front may have read it as another one.  RFC 9110 §5.1, §5.5."""
    request = of_length(form).replace(b"Host:", line + b"\r\nHost:", 1)

    answer = exchange(live, request + SMUGGLED)

    assert (answer.status, answer.answers) == (400, 1)


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

    assert exchange(live, of_length(body, *lines)).status in (400, 431)


def test_a_target_of_a_megabyte_is_refused(live: Live, form: bytes) -> None:
    """T44: RFC 9110 §15.5.15 has a status for it."""
    request = head(
        f"Content-Length: {len(form)}",
        "Connection: close",
        target="/oauth/token?" + "a" * MEGABYTE,
    )

    assert exchange(live, request + form).status in (400, 414, 431)


# --- T46, T48: targets and methods

TARGETS = {
    "user of another host": "@evil.example/oauth/token",
    "no slash": "oauth/token",
    "two slashes": "//evil.example/oauth/token",
    "backslashes": "\\\\evil.example\\oauth\\token",
    "star": "*",
    "NUL": "/oauth/token%00",
    "trailing slash": "/oauth/token/",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_another_target_is_never_the_token_endpoint(live: Live, form: bytes, target: str) -> None:
    """T45, T46: nor a redirect to it.  RFC 9112 §3.2; CVE-2026-54282."""
    request = head(f"Content-Length: {len(form)}", "Connection: close", target=target)

    answer = exchange(live, request + form)

    assert answer.status in (400, 404)
    assert "location" not in answer.headers


def test_the_host_of_an_absolute_target_makes_no_difference(live: Live, form: bytes) -> None:
    """T46, T47: proxies send this form.  RFC 9112 §3.2.2."""
    request = head(
        f"Content-Length: {len(form)}",
        "Connection: close",
        target="http://evil.example/oauth/token",
    )

    token = exchange(live, request + form).json()["access_token"]

    assert jwt.decode(token, options={"verify_signature": False})["iss"] == live.issuer


ODD_METHODS = ("__INIT__", "DISPATCH", "post", "POSTS", "P", "PRI", "M-SEARCH", "CONNECT", "(POST)")


@pytest.mark.parametrize("method", ODD_METHODS)
def test_an_odd_method_is_refused(live: Live, form: bytes, method: str) -> None:
    """T48: never looked up as the name of anything.  RFC 9110 §15.6.2, §15.5.6."""
    request = head(f"Content-Length: {len(form)}", "Connection: close", method=method)

    assert exchange(live, request + form).status in (400, 404, 405, 501)


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/introspect", "/oauth/revoke"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_the_form_endpoints_answer_post_only(live: Live, method: str, path: str) -> None:
    """T31: with JSON and Allow; HEAD without a body.  RFC 9110 §15.5.6, §9.3.2."""
    answer = exchange(live, head("Connection: close", method=method, target=path))

    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    if method == "HEAD":
        assert answer.body == b""
    else:
        assert answer.json()["code"] == "method_not_allowed"


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
