"""`/v1/organizations`, `/projects`, `/members`, `/groups`.  answers.md K2, K8, K23-K25."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from coatcheck.server import sealing
from coatcheck.server.manage import api_keys, organizations
from coatcheck.server.manage.api import dispatch
from coatcheck.server.manage.api.routes import ROUTES
from coatcheck.server.manage.api.wire import Answer, Request
from coatcheck.server.manage.api_keys import NewApiKey
from coatcheck.server.manage.authority import local
from coatcheck.server.manage.errors import Invalid
from support.deployment import AUDIENCE, NOON, TESTER, Deployment, a_client, a_deployment
from support.wire import MANAGEMENT, bearer, token_for

Told = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """A deployment with an operator, shared by the tests of this file.

    Attributes:
        operator: an API key that may do everything in the operator's organization and beyond.
    """

    deployment: Deployment
    http: TestClient
    operator: str

    def call(
        self, key: str, method: str, path: str, body: object = None, **headers: str
    ) -> httpx2.Response:
        """One request; `if_match` and `idempotency_key` are headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = None
        if body is not None:
            # As ASCII, which can say what UTF-8 cannot.
            content, named["Content-Type"] = json.dumps(body), "application/json"
        return self.http.request(method, f"/v1{path}", content=content, headers=bearer(key) | named)

    def done(self, key: str, method: str, path: str, body: object = None, **headers: str) -> Told:
        """The body of an answer that has to be a success."""
        answer = self.call(key, method, path, body, **headers)
        assert answer.status_code in (200, 201), answer.text
        told: Told = answer.json()
        return told

    def key(self, organization_id: str, *scopes: str, **more: Any) -> str:
        """An API key for management, made by the command line on the machine itself."""
        new = NewApiKey(
            organization_id, "test", scopes=scopes, **({"audiences": (MANAGEMENT,)} | more)
        )
        return api_keys.create(
            self.deployment.store,
            self.deployment.catalog,
            new,
            TESTER,
            now=NOON,
            issuer=self.deployment.settings.issuer,
            seal_with=lambda _: sealing.load(self.deployment.settings.keys_dir).newest(),
        ).key

    def edited(self, key: str, path: str, body: object) -> Told:
        return self.done(key, "PATCH", path, body, if_match="*")

    def is_active(self, token: str) -> bool:
        """Whether a token works at this very moment, asked by its own resource server."""
        asker = self.key(
            self.deployment.organization_id, RESOURCE_SERVER, audiences=(AUDIENCE, MANAGEMENT)
        )
        answer = self.http.post("/oauth/introspect", data={"client_secret": asker, "token": token})
        active: bool = answer.json()["active"]
        return active


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_deployment(tmp_path_factory.mktemp("tenancy")) as made, a_client(made) as http:
        world = World(made, http, "")
        operator = world.key(made.organization_id, OPERATOR, *ORGANIZATION_PERMISSIONS)
        yield World(made, http, operator)


@dataclass(frozen=True, slots=True)
class Tenant:
    """An organization that is there for one test, its admin API key and default project."""

    id: str
    admin: str
    project: str


@pytest.fixture
def tenant(world: World) -> Tenant:
    return a_tenant(world)


def a_tenant(world: World) -> Tenant:
    body = {"name": "Acme", "bootstrap": True}
    told = world.done(world.operator, "POST", "/organizations", body)
    return Tenant(told["organization"]["id"], told["key"]["key"], told["project"]["id"])


def refused(answer: httpx2.Response, status: int, code: str) -> Told:
    """The body of a problem, once what holds for all of them was looked at."""
    body: Told = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert body["status"] == status
    assert body["detail"].endswith(".")
    assert body["requestId"]
    return body


def pointers(body: Told) -> list[str]:
    return [one["pointer"] for one in body.get("errors", [])]


# --- before and after the bootstrap


