"""`coatcheck.server.manage.api_keys`: what may be done to an API key.  answers.md K1, K4-K9."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from coatcheck import apikey, ids
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import ApiKeyView, Created, NewApiKey
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.store.tables import ChangeRow
from coatcheck.token_profile import MAX_TOKEN_BYTES
from support.deployment import AUDIENCE, DAY, HOUR, MINUTE, NOON, TESTER, Deployment, form

NEW = NewApiKey(organization_id="", name="ci-prod", scopes=("widgets:read",))
SOMEBODY = Actor("cli:somebody", "198.51.100.7", "req-1")
UNKNOWN_ID = "key_" + "0" * 22


def create(deployment: Deployment, new: NewApiKey = NEW, *, actor: Actor = TESTER) -> list[Created]:
    """Make an API key in the deployment's own organization, unless another one is named."""
    return [
        api_keys.create(
            deployment.store,
            deployment.catalog,
            replace(new, organization_id=new.organization_id or deployment.organization_id),
            actor,
            now=deployment.now,
            issuer=deployment.settings.issuer,
        )
    ]


def create_many(
    deployment: Deployment, count: int, *, organization_id: str = ""
) -> list[tuple[str, str]]:
    """Make API keys alike: their ids and secrets."""
    return list(
        api_keys.create_many(
            deployment.store,
            deployment.catalog,
            replace(NEW, organization_id=organization_id or deployment.organization_id),
            TESTER,
            now=deployment.now,
            issuer=deployment.settings.issuer,
            count=count,
        )
    )


def changes(deployment: Deployment, subject: str) -> list[ChangeRow]:
    with deployment.store.transaction(read_only=True) as tx:
        return list(tx.changes(subject))


def whats(deployment: Deployment, subject: str) -> list[str]:
    return [row.what for row in changes(deployment, subject)]


def all_api_keys(deployment: Deployment) -> list[ApiKeyView]:
    return api_keys.list_api_keys(deployment.store, organization_id=None, now=NOON, limit=10_000)


def token_status(http: TestClient, key: str) -> tuple[int, str]:
    """What the token endpoint says to a secret: status, and our code."""
    answer = http.post("/oauth/token", data=form(key))
    return answer.status_code, answer.json().get("code", "issued")


# --- create


def test_a_new_api_key_is_what_was_asked_for(deployment: Deployment) -> None:
    """Everything that is shown is what is stored."""
    asked = replace(NEW, environment="test", audiences=(AUDIENCE,), expires_at=NOON + DAY)

    (made,) = create(deployment, asked)
    shown = api_keys.show(deployment.store, made.api_key.id, now=NOON)

    assert shown == made.api_key
    assert (shown.name, shown.environment, shown.status) == ("ci-prod", "test", "active")
    assert (shown.scopes, shown.audiences) == (("widgets:read",), (AUDIENCE,))
    assert (shown.created_at, shown.expires_at, shown.last_used_at) == (NOON, NOON + DAY, None)
    assert shown.mask == apikey.mask(made.key)
    assert apikey.parse(made.key).environment == "test"
    assert ids.is_api_key_id(shown.id)


def test_absent_means_unrestricted_or_the_default(deployment: Deployment) -> None:
    """Live, the default audience, every scope, for ever."""
    (made,) = create(deployment, NewApiKey(organization_id="", name="n"))

    view = made.api_key
    assert made.key.startswith("ck_live_")
    assert (view.environment, view.audiences, view.scopes) == ("live", (AUDIENCE,), ("*",))
    assert view.expires_at is None


REFUSED = {
    "an audience nobody knows": ({"audiences": ("https://other.example",)}, "audiences"),
    "one of two audiences unknown": ({"audiences": (AUDIENCE, "x")}, "audiences"),
    "a malformed scope": ({"scopes": ('"widgets"',)}, "scopes"),
    "an empty scope": ({"scopes": ("",)}, "scopes"),
    "a scope with a wildcard in it": ({"scopes": ("widgets:*",)}, "scopes"),
    "a filter that is not canonical": ({"scopes": ("read@PLACE/%41",)}, "scopes"),
    "an environment nobody knows": ({"environment": "staging"}, "env"),
    "an expiry in the past": ({"expires_at": NOON - 1}, "expiresAt"),
    "an expiry now": ({"expires_at": NOON}, "expiresAt"),
    "an empty name": ({"name": " "}, "name"),
    "a name with a line feed": ({"name": "a\nb"}, "name"),
}


