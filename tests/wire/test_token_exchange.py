"""POST /oauth/token, a resource server hands in its caller's API key.  RFC 8693 §2.1, §2.2."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.server.manage import api_keys, organizations
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.oauth.grants.token_exchange import ACCESS_TOKEN, GRANT_TYPE
from support.deployment import (
    AUDIENCE,
    DAY,
    HOUR,
    ISSUER,
    MINUTE,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.tokens import claims, signer
from support.wire import LIFETIME, MANAGEMENT, basic, claims_of

SUBJECT_TOKEN_TYPE = f"{ISSUER}/token-types/api-key"
ADDRESS = "203.0.113.7"
#: What differs from one token of a caller to its next.
OF_THE_MOMENT = {"jti"}


@pytest.fixture
def service_key(deployment: Deployment) -> str:
    """The resource server's own API key, for the default audience."""
    return deployment.api_key("coatcheck:resource-server", name="resource server").key


def question(service_key: str | None, subject: str, **changes: str | None) -> dict[str, str]:
    """The parameters of an ordinary exchange; None leaves one out."""
    parameters = {
        "grant_type": GRANT_TYPE,
        "client_secret": service_key,
        "subject_token": subject,
        "subject_token_type": SUBJECT_TOKEN_TYPE,
        "client_address": ADDRESS,
        **changes,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def exchange(
    http: TestClient,
    service_key: str | None,
    subject: str,
    headers: dict[str, str] | None = None,
    **changes: str | None,
) -> httpx2.Response:
    data = question(service_key, subject, **changes)
    answer = http.post("/oauth/token", data=data, headers=headers)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    return answer


def good(answer: httpx2.Response) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert answer.status_code == 200, answer.text
    return body


def refused(
    answer: httpx2.Response, error: str, code: str, *secrets: str, status: int = 400
) -> dict[str, Any]:
    """A refusal of the exchange: no challenge, no secret, printable ASCII (RFC 6749 §5.2)."""
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["error"], body["code"]) == (status, error, code), answer.text
    assert "www-authenticate" not in answer.headers
    assert "access_token" not in body
    description = body["error_description"]
    assert description.isascii()
    assert description.isprintable()
    assert '"' not in description
    everything = answer.text + str(answer.headers)
    assert not [secret for secret in secrets if secret in everything]
    return body


def own_token(http: TestClient, key: str, **parameters: str) -> dict[str, Any]:
    """What the caller would have got itself."""
    return good(http.post("/oauth/token", data=form(key, **parameters)))


def an_organization(deployment: Deployment) -> str:
    """A customer beside the operator's own organization."""
    return organizations.create(deployment.store, "Customer", TESTER, now=NOON).id


def a_key_of(deployment: Deployment, organization_id: str) -> Created:
    new = NewApiKey(organization_id=organization_id, name="customer's", scopes=("widgets:read",))
    return api_keys.create(
        deployment.store, deployment.catalog, new, TESTER, now=deployment.now, issuer=ISSUER
    )


# --- what a resource server gets


ASKS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "one scope": (("widgets:read",), {}),
    "everything": ((), {}),
    "filters": (("read@PLACE/Site/42", "write@PLACE/Site/#"), {}),
    "less": (("widgets:read", "widgets:write"), {"scope": "widgets:write"}),
    "in another order": (("a", "b"), {"scope": "b a"}),
    "by resource": (("widgets:read",), {"resource": AUDIENCE}),
    "by audience": (("widgets:read",), {"audience": AUDIENCE}),
}


@pytest.mark.parametrize(("scopes", "asked"), ASKS.values(), ids=ASKS)
def test_a_resource_server_gets_the_token_that_its_caller_would_have_got(
    http: TestClient,
    deployment: Deployment,
    service_key: str,
    scopes: tuple[str, ...],
    asked: dict[str, str],
) -> None:
    """
    One meaning for both credentials: nothing of the resource server is in the token.

    RFC 8693 §2.2.1: issued_token_type is required, and no refresh token.
    """
    caller = deployment.api_key(*scopes)

    told = good(exchange(http, service_key, caller.key, None, **asked))
    own = own_token(http, caller.key, **asked)

    assert told.pop("issued_token_type") == ACCESS_TOKEN
    ours, theirs = claims_of(told.pop("access_token")), claims_of(own.pop("access_token"))
    assert told == own
    assert told["token_type"] == "Bearer"
    assert type(told["expires_in"]) is int
    assert {name for name in theirs if ours[name] != theirs[name]} == OF_THE_MOMENT
    assert set(ours) == set(theirs)
    assert ours["sub"] == ours["client_id"] == caller.api_key.id
    assert (ours["aud"], ours["env"]) == (AUDIENCE, "live")


