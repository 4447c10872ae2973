"""S0, an IDE with an LLM gateway: each behavior of its row of the product page."""

import re
import time
from collections.abc import Iterator

import pytest
import requests

from products.product import Customer, Document, Door, Product, a_product, locally, needing, soon

GATEWAY = "https://gateway.example.com"
STAGING = "https://staging.example.com"
DAY = 86_400

#: What callers do → the permission that it needs.
ROUTES = [
    needing("/infer", "gateway:infer", "POST"),
    needing("/providers", "providers:list"),
    needing("/sessions", "sessions:manage", "POST"),
    needing("/agents", "agents:launch", "POST"),
    needing("/agents/7", "agents:manage", "PATCH"),
    needing("/agents/7/runs", "agents:monitor"),
    needing("/members", "team:manage", "POST"),
    needing("/billing", "billing:manage"),
]
IDE = {"/infer", "/providers", "/sessions"}
CLOUD_AGENTS = {"/agents", "/agents/7", "/agents/7/runs"}
EVERYTHING = IDE | CLOUD_AGENTS | {"/members", "/billing"}
COMBINATIONS = {
    "ide": IDE,
    "cloud-agents": CLOUD_AGENTS,
    "gateway": {"/infer"},
    "admin": EVERYTHING,
    "full-access": EVERYTHING,
    # Can launch agents and infer, and cannot manage members or billing.
    "cloud-agents+gateway": CLOUD_AGENTS | {"/infer"},
}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("ide")
    with a_product(folder, "s0-ide.toml", live=[GATEWAY], test=[STAGING]) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(product: Product) -> Door:
    return product.door(GATEWAY, ROUTES)


@pytest.fixture(scope="module")
def staging(product: Product) -> Door:
    return product.door(STAGING, ROUTES, "test")


@pytest.fixture(scope="module")
def customer(product: Product) -> Customer:
    return product.customer()


def reached(door: Door, credential: str) -> set[str]:
    """The paths of the product that a credential opens."""
    found = set()
    for route in ROUTES:
        (method,) = (route.methods or set()) - {"HEAD"}
        status, code = door.told(credential, route.path, method)
        assert (status, code) in [(200, None), (403, "insufficient_scope")]
        if status == 200:
            found.add(route.path)
    return found


def test_the_prefix_is_the_environment_and_test_keys_go_to_staging_only(
    product: Product, customer: Customer, gateway: Door, staging: Door
) -> None:
    """Keys `cr_live_…` and `cr_test_…`."""
    real = customer.api.make("real", "gateway")
    trial = customer.api.make("trial", "gateway", env="test")

    assert re.fullmatch(r"cr_live_[0-9A-Za-z]{38}", real["key"])
    assert re.fullmatch(r"cr_test_[0-9A-Za-z]{38}", trial["key"])
    assert (real["audiences"], trial["audiences"]) == ([GATEWAY], [STAGING])
    assert gateway.all_told(product.both(real)) == staging.all_told(product.both(trial))
    assert gateway.ask(real["key"]).json()["env"] == "live"
    assert staging.ask(trial["key"]).json()["env"] == "test"
    assert {status for status, _ in gateway.all_told(product.both(trial))} == {401}
    assert {status for status, _ in staging.all_told(product.both(real))} == {401}
    assert product.refusal(trial["key"], resource=GATEWAY)[:2] == (400, "invalid_target")
    named = customer.api.refusal(
        "POST", "/keys", {"name": "x", "env": "test", "audiences": [GATEWAY]}
    )
    assert named[:2] == (400, "invalid_input")


@pytest.mark.parametrize("scopes", COMBINATIONS)
def test_named_scopes_combine(
    product: Product, customer: Customer, gateway: Door, scopes: str
) -> None:
    """A key may do what any of its scopes allows, and so may its tokens."""
    made = customer.api.make("scoped", *scopes.split("+"))

    wanted = COMBINATIONS[scopes]
    assert [reached(gateway, credential) for credential in product.both(made)] == [wanted, wanted]