def test_before_the_bootstrap_every_answer_says_so_and_how(world: World) -> None:
    """But for who one is, what there is, and the state of the organization itself."""
    waiting = organizations.create(world.deployment.store, "W", TESTER, now=NOON).id
    key = world.key(waiting, OPERATOR, RESOURCE_SERVER, *ORGANIZATION_PERMISSIONS)
    answered = set()
    for route in ROUTES:
        path = "/".join("x" if part[:1] == "{" else part for part in route.path.split("/"))
        answer = world.call(key, route.method, path)
        if not route.needs_bootstrap:
            answered.add((route.method, route.path))
            continue
        body = refused(answer, 409, "organization_not_bootstrapped")
        assert f"POST {MANAGEMENT}/organizations/{waiting}/bootstrap" in body["detail"]
        assert f"coatcheck orgs bootstrap {waiting}" in body["detail"]

    assert {
        ("GET", "/whoami"),
        ("GET", "/catalog"),
        ("GET", "/organizations/{organization}"),
        ("POST", "/organizations/{organization}/bootstrap"),
    } <= answered
    assert world.done(key, "GET", f"/organizations/{waiting}")["bootstrappedAt"] is None
    for path in ("/projects", "/members"):
        body = {"name": "n", "organization": waiting}
        if path == "/members":
            body |= {"email": "a@example.com", "role": "viewer"}
        refused(
            world.call(world.operator, "POST", path, body), 409, "organization_not_bootstrapped"
        )

    world.done(world.operator, "POST", f"/organizations/{waiting}/bootstrap")

    assert world.call(key, "GET", "/keys").status_code == 200


def test_a_bootstrap_shows_the_admin_key_once(world: World) -> None:
    """K3: who asks again with the same Idempotency-Key learns the rest of it."""
    made = world.done(world.operator, "POST", "/organizations", {"name": "Acme"})
    path = f"/organizations/{made['id']}/bootstrap"
    assert (made["bootstrappedAt"], made["operator"]) == (None, False)

    first, again = (
        world.call(world.operator, "POST", path, idempotency_key="once") for _ in range(2)
    )

    told = first.json()
    assert first.status_code == again.status_code == 201
    assert set(told) == {"organization", "project", "key"}
    assert first.headers["location"] == f"{MANAGEMENT}/organizations/{made['id']}"
    assert told["organization"]["bootstrappedAt"] == "2027-01-15T08:00:00Z"
    assert (told["project"]["name"], told["project"]["default"]) == ("Default", True)
    assert told["key"]["scopes"] == list(ORGANIZATION_PERMISSIONS)
    assert again.json() == told | {"key": told["key"] | {"key": None}}
    assert again.headers["idempotency-replayed"] == "true"
    assert world.done(told["key"]["key"], "GET", "/whoami")["bootstrapped"] is True
    refused(world.call(world.operator, "POST", path), 409, "already_bootstrapped")


VERBS = ("suspend", "resume", "bootstrap")


def test_only_an_operator_makes_and_switches_on_organizations(world: World, tenant: Tenant) -> None:
    """K23: the right that lacks is named; an organization's admin has it not."""
    one = f"/organizations/{tenant.id}"
    for path in ("/organizations", *(f"{one}/{verb}" for verb in VERBS)):
        body = refused(world.call(tenant.admin, "POST", path), 403, "insufficient_scope")
        assert body["scope"] == OPERATOR


def test_nobody_comes_in_without_an_api_key_for_management(world: World, tenant: Tenant) -> None:
    """K23: nothing, a guess, an API key of the product, a token for another audience."""
    product_key = world.key(tenant.id, "widgets:read", audiences=(AUDIENCE,))
    for path in ("/organizations", "/projects", "/members", "/groups"):
        assert world.http.get(f"/v1{path}").status_code == 401
        for credential in ("x", product_key, token_for(world.http, product_key)):
            assert world.call(credential, "GET", path).status_code == 401


def test_the_set_up_sees_to_signing_keys_first(world: World) -> None:
    """The command line runs the same routes; it too names one of several organizations."""
    deployment = world.deployment
    seen: list[int] = []

    office = replace(
        deployment.service._management._office,
        ensure_signing_keys=lambda: seen.append(deployment.store.head()),
    )

    def run(path: str, body: Told) -> Answer:
        headers = {"content-type": "application/json"}
        sent = Request("POST", path, headers=headers, body=json.dumps(body).encode())
        return dispatch.answer(deployment.store, office, sent, lambda tx: local(TESTER), now=NOON)

    head = deployment.store.head()
    made = run("/organizations", {"name": "n"}).body
    assert made is not None
    assert seen == [head], "before anything was written"
    assert run(f"/organizations/{made['id']}/bootstrap", {}).status == 201
    assert len(seen) == 2
    assert run("/projects", {"name": "n", "organization": made["id"]}).status == 201
    unnamed = run("/projects", {"name": "n"})
    assert unnamed.body is not None
    assert (unnamed.status, unnamed.body["code"]) == (400, "organization_required")
    assert len(seen) == 2, "nobody else needs it"


# --- organizations


