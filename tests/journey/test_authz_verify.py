"""ANY /authz/verify: what gateways are told of their callers' requests, and nobody else is."""

import asyncio
import base64
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
import uvicorn
from httpx2 import Response
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.scope import ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from coatcheck.server import catalog as catalogs
from coatcheck.server import setup
from coatcheck.server.app import Service
from coatcheck.server.listen import Protocol
from coatcheck.server.manage import api_keys, organizations
from coatcheck.server.settings import Settings
from coatcheck.server.store import StoreUnavailable, open_store
from coatcheck.verifier import Verifier, VerifierError
from rights.cast import CATALOG, PRODUCT, Made, Stage
from support.deployment import (
    DAY,
    HOUR,
    ISSUER,
    NOON,
    TESTER,
    Clock,
    Deployment,
    a_deployment,
)
from support.deployment import form as form_of
from support.gateways import MAX_PROBLEM_LENGTH, running
from support.live import free_port
from support.postgres import Server

PROXY, GATEWAY, CALLER = "10.0.0.1", "192.0.2.33", "203.0.113.7"
STAGING, MCP = "https://staging.example.com", "https://mcp.example.com/mcp"
FACTS = (
    *("key", "org", "project", "environment", "scopes", "method", "roles", "group", "models"),
    *("uri", "private"),
)
METADATA = f"{PRODUCT}/.well-known/oauth-protected-resource"


@dataclass(frozen=True, slots=True)
class Door:
    """A deployment with gateways in front of an API."""

    stage: Stage
    proxy: TestClient
    stranger: TestClient

    @property
    def organization_id(self) -> str:
        return self.stage.deployment.organization_id

    def key(self, *scopes: str, **columns: Any) -> Made:
        """A caller's API key."""
        columns.setdefault("audiences", (PRODUCT,))
        return self.stage.api_key(self.organization_id, *(scopes or ("read",)), **columns)

    def token(self, key: Made, **form: str) -> str:
        answer = self.proxy.post(
            "/oauth/token",
            data=form_of(key.secret, **{"resource": PRODUCT, **form}),
            headers={"X-Forwarded-For": CALLER},
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def ask(
        self,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        *,
        method: str = "GET",
        uri: str = "/widgets",
        address: str | None = CALLER,
        kind: str = "haproxy",
        asker: TestClient | None = None,
        **parameters: str,
    ) -> Response:
        """What a gateway is told that passes this request on."""
        sent = [*(headers.items() if isinstance(headers, Mapping) else headers)]
        if address is not None:
            sent.append(("X-Forwarded-For", address))
        query = urlencode({"audience": PRODUCT, "for": kind, **parameters})
        client = asker or self.proxy
        if kind == "envoy":
            address_of_envoy = f"/authz/verify?{query}&path={uri}"
            answer = client.request(method, address_of_envoy, headers=sent)
            assert isinstance(answer, Response)
            return answer
        name = "Forwarded" if kind in ("traefik", "caddy") else "Original"
        sent += [(f"X-{name}-Method", method), (f"X-{name}-Uri", uri)]
        answer = client.get(f"/authz/verify?{query}", headers=sent)
        assert isinstance(answer, Response)
        return answer


def a_door(folder: Path, **settings: Any) -> Iterator[Door]:
    path = folder / "catalog.toml"
    path.write_text(CATALOG)
    settings.setdefault("trusted_proxies", "10.0.0.0/8")
    with a_deployment(folder, catalog=path, **settings) as made:

        def client(host: str) -> TestClient:
            return TestClient(
                made.service,
                base_url=made.settings.issuer,
                raise_server_exceptions=False,
                follow_redirects=False,
                client=(host, 40_000),
            )

        proxy = client(PROXY)
        yield Door(Stage(made, proxy, folder / "coatcheck.db"), proxy, client(GATEWAY))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """For tests that break nothing."""
    yield from a_door(tmp_path_factory.mktemp("authz"), guesses_per_minute=0)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Door]:
    """For tests that set its clock, break it or guess."""
    yield from a_door(tmp_path, guesses_per_minute=3)


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def basic(user: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()}


def told(answer: Response) -> dict[str, str]:
    """The facts of a yes, which are all there and in no other answer.

    Envoy lets a request pass on 200 and on nothing else.
    """
    ours = f"{answer.request.url} {answer.request.headers.get('X-Coatcheck-Authz')}"
    is_envoys = "for=envoy" in ours
    assert answer.status_code == (200 if is_envoys else 204), answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert ("content-length" in answer.headers) == is_envoys
    assert not answer.content
    return {name: answer.headers[f"x-coatcheck-{name}"] for name in FACTS}


