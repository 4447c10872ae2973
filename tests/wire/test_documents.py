"""What the service publishes: key set, metadata, health, pages.  RFC 7517, RFC 8414."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from joserfc.jwk import import_key
from starlette.testclient import TestClient

from coatcheck.durations import JWKS_MAX_AGE, PUBLISH_AFTER, PUBLISH_AHEAD
from coatcheck.server import sealing, signing
from coatcheck.server.oauth.grants.token_exchange import GRANT_TYPE
from coatcheck.token_profile import Algorithm
from coatcheck.verifier import product
from coatcheck.verifier.changes import read_source
from support.deployment import (
    AUDIENCE,
    ISSUER,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.wire import database

KEY_SET = "/.well-known/jwks.json"
OAUTH_METADATA = "/.well-known/oauth-authorization-server"
OPENID_METADATA = "/.well-known/openid-configuration"
PUBLIC = f"public, max-age={JWKS_MAX_AGE}"


def signing_keys(http: TestClient) -> dict[str, dict[str, str]]:
    """The published signing keys, by kid."""
    answer = http.get(KEY_SET)
    assert answer.status_code == 200, answer.text
    return {jwk["kid"]: jwk for jwk in answer.json()["keys"]}


def kids(http: TestClient, algorithm: Algorithm = "ES256") -> set[str]:
    return {kid for kid, jwk in signing_keys(http).items() if jwk["alg"] == algorithm}


def signed_by(http: TestClient, deployment: Deployment) -> str:
    """The kid that signs at the moment."""
    answer = http.post("/oauth/token", data=form(deployment.api_key().key))
    kid: str = jwt.get_unverified_header(answer.json()["access_token"])["kid"]
    return kid


def rotate(deployment: Deployment, *, at_once: bool = False) -> str:
    sealing_key = sealing.load(deployment.settings.keys_dir).newest()
    return signing.rotate(
        deployment.store, sealing_key, "ES256", TESTER, now=deployment.now, at_once=at_once
    )


def withdraw_all(deployment: Deployment) -> None:
    for record in deployment.store.signing_keys():
        signing.withdraw(deployment.store, record.kid, TESTER, now=deployment.now, force=True)


# --- the key set


def test_the_key_set_holds_public_members_and_nothing_else(http: TestClient) -> None:
    """
    One private member, and every token of the deployment can be forged.

    RFC 7517 §4, RFC 7518 §6.2.1 and §6.3.1; verifiers pick by `use`, `alg` and `kid`.
    """
    document = http.get(KEY_SET).json()
    members = {
        "ES256": {"kty", "crv", "x", "y", "kid", "use", "alg"},
        "RS256": {"kty", "n", "e", "kid", "use", "alg"},
    }

    assert set(document) == {"keys"}
    assert sorted(jwk["alg"] for jwk in document["keys"]) == ["ES256", "RS256"]
    for jwk in document["keys"]:
        assert set(jwk) == members[jwk["alg"]]
        assert jwk["use"] == "sig"
        assert all(isinstance(value, str) for value in jwk.values())


def test_a_kid_is_the_thumbprint_of_its_key(http: TestClient, deployment: Deployment) -> None:
    """RFC 7638 §3: two keys never share a name, and nobody has to invent one."""
    rotate(deployment)

    published = http.get(KEY_SET).json()["keys"]

    assert len({jwk["kid"] for jwk in published}) == len(published) == 3
    for jwk in published:
        assert import_key(jwk).thumbprint() == jwk["kid"]


def test_the_key_set_may_be_cached_as_long_as_it_says(http: TestClient) -> None:
    """Verifiers and CDNs go by these headers.  RFC 7517 §8.5.2, RFC 9111 §5.2.2."""
    answer = http.get(KEY_SET)

    assert answer.headers["content-type"] == "application/jwk-set+json"
    assert answer.headers["cache-control"] == PUBLIC
    assert re.fullmatch(r'"[!#-~]+"', answer.headers["etag"])
    assert answer.headers["access-control-allow-origin"] == "*"


IF_NONE_MATCH: dict[str, Callable[[str], list[str]]] = {
    "the same": lambda etag: [etag],
    "weakened on the way": lambda etag: [f"W/{etag}"],
    "one of several": lambda etag: [f'"a", {etag}, "b"'],
    "on a second line": lambda etag: ['"a"', etag],
    "any": lambda etag: ["*"],
}


@pytest.mark.parametrize("values", IF_NONE_MATCH.values(), ids=IF_NONE_MATCH)
def test_an_unchanged_key_set_is_not_sent_again(
    http: TestClient, values: Callable[[str], list[str]]
) -> None:
    """RFC 9110 §13.1.2: compared weakly; 304 repeats what a cache needs (§15.4.5)."""
    first = http.get(KEY_SET)

    headers = [("If-None-Match", value) for value in values(first.headers["etag"])]
    answer = http.get(KEY_SET, headers=headers)

    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == first.headers["etag"]
    assert answer.headers["cache-control"] == PUBLIC


def test_another_key_set_is_sent(http: TestClient, deployment: Deployment) -> None:
    """A verifier that holds the old one must get the new signing key."""
    first = http.get(KEY_SET)
    rotate(deployment)

    answer = http.get(KEY_SET, headers={"If-None-Match": first.headers["etag"]})

    assert answer.status_code == 200
    assert answer.headers["etag"] != first.headers["etag"]


def test_the_next_signing_key_is_published_long_before_it_signs(
    http: TestClient, deployment: Deployment
) -> None:
    """Every cache has seen it by the time it signs, and none meets an unknown kid."""
    first = signed_by(http, deployment)

    second = rotate(deployment)

    assert kids(http) == {first, second}
    deployment.clock.now = NOON + PUBLISH_AHEAD - 1
    assert signed_by(http, deployment) == first
    deployment.clock.now = NOON + PUBLISH_AHEAD
    assert signed_by(http, deployment) == second


def test_a_replaced_signing_key_stays_until_its_last_token_has_ended(
    http: TestClient, deployment: Deployment
) -> None:
    """Leaving earlier, it would take good tokens with it; by the clock alone, on every node."""
    first = signed_by(http, deployment)
    second = rotate(deployment)

    deployment.clock.now = NOON + PUBLISH_AHEAD + PUBLISH_AFTER - 1
    assert kids(http) == {first, second}
    deployment.clock.now = NOON + PUBLISH_AHEAD + PUBLISH_AFTER
    assert kids(http) == {second}


def test_a_withdrawn_signing_key_leaves_at_once(http: TestClient, deployment: Deployment) -> None:
    """It was stolen: each second that it stays published, forged tokens are accepted."""
    first = signed_by(http, deployment)
    second = rotate(deployment, at_once=True)
    assert kids(http) == {first, second}

    signing.withdraw(deployment.store, first, TESTER, now=deployment.now)

    assert kids(http) == {second}
    assert signed_by(http, deployment) == second


def test_a_signing_key_that_was_withdrawn_before_its_start_never_signs(
    http: TestClient, deployment: Deployment
) -> None:
    """The one before it goes on: a withdrawn successor has not succeeded."""
    first = signed_by(http, deployment)
    second = rotate(deployment)
    signing.withdraw(deployment.store, second, TESTER, now=deployment.now)

    deployment.clock.now = NOON + 2 * PUBLISH_AHEAD

    assert kids(http) == {first}
    assert signed_by(http, deployment) == first


def test_the_key_set_is_served_without_the_database(
    http: TestClient, deployment: Deployment
) -> None:
    """Resource servers go on verifying while we are in trouble; from memory."""
    before = http.get(KEY_SET)
    database(deployment).unlink()
    wait_until(lambda: http.get("/readyz").status_code == 503)

    answer = http.get(KEY_SET)

    assert answer.content == before.content
    assert answer.headers["etag"] == before.headers["etag"]


# --- the metadata


def test_the_metadata_is_one_document_at_two_places(http: TestClient) -> None:
    """AWS, Spring and openid-client look at one, MCP clients at the other.  RFC 8414 §3."""
    first, second = http.get(OAUTH_METADATA), http.get(OPENID_METADATA)

    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert first.headers["content-type"] == second.headers["content-type"] == "application/json"
    assert first.headers["cache-control"] == PUBLIC
    assert first.headers["access-control-allow-origin"] == "*"


def test_the_metadata_says_what_there_is_and_what_clients_insist_on(http: TestClient) -> None:
    """
    MCP's and MSAL's clients refuse a document without an authorization endpoint.

    RFC 8414 §2.
    """
    document = http.get(OAUTH_METADATA).json()

    assert document["issuer"] == ISSUER
    endpoints = {
        "token_endpoint": "/oauth/token",
        "authorization_endpoint": "/oauth/authorize",
        "introspection_endpoint": "/oauth/introspect",
        "revocation_endpoint": "/oauth/revoke",
        "jwks_uri": KEY_SET,
    }
    assert {name: document[name] for name in endpoints} == {
        name: f"{ISSUER}{path}" for name, path in endpoints.items()
    }
    assert document["response_types_supported"] == []
    methods = ["client_secret_basic", "client_secret_post"]
    assert document["token_endpoint_auth_methods_supported"] == methods
    assert document["introspection_endpoint_auth_methods_supported"] == methods
    assert document["revocation_endpoint_auth_methods_supported"] == methods
    assert "client_credentials" in document["grant_types_supported"]


def test_the_metadata_lists_no_scopes(http: TestClient) -> None:
    """MCP clients would ask for all of them, and be refused."""
    assert "scopes_supported" not in http.get(OAUTH_METADATA).json()
    assert "scopes_supported" not in http.get(OPENID_METADATA).json()


FOREIGN = {
    "Host": {"Host": "evil.example"},
    "X-Forwarded-Host": {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"},
    "Forwarded": {"Forwarded": "host=evil.example;proto=https"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("path", [OAUTH_METADATA, OPENID_METADATA, KEY_SET])
def test_no_document_depends_on_the_request(
    http: TestClient, path: str, headers: dict[str, str]
) -> None:
    """T47: a poisoned cache would send every secret elsewhere.  RFC 8414 §6.2."""
    assert http.get(path, headers=headers).content == http.get(path).content


DOCUMENTS = (KEY_SET, OAUTH_METADATA, OPENID_METADATA, "/healthz", "/readyz", "/openapi.yaml")


@pytest.mark.parametrize("path", DOCUMENTS)
def test_head_is_get_without_the_body(http: TestClient, path: str) -> None:
    """Monitors and caches ask so.  RFC 9110 §9.3.2."""
    get, head = http.get(path), http.head(path)

    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("path", [OAUTH_METADATA, OPENID_METADATA, KEY_SET, "/healthz", "/docs"])
def test_a_document_without_a_database_is_a_document(
    http: TestClient, deployment: Deployment, path: str
) -> None:
    """Whatever needs no database goes on while it is away."""
    database(deployment).unlink()

    assert http.get(path).status_code == 200


# --- an issuer with a path

TENANT = "https://auth.example.com/tenant"


@pytest.fixture
def tenant(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose issuer has a path."""
    with a_deployment(tmp_path, issuer=TENANT) as made:
        yield made