def test_an_operator_sees_all_organizations_and_everybody_else_their_own(
    world: World, tenant: Tenant
) -> None:
    """Which others there are is the operator's secret."""
    seen = world.done(world.operator, "GET", "/organizations")
    own = world.done(tenant.admin, "GET", "/organizations")

    assert {tenant.id, world.deployment.organization_id} <= {one["id"] for one in seen["data"]}
    assert [one["id"] for one in own["data"]] == [tenant.id]
    assert (own["nextCursor"], own["hasMore"]) == (None, False)
    viewer = world.key(tenant.id, "usage:read")
    assert world.done(viewer, "GET", "/organizations") == own
    server = world.key(tenant.id, RESOURCE_SERVER)
    refused(world.call(server, "GET", "/organizations"), 403, "insufficient_scope")


def test_an_admin_sets_the_policies_of_its_organization(world: World, tenant: Tenant) -> None:
    """Spans as people write them, or seconds; null takes a limit away."""
    path = f"/organizations/{tenant.id}"
    for given, stored in (("90d", "90d"), (3600, "1h"), ("90s", "90s"), (None, None)):
        told = world.edited(tenant.admin, path, {"maxLifetime": given})
        assert told["maxLifetime"] == stored
    told = world.edited(tenant.admin, path, {"name": "Acme Ltd", "recoverable": True})

    assert (told["name"], told["recoverable"]) == ("Acme Ltd", True)
    assert world.done(tenant.admin, "GET", path) == told
    reader = world.key(tenant.id, "keys:read", "keys:write", "members:write")
    assert world.done(reader, "GET", path) == told
    answer = world.call(reader, "PATCH", path, {"name": "Mine"}, if_match="*")
    assert refused(answer, 403, "insufficient_scope")["scope"] == "org:admin"
    answer = world.call(world.key(tenant.id, "usage:read"), "GET", path)
    assert refused(answer, 403, "insufficient_scope")["scope"] == "keys:read"


def test_what_an_organization_may_spend_is_the_operators_to_say(
    world: World, tenant: Tenant
) -> None:
    """Not even the same amount again: nothing about credit is an admin's."""
    path = f"/organizations/{tenant.id}"
    for body in ({"creditLimit": 5}, {"lowCredit": None}, {"name": "n", "creditLimit": None}):
        answer = world.call(tenant.admin, "PATCH", path, body, if_match="*")
        assert refused(answer, 403, "insufficient_scope")["scope"] == OPERATOR

    told = world.edited(world.operator, path, {"creditLimit": 100, "lowCredit": 2.5})
    assert (told["creditLimit"], told["lowCredit"], told["name"]) == (100, 2.5, "Acme")
    bare = world.key(world.deployment.organization_id, OPERATOR)
    assert world.edited(bare, path, {"creditLimit": None})["creditLimit"] is None
    new = world.done(bare, "POST", "/organizations", {"name": "Not yet bootstrapped"})
    told = world.edited(bare, f"/organizations/{new['id']}", {"creditLimit": 5})
    assert (told["creditLimit"], told["bootstrappedAt"]) == (5, None)


BAD_POLICIES = {
    "a word for a lifetime": ({"maxLifetime": "long"}, "/maxLifetime"),
    "a truth for a lifetime": ({"maxLifetime": True}, "/maxLifetime"),
    "a fraction for a lifetime": ({"maxLifetime": 1.5}, "/maxLifetime"),
    "a negative lifetime": ({"maxLifetime": -1}, "/maxLifetime"),
    "no lifetime": ({"maxLifetime": "0"}, "/maxLifetime"),
    "an eternal lifetime": ({"maxLifetime": "999999999d"}, "/maxLifetime"),
    "a number beyond all": ({"maxLifetime": 10**400}, "/maxLifetime"),
    "a word for credit": ({"creditLimit": "much"}, "/creditLimit"),
    "a truth for credit": ({"creditLimit": True}, "/creditLimit"),
    "debt": ({"creditLimit": -1}, "/creditLimit"),
    "more than everything": ({"creditLimit": 1e300}, "/creditLimit"),
    "too fine": ({"lowCredit": 0.0000001}, "/lowCredit"),
    "a word for a truth": ({"recoverable": "yes"}, "/recoverable"),
    "no name": ({"name": None}, "/name"),
}


@pytest.mark.parametrize(("body", "pointer"), BAD_POLICIES.values(), ids=BAD_POLICIES)
def test_a_bad_policy_is_pointed_at(world: World, body: Told, pointer: str) -> None:
    """400 with the one input that is wrong, and nothing done."""
    path = f"/organizations/{world.deployment.organization_id}"
    before = world.done(world.operator, "GET", path)

    answer = world.call(world.operator, "PATCH", path, body, if_match="*")

    assert pointers(refused(answer, 400, "invalid_input")) == [pointer]
    assert world.done(world.operator, "GET", path) == before


