"""Every kind of caller on every route: who is let in, and what of others it gets to see.

answers.md K23.  `lines` says what each route needs; it is written from the contract, and a route
without a line fails.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import pytest
from httpx2 import Response

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from coatcheck.server.manage import api_keys, usage
from coatcheck.server.manage.api.routes import ROUTES
from coatcheck.server.manage.members import ROLES
from coatcheck.server.manage.usage import Report
from coatcheck.server.store.transaction import Reported
from rights.cast import (
    MANAGEMENT,
    PRODUCT,
    Made,
    Stage,
    a_product,
    an_unknown_id,
    an_unknown_secret,
    code_of,
    mentioned,
    without_request_id,
)
from rights.lines import LINES, Question, Things, question
from support.deployment import MINUTE, NOON, TESTER

NAMES: Final = tuple(f"{route.method} {route.path}" for route in ROUTES)
EVERYTHING: Final = tuple(ORGANIZATION_PERMISSIONS)
PLATFORM: Final = (OPERATOR, RESOURCE_SERVER)
#: What lets somebody in who may do this: all but the following.
NOBODY, FORBIDDEN, IN = "401", "403", "let in"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One deployment for all tests here: each makes what it changes."""
    with a_product(tmp_path_factory.mktemp("rights")) as made:
        yield made


@dataclass(frozen=True, slots=True)
class Role:
    """A caller with good credentials, and what it may do by them.

    Attributes:
        organization: the one that it belongs to.
    """

    organization: str
    permissions: tuple[str, ...]
    secret: str = field(repr=False)
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cast:
    """All kinds of callers of one organization.

    Attributes:
        outsiders: credentials that are none here, by what is wrong with them.
    """

    organization: str
    roles: Mapping[str, Role]
    outsiders: Mapping[str, str | Mapping[str, str] | None]


@pytest.fixture(scope="module")
def cast(stage: Stage) -> Cast:
    organization, deployment = stage.organization("Ada's"), stage.deployment
    roles: dict[str, Role] = {}

    def role(name: str, made: Made, *permissions: str, of: str = organization) -> None:
        roles[name] = Role(of, permissions, made.secret, stage.token(made.secret))

    for permission in EVERYTHING:
        role(f"{permission} only", stage.api_key(organization, permission), permission)
    role("everything", stage.api_key(organization, *EVERYTHING), *EVERYTHING)
    role("a star", stage.api_key(organization, "*"), *EVERYTHING)
    for name, permissions in ROLES.items():
        made = stage.members_key(stage.member(organization, name))
        role(f"a member who is {name}", made, *permissions)
    operators = deployment.organization_id
    for permission in PLATFORM:
        role(permission, stage.api_key(operators, permission), permission, of=operators)

    product = stage.api_key(organization, "read", audiences=(PRODUCT,))
    both = stage.api_key(organization, *EVERYTHING, "read", audiences=(MANAGEMENT, PRODUCT))
    connector = stage.api_key(organization, *EVERYTHING, kind="connector")
    revoked, disabled, deleted = (stage.api_key(organization, *EVERYTHING) for _ in range(3))
    expired = stage.api_key(organization, *EVERYTHING, expires_at=NOON + MINUTE)
    far_away = stage.api_key(organization, *EVERYTHING, networks=("198.51.100.0/24",))
    ended = {
        name: stage.token(made.secret)
        for name, made in (("revoked", revoked), ("disabled", disabled), ("expired", expired))
    }
    now = deployment.now
    api_keys.revoke(deployment.store, revoked.id, TESTER, now=now)
    api_keys.disable(deployment.store, disabled.id, TESTER, now=now)
    api_keys.delete(deployment.store, deployment.catalog, deleted.id, TESTER, now=now)
    deployment.clock.now += MINUTE
    everything = roles["everything"].secret
    outsiders: dict[str, str | Mapping[str, str] | None] = {
        "nobody": None,
        "an empty bearer": {"Authorization": "Bearer"},
        "garbage": "no-credential-at-all",
        "garbage in three parts": "eyJhbGciOiJub25lIn0.e30.",
        "an unknown API key": an_unknown_secret(),
        "an API key of another brand": an_unknown_secret("ck_live"),
        "an API key with a letter wrong": everything[:-1] + ("a" if everything[-1] != "a" else "b"),
        "an ordinary API key of the product": product.secret,
        "a token of the product": stage.token(product.secret, PRODUCT),
        "a token of another audience": stage.token(both.secret, PRODUCT),
        "a token without its signature": roles["everything"].token.rpartition(".")[0] + ".",
        "a connector key in a header": connector.secret,
        "a connector key in X-API-Key": {"X-API-Key": connector.secret},
        "a revoked API key": revoked.secret,
        "a disabled API key": disabled.secret,
        "a deleted API key": deleted.secret,
        "an expired API key": expired.secret,
        "an id without a secret": {"X-API-Key": both.id},
        **{f"a token of a {name} API key": token for name, token in ended.items()},
    }
    # Not 401: it is known, and not here.
    roles["from elsewhere"] = Role(organization, (), far_away.secret, roles["everything"].token)
    return Cast(organization, roles, outsiders)


