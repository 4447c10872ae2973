"""What every grant of the token endpoint promises; runs over GRANTS."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient

from coatcheck.server.oauth import metadata
from coatcheck.server.oauth.grants import GRANTS, token_exchange
from support.deployment import ISSUER, Deployment, form

#: By grant type: the parameters of a request that succeeds.  A new grant has its line here.
REQUESTS: dict[str, Callable[[Deployment], dict[str, str]]] = {
    "client_credentials": lambda deployment: form(deployment.api_key("widgets:read").key),
    token_exchange.GRANT_TYPE: lambda deployment: {
        "grant_type": token_exchange.GRANT_TYPE,
        "client_secret": deployment.api_key("coatcheck:resource-server").key,
        "subject_token": deployment.api_key("widgets:read").key,
        "subject_token_type": token_exchange.api_key_token_type(ISSUER),
        "client_address": "203.0.113.7",
    },
}

each_grant = pytest.mark.parametrize("grant", GRANTS, ids=[one.GRANT_TYPE for one in GRANTS])


def post(http: TestClient, parameters: list[tuple[str, str]]) -> Any:
    """Post parameters in this order, repeated ones too."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return http.post("/oauth/token", content=urlencode(parameters), headers=headers)


def test_every_grant_has_a_request_here() -> None:
    """The line of registration buys these tests; this is what it has to bring."""
    assert {grant.GRANT_TYPE for grant in GRANTS} == set(REQUESTS)


@each_grant
def test_a_grant_has_a_type_of_its_own(grant: Any) -> None:
    """Authlib finds it by that; RFC 6749 §4.5 wants a URI of the ones that are not its own."""
    own = {"client_credentials", "authorization_code", "password", "refresh_token"}

    assert isinstance(grant.GRANT_TYPE, str)
    assert grant.GRANT_TYPE in own or ":" in grant.GRANT_TYPE
    assert [one.GRANT_TYPE for one in GRANTS].count(grant.GRANT_TYPE) == 1


@each_grant
@pytest.mark.parametrize("document", metadata.DOCUMENTS)
def test_a_grant_is_in_the_metadata(http: TestClient, grant: Any, document: str) -> None:
    """RFC 8414 §2: grant_types_supported lists exactly what the endpoint takes."""
    told = http.get(f"/.well-known/{document}").json()["grant_types_supported"]

    assert grant.GRANT_TYPE in told
    assert len(told) == len(GRANTS)


@each_grant
def test_a_grant_answers_with_an_uncached_bearer_token(
    http: TestClient, deployment: Deployment, grant: Any
) -> None:
    """RFC 6749 §5.1."""
    answer = http.post("/oauth/token", data=REQUESTS[grant.GRANT_TYPE](deployment))

    told = answer.json()
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert told["token_type"] == "Bearer"
    assert type(told["expires_in"]) is int
    assert "refresh_token" not in told


@each_grant
def test_a_grant_refuses_a_parameter_that_is_sent_twice(
    http: TestClient, deployment: Deployment, grant: Any
) -> None:
    """RFC 6749 §3.2: parameters MUST NOT be included more than once, alike or not."""
    parameters = REQUESTS[grant.GRANT_TYPE](deployment)
    for name, value in parameters.items():
        if name in ("resource", "audience"):
            continue
        for second in (value, "other", ""):
            answer = post(http, [*parameters.items(), (name, second)])
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), name
            assert value not in answer.text or len(value) < 20


@each_grant
def test_a_grant_ignores_parameters_that_it_does_not_know(
    http: TestClient, deployment: Deployment, grant: Any
) -> None:
    """RFC 6749 §3.2: unrecognized request parameters MUST be ignored."""
    parameters = REQUESTS[grant.GRANT_TYPE](deployment)
    unknown = {"flavor": "vanilla", "redirect_uri": "https://evil.example", "id": "key_1"}

    assert http.post("/oauth/token", data={**parameters, **unknown}).status_code == 200


@each_grant
def test_a_grant_takes_a_parameter_without_value_as_absent(
    http: TestClient, deployment: Deployment, grant: Any
) -> None:
    """RFC 6749 §3.2: parameters sent without a value are treated as omitted."""
    parameters = REQUESTS[grant.GRANT_TYPE](deployment)

    answer = http.post("/oauth/token", data={**parameters, "scope": "", "resource": ""})

    assert answer.status_code == 200, answer.text


@each_grant
@pytest.mark.parametrize("changed", [str.upper, str.title, lambda text: f" {text}"])
def test_a_grant_type_is_compared_letter_by_letter(
    http: TestClient, deployment: Deployment, grant: Any, changed: Callable[[str], str]
) -> None:
    """RFC 6749 §5.2: what is not exactly a known type is unsupported_grant_type."""
    parameters = REQUESTS[grant.GRANT_TYPE](deployment)

    answer = http.post("/oauth/token", data={**parameters, "grant_type": changed(grant.GRANT_TYPE)})

    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_grant_type")
