"""What every database promises; runs over STORES.  answers.md §2 (F2, F5, F6, F10), K30.

What only one database can be asked (a pragma, a file that vanishes) stands at the end under its
name.
"""

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from coatcheck.client_address import parse_networks
from coatcheck.durations import BUSY_TIMEOUT, CHANGE_LEASE
from coatcheck.scope import Scopes
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.store import (
    STORES,
    ApiKeyRecord,
    Found,
    SchemaMismatch,
    SigningKeyRecord,
    Store,
    StoreMissing,
    StoreUnavailable,
    Transaction,
    hot,
    migrations,
    open_store,
    sqlite,
)
from coatcheck.server.store.migrations import REVISION
from coatcheck.server.store.sqlite import SqliteStore
from coatcheck.server.store.tables import (
    METADATA,
    ApiKey,
    ApiKeySecret,
    Deployment,
    Group,
    Organization,
    Project,
    SigningKey,
)
from support.deployment import NOON, TESTER

#: By scheme: the URL of a database of its own.  A new store has its line here.
URLS: dict[str, Callable[[pytest.FixtureRequest, Path], str]] = {
    "sqlite": lambda _, folder: f"sqlite:///{folder}/store.db",
    "postgresql": lambda request, _: request.getfixturevalue("postgres").new_database(),
}

#: By scheme: seconds until a store sees what another one wrote; not in the list: at once.
SEEN_WITHIN = {"postgresql": 2 * CHANGE_LEASE}

#: Seconds beyond BUSY_TIMEOUT that a slow machine may take.
SLACK = 1.5


@pytest.fixture(scope="module", params=STORES)
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    assert name in URLS, "a new store needs its URL in URLS"
    return name


@pytest.fixture
def url(request: pytest.FixtureRequest, scheme: str, tmp_path: Path) -> str:
    return URLS[scheme](request, tmp_path)


