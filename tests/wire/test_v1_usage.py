"""`/v1/usage`, `/v1/keys/{key}/usage`, `/v1/events`: what resource servers tell and owners see."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from coatcheck import apikey, ids
from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from coatcheck.server.catalog import Policies
from coatcheck.server.changes import Change, What
from coatcheck.server.manage import api_keys, usage
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.oauth.grants.token_exchange import GRANT_TYPE
from coatcheck.server.store.tables import Organization, Project
from support.deployment import (
    ISSUER,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.wire import MANAGEMENT, bearer, token_for

#: An IDE with an LLM gateway: its test keys burn no credits.
CATALOG = Path(__file__).parents[2] / "examples" / "catalogs" / "s0-ide.toml"
GATEWAY = "https://gateway.example.com"
NOON_TOLD = "2027-01-15T08:00:00Z"


@dataclass(frozen=True, slots=True)
class World:
    """A deployment with people and programs that have keys for its management API.

    Attributes:
        resource_server: reports usage.
        of_gateway: a resource server that exchanges and asks about its callers' credentials.
    """

    deployment: Deployment
    http: TestClient
    owner: str
    resource_server: str
    operator: str
    of_gateway: str

    def key(self, *, of: str | None = None, **wanted: Any) -> Created:
        """An API key of the deployment's own organization, unless another is named."""
        deployment = self.deployment
        new = NewApiKey(of or deployment.organization_id, "n", **wanted)
        return api_keys.create(
            deployment.store, deployment.catalog, new, TESTER, now=deployment.now, issuer=ISSUER
        )

    def manager(self, *scopes: str, **wanted: Any) -> str:
        return self.key(scopes=scopes, audiences=(MANAGEMENT,), **wanted).key

    def another_organization(self) -> str:
        row = Organization(
            id=ids.new_id("org", NOON * 1000), name="Other", created_at=NOON, bootstrapped_at=NOON
        )
        with self.deployment.store.transaction() as tx:
            tx.add(row)
        return row.id

    def a_project(self) -> str:
        row = Project(
            id=ids.new_id("prj", NOON * 1000),
            organization_id=self.deployment.organization_id,
            name="p",
            created_at=NOON,
        )
        with self.deployment.store.transaction() as tx:
            tx.add(row)
        return row.id

    def limit(self, credit_limit: int | None) -> None:
        """Of the deployment's own organization, in millionths."""
        with self.deployment.store.transaction() as tx:
            row = tx.organization(self.deployment.organization_id)
            assert row is not None
            row.credit_limit = credit_limit
            usage.settle_organization(tx, row, TESTER, self.deployment.now)

    def get(self, path: str, key: str | None = None, **query: str) -> httpx2.Response:
        return self.http.get(f"/v1{path}", headers=bearer(key or self.owner), params=query)

    def told(self, path: str, key: str | None = None, **query: str) -> dict[str, Any]:
        answer = self.get(path, key, **query)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def send(
        self, *reports: Mapping[str, object], key: str | None = None, **headers: str
    ) -> httpx2.Response:
        return self.http.post(
            "/v1/usage",
            json={"reports": reports},
            headers=bearer(key or self.resource_server) | headers,
        )

    def spend(self, made: Created, amount: float) -> None:
        report = {"id": ids.new_id("key", 0), "key": made.api_key.id, "credits": amount}
        assert self.send(report).json()["counted"] == 1

    def events(self, **query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.told("/events", **query)["data"]
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with a_deployment(tmp_path, catalog=CATALOG) as deployment, a_client(deployment) as http:

        def manager(*scopes: str) -> str:
            return deployment.api_key(*scopes, audiences=(MANAGEMENT,)).key

        yield World(
            deployment,
            http,
            owner=manager(*ORGANIZATION_PERMISSIONS),
            resource_server=manager(RESOURCE_SERVER),
            operator=manager(OPERATOR, *ORGANIZATION_PERMISSIONS),
            of_gateway=deployment.api_key(
                *(RESOURCE_SERVER, "gateway:infer"), audiences=(GATEWAY, MANAGEMENT)
            ).key,
        )


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return body


def is_active(world: World, token: str) -> bool:
    """What introspection says, to a resource server of the gateway."""
    answer = world.http.post(
        "/oauth/introspect", data={"token": token, "client_secret": world.of_gateway}
    )
    assert answer.status_code == 200, answer.text
    active: bool = answer.json()["active"]
    return active


def code_of(answer: httpx2.Response) -> str:
    code: str = answer.json().get("code", "issued")
    return code


def token_code(world: World, made: Created, **parameters: str) -> str:
    return code_of(world.http.post("/oauth/token", data=form(made.key, **parameters)))


def exchange(world: World, made: Created, address: str = "203.0.113.7") -> httpx2.Response:
    """What a resource server of the gateway gets for its caller's API key."""
    return world.http.post(
        "/oauth/token",
        data={
            "grant_type": GRANT_TYPE,
            "client_secret": world.of_gateway,
            "subject_token": made.key,
            "subject_token_type": f"{ISSUER}/token-types/api-key",
            "client_address": address,
        },
    )


# --- usage


def test_usage_is_told_as_the_product_has_it(world: World) -> None:
    """These members and no others, before the first use and after it."""
    made = world.key()
    path = f"/keys/{made.api_key.id}/usage"
    unused = {
        "keyId": made.api_key.id,
        "name": "n",
        "totalRequests": 0,
        "lastUsed": None,
        "tokensConsumed": {"input": 0, "output": 0},
        "creditsConsumed": 0,
        "agentRuns": 0,
    }
    assert world.told(path) == unused

    told = {"key": made.api_key.id, "inputTokens": 1200, "outputTokens": 80, "credits": 0.25}
    answer = world.send(
        {"id": "a", **told, "requests": 3, "at": "2027-01-15T07:59:00+01:00"},
        {"id": "b", **told, "agentRuns": 1, "at": "2027-01-15T07:59:00Z"},
        {"id": "a", **told},
    )
    assert (answer.status_code, answer.json()) == (200, {"counted": 2, "known": 1, "unknown": []})

    used = {
        "totalRequests": 4,
        "lastUsed": "2027-01-15T07:59:00Z",
        "tokensConsumed": {"input": 2400, "output": 160},
        "creditsConsumed": 0.5,
        "agentRuns": 1,
    }
    assert world.told(path) == {"keyId": made.api_key.id, "name": "n", **used}
    assert world.told("/usage") == {
        "organization": world.deployment.organization_id,
        **used,
        "creditLimit": None,
        "creditsLeft": None,
    }


def test_what_is_left_of_a_limit_is_told(world: World) -> None:
    """Never less than nothing, even if the last report went beyond it."""
    world.limit(2_500_000)
    made = world.key()
    for used, left in ((1, 1.5), (9, 0)):
        world.spend(made, used)
        told = world.told("/usage")
        assert (told["creditLimit"], told["creditsLeft"]) == (2.5, left)


def test_a_report_sent_again_is_known(world: World) -> None:
    """With or without an Idempotency-Key: whoever had no answer sends it once more."""
    made = world.key()
    report = {"id": "1", "key": made.api_key.id}
    unknown = {"id": "2", "key": "key_" + "0" * 22}

    first = world.send(report, unknown, **{"Idempotency-Key": "k"})
    again = world.send(report, unknown, **{"Idempotency-Key": "k"})
    third = world.send(report, unknown)

    expected = {"counted": 1, "known": 0, "unknown": [unknown["key"]]}
    assert first.json() == again.json() == expected
    assert third.json() == expected | {"counted": 0, "known": 1}
    assert world.told("/usage")["totalRequests"] == 1


GOOD = {"id": "1", "key": "key_" + "0" * 22}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "a secret for an id": ({"key": apikey.make("cr_live")}, "/reports/1/key"),
    "a name with a blank": ({"id": "a b"}, "/reports/1/id"),
    "a name that is too long": ({"id": "a" * 65}, "/reports/1/id"),
    "an empty name": ({"id": ""}, "/reports/1/id"),
    "less than nothing": ({"requests": -1}, "/reports/1/requests"),
    "half a request": ({"requests": 0.5}, "/reports/1/requests"),
    "a number as text": ({"inputTokens": "1"}, "/reports/1/inputTokens"),
    "more than there is": ({"outputTokens": 2**63}, "/reports/1/outputTokens"),
    "true": ({"agentRuns": True}, "/reports/1/agentRuns"),
    "a negative price": ({"credits": -0.1}, "/reports/1/credits"),
    "a price too fine": ({"credits": 0.0000001}, "/reports/1/credits"),
    "a price too high": ({"credits": 1e300}, "/reports/1/credits"),
    "no moment": ({"at": "yesterday"}, "/reports/1/at"),
    "a name nobody knows": ({"tokens": 1}, "/reports/1/tokens"),
}