def test_a_suspended_organization_is_out_from_the_next_request_on(
    world: World, tenant: Tenant
) -> None:
    """And back with the next one after it is resumed; tokens of before stay dead.  K8."""
    path = f"/organizations/{tenant.id}"
    token = token_for(world.http, tenant.admin, resource=MANAGEMENT)
    assert world.done(token, "GET", "/whoami")["organization"] == tenant.id

    assert world.done(world.operator, "POST", f"{path}/suspend")["status"] == "suspended"
    assert world.call(tenant.admin, "GET", "/whoami").json()["code"] == "org_suspended"
    assert world.call(token, "GET", "/whoami").json()["code"] == "token_revoked"

    assert world.done(world.operator, "POST", f"{path}/resume")["status"] == "active"
    assert world.call(tenant.admin, "GET", "/whoami").status_code == 200
    assert world.call(token, "GET", "/whoami").status_code == 401
    own = f"/organizations/{world.deployment.organization_id}"
    refused(world.call(world.operator, "POST", f"{own}/suspend"), 409, "conflict")


# --- whose it is


def test_another_organizations_anything_does_not_exist(world: World, tenant: Tenant) -> None:
    """The answer is that to an id nobody has, byte for byte but for the request's own name."""
    other = a_tenant(world)
    there = a_member(world, other)["id"]
    own = {"organizations": other.id, "projects": other.project, "members": there}
    none = {"organizations": "org_x", "projects": "prj_x", "members": "mem_x"}
    cases: list[tuple[str, str, object]] = [
        (method, f"/{kind}/{{{kind}}}", {} if method == "PATCH" else None)
        for kind in own
        for method in ("GET", "PATCH")
    ]
    cases += [
        ("DELETE", "/members/{members}", None),
        ("POST", "/projects/{projects}/archive", None),
        ("POST", "/projects/{projects}/restore", None),
        ("GET", "/projects?organization={organizations}", None),
        ("GET", "/members?organization={organizations}", None),
        ("POST", "/projects", {"name": "n", "organization": "{organizations}"}),
        (
            "POST",
            "/members",
            {"name": "n", "email": "a@b.c", "role": "viewer", "organization": "{organizations}"},
        ),
    ]
    for method, path, body in cases:
        told = []
        for ids in (own, none):
            sent = body
            if isinstance(body, dict) and "organization" in body:
                sent = body | {"organization": ids["organizations"]}
            answer = world.call(tenant.admin, method, path.format(**ids), sent, if_match="*")
            told.append(refused(answer, 404, "not_found") | {"requestId": None})
        assert told[0] == told[1], (method, path)
    assert world.done(other.admin, "GET", f"/members/{there}")["id"] == there


def test_an_operator_names_the_organization_it_works_on(world: World, tenant: Tenant) -> None:
    """In the query to read, in the body to make; by id nothing more is needed."""
    body = {"name": "Shop", "organization": tenant.id}
    project = world.done(world.operator, "POST", "/projects", body)
    member = world.done(
        world.operator, "POST", "/members", body | {"email": "a@b.c", "role": "viewer"}
    )

    assert (project["organization"], member["organization"]) == (tenant.id, tenant.id)
    for path, made in (("/projects", project), ("/members", member)):
        listed = world.done(world.operator, "GET", f"{path}?organization={tenant.id}")["data"]
        assert made in listed
        assert made not in world.done(world.operator, "GET", path)["data"]
        renamed = world.edited(world.operator, f"{path}/{made['id']}", {"name": "N"})
        assert renamed["name"] == "N"


def test_who_is_bound_to_a_project_stays_in_it(world: World, tenant: Tenant) -> None:
    """It sees that one, and changes nothing that has to do with others."""
    other = world.done(tenant.admin, "POST", "/projects", {"name": "Other"})["id"]
    bound = world.key(tenant.id, *ORGANIZATION_PERMISSIONS, project_id=other)
    member = a_member(world, tenant)["id"]

    assert [one["id"] for one in world.done(bound, "GET", "/projects")["data"]] == [other]
    refused(world.call(bound, "GET", f"/projects/{tenant.project}"), 404, "not_found")
    refused(world.call(bound, "POST", f"/projects/{tenant.project}/archive"), 404, "not_found")
    assert world.edited(bound, f"/projects/{other}", {"name": "Mine"})["name"] == "Mine"
    for method, path, body in (
        ("POST", "/projects", {"name": "n"}),
        ("PATCH", f"/organizations/{tenant.id}", {"recoverable": True}),
        ("POST", "/members", {"name": "n", "email": "a@b.c", "role": "viewer"}),
        ("PATCH", f"/members/{member}", {"role": "viewer"}),
        ("DELETE", f"/members/{member}", None),
    ):
        answer = world.call(bound, method, path, body, if_match="*")
        assert pointers(refused(answer, 403, "beyond_your_rights")) == ["/project"]


