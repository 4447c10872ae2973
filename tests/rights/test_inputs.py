"""What nobody may say: columns that are not inputs, and positions and sizes that are none.

answers.md K24 (mass assignment) and K25 (lists).  Every body of `lines` is tried with every name.
"""

from collections.abc import Iterator
from typing import Final

import pytest

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from rights.cast import MANAGEMENT, PRODUCT, Made, Stage, a_product, an_unknown_secret, code_of
from rights.lines import LINES, Things, question

MCP: Final = "https://mcp.example.com/mcp"
#: Columns, what clients of other services send, and what a handler of ours holds.
NAMES: Final = (
    *("id", "hash", "digest", "secret", "key", "sealed", "mask", "state", "status", "kind"),
    *("createdAt", "created_at", "createdBy", "created_by", "organizationId", "organization_id"),
    *("projectId", "memberId", "member_id", "device", "isOperator", "operator", "bootstrappedAt"),
    *("suspendedAt", "revokedAt", "deletedAt", "disabledAt", "creditsUsed", "creditSpentAt"),
    *("tokensIssued", "anyScope", "platform", "bounds", "__proto__", "constructor", ""),
)
VALUES: Final = {"createdAt": "2020-01-01T00:00:00Z", "isOperator": True, "kind": "member"}
#: Names of the list that are inputs of a line.
INPUTS: Final = {"POST /mcp/connections": ("device",)}
WITH_BODY: Final = tuple(name for name, line in LINES.items() if line.body is not None)
WITHOUT_BODY: Final = tuple(
    name
    for name, line in LINES.items()
    if line.body is None and name.startswith(("POST", "PUT", "PATCH"))
)
LISTS: Final = (
    "/keys",
    "/events",
    "/organizations",
    "/projects",
    "/members",
    "/groups",
    "/devices",
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with a_product(tmp_path_factory.mktemp("inputs")) as made:
        yield made


@pytest.fixture(scope="module")
def caller(stage: Stage) -> Made:
    """One that may do everything, so that nothing but the input is in the way."""
    return stage.api_key(
        stage.deployment.organization_id,
        *(*ORGANIZATION_PERMISSIONS, OPERATOR, RESOURCE_SERVER, "read"),
        audiences=(MANAGEMENT, PRODUCT, MCP),
    )


@pytest.fixture(scope="module")
def things(stage: Stage) -> Things:
    organization = stage.deployment.organization_id
    return Things(
        organization=organization,
        key=stage.api_key(organization, "keys:write").id,
        project=stage.project(organization),
        member=stage.member(organization, "viewer"),
        group=stage.group(),
    )


def everything_stored(stage: Stage) -> list[object]:
    """Rows and how many there are: of what a request may change."""
    tables = ("organizations", "projects", "members", "groups", "api_keys")
    found: list[object] = list(stage.contents())
    for table in tables:
        found += stage.rows(f"SELECT * FROM {table}")  # noqa: S608 - a fixed name
    return found


@pytest.mark.parametrize("name", WITH_BODY)
def test_what_is_no_input_is_refused(stage: Stage, caller: Made, things: Things, name: str) -> None:
    """K24: by its name, before anything is done; and also deep within a body."""
    asked = question(name, things)
    before = everything_stored(stage)

    for extra in NAMES:
        if extra in INPUTS.get(name, ()):
            continue
        value = VALUES.get(extra, "key_0000000000000000000000")
        body: dict[str, object] = (asked.body or {}) | {extra: value}
        bodies = [body]
        reports = (asked.body or {}).get("reports")
        if isinstance(reports, list) and extra not in ("id", "key"):
            bodies.append({"reports": [reports[0] | {extra: value}]})
        for one in bodies:
            answer = stage.ask(caller.secret, asked.method, asked.path, one, asked.query)
            assert (answer.status_code, code_of(answer)) == (400, "invalid_input"), extra
    assert everything_stored(stage) == before


@pytest.mark.parametrize("name", WITHOUT_BODY)
def test_what_takes_no_input_is_not_told_anything(
    stage: Stage, caller: Made, things: Things, name: str
) -> None:
    """Refused, or without effect: the thing that was named in the path is the one that changes."""
    organization = stage.deployment.organization_id
    victim = stage.api_key(organization, "keys:write")
    target = stage.api_key(organization, "keys:write")
    own = Things(
        things.organization, target.id, stage.project(organization), things.member, things.group
    )
    asked = question(name, own)
    before = stage.api_key_rows(organization)[victim.id]
    body = {"id": victim.id, "key": victim.id, "organization": "org_x", "kind": "member"}

    stage.ask(caller.secret, asked.method, asked.path, body | {"createdAt": 1, "scopes": ["*"]})

    assert stage.api_key_rows(organization)[victim.id] == before
    after = stage.api_key_rows(organization)[target.id]
    assert (after["id"], after["kind"], after["scopes"]) == (target.id, "standard", "keys:write")
    assert after["created_at"] == before["created_at"]


@pytest.mark.parametrize("name", WITH_BODY)
@pytest.mark.parametrize("wrong", ["null", "[]", '"text"', "1", "{", "", '{"name":"a","name":"b"}'])
def test_a_body_is_one_object(
    stage: Stage, caller: Made, things: Things, name: str, wrong: str
) -> None:
    if wrong == "" and name in ("POST /keys/{key}/rotate", "PATCH /groups/{group}"):
        return
    asked = question(name, things)
    if not wrong and not asked.body:
        return
    before = everything_stored(stage)

    answer = stage.http.request(
        asked.method,
        f"/v1{asked.path}",
        headers={
            "Authorization": f"Bearer {caller.secret}",
            "Content-Type": "application/json",
            "If-Match": "*",
        },
        content=wrong.encode(),
        params=asked.query,
    )

    if wrong == "" and asked.method == "PATCH":
        # Nothing is to be changed.
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    assert everything_stored(stage) == before


def test_a_secret_in_the_wrong_place_is_not_repeated(
    stage: Stage, caller: Made, things: Things
) -> None:
    secret = an_unknown_secret()
    for name in WITH_BODY:
        asked = question(name, things)
        for body in ({**(asked.body or {}), secret: 1}, dict.fromkeys(asked.body or ("name",), 7)):
            answer = stage.ask(caller.secret, asked.method, asked.path, body, asked.query)
            assert secret not in answer.text


#: K25, as query parameters.
WRONG: Final = (
    *({"limit": limit} for limit in ("-1", "0", "101", "1000000000", "1e2", "", "ten", "1.5")),
    *({"cursor": cursor} for cursor in ("x", "", "AAAA", "MTIzNDU2", "%00", "../..", "e30", "1")),
    {"cursor": "a" * 600},
    {"offset": "1"},
    {"sort": "secret"},
    {"organizationId": "org_x"},
)


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_list_takes_its_own_positions_only(
    stage: Stage, caller: Made, things: Things, path: str, wrong: dict[str, str]
) -> None:
    """K25: a cursor that was made up, a limit that is none, a name that nobody knows: 400."""
    query = wrong | ({"member": things.member} if path == "/devices" else {})
    if wrong.get("cursor") == "":
        query["limit"] = "1"

    answer = stage.ask(caller.secret, "GET", path, query=query)

    assert (answer.status_code, code_of(answer)) == (400, "invalid_input"), answer.text


@pytest.mark.parametrize("path", ["/keys", "/events", "/projects", "/members", "/groups"])
def test_a_cursor_with_a_letter_changed_is_none(stage: Stage, caller: Made, path: str) -> None:
    organization = stage.deployment.organization_id
    for _ in range(2):
        stage.api_key(organization, "keys:read")
        stage.project(organization)
        stage.member(organization, "viewer")
        stage.group()
    first = stage.ask(caller.secret, "GET", path, query={"limit": "1"}).json()
    cursor = first["nextCursor"]
    assert cursor is not None

    for place in range(0, len(cursor), 5):
        other = "B" if cursor[place] == "A" else "A"
        changed = cursor[:place] + other + cursor[place + 1 :]
        answer = stage.ask(caller.secret, "GET", path, query={"limit": "1", "cursor": changed})
        assert answer.status_code == 400