def code(answer: Response) -> str:
    """The code of a refusal, after a look at its form."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-coatcheck-status"] == str(problem["status"])
    assert answer.headers.get("x-coatcheck-problem", answer.text) == answer.text
    assert len(answer.text) <= MAX_PROBLEM_LENGTH
    assert not [name for name in FACTS if f"x-coatcheck-{name}" in answer.headers]
    assert "authorization" not in answer.headers
    return str(problem["code"])


# --- who may pass

PLACES: dict[str, Callable[[str], dict[str, str]]] = {
    "bearer": bearer,
    "bearer in capitals": lambda key: {"AUTHORIZATION": f"BEARER {key}"},
    "basic": basic,
    "x-api-key": lambda key: {"X-API-Key": key},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["nginx", "haproxy", "apache", "traefik", "caddy", "envoy"])
def test_a_credential_is_taken_wherever_a_resource_server_takes_it(
    door: Door, kind: str, place: Callable[[str], dict[str, str]]
) -> None:
    key = door.key("read", "write")
    expected = {
        "key": key.id,
        "org": door.organization_id,
        "project": "",
        "environment": "live",
        "roles": "",
        "group": "",
        "models": "*",
        "uri": "/a/b?c=d",
        "private": "",
    }

    for sent, method in ((key.secret, "api_key"), (door.token(key), "jwt")):
        facts = told(door.ask(place(sent), kind=kind, uri="/a/b?c=d"))
        assert set(facts.pop("scopes").split()) == {"read", "write", "create"}
        assert facts == expected | {"method": method}


def test_everything_that_restricts_is_told(door: Door) -> None:
    """What a gateway cannot look at, its upstream has to."""
    project = door.stage.project(door.organization_id)
    group = door.stage.group(models=("small",))
    key = door.key(
        "read@PLACE/Site/42",
        project_id=project,
        permissions="read",
        models=("large", "small"),
        group_id=group,
    )

    facts = told(door.ask(bearer(key.secret)))
    assert facts["scopes"] == "read@PLACE/Site/42"
    assert (facts["project"], facts["roles"]) == (project, "viewer")
    assert (facts["group"], facts["models"]) == (group, "small")


def test_the_product_header_is_read(tmp_path: Path) -> None:
    text = CATALOG.replace("[key]", '[key]\nheader = "X-Acme-Key"')
    (tmp_path / "other.toml").write_text(text)
    with a_deployment(
        tmp_path, catalog=tmp_path / "other.toml", trusted_proxies="10.0.0.0/8"
    ) as made:
        client = TestClient(made.service, client=(PROXY, 1))
        door = Door(Stage(made, client, tmp_path / "coatcheck.db"), client, client)
        assert told(door.ask({"X-Acme-Key": door.key().secret}))["method"] == "api_key"


def test_a_connector_key_is_taken_from_the_original_uri_and_out_of_it(door: Door) -> None:
    """It would end up in the upstream's logs, and in those of everybody behind."""
    connector = door.key(kind="connector")
    for uri, clean in {
        f"/mcp?api_key={connector.secret}": "/mcp",
        f"/mcp?a=1&api_key={connector.secret}&b=%20": "/mcp?a=1&b=%20",
        f"/mcp?%61pi_key={connector.secret}&a": "/mcp?a",
    }.items():
        for kind in ("nginx", "envoy"):
            facts = told(door.ask(uri=uri, kind=kind))
            assert (facts["uri"], facts["private"]) == (clean, "true")

    assert code(door.ask(bearer(connector.secret))) == "connector_only_in_query"
    refused = door.ask(uri=f"/mcp?api_key={door.key().secret}")
    assert (refused.status_code, code(refused)) == (401, "connector_only_in_query")
    # Ours is no place for one, and neither is the gateway's own path.
    assert code(door.ask(uri="/mcp", api_key=connector.secret)) == "gateway_misconfigured"