RIGHTS = {
    # permission of a caller → what it may do, of all that is attempted
    "keys:read": {"list projects", "list members", "list groups", "show project"},
    "keys:write": set[str](),
    "usage:read": set[str](),
    "audit:read": set[str](),
    "members:write": {"remove member"},
    "org:admin": {"make project", "edit project", "archive project", "edit organization"},
    RESOURCE_SERVER: {"list groups"},
    OPERATOR: {"list groups", "make group", "edit organization", "make organization"},
}


@pytest.mark.parametrize(("permission", "allowed"), RIGHTS.items(), ids=RIGHTS)
def test_each_permission_opens_its_own_doors(
    world: World, tenant: Tenant, permission: str, allowed: set[str]
) -> None:
    """403 with the name of the permission for all others; a role beyond one's own is refused."""
    member = a_member(world, tenant)["id"]
    project = world.done(tenant.admin, "POST", "/projects", {"name": "n"})["id"]
    person = {"name": "n", "email": "n@example.com", "role": "viewer"}
    attempts: dict[str, tuple[str, str, object]] = {
        "list projects": ("GET", "/projects", None),
        "list members": ("GET", "/members", None),
        "list groups": ("GET", "/groups", None),
        "show project": ("GET", f"/projects/{project}", None),
        "make project": ("POST", "/projects", {"name": "n"}),
        "edit project": ("PATCH", f"/projects/{project}", {"name": "n"}),
        "archive project": ("POST", f"/projects/{project}/archive", None),
        "edit organization": ("PATCH", f"/organizations/{tenant.id}", {"name": "n"}),
        "make organization": ("POST", "/organizations", {"name": "n"}),
        "make group": ("POST", "/groups", {"name": "n"}),
        "make viewer": ("POST", "/members", person),
        "demote member": ("PATCH", f"/members/{member}", {"role": "viewer"}),
        "remove member": ("DELETE", f"/members/{member}", None),
    }
    key = world.key(tenant.id, permission)

    done = set()
    for name, (method, path, body) in attempts.items():
        answer = world.call(key, method, path, body, if_match="*")
        if answer.status_code < 300:
            done.add(name)
        elif permission == "members:write" and name in ("make viewer", "demote member"):
            assert pointers(refused(answer, 403, "beyond_your_rights")) == ["/role"]
        else:
            refused(answer, 403, "insufficient_scope")

    assert done == allowed


# --- projects


def test_an_archived_project_takes_its_tokens_along(world: World, tenant: Tenant) -> None:
    """K8, K10: at the next introspection, and at this very API; restoring revives API keys only."""
    project = world.done(tenant.admin, "POST", "/projects", {"name": "Shop"})["id"]
    bound = world.key(tenant.id, "widgets:read", audiences=(AUDIENCE,), project_id=project)
    manager = world.key(tenant.id, "keys:read", project_id=project)
    free = world.key(tenant.id, "widgets:read", audiences=(AUDIENCE,))
    token, other = token_for(world.http, bound), token_for(world.http, free)
    own = token_for(world.http, manager, resource=MANAGEMENT)
    assert world.is_active(token)
    assert world.call(own, "GET", "/whoami").status_code == 200

    told = world.done(tenant.admin, "POST", f"/projects/{project}/archive")

    assert told["status"] == "archived"
    assert not world.is_active(token)
    assert world.is_active(other)
    assert world.call(own, "GET", "/whoami").json()["code"] == "token_revoked"
    assert world.call(manager, "GET", "/whoami").status_code == 401

    assert world.done(tenant.admin, "POST", f"/projects/{project}/restore")["archivedAt"] is None
    assert not world.is_active(token)
    assert world.is_active(token_for(world.http, bound))
    answer = world.call(tenant.admin, "POST", f"/projects/{tenant.project}/archive")
    refused(answer, 409, "default_project")


# --- members


def a_member(world: World, tenant: Tenant, role: str = "admin") -> Told:
    body = {"name": "Ada", "email": "ada@example.com", "role": role}
    return world.done(tenant.admin, "POST", "/members", body)


