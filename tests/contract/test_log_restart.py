"""What a restore asks of every database; runs over STORES.  contract.md, revocation."""

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from coatcheck.server.changes import Change, What
from coatcheck.server.store import STORES, Store, migrations, open_store
from coatcheck.server.store.tables import ChangeRow, Deployment
from support.deployment import ISSUER, NOON, TESTER

FAR = 2**32 + 5
#: By scheme: the URL of a database of its own.  A new store has its line here.
URLS: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {
    "sqlite": lambda _, folder: f"sqlite:///{folder}/store.db",
    "postgresql": lambda request, _: request.getfixturevalue("postgres").new_database(),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store with a deployment and three changes."""
    with closing(open_store(URLS[request.param](request, tmp_path))) as made:
        made.upgrade(create=True)
        with made.transaction() as tx:
            tx.add(Deployment(issuer=ISSUER, log="first", created_at=NOON))
            tx.append([a_change("a"), a_change("b"), a_change("c")])
        yield made


def a_change(subject: str) -> Change:
    return Change(What.API_KEY_DISABLED, subject, TESTER, NOON, change_id=f"change of {subject}")


def test_a_log_goes_on_under_another_name_and_far_above(store: Store) -> None:
    """The next row has the next number; what was there stays."""
    with store.transaction() as tx:
        tx.rename_log("second", FAR)
        tx.append([a_change("d")])
        last = tx.last_change()
    with store.transaction() as tx:
        tx.append([a_change("e")])
        rows = tx.changes_after(-1, 10)
    store.close()

    assert last is not None
    assert last.seq == FAR + 1
    assert [row.subject for row in rows] == ["a", "b", "c", "d", "e"]
    assert rows[-1].seq == FAR + 2
    assert (store.log(), store.head()) == ("second", FAR + 2)


def test_a_new_name_that_was_not_committed_is_none(store: Store) -> None:
    """A restart that failed leaves the log as it was; its numbers only ever rise."""
    with suppress(RuntimeError), store.transaction() as tx:
        tx.rename_log("second", FAR)
        raise RuntimeError
    with store.transaction() as tx:
        tx.append([a_change("d")])
    store.close()

    assert store.log() == "first"
    assert store.head() > 3


def test_rows_are_read_from_a_place_on(store: Store) -> None:
    """In order, and no more than asked for; read by number, known by their change."""
    with store.transaction(read_only=True) as tx:
        every = tx.changes_after(-1, 10)
        some = tx.changes_after(number(every[0]), 1)
        known = tx.known_changes(["change of a", "change of z", "change of c"])
        last = tx.last_change()
        revision = tx.revision()

    assert [row.subject for row in every] == ["a", "b", "c"]
    assert [row.subject for row in some] == ["b"]
    assert known == {"change of a", "change of c"}
    assert last is not None
    assert last.subject == "c"
    assert revision == migrations.REVISION


def number(row: ChangeRow) -> int:
    assert row.seq is not None
    return row.seq


def test_the_steps_of_an_upgrade_are_all_those_that_are_missing() -> None:
    """None at the end, all at the beginning, in order."""
    every = migrations.steps_after(None)

    assert [revision for revision, _ in every] == sorted(revision for revision, _ in every)
    assert every[-1][0] == migrations.REVISION
    assert migrations.steps_after(migrations.REVISION) == []
    assert migrations.steps_after(every[0][0]) == every[1:]


def test_the_drift_of_a_clock_is_small_or_none(store: Store) -> None:
    """One machine, one clock; None where the database has none of its own."""
    drift_s = store.clock_drift_s()

    assert drift_s is None or abs(drift_s) < 1