def test_a_token_is_handed_on_if_it_is_asked_for(door: Door) -> None:
    """The upstream then needs to know nothing of API keys."""
    key = door.key("read")
    token = door.token(key)
    query = urlencode({"audience": PRODUCT, "for": "envoy", "token": "true"}) + "&path=/"

    of_token = raw(door, query, bearer(token))
    of_key = raw(door, query, bearer(key.secret))
    again = raw(door, query, bearer(key.secret))

    assert of_token.headers["authorization"] == f"Bearer {token}"
    issued = of_key.headers["authorization"].removeprefix("Bearer ")
    assert again.headers["authorization"] == of_key.headers["authorization"]
    assert told(door.ask(bearer(issued)))["key"] == key.id
    assert "authorization" not in door.ask(bearer(key.secret)).headers


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer that no HTTP client has looked at."""

    status: int
    headers: dict[str, str]
    body: bytes


def raw(
    door: Door,
    query: str,
    headers: Mapping[str, str] = {},
    *,
    method: str = "GET",
    path: str = "/authz/verify",
) -> Raw:
    """One request as ASGI has it; whoever reads its body fails."""
    sent: list[Any] = []
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [*lines, (b"x-forwarded-for", CALLER.encode())],
        "client": (PROXY, 1),
    }

    async def receive() -> Any:
        raise AssertionError("the body is not read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(door.stage.deployment.service(scope, receive, send))
    start, body = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Raw(start["status"], found, body["body"])


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PURGE", "__INIT__"]
)
def test_any_method_asks(door: Door, method: str) -> None:
    """And a body that comes along is left alone; what is left of it must be no next request."""
    key = door.key().secret
    query = urlencode({"audience": PRODUCT, "for": "envoy"}) + "&path=/"

    plain = raw(door, query, bearer(key), method=method)
    with_body = raw(door, query, bearer(key) | {"Content-Length": "7"}, method=method)
    in_chunks = raw(door, query, bearer(key) | {"Transfer-Encoding": "chunked"}, method=method)
    empty = raw(door, query, bearer(key) | {"Content-Length": "0"}, method=method)

    assert [one.status for one in (plain, with_body, in_chunks, empty)] == [200] * 4
    assert with_body.headers["connection"] == in_chunks.headers["connection"] == "close"
    assert "connection" not in plain.headers
    assert "connection" not in empty.headers


# --- who may ask


def test_nobody_else_learns_anything(door: Door) -> None:
    """Not whether a credential is good, and not what is wrong with the question."""
    good, token = door.key(), door.token(door.key())
    answers = [
        door.ask(headers, asker=door.stranger, kind=kind)
        for headers in ({}, bearer(good.secret), bearer(token), bearer("nonsense"))
        for kind in ("nginx", "envoy", "whatever")
    ]
    answers.append(door.stranger.get("/authz/verify"))

    assert {(one.status_code, one.content) for one in answers} == {(403, answers[0].content)}
    assert code(answers[0]) == "not_a_gateway"
    assert not [one for one in answers if "www-authenticate" in one.headers]


def service_key(door: Door, *scopes: str, **columns: Any) -> Made:
    return door.key(*(scopes or (RESOURCE_SERVER,)), **columns)


def with_key(key: Made | str) -> dict[str, str]:
    return {"X-Coatcheck-Service-Key": key if isinstance(key, str) else key.secret}


def test_a_resource_servers_key_makes_a_gateway(door: Door) -> None:
    """From anywhere, and its own address then stands between its callers and us."""
    service, key = service_key(door), door.key(networks=(f"{CALLER}/32",))
    sent = bearer(key.secret) | with_key(service)

    assert told(door.ask(sent, asker=door.stranger))["key"] == key.id
    forged = door.ask(sent, asker=door.stranger, address=f"{CALLER}, 198.51.100.9")
    assert code(forged) == "ip_not_allowed"
    assert code(door.ask(sent, asker=door.stranger, address=None)) == "ip_not_allowed"
    # Behind a load balancer of ours it is the last one on its own side.
    behind = door.ask(sent, address=f"{CALLER}, {GATEWAY}")
    assert told(behind)["key"] == key.id


def test_any_other_key_makes_none(door: Door) -> None:
    """Whether the peer is trusted or not: what is sent has to be right."""
    stage, revoked = door.stage, service_key(door)
    api_keys.revoke(stage.deployment.store, revoked.id, TESTER, now=NOON)
    keys: dict[str, Made | str] = {
        "an ordinary one": door.key(),
        "an administrator's": stage.api_key(door.organization_id, *ORGANIZATION_PERMISSIONS),
        "of another audience": service_key(door, audiences=(MCP,)),
        "of another environment": service_key(door, environment="test", audiences=(STAGING,)),
        "from elsewhere": service_key(door, networks=("198.51.100.0/24",)),
        "revoked": revoked,
        "unknown": apikey.make("ac_live"),
        "nonsense": "nonsense",
    }

    for name, key in keys.items():
        for asker in (door.stranger, door.proxy):
            answer = door.ask(bearer(door.key().secret) | with_key(key), asker=asker)
            assert (answer.status_code, code(answer)) == (403, "not_a_gateway"), name
    twice = [*bearer(door.key().secret).items(), *2 * [*with_key(service_key(door)).items()]]
    assert code(door.ask(twice, asker=door.stranger)) == "not_a_gateway"


def test_a_key_of_a_gateway_ends_as_any_other(own: Door) -> None:
    """Expired, or disabled and enabled again: from the next question on."""
    service = service_key(own, expires_at=NOON + HOUR)
    sent = bearer(own.key().secret) | with_key(service)
    store = own.stage.deployment.store

    told(own.ask(sent, asker=own.stranger))
    api_keys.disable(store, service.id, TESTER, now=NOON)
    assert code(own.ask(sent, asker=own.stranger)) == "not_a_gateway"
    api_keys.enable(store, service.id, TESTER, now=NOON)
    told(own.ask(sent, asker=own.stranger))
    own.stage.deployment.clock.now = NOON + HOUR
    assert code(own.ask(sent, asker=own.stranger)) == "not_a_gateway"


def test_guessing_at_a_gateways_key_is_throttled(own: Door) -> None:
    """By the guesser's address; a right one always passes."""
    good = bearer(own.key().secret)
    codes = [
        code(own.ask(good | with_key(apikey.make("ac_live")), asker=own.stranger)) for _ in range(5)
    ]

    assert codes == ["not_a_gateway"] * 3 + ["rate_limited"] * 2
    told(own.ask(good | with_key(service_key(own)), asker=own.stranger))


# --- what a gateway can get wrong


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "apache", "traefik", "caddy"])
def test_a_header_of_the_dialect_that_is_missing_denies(door: Door, kind: str) -> None:
    """Also if those of another dialect are there: they may be the caller's own."""
    key, query = door.key().secret, urlencode({"audience": PRODUCT, "for": kind})
    own, others = ("Forwarded", "Original")[:: 1 if kind in ("traefik", "caddy") else -1]
    good = {f"X-{own}-Method": "GET", f"X-{own}-Uri": "/"}
    forged = {f"X-{others}-Method": "GET", f"X-{others}-Uri": "/"}

    assert door.proxy.get(f"/authz/verify?{query}", headers=bearer(key) | good).is_success
    for left_out in good:
        sent = {name: value for name, value in good.items() if name != left_out}
        answer = door.proxy.get(f"/authz/verify?{query}", headers=bearer(key) | forged | sent)
        assert (answer.status_code, code(answer)) == (500, "gateway_misconfigured")
        assert left_out.lower() in answer.json()["detail"].lower()
    for name, value in good.items():
        twice = [*bearer(key).items(), *good.items(), (name, value)]
        answer = door.proxy.get(f"/authz/verify?{query}", headers=twice)
        assert (answer.status_code, code(answer)) == (500, "gateway_misconfigured")
        assert "twice" in answer.json()["detail"]


