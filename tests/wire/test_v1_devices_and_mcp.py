"""`/v1/devices` and `/v1/mcp`: what clients see, and where a connector key may stand.

RFC 8693 §2.2.2 (a bad subject), contract.md (Resource server: `?api_key=` for connector keys).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from coatcheck.scope import ORGANIZATION_PERMISSIONS
from coatcheck.server.manage import api_keys, members, organizations, projects
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.manage.mcp_clients import CLIENTS
from coatcheck.server.oauth.grants.token_exchange import GRANT_TYPE
from support.deployment import (
    AUDIENCE,
    DAY,
    ISSUER,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.wire import claims_of

CATALOG = f"""
name = "Acme IDE"

[[audience]]
id = "{AUDIENCE}"
shared = true
default = true
"""
OFFERS = """
[device_keys]
scopes = ["gateway:infer"]

[mcp]
name = "acme"
url = "https://mcp.example.com/mcp"
scopes = ["widgets:read"]
"""
DEVICE = "/v1/devices/build-7/key"
CONNECTIONS = "/v1/mcp/connections"
ADDRESS = "203.0.113.7"


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """One whose catalog has device keys and an MCP server."""
    with a_deployment_of(tmp_path, CATALOG + OFFERS) as made:
        yield made


def a_deployment_of(folder: Path, catalog: str) -> Any:
    file = folder / "coatcheck.toml"
    file.write_text(catalog)
    return a_deployment(folder, catalog=file)


def make(deployment: Deployment, organization_id: str = "", **wanted: Any) -> Created:
    """An API key of this organization, or else the deployment's own."""
    new = NewApiKey(
        organization_id=organization_id or deployment.organization_id,
        **{"name": "test key"} | wanted,
    )
    return api_keys.create(
        deployment.store, deployment.catalog, new, TESTER, now=deployment.now, issuer=ISSUER
    )


def a_member(
    deployment: Deployment, role: str = "viewer", name: str = "Ada", organization_id: str = ""
) -> tuple[str, str]:
    """The id of a member, and its own API key for management."""
    organization_id = organization_id or deployment.organization_id
    email = f"{name.lower()}@example.com"
    member_id = members.add(
        deployment.store, organization_id, name, email, role, TESTER, now=deployment.now
    ).id
    made = make(
        deployment,
        organization_id,
        scopes=members.ROLES[role],
        audiences=(deployment.settings.management_audience,),
        kind="member",
        member_id=member_id,
    )
    return member_id, made.key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def admin(deployment: Deployment) -> dict[str, str]:
    return bearer(deployment.initialized.key)


