"""`/metrics`, request ids and the log: what they tell, whom, and what they never do."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.app import Service
from coatcheck.server.oauth.grants.token_exchange import api_key_token_type
from coatcheck.server.settings import Settings
from support.deployment import ISSUER, MINUTE, Deployment, a_client, a_deployment, form
from support.live import Live
from support.wire import a_wrong_key, basic, bearer, database, refused, token_for

ENDPOINTS = ("/oauth/token", "/oauth/introspect", "/oauth/revoke")


def asked_from(deployment: Deployment, host: str) -> TestClient:
    """A client whose connections come from this address."""
    return TestClient(deployment.service, base_url=ISSUER, client=(host, 4711))


@pytest.fixture
def operator(deployment: Deployment) -> Iterator[TestClient]:
    """Somebody on the machine itself."""
    with asked_from(deployment, "127.0.0.1") as client:
        yield client


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and the values of its labels in order of their names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def told(operator: TestClient) -> dict[tuple[str, ...], float]:
    answer = operator.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(answer.text)


def counted(found: dict[tuple[str, ...], float], name: str) -> dict[tuple[str, ...], float]:
    """The samples of one name, by the values of their labels."""
    return {sample[1:]: value for sample, value in found.items() if sample[0] == name}


# --- what they tell


def test_requests_for_tokens_are_counted_by_what_came_of_them(
    deployment: Deployment, operator: TestClient
) -> None:
    """In the order of the labels: how it authenticated, the error, the outcome."""
    key = deployment.api_key("widgets:read").key
    grant = {"grant_type": "client_credentials"}
    operator.post("/oauth/token", data=form(key))
    operator.post("/oauth/token", data=grant, headers=basic(key, ""))
    operator.post("/oauth/token", data=grant, headers=bearer(key))
    operator.post("/oauth/token", data=form(key, scope="widgets:write"))
    operator.post("/oauth/token", data=form(a_wrong_key()))
    operator.post("/oauth/token", data={**form(key), "grant_type": "whatever I like"})
    operator.get("/oauth/token")
    found = told(operator)

    assert counted(found, "coatcheck_token_requests_total") == {
        ("form", "", "issued"): 1,
        ("basic", "", "issued"): 1,
        ("bearer", "", "issued"): 1,
        ("form", "invalid_scope", "refused"): 1,
        ("form", "invalid_client", "refused"): 1,
        ("form", "unsupported_grant_type", "refused"): 1,
        ("none", "invalid_request", "refused"): 1,
    }
    assert found[("coatcheck_token_duration_seconds_count",)] == 7


def test_api_keys_that_were_looked_at_are_counted_wherever_they_were_sent(
    deployment: Deployment, operator: TestClient
) -> None:
    """In the order of the labels: the method, the reason, the outcome."""
    good, dead = deployment.api_key("widgets:read"), deployment.api_key()
    server = deployment.api_key(RESOURCE_SERVER)
    deployment.disable(dead)
    for endpoint in ENDPOINTS:
        operator.post(endpoint, data=form(good.key, token="nonsense"))
        operator.post(endpoint, data=form(dead.key, token="nonsense"))
        operator.post(endpoint, data=form(a_wrong_key(), token="nonsense"))
    operator.post("/oauth/token", data=form(good.key, scope="widgets:write"))
    exchange = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": api_key_token_type(ISSUER),
        "client_address": "192.0.2.1",
        "client_secret": server.key,
    }
    for subject in (good.key, dead.key, a_wrong_key()):
        operator.post("/oauth/token", data=exchange | {"subject_token": subject})

    assert counted(told(operator), "coatcheck_credential_checks_total") == {
        ("form", "", "accepted"): 5,
        ("form", "api_key_disabled", "refused"): 3,
        ("form", "api_key_unknown", "refused"): 3,
        ("exchange", "", "accepted"): 1,
        ("exchange", "api_key_disabled", "refused"): 1,
        ("exchange", "api_key_unknown", "refused"): 1,
    }


def test_whoever_guesses_too_often_is_no_failure_of_ours(deployment: Deployment) -> None:
    """429 has the error of 503; whoever is woken by `failed` must not be woken by it."""
    settings = deployment.settings.model_copy(update={"guesses_per_minute": 1})
    with asked_from(limited(deployment, **settings.model_dump()), "127.0.0.1") as operator:
        answers = [operator.post("/oauth/token", data=form(a_wrong_key())) for _ in range(2)]
        found = told(operator)

    assert [answer.status_code for answer in answers] == [400, 429]
    labels = ("form", "temporarily_unavailable", "refused")
    assert found[("coatcheck_token_requests_total", *labels)] == 1
    assert found[("coatcheck_credential_checks_total", "form", "rate_limited", "refused")] == 1


def limited(deployment: Deployment, **settings: object) -> Deployment:
    """The same deployment, served with other settings."""
    chosen = Settings.model_validate(settings)
    service = Service(chosen, deployment.store, deployment.clock)
    return replace(deployment, settings=chosen, service=service)


def test_the_state_of_the_deployment_is_told(deployment: Deployment, operator: TestClient) -> None:
    """How old what signs is, and when the next one is due; the head of the log; the version."""
    deployment.api_key()
    operator.get("/.well-known/jwks.json")
    operator.get("/oauth/revocations")
    deployment.clock.now += MINUTE
    found = told(operator)

    assert found[("coatcheck_jwks_requests_total",)] == 1
    assert found[("coatcheck_change_log_head",)] == deployment.store.head()
    assert found[("coatcheck_signing_key_age_seconds", "ES256", "token")] == MINUTE
    assert found[("coatcheck_signing_key_age_seconds", "ES256", "feed")] == MINUTE
    rotates_at = found[("coatcheck_signing_key_next_rotation_timestamp_seconds", "ES256", "token")]
    assert rotates_at == deployment.now - MINUTE + deployment.settings.rotate_every
    assert found[("coatcheck_requests_in_flight",)] == 0
    assert found[("coatcheck_feed_followers",)] == 0
    assert found[("coatcheck_workers",)] == 1


def test_no_metric_is_about_a_key_or_an_organization(
    deployment: Deployment, operator: TestClient
) -> None:
    """Who asks how often is nobody's business who may look at metrics."""
    created = deployment.api_key("widgets:read")
    token_for(operator, created.key)
    operator.post(f"/oauth/{created.api_key.id}", data=form(created.key))
    text = operator.get("/metrics").text

    for secret in (created.key, created.api_key.id, deployment.organization_id, "widgets"):
        assert secret not in text


