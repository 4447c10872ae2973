"""What PostgreSQL alone can be asked: nodes beside each other, and a server that goes away.

answers.md §2 (F7, F10, F11, F18).  What every database promises is in `test_store`.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from coatcheck.durations import BUSY_TIMEOUT, CHANGE_LEASE
from coatcheck.server.changes import Change, What
from coatcheck.server.store import Found, Store, StoreMissing, StoreUnavailable, open_store
from coatcheck.server.store.migrations import REVISION
from coatcheck.server.store.postgres import PostgresStore
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeySecret,
    Deployment,
    Organization,
    SigningKey,
)
from coatcheck.server.store.transaction import LOG_LOCK
from support.deployment import NOON, TESTER
from support.postgres import Server, server

DIGEST = b"d" * 32
#: Seconds that a busy machine may take beyond a limit.
SLACK = 1.0
#: Seconds after which a node works again once its database does.
RECOVERY = 5


@pytest.fixture(scope="module")
def mine() -> Iterator[Server]:
    """A server that may be stopped and frozen."""
    with server() as running:
        yield running


def a_deployment(url: str) -> str:
    """A database with one API key in it."""
    with opened(url) as store:
        store.upgrade(create=True)
        with store.transaction() as tx:
            tx.add(
                Deployment(issuer="urn:issuer", log="first", created_at=NOON),
                Organization(id="org_1", name="Acme", created_at=NOON),
                ApiKey(
                    id="key_1",
                    organization_id="org_1",
                    name="n",
                    environment="live",
                    scopes="read",
                    audiences="urn:a",
                    mask="...",
                    created_at=NOON,
                ),
                ApiKeySecret(digest=DIGEST, api_key_id="key_1", mask="...", created_at=NOON),
            )
            tx.append([change("key_1", What.API_KEY_CREATED)])
    return url


@contextmanager
def opened(url: str, clock: Callable[[], float] = time.time) -> Iterator[PostgresStore]:
    with closing(PostgresStore(url, clock)) as store:
        yield store


@pytest.fixture
def url(postgres: Server) -> str:
    return a_deployment(postgres.new_database())


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with opened(url) as made:
        yield made


@pytest.fixture
def other(store: PostgresStore, url: str) -> Iterator[PostgresStore]:
    """The same database, as another node opens it."""
    with opened(url) as made:
        yield made


def change(subject: str, what: What = What.API_KEY_DISABLED, **rest: Any) -> Change:
    return Change(what, subject, TESTER, NOON, **rest)


def find(store: Store) -> Found:
    return asyncio.run(store.find([DIGEST]))


def disable(store: Store, at: int | None) -> None:
    with store.transaction() as tx:
        row = tx.api_key("key_1")
        assert row is not None
        row.disabled_at = at
        tx.append([change("key_1")])


def write(store: Store) -> None:
    with store.transaction() as tx:
        tx.append([change("key_1")])


def refused_after(call: Callable[[], object]) -> float:
    """Seconds until it says that the database does not answer."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call()
    return time.monotonic() - began


def seconds_until(condition: Callable[[], object]) -> float:
    """Seconds until it neither raises nor is false; RECOVERY at most."""
    began = time.monotonic()
    while time.monotonic() - began < RECOVERY:
        try:
            if condition():
                break
        except StoreUnavailable:
            pass
        time.sleep(0.02)
    else:
        pytest.fail("it does not come back")
    return time.monotonic() - began


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        found = connection.execute(statement.encode())
        return found.fetchall() if found.description else []


# --- a server that goes away