@contextmanager
def opened(url: str, *, create: bool = False) -> Iterator[Store]:
    store = open_store(url)
    try:
        if create:
            store.upgrade(create=True)
            with store.transaction() as tx:
                tx.add(an_organization())
                tx.append([a_change("org_1")])
        yield store
    finally:
        store.close()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store with the schema, one organization and one row in the change log."""
    with opened(url, create=True) as made:
        yield made


@pytest.fixture
def other(store: Store, url: str) -> Iterator[Store]:
    """The same database, as another process would open it."""
    with opened(url) as made:
        yield made


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest, scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """A store for properties, which need no fresh one for each example."""
    with opened(URLS[scheme](request, tmp_path_factory.mktemp("shared")), create=True) as made:
        yield made


def an_organization(**changes: Any) -> Organization:
    row: dict[str, Any] = {"id": "org_1", "name": "Acme", "created_at": NOON}
    return Organization(**row | changes)


def an_api_key(**changes: Any) -> ApiKey:
    row: dict[str, Any] = {
        "id": "key_1",
        "organization_id": "org_1",
        "name": "n",
        "environment": "live",
        "scopes": "read",
        "audiences": "urn:a",
        "mask": "...",
        "created_at": NOON,
    }
    return ApiKey(**row | changes)


def a_project(**changes: Any) -> Project:
    same: dict[str, Any] = {"name": "Web", "created_at": NOON}
    return Project(**same | changes)


def a_group(**changes: Any) -> Group:
    same: dict[str, Any] = {"name": "Gold", "price_multiplier": 1, "created_at": NOON}
    return Group(**same | changes)


def a_secret(digest: bytes, api_key_id: str = "key_1", **changes: Any) -> ApiKeySecret:
    row: dict[str, Any] = {"mask": "...", "created_at": NOON}
    return ApiKeySecret(digest=digest, api_key_id=api_key_id, **row | changes)


def a_change(subject: str, what: What = What.API_KEY_DISABLED, **changes: Any) -> Change:
    return replace(Change(what, subject, TESTER, NOON), **changes)


def find(store: Store, *digests: bytes) -> Found:
    return asyncio.run(store.find(digests))


def sees(scheme: str, condition: Callable[[], bool]) -> bool:
    """Whether it is so by the time that this database needs for it."""
    until = time.monotonic() + SEEN_WITHIN.get(scheme, 0)
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def narrowed_since(store: Store, subjects: Sequence[str], as_of: int) -> bool:
    return asyncio.run(store.narrowed_since(subjects, as_of))


DIGEST = b"d" * 32


@pytest.fixture
def with_key(store: Store) -> Store:
    """`store` with one API key, whose secret has DIGEST."""
    with store.transaction() as tx:
        tx.add(an_api_key(), a_secret(DIGEST))
        tx.append([a_change("key_1", What.API_KEY_CREATED)])
    return store


def disable(store: Store, at: int | None, *, logged: bool = True) -> None:
    with store.transaction() as tx:
        row = tx.api_key("key_1")
        assert row is not None
        row.disabled_at = at
        if logged:
            tx.append([a_change("key_1")])


# --- the record

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
WORDS = st.text("abcdefgh:/.", min_size=1, max_size=12)
TIMES = st.none() | st.integers(0, 2**62)
BLOBS = st.binary(min_size=1, max_size=64)
_counter = iter(range(10**9))


@dataclass(frozen=True)
class Rows:
    organization: dict[str, Any]
    api_key: dict[str, Any]
    secret: dict[str, Any]
    project: dict[str, Any] | None
    group: dict[str, Any] | None


MODELS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
ROWS = st.builds(
    Rows,
    st.fixed_dictionaries(
        {
            "name": TEXTS,
            "is_operator": st.booleans(),
            "suspended_at": TIMES,
            "credit_spent_at": TIMES,
        }
    ),
    st.fixed_dictionaries(
        {
            "name": TEXTS,
            "environment": WORDS,
            "scopes": st.sampled_from(["", "*", "read", "a b@X/# c@Y/1"]),
            "audiences": st.lists(WORDS, min_size=1, max_size=3).map(" ".join),
            "expires_at": TIMES,
            "disabled_at": TIMES,
            "revoked_at": TIMES,
            "kind": WORDS,
            "disabled_reason": st.none() | WORDS,
            "networks": st.none() | st.sampled_from(["10.0.0.0/8", "10.1.2.3/32 2001:db8::/32"]),
            "role": st.none() | WORDS,
            "models": st.none() | MODELS,
            # What does not exist binds nothing.
            "project_id": st.none() | WORDS,
            "group_id": st.none() | WORDS,
        }
    ),
    st.fixed_dictionaries({"expires_at": TIMES}),
    st.none() | st.fixed_dictionaries({"archived_at": TIMES}),
    st.none() | st.fixed_dictionaries({"models": st.none() | MODELS}),
)


def test_the_raw_record_is_the_record_of_the_orm(shared: Store) -> None:
    """The token path reads past the ORM; both must see the same row, None and all."""

    @settings(max_examples=50, deadline=None)
    @given(ROWS, BLOBS)
    def holds(rows: Rows, noise: bytes) -> None:
        n = next(_counter)
        org_id, key_id = f"org_raw_{n}", f"key_raw_{n}"
        digest = n.to_bytes(8, "big") + noise
        api_key = dict(rows.api_key)
        with shared.transaction() as tx:
            tx.add(an_organization(id=org_id, **rows.organization))
            if rows.project is not None:
                api_key["project_id"] = f"prj_raw_{n}"
                tx.add(a_project(id=f"prj_raw_{n}", organization_id=org_id, **rows.project))
            if rows.group is not None:
                api_key["group_id"] = f"grp_raw_{n}"
                tx.add(a_group(id=f"grp_raw_{n}", **rows.group))
            tx.add(
                an_api_key(id=key_id, organization_id=org_id, **api_key),
                a_secret(digest, key_id, **rows.secret),
            )
        with shared.transaction(read_only=True) as tx:
            expected = through_the_orm(tx, digest, key_id, org_id)

        assert find(shared, digest).records == {digest: expected}

    holds()


def through_the_orm(
    tx: Transaction, digest: bytes, api_key_id: str, organization_id: str
) -> ApiKeyRecord:
    api_key, organization = tx.api_key(api_key_id), tx.organization(organization_id)
    (secret,) = tx.secrets(api_key_id)
    assert api_key is not None
    assert organization is not None
    project, group = tx.project(api_key.project_id or ""), tx.group(api_key.group_id or "")
    networks = api_key.networks
    return ApiKeyRecord(
        digest=digest,
        secret_expires_at=secret.expires_at,
        id=api_key.id,
        organization_id=organization.id,
        environment=api_key.environment,
        scopes=Scopes.parse(api_key.scopes),
        audiences=tuple(api_key.audiences.split(" ")),
        expires_at=api_key.expires_at,
        disabled_at=api_key.disabled_at,
        revoked_at=api_key.revoked_at,
        organization_suspended_at=organization.suspended_at,
        organization_spent_at=organization.credit_spent_at,
        disabled_reason=api_key.disabled_reason,
        kind=api_key.kind,
        project_id=api_key.project_id,
        project_archived_at=None if project is None else project.archived_at,
        networks=None if networks is None else parse_networks(tuple(networks.split(" "))),
        role=api_key.role,
        models=None if api_key.models is None else tuple(api_key.models.split(" ")),
        group_id=api_key.group_id,
        group_models=tuple(group.models.split(" ")) if group and group.models else None,
    )


def test_the_raw_signing_keys_are_those_of_the_orm(shared: Store) -> None:
    """In the order in which they were made, withdrawn ones too."""

    @settings(max_examples=25, deadline=None)
    @given(TEXTS, BLOBS, st.integers(0, 2**62), TIMES)
    def holds(text: str, blob: bytes, starts_at: int, withdrawn_at: int | None) -> None:
        n = next(_counter)
        row = SigningKey(
            kid=f"kid_{n}",
            purpose=text,
            algorithm=text,
            public_jwk=text,
            sealed_private=blob,
            sealing_key_id=text,
            position=n,
            created_at=NOON,
            starts_at=starts_at,
            withdrawn_at=withdrawn_at,
        )
        with shared.transaction() as tx:
            tx.add(row)
            tx.append([a_change(row.kid, What.SIGNING_KEY_CREATED)])
        with shared.transaction(read_only=True) as tx:
            expected = [
                SigningKeyRecord(
                    **{name: getattr(one, name) for name in SigningKeyRecord.__dataclass_fields__}
                )
                for one in tx.signing_keys()
            ]

        assert shared.signing_keys() == expected
        assert expected[-1].sealed_private == blob

    holds()


def test_two_secrets_are_found_in_one_look_up(with_key: Store) -> None:
    """RFC 8693 presents two; each is found, in either order, and what is unknown is absent."""
    with with_key.transaction() as tx:
        tx.add(an_api_key(id="key_2"), a_secret(b"e" * 32, "key_2"))
        tx.append([a_change("key_2", What.API_KEY_CREATED)])

    for digests in ((DIGEST, b"e" * 32), (b"e" * 32, DIGEST), (DIGEST, b"?" * 32), (b"?" * 32,)):
        found = find(with_key, *digests).records
        assert set(found) == set(digests) - {b"?" * 32}
        assert all(found[digest].digest == digest for digest in found)
    # The second time from memory: the same.
    assert set(find(with_key, DIGEST, b"e" * 32).records) == {DIGEST, b"e" * 32}


# --- the position in the change log


def test_the_head_is_the_last_row_of_the_log(store: Store) -> None:
    """The sequence is the one version number."""
    with store.transaction() as tx:
        tx.append([a_change("a"), a_change("b")])
        rows = [tx.changes(subject)[0].seq for subject in ("org_1", "a", "b")]

    assert rows == sorted(seq for seq in rows if seq is not None)
    assert store.head() == rows[-1]
    with store.transaction(read_only=True) as tx:
        assert tx.head() == rows[-1]


def test_the_head_of_an_empty_log_is_0(url: str) -> None:
    """Nothing has happened yet."""
    with opened(url) as store:
        store.upgrade(create=True)

        assert store.head() == 0


def test_the_head_is_read_before_the_record(scheme: str, with_key: Store, other: Store) -> None:
    """`as_of` may be too old, never too new: a revocation above it still kills the token.

    One writes, one reads, 200 times over: whoever was told a position has what was done up to it.
    """
    done = threading.Event()
    disabled_at_seq: dict[int, int] = {}

    def write() -> None:
        for n in range(200):
            with other.transaction() as tx:
                row = tx.api_key("key_1")
                assert row is not None
                row.disabled_at = n
                tx.append([a_change("key_1")])
                disabled_at_seq[tx.head()] = n
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        found = find(with_key, DIGEST)
        seen.append((found.as_of, found.records[DIGEST].disabled_at))
    writer.join()

    for as_of, disabled_at in seen:
        at_least = disabled_at_seq.get(as_of, -1)
        assert (-1 if disabled_at is None else disabled_at) >= at_least
    if scheme == "sqlite":
        # Elsewhere a record that was just read may come with a later head than the next look has.
        assert seen == sorted(seen, key=lambda one: one[0])


def test_a_change_through_another_connection_is_seen_at_the_next_look(
    scheme: str, with_key: Store, other: Store
) -> None:
    """F8: no cache is older than the log, however often it was asked before.

    The next look is a moment later where the database is on another machine.
    """
    for at in (NOON, None, NOON + 1):
        find(with_key, DIGEST)
        disable(other, at)

        assert sees(scheme, lambda: find(with_key, DIGEST).as_of == other.head())
        assert find(with_key, DIGEST).records[DIGEST].disabled_at == at


def test_a_change_through_the_same_store_is_seen_at_the_next_look(with_key: Store) -> None:
    """Writes go over another connection than reads."""
    for at in (NOON, None):
        find(with_key, DIGEST)
        disable(with_key, at)

        assert find(with_key, DIGEST).records[DIGEST].disabled_at == at


CHANGE_IN_ANOTHER_PROCESS = """
import sys
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.store import open_store

