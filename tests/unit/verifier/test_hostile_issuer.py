"""An issuer that means no good, or is broken, over a real connection: it harms nothing.

What a verifier knew goes on, memory and time are bounded, and it is well as soon as the issuer is.
Single fetches are in `unit/test_http`, exchanges in `test_exchange`.
"""

import asyncio
import gzip
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import pytest

from coatcheck import http
from coatcheck.durations import JWKS_COOLDOWN
from coatcheck.feed_profile import MAX_FEED_BYTES
from coatcheck.testing import FakeIssuer
from coatcheck.verifier import ApiKeyRevoked, IssuerUnavailable, UnknownSigningKey, Verifier
from support.tokens import SetClock, as_json, base64url

AUDIENCE = "https://widgets.example.com"
#: Seconds that a fetch from where the issuer is bad may take here, instead of half a minute.
PATIENCE = 0.1
WAIT = 10
#: Bytes: far more than the largest document, and far less than a bomb or a flood.
MEMORY = 40 * MAX_FEED_BYTES

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """An issuer on a port of its own, good but for one path.

    Attributes:
        flawed: the path where it is bad.
        flaw: how.
        paths: what it was asked for there and at places to which it alone refers.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.issuer = FakeIssuer(self.url, audience=AUDIENCE)
        self.flawed = ""
        self.flaw: Answer | None = None
        self.paths: list[str] = []
        self.is_over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        return


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == self.server.flawed and self.server.flaw is not None:
            self.server.paths.append(path)
            self.server.flaw(self)
            return
        if "elsewhere" in path:
            self.server.paths.append(path)
        # A long poll must not hold up the end of a test.
        url = f"{self.server.url}{self.path}".replace("wait=25", "wait=0.02")
        self.plain(200, self.server.issuer.get(url))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.server.flaw is not None and self.path == self.server.flawed:
            self.server.paths.append(self.path)
            self.server.flaw(self)
            return
        form = dict(parse_qsl(body))
        status, _, answer = self.server.issuer.post(f"{self.server.url}{self.path}", form)
        self.plain(status, answer)

    def plain(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def flood(self, beginning: bytes, chunk: bytes, pause_s: float = 0.0) -> None:
        """Write without end, until whoever reads has gone."""
        try:
            self.wfile.write(beginning)
            while not self.server.is_over.wait(pause_s):
                self.wfile.write(chunk)
        except OSError:
            return

    def give_up_after(self, beginning: bytes) -> None:
        self.wfile.write(beginning)

    def log_message(self, *_: object) -> None:
        return


OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(50_000_000), 9)
FLAWS: dict[str, Answer] = {
    "endless": lambda to: to.flood(OK + b"\r\n", b" " * 65_536),
    "endless in chunks": lambda to: to.flood(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n%b\r\n" % (b" " * 65_536)
    ),
    "an endless header": lambda to: to.flood(OK + b"X-Long: ", b"x" * 65_536),
    "headers without end": lambda to: to.flood(OK, b"X-More: yes\r\n" * 1000),
    "answers before the answer": lambda to: to.flood(
        b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01
    ),
    "huge": lambda to: to.flood(OK + b"Content-Length: 1000000000000\r\n\r\n", b" " * 65_536),
    "a drip": lambda to: to.flood(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.02),
    "a drip of a header": lambda to: to.flood(OK + b"X-Slow: ", b"x", 0.02),
    "silence": lambda to: to.flood(b"", b"", 0.02),
    "a bomb": lambda to: to.plain(200, BOMB, Content_Encoding="gzip"),
    "a bomb that does not say so": lambda to: to.plain(200, BOMB),
    "a redirect": lambda to: to.plain(302, b"", Location=f"{to.server.url}/elsewhere"),
    "a redirect that keeps the method": lambda to: to.plain(308, b"", Location="/elsewhere"),
    "no HTTP": lambda to: to.flood(b"SSH-2.0-OpenSSH\r\n", b"\0" * 1000),
    "half an answer": lambda to: to.give_up_after(OK + b"Content-Length: 9\r\n\r\n{"),
    "no answer": lambda to: None,
    "broken JSON": lambda to: to.plain(200, b'{"keys": ['),
    "other JSON": lambda to: to.plain(200, b'{"keys": {}, "issuer": 7}'),
    "deep JSON": lambda to: to.plain(200, b"[" * 100_000),
    "no UTF-8": lambda to: to.plain(200, b"\xff\xfe{\0}\0"),
    "nothing in it": lambda to: to.plain(200, b""),
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.is_over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def clock() -> SetClock:
    return SetClock(0.0)


@pytest.fixture
def verifier(server: Server, clock: SetClock) -> Iterator[Verifier]:
    def fetch(url: str) -> bytes:
        is_bad = server.flaw is not None and server.flawed in url
        # One that was under way when the issuer turned bad has to end before nobody waits for it.
        patience = PATIENCE if is_bad else WAIT / 5
        return http.fetch(url, max_bytes=MAX_FEED_BYTES, timeout_s=patience)

    with Verifier(
        server.url, AUDIENCE, service_key="any", fetch=fetch, monotonic=clock
    ) as verifier:
        yield verifier


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def eventually(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def ask_for_key_set(server: Server, verifier: Verifier, clock: SetClock) -> None:
    verifier.renew()
    status: Any = verifier.status()
    assert status["key_set"]["last_error"]
    assert status["key_set"]["state"] == "fresh"


def ask_for_document(server: Server, verifier: Verifier, clock: SetClock) -> None:
    clock.now += 301
    eventually(lambda: server.paths)
    # The feed is followed by what it said before.
    status: Any = verifier.status()
    seq = status["feed"]["seq"]
    server.issuer.revoke("org_another")
    assert verifier.catch_up(seq + 1)


def ask_for_feed(server: Server, verifier: Verifier, clock: SetClock) -> None:
    def failed() -> bool:
        feed: Any = verifier.status()["feed"]
        return feed["last_error"] is not None

    eventually(failed)
    status: Any = verifier.status()
    assert status["feed"]["state"] == "fresh"


def ask_for_exchange(server: Server, verifier: Verifier, clock: SetClock) -> None:
    assert verifier._exchange is not None
    posts = verifier._exchange._posts
    patience, posts.timeout_s = posts.timeout_s, PATIENCE
    with pytest.raises(IssuerUnavailable):
        verifier.authenticate(bearer(server.issuer.api_key()))
    posts.timeout_s = patience


PLACES: dict[str, Callable[[Server, Verifier, SetClock], None]] = {
    "/.well-known/jwks.json": ask_for_key_set,
    "/.well-known/coatcheck": ask_for_document,
    "/oauth/revocations": ask_for_feed,
    "/oauth/token": ask_for_exchange,
}


#: The document and the feed are fetched as the key set is; what differs is how they are read.
READ_APART = ("endless", "huge", "a drip", "a bomb", "a redirect", "broken JSON", "other JSON")


@pytest.mark.parametrize(
    ("place", "flaw"),
    [
        (place, flaw)
        for place in PLACES
        for flaw in FLAWS
        if place in ("/.well-known/jwks.json", "/oauth/token") or flaw in READ_APART
    ],
)
def test_what_is_known_goes_on(
    server: Server, verifier: Verifier, clock: SetClock, place: str, flaw: str
) -> None:
    """The last good key set, document, feed and token are kept; then all is well again."""
    api_key = server.issuer.api_key()
    assert verifier.authenticate(bearer(server.issuer.token()))
    assert verifier.authenticate(bearer(api_key))

    server.flawed, server.flaw = place, FLAWS[flaw]
    began = time.monotonic()
    tracemalloc.start()
    PLACES[place](server, verifier, clock)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < MEMORY
    assert time.monotonic() - began < WAIT
    assert set(server.paths) == {place}
    assert verifier.authenticate(bearer(server.issuer.token()))
    assert verifier.authenticate(bearer(api_key))

    server.flaw = None
    verifier.renew()
    status: Any = verifier.status()
    server.issuer.revoke(api_key)
    assert verifier.catch_up(status["feed"]["seq"] + 1)
    with pytest.raises(ApiKeyRevoked):
        verifier.authenticate(bearer(api_key))
    status = verifier.status()
    assert (status["key_set"]["state"], status["key_set"]["last_error"]) == ("fresh", None)
    assert verifier.authenticate(bearer(server.issuer.api_key()))


# Invented signing keys


class Counting(FakeIssuer):
    """Counts how often its key set is asked for."""

    fetches = 0

    def get(self, url: str) -> bytes:
        self.fetches += url.endswith("/jwks.json")
        return super().get(url)


@pytest.mark.parametrize("face", ["threads", "loop"])
def test_ten_thousand_invented_signing_keys_make_one_fetch_per_cool_down(face: str) -> None:
    """Whoever invents them, at whatever rate, does not reach the issuer through us."""
    clock = SetClock(0.0)
    with (
        Counting("https://counting.example.com", audience=AUDIENCE) as issuer,
        Verifier(issuer.issuer, AUDIENCE, monotonic=clock) as verifier,
    ):
        verifier.verify_jwt(issuer.token())
        tokens = [
            f"{_with_kid(number)}.{rest}"
            for rest in (issuer.token().partition(".")[2],)
            for number in range(10_000)
        ]
        assert issuer.fetches == 1
        for turn in range(2):
            clock.now += JWKS_COOLDOWN
            half = tokens[turn * 5000 :][:5000]
            if face == "threads":
                with ThreadPoolExecutor(16) as pool:
                    outcomes = list(pool.map(partial(outcome, verifier), half))
            else:
                outcomes = asyncio.run(all_outcomes(verifier, half))
            assert set(outcomes) == {UnknownSigningKey}
            assert issuer.fetches == 2 + turn
        assert verifier.verify_jwt(issuer.token())


def _with_kid(number: int) -> str:
    return base64url(as_json({"typ": "at+jwt", "alg": "ES256", "kid": f"invented-{number}"}))


def outcome(verifier: Verifier, token: str) -> type[object]:
    try:
        return type(verifier.verify_jwt(token))
    except Exception as error:
        return type(error)


async def all_outcomes(verifier: Verifier, tokens: list[str]) -> list[type[object]]:
    waits = (verifier.verify_jwt_async(token) for token in tokens)
    return [type(error) for error in await asyncio.gather(*waits, return_exceptions=True)]
