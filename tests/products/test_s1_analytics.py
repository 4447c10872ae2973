"""S1, creator analytics: each behavior of its row of the product page."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest

from products.product import Customer, Document, Door, Product, a_product, needing, soon

API = "https://api.example.com"
MCP = "https://mcp.example.com/mcp"
AGENT = ["profile:read", "content:read", "analytics:read"]
ROUTES = [
    needing("/posts", "content:read"),
    needing("/views", "analytics:read"),
    needing("/reports", "reports:write", "POST"),
]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("analytics")
    with a_product(folder, "s1-analytics.toml", live=[API, MCP]) as running:
        yield running


@pytest.fixture(scope="module")
def analytics(product: Product) -> Door:
    return product.door(API, ROUTES)


@pytest.fixture(scope="module")
def mcp(product: Product) -> Door:
    """The product's MCP server, as far as who comes in is concerned."""
    return product.door(MCP, [needing("/mcp", "analytics:read", "POST"), *ROUTES])


@pytest.fixture(scope="module")
def customer(product: Product) -> Customer:
    return product.customer()


def test_a_key_as_bearer_returns_its_own_organizations_data_only(
    product: Product, customer: Customer, analytics: Door
) -> None:
    """`Authorization: Bearer KEY`; `GET …/whoami`; another organization's key does not exist."""
    neighbor = product.customer("Neighbor")
    ours, theirs = (one.api.make("reader", "content:read") for one in (customer, neighbor))

    for owner, made in ((customer, ours), (neighbor, theirs)):
        for credential in product.both(made):
            whoami = analytics.ask(credential).json()
            assert (whoami["org"], whoami["key"]) == (owner.id, made["id"])
            assert analytics.ask(credential, "/posts").json() == {"org": owner.id}
    for way in ("GET", "DELETE"):
        assert customer.api.refusal(way, f"/keys/{theirs['id']}")[:2] == (404, "not_found")
    assert theirs["id"] not in customer.api.ask("GET", "/keys?status=all").text
    assert neighbor.id not in customer.api.ask("GET", "/events").text
    told = customer.api("GET", "/whoami")
    assert (told["organization"], told["organizationName"]) == (customer.id, "Customer")


def test_the_page_shows_keys_enabled_and_disabled(product: Product, analytics: Door) -> None:
    """Two sections; name, status, masked key, last used, created."""
    owner = product.customer("Sections").api
    used, idle, off = (owner.make(name, "content:read") for name in ("used", "idle", "off"))
    owner("POST", f"/keys/{off['id']}/disable")
    assert analytics.told(used["key"]) == (200, None)

    for enabled in ("", "?status=active"):
        assert set(owner.names(enabled)) == {"used", "idle"}
    assert owner.names("?status=disabled") == ["off"]
    soon(lambda: owner("GET", f"/keys/{used['id']}")["lastUsedAt"] is not None, True)
    rows = {one["name"]: one for one in owner("GET", "/keys?status=all")["data"]}
    assert re.fullmatch(r"acme_live_\w{4}\.\.\.\w{4}", rows["used"]["mask"])
    assert used["key"].endswith(rows["used"]["mask"][-4:])
    statuses = [rows[name]["status"] for name in ("used", "idle", "off")]
    assert statuses == ["active", "active", "disabled"]
    assert rows["idle"]["lastUsedAt"] is None
    assert rows["idle"]["createdAt"] == idle["createdAt"]


def test_a_name_is_edited_in_its_row(product: Product, customer: Customer, analytics: Door) -> None:
    """Nobody is signed out by it, and two people do not overwrite each other."""
    made = customer.api.make("frist", "content:read")
    credentials = product.both(made)
    path = f"/keys/{made['id']}"
    seen = customer.api.ask("GET", path).headers["ETag"]

    assert customer.api.edit(path, name="first")["name"] == "first"

    stale = customer.api.ask("PATCH", path, {"name": "other"}, If_Match=seen)
    assert (stale.status_code, customer.api("GET", path)["name"]) == (412, "first")
    assert analytics.all_told(credentials) == {(200, None)}


