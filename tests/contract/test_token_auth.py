"""`TokenAuth` of each library, sync and async: the same name, the same arguments, the same acts.

The API is a server on 127.0.0.1, its name for another host `localhost`; the issuer is a fake.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import httpx2
import pytest
import requests

import coatcheck.httpx
import coatcheck.httpx2
import coatcheck.requests
from coatcheck import apikey
from coatcheck.caller import HostNotAllowed, KeyRejected, TokenSource
from unit.caller.fakes import ISSUER, FakeIssuer, problem

API_KEY = apikey.make("ck_live")
WAIT = 10
#: Trusts nobody, which takes no time; nothing here speaks TLS.
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass(frozen=True)
class Library:
    """A way to call an API.

    Attributes:
        auth: its `TokenAuth`.
        call: method, URL, body → status.
        streams: makes a body that can be sent once.
    """

    auth: Callable[..., Any]
    call: Callable[..., int]
    streams: Callable[[], Any]


def by_requests(auth: Any, method: str, url: str, body: Any = None) -> int:
    with requests.Session() as session:
        session.trust_env = False
        session.auth = auth
        return session.request(method, url, data=body, timeout=WAIT).status_code


def by_client(library: Any) -> Callable[..., int]:
    def call(auth: Any, method: str, url: str, body: Any = None) -> int:
        with library.Client(auth=auth, verify=TLS, follow_redirects=True, timeout=WAIT) as client:
            status: int = client.request(method, url, content=body).status_code
            return status

    return call


def by_async_client(library: Any) -> Callable[..., int]:
    async def call(auth: Any, method: str, url: str, body: Any) -> int:
        async with library.AsyncClient(
            auth=auth, verify=TLS, follow_redirects=True, timeout=WAIT
        ) as client:
            status: int = (await client.request(method, url, content=body)).status_code
            return status

    return lambda auth, method, url, body=None: asyncio.run(call(auth, method, url, body))


def stream() -> Iterator[bytes]:
    yield b"a "
    yield b"body"


async def async_stream() -> AsyncIterator[bytes]:
    yield b"a "
    yield b"body"


LIBRARIES = {
    "httpx2": Library(coatcheck.httpx2.TokenAuth, by_client(httpx2), stream),
    "httpx2, async": Library(coatcheck.httpx2.TokenAuth, by_async_client(httpx2), async_stream),
    "httpx": Library(coatcheck.httpx.TokenAuth, by_client(httpx), stream),
    "httpx, async": Library(coatcheck.httpx.TokenAuth, by_async_client(httpx), async_stream),
    "requests": Library(coatcheck.requests.TokenAuth, by_requests, stream),
}
SYNC = {name: one for name, one in LIBRARIES.items() if "async" not in name}
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


@dataclass(frozen=True)
class Seen:
    """A request that has arrived."""

    method: str
    host: str
    path: str
    token: str | None
    body: bytes
    cookie: str | None


@dataclass
class Api:
    """Keeps what arrives, and refuses tokens that have expired or that it was told to refuse."""

    issuer: FakeIssuer
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    refused: set[str | None] = field(default_factory=set)
    meet: threading.Barrier | None = None

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    @property
    def elsewhere(self) -> str:
        """A URL of another host, where every token is called invalid."""
        return self.url("/never", "localhost")

    @property
    def tokens(self) -> list[str | None]:
        return [one.token for one in self.seen]

    def answer(self, seen: Seen, asked: str) -> tuple[int, dict[str, str], bytes]:
        invalid = {"WWW-Authenticate": 'Bearer realm="api", error="invalid_token"'}
        match urlsplit(asked).path:
            case "/to":
                query = parse_qs(urlsplit(asked).query)
                return int(query["status"][0]), {"Location": query["url"][0]}, b""
            case "/never":
                return 401, invalid, b"never"
            case "/basic":
                return 401, {"WWW-Authenticate": 'Basic realm="api"'}, b""
            case "/problem":
                invalid = {"Content-Type": "application/problem+json", "Set-Cookie": "seen=it"}
                body = json.dumps({"code": "token_revoked"}).encode()
                return (401, invalid, body) if self.is_refused(seen) else (200, {}, b"")
            case _:
                return (401, invalid, b"no") if self.is_refused(seen) else (200, {}, b"yes")

    def is_refused(self, seen: Seen) -> bool:
        if self.meet is not None and seen.token in self.refused:
            self.meet.wait(WAIT)
        return seen.token in self.refused or self.issuer.status_of(seen.token or "") != 200


@contextmanager
def served(api: Api) -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            host = self.headers["Host"].partition(":")[0]
            path = urlsplit(self.path).path
            cookie = self.headers["Cookie"]
            seen = Seen(self.command, host, path, token, self.body(), cookie)
            api.seen.append(seen)
            status, headers, body = api.answer(seen, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            read = b""
            while size := int(self.rfile.readline(), 16):
                read += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return read

        def log_message(self, *told: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            # A client that repeats a request may leave the first answer unread.
            return

    with Server(("127.0.0.1", 0), Handler) as server:
        api.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join(WAIT)


@pytest.fixture(scope="module")
def running() -> Iterator[Api]:
    with served(Api(FakeIssuer())) as api:
        yield api


@pytest.fixture
def issuer() -> FakeIssuer:
    return FakeIssuer()


@pytest.fixture
def api(running: Api, issuer: FakeIssuer) -> Api:
    running.issuer, running.seen, running.refused = issuer, [], set()
    running.meet = None
    return running


@pytest.fixture
def source(issuer: FakeIssuer) -> Iterator[TokenSource]:
    with TokenSource(ISSUER, API_KEY, post=issuer, monotonic=issuer.clock) as made:
        yield made


@pytest.fixture
def auth(library: Library, source: TokenSource) -> Any:
    return library.auth(source)


@each_library
def test_each_request_carries_the_token(library: Library, api: Api, auth: Any) -> None:
    """The same object in one client after another; one exchange for all."""
    assert library.call(auth, "GET", api.url("/")) == 200
    assert library.call(auth, "POST", api.url("/"), b"a body") == 200

    assert api.tokens == ["token-1"] * 2
    assert api.seen[1].body == b"a body"


@each_library
def test_the_short_form_takes_the_settings_of_a_source(library: Library, api: Api) -> None:
    """`TokenAuth("https://auth.example.com", scope="widgets:read")`; a source has its own."""
    auth = library.auth(ISSUER, API_KEY, scope="widgets:read", post=api.issuer)

    assert library.call(auth, "GET", api.url("/")) == 200
    assert api.issuer.forms[0]["scope"] == "widgets:read"
    with pytest.raises(ValueError, match="a TokenSource has its settings already"):
        library.auth(auth.source, scope="widgets:read")


BODIES: dict[str, Any] = {"none": None, "bytes": b"a body", "text": "a body", "empty": b""}


@each_library
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", ["/", "/problem"])
def test_a_refused_token_is_renewed_and_the_request_repeated_once(
    library: Library, api: Api, auth: Any, path: str, body: Any
) -> None:
    """Told by the challenge, or by the problem's code where a gateway has cut that."""
    api.refused.add("token-1")

    assert library.call(auth, "POST", api.url(path), body) == 200
    assert api.tokens == ["token-1", "token-2"]
    assert api.seen[0].body == api.seen[1].body