# --- whom

PASSED_ON = ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "X-Forwarded-Host")


def test_metrics_are_told_to_the_machine_itself_and_to_no_other(deployment: Deployment) -> None:
    """What is not configured is not open; no proxy's word for it counts."""
    statuses = {}
    for host in ("127.0.0.1", "::1", "10.0.0.7", "192.0.2.1", "not an address"):
        with asked_from(deployment, host) as client:
            statuses[host] = client.get("/metrics").status_code

    assert statuses == {
        "127.0.0.1": 200,
        "::1": 200,
        "10.0.0.7": 403,
        "192.0.2.1": 403,
        "not an address": 403,
    }


@pytest.mark.parametrize("header", PASSED_ON)
def test_metrics_are_not_told_through_a_proxy(operator: TestClient, header: str) -> None:
    """A proxy on the same machine would open them to everybody who can reach it."""
    answer = operator.get("/metrics", headers={header: "127.0.0.1"})

    assert answer.status_code == 403
    assert answer.json()["code"] == "forbidden"
    assert answer.headers["cache-control"] == "no-store"


def test_metrics_are_told_to_the_networks_that_the_setting_names(
    deployment: Deployment,
) -> None:
    settings = deployment.settings.model_dump() | {"metrics_from": "10.0.0.0/8"}
    changed = limited(deployment, **settings)

    with asked_from(changed, "10.0.0.7") as collector, asked_from(changed, "127.0.0.1") as local:
        assert collector.get("/metrics").status_code == 200
        assert local.get("/metrics").status_code == 403


# --- too many requests


