"""Rights over rights: whatever is asked in whatever order, nobody gets what nobody gave it.

`stories` makes an organization with management keys of random rights and lets somebody who holds
one of them try everything, with every further secret that is told on the way.  After each step
`plain`, which shares no code with the service, compares the rows themselves.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from httpx2 import Response
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coatcheck.client_address import parse_networks
from coatcheck.restrictions import Allowance, Ask, Refusal
from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER, Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.server.issue.decide import decide
from coatcheck.server.manage import usage
from coatcheck.server.manage.authority import Bounds, rights_of
from coatcheck.server.manage.errors import Beyond
from coatcheck.server.manage.usage import Report
from coatcheck.server.store import ApiKeyRecord
from coatcheck.server.store.tables import ApiKey
from coatcheck.server.store.transaction import Reported
from rights import plain
from rights.cast import CATALOG, MANAGEMENT, PRODUCT, Made, Stage, a_product, code_of
from support.deployment import DAY, HOUR, NOON, TESTER

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "catalogs"
CATALOGS: Final[Mapping[str, str | None]] = {
    "none": None,
    "one of everything": CATALOG,
    **{path.stem: path.read_text() for path in sorted(EXAMPLES.glob("*.toml"))},
}
#: Six stories of twelve steps for each catalog, the same ones in every run.  A story follows
#: from its number alone, which there is nothing to shrink about.
CAREFULLY: Final = settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
CREDIT: Final = 1_000_000
AN_API_KEY: Final = re.compile(r"\b[A-Za-z0-9]{1,16}_(?:[a-z0-9]{1,16}_)?[0-9A-Za-z]{38}\b")
#: Columns that say what an API key is good for.
RIGHTS: Final = (
    *("environment", "scopes", "audiences", "expires_at", "networks", "project_id", "role"),
    *("models", "group_id", "credit_limit", "organization_id"),
)
PLATFORM: Final = (OPERATOR, RESOURCE_SERVER)

NETWORKS: Final[tuple[tuple[str, ...] | None, ...]] = (
    None,
    ("192.0.2.0/24",),
    ("192.0.2.10/32",),
    ("192.0.0.0/16", "2001:db8::/32"),
    ("0.0.0.0/0",),
)
OTHER_NETWORKS: Final = (*NETWORKS, ("2001:db8:1::/48",), ("*",), ("198.51.100.0/24",))
ENDS: Final = (None, NOON + HOUR, NOON + DAY, NOON + 30 * DAY)


@pytest.fixture(scope="module", params=CATALOGS)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with a_product(tmp_path_factory.mktemp("wider"), CATALOGS[request.param]) as made:
        yield made


# --- what there is to choose from


def scopes_of(catalog: Catalog) -> list[str]:
    """Scope-tokens of the product: bare, named, filtered, and all of them."""
    if catalog.permissions is None:
        return ["*", "read", "write", "read@PLACE/Site/1", "read@PLACE/Site/#", "*@PLACE/Site/1"]
    found = ["*", *list(catalog.permissions)[:6], *catalog.named_scopes]
    if "PLACE" in catalog.resource_types:
        found += ["read@PLACE/Site/1", "read@PLACE/Site/#", "write@PLACE/Site/1", "*@PLACE/Site/1"]
    return found


def fitting(
    scopes: Sequence[str], audiences: Sequence[str], catalog: Catalog
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of the scopes that mean something there, and those audiences where one does."""

    def means(scope: str, audience: str) -> bool:
        return bool(plain.rights_at(audience, scope, catalog))

    here = tuple(dict.fromkeys(s for s in scopes if any(means(s, a) for a in audiences)))
    there = tuple(dict.fromkeys(a for a in audiences if any(means(s, a) for s in here)))
    return here, there