def things_of(stage: Stage, organization: str) -> Things:
    """New things of an organization, for a test to change."""
    return Things(
        organization=organization,
        # Within whoever may write API keys.
        key=stage.api_key(organization, "keys:write").id,
        project=stage.project(organization),
        member=stage.member(organization, "viewer"),
        group=stage.group(),
    )


def put(stage: Stage, credential: str | Mapping[str, str] | None, asked: Question) -> Response:
    return stage.ask(credential, asked.method, asked.path, asked.body, asked.query)


def outcome(answer: Response) -> str:
    if answer.status_code == 401:
        return NOBODY
    # Other reasons for 403 come after the door: what is asked goes beyond the caller's own.
    is_forbidden = answer.status_code == 403 and code_of(answer) == "insufficient_scope"
    return FORBIDDEN if is_forbidden else IN


# --- 1. the door


def test_every_route_has_its_line() -> None:
    """A new route is covered by its line, and only by that."""
    assert sorted(NAMES) == sorted(LINES)


@pytest.mark.parametrize("name", NAMES)
def test_who_is_let_in(stage: Stage, cast: Cast, name: str) -> None:
    """K23.  A token means what the API key means; a star is never the platform's.

    Whoever is not known has changed nothing, anywhere.
    """
    operators_only = LINES[name].needs == (OPERATOR,)
    # What stops an organization must not stop the callers.
    victim = stage.organization("a victim") if operators_only else cast.organization
    things = things_of(stage, victim)
    asked = question(name, things)

    found = {}
    everything = stage.contents()
    for caller, credential in cast.outsiders.items():
        found[caller] = outcome(put(stage, credential, asked))
    assert stage.contents() == everything
    expected = dict.fromkeys(cast.outsiders, NOBODY)
    for place, (caller, role) in enumerate(cast.roles.items(), start=NAMES.index(name)):
        if caller == "from elsewhere":
            continue
        own = things if operators_only else replace(things, organization=role.organization)
        # By turns: each caller comes with both, and each route is asked with both.
        credential = role.token if place % 2 else role.secret
        found[caller] = outcome(put(stage, credential, question(name, own)))
        is_in = LINES[name].needs is None or set(LINES[name].needs or ()) & set(role.permissions)
        expected[caller] = IN if is_in else FORBIDDEN
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_each_line_is_a_request_that_is_done(stage: Stage, name: str) -> None:
    """Else a door would seem open that leads nowhere."""
    organization = stage.organization("Grace's", recoverable=True)
    admin, line = stage.api_key(organization, *EVERYTHING, "read", audiences=BOTH), LINES[name]
    things = things_of(stage, organization)
    caller = admin.secret
    if line.needs in ((OPERATOR,), (RESOURCE_SERVER,)):
        caller = stage.api_key(stage.deployment.organization_id, *(line.needs or ())).secret

    answer = put(stage, caller, question(name, things))

    assert answer.status_code == line.status, answer.text


BOTH: Final = (MANAGEMENT, PRODUCT, "https://mcp.example.com/mcp")


