"""openapi.yaml against the service: the same operations, and answers as it shows them.

That all answers are as it describes them, tests/fuzz looks after; of what is below /v1,
`test_openapi_management` and `test_openapi_management_service`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from openapi_schema_validator import OAS31Validator
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.oauth.grants import token_exchange
from spec.document import DOCUMENT, ROOT
from support.deployment import Deployment

OPERATIONS = [
    (method.upper(), path)
    for path, item in DOCUMENT["paths"].items()
    if not path.startswith(f"{ROOT}/")
    for method in item
    if method in ("get", "post", "put", "patch", "delete")
]


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

    assert set(_routes(deployment)) - {"/", ROOT} == documented


def _routes(deployment: Deployment) -> Iterator[str]:
    yield from deployment.service.forms
    yield "/authz/verify"
    for route in deployment.service.pages.routes:
        assert isinstance(route, Route)
        # All that is below /v1 is one route here.
        yield ROOT if route.path.startswith(ROOT) else route.path


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
