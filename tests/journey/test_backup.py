"""Backup and restore: what was revoked stays revoked.  answers.md F16, K28.

Everything here runs over BACKUPS; what only one database can be asked stands at the end.
"""

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from starlette.testclient import TestClient

from coatcheck import apikey, feed_profile
from coatcheck.server import catalog as catalogs
from coatcheck.server import catalog_start, sealing, setup, signing
from coatcheck.server import restore as restoring
from coatcheck.server.app import Service
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_keys, organizations
from coatcheck.server.manage.api_keys import Created
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.restore import JUMP, Restored
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, StoreUnavailable, open_store
from coatcheck.server.store.backups import BACKUPS, BackupFailed, backups_of
from coatcheck.server.store.tables import ChangeRow, Group, Project
from coatcheck.verifier.changes import Signed, merge
from support.deployment import HOUR, ISSUER, NOON, TESTER, Clock, form
from support.postgres import Server
from support.wire import claims_of

OPERATOR = Actor("cli:operator")
LATER = NOON + 600
_numbers = count(1)


@dataclass(frozen=True)
class Home:
    """A deployment as operators have it: settings, a keys directory and a database."""

    settings: Settings
    store: Store
    organization_id: str

    def api_key(self, organization_id: str | None = None) -> Created:
        new = api_keys.NewApiKey(organization_id or self.organization_id, "key", ("read",))
        catalog = catalogs.without_file(self.settings)
        return api_keys.create(self.store, catalog, new, TESTER, now=NOON, issuer=ISSUER)

    def api_keys(self, number: int) -> list[str]:
        """Ids of new API keys, made at once."""
        new = api_keys.NewApiKey(self.organization_id, "key", ("read",))
        catalog = catalogs.without_file(self.settings)
        made = api_keys.create_many(
            self.store, catalog, new, TESTER, now=NOON, issuer=ISSUER, count=number
        )
        return [api_key_id for api_key_id, _ in made]

    def revoke(self, made: Created) -> None:
        api_keys.revoke(self.store, made.api_key.id, TESTER, now=NOON + 60)

    def edit(self, made: Created, **changes: Any) -> None:
        catalog = catalogs.without_file(self.settings)
        api_keys.edit(
            self.store,
            catalog,
            made.api_key.id,
            lambda current: replace(current, **changes),
            TESTER,
            now=NOON + 60,
            issuer=ISSUER,
        )

    def delete(self, made: Created) -> None:
        catalog = catalogs.without_file(self.settings)
        api_keys.delete(self.store, catalog, made.api_key.id, TESTER, now=NOON + 60)

    def columns(self, made: Created, *names: str) -> tuple[object, ...]:
        """What stands in some columns of an API key."""
        with self.store.transaction(read_only=True) as tx:
            row = tx.api_key(made.api_key.id)
            return tuple(getattr(row, name) for name in names)

    def status(self, made: Created | str) -> str:
        api_key_id = made if isinstance(made, str) else made.api_key.id
        return api_keys.show(self.store, api_key_id, now=LATER).status

    def owner(self, key: str) -> str:
        """Whose secret this is, and whether it works: read as the token path reads."""
        store = open_store(self.settings.database_url)
        with closing(store), store.transaction(read_only=True) as tx:
            row = tx.api_key_by_digest(apikey.digest(key))
            if row is None:
                return "nobody"
            (secret,) = (one for one in tx.secrets(row.id) if one.mask == apikey.mask(key))
            return "ended" if (secret.expires_at or LATER + 1) <= LATER else row.id

    def changes(self) -> list[ChangeRow]:
        with self.store.transaction(read_only=True) as tx:
            return list(tx.changes_after(-1, 10_000))

    def backup(self, file: Path) -> Path:
        restoring.save(self.settings, self.store, file)
        return file

    def restore(self, file: Path, **choice: Any) -> Restored:
        now = choice.pop("now", LATER)
        restored = restoring.restore(self.settings, file, OPERATOR, now=now, **choice)
        # What is asked next is asked by a new process.
        self.store.close()
        return restored


@dataclass(frozen=True)
class Kind:
    """How tests get databases of one kind, each with the same deployment in it."""

    new: Callable[[Path], str]
    lose: Callable[[str], None]


def initialize(settings: Settings) -> str:
    store = open_store(settings.database_url)
    with closing(store):
        made = setup.initialize(
            settings,
            catalogs.without_file(settings),
            store,
            TESTER,
            now=NOON,
            organization_name="Acme",
        )
    return made.organization_id


@dataclass(frozen=True)
class Template:
    """A deployment that is copied, because signing keys take their time."""

    kind: Kind
    keys_dir: Path
    organization_id: str