@pytest.mark.parametrize(("changed", "pointer"), REFUSED.values(), ids=REFUSED)
def test_one_wrong_report_counts_none(
    world: World, changed: dict[str, object], pointer: str
) -> None:
    """It is told which; what stands there is not, for it may be a secret."""
    made = world.key()
    good = {"id": "1", "key": made.api_key.id}

    answer = world.send(good, GOOD | changed)

    told = problem(answer, 400, "invalid_input")
    # A union is told by its members.
    assert {error["pointer"] for error in told["errors"]} <= {
        pointer,
        *(f"{pointer}/{kind}" for kind in ("int", "float")),
    }
    if changed.get("key"):
        assert str(changed["key"]) not in answer.text
    assert world.told("/usage")["totalRequests"] == 0


def test_a_call_holds_at_most_a_thousand_reports(world: World) -> None:
    """And a body 64 KiB: short reports fit, all of them."""
    made = world.key()
    reports = [{"id": str(number), "key": made.api_key.id} for number in range(1001)]

    assert problem(world.send(*reports), 400, "invalid_input")["errors"][0]["pointer"] == "/reports"
    assert problem(world.send(), 400, "invalid_input")["errors"][0]["pointer"] == "/reports"
    assert world.send(*reports[:1000]).json()["counted"] == 1000


