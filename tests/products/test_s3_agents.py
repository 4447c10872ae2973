"""S3, an agent platform: each behavior of its row of the product page."""

import re
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from products.product import Customer, Door, Product, a_product, needing, soon

AGENTS = "https://agents.example.com"
#: Every endpoint declares the permission it needs.
ENDPOINTS = {
    "agents:create": ("POST", "/agents"),
    "agents:update": ("PATCH", "/agents/7"),
    "agents:delete": ("DELETE", "/agents/7"),
    "agent:chat": ("POST", "/agents/7/chat"),
    "session:create": ("POST", "/sessions"),
    "session:read": ("GET", "/sessions/7"),
    "session:update": ("PATCH", "/sessions/7"),
    "session:delete": ("DELETE", "/sessions/7"),
    "messages:read": ("GET", "/sessions/7/messages"),
    "kb:read": ("GET", "/kb/7"),
    "kb:create": ("POST", "/kb"),
    "kb:write": ("PUT", "/kb/7"),
    "kb:delete": ("DELETE", "/kb/7"),
    "kb:upload": ("POST", "/kb/7/files"),
    "rag:search": ("GET", "/search"),
    "tools:create": ("POST", "/tools"),
    "tools:update": ("PATCH", "/tools/7"),
    "tools:delete": ("DELETE", "/tools/7"),
    "webhooks:create": ("POST", "/webhooks"),
    "webhooks:read": ("GET", "/webhooks/7"),
    "webhooks:update": ("PATCH", "/webhooks/7"),
    "webhooks:delete": ("DELETE", "/webhooks/7"),
}
ROLES = {
    "admin": ("admin", {"GET", "POST", "PATCH", "PUT", "DELETE"}),
    "write": ("member", {"GET", "POST", "PATCH"}),
    "read": ("viewer", {"GET"}),
}


async def runs(request: Request) -> JSONResponse:
    """An endpoint that is about one project, and one agent of it."""
    project = request.user.require_project()
    return JSONResponse({"org": request.user.org_id, "project": project})


ROUTES = [
    Route("/agents/{agent}/runs", runs),
    *(needing(path, permission, method) for permission, (method, path) in ENDPOINTS.items()),
]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("agents")
    with a_product(folder, "s3-agents.toml", live=[AGENTS]) as running:
        yield running


@pytest.fixture(scope="module")
def platform(product: Product) -> Door:
    return product.door(AGENTS, ROUTES)


@pytest.fixture(scope="module")
def customer(product: Product) -> Customer:
    return product.customer()


def opened(door: Door, credential: str, code: str = "insufficient_scope") -> set[str]:
    """The permissions whose endpoints a credential opens; the others refuse by this code."""
    found = set()
    for permission, (method, path) in ENDPOINTS.items():
        told = door.told(credential, path, method, place="X-API-Key")
        assert told in [(200, None), (403, code)], permission
        if told[0] == 200:
            found.add(permission)
    return found


def test_a_key_is_sent_as_x_api_key(product: Product, customer: Customer, platform: Door) -> None:
    """`X-API-Key: sk_…`: no environment in it."""
    made = customer.api.make("caller", "agent:chat")

    assert re.fullmatch(r"sk_[0-9A-Za-z]{38}", made["key"])
    for credential in product.both(made):
        whoami = platform.ask(credential, place="X-API-Key").json()
        assert (whoami["org"], whoami["key"]) == (customer.id, made["id"])


def test_every_endpoint_lets_in_who_has_its_permission_and_nobody_else(
    product: Product, customer: Customer, platform: Door
) -> None:
    """All 22, each allowed by one key and denied to the other, raw and as a token."""
    names = list(ENDPOINTS)
    assert len(names) == 22
    assert [one["name"] for one in customer.api("GET", "/catalog")["permissions"]] == names

    for half in (names[::2], names[1::2]):
        made = customer.api.make("half", *half)
        for credential in product.both(made):
            assert opened(platform, credential) == set(half)


@pytest.mark.parametrize("permission", ["kb:write", "agent:chat"])
def test_a_permission_stands_for_itself_alone(
    product: Product, customer: Customer, platform: Door, permission: str
) -> None:
    """`kb:write` is not `kb:create`, and `agent:` is not `agents:`."""
    made = customer.api.make("single", permission)

    assert opened(platform, made["key"]) == {permission}