def sqlite_kind(folder: Path, request: pytest.FixtureRequest) -> tuple[str, Kind]:
    path = folder / "template.db"

    def new(home: Path) -> str:
        shutil.copyfile(path, home / "coatcheck.db")
        return f"sqlite:///{home}/coatcheck.db"

    def lose(url: str) -> None:
        Path(url.removeprefix("sqlite:///")).unlink()

    return f"sqlite:///{path}", Kind(new, lose)


def postgres_kind(folder: Path, request: pytest.FixtureRequest) -> tuple[str, Kind]:
    server = request.getfixturevalue("postgres")
    template = server.new_database()

    def run(statement: str) -> None:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def new(home: Path) -> str:
        name = f"home_{os.getpid()}_{next(_numbers)}"
        run(f'CREATE DATABASE "{name}" TEMPLATE "{urlsplit(template).path[1:]}"')
        url: str = server.url(name)
        return url

    def lose(url: str) -> None:
        run(f'DROP DATABASE "{urlsplit(url).path[1:]}" WITH (FORCE)')

    return template, Kind(new, lose)


#: A new database has its line here.
KINDS = {"sqlite": sqlite_kind, "postgresql": postgres_kind}


def a_template(kind: str, request: pytest.FixtureRequest) -> Template:
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    folder = factory.mktemp("template")
    assert kind in KINDS, "a new way of backing up needs its line in KINDS"
    url, made = KINDS[kind](folder, request)
    settings = Settings(issuer=ISSUER, database_url=url, keys_dir=folder / "keys")
    return Template(made, settings.keys_dir, initialize(settings))


@pytest.fixture(scope="module", params=BACKUPS)
def each_template(request: pytest.FixtureRequest) -> Template:
    return a_template(request.param, request)


@pytest.fixture(scope="module")
def template(request: pytest.FixtureRequest) -> Template:
    """For what does not hang on the kind of database."""
    return a_template("sqlite", request)


class Homes:
    """Homes of one deployment, each with a database of its own."""

    def __init__(self, template: Template, folder: Path) -> None:
        self._template = template
        self._folder = folder
        self._made: list[Home] = []

    def new(self) -> Home:
        folder = self._folder / f"home{len(self._made)}"
        folder.mkdir()
        shutil.copytree(self._template.keys_dir, folder / "keys")
        url = self._template.kind.new(folder)
        settings = Settings(issuer=ISSUER, database_url=url, keys_dir=folder / "keys")
        self._made.append(Home(settings, open_store(url), self._template.organization_id))
        return self._made[-1]

    def lose(self, home: Home) -> None:
        """Take a database away, as a broken disk does."""
        home.store.close()
        self._template.kind.lose(home.settings.database_url)

    def close(self) -> None:
        for home in self._made:
            home.store.close()


@pytest.fixture
def each(each_template: Template, tmp_path: Path) -> Iterator[Homes]:
    with closing(Homes(each_template, tmp_path)) as homes:
        yield homes


@pytest.fixture
def each_home(each: Homes) -> Home:
    return each.new()


@pytest.fixture
def home(template: Template, tmp_path: Path) -> Iterator[Home]:
    with closing(Homes(template, tmp_path)) as homes:
        yield homes.new()