@dataclass(slots=True)
class World:
    """An organization, and somebody who tries.

    Attributes:
        devices: members and theirs, that have no API key yet.
        secrets: what that somebody knows, by the id of the API key.
    """

    stage: Stage
    chance: Random
    organization: str
    projects: list[str]
    members: list[str]
    groups: list[str]
    devices: list[tuple[str, str]]
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def catalog(self) -> Catalog:
        return self.stage.deployment.catalog

    def one(self, values: Sequence[Any]) -> Any:
        return self.chance.choice(values)

    def some(self, values: Sequence[Any], least: int = 0, most: int = 3) -> list[Any]:
        many = self.chance.randint(least, max(least, min(most, len(values))))
        return self.chance.sample(values, many)

    def audiences(self, environment: str) -> list[str]:
        return [
            one.id
            for one in self.catalog.audiences.values()
            if one.environment in (None, environment) and one.id != MANAGEMENT
        ]

    # --- API keys as they are to begin with

    def columns(self, environment: str, networks: Sequence[Any] = NETWORKS) -> dict[str, Any]:
        catalog = self.catalog
        models = list(catalog.models or ("large", "small"))[:3]
        roles = [None] * 4 + [offer.permission for offer in catalog.roles.values()]
        return {
            "environment": environment,
            "networks": self.one(networks),
            "expires_at": self.one(ENDS),
            "project_id": self.one([None] * 4 + self.projects),
            "permissions": self.one(roles),
            "models": self.one([None] * 3 + [(models[0],), tuple(models)]),
            "group_id": self.one([None] * 4 + self.groups),
            "credit_limit": self.one([None, None, 10 * CREDIT, 100 * CREDIT]),
        }

    def a_manager(self) -> Made:
        """An API key for management, with random rights."""
        environment = self.one(self.catalog.environments)
        audiences = [MANAGEMENT, *self.some(self.audiences(environment))]
        wanted = ["keys:write", *self.some(ORGANIZATION_PERMISSIONS, most=4)]
        wanted += self.some(scopes_of(self.catalog))
        scopes, there = fitting(wanted, audiences, self.catalog)
        columns = self.columns(environment)
        return self.stage.api_key(self.organization, *scopes, audiences=there, **columns)

    def a_bystander(self) -> Made:
        """An API key whose secret nobody has told."""
        environment = self.one(self.catalog.environments)
        audiences = [MANAGEMENT, *self.some(self.audiences(environment))]
        wanted = ["keys:read", *self.some(ORGANIZATION_PERMISSIONS)]
        wanted += self.some(scopes_of(self.catalog))
        scopes, there = fitting(wanted, audiences, self.catalog)
        columns = self.columns(environment, OTHER_NETWORKS)
        if self.devices and self.one([False, True]):
            member_id, device = self.devices.pop()
            columns |= {"kind": "device", "member_id": member_id, "device": device}
        return self.stage.api_key(self.organization, *scopes, audiences=there, **columns)

    def able(self, rows: Mapping[str, plain.Row]) -> list[str]:
        """Those whose secrets are known that can call at all; now and then, one that cannot."""
        able = [
            one
            for one in self.secrets
            if rows[one]["state"] == "active" and MANAGEMENT in rows[one]["audiences"].split(" ")
        ]
        return able if able and self.one([True] * 9 + [False]) else list(self.secrets)

    # --- what may be tried

    def body(self) -> dict[str, Any]:
        """What is wanted of an API key; some of it."""
        environment = self.one(self.catalog.environments)
        audiences = self.some([MANAGEMENT, *self.audiences(environment)], 1)
        pool = [*ORGANIZATION_PERMISSIONS, *scopes_of(self.catalog)]
        wanted = self.some(pool, 1, 4)
        if self.one([False] * 7 + [True]):
            wanted.append(self.one(PLATFORM))
        scopes, there = fitting(wanted, audiences, self.catalog)
        columns = self.columns(environment, OTHER_NETWORKS)
        end, credit = columns["expires_at"], columns["credit_limit"]
        if set(wanted) & set(PLATFORM):
            scopes = tuple(wanted)
        body: dict[str, Any] = {
            "env": environment,
            "scopes": list(scopes) or wanted,
            "audiences": list(there) or audiences,
            "cidrs": columns["networks"] and list(columns["networks"]),
            "expiresAt": None if end is None else f"{end - NOON}s",
            "project": columns["project_id"],
            "permissions": columns["permissions"],
            "models": columns["models"] and list(columns["models"]),
            "group": columns["group_id"],
            "creditLimit": None if credit is None else credit // CREDIT,
        }
        return body

    def like(self, row: plain.Row) -> dict[str, Any]:
        """As narrow as this API key on every axis, so that something comes into being."""
        credit = row["credit_limit"]
        scopes = self.some(row["scopes"].split(), 1, 9)
        scopes, audiences = map(list, fitting(scopes, row["audiences"].split(), self.catalog))
        return {
            "env": row["environment"],
            "scopes": scopes,
            "audiences": audiences,
            "cidrs": row["networks"] and row["networks"].split(),
            "expiresAt": "1800s",
            "project": row["project_id"],
            "permissions": row["role"],
            "models": row["models"] and row["models"].split(),
            "group": row["group_id"],
            "creditLimit": credit and credit // CREDIT // 4,
        }