@pytest.fixture
def tenant_http(tenant: Deployment) -> Iterator[TestClient]:
    with a_client(tenant) as client:
        yield client


@pytest.mark.parametrize("name", ["oauth-authorization-server", "openid-configuration"])
def test_well_known_documents_are_inserted_before_the_path_of_the_issuer(
    tenant_http: TestClient, name: str
) -> None:
    """RFC 8414 §3.1 inserts; OpenID Connect Discovery §4 appends; both find the document."""
    inserted = tenant_http.get(f"/.well-known/{name}/tenant")
    appended = tenant_http.get(f"/tenant/.well-known/{name}")

    assert inserted.status_code == 200
    assert inserted.content == appended.content
    assert inserted.json()["issuer"] == TENANT
    # Beside the path there may be somebody else's deployment.
    assert tenant_http.get(f"/.well-known/{name}").status_code == 404


def test_every_endpoint_of_the_metadata_lies_under_the_path_of_the_issuer(
    tenant_http: TestClient, tenant: Deployment
) -> None:
    """A proxy that forwards the path alone must reach all of it."""
    key = tenant.api_key().key
    document = tenant_http.get("/.well-known/oauth-authorization-server/tenant").json()
    paths = {
        name: url.removeprefix("https://auth.example.com")
        for name, url in document.items()
        if name.endswith(("_endpoint", "_uri")) or name == "service_documentation"
    }
    assert all(path.startswith("/tenant/") for path in paths.values())

    answer = tenant_http.post(paths["token_endpoint"], data=form(key))
    token = answer.json()["access_token"]
    header = jwt.get_unverified_header(token)
    key_set = jwt.PyJWKSet.from_dict(tenant_http.get(paths["jwks_uri"]).json())
    claims = jwt.decode(
        token,
        key_set[header["kid"]],
        algorithms=["ES256"],
        audience=AUDIENCE,
        issuer=TENANT,
        options={"verify_exp": False, "verify_iat": False},
    )
    question = {"client_secret": key, "token": token}

    assert claims["iss"] == TENANT
    assert tenant_http.post(paths["introspection_endpoint"], data=question).json()["active"]
    assert tenant_http.post(paths["revocation_endpoint"], data=question).status_code == 200
    assert not tenant_http.post(paths["introspection_endpoint"], data=question).json()["active"]
    assert tenant_http.get(paths["authorization_endpoint"]).status_code == 400
    assert tenant_http.get(paths["service_documentation"]).status_code == 200