def test_what_was_ended_since_the_backup_stays_ended(each_home: Home, tmp_path: Path) -> None:
    """The database that is replaced knows: revoked, disabled, suspended, overlap ended, withdrawn.

    What was made since is gone, but for the successor of a secret that ended.
    """
    other = organizations.create(each_home.store, "Other", TESTER, now=NOON)
    revoked, disabled, rotated, left, stays = (each_home.api_key() for _ in range(5))
    of_other = each_home.api_key(other.id)
    with each_home.store.transaction(read_only=True) as tx:
        withdrawn = next(row.kid for row in tx.signing_keys() if row.algorithm == "RS256")
    file = each_home.backup(tmp_path / "backup")
    each_home.revoke(revoked)
    api_keys.disable(each_home.store, disabled.api_key.id, TESTER, now=NOON + 1)
    successor = api_keys.rotate(
        each_home.store, rotated.api_key.id, TESTER, overlap_s=60, now=NOON + 2
    )
    overlapping = api_keys.rotate(
        each_home.store, left.api_key.id, TESTER, overlap_s=HOUR, now=NOON + 2
    )
    organizations.suspend(each_home.store, other.id, TESTER, now=NOON + 3)
    signing.withdraw(each_home.store, withdrawn, TESTER, now=NOON + 4, force=True)
    made_since = each_home.api_key()
    before = each_home.changes()

    restored = each_home.restore(file)

    assert [each_home.status(key) for key in (revoked, disabled, stays)] == [
        *("revoked", "disabled", "active")
    ]
    assert each_home.owner(rotated.key) == "ended"
    assert each_home.owner(successor.key) == rotated.api_key.id
    assert each_home.owner(left.key) == each_home.owner(overlapping.key) == left.api_key.id
    assert each_home.owner(made_since.key) == "nobody"
    suspended_at = {
        one.id: one.suspended_at for one in organizations.list_organizations(each_home.store)
    }
    assert suspended_at == {each_home.organization_id: None, other.id: NOON + 3}
    assert each_home.status(of_other) == "active"
    with each_home.store.transaction(read_only=True) as tx:
        found = tx.signing_key(withdrawn)
        assert found is not None
        assert found.withdrawn_at is not None
    assert restored.lost_since is None
    assert dict(restored.carried_over) == {
        "api_key.revoked": 1,
        "api_key.disabled": 1,
        "api_key.rotated": 2,
        "api_key.overlap_ended": 1,
        "organization.suspended": 1,
        "signing_key.withdrawn": 1,
    }
    # Who ended it, and when, is still in the log, under new numbers.
    after = {row.change_id: row for row in each_home.changes()}
    (was,) = (row for row in before if row.what == "api_key.revoked")
    now_is = after[was.change_id]
    assert (now_is.at, now_is.actor, now_is.subject) == (was.at, was.actor, was.subject)
    assert now_is.seq is not None
    assert now_is.seq > restored.new_log.seq


def test_what_was_narrowed_since_the_backup_is_worth_what_it_is_worth_today(
    each_home: Home, tmp_path: Path
) -> None:
    """Fewer scopes or addresses, an earlier end; and of one widened again, its owner's last word.

    What an API key was bound to since comes along, or it would be bound to nothing.
    """
    store = each_home.store
    narrowed, widened, bound, renamed = (each_home.api_key() for _ in range(4))
    file = each_home.backup(tmp_path / "backup")
    with store.transaction() as tx:
        tx.add(a_project("prj_new", each_home), a_group("grp_new", models="small"))
    each_home.edit(narrowed, scopes=("read@Site/1",), networks=("10.0.0.0/8",), expires_at=LATER)
    each_home.edit(widened, scopes=("read@Site/1",), expires_at=LATER)
    each_home.edit(widened, scopes=("read", "write"), expires_at=LATER + HOUR, credit_limit=7)
    each_home.edit(bound, project_id="prj_new", group_id="grp_new", models=("small",))
    each_home.edit(renamed, name="another")

    restored = each_home.restore(file)

    worth = ("scopes", "networks", "expires_at", "credit_limit")
    assert each_home.columns(narrowed, *worth) == ("read@Site/1", "10.0.0.0/8", LATER, None)
    assert each_home.columns(widened, *worth) == ("read write", None, LATER + HOUR, 7)
    assert each_home.columns(bound, "project_id", "group_id", "models", "state") == (
        *("prj_new", "grp_new", "small", "active"),
    )
    assert each_home.columns(renamed, "name", "scopes") == ("key", "read")
    with store.transaction(read_only=True) as tx:
        project, group = tx.project("prj_new"), tx.group("grp_new")
    assert project is not None
    assert group is not None
    assert group.models == "small"
    assert restored.carried_over["api_key.narrowed"] == 3


def test_what_was_used_up_since_the_backup_stays_stopped(home: Home, tmp_path: Path) -> None:
    """A limit below what was used: its owner can raise it, and nobody can simply enable it."""
    key, file = home.api_key(), home.backup(tmp_path / "backup")
    home.edit(key, credit_limit=0)

    home.restore(file)

    assert home.columns(key, "state", "disabled_reason") == ("disabled", "quota")
    with pytest.raises(Conflict, match="credit"):
        api_keys.enable(home.store, key.api_key.id, TESTER, now=LATER)


def test_an_organization_that_was_spent_since_the_backup_stays_so(
    home: Home, tmp_path: Path
) -> None:
    """Unless its limit was raised; by today's limit either way."""
    spent, raised = (organizations.create(home.store, name, TESTER, now=NOON) for name in "ab")
    file = home.backup(tmp_path / "backup")
    with home.store.transaction() as tx:
        for made, limit, spent_at in ((spent, 5, NOON + 1), (raised, 9, None)):
            row = tx.organization(made.id)
            assert row is not None
            row.credit_limit, row.credit_spent_at = limit, spent_at
        tx.append(
            Change(What.ORGANIZATION_SPENT, one.id, TESTER, NOON + 1) for one in (spent, raised)
        )

    home.restore(file)

    with home.store.transaction(read_only=True) as tx:
        rows = [tx.organization(one.id) for one in (spent, raised)]
    found = [row and (row.credit_limit, row.credit_spent_at, row.suspended_at) for row in rows]
    assert found == [(5, NOON + 1, None), (9, None, None)]