@pytest.mark.parametrize("place", ["Bearer", "X-API-Key", "Basic"])
def test_a_raw_key_is_the_same_wherever_it_stands(stage: Stage, cast: Cast, place: str) -> None:
    def headers(secret: str) -> Mapping[str, str]:
        if place == "X-API-Key":
            return {"X-API-Key": secret}
        basic = f"Basic {b64encode(f'{secret}:'.encode()).decode()}"
        return {"Authorization": basic if place == "Basic" else f"Bearer {secret}"}

    asked = question("GET /projects", things_of(stage, cast.organization))

    for role in cast.roles.values():
        there, by_bearer = (
            put(stage, credential, asked) for credential in (headers(role.secret), role.secret)
        )
        assert there.status_code == by_bearer.status_code
        if there.status_code == 200:
            assert without_request_id(there) == without_request_id(by_bearer)
    for secret in (one for one in cast.outsiders.values() if isinstance(one, str)):
        assert put(stage, headers(secret), asked).status_code == 401


def test_two_credentials_are_not_chosen_from(stage: Stage, cast: Cast) -> None:
    """Whoever adds a better one to a worse one does not get the better one's rights."""
    reader, admin = cast.roles["keys:read only"], cast.roles["everything"]
    headers = {"Authorization": f"Bearer {reader.secret}", "X-API-Key": admin.secret}

    answer = stage.ask(headers, "GET", "/whoami")

    assert (answer.status_code, code_of(answer)) == (400, "multiple_credentials")


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_address_is_refused_everywhere(stage: Stage, cast: Cast, name: str) -> None:
    asked = question(name, things_of(stage, cast.organization))

    answer = put(stage, cast.roles["from elsewhere"].secret, asked)

    assert (answer.status_code, code_of(answer)) == (403, "ip_not_allowed")


def test_a_secret_in_the_url_is_no_credential(stage: Stage, cast: Cast) -> None:
    """Not even a connector key's: it is for the product's MCP server."""
    connector = stage.api_key(cast.organization, *EVERYTHING, kind="connector")

    for secret in (connector.secret, cast.roles["everything"].secret):
        answer = stage.ask(None, "GET", "/keys", query={"api_key": secret})
        assert answer.status_code == 401


# --- 2. other organizations


@dataclass(frozen=True, slots=True)
class Other:
    """An organization that a caller has nothing to do with.

    Attributes:
        marks: texts that nothing else has: its ids, names, masks and addresses.
    """

    things: Things
    secret: str = field(repr=False)
    marks: tuple[str, ...]


@pytest.fixture(scope="module")
def other(stage: Stage) -> Other:
    """Bertha's organization: one of everything, with usage and events."""
    name = "Zebra-Bertha"
    deployment = stage.deployment
    organization = stage.organization(name, recoverable=True, credit_limit=77_000_000)
    project = stage.project(organization, f"{name}-project")
    member = stage.member(organization, "developer", f"{name}-member")
    key = stage.api_key(
        organization, "*", name=f"{name}-key", project_id=project, audiences=(MANAGEMENT, PRODUCT)
    )
    device = stage.device_key(member, organization, "zebra-device", name=f"{name}-device")
    used = Reported(
        requests=41,
        input_tokens=123_457,
        output_tokens=0,
        credits=1,
        agent_runs=0,
        last_used_at=deployment.now,
    )
    usage.report(
        deployment.store,
        deployment.catalog,
        [Report("zebra-report", key.id, used)],
        TESTER,
        now=deployment.now,
    )
    masks = [row["mask"] for row in stage.api_key_rows(organization).values()]
    marks = (name, organization, project, member, key.id, device.id, "123457", *masks)
    things = Things(organization, key.id, project, member, stage.group(), "zebra-device")
    return Other(things, key.secret, marks)


def nowhere(things: Things) -> Things:
    """The same questions about what does not exist."""
    return replace(
        things,
        organization=an_unknown_id("org"),
        key=an_unknown_id("key"),
        project=an_unknown_id("prj"),
        member=an_unknown_id("mem"),
        of=None if things.of is None else an_unknown_id("org"),
    )