def good(answer: httpx2.Response, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refused(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), answer.text
    return body


# --- devices


def test_a_member_signs_a_device_in_and_out(http: TestClient, deployment: Deployment) -> None:
    """Any role will do, without an Idempotency-Key."""
    member_id, key = a_member(deployment)
    named = {"name": "MacBook Pro - Ada's IDE"}

    first = good(http.put(DEVICE, headers=bearer(key), json=named), 201)
    kept = http.put(DEVICE, headers=bearer(key), json={"currentKey": first["key"]})
    replaced = good(http.put(DEVICE, headers=bearer(key), json={}))
    out = [http.delete(DEVICE, headers=bearer(key)).status_code for _ in range(2)]
    again = good(http.put(DEVICE, headers=bearer(key), json=named), 201)

    assert first["name"] == named["name"]
    assert (first["kind"], first["device"], first["member"]) == ("device", "build-7", member_id)
    assert first["scopes"] == ["gateway:infer"]
    assert good(kept)["key"] is None
    assert {first["id"], kept.json()["id"], replaced["id"]} == {first["id"]}
    assert replaced["key"] not in (None, first["key"])
    assert out == [204, 204]
    assert again["id"] != first["id"]
    token = good(http.post("/oauth/token", data=form(again["key"])))
    assert token["scope"] == "gateway:infer"


def test_signing_in_again_takes_the_tokens_of_the_lost_secret(
    http: TestClient, deployment: Deployment
) -> None:
    _, key = a_member(deployment)
    first = good(http.put(DEVICE, headers=bearer(key), json={"name": "laptop"}), 201)
    token = good(http.post("/oauth/token", data=form(first["key"])))["access_token"]

    replaced = good(http.put(DEVICE, headers=bearer(key), json={}))

    asks = {"token": token, "client_secret": replaced["key"]}
    assert good(http.post("/oauth/introspect", data=asks)) == {"active": False}


def test_a_member_sees_its_own_devices_a_page_at_a_time(
    http: TestClient, deployment: Deployment
) -> None:
    _, ada = a_member(deployment)
    grace, graces = a_member(deployment, name="Grace")
    for device in ("a", "b", "c"):
        path = f"/v1/devices/{device}/key"
        good(http.put(path, headers=bearer(ada), json={"name": device}), 201)
    good(http.put(DEVICE, headers=bearer(graces), json={"name": "Grace's"}), 201)

    first = good(http.get("/v1/devices?limit=2", headers=bearer(ada)))
    cursor = first["nextCursor"]
    second = good(http.get(f"/v1/devices?limit=2&cursor={cursor}", headers=bearer(ada)))

    assert [one["device"] for one in first["data"]] == ["a", "b"]
    assert [one["device"] for one in second["data"]] == ["c"]
    assert (first["hasMore"], second["hasMore"], second["nextCursor"]) == (True, False, None)
    assert "key" not in first["data"][0]
    of_grace = f"/v1/devices?member={grace}"
    refused(http.get(of_grace, headers=bearer(ada)), 403, "insufficient_scope")
    seen = good(http.get(of_grace, headers=admin(deployment)))["data"]
    assert [one["name"] for one in seen] == ["Grace's"]
    stolen = http.get(f"/v1/devices?cursor={cursor}", headers=bearer(graces))
    refused(stolen, 400, "invalid_input")


def test_who_manages_members_signs_a_members_device_in(
    http: TestClient, deployment: Deployment
) -> None:
    """Another organization's member does not exist."""
    member_id, own = a_member(deployment)
    customer = organizations.create(deployment.store, "Customer", TESTER, now=NOON).id
    stranger, _ = a_member(deployment, name="Eve", organization_id=customer)
    wanted = {"name": "kiosk", "member": member_id}

    made = good(http.put(DEVICE, headers=admin(deployment), json=wanted), 201)

    assert made["member"] == member_id
    assert good(http.put(DEVICE, headers=bearer(own), json={}))["id"] == made["id"]
    elsewhere = wanted | {"member": stranger}
    refused(http.put(DEVICE, headers=admin(deployment), json=elsewhere), 404, "not_found")
    refused(http.put(DEVICE, headers=bearer(own), json=elsewhere), 403, "insufficient_scope")


def test_a_machine_is_no_member(http: TestClient, deployment: Deployment) -> None:
    for answer in (
        http.put(DEVICE, headers=admin(deployment), json={"name": "kiosk"}),
        http.delete(DEVICE, headers=admin(deployment)),
        http.get("/v1/devices", headers=admin(deployment)),
    ):
        body = refused(answer, 400, "member_required")
        assert body["errors"] == [{"pointer": "/member", "detail": "is missing"}]


BAD: dict[str, tuple[str, dict[str, object], str]] = {
    "no name": (DEVICE, {}, "/name"),
    "an empty name": (DEVICE, {"name": " "}, "/name"),
    "an unknown member": (DEVICE, {"name": "x", "scopes": ["*"]}, "/scopes"),
    "a long secret": (DEVICE, {"name": "x", "currentKey": "s" * 201}, "/currentKey"),
    "a device with a blank": ("/v1/devices/build%207/key", {"name": "x"}, "/device"),
    "a long device": (f"/v1/devices/{'d' * 65}/key", {"name": "x"}, "/device"),
}


@pytest.mark.parametrize(("path", "body", "pointer"), BAD.values(), ids=BAD)
def test_a_bad_sign_in_says_what_is_wrong(
    http: TestClient, deployment: Deployment, path: str, body: dict[str, object], pointer: str
) -> None:
    _, key = a_member(deployment)

    problem = refused(http.put(path, headers=bearer(key), json=body), 400, "invalid_input")

    assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert "s" * 201 not in str(problem)
    assert good(http.get("/v1/devices", headers=bearer(key)))["data"] == []


def test_a_disabled_device_stays_out(http: TestClient, deployment: Deployment) -> None:
    _, key = a_member(deployment)
    made = good(http.put(DEVICE, headers=bearer(key), json={"name": "laptop"}), 201)
    good(http.post(f"/v1/keys/{made['id']}/disable", headers=admin(deployment)))

    for answer in (
        http.put(DEVICE, headers=bearer(key), json={"currentKey": made["key"]}),
        http.delete(DEVICE, headers=bearer(key)),
    ):
        refused(answer, 409, "api_key_disabled")


def test_a_catalog_without_offers_says_what_to_write(tmp_path: Path) -> None:
    with a_deployment_of(tmp_path, CATALOG) as deployment, a_client(deployment) as http:
        _, key = a_member(deployment)
        device = http.put(DEVICE, headers=bearer(key), json={"name": "laptop"})
        connection = http.post(CONNECTIONS, headers=admin(deployment), json={"client": "cursor"})

    assert "[device_keys]" in refused(device, 409, "no_device_keys")["detail"]
    assert "[mcp]" in refused(connection, 409, "no_mcp_server")["detail"]


# --- MCP


def connect(
    http: TestClient, headers: dict[str, str], client: str = "cursor", **body: object
) -> httpx2.Response:
    return http.post(CONNECTIONS, headers=headers, json={"client": client} | body)


def test_the_clients_are_listed(http: TestClient, deployment: Deployment) -> None:
    told = good(http.get("/v1/mcp/clients", headers=admin(deployment)))["data"]

    assert {"client": "chatgpt", "name": "ChatGPT", "sendsHeaders": False} in told
    assert {one["client"] for one in told} == set(CLIENTS)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_a_narrow_key_and_what_to_do_with_it(
    http: TestClient, deployment: Deployment, client: str
) -> None:
    body = good(connect(http, admin(deployment), client, device="build-7"), 201)

    api_key, known = body["key"], CLIENTS[client]
    assert body["client"] == client
    assert api_key["name"] == f"{known.name} on build-7"
    assert api_key["kind"] == ("standard" if known.sends_headers else "connector")
    assert (api_key["scopes"], api_key["audiences"]) == (["widgets:read"], [AUDIENCE])
    assert api_key["expiresAt"] == body["expiresAt"] == "2027-04-15T08:00:00Z"
    steps = known.steps("acme", "https://mcp.example.com/mcp", api_key["key"])
    assert body["steps"] == [step.to_json() for step in steps]
    assert body["notes"][: len(known.notes)] == list(known.notes)
    assert not any(api_key["key"] in note for note in body["notes"])


def test_a_name_can_be_given(http: TestClient, deployment: Deployment) -> None:
    named = good(connect(http, admin(deployment), name="agent", device="x"), 201)
    plain = good(connect(http, admin(deployment)), 201)

    assert (named["key"]["name"], plain["key"]["name"]) == ("agent", "Cursor")


def test_a_replay_shows_no_secret(http: TestClient, deployment: Deployment) -> None:
    headers = admin(deployment) | {"Idempotency-Key": "once"}

    first = connect(http, headers)
    again = connect(http, headers)

    secret = good(first, 201)["key"]["key"]
    body = good(again, 201)
    assert again.headers["idempotency-replayed"] == "true"
    assert (body["key"]["key"], body["steps"]) == (None, None)
    assert body["key"]["id"] == first.json()["key"]["id"]
    assert secret not in again.text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"client": "emacs"}, "client"),
        ({"client": "cursor", "env": "prod"}, "env"),
        ({"client": "cursor", "project": "prj_x"}, "project"),
        ({"client": "cursor", "device": "a\u202eb"}, "device"),
        ({"client": "cursor", "scopes": ["*"]}, "scopes"),
    ],
)
def test_a_bad_connection_says_what_is_wrong(
    http: TestClient, deployment: Deployment, body: dict[str, str], field: str
) -> None:
    answer = http.post(CONNECTIONS, headers=admin(deployment), json=body)

    problem = refused(answer, 400, "invalid_input")
    assert [error["pointer"] for error in problem["errors"]] == [f"/{field}"]