def test_what_was_deleted_since_the_backup_stays_deleted(each_home: Home, tmp_path: Path) -> None:
    """With its secrets: nobody can tell any more that there were some."""
    key, rotated = each_home.api_key(), each_home.api_key()
    file = each_home.backup(tmp_path / "backup")
    successor = api_keys.rotate(
        each_home.store, rotated.api_key.id, TESTER, overlap_s=60, now=NOON + 1
    )
    for one in (key, rotated):
        each_home.delete(one)

    restored = each_home.restore(file)

    for one in (key, rotated):
        assert each_home.columns(one, "state", "deleted_at", "revoked_at") == (
            *("deleted", NOON + 60, NOON + 60),
        )
    assert {each_home.owner(one.key) for one in (key, rotated, successor)} == {"nobody"}
    assert restored.carried_over["api_key.deleted"] == 2


def test_projects_and_groups_are_what_they_are_today(each_home: Home, tmp_path: Path) -> None:
    """Archived stays archived, unless it was taken back; a group sells what it sells now."""
    store = each_home.store
    with store.transaction() as tx:
        tx.add(
            *(a_project(f"prj_{n}", each_home) for n in range(3)),
            *(a_group(f"grp_{n}", models="small large") for n in range(2)),
        )
    file = each_home.backup(tmp_path / "backup")
    with store.transaction() as tx:
        for n in range(2):
            project = tx.project(f"prj_{n}")
            assert project is not None
            project.archived_at = NOON + 1 if n == 0 else None
        group = tx.group("grp_0")
        assert group is not None
        group.models, group.requests_per_minute = "small", 5
        tx.append(
            [
                *(Change(What.PROJECT_ARCHIVED, f"prj_{n}", TESTER, NOON + 1) for n in range(2)),
                Change(What.PROJECT_RESTORED, "prj_1", TESTER, NOON + 2),
                Change(What.PROJECT_ARCHIVED, "prj_since", TESTER, NOON + 2),
                Change(What.GROUP_NARROWED, "grp_0", TESTER, NOON + 3),
                Change(What.GROUP_NARROWED, "grp_since", TESTER, NOON + 3),
            ]
        )

    each_home.restore(file)

    with store.transaction(read_only=True) as tx:
        projects = [tx.project(f"prj_{n}") for n in range(3)]
        groups = [tx.group(f"grp_{n}") for n in range(2)]
    assert [one and one.archived_at for one in projects] == [NOON + 1, None, None]
    assert [one and (one.models, one.requests_per_minute) for one in groups] == [
        *(("small", 5), ("small large", None)),
    ]


def test_the_catalog_of_running_services_stays_known(each_home: Home, tmp_path: Path) -> None:
    """They go on with it; whoever starts with the backup's ends the tokens that they made since."""
    store = each_home.store
    before = catalogs.without_file(each_home.settings)
    after = replace(before, default_audiences={"live": "urn:another"})
    catalog_start.note(store, before, now=NOON)
    file = each_home.backup(tmp_path / "backup")
    assert catalog_start.note(store, after, now=NOON + 1)

    each_home.restore(file)

    assert not catalog_start.note(store, after, now=LATER)
    assert catalog_start.note(store, before, now=LATER)


def a_project(project_id: str, home: Home) -> Project:
    return Project(
        id=project_id, organization_id=home.organization_id, name="project", created_at=NOON
    )


def a_group(group_id: str, models: str) -> Group:
    return Group(id=group_id, name="group", price_multiplier=1, models=models, created_at=NOON)


def test_a_restore_starts_a_new_log_and_narrows_everything(each_home: Home, tmp_path: Path) -> None:
    """contract.md: a new name, a jump of 2^32, one `*` entry: every token from before dies.

    A process that had the database open sees it at its next look.
    """
    name, file = each_home.store.log(), each_home.backup(tmp_path / "backup")
    each_home.revoke(each_home.api_key())
    last = each_home.store.head()

    restored = each_home.restore(file)

    assert restored.new_log.seq == last + JUMP
    assert restored.new_log.log != name
    (row,) = [row for row in each_home.changes() if row.seq == restored.new_log.seq]
    assert (row.what, row.subject, row.narrows) == ("log.restarted", "*", True)
    assert row.actor == OPERATOR.id
    assert json.loads(row.detail)["replacedLog"] == name
    again = open_store(each_home.settings.database_url)
    with closing(again):
        assert again.log() == restored.new_log.log
        assert again.head() >= restored.new_log.seq