def test_a_frozen_server_is_told_in_time_and_comes_back(mine: Server) -> None:
    """F7: connections stay, nothing answers, and nobody waits longer than a write may."""
    with opened(a_deployment(mine.new_database())) as store:
        find(store)
        write(store)
        with mine.frozen():
            # A record that is known is used for as long as the lease runs, and no longer.
            time.sleep(CHANGE_LEASE + 0.1)
            assert refused_after(store.head) < SLACK
            assert refused_after(lambda: find(store)) < BUSY_TIMEOUT + SLACK
            assert refused_after(lambda: write(store)) < BUSY_TIMEOUT + SLACK
            assert refused_after(store.check_schema) < 2 * BUSY_TIMEOUT + SLACK
            # By now it is known: nobody is kept waiting any more.
            assert refused_after(lambda: find(store)) < SLACK
            assert refused_after(lambda: write(store)) < SLACK

        seconds_until(lambda: find(store).records)
        write(store)
        store.check_schema()


def test_a_write_under_way_on_a_frozen_server_ends_in_time(mine: Server) -> None:
    """F7: its connection was good a moment ago."""
    with opened(a_deployment(mine.new_database())) as store:
        write(store)
        with mine.frozen():
            assert refused_after(lambda: write(store)) < 2 * BUSY_TIMEOUT + SLACK
        seconds_until(lambda: store.head() >= 0)


def test_a_server_that_was_restarted_is_used_again(mine: Server) -> None:
    """Every connection of the pools is stale by then; nobody who asks notices."""
    with opened(a_deployment(mine.new_database())) as store:
        find(store)
        write(store)
        head = store.head()
        mine.stop()
        assert refused_after(lambda: write(store)) < BUSY_TIMEOUT + SLACK
        mine.start()
        seconds_until(lambda: store.head() == head)

        write(store)
        assert find(store).records[DIGEST].id == "key_1"
        with store.transaction(read_only=True) as tx:
            assert tx.head() == head + 1


def test_what_cannot_be_reached_is_told_without_the_password(mine: Server) -> None:
    """The message goes to logs."""
    url = mine.url("nowhere").replace("coatcheck@", "coatcheck:hunter2@")
    with opened(url) as store, pytest.raises(StoreMissing, match="createdb") as refused:
        store.check_schema()

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "bad", ["postgresql://u:hunter2@[::1/db", "postgresql://u:hun%zzter2@h/db", "mysql://u@h/db"]
)
def test_a_url_that_names_no_database_is_answered_without_repeating_it(bad: str) -> None:
    """It may hold the password."""
    with pytest.raises(ValueError, match="COATCHECK_DATABASE_URL") as refused:
        PostgresStore(bad)

    assert "hun" not in str(refused.value)


def test_when_no_connection_is_left_it_is_told(mine: Server) -> None:
    """F7: what is known already goes on being answered until the lease ends."""
    url = a_deployment(mine.new_database())
    sql(mine.url("postgres"), "DROP ROLE IF EXISTS crowded")
    sql(mine.url("postgres"), "CREATE ROLE crowded LOGIN CONNECTION LIMIT 1")
    sql(url, "GRANT ALL ON ALL TABLES IN SCHEMA public TO crowded")
    with opened(url.replace("coatcheck@", "crowded@")) as store:
        assert store.head() > 0
        assert refused_after(lambda: write(store)) < BUSY_TIMEOUT + SLACK
        assert store.head() > 0