def a_manager(deployment: Deployment, **wanted: Any) -> Created:
    """Who makes API keys within itself, and may itself what agents may."""
    audiences = (deployment.settings.management_audience, AUDIENCE)
    scopes = ("keys:write", "keys:read", "widgets:read")
    return make(deployment, **{"scopes": scopes, "audiences": audiences} | wanted)


def test_a_narrow_manager_makes_no_wider_agent(deployment: Deployment) -> None:
    """What it has not itself it cannot give; what restricts it restricts the agent."""
    without = a_manager(deployment, scopes=("keys:write", "other:thing"))
    project = projects.create(
        deployment.store, deployment.organization_id, "Agents", TESTER, now=NOON
    ).id
    narrow = a_manager(
        deployment,
        expires_at=NOON + DAY,
        models=("gpt-x",),
        networks=(f"{ADDRESS}/32",),
        project_id=project,
    )

    with TestClient(deployment.service, base_url=ISSUER, client=(ADDRESS, 50000)) as http:
        problem = refused(connect(http, bearer(without.key)), 403, "beyond_your_rights")
        made = good(connect(http, bearer(narrow.key)), 201)
        in_test = connect(http, bearer(narrow.key), env="test")

    assert problem["errors"][0]["pointer"] == "/scopes"
    assert refused(in_test, 403, "beyond_your_rights")["errors"][0]["pointer"] == "/env"
    api_key = made["key"]
    assert made["expiresAt"] == "2027-01-16T08:00:00Z"
    assert (api_key["models"], api_key["cidrs"]) == (["gpt-x"], [f"{ADDRESS}/32"])
    assert api_key["project"] == project
    assert any(ADDRESS in note for note in made["notes"])


