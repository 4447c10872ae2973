"""Lists of API keys: every one on exactly one page, at a cost that does not grow with their number.

The cost on SQLite is counted in steps of its virtual machine, which are the same each time; on
PostgreSQL the plan is asked whether it walks along an index.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coatcheck import apikey
from coatcheck.server.store import Store, open_store
from coatcheck.server.store.pages import MOST_SCANNED, Filter
from coatcheck.server.store.sqlite import SqliteStore
from coatcheck.server.store.tables import Organization, Project
from support.deployment import DAY, NOON

FEW = 1000
#: A million takes a minute to make: `COATCHECK_TEST_API_KEYS=1000000` when that is wanted.
MANY = int(os.environ.get("COATCHECK_TEST_API_KEYS", "20000"))
#: API keys on a page: so many of each kind are among few, too.
LIMIT = 20
#: What a page may cost more among many than among few.
BAR = 1.5
#: Steps of SQLite's machine between two counts.
_GRAIN = 10


def rows(count: int, organization_id: str = "org_1") -> Iterator[dict[str, Any]]:
    """API keys of every state, in the same proportions however many there are."""
    for number in range(count):
        state = "active" if number % 10 < 7 else ("disabled", "revoked", "deleted")[number % 10 - 7]
        ends = (None, NOON - DAY - number, NOON + number % 30 * DAY + 1)[number % 3]
        yield {
            "id": f"key_{organization_id}_{number:09d}",
            "organization_id": organization_id,
            "name": f"ci {number % 50} {'needle' if number % 500 == 1 else 'hay'}",
            "environment": ("live", "test")[number % 4 == 0],
            "scopes": "read",
            "audiences": "urn:a",
            "mask": f"ck_live_0000...{number % 10_000:04d}",
            "created_at": NOON - 100 * DAY,
            "expires_at": ends,
            "disabled_at": NOON if state == "disabled" else None,
            "revoked_at": NOON if state in ("revoked", "deleted") else None,
            "deleted_at": NOON if state == "deleted" else None,
            "state": state,
            "kind": "standard",
            "project_id": "prj_1" if number % 5 == 0 else None,
        }


def fill(store: Store, count: int, organization_id: str = "org_1") -> None:
    made = list(rows(count, organization_id))
    secrets = [
        {
            "digest": apikey.digest(f"{row['id']} secret"),
            "api_key_id": row["id"],
            "mask": row["mask"],
            "created_at": NOON,
        }
        for row in made
    ]
    with store.transaction() as tx:
        if tx.organization(organization_id) is None:
            tx.add(Organization(id=organization_id, name="Acme", created_at=NOON))
        tx.add_api_keys(made, secrets)


def every_page(store: Store, wanted: Filter, limit: int = 100) -> list[str]:
    found: list[str] = []
    after = None
    while True:
        with store.transaction(read_only=True) as tx:
            page, after = tx.api_keys_page("org_1", wanted, NOON, after, limit)
        assert len(page) <= limit
        found += [row.id for row in page]
        if after is None:
            return found


def fits(row: dict[str, Any], wanted: Filter, used: dict[str, int]) -> bool:
    """The same question, asked of one row without an index."""
    ends = row["expires_at"]
    has_ended = ends is not None and ends <= NOON
    status = (
        row["state"]
        if row["state"] in ("revoked", "deleted")
        else ("expired" if has_ended else row["state"])
    )
    text = wanted.text
    return (
        status != "deleted"
        and wanted.status in ("all", status)
        and wanted.project_id in (None, row["project_id"])
        and wanted.environment in (None, row["environment"])
        and (text is None or text in row["name"] or row["mask"].endswith(text))
        and (
            wanted.unused_since is None
            or (
                row["created_at"] < wanted.unused_since
                and used.get(row["id"], 0) < wanted.unused_since
            )
        )
        and (wanted.ends_before is None or (ends is not None and NOON < ends <= wanted.ends_before))
    )


WANTED = {
    "active": Filter(),
    "disabled": Filter(status="disabled"),
    "expired": Filter(status="expired"),
    "revoked": Filter(status="revoked"),
    "all": Filter(status="all"),
    "newest first": Filter(newest_first=True),
    "all, newest first": Filter(status="all", newest_first=True),
    "of a project": Filter(project_id="prj_1"),
    "of an environment": Filter(status="all", environment="test"),
    "by name": Filter(status="all", text="needle"),
    "by last four": Filter(status="all", text="0123"),
    "unused": Filter(status="all", unused_since=NOON - 30 * DAY),
    "ending soon": Filter(ends_before=NOON + 14 * DAY),
    "nothing": Filter(text="no such name"),
}
each_filter = pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
#: Who looks for part of a name waits longer, up to another bound (`pages`).
INDEXED = {name: wanted for name, wanted in WANTED.items() if wanted.text is None}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def listed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A few thousand API keys, some of which were used, beside those of another organization."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('pages')}/pages.db"
    else:
        url = request.getfixturevalue("postgres").new_database()
    store = open_store(url)
    store.upgrade(create=True)
    count = 3 * MOST_SCANNED
    fill(store, count)
    fill(store, 500, "org_2")
    used = {
        row["id"]: NOON - number * 7 % 60 * DAY
        for number, row in enumerate(rows(count))
        if number % 2
    }
    with store.transaction() as tx:
        tx.add(Project(id="prj_1", organization_id="org_1", name="Blue", created_at=NOON))
        tx.add_usage({one: (1, 0, at) for one, at in used.items()})
    try:
        yield store, list(rows(count)), used
    finally:
        store.close()


@each_filter
def test_every_api_key_that_fits_is_on_one_page(listed: Any, wanted: Filter) -> None:
    """None is left out between two pages, and none is told twice."""
    store, made, used = listed

    found = every_page(store, wanted, limit=97)

    assert len(found) == len(set(found))
    assert set(found) == {row["id"] for row in made if fits(row, wanted, used)}


def test_pages_are_in_order(listed: Any) -> None:
    """By id, which is by age; those with an end wanted by their end."""
    store, made, _ = listed
    ends = {row["id"]: row["expires_at"] for row in made}

    oldest, newest = every_page(store, Filter()), every_page(store, Filter(newest_first=True))
    ended = every_page(store, Filter(status="expired"))

    assert oldest == sorted(oldest)
    assert newest == oldest[::-1]
    assert [ends[one] for one in ended] == sorted(ends[one] for one in ended)


# --- the cost


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SqliteStore, SqliteStore]]:
    """Two databases that are the same but for their size."""
    folder: Path = tmp_path_factory.mktemp("sizes")
    stores = []
    for count in (FEW, MANY):
        store = SqliteStore(f"sqlite:///{folder}/{count}.db")
        store.upgrade(create=True)
        for organization in ("org_1", "org_2"):
            fill(store, count, organization)
        with store.transaction() as tx:
            tx._session.connection().exec_driver_sql("ANALYZE")
        stores.append(store)
    few, many = stores
    yield few, many
    for store in stores:
        store.close()


@contextmanager
def counted(tx: Any) -> Iterator[list[int]]:
    """Steps of SQLite's machine within the block, in units of _GRAIN."""
    connection = tx._session.connection().connection.driver_connection
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    connection.set_progress_handler(count, _GRAIN)
    try:
        yield steps
    finally:
        connection.set_progress_handler(None, _GRAIN)


