"""One of the five products as its people have it: a service, an operator, customers, an API.

The service is a process of its own, begun by `coatcheck init`, and everything is asked of it over
HTTP by clients that know nothing of it: requests at `/v1`, OAuth libraries at the token endpoint.
The product's own API stands in process behind our middleware, with a verifier that follows the
service.
"""

import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import requests
from httpx2 import Response
from oauthlib.oauth2 import BackendApplicationClient
from requests_oauthlib import OAuth2Session
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.testclient import TestClient

from coatcheck.server import catalog_file
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.settings import Settings
from coatcheck.server.store import open_store
from coatcheck.starlette import CoatcheckMiddleware, require_scopes
from coatcheck.verifier import Verifier
from support.live import Live, a_service

CATALOGS: Final = Path(__file__).parents[2] / "examples" / "catalogs"
#: Where callers call from, unless a test says otherwise.
HERE: Final = "198.51.100.7"
TIMEOUT: Final = 10
#: Seconds for which a test waits for what the service says itself is a matter of one.
SOON: Final = 8

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Api:
    """The management API, for whoever holds this API key."""

    issuer: str
    key: str = field(repr=False)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> requests.Response:
        sent = {"Authorization": f"Bearer {self.key}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.request(
            method, f"{self.issuer}/v1{path}", json=body, headers=sent, timeout=TIMEOUT
        )

    def __call__(
        self, method: str, path: str, body: object = None, *, status: int = 200, **headers: str
    ) -> Any:
        """The answer's document; its status has to be this one."""
        answer = self.ask(method, path, body, **headers)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def refusal(self, method: str, path: str, body: object = None) -> tuple[int, str, str]:
        """Status, code and sentence of an answer that says no, with what it points at."""
        answer = self.ask(method, path, body, If_Match="*")
        told = answer.json()
        pointed = "; ".join(f"{one['pointer']} {one['detail']}" for one in told.get("errors", ()))
        return answer.status_code, told["code"], pointed or told["detail"]

    def make(self, name: str, *scopes: str, **more: object) -> Document:
        """A new API key."""
        body = {"name": name, **({"scopes": scopes} if scopes else {}), **more}
        made: Document = self("POST", "/keys", body, status=201)
        return made

    def edit(self, path: str, **changes: object) -> Document:
        """Change something as a page does: by the version that it shows."""
        etag = self.ask("GET", path).headers["ETag"]
        edited: Document = self("PATCH", path, changes, If_Match=etag)
        return edited

    def names(self, query: str = "") -> list[str]:
        """The names in a list of API keys, but for the customer's own for management."""
        return [one["name"] for one in self("GET", f"/keys{query}")["data"] if not _manages(one)]

    def events(self, what: str) -> list[Document]:
        found: list[Document] = self("GET", f"/events?what={what}")["data"]
        return found


@dataclass(frozen=True, slots=True)
class Customer:
    """An organization, and its first key, which administers it."""

    id: str
    project: str
    api: Api


@dataclass(frozen=True, slots=True)
class Door:
    """The product's own API, behind our middleware."""

    app: Starlette
    verifier: Verifier

    def ask(
        self,
        credential: str,
        path: str = "/whoami",
        method: str = "GET",
        *,
        place: str = "bearer",
        address: str = HERE,
        project: str | None = None,
        body: object = None,
    ) -> Response:
        """Call it with a credential in one of the places where one may stand."""
        headers = {} if place == "query" else presented(credential, place)
        if project is not None:
            headers["X-Project-Id"] = project
        params = {"api_key": credential} if place == "query" else {}
        client = TestClient(self.app, client=(address, 50_000))
        return client.request(method, path, headers=headers, params=params, json=body)

    def told(self, credential: str, *where: str, **how: Any) -> tuple[int, str | None]:
        """Status and code; of an answer that says yes, None."""
        answer = self.ask(credential, *where, **how)
        return answer.status_code, answer.json().get("code")

    def all_told(
        self, credentials: Iterable[str], *where: str, **how: Any
    ) -> set[tuple[int, str | None]]:
        """What several credentials are told: one element, if it makes no difference."""
        return {self.told(credential, *where, **how) for credential in credentials}