def test_an_expiry_is_optional(customer: Customer) -> None:
    assert customer.api.make("for good", "ide")["expiresAt"] is None
    assert customer.api.make("for a month", "ide", expiresAt="30d")["expiresAt"] is not None
    assert customer.api.make("to a day", "ide", expiresAt="2099-12-31")["expiresAt"] == (
        "2099-12-31T23:59:59Z"
    )


def test_a_key_is_shown_once(customer: Customer) -> None:
    """Not in lists, not by asking again, not by repeating the request, not by any policy."""
    asked = {"name": "once", "scopes": ["ide"]}
    made, again = (
        customer.api.ask("POST", "/keys", asked, Idempotency_Key="one-click").json()
        for _ in range(2)
    )
    path = f"/keys/{made['id']}"

    assert (again["id"], again["key"]) == (made["id"], None)
    for shown in (customer.api.ask("GET", path), customer.api.ask("GET", "/keys?status=all")):
        assert made["key"] not in shown.text
        assert made["mask"] in shown.text
    assert customer.api.refusal("POST", f"{path}/reveal")[:2] == (409, "not_recoverable")
    organization = f"/organizations/{customer.id}"
    assert customer.api.refusal("PATCH", organization, {"recoverable": True})[0] == 400


def test_a_device_signs_in_once_and_out_for_good(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """Made at first sign-in, named after the device, IDE scope, one per device."""
    person = {"name": "Ada", "email": "ada@example.com", "role": "developer"}
    member = customer.api("POST", "/members", person, status=201)["id"]
    device = "/devices/macbook-7/key"
    wanted = {"member": member, "name": "MacBook Pro - Acme IDE"}

    made = customer.api("PUT", device, wanted, status=201)
    other = customer.api("PUT", "/devices/tower/key", wanted | {"name": "Tower"}, status=201)

    assert (made["name"], made["scopes"]) == ("MacBook Pro - Acme IDE", ["ide"])
    assert reached(gateway, made["key"]) == IDE
    # Signing in again reuses it, for a device that proves that it has it.
    again = customer.api("PUT", device, {"member": member, "currentKey": made["key"]})
    assert (again["id"], again["key"]) == (made["id"], None)
    # Who lost it gets a new one in its place.
    lost = product.both(made)
    made = customer.api("PUT", device, {"member": member})
    assert (made["id"], made["key"] in (None, lost[0])) == (again["id"], False)
    assert gateway.told(made["key"]) == (200, None)
    soon(lambda: {status for status, _ in gateway.all_told(lost)}, {401})
    # It is listed and revocable.
    assert {"MacBook Pro - Acme IDE", "Tower"} <= set(customer.api.names("?kind=device"))
    listed = customer.api("GET", f"/devices?member={member}")["data"]
    assert [one["device"] for one in listed] == ["macbook-7", "tower"]
    credentials = product.both(made)
    customer.api("POST", f"/keys/{made['id']}/revoke")
    # Revoking signs that device out, and no other, until the next sign-in.
    soon(lambda: {status for status, _ in gateway.all_told(credentials)}, {401})
    assert gateway.told(other["key"]) == (200, None)
    after = customer.api("PUT", device, wanted, status=201)
    assert after["id"] != made["id"]
    assert gateway.told(after["key"]) == (200, None)


def test_usage_is_told_near_real_time_and_test_keys_burn_no_credits(
    product: Product, customer: Customer
) -> None:
    """At `GET /v1/keys/{id}/usage`, with exactly these members."""
    real = customer.api.make("counted", "ide")
    trial = customer.api.make("trial", "ide", env="test")
    consumed = {"inputTokens": 1200, "outputTokens": 300, "credits": 2.5, "agentRuns": 1}

    product.report({"id": "r-1", "key": real["id"], **consumed})
    product.report({"id": "r-2", "key": real["id"], "requests": 2})
    product.report({"id": "r-3", "key": trial["id"], **consumed}, environment="test")

    told = customer.api("GET", f"/keys/{real['id']}/usage")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told.pop("lastUsed"))
    assert told == {
        "keyId": real["id"],
        "name": "counted",
        "totalRequests": 3,
        "tokensConsumed": {"input": 1200, "output": 300},
        "creditsConsumed": 2.5,
        "agentRuns": 1,
    }
    of_trial = customer.api("GET", f"/keys/{trial['id']}/usage")
    assert (of_trial["totalRequests"], of_trial["agentRuns"]) == (1, 1)
    assert of_trial["creditsConsumed"] == 0