def test_restored_twice_it_counts_on_and_keeps_what_it_kept(home: Home, tmp_path: Path) -> None:
    """Of the same backup: the second jump starts where the first one ended."""
    key, file = home.api_key(), home.backup(tmp_path / "backup")
    home.revoke(key)

    first = home.restore(file)
    second = home.restore(file, now=LATER + 1)

    assert second.new_log.seq > first.new_log.seq + JUMP - 1
    assert home.status(key) == "revoked"
    assert dict(second.carried_over) == {"api_key.revoked": 1}


def test_a_newer_backup_after_an_older_one(home: Home, tmp_path: Path) -> None:
    """The logs have parted: each change is compared, and what is known is not told twice."""
    early, late = home.api_key(), home.api_key()
    old = home.backup(tmp_path / "old")
    home.revoke(early)
    new = home.backup(tmp_path / "new")
    home.restore(old)
    home.revoke(late)

    restored = home.restore(new)

    assert [home.status(early), home.status(late)] == ["revoked", "revoked"]
    assert dict(restored.carried_over) == {"api_key.revoked": 1}


def test_a_withdrawn_signing_key_that_the_backup_lacks_is_refused_for_ever(
    home: Home, tmp_path: Path
) -> None:
    """It comes back as withdrawn only, and those before it can sign again."""
    file = home.backup(tmp_path / "backup")
    sealing_key = sealing.load(home.settings.keys_dir).newest()
    kid = signing.rotate(home.store, sealing_key, "ES256", TESTER, now=NOON + 1, at_once=True)
    signing.withdraw(home.store, kid, TESTER, now=NOON + 2, force=True)

    restored = home.restore(file)

    assert restored.new_log.signing_keys == ()
    with home.store.transaction(read_only=True) as tx:
        found = tx.signing_key(kid)
    assert found is not None
    assert found.withdrawn_at is not None
    ring = ring_of(home)
    assert ring.signer("ES256", LATER).kid != kid


def test_where_the_last_signing_key_was_withdrawn_a_new_one_is_made(
    home: Home, tmp_path: Path
) -> None:
    """Its successor is gone with what was made since; a restored service signs all the same."""
    file = home.backup(tmp_path / "backup")
    old = ring_of(home).signer("ES256", LATER).kid
    sealing_key = sealing.load(home.settings.keys_dir).newest()
    since = signing.rotate(home.store, sealing_key, "ES256", TESTER, now=NOON + 1, at_once=True)
    signing.withdraw(home.store, old, TESTER, now=NOON + 2)

    restored = home.restore(file)

    (made,) = restored.new_log.signing_keys
    assert ring_of(home).signer("ES256", LATER).kid == made
    assert made not in (old, since)


def test_where_nobody_was_to_sign_nobody_signs(home: Home, tmp_path: Path) -> None:
    """`withdraw --force` without a successor is an operator's decision, and stays one."""
    file = home.backup(tmp_path / "backup")
    old = ring_of(home).signer("ES256", LATER).kid
    signing.withdraw(home.store, old, TESTER, now=NOON + 2, force=True)

    assert home.restore(file).new_log.signing_keys == ()
    with pytest.raises(signing.NoSigner):
        ring_of(home).signer("ES256", LATER)


def ring_of(home: Home) -> signing.Ring:
    store = open_store(home.settings.database_url)
    with closing(store):
        keeper = signing.RingKeeper(store, sealing.load(home.settings.keys_dir))
        return keeper.at(store.head())


# --- what cannot be known


def test_without_the_replaced_database_nothing_happens_until_somebody_chose(
    each: Homes, tmp_path: Path
) -> None:
    """K28: the gap is told, with its beginning; whoever restores says it, or suspends all."""
    home = each.new()
    key, file = home.api_key(), home.backup(tmp_path / "backup")
    home.revoke(key)
    each.lose(home)

    with pytest.raises(Invalid, match=r"at 2027-01-15T08:00:00Z is unknown.*--suspend-all"):
        home.restore(file)
    with pytest.raises(Invalid, match="say 2027-01-15T08:00:00Z"):
        home.restore(file, accept_loss_since="2027-01-15T08:00:01Z")
    with pytest.raises(Invalid, match="no existing date"):
        home.restore(file, accept_loss_since="yesterday")
    assert not open_store(home.settings.database_url).exists()

    restored = home.restore(file, accept_loss_since="2027-01-15T08:00:00Z")

    assert restored.lost_since == NOON
    assert home.status(key) == "active"
    assert restored.new_log.seq % JUMP == restored.new_log.seq - JUMP * 11
    assert restored.replaced is None