def test_a_path_behind_ours_is_the_callers_with_its_query(door: Door) -> None:
    """And nothing in it configures anything, whoever sends what."""
    key = door.key("read")
    ours = {"X-Coatcheck-Authz": urlencode({"audience": PRODUCT, "for": "envoy", "scope": "read"})}
    theirs = urlencode({"audience": STAGING, "scope": "write", "for": "nginx", "token": "true"})
    headers = bearer(key.secret) | {"X-Original-Method": "GET", "X-Original-URI": "/"}

    for path in ("/", "/widgets/1", "//x", "/authz/verify"):
        asked = door.proxy.get(f"/authz/verify{path}?{theirs}", headers=headers | ours)
        assert told(asked)["uri"] == f"{path}?{theirs}"
        assert "authorization" not in asked.headers
        smuggled = urlencode({"audience": PRODUCT, "for": "nginx"})
        for query in ("", theirs, smuggled):
            refused = door.proxy.get(f"/authz/verify{path}?{query}", headers=headers)
            assert (refused.status_code, code(refused)) == (403, "gateway_misconfigured")
    # In the other form that header is the caller's own, and means nothing.
    other = {"X-Coatcheck-Authz": urlencode({"audience": STAGING, "for": "envoy"})}
    assert told(door.ask(bearer(key.secret) | other, kind="envoy"))["key"] == key.id


def test_behind_the_path_everything_is_the_callers(door: Door) -> None:
    """Envoy writes its caller's path and query behind what its operator wrote."""
    key = door.key("read").secret
    for uri in (
        "/x?scope=write",
        "/x&scope=write",
        "/x?audience=https://staging.example.com&for=nginx",
        "/x?path=/y&path=/z",
        "/x&path=/y?token=true",
    ):
        answer = door.ask(bearer(key), uri=uri, kind="envoy", scope="read")
        assert told(answer)["uri"] == uri
        assert "authorization" not in answer.headers
        less = door.ask(bearer(key), uri=uri, kind="envoy", scope="read write")
        assert code(less) == "insufficient_scope"


@pytest.mark.parametrize("audience", ["https://other.example.com", "http://127.0.0.1:8000/v1", ""])
def test_an_audience_is_one_of_the_products(door: Door, audience: str) -> None:
    """Never the management API's, which no gateway stands in front of."""
    answer = door.ask(bearer(door.key().secret), audience=audience)

    assert (answer.status_code, code(answer)) == (500, "gateway_misconfigured")


def test_a_name_beside_ours_is_not_there(door: Door) -> None:
    """And nothing is redirected: a client would send its secret again."""
    for path in ("/authz", "/authz/", "/authz/verifyx", "/authz/verify%2Fx", "/authz/%76erify"):
        assert door.proxy.get(path).status_code == 404


# --- the right to pass


def test_scopes_are_all_needed(door: Door) -> None:
    answer = door.ask(bearer(door.key("read").secret), scope="read billing:manage")

    assert (answer.status_code, code(answer)) == (403, "insufficient_scope")
    assert 'scope="read billing:manage"' in answer.headers["www-authenticate"]
    told(door.ask(bearer(door.key("write").secret), scope="write create"))


def test_a_role_is_held_against_the_original_method(door: Door) -> None:
    """Whatever method the gateway itself asks with."""
    viewer = door.key(permissions="read")
    for sent in (viewer.secret, door.token(viewer)):
        for kind in ("nginx", "traefik", "envoy"):
            told(door.ask(bearer(sent), method="HEAD", kind=kind))
            refused = door.ask(bearer(sent), method="DELETE", kind=kind)
            assert (refused.status_code, code(refused)) == (403, "role_not_allowed")


def test_a_project_is_named_in_its_header(door: Door) -> None:
    project = door.stage.project(door.organization_id)
    bound, free = door.key(project_id=project), door.key()
    named = {"X-Project-Id": "prj_of_the_request"}

    assert told(door.ask(bearer(free.secret) | named))["project"] == "prj_of_the_request"
    assert told(door.ask(bearer(bound.secret)))["project"] == project
    assert code(door.ask(bearer(bound.secret) | named)) == "wrong_project"
    several = door.ask(bearer(free.secret) | {"X-Project-Id": "a b"})
    assert (several.status_code, code(several)) == (400, "project_required")


def test_a_key_of_another_environment_does_not_pass(tmp_path: Path) -> None:
    """Where an audience is shared the gateway says which, or its own key does."""
    with a_deployment(tmp_path, audience=PRODUCT, trusted_proxies="10.0.0.0/8") as made:
        client = TestClient(made.service, client=(PROXY, 1))
        stranger = TestClient(made.service, client=(GATEWAY, 1))
        door = Door(Stage(made, client, tmp_path / "coatcheck.db"), client, stranger)
        test = door.key(environment="test")
        live_service = service_key(door)
        for sent in (test.secret, door.token(test)):
            assert told(door.ask(bearer(sent)))["environment"] == "test"
            told(door.ask(bearer(sent), environment="test"))
            refused = door.ask(bearer(sent), environment="live")
            assert (refused.status_code, code(refused)) == (401, "wrong_environment")
            refused = door.ask(bearer(sent) | with_key(live_service), asker=stranger)
            assert code(refused) == "wrong_environment"
        other = door.ask(bearer(test.secret) | with_key(live_service), environment="test")
        assert code(other) == "not_a_gateway"


