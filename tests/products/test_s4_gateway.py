"""S4, an LLM gateway: each behavior of its row of the product page."""

import re
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from coatcheck.starlette import require_scopes
from products.product import HERE, Customer, Document, Door, Product, a_product, soon

GATEWAY = "https://llm.example.com/v1"
ELSEWHERE = "203.0.113.9"
MODELS = ["atlas-large", "atlas-small", "atlas-embed", "brush-2", "quill-70b"]


@require_scopes("chat:create")
async def chat(request: Request) -> JSONResponse:
    """A chat: the model stands in the body, the price in the caller's group."""
    request.user.require_model((await request.json())["model"])
    return JSONResponse({"org": request.user.org_id, "group": request.user.group})


ROUTES = [Route("/chat", chat, methods=["POST"])]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("gateway")
    with a_product(folder, "s4-gateway.toml", live=[GATEWAY]) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(product: Product) -> Door:
    return product.door(GATEWAY, ROUTES)


@pytest.fixture(scope="module")
def customer(product: Product) -> Customer:
    """One that may copy its keys again."""
    made = product.customer()
    made.api.edit(f"/organizations/{made.id}", recoverable=True)
    return made


def usable(door: Door, credential: str) -> list[str]:
    """The models that a credential may ask."""
    found = []
    for model in MODELS:
        told = door.told(credential, "/chat", "POST", body={"model": model})
        assert told in [(200, None), (403, "model_not_allowed")]
        if told[0] == 200:
            found.append(model)
    return found


def a_group(product: Product, **terms: object) -> Document:
    made: Document = product.operator("POST", "/groups", {"name": "Tier", **terms}, status=201)
    return made


def test_the_list_has_a_column_for_everything(product: Product) -> None:
    """Name, status Active / Disabled / Expired, quota, expiry ("Permanent"), IP restriction."""
    owner = product.customer("Columns").api
    plain = owner.make("plain")
    full = owner.make("full", creditLimit=100, expiresAt="2099-12-31", cidrs=["203.0.113.0/24"])
    brief = owner.make("brief", expiresAt="1s")
    owner("POST", f"/keys/{owner.make('off')['id']}/disable")
    product.report({"id": "l-1", "key": full["id"], "credits": 40})
    soon(lambda: owner("GET", f"/keys/{brief['id']}")["status"], "expired")

    rows = {one["name"]: one for one in owner("GET", "/keys?status=all")["data"]}

    assert re.fullmatch(r"lg_live_[0-9A-Za-z]{38}", plain["key"])
    statuses = {"plain": "active", "full": "active", "brief": "expired", "off": "disabled"}
    assert {name: rows[name]["status"] for name in statuses} == statuses
    columns = ("creditLimit", "creditsUsed", "expiresAt", "cidrs")
    assert [rows["plain"][column] for column in columns] == [None, 0, None, None]
    shown = [rows["full"][column] for column in columns]
    assert shown == [100, 40, "2099-12-31T23:59:59Z", ["203.0.113.0/24"]]