def test_what_a_deleted_key_has_used_stays(world: World) -> None:
    """Deleting takes it out of every list; audit and usage are kept."""
    made = world.key()
    world.send({"id": "1", "key": made.api_key.id, "requests": 7})
    deployment = world.deployment
    # This product's catalog revokes only.
    catalog = replace(deployment.catalog, policies=Policies())
    api_keys.delete(deployment.store, catalog, made.api_key.id, TESTER, now=NOON, is_confirmed=True)

    problem(world.get(f"/keys/{made.api_key.id}"), 404, "not_found")
    assert world.told(f"/keys/{made.api_key.id}/usage")["totalRequests"] == 7


def test_who_is_no_resource_server_reports_of_its_own_organization_at_most(world: World) -> None:
    """By `usage:write`; an operator who has neither permission reports nothing."""
    own, theirs = world.key(), world.key(of=world.another_organization())
    reports = [{"id": "1", "key": own.api_key.id}, {"id": "2", "key": theirs.api_key.id}]

    told = world.send(*reports, key=world.manager("usage:write")).json()
    operator = world.manager("coatcheck:operator")
    refused = problem(world.send(*reports, key=operator), 403, "insufficient_scope")

    assert told == {"counted": 1, "known": 0, "unknown": [theirs.api_key.id]}
    assert refused["scope"] == RESOURCE_SERVER


def test_usage_is_for_who_may_read_it_and_for_nobody_elses_organization(world: World) -> None:
    """Another organization's is not there at all; an operator sees each that it names."""
    other = world.another_organization()
    theirs = world.key(of=other)
    stranger = world.key(of=other, scopes=("usage:read",), audiences=(MANAGEMENT,)).key
    unable = world.manager("keys:read")

    for path in ("/usage", f"/keys/{world.key().api_key.id}/usage"):
        problem(world.get(path, unable), 403, "insufficient_scope")
    problem(world.get(f"/keys/{theirs.api_key.id}/usage"), 404, "not_found")
    problem(world.get("/usage", organization=other), 404, "not_found")
    assert world.told("/usage", stranger)["organization"] == other
    assert world.told("/usage", world.operator, organization=other)["organization"] == other