@pytest.mark.parametrize("permissions", ROLES)
def test_a_role_allows_methods_whatever_the_scopes_say(
    product: Product, customer: Customer, platform: Door, permissions: str
) -> None:
    """Admin: GET POST PATCH PUT DELETE; write → member: GET POST PATCH; read → viewer: GET."""
    role, methods = ROLES[permissions]
    made = customer.api.make("of a role", permissions=permissions)
    allowed = {name for name, (method, _) in ENDPOINTS.items() if method in methods}

    for credential in product.both(made):
        assert opened(platform, credential, "role_not_allowed") == allowed
        assert platform.ask(credential).json()["roles"] == [role]
    both = customer.api.make("of a role and a scope", "agents:delete", permissions=permissions)
    status = platform.told(both["key"], "/agents/7", "DELETE")[0]
    assert status == (200 if permissions == "admin" else 403)


def test_a_smaller_role_holds_for_tokens_that_were_made_before(
    product: Product, customer: Customer, platform: Door
) -> None:
    made = customer.api.make("demoted", permissions="admin")
    key, token = product.both(made)
    assert platform.all_told([key, token], "/agents/7", "DELETE") == {(200, None)}

    customer.api.edit(f"/keys/{made['id']}", permissions="read")

    soon(lambda: platform.told(token), (401, "token_revoked"))
    assert platform.told(key, "/agents/7", "DELETE") == (403, "role_not_allowed")
    assert platform.told(key) == (200, None)


def test_an_unbound_key_names_its_project_where_one_is_needed(
    product: Product, customer: Customer, platform: Door
) -> None:
    """Optional `X-Project-Id`; missing where needed: 400."""
    made = customer.api.make("any project")
    path = "/agents/7/runs"

    for credential in product.both(made):
        assert platform.told(credential) == (200, None)
        assert platform.told(credential, path) == (400, "project_required")
        named = platform.ask(credential, path, project=customer.project)
        assert named.json() == {"org": customer.id, "project": customer.project}
        assert platform.told(credential, path, project="not a project!")[0] == 400


def test_a_bound_key_works_in_its_project_and_no_other(
    product: Product, customer: Customer, platform: Door
) -> None:
    """It needs no header, and another project is 403."""
    other = customer.api("POST", "/projects", {"name": "Other"}, status=201)["id"]
    made = customer.api.make("bound", project=customer.project)
    path = "/agents/7/runs"

    for credential in product.both(made):
        assert platform.ask(credential, path).json()["project"] == customer.project
        assert platform.told(credential, path, project=customer.project) == (200, None)
        assert platform.told(credential, path, project=other) == (403, "wrong_project")
        # Wherever it is named, needed or not.
        assert platform.told(credential, project=other) == (403, "wrong_project")


def test_keys_belong_to_an_organization_and_to_one_project_if_wanted(
    product: Product, platform: Door
) -> None:
    """Organization → Project → Agent; archiving a project ends what runs in it."""
    owner = product.customer("Owner")
    shop = owner.api("POST", "/projects", {"name": "Shop"}, status=201)["id"]
    bound = owner.api.make("of the shop", project=shop)
    whole = owner.api.make("of the organization")
    key, token = product.both(bound)

    assert (bound["project"], whole["project"]) == (shop, None)
    assert owner.api.names(f"?project={shop}") == ["of the shop"]
    projects = {one["name"] for one in owner.api("GET", "/projects")["data"]}
    assert projects == {"Default", "Shop"}
    stranger = product.customer("Stranger")
    refused = stranger.api.refusal("POST", "/keys", {"name": "x", "project": shop})
    assert refused[:2] == (400, "invalid_input")
    assert stranger.api.refusal("GET", f"/projects/{shop}")[:2] == (404, "not_found")

    owner.api("POST", f"/projects/{shop}/archive")

    soon(lambda: platform.told(token), (401, "token_revoked"))
    assert platform.told(key)[0] in (401, 403)
    assert platform.told(whole["key"]) == (200, None)