def by_number(number: int) -> Random:
    """The same choices each time."""
    return Random(number)  # noqa: S311 - nothing secret comes of it


DEVICES: Final = ("a-laptop", "a-phone")
#: A request: method, path, body.
Try = tuple[str, str, dict[str, Any] | None]


def _create(world: World, caller: plain.Row) -> Try:
    """Within the caller, but for an axis or two."""
    wanted = world.body()
    body = world.like(caller) | {name: wanted[name] for name in world.some(list(wanted), most=2)}
    scopes, audiences = fitting(body["scopes"], body["audiences"], world.catalog)
    if scopes and not set(body["scopes"]) & set(PLATFORM):
        body |= {"scopes": list(scopes), "audiences": list(audiences)}
    return "POST", "/keys", body | {"name": "made"}


def _edit(world: World, caller: plain.Row) -> Try:
    body = world.body()
    body.pop("env", None)
    kept = world.some(list(body), least=1, most=2)
    return "PATCH", f"/keys/{_target(world, caller)}", {name: body[name] for name in kept}


def _narrow_then_widen(world: World, caller: plain.Row) -> Try:
    """Takes the limits off, one by one."""
    limit = world.one(["project", "permissions", "cidrs", "models", "group", "creditLimit"])
    return "PATCH", f"/keys/{_target(world, caller)}", {limit: None}


def _target(world: World, caller: plain.Row) -> str:
    known = world.stage.api_key_rows(world.organization)
    return str(world.one([*known, caller["id"]]))


def _on_key(action: str, body: dict[str, Any] | None = None) -> Callable[[World, plain.Row], Try]:
    def tried(world: World, caller: plain.Row) -> Try:
        return "POST", f"/keys/{_target(world, caller)}/{action}", body

    return tried


def _delete(world: World, caller: plain.Row) -> Try:
    return "DELETE", f"/keys/{_target(world, caller)}", None


def _search(world: World, caller: plain.Row) -> Try:
    query = world.one(["key", "made", _target(world, caller)])
    return "POST", "/keys/search", {"query": query}


def _sign_in(world: World, caller: plain.Row) -> Try:
    body: dict[str, Any] = {"name": "a device"}
    if world.one([True, False]):
        body["member"] = world.one(world.members)
    if world.one([True, False, False]):
        body["currentKey"] = world.one(list(world.secrets.values()))
    return "PUT", f"/devices/{world.one(DEVICES)}/key", body


def _add_member(world: World, caller: plain.Row) -> Try:
    role = world.one(["admin", "developer", "viewer"])
    email = f"{len(world.members)}@example.com"
    return "POST", "/members", {"name": "New", "email": email, "role": role}


def _edit_member(world: World, caller: plain.Row) -> Try:
    role = world.one(["admin", "developer", "viewer"])
    return "PATCH", f"/members/{world.one(world.members)}", {"role": role}


def _members_key(world: World, caller: plain.Row) -> Try:
    base = world.like(caller)
    for name in ("scopes", "audiences", "env"):
        base.pop(name, None)
    scopes = world.some(["keys:read", "keys:read", "usage:read", "org:admin", OPERATOR], most=2)
    member = world.one(world.members)
    return "POST", "/keys", base | {"name": "own", "member": member, "scopes": scopes}


def _connect(world: World, caller: plain.Row) -> Try:
    client = world.one(["cursor", "claude-code", "chatgpt"])
    return "POST", "/mcp/connections", {"client": client, "reuse": world.one([True, False])}


TRIES: Final[tuple[Callable[[World, plain.Row], Try], ...]] = (
    *(_create, _create, _create, _edit, _edit, _narrow_then_widen, _search),
    *(_on_key("rotate", {"overlap": "0"}), _on_key("rotate", {"overlap": "1h"})),
    *(_on_key("disable"), _on_key("enable"), _on_key("reveal"), _on_key("revoke")),
    *(_delete, _sign_in, _sign_in, _add_member, _edit_member, _members_key, _connect),
)


# --- the oracle


@dataclass(frozen=True, slots=True)
class Before:
    """What was there when a request began."""

    caller: plain.Row
    rows: Mapping[str, plain.Row]
    credit_left: int | None


def spent_by(stage: Stage, api_key_id: str) -> int:
    rows = stage.rows("SELECT credits FROM api_key_usage WHERE api_key_id = ?", api_key_id)
    return sum(row["credits"] for row in rows)


