"""The recipes of `deploy/gateways`, each running in front of an API, with the service behind.

One table of requests for all of them: whoever changes the gateway changes nothing of what callers
are told, nor of what the API may believe.
"""

import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import httpx2
import jwt
import pytest
import yaml

from coatcheck import apikey
from coatcheck.server import catalog_file
from coatcheck.server.authz import endpoint
from coatcheck.server.authz.asked import DIALECTS
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.oauth.wire import Reply
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from support.gateways import (
    AUDIENCE,
    CALLER,
    GATEWAYS,
    RECIPES,
    REFUSALS,
    SOCKET,
    STREAM,
    Answer,
    Api,
    Gateway,
    Headers,
    an_api,
    in_its_place,
    running,
)
from support.live import Live, a_service
from support.secrets import SWEEP

CATALOG: Final = f"""
name = "Acme"
[key]
header = "X-Acme-Key"
[[audience]]
id = "{AUDIENCE}"
shared = true
default = true
[[permission]]
name = "widgets:read"
[[permission]]
name = "widgets:write"
[[role]]
name = "viewer"
permission = "read"
methods = ["GET"]
"""
TESTER: Final = Actor("cli:tester")
DAY: Final = 86_400
#: A network that no caller of these tests is in.
ELSEWHERE: Final = "203.0.113.0/24"
MB: Final = 1 << 20
#: All that Coatcheck says of a caller.
SAID: Final = (
    "Key",
    "Org",
    "Project",
    "Environment",
    "Scopes",
    "Method",
    "Roles",
    "Group",
    "Models",
    "Uri",
    "Private",
)
#: All that it says of one it refuses.
SAID_NO: Final = {"x-coatcheck-status"}
#: All that a refusal depends on.
HEADERS_OF_A_REFUSAL: Final = ("Content-Type", "Cache-Control", "WWW-Authenticate", "Retry-After")
#: What a recipe's reader adds to ask for a permission.
WITH_SCOPE: Final = {"&token=true": "&token=true&scope=widgets:read"}

#: The longest that a gateway waits for an answer, made shorter.
LESS_PATIENCE: Final = {
    "nginx": {"read_timeout 5s": "read_timeout 500ms"},
    "haproxy": {"server 5s": "server 500ms"},
    "apache": {"TIMEOUT = 5": "TIMEOUT = 0.5"},
    "caddy": {"header_timeout 5s": "header_timeout 500ms"},
}

#: How a gateway says its own API key.
BY_SERVICE_KEY: Final[Mapping[str, Mapping[str, str]]] = {
    "nginx": {'Service-Key ""': 'Service-Key "KEY!"'},
    "haproxy": {"#http-request set-header": "http-request set-header"},
    "apache": {},
    "caddy": {"#header_up": "header_up"},
}

#: Claims of a caller, in every spelling that some framework reads as ours.
FORGED: Final = (
    *(("X-Coatcheck-Org", "org_evil"), ("X-Coatcheck-Org", "org_evil_too")),
    *(("x_coatcheck_org", "org_evil"), ("X-Coatcheck_Org", "org_evil")),
    *(("X.Coatcheck.Org", "org_evil"), ("x-coatcheck-key", "key_evil")),
    *(("X-Coatcheck-Admin", "evil"), ("X_Coatcheck_Admin", "evil")),
    *(("X-Coatcheck-Uri", "/evil"), ("X-Coatcheck-Scopes", "evil")),
    *(("X-Coatcheck-Service-Key", "evil"), ("X-Coatcheck-Status", "evil")),
    ("X-Coatcheck-Problem", "evil"),
    *(("X-Original-URI", "/evil"), ("X-Original-Method", "EVIL")),
    *(("X-Forwarded-Uri", "/evil"), ("X-Forwarded-Method", "EVIL")),
    *(("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-For", "203.0.113.8")),
)