ADMINS: Final = ("everything", "a star", "a member who is admin")
#: Routes that an organization's own people are let in to, and that name a thing.
ABOUT_THINGS: Final = tuple(
    name
    for name in NAMES
    if any(f"{{{what}}}" in name for what in ("organization", "key", "project", "member"))
    and not set(LINES[name].needs or ()) <= set(PLATFORM)
)
NAMES_ORGANIZATION: Final = tuple(name for name in NAMES if LINES[name].names_organization)
NAMES_MEMBER: Final = ("GET /devices", "PUT /devices/{device}/key")


@pytest.mark.parametrize("name", [*ABOUT_THINGS, *NAMES_ORGANIZATION, *NAMES_MEMBER])
def test_what_another_organization_has_does_not_exist(
    stage: Stage, cast: Cast, other: Other, name: str
) -> None:
    """404, told by the same words as of what nobody has; and nothing of it has changed."""
    things = replace(other.things, of=other.things.organization)
    before = stage.of_organization(other.things.organization)

    for caller in ADMINS:
        for credential in (cast.roles[caller].secret, cast.roles[caller].token):
            theirs = put(stage, credential, question(name, things))
            none = put(stage, credential, question(name, nowhere(things)))

            assert theirs.status_code == 404, (caller, theirs.text)
            assert without_request_id(theirs) == without_request_id(none)
            assert not mentioned(theirs, other.marks)
    assert stage.of_organization(other.things.organization) == before


@pytest.mark.parametrize(
    "name", [name for name in NAMES if set(LINES[name].needs or "-") <= {*PLATFORM}]
)
def test_what_is_the_platforms_tells_nothing_of_another_organization(
    stage: Stage, cast: Cast, other: Other, name: str
) -> None:
    """The door comes first: the answer is the same whatever is behind it."""
    before = stage.of_organization(other.things.organization)

    for caller in ADMINS:
        credential = cast.roles[caller].secret
        theirs = put(stage, credential, question(name, other.things))
        none = put(stage, credential, question(name, nowhere(other.things)))

        assert outcome(theirs) == FORBIDDEN
        assert without_request_id(theirs) == without_request_id(none)
    assert stage.of_organization(other.things.organization) == before


#: Inputs that name something of another organization beside the route's own thing.
NAMING: Final[Mapping[str, tuple[str, str, Callable[[Other], dict[str, object]]]]] = {
    "a key bound to its project": (
        "POST",
        "/keys",
        lambda other: {"name": "mine", "scopes": ["read"], "project": other.things.project},
    ),
    "a key of its member": (
        "POST",
        "/keys",
        lambda other: {"name": "mine", "member": other.things.member},
    ),
    "a connection of its project": (
        "POST",
        "/mcp/connections",
        lambda other: {"client": "cursor", "project": other.things.project},
    ),
    "a search for its id": (
        "POST",
        "/keys/search",
        lambda other: {"query": other.things.key},
    ),
    "a search for its secret": ("POST", "/keys/search", lambda other: {"query": other.secret}),
    "a search for its name": ("POST", "/keys/search", lambda other: {"query": "Zebra"}),
    "a search for its last letters": (
        "POST",
        "/keys/search",
        lambda other: {"query": other.secret[-4:]},
    ),
    "a device signed in with its secret": (
        "PUT",
        "/devices/zebra-device/key",
        lambda other: {"name": "mine", "currentKey": other.secret, "member": other.things.member},
    ),
}


@pytest.mark.parametrize("case", NAMING)
@pytest.mark.parametrize("caller", ADMINS)
def test_naming_what_another_organization_has_gives_nothing(
    stage: Stage, cast: Cast, other: Other, caller: str, case: str
) -> None:
    method, path, body = NAMING[case]
    before = stage.of_organization(other.things.organization)
    own = len(stage.api_key_rows(cast.organization))

    answer = stage.ask(cast.roles[caller].secret, method, path, body(other))

    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 200:
        assert answer.json()["data"] == []
    assert not mentioned(answer, other.marks)
    assert stage.of_organization(other.things.organization) == before
    assert len(stage.api_key_rows(cast.organization)) == own