def test_suspending_all_lets_nothing_live_that_nobody_looked_at(
    each: Homes, tmp_path: Path
) -> None:
    """Which API keys and signing keys were withdrawn is unknown: none of them goes on."""
    home = each.new()
    alive, dead, gone = home.api_key(), home.api_key(), home.api_key()
    home.revoke(dead)
    home.delete(gone)
    file = home.backup(tmp_path / "backup")
    kids = {one.kid for one in ring_of(home).signing_keys}
    each.lose(home)

    restored = home.restore(file, suspend_all=True)

    assert [home.status(alive), home.status(dead)] == ["disabled", "revoked"]
    # Its lists read the state, which no listener keeps where many rows change at once.
    assert home.columns(alive, "state", "disabled_reason") == ("disabled", "manual")
    assert home.columns(dead, "state") == ("revoked",)
    assert home.columns(gone, "state") == ("deleted",)
    assert restored.new_log.suspended == 2  # the admin's, too
    assert len(restored.new_log.signing_keys) == len(kids)
    ring = ring_of(home)
    assert {one.kid for one in ring.published(LATER, None)} == set(restored.new_log.signing_keys)
    assert ring.signer("ES256", LATER).kid not in kids
    api_keys.enable(home.store, alive.api_key.id, TESTER, now=LATER)
    assert home.status(alive) == "active"


def test_another_deployment_says_nothing_of_the_backup(home: Home, tmp_path: Path) -> None:
    """A database of the same issuer that was set up anew knows of no revocation; it is kept."""
    key, file = home.api_key(), home.backup(tmp_path / "backup")
    fresh = home.settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/fresh.db"})
    initialize(fresh)
    with closing(open_store(fresh.database_url)) as store:
        other = Home(fresh, store, home.organization_id)
        with pytest.raises(Invalid, match="belongs to another deployment"):
            other.restore(file)

        restored = other.restore(file, accept_loss_since="2027-01-15T08:00:00Z")

        assert restored.replaced is not None
        assert Path(restored.replaced).exists()
        assert other.status(key) == "active"


def test_a_backup_of_another_issuer_is_refused(home: Home, tmp_path: Path) -> None:
    """And nothing is changed."""
    file, log = home.backup(tmp_path / "backup"), home.store.log()
    settings = home.settings.model_copy(update={"issuer": "https://other.example"})

    with pytest.raises(setup.OtherDeployment):
        restoring.restore(settings, file, OPERATOR, now=LATER)

    assert home.store.log() == log


def test_without_its_sealing_key_a_backup_is_not_restored(home: Home, tmp_path: Path) -> None:
    """It is not in the backup; the message names the file that is missing."""
    file, log = home.backup(tmp_path / "backup"), home.store.log()
    (sealing_file,) = home.settings.keys_dir.glob("*.key")
    sealing_file.unlink()
    sealing.create(home.settings.keys_dir)

    with pytest.raises(sealing.BadSealingKey, match=sealing_file.stem.removeprefix("sealing-")):
        home.restore(file)

    assert home.store.log() == log