@dataclass(frozen=True, slots=True)
class Keys:
    """One of each kind.  `token` is an access token of `good`."""

    good: Created
    narrow: Created
    viewer: Created
    elsewhere: Created
    here: Created
    expired: Created
    revoked: Created
    connector: Created
    service: Created
    wrong: str = field(repr=False)
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Place:
    """The service, the API, and one gateway of each kind between them."""

    live: Live
    coatcheck: int
    api: Api
    keys: Keys
    gateway: Callable[[str], Gateway]
    without_service: Callable[[str], Gateway]
    without_api: Callable[[str], Gateway]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("gateways")
    (folder / "coatcheck.toml").write_text(CATALOG, "utf-8")
    with (
        a_service(
            folder,
            catalog=str(folder / "coatcheck.toml"),
            trusted_proxies="127.0.0.1",
            guesses_per_minute="0",
        ) as live,
        an_api() as api,
        socket.socket() as closed,
        ExitStack() as gateways,
    ):
        # Bound and not listening: nobody answers there, and nobody else takes it.
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
        service = int(live.issuer.rpartition(":")[2])
        started: dict[tuple[str, int, int], Gateway] = {}

        def gateway(name: str, coatcheck: int, behind: int) -> Gateway:
            which = (name, coatcheck, behind)
            if which not in started:
                started[which] = gateways.enter_context(
                    running(name, coatcheck=coatcheck, api=behind, changes=WITH_SCOPE)
                )
            return started[which]

        yield Place(
            live,
            service,
            api,
            keys_of(live),
            partial(gateway, coatcheck=service, behind=api.port),
            partial(gateway, coatcheck=nobody, behind=api.port),
            partial(gateway, coatcheck=service, behind=nobody),
        )


def keys_of(live: Live) -> Keys:
    settings = Settings.load(live.environment)
    store = open_store(settings.database_url)
    try:
        make = partial(made, store, settings, live.initialized["organization"])
        now = int(time.time())
        good = make()
        revoked = make()
        api_keys.revoke(store, revoked.api_key.id, TESTER, now=now)
        return Keys(
            good=good,
            narrow=make(scopes=("widgets:write",)),
            viewer=make(permissions="read"),
            elsewhere=make(networks=(ELSEWHERE,)),
            here=make(networks=(CALLER,)),
            expired=make(now=now - 2 * DAY, expires_at=now - DAY),
            revoked=revoked,
            connector=make(kind="connector"),
            service=make(scopes=("coatcheck:resource-server",), audiences=(AUDIENCE,)),
            wrong=apikey.make("ck_live"),
            token=token_of(live, good),
        )
    finally:
        store.close()


def made(
    store: Store, settings: Settings, organization_id: str, now: int | None = None, **more: Any
) -> Created:
    new = NewApiKey(organization_id, "caller", **({"scopes": ("widgets:read",)} | more))
    at = int(time.time()) if now is None else now
    catalog = catalog_file.of(settings)
    return api_keys.create(store, catalog, new, TESTER, now=at, issuer=settings.issuer)


def token_of(live: Live, api_key: Created) -> str:
    form = {"grant_type": "client_credentials", "client_secret": api_key.key}
    answer = httpx2.post(f"{live.issuer}/oauth/token", data=form, timeout=10)
    return str(answer.json()["access_token"])


def bearer(credential: str) -> Headers:
    return (("Authorization", f"Bearer {credential}"),)


def basic(credential: str) -> Headers:
    return (("Authorization", f"Basic {b64encode(f'{credential}:'.encode()).decode()}"),)