#: What lists may be asked for, by what another organization has.
FILTERS: Final[tuple[tuple[str, Callable[[Other], dict[str, str]]], ...]] = (
    ("/keys", lambda other: {}),
    ("/keys", lambda other: {"status": "all"}),
    ("/keys", lambda other: {"status": "all", "project": other.things.project}),
    ("/keys", lambda other: {"status": "all", "member": other.things.member}),
    ("/keys", lambda other: {"status": "all", "name": "Zebra"}),
    ("/keys", lambda other: {"status": "all", "kind": "device"}),
    ("/keys", lambda other: {"status": "all", "group": other.things.group}),
    ("/events", lambda other: {}),
    ("/events", lambda other: {"subject": other.things.key}),
    ("/events", lambda other: {"subject": other.things.organization}),
    ("/events", lambda other: {"what": "api_key.created"}),
    ("/usage", lambda other: {}),
    ("/organizations", lambda other: {}),
    ("/projects", lambda other: {}),
    ("/members", lambda other: {}),
    ("/groups", lambda other: {}),
    ("/whoami", lambda other: {}),
    ("/catalog", lambda other: {}),
    ("/mcp/clients", lambda other: {}),
)


@pytest.mark.parametrize(("path", "query"), FILTERS)
def test_no_list_holds_anything_of_another_organization(
    stage: Stage, cast: Cast, other: Other, path: str, query: Callable[[Other], dict[str, str]]
) -> None:
    """All pages of it, also from a position that is another organization's."""
    for caller in ADMINS:
        secret, asked = cast.roles[caller].secret, query(other)
        for _ in range(50):
            answer = stage.ask(secret, "GET", path, query=asked)
            assert answer.status_code == 200, answer.text
            assert not mentioned(answer, other.marks)
            following = answer.json().get("nextCursor")
            if following is None:
                break
            asked["cursor"] = following
        else:
            pytest.fail("the list does not end")


def test_a_cursor_is_good_for_its_own_list_only(stage: Stage, cast: Cast, other: Other) -> None:
    """K25: one that was made for another organization, or another filter, is refused."""
    operator = stage.api_key(stage.deployment.organization_id, OPERATOR, "keys:read", "audit:read")
    for path in ("/keys", "/events"):
        stage.api_key(other.things.organization, "keys:read", name="Zebra-Bertha-key")
        asked = {"organization": other.things.organization, "limit": "1"}
        cursor = stage.ask(operator.secret, "GET", path, query=asked).json()["nextCursor"]
        assert cursor is not None

        own = {"limit": "1", "cursor": cursor}
        answer = stage.ask(cast.roles["everything"].secret, "GET", path, query=own)

        assert answer.status_code == 400
        assert not mentioned(answer, other.marks)


def test_the_same_idempotency_key_of_another_caller_is_another(stage: Stage, cast: Cast) -> None:
    """What one caller was answered is never told to another of its organization."""
    secrets = [cast.roles[caller].secret for caller in ("everything", "a star")]
    answers = [
        stage.ask(
            {"Authorization": f"Bearer {secret}", "Idempotency-Key": "again"},
            "POST",
            "/keys",
            {"name": "made twice", "scopes": ["keys:read"], "audiences": [MANAGEMENT]},
        )
        for secret in secrets
    ]

    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["id"] != answers[1].json()["id"]
    assert all(answer.json()["key"] for answer in answers)


# --- 3. projects


@dataclass(frozen=True, slots=True)
class Bound:
    """A caller that is bound to one project, and what another project of its organization has."""

    organization: str
    role: Role
    theirs: Things
    secret: str = field(repr=False)
    marks: tuple[str, ...]