UNDER_THE_PATH = ("/healthz", "/readyz", "/openapi.yaml", "/docs")


@pytest.mark.parametrize("path", UNDER_THE_PATH)
def test_pages_lie_under_the_path_of_the_issuer(tenant_http: TestClient, path: str) -> None:
    """All endpoints live under the issuer's path."""
    assert tenant_http.get(f"/tenant{path}").status_code == 200
    assert tenant_http.get(path).status_code == 404


@pytest.mark.parametrize(
    "path", ["/oauth/token", "/oauth/introspect", "/tenant/tenant/oauth/token"]
)
def test_beside_the_path_of_the_issuer_nothing_is_answered(
    tenant_http: TestClient, tenant: Deployment, path: str
) -> None:
    """Another deployment may live there."""
    answer = tenant_http.post(path, data=form(tenant.api_key().key))

    assert answer.status_code == 404


def test_a_challenge_names_the_issuer_with_its_path(tenant_http: TestClient) -> None:
    """RFC 9110 §11.5: the realm tells which credentials to send."""
    answer = tenant_http.post("/tenant/oauth/token", data={"grant_type": "client_credentials"})

    assert answer.status_code == 401
    assert f'realm="{TENANT}"' in answer.headers["www-authenticate"]


# --- health


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def unavailable(answer: httpx2.Response) -> dict[str, Any]:
    """The checks of a service that is not ready."""
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert body["status"] == "unavailable"
    checks: dict[str, Any] = body["checks"]
    return checks