def test_a_server_that_cannot_be_written_to_is_refused(postgres: Server, url: str) -> None:
    """F18: a replica lags, and would call good what was revoked."""
    name = url.rpartition("/")[2]
    sql(postgres.url("postgres"), f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')

    with opened(url) as store, pytest.raises(StoreUnavailable, match="read-only"):
        store.head()


# --- writers beside each other


def test_a_lock_that_is_not_given_back_is_told_in_time(store: PostgresStore, url: str) -> None:
    """F7: whoever holds the log's lock is frozen; nobody else waits for it for long."""
    find(store)
    with closing(psycopg.connect(url)) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(%s)", [LOG_LOCK])

        assert refused_after(lambda: write(store)) < BUSY_TIMEOUT + SLACK
        assert find(store).records
    write(store)


def test_a_frozen_writer_loses_its_lock(store: PostgresStore, other: PostgresStore) -> None:
    """A node that hangs between its row and its commit must not hold up all revocations."""

    def hang() -> None:
        with other.transaction() as tx:
            tx.append([change("key_1", change_id="frozen")])
            time.sleep(BUSY_TIMEOUT)
            tx.head()

    with pytest.raises(StoreUnavailable):
        hang()
    write(store)
    with store.transaction(read_only=True) as tx:
        assert not tx.known_changes(["frozen"])


def test_two_who_change_one_api_key_come_one_after_the_other(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Each sees what the one before it has done."""
    first_has_it, second_asks = threading.Event(), threading.Event()

    def first() -> None:
        with other.transaction() as tx:
            row = tx.api_key("key_1")
            assert row is not None
            first_has_it.set()
            second_asks.wait(5)
            time.sleep(0.1)
            row.revoked_at = 7
            tx.append([change("key_1", What.API_KEY_REVOKED)])

    thread = threading.Thread(target=first)
    thread.start()
    first_has_it.wait(5)
    with store.transaction() as tx:
        second_asks.set()
        row = tx.api_key("key_1")
        assert row is not None
        seen = row.revoked_at
    thread.join()

    assert seen == 7


def test_an_api_key_is_counted_while_it_is_changed(
    store: PostgresStore, other: PostgresStore
) -> None:
    """The flush of usage points at the API key's row, and waits for nobody who edits it."""
    with store.transaction() as tx:
        assert tx.api_key("key_1") is not None
        with other.transaction() as counting:
            counting.add_usage({"key_1": (1, 0, NOON)})


class Cut:
    """A connection that breaks at its commit, before or after it was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_done: bool) -> None:
        commit = psycopg.Connection.commit

        def cut(connection: psycopg.Connection[Any]) -> None:
            monkeypatch.undo()
            if is_done:
                commit(connection)
            connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

        monkeypatch.setattr(psycopg.Connection, "commit", cut)


def test_a_commit_whose_answer_was_lost_is_looked_up(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: it was done, so it is acknowledged; the log says so by the change's id."""
    write(store)
    Cut(monkeypatch, is_done=True)
    with store.transaction() as tx:
        tx.append([change("key_1", change_id="done")])

    with store.transaction(read_only=True) as tx:
        assert tx.known_changes(["done"])


def test_a_commit_that_was_not_done_is_not_acknowledged(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: and the same change may be said again."""
    write(store)
    Cut(monkeypatch, is_done=False)
    with pytest.raises(StoreUnavailable), store.transaction() as tx:
        tx.append([change("key_1", change_id="again")])

    with store.transaction() as tx:
        tx.append([change("key_1", change_id="again")])


def test_two_upgrades_at_once_make_one_schema(postgres: Server) -> None:
    """F3: every node of a fleet may try; an advisory lock lets them in one by one."""
    url = postgres.new_database()
    results = []

    def upgrade() -> None:
        with opened(url) as store:
            results.append(store.upgrade(create=True))

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(results, key=str) == [
        *[(REVISION, REVISION)] * 2,
        (None, REVISION),
    ]


# --- what a node knows


def test_a_node_that_hears_nothing_says_so_within_the_lease(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its polls hang: what it remembers may have been revoked elsewhere by now."""
    find(store)
    go_on = threading.Event()
    news = store._follower._source.news

    def hang(after: int | None) -> Any:
        go_on.wait(10)
        return news(after)

    monkeypatch.setattr(store._follower._source, "news", hang)
    time.sleep(CHANGE_LEASE + 0.25)
    assert store.find_now([DIGEST]) is None
    with pytest.raises(StoreUnavailable):
        asyncio.run(_head(store))
    go_on.set()
    seconds_until(lambda: store.find_now([DIGEST]))


def test_an_outage_is_told_to_each_who_asks_by_an_exception_of_its_own(mine: Server) -> None:
    """One for all of them would keep the frames, and so the requests, of everybody it was told."""
    with opened(a_deployment(mine.new_database())) as store:
        store.head()
        mine.stop()
        try:
            seconds_until(lambda: store._follower.is_away)
            told = []
            for _ in range(3):
                with pytest.raises(StoreUnavailable) as refused:
                    find(store)
                told.append(refused.value)
        finally:
            mine.start()

    assert len({id(one) for one in told}) == 3
    assert len({len(traceback.extract_tb(one.__traceback__)) for one in told}) == 1


async def _head(store: Store) -> int:
    return store.head()


def test_a_record_read_while_its_api_key_changes_is_not_kept(
    store: PostgresStore, other: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading began before the change, and ends after this node has heard of it."""
    head = store.head()
    read = store._read

    def slow(sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        rows = read(sql, parameters)
        disable(other, 7)
        seconds_until(lambda: store._follower.head > head)
        return rows

    monkeypatch.setattr(store, "_read", slow)
    found = find(store)
    monkeypatch.undo()

    assert (found.records[DIGEST].disabled_at, found.as_of) == (None, head)
    assert find(store).records[DIGEST].disabled_at == 7


def test_only_what_a_change_concerns_is_forgotten(
    store: PostgresStore, other: PostgresStore
) -> None:
    """A busy log must not send every API key back to the database."""
    find(store)
    for what in (What.TOKEN_REVOKED, What.SIGNING_KEY_WITHDRAWN, What.API_KEY_DISABLED):
        with other.transaction() as tx:
            tx.append([change("another", what)])
        seconds_until(lambda: store._follower.head == other.head())
        assert store.find_now([DIGEST]) is not None

    with other.transaction() as tx:
        tx.append([change("org_1", What.ORGANIZATION_SUSPENDED)])
    seconds_until(lambda: store._follower.head == other.head())
    assert store.find_now([DIGEST]) is None


#: Changes of what the record of `key_1` is read from, or may be.
CONCERNING = {
    "its project": (What.PROJECT_ARCHIVED, "prj_1"),
    "its project, taken back": (What.PROJECT_RESTORED, "prj_1"),
    "its group": (What.GROUP_NARROWED, "grp_1"),
    "its group, widened": (What.GROUP_EDITED, "grp_1"),
    "itself": (What.API_KEY_NARROWED, "key_1"),
    "the catalog": (What.CATALOG_CHANGED, "*"),
}
#: Changes of what no record holds, and of others of its kind.
OTHERS = (
    (What.PROJECT_ARCHIVED, "prj_2"),
    (What.GROUP_NARROWED, "grp_2"),
    (What.MEMBER_REMOVED, "mem_1"),
    (What.USE_FROM_WRONG_ADDRESS, "key_1"),
    (What.CREDIT_LOW, "org_1"),
    (What.API_KEY_NARROWED, "key_2"),
)


@pytest.mark.parametrize(("what", "subject"), CONCERNING.values(), ids=CONCERNING)
def test_a_record_is_forgotten_with_what_it_is_bound_to(
    store: PostgresStore, other: PostgresStore, what: What, subject: str
) -> None:
    """Its project's end and its group's models are read with it; what others do is not."""
    with other.transaction() as tx:
        row = tx.api_key("key_1")
        assert row is not None
        row.project_id, row.group_id = "prj_1", "grp_1"
        tx.append([change("key_1", What.API_KEY_NARROWED)])
    seconds_until(lambda: store.head() == other.head())
    find(store)
    with other.transaction() as tx:
        tx.append(change(one, of) for of, one in OTHERS)
    seconds_until(lambda: store._follower.head == other.head())
    assert store.find_now([DIGEST]) is not None

    with other.transaction() as tx:
        tx.append([change(subject, what)])
    seconds_until(lambda: store._follower.head == other.head())
    assert store.find_now([DIGEST]) is None


def test_a_deleted_api_key_is_gone_with_the_next_poll(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Its secret is unknown then, as one that never was."""
    assert find(store).records
    with other.transaction() as tx:
        row = tx.api_key("key_1")
        assert row is not None
        row.deleted_at = row.revoked_at = NOON
        tx.delete_secrets("key_1")
        tx.append([change("key_1", What.API_KEY_DELETED)])
    seconds_until(lambda: store._follower.head == other.head())

    assert find(store).records == {}


def test_nobody_re_seals_while_a_copy_of_a_secret_is_stored(
    store: PostgresStore, other: PostgresStore
) -> None:
    """It would be left behind under the old sealing key; two who store copies do not wait."""
    order = []

    def re_seal() -> None:
        with other.transaction() as tx:
            tx.lock_signing_keys()
            order.append("re-sealed")

    with store.transaction() as tx:
        tx.hold_signing_keys()
        with other.transaction() as beside:
            beside.hold_signing_keys()
        thread = threading.Thread(target=re_seal)
        thread.start()
        thread.join(0.2)
        order.append("stored")
    thread.join()

    assert order == ["stored", "re-sealed"]


def test_a_signing_key_of_another_node_is_known_with_its_change(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Who sees the head of the log finds the ring as it is there."""
    assert store.signing_keys() == []
    with other.transaction() as tx:
        tx.add(
            SigningKey(
                kid="first",
                purpose="token",
                algorithm="ES256",
                public_jwk="{}",
                sealed_private=b"",
                sealing_key_id="1",
                position=1,
                created_at=NOON,
                starts_at=NOON,
            )
        )
        tx.append([change("first", What.SIGNING_KEY_CREATED)])
    seconds_until(lambda: store.head() == other.head())

    assert [key.kid for key in store.signing_keys()] == ["first"]


def test_a_clock_that_is_off_stops_tokens_and_no_revocation(url: str) -> None:
    """F11: more than 10 seconds; back again, it recovers by itself."""
    off = 60.0
    with opened(url, lambda: time.time() + off) as store:
        with pytest.raises(StoreUnavailable, match=r"clock is \+60 s off .* NTP"):
            store.head()
        assert refused_after(lambda: find(store)) < SLACK
        drift = store.clock_drift_s()
        assert drift is not None
        assert 59 < drift < 61
        write(store)

        off = -9.0
        seconds_until(lambda: find(store).records)


def test_a_log_that_lost_changes_is_not_vouched_for(store: PostgresStore, url: str) -> None:
    """F7: a failover to a replica that lagged; what was revoked there would live again."""
    head = store.head()
    sql(url, f"DELETE FROM changes WHERE seq = {head}")  # noqa: S608 - our own number

    def look() -> None:
        for _ in range(100):
            store.head()
            time.sleep(0.02)

    with pytest.raises(StoreUnavailable, match="coatcheck db new-log"):
        look()


def test_a_new_log_is_followed_from_its_beginning(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Whatever was remembered of the old one counts no more."""
    find(store)
    with other.transaction() as tx:
        tx.rename_log("second", 2**32)
        tx.append([change("*", What.LOG_RESTARTED)])
    seconds_until(lambda: store.log() == "second")

    assert store.head() > 2**32
    assert store.find_now([DIGEST]) is None
    assert [row.subject for row in store.narrowings(-1, 0)][-1] == "*"


def test_a_log_longer_than_one_poll_is_read_to_its_end(
    store: PostgresStore, other: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was cut off for a while catches up, and vouches for nothing before that."""
    monkeypatch.setattr("coatcheck.server.store.postgres._MOST_NEWS", 3)
    head = store.head()
    with other.transaction() as tx:
        tx.append(change(f"key_{n}", What.API_KEY_DISABLED, change_id=f"{n}") for n in range(10))
    seconds_until(lambda: store.head() == head + 10)

    assert len(store.narrowings(head, 0)) == 10


def test_a_store_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stays with SQLite needs none."""
    monkeypatch.setitem(__import__("sys").modules, "coatcheck.server.store.postgres", None)

    with pytest.raises(ValueError, match=r"pip install 'coatcheck\[postgres\]'"):
        open_store("postgresql://u@h/d")