@pytest.fixture(scope="module")
def bound(stage: Stage) -> Bound:
    organization = stage.organization("Ida's", recoverable=True)
    own = stage.project(organization, "own")
    other = stage.project(organization, "Quagga-project")
    ida = stage.member(organization, "admin", "Ida")
    caller = stage.api_key(
        organization,
        *EVERYTHING,
        "read",
        project_id=own,
        member_id=ida,
        audiences=BOTH,
    )
    key = stage.api_key(
        organization,
        "read",
        name="Quagga-key",
        project_id=other,
        audiences=(PRODUCT, "https://mcp.example.com/mcp"),
    )
    device = stage.device_key(
        ida, organization, "quagga-device", name="Quagga-device", project_id=other
    )
    disabled, expired = (
        stage.device_key(
            ida,
            organization,
            f"quagga-{name}",
            name=f"Quagga-{name}",
            project_id=other,
            expires_at=stage.deployment.now + MINUTE if name == "expired" else None,
        )
        for name in ("disabled", "expired")
    )
    api_keys.disable(stage.deployment.store, disabled.id, TESTER, now=stage.deployment.now)
    stage.deployment.clock.now += MINUTE
    whole = stage.api_key(organization, "read", name="Quagga-whole", audiences=(PRODUCT,))
    ids = (other, key.id, device.id, disabled.id, expired.id, whole.id)
    marks = (*ids, "Quagga-project", "Quagga-key", "Quagga-device", "Quagga-whole")
    return Bound(
        organization,
        Role(organization, EVERYTHING, caller.secret, stage.token(caller.secret)),
        Things(organization, key.id, other, ida, stage.group(), "quagga-device"),
        key.secret,
        marks,
    )


def of_project(stage: Stage, bound: Bound) -> list[dict[str, object]]:
    """Every row that the other project, and what belongs to it, has."""
    keys = stage.rows(
        "SELECT * FROM api_keys WHERE organization_id = ? AND name LIKE 'Quagga-%'",
        bound.organization,
    )
    found = list(keys)
    found += stage.rows("SELECT * FROM projects WHERE id = ?", bound.theirs.project)
    for key in keys:
        found += stage.rows("SELECT * FROM api_key_secrets WHERE api_key_id = ?", key["id"])
        found += stage.rows("SELECT * FROM changes WHERE subject = ?", key["id"])
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if "{key}" in name or "{project}" in name])
def test_what_another_project_has_does_not_exist(stage: Stage, bound: Bound, name: str) -> None:
    before = of_project(stage, bound)
    assert len(before) > 4

    for credential in (bound.role.secret, bound.role.token):
        theirs = put(stage, credential, question(name, bound.theirs))
        none = put(stage, credential, question(name, nowhere(bound.theirs)))

        assert theirs.status_code == 404, theirs.text
        assert without_request_id(theirs) == without_request_id(none)
    assert of_project(stage, bound) == before


#: What a caller that is bound to a project may try on another one.
TRIES: Final[tuple[tuple[str, str, Callable[[Bound], dict[str, object]]], ...]] = (
    ("POST", "/keys", lambda _: {"name": "x", "scopes": ["read"], "project": _.theirs.project}),
    ("POST", "/mcp/connections", lambda _: {"client": "cursor", "project": _.theirs.project}),
    ("POST", "/mcp/connections", lambda _: {"client": "cursor", "reuse": True}),
    ("POST", "/keys/search", lambda _: {"query": "Quagga", "status": "all"}),
    ("POST", "/keys/search", lambda _: {"query": _.theirs.key}),
    ("POST", "/keys/search", lambda _: {"query": _.secret}),
    ("GET", "/keys", lambda _: {"status": "all"}),
    ("GET", "/keys", lambda _: {"status": "all", "project": _.theirs.project}),
    ("GET", "/keys", lambda _: {"status": "all", "member": _.theirs.member}),
    ("GET", "/keys", lambda _: {"status": "all", "kind": "device"}),
    ("GET", "/projects", lambda _: {}),
    ("GET", "/events", lambda _: {}),
    ("GET", "/events", lambda _: {"subject": _.theirs.key}),
    ("GET", "/usage", lambda _: {}),
    ("GET", "/devices", lambda _: {}),
    ("GET", "/whoami", lambda _: {}),
    ("POST", "/projects", lambda _: {"name": "a third"}),
    ("POST", "/members", lambda _: {"name": "x", "email": "x@example.com", "role": "admin"}),
    ("PATCH", "/members/{member}", lambda _: {"role": "viewer"}),
    ("DELETE", "/members/{member}", lambda _: {}),
    ("PATCH", "/organizations/{organization}", lambda _: {"recoverable": False}),
    ("PUT", "/devices/quagga-device/key", lambda _: {"name": "mine"}),
    ("PUT", "/devices/quagga-device/key", lambda _: {"currentKey": _.secret}),
    ("PUT", "/devices/quagga-disabled/key", lambda _: {"name": "mine"}),
    ("PUT", "/devices/quagga-expired/key", lambda _: {"name": "mine"}),
    ("DELETE", "/devices/quagga-device/key", lambda _: {}),
    ("DELETE", "/devices/quagga-disabled/key", lambda _: {}),
)