def test_who_may_only_read_connects_nothing(http: TestClient, deployment: Deployment) -> None:
    _, viewer = a_member(deployment)

    refused(connect(http, bearer(viewer)), 403, "insufficient_scope")


def test_an_agent_belongs_to_the_environment_of_the_server(
    tmp_path: Path, http: TestClient, deployment: Deployment
) -> None:
    """One that all environments share serves each; else there is one that fits."""
    shared = good(connect(http, admin(deployment), env="test"), 201)
    assert shared["key"]["env"] == "test"

    of_test = "https://test.example.com"
    catalog = f"""
[[audience]]
id = "{of_test}"
environment = "test"
default = true

[[audience]]
id = "{AUDIENCE}"
environment = "live"
default = true
{OFFERS}
audience = "{of_test}"
"""
    folder = tmp_path / "apart"
    folder.mkdir()
    with a_deployment_of(folder, catalog) as apart, a_client(apart) as other:
        made = good(connect(other, admin(apart)), 201)
        live = connect(other, admin(apart), env="live")

    assert (made["key"]["env"], made["key"]["audiences"]) == ("test", [of_test])
    assert refused(live, 400, "invalid_input")["errors"][0]["pointer"] == "/env"


# --- an API key that is good for it already


def keep_copies(http: TestClient, deployment: Deployment) -> None:
    with deployment.store.transaction() as tx:
        organization = tx.organization(deployment.organization_id)
        assert organization is not None
        organization.recoverable = True


def post_key(http: TestClient, deployment: Deployment, **body: object) -> dict[str, Any]:
    wanted = {"name": "agent", "scopes": ["widgets:read"]} | body
    return good(http.post("/v1/keys", headers=admin(deployment), json=wanted), 201)


def test_a_key_that_is_good_for_it_is_taken_again(http: TestClient, deployment: Deployment) -> None:
    """The newest of those that fit; that it was shown is in the change log."""
    keep_copies(http, deployment)
    post_key(http, deployment)
    deployment.clock.now += 1
    fits = post_key(http, deployment, scopes=["widgets:read", "widgets:write"])
    deployment.clock.now += 1
    post_key(http, deployment, scopes=["other:thing"])
    post_key(http, deployment, env="test")
    management = deployment.settings.management_audience
    post_key(http, deployment, scopes=["*"], audiences=[management, AUDIENCE])

    body = good(connect(http, admin(deployment), "codex", reuse=True))

    assert (body["key"]["id"], body["key"]["key"]) == (fits["id"], fits["key"])
    assert fits["key"] in body["steps"][0]["text"]
    with deployment.store.transaction(read_only=True) as tx:
        assert tx.changes(fits["id"])[-1].what == "api_key.revealed"