def test_disabling_can_be_undone_and_is_immediate(
    product: Product, customer: Customer, analytics: Door
) -> None:
    made = customer.api.make("paused", "content:read")
    key, token = product.both(made)
    assert analytics.all_told([key, token]) == {(200, None)}

    customer.api("POST", f"/keys/{made['id']}/disable")

    assert product.refusal(key)[1:] == ("invalid_client", "api_key_disabled")
    soon(lambda: analytics.told(token), (401, "token_revoked"))
    # A resource server remembers for five seconds what it was told of a raw key: another one asks.
    assert product.door(API, ROUTES).told(key) == (401, "api_key_disabled")
    enabled = customer.api("POST", f"/keys/{made['id']}/enable")
    assert enabled["status"] == "active"
    assert analytics.all_told([key, product.token(made)]) == {(200, None)}
    # What was taken once stays taken.
    assert analytics.told(token) == (401, "token_revoked")


def test_deleting_is_confirmed_and_permanent(
    product: Product, customer: Customer, analytics: Door
) -> None:
    """It warns when the key was used in the last 24 hours; audit and usage stay."""
    made, unused = (customer.api.make(name, "content:read") for name in ("doomed", "unused"))
    key, token = product.both(made)
    path = f"/keys/{made['id']}"
    product.report({"id": "x-1", "key": made["id"], "requests": 7})
    used = customer.api("GET", "/usage")["totalRequests"]
    soon(lambda: customer.api("GET", path)["tokensIssued"], 1)

    warned = customer.api("DELETE", path, status=409)
    assert (warned["code"], warned["tokensIssued"]) == ("api_key_in_use", 1)
    assert warned["lastUsedAt"] == customer.api("GET", path)["lastUsedAt"]
    assert analytics.all_told([key, token]) == {(200, None)}

    customer.api("DELETE", f"{path}?confirm=true", status=204)
    customer.api("DELETE", f"/keys/{unused['id']}", status=204)

    soon(lambda: analytics.told(token), (401, "token_revoked"))
    assert analytics.told(key)[0] == 401
    assert customer.api.refusal("GET", path)[:2] == (404, "not_found")
    assert not {"doomed", "unused"} & set(customer.api.names("?status=all"))
    events = customer.api("GET", f"/events?subject={made['id']}")["data"]
    assert [one["what"] for one in events] == ["api_key.deleted", "api_key.created"]
    assert customer.api("GET", "/usage")["totalRequests"] == used


def connect(
    customer: Customer, client: str, *, status: int = 201, **wanted: object
) -> tuple[Document, dict[str, str]]:
    """What the card tells for a client: its API key, and the first and last step of a kind."""
    body = {"client": client, **wanted}
    told = customer.api("POST", "/mcp/connections", body, status=status)
    first = {step["kind"]: step["text"] for step in reversed(told["steps"])}
    last = {f"last {step['kind']}": step["text"] for step in told["steps"]}
    return told["key"], first | last