@pytest.mark.parametrize(("method", "path", "values"), TRIES)
def test_nothing_of_another_project_is_seen_or_changed(
    stage: Stage,
    bound: Bound,
    method: str,
    path: str,
    values: Callable[[Bound], dict[str, object]],
) -> None:
    before = of_project(stage, bound)
    members = stage.rows("SELECT * FROM members WHERE organization_id = ?", bound.organization)
    whole = stage.rows("SELECT * FROM organizations WHERE id = ?", bound.organization)
    path = path.replace("{member}", bound.theirs.member)
    path = path.replace("{organization}", bound.organization)
    asked = values(bound)
    query = {name: str(value) for name, value in asked.items()} if method == "GET" else None
    body = asked if method in ("POST", "PUT", "PATCH") else None

    for credential in (bound.role.secret, bound.role.token):
        answer = stage.ask(credential, method, path, body, query)

        assert answer.status_code < 500, answer.text
        assert not mentioned(answer, bound.marks)
        assert of_project(stage, bound) == before
        assert (
            stage.rows("SELECT * FROM members WHERE organization_id = ?", bound.organization)
            == members
        )
        assert stage.rows("SELECT * FROM organizations WHERE id = ?", bound.organization) == whole


# --- 4. organizations that are not bootstrapped


@pytest.mark.parametrize("name", NAMES)
def test_before_an_organization_is_bootstrapped_nothing_of_it_is_managed(
    stage: Stage, name: str
) -> None:
    """409, and how to switch it on, once somebody is let in; what it is, it may always see."""
    organization = stage.organization("new", is_bootstrapped=False)
    admin = stage.api_key(organization, *EVERYTHING)
    things = things_of(stage, organization)
    before = stage.of_organization(organization, is_used=True)
    line = LINES[name]

    for credential in (admin.secret, stage.token(admin.secret)):
        answer = put(stage, credential, question(name, things))

        if line.needs is not None and not set(line.needs) & set(EVERYTHING):
            assert outcome(answer) == FORBIDDEN
        elif line.is_always_open:
            assert answer.status_code == 200
        else:
            assert (answer.status_code, code_of(answer)) == (409, "organization_not_bootstrapped")
            assert "/bootstrap" in answer.json()["detail"]
            assert "coatcheck orgs bootstrap" in answer.json()["detail"]
    assert stage.of_organization(organization, is_used=True) == before


@pytest.mark.parametrize(
    "name", [name for name in NAMES if LINES[name].names_organization == "body"]
)
def test_the_operator_makes_nothing_in_an_organization_that_is_not_bootstrapped(
    stage: Stage, name: str
) -> None:
    if name == "POST /keys/search":
        return
    organization = stage.organization("new", is_bootstrapped=False)
    things = replace(things_of(stage, organization), of=organization)
    operator = stage.api_key(
        stage.deployment.organization_id, OPERATOR, *EVERYTHING, "read", audiences=BOTH
    )
    before = stage.of_organization(organization, is_used=True)

    answer = put(stage, operator.secret, question(name, things))

    assert (answer.status_code, code_of(answer)) == (409, "organization_not_bootstrapped")
    assert stage.of_organization(organization, is_used=True) == before


def test_bootstrapping_is_done_once(stage: Stage) -> None:
    """The second time gives nobody a second admin key."""
    organization = stage.organization("new", is_bootstrapped=False)
    operator = stage.api_key(stage.deployment.organization_id, OPERATOR)
    path = f"/organizations/{organization}/bootstrap"

    first, second = (stage.ask(operator.secret, "POST", path) for _ in range(2))

    assert (first.status_code, second.status_code) == (201, 409)
    assert code_of(second) == "already_bootstrapped"
    (admin,) = stage.api_key_rows(organization).values()
    assert set(admin["scopes"].split()) == set(EVERYTHING)
    assert admin["audiences"] == MANAGEMENT