def own_key(world: World, tenant: Tenant, member: Told) -> str:
    body = {"name": "mine", "member": member["id"]}
    key: str = world.done(tenant.admin, "POST", "/keys", body)["key"]
    return key


def test_a_removed_members_api_key_is_out_on_the_next_request(world: World, tenant: Tenant) -> None:
    """And the token that was made from it before, too; the member is in no list any more."""
    member = a_member(world, tenant)
    key = own_key(world, tenant, member)
    token = token_for(world.http, key, resource=MANAGEMENT)
    assert world.done(key, "GET", "/whoami")["member"] == member["id"]
    assert world.done(tenant.admin, "GET", "/members")["data"] == [member]

    path = f"/members/{member['id']}"
    assert world.call(tenant.admin, "DELETE", path).status_code == 204

    assert world.call(key, "GET", "/whoami").json()["code"] == "api_key_revoked"
    assert world.call(token, "GET", "/whoami").json()["code"] == "token_revoked"
    assert world.done(tenant.admin, "GET", "/members")["data"] == []
    for method in ("GET", "DELETE"):
        refused(world.call(tenant.admin, method, path), 404, "not_found")


def test_a_smaller_role_holds_from_the_next_request_on(world: World, tenant: Tenant) -> None:
    """For the API key and the token alike; a larger one gives neither anything."""
    member = a_member(world, tenant, "developer")
    key = own_key(world, tenant, member)
    token = token_for(world.http, key, resource=MANAGEMENT)
    new = {"name": "n", "scopes": ["keys:read"], "audiences": [MANAGEMENT]}
    world.done(key, "POST", "/keys", new)

    for role in ("viewer", "admin"):
        told = world.edited(tenant.admin, f"/members/{member['id']}", {"role": role})
        assert told["role"] == role
        refused(world.call(key, "POST", "/keys", new), 403, "insufficient_scope")
        assert world.call(token, "POST", "/keys", new).json()["code"] == "token_revoked"
    assert world.done(key, "GET", "/whoami")["permissions"] == ["keys:read", "usage:read"]


def test_no_edit_gives_a_members_own_api_key_more_than_the_role(
    world: World, tenant: Tenant
) -> None:
    """Whoever edits it may more: what an API key of a member's is, is its member's role."""
    member = a_member(world, tenant, "viewer")
    made = world.done(tenant.admin, "POST", "/keys", {"name": "mine", "member": member["id"]})

    for body in ({"scopes": ["org:admin"]}, {"scopes": ["*"]}, {"audiences": [AUDIENCE]}):
        path = f"/keys/{made['id']}"
        edited = world.call(tenant.admin, "PATCH", path, body, if_match="*")
        assert pointers(refused(edited, 400, "invalid_input")) == [f"/{next(iter(body))}"]
    assert world.edited(tenant.admin, path, {"scopes": ["keys:read"]})["scopes"] == ["keys:read"]


def test_one_address_is_one_member(world: World, tenant: Tenant) -> None:
    """A conflict, with its own name."""
    a_member(world, tenant)
    body = {"name": "Ada", "email": "ADA@example.com", "role": "viewer"}

    refused(world.call(tenant.admin, "POST", "/members", body), 409, "member_exists")


# --- groups


def test_a_narrowed_group_takes_its_tokens_along(world: World, tenant: Tenant) -> None:
    """K10: of every organization, at the next introspection; a new price takes none."""
    group = world.done(world.operator, "POST", "/groups", {"name": "Gold", "priceMultiplier": 1.5})
    path = f"/groups/{group['id']}"
    key = world.key(tenant.id, "widgets:read", audiences=(AUDIENCE,), group_id=group["id"])
    token = token_for(world.http, key)

    world.edited(world.operator, path, {"priceMultiplier": 2, "name": "Silver"})
    assert world.is_active(token)
    told = world.edited(world.operator, path, {"models": ["opus"], "requestsPerMinute": 5})

    assert not world.is_active(token)
    assert world.is_active(token_for(world.http, key))
    assert (told["priceMultiplier"], told["models"], told["tokensPerMinute"]) == (2, ["opus"], None)
    refused(world.call(world.operator, "DELETE", path), 409, "group_in_use")


