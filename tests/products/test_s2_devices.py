"""S2, a device platform: each behavior of its row of the product page."""

import re
from collections.abc import Iterator

import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from products.product import HERE, Api, Customer, Door, Product, a_product, locally, soon

PLATFORM = "https://devices.example.com"
SITE = "PLACE/Site/42"
BATTERY = f"{SITE}/THING/Battery/7"
#: HTTP method → the action that it is.
ACTIONS = {"GET": "read", "POST": "create", "PATCH": "update", "DELETE": "delete", "PUT": "admin"}


async def thing(request: Request) -> JSONResponse:
    """Any thing: the path is its name, the method the action."""
    resource = request.url.path.removeprefix("/things/")
    request.user.require(ACTIONS[request.method], resource=resource)
    return JSONResponse({"org": request.user.org_id})


THINGS = Route("/things/{name:path}", thing, methods=list(ACTIONS))


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("devices")
    with a_product(folder, "s2-devices.toml", live=[PLATFORM]) as running:
        yield running


@pytest.fixture(scope="module")
def platform(product: Product) -> Door:
    return product.door(PLATFORM, [THINGS])


@pytest.fixture(scope="module")
def customer(product: Product) -> Customer:
    return product.customer()


def may(door: Door, credential: str, method: str, resource: str) -> bool:
    """Whether a credential may do this with that thing."""
    told = door.told(credential, f"/things/{resource}", method)
    assert told in [(200, None), (403, "insufficient_scope")]
    return told[0] == 200


def test_there_is_no_page_before_the_organization_is_bootstrapped(product: Product) -> None:
    """Every answer says so and how; then it is there, with the signing keys."""
    operator = product.operator
    waiting = operator("POST", "/organizations", {"name": "Waiting"}, status=201)["id"]
    management = f"{product.issuer}/v1"
    scopes = ("keys:read", "keys:write", "usage:read", "audit:read", "org:admin")
    made = locally(product.live, "early", *scopes, organization_id=waiting, audiences=(management,))
    early = Api(product.issuer, made.key)
    calls = [("GET", "/keys"), ("POST", "/keys"), ("GET", "/usage"), ("GET", "/events")]
    for method, path in [*calls, ("GET", "/projects"), ("GET", f"/keys/{made.api_key.id}")]:
        status, code, sentence = early.refusal(
            method, path, {"name": "x"} if method == "POST" else None
        )
        assert (status, code) == (409, "organization_not_bootstrapped"), path
        assert f"POST {management}/organizations/{waiting}/bootstrap" in sentence
        assert f"coatcheck orgs bootstrap {waiting}" in sentence
    assert early("GET", "/whoami")["bootstrapped"] is False

    told = operator("POST", f"/organizations/{waiting}/bootstrap", status=201)

    admin = Api(product.issuer, told["key"]["key"])
    assert admin("GET", "/whoami")["bootstrapped"] is True
    assert admin.make("first", "read")["status"] == "active"
    again = operator.refusal("POST", f"/organizations/{waiting}/bootstrap")
    assert again[:2] == (409, "already_bootstrapped")


def test_a_name_is_required_and_an_end_is_not(customer: Customer) -> None:
    for body in ({"scopes": ["read"]}, {"name": "", "scopes": ["read"]}):
        status, code, pointed = customer.api.refusal("POST", "/keys", body)
        assert (status, code, "/name" in pointed) == (400, "invalid_input", True)
    assert customer.api.make("for good", "read")["expiresAt"] is None
    assert customer.api.make("for now", "read", expiresAt="7d")["expiresAt"] is not None


@pytest.mark.parametrize(
    ("scope", "covers", "misses"),
    [
        (f"read@{SITE}", [SITE], ["PLACE/Site/43", "PLACE/Building/42", BATTERY, "PLACE/Site"]),
        ("read@PLACE/Site/#", [SITE, "PLACE/Site/43"], ["PLACE/Room/42", BATTERY]),
        ("read@PLACE/*/42", [SITE, "PLACE/Room/42"], ["PLACE/Room/43"]),
        (
            f"read@{SITE}/THING/Battery/#",
            [BATTERY, f"{SITE}/THING/Battery/8"],
            [SITE, f"{SITE}/THING/Meter/7", "THING/Battery/7", "PLACE/Site/43/THING/Battery/7"],
        ),
        (
            "read@PLACE/#/#/THING/#/#",
            [BATTERY, "PLACE/Room/1/THING/Meter/2"],
            [SITE, "THING/Meter/2", f"{BATTERY}/THING/Meter/2"],
        ),
        ("read@THING/Battery/7", ["THING/Battery/7"], [BATTERY, "THING/Battery/8"]),
        ("read", [SITE, BATTERY, "THING/Meter/1"], []),
        ("read@*", [SITE, BATTERY, "THING/Meter/1"], []),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_filter_has_an_exact_shape(
    product: Product,
    customer: Customer,
    platform: Door,
    scope: str,
    covers: list[str],
    misses: list[str],
) -> None:
    """Nested from the outside in; a wildcard is exactly one segment; nothing below or above."""
    made = customer.api.make("filtered", scope)

    for credential in product.both(made):
        allowed = [one for one in (*covers, *misses) if may(platform, credential, "GET", one)]
        assert allowed == covers
        assert not any(may(platform, credential, "DELETE", one) for one in covers)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("read@SITE/42", "PLACE, THING"),
        ("read@PLACE/Castle/42", "Site, Building, Room"),
        ("read@PLACE/Site", "PLACE/<kind>/<id>"),
        ("read@PLACE/Site/42/7", "PLACE, THING"),
        ("read@THING/Meter/1/PLACE/Site/42", "PLACE is not nested in THING"),
        ("read@THING/Meter/1/THING/Meter/2", "THING is not nested in THING"),
        ("reboot", "read, write"),
        (f"reboot@{SITE}", "read, write"),
    ],
)
def test_a_bad_filter_is_refused_by_name(customer: Customer, scope: str, names: str) -> None:
    """When the key is made and when it is edited; nobody finds out at three in the morning."""
    made = customer.api.make("good", "read")

    for method, path in (("POST", "/keys"), ("PATCH", f"/keys/{made['id']}")):
        status, code, pointed = customer.api.refusal(method, path, {"name": "x", "scopes": [scope]})
        assert (status, code) == (400, "invalid_input")
        assert "/scopes" in pointed
        assert names in pointed