def test_a_token_type_may_be_asked_for_if_it_is_ours(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """RFC 8693 §2.1: requested_token_type is optional."""
    caller = deployment.api_key()

    assert good(exchange(http, service_key, caller.key, requested_token_type=ACCESS_TOKEN))
    assert good(exchange(http, service_key, caller.key, requested_token_type=""))


def test_a_resource_server_serves_callers_of_every_organization(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """It is the operator's; its callers are the operator's customers."""
    customer = an_organization(deployment)

    told = good(exchange(http, service_key, a_key_of(deployment, customer).key))

    assert claims_of(told["access_token"])["org_id"] == customer


def test_a_test_key_is_exchanged_by_a_test_resource_server(
    http: TestClient, deployment: Deployment
) -> None:
    """Both belong to one environment, whichever it is."""
    service = deployment.api_key("coatcheck:resource-server", environment="test")
    caller = deployment.api_key(environment="test")

    told = good(exchange(http, service.key, caller.key))

    assert claims_of(told["access_token"])["env"] == "test"


CREDENTIALS: dict[str, Callable[[str], dict[str, str]]] = {
    "Basic KEY:": lambda key: basic(key, ""),
    "Basic :KEY": lambda key: basic("", key),
    "Bearer": lambda key: {"Authorization": f"Bearer {key}"},
}


@pytest.mark.parametrize("credential", CREDENTIALS.values(), ids=CREDENTIALS)
def test_a_resource_server_authenticates_as_everybody_does(
    http: TestClient,
    deployment: Deployment,
    service_key: str,
    credential: Callable[[str], dict[str, str]],
) -> None:
    """RFC 6749 §2.3.1: one endpoint, one way of reading credentials."""
    caller = deployment.api_key()

    assert good(exchange(http, None, caller.key, headers=credential(service_key)))


def test_a_token_ends_with_the_callers_key_and_not_with_the_resource_servers(
    http: TestClient, deployment: Deployment
) -> None:
    """RFC 7519 §4.1.4; the resource server only carries the question."""
    lasting = deployment.api_key("coatcheck:resource-server").key
    ending = deployment.api_key("coatcheck:resource-server", expires_at=NOON + MINUTE).key
    caller = deployment.api_key()
    short = deployment.api_key(expires_at=NOON + 100)
    replaced = deployment.api_key()
    deployment.rotate(replaced, overlap_s=200)

    lifetimes = {
        "short": good(exchange(http, lasting, short.key)),
        "replaced": good(exchange(http, lasting, replaced.key)),
        "by an ending one": good(exchange(http, ending, caller.key)),
    }

    assert {name: told["expires_in"] for name, told in lifetimes.items()} == {
        "short": 100,
        "replaced": 200,
        "by an ending one": LIFETIME,
    }
    for told in lifetimes.values():
        assert claims_of(told["access_token"])["exp"] == NOON + told["expires_in"]


def test_it_is_counted_as_a_use_of_the_raw_key(tmp_path: Path) -> None:
    """Operators see who has not moved yet: of the caller, not of the resource server."""
    with a_deployment(tmp_path) as deployment:
        service = deployment.api_key("coatcheck:resource-server")
        raw, token = deployment.api_key(), deployment.api_key()
        with a_client(deployment) as http:
            for _ in range(3):
                good(exchange(http, service.key, raw.key))
            own_token(http, raw.key)
            own_token(http, token.key)
            exchange(http, service.key, token.key, client_address="nowhere")

        uses = {
            name: api_keys.show(deployment.store, one.api_key.id, now=NOON).to_json()
            for name, one in {"raw": raw, "token": token, "service": service}.items()
        }

    counted = {name: (view["rawKeyUses"], view["tokensIssued"]) for name, view in uses.items()}
    assert counted == {"raw": (3, 4), "token": (0, 1), "service": (0, 0)}


# --- the request

BAD_REQUESTS: dict[str, dict[str, str | None]] = {
    "no subject_token": {"subject_token": None},
    "empty subject_token": {"subject_token": ""},
    "no subject_token_type": {"subject_token_type": None},
    "subject_token_type of an access token": {"subject_token_type": ACCESS_TOKEN},
    "subject_token_type of a JWT": {
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    },
    "subject_token_type of another issuer": {
        "subject_token_type": "http://127.0.0.1:9000/token-types/api-key"
    },
    "subject_token_type with a slash": {"subject_token_type": f"{SUBJECT_TOKEN_TYPE}/"},
    "subject_token_type in capitals": {"subject_token_type": SUBJECT_TOKEN_TYPE.upper()},
    "requested_token_type of a refresh token": {
        "requested_token_type": "urn:ietf:params:oauth:token-type:refresh_token"
    },
    "requested_token_type of a JWT": {
        "requested_token_type": "urn:ietf:params:oauth:token-type:jwt"
    },
    "presented_in body": {"presented_in": "body"},
    "presented_in capitals": {"presented_in": "Header"},
    "presented_in both": {"presented_in": "header query"},
    "no client_address": {"client_address": None},
    "empty client_address": {"client_address": ""},
}


@pytest.mark.parametrize("changes", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_parameter_that_is_missing_or_odd_is_an_invalid_request(
    http: TestClient, deployment: Deployment, service_key: str, changes: dict[str, str | None]
) -> None:
    """RFC 8693 §2.1, §2.2.2: whatever the subject is, the resource server hears what to mend."""
    for subject in (deployment.api_key().key, apikey.make("ck_live")):
        parameters = question(service_key, subject) | {"subject_token": subject} | changes
        sent = {name: value for name, value in parameters.items() if value is not None}
        answer = http.post("/oauth/token", data=sent)

        refused(answer, "invalid_request", "invalid_request", service_key, subject)


ADDRESSES = [
    "203.0.113.7",
    "0.0.0.0",  # noqa: S104 - an address that somebody may name, bound to by nobody
    "2001:db8::1",
    "2001:DB8:0:0:0:0:0:1",
    "::ffff:203.0.113.7",
    "::1",
    "unknown",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_taken_in_every_usual_form(
    http: TestClient, deployment: Deployment, service_key: str, address: str
) -> None:
    """RFC 4291 §2.2, §2.5.5.2; RFC 7239 §6.2 for what is not known."""
    caller = deployment.api_key()

    assert good(exchange(http, service_key, caller.key, client_address=address))


NO_ADDRESSES = [
    "Unknown",
    "localhost",
    "testclient",
    "203.0.113.7:4711",
    "[2001:db8::1]",
    "203.0.113.007",
    "203.0.113",
    "3405803783",
    "0x7f000001",
    "203.0.113.7/32",
    "203.0.113.7, 10.0.0.1",
    " 203.0.113.7",
    "203.0.113.7\n",
    "203.0.113.7\0",
    "٢٠٣.0.113.7",
    "_hidden",
    "1" * 5000,
]


@pytest.mark.parametrize("address", NO_ADDRESSES, ids=[repr(text[:24]) for text in NO_ADDRESSES])
def test_an_address_that_is_none_is_refused(
    http: TestClient, deployment: Deployment, service_key: str, address: str
) -> None:
    """An address that is guessed at would open the ranges of a key; RFC 7239 §6."""
    caller = deployment.api_key()

    answer = exchange(http, service_key, caller.key, client_address=address)

    refused(answer, "invalid_request", "invalid_request", address)


def test_a_key_that_stood_in_a_url_is_refused(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """RFC 9700 §4.3.2: URLs get logged; only a connector key may stand there."""
    caller = deployment.api_key()

    answer = exchange(http, service_key, caller.key, presented_in="query")

    refused(answer, "invalid_request", "connector_only_in_query", caller.key)


def test_a_subject_in_the_query_is_refused(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """RFC 6749 §2.3.1: secrets never stand in the URI, our callers' neither."""
    caller = deployment.api_key()
    parameters = question(service_key, caller.key)
    del parameters["subject_token"]

    answer = http.post(f"/oauth/token?subject_token={caller.key}", data=parameters)

    refused(answer, "invalid_request", "invalid_request", caller.key, service_key)


# --- who may ask

NO_RESOURCE_SERVERS: dict[str, tuple[str, ...]] = {
    "an ordinary key": ("widgets:read",),
    "a key for everything": (),
    "an operator": ("coatcheck:operator",),
    "a resource server for one resource": ("coatcheck:resource-server@P/1",),
}


@pytest.mark.parametrize("scopes", NO_RESOURCE_SERVERS.values(), ids=NO_RESOURCE_SERVERS)
def test_an_exchange_is_for_resource_servers(
    http: TestClient, deployment: Deployment, scopes: tuple[str, ...]
) -> None:
    """RFC 6749 §5.2 unauthorized_client; the answer is no oracle for other people's keys."""
    asking = deployment.api_key(*scopes)
    good_one, unknown = deployment.api_key().key, apikey.make("ck_live")

    answers = [exchange(http, asking.key, subject) for subject in (good_one, unknown, "x")]

    for answer in answers:
        refused(answer, "unauthorized_client", "unauthorized_client", asking.key, good_one)
    assert len({answer.content for answer in answers}) == 1


def test_nobody_exchanges_its_own_key(http: TestClient, deployment: Deployment) -> None:
    """Whoever has the key asks for a token by client_credentials."""
    caller = deployment.api_key()

    answer = exchange(http, caller.key, caller.key)

    refused(answer, "unauthorized_client", "unauthorized_client", caller.key)


Ending = Callable[[Deployment, Created], object]

DEAD: dict[str, tuple[Ending, str]] = {
    "revoked": (lambda deployment, made: deployment.revoke(made), "api_key_revoked"),
    "disabled": (lambda deployment, made: deployment.disable(made), "api_key_disabled"),
    "replaced": (
        lambda deployment, made: deployment.rotate(made, overlap_s=0),
        "api_key_expired",
    ),
    "expired": (
        lambda deployment, made: setattr(deployment.clock, "now", NOON + DAY),
        "api_key_expired",
    ),
}


@pytest.mark.parametrize(("end", "code"), DEAD.values(), ids=DEAD)
def test_a_refused_resource_server_is_a_refused_client(
    http: TestClient, deployment: Deployment, end: Ending, code: str
) -> None:
    """RFC 6749 §5.2: 400 for a body credential, 401 with a challenge for one in the header."""
    service = deployment.api_key("coatcheck:resource-server", expires_at=NOON + DAY)
    caller = deployment.api_key()
    end(deployment, service)

    in_the_body = exchange(http, service.key, caller.key)
    in_the_header = exchange(http, None, caller.key, headers=basic(service.key, ""))

    refused(in_the_body, "invalid_client", code, service.key, caller.key)
    told = in_the_header.json()
    assert (in_the_header.status_code, told["error"], told["code"]) == (401, "invalid_client", code)
    assert in_the_header.headers["www-authenticate"].startswith("Basic ")
    assert service.key not in in_the_header.text


UNKNOWN_SERVICES: dict[str, tuple[str | None, dict[str, str], int, str]] = {
    "unknown": (apikey.make("ck_live"), {}, 400, "api_key_unknown"),
    "no API key": ("secret", {}, 400, "api_key_unknown"),
    "a JWT": (None, {"Authorization": "Bearer a.b.c"}, 401, "api_key_unknown"),
    "nothing": (None, {}, 401, "missing_credential"),
}


@pytest.mark.parametrize(
    ("key", "headers", "status", "code"), UNKNOWN_SERVICES.values(), ids=UNKNOWN_SERVICES
)
def test_who_is_no_client_learns_nothing_about_the_subject(
    http: TestClient,
    deployment: Deployment,
    key: str | None,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    """The subject's key authenticates nobody: it is what is asked about."""
    caller = deployment.api_key()
    dead = deployment.api_key()
    deployment.revoke(dead)

    answers = [
        exchange(http, key, subject, headers=headers)
        for subject in (caller.key, dead.key, apikey.make("ck_live"))
    ]

    for answer in answers:
        told = answer.json()
        assert (answer.status_code, told["error"], told["code"]) == (status, "invalid_client", code)
    assert len({answer.content for answer in answers}) == 1


# --- which tokens


def test_the_audience_has_to_be_the_resource_servers_own(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """A resource server gets no token for another one.  RFC 8707 §2 invalid_target."""
    caller = deployment.api_key(audiences=(AUDIENCE, MANAGEMENT))
    own_token(http, caller.key, resource=MANAGEMENT)

    answer = exchange(http, service_key, caller.key, resource=MANAGEMENT)

    refused(answer, "invalid_target", "invalid_target", caller.key, service_key)


def test_the_default_audience_has_to_be_the_resource_servers_own_too(
    http: TestClient, deployment: Deployment
) -> None:
    """What is not named is no way around what may not be named."""
    elsewhere = deployment.api_key("coatcheck:resource-server", audiences=(MANAGEMENT,))

    answer = exchange(http, elsewhere.key, deployment.api_key().key)

    refused(answer, "invalid_target", "invalid_target")


def test_the_audience_has_to_be_the_subjects(http: TestClient, deployment: Deployment) -> None:
    """A resource server gives its caller no audience that the caller lacks."""
    service = deployment.api_key("coatcheck:resource-server", audiences=(AUDIENCE, MANAGEMENT))
    caller = deployment.api_key()

    answer = exchange(http, service.key, caller.key, resource=MANAGEMENT)

    refused(answer, "invalid_target", "invalid_target", caller.key)


TARGETS = ["https://nobody.example", "https://API.example.com", f"{AUDIENCE}/", "x y", "*"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_audience_that_is_none_is_an_invalid_target(
    http: TestClient, deployment: Deployment, service_key: str, target: str
) -> None:
    """RFC 8707 §2: compared as it is written."""
    answer = exchange(http, service_key, deployment.api_key().key, resource=target)

    refused(answer, "invalid_target", "invalid_target")


def test_two_audiences_are_an_invalid_target(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """One audience per token, here as everywhere."""
    caller = deployment.api_key(audiences=(AUDIENCE, MANAGEMENT))

    answer = exchange(http, service_key, caller.key, resource=AUDIENCE, audience=MANAGEMENT)

    refused(answer, "invalid_target", "invalid_target")


@pytest.mark.parametrize(("mine", "theirs"), [("live", "test"), ("test", "live")])
def test_environments_never_mix(
    http: TestClient, deployment: Deployment, mine: str, theirs: str
) -> None:
    """A test key at a live resource server is a mistake that has to show at once."""
    service = deployment.api_key("coatcheck:resource-server", environment=mine)
    caller = deployment.api_key(environment=theirs)

    answer = exchange(http, service.key, caller.key)

    refused(answer, "invalid_target", "wrong_environment", caller.key, service.key)


@pytest.mark.parametrize("scope", ["widgets:write", "widgets:read widgets:write", "*"])
def test_more_than_the_subject_has_is_an_invalid_scope(
    http: TestClient, deployment: Deployment, service_key: str, scope: str
) -> None:
    """RFC 6749 §3.3: exactly what was asked, or nothing."""
    caller = deployment.api_key("widgets:read")

    answer = exchange(http, service_key, caller.key, scope=scope)

    refused(answer, "invalid_scope", "invalid_scope", caller.key)


# --- the subject

NO_KEYS: dict[str, Callable[[str], str]] = {
    "garbage": lambda key: "garbage",
    "a blank": lambda key: " ",
    "NUL": lambda key: "\0",
    "one letter less": lambda key: key[:-1],
    "one letter more": lambda key: f"{key}a",
    "one letter wrong": lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
    "another environment": lambda key: key.replace("_live_", "_test_"),
    "other case": lambda key: key.upper(),
    "blank behind": lambda key: f"{key} ",
    "newline behind": lambda key: f"{key}\n",
    "Bearer before": lambda key: f"Bearer {key}",
    "colon behind": lambda key: f"{key}:",
    "look-alike letter": lambda key: key.replace("c", "\u0441", 1),
    "full-width letter": lambda key: key.replace("k", "\uff4b", 1),
    "two keys": lambda key: f"{key} {key}",
    "a mask": apikey.mask,
    "two dots": lambda key: "a.b.c",
    "a JWT": lambda key: signer().token(claims(iss=ISSUER, aud=AUDIENCE)),
    "too long": lambda key: "a" * 12_000,
}


@pytest.mark.parametrize("change", NO_KEYS.values(), ids=NO_KEYS)
def test_a_subject_that_is_no_api_key_is_malformed(
    http: TestClient, deployment: Deployment, service_key: str, change: Callable[[str], str]
) -> None:
    """L2, L3; RFC 8693 §2.2.2: invalid_request, and no failed authentication of who asks."""
    subject = change(deployment.api_key().key)

    for headers in (None, basic(service_key, "")):
        own = None if headers else service_key
        answer = exchange(http, own, subject, headers=headers)
        secrets = [subject] if len(subject) > 20 else []
        refused(answer, "invalid_request", "api_key_malformed", service_key, *secrets)


def test_a_token_of_the_caller_is_no_api_key(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """A token cannot prolong itself."""
    token = own_token(http, deployment.api_key().key)["access_token"]

    answer = exchange(http, service_key, token)

    refused(answer, "invalid_request", "api_key_malformed", token)


Subject = Callable[[Deployment], str]


def after(end: Ending) -> Subject:
    def made(deployment: Deployment) -> str:
        created = deployment.api_key()
        end(deployment, created)
        return created.key

    return made


def of_a_suspended_organization(deployment: Deployment) -> str:
    customer = an_organization(deployment)
    made = a_key_of(deployment, customer)
    organizations.suspend(deployment.store, customer, TESTER, now=NOON)
    return made.key


def an_expired_key(deployment: Deployment) -> str:
    made = deployment.api_key(expires_at=NOON + HOUR)
    deployment.clock.now = NOON + HOUR
    return made.key


def after_an_overlap(deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.rotate(made, overlap_s=MINUTE)
    deployment.clock.now = NOON + MINUTE
    return made.key


BAD_SUBJECTS: dict[str, tuple[Subject, str]] = {
    "unknown": (lambda deployment: apikey.make("ck_live"), "api_key_unknown"),
    "of another product": (lambda deployment: apikey.make("other"), "api_key_unknown"),
    "revoked": (after(DEAD["revoked"][0]), "api_key_revoked"),
    "disabled": (after(DEAD["disabled"][0]), "api_key_disabled"),
    "replaced": (after(DEAD["replaced"][0]), "api_key_expired"),
    "replaced, the overlap over": (after_an_overlap, "api_key_expired"),
    "expired": (an_expired_key, "api_key_expired"),
    "suspended organization": (of_a_suspended_organization, "org_suspended"),
    "another resource server": (
        lambda deployment: deployment.api_key("coatcheck:resource-server").key,
        "api_key_unknown",
    ),
    "an operator": (
        lambda deployment: deployment.api_key("coatcheck:operator", "widgets:read").key,
        "api_key_unknown",
    ),
    "a platform key for one resource": (
        lambda deployment: deployment.api_key("widgets:read", "coatcheck:x@P/1").key,
        "api_key_unknown",
    ),
}


@pytest.mark.parametrize(("subject", "code"), BAD_SUBJECTS.values(), ids=BAD_SUBJECTS)
def test_a_bad_subject_is_an_invalid_request_with_our_code(
    http: TestClient, deployment: Deployment, service_key: str, subject: Subject, code: str
) -> None:
    """
    RFC 8693 §2.2.2: never invalid_client, never a challenge, however the resource server came.

    It was authenticated; a client library would throw its credentials away otherwise.
    """
    key = subject(deployment)

    in_the_body = exchange(http, service_key, key)
    in_the_header = exchange(http, None, key, headers={"Authorization": f"Bearer {service_key}"})

    refused(in_the_body, "invalid_request", code, service_key, key)
    assert in_the_body.content == in_the_header.content
    refused(in_the_header, "invalid_request", code, service_key, key)


def test_the_resource_servers_own_key_is_no_subject(
    http: TestClient, deployment: Deployment, service_key: str
) -> None:
    """A key of the platform speaks for nobody, not even for itself."""
    refused(
        exchange(http, service_key, service_key), "invalid_request", "api_key_unknown", service_key
    )


def test_a_key_for_management_only_is_no_subject(http: TestClient, deployment: Deployment) -> None:
    """An admin's key that was pasted into the wrong place opens nothing there."""
    service = deployment.api_key("coatcheck:resource-server", audiences=(AUDIENCE, MANAGEMENT))
    admin = deployment.initialized.key

    for resource in (None, AUDIENCE, MANAGEMENT):
        answer = exchange(http, service.key, admin, resource=resource)

        assert answer.status_code == 400, resource
        assert admin not in answer.text


def test_no_secret_is_logged(
    http: TestClient, deployment: Deployment, service_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """OWASP ASVS 5 §16.2.5: of success and of every kind of refusal."""
    caller, dead = deployment.api_key(), deployment.api_key()
    deployment.revoke(dead)
    unknown = apikey.make("ck_live")
    caplog.set_level(logging.DEBUG, "coatcheck")
    caplog.set_level(logging.DEBUG, "authlib")

    for subject in (caller.key, dead.key, unknown, caller.key[:-1]):
        for key in (service_key, unknown, dead.key):
            exchange(http, key, subject)

    logged = caplog.text
    assert not [key for key in (caller.key, dead.key, unknown, service_key) if key in logged]
    assert caller.key[:-1] not in logged


# --- guessing


def guess(http: TestClient, service_key: str, address: str, subject: str | None = None) -> int:
    answer = exchange(http, service_key, subject or apikey.make("ck_live"), client_address=address)
    if answer.status_code == 429:
        assert (answer.json()["error"], answer.json()["code"]) == (
            "temporarily_unavailable",
            "rate_limited",
        )
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code


def test_guesses_at_a_resource_server_are_counted_by_its_callers_address(tmp_path: Path) -> None:
    """
    OWASP ASVS 5 §6.3.1.

    One guesser blocks neither other callers, nor right keys from its own address, nor the
    resource server, nor guesses at another resource server.
    """
    with a_deployment(tmp_path, guesses_per_minute=3) as deployment, a_client(deployment) as http:
        service = deployment.api_key("coatcheck:resource-server").key
        another = deployment.api_key("coatcheck:resource-server").key
        caller = deployment.api_key().key

        assert [guess(http, service, ADDRESS) for _ in range(5)] == [400, 400, 400, 429, 429]

        assert guess(http, service, ADDRESS, caller) == 200
        assert guess(http, service, "203.0.113.8") == 400
        assert guess(http, service, "unknown") == 400
        assert guess(http, another, ADDRESS) == 400
        own_token(http, deployment.api_key("coatcheck:resource-server").key)
        # The resource server's own address has guessed nothing.
        assert http.post("/oauth/token", data=form(apikey.make("ck_live"))).status_code == 400


SAME_ADDRESSES: dict[str, tuple[list[str], bool]] = {
    "mapped": ([ADDRESS, f"::ffff:{ADDRESS}", "::ffff:cb00:7107"], True),
    "spelled otherwise": (["2001:db8::1", "2001:DB8:0::1", "2001:db8:0:0:0:0:0:1"], True),
    "one /64": (["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::1"], True),
    "three /64": (["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"], False),
    "neighbors": (["203.0.113.7", "203.0.113.8", "203.0.113.9"], False),
}


@pytest.mark.parametrize(("addresses", "is_one"), SAME_ADDRESSES.values(), ids=SAME_ADDRESSES)
def test_one_guesser_has_one_account(tmp_path: Path, addresses: list[str], is_one: bool) -> None:
    """An IPv6 subscriber has a whole /64; a mapped address is the IPv4 one."""
    with a_deployment(tmp_path, guesses_per_minute=2) as deployment, a_client(deployment) as http:
        service = deployment.api_key("coatcheck:resource-server").key

        statuses = [guess(http, service, address) for address in addresses]

    assert statuses == [400, 400, 429 if is_one else 400]


def test_only_secrets_that_match_nothing_are_counted(tmp_path: Path) -> None:
    """A client that keeps sending its dead key guesses at nothing, and hears why each time."""
    with a_deployment(tmp_path, guesses_per_minute=2) as deployment, a_client(deployment) as http:
        service = deployment.api_key("coatcheck:resource-server").key
        dead = deployment.api_key()
        deployment.revoke(dead)

        assert {guess(http, service, ADDRESS, dead.key) for _ in range(6)} == {400}
        assert {guess(http, service, ADDRESS, service) for _ in range(6)} == {400}
        assert [guess(http, service, ADDRESS) for _ in range(3)] == [400, 400, 429]


def test_whoever_is_no_resource_server_cannot_use_up_anothers_account(tmp_path: Path) -> None:
    """The account belongs to who was authenticated, not to who is named."""
    with a_deployment(tmp_path, guesses_per_minute=2) as deployment, a_client(deployment) as http:
        service = deployment.api_key("coatcheck:resource-server")
        stranger = deployment.api_key().key

        for _ in range(6):
            exchange(http, stranger, apikey.make("ck_live"), client_id=None)
            exchange(http, stranger, apikey.make("ck_live"), client_id=service.api_key.id)

        assert guess(http, service.key, ADDRESS) == 400