#: RFC 6455 §1.2, but for what it is upgraded to.
HANDSHAKE: Final = (
    *(("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request."""

    headers: Headers = field(default=(), repr=False)
    query: str = field(default="", repr=False)
    method: str = "GET"
    body: bytes | None = field(default=None, repr=False)
    path: str = "/widgets/a%2Fb"

    @property
    def target(self) -> str:
        return f"{self.path}{self.query}"

    def to(self, gateway: Gateway) -> Answer:
        return gateway.ask(self.headers, self.target, self.method, self.body)


Sends = Callable[[Keys], Sent]

#: Requests that reach the API, by what is remarkable about them.
LET_IN: Final[Mapping[str, Sends]] = {
    "a token": lambda keys: Sent(bearer(keys.token)),
    "an API key as Bearer": lambda keys: Sent(bearer(keys.good.key)),
    "an API key as X-API-Key": lambda keys: Sent((("X-API-Key", keys.good.key),)),
    "an API key in the product's header": lambda keys: Sent((("X-Acme-Key", keys.good.key),)),
    "an API key as Basic user": lambda keys: Sent(basic(keys.good.key)),
    "a connector URL": lambda keys: Sent(query=f"?a=1&api_key={keys.connector.key}&b=%2F%3F"),
    "a connector URL in disguise": lambda keys: Sent(query=f"?%61pi_key={keys.connector.key}"),
    "the same key twice": lambda keys: Sent((*bearer(keys.good.key), ("X-API-Key", keys.good.key))),
    "an address that fits": lambda keys: Sent(bearer(keys.here.key)),
    "forged claims": lambda keys: Sent((*bearer(keys.token), *FORGED)),
    "forged claims, named as of this hop": lambda keys: Sent(
        (*bearer(keys.token), ("Connection", "close, X-Coatcheck-Org, X-Coatcheck-Scopes"))
    ),
    "a token that is named as of this hop": lambda keys: Sent(
        (*bearer(keys.good.key), ("Connection", "Authorization, X-Forwarded-For"))
    ),
    "a role that may": lambda keys: Sent(bearer(keys.viewer.key)),
    "HEAD": lambda keys: Sent(bearer(keys.viewer.key), method="HEAD"),
    "an upload": lambda keys: Sent(bearer(keys.good.key), method="POST", body=bytes(MB)),
    "an upload of unknown length": lambda keys: Sent(
        (*bearer(keys.token), ("Transfer-Encoding", "chunked")),
        method="POST",
        body=b"4\r\nabcd\r\n0\r\n\r\n",
    ),
    "a query": lambda keys: Sent(bearer(keys.token), query="?a=1&b=%26api_key%3D&c"),
    "a long query": lambda keys: Sent(bearer(keys.good.key), query=f"?a={'x' * 6000}"),
    "a long connector URL": lambda keys: Sent(
        query=f"?a={'x' * 3000}&api_key={keys.connector.key}&b={'y' * 3000}"
    ),
    "an odd path": lambda keys: Sent(bearer(keys.token), path="/a//b/./%61;x=1/%25/%3F/c~d,"),
    "a page before": lambda keys: Sent(
        (*bearer(keys.token), ("Referer", f"https://x.example/?api_key={keys.good.key}"))
    ),
    "an upgrade to one thing or another": lambda keys: Sent(
        (*bearer(keys.token), *HANDSHAKE, ("Upgrade", "websocket, h2c"))
    ),
    "two upgrades": lambda keys: Sent(
        (
            *(*bearer(keys.token), *HANDSHAKE),
            *(("Upgrade", "websocket"), ("Upgrade", "h2c")),
        )
    ),
    "an upgrade to something else": lambda keys: Sent(
        (*bearer(keys.token), ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"))
    ),
}

#: Requests that do not: what is sent, status, code.
REFUSED: Final[Mapping[str, tuple[Sends, int, str]]] = {
    "nothing": (lambda _: Sent(), 401, "missing_credentials"),
    "a preflight": (
        lambda _: Sent((("Origin", "https://x.example"),), method="OPTIONS"),
        401,
        "missing_credentials",
    ),
    "a wrong API key": (lambda keys: Sent(bearer(keys.wrong)), 401, "api_key_unknown"),
    "a typing error": (lambda keys: Sent(bearer(swapped(keys.good.key))), 401, "api_key_malformed"),
    "a token that was changed": (
        lambda keys: Sent(bearer(keys.token[:-8] + "AAAAAAAA")),
        401,
        "bad_signature",
    ),
    "a revoked API key": (lambda keys: Sent(bearer(keys.revoked.key)), 401, "api_key_revoked"),
    "an expired API key": (lambda keys: Sent(basic(keys.expired.key)), 401, "api_key_expired"),
    "a connector key in a header": (
        lambda keys: Sent(bearer(keys.connector.key)),
        401,
        "connector_only_in_query",
    ),
    "a token in the query": (
        lambda keys: Sent(query=f"?access_token={keys.token}"),
        400,
        "token_malformed",
    ),
    "two credentials": (
        lambda keys: Sent((*bearer(keys.good.key), ("X-API-Key", keys.narrow.key))),
        400,
        "multiple_credentials",
    ),
    "a missing permission": (
        lambda keys: Sent(bearer(keys.narrow.key)),
        403,
        "insufficient_scope",
    ),
    "another address": (
        lambda keys: Sent(bearer(keys.elsewhere.key)),
        403,
        "ip_not_allowed",
    ),
    "another address, with a forged one": (
        lambda keys: Sent((*bearer(keys.elsewhere.key), *FORGED)),
        403,
        "ip_not_allowed",
    ),
    "a role that may not": (
        lambda keys: Sent(bearer(keys.viewer.key), method="POST", body=b"{}"),
        403,
        "role_not_allowed",
    ),
    "a role that may not, with a forged method": (
        lambda keys: Sent(
            (
                *bearer(keys.viewer.key),
                *(("X-Original-Method", "GET"), ("X-Forwarded-Method", "GET")),
                ("X-HTTP-Method-Override", "GET"),
            ),
            method="DELETE",
        ),
        403,
        "role_not_allowed",
    ),
}

every_gateway: Final = pytest.mark.parametrize("name", GATEWAYS)


@every_gateway
@pytest.mark.parametrize("sends", LET_IN.values(), ids=LET_IN)
def test_the_api_learns_who_is_calling_and_never_by_which_secret(
    place: Place, name: str, sends: Sends
) -> None:
    """What Coatcheck says is all that the API has to go by, so that nobody else may say it."""
    sent = sends(place.keys)
    gateway = place.gateway(name)
    place.api.seen.clear()

    answer = sent.to(gateway)

    assert answer.status == 200, (answer.body, gateway.logs)
    (seen,) = place.api.seen
    assert seen.method == sent.method
    assert seen.body_bytes == (MB if len(sent.body or b"") == MB else 4 if sent.body else 0)
    assert seen.target == sent.path + without_key(sent.query)
    told = {one: seen.like(f"X-Coatcheck-{one}") for one in SAID}
    assert all(len(values) <= 1 for values in told.values()), told
    who = {one: "".join(values) for one, values in told.items()}
    assert who["Key"].startswith("key_")
    assert who["Org"] == place.live.initialized["organization"]
    assert (who["Environment"], who["Scopes"]) == ("live", "widgets:read")
    assert who["Roles"] == ("viewer" if who["Key"] == place.keys.viewer.api_key.id else "")
    (authorization,) = seen.like("Authorization")
    claims = jwt.decode(authorization.removeprefix("Bearer "), options={"verify_signature": False})
    assert (claims["sub"], claims["aud"]) == (who["Key"], AUDIENCE)
    assert "evil" not in str(seen.headers)
    assert not seen.like("X-Coatcheck-Admin")
    assert seen.named("X-Forwarded-For") == [CALLER]
    assert seen.named("Upgrade") in ([], ["websocket"])
    assert {secret.kind for secret in SWEEP.secrets.find(wire(seen.headers))} == {"token"}


@every_gateway
@pytest.mark.parametrize(("sends", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_told_as_our_verifier_tells_it(
    place: Place, name: str, sends: Sends, status: int, code: str
) -> None:
    """Callers cannot see which gateway stands there: status, challenge and body are the same."""
    place.api.seen.clear()

    answer = sends(place.keys).to(place.gateway(name))

    assert not place.api.seen
    assert (answer.status, answer.problem["code"]) == (status, code)
    assert answer.problem["status"] == status
    assert answer.header("Content-Type") == "application/problem+json"
    assert answer.header("Cache-Control") == "no-store"
    challenge = answer.header("WWW-Authenticate")
    assert challenge is not None
    assert challenge.count("Bearer realm=") == 1
    assert ("error=" in challenge) is (code != "missing_credentials")
    assert ('scope="widgets:read"' in challenge) is (code == "insufficient_scope")
    assert {one.lower() for one, _ in answer.headers if "coatcheck" in one.lower()} <= SAID_NO
    assert answer.header("Authorization") is None


@every_gateway
def test_every_refusal_there_is_reaches_the_caller_unchanged(place: Place, name: str) -> None:
    """Whatever the path is called: gateways know types of content by suffix."""
    place.api.seen.clear()

    def refused(uri: str) -> Reply:
        error = REFUSALS[uri[1:].removesuffix(".html")]
        return endpoint.refusal(error.status, error.headers, error.body, error.code, DIALECTS[name])

    with (
        in_its_place(refused) as port,
        running(name, coatcheck=port, api=place.api.port, changes={}) as gateway,
    ):
        answers = {code: gateway.ask(target=f"/{code}.html") for code in REFUSALS}

    assert not place.api.seen
    for code, error in REFUSALS.items():
        told = {one: answers[code].header(one) for one in HEADERS_OF_A_REFUSAL}
        assert told == {one: error.headers.get(one) for one in HEADERS_OF_A_REFUSAL}
        assert (answers[code].status, answers[code].body) == (error.status, error.body)


@every_gateway
def test_a_refusal_costs_one_question(place: Place, name: str) -> None:
    """A second one would be work for nothing, and count a wrong API key as two guesses."""
    gateway = place.gateway(name)
    before = questions_counted(place)

    assert gateway.ask(bearer(place.keys.wrong)).status == 401
    assert gateway.ask(bearer(place.keys.narrow.key)).status == 403

    after = questions_counted(place)
    assert {kind: after[kind] - before.get(kind, 0) for kind in after} == {
        **dict.fromkeys(after, 0),
        ("refused", "api_key_unknown"): 1,
        ("refused", "insufficient_scope"): 1,
    }


def questions_counted(place: Place) -> dict[tuple[str, str], int]:
    """How often gateways asked, by what came of it."""
    text = httpx2.get(f"{place.live.issuer}/metrics", timeout=10).text
    found = re.findall(r'authz_requests_total\{result="(\w+)",code="(\w*)"\} (\d+)', text)
    return {(result, code): int(number) for result, code, number in found}


@every_gateway
def test_a_refused_head_has_no_body(place: Place, name: str) -> None:
    """RFC 9110 §9.3.2: or the next answer on the connection is read from the middle."""
    gateway = place.gateway(name)

    answer = gateway.ask(method="HEAD")

    assert (answer.status, answer.body) == (401, b"")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        head = b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        connection.sendall(head + head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        with connection.makefile("rb") as stream:
            told = stream.read()
    assert told.count(b"\r\n\r\n") == told.count(b"HTTP/1.1 401") == 2
    assert told.endswith(b"\r\n\r\n")


@every_gateway
def test_the_body_of_a_refused_request_is_no_request(place: Place, name: str) -> None:
    """RFC 9112 §9.3: it was not read, and the connection goes on or ends, nothing else."""
    place.api.seen.clear()
    hidden = f"GET /hidden HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {place.keys.token}\r\n\r\n"
    head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(hidden)}\r\n\r\n"
    with socket.create_connection(
        ("127.0.0.1", place.gateway(name).port), 10, (CALLER, 0)
    ) as connection:
        last = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        connection.sendall((head + hidden + last).encode())
        with connection.makefile("rb") as stream:
            told = stream.read()

    assert 1 <= told.count(b"HTTP/1.1 401") == told.count(b"HTTP/1.1 ") <= 2
    assert not place.api.seen


@every_gateway
def test_nobody_gets_in_while_the_service_is_away(place: Place, name: str) -> None:
    """It fails closed, and says that it is not the caller's fault."""
    place.api.seen.clear()

    answer = place.without_service(name).ask(bearer(place.keys.token), "/widgets.html")

    assert not place.api.seen
    assert answer.status == 503
    assert int(answer.header("Retry-After") or 0) > 0
    assert answer.problem["code"] == "issuer_unavailable"
    assert answer.header("Content-Type") == "application/problem+json"
    assert answer.header("Cache-Control") == "no-store"


@pytest.mark.parametrize(
    ("name", "line", "status"),
    [("haproxy", "let_in(txn, answer.headers)", 503), ("apache", "return let_in(", 500)],
    ids=["haproxy", "apache"],
)
def test_nobody_gets_in_if_the_script_of_a_recipe_fails(
    place: Place, name: str, line: str, status: int
) -> None:
    """After somebody has changed it, for example."""
    place.api.seen.clear()
    changes = {line: f"missing_function() {line}"}
    with running(name, coatcheck=place.coatcheck, api=place.api.port, changes=changes) as gateway:
        assert gateway.ask(bearer(place.keys.token)).status == status

    assert not place.api.seen


@every_gateway
def test_nobody_waits_for_a_service_that_says_nothing(place: Place, name: str) -> None:
    """A service that hangs is one that is away, after some seconds."""
    place.api.seen.clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with running(
            name, coatcheck=port, api=place.api.port, changes=LESS_PATIENCE[name]
        ) as gateway:
            answer = gateway.ask(bearer(place.keys.token))

    assert not place.api.seen
    assert (answer.status, answer.problem["code"]) == (503, "issuer_unavailable")


@every_gateway
def test_what_the_api_does_wrong_is_not_said_of_the_service(place: Place, name: str) -> None:
    """Whoever is on call looks in the right place."""
    answer = place.without_api(name).ask(bearer(place.keys.token))

    assert answer.status in (502, 503)
    assert b"credential" not in answer.body


@every_gateway
def test_an_answer_whose_url_is_a_secret_is_kept_by_nobody(place: Place, name: str) -> None:
    """RFC 9111 §5.2.2.7; and no page hands the URL on to the next."""
    gateway = place.gateway(name)

    connector = gateway.ask(target=f"/widgets?api_key={place.keys.connector.key}")
    other = gateway.ask(bearer(place.keys.token), target="/widgets?a=%20")

    assert "private" in (connector.header("Cache-Control") or "")
    assert connector.header("Referrer-Policy") == "no-referrer"
    assert other.header("Cache-Control") == "max-age=60"
    assert other.header("Referrer-Policy") is None


@every_gateway
def test_callers_can_find_out_where_to_get_a_token(place: Place, name: str) -> None:
    """RFC 9728 §3, without a credential: whoever asks has none yet."""
    place.api.seen.clear()

    answer = place.gateway(name).ask(target="/.well-known/oauth-protected-resource")

    assert answer.status == 200
    assert answer.header("Content-Type") == "application/json"
    assert answer.problem == {
        "resource": AUDIENCE,
        "authorization_servers": ["https://auth.example.com"],
        "bearer_methods_supported": ["header"],
    }
    below = "/.well-known/oauth-protected-resource"
    for path in (f"{below}/../../widgets", f"{below}/more", f"/{below}", f"{below}%2F..%2Fx"):
        assert b"from" not in place.gateway(name).ask(target=path).body
    assert not place.api.seen


@every_gateway
def test_a_websocket_passes(place: Place, name: str) -> None:
    """Bytes in both directions, once the handshake was allowed; without a credential, none."""
    asked = (*HANDSHAKE, ("Upgrade", "websocket"))
    gateway = place.gateway(name)
    assert gateway.ask(asked).status == 401

    lines = [f"{one}: {value}" for one, value in (*asked, *bearer(place.keys.token))]
    head = "\r\n".join([f"GET {SOCKET} HTTP/1.1", "Host: 127.0.0.1", *lines, "\r\n"])
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(head.encode())
        with connection.makefile("rb") as stream:
            assert stream.readline().startswith(b"HTTP/1.1 101")
            while stream.readline() != b"\r\n":
                pass
            connection.sendall(b"hello\n")
            assert stream.readline() == b"HELLO\n"


@every_gateway
def test_an_event_reaches_the_caller_while_the_answer_goes_on(place: Place, name: str) -> None:
    """Nothing waits for the end of an answer that may have none."""
    place.api.go_on.clear()
    port = place.gateway(name).port
    http = HTTPConnection("127.0.0.1", port, timeout=10, source_address=(CALLER, 0))
    http.request("GET", STREAM, headers=dict(bearer(place.keys.token)))
    answer = http.getresponse()

    assert answer.readline() == b"data: first\n"
    place.api.go_on.set()
    assert answer.read() == b"\ndata: second\n\n"
    http.close()


@every_gateway
def test_callers_at_the_same_time_are_not_taken_for_each_other(place: Place, name: str) -> None:
    """What one was told by Coatcheck stays with its own request."""
    gateway = place.gateway(name)
    place.api.seen.clear()
    callers = (place.keys.good, place.keys.here, place.keys.viewer) * 20

    def call(caller: Created) -> int:
        return gateway.ask(bearer(caller.key), target=f"/{caller.api_key.id}").status

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(call, callers)) == {200}

    assert len(place.api.seen) == len(callers)
    for seen in place.api.seen:
        assert seen.named("X-Coatcheck-Key") == [seen.target[1:]]


@every_gateway
def test_an_api_that_wants_no_token_gets_no_credential_at_all(place: Place, name: str) -> None:
    """`token=true` is taken out of the recipe: the raw credential is dropped all the same."""
    changes = {"&token=true": ""}
    with running(name, coatcheck=place.coatcheck, api=place.api.port, changes=changes) as gateway:
        place.api.seen.clear()
        for headers in (basic(place.keys.good.key), bearer(place.keys.token)):
            assert gateway.ask(headers).status == 200

    for seen in place.api.seen:
        assert seen.named("X-Coatcheck-Key") == [place.keys.good.api_key.id]
        assert not seen.named("Authorization")


@every_gateway
def test_a_gateway_may_be_known_by_an_api_key_of_its_own(place: Place, name: str) -> None:
    """Where its address says nothing.  It decides: with a wrong one nobody gets in."""
    answers = []
    for service_key in (place.keys.service.key, place.keys.wrong):
        changes = BY_SERVICE_KEY[name]
        changes = {old: new.replace("KEY!", service_key) for old, new in changes.items()}
        with running(
            name,
            coatcheck=place.coatcheck,
            api=place.api.port,
            changes=changes,
            COATCHECK_SERVICE_KEY=service_key,
        ) as gateway:
            answers.append(gateway.ask(bearer(place.keys.here.key)))

    assert [answer.status for answer in answers] == [200, 403]
    assert answers[1].problem["code"] == "not_a_gateway"


@every_gateway
def test_no_log_of_a_gateway_holds_a_secret(place: Place, name: str) -> None:
    """Whatever came, and whatever went wrong: RFC 6750 §5.3, RFC 9700 §4.3.2."""
    keys = place.keys
    gateway = place.gateway(name)
    for secret in (keys.good.key, keys.connector.key, keys.wrong, keys.token):
        for headers in (bearer(secret), basic(secret), (("X-API-Key", secret),)):
            gateway.ask((*headers, ("Referer", f"https://x.example/?api_key={secret}")))
        for path in ("/widgets", "/../widgets", "/widgets%00", "/%zz", "//widgets"):
            gateway.ask(target=f"{path}?api_key={secret}")
        gateway.ask((("X-Bad\x01", secret),), target=f"/widgets?api_key={secret}")
    others = place.without_service(name), place.without_api(name)
    for other in others:
        other.ask((*basic(keys.good.key), ("Referer", f"https://x.example/?{keys.good.key}")))
        other.ask(target=f"/widgets?api_key={keys.connector.key}")

    for one in (gateway, *others):
        logs = logs_of(one)
        assert logs.count("/widgets") >= 2
        assert "api_key=" not in logs
        assert not SWEEP.secrets.find(logs.encode())
    # Whose requests they were is still known.
    assert keys.good.api_key.id in logs_of(gateway)


# --- those that cannot run here

UNTESTED: Final = ("traefik", "envoy")
#: The first line of whatever nobody has run.
WARNING: Final = "UNTESTED"


def recipe(name: str) -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted((RECIPES / name).iterdir()))


def questions(name: str) -> list[str]:
    """The addresses that a recipe asks, without those of its comments."""
    lines = [line for line in recipe(name).splitlines() if line.strip()[:1] not in "#-"]
    text = re.sub(r"\"\s*\.\.\s*\"", "", " ".join(lines))
    return re.findall(r"/authz/verify\?[^\s\";]+", text)


@pytest.mark.parametrize("name", [*GATEWAYS, *UNTESTED])
def test_a_recipe_asks_for_its_kind_audience_environment_and_a_token(name: str) -> None:
    """What is not asked for is not checked."""
    asked = [parse_qs(urlsplit(question).query) for question in questions(name)]

    assert asked
    for one in asked:
        assert one["audience"] == [AUDIENCE]
        assert (one["for"], one["environment"], one["token"]) == ([name], ["live"], ["true"])


@pytest.mark.parametrize("name", [*GATEWAYS, *UNTESTED])
def test_a_recipe_names_every_header_of_a_yes(place: Place, name: str) -> None:
    """One that is not named is one that a caller may forge, where names are all a gateway knows."""
    told = httpx2.get(
        f"{place.live.issuer}{questions('nginx')[0]}&scope=widgets:read",
        headers={
            **dict(bearer(place.keys.token)),
            "X-Original-Method": "GET",
            "X-Original-URI": "/",
            "X-Forwarded-For": CALLER,
        },
        timeout=10,
    )
    names = {one for one in told.headers if one.startswith("x-coatcheck-")}
    assert names == {f"x-coatcheck-{one.lower()}" for one in SAID}

    text = recipe(name).lower().replace("_", "-")  # nginx has them in variables
    if "x[^a-z0-9]*coatcheck" not in text:  # by pattern, whatever it is called
        assert {one for one in names if one not in text} == set()


@pytest.mark.parametrize("name", UNTESTED)
def test_what_nobody_has_run_says_so_first(name: str) -> None:
    """In each file, and on its page: nobody has to find out in production."""
    page = (RECIPES.parents[1] / "docs" / "gateways" / f"{name}.md").read_text("utf-8")

    assert page.splitlines()[2].startswith("**Untested**")
    for path in (RECIPES / name).iterdir():
        assert path.read_text("utf-8").splitlines()[0].startswith(f"# {WARNING}")


def test_traefik_is_told_yes_and_drops_what_it_has_to(place: Place) -> None:
    """By its documentation; the service is asked as Traefik would."""
    static, dynamic = (
        yaml.safe_load((RECIPES / "traefik" / name).read_text("utf-8"))
        for name in ("traefik.yaml", "dynamic.yaml")
    )
    http = dynamic["http"]
    forward = http["middlewares"]["coatcheck"]["forwardAuth"]
    uri = "/widgets?a=1"
    told = httpx2.get(
        forward["address"].replace("http://127.0.0.1:8000", place.live.issuer),
        headers={
            **dict(bearer(place.keys.good.key)),
            "X-Forwarded-For": CALLER,
            "X-Forwarded-Method": "GET",
            "X-Forwarded-Uri": uri,
        },
        timeout=10,
    )

    assert told.status_code == 204
    said = {one for one in told.headers if one.startswith("x-coatcheck-")} | {"authorization"}
    assert {one.lower() for one in forward["authResponseHeaders"]} == said
    assert forward["trustForwardHeader"] is False
    forged = re.compile(forward["authResponseHeadersRegex"])
    assert all(forged.search(one) for one, _ in FORGED if "oatcheck" in one)
    routers, dropped = http["routers"], ("X-Api-Key", "X-Acme-Key", "Referer")
    assert routers["api"]["middlewares"] == ["coatcheck", "no-credentials"]
    assert routers["refused"]["middlewares"] == ["nobody"]
    assert routers["refused"]["priority"] > routers["metadata"]["priority"]
    gone = {"no-credentials": set(dropped)}
    gone["nobody-is-calling"] = {*dropped, "Authorization", *(f"X-Coatcheck-{one}" for one in SAID)}
    for middleware, names in gone.items():
        headers = http["middlewares"][middleware]["headers"]["customRequestHeaders"]
        assert headers == dict.fromkeys(names, "")
    for router in routers.values():
        assert set(router["middlewares"]) <= set(http["middlewares"])
        assert router["service"] in http["services"]
    fields = static["accessLog"]["fields"]
    assert (fields["defaultMode"], fields["headers"]) == ("drop", {"defaultMode": "drop"})
    assert not {"ClientUsername", "RequestPath", "RequestLine"} & set(fields["names"])


def test_envoy_is_told_yes_and_drops_what_it_has_to(place: Place) -> None:
    """By its documentation; the service is asked as Envoy would.

    Envoy lets a request pass on 200 and on nothing else.
    """
    config = yaml.safe_load((RECIPES / "envoy" / "envoy.yaml").read_text("utf-8"))
    (listener,) = config["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {one["name"]: one["typed_config"] for one in manager["http_filters"]}
    assert list(filters) == [
        *("coatcheck.before", "coatcheck.ask", "coatcheck.after", "envoy.filters.http.router")
    ]
    ask = filters["coatcheck.ask"]
    prefix = ask["http_service"]["path_prefix"]
    assert prefix.endswith("&path=")
    url = f"{place.live.issuer}{prefix}/widgets?a=1&api_key={place.keys.connector.key}"
    told = httpx2.get(url, headers={"X-Forwarded-For": CALLER}, timeout=10)
    refused = httpx2.get(f"{place.live.issuer}{prefix}/", timeout=10)

    assert (told.status_code, told.content) == (200, b"")
    assert told.headers["X-Coatcheck-Uri"] == "/widgets?a=1"
    assert (refused.status_code, refused.json()["code"]) == (401, "missing_credentials")
    assert ask["failure_mode_allow"] is False
    assert ask["status_on_error"] == {"code": "ServiceUnavailable"}
    sent = {one["exact"] for one in ask["allowed_headers"]["patterns"]}
    assert {"x-api-key", "x-acme-key", "x-project-id", "x-forwarded-for"} <= sent
    upstream = ask["http_service"]["authorization_response"]["allowed_upstream_headers"]
    kept = [(one.get("exact"), one.get("prefix")) for one in upstream["patterns"]]
    assert kept == [("authorization", None), (None, "x-coatcheck-")]
    before, after = (
        filters[name]["default_source_code"]["inline_string"]
        for name in ("coatcheck.before", "coatcheck.after")
    )
    assert '"^x[^a-z0-9]*coatcheck"' in before
    assert 'remove("referer")' in before
    assert 'replace(":path", uri)' in after
    for dropped in ("x-api-key", "x-acme-key"):
        assert f'remove("{dropped}")' in after
    assert manager["use_remote_address"] is True
    assert manager["upgrade_configs"] == [{"upgrade_type": "websocket"}]
    logged = str(manager["access_log"])
    assert "%REQ_WITHOUT_QUERY(:PATH)%" in logged
    assert not re.search(
        "REQ.(:PATH|AUTHORIZATION|REFERER|X-API-KEY)",
        logged.replace("REQ_WITHOUT_QUERY(:PATH)", ""),
    )


def logs_of(gateway: Gateway) -> str:
    """They are written when the answer is out already."""
    before = ""
    for _ in range(100):
        if before == (now := gateway.logs) and now:
            break
        before = now
        time.sleep(0.05)
    return before


def swapped(api_key: str) -> str:
    """Two letters that are not alike, in each other's place."""
    at = next(n for n in range(10, 40) if api_key[n] != api_key[n + 1])
    return api_key[:at] + api_key[at + 1] + api_key[at] + api_key[at + 2 :]


def without_key(query: str) -> str:
    kept = [one for one in query[1:].split("&") if not re.match("(a|%61)pi_key=", one)]
    return f"?{'&'.join(kept)}" if any(kept) else ""


def wire(headers: Headers) -> bytes:
    return "\n".join(f"{one}: {value}" for one, value in headers).encode("latin-1")
