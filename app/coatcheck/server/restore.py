"""Backup and restore: a restore never revives what was revoked after the backup was made.

Every token that was issued before a restore dies by it: the change log goes on under a new name,
far above every number that anybody has seen, and its first row narrows everything.  That does
not reach API keys, which are records: what was narrowed since the backup is read from the
database that is replaced, and applied to the restored one before anybody can connect to it.  If
that database is lost, nobody can know, and whoever restores has to choose.

What was made since the backup is gone; what was ended since stays ended.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from coatcheck import base62
from coatcheck.server import sealing, setup, signing
from coatcheck.server.changes import EVERYTHING, Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Conflict, Invalid
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, StoreUnavailable, Transaction, open_store
from coatcheck.server.store.backups import BackupFailed, backups_of, new_file
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeySecret,
    ChangeRow,
    Group,
    Organization,
    Project,
    SigningKey,
)
from coatcheck.token_profile import Algorithm

#: Between the last sequence number of a log and the first of the one that takes its place.
JUMP: Final = 2**32
#: Changes that one transaction carries over: each asks several times, and no write may be long.
_CARRIED: Final = 25
#: API keys that one transaction disables.
_DISABLED: Final = 1000
_WHAT: Final = {what.text: what for what in What}


@dataclass(frozen=True, slots=True)
class Saved:
    """A backup that was written.

    Attributes:
        seq: everything up to this row of the change log is in it.
    """

    file: str
    size: int
    log: str
    seq: int

    def to_json(self) -> dict[str, object]:
        return {"file": self.file, "bytes": self.size, "log": self.log, "seq": self.seq}


@dataclass(frozen=True, slots=True)
class NewLog:
    """A change log that took another's place.

    Attributes:
        seq: its first row, which narrows everything.
        last_change_at: of the log before, in seconds since the epoch.  What was changed after
            this and is not in the database is lost.
        suspended: how many API keys were disabled with it.
        signing_keys: kids that were made because none before may sign.
    """

    log: str
    seq: int
    replaced_log: str
    last_change_at: int
    suspended: int
    signing_keys: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "log": self.log,
            "seq": self.seq,
            "replacedLog": self.replaced_log,
            "lastChangeAt": forms.rfc3339(self.last_change_at),
            "apiKeysDisabled": self.suspended,
            "newSigningKeys": list(self.signing_keys),
        }


@dataclass(frozen=True, slots=True)
class Restored:
    """A backup that was put in place.

    Attributes:
        carried_over: what the replaced database said since the backup, by kind, as applied.
        lost_since: None if the replaced database was read; else the moment, in seconds since the
            epoch, after which changes are unknown.
        replaced: where the replaced database is kept; None if there was none.
    """

    new_log: NewLog
    carried_over: Mapping[str, int]
    lost_since: int | None
    replaced: str | None

    def to_json(self) -> dict[str, object]:
        return self.new_log.to_json() | {
            "carriedOver": dict(self.carried_over),
            "lostSince": forms.rfc3339(self.lost_since),
            "replaced": self.replaced,
        }


def save(settings: Settings, store: Store, file: Path, *, force: bool = False) -> Saved:
    """Write a backup: everything that was acknowledged before this was called is in it.

    Args:
        force: take the place of a file that is there.

    Raises:
        BackupFailed: it cannot be written there; the message says why.
        StoreUnavailable: the database did not answer.
    """
    backups = backups_of(settings.database_url)
    if backups.is_part(file):
        raise BackupFailed(f"{file} is the database itself: choose another name")
    log, seq = store.log(), store.head()
    with new_file(file, force=force) as beside:
        backups.save(beside)
    return Saved(str(file), file.stat().st_size, log, seq)


def restore(
    settings: Settings,
    file: Path,
    actor: Actor,
    *,
    now: int,
    accept_loss_since: str | None = None,
    suspend_all: bool = False,
) -> Restored:
    """Put a backup in the place of the database that the settings name.

    1. The backup becomes a database that nobody else uses.  It is whole, of this deployment, and
       brought to this version's schema.
    2. It is known what was narrowed since: from the database in place, or else whoever restores
       has said what to do without.
    3. Its change log starts anew, above everything that anybody has seen.
    4. What was narrowed since is applied to it.
    5. Its signing keys open with the sealing keys that are here, and some can sign.
    6. It takes the other's place, while nobody can write, with all that was narrowed until then.

    Until the last step is done nothing has changed.

    Args:
        now: seconds since the epoch.
        accept_loss_since: a moment at or before the backup's last change (RFC 3339): what was
            revoked after it and cannot be known works again.
        suspend_all: disable all API keys, withdraw all signing keys and make new ones.

    Raises:
        Invalid: nobody chose what to do about changes that are lost.
        BackupFailed, SchemaMismatch, OtherDeployment, BadSealingKey, StoreUnavailable: why it
            cannot be restored.
        Conflict: the database in place was written by a newer version.
    """
    with ExitStack() as stack:
        # 1
        if not file.is_file():
            raise BackupFailed(f"there is no file {file}")
        staged = stack.enter_context(backups_of(settings.database_url).staged(file))
        _require_of_this_deployment(settings, staged.store, file)
        # 2
        live, why_not = stack.enter_context(_in_place(settings, staged.store))
        last = _last_change(staged.store)
        if live is None and not suspend_all:
            _require_acceptance(accept_loss_since, last, why_not)
        # 3
        lost_since = last.at if live is None else None
        detail: dict[str, object] = {
            "by": "restore",
            "backupSeq": last.seq,
            "lostSince": forms.rfc3339(lost_since),
        }
        above = None if live is None else _last_change(live).seq
        started = _restart(
            settings, staged.store, actor, now, above=above, detail=detail, suspend_all=suspend_all
        )
        # 4
        carry_over = _CarryOver(staged.store, last, below=started.seq)
        if live is not None:
            carry_over(live)
        # 5
        made = _signing_again(settings, staged.store, live, actor, now)
        # 6
        if live is not None:
            # Its connections are about to be cut, with those of everybody else.
            live.close()
        replaced = staged.replace(None if live is None else carry_over)
        started = dataclasses.replace(started, signing_keys=started.signing_keys + made)
        return Restored(started, dict(carry_over.counts), lost_since, replaced)


def new_log(
    settings: Settings, store: Store, actor: Actor, *, now: int, suspend_all: bool = False
) -> NewLog:
    """Start a new change log in place: after a failover with loss, or a restore by other means.

    Everything issued before dies.  Done twice, it is done twice, and changes nothing more.

    Raises:
        BadSealingKey: `suspend_all` needs the sealing key.
        StoreUnavailable: the database did not answer.
    """
    detail: dict[str, object] = {"by": "new-log"}
    return _restart(settings, store, actor, now, above=None, detail=detail, suspend_all=suspend_all)


def last_change_at(store: Store) -> int:
    """When the change log ends, in seconds since the epoch.  Raises StoreUnavailable."""
    return _last_change(store).at


# --- 1: the backup


def _require_of_this_deployment(settings: Settings, staged: Store, file: Path) -> None:
    if not staged.exists():
        raise BackupFailed(f"{file} holds no deployment: is it a backup of Coatcheck?")
    staged.upgrade()
    setup.require_deployment(settings, staged)


# --- 2: the database in place


@contextmanager
def _in_place(settings: Settings, staged: Store) -> Iterator[tuple[Store | None, str]]:
    """The database that is to be replaced; None, and why, if it tells nothing of the backup."""
    live = open_store(settings.database_url)
    try:
        try:
            if not setup.is_initialized(live):
                yield None, "there is no deployment in the database to be replaced"
                return
            if not _continues(live, staged):
                yield None, "the database to be replaced belongs to another deployment"
                return
        except StoreUnavailable as error:
            yield None, f"the database to be replaced cannot be read ({error})"
            return
        yield live, ""
    finally:
        live.close()


def _continues(live: Store, staged: Store) -> bool:
    """Whether both logs begin with the same row."""
    with staged.transaction(read_only=True) as here:
        first = here.changes_after(-1, 1)[0].change_id
    with live.transaction(read_only=True) as there:
        return bool(there.known_changes([first]))


def _require_acceptance(accepted: str | None, last: "_Last", why_not: str) -> None:
    end = forms.rfc3339(last.at)
    if accepted is None:
        raise Invalid(
            "accept-loss-since",
            f"{why_not}: what was revoked after the backup's last change at {end} is unknown, and"
            " would work again.  Say --suspend-all to disable every API key and replace every"
            " signing key, and enable what you have looked at; or --accept-loss-since"
            f" {end} if nothing was revoked since",
        )
    if forms.instant("accept-loss-since", accepted) > last.at:
        raise Invalid("accept-loss-since", f"the backup ends earlier: say {end}")


# --- 3: the new log


@dataclass(frozen=True, slots=True)
class _Last:
    """The end of a change log.  `at` in seconds since the epoch."""

    seq: int
    change_id: str
    at: int


def _last_change(store: Store) -> _Last:
    with store.transaction(read_only=True) as tx:
        row = tx.last_change()
    if row is None or row.seq is None:
        raise BackupFailed("the change log is empty: this is no deployment")
    return _Last(row.seq, row.change_id, row.at)


def _restart(
    settings: Settings,
    store: Store,
    actor: Actor,
    now: int,
    *,
    above: int | None,
    detail: dict[str, object],
    suspend_all: bool,
) -> NewLog:
    """Start a new log, and end all that nobody can vouch for, if that was asked for.

    Args:
        above: the last sequence number that anybody can have seen; None: unknown.
    """
    last = _last_change(store)
    if above is None:
        # A restore of the same backup that is lost by now may have jumped before.  It did so at
        # another minute.
        jumps = max(1, 1 + (now - last.at) // 60)
        above = last.seq + (jumps - 1) * JUMP
    first = max(above, last.seq) + JUMP
    name = base62.random_text(22)
    with store.transaction() as tx:
        deployment = tx.deployment()
        assert deployment is not None  # noqa: S101 - `require_deployment` looked
        replaced = deployment.log
        tx.rename_log(name, first - 1)
        detail = detail | {"replacedLog": replaced, "suspendAll": suspend_all}
        tx.append([Change(What.LOG_RESTARTED, EVERYTHING, actor, now, detail=detail)])
        row = tx.last_change()
        assert row is not None  # noqa: S101 - it was appended a moment ago
        assert row.seq is not None  # noqa: S101 - by the database
    suspended = _suspend_all(store, actor, now) if suspend_all else 0
    kids = _replace_signing_keys(settings, store, actor, now) if suspend_all else ()
    return NewLog(name, row.seq, replaced, last.at, suspended, kids)


def _suspend_all(store: Store, actor: Actor, now: int) -> int:
    """Disable every API key that is neither revoked nor disabled.  Returns how many."""
    count, after = 0, ""
    while True:
        with store.transaction() as tx:
            rows = tx.api_keys(None, after, _DISABLED)
            if not rows:
                return count
            alive = [row for row in rows if row.revoked_at is None and row.disabled_at is None]
            tx.disable_api_keys([row.id for row in alive], now)
            tx.append(
                Change(
                    What.API_KEY_DISABLED,
                    row.id,
                    actor,
                    now,
                    row.organization_id,
                    wider=row.organization_id,
                    detail={"by": "suspend-all"},
                )
                for row in alive
            )
        count, after = count + len(alive), rows[-1].id


def _replace_signing_keys(
    settings: Settings, store: Store, actor: Actor, now: int
) -> tuple[str, ...]:
    """Withdraw every signing key, and make one for each line that had one."""
    with store.transaction(read_only=True) as tx:
        rows = [row for row in tx.signing_keys() if row.withdrawn_at is None]
    for row in rows:
        signing.withdraw(store, row.kid, actor, now=now, force=True)
    # Only now: the one that sealed those may be lost, and counts no more.
    sealing_key = signing.sealing_key_in_use(store, sealing.load(settings.keys_dir))
    lines = {(row.purpose, row.algorithm) for row in rows}
    return tuple(
        signing.rotate(store, sealing_key, algorithm, actor, now=now, at_once=True, purpose=purpose)
        for purpose, algorithm in signing.LINES
        if (purpose, algorithm) in lines
    )


# --- 4: what was narrowed since


@dataclass(frozen=True, slots=True)
class _State:
    """What the replaced database says of the subjects of some changes."""

    api_keys: Mapping[str, ApiKey | None]
    secrets: Mapping[str, Sequence[ApiKeySecret]]
    organizations: Mapping[str, Organization | None]
    projects: Mapping[str, Project | None]
    groups: Mapping[str, Group | None]
    signing_keys: Mapping[str, SigningKey | None]


@dataclass(slots=True)
class _CarryOver:
    """Applies to a restored database what the replaced one says was narrowed since the backup.

    Attributes:
        ends: where the backup's log ends.
        below: the new log's first row; the replaced log has to end before it.
        counts: by kind of change, how many were applied.
    """

    staged: Store
    ends: _Last
    below: int
    counts: Counter[str] = field(default_factory=Counter)
    _after: int | None = None

    def __call__(self, live: Store) -> None:
        """Apply all there is, from where the last call ended."""
        if self._after is None:
            self._after = self._branching(live)
        while True:
            with live.transaction(read_only=True) as there:
                rows = there.changes_after(self._after, _CARRIED)
                if rows and self._number(rows[-1]) >= self.below:
                    raise Conflict("another new log was started meanwhile: try again")
                told = [row for row in rows if row.narrows or row.what in _APPLY]
                state = _state(there, told)
            if not rows:
                self._keep_catalog(live)
                return
            with self.staged.transaction() as here:
                known = here.known_changes([row.change_id for row in told])
                new = [row for row in told if row.change_id not in known]
                applied = [row for row in new if _apply(here, row, state)]
                if applied:
                    here.append(map(_again, applied))
            self.counts.update(row.what for row in applied)
            self._after = self._number(rows[-1])

    def _keep_catalog(self, live: Store) -> None:
        """Services go on with the catalog that they started with, and not with the backup's.

        Tokens that they make from now on have to end once one starts with another.
        """
        with live.transaction(read_only=True) as there:
            deployment = there.deployment()
        if deployment is not None and deployment.catalog is not None:
            with self.staged.transaction() as here:
                here.deployment_for_change().catalog = deployment.catalog

    def _number(self, row: ChangeRow) -> int:
        assert row.seq is not None  # noqa: S101 - the database counts
        return row.seq

    def _branching(self, live: Store) -> int:
        """Up to where both logs are the same.

        Where the log in place does not hold the end of the backup's, they parted somewhere
        before: each row is compared.
        """
        with live.transaction(read_only=True) as there:
            same = there.changes_after(self.ends.seq - 1, 1)
        is_same = bool(same) and same[0].change_id == self.ends.change_id
        return self.ends.seq if is_same else -1


def _state(tx: Transaction, rows: Iterable[ChangeRow]) -> _State:
    rooms = ("api_key", "organization", "project", "group", "signing_key")
    subjects: dict[str, set[str]] = {room: set() for room in rooms}
    for row in rows:
        subjects.get(row.what.partition(".")[0], set()).add(row.subject)
    api_keys = {one: tx.api_key(one) for one in subjects["api_key"]}
    for api_key in filter(None, api_keys.values()):
        # What it is bound to may have been made since.
        subjects["project"].update(filter(None, [api_key.project_id]))
        subjects["group"].update(filter(None, [api_key.group_id]))
    return _State(
        api_keys,
        {one: tx.secrets(one) for one in api_keys},
        {one: tx.organization(one) for one in subjects["organization"]},
        {one: tx.project(one) for one in subjects["project"]},
        {one: tx.group(one) for one in subjects["group"]},
        {one: tx.signing_key(one) for one in subjects["signing_key"]},
    )


def _apply(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """Let one change hold here, too.  Returns whether there is anything that it concerns.

    Raises:
        Conflict: this version does not know what the change means.
    """
    apply = _APPLY.get(row.what)
    if apply is None:
        raise Conflict(
            f"the database to be replaced holds a change {row.what}, which this version does not"
            " know how to keep: restore with the version that wrote it"
        )
    return apply(here, row, state)


def _again(row: ChangeRow) -> Change:
    """The change as it was made: its time, and who made it.  Only its number is new."""
    return Change(
        what=_WHAT[row.what],
        subject=row.subject,
        actor=Actor(row.actor, row.address, row.request_id),
        at=row.at,
        organization_id=row.organization_id,
        detail=json.loads(row.detail),
        change_id=row.change_id,
        wider=row.wider,
    )


def _api_key(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """The API key ends wherever it had ended, and its replaced secrets with their overlaps.

    A rotation is carried over whole: an ended secret without its successor would leave the owner
    with nothing.
    """
    mine, theirs = here.api_key(row.subject), state.api_keys[row.subject]
    if mine is None:
        return False
    if theirs is None:
        mine.revoked_at = _earlier(mine.revoked_at, row.at)
        return True
    mine.revoked_at = _earlier(mine.revoked_at, theirs.revoked_at)
    mine.deleted_at = _earlier(mine.deleted_at, theirs.deleted_at)
    mine.disabled_at = _earlier(mine.disabled_at, theirs.disabled_at)
    if theirs.disabled_at is not None:
        mine.disabled_reason = theirs.disabled_reason
    mine.expires_at = _earlier(mine.expires_at, theirs.expires_at)
    known = {secret.digest: secret for secret in here.secrets(mine.id)}
    made_since = []
    for secret in state.secrets[row.subject]:
        if secret.digest in known:
            ended = known[secret.digest]
            ended.expires_at = _earlier(ended.expires_at, secret.expires_at)
        else:
            made_since.append(secret)
    if all(secret.expires_at is not None for secret in known.values()):
        mine.mask = theirs.mask
        here.add(*(ApiKeySecret(**secret.model_dump()) for secret in made_since))
    if mine.deleted_at is not None:
        here.delete_secrets(mine.id)
    return True


def _narrowed_api_key(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """The API key is worth what it is worth today: the last word of whoever edited it.

    That may be more than what it was narrowed to, and even more than what it was worth in the
    backup.
    """
    mine, theirs = here.api_key(row.subject), state.api_keys[row.subject]
    if mine is not None and theirs is not None:
        for name in _WORTH:
            setattr(mine, name, getattr(theirs, name))
        _bring(here, Project, here.project, state.projects.get(theirs.project_id or ""))
        _bring(here, Group, here.group, state.groups.get(theirs.group_id or ""))
    return _api_key(here, row, state)


_Bound = TypeVar("_Bound", Project, Group)


def _bring(
    here: Transaction,
    table: type[_Bound],
    known: Callable[[str], _Bound | None],
    theirs: _Bound | None,
) -> None:
    """Add what an API key is bound to, if it was made since: a binding to nothing binds less."""
    if theirs is not None and known(theirs.id) is None:
        here.add(table(**theirs.model_dump()))


def _organization(here: Transaction, row: ChangeRow, state: _State) -> bool:
    mine, theirs = here.organization(row.subject), state.organizations[row.subject]
    if mine is None:
        return False
    ended = row.at if theirs is None else theirs.suspended_at
    mine.suspended_at = _earlier(mine.suspended_at, ended)
    return True


def _spent_organization(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """As with an API key, what it is worth today: its limit may have been raised since."""
    mine, theirs = here.organization(row.subject), state.organizations[row.subject]
    if mine is not None and theirs is not None:
        mine.credit_limit = theirs.credit_limit
        mine.credit_spent_at = theirs.credit_spent_at
    return _organization(here, row, state)


def _project(here: Transaction, row: ChangeRow, state: _State) -> bool:
    mine, theirs = here.project(row.subject), state.projects[row.subject]
    if mine is None:
        return False
    archived_at = row.at if theirs is None else theirs.archived_at
    mine.archived_at = _earlier(mine.archived_at, archived_at)
    return True


def _group(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """As with an API key, what it is worth today."""
    mine, theirs = here.group(row.subject), state.groups[row.subject]
    if mine is None or theirs is None:
        return False
    for name, value in theirs.model_dump(exclude={"id", "created_at"}).items():
        setattr(mine, name, value)
    return True


def _signing_key(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """Also one that was made after the backup: its thumbprint is refused for ever."""
    mine, theirs = here.signing_key(row.subject), state.signing_keys[row.subject]
    if mine is not None:
        mine.withdrawn_at = _earlier(mine.withdrawn_at, row.at)
    elif theirs is not None:
        # It succeeds nobody, or those before it could not sign again; and it is not the newest,
        # which says what sealing key is in use.
        first = min((one.position for one in here.signing_keys()), default=1)
        changed = {"position": first - 1, "starts_at": max(theirs.starts_at, row.at + 1)}
        here.add(SigningKey(**theirs.model_dump() | changed))
    return True


def _nothing(here: Transaction, row: ChangeRow, state: _State) -> bool:
    """No token survives a restore."""
    return False


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((at for at in (one, other) if at is not None), default=None)


#: What an edit of an API key may change, but for its name: the columns that say what it may do.
_WORTH: Final = (
    *("environment", "scopes", "audiences", "expires_at", "project_id", "networks", "role"),
    *("models", "group_id", "credit_limit"),
)
#: How a change of each kind that narrows comes to hold in the restored database.
_APPLY: Final[Mapping[str, Callable[[Transaction, ChangeRow, _State], bool]]] = {
    What.API_KEY_DISABLED.text: _api_key,
    What.API_KEY_REVOKED.text: _api_key,
    What.API_KEY_ROTATED.text: _api_key,
    What.API_KEY_OVERLAP_ENDED.text: _api_key,
    What.API_KEY_NARROWED.text: _narrowed_api_key,
    What.API_KEY_DELETED.text: _api_key,
    What.PROJECT_ARCHIVED.text: _project,
    What.GROUP_NARROWED.text: _group,
    What.ORGANIZATION_SUSPENDED.text: _organization,
    What.ORGANIZATION_SPENT.text: _spent_organization,
    What.SIGNING_KEY_WITHDRAWN.text: _signing_key,
    What.TOKEN_REVOKED.text: _nothing,
    What.CATALOG_CHANGED.text: _nothing,
    What.LOG_RESTARTED.text: _nothing,
}


# --- 5: signing again


def _signing_again(
    settings: Settings, staged: Store, live: Store | None, actor: Actor, now: int
) -> tuple[str, ...]:
    """Make a signing key for each line that signs in the replaced database and not in this one.

    Its signing keys were withdrawn there, and their successors are not in the backup.

    Returns:
        Their kids.

    Raises:
        BadSealingKey: some do not open; the message names the file that is missing.
    """
    # Anew: what it has read until now may be from before the last write.
    staged.close()
    sealing_keys = sealing.load(settings.keys_dir)
    ring = signing.RingKeeper(staged, sealing_keys).at(staged.head())
    ring.require_open()
    if live is None:
        return ()
    replaced = signing.RingKeeper(live, sealing_keys).at(live.head())
    sealing_key = signing.sealing_key_in_use(staged, sealing_keys)
    made = []
    for purpose, algorithm in signing.LINES:
        if _signs(replaced, purpose, algorithm, now) and not _signs(ring, purpose, algorithm, now):
            # One that waits for its start is left alone.
            with suppress(signing.SigningKeyConflict):
                kid = signing.rotate(
                    staged, sealing_key, algorithm, actor, now=now, at_once=True, purpose=purpose
                )
                made.append(kid)
    return tuple(made)


def _signs(ring: signing.Ring, purpose: signing.Purpose, algorithm: Algorithm, now: int) -> bool:
    try:
        ring.signer(algorithm, now, purpose)
    except signing.NoSigner:
        return False
    return True