def test_several_scopes_never_make_a_whole(
    product: Product, customer: Customer, platform: Door
) -> None:
    """An ask is covered by one grant: two halves are two halves."""
    made = customer.api.make("halves", "read@PLACE/Site/#", f"delete@{SITE}")

    for credential in product.both(made):
        assert may(platform, credential, "GET", SITE)
        assert may(platform, credential, "DELETE", SITE)
        assert not may(platform, credential, "DELETE", "PLACE/Site/43")
    asked = product.refusal(made["key"], scope="read@PLACE/#/42")
    assert asked[:2] == (400, "invalid_scope")
    assert product.token(made, scope=f"read@{SITE}")


@pytest.mark.parametrize(
    ("scope", "methods"),
    [
        ("read", {"GET"}),
        (f"write@{SITE}", {"POST", "PATCH", "DELETE"}),
        ("admin", {"PUT"}),
        ("*", set(ACTIONS)),
        (f"*@{SITE}", set(ACTIONS)),
    ],
)
def test_an_action_is_what_its_name_says(
    product: Product, customer: Customer, platform: Door, scope: str, methods: set[str]
) -> None:
    """`write` is create, update and delete; `*` is everything; none implies another otherwise."""
    made = customer.api.make("actions", scope)

    for credential in product.both(made):
        assert {one for one in ACTIONS if may(platform, credential, one, SITE)} == methods


def test_addresses_are_allowed_by_network_v4_and_v6_apart(
    product: Product, customer: Customer, platform: Door
) -> None:
    """Default: from anywhere.  A list of one version lets nobody in of the other."""
    open_to_all = customer.api.make("anywhere", "read")
    made = customer.api.make("office", "read", cidrs=["203.0.113.0/24", "127.0.0.1"])
    both = customer.api.make("both", "read", cidrs=["203.0.113.7", "2001:db8::/32", "127.0.0.1"])
    inside, outside = (200, None), (403, "ip_not_allowed")

    assert (open_to_all["cidrs"], made["cidrs"]) == (None, ["203.0.113.0/24", "127.0.0.1/32"])
    assert any("IPv6" in warning for warning in made["warnings"])
    table = {
        "203.0.113.7": (inside, inside, inside),
        "203.0.114.7": (inside, outside, outside),
        "2001:db8::7": (inside, outside, inside),
        "2001:db9::7": (inside, outside, outside),
        "::ffff:203.0.113.7": (inside, inside, inside),
        HERE: (inside, outside, outside),
    }
    for one, place in ((open_to_all, 0), (made, 1), (both, 2)):
        for credential in product.both(one):
            told = {at: platform.told(credential, address=at) for at in table}
            assert told == {at: row[place] for at, row in table.items()}


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "::/0", "*"])
def test_a_wildcard_range_is_warned_about(customer: Customer, cidr: str) -> None:
    made = customer.api.make("wide", "read", cidrs=[cidr])

    assert any(warning.startswith("cidrs:") for warning in made["warnings"])


def test_keys_are_listed_by_status_and_searched_by_name(product: Product) -> None:
    """Active, Expired, Revoked; Active is what the page shows first."""
    owner = product.customer("Lists").api
    made = {name: owner.make(name, "read") for name in ("Pump east", "pump west", "Gate")}
    brief = owner.make("brief", "read", expiresAt="1s")
    owner("POST", f"/keys/{made['Gate']['id']}/revoke")
    soon(lambda: owner("GET", f"/keys/{brief['id']}")["status"], "expired")

    assert set(owner.names()) == set(owner.names("?status=active")) == {"Pump east", "pump west"}
    assert owner.names("?status=expired") == ["brief"]
    assert owner.names("?status=revoked") == ["Gate"]
    assert set(owner.names("?name=PUMP")) == {"Pump east", "pump west"}
    assert owner.names("?name=gate") == []
    found = owner("POST", "/keys/search", {"query": "gate"})["data"]
    assert [one["name"] for one in found] == ["Gate"]
    assert product.refusal(brief["key"])[2] == "api_key_expired"


