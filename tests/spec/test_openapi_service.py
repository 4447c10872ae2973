"""openapi.yaml against the service: the same operations, and answers as it describes them."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck.server import pages
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


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_strangers_are_as_documented(case: Case, fuzzed: Live) -> None:
    """Whatever is sent, the answer is one that openapi.yaml lists, and never a 5xx."""
    answer = case.call(base_url=fuzzed.issuer, allow_redirects=False)

    case.validate_response(answer, checks=CHECKS)


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_a_known_key_are_as_documented(
    case: Case, fuzzed: Live, api_key: dict[str, Any]
) -> None:
    """Likewise behind the authentication, where other code answers."""
    credential = (api_key["id"], api_key["key"])
    answer = case.call(base_url=fuzzed.issuer, allow_redirects=False, auth=credential)

    case.validate_response(answer, checks=CHECKS)