def test_whoever_is_bound_to_a_project_sees_its_keys_and_no_totals(world: World) -> None:
    """The organization's events and sums tell of other projects."""
    project = world.a_project()
    bound = world.manager("usage:read", "audit:read", project_id=project)
    inside, outside = world.key(project_id=project), world.key()

    world.told(f"/keys/{inside.api_key.id}/usage", bound)
    problem(world.get(f"/keys/{outside.api_key.id}/usage", bound), 404, "not_found")
    for path in ("/usage", "/events"):
        told = problem(world.get(path, bound), 403, "beyond_your_rights")
        assert [error["pointer"] for error in told["errors"]] == ["/project"]


# --- credit that is used up


def test_tokens_die_with_the_last_credit_of_their_api_key(world: World) -> None:
    """From the next request on; others go on, and a higher limit lets it go on."""
    made, other = world.key(credit_limit=2_000_000), world.key()
    token, others = token_for(world.http, made.key), token_for(world.http, other.key)
    world.spend(made, 1.999999)
    assert (is_active(world, token), token_code(world, made)) == (True, "issued")

    world.spend(made, 0.000001)

    assert (is_active(world, token), token_code(world, made)) == (False, "quota_exceeded")
    assert code_of(exchange(world, made)) == "quota_exceeded"
    assert (is_active(world, others), token_code(world, other)) == (True, "issued")
    shown = world.told(f"/keys/{made.api_key.id}")
    assert (shown["status"], shown["disabledReason"]) == ("disabled", "quota")

    answer = world.http.patch(
        f"/v1/keys/{made.api_key.id}",
        json={"creditLimit": 3},
        headers=bearer(world.owner) | {"If-Match": "*"},
    )
    assert answer.status_code == 200, answer.text
    assert (is_active(world, token), token_code(world, made)) == (False, "issued")


def test_tokens_die_with_the_last_credit_of_their_organization(world: World) -> None:
    """All that cost something.  What is free, and management, goes on; so does who pays more."""
    made, free = world.key(), world.key(environment="test")
    token = token_for(world.http, made.key)
    world.limit(2_000_000)
    world.spend(made, 1.5)
    assert (is_active(world, token), token_code(world, made)) == (True, "issued")

    world.spend(made, 1)

    assert (is_active(world, token), token_code(world, made)) == (False, "quota_exceeded")
    assert code_of(exchange(world, made)) == "quota_exceeded"
    assert token_code(world, free) == "issued"
    assert world.told("/usage")["creditsLeft"] == 0
    # What was consumed before it was known is still reported, and counted.
    world.spend(made, 1)

    world.limit(4_000_000)
    assert (is_active(world, token), token_code(world, made)) == (False, "issued")


def test_the_operator_raises_an_organizations_limit_and_it_goes_on(world: World) -> None:
    """In the edit itself; nobody has to do anything else."""
    made = world.key()
    path = f"/v1/organizations/{world.deployment.organization_id}"
    headers = bearer(world.operator) | {"If-Match": "*"}

    def edit(credit_limit: float | None) -> None:
        answer = world.http.patch(path, json={"creditLimit": credit_limit}, headers=headers)
        assert answer.status_code == 200, answer.text

    edit(1)
    world.spend(made, 2)
    for limit, code in ((3, "issued"), (2, "quota_exceeded"), (None, "issued")):
        edit(limit)
        assert token_code(world, made) == code


# --- alarms


