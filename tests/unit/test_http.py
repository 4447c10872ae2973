"""The bounded fetch and post, against a real server on the loopback that means no good."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coatcheck.http import Answer as Posted
from coatcheck.http import FetchFailed, Posts, fetch, put_in, require_safe

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A local server that answers as the test tells it to."""

    def __init__(self) -> None:
        server = self
        self.answer: Answer = plain(200, b"{}")
        self.paths: list[str] = []
        self.form = ""
        self.connections: set[socket.socket] = set()
        self.headers: dict[str, str] = {}
        self.is_over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.connections.add(self.connection)
                server.form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.do_GET()

            def do_GET(self) -> None:
                server.paths.append(self.path)
                server.headers = {name.lower(): value for name, value in self.headers.items()}
                server.answer(self)

            def log_message(self, *_: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/jwks"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.is_over.set()
        self._http.shutdown()
        self._http.server_close()


def plain(status: int, body: bytes, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def failure(server: Server, *, timeout_s: float = 5, max_bytes: int = 100) -> str:
    with pytest.raises(FetchFailed) as failed:
        fetch(server.url, max_bytes=max_bytes, timeout_s=timeout_s)
    return failed.value.kind


def test_the_body_of_a_good_answer_comes_back(server: Server) -> None:
    """The header asks for the media type of RFC 7517 §8.5."""
    server.answer = plain(200, b'{"keys":[]}')

    assert fetch(server.url, max_bytes=100) == b'{"keys":[]}'
    assert server.headers["accept"].startswith("application/jwk-set+json")


@pytest.mark.parametrize("status", [204, 302, 304, 401, 404, 500, 503])
def test_only_200_is_an_answer(server: Server, status: int) -> None:
    """V40: a redirect is not followed, wherever it leads."""
    for elsewhere in (f"{server.url}/elsewhere", "file:///etc/passwd", "data:,{}"):
        server.answer = plain(status, b"{}", Location=elsewhere)
        assert failure(server) == f"http_{status}"

    assert set(server.paths) == {"/jwks"}


def test_a_long_body_is_not_read_to_its_end(server: Server) -> None:
    """V40: 50 MB of key set."""

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.is_over.is_set():
            try:
                handler.wfile.write(b"x" * 65_536)
            except OSError:
                return

    server.answer = endless
    assert failure(server) == "too_long"


def test_a_compressed_body_is_refused(server: Server) -> None:
    """64 KiB of gzip are 64 MB of memory."""
    server.answer = plain(200, gzip.compress(b"{}"), Content_Encoding="gzip")

    assert failure(server) == "compressed"
    assert server.headers["accept-encoding"] == "identity"


DRIPS = {"in the header": b"HTTP/1.1 200 OK\r\nX-Long: ", "in the body": b"HTTP/1.0 200 OK\r\n\r\n"}


@pytest.mark.parametrize("beginning", DRIPS.values(), ids=DRIPS)
def test_the_time_limit_is_for_everything_together(server: Server, beginning: bytes) -> None:
    """A byte now and then would renew the limit of a single read for ever."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(beginning)
        while not server.is_over.wait(0.02):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:
                return

    server.answer = drip
    began = time.monotonic()
    assert failure(server, timeout_s=0.3, max_bytes=10_000) == "timeout"
    assert time.monotonic() - began < 5


def test_a_server_that_says_nothing_is_left(server: Server) -> None:
    """The ordinary timeout."""

    def say_nothing(_: BaseHTTPRequestHandler) -> None:
        server.is_over.wait(10)

    server.answer = say_nothing
    assert failure(server, timeout_s=0.1) == "timeout"


def test_a_server_that_is_not_there_is_a_failure(server: Server) -> None:
    """The kind is for status pages; the address stays out of it."""
    server.close()

    assert failure(server) == "ConnectError"


def test_proxies_of_the_environment_do_not_count(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable meant for another program does not decide whom a resource server believes."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert fetch(server.url, max_bytes=100) == b"{}"


# Posts


@pytest.fixture
def posts() -> Iterator[Posts]:
    posts = Posts(timeout_s=5)
    yield posts
    posts.close()


FORM = {"grant_type": "a", "subject_token": "b c&d=é"}


def test_a_form_is_answered_whatever_the_status(server: Server, posts: Posts) -> None:
    """The exchange reads refusals, too; a redirect is one of them and leads nowhere."""
    for status in (200, 302, 400, 503):
        server.answer = plain(status, b"{}", Retry_After="7", Location=f"{server.url}/elsewhere")
        answer = posts.post(server.url, FORM, max_bytes=100)

        assert (answer.status, answer.body, answer.headers["retry-after"]) == (status, b"{}", "7")
    assert server.form == "grant_type=a&subject_token=b+c%26d%3D%C3%A9"
    assert server.headers["accept-encoding"] == "identity"
    assert set(server.paths) == {"/jwks"}


def test_connections_are_kept_for_the_next_post(server: Server, posts: Posts) -> None:
    """An exchange stands in the way of a request: a handshake each time would be felt."""
    for _ in range(5):
        posts.post(server.url, FORM, max_bytes=100)

    assert len(server.connections) == 1


def test_posts_at_once_have_a_connection_each(server: Server, posts: Posts) -> None:
    """None waits for another one's answer."""
    together = threading.Barrier(4, timeout=5)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        together.wait()
        plain(200, b"{}")(handler)

    server.answer = answer
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: posts.post(server.url, FORM, max_bytes=9), range(4)))

    assert [one.status for one in done] == [200] * 4
    assert len(server.connections) == 4