def test_what_this_version_does_not_know_how_to_keep_stops_it(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown means no: a change of a newer version may be a revocation."""
    file, log = home.backup(tmp_path / "backup"), home.store.log()
    monkeypatch.setattr(What.API_KEY_REVOKED, "text", "api_key.burned")
    home.revoke(home.api_key())

    with pytest.raises(Conflict, match=r"api_key\.burned"):
        home.restore(file)

    assert home.store.log() == log


def test_every_kind_of_narrowing_is_known_to_a_restore() -> None:
    """A new one says in `restore` how it is kept; else a restore would stop, or revive."""
    assert {what.text for what in What if what.narrows} <= set(restoring._APPLY)


# --- a new log in place


def test_a_new_log_in_place_narrows_everything_and_nothing_else(each_home: Home) -> None:
    """After a failover with loss.  Twice is twice: the second jumps, too."""
    key, name, last = each_home.api_key(), each_home.store.log(), each_home.store.head()

    first = restoring.new_log(each_home.settings, each_home.store, OPERATOR, now=NOON)
    second = restoring.new_log(each_home.settings, each_home.store, OPERATOR, now=NOON)

    assert (first.replaced_log, second.replaced_log) == (name, first.log)
    assert first.seq == last + JUMP
    assert second.seq == first.seq + JUMP
    assert each_home.status(key) == "active"
    rows = [row for row in each_home.changes() if row.subject == feed_profile.EVERYTHING]
    assert [row.seq for row in rows] == [first.seq, second.seq]


def test_a_new_log_can_suspend_all(home: Home) -> None:
    """The safe choice of whoever cannot know what was lost."""
    key = home.api_key()

    made = restoring.new_log(home.settings, home.store, OPERATOR, now=LATER, suspend_all=True)

    assert home.status(key) == "disabled"
    assert set(made.signing_keys) == {one.kid for one in ring_of(home).published(LATER, None)}


# --- under load


class Revoking:
    """Threads that revoke until they are stopped, and remember what was acknowledged."""

    def __init__(self, home: Home, keys: list[str]) -> None:
        self._home = home
        self._keys = iter(keys)
        self._taking = threading.Lock()
        self._stopped = threading.Event()
        self.acknowledged: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]

    def __enter__(self) -> "Revoking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, number: int) -> None:
        while len(self.acknowledged) < number and any(t.is_alive() for t in self._threads):
            self._stopped.wait(0.005)

    def _run(self) -> None:
        store = open_store(self._home.settings.database_url)
        with closing(store):
            while not self._stopped.is_set():
                with self._taking:
                    key = next(self._keys, None)
                if key is None:
                    return
                # Refused is refused: only what was answered counts.
                with suppress(StoreUnavailable, NotFound):
                    api_keys.revoke(store, key, TESTER, now=NOON)
                    self.acknowledged.append(key)
                self._stopped.wait(0.002)


def test_a_backup_under_load_has_all_that_was_acknowledged_before(
    each: Homes, tmp_path: Path
) -> None:
    """F16: taken while revocations run, restored elsewhere: none of them is missing."""
    home, elsewhere = each.new(), each.new()
    each.lose(elsewhere)
    keys = home.api_keys(60)
    with Revoking(home, keys) as revoking:
        revoking.wait_for(20)
        acknowledged = list(revoking.acknowledged)
        file = home.backup(tmp_path / "backup")

    elsewhere.restore(file, accept_loss_since="2027-01-15T08:00:00Z")

    assert len(acknowledged) >= 20
    assert {elsewhere.status(key) for key in acknowledged} == {"revoked"}


def test_a_restore_under_load_loses_nothing_that_was_acknowledged(
    each_home: Home, tmp_path: Path
) -> None:
    """Neither what came before, nor what came while the one database took the other's place."""
    keys = each_home.api_keys(100)
    file = each_home.backup(tmp_path / "backup")
    with Revoking(each_home, keys) as revoking:
        revoking.wait_for(20)
        each_home.restore(file)
        revoking.wait_for(len(revoking.acknowledged) + 10)

    assert len(revoking.acknowledged) >= 30
    alive = [key for key in revoking.acknowledged if each_home.status(key) != "revoked"]
    assert alive == []


# --- a service that runs


def test_a_running_service_notices_and_kills_every_token(each_home: Home, tmp_path: Path) -> None:
    """Records, ring, feed and `as_of` follow the new log; no restart, no second chance."""
    key, revoked = each_home.api_key(), each_home.api_key()
    service = Service(each_home.settings, each_home.store, Clock())
    with TestClient(service, base_url=ISSUER) as http:

        def ask(path: str, **parameters: str) -> Any:
            """What is answered in the end: away for a moment (503) is no answer."""
            answers = []

            def is_answered() -> bool:
                answers.append(http.post(path, data=parameters))
                return answers[-1].status_code != 503

            wait_until(is_answered)
            return answers[-1].json()

        def is_active(token: str) -> bool:
            told = ask("/oauth/introspect", token=token, client_secret=key.key)
            return bool(told["active"])

        token = ask("/oauth/token", **form(key.key))["access_token"]
        assert is_active(token)
        before = feed_of(http, each_home.store.log())
        file = each_home.backup(tmp_path / "backup")
        each_home.revoke(revoked)

        restored = restoring.restore(each_home.settings, file, OPERATOR, now=NOON)

        wait_until(lambda: not is_active(token))
        # A node among many vouches for what it knows for half a second more.
        after = feed_of(http, restored.new_log.log)
        assert ask("/oauth/token", **form(revoked.key))["code"] == "api_key_revoked"
        issued = ask("/oauth/token", **form(key.key))["access_token"]
        assert claims_of(issued)["as_of"] >= restored.new_log.seq
        assert is_active(issued)
    assert before["log"] == restored.new_log.replaced_log
    assert after["seq"] >= before["seq"] + JUMP
    assert after["entries"][feed_profile.subject("*")] == restored.new_log.seq
    # A follower takes it: the name is new, and the number is higher.
    merged = merge(merge(None, signed(before), 0.0), signed(after), 0.0)
    assert merged.log == restored.new_log.log


def feed_of(http: TestClient, log: str) -> dict[str, Any]:
    """What the feed says once it is of this log."""
    claims: dict[str, Any] = {}

    def is_there() -> bool:
        answer = http.get("/oauth/revocations")
        if answer.status_code == 200:
            claims.update(claims_of(answer.text))
        return claims.get("log") == log

    wait_until(is_there)
    return claims


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def signed(claims: dict[str, Any]) -> Signed:
    return Signed(
        claims["log"], claims["seq"], claims["entries"], frozenset(claims["kids"]), claims["iat"]
    )


# --- a failure on the way


def test_a_failure_in_the_last_step_leaves_everything_as_it_was(
    each_home: Home, tmp_path: Path
) -> None:
    """Killed, out of space, or refused: the database in place is the old one, and is written to."""
    key, file = each_home.api_key(), each_home.backup(tmp_path / "backup")
    log, calls = each_home.store.log(), count()

    def breaks(live: Store) -> None:
        # The first call comes while others may write, the last one when nobody may.
        if next(calls) == 1:
            raise BackupFailed("out of space")

    backups = backups_of(each_home.settings.database_url)
    with backups.staged(file) as staged, pytest.raises(BackupFailed, match="out of space"):
        staged.replace(breaks)

    with closing(open_store(each_home.settings.database_url)) as again:
        assert again.log() == log
    each_home.revoke(key)
    assert each_home.status(key) == "revoked"
    assert not list((tmp_path / "home0").glob(".coatcheck.db*"))


# --- SQLite alone


def test_another_process_that_never_lets_go_is_told_about(home: Home, tmp_path: Path) -> None:
    """A frozen writer must not freeze the restore with it; nothing was changed."""
    file, log = home.backup(tmp_path / "backup"), home.store.log()
    path = home.settings.database_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BackupFailed, match="does not let go"):
            home.restore(file)
    assert home.store.log() == log