def test_a_key_deactivates_when_its_credit_is_used_up(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """Key and token; and it goes on when somebody raises the limit."""
    made = customer.api.make("capped", creditLimit=10)
    path = f"/keys/{made['id']}"
    key, token = product.both(made)
    product.report({"id": "q-1", "key": made["id"], "credits": 9.999999})
    assert customer.api("GET", path)["status"] == "active"

    product.report({"id": "q-2", "key": made["id"], "credits": 0.000001})

    told = customer.api("GET", path)
    assert (told["status"], told["disabledReason"]) == ("disabled", "quota")
    assert product.refusal(key) == (400, "unauthorized_client", "quota_exceeded")
    soon(lambda: gateway.told(token), (401, "token_revoked"))
    assert product.door(GATEWAY, ROUTES).told(key) == (429, "quota_exceeded")
    assert customer.api.refusal("POST", f"{path}/enable")[:2] == (409, "quota_exceeded")

    raised = customer.api.edit(path, creditLimit=20)

    assert (raised["status"], raised["creditsUsed"]) == ("active", 10)
    assert gateway.all_told([key, product.token(made)]) == {(200, None)}


def test_an_unlimited_key_is_bound_by_its_organizations_total(
    product: Product, gateway: Door
) -> None:
    """All of its keys stop together, and go on together when the operator raises the total."""
    owner = product.customer("Poor")
    path = f"/organizations/{owner.id}"
    product.operator.edit(path, creditLimit=50)
    spender, other = owner.api.make("spender"), owner.api.make("other")
    credentials = (*product.both(spender), *product.both(other))
    assert gateway.all_told(credentials) == {(200, None)}

    product.report({"id": "o-1", "key": spender["id"], "credits": 50})

    soon(lambda: gateway.told(credentials[1]), (401, "token_revoked"))
    soon(lambda: gateway.told(credentials[3]), (401, "token_revoked"))
    assert product.refusal(other["key"]) == (400, "unauthorized_client", "quota_exceeded")
    assert product.door(GATEWAY, ROUTES).told(other["key"]) == (429, "quota_exceeded")
    # Who has none left still sees it, and cannot help itself.
    assert owner.api("GET", "/usage")["creditsLeft"] == 0
    assert owner.api.refusal("PATCH", path, {"creditLimit": 99})[0] == 403

    product.operator.edit(path, creditLimit=100)

    token = product.token(other)
    assert gateway.all_told([token, product.token(spender)]) == {(200, None)}
    # And stop at once when it is lowered below what was used.
    product.operator.edit(path, creditLimit=40)
    soon(lambda: gateway.told(token), (401, "token_revoked"))


def test_a_group_is_a_tier_that_the_operator_makes(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """Price multiplier, model list, requests and tokens per minute."""
    terms = {
        "name": "Pro",
        "priceMultiplier": 0.8,
        "models": ["atlas-small", "quill-70b"],
        "requestsPerMinute": 600,
        "tokensPerMinute": 90_000,
    }
    assert customer.api.refusal("POST", "/groups", terms)[:2] == (403, "insufficient_scope")
    group = a_group(product, **terms)
    made = customer.api.make("of the tier", group=group["id"])

    assert {name: group[name] for name in terms} == terms
    key, token = product.both(made)
    for credential in (key, token):
        assert usable(gateway, credential) == ["atlas-small", "quill-70b"]
        asked = gateway.ask(credential, "/chat", "POST", body={"model": "quill-70b"})
        # What the gateway charges and lets through by the minute, it reads there.
        read = product.resource_server()("GET", f"/groups/{asked.json()['group']}")
        assert (read["priceMultiplier"], read["requestsPerMinute"]) == (0.8, 600)

    product.operator.edit(f"/groups/{group['id']}", models=["quill-70b"])

    soon(lambda: gateway.told(token), (401, "token_revoked"))
    assert usable(gateway, key) == ["quill-70b"]
    in_use = product.operator.refusal("DELETE", f"/groups/{group['id']}")
    assert in_use[:2] == (409, "group_in_use")


def test_a_key_is_for_its_models_and_those_of_its_group(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """Model restrictions: none, a list, a list within the group's."""
    group = a_group(product, models=["atlas-small", "quill-70b"])
    wanted = [
        ({}, MODELS),
        ({"models": ["brush-2", "atlas-small"]}, ["atlas-small", "brush-2"]),
        ({"models": ["brush-2", "atlas-small"], "group": group["id"]}, ["atlas-small"]),
    ]
    for restriction, models in wanted:
        made = customer.api.make("models", **restriction)
        for credential in product.both(made):
            assert usable(gateway, credential) == models
    status, code, pointed = customer.api.refusal("POST", "/keys", {"name": "x", "models": ["gpt"]})
    assert (status, code) == (400, "invalid_input")
    assert "atlas-large" in pointed


def test_a_key_is_for_its_addresses(product: Product, customer: Customer, gateway: Door) -> None:
    """IP allow-list."""
    made = customer.api.make("office", cidrs=["127.0.0.1", f"{HERE}/32"])

    for credential in product.both(made):
        assert gateway.told(credential) == (200, None)
        assert gateway.told(credential, address=ELSEWHERE) == (403, "ip_not_allowed")


def test_everything_can_be_edited_and_the_key_string_stays(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """Name, expiry, credit limit, models, IPs: what uses the key notices nothing but the rules."""
    made = customer.api.make("before")
    path = f"/keys/{made['id']}"
    changes: dict[str, object] = {
        "name": "after",
        "expiresAt": "2099-12-31T00:00:00Z",
        "creditLimit": 12.5,
        "models": ["brush-2"],
        "cidrs": ["198.51.100.0/24"],
    }

    for name, value in changes.items():
        edited = customer.api.edit(path, **{name: value})
        assert edited[name] == value
        assert (edited["id"], edited["mask"]) == (made["id"], made["mask"])
    assert gateway.told(made["key"]) == (200, None)
    assert usable(gateway, made["key"]) == ["brush-2"]
    assert gateway.told(made["key"], address=ELSEWHERE) == (403, "ip_not_allowed")

    customer.api.edit(path, expiresAt=None, creditLimit=None, models=None, cidrs=None)

    assert gateway.told(product.token(made), address=ELSEWHERE) == (200, None)


def test_disabling_keeps_configuration_and_usage(
    product: Product, customer: Customer, gateway: Door
) -> None:
    made = customer.api.make("paused", creditLimit=100, models=["brush-2"])
    path = f"/keys/{made['id']}"
    token = product.token(made)
    product.report({"id": "d-1", "key": made["id"], "credits": 3, "inputTokens": 10})
    kept = ("name", "models", "creditLimit", "creditsUsed", "cidrs", "scopes", "mask")
    before = customer.api("GET", path)
    used = customer.api("GET", f"{path}/usage")

    disabled = customer.api("POST", f"{path}/disable")

    assert (disabled["status"], disabled["disabledReason"]) == ("disabled", "manual")
    assert product.refusal(made["key"])[2] == "api_key_disabled"
    soon(lambda: gateway.told(token), (401, "token_revoked"))
    enabled = customer.api("POST", f"{path}/enable")
    assert {name: enabled[name] for name in kept} == {name: before[name] for name in kept}
    assert customer.api("GET", f"{path}/usage") == used
    assert usable(gateway, made["key"]) == ["brush-2"]


def test_deleting_is_immediate(product: Product, customer: Customer, gateway: Door) -> None:
    made = customer.api.make("gone")
    key, token = product.both(made)
    assert gateway.all_told([key, token]) == {(200, None)}

    customer.api("DELETE", f"/keys/{made['id']}?confirm=true", status=204)

    assert product.refusal(key)[1] == "invalid_client"
    soon(lambda: {status for status, _ in gateway.all_told([key, token])}, {401})
    assert "gone" not in customer.api.names("?status=all")


def test_a_key_can_be_copied_again_at_any_time(product: Product, customer: Customer) -> None:
    """Where the organization keeps sealed copies; each time is an event, and a rotation counts."""
    made = customer.api.make("copied")
    path = f"/keys/{made['id']}"

    copies = [customer.api("POST", f"{path}/reveal")["key"] for _ in range(2)]

    assert copies == [made["key"]] * 2
    seen = [one for one in customer.api.events("api_key.revealed") if one["subject"] == made["id"]]
    assert len(seen) == 2
    assert all(one["actor"].startswith("key_") and one["address"] for one in seen)
    rotated = customer.api("POST", f"{path}/rotate", {"overlap": "none"})
    assert customer.api("POST", f"{path}/reveal")["key"] == rotated["key"] != made["key"]
    for shown in (customer.api.ask("GET", path), customer.api.ask("GET", "/keys")):
        assert rotated["key"] not in shown.text


def test_who_keeps_no_copies_copies_nothing_again(product: Product) -> None:
    """Never again is the default, and switching it off deletes the copies there are."""
    owner = product.customer("Careful")
    before = owner.api.make("before")
    owner.api.edit(f"/organizations/{owner.id}", recoverable=True)
    during = owner.api.make("during")
    assert owner.api("POST", f"/keys/{during['id']}/reveal")["key"] == during["key"]
    owner.api.edit(f"/organizations/{owner.id}", recoverable=False)
    owner.api.edit(f"/organizations/{owner.id}", recoverable=True)

    for made in (before, during):
        refused = owner.api.refusal("POST", f"/keys/{made['id']}/reveal")
        assert refused[:2] == (409, "not_recoverable")