def test_an_address_comes_from_behind_the_proxies(own: Door) -> None:
    """And a right key from a wrong one alarms its owner."""
    key = own.key(networks=("203.0.113.0/24",))
    for address, is_good in {
        CALLER: True,
        f"198.51.100.1, {CALLER}": True,
        f"{CALLER}:4711, 10.1.2.3": True,
        f"{CALLER}, 198.51.100.1": False,
        "198.51.100.1": False,
        "nonsense": False,
    }.items():
        answer = own.ask(bearer(key.secret), address=address)
        assert answer.is_success if is_good else code(answer) == "ip_not_allowed", address
    own.stage.deployment.service._alarms.flush(NOON)
    alarms = own.stage.rows("SELECT * FROM changes WHERE what = 'use.from_wrong_address'")
    assert {alarm["subject"] for alarm in alarms} == {key.id}


# --- what ends


def test_what_is_ended_does_not_pass_again(own: Door) -> None:
    """Remembered or not, from the next request on."""
    store, clock = own.stage.deployment.store, own.stage.deployment.clock
    ends: dict[str, Callable[[str], object]] = {
        "api_key_revoked": lambda key: api_keys.revoke(store, key, TESTER, now=NOON),
        "api_key_disabled": lambda key: api_keys.disable(store, key, TESTER, now=NOON),
    }
    for expected, end in ends.items():
        key = own.key()
        token = own.token(key)
        for _ in range(2):
            told(own.ask(bearer(key.secret)))
            told(own.ask(bearer(token)))
        other = own.key()
        told(own.ask(bearer(token)))
        end(key.id)
        assert code(own.ask(bearer(key.secret))) == expected
        assert code(own.ask(bearer(token))) == "token_revoked"
        assert code(own.ask(bearer(token))) == "token_revoked"
        told(own.ask(bearer(other.secret)))

    short = own.key(expires_at=NOON + 60)
    token = own.token(short)
    told(own.ask(bearer(short.secret)))
    told(own.ask(bearer(token)))
    clock.now = NOON + 60
    assert code(own.ask(bearer(short.secret))) == "api_key_expired"
    clock.now = NOON + 60 + 30
    assert code(own.ask(bearer(token))) == "token_expired"


def test_what_is_narrowed_or_widened_holds_from_the_next_request_on(own: Door) -> None:
    """A token that was remembered for the API key says what it was, and is dead as any other."""
    deployment, key = own.stage.deployment, own.key("read", "billing:manage")
    token = own.token(key)

    def edit(*scopes: str) -> None:
        api_keys.edit(
            deployment.store,
            deployment.catalog,
            key.id,
            lambda new: replace(new, scopes=scopes),
            TESTER,
            now=NOON,
            issuer=ISSUER,
        )

    told(own.ask(bearer(token), scope="billing:manage"))
    told(own.ask(bearer(key.secret), scope="billing:manage"))
    edit("read")
    assert code(own.ask(bearer(key.secret), scope="billing:manage")) == "insufficient_scope"
    assert code(own.ask(bearer(token), scope="read")) == "token_revoked"
    assert told(own.ask(bearer(key.secret)))["scopes"] == "read"
    edit("read", "billing:manage")
    told(own.ask(bearer(key.secret), scope="billing:manage"))


def test_what_is_ended_does_not_pass_again_on_postgresql(postgres: Server, tmp_path: Path) -> None:
    """Where the log is followed from afar: also right after what this very node has written."""
    now = int(time.time())
    chosen = Settings(
        issuer=ISSUER,
        audience=PRODUCT,
        database_url=postgres.new_database(),
        keys_dir=tmp_path / "keys",
        trusted_proxies="10.0.0.0/8",  # type: ignore[arg-type] # as the environment has it
    )
    catalog, store = catalogs.without_file(chosen), open_store(chosen.database_url)
    made = setup.initialize(chosen, catalog, store, TESTER, now=now, organization_name="Acme")
    service = Service(chosen, store, time.time)
    deployment = Deployment(chosen, catalog, store, Clock(now), made, service)
    with TestClient(service, base_url=ISSUER, client=(PROXY, 1)) as client:
        door = Door(Stage(deployment, client, tmp_path), client, client)
        for end, expected in {
            api_keys.revoke: "api_key_revoked",
            api_keys.disable: "api_key_disabled",
        }.items():
            key = door.key()
            token = door.token(key)
            for sent in 2 * (key.secret, token):
                told(door.ask(bearer(sent)))
            end(store, key.id, TESTER, now=now)
            assert code(door.ask(bearer(token))) == "token_revoked"
            assert code(door.ask(bearer(key.secret))) == expected