def test_no_key_is_taken_again_without_copies_or_for_a_url(
    http: TestClient, deployment: Deployment
) -> None:
    before = post_key(http, deployment)["id"]
    without_copies = good(connect(http, admin(deployment), reuse=True), 201)
    keep_copies(http, deployment)

    # Those of before have no copy, and a connector key is for one connector.
    first = good(connect(http, admin(deployment), reuse=True), 201)
    in_url = good(connect(http, admin(deployment), "claude", reuse=True), 201)
    again = good(connect(http, admin(deployment), "claude", reuse=True), 201)

    made = [body["key"]["id"] for body in (without_copies, first, in_url, again)]
    assert len({before, *made}) == 5


def test_a_key_that_the_caller_may_not_see_is_not_taken_again(
    http: TestClient, deployment: Deployment
) -> None:
    """Nobody gets another's secret by connecting."""
    keep_copies(http, deployment)
    others = post_key(http, deployment)["id"]
    manager = a_manager_with_copies(http, deployment)

    first = good(connect(http, bearer(manager), reuse=True), 201)
    again = good(connect(http, bearer(manager), reuse=True))

    assert first["key"]["id"] != others
    assert again["key"]["id"] == first["key"]["id"]


def a_manager_with_copies(http: TestClient, deployment: Deployment) -> str:
    """As `a_manager`, of an organization that keeps copies."""
    management = deployment.settings.management_audience
    scopes = ["keys:write", "widgets:read"]
    key: str = post_key(http, deployment, scopes=scopes, audiences=[management, AUDIENCE])["key"]
    return key


# --- where a connector key may stand


def exchange(http: TestClient, service_key: str, subject: str, place: str) -> httpx2.Response:
    return http.post(
        "/oauth/token",
        data={
            "grant_type": GRANT_TYPE,
            "client_secret": service_key,
            "subject_token": subject,
            "subject_token_type": f"{ISSUER}/token-types/api-key",
            "client_address": ADDRESS,
            "presented_in": place,
        },
    )


def test_a_connector_key_is_good_in_a_url_and_nowhere_else(
    http: TestClient, deployment: Deployment
) -> None:
    """What leaks from a URL opens nothing by itself: not the token endpoint, and no header."""
    service_key = make(deployment, scopes=("coatcheck:resource-server",)).key
    connector = good(connect(http, admin(deployment), "claude"), 201)["key"]["key"]
    ordinary = good(connect(http, admin(deployment), "cursor"), 201)["key"]["key"]

    in_url = good(exchange(http, service_key, connector, "query"))
    in_header = exchange(http, service_key, connector, "header")
    by_itself = http.post("/oauth/token", data=form(connector))

    claims = claims_of(in_url["access_token"])
    assert (in_url["scope"], claims["aud"]) == ("widgets:read", AUDIENCE)
    refused(in_header, 400, "connector_only_in_query")
    assert in_header.json()["error"] == "invalid_request"
    assert by_itself.status_code == 400
    assert by_itself.json()["code"] == "connector_only_in_query"
    good(exchange(http, service_key, ordinary, "header"))
    assert exchange(http, service_key, ordinary, "query").status_code == 400


def test_a_connector_key_does_not_manage(http: TestClient, deployment: Deployment) -> None:
    connector = good(connect(http, admin(deployment), "claude"), 201)["key"]["key"]

    for answer in (
        http.get("/v1/whoami", headers=bearer(connector)),
        http.get(f"/v1/whoami?api_key={connector}"),
    ):
        assert answer.status_code in (401, 403)
        assert connector not in answer.text


def test_whoever_may_make_keys_makes_no_other_kind(
    http: TestClient, deployment: Deployment
) -> None:
    """Kinds have rules; they are made where the rules are."""
    for kind in ("device", "connector", "member"):
        body = {"name": "x", "kind": kind, "scopes": list(ORGANIZATION_PERMISSIONS)}
        answer = http.post("/v1/keys", headers=admin(deployment), json=body)
        refused(answer, 400, "invalid_input")