@dataclass(frozen=True, slots=True)
class Product:
    """A running deployment of one catalog.

    Attributes:
        operator: what the platform's own key may do.
        service_keys: environment → the API key of its resource servers.
    """

    live: Live
    operator: Api
    service_keys: Mapping[str, str] = field(repr=False)
    _doors: ExitStack

    @property
    def issuer(self) -> str:
        return self.live.issuer

    def customer(self, name: str = "Customer") -> Customer:
        """A new organization whose key management is switched on."""
        told = self.operator(
            "POST", "/organizations", {"name": name, "bootstrap": True}, status=201
        )
        api = Api(self.issuer, told["key"]["key"])
        return Customer(told["organization"]["id"], told["project"]["id"], api)

    def door(self, audience: str, routes: Sequence[BaseRoute], environment: str = "live") -> Door:
        """An API of the product, which trusts this service."""
        verifier = Verifier(
            self.issuer,
            audience,
            environment=environment,
            service_key=self.service_keys[environment],
        )
        self._doors.callback(verifier.close)
        shown = [Route("/whoami", whoami), *routes]
        return Door(
            Starlette(
                routes=shown, middleware=[Middleware(CoatcheckMiddleware, verifier=verifier)]
            ),
            verifier,
        )

    def resource_server(self, environment: str = "live") -> Api:
        """The management API for a resource server's key, to report usage and read groups."""
        return Api(self.issuer, self.service_keys[environment])

    def token(self, made: Document, scope: str | None = None, resource: str | None = None) -> str:
        """An access token, by a library that knows nothing of Coatcheck."""
        client = BackendApplicationClient(client_id=made["id"], scope=scope)
        with OAuth2Session(client=client) as session:
            told = session.fetch_token(
                f"{self.issuer}/oauth/token",
                client_id=made["id"],
                client_secret=made["key"],
                resource=resource,
            )
        return str(told["access_token"])

    def both(self, made: Document, resource: str | None = None) -> tuple[str, str]:
        """The raw API key and a token made from it: everything has to hold for either."""
        return made["key"], self.token(made, resource=resource)

    def refusal(self, key: str, **more: str) -> tuple[int, str, str]:
        """What the token endpoint says to an API key that gets no token."""
        form = {"grant_type": "client_credentials", "client_secret": key, **more}
        answer = requests.post(f"{self.issuer}/oauth/token", data=form, timeout=TIMEOUT)
        told = answer.json()
        return answer.status_code, told["error"], told["code"]

    def report(self, *reports: Document, environment: str = "live") -> None:
        """What a gateway tells of its callers."""
        told = self.resource_server(environment)("POST", "/usage", {"reports": reports})
        assert told["counted"] == len(reports)


@contextmanager
def a_product(folder: Path, catalog: str, **audiences: Sequence[str]) -> Iterator[Product]:
    """A deployment of one of the example catalogs, until the block ends.

    Args:
        audiences: environment → the resource servers in it.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        ExitStack() as doors,
        a_service(folder, catalog=str(CATALOGS / catalog)) as live,
    ):
        # Libraries that insist on TLS take loopback without it only when they are told.
        patch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
        patch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
        management = f"{live.issuer}/v1"
        operator = locally(live, "operator", "coatcheck:operator", audiences=(management,))
        service_keys = {
            environment: locally(
                live,
                f"resource servers of {environment}",
                "coatcheck:resource-server",
                audiences=(*named, management),
                environment=environment,
            ).key
            for environment, named in audiences.items()
        }
        yield Product(live, Api(live.issuer, operator.key), service_keys, doors)


def locally(
    live: Live,
    name: str,
    *scopes: str,
    organization_id: str = "",
    now: float | None = None,
    **more: Any,
) -> Created:
    """A new API key as the command line on the machine makes one: of the platform, or long ago."""
    settings = Settings.load(live.environment)
    new = NewApiKey(
        organization_id or live.initialized["organization"], name, scopes=scopes, **more
    )
    store = open_store(settings.database_url)
    try:
        return api_keys.create(
            store,
            catalog_file.of(settings),
            new,
            Actor("cli:tester"),
            now=int(time.time() if now is None else now),
            issuer=live.issuer,
        )
    finally:
        store.close()


async def whoami(request: Request) -> JSONResponse:
    """Who is calling, and nothing that another organization has."""
    caller = request.user
    told = {"org": caller.org_id, "project": caller.project_id, "key": caller.key_id}
    return JSONResponse(told | {"env": caller.environment, "roles": list(caller.roles)})


def needing(path: str, permission: str, *methods: str) -> Route:
    """A route that declares the permission it needs, in one line."""

    @require_scopes(permission)
    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse({"org": request.user.org_id})

    return Route(path, endpoint, methods=list(methods) or ["GET"])


def presented(credential: str, place: str) -> dict[str, str]:
    """The header that carries a credential."""
    match place:
        case "bearer":
            return {"Authorization": f"Bearer {credential}"}
        case "basic":
            encoded = b64encode(f"{credential}:".encode()).decode()
            return {"Authorization": f"Basic {encoded}"}
        case _:
            return {place: credential}


def soon(ask: Callable[[], object], wanted: object) -> None:
    """Wait until something is so.  A revocation takes a second to reach everybody."""
    deadline = time.monotonic() + SOON
    while (told := ask()) != wanted:
        assert time.monotonic() < deadline, f"{told} is not yet {wanted}"
        time.sleep(0.05)


def _manages(told: Document) -> bool:
    return all(audience.endswith("/v1") for audience in told["audiences"]) and any(
        scope.startswith("keys:") for scope in told["scopes"]
    )