def credit_left(stage: Stage, row: plain.Row, rows: Mapping[str, plain.Row]) -> int | None:
    """What an API key has left to give: less what it used, gave, and had used by what is gone."""
    if row["credit_limit"] is None:
        return None
    left = int(row["credit_limit"]) - spent_by(stage, row["id"])
    for child in rows.values():
        if child["created_by"] == row["id"]:
            is_gone = child["revoked_at"] is not None or child["deleted_at"] is not None
            left -= spent_by(stage, child["id"]) if is_gone else child["credit_limit"] or 0
    return max(0, left)


def exceptions_of(caller: plain.Row, row: plain.Row, catalog: Catalog) -> plain.Exceptions:
    """What the contract lets this caller give beyond its own."""
    here = plain.rights_at(MANAGEMENT, caller["scopes"], catalog)
    is_admin = plain.covers(here, ("org:admin", None))
    of_a_device: frozenset[tuple[str, plain.Right]] = frozenset()
    if row["kind"] == "device" and catalog.device_scopes is not None:
        audience = catalog.default_audiences[row["environment"]]
        scopes = str(catalog.device_scopes)
        rights = plain.rights_at(audience, scopes, catalog)
        of_a_device = frozenset((audience, right) for right in rights)
    is_default = caller["environment"] == catalog.default_environment
    return plain.Exceptions(is_admin, is_admin and is_default, of_a_device)


def told_keys(stage: Stage, answer: Response) -> dict[str, str]:
    """The secrets that an answer tells, by the id of their API key."""
    found = {}
    for text in set(AN_API_KEY.findall(answer.text)):
        digest = sha256(text.encode()).digest()
        for row in stage.rows("SELECT api_key_id FROM api_key_secrets WHERE digest = ?", digest):
            found[str(row["api_key_id"])] = text
    return found


def gained(
    catalog: Catalog, before: Before, after: Mapping[str, plain.Row], told: Mapping[str, str]
) -> Iterator[str]:
    """What somebody got that was not theirs to have; nothing, if all is well."""
    caller = before.caller
    for api_key_id, row in after.items():
        old = before.rows.get(api_key_id)
        is_new = old is None
        is_changed = old is not None and any(old[name] != row[name] for name in RIGHTS)
        is_revived = old is not None and (
            (old["disabled_at"] is not None and row["disabled_at"] is None)
            or (old["revoked_at"] is not None and row["revoked_at"] is None)
            or (old["deleted_at"] is not None and row["deleted_at"] is None)
        )
        is_wider = old is not None and bool(plain.axes_beyond(row, old, catalog))
        if not (is_new or is_revived or is_wider or is_changed or api_key_id in told):
            continue
        # A smaller role takes from a member's API keys, whatever else they may.
        is_taken = is_changed and not is_wider and row["kind"] == "member"
        if is_taken and api_key_id not in told and not is_revived:
            continue
        beyond = plain.axes_beyond(row, caller, catalog, exceptions_of(caller, row, catalog))
        yield from (f"{api_key_id}: {axis}" for axis in sorted(beyond))
        if (is_new or is_changed) and any(
            one.startswith("coatcheck:") for one in row["scopes"].split(" ")
        ):
            yield f"{api_key_id}: a platform permission"
        if before.credit_left is not None and (is_new or is_changed):
            limit, had = row["credit_limit"], None if old is None else old["credit_limit"]
            if limit is None or (limit > before.credit_left and limit != had):
                yield f"{api_key_id}: credit"
    own = after.get(caller["id"])
    if own is not None:
        wider = plain.axes_beyond(own, caller, catalog)
        yield from (f"itself: {axis}" for axis in sorted(wider))
        limit, had = own["credit_limit"], caller["credit_limit"]
        if had is not None and (limit is None or limit > had):
            yield "itself: credit"


# --- stories


def _a_world(stage: Stage, chance: Random) -> World:
    may_keep = stage.deployment.catalog.policies.recoverable
    organization = stage.organization("A story's", recoverable=may_keep)
    members = [stage.member(organization, role) for role in ("admin", "viewer")]
    return World(
        stage,
        chance,
        organization,
        [stage.project(organization) for _ in range(2)],
        members,
        [stage.group("plain"), stage.group("gold")],
        [(member, device) for member in members for device in DEVICES],
    )