store = open_store(sys.argv[1])
with store.transaction() as tx:
    tx.api_key("key_1").revoked_at = 7
    tx.append([Change(What.API_KEY_REVOKED, "key_1", Actor("cli:other"), 7)])
"""


def test_a_change_in_another_process_is_seen_at_the_next_look(
    scheme: str, with_key: Store, url: str
) -> None:
    """The command line revokes while the service runs."""
    assert find(with_key, DIGEST).records[DIGEST].revoked_at is None

    subprocess.run([sys.executable, "-c", CHANGE_IN_ANOTHER_PROCESS, url], check=True, timeout=60)

    assert sees(scheme, lambda: find(with_key, DIGEST).records[DIGEST].revoked_at == 7)


def test_a_new_api_key_is_found_although_it_was_looked_for_before(with_key: Store) -> None:
    """That a digest matched nothing is not remembered: anybody may guess."""
    assert not find(with_key, b"n" * 32).records

    with with_key.transaction() as tx:
        tx.add(an_api_key(id="key_2"), a_secret(b"n" * 32, "key_2"))
        tx.append([a_change("key_2", What.API_KEY_CREATED)])

    assert find(with_key, b"n" * 32).records


def test_a_flush_of_usage_evicts_nothing(scheme: str, with_key: Store, other: Store) -> None:
    """It commits every second, and changes nothing that a credential may do.

    To see that the remembered record is used, the row is changed without a row in the log, which
    no use case ever does.
    """
    find(with_key, DIGEST)
    disable(other, NOON, logged=False)
    for _ in range(3):
        with other.transaction() as tx:
            tx.add_usage({"key_1": (1, 0, NOON)})

        assert find(with_key, DIGEST).records[DIGEST].disabled_at is None

    with other.transaction() as tx:
        tx.append([a_change("key_1")])
    assert sees(scheme, lambda: find(with_key, DIGEST).records[DIGEST].disabled_at == NOON)


# --- narrowed since

SUBJECTS = ("key_1", "org_1", "kid_1", "jti_1", "*", "key_2")
CHANGES = st.lists(st.tuples(st.sampled_from(SUBJECTS), st.sampled_from(list(What))), max_size=6)


def test_narrowed_since_is_whether_a_subject_was_narrowed_above_a_position(
    shared: Store,
) -> None:
    """K10: entries for key, organization, signing key, token and everything, in every order.

    Compared with the plain sentence: any change above, of one of the subjects, that narrows.
    """

    @settings(max_examples=50, deadline=None)
    @given(
        CHANGES,
        st.lists(st.sampled_from(SUBJECTS), min_size=1, max_size=8),
        st.integers(0, 7),
    )
    def holds(changes: list[tuple[str, What]], asked: list[str], after: int) -> None:
        start = shared.head()
        with shared.transaction() as tx:
            tx.append([a_change(subject, what) for subject, what in changes])

        expected = any(
            subject in asked and what.narrows and number > after
            for number, (subject, what) in enumerate(changes, start=1)
        )

        # Positions up to `start` belong to examples before this one.
        assert narrowed_since(shared, asked, start + after) is expected

    holds()


def test_a_position_itself_is_not_above_it(store: Store) -> None:
    """A token that was made after the change knows of it."""
    with store.transaction() as tx:
        tx.append([a_change("key_1")])
    seq = store.head()

    assert narrowed_since(store, ["key_1"], seq - 1)
    assert not narrowed_since(store, ["key_1"], seq)


def test_a_narrowing_by_another_connection_is_seen_at_once(store: Store, other: Store) -> None:
    """K8: inactive at introspection with the next question."""
    as_of = store.head()
    assert not narrowed_since(store, ["key_1"], as_of)

    with other.transaction() as tx:
        tx.append([a_change("key_1")])

    assert narrowed_since(store, ["key_1"], as_of)


def test_more_subjects_than_a_token_has_are_refused(store: Store) -> None:
    """Silently dropping one would let a dead token live."""
    narrowed_since(store, ["s"] * hot.MOST_SUBJECTS, 0)
    with pytest.raises(ValueError, match="at most"):
        narrowed_since(store, ["s"] * (hot.MOST_SUBJECTS + 1), 0)


# --- writing


class Broken(Exception):
    """What goes wrong in the middle of a transaction."""


def test_a_transaction_is_all_or_nothing(with_key: Store) -> None:
    """F2: neither rows nor log of what failed half-way."""
    before = with_key.head()
    with suppress(Broken), with_key.transaction() as tx:
        tx.add(an_api_key(id="key_2"), a_secret(b"2" * 32, "key_2"))
        row = tx.api_key("key_1")
        assert row is not None
        row.revoked_at = NOON
        tx.append([a_change("key_1", What.API_KEY_REVOKED)])
        tx.add_usage({"key_1": (1, 0, NOON)})
        raise Broken

    found = find(with_key, DIGEST, b"2" * 32)
    with with_key.transaction(read_only=True) as tx:
        assert not tx.usage(["key_1"])
    assert with_key.head() == found.as_of == before
    assert set(found.records) == {DIGEST}
    assert found.records[DIGEST].revoked_at is None


def test_a_broken_transaction_stops_no_later_one(store: Store) -> None:
    """Locks and connections are given back."""
    with suppress(Broken), store.transaction():
        raise Broken

    with store.transaction() as tx:
        tx.append([a_change("key_1")])
    assert store.head() > 1


def test_a_change_that_was_said_before_is_not_written_again(store: Store) -> None:
    """Its change id makes it one; what comes with the second saying is not written either."""
    change = a_change("key_1", change_id="once")
    with store.transaction() as tx:
        tx.append([change])
    with suppress(Exception), store.transaction() as tx:
        tx.append([change])

    with store.transaction(read_only=True) as tx:
        assert len(tx.changes("key_1")) == 1


def test_a_read_only_transaction_writes_nothing(with_key: Store) -> None:
    """`keys list` waits for no writer, and is none."""
    before = with_key.head()
    with suppress(Exception), with_key.transaction(read_only=True) as tx:
        tx.append([a_change("key_1")])
        raise Broken

    assert with_key.head() == before


def test_the_log_is_in_the_order_of_commits(store: Store, other: Store) -> None:
    """A reader that has seen a position never finds something new below it."""

    def append(to: Store, name: str) -> None:
        for n in range(50):
            with to.transaction() as tx:
                tx.append([a_change(name, change_id=f"{name}-{n}")])

    threads = [
        threading.Thread(target=append, args=(to, name))
        for to, name in ((store, "a"), (store, "b"), (other, "c"))
    ]
    for thread in threads:
        thread.start()
    seen: set[int] = set()
    highest = 0
    while any(thread.is_alive() for thread in threads):
        with other.transaction(read_only=True) as tx:
            now = {row.seq or 0 for name in "abc" for row in tx.changes(name)}
        assert all(seq > highest for seq in now - seen)
        seen, highest = now, max(now, default=0)
    for thread in threads:
        thread.join()

    with store.transaction(read_only=True) as tx:
        for name in "abc":
            rows = tx.changes(name)
            assert [row.change_id for row in rows] == [f"{name}-{n}" for n in range(50)]
            assert [row.seq for row in rows] == sorted(row.seq or 0 for row in rows)


def test_a_row_of_the_log_holds_what_was_said(store: Store) -> None:
    """Who, what, when, from where, and the rest as JSON."""
    change = Change(
        What.API_KEY_ROTATED,
        "key_1",
        Actor("cli:somebody", "2001:db8::1", "req-1"),
        NOON,
        "org_1",
        {"overlapSeconds": 60, "text": '\u20ac "'},
        "change-1",
    )
    with store.transaction() as tx:
        tx.append([change])
        (row,) = tx.changes("key_1")

    assert (row.what, row.narrows, row.at) == ("api_key.rotated", False, NOON)
    assert (row.actor, row.address, row.request_id) == ("cli:somebody", "2001:db8::1", "req-1")
    assert (row.organization_id, row.change_id) == ("org_1", "change-1")
    assert json.loads(row.detail) == change.detail


def test_what_has_no_organization_is_not_stored(store: Store) -> None:
    """Foreign keys hold: no secret without its API key, no API key without its organization."""
    for orphan in (an_api_key(organization_id="org_none"), a_secret(DIGEST, "key_none")):
        with pytest.raises(Exception, match=r"(?i)foreign key"), store.transaction() as tx:
            tx.add(orphan)

    assert not find(store, DIGEST).records


# --- schema


def test_the_code_needs_the_last_migration() -> None:
    """A step that was added without its line in `REVISION` would never be asked for."""
    script = ScriptDirectory.from_config(migrations.config())

    assert script.get_heads() == [migrations.REVISION]
    assert len(list(script.walk_revisions())) == int(migrations.REVISION)


def test_tables_and_migrations_do_not_differ(shared: Store) -> None:
    """Alembic finds nothing to add: who upgrades has what who begins has."""
    with shared.transaction(read_only=True) as tx:
        context = MigrationContext.configure(
            tx._session.connection(), opts={"compare_type": True, "compare_server_default": True}
        )

        assert compare_metadata(context, METADATA) == []


def test_an_upgrade_says_where_it_began_and_ended(url: str) -> None:
    """The second time it has nothing to do."""
    with opened(url) as store:
        assert store.upgrade(create=True) == (None, migrations.REVISION)
        assert store.upgrade() == (migrations.REVISION, migrations.REVISION)
        store.check_schema()


def set_revision(store: Store, revision: str) -> None:
    with store.transaction() as tx:
        tx._session.connection().exec_driver_sql(
            f"UPDATE alembic_version SET version_num = '{revision}'"  # noqa: S608
        )


def test_a_newer_schema_is_refused_with_the_fix(store: Store) -> None:
    """F10: an old node beside new ones refuses to start; it upgrades nothing."""
    set_revision(store, "9999")

    for refused in (store.check_schema, store.upgrade):
        with pytest.raises(SchemaMismatch, match="run the newer coatcheck"):
            refused()


def test_a_newer_schema_that_only_added_something_is_worked_with(store: Store) -> None:
    """Nodes of two versions share a database while an upgrade goes around."""
    with store.transaction() as tx:
        tx.add(Deployment(issuer="urn:i", log="l", created_at=NOON, works_with=REVISION))
    set_revision(store, "9999")
    store.check_schema()

    with store.transaction() as tx:
        deployment = tx.deployment()
        assert deployment is not None
        deployment.works_with = "9998"
    with pytest.raises(SchemaMismatch, match="run the newer coatcheck"):
        store.check_schema()


#: Rows as the version before wrote them: an API key in each state.
OF_0003 = """
INSERT INTO deployment (id, issuer, log, created_at, works_with) VALUES (1, 'urn:i', 'l', 7, '0003')
INSERT INTO organizations (id, name, is_operator, created_at) VALUES ('org_1', 'Acme', true, 7)
INSERT INTO api_keys (id, organization_id, name, environment, scopes, audiences, mask, created_at,
 disabled_at, revoked_at) VALUES
 ('key_1', 'org_1', 'n', 'live', 'read', 'urn:a', 'm', 7, NULL, NULL),
 ('key_2', 'org_1', 'n', 'live', 'read', 'urn:a', 'm', 7, 8, NULL),
 ('key_3', 'org_1', 'n', 'live', 'read', 'urn:a', 'm', 7, NULL, 9),
 ('key_4', 'org_1', 'n', 'live', 'read', 'urn:a', 'm', 7, 8, 9)
