"""FastAPI alone: dependencies of every kind, the OpenAPI document, and the lifespan."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Security, WebSocket
from fastapi.exceptions import WebSocketException
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer, SecurityScopes
from fastapi.testclient import TestClient
from openapi_spec_validator import validate
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from coatcheck.fastapi import Coatcheck, Principal, allow_api_key_query
from coatcheck.verifier import MissingCredentials, Verifier, VerifierError
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, claims, key_set, signer

METADATA = "/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{AUDIENCE}{METADATA}"'
KEY_ID = claims()["sub"]


@pytest.fixture
def fetched() -> list[str]:
    """What was asked of the issuer."""
    return []


@pytest.fixture
def settings(fetched: list[str]) -> dict[str, Any]:
    """Of a verifier whose issuer is this test."""

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return key_set()

    return {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "feed": None,
        "fetch": fetch,
        "clock": SetClock(),
        "roles": {"viewer": ("GET",)},
    }


@pytest.fixture
def auth(settings: dict[str, Any]) -> Iterator[Coatcheck]:
    made = Coatcheck(**settings)
    yield made
    made.gate.verifier.close()


def sent(**changes: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {signer().token(claims(**changes))}"}


def test_the_issuer_and_the_audience_are_named_by_place(auth: Coatcheck) -> None:
    """As in the first line of every example."""
    named = Coatcheck(ISSUER, audience=AUDIENCE)

    assert named.gate.verifier.issuer == auth.gate.verifier.issuer == ISSUER
    with pytest.raises(ValueError, match="not both"):
        Coatcheck(ISSUER, verifier=auth.gate.verifier)


# Where it may stand


PLACES: dict[str, Callable[[Coatcheck], FastAPI]] = {}


def place(build: Callable[[Coatcheck], FastAPI]) -> Callable[[Coatcheck], FastAPI]:
    PLACES[build.__name__] = build
    return build


@place
def security(auth: Coatcheck) -> FastAPI:
    app = FastAPI()

    @app.get("/widgets")
    async def widgets(
        who: Annotated[Principal, Security(auth, scopes=["widgets:read"])],
    ) -> dict[str, str]:
        return {"key_id": who.key_id}

    return app


@place
def a_function_of_a_thread(auth: Coatcheck) -> FastAPI:
    app = FastAPI()

    @app.get("/widgets")
    def widgets(who: Annotated[Principal, Depends(auth)]) -> dict[str, str]:
        who.require("widgets:read")
        return {"key_id": who.key_id}

    return app


@place
def of_the_application(auth: Coatcheck) -> FastAPI:
    app = FastAPI(dependencies=[Security(auth, scopes=["widgets:read"])])

    @app.get("/widgets")
    async def widgets() -> dict[str, object]:
        return {"key_id": KEY_ID}

    return app


@place
def of_a_router(auth: Coatcheck) -> FastAPI:
    router = APIRouter(prefix="/widgets", dependencies=[Security(auth, scopes=["widgets:read"])])

    @router.get("")
    async def widgets(who: Annotated[Principal, Depends(auth)]) -> dict[str, str]:
        return {"key_id": who.key_id}

    app = FastAPI()
    app.include_router(router)
    return app


@place
def in_a_sub_application(auth: Coatcheck) -> FastAPI:
    app, inner = FastAPI(), FastAPI()

    @inner.get("/")
    async def widgets(
        who: Annotated[Principal, Security(auth, scopes=["widgets:read"])],
    ) -> dict[str, str]:
        return {"key_id": who.key_id}

    app.mount("/widgets", inner)
    return app


@place
def below_another_dependency(auth: Coatcheck) -> FastAPI:
    async def organization(who: Annotated[Principal, Security(auth)]) -> str | None:
        return who.org_id

    app = FastAPI()

    @app.get("/widgets")
    async def widgets(
        _: Annotated[str | None, Security(organization, scopes=["widgets:read"])],
        who: Annotated[Principal, Security(auth)],
    ) -> dict[str, str]:
        return {"key_id": who.key_id}

    return app


@pytest.mark.parametrize("build", PLACES.values(), ids=PLACES)
def test_a_refusal_is_answered_in_full_wherever_it_is_made(
    auth: Coatcheck, build: Callable[[Coatcheck], FastAPI]
) -> None:
    """Without a handler by the user, and without the lifespan."""
    client = TestClient(build(auth))

    assert client.get("/widgets", headers=sent()).json() == {"key_id": KEY_ID}
    missing = client.get("/widgets")
    assert (missing.status_code, missing.headers["www-authenticate"]) == (401, BARE)
    assert missing.json()["code"] == "missing_credentials"
    lacking = client.get("/widgets", headers=sent(scope="widgets:write"))
    assert (lacking.status_code, lacking.json()["code"]) == (403, "insufficient_scope")
    assert lacking.headers["content-type"] == "application/problem+json"
    assert lacking.headers["cache-control"] == "no-store"
    assert 'scope="widgets:read"' in lacking.headers["www-authenticate"]


def test_scopes_of_nested_dependencies_add_up(auth: Coatcheck) -> None:
    """All of them are needed, and the challenge names them at once."""
    nested = APIRouter(dependencies=[Security(auth)])

    async def writer(who: Annotated[Principal, Security(auth, scopes=["widgets:write"])]) -> str:
        return who.key_id

    @nested.get("/widgets")
    async def widgets(key_id: Annotated[str, Security(writer, scopes=["widgets:read"])]) -> str:
        return key_id

    app = FastAPI()
    app.include_router(nested)
    client = TestClient(app)

    assert client.get("/widgets", headers=sent()).json() == KEY_ID
    for scope in ("widgets:read", "widgets:write"):
        refused = client.get("/widgets", headers=sent(scope=scope))
        assert refused.status_code == 403
        assert 'scope="widgets:read widgets:write"' in refused.headers["www-authenticate"]


def test_a_refusal_by_the_application_gets_the_challenge_of_this_api(auth: Coatcheck) -> None:
    """An error that the application makes itself knows no realm."""
    app = FastAPI(dependencies=[Security(auth)])

    @app.get("/")
    async def refusing() -> None:
        raise MissingCredentials

    assert TestClient(app).get("/", headers=sent()).headers["www-authenticate"] == BARE


def test_the_wrong_role_is_told_by_the_method(auth: Coatcheck) -> None:
    """Per route as anywhere."""
    app = FastAPI()

    @app.api_route("/", methods=["GET", "POST"])
    async def root(who: Annotated[Principal, Depends(auth)]) -> str:
        return who.key_id

    client, viewer = TestClient(app), sent(must=["role"], roles=["viewer"])

    assert client.get("/", headers=viewer).status_code == 200
    assert client.post("/", headers=viewer).json()["code"] == "role_not_allowed"


def test_refusals_win_over_wrong_parameters(auth: Coatcheck) -> None:
    """Who may not ask learns nothing of what may be asked."""
    app = FastAPI()

    @app.post("/things/{number}")
    async def thing(number: int, who: Annotated[Principal, Depends(auth)], body: list[int]) -> str:
        return f"{who.key_id} {number} {body}"

    client = TestClient(app)

    assert client.post("/things/a", json={"no": "list"}).status_code == 401
    assert client.post("/things/a", json={"no": "list"}, headers=sent()).status_code == 422
    # A limit: FastAPI reads JSON before it asks any dependency.
    broken: dict[str, Any] = {"content": b"{", "headers": {"Content-Type": "application/json"}}
    assert client.post("/things/1", **broken).status_code == 422


def test_a_handler_of_the_users_own_wins(auth: Coatcheck) -> None:
    """For who wants refusals in the form of all other errors."""
    app = security(auth)

    @app.exception_handler(VerifierError)
    async def own(_: Request, error: VerifierError) -> JSONResponse:
        return JSONResponse({"own": error.code}, error.status)

    assert TestClient(app).get("/widgets").json() == {"own": "missing_credentials"}


def test_without_a_place_for_handlers_the_challenge_still_arrives(auth: Coatcheck) -> None:
    """Inside of something that is no Starlette application."""
    bare: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}

    def ask(**more: str) -> Principal:
        return asyncio.run(auth(HTTPConnection(bare | more), SecurityScopes()))

    with pytest.raises(HTTPException) as refused:
        ask()
    assert refused.value.status_code == 401
    assert refused.value.headers is not None
    assert refused.value.headers["WWW-Authenticate"] == BARE
    with pytest.raises(WebSocketException) as closed:
        ask(type="websocket")
    assert closed.value.code == 1008


# WebSockets


def test_a_websocket_is_closed_with_1008(auth: Coatcheck) -> None:
    """RFC 6455 §7.4.1; before it is accepted, and after."""
    app = FastAPI()

    @app.websocket("/chat")
    async def chat(
        websocket: WebSocket, who: Annotated[Principal, Security(auth, scopes=["chat"])]
    ) -> None:
        await websocket.accept()
        await websocket.send_text(who.key_id)
        who.require("chat:more")

    client = TestClient(app)
    with client.websocket_connect("/chat", headers=sent(scope="chat chat:more")) as socket:
        assert socket.receive_text() == KEY_ID
    with client.websocket_connect("/chat", headers=sent(scope="chat")) as socket:
        assert socket.receive_text() == KEY_ID
        with pytest.raises(WebSocketDisconnect) as late:
            socket.receive_text()
    refused = {"missing_credentials": {}, "insufficient_scope": sent(), "token_expired": EXPIRED}
    for code, headers in refused.items():
        with (
            pytest.raises(WebSocketDisconnect) as closed,
            client.websocket_connect("/chat", headers=headers),
        ):
            pass
        assert (closed.value.code, closed.value.reason) == (1008, code)
    assert (late.value.code, late.value.reason) == (1008, "insufficient_scope")


EXPIRED = {"Authorization": f"Bearer {signer().token(claims(iat=NOW - 900, exp=NOW - 300))}"}


# OpenAPI


def test_the_openapi_document_is_valid_and_names_the_scopes_of_each_route(auth: Coatcheck) -> None:
    """OpenAPI 3.1.1 §4.8.27: a reader sees what to ask a token for."""
    app = FastAPI(lifespan=auth.lifespan)

    @app.get("/widgets")
    async def widgets(
        who: Annotated[Principal, Security(auth, scopes=["widgets:read"])],
    ) -> dict[str, str]:
        return {"key_id": who.key_id}

    @app.get("/whoami")
    async def whoami(who: Annotated[Principal, Depends(auth)]) -> str:
        return who.key_id

    @app.get("/health")
    async def health() -> None:
        """Open to everybody."""

    with TestClient(app) as client:
        document = client.get("/openapi.json").json()
    validate(document)
    assert document["components"]["securitySchemes"] == {
        "Coatcheck": {
            "type": "oauth2",
            "flows": {"clientCredentials": {"scopes": {}, "tokenUrl": f"{ISSUER}/oauth/token"}},
        }
    }
    assert set(document["paths"]) == {"/widgets", "/whoami", "/health"}
    assert document["paths"]["/widgets"]["get"]["security"] == [{"Coatcheck": ["widgets:read"]}]
    assert document["paths"]["/whoami"]["get"]["security"] == [{"Coatcheck": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def test_two_apis_in_one_document_have_two_names(auth: Coatcheck, settings: dict[str, Any]) -> None:
    """Each with its own audience and its own words."""
    admin = Coatcheck(
        **settings | {"audience": "https://admin.example.com"},
        scheme_name="Admin",
        description="For operators.",
        scopes={"admin": "Everything"},
    )
    app = FastAPI()

    @app.get("/widgets")
    async def widgets(who: Annotated[Principal, Security(auth)]) -> str:
        return who.key_id

    @app.get("/admin")
    async def admins(who: Annotated[Principal, Security(admin, scopes=["admin"])]) -> str:
        return who.key_id

    document = app.openapi()
    validate(document)
    schemes = document["components"]["securitySchemes"]
    assert set(schemes) == {"Coatcheck", "Admin"}
    assert schemes["Admin"]["description"] == "For operators."
    assert schemes["Admin"]["flows"]["clientCredentials"]["scopes"] == {"admin": "Everything"}
    client = TestClient(app)
    assert client.get("/widgets").headers["www-authenticate"] == BARE
    assert "https://admin.example.com" in client.get("/admin").headers["www-authenticate"]


def test_the_documentation_page_can_take_a_token(auth: Coatcheck) -> None:
    """Browsers may not ask the token endpoint from another origin, so that one is pasted."""
    app = FastAPI(dependencies=[Depends(HTTPBearer(auto_error=False))])

    @app.get("/widgets")
    async def widgets(who: Annotated[Principal, Security(auth, scopes=["widgets:read"])]) -> str:
        return who.key_id

    document = app.openapi()
    validate(document)
    needs = document["paths"]["/widgets"]["get"]["security"]
    assert sorted(needs, key=str) == [{"Coatcheck": ["widgets:read"]}, {"HTTPBearer": []}]
    client = TestClient(app)
    assert client.get("/widgets", headers=sent()).status_code == 200
    assert client.get("/widgets").headers["www-authenticate"] == BARE


# The lifespan


def test_the_lifespan_asks_the_issuer_ahead_and_serves_the_document(
    auth: Coatcheck, fetched: list[str]
) -> None:
    """RFC 9728 §3; also where a route takes every path, and as often as the app starts."""
    app = FastAPI(lifespan=auth.lifespan)

    @app.get("/{path:path}")
    async def everything(path: str, who: Annotated[Principal, Depends(auth)]) -> str:
        return f"{path} {who.key_id}"

    for starts in (1, 2):
        with TestClient(app) as client:
            assert len(fetched) == starts
            document = client.get(METADATA)
            assert document.json() == auth.gate.verifier.protected_resource_metadata()
            assert document.headers["content-type"] == "application/json"
            assert client.post(METADATA).status_code == 405
            assert client.get("/a", headers=sent()).status_code == 200
            assert len(fetched) == starts
    assert [getattr(route, "path", "") for route in app.routes].count(METADATA) == 1


def test_the_lifespan_can_stand_in_the_users_own(auth: Coatcheck, fetched: list[str]) -> None:
    """Which nearly every application has."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with auth.lifespan(app):
            yield {"state": "mine"}

    app = FastAPI(lifespan=lifespan)

    @app.get("/widgets")
    async def widgets(request: Request, who: Annotated[Principal, Depends(auth)]) -> str:
        return f"{request.state.state} {who.key_id}"

    with TestClient(app) as client:
        assert fetched
        assert client.get(METADATA).status_code == 200
        assert client.get("/widgets", headers=sent()).json() == f"mine {KEY_ID}"


