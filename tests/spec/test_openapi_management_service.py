"""openapi.yaml against the management API in process: it answers what is documented, and no more.

First what Schemathesis works out of the document: its examples, and each rule kept and broken.
Then walks along the links: what one operation answers, another one takes.  Under `make fuzz` both
go on for longer, in tests/fuzz.
"""

import json
import re
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.failures import FailureGroup

from spec.document import DOCUMENT, OPERATIONS, ROOT
from spec.managed import CHECKS, Case, Managed, a_managed_deployment, strict, walk

schema = schemathesis.openapi.from_dict(strict())
# Each costs a request at each operation, and one shows what all do.
schema.config.phases.coverage.unexpected_methods = {"PUT", "TRACE"}
worked_out = settings(
    max_examples=1,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with a_managed_deployment(tmp_path_factory.mktemp("managed")) as running:
        yield running
        running.require_callers()


@schema.parametrize()
@worked_out
def test_answers_are_as_documented(case: Case, managed: Managed) -> None:
    """Whatever is sent, the answer is one that openapi.yaml lists, and never a 5xx.

    What is worked out is much alike: one of three is sent, the same ones each time.
    """
    sent = (case.path_parameters, case.query, case.headers, case.body, case.method)
    if zlib.crc32(repr(sent).encode("utf-8", "replace")) % 3:
        return
    case.validate_response(managed.send_likely(case), checks=CHECKS)


#: Every operation, in an order in which it can succeed, with a body that it takes.
TOUR: Final[dict[str, dict[str, Any] | None]] = {
    "GET /v1/whoami": None,
    "GET /v1/catalog": None,
    "GET /v1/organizations": None,
    "POST /v1/organizations": {"name": "Beta"},
    "GET /v1/organizations/{organization}": None,
    "PATCH /v1/organizations/{organization}": {"maxLifetime": "90d", "creditLimit": 2.5},
    "POST /v1/organizations/{organization}/bootstrap": None,
    "POST /v1/organizations/{organization}/suspend": None,
    "POST /v1/organizations/{organization}/resume": None,
    "GET /v1/projects": None,
    "POST /v1/projects": {"name": "Web shop"},
    "GET /v1/projects/{project}": None,
    "PATCH /v1/projects/{project}": {"name": "Web shop, Europe"},
    "POST /v1/projects/{project}/archive": None,
    "POST /v1/projects/{project}/restore": None,
    "GET /v1/groups": None,
    "POST /v1/groups": {"name": "Batch", "priceMultiplier": 0.5, "models": ["small-1"]},
    "GET /v1/groups/{group}": None,
    "PATCH /v1/groups/{group}": {"models": None, "tokensPerMinute": 1000},
    "DELETE /v1/groups/{group}": None,
    "GET /v1/members": None,
    "POST /v1/members": {"name": "Bo", "email": "cy@example.com", "role": "developer"},
    "GET /v1/members/{member}": None,
    "PATCH /v1/members/{member}": {"role": "viewer"},
    "DELETE /v1/members/{member}": None,
    "PUT /v1/devices/{device}/key": {"name": "MacBook Pro"},
    "GET /v1/devices": None,
    "DELETE /v1/devices/{device}/key": None,
    "GET /v1/mcp/clients": None,
    "POST /v1/mcp/connections": {"client": "claude-code", "device": "build-7"},
    "POST /v1/keys": {"name": "a", "env": "test", "permissions": "view", "creditLimit": 25.5},
    "GET /v1/keys": None,
    "POST /v1/keys/search": {"query": "a"},
    "GET /v1/keys/{key}": None,
    "PATCH /v1/keys/{key}": {"scopes": ["widgets:read"], "cidrs": ["203.0.113.0/24"]},
    "POST /v1/usage": {"reports": [{"id": "a", "key": "{key}", "credits": 0.42}]},
    "GET /v1/keys/{key}/usage": None,
    "GET /v1/usage": None,
    "GET /v1/events": None,
    "POST /v1/keys/{key}/rotate": {"overlap": "7d"},
    "POST /v1/keys/{key}/end-overlap": None,
    "POST /v1/keys/{key}/disable": None,
    "POST /v1/keys/{key}/enable": None,
    "POST /v1/keys/{key}/reveal": None,
    "POST /v1/keys/{key}/revoke": None,
    "DELETE /v1/keys/{key}": None,
}
#: What is called otherwise in a path than in the body that names it.
MADE_BY: Final = {
    "POST /v1/organizations": "organization",
    "POST /v1/projects": "project",
    "POST /v1/groups": "group",
    "POST /v1/members": "member",
    "POST /v1/keys": "key",
}


def test_every_operation_succeeds_as_documented(tmp_path: Path) -> None:
    """Each once, with a whole life of everything: what is answered is what is documented."""
    assert set(TOUR) == {name for name in OPERATIONS if f" {ROOT}/" in name}
    with a_managed_deployment(tmp_path) as managed:
        with managed.deployment.store.transaction() as tx:
            # Who may see a secret again has decided so.
            tx.organization(managed.deployment.organization_id).recoverable = True  # type: ignore[union-attr]
        known, etag = {"device": "laptop-1"}, ""
        for line, body in TOUR.items():
            method, path = line.split(" ")
            text = json.dumps(body).replace("{key}", known.get("key", ""))
            case = schema[path][method].Case(
                path_parameters={name: known[name] for name in re.findall(r"\{(\w+)\}", path)},
                headers={"If-Match": etag} if method == "PATCH" else {},
                **({} if body is None else {"body": json.loads(text)}),
                media_type=None if body is None else "application/json",
            )
            answer = managed.send(case)
            assert answer.status_code < 300, (line, answer.text)
            case.validate_response(answer, checks=CHECKS)
            if line in MADE_BY:
                known[MADE_BY[line]] = answer.json()["id"]
            etag = answer.headers.get("etag", [""])[0]


#: What makes something, and where its secret stands in the answer.
MADE: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "POST /v1/keys": ({"name": "a"}, ("key",)),
    "POST /v1/keys/{key}/rotate": ({}, ("key",)),
    "POST /v1/projects": ({"name": "a"}, ()),
    "POST /v1/organizations": ({"name": "a", "bootstrap": True}, ("key", "key")),
    "POST /v1/mcp/connections": ({"client": "claude-code"}, ("key", "key")),
}