"""


def test_a_database_of_the_version_before_is_brought_along(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its API keys are, they stay; who managed them goes on; and its nodes have to end.

    They would hand out tokens without the restrictions that are kept from now on.
    """
    with opened(url) as store:
        upgrade = command.upgrade
        with monkeypatch.context() as patch:
            patch.setattr(command, "upgrade", lambda to, _: upgrade(to, "0003"))
            store.upgrade(create=True)
        with store.transaction() as tx:
            connection = tx._session.connection()
            for statement in OF_0003.split("\nINSERT")[1:]:
                connection.exec_driver_sql(f"INSERT{statement}")

        assert store.upgrade() == ("0003", REVISION)

        store.check_schema()
        with store.transaction(read_only=True) as tx:
            rows = {row.id: row for row in tx.api_keys("org_1", "", 10)}
            organization, deployment = tx.organization("org_1"), tx.deployment()
        told = {one: (row.state, row.disabled_reason, row.kind) for one, row in rows.items()}
        assert told == {
            "key_1": ("active", None, "standard"),
            "key_2": ("disabled", "manual", "standard"),
            "key_3": ("revoked", None, "standard"),
            "key_4": ("revoked", "manual", "standard"),
        }
        assert organization is not None
        assert (organization.bootstrapped_at, organization.recoverable) == (7, False)
        assert deployment is not None
        assert (deployment.works_with, deployment.catalog) == ("0004", None)
        with store.transaction() as tx:
            tx.add(a_secret(DIGEST))
        assert find(store, DIGEST).records[DIGEST].id == "key_1"
        monkeypatch.setattr(migrations, "REVISION", "0003")
        with pytest.raises(SchemaMismatch, match="run the newer coatcheck"):
            store.check_schema()


