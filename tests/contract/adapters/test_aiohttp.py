"""aiohttp alone: handlers of every kind, WebSockets, and what its access log sees."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from http.client import IncompleteRead
from typing import Any

import pytest
from aiohttp import ClientSession, WSServerHandshakeError, web
from aiohttp.test_utils import make_mocked_request

from coatcheck import apikey
from coatcheck.aiohttp import coatcheck_middleware, require_scopes
from coatcheck.scope import MalformedScope
from coatcheck.verifier import MissingCredentials, Verifier
from support.adapters.aiohttp import asking, serving
from support.adapters.harness import Answer
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, a_principal, claims, key_set, signer

METADATA = "/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{AUDIENCE}{METADATA}"'
KEY_ID = claims()["sub"]
API_KEY = apikey.make("ck_live")


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of a verifier whose issuer is this test, and which looks up API keys itself."""
    return {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "feed": None,
        "fetch": lambda _: key_set(),
        "clock": SetClock(),
        "check_api_key": a_principal,
    }


@pytest.fixture
def verifier(settings: dict[str, Any]) -> Iterator[Verifier]:
    with Verifier(**settings) as verifier:
        yield verifier


def bearer(**changes: object) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {signer().token(claims(**changes))}")]


Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


def behind(
    verifier: Verifier, handler: Any, *, path: str = "/", public: tuple[str, ...] = ()
) -> web.Application:
    """An application of one handler behind the middleware."""
    app = web.Application(middlewares=[coatcheck_middleware(verifier, public=public)])
    app.router.add_route("*", path, handler)
    return app


# What needs scopes


@require_scopes("widgets:read")
async def a_function(request: web.Request) -> web.Response:
    return web.json_response({"key_id": request["coatcheck"].key_id})


class Handlers:
    @require_scopes("widgets:read")
    async def a_method(self, request: web.Request) -> web.Response:
        return web.json_response({"key_id": request["coatcheck"].key_id})


class AMethodOfAView(web.View):
    @require_scopes("widgets:read")
    async def get(self) -> web.Response:
        return web.json_response({"key_id": self.request["coatcheck"].key_id})


@require_scopes("widgets:read")
class AView(web.View):
    async def get(self) -> web.Response:
        return web.json_response({"key_id": self.request["coatcheck"].key_id})


async def asked_inside(request: web.Request) -> web.Response:
    request["coatcheck"].require("widgets:read")
    return web.json_response({"key_id": request["coatcheck"].key_id})


HANDLERS: dict[str, Any] = {
    "a function": a_function,
    "a method": Handlers().a_method,
    "a method of a view": AMethodOfAView,
    "a view": AView,
    "asked inside": asked_inside,
}


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_scopes_are_asked_of_every_kind_of_handler(verifier: Verifier, handler: Any) -> None:
    """Wherever they are asked, the answer is the same."""
    with asking(behind(verifier, handler)) as ask:
        assert ask("GET", "/", bearer()).document == {"key_id": KEY_ID}
        refused = ask("GET", "/", bearer(scope="other"))

    assert (refused.status, refused.document["code"]) == (403, "insufficient_scope")
    assert 'scope="widgets:read"' in refused.headers["www-authenticate"]
    assert refused.headers["content-type"] == "application/problem+json"


def test_the_middleware_makes_its_verifier_itself(settings: dict[str, Any]) -> None:
    """With the settings by name, and scopes for every request."""
    door = coatcheck_middleware(scopes="widgets:read", **settings)
    app = web.Application(middlewares=[door])
    app.router.add_get("/", asked_inside)
    with asking(app) as ask:
        assert ask("GET", "/", bearer()).status == 200
        assert ask("GET", "/", bearer(scope="other")).status == 403
        assert ask("GET", "/nowhere", bearer()).status == 404
        assert ask("GET", "/nowhere").status == 401


def test_a_mistake_in_the_code_is_told_to_who_made_it(verifier: Verifier) -> None:
    """At once where that is possible, and never as an answer to a caller."""
    with pytest.raises(MalformedScope):
        require_scopes('a"b')
    with pytest.raises(ValueError, match="not both"):
        coatcheck_middleware(verifier, issuer=ISSUER)
    bare = make_mocked_request("GET", "/")
    with pytest.raises(RuntimeError, match="middlewares"):
        asyncio.run(_awaited(a_function(bare)))


