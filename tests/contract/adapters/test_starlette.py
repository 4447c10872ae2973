"""What Starlette's users have beside the contract: endpoints of all kinds, and WebSockets."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from coatcheck import apikey
from coatcheck.scope import MalformedScope
from coatcheck.starlette import CoatcheckMiddleware, require_scopes
from coatcheck.verifier import Verifier
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, a_principal, claims, key_set, signer

METADATA = "/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{AUDIENCE}{METADATA}"'


@require_scopes("widgets:read")
async def widgets(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.key_id})


@require_scopes("widgets:read")
def widgets_sync(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.key_id})


class Widgets(HTTPEndpoint):
    @require_scopes("widgets:read", "widgets:write")
    async def get(self, request: Request) -> Response:
        return JSONResponse({"key_id": request.user.key_id})


@requires("widgets:read")
async def stock_requires(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.identity})


async def one_place(request: Request) -> Response:
    request.user.require("read", resource=f"PLACE/{request.path_params['id']}")
    return JSONResponse({})


async def whoami(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.display_name})


async def health(request: Request) -> Response:
    return JSONResponse({"is_authenticated": request.user.is_authenticated})


async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(websocket.user.key_id)
    await websocket.close()


@require_scopes("chat")
async def narrow_chat(websocket: WebSocket) -> None:
    await chat(websocket)


def starlette_client(verifier: Verifier) -> TestClient:
    app = Starlette(
        routes=[
            Route("/whoami", whoami),
            Route("/widgets", widgets),
            Route("/widgets/sync", widgets_sync),
            Route("/widgets/class", Widgets),
            Route("/widgets/stock", stock_requires),
            Route("/places/{id}", one_place),
            Route("/health", health),
            Route("/health/widgets", widgets),
            WebSocketRoute("/chat", chat),
            WebSocketRoute("/chat/narrow", narrow_chat),
        ],
        middleware=[
            Middleware(CoatcheckMiddleware, verifier, public=["/health", "/health/widgets"])
        ],
    )
    return TestClient(app)


@pytest.fixture
def bodies() -> list[bytes]:
    """What the issuer answers with; empty it, and the issuer is away."""
    return [key_set()]


@pytest.fixture
def verifier(bodies: list[bytes]) -> Iterator[Verifier]:
    def fetch(_: str) -> bytes:
        return bodies[-1]

    with Verifier(ISSUER, AUDIENCE, feed=None, fetch=fetch, clock=SetClock()) as verifier:
        yield verifier


def bearer(**changes: object) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {signer().token(claims(**changes))}")]


@pytest.fixture
def client(verifier: Verifier) -> TestClient:
    return starlette_client(verifier)


def sent(**changes: object) -> dict[str, str]:
    return dict(bearer(**changes))


@pytest.mark.parametrize("path", ["/widgets", "/widgets/sync", "/widgets/class", "/widgets/stock"])
def test_scopes_are_asked_of_every_kind_of_endpoint(client: TestClient, path: str) -> None:
    """Functions, coroutines, methods, and Starlette's own decorator."""
    assert client.get(path, headers=sent()).json() == {"key_id": claims()["sub"]}
    assert client.get(path, headers=sent(scope="other")).status_code == 403


def test_a_principal_that_is_asked_inside_answers_as_the_decorator_does(
    client: TestClient,
) -> None:
    """`request.user.require(…)` is the way for filters that depend on the path."""
    assert client.get("/places/1", headers=sent(scope="read@PLACE/1")).status_code == 200
    refused = client.get("/places/2", headers=sent(scope="read@PLACE/1"))

    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
    assert 'scope="read@PLACE/2"' in refused.headers["www-authenticate"]
    assert refused.headers["www-authenticate"].startswith(BARE)


def test_a_scope_on_a_public_path_asks_for_a_credential(client: TestClient) -> None:
    """Two settings that contradict each other: the stricter one counts."""
    refused = client.get("/health/widgets")

    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, BARE)


@pytest.mark.parametrize("path", ["/chat", "/chat/narrow"])
def test_a_websocket_needs_a_credential_and_its_scopes(client: TestClient, path: str) -> None:
    """RFC 6455 §7.4.1: 1008, policy violation."""
    with client.websocket_connect(path, headers=sent(scope="chat")) as socket:
        assert socket.receive_text() == claims()["sub"]
    for headers in ({}, sent(exp=NOW - 300)):
        with (
            pytest.raises(WebSocketDisconnect) as closed,
            client.websocket_connect(path, headers=headers),
        ):
            pass
        assert closed.value.code == 1008