def test_a_right_secret_from_a_wrong_address_is_an_event(world: World) -> None:
    """The best sign of a leak: the owner sees where from, wherever it was presented."""
    made = world.key(networks=("10.0.0.0/8",))
    wrong = apikey.make("cr_live")
    with TestClient(world.deployment.service, base_url=ISSUER, client=("192.0.2.9", 1)) as thief:
        for path in ("/oauth/token", "/oauth/introspect", "/oauth/revoke"):
            answer = thief.post(path, data=form(made.key, token="x"))
            assert code_of(answer) == "ip_not_allowed"
        assert code_of(thief.post("/oauth/token", data=form(wrong))) == "api_key_unknown"
    assert code_of(exchange(world, made, "::ffff:198.51.100.3")) == "ip_not_allowed"
    assert code_of(exchange(world, made, "10.1.2.3")) == "issued"
    world.deployment.service._alarms.flush(world.deployment.now)

    found = world.events(what="use.")
    assert {event["detail"]["address"]: event["detail"]["uses"] for event in found} == {
        "192.0.2.9": 3,
        "198.51.100.3": 1,
    }
    assert {(event["what"], event["subject"], event["narrows"]) for event in found} == {
        ("use.from_wrong_address", made.api_key.id, False)
    }


# --- events


def test_an_event_tells_what_who_and_when(world: World) -> None:
    """These members and no others."""
    made = world.key()
    answer = world.http.post(f"/v1/keys/{made.api_key.id}/revoke", headers=bearer(world.owner))
    assert answer.status_code == 200, answer.text
    newest, oldest = world.events(subject=made.api_key.id)

    assert newest == {
        "id": newest["id"],
        "at": NOON_TOLD,
        "what": "api_key.revoked",
        "subject": made.api_key.id,
        "actor": world.told("/whoami")["actor"],
        "address": newest["address"],
        "requestId": answer.headers["x-request-id"],
        "narrows": True,
        "detail": {},
    }
    assert newest["id"].isdecimal()
    assert (oldest["what"], oldest["actor"], oldest["narrows"]) == (
        *("api_key.created", "cli:tester"),
        False,
    )
    assert made.key not in json.dumps([newest, oldest])


def test_events_are_paged_the_newest_first_and_filtered_by_kind(world: World) -> None:
    """Every event once; a cursor is good for its own list."""
    made = [world.key() for _ in range(7)]
    world.deployment.revoke(made[0])
    expected = [event["id"] for event in world.events(what="api_key.")]
    assert expected == sorted(expected, key=int, reverse=True)
    assert world.events(what="api_key.revoked")[0]["subject"] == made[0].api_key.id

    found: list[str] = []
    query = {"what": "api_key.", "limit": "3"}
    while True:
        page = world.told("/events", **query)
        found += [event["id"] for event in page["data"]]
        assert page["hasMore"] == (page["nextCursor"] is not None)
        if not page["hasMore"]:
            break
        query["cursor"] = page["nextCursor"]
        # What happens meanwhile is on no later page.
        world.key()

    assert found == expected
    for wrong in ({"what": "api", "cursor": query["cursor"]}, {"cursor": "x"}):
        problem(world.get("/events", **wrong), 400, "invalid_input")


def test_events_are_one_organizations(world: World) -> None:
    """Another's are not there; what is nobody's is told to operators who ask for it."""
    other = world.another_organization()
    theirs = world.key(of=other)
    with world.deployment.store.transaction() as tx:
        tx.append([Change(What.SIGNING_KEY_EXPORTED, "kid_1", TESTER, NOON)])

    assert not world.events(subject=theirs.api_key.id)
    assert not world.events(what="signing_key.")
    problem(world.get("/events", organization=other), 404, "not_found")
    problem(world.get("/events", scope="platform"), 403, "insufficient_scope")
    problem(world.get("/events", world.manager("keys:read")), 403, "insufficient_scope")

    (event,) = world.told("/events", world.operator, organization=other)["data"]
    assert event["subject"] == theirs.api_key.id
    platform = world.told("/events", world.operator, scope="platform")["data"]
    assert platform[0]["subject"] == "kid_1"
    assert not [event for event in platform if event["what"].startswith("api_key.")]
    problem(
        world.get("/events", world.operator, scope="platform", organization=other),
        *(400, "invalid_input"),
    )