def test_whatever_models_a_group_gets_its_tokens_fit(world: World, tenant: Tenant) -> None:
    """The largest API key that it takes still gets tokens when the group names the most models."""
    path = f"/groups/{world.done(world.operator, 'POST', '/groups', {'name': 'G'})['id']}"
    largest, count = "", 0
    with suppress(Invalid):
        for count in range(5, 200, 15):
            scopes = [f"widgets:read{number:04}" for number in range(count)]
            largest = world.key(
                tenant.id, *scopes, audiences=(AUDIENCE,), group_id=path.removeprefix("/groups/")
            )

    assert count < 185, "there is a largest one"
    world.edited(world.operator, path, {"models": [f"m{number:04}" for number in range(187)]})

    assert world.is_active(token_for(world.http, largest))


def test_a_group_is_everybodys_to_read(world: World, tenant: Tenant) -> None:
    """Who chooses one and who applies one; a deleted one is gone."""
    group = world.done(world.operator, "POST", "/groups", {"name": "Gold"})
    path = f"/groups/{group['id']}"
    assert (group["priceMultiplier"], group["models"]) == (1, None)

    for key in (tenant.admin, world.key(tenant.id, RESOURCE_SERVER), world.operator):
        assert world.done(key, "GET", path) == group
        assert group in world.done(key, "GET", "/groups")["data"]
    for key in (tenant.admin, world.key(tenant.id, RESOURCE_SERVER)):
        for method in ("PATCH", "DELETE"):
            answer = world.call(key, method, path, if_match="*")
            assert refused(answer, 403, "insufficient_scope")["scope"] == OPERATOR

    assert world.call(world.operator, "DELETE", path).status_code == 204
    refused(world.call(tenant.admin, "GET", path), 404, "not_found")


BAD_GROUPS = {
    "a free lunch and more": ({"priceMultiplier": -1}, "/priceMultiplier"),
    "a price too fine": ({"priceMultiplier": 0.0000001}, "/priceMultiplier"),
    "a price beyond all": ({"priceMultiplier": 1e300}, "/priceMultiplier"),
    "no price": ({"priceMultiplier": None}, "/priceMultiplier"),
    "a word for a price": ({"priceMultiplier": "1"}, "/priceMultiplier"),
    "a model that is none": ({"models": [1]}, "/models/0"),
    "no models": ({"models": []}, "/models"),
    "no requests": ({"requestsPerMinute": 0}, "/requestsPerMinute"),
    "half a token": ({"tokensPerMinute": 0.5}, "/tokensPerMinute"),
    "tokens beyond all": ({"tokensPerMinute": 10**30}, "/tokensPerMinute"),
}