@pytest.mark.parametrize(("changed", "field"), REFUSED.values(), ids=REFUSED)
def test_what_breaks_a_rule_is_refused_and_nothing_stored(
    deployment: Deployment, changed: dict[str, object], field: str
) -> None:
    """K1, K2, K4: refused by the name of the field."""
    before = all_api_keys(deployment), deployment.store.head()

    with pytest.raises(Invalid) as refused:
        create(deployment, replace(NEW, **changed))  # type: ignore[arg-type]

    assert refused.value.field == field
    assert (all_api_keys(deployment), deployment.store.head()) == before


def test_a_refused_audience_is_answered_by_those_there_are(deployment: Deployment) -> None:
    """K1: whoever mistyped sees what to type."""
    with pytest.raises(Invalid, match=AUDIENCE):
        create(deployment, replace(NEW, audiences=("https://ap1.example.com",)))


def test_an_unknown_organization_gets_no_api_key(deployment: Deployment) -> None:
    """Nothing is stored, not even for the first of many."""
    with pytest.raises(NotFound):
        create_many(deployment, 3, organization_id="org_" + "0" * 22)

    assert len(all_api_keys(deployment)) == 1


def test_an_api_key_whose_token_would_be_too_long_is_refused(
    deployment: Deployment, http: TestClient
) -> None:
    """At the edit, where somebody reads it; every key that was made gets a token that fits.

    The token that carries all scopes decides.  The longest that is let through is searched for.
    """

    def key_with(scope_length: int) -> str:
        (made,) = create(deployment, replace(NEW, scopes=("s" * scope_length,)))
        return made.key

    fits, too_long = 1, MAX_TOKEN_BYTES
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        with suppress(Invalid):
            longest = key_with(middle)
            fits = middle
        if fits != middle:
            too_long = middle
    with pytest.raises(Invalid, match=f"scopes: .* {MAX_TOKEN_BYTES} bytes"):
        key_with(too_long)

    answer = http.post("/oauth/token", data=form(longest))

    assert fits > 1500
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["access_token"]) <= MAX_TOKEN_BYTES


@pytest.mark.parametrize("count", [1, 9_999, 10_001])
def test_many_are_made_alike_across_batches(deployment: Deployment, count: int) -> None:
    """Each its own id and secret, all of the same name; each leaves its row in the log."""
    before = deployment.store.head()

    made = create_many(deployment, count)

    assert len({key for _, key in made}) == len({key_id for key_id, _ in made}) == count
    assert deployment.store.head() == before + count
    first = api_keys.find(deployment.store, made[0][1], now=NOON)
    last = api_keys.find(deployment.store, made[-1][1], now=NOON)
    assert (first.id, last.id) == (made[0][0], made[-1][0])
    assert (first.name, first.scopes) == (last.name, last.scopes) == ("ci-prod", ("widgets:read",))


# --- list, show, find


def test_a_list_shows_the_oldest_first_and_pages_by_id(deployment: Deployment) -> None:
    """Ids sort by the time they were made."""
    for minute in range(5):
        deployment.clock.now = NOON + (minute + 1) * MINUTE
        create(deployment, replace(NEW, name=f"key {minute}"))

    first = api_keys.list_api_keys(deployment.store, organization_id=None, now=NOON, limit=3)
    rest = api_keys.list_api_keys(
        deployment.store, organization_id=None, now=NOON, after=first[-1].id
    )

    assert [view.name for view in first + rest] == ["admin", *(f"key {n}" for n in range(5))]


def test_a_list_shows_only_the_organization_that_was_asked_for(deployment: Deployment) -> None:
    """Another organization's keys do not exist."""
    create(deployment)

    for organization_id, expected in ((deployment.organization_id, 2), ("org_other", 0)):
        found = api_keys.list_api_keys(deployment.store, organization_id=organization_id, now=NOON)
        assert len(found) == expected


def test_no_secret_and_no_digest_is_ever_shown(deployment: Deployment) -> None:
    """K5: neither by show nor by list nor by a value's repr; the one time is at creation."""
    (made,) = create(deployment)
    rotated = deployment.rotate(made, overlap_s=HOUR)
    shown = api_keys.show(deployment.store, made.api_key.id, now=NOON)
    found = api_keys.find(deployment.store, rotated.key, now=NOON)

    told = [
        json.dumps(shown.to_json()),
        json.dumps(found.to_json()),
        json.dumps([view.to_json() for view in all_api_keys(deployment)]),
        repr((made, rotated, shown, found)),
    ]

    for key in (made.key, rotated.key):
        for text in told:
            assert_holds_no_secret(text, key)