@pytest.mark.parametrize("beginning", DRIPS.values(), ids=DRIPS)
def test_the_time_limit_holds_on_a_kept_connection(
    server: Server, posts: Posts, beginning: bytes
) -> None:
    """A byte now and then, on the second answer; the third one comes over another connection."""
    posts.post(server.url, FORM, max_bytes=100)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(beginning)
        while not server.is_over.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    server.answer, posts.timeout_s = drip, 0.3
    began = time.monotonic()
    with pytest.raises(FetchFailed, match="timeout"):
        posts.post(server.url, FORM, max_bytes=10_000)
    assert time.monotonic() - began < 5
    assert len(server.connections) == 1

    server.answer, posts.timeout_s = plain(200, b"{}"), 5
    assert posts.post(server.url, FORM, max_bytes=100).body == b"{}"
    assert len(server.connections) == 2


def test_a_slow_post_ends_no_other(server: Server, posts: Posts) -> None:
    """The limit is each one's own, also when they come one after the other for longer than it."""
    posts.timeout_s = 0.6
    until = time.monotonic() + 1.2 * posts.timeout_s
    while time.monotonic() < until:
        assert posts.post(server.url, FORM, max_bytes=100).status == 200

    assert len(server.connections) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (plain(200, gzip.compress(b"{}"), Content_Encoding="gzip"), "compressed"),
        (plain(200, b"x" * 101), "too_long"),
    ],
    ids=["compressed", "too long"],
)
def test_an_unfit_answer_to_a_post_is_a_failure(
    server: Server, posts: Posts, answer: Answer, kind: str
) -> None:
    """And its connection is not used again: nobody knows what comes next over it."""
    server.answer = answer
    with pytest.raises(FetchFailed, match=kind):
        posts.post(server.url, FORM, max_bytes=100)
    server.answer = plain(200, b"{}")
    posts.post(server.url, FORM, max_bytes=100)

    assert len(server.connections) == 2


def test_a_post_to_nobody_is_a_failure(server: Server, posts: Posts) -> None:
    """The kind tells; neither address nor form does."""
    server.close()
    with pytest.raises(FetchFailed) as failed:
        posts.post(server.url, FORM, max_bytes=100)

    assert str(failed.value) == failed.value.kind == "ConnectError"


# An issuer of this process


class StandIn:
    """Answers, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, url: str) -> bytes:
        self.asked.append(url)
        return b"from here"

    def post(self, url: str, form: Mapping[str, str]) -> Posted:
        self.asked.append(url)
        return Posted(200, {}, form["grant_type"].encode())


def test_an_issuer_of_this_process_answers_instead_of_the_network(
    server: Server, posts: Posts
) -> None:
    """For its own URL and what is below it, and only while it is there."""
    base, stand_in = server.url, StandIn()
    assert put_in(base, stand_in) is None
    try:
        assert fetch(base, max_bytes=1) == fetch(f"{base}/x?y", max_bytes=1) == b"from here"
        assert posts.post(f"{base}/token", FORM, max_bytes=1).body == b"a"
        for beside in (f"{base}2", base.replace("/jwks", "/other")):
            assert fetch(beside, max_bytes=100) == b"{}"
    finally:
        assert put_in(base, None) is stand_in

    assert fetch(base, max_bytes=100) == b"{}"
    assert posts.post(base, FORM, max_bytes=100).body == b"{}"
    assert stand_in.asked == [base, f"{base}/x?y", f"{base}/token"]
    assert server.paths == ["/jwks2", "/other", "/jwks", "/jwks"]


def test_the_one_before_comes_back(server: Server) -> None:
    """Who puts one in for a while gives its place back."""
    first, second = StandIn(), StandIn()
    put_in(server.url, first)
    assert put_in(server.url, second) is first
    assert put_in(server.url, first) is second
    assert put_in(server.url, None) is first
    assert put_in(server.url, None) is None


SAFE = [
    "https://auth.example.com/jwks",
    "https://auth.example.com:8443/a?b=c",
    "http://127.0.0.1:8000/jwks",
    "http://127.8.9.1/jwks",
    "http://localhost:8000/jwks",
    "http://[::1]:8000/jwks",
]
UNSAFE = [
    "http://auth.example.com/jwks",
    "http://localhost.example.com/jwks",
    "http://10.0.0.1/jwks",
    "http://127.0.0.1@evil.example/jwks",
    "https://user:secret@auth.example.com/jwks",
    "https://auth.example.com/jwks#fragment",
    "https:///jwks",
    "https://auth.example.com:port/jwks",
    "https://[::1/jwks",
    "file:///etc/passwd",
    "data:application/json,{}",
    "ftp://127.0.0.1/jwks",
    "auth.example.com",
    "",
]


@pytest.mark.parametrize("url", SAFE)
def test_https_and_the_own_machine_are_safe(url: str) -> None:
    """Development needs no certificates."""
    assert require_safe(url) == url


@pytest.mark.parametrize("url", UNSAFE)
def test_everything_else_is_not(url: str) -> None:
    """Whoever is on the way of plain http could publish a signing key of their own."""
    with pytest.raises(ValueError, match=r"http|URL"):
        require_safe(url)


def test_plain_http_can_be_asked_for() -> None:
    """Inside a cluster that encrypts by itself.  The name of the setting says what it is."""
    assert require_safe("http://coatcheck:8000/jwks", unsafe_plain_http=True)
    with pytest.raises(ValueError, match=r"http|URL"):
        require_safe("file:///etc/passwd", unsafe_plain_http=True)