def test_a_new_deployment_works_with_this_version(store: Store) -> None:
    """And with none before it, which would not know its restrictions."""
    with store.transaction() as tx:
        tx.add(Deployment(issuer="urn:i", log="l", created_at=NOON))

    with store.transaction(read_only=True) as tx:
        deployment = tx.deployment()
    assert deployment is not None
    assert deployment.works_with == REVISION


def test_an_older_schema_is_refused_with_the_fix(store: Store) -> None:
    """F10: it is upgraded by a command, not in passing by whichever worker starts first."""
    set_revision(store, "0000")

    with pytest.raises(SchemaMismatch, match="run coatcheck db upgrade"):
        store.check_schema()


def test_an_upgrade_that_fails_leaves_nothing_half_done(url: str) -> None:
    """F3: all steps are one transaction; the rerun completes.

    The last table of the first step is in the way, so the step fails after all the others.
    """
    with opened(url) as store:
        store.upgrade(create=True)
        with store.transaction() as tx:
            connection = tx._session.connection()
            for table in reversed(METADATA.sorted_tables):
                connection.exec_driver_sql(f"DROP TABLE {table.name}")
            connection.exec_driver_sql("DROP TABLE alembic_version")
            connection.exec_driver_sql("CREATE TABLE api_key_usage (x INTEGER)")
        with pytest.raises(Exception, match="api_key_usage"):
            store.upgrade(create=True)

        with pytest.raises(SchemaMismatch, match="schema none"):
            store.check_schema()
        with store.transaction() as tx:
            tx._session.connection().exec_driver_sql("DROP TABLE api_key_usage")
        assert store.upgrade(create=True) == (None, migrations.REVISION)
        store.check_schema()