def test_a_service_that_can_issue_is_ready(http: TestClient) -> None:
    """A load balancer sends traffic on this answer."""
    alive, ready = http.get("/healthz"), http.get("/readyz")

    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert set(ready.json()["checks"].values()) == {"ok"}
    assert alive.headers["cache-control"] == ready.headers["cache-control"] == "no-store"


def test_without_the_database_the_service_is_alive_and_not_ready(
    http: TestClient, deployment: Deployment
) -> None:
    """Restarting the process would not bring the file back; and nobody is told where it is."""
    away = database(deployment).rename(database(deployment).with_suffix(".away"))

    answer = http.get("/readyz")

    assert unavailable(answer)["database"] != "ok"
    assert str(database(deployment)) not in answer.text
    assert http.get("/healthz").status_code == 200
    away.rename(database(deployment))
    assert http.get("/readyz").status_code == 200


def test_without_a_signing_key_the_service_is_not_ready(
    http: TestClient, deployment: Deployment
) -> None:
    """It would answer 503 to every token request; another node may do better."""
    withdraw_all(deployment)

    checks = unavailable(http.get("/readyz"))

    assert checks["database"] == "ok"
    assert checks["signing_key"] != "ok"
    assert http.get(KEY_SET).json() == {"keys": []}


# --- what our own verifier reads

COATCHECK = "/.well-known/coatcheck"
CATALOG = """
name = "Acme"

[key]
header = "X-Acme-Key"
foreign_prefixes = ["sk-old-"]

[[audience]]
id = "https://api.example.com"
shared = true
default = true

[[permission]]
name = "widgets:read"

[[role]]
name = "member"
permission = "write"
methods = ["POST", "GET"]

[[resource]]
type = "PLACE"
segments = [{ name = "kind", values = ["Site"] }, { name = "id" }]
"""


@pytest.fixture
def of_a_product(tmp_path: Path) -> Iterator[tuple[TestClient, Deployment]]:
    """A deployment with a catalog."""
    catalog = tmp_path / "coatcheck.toml"
    catalog.write_text(CATALOG, encoding="utf-8")
    with (
        a_deployment(tmp_path, catalog=catalog, audience=None) as deployment,
        a_client(deployment) as client,
    ):
        yield client, deployment


def test_the_product_is_told_to_verifiers(of_a_product: tuple[TestClient, Deployment]) -> None:
    """Roles, header and prefixes are in the catalog only, and resource servers have none."""
    http, _ = of_a_product
    answer = http.get(COATCHECK)
    told = answer.json()

    assert told["roles"] == {"member": ["GET", "POST"]}
    assert told["api_key_header"] == "X-Acme-Key"
    assert told["foreign_prefixes"] == ["sk-old-"]
    assert told["resource_types"] == [
        {
            "type": "PLACE",
            "segments": [{"name": "kind", "values": ["Site"]}, {"name": "id", "values": None}],
            "within": [],
        }
    ]
    assert read_source(answer.content, ISSUER).product == {
        "roles": {"member": frozenset(("GET", "POST"))},
        "api_key_header": "x-acme-key",
        "foreign_prefixes": ("sk-old-",),
    }