async def _awaited(answer: Awaitable[web.StreamResponse]) -> web.StreamResponse:
    return await answer


def test_a_scope_on_a_public_path_asks_for_a_credential(verifier: Verifier) -> None:
    """Two settings that contradict each other: the stricter one counts."""
    with asking(behind(verifier, a_function, public=("/",))) as ask:
        refused = ask("GET", "/", bearer())

    assert (refused.status, refused.headers["www-authenticate"]) == (401, BARE)


def test_a_public_path_is_the_one_that_is_routed(verifier: Verifier) -> None:
    """aiohttp's routes see no slash where `%2F` was sent, so that `request.path` is not enough."""

    async def named(request: web.Request) -> web.Response:
        return web.Response(text=request.match_info["name"])

    with asking(behind(verifier, named, path="/{name}", public=("/files/a", "/b"))) as ask:
        assert ask("GET", "/files%2Fa").status == 401
        assert ask("GET", "/files%2Fa", bearer()).body == b"files/a"
        assert ask("GET", "/%62").status == 200


def test_a_sub_application_is_behind_the_same_door(verifier: Verifier) -> None:
    """And its own door, for another audience, still sees what was sent."""
    inner = behind(verifier, a_function)
    outer = web.Application(middlewares=[coatcheck_middleware(verifier)])
    outer.add_subapp("/inner", inner)
    with asking(outer) as ask:
        assert ask("GET", "/inner/").status == 401
        assert ask("GET", "/inner/", bearer()).status == 200
        assert ask("GET", f"/inner/?api_key={API_KEY}").status == 200


def test_an_answer_of_the_application_stays_as_it_is(verifier: Verifier) -> None:
    """Only our own errors are answered here."""

    async def gone(_: web.Request) -> web.Response:
        raise web.HTTPGone

    with asking(behind(verifier, gone)) as ask:
        assert ask("GET", "/", bearer()).status == 410
        assert ask("GET", METADATA).headers["content-type"] == "application/json"
        assert ask("POST", METADATA).status == 401


def test_a_refusal_after_the_answer_has_begun_ends_the_connection(verifier: Verifier) -> None:
    """A second status line would be read as part of the body."""

    async def late(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "10"})
        await answer.prepare(request)
        raise MissingCredentials

    with (
        asking(behind(verifier, late)) as ask,
        pytest.raises(IncompleteRead),
    ):
        ask("GET", "/", bearer())


# WebSockets


