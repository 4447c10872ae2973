"""`coatcheck.server.manage.usage`: what was consumed is counted once, and ends what is spent.

Runs over every database: the sums are added by SQL.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck.server import catalog as catalogs
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import usage
from coatcheck.server.manage.forms import CREDIT
from coatcheck.server.manage.usage import Counted, Report
from coatcheck.server.settings import Settings
from coatcheck.server.store import STORES, Store, StoreUnavailable, open_store
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeyUsage,
    ChangeRow,
    Organization,
    OrganizationUsage,
)
from coatcheck.server.store.transaction import Reported
from support.deployment import DAY, HOUR, ISSUER, NOON, TESTER

CATALOG = replace(
    catalogs.without_file(Settings(issuer=ISSUER)), free_environments=frozenset({"test"})
)
REPORTER = Actor("key_reporter", "198.51.100.7", "req-1")
#: Every name in the databases of this file is new.
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class World:
    """An organization in a database, and whoever reports to it."""

    store: Store
    organization_id: str

    def api_key(self, **columns: Any) -> str:
        row: dict[str, Any] = {
            "id": f"key_{next(_numbers)}",
            "organization_id": self.organization_id,
            "name": "n",
            "environment": "live",
            "scopes": "*",
            "audiences": "urn:a",
            "mask": "...",
            "created_at": NOON,
        }
        with self.store.transaction() as tx:
            tx.add(made := ApiKey(**row | columns))
            return made.id

    def report(
        self, *reports: Report, now: int = NOON, by: Actor = REPORTER, store: Store | None = None
    ) -> Counted:
        return usage.report(store or self.store, CATALOG, reports, by, now=now)

    def limit(self, credit_limit: int | None, low_credit: int | None = None) -> None:
        """What editing the organization does."""
        with self.store.transaction() as tx:
            row = tx.organization(self.organization_id)
            assert row is not None
            row.credit_limit, row.low_credit = credit_limit, low_credit
            usage.settle_organization(tx, row, TESTER, NOON)

    def row(self, api_key_id: str) -> ApiKey:
        with self.store.transaction(read_only=True) as tx:
            found = tx.api_key(api_key_id)
            assert found is not None
            return found

    def organization(self) -> Organization:
        with self.store.transaction(read_only=True) as tx:
            found = tx.organization(self.organization_id)
            assert found is not None
            return found

    def used(self, api_key_id: str) -> Reported:
        with self.store.transaction(read_only=True) as tx:
            return sums(tx.usage([api_key_id]).get(api_key_id))

    def used_by_all(self) -> Reported:
        with self.store.transaction(read_only=True) as tx:
            return sums(tx.organization_usage(self.organization_id))

    def changes(self, subject: str | None = None) -> list[ChangeRow]:
        """Of an API key; None: of the organization itself."""
        with self.store.transaction(read_only=True) as tx:
            return list(tx.changes(subject or self.organization_id))

    def whats(self, subject: str | None = None) -> list[str]:
        return [row.what for row in self.changes(subject)]


def sums(row: ApiKeyUsage | OrganizationUsage | None) -> Reported:
    if row is None:
        return Reported()
    return Reported(*(getattr(row, name) for name in Reported._fields))


def a_report(api_key_id: str, name: str = "", *, at: int = NOON, **used: int) -> Report:
    """One that nobody has sent before, unless it is named."""
    consumed = Reported(**{"requests": 1, "last_used_at": at, **used})
    return Report(name or f"r{next(_numbers)}", api_key_id, consumed)


@pytest.fixture(scope="module", params=STORES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('usage')}/store.db"
    made: str = request.getfixturevalue("postgres").new_database()
    return made


@pytest.fixture(scope="module")
def store(url: str) -> Iterator[Store]:
    with closing(open_store(url)) as made:
        made.upgrade(create=True)
        yield made


@pytest.fixture
def world(store: Store) -> World:
    return a_world(store)


def a_world(store: Store, **columns: Any) -> World:
    row = Organization(id=f"org_{next(_numbers)}", name="Acme", created_at=NOON, **columns)
    with store.transaction() as tx:
        tx.add(row)
    return World(store, row.id)


# --- counted once

AMOUNTS = st.builds(
    Reported,
    *(st.integers(0, 10**12) for _ in range(5)),
    last_used_at=st.integers(0, NOON),
)


def test_sums_are_what_was_reported_in_any_order_and_repetition(store: Store) -> None:
    """Each report counts once, wherever and however often it arrives; no other is lost."""

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 2), AMOUNTS), min_size=1, max_size=8),
        st.lists(st.lists(st.integers(0, 7), max_size=8), max_size=4),
    )
    def holds(reported: list[tuple[int, Reported]], batches: list[list[int]]) -> None:
        world = a_world(store)
        keys = [world.api_key(), world.api_key(), world.api_key(environment="test")]
        reports = [Report(f"r{n}", keys[key], used) for n, (key, used) in enumerate(reported)]
        seen: set[int] = set()
        by = Actor(f"key_reporter_{next(_numbers)}")
        for batch in batches:
            sent = [n for n in batch if n < len(reports)]
            new = set(sent) - seen
            counted = world.report(*(reports[n] for n in sent), by=by)
            assert counted == Counted(len(new), len(sent) - len(new), ())
            seen |= new

        total = Reported()
        for place, key in enumerate(keys):
            mine = [reported[n][1] for n in seen if reported[n][0] == place]
            if place == 2:
                mine = [used._replace(credits=0) for used in mine]
            assert world.used(key) == added(mine)
            total = added([total, *mine])
        assert world.used_by_all() == total

    holds()


def added(many: Sequence[Reported]) -> Reported:
    if not many:
        return Reported()
    together = Reported(*map(sum, zip(*many, strict=True)))
    return together._replace(last_used_at=max(one.last_used_at for one in many))


def test_a_report_is_the_same_of_one_reporter_only(world: World) -> None:
    """Two resource servers number theirs from one, both."""
    key = world.api_key()
    other = Actor("key_other")

    for by in (REPORTER, other, REPORTER):
        world.report(a_report(key, "same"), by=by)

    assert world.used(key).requests == 2


def test_of_two_reports_of_one_name_the_first_counts(world: World) -> None:
    """Within one call as between two."""
    key = world.api_key()
    name = f"twice{next(_numbers)}"

    counted = world.report(a_report(key, name, requests=3), a_report(key, name, requests=5))

    assert counted == Counted(1, 1, ())
    assert world.used(key).requests == 3


def test_a_report_is_known_for_a_day(world: World) -> None:
    """Whoever was cut off for longer has to keep count; nobody can remember for ever."""
    key = world.api_key()
    report = a_report(key)

    for later, expected in ((0, 1), (DAY, 0), (DAY + 1, 1)):
        assert world.report(report, now=NOON + later).counted == expected


def test_an_api_key_that_is_none_is_told_and_stops_nobody(world: World) -> None:
    """Each once; its reports are not remembered, in case it was a restore that lost it."""
    key = world.api_key()
    deleted = world.api_key(deleted_at=NOON, revoked_at=NOON)
    lost = f"key_{next(_numbers)}"
    reports = (a_report(lost), a_report(key), a_report(lost), a_report(deleted))

    assert world.report(*reports) == Counted(2, 0, (lost,))
    assert world.used_by_all().requests == 2
    world.api_key(id=lost)
    assert world.report(*reports) == Counted(2, 2, ())


def test_the_last_use_never_goes_back_nor_into_the_future(world: World) -> None:
    """A late report is late, and a clock that is ahead is wrong."""
    key = world.api_key()

    for at, expected in ((NOON - HOUR, NOON - HOUR), (NOON + 1, NOON), (NOON - DAY, NOON)):
        world.report(a_report(key, at=at))
        assert world.used(key).last_used_at == world.used_by_all().last_used_at == expected


def test_tokens_and_reports_are_counted_side_by_side(world: World) -> None:
    """One row holds both; neither resets the other."""
    key = world.api_key()
    with world.store.transaction() as tx:
        tx.add_usage({key: (2, 1, NOON - 1)})
    world.report(a_report(key, requests=7))
    with world.store.transaction() as tx:
        tx.add_usage({key: (3, 0, NOON - 2)})

    with world.store.transaction(read_only=True) as tx:
        row = tx.usage([key])[key]
    assert (row.tokens_issued, row.raw_key_uses, row.requests) == (5, 1, 7)
    assert row.last_used_at == NOON


def test_a_sum_ends_where_the_database_would_break(world: World) -> None:
    """SQLite would go on with a float, PostgreSQL refuse every report to come."""
    key = world.api_key()
    for _ in range(5):
        world.report(a_report(key, requests=2**61, credits=2**61))

    assert world.used(key).requests == world.used_by_all().credits == 2**62


def test_those_who_report_at_once_lose_nothing(world: World, url: str) -> None:
    """And the limit is reached once, whoever reaches it."""
    keys = [world.api_key(credit_limit=40 * CREDIT) for _ in range(3)]
    world.limit(120 * CREDIT, low_credit=10 * CREDIT)
    reports = [a_report(key, credits=CREDIT) for key in keys for _ in range(40)]
    trouble: list[Exception] = []
    counted: list[int] = []

    def patiently(batch: list[Report], store: Store) -> int:
        """A machine that is busy may be too slow for a database; who reports says it again."""
        for _ in range(5):
            with suppress(StoreUnavailable):
                return world.report(*batch, store=store).counted
        return world.report(*batch, store=store).counted

    def send(batches: list[list[Report]]) -> None:
        with closing(open_store(url)) as store:
            try:
                counted.extend(patiently(batch, store) for batch in batches)
            except Exception as error:
                trouble.append(error)

    batches = [reports[start::6] for start in range(6)]
    orders = (batches, batches[::-1], batches[3:] + batches[:3])
    threads = [threading.Thread(target=send, args=(list(order),)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not trouble
    assert sum(counted) == len(reports)
    assert [world.used(key).credits for key in keys] == [40 * CREDIT] * 3
    assert world.whats() == ["credit.low", "organization.spent"]
    for key in keys:
        assert world.whats(key) == ["credit.low", "api_key.disabled"]


# --- credit

AT_LIMIT: dict[str, tuple[list[int], bool]] = {
    "just below": ([99, 900_000], False),
    "reached exactly": ([99, 1_000_000], True),
    "crossed": ([99, 1_000_001], True),
    "crossed at once": ([5_000_000_000], True),
}


@pytest.mark.parametrize(("amounts", "is_spent"), AT_LIMIT.values(), ids=AT_LIMIT)
def test_an_api_key_ends_that_reaches_its_limit(
    world: World, amounts: list[int], is_spent: bool
) -> None:
    """In the very transaction, for tokens that were made before as well."""
    key = world.api_key(credit_limit=1_000_099)
    other = world.api_key()
    for amount in amounts:
        assert world.row(key).disabled_at is None
        world.report(a_report(key, credits=amount), a_report(other, credits=amount))

    row = world.row(key)
    expected = (NOON, "quota", "disabled") if is_spent else (None, None, "active")
    assert (row.disabled_at, row.disabled_reason, row.state) == expected
    assert world.row(other).disabled_at is None
    ended = [one for one in world.changes(key) if one.what == "api_key.disabled"]
    assert [(one.narrows, json.loads(one.detail)) for one in ended] == (
        [(True, {"reason": "quota"})] if is_spent else []
    )
    # The owner is not told who the operator's resource servers are.
    assert all((one.actor, one.address) == ("service:usage", None) for one in world.changes(key))


def test_what_is_free_ends_nothing(world: World) -> None:
    """An API key of a test environment counts its requests and no credits."""
    world.limit(CREDIT, CREDIT)
    key = world.api_key(environment="test", credit_limit=1)

    world.report(a_report(key, credits=10 * CREDIT, input_tokens=5))

    assert world.used(key)._replace(last_used_at=0) == Reported(1, 5)
    assert (world.whats(), world.whats(key)) == ([], [])


@pytest.mark.parametrize("state", ["revoked", "disabled"])
def test_what_has_ended_otherwise_stays_as_it_is(world: World, state: str) -> None:
    """Raising the limit must not enable what somebody has disabled."""
    key = world.api_key(
        credit_limit=1, **{f"{state}_at": NOON - 1, "disabled_reason": "manual", "state": state}
    )

    world.report(a_report(key, credits=1))

    row = world.row(key)
    assert (row.state, row.disabled_reason) == (state, "manual")
    assert "api_key.disabled" not in world.whats(key)


def test_low_credit_is_told_once(world: World) -> None:
    """When less than a tenth is left, or what the organization asked for; not at the line."""
    key = world.api_key(credit_limit=100 * CREDIT)
    world.limit(200 * CREDIT, low_credit=150 * CREDIT)

    for amount, whats in (
        (50, ([], [])),
        (40, (["credit.low"], [])),
        (1, (["credit.low"], ["credit.low"])),
        (1, (["credit.low"], ["credit.low"])),
    ):
        world.report(a_report(key, credits=amount * CREDIT))
        assert (world.whats(), world.whats(key)) == whats

    (of_organization,), (of_key,) = world.changes(), world.changes(key)
    assert json.loads(of_organization.detail) == {"left": 110, "limit": 200}
    assert json.loads(of_key.detail) == {"left": 9, "limit": 100}
    assert {of_organization.organization_id, of_key.organization_id} == {world.organization_id}
    assert not of_organization.narrows


SETTLED: dict[str, tuple[int | None, bool]] = {
    "raised": (20, False),
    "taken away": (None, False),
    "raised too little": (10, True),
    "lowered": (5, True),
}


@pytest.mark.parametrize(("limit", "stays_spent"), SETTLED.values(), ids=SETTLED)
def test_an_organization_is_spent_until_its_limit_is_raised(
    world: World, limit: int | None, stays_spent: bool
) -> None:
    """Its API keys are left alone: there may be a million of them."""
    key = world.api_key()
    world.limit(10 * CREDIT)
    world.report(a_report(key, credits=9 * CREDIT))
    assert world.organization().credit_spent_at is None
    world.report(a_report(key, credits=CREDIT))
    world.report(a_report(key, credits=CREDIT // 2))

    assert world.organization().credit_spent_at == NOON
    assert world.row(key).disabled_at is None
    (spent,) = world.changes()
    assert (spent.what, spent.narrows) == ("organization.spent", True)
    assert json.loads(spent.detail) == {"used": 10, "limit": 10, "spent": True}

    world.limit(None if limit is None else limit * CREDIT)

    assert (world.organization().credit_spent_at is not None) == stays_spent
    settled = [] if stays_spent else ["organization.edited"]
    assert world.whats() == ["organization.spent", *settled]


def test_a_limit_below_what_is_used_spends_at_once(world: World) -> None:
    """Not at the next report only."""
    key = world.api_key()
    world.report(a_report(key, credits=2 * CREDIT))

    world.limit(2 * CREDIT)

    assert world.organization().credit_spent_at == NOON
    assert world.whats() == ["organization.spent"]


# --- how many there are

COUNTED: dict[str, tuple[dict[str, Any], str, bool]] = {
    "endless": ({}, "active", False),
    "ends soon": ({"expires_at": NOON + 1}, "active", True),
    "ends at the edge": ({"expires_at": NOON + HOUR}, "active", True),
    "ends later": ({"expires_at": NOON + HOUR + 1}, "active", False),
    "has ended": ({"expires_at": NOON}, "expired", False),
    "disabled": ({"disabled_at": NOON, "expires_at": NOON + 1}, "disabled", False),
    "disabled and ended": ({"disabled_at": NOON, "expires_at": NOON}, "expired", False),
    "revoked and ended": ({"revoked_at": NOON, "expires_at": NOON}, "revoked", False),
    "deleted": ({"revoked_at": NOON, "deleted_at": NOON}, "", False),
}


@pytest.mark.parametrize(("columns", "status", "is_expiring"), COUNTED.values(), ids=COUNTED)
def test_api_keys_are_counted_as_they_are_shown(
    world: World, columns: dict[str, Any], status: str, is_expiring: bool
) -> None:
    """By the one word of `keys list`."""

    def counts() -> tuple[dict[str, int], int]:
        with world.store.transaction(read_only=True) as tx:
            found = tx.count_api_keys(NOON, NOON + HOUR)
            assert found.last is not None
            assert tx.count_api_keys(NOON, NOON + HOUR, found.last) == (
                dict.fromkeys(found.by_status, 0),
                *(0, None),
            )
        return dict(found.by_status), found.expiring

    world.api_key(revoked_at=NOON, state="revoked")
    before, expiring = counts()
    world.api_key(**columns)
    after, expiring_after = counts()

    more = {name: after[name] - before[name] for name in after}
    assert {name for name in more if more[name]} == ({status} if status else set())
    assert expiring_after - expiring == is_expiring


# --- the log by organization


def test_events_of_no_organization_are_apart(world: World) -> None:
    """A signing key concerns the operator; whoever asks for an organization does not see it."""
    with world.store.transaction() as tx:
        tx.append(
            [
                Change(What.SIGNING_KEY_CREATED, "kid", TESTER, NOON),
                Change(What.MEMBER_ADDED, "mem_1", TESTER, NOON, world.organization_id),
            ]
        )

    with world.store.transaction(read_only=True) as tx:
        own, _ = tx.events(world.organization_id, None, 10)
        of_platform, _ = tx.events(None, None, 10, of_platform=True)
        narrowed, _ = tx.events(None, None, 10, of_platform=True, subject="mem_1")
    assert [row.what for row in own] == ["member.added"]
    assert of_platform[0].what == "signing_key.created"
    assert {row.organization_id for row in of_platform} == {None}
    assert not narrowed