def _spend(world: World, number: int) -> None:
    """A resource server tells that something was used."""
    deployment = world.stage.deployment
    key = world.one(list(world.stage.api_key_rows(world.organization)))
    used = Reported(1, 0, 0, world.one([1, 5]) * CREDIT, 0, deployment.now)
    report = Report(f"{world.organization} {number}", key, used)
    usage.report(deployment.store, deployment.catalog, [report], TESTER, now=deployment.now)


@CAREFULLY
@given(story=st.integers(0, 2**32))
def test_no_story_gives_anybody_what_it_had_not(stage: Stage, story: int) -> None:
    """Made, changed, awakened or told: nothing lies beyond the caller, as it was then."""
    world = _a_world(stage, by_number(story))
    catalog = world.catalog
    for made in [world.a_manager() for _ in range(2)]:
        world.secrets[made.id] = made.secret
    members_key = stage.members_key(world.one(world.members))
    world.secrets[members_key.id] = members_key.secret
    for _ in range(3):
        world.a_bystander()
    for number in range(12):
        if world.one([True] + [False] * 5):
            _spend(world, number)
            continue
        rows = stage.api_key_rows(world.organization)
        caller = rows[world.one(world.able(rows))]
        before = Before(caller, rows, credit_left(stage, caller, rows))
        method, path, body = world.one(TRIES)(world, caller)

        answer = stage.ask(world.secrets[caller["id"]], method, path, body)

        assert answer.status_code < 500, answer.text
        told = told_keys(stage, answer)
        after = stage.api_key_rows(world.organization)
        found = list(gained(catalog, before, after, told))
        assert not found, (method, path, body, dict(caller), answer.text)
        if answer.status_code in (400, 401, 403, 404, 409, 412, 422, 428):
            assert after == rows
            assert not told
        world.secrets |= told
        if (method, path, answer.status_code) == ("POST", "/members", 201):
            world.members.append(answer.json()["id"])


# --- attacks by name


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The product that has one of everything."""
    with a_product(tmp_path_factory.mktemp("acme")) as made:
        yield made


ALL: Final = tuple(ORGANIZATION_PERMISSIONS)
ADMIN_KEY: Final = {"name": "more", "scopes": ["org:admin"], "audiences": [MANAGEMENT]}


def scopes_in(stage: Stage, made: Made | str, organization: str) -> set[str]:
    api_key_id = made if isinstance(made, str) else made.id
    return set(stage.api_key_rows(organization)[api_key_id]["scopes"].split(" "))


def test_a_token_gives_no_more_than_it_may_itself(acme: Stage) -> None:
    """Whoever asked for a narrow token meant that nobody who takes it gets more."""
    organization = acme.organization("Narrow")
    admin = acme.api_key(organization, *ALL)
    other_admin = acme.api_key(organization, *ALL)
    narrow = acme.token(admin.secret, scope="keys:write")

    refused = [
        acme.ask(narrow, "POST", "/keys", ADMIN_KEY),
        acme.ask(narrow, "POST", "/keys", ADMIN_KEY | {"scopes": ["keys:read"]}),
        acme.ask(narrow, "POST", f"/keys/{other_admin.id}/rotate", {"overlap": "0"}),
        acme.ask(narrow, "POST", f"/keys/{admin.id}/rotate", {"overlap": "1h"}),
    ]

    assert [answer.status_code for answer in refused] == [403] * 4
    assert {code_of(answer) for answer in refused} == {"beyond_your_rights"}
    within = acme.ask(narrow, "POST", "/keys", ADMIN_KEY | {"scopes": ["keys:write"]})
    assert within.status_code == 201


@pytest.mark.parametrize("ending", ["revoke", "delete"])
def test_credit_that_was_used_does_not_come_back(acme: Stage, ending: str) -> None:
    """Else a limit is none: make, use, end, and again."""
    organization, deployment = acme.organization("Thrifty"), acme.deployment
    manager = acme.api_key(organization, "keys:write", credit_limit=10 * CREDIT)
    body = {"name": "child", "scopes": ["keys:write"], "audiences": [MANAGEMENT], "creditLimit": 10}
    child = acme.ask(manager.secret, "POST", "/keys", body).json()["id"]
    used = Reported(1, 0, 0, 7 * CREDIT, 0, NOON)
    report = Report(f"used {child}", child, used)
    usage.report(deployment.store, deployment.catalog, [report], TESTER, now=NOON)
    if ending == "revoke":
        ended = acme.ask(manager.secret, "POST", f"/keys/{child}/revoke")
    else:
        ended = acme.ask(manager.secret, "DELETE", f"/keys/{child}", query={"confirm": "true"})
    assert ended.status_code in (200, 204)

    again = acme.ask(manager.secret, "POST", "/keys", body)
    rest = acme.ask(manager.secret, "POST", "/keys", body | {"creditLimit": 3})

    assert (again.status_code, code_of(again)) == (403, "beyond_your_rights")
    assert rest.status_code == 201


def test_credit_is_given_once_whoever_made_the_api_keys(acme: Stage) -> None:
    """Raising the limits of API keys that others made is giving, too."""
    organization = acme.organization("Thrifty")
    manager = acme.api_key(organization, "keys:write", credit_limit=10 * CREDIT)
    others = [acme.api_key(organization, "keys:write", credit_limit=CREDIT) for _ in range(4)]

    for other in others:
        acme.ask(manager.secret, "PATCH", f"/keys/{other.id}", {"creditLimit": 10})

    rows = acme.api_key_rows(organization)
    raised = sum(rows[other.id]["credit_limit"] - CREDIT for other in others)
    assert raised <= 10 * CREDIT


def test_whoever_gave_credit_still_manages_what_got_it(acme: Stage) -> None:
    """What an API key has of its maker's credit is not asked for a second time."""
    organization = acme.organization("Thrifty")
    manager = acme.api_key(organization, "keys:write", credit_limit=10 * CREDIT)
    body = {"name": "child", "scopes": ["keys:write"], "audiences": [MANAGEMENT], "creditLimit": 8}
    child = acme.ask(manager.secret, "POST", "/keys", body).json()["id"]

    renamed = acme.ask(manager.secret, "PATCH", f"/keys/{child}", {"name": "renamed"})
    rotated = acme.ask(manager.secret, "POST", f"/keys/{child}/rotate", {"overlap": "0"})
    raised = acme.ask(manager.secret, "PATCH", f"/keys/{child}", {"creditLimit": 10})
    too_far = acme.ask(manager.secret, "PATCH", f"/keys/{child}", {"creditLimit": 11})
    itself = acme.ask(manager.secret, "PATCH", f"/keys/{manager.id}", {"name": "renamed"})

    told = [answer.status_code for answer in (renamed, rotated, raised, too_far, itself)]
    assert told == [200, 200, 200, 403, 200]