def test_a_store_can_be_used_after_it_was_closed(with_key: Store) -> None:
    """It opens its connections again; nothing it remembered is kept."""
    find(with_key, DIGEST)
    with_key.close()
    with_key.close()

    assert find(with_key, DIGEST).records
    with with_key.transaction() as tx:
        assert tx.head() == with_key.head()


def test_an_unknown_scheme_is_answered_by_those_there_are() -> None:
    """And not by the URL, which may hold a password."""
    with pytest.raises(ValueError, match="sqlite://") as refused:
        open_store("oracle://u:hunter2@db/c")

    assert "hunter2" not in str(refused.value)


# --- SQLite


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SqliteStore]:
    """A SQLite store with one API key, whose secret has DIGEST."""
    url = f"sqlite:///{tmp_path}/store.db"
    with opened(url, create=True) as store:
        assert isinstance(store, SqliteStore)
        with store.transaction() as tx:
            tx.add(an_api_key(), a_secret(DIGEST))
            tx.append([a_change("key_1", What.API_KEY_CREATED)])
        yield store


PRAGMAS = {"synchronous": 2, "foreign_keys": 1, "journal_mode": "wal"}


@pytest.mark.parametrize(("pragma", "value"), PRAGMAS.items(), ids=PRAGMAS)
def test_sqlite_writes_with_the_pragmas_that_keep_a_revocation(
    file: SqliteStore, pragma: str, value: object
) -> None:
    """F6: FULL; with NORMAL, WAL loses the last commits when the power fails."""
    with file.transaction() as tx:
        answer = tx._session.connection().exec_driver_sql(f"PRAGMA {pragma}").scalar()

    assert answer == value