@each_library
def test_a_second_refusal_is_the_callers(library: Library, api: Api, auth: Any) -> None:
    """And the next request does not renew again at once."""
    assert library.call(auth, "GET", api.url("/never")) == 401
    assert api.tokens == ["token-1", "token-2"]
    assert library.call(auth, "GET", api.url("/never")) == 401
    assert api.tokens == ["token-1", "token-2", "token-2"]


@each_library
def test_a_401_of_something_else_is_not_repeated(library: Library, api: Api, auth: Any) -> None:
    """A proxy's, for instance; a new token changes nothing."""
    assert library.call(auth, "GET", api.url("/basic")) == 401

    assert api.tokens == ["token-1"]
    assert len(api.issuer.forms) == 1


@each_library
def test_a_body_that_can_be_sent_once_is_sent_once(library: Library, api: Api, auth: Any) -> None:
    """The caller gets the 401, and its next request another token."""
    api.refused.add("token-1")

    assert library.call(auth, "POST", api.url("/"), library.streams()) == 401
    assert library.call(auth, "POST", api.url("/"), library.streams()) == 200
    assert api.tokens == ["token-1", "token-2"]
    assert {one.body for one in api.seen} == {b"a body"}


@each_library
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_goes_on_without_the_token(
    library: Library, api: Api, auth: Any, status: int
) -> None:
    """And what that one says of a token it never got renews nothing."""
    there = api.url(f"/to?status={status}&url={api.elsewhere}")

    assert library.call(auth, "GET", there) == 401
    assert [(one.host, one.token) for one in api.seen] == [
        ("127.0.0.1", "token-1"),
        ("localhost", None),
    ]
    assert library.call(auth, "GET", api.url("/")) == 200
    assert len(api.issuer.forms) == 1


@each_library
def test_a_redirect_to_the_same_origin_keeps_the_token(
    library: Library, api: Api, auth: Any
) -> None:
    """A slash at the end, for instance."""
    assert library.call(auth, "GET", api.url("/to?status=307&url=/widgets/")) == 200
    assert api.tokens == ["token-1"] * 2


@each_library
def test_what_was_done_is_not_done_twice(library: Library, api: Api, auth: Any) -> None:
    """A POST that was answered by a redirect is done, whatever its page says then."""
    api.refused.add("token-1")

    library.call(auth, "POST", api.url("/to?status=303&url=/widgets/"), b"a body")

    assert [one.method for one in api.seen].count("POST") == 1
    assert library.call(auth, "GET", api.url("/")) == 200


@each_library
def test_a_request_to_another_host_is_not_sent(library: Library, api: Api, auth: Any) -> None:
    """The first request binds an auth that was told of no hosts; a sent token cannot be unsent."""
    assert library.call(auth, "GET", api.url("/")) == 200

    for url in (api.elsewhere, "http://192.0.2.1/", "https://127.0.0.1:1/"):
        with pytest.raises(HostNotAllowed):
            library.call(auth, "GET", url)
    assert len(api.seen) == 1