def test_a_websocket_is_refused_before_its_handshake(verifier: Verifier) -> None:
    """With the whole answer: RFC 6455 §4.2.2 lets a server answer as to any request."""

    @require_scopes("chat")
    async def chat(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(request["coatcheck"].key_id)
        request["coatcheck"].require("chat:more")
        await socket.close()
        return socket

    async def talk(port: int) -> list[object]:
        url, told = f"http://127.0.0.1:{port}/", list[object]()
        async with ClientSession() as session:
            for headers in ([], bearer(), bearer(exp=NOW - 300)):
                try:
                    await session.ws_connect(url, headers=headers)
                except WSServerHandshakeError as refused:
                    told.append(refused.status)
            for scope in ("chat chat:more", "chat"):
                async with session.ws_connect(url, headers=bearer(scope=scope)) as socket:
                    told.append(await socket.receive_str())
                    await socket.receive()
                    told.append(socket.close_code)
        return told

    with serving(behind(verifier, chat)) as port:
        # 1006: later it can only be cut off, because nobody but the handler has the socket.
        assert asyncio.run(talk(port)) == [401, 403, 401, KEY_ID, 1000, KEY_ID, 1006]


# API keys in the URL


QUERIES = {
    "alone": (f"api_key={API_KEY}", "/"),
    "between others": (f"a=1&api_key={API_KEY}&b=%20+", "/?a=1&b=%20+"),
    "in another spelling": (f"%61pi_key={API_KEY}&a", "/?a"),
    "twice": (f"api_key={API_KEY}&api_key={API_KEY}", "/"),
    "beside what is no UTF-8": (f"api_key={API_KEY}&a=%ff", "/?a=%ff"),
}


@pytest.mark.parametrize(("query", "left"), QUERIES.values(), ids=QUERIES)
def test_an_api_key_in_the_url_is_seen_by_nobody(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, query: str, left: str
) -> None:
    """Not by handlers, whatever they ask the request, and not by the access log."""
    seen: list[str] = []

    async def look(request: web.Request) -> web.Response:
        copy = request.clone()
        for each in (request, copy):
            seen.extend((each.raw_path, each.path_qs, str(each.rel_url)))
            assert each.url.host == "127.0.0.1"
            seen.append(each.url.raw_path_qs)
            assert "api_key" not in each.query
            assert API_KEY not in f"{each.query_string} {each.url} {vars(each)}"
        return web.json_response({"key_id": request["coatcheck"].key_id})

    with (
        caplog.at_level(logging.DEBUG),
        asking(behind(verifier, look)) as ask,
    ):
        answer = ask("GET", f"/?{query}")

    assert (answer.status, answer.document) == (200, {"key_id": "key_1"})
    assert seen == [left] * 8
    (line,) = (r.getMessage() for r in caplog.records if r.name == "aiohttp.access")
    assert f'"GET {left} HTTP/1.1" 200' in line
    assert API_KEY not in caplog.text
    assert_private(answer)


def assert_private(answer: Answer) -> None:
    assert answer.headers["cache-control"] in ("private", "no-store")
    assert answer.headers["referrer-policy"] == "no-referrer"


REFUSED = {
    "a token": "access_token=a.b.c&",
    "two keys": "api_key=another&",
}


@pytest.mark.parametrize("more", REFUSED.values(), ids=REFUSED)
def test_a_refused_api_key_in_the_url_is_logged_by_nobody(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, more: str
) -> None:
    """It is still somebody's key."""
    with (
        caplog.at_level(logging.DEBUG),
        asking(behind(verifier, a_function, path="/a")) as ask,
    ):
        for path in ("/a", "/nowhere", METADATA):
            assert_private(ask("GET", f"{path}?{more}api_key={API_KEY}"))

    assert API_KEY not in caplog.text
    assert "access_token" not in caplog.text
    assert caplog.text.count("HTTP/1.1") == 3


def test_an_api_key_on_a_public_path_is_hidden_too(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody asked for it there, and it may work elsewhere."""

    async def open_to_all(request: web.Request) -> web.Response:
        return web.json_response({"who": request["coatcheck"], "query": request.query_string})

    with (
        caplog.at_level(logging.DEBUG),
        asking(behind(verifier, open_to_all, public=("/",))) as ask,
    ):
        answer = ask("GET", f"/?api_key={API_KEY}&a=1")

    assert answer.document == {"who": None, "query": "a=1"}
    assert API_KEY not in caplog.text


def test_an_absolute_request_target_is_hidden_too(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    """RFC 9112 §3.2.2: a server takes it, although only proxies get it."""

    async def look(request: web.Request) -> web.Response:
        return web.json_response([request.raw_path, request.path_qs, str(request.url)])

    with (
        caplog.at_level(logging.DEBUG),
        asking(behind(verifier, look, path="/a")) as ask,
    ):
        answer = ask("GET", f"http://api.example.com/a?api_key={API_KEY}&b=1")

    told = ["http://api.example.com/a?b=1", "/a?b=1", "http://api.example.com/a?b=1"]
    assert answer.document == told
    assert API_KEY not in caplog.text


def test_an_answer_that_the_handler_begins_itself_is_kept_private(verifier: Verifier) -> None:
    """A stream is sent before the middleware sees it; what the application said last loses."""

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Cache-Control": "public", "X-Own": "1"})
        await answer.prepare(request)
        await answer.write(b"{}")
        return answer

    async def signal(_: web.Request, answer: web.StreamResponse) -> None:
        answer.headers["Referrer-Policy"] = "origin"

    app = behind(verifier, stream)
    app.on_response_prepare.append(signal)
    with asking(app) as ask:
        private, ordinary = ask("GET", f"/?api_key={API_KEY}"), ask("GET", "/", bearer())

    assert_private(private)
    assert (private.headers["x-own"], private.body) == ("1", b"{}")
    assert ordinary.headers["cache-control"] == "public"
    assert ordinary.headers["referrer-policy"] == "origin"