def test_an_issuer_that_is_away_keeps_nothing_from_starting(settings: dict[str, Any]) -> None:
    """The first caller gets 503, and a later one is served."""

    def fetch(_: str) -> bytes:
        raise OSError

    auth = Coatcheck(**settings | {"fetch": fetch})
    app = security(auth)
    app.router.lifespan_context = auth.lifespan
    with TestClient(app) as client:
        assert client.get("/widgets", headers=sent()).json()["code"] == "issuer_unavailable"


def test_a_verifier_that_was_handed_in_is_not_closed(settings: dict[str, Any]) -> None:
    """Others may use it, too."""
    with Verifier(**settings) as verifier:
        auth = Coatcheck(verifier=verifier)
        with TestClient(FastAPI(lifespan=auth.lifespan)):
            pass
        assert auth.gate.verifier is verifier
        assert verifier.verify_jwt(signer().token(claims())).key_id == KEY_ID


# API keys in the URL


def test_an_api_key_in_the_url_is_hidden_although_it_does_not_count(auth: Coatcheck) -> None:
    """It counts where something stands before all routes that takes it from every log."""
    app, seen = FastAPI(), []

    @app.get("/")
    async def root(request: Request, who: Annotated[Principal, Depends(auth)]) -> str:
        seen.append(str(request.url))
        return who.key_id

    client = TestClient(app)
    assert client.get("/?api_key=ck_live_x&a=1").json()["code"] == "missing_credentials"
    assert client.get("/?api_key=ck_live_x&a=1", headers=sent()).status_code == 200
    app = security(auth)
    app.add_middleware(allow_api_key_query)
    malformed = TestClient(app).get("/widgets?api_key=ck_live_x")
    assert malformed.json()["code"] == "token_malformed"
    assert malformed.headers["referrer-policy"] == "no-referrer"
    assert seen == ["http://testserver/?a=1"]


# Tests of users


def test_users_can_put_somebody_in_its_place(auth: Coatcheck) -> None:
    """FastAPI's own way to test what stands behind a dependency."""
    app = security(auth)
    app.dependency_overrides[auth] = lambda: auth.gate.verifier.verify_jwt(
        signer().token(claims(sub="key_other"))
    )

    assert TestClient(app).get("/widgets").json() == {"key_id": "key_other"}