def test_a_revocation_is_immediate_and_final(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """The next request gets 401."""
    made = customer.api.make("leaked", "ide")
    key, token = product.both(made)
    assert gateway.all_told([key, token]) == {(200, None)}

    customer.api("POST", f"/keys/{made['id']}/revoke")

    assert product.refusal(key)[1:] == ("invalid_client", "api_key_revoked")
    soon(lambda: gateway.told(token), (401, "token_revoked"))
    assert gateway.told(key) == (401, "api_key_revoked")
    for way in ("enable", "rotate"):
        status, code, _ = customer.api.refusal("POST", f"/keys/{made['id']}/{way}", {})
        assert (status, code) == (409, "api_key_revoked"), way
    assert customer.api.names("?status=revoked&name=leaked") == ["leaked"]


def test_keys_unused_for_ninety_days_are_found(product: Product, customer: Customer) -> None:
    """Whether they were never used or long ago, and none that is merely young."""
    then = time.time() - 100 * DAY
    stale, used_long_ago, in_use = (
        locally(product.live, name, "ide", organization_id=customer.id, now=then).api_key.id
        for name in ("stale", "used once", "in use")
    )
    customer.api.make("young", "ide")
    product.report(
        {"id": "u-1", "key": used_long_ago, "at": "2020-02-02"}, {"id": "u-2", "key": in_use}
    )

    found = {one["id"] for one in customer.api("GET", "/keys?unusedDays=90")["data"]}

    assert found == {stale, used_long_ago}


def test_a_low_balance_raises_an_alert(product: Product) -> None:
    """Once, when the balance falls below what was set, for the organization and for a key."""
    poor = product.customer("Poor")
    organization = f"/organizations/{poor.id}"
    product.operator.edit(organization, creditLimit=100, lowCredit=20)
    made = poor.api.make("spender", "ide", creditLimit=90)

    product.report({"id": "c-1", "key": made["id"], "credits": 70})
    assert poor.api.events("credit.low") == []
    product.report({"id": "c-2", "key": made["id"], "credits": 15})
    product.report({"id": "c-3", "key": made["id"], "credits": 1})

    alerts: dict[str, Document] = {
        one["subject"]: one["detail"] for one in poor.api.events("credit.low")
    }
    assert alerts == {
        poor.id: {"left": 15, "limit": 100},
        made["id"]: {"left": 5, "limit": 90},
    }
    assert poor.api("GET", "/usage")["creditsLeft"] == 14
    # Who has nothing left goes on testing: that costs nothing.
    product.report({"id": "c-4", "key": made["id"], "credits": 14})
    live, test = (poor.api.make(env, "ide", env=env) for env in ("live", "test"))
    assert product.refusal(live["key"])[2] == "quota_exceeded"
    assert product.token(test)


def test_a_key_is_a_basic_user_name_with_an_empty_password(
    product: Product, customer: Customer, gateway: Door
) -> None:
    """At the gateway and at the token endpoint; a token as well."""
    made = customer.api.make("basic", "gateway")

    assert gateway.all_told(product.both(made), place="basic") == {(200, None)}
    answer = requests.post(
        f"{product.issuer}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(made["key"], ""),
        timeout=10,
    )
    assert (answer.status_code, answer.json()["expires_in"]) == (200, 600)


def test_the_page_is_made_of_the_catalog(customer: Customer) -> None:
    """What people tick when they make a key: names and what they mean."""
    told = customer.api("GET", "/catalog")

    offered = ["IDE", "Cloud Agents", "Gateway", "Admin", "Full Access"]
    assert [one["name"] for one in told["scopes"]] == offered
    assert (told["freeEnvironments"], told["deviceScopes"]) == (["test"], ["ide"])
    assert told["policies"]["recoverable"] is False