@pytest.mark.parametrize("wanted", INDEXED.values(), ids=INDEXED)
def test_a_page_costs_the_same_among_many(sizes: Any, wanted: Filter) -> None:
    """The bar is 1.5; a walk that an index does not bound would cost sixty times as much."""
    costs = []
    for store in sizes:
        with store.transaction(read_only=True) as tx, counted(tx) as steps:
            tx.api_keys_page("org_1", wanted, NOON, None, LIMIT)
        costs.append(steps[0])
    few, many = costs

    assert few > 100, "something has to be counted"
    assert many <= BAR * few


@each_filter
def test_the_next_page_costs_no_more_than_the_first(sizes: Any, wanted: Filter) -> None:
    """A cursor goes on where the page before ended; it does not count its way there."""
    _, store = sizes
    with store.transaction(read_only=True) as tx, counted(tx) as steps:
        _, after = tx.api_keys_page("org_1", wanted, NOON, None, LIMIT)
        first = steps[0]
        for _ in range(3):
            if after is not None:
                _, after = tx.api_keys_page("org_1", wanted, NOON, after, LIMIT)
        following = (steps[0] - first) / 3

    assert following <= BAR * first


def test_looking_for_one_costs_the_same_among_many(sizes: Any) -> None:
    """By id and by the digest of a pasted secret."""
    costs = []
    for store, count in zip(sizes, (FEW, MANY), strict=True):
        one = f"key_org_1_{count // 2:09d}"
        with store.transaction(read_only=True) as tx, counted(tx) as steps:
            for _ in range(20):
                assert tx.api_key_by_digest(apikey.digest(f"{one} secret")).id == one
                assert tx.api_key(one).id == one
                tx._session.expire_all()
        costs.append(steps[0])
    few, many = costs

    assert many <= BAR * few


def test_events_of_an_organization_cost_the_same_among_many(sizes: Any) -> None:
    """The log is walked along its index, from its end."""
    for store in sizes:
        with store.transaction(read_only=True) as tx:
            plan = tx._session.connection().exec_driver_sql(
                "EXPLAIN QUERY PLAN SELECT seq FROM changes WHERE organization_id = 'org_1'"
                " ORDER BY seq DESC LIMIT 1000"
            )
            assert "ix_changes_organization_id_seq" in str(plan.all())