def test_sqlite_reads_over_a_connection_that_cannot_write(file: SqliteStore) -> None:
    """The token path writes nothing, whatever somebody adds to it."""
    with (
        pytest.raises(StoreUnavailable, match="readonly"),
        file._reading as connection,
    ):
        connection.execute("DELETE FROM api_keys")


def test_a_new_sqlite_file_is_for_its_owner_only(file: SqliteStore) -> None:
    """It holds digests and sealed keys; its side files follow its mode."""
    for path in file.path.parent.glob("store.db*"):
        assert path.stat().st_mode & 0o077 == 0, path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process that writes and does not come to an end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def write_one(store: Store) -> float:
    """Try to write; the seconds until it was refused."""
    start = time.monotonic()
    with pytest.raises(StoreUnavailable), store.transaction() as tx:
        tx.append([a_change("key_1")])
    return time.monotonic() - start


def test_a_lock_that_is_not_given_back_is_told_within_the_timeout(file: SqliteStore) -> None:
    """F5: 503 within busy_timeout; reading goes on meanwhile."""
    with locked(file.path):
        took = write_one(file)

        assert BUSY_TIMEOUT * 0.5 <= took <= BUSY_TIMEOUT + SLACK
        assert find(file, DIGEST).records
        assert file.signing_keys() == []

    with file.transaction() as tx:
        tx.append([a_change("key_1")])