def assert_holds_no_secret(text: str, key: str) -> None:
    digest = apikey.digest(key)
    assert key not in text
    assert key[8:40] not in text
    assert digest.hex() not in text.lower()
    assert repr(digest)[2:-1] not in text


def test_the_creation_shows_the_secret_once(deployment: Deployment) -> None:
    """`{"id", "key", …}`: the id first, then the key."""
    (made,) = create(deployment)

    told = made.to_json()

    assert list(told)[:2] == ["id", "key"]
    assert told["key"] == made.key


def test_a_key_tells_at_least_what_the_contract_promises(deployment: Deployment) -> None:
    """Programs read these members; times are RFC 3339 in UTC."""
    (made,) = create(deployment, replace(NEW, expires_at=NOON + DAY))

    told = made.api_key.to_json()

    assert set(told) >= {
        *("id", "name", "organization", "project", "env", "status", "scopes", "audiences"),
        *("createdAt", "expiresAt", "lastUsedAt"),
    }
    assert (told["createdAt"], told["expiresAt"]) == (
        "2027-01-15T08:00:00Z",
        "2027-01-16T08:00:00Z",
    )


OPERATIONS: dict[str, Callable[[Deployment, str], object]] = {
    "show": lambda d, i: api_keys.show(d.store, i, now=d.now),
    "disable": lambda d, i: api_keys.disable(d.store, i, TESTER, now=d.now),
    "enable": lambda d, i: api_keys.enable(d.store, i, TESTER, now=d.now),
    "revoke": lambda d, i: api_keys.revoke(d.store, i, TESTER, now=d.now),
    "rotate": lambda d, i: api_keys.rotate(d.store, i, TESTER, overlap_s=0, now=d.now),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_unknown_id_is_not_found_and_not_repeated(
    deployment: Deployment, operation: Callable[[Deployment, str], object]
) -> None:
    """K7: a kind of its own.  The text may be the API key itself, in the wrong place."""
    (made,) = create(deployment)

    for unknown in (UNKNOWN_ID, made.key, "", "%", deployment.organization_id):
        with pytest.raises(NotFound) as refused:
            operation(deployment, unknown)
        assert len(unknown) < 2 or unknown not in str(refused.value)


def test_a_secret_that_matches_nothing_is_not_found(deployment: Deployment) -> None:
    """Well-formed or not."""
    for text in (apikey.make("ck_live"), "", "\u20ac"):
        with pytest.raises(NotFound):
            api_keys.find(deployment.store, text, now=NOON)


# --- states


@pytest.fixture
def made(deployment: Deployment) -> Created:
    return deployment.api_key("widgets:read", expires_at=NOON + DAY)


def test_disabled_and_enabled_again(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """K9: no new token while it is disabled; afterwards it works as before."""
    deployment.disable(made)
    assert api_keys.show(deployment.store, made.api_key.id, now=NOON).status == "disabled"
    assert token_status(http, made.key) == (400, "api_key_disabled")

    deployment.enable(made)
    assert api_keys.show(deployment.store, made.api_key.id, now=NOON) == made.api_key
    assert token_status(http, made.key) == (200, "issued")


def test_revoked_is_final(deployment: Deployment, http: TestClient, made: Created) -> None:
    """Neither enabling nor rotating brings it back; its record stays."""
    deployment.revoke(made)

    for operation in ("disable", "enable", "rotate"):
        with pytest.raises(Conflict, match="revoked at 2027-01-15T08:00:00Z"):
            OPERATIONS[operation](deployment, made.api_key.id)

    view = api_keys.show(deployment.store, made.api_key.id, now=NOON)
    assert (view.status, view.revoked_at) == ("revoked", NOON)
    assert token_status(http, made.key) == (400, "api_key_revoked")


def test_a_disabled_api_key_can_still_be_revoked(deployment: Deployment, made: Created) -> None:
    """The final state is reached from every other."""
    deployment.disable(made)
    deployment.revoke(made)

    assert api_keys.show(deployment.store, made.api_key.id, now=NOON).status == "revoked"


def test_expired_comes_from_the_clock(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """To the second: good until its expiry, not at it."""
    deployment.clock.now = NOON + DAY - 1
    assert token_status(http, made.key) == (200, "issued")

    deployment.clock.now = NOON + DAY
    view = api_keys.show(deployment.store, made.api_key.id, now=deployment.now)
    assert view.status == "expired"
    assert token_status(http, made.key) == (400, "api_key_expired")
    with pytest.raises(Conflict, match="expired"):
        deployment.rotate(made, overlap_s=0)


TWICE = {
    "disable": ["api_key.created", "api_key.disabled"],
    "enable": ["api_key.created"],
    "revoke": ["api_key.created", "api_key.revoked"],
}


@pytest.mark.parametrize(("operation", "expected"), TWICE.items(), ids=TWICE)
def test_doing_it_twice_is_doing_it_once(
    deployment: Deployment, made: Created, operation: str, expected: list[str]
) -> None:
    """K7: idempotent; the second time changes neither the date nor the log."""
    first = OPERATIONS[operation](deployment, made.api_key.id)
    deployment.clock.now = NOON + HOUR
    second = OPERATIONS[operation](deployment, made.api_key.id)

    assert first == second
    assert whats(deployment, made.api_key.id) == expected


# --- rotate


@pytest.mark.parametrize("overlap_s", [HOUR, DAY - 1])
def test_both_secrets_work_in_the_overlap_and_only_the_new_one_after(
    deployment: Deployment, http: TestClient, made: Created, overlap_s: int
) -> None:
    """K6, at both edges of the clock: the id stays."""
    new = deployment.rotate(made, overlap_s=overlap_s)
    assert new.api_key.id == made.api_key.id

    deployment.clock.now = NOON + overlap_s - 1
    assert token_status(http, made.key) == (200, "issued")
    assert token_status(http, new.key) == (200, "issued")

    deployment.clock.now = NOON + overlap_s
    assert token_status(http, made.key) == (400, "api_key_expired")
    assert token_status(http, new.key) == (200, "issued")


def test_a_token_from_the_replaced_secret_ends_with_the_overlap(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """Never past the end of the presented secret's overlap."""
    new = deployment.rotate(made, overlap_s=TOKEN_LIFETIME)
    deployment.clock.now = NOON + TOKEN_LIFETIME - 7

    lives = [
        http.post("/oauth/token", data=form(key)).json()["expires_in"]
        for key in (made.key, new.key)
    ]

    assert lives == [7, TOKEN_LIFETIME]


def test_without_overlap_the_old_secret_is_dead_at_once(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """For a secret that leaked."""
    new = deployment.rotate(made, overlap_s=0)

    assert token_status(http, made.key) == (400, "api_key_expired")
    assert token_status(http, new.key) == (200, "issued")


def test_a_second_rotation_ends_the_overlap_of_the_first(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """A key has at most two secrets."""
    second = deployment.rotate(made, overlap_s=DAY - 1)
    third = deployment.rotate(second, overlap_s=HOUR)

    statuses = [token_status(http, key)[0] for key in (made.key, second.key, third.key)]
    view = api_keys.show(deployment.store, made.api_key.id, now=NOON)

    assert statuses == [400, 200, 200]
    masks = [apikey.mask(second.key), apikey.mask(third.key)]
    assert [secret.mask for secret in view.secrets] == masks
    assert [secret.ends_at for secret in view.secrets] == [NOON + HOUR, None]


def test_a_second_rotation_never_prolongs_an_overlap(deployment: Deployment, made: Created) -> None:
    """The first secret was promised to end; nothing gives it more time."""
    second = deployment.rotate(made, overlap_s=MINUTE)
    deployment.clock.now = NOON + HOUR
    deployment.rotate(second, overlap_s=DAY - HOUR)

    view = api_keys.show(deployment.store, made.api_key.id, now=deployment.now)

    assert apikey.mask(made.key) not in [secret.mask for secret in view.secrets]


def test_a_rotated_api_key_keeps_its_shape_and_shows_the_new_mask(
    deployment: Deployment, made: Created
) -> None:
    """Brand and environment of the secret are what scanners and routers look at."""
    new = deployment.rotate(made, overlap_s=HOUR)

    assert apikey.parse(new.key).environment == apikey.parse(made.key).environment
    assert new.api_key.mask == apikey.mask(new.key)
    assert new.key != made.key


@pytest.mark.parametrize("overlap_s", [10**12, 10**15])
def test_an_overlap_beyond_the_year_9999_is_refused(
    deployment: Deployment, made: Created, overlap_s: int
) -> None:
    """K4: such a moment cannot be written down, so the key could never be listed again."""
    with pytest.raises(Invalid):
        deployment.rotate(made, overlap_s=overlap_s)

    assert all_api_keys(deployment)[-1].to_json()["secrets"]


def test_a_rotation_while_disabled_leaves_it_disabled(
    deployment: Deployment, http: TestClient, made: Created
) -> None:
    """A new secret is no way around the owner's stop."""
    deployment.disable(made)
    new = deployment.rotate(made, overlap_s=0)

    assert token_status(http, new.key) == (400, "api_key_disabled")


# --- the change log

LOGGED: dict[str, tuple[Callable[[Deployment, str], object], list[tuple[str, bool]]]] = {
    "disable": (
        lambda d, i: api_keys.disable(d.store, i, SOMEBODY, now=d.now),
        [("api_key.disabled", True)],
    ),
    "revoke": (
        lambda d, i: api_keys.revoke(d.store, i, SOMEBODY, now=d.now),
        [("api_key.revoked", True)],
    ),
    "rotate, with an overlap longer than any token": (
        lambda d, i: api_keys.rotate(d.store, i, SOMEBODY, overlap_s=TOKEN_LIFETIME, now=d.now),
        [("api_key.rotated", False)],
    ),
    "rotate, with an overlap shorter than a token": (
        lambda d, i: api_keys.rotate(d.store, i, SOMEBODY, overlap_s=TOKEN_LIFETIME - 1, now=d.now),
        [("api_key.rotated", False), ("api_key.overlap_ended", True)],
    ),
    "rotate, without an overlap": (
        lambda d, i: api_keys.rotate(d.store, i, SOMEBODY, overlap_s=0, now=d.now),
        [("api_key.rotated", False), ("api_key.overlap_ended", True)],
    ),
}


@pytest.mark.parametrize(("operation", "expected"), LOGGED.values(), ids=LOGGED)
def test_every_change_is_logged_with_its_actor(
    deployment: Deployment,
    made: Created,
    operation: Callable[[Deployment, str], object],
    expected: list[tuple[str, bool]],
) -> None:
    """Who, from where, what; only what narrows is marked so, because it kills tokens."""
    operation(deployment, made.api_key.id)

    (_, *rows) = changes(deployment, made.api_key.id)

    assert [(row.what, row.narrows) for row in rows] == expected
    assert {(row.actor, row.address, row.request_id) for row in rows} == {
        ("cli:somebody", "198.51.100.7", "req-1")
    }
    assert {(row.at, row.organization_id) for row in rows} == {(NOON, deployment.organization_id)}


def test_a_creation_and_an_enabling_narrow_nothing(deployment: Deployment) -> None:
    """They must not kill tokens that are out there."""
    (one,) = create(deployment, actor=SOMEBODY)
    deployment.disable(one)
    api_keys.enable(deployment.store, one.api_key.id, SOMEBODY, now=NOON)

    rows = changes(deployment, one.api_key.id)

    assert [(row.what, row.narrows) for row in rows] == [
        ("api_key.created", False),
        ("api_key.disabled", True),
        ("api_key.enabled", False),
    ]
    assert rows[0].actor == rows[2].actor == "cli:somebody"


def test_no_change_row_holds_a_secret_or_a_digest(deployment: Deployment) -> None:
    """K5: the log is read by feeds, webhooks and audits."""
    made = deployment.api_key("widgets:read")
    rotated = [deployment.rotate(made, overlap_s=overlap_s).key for overlap_s in (DAY, 0)]
    keys = [deployment.initialized.key, made.key, *rotated]
    deployment.disable(made)
    deployment.enable(made)
    deployment.revoke(made)

    subjects = (made.api_key.id, deployment.initialized.key_id, deployment.organization_id)
    rows = [row for subject in subjects for row in changes(deployment, subject)]
    written = " ".join(row.model_dump_json() for row in rows)

    assert len(rows) >= 9
    for key in keys:
        assert_holds_no_secret(written, key)


def test_a_refused_change_leaves_no_row(deployment: Deployment, made: Created) -> None:
    """What is in the log is what was done."""
    deployment.revoke(made)
    before = deployment.store.head()
    with pytest.raises(Conflict):
        deployment.rotate(made, overlap_s=0)

    assert deployment.store.head() == before