@each_library
def test_hosts_are_those_of_the_resource_or_those_that_are_named(
    library: Library, api: Api, issuer: FakeIssuer
) -> None:
    """Never what a request happens to go to first."""
    of_resource = library.auth(ISSUER, API_KEY, resource="https://api.example.com", post=issuer)
    named = library.auth(of_resource.source, allowed_hosts=[f"127.0.0.1:{api.port}"])

    with pytest.raises(HostNotAllowed, match=r"https://api\.example\.com"):
        library.call(of_resource, "GET", api.url("/"))
    assert not issuer.forms
    library.call(named, "GET", api.url("/"))
    assert api.tokens[0] == "token-1"


@each_library
def test_without_a_token_nothing_is_sent(library: Library, api: Api, auth: Any) -> None:
    """The source's own error comes out of the library as it is."""
    api.issuer.tells(problem("invalid_client", "Revoked on Monday."))

    for _ in range(3):
        with pytest.raises(KeyRejected, match="Revoked on Monday"):
            library.call(auth, "GET", api.url("/"))
    assert not api.seen
    assert len(api.issuer.forms) == 1


@each_library
def test_a_key_that_ends_in_between_is_told_as_such(library: Library, api: Api, auth: Any) -> None:
    """Rather than a 401 that does not say why."""
    assert library.call(auth, "GET", api.url("/")) == 200
    api.refused.add("token-1")
    api.issuer.tells(problem("invalid_client", "Revoked on Monday."))

    with pytest.raises(KeyRejected, match="Revoked on Monday"):
        library.call(auth, "GET", api.url("/"))


@each_library
def test_the_key_itself_is_sent_if_that_is_wanted_and_repeated_never(
    library: Library, api: Api, issuer: FakeIssuer
) -> None:
    """An API that refuses it meets the same key again otherwise."""
    issuer.tells(problem("temporarily_unavailable", status=503))
    auth = library.auth(ISSUER, API_KEY, fallback="api_key", post=issuer)

    assert library.call(auth, "GET", api.url("/never")) == 401
    assert api.tokens == [API_KEY]


@each_library
def test_a_repr_holds_no_secret(library: Library, api: Api, auth: Any) -> None:
    """Libraries show their clients' settings in errors."""
    library.call(auth, "GET", api.url("/"))

    assert repr(auth).startswith(f"<TokenAuth Reach(http://127.0.0.1:{api.port}) <TokenSource of")
    assert API_KEY not in repr(auth)
    assert "token-1" not in repr(auth)


@pytest.mark.parametrize("library", SYNC.values(), ids=SYNC)
def test_threads_that_are_refused_together_renew_once(
    library: Library, api: Api, auth: Any, issuer: FakeIssuer
) -> None:
    """A revocation of tokens meets all of them in the same moment."""
    api.refused.add("token-1")
    api.meet = threading.Barrier(32)

    with ThreadPoolExecutor(32) as pool:
        told = list(pool.map(lambda _: library.call(auth, "GET", api.url("/")), range(32)))

    assert set(told) == {200}
    assert len(issuer.forms) == 2


# --- requests alone


requests_alone = pytest.mark.parametrize("library", [LIBRARIES["requests"]], ids=["requests"])


@requests_alone
def test_a_file_is_sent_again_from_where_it_was_read(library: Library, api: Api, auth: Any) -> None:
    """As requests' own digest authentication does it."""
    file = BytesIO(b"read already, a body")
    file.seek(len(b"read already, "))
    api.refused.add("token-1")

    assert library.call(auth, "POST", api.url("/"), file) == 200
    assert [one.body for one in api.seen] == [b"a body"] * 2


@requests_alone
def test_a_repetition_brings_the_cookies_and_keeps_the_history(
    library: Library, api: Api, auth: Any
) -> None:
    """What the refusal has set counts; hooks of others are called with the last answer."""
    api.refused.add("token-1")
    called: list[int] = []
    with requests.Session() as session:
        session.trust_env = False
        session.auth = auth
        response = session.get(
            api.url("/problem"),
            timeout=WAIT,
            hooks={"response": lambda answer, **_: called.append(answer.status_code)},
        )
        assert session.cookies["seen"] == "it"

    assert response.status_code == 200
    assert [one.status_code for one in response.history] == [401]
    assert response.request.headers["Authorization"] == "Bearer token-2"
    assert api.seen[1].cookie == "seen=it"
    assert len(called) == 1


@requests_alone
def test_an_answer_that_is_streamed_can_be_read(library: Library, api: Api, auth: Any) -> None:
    """The refused one is let go of; its connection would be lost otherwise."""
    api.refused.add("token-1")
    with requests.Session() as session:
        session.trust_env = False
        session.auth = auth
        with session.get(api.url("/"), timeout=WAIT, stream=True) as response:
            assert (response.status_code, response.content) == (200, b"yes")
            assert response.history[0].raw.closed