def test_beyond_the_limit_requests_are_refused_before_anybody_looks_into_them(
    deployment: Deployment,
) -> None:
    """503 and when to come again; key set, feed, health and revocation go on."""
    key = deployment.api_key("widgets:read").key
    with asked_from(deployment, "127.0.0.1") as http:
        deployment.service.in_flight.count = deployment.settings.max_in_flight
        told_too_many = [
            http.post(endpoint, data=form(key, token="x")) for endpoint in ENDPOINTS[:2]
        ]
        others = [
            http.post("/oauth/revoke", data=form(key, token="x")),
            *(http.get(path) for path in ("/healthz", "/readyz", "/.well-known/jwks.json")),
            *(http.get(path) for path in ("/.well-known/coatcheck", "/oauth/revocations")),
        ]
        deployment.service.in_flight.count = 0
        again = http.post("/oauth/token", data=form(key))
        found = told(http)

    for answer in told_too_many:
        assert refused(answer, 503, "temporarily_unavailable")["code"] == "overloaded"
        assert answer.headers["retry-after"] == "1"
    assert [answer.status_code for answer in others] == [200] * len(others)
    assert again.status_code == 200
    assert found[("coatcheck_requests_shed_total", "token")] == 1
    assert found[("coatcheck_requests_shed_total", "introspect")] == 1
    assert found[("coatcheck_requests_in_flight",)] == 0


# --- request ids


def test_every_answer_of_a_service_names_its_request(live: Live) -> None:
    """Short way, long way, pages, errors of framing: whoever complains can say which one it was."""
    with httpx2.Client(base_url=live.issuer) as http:
        answers = [
            http.post("/oauth/token", data=form(a_wrong_key())),
            http.get("/oauth/token"),
            http.post("/oauth/introspect", data={}),
            http.get("/healthz"),
            http.get("/nowhere"),
            http.get("/.well-known/jwks.json"),
            http.get("/healthz", headers={"Host": "no host"}),
        ]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]

    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(answers)
    assert len({one[0].partition("-")[0] for one in ids}) == 1


def test_a_caller_does_not_choose_the_id_of_its_request(live: Live) -> None:
    """Else its lines in the log would look like somebody else's."""
    with httpx2.Client(base_url=live.issuer, headers={"X-Request-Id": "mine"}) as http:
        answers = [
            http.post("/oauth/token", data=form(a_wrong_key())),
            http.get("/healthz"),
        ]

    assert all(answer.headers["x-request-id"] != "mine" for answer in answers)


def test_the_line_of_a_refused_key_names_the_request_and_not_the_key(live: Live) -> None:
    """One JSON object a line: what collects them need not guess."""
    made = live.api_key("widgets:read")
    assert live.command("keys", "disable", made["id"]).returncode == 0
    answer = httpx2.post(f"{live.issuer}/oauth/token", data=form(made["key"]))
    lines = [json.loads(line) for line in live.log.splitlines()]
    about = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]

    (line,) = about
    assert made["id"] in line["event"]
    assert "api_key_disabled" in line["event"]
    assert made["key"] not in live.log


def test_a_revocation_is_found_in_the_log_by_the_request_that_made_it(
    deployment: Deployment,
) -> None:
    """The change log keeps the id that the caller was told."""
    key = deployment.api_key("widgets:read").key
    with a_client(deployment) as http:
        answer = http.post("/oauth/revoke", data=form(key, token=token_for(http, key)))
    with closing(sqlite3.connect(database(deployment))) as connection:
        rows = connection.execute(
            "SELECT request_id FROM changes WHERE what = 'token.revoked'"
        ).fetchall()

    assert rows == [(answer.headers["x-request-id"],)]


def test_behind_a_trusted_proxy_the_guesses_of_one_caller_are_its_own(tmp_path: Path) -> None:
    """The id is ours there as well, and whoever is counted is the caller and not the proxy."""
    with (
        a_deployment(tmp_path, trusted_proxies="10.0.0.0/8", guesses_per_minute=1) as made,
        asked_from(made, "10.0.0.1") as http,
    ):
        statuses = []
        for caller in ("192.0.2.1", "192.0.2.1", "evil, 192.0.2.1", "192.0.2.2"):
            answer = http.post(
                "/oauth/token",
                data=form(a_wrong_key()),
                headers={"X-Forwarded-For": caller, "X-Request-Id": "proxy"},
            )
            statuses.append(answer.status_code)
            assert answer.headers["x-request-id"] != "proxy"

    assert statuses == [400, 429, 429, 400]