#: What the holder of an API key may try on the key itself.
WIDER: Final[tuple[dict[str, Any], ...]] = (
    {"scopes": ["*"]},
    {"scopes": list(ALL)},
    {"scopes": ["org:admin", "keys:write", "read"], "audiences": [MANAGEMENT, PRODUCT]},
    {"scopes": ["org:admin", "keys:write", OPERATOR]},
    {"scopes": ["org:admin", "keys:write", RESOURCE_SERVER]},
    {"cidrs": None},
    {"cidrs": ["*"]},
    {"cidrs": ["192.0.0.0/8"]},
    {"cidrs": ["192.0.2.0/24", "::/0"]},
    {"expiresAt": None},
    {"expiresAt": "3650d"},
    {"project": None},
    {"permissions": None},
    {"models": None},
    {"models": ["large", "small"]},
    {"group": None},
    {"creditLimit": None},
    {"creditLimit": 1000},
)


@pytest.mark.parametrize("wanted", WIDER, ids=repr)
@pytest.mark.parametrize("scopes", [("keys:write",), ("org:admin", "keys:write")], ids=repr)
def test_nobody_widens_itself(acme: Stage, scopes: tuple[str, ...], wanted: dict[str, Any]) -> None:
    """Not even who may give anything: what it gives has a name of its own."""
    organization = acme.organization("Vain")
    own = acme.api_key(
        organization,
        *scopes,
        networks=("192.0.2.0/24",),
        expires_at=NOON + DAY,
        project_id=acme.project(organization),
        permissions="member",
        models=("small",),
        group_id=acme.group(),
        credit_limit=5 * CREDIT if "creditLimit" in wanted else None,
    )
    before = acme.api_key_rows(organization)[own.id]
    token = acme.token(own.secret)

    for credential in (own.secret, token):
        answer = acme.ask(credential, "PATCH", f"/keys/{own.id}", wanted)

        assert (answer.status_code, code_of(answer)) in (
            (403, "beyond_your_rights"),
            # A platform permission may be unknown to who must not give it.
            (400, "invalid_input"),
        )
        assert acme.api_key_rows(organization)[own.id] == before