def test_without_a_catalog_there_is_nothing_to_tell(http: TestClient) -> None:
    """The members are there all the same, so that whoever looks for them finds out."""
    answer = http.get(COATCHECK)
    told = answer.json()

    assert told.keys() == {
        *("issuer", "revocations_endpoint", "revocation_keys", "durations"),
        *("roles", "resource_types", "api_key_header", "foreign_prefixes"),
    }
    assert (told["roles"], told["resource_types"]) == ({}, [])
    assert (told["api_key_header"], told["foreign_prefixes"]) == (None, [])
    assert answer.headers["cache-control"] == "no-cache"
    assert product.of(**read_source(answer.content, ISSUER).product) == product.UNTOLD


def test_an_api_key_of_an_older_system_is_looked_up_by_its_prefix_alone(
    of_a_product: tuple[TestClient, Deployment],
) -> None:
    """It has no checksum of ours; whether it exists is another question."""
    http, deployment = of_a_product
    service_key = deployment.api_key("coatcheck:resource-server").key

    def code(subject: str) -> str:
        answer = http.post(
            "/oauth/token",
            data={
                "grant_type": GRANT_TYPE,
                "client_secret": service_key,
                "subject_token": subject,
                "subject_token_type": f"{ISSUER}/token-types/api-key",
                "client_address": "203.0.113.7",
            },
        )
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
        told: str = answer.json()["code"]
        return told

    assert code("sk-old-5f3a9c") == "api_key_unknown"
    assert code("sk-new-5f3a9c") == "api_key_malformed"
    assert code("ck_live_sk-old-5f3a9c") == "api_key_malformed"


# --- pages for people


@pytest.mark.parametrize("query", ["", "?response_type=code&client_id=x&redirect_uri=//evil"])
def test_authorize_is_a_plain_page_that_says_no(http: TestClient, query: str) -> None:
    """The metadata has to name it; there is no such flow, and no redirect to anywhere."""
    answer = http.get(f"/oauth/authorize{query}")

    assert answer.status_code == 400
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert "location" not in answer.headers
    assert "client_credentials" in answer.text
    assert "evil" not in answer.text
    assert_no_script(answer)


def test_the_docs_page_runs_nothing_and_loads_nothing(http: TestClient) -> None:
    """People paste keys beside it: no script, no foreign host, no frame around it.  CSP 3 §6."""
    answer = http.get("/docs")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert f"{ISSUER}/oauth/token" in answer.text
    assert_no_script(answer)


def assert_no_script(answer: httpx2.Response) -> None:
    policy = {
        name: sources
        for name, *sources in map(str.split, answer.headers["content-security-policy"].split(";"))
    }
    assert policy["default-src"] == policy["frame-ancestors"] == ["'none'"]
    assert policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert "script-src" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["style-src"] == [f"'sha256-{digest}'"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<(?:script|link|iframe|object|img)\b", answer.text)
    assert not re.search(r"<[^>]*\s(?:src|style|on\w+)\s*=", answer.text)


def test_the_root_leads_to_the_docs(http: TestClient) -> None:
    """Whoever pastes the issuer into a browser should find out what it is."""
    answer = http.get("/")

    assert answer.status_code in (302, 303, 307, 308)
    assert answer.headers["location"] == "/docs"


# --- nothing there


@pytest.mark.parametrize(
    "path", ["/nothing", "/.well-known/nothing", "/docs/", "/healthz/", "//docs", "/oauth/", "/%00"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_a_path_that_does_not_exist_is_json_404(http: TestClient, method: str, path: str) -> None:
    """Programs ask here: HTML would surface as a parse error in their logs."""
    answer = http.request(method, ISSUER + path)

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["code"] == "not_found"
    assert "location" not in answer.headers


@pytest.mark.parametrize("path", [*DOCUMENTS, "/docs", "/oauth/authorize"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_a_method_that_is_not_answered_is_json_405(
    http: TestClient, method: str, path: str
) -> None:
    """RFC 9110 §15.5.6: Allow names what works."""
    answer = http.request(method, path)

    assert answer.status_code == 405
    assert set(re.split(r",\s*", answer.headers["allow"])) == {"GET", "HEAD"}
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content)["code"] == "method_not_allowed"