def test_a_secret_is_shown_once(customer: Customer) -> None:
    made = customer.api.make("secret", "read")

    for path in (f"/keys/{made['id']}", "/keys?status=all"):
        assert made["key"] not in customer.api.ask("GET", path).text
    refused = customer.api.refusal("POST", f"/keys/{made['id']}/reveal")
    assert refused[:2] == (409, "not_recoverable")


def test_an_edit_warns_first_and_takes_effect_at_once(
    product: Product, customer: Customer, platform: Door
) -> None:
    """Scopes and addresses; for tokens that were made before, too."""
    made = customer.api.make("edited", "read", "write")
    path = f"/keys/{made['id']}"
    key, token = product.both(made)
    assert may(platform, key, "DELETE", SITE)
    soon(lambda: customer.api("GET", path)["lastUsedAt"] is not None, True)
    fewer = {"scopes": ["read"], "cidrs": [f"{HERE}/32"]}

    tried = customer.api("PATCH", f"{path}?dryRun=true", fewer)

    assert (tried["narrows"], tried["scopes"]) == (True, ["read"])
    assert "used in the last 24 hours" in tried["warnings"][0]
    assert customer.api("GET", path)["scopes"] == ["read", "write"]
    assert may(platform, token, "DELETE", SITE)

    edited = customer.api.edit(path, **fewer)

    assert edited["narrows"] is True
    soon(lambda: platform.told(token, f"/things/{SITE}"), (401, "token_revoked"))
    assert not may(platform, key, "DELETE", SITE)
    assert may(platform, key, "GET", SITE)
    assert platform.told(key, address="203.0.113.9") == (403, "ip_not_allowed")
    assert product.refusal(key)[2] == "ip_not_allowed"
    # Widening takes nothing away: nobody is signed out.
    wider = customer.api.edit(path, scopes=["read", "write"], cidrs=None)
    assert wider["narrows"] is False
    assert may(platform, product.token(made), "DELETE", SITE)


def test_revoking_is_the_only_end(product: Product, customer: Customer, platform: Door) -> None:
    """Disable and delete are not offered; the record stays."""
    made = customer.api.make("ended", "read")
    path = f"/keys/{made['id']}"
    credentials = product.both(made)

    assert customer.api.refusal("POST", f"{path}/disable")[:2] == (409, "disable_not_offered")
    assert customer.api.refusal("DELETE", path)[:2] == (409, "delete_not_offered")
    assert customer.api("GET", "/catalog")["policies"] == {
        "recoverable": False,
        "maxLifetime": None,
        "disable": False,
        "delete": False,
    }
    customer.api("POST", f"{path}/revoke")

    soon(lambda: {status for status, _ in platform.all_told(credentials)}, {401})
    assert customer.api("GET", path)["status"] == "revoked"
    assert customer.api.refusal("POST", f"{path}/enable")[:2] == (409, "api_key_revoked")


def test_usage_is_told_per_key_and_organization(product: Product) -> None:
    owner = product.customer("Metered")
    one, other = (owner.api.make(name, "read") for name in ("one", "other"))

    product.report(
        {"id": "m-1", "key": one["id"], "requests": 5},
        {"id": "m-2", "key": other["id"], "requests": 7},
    )

    told = [owner.api("GET", f"/keys/{made['id']}/usage") for made in (one, other)]
    assert [usage["totalRequests"] for usage in told] == [5, 7]
    whole = owner.api("GET", "/usage")
    assert (whole["organization"], whole["totalRequests"]) == (owner.id, 12)


def test_a_key_is_taken_as_it_was_and_exchanged_by_who_likes(
    product: Product, customer: Customer, platform: Door
) -> None:
    """`X-Api-Key` goes on unchanged; get a token, call with it, renew about every ten minutes."""
    made = customer.api.make("caller", f"read@{SITE}")
    assert re.fullmatch(r"dev_live_[0-9A-Za-z]{38}", made["key"])
    with OAuth2Session(made["id"], made["key"]) as session:
        url = f"{product.issuer}/oauth/token"
        first = session.fetch_token(url)
        renewed = session.fetch_token(url)

    assert (first["token_type"], first["expires_in"]) == ("Bearer", 600)
    assert first["access_token"] != renewed["access_token"]
    path = f"/things/{SITE}"
    for credential in (made["key"], first["access_token"], renewed["access_token"]):
        for place in ("X-Api-Key", "x-api-key", "bearer"):
            assert platform.ask(credential, path, place=place).json() == {"org": customer.id}
    # The key page itself takes it there, too.
    answer = requests.get(
        f"{product.issuer}/v1/whoami", headers={"X-Api-Key": customer.api.key}, timeout=10
    )
    assert answer.json()["organization"] == customer.id