def test_membership_gives_what_the_catalog_says_and_no_more(acme: Stage) -> None:
    """A device key that an administrator has widened is not a viewer's to take."""
    organization = acme.organization("Signed in")
    viewer = acme.member(organization, "viewer")
    own = acme.members_key(viewer)
    device = acme.device_key(
        viewer,
        organization,
        "a-laptop",
        scopes=("reader", "billing:manage", "org:admin"),
        audiences=(PRODUCT, MANAGEMENT),
    )

    answer = acme.ask(own.secret, "PUT", "/devices/a-laptop/key", {"name": "mine"})

    taken = told_keys(acme, answer)
    row = acme.api_key_rows(organization)[device.id]
    assert not taken or set(row["scopes"].split(" ")) <= {"reader", "read"}


@pytest.mark.parametrize("permission", PLATFORM)
@pytest.mark.parametrize("action", ["rotate", "reveal", "enable", "edit"])
def test_an_api_key_of_the_platform_is_out_of_reach(
    acme: Stage, permission: str, action: str
) -> None:
    """For administrators of the operator's organization, and for its other machines."""
    operators = acme.deployment.organization_id
    platform = acme.api_key(operators, permission)
    callers = [
        acme.deployment.initialized.key,
        acme.api_key(operators, *ALL).secret,
        acme.api_key(operators, "*").secret,
        acme.api_key(operators, *ALL, OPERATOR).secret,
        acme.api_key(operators, *ALL, *PLATFORM).secret,
    ]
    method, path, body = {
        "rotate": ("POST", f"/keys/{platform.id}/rotate", {"overlap": "1h"}),
        "reveal": ("POST", f"/keys/{platform.id}/reveal", None),
        "enable": ("POST", f"/keys/{platform.id}/enable", None),
        "edit": ("PATCH", f"/keys/{platform.id}", {"cidrs": ["192.0.2.0/24"]}),
    }[action]
    before = acme.api_key_rows(operators)[platform.id]

    for caller in callers:
        answer = acme.ask(caller, method, path, body)
        assert (answer.status_code, code_of(answer)) == (403, "beyond_your_rights")
        assert not told_keys(acme, answer)
    assert acme.api_key_rows(operators)[platform.id] == before


@pytest.mark.parametrize("permission", [*PLATFORM, "coatcheck:*", "coatcheck:anything"])
def test_no_machine_gives_a_platform_permission(acme: Stage, permission: str) -> None:
    """Local command line or a person of the operator's: nobody else, whatever it has."""
    operators = acme.deployment.organization_id
    customers = acme.organization("A customer")
    member = acme.member(operators, "admin")
    callers = [
        acme.deployment.initialized.key,
        acme.api_key(operators, "*").secret,
        acme.api_key(operators, *ALL, *PLATFORM).secret,
        acme.members_key(member).secret,
        acme.api_key(customers, *ALL).secret,
        # A customer's own people, even with a permission that they should never have got.
        acme.members_key(acme.member(customers, "admin"), *ALL, OPERATOR).secret,
    ]
    before = {one: acme.api_key_rows(one) for one in (operators, customers)}
    body = {"name": "more", "scopes": [permission], "audiences": [MANAGEMENT]}

    for caller in callers:
        for organization in (operators, customers):
            named = body | {"organization": organization}
            answer = acme.ask(caller, "POST", "/keys", named)
            assert answer.status_code in (400, 403, 404)
        for own in (acme.member(operators, "admin"), acme.member(customers, "admin")):
            answer = acme.ask(caller, "POST", "/keys", {"name": "x", "member": own, **body})
            assert answer.status_code in (400, 403, 404)
    for organization, rows in before.items():
        assert acme.api_key_rows(organization) == rows


def test_a_person_of_the_operators_gives_operator_to_another(acme: Stage) -> None:
    """The one way beside the command line; and never to a customer's people."""
    operators = acme.deployment.organization_id
    person = acme.members_key(acme.member(operators, "admin"), *ALL, OPERATOR)
    other = acme.member(operators, "admin")
    body = {"name": "operator", "member": other, "scopes": [*ALL, OPERATOR]}

    given = acme.ask(person.secret, "POST", "/keys", body)

    assert given.status_code == 201
    assert OPERATOR in scopes_in(acme, given.json()["id"], operators)