@pytest.mark.parametrize(("body", "pointer"), BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_a_bad_group_is_pointed_at(world: World, body: Told, pointer: str) -> None:
    """400 with the one input that is wrong."""
    answer = world.call(world.operator, "POST", "/groups", {"name": "G"} | body)

    assert pointers(refused(answer, 400, "invalid_input")) == [pointer]


# --- what holds for each of them


def one_of_each(world: World, tenant: Tenant) -> dict[str, Told]:
    """Something of each kind, by its path."""
    member = a_member(world, tenant)
    group = world.done(world.operator, "POST", "/groups", {"name": "G"})
    paths = (
        f"/organizations/{tenant.id}",
        f"/projects/{tenant.project}",
        f"/members/{member['id']}",
        f"/groups/{group['id']}",
    )
    return {path: world.done(world.operator, "GET", path) for path in paths}


def test_no_edit_is_lost(world: World, tenant: Tenant) -> None:
    """RFC 9110 §13.1.1: without If-Match 428, with a stale one 412, both with the current tag."""
    for path, before in one_of_each(world, tenant).items():
        seen = world.call(world.operator, "GET", path).headers["etag"]
        missing = world.call(world.operator, "PATCH", path, {"name": "A"})
        done = world.call(world.operator, "PATCH", path, {"name": "A"}, if_match=seen)
        stale = world.call(world.operator, "PATCH", path, {"name": "B"}, if_match=seen)

        refused(missing, 428, "precondition_required")
        refused(stale, 412, "precondition_failed")
        assert done.status_code == 200, done.text
        assert missing.headers["etag"] == seen != done.headers["etag"]
        assert stale.headers["etag"] == done.headers["etag"]
        after = world.call(world.operator, "GET", path)
        assert after.json() == done.json() == before | {"name": "A"}
        assert after.headers["etag"] == done.headers["etag"]
        assert world.edited(world.operator, path, {}) == done.json()


def test_what_is_made_says_where_it_is(world: World, tenant: Tenant) -> None:
    """RFC 9110 §15.3.2; its ETag is good for the first edit."""
    for path, body in (
        ("/organizations", {"name": "n"}),
        ("/projects", {"name": "n", "organization": tenant.id}),
        (
            "/members",
            {"name": "n", "email": "a@b.c", "role": "viewer", "organization": tenant.id},
        ),
        ("/groups", {"name": "n"}),
    ):
        made = world.call(world.operator, "POST", path, body)
        there = made.headers["location"].removeprefix(MANAGEMENT)

        assert (made.status_code, there) == (201, f"{path}/{made.json()['id']}")
        assert world.done(world.operator, "GET", there) == made.json()
        tag = made.headers["etag"]
        edited = world.call(world.operator, "PATCH", there, {"name": "m"}, if_match=tag)
        assert edited.json() == made.json() | {"name": "m"}


SET_FROM_OUTSIDE = ("id", "createdAt", "bootstrappedAt", "isOperator", "operator", "archivedAt")


def test_nothing_is_set_that_is_not_asked_for(world: World, tenant: Tenant) -> None:
    """K24: a name that nobody knows is refused by a pointer to it."""
    for path, before in one_of_each(world, tenant).items():
        collection = path[: path.rindex("/")]
        for name in SET_FROM_OUTSIDE:
            body = {name: "x"}
            edited = world.call(world.operator, "PATCH", path, body, if_match="*")
            made = world.call(world.operator, "POST", collection, {"name": "n"} | body)
            for answer in (edited, made):
                assert f"/{name}" in pointers(refused(answer, 400, "invalid_input"))
        assert world.done(world.operator, "GET", path) == before
    # A member of another organization cannot be made by an edit, either.
    for path in (f"/projects/{tenant.project}", f"/organizations/{tenant.id}"):
        body = {"organization": world.deployment.organization_id}
        answer = world.call(world.operator, "PATCH", path, body, if_match="*")
        assert pointers(refused(answer, 400, "invalid_input")) == ["/organization"]


FORGERIES = ("", "a\r\nb", "a\0b", "\x1b[2J", "a\u202eb", "a" * 10_000, "\ud800")


def test_no_name_forges_a_line(world: World, tenant: Tenant) -> None:
    """K2: for whatever has a name, when it is made and when it is edited."""
    for path, before in one_of_each(world, tenant).items():
        collection = path[: path.rindex("/")]
        more = {}
        if collection == "/members":
            more = {"email": "grace@example.com", "role": "viewer"}
        for name in FORGERIES:
            edited = world.call(world.operator, "PATCH", path, {"name": name}, if_match="*")
            made = world.call(world.operator, "POST", collection, {"name": name} | more)
            for answer in (edited, made):
                assert pointers(refused(answer, 400, "invalid_input")) == ["/name"]
        assert world.done(world.operator, "GET", path) == before


def test_pages_lead_to_the_end_and_nowhere_else(world: World, tenant: Tenant) -> None:
    """K25: each thing once; a cursor is good for its own list, as it was written."""
    for number in range(3):
        world.done(tenant.admin, "POST", "/projects", {"name": f"p{number}"})
        person = {"name": "n", "email": f"{number}@example.com", "role": "viewer"}
        world.done(tenant.admin, "POST", "/members", person)
        world.done(world.operator, "POST", "/groups", {"name": f"g{number}"})
    cursors = {}
    for key, path in (
        (tenant.admin, "/projects"),
        (tenant.admin, "/members"),
        (tenant.admin, "/groups"),
        (world.operator, "/organizations"),
    ):
        whole = world.done(key, "GET", path)["data"]
        first = page = world.done(key, "GET", f"{path}?limit=1")
        seen = page["data"]
        while page["hasMore"]:
            page = world.done(key, "GET", f"{path}?limit=1&cursor={page['nextCursor']}")
            seen += page["data"]
        assert seen == whole
        assert len(whole) >= 2
        assert page["nextCursor"] is None
        cursors[path] = first["nextCursor"]
        for query in ("limit=0", "limit=-1", f"limit={10**9}", "limit=x"):
            answer = world.call(key, "GET", f"{path}?{query}")
            assert pointers(refused(answer, 400, "invalid_input")) == ["/limit"]
        for cursor in ("x", first["nextCursor"][:-2], f"{first['nextCursor']}AA", ""):
            answer = world.call(key, "GET", f"{path}?cursor={cursor}")
            assert pointers(refused(answer, 400, "invalid_input")) == ["/cursor"]
        answer = world.call(key, "GET", f"{path}?offset=1")
        assert pointers(refused(answer, 400, "invalid_input")) == ["/offset"]
    answer = world.call(tenant.admin, "GET", f"/projects?cursor={cursors['/members']}")
    assert pointers(refused(answer, 400, "invalid_input")) == ["/cursor"]