@pytest.mark.parametrize("line", MADE)
def test_a_repeated_request_is_answered_as_before_but_for_a_secret(
    managed: Managed, line: str
) -> None:
    """Whoever lost the answer needs to find what was made: its status, Location and ETag."""
    body, place = MADE[line]
    method, path = line.split(" ")
    parameters = {}
    if "{key}" in path:
        # One of its own: another test may end those that are known.
        make = schema["/v1/keys"]["POST"].Case(body={"name": "a"}, media_type="application/json")
        parameters["key"] = managed.send(make).json()["id"]
    case = schema[path][method].Case(
        path_parameters=parameters,
        headers={"Idempotency-Key": f"{managed.deployment.now}{line}".replace(" ", "")},
        body=body,
        media_type="application/json",
    )
    first, again = managed.send(case), managed.send(case)

    assert (first.status_code, again.status_code) in {(201, 201), (200, 200)}
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == ["true"]
    for name in ("etag", "location"):
        assert again.headers.get(name) == first.headers.get(name)
    assert without(again.json(), place) == without(first.json(), place)
    case.validate_response(again, checks=CHECKS)


def without(told: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """An answer without the member there, and without what a client types or pastes."""
    if not place:
        return told
    first, *rest = place
    less = without(told[first], tuple(rest)) if rest else None
    return told | {first: less} | ({"steps": None} if "steps" in told else {})


def test_every_refusal_is_as_documented(managed: Managed) -> None:
    """Without credentials, with an API key for something else, and with one that may do little."""
    made = managed.deployment
    elsewhere = made.api_key("widgets:read")
    little = made.api_key("audit:read", audiences=(made.catalog.management_audience,))
    for operation in operations():
        named = re.findall(r"\{(\w+)\}", operation.path)
        case = operation.Case(path_parameters=dict.fromkeys(named, f"key_{'0' * 22}"))
        seen = []
        for caller in ("", elsewhere.key, little.key):
            answer = managed.send(case, caller)
            case.validate_response(answer, checks=CHECKS)
            seen.append(answer.status_code)
        is_bound = bool(DOCUMENT["paths"][case.path][operation.method]["security"][0]["oauth2"])
        is_open = operation.path == "/v1/events"
        assert seen[:2] == [401, 401]
        assert not is_bound or is_open or seen[2] == 403, (operation.label, seen)


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /v1/nothing", 404), ("GET /v1/keys/a%0Ab", 404), ("TRACE /v1/keys", 405)],
)
def test_whatever_is_asked_below_v1_is_refused_as_a_problem(
    managed: Managed, line: str, status: int
) -> None:
    """RFC 9457: also where no route, or no method, would ever lead to the management API."""
    method, path = line.split(" ")
    answer = managed.http.request(
        method, path, headers={"Authorization": f"Bearer {managed.admin}"}
    )

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_member_that_is_not_documented_is_noticed(managed: Managed) -> None:
    """The checks above prove nothing unless they can fail."""
    case = schema["/v1/whoami"]["GET"].Case()
    answer = managed.send(case)
    for more in ({}, {"secret": 1}, {"key": answer.json()["key"] | {"secret": 1}}):
        request = httpx2.Request("GET", "http://127.0.0.1:8000/v1/whoami")
        changed = httpx2.Response(200, json=answer.json() | more, request=request)
        changed.elapsed = timedelta()
        response = schemathesis.Response.from_any(changed)
        if not more:
            case.validate_response(response, checks=CHECKS)
            continue
        with pytest.raises(FailureGroup):
            case.validate_response(response, checks=CHECKS)


def operations() -> Iterator[Any]:
    for line in TOUR:
        method, path = line.split(" ")
        yield schema[path][method]


def test_walks_along_the_links_are_as_documented(tmp_path: Path) -> None:
    """What one operation answers, another one takes: made, changed, ended, and asked for again."""
    walked = walk(schema, tmp_path, walks=2, steps=50)

    # Links that lead nowhere would make this a test of single requests.
    assert sum(walked.values()) > 0