# --- PostgreSQL alone


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


NOBODY = "postgresql://me:hunter2@127.0.0.1:1/name?sslmode=disable"


def test_without_pg_dump_it_says_what_to_install(programs: Path, tmp_path: Path) -> None:
    """The service's image may not have the client programs."""
    with pytest.raises(BackupFailed, match="pg_dump is not on PATH: install"):
        backups_of(NOBODY).save(tmp_path / "backup")


def test_the_password_is_no_argument_and_a_version_mismatch_is_told(
    programs: Path, tmp_path: Path
) -> None:
    """Arguments can be read by every user of the machine."""
    (programs / "pg_dump").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n'
        f'echo "$PGUSER:$PGPASSWORD@$PGHOST:$PGPORT/$PGDATABASE $PGSSLMODE" > {tmp_path}/env\n'
        "echo 'aborting because of server version mismatch' >&2\nexit 1\n"
    )
    (programs / "pg_dump").chmod(0o755)

    with pytest.raises(BackupFailed, match=r"version mismatch.*client programs") as told:
        backups_of(NOBODY).save(tmp_path / "backup")

    assert "hunter2" not in str(told.value) + (tmp_path / "arguments").read_text()
    assert (tmp_path / "env").read_text() == "me:hunter2@127.0.0.1:1/name disable\n"


def test_a_database_that_others_share_is_not_replaced(postgres: Server, tmp_path: Path) -> None:
    """The restore would turn their tables back, too."""
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE invoices (id int)")

    with pytest.raises(BackupFailed, match=r"public\.invoices"):
        backups_of(url).save(tmp_path / "backup")


def test_who_may_not_make_databases_is_told_how(postgres: Server, tmp_path: Path) -> None:
    """And the database in place stays as it is."""
    role = f"plain_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(f"CREATE DATABASE {role} OWNER {role}".encode())
    url = postgres.url(role).replace("coatcheck@", f"{role}@")
    settings = Settings(issuer=ISSUER, database_url=url, keys_dir=tmp_path / "keys")
    initialize(settings)
    with closing(open_store(url)) as store:
        home = Home(settings, store, "")
        file, log = home.backup(tmp_path / "backup"), store.log()

        with pytest.raises(BackupFailed, match=r"CREATEDB.*coatcheck db new-log"):
            home.restore(file)

        assert store.log() == log