def test_the_card_prints_a_ready_command_for_each_client(
    product: Product, customer: Customer, mcp: Door, analytics: Door
) -> None:
    """Claude Code, Codex, VS Code, and a Cursor deeplink: a narrow key that works at once."""
    made, claude = connect(customer, "claude-code", device="build-7")
    assert made["name"] == "Claude Code on build-7"
    assert (made["scopes"], made["audiences"]) == (AGENT, [MCP])
    assert claude["last command"] == (
        f"claude mcp add --transport http acme-analytics {MCP}"
        f' --header "Authorization: Bearer {made["key"]}"'
    )
    codex_key, codex = connect(customer, "codex")
    assert codex["command"] == f"export ACME_ANALYTICS_API_KEY={codex_key['key']}"
    assert codex["last command"] == (
        f"codex mcp add acme-analytics --url {MCP} --bearer-token-env-var ACME_ANALYTICS_API_KEY"
    )
    code_key, code = connect(customer, "vscode")
    assert code["command"].startswith("code --add-mcp '{")
    added = json.loads(code["command"].partition("'")[2].rstrip("'"))
    assert added["url"] == MCP
    assert added["headers"] == {"Authorization": f"Bearer {code_key['key']}"}
    cursor_key, cursor = connect(customer, "cursor")
    link = urlsplit(cursor["link"])
    assert (link.scheme, link.netloc) == ("cursor", "anysphere.cursor-deeplink")
    config = json.loads(b64decode(parse_qs(link.query)["config"][0]))
    assert config["headers"]["Authorization"] == f"Bearer {cursor_key['key']}"

    for one in (made, codex_key, code_key, cursor_key):
        assert mcp.all_told(product.both(one, MCP), "/mcp", "POST") == {(200, None)}
        # Narrow: nothing of it works at the API, and reports are not an agent's.
        assert analytics.told(one["key"])[0] in (401, 403)
        assert mcp.told(one["key"], "/reports", "POST") == (403, "insufficient_scope")


def test_a_connector_url_works_at_the_mcp_server_and_nowhere_else(
    product: Product, customer: Customer, mcp: Door, analytics: Door
) -> None:
    """`?api_key=…`, for clients that take only a URL."""
    made, steps = connect(customer, "claude")
    url = urlsplit(steps["url"])
    key = parse_qs(url.query)["api_key"][0]
    assert (steps["url"].partition("?")[0], key) == (MCP, made["key"])

    answer = mcp.ask(key, "/mcp", "POST", place="query")

    assert answer.json() == {"org": customer.id}
    assert answer.headers["Cache-Control"] == "private"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    wrong_place = (401, "connector_only_in_query")
    for place in ("bearer", "X-API-Key", "basic"):
        assert mcp.told(key, "/mcp", "POST", place=place) == wrong_place
    assert product.refusal(key, resource=MCP)[2] == "connector_only_in_query"
    assert analytics.told(key, "/posts", place="query")[0] in (401, 403)
    # And no other key goes into a URL, nor does a token.
    other = customer.api.make("ordinary", *AGENT, audiences=[MCP])
    assert mcp.told(other["key"], "/mcp", "POST", place="query") == wrong_place
    token = product.token(other, resource=MCP)
    assert mcp.told(token, "/mcp", "POST", place="query")[0] == 400
    customer.api("POST", f"/keys/{made['id']}/revoke")
    soon(lambda: mcp.told(key, "/mcp", "POST", place="query")[0], 401)


def test_the_card_picks_the_organizations_active_key_or_makes_one(product: Product) -> None:
    """Where the organization keeps sealed copies; every time it is shown is an event."""
    owner = product.customer("Recoverable")
    owner.api.make("made before, so without a copy", *AGENT, audiences=[MCP])
    owner.api.edit(f"/organizations/{owner.id}", recoverable=True)

    kept = owner.api.make("ours", *AGENT, audiences=[MCP, API])

    found, steps = connect(owner, "codex", status=200, reuse=True)

    assert (found["id"], found["key"]) == (kept["id"], kept["key"])
    assert kept["key"] in steps["command"]
    assert [one["subject"] for one in owner.api.events("api_key.revealed")] == [kept["id"]]
    # One that is not active does not work for an agent either.
    owner.api("POST", f"/keys/{kept['id']}/disable")
    fresh, _ = connect(owner, "codex", reuse=True)
    assert (fresh["name"], fresh["id"] == kept["id"]) == ("Codex", False)


def test_the_card_makes_a_fresh_key_where_no_copies_are_kept(product: Product) -> None:
    """Shown once is the default: the card never shows a key that was made before."""
    owner = product.customer("Default")
    owner.api.make("ours", *AGENT, audiences=[MCP])

    made = [connect(owner, "codex", reuse=True)[0] for _ in range(2)]

    assert made[0]["id"] != made[1]["id"]
    assert sorted(owner.api.names()) == ["Codex", "Codex", "ours"]
    assert all(one["expiresAt"] is not None for one in made)