def test_a_token_that_is_handed_on_is_renewed_in_time(own: Door) -> None:
    """The upstream gets one that it can still use."""
    key = own.key()
    query = urlencode({"audience": PRODUCT, "for": "envoy", "token": "true"}) + "&path=/"
    first = raw(own, query, bearer(key.secret)).headers["authorization"]
    own.stage.deployment.clock.now = NOON + 569
    assert raw(own, query, bearer(key.secret)).headers["authorization"] == first
    own.stage.deployment.clock.now = NOON + 570
    assert raw(own, query, bearer(key.secret)).headers["authorization"] != first


def test_raw_keys_are_counted_and_guesses_throttled(own: Door) -> None:
    """By the caller's address, and a right key always passes."""
    key = own.key()
    for _ in range(3):
        told(own.ask(bearer(key.secret)))
    own.stage.deployment.service._usage.flush()
    (usage,) = own.stage.rows("SELECT * FROM api_key_usage WHERE api_key_id = ?", key.id)
    assert usage["raw_key_uses"] == 3

    guesses = [own.ask(bearer(apikey.make("ac_live")), kind="nginx") for _ in range(5)]
    assert [code(one) for one in guesses] == ["api_key_unknown"] * 3 + ["rate_limited"] * 2
    assert [one.status_code for one in guesses] == [401] * 3 + [403] * 2
    assert guesses[-1].headers["x-coatcheck-status"] == "429"
    assert int(guesses[-1].headers["retry-after"]) >= 1
    told(own.ask(bearer(key.secret)))
    elsewhere = own.ask(bearer(apikey.make("ac_live")), address="198.51.100.77")
    assert code(elsewhere) == "api_key_unknown"


def test_our_own_trouble_is_no_answer_about_the_caller(own: Door) -> None:
    """503, which nginx takes for 500; never 401."""
    key = own.key()
    token = own.token(key)
    told(own.ask(bearer(token)))
    (own.stage.database).rename(own.stage.database.with_suffix(".away"))
    own.stage.deployment.store.close()

    for sent in (key.secret, token):
        for kind, status in {"nginx": 500, "haproxy": 503, "envoy": 503}.items():
            answer = own.ask(bearer(sent), kind=kind)
            assert (answer.status_code, code(answer)) == (status, "issuer_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert "www-authenticate" not in answer.headers
    with pytest.raises(StoreUnavailable):
        own.stage.deployment.store.head()


# --- what nginx can handle


def test_nginx_gets_a_status_that_it_knows_and_its_caller_the_true_one(door: Door) -> None:
    """auth_request answers 500 to anything but 2xx, 401 and 403."""
    key = door.key("read")
    several = bearer(key.secret) | {"X-API-Key": door.key().secret}
    refusals: list[tuple[dict[str, str], int, int]] = [
        (several, 400, 403),
        ({}, 401, 401),
        (bearer(door.key(permissions="read").secret), 403, 403),
    ]
    for headers, true, known in refusals:
        nginx = door.ask(headers, method="POST", kind="nginx")
        other = door.ask(headers, method="POST")
        assert (nginx.status_code, other.status_code) == (known, true)
        assert code(nginx) == code(other)
        assert {one.headers["x-coatcheck-status"] for one in (nginx, other)} == {str(true)}
        assert nginx.content == other.content
        assert nginx.headers["www-authenticate"] == other.headers["www-authenticate"]


def test_nginx_is_told_in_a_header_what_its_caller_shall_read(door: Door) -> None:
    """auth_request drops the body.  What is wrong with the gateway itself is told as well."""
    good, own_key = bearer(door.key().secret), with_key("nonsense")
    for kind, is_told in {
        "nginx": True,
        "nonsense": True,
        "haproxy": False,
        "envoy": False,
    }.items():
        for answer in (
            door.ask(kind=kind),
            door.ask(good | own_key, kind=kind),
            door.ask(good, kind=kind, audience="nonsense"),
            door.ask(good, asker=door.stranger, kind=kind),
        ):
            assert code(answer)
            assert answer.headers.get("x-coatcheck-problem") == (answer.text if is_told else None)
    assert "x-coatcheck-problem" not in door.ask(good, kind="nginx").headers


def test_a_guess_through_nginx_is_one(tmp_path: Path) -> None:
    """Whoever mistypes three times has three refusals, told as such, before it is too often."""
    port = free_port()
    for door in a_door(
        tmp_path,
        issuer=f"http://127.0.0.1:{port}",
        trusted_proxies="127.0.0.1",
        guesses_per_minute=3,
    ):
        service = door.stage.deployment.service
        with (
            listening(service, port),
            running("nginx", coatcheck=port, api=free_port(), changes={}) as nginx,
        ):
            guesses = [
                nginx.ask([*bearer(apikey.make("ac_live")).items()], "/guess.html")
                for _ in range(5)
            ]
        metrics = service._metrics.text({}, {})

        assert [one.status for one in guesses] == [401] * 3 + [429] * 2
        assert [one.problem["code"] for one in guesses] == (
            ["api_key_unknown"] * 3 + ["rate_limited"] * 2
        )
        assert [one.header("Retry-After") is not None for one in guesses] == [False] * 3 + [
            True
        ] * 2
        assert set(re.findall(r"coatcheck_authz_requests_total(\{.*)", metrics)) == {
            '{result="refused",code="api_key_unknown"} 3',
            '{result="refused",code="rate_limited"} 2',
        }


# --- what stands in headers


def test_no_caller_writes_a_header(door: Door) -> None:
    """What comes back of what a caller sent is escaped; facts are ours alone."""
    key = door.key()
    forged = {f"X-Coatcheck-{name.title()}": "forged" for name in FACTS}
    uri = "/%0d%0aX-Coatcheck-Key:%20forged?a=%0A"
    facts = told(door.ask(bearer(key.secret) | forged, uri=uri))

    assert facts["key"] == key.id
    assert facts["uri"] == uri
    assert "forged" not in "".join(value for name, value in facts.items() if name != "uri")
    beyond = raw(
        door,
        urlencode({"audience": PRODUCT, "for": "nginx"}),
        bearer(key.secret) | {"X-Original-Method": "GET", "X-Original-URI": "/é"},
    )
    assert beyond.headers["x-coatcheck-uri"] == "/%C3%A9"


# --- as any resource server says


@contextmanager
def listening(service: Service, port: int) -> Iterator[None]:
    """The service on a port of 127.0.0.1."""
    config = uvicorn.Config(
        service, port=port, http=Protocol, lifespan="off", log_config=None, proxy_headers=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Verifier]]:
    """A deployment that a resource server reaches by HTTP, and our verifier in it."""
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    for door in a_door(tmp_path_factory.mktemp("served"), issuer=issuer, guesses_per_minute=0):
        made = door.stage.deployment
        roles = {name: one.role.methods for name, one in made.catalog.roles.items()}
        with (
            listening(made.service, port),
            Verifier(
                issuer,
                PRODUCT,
                environment="live",
                service_key=service_key(door).secret,
                feed=None,
                roles=roles,
                clock=made.clock,
            ) as verifier,
        ):
            yield door, verifier