def test_a_websocket_without_the_scope_is_closed(client: TestClient) -> None:
    """The decorator covers WebSockets too."""
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect("/chat/narrow", headers=sent()),
    ):
        pass

    assert (closed.value.code, closed.value.reason) == (1008, "insufficient_scope")


def test_metadata_is_served_for_get_only(client: TestClient) -> None:
    """Everything else at that path belongs to the application, behind the door."""
    assert client.head(METADATA).status_code == 200
    assert client.post(METADATA).status_code == 401


def test_the_peer_is_passed_on(bodies: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrictions need the caller's address."""
    seen: list[object] = []
    with Verifier(
        ISSUER, AUDIENCE, feed=None, fetch=lambda _: bodies[-1], clock=SetClock()
    ) as verifier:
        ours = verifier.authenticate_async

        async def watched(*args: Any, **named: Any) -> Any:
            seen.append(named["client_address"])
            return await ours(*args, **named)

        monkeypatch.setattr(verifier, "authenticate_async", watched)
        starlette_client(verifier).get("/whoami", headers=sent())

    assert seen == ["testclient"]


# Starlette: what it tells the verifier of the request, and what it keeps from everybody else


@pytest.fixture
def restricting(bodies: list[bytes]) -> Iterator[Verifier]:
    """One that knows a role, and looks up API keys itself."""
    with Verifier(
        ISSUER,
        AUDIENCE,
        feed=None,
        fetch=lambda _: bodies[-1],
        clock=SetClock(),
        roles={"viewer": ("GET",), "member": ("GET", "POST")},
        check_api_key=a_principal,
    ) as verifier:
        yield verifier


def test_the_method_is_passed_on(restricting: Verifier) -> None:
    """A role is held against it; the handshake of a WebSocket is a GET, RFC 6455 §4.1."""
    client = starlette_client(restricting)
    viewer = sent(must=["role"], roles=["viewer"], scope="chat")
    poster = sent(must=["role"], roles=["member"])

    assert client.get("/whoami", headers=viewer).status_code == 200
    assert client.head("/whoami", headers=viewer).status_code == 200
    refused = client.post("/whoami", headers=viewer)
    assert (refused.status_code, refused.json()["code"]) == (403, "role_not_allowed")
    assert client.post("/whoami", headers=poster).status_code == 405
    with client.websocket_connect("/chat", headers=viewer) as socket:
        assert socket.receive_text() == claims()["sub"]


def test_a_project_is_read_from_its_header(restricting: Verifier) -> None:
    """And the application finds it in the Principal."""

    async def project(request: Request) -> Response:
        return JSONResponse({"project": request.user.require_project()})

    client = behind(restricting, project)

    named = client.get("/", headers=sent() | {"X-Project-Id": "prj_1"})
    assert named.json() == {"project": "prj_1"}
    missing = client.get("/", headers=sent())
    assert (missing.status_code, missing.json()["code"]) == (400, "project_required")
    assert missing.headers["www-authenticate"].startswith(BARE)


API_KEY = apikey.make("ck_live")
Endpoint = Callable[[Request], Awaitable[Response]]


def behind(verifier: Verifier, endpoint: Endpoint, *, public: tuple[str, ...] = ()) -> TestClient:
    """A client of one endpoint behind the middleware."""
    routes = [Route("/", endpoint, methods=["GET", "POST"])]
    middleware = [Middleware(CoatcheckMiddleware, verifier, public=public)]
    return TestClient(Starlette(routes=routes, middleware=middleware))


QUERIES = {
    "alone": (f"api_key={API_KEY}", ""),
    "between others": (f"a=1&api_key={API_KEY}&b=%20+", "a=1&b=%20+"),
    "in another spelling": (f"%61pi_key={API_KEY}&a", "a"),
    "twice": (f"api_key={API_KEY}&api_key={API_KEY}", ""),
}


@pytest.mark.parametrize(("query", "left"), QUERIES.values(), ids=QUERIES)
def test_an_api_key_in_the_url_is_seen_by_nobody_behind(
    restricting: Verifier, query: str, left: str
) -> None:
    """
    It would end up in logs, traces and error reports.

    The server's access log reads the very same dict when the answer begins.
    """
    seen: list[str] = []
    servers: list[Any] = []

    async def endpoint(request: Request) -> Response:
        seen.append(f"{request.url} {request.scope}")
        return JSONResponse({"query": request.url.query})

    inner = behind(restricting, endpoint).app

    async def server(scope: Any, receive: Any, send: Any) -> None:
        servers.append(scope)
        await inner(scope, receive, send)

    answer = TestClient(server).get(f"/?{query}")

    assert answer.json() == {"query": left}
    (scope,) = (scope for scope in servers if scope["type"] == "http")
    assert scope["query_string"] == left.encode()
    assert API_KEY not in f"{seen}{answer.headers}"
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["referrer-policy"] == "no-referrer"


CACHED = {
    "nothing said": ({}, "private"),
    "for everybody": ({"Cache-Control": "public, max-age=600"}, "private"),
    "for nobody": ({"Cache-Control": "no-store"}, "no-store"),
    "for nobody and more": ({"cache-control": "max-age=0, No-Store"}, "max-age=0, No-Store"),
    "a policy of its own": ({"Referrer-Policy": "unsafe-url"}, "private"),
}


@pytest.mark.parametrize(("headers", "kept"), CACHED.values(), ids=CACHED)
def test_an_answer_under_such_a_url_is_kept_by_no_shared_cache(
    restricting: Verifier, headers: dict[str, str], kept: str
) -> None:
    """RFC 9111 §5.2.2: what the application says may be stricter, never looser."""

    async def endpoint(_: Request) -> Response:
        return Response(headers=headers)

    client = behind(restricting, endpoint)

    answer = client.get("/", params={"api_key": API_KEY})
    assert answer.headers.get_list("cache-control") == [kept]
    assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
    untouched = client.get("/?a=1", headers={"X-API-Key": API_KEY})
    for name in ("Cache-Control", "Referrer-Policy"):
        said = {key.lower(): value for key, value in headers.items()}
        assert untouched.headers.get(name) == said.get(name.lower())


def test_a_refused_request_with_a_key_in_its_url_leaves_no_trace_either(
    verifier: Verifier,
) -> None:
    """It is logged as any other; and such an answer is stored by nobody."""
    scopes: list[Any] = []
    inner = starlette_client(verifier).app

    async def server(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await inner(scope, receive, send)

    answer = TestClient(server).get("/whoami", params={"api_key": API_KEY, "a": "1"})

    assert (answer.status_code, answer.json()["code"]) == (401, "tokens_only")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert scopes[-1]["query_string"] == b"a=1"
    assert API_KEY not in f"{answer.text}{answer.headers}"


def test_the_query_of_a_public_path_is_the_applications_own(restricting: Verifier) -> None:
    """Nothing there is a credential of ours: a parameter of the same name may be one of theirs."""

    async def endpoint(request: Request) -> Response:
        return JSONResponse({"query": request.url.query})

    answer = behind(restricting, endpoint, public=("/",)).get("/?api_key=theirs&a=1")

    assert answer.json() == {"query": "api_key=theirs&a=1"}
    assert "referrer-policy" not in answer.headers


def test_a_websocket_takes_a_key_in_its_url_as_well(restricting: Verifier) -> None:
    """Browsers can set no header there."""
    client = starlette_client(restricting)

    with client.websocket_connect(f"/chat?api_key={API_KEY}") as socket:
        assert socket.receive_text() == "key_1"
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(f"/chat/narrow?api_key={API_KEY}"),
    ):
        pass
    assert closed.value.code == 1008


def test_settings_can_be_passed_by_name() -> None:
    """The short form; mistakes are told when the application is built."""
    CoatcheckMiddleware(Starlette(), issuer=ISSUER, audience=AUDIENCE)
    with pytest.raises(ValueError, match="leeway"):
        CoatcheckMiddleware(Starlette(), issuer=ISSUER, audience=AUDIENCE, leeway=600)
    with pytest.raises(ValueError, match="public"):
        CoatcheckMiddleware(Starlette(), public="/health", issuer=ISSUER, audience=AUDIENCE)


def test_a_verifier_and_settings_contradict_each_other(verifier: Verifier) -> None:
    """One of them would be ignored in silence."""
    with pytest.raises(ValueError, match="not both"):
        CoatcheckMiddleware(Starlette(), verifier, leeway=5)


def test_mistakes_in_the_decorator_are_told_at_import() -> None:
    """Not at the first request."""
    with pytest.raises(MalformedScope):
        require_scopes("widgets read@")
    with pytest.raises(TypeError):
        require_scopes("widgets:read")(lambda: None)