def test_writers_that_wait_together_are_told_together(file: SqliteStore) -> None:
    """F5: each within about busy_timeout, not one after the other."""
    took: list[float] = []
    with locked(file.path):
        threads = [threading.Thread(target=lambda: took.append(write_one(file))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(took) == 4
    assert max(took) <= 2 * BUSY_TIMEOUT + SLACK


def test_an_upgrade_of_a_locked_database_is_refused_with_a_sentence(file: SqliteStore) -> None:
    """The command line says so and exits 1; it does not throw."""
    file.close()
    with locked(file.path), pytest.raises(StoreUnavailable):
        file.upgrade()


def head_in_a_transaction(store: Store, *, read_only: bool) -> int:
    with store.transaction(read_only=read_only) as tx:
        return tx.head()


OPERATIONS: dict[str, Callable[[SqliteStore], object]] = {
    "find": lambda store: find(store, DIGEST),
    "narrowed_since": lambda store: narrowed_since(store, ["key_1"], 0),
    "head": lambda store: store.head(),
    "signing_keys": lambda store: store.signing_keys(),
    "check_schema": lambda store: store.check_schema(),
    "upgrade": lambda store: store.upgrade(),
    "transaction": lambda store: head_in_a_transaction(store, read_only=False),
    "read-only transaction": lambda store: head_in_a_transaction(store, read_only=True),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_missing_file_is_told_and_none_is_made(
    tmp_path: Path, operation: Callable[[SqliteStore], object]
) -> None:
    """F5: no silent new empty database."""
    store = SqliteStore(f"sqlite:///{tmp_path}/absent.db")

    with pytest.raises(StoreMissing, match=r"run coatcheck init"):
        operation(store)

    assert not store.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_file_that_is_no_database_is_told(
    tmp_path: Path, operation: Callable[[SqliteStore], object]
) -> None:
    """A disk that went bad, or a wrong mount: 503, never 401, and never an exception of SQLite."""
    path = tmp_path / "rubbish.db"
    path.write_bytes(b"This is no database at all. " * 100)
    store = SqliteStore(f"sqlite:///{path}")

    with pytest.raises(StoreUnavailable):
        operation(store)

    store.close()
    assert path.read_bytes().startswith(b"This is no database")


def within_a_second_or_so(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_away(store: SqliteStore) -> bool:
    try:
        find(store, DIGEST)
    except StoreUnavailable:
        return True
    return False


def test_a_file_deleted_while_open_is_noticed(file: SqliteStore) -> None:
    """F5: its connection would answer for ever from what nobody can revoke in any more."""
    assert find(file, DIGEST).records
    file.path.unlink()

    with pytest.raises(StoreMissing), file.transaction():
        pass
    assert within_a_second_or_so(lambda: is_away(file))
    assert not file.path.exists()


def test_a_file_deleted_while_only_reading_is_noticed(file: SqliteStore) -> None:
    """Without a write in between, too."""
    assert find(file, DIGEST).records
    file.path.unlink()

    assert within_a_second_or_so(lambda: is_away(file))
    assert not file.path.exists()


def test_a_file_that_was_replaced_is_read_anew(file: SqliteStore, tmp_path: Path) -> None:
    """A restore puts another file there; what was remembered of the first counts no more."""
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(file.path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("UPDATE api_keys SET revoked_at = 7")
        target.commit()
    assert find(file, DIGEST).records[DIGEST].revoked_at is None

    for side_file in tmp_path.glob("store.db-*"):
        side_file.unlink()
    copy.replace(file.path)

    assert within_a_second_or_so(lambda: find(file, DIGEST).records[DIGEST].revoked_at == 7)


def test_a_file_that_comes_back_is_used_again(file: SqliteStore, tmp_path: Path) -> None:
    """A mount that was away for a moment: no restart is needed."""
    file.close()
    shutil.move(file.path, tmp_path / "away.db")
    assert within_a_second_or_so(lambda: is_away(file))
    shutil.move(tmp_path / "away.db", file.path)

    assert within_a_second_or_so(lambda: not is_away(file))


def test_the_number_of_remembered_records_is_bounded(tmp_path: Path) -> None:
    """A million keys in use do not fill the memory of every worker."""
    store = SqliteStore(f"sqlite:///{tmp_path}/none.db")
    record = ApiKeyRecord(
        b"", None, "key_1", "org_1", "live", Scopes(), ("urn:a",), None, None, None, None
    )
    for n in range(sqlite._MOST_RECORDS + 100):
        last = store._remember(replace(record, digest=n.to_bytes(4, "big")))

    assert len(store._records) == sqlite._MOST_RECORDS
    assert store._records[last.digest] is last


def test_a_position_is_never_given_twice(file: SqliteStore) -> None:
    """Not even if somebody deletes the last row: tokens out there carry it."""
    head = file.head()
    with closing(sqlite3.connect(file.path)) as connection:
        connection.execute("DELETE FROM changes WHERE seq = ?", (head,))
        connection.commit()

    with file.transaction() as tx:
        tx.append([a_change("key_1")])

    assert file.head() == head + 1


def test_migrations_make_the_very_tables_that_the_models_describe(file: SqliteStore) -> None:
    """What Alembic does not compare: WITHOUT ROWID, AUTOINCREMENT."""

    def kinds(path: Path) -> dict[str, tuple[object, ...]]:
        with closing(sqlite3.connect(path)) as connection:
            return {
                row[1]: (row[2], row[3], row[4], row[5])
                for row in connection.execute("PRAGMA table_list")
                if row[0] == "main" and row[1] != "alembic_version"
            }

    from_models = file.path.with_name("models.db")
    engine = create_engine(f"sqlite:///{from_models}")
    METADATA.create_all(engine)
    engine.dispose()

    assert kinds(file.path) == kinds(from_models)
    assert "sqlite_sequence" in kinds(file.path)


BAD_URLS = ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:relative.db", "sqlite"]


@pytest.mark.parametrize("bad", BAD_URLS)
def test_a_sqlite_url_names_a_file(bad: str) -> None:
    """A database in memory would be another one in each process."""
    with pytest.raises(ValueError, match=r"sqlite:///file\.db"):
        open_store(bad)


@pytest.mark.parametrize("name", ["plain.db", "with blank.db", "a?b.db", "a#b.db", "a%41.db"])
def test_a_sqlite_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """What is special in a URI is part of the name here."""
    with opened(f"sqlite:///{tmp_path}/{name}", create=True) as store:
        assert store.head() == 1

    assert (tmp_path / name).exists()