def test_without_a_catalog_a_star_is_no_platform_permission(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with a_product(tmp_path_factory.mktemp("free"), None) as stage:
        organization = stage.deployment.organization_id
        star = stage.api_key(organization, "*")
        for permission in (*PLATFORM, "coatcheck:*", "coatcheck:operator@PLACE/1"):
            body = {"name": "more", "scopes": [permission], "audiences": [MANAGEMENT]}
            answer = stage.ask(star.secret, "POST", "/keys", body)
            assert answer.status_code in (400, 403)
            assert permission not in stage.ask(star.secret, "GET", "/keys").text


# --- the same `narrow`


@settings(CAREFULLY, max_examples=400)
@given(number=st.integers(0, 2**32))
def test_a_child_never_gets_a_token_that_its_parent_would_not(acme: Stage, number: int) -> None:
    """What `Bounds` lets pass, `decide` finds within, for whatever is asked from wherever."""
    world = World(acme, by_number(number), "org_x", ["prj_1", "prj_2"], [], ["grp_1", "grp_2"], [])
    catalog = acme.deployment.catalog
    parent = _a_row(world, "key_parent")
    child = _a_row(world, "key_child", like=parent)
    bounds = Bounds(rights_of(parent, catalog), any_scope=False, any_environment=False)
    try:
        bounds.require(rights_of(child, catalog), catalog)
    except Beyond:
        return
    audience = catalog.audiences[world.one(list(catalog.audiences))]
    asked = world.one([None, [world.one([*scopes_of(catalog), *ALL])]])
    ask = Ask(
        audience.id,
        audience.environment,
        None if asked is None else Scopes.of(asked),
        catalog.vocabulary(audience.id),
        world.one([None, "192.0.2.10", "192.0.77.1", "198.51.100.7", "2001:db8:1::5"]),
    )
    try:
        got = decide(_record(child), ask, catalog.role(child.role))
    except Refusal:
        return
    # The parent is not refused where its child is not.
    could = decide(_record(parent), ask, catalog.role(parent.role))

    assert not got.beyond(could)
    assert not plain.axes_beyond(_as_row(got), _as_row(could), catalog)


def _a_row(world: World, api_key_id: str, like: ApiKey | None = None) -> ApiKey:
    """A row with random rights; those of another one on most axes."""
    environment = world.one(world.catalog.environments) if like is None else like.environment
    audiences = [MANAGEMENT, *world.audiences(environment)]
    pool = [*ALL, *scopes_of(world.catalog)]
    scopes, there = fitting(world.some(pool, 1, 5), world.some(audiences, 1), world.catalog)
    columns = world.columns(environment, (*NETWORKS, ("2001:db8:1::/48",)))
    networks, models = columns["networks"], columns["models"]
    row = ApiKey(
        id=api_key_id,
        organization_id="org_x",
        name="x",
        environment=environment,
        scopes=" ".join(scopes or ("keys:read",)),
        audiences=" ".join(there or (MANAGEMENT,)),
        mask="...",
        created_at=NOON,
        expires_at=columns["expires_at"],
        networks=networks and " ".join(networks),
        project_id=columns["project_id"],
        role={None: None, "write": "member", "read": "viewer"}[columns["permissions"]],
        models=models and " ".join(models),
        group_id=columns["group_id"],
    )
    for name in RIGHTS:
        if like is not None and name != "credit_limit" and world.one([True, True, False]):
            setattr(row, name, getattr(like, name))
    return row


def _record(row: ApiKey) -> ApiKeyRecord:
    return ApiKeyRecord(
        digest=b"",
        secret_expires_at=None,
        id=row.id,
        organization_id=row.organization_id,
        environment=row.environment,
        scopes=Scopes.parse(row.scopes),
        audiences=tuple(row.audiences.split(" ")),
        expires_at=row.expires_at,
        disabled_at=None,
        revoked_at=None,
        organization_suspended_at=None,
        project_id=row.project_id,
        networks=None if row.networks is None else parse_networks(tuple(row.networks.split(" "))),
        role=row.role,
        models=None if row.models is None else tuple(row.models.split(" ")),
        group_id=row.group_id,
    )


def _as_row(allowance: Allowance) -> plain.Row:
    """What a token may be, as if it were a row."""
    networks, models, role = allowance.networks, allowance.models, allowance.role
    return {
        "organization_id": allowance.organization_id,
        "environment": allowance.environment,
        "scopes": str(allowance.scopes),
        "audiences": " ".join(allowance.audiences),
        "expires_at": allowance.expires_at,
        "networks": None if networks is None else " ".join(map(str, networks)),
        "project_id": allowance.project_id,
        "role": None if role is None else role.name,
        "models": None if models is None else " ".join(models),
        "group_id": allowance.group_id,
    }