def test_over_a_connection_it_is_the_same(served: tuple[Door, Verifier]) -> None:
    """
    The listener asks without ASGI where it can, and no gateway waits for a body of a 204.

    RFC 9110 §8.6: no Content-Length; RFC 9112 §9.3: what is not read ends the connection.
    """
    door, _ = served
    key = door.key()
    query = urlencode({"audience": PRODUCT, "for": "nginx"})
    lines = {
        **bearer(door.token(key)),
        **with_key(service_key(door)),
        "Host": "coatcheck",
        "X-Forwarded-For": CALLER,
        "X-Original-Method": "GET",
        "X-Original-URI": "/a?b",
    }
    head = f"GET /authz/verify?{query} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in lines.items()
    )
    address = urlsplit(door.stage.deployment.settings.issuer)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        for _ in range(3):
            connection.sendall(f"{head}\r\n".encode())
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 204 ")
            assert answer.endswith(b"\r\n\r\n")
            assert f"\r\nx-coatcheck-key: {key.id}\r\n".encode() in answer
            assert b"content-length" not in answer
        # The gateway announces its caller's body and does not send it.
        connection.sendall(f"{head}Content-Length: 500\r\n\r\n".encode())
        rest = connection.makefile("rb").read()
        assert rest.startswith(b"HTTP/1.1 204 ")
        assert b"\r\nconnection: close\r\n" in rest


def credentials(door: Door) -> dict[str, str]:
    """One of everything that somebody may send."""
    deployment = door.stage.deployment
    store, organization = deployment.store, organizations.create
    suspended = organization(store, "Suspended", TESTER, now=NOON).id
    project = door.stage.project(door.organization_id)
    keys = {
        "ordinary": door.key("read", "write"),
        "everything": door.key("full-access"),
        "viewer": door.key(permissions="read"),
        "member": door.key(permissions="write"),
        "networks": door.key(networks=("203.0.113.0/24",)),
        "project": door.key(project_id=project),
        "restricted": door.key("read@PLACE/Site/1", models=("small",), group_id=door.stage.group()),
        "ending": door.key(expires_at=NOON + DAY),
        "two audiences": door.key(audiences=(PRODUCT, MCP)),
    }
    tokens = {f"token of {name}": door.token(key) for name, key in keys.items()}
    elsewhere = door.key(audiences=(MCP,))
    staging = door.key(environment="test", audiences=(STAGING,))
    bad = {
        "expired": door.key(expires_at=NOON + 1),
        "revoked": door.key(),
        "disabled": door.key(),
        "suspended": door.stage.api_key(suspended, "read", audiences=(PRODUCT,)),
        "elsewhere": elsewhere,
        "staging": staging,
        "connector": door.key(kind="connector"),
        "a resource server": service_key(door),
        "management": door.key(
            *ORGANIZATION_PERMISSIONS, audiences=(deployment.catalog.management_audience,)
        ),
    }
    management = deployment.catalog.management_audience
    api_keys.revoke(store, bad["revoked"].id, TESTER, now=NOON)
    api_keys.disable(store, bad["disabled"].id, TESTER, now=NOON)
    organizations.suspend(store, suspended, TESTER, now=NOON)
    deployment.clock.now = NOON + 1
    ordinary = tokens["token of ordinary"]
    return {
        **{name: key.secret for name, key in (keys | bad).items()},
        **tokens,
        "token for elsewhere": door.token(elsewhere, resource=MCP),
        "token for management": door.token(bad["management"], resource=management),
        "token of staging": door.token(staging, resource=STAGING),
        "tampered": ordinary[:-6] + "AAAAAA",
        "cut": ordinary[:-40],
        "unknown": apikey.make("ac_live"),
        "mistyped": keys["ordinary"].secret[:-1] + "_",
        "wrong checksum": keys["ordinary"].secret[:-6] + "000000",
        "nonsense": "nonsense",
    }


SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a post": {"method": "POST"},
    "a delete": {"method": "DELETE"},
    "from elsewhere": {"address": "198.51.100.7"},
    "from nowhere": {"address": None},
    "another project": {"headers": {"X-Project-Id": "prj_another"}},
    "read": {"scope": "read"},
    "a site": {"scope": "read@PLACE/Site/1"},
    "billing": {"scope": "billing:manage read"},
    "basic": {"place": basic},
    "in a header of its own": {"place": lambda key: {"X-API-Key": key}},
    "in the query": {"in_query": True},
    "and another one": {"headers": {"X-API-Key": "another"}},
}


def comparable(challenge: str | None) -> str | None:
    """A challenge but for its sentence: the issuer's own words name a date."""
    return challenge and re.sub(r' error_description="[^"]*",?', "", challenge).rstrip(",")


def decided(
    verifier: Verifier, headers: Mapping[str, str], case: Mapping[str, Any], query: str
) -> object:
    """What our verifier says at a resource server: the facts, or the refusal."""
    try:
        who = verifier.authenticate(
            headers,
            case.get("scope", ""),
            case.get("address", CALLER),
            query=query,
            method=case.get("method", "GET"),
        )
    except VerifierError as error:
        return error.status, error.code, comparable(error.challenge)
    return {
        "key": who.key_id,
        "org": who.org_id,
        "project": who.project_id or "",
        "environment": who.environment,
        "scopes": str(who.scopes),
        "method": who.method,
        "roles": " ".join(who.roles),
        "group": who.group or "",
        "models": "*" if who.models is None else " ".join(who.models),
        "uri": "/",
        "private": "true" if query else "",
    }


def test_a_gateway_is_told_what_a_resource_server_decides(
    served: tuple[Door, Verifier],
) -> None:
    """One path, one meaning: for each credential in each situation."""
    door, verifier = served
    outcomes = set()
    for name, credential in credentials(door).items():
        for situation, case in SITUATIONS.items():
            query = f"api_key={quote(credential)}" if "in_query" in case else ""
            place = case.get("place", bearer)
            headers = {**({} if query else place(credential)), **case.get("headers", {})}
            answer = door.ask(
                headers,
                method=case.get("method", "GET"),
                uri=f"/?{query}" if query else "/",
                address=case.get("address", CALLER),
                **({"scope": case["scope"]} if "scope" in case else {}),
            )
            expected = decided(verifier, headers, case, query)
            if answer.is_success:
                assert told(answer) == expected, (name, situation)
                outcomes.add("")
                continue
            challenge = comparable(answer.headers.get("www-authenticate"))
            found = answer.status_code, code(answer), challenge
            assert found == expected, (name, situation)
            outcomes.add(code(answer))
    # The table is worth something.
    assert len(outcomes) >= 17, outcomes


def test_questions_are_counted_by_what_came_of_them(own: Door) -> None:
    """No label is anything that a caller chooses."""
    key = own.key()
    for _ in range(2):
        own.ask(bearer(key.secret))
    own.ask(bearer(key.secret), scope="write")
    own.ask(bearer(key.secret), asker=own.stranger)
    own.ask(bearer(key.secret), audience="https://other.example.com")
    metrics = own.stage.deployment.service._metrics.text({}, {})

    assert set(re.findall(r"coatcheck_authz_requests_total(\{.*)", metrics)) == {
        '{result="allowed",code=""} 2',
        '{result="refused",code="insufficient_scope"} 1',
        '{result="refused",code="not_a_gateway"} 1',
        '{result="failed",code="gateway_misconfigured"} 1',
    }


def test_with_too_many_under_way_it_is_refused_at_once(tmp_path: Path) -> None:
    """As a token request is: 503, or what the gateway takes for it."""
    for door in a_door(tmp_path, max_in_flight=1):
        with door.stage.deployment.service.in_flight:
            for kind, status in {"nginx": 500, "caddy": 503}.items():
                answer = door.ask(bearer("whatever"), kind=kind)
                assert (answer.status_code, code(answer)) == (status, "issuer_unavailable")


def test_nothing_of_a_credential_is_logged(own: Door, caplog: pytest.LogCaptureFixture) -> None:
    """Not the caller's, not the gateway's; the ids of keys that exist are."""
    caplog.set_level("DEBUG", logger="coatcheck")
    key, service = own.key(permissions="read"), service_key(own, networks=("198.51.100.0/24",))
    token, connector = own.token(key), own.key(kind="connector")
    secrets = [key.secret, token, service.secret, connector.secret]
    for sent in (key.secret, token, connector.secret):
        own.ask(bearer(sent), method="DELETE")
        own.ask(bearer(sent), uri=f"/?api_key={connector.secret}", kind="envoy")
        own.ask(bearer(sent), method=f"x {sent}")
        own.ask(bearer(sent) | with_key(service), asker=own.stranger)
    # What HTTP clients log is not the service's.
    ours = [one for one in caplog.records if one.name.startswith("coatcheck")]
    text = "\n".join(one.getMessage() for one in ours)

    assert f"refused {service.id} as a gateway's: ip_not_allowed" in text
    assert "refused at authz: role_not_allowed" in text
    assert not [secret for secret in secrets if secret[-20:] in text]
