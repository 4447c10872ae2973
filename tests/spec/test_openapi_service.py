"""openapi.yaml against the service: the same operations, and answers as it describes them."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from openapi_schema_validator import OAS31Validator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server import pages
from coatcheck.server.oauth.grants import token_exchange
from support.deployment import Deployment
from support.live import Live, a_service

DOCUMENT: dict[str, Any] = yaml.safe_load(pages.openapi_text())
OPERATIONS = [
    (method.upper(), path)
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if method in ("get", "post", "put", "patch", "delete")
]

Case = schemathesis.Case[Any]
schema = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@schemathesis.deserializer("application/json")
def as_described(context: object, response: schemathesis.Response) -> object:
    """A JWT's schema describes its text; Schemathesis counts `application/jwt` among JSON."""
    is_jwt = response.headers["content-type"] == ["application/jwt"]
    return response.text if is_jwt else response.json()


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[" ".join(o) for o in OPERATIONS])
def test_every_operation_of_the_document_is_served(
    http: TestClient, method: str, path: str
) -> None:
    """What is documented exists: anything but 404, and not 405 for its own method."""
    answer = http.request(method, path)

    assert answer.status_code not in (404, 405)


def test_every_route_is_in_the_document(deployment: Deployment) -> None:
    """What exists is documented; the landing page only leads to /docs."""
    documented = {path for _, path in OPERATIONS}

    assert set(_routes(deployment)) - {"/"} == documented


def _routes(deployment: Deployment) -> Iterator[str]:
    yield from deployment.service.forms
    for route in deployment.service.pages.routes:
        assert isinstance(route, Route)
        yield route.path


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service of its own: so many wrong secrets would throttle the tests of others."""
    with a_service(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


@pytest.fixture(scope="module")
def api_key(fuzzed: Live) -> dict[str, Any]:
    return fuzzed.api_key("widgets:read")


@pytest.fixture(scope="module")
def resource_server(fuzzed: Live) -> dict[str, Any]:
    return fuzzed.api_key(RESOURCE_SERVER)


def at_once(case: Case) -> Case:
    """The same request without the patience of a long poll: no news will come."""
    if case.path == "/oauth/revocations" and case.query:
        case.query = {**case.query, "wait": 0}
    return case


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_strangers_are_as_documented(case: Case, fuzzed: Live) -> None:
    """Whatever is sent, the answer is one that openapi.yaml lists, and never a 5xx."""
    answer = at_once(case).call(base_url=fuzzed.issuer, allow_redirects=False)

    case.validate_response(answer, checks=CHECKS)


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_a_known_key_are_as_documented(
    case: Case, fuzzed: Live, api_key: dict[str, Any]
) -> None:
    """Likewise behind the authentication, where other code answers."""
    credential = (api_key["id"], api_key["key"])
    answer = at_once(case).call(base_url=fuzzed.issuer, allow_redirects=False, auth=credential)

    case.validate_response(answer, checks=CHECKS)


@schema.include(path="/oauth/token").parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_a_resource_server_are_as_documented(
    case: Case, fuzzed: Live, resource_server: dict[str, Any]
) -> None:
    """Likewise behind the rights that a token exchange wants."""
    if isinstance(case.body, dict):
        case.body = {
            **case.body,
            "grant_type": token_exchange.GRANT_TYPE,
            "subject_token_type": token_exchange.api_key_token_type(fuzzed.issuer),
        }
    credential = (resource_server["id"], resource_server["key"])
    answer = case.call(base_url=fuzzed.issuer, allow_redirects=False, auth=credential)

    case.validate_response(answer, checks=CHECKS)


#: Examples of a token exchange, and what about an ordinary one has to be otherwise to get them.
EXCHANGES: dict[str, Callable[[Deployment], dict[str, str]]] = {
    "exchanged": lambda _: {},
    "unauthorizedClient": lambda made: {"client_secret": made.api_key("widgets:read").key},
    "unsupportedGrantType": lambda _: {"grant_type": "password"},
    "wrongSubjectTokenType": lambda _: {"subject_token_type": token_exchange.ACCESS_TOKEN},
    "missingClientAddress": lambda _: {"client_address": ""},
    "malformedSubject": lambda _: {"subject_token": "ck_live_EXAMPLE"},
    "unknownSubject": lambda _: {"subject_token": apikey.make("ck_live")},
    "subjectOfThePlatform": lambda made: {"subject_token": made.api_key(RESOURCE_SERVER).key},
    "revokedSubject": lambda made: {"subject_token": a_revoked_key(made)},
    "subjectInQuery": lambda _: {"presented_in": "query"},
    "foreignTarget": lambda _: {"resource": "https://elsewhere.example.com"},
}


def a_revoked_key(deployment: Deployment) -> str:
    created = deployment.api_key("widgets:read")
    deployment.revoke(created)
    return created.key


@pytest.mark.parametrize(("name", "change"), EXCHANGES.items(), ids=EXCHANGES)
def test_a_token_exchange_is_answered_as_shown(
    http: TestClient,
    deployment: Deployment,
    name: str,
    change: Callable[[Deployment], dict[str, str]],
) -> None:
    """RFC 8693 §2.2: but for the token and the date, the examples are what the service says."""
    operation = DOCUMENT["paths"]["/oauth/token"]["post"]
    (sent,) = operation["requestBody"]["content"].values()
    form = sent["examples"]["tokenExchange"]["value"] | {
        "client_secret": deployment.api_key(RESOURCE_SERVER).key,
        "subject_token": deployment.api_key("widgets:read").key,
    }
    answer = http.post("/oauth/token", data=form | change(deployment))
    shown = operation["responses"][str(answer.status_code)]["content"]["application/json"]

    assert comparable(answer.json()) == comparable(shown["examples"][name]["value"])


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what differs each time."""
    text = re.sub(r"[0-9-]{10} at [0-9:]{5}", "DATE", body.get("error_description", ""))
    return body | {"access_token": "TOKEN", "error_description": text}


@pytest.mark.parametrize(("query", "name"), [("after=soon", "badAfter"), ("wait=1.5", "badWait")])
def test_a_bad_number_at_the_feed_is_answered_as_shown(
    http: TestClient, query: str, name: str
) -> None:
    refused = DOCUMENT["paths"]["/oauth/revocations"]["get"]["responses"]["400"]
    answer = http.get(f"/oauth/revocations?{query}")

    assert answer.status_code == 400
    assert answer.json() == refused["content"]["application/json"]["examples"][name]["value"]


def test_the_feed_says_what_its_schemas_say(http: TestClient) -> None:
    """A JWT is opaque to the checks above: here it is opened."""
    feed = http.get("/oauth/revocations").text
    header = jwt.get_unverified_header(feed)
    claims = jwt.decode(feed, options={"verify_signature": False})

    for name, value in {"RevocationsHeader": header, "RevocationsClaims": claims}.items():
        described = DOCUMENT["components"]["schemas"][name]
        rooted = {**described, "components": DOCUMENT["components"]}
        assert list(OAS31Validator(rooted).iter_errors(value)) == []
        assert set(value) == set(described["properties"])
