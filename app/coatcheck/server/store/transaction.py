"""One write: rows in and out, and the change-log rows that go with them.

Synchronous SQLModel, the same for every database.  It runs in a writer thread or in the command
line, never on the token path.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Compiled,
    Connection,
    Dialect,
    LargeBinary,
    Select,
    String,
    and_,
    bindparam,
    case,
    column,
    delete,
    insert,
    literal_column,
    or_,
    text,
    update,
)
from sqlalchemy import false as sql_false
from sqlalchemy import select as sql_select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, col, func, select

from coatcheck.server.changes import Change
from coatcheck.server.store.base import Taken
from coatcheck.server.store.pages import Filter, Position, read_page
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeySecret,
    ApiKeyUsage,
    ChangeRow,
    Deployment,
    Group,
    IdempotentRequest,
    Member,
    Organization,
    OrganizationUsage,
    Project,
    SigningKey,
    UsageReport,
)

#: Rows of one table that one statement carries; bounds memory while millions are written.
_BATCH: Final = 5000
#: "Insert, or update where it exists", in the words of each database.
_UPSERT: Final[Mapping[str, Callable[..., Any]]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}
#: PostgreSQL's advisory lock of whoever appends to the change log.
LOG_LOCK: Final = 0x0C0A7C4EC4
#: What makes sequence order commit order, where transactions run side by side.  It is waited for
#: before the first row has a number, and given back by the commit.
_BEFORE_APPENDING: Final[Mapping[str, str]] = {
    "postgresql": f"SELECT pg_advisory_xact_lock({LOG_LOCK})",
}
#: The next sequence number of the change log is the one after `last`.
_COUNT_ON_FROM: Final[Mapping[str, str]] = {
    "sqlite": "UPDATE sqlite_sequence SET seq = :last WHERE name = 'changes'",
    "postgresql": "SELECT setval(pg_get_serial_sequence('changes', 'seq'), :last)",
}
#: In the very words of its index: SQLite takes an index of some rows for no others.
_IS_DEVICE_KEY: Final = text("device IS NOT NULL AND state IN ('active', 'disabled')")
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


class Reported(NamedTuple):
    """What resource servers reported.  Credits in millionths, times in seconds since the epoch."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    credits: int = 0
    agent_runs: int = 0
    last_used_at: int = 0


class Credit(NamedTuple):
    """What an organization or an API key may use, and has used, in millionths.

    Attributes:
        organization_id: whose it is.
        low: what is left when the owners are told; None: a tenth of an API key's limit, or never.
        spent_at: since when an organization's is used up.
    """

    id: str
    organization_id: str
    limit: int
    used: int
    low: int | None = None
    spent_at: int | None = None


class ApiKeyCounts(NamedTuple):
    """How many API keys there are.

    Attributes:
        by_status: as `status` shows them.
        expiring: those of the active ones that end before some moment.
        last: the id of the last one that was counted; None: there are no more.
    """

    by_status: Mapping[str, int]
    expiring: int
    last: str | None


class _Sums(NamedTuple):
    """A table with one row of sums for each of something, and the sums that are added to.

    Attributes:
        owner: the table of what they are of; nothing is added for what is not there.
    """

    table: str
    id: str
    owner: str
    names: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.names, "last_used_at")


_COUNTED: Final = ("tokens_issued", "raw_key_uses")
_REPORTED: Final = Reported._fields[:-1]
_COUNTED_OF_API_KEYS: Final = _Sums("api_key_usage", "api_key_id", "api_keys", _COUNTED)
_REPORTED_OF_API_KEYS: Final = _Sums(
    "api_key_usage", "api_key_id", "api_keys", (*_COUNTED, *_REPORTED)
)
_REPORTED_OF_ORGANIZATIONS: Final = _Sums(
    "organization_usage", "organization_id", "organizations", _REPORTED
)
#: API keys that one statement counts.
_MOST_COUNTED: Final = 50_000
#: A sum stays here once it is reached: SQLite would go on with a float, PostgreSQL refuse.
_MOST: Final = 2**62


def _add_by_row(connection: Connection, sums: _Sums, rows: list[dict[str, Any]]) -> None:
    _execute_many(connection, _one_row_of(sums, connection.dialect), rows)


@lru_cache
def _one_row_of(sums: _Sums, dialect: Dialect) -> Compiled:
    given = [bindparam(name, type_=BigInteger()) for name in sums.columns]
    owner = SQLModel.metadata.tables[sums.owner]
    known = select(owner.c.id, *given).where(owner.c.id == bindparam(sums.id, type_=String()))
    compiled: Compiled = _upsert(sums, dialect, known).compile(dialect=dialect)
    return compiled


def _add_in_arrays(connection: Connection, sums: _Sums, rows: list[dict[str, Any]]) -> None:
    """In one statement: each would be a round trip."""
    types: dict[str, Any] = {sums.id: String(), **dict.fromkeys(sums.columns, BigInteger())}
    arrays = [bindparam(name, type_=postgresql.ARRAY(of)) for name, of in types.items()]
    columns: list[Any] = [column(name, of) for name, of in types.items()]
    given = func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
    owner = SQLModel.metadata.tables[sums.owner]
    known = (
        select(owner.c.id, *[given.c[name] for name in sums.columns])
        .join(given, given.c[sums.id] == owner.c.id)
        .order_by(owner.c.id)
    )
    in_columns = {name: [row[name] for row in rows] for name in types}
    connection.execute(_upsert(sums, connection.dialect, known), in_columns)


#: How sums are added to, in the words of each database.
_ADD: Final[Mapping[str, Callable[[Connection, _Sums, list[dict[str, Any]]], None]]] = {
    "sqlite": _add_by_row,
    "postgresql": _add_in_arrays,
}


def _upsert(sums: _Sums, dialect: Dialect, known: Select[*tuple[Any, ...]]) -> Any:
    """Insert rows of sums or add to them."""
    table = SQLModel.metadata.tables[sums.table]
    upsert = _UPSERT[dialect.name](table).from_select(
        (sums.id, *sums.columns), known, include_defaults=False
    )
    new = upsert.excluded
    most: Any = literal_column(str(_MOST), BigInteger())
    added = {
        name: case((table.c[name] > most - new[name], most), else_=table.c[name] + new[name])
        for name in sums.names
    }
    # A worker that was cut off for a while must not turn the last use back.
    last = case(
        (table.c.last_used_at > new.last_used_at, table.c.last_used_at), else_=new.last_used_at
    )
    return upsert.on_conflict_do_update(
        index_elements=[sums.id], set_={**added, "last_used_at": last}
    )


@lru_cache
def _use_of_secret(dialect: Dialect) -> Compiled:
    """The last use of a secret that was replaced."""
    last = col(ApiKeySecret.last_used_at)
    used_at = bindparam("used_at", type_=BigInteger())
    return (
        update(ApiKeySecret)
        .where(
            col(ApiKeySecret.digest) == bindparam("of_digest", type_=LargeBinary()),
            col(ApiKeySecret.expires_at).is_not(None),
            or_(last.is_(None), last < bindparam("later_than", type_=BigInteger())),
        )
        .values(last_used_at=used_at)
        .compile(dialect=dialect)
    )


class Transaction:
    """What a use case may do to the database; committed as a whole, or not at all."""

    def __init__(self, session: Session, *, locks: bool) -> None:
        """Args:
        locks: hold whatever is read to be changed, so that nobody else changes it meanwhile.
        """
        self._session = session
        # No key column changes, so that rows which point there may go on being added.
        self._for_change: Any = {"key_share": True} if locks else None
        #: The change that was appended last; tells whether a commit was done.
        self.last_change_id: str | None = None

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator["Transaction"]:
        """This one: a use case that another one calls joins it."""
        yield self

    # --- the deployment

    def deployment(self) -> Deployment | None:
        return self._session.get(Deployment, 1)

    def deployment_for_change(self) -> Deployment:
        """The deployment's row; two that change it come one after the other."""
        return self._session.get_one(Deployment, 1, with_for_update={"key_share": True})

    def revision(self) -> str | None:
        """The schema's."""
        found = self._session.connection().exec_driver_sql(
            "SELECT version_num FROM alembic_version"
        )
        row = found.fetchone()
        return None if row is None else str(row[0])

    def rename_log(self, name: str, last: int) -> None:
        """Let the change log go on under another name, its next row after this number.

        Two that do so at once come one after the other.
        """
        row = self._session.get_one(Deployment, 1, with_for_update=True)
        row.log = name
        self._session.flush()
        connection = self._session.connection()
        connection.execute(text(_COUNT_ON_FROM[connection.dialect.name]), {"last": last})

    def add(self, *rows: SQLModel) -> None:
        """Add rows of any table but the change log, in this order."""
        for row in rows:
            self._session.add(row)
            self._session.flush()

    def append(self, changes: Iterable[Change]) -> None:
        """Add rows to the change log.  Call it last: what is in the log is what was done.

        All other rows go to the database first, so that sequence order is commit order on a
        database that serializes writers only here.
        """
        self._session.flush()
        changes = list(changes)
        connection = self._session.connection()
        if connection.dialect.name in _BEFORE_APPENDING:
            connection.exec_driver_sql(_BEFORE_APPENDING[connection.dialect.name])
        for change in changes:
            self.last_change_id = change.change_id
        # The rows of a batch share one detail: it is written once.
        details = {id(change.detail): change.detail for change in changes}
        texts = {identity: _to_json(detail) for identity, detail in details.items()}
        self._insert(
            ChangeRow,
            [
                {
                    "change_id": change.change_id,
                    "at": change.at,
                    "what": change.what.text,
                    "subject": change.subject,
                    "wider": change.wider,
                    "narrows": change.what.narrows,
                    "organization_id": change.organization_id,
                    "actor": change.actor.id,
                    "address": change.actor.address,
                    "request_id": change.actor.request_id,
                    "detail": texts[id(change.detail)],
                }
                for change in changes
            ],
        )

    # --- organizations

    def organization(self, organization_id: str) -> Organization | None:
        return self._session.get(Organization, organization_id, with_for_update=self._for_change)

    def organizations(self) -> Sequence[Organization]:
        return self._session.exec(select(Organization).order_by(col(Organization.id))).all()

    def organizations_page(self, after: str, limit: int) -> Sequence[Organization]:
        """Organizations, the oldest first, from the one after `after`."""
        return self._session.exec(
            select(Organization)
            .where(col(Organization.id) > after)
            .order_by(col(Organization.id))
            .limit(limit)
        ).all()

    def forget_sealed_copies(self, organization_id: str) -> None:
        """Delete the sealed copy of every secret of an organization; the secrets go on working."""
        self._session.flush()
        own = select(ApiKey.id).where(ApiKey.organization_id == organization_id)
        statement = (
            update(ApiKeySecret)
            .where(col(ApiKeySecret.api_key_id).in_(own), col(ApiKeySecret.sealed).is_not(None))
            .values(sealed=None, sealing_key_id=None)
        )
        self._session.connection().execute(statement)
        # What was read of them before is out of date.
        self._session.expire_all()

    # --- projects, members, groups

    def project(self, project_id: str) -> Project | None:
        return self._session.get(Project, project_id, with_for_update=self._for_change)

    def projects(
        self, organization_id: str, after: str = "", limit: int = 100
    ) -> Sequence[Project]:
        """Projects of an organization, the oldest first, from the one after `after`."""
        return self._session.exec(
            select(Project)
            .where(Project.organization_id == organization_id, col(Project.id) > after)
            .order_by(col(Project.id))
            .limit(limit)
        ).all()

    def member(self, member_id: str) -> Member | None:
        return self._session.get(Member, member_id, with_for_update=self._for_change)

    def members(self, organization_id: str, after: str = "", limit: int = 100) -> Sequence[Member]:
        """Members of an organization that were not removed, the oldest first."""
        return self._session.exec(
            select(Member)
            .where(
                Member.organization_id == organization_id,
                col(Member.removed_at).is_(None),
                col(Member.id) > after,
            )
            .order_by(col(Member.id))
            .limit(limit)
        ).all()

    def member_by_email(self, organization_id: str, email: str) -> Member | None:
        """The member of an organization with this address, if it was not removed."""
        query = select(Member).where(
            Member.organization_id == organization_id,
            Member.email == email,
            col(Member.removed_at).is_(None),
        )
        return self._session.exec(query.limit(1)).first()

    def live_api_keys_of_member(self, organization_id: str, member_id: str) -> Sequence[ApiKey]:
        """A member's own API keys that are neither revoked nor deleted, the oldest first.

        It walks along all such API keys of the organization: nothing is indexed by member alone.
        """
        query = (
            select(ApiKey)
            .where(
                ApiKey.organization_id == organization_id,
                col(ApiKey.state).in_(("active", "disabled")),
                ApiKey.member_id == member_id,
            )
            .order_by(col(ApiKey.id))
        )
        return self._session.exec(query).all()

    def has_api_keys_in_group(self, group_id: str) -> bool:
        """Whether an API key that is neither revoked nor deleted belongs to a group.

        It looks at API keys until it finds one, at all of them if there is none: nothing is
        indexed by group, because nobody else asks, and groups are seldom deleted.
        """
        query = select(ApiKey.id).where(
            ApiKey.group_id == group_id, col(ApiKey.state).in_(("active", "disabled"))
        )
        return self._session.exec(query.limit(1)).first() is not None

    def group(self, group_id: str) -> Group | None:
        return self._session.get(Group, group_id, with_for_update=self._for_change)

    def groups(self, after: str = "", limit: int = 100) -> Sequence[Group]:
        """Groups that were not deleted, the oldest first."""
        return self._session.exec(
            select(Group)
            .where(col(Group.deleted_at).is_(None), col(Group.id) > after)
            .order_by(col(Group.id))
            .limit(limit)
        ).all()

    # --- requests done once

    def idempotent_request(self, request_id: str) -> IdempotentRequest | None:
        return self._session.get(IdempotentRequest, request_id)

    def add_idempotent_request(self, row: IdempotentRequest) -> None:
        """Add a request, in the place of one of its name that is too old to count.

        Raises:
            Taken: the same request was done at this very moment.
        """
        try:
            self._session.merge(row)
            self._session.flush()
        except IntegrityError:
            raise Taken from None

    def forget_idempotent_requests(self, before_at: int) -> None:
        """Let go of those that were done before a moment."""
        table = SQLModel.metadata.tables[str(IdempotentRequest.__tablename__)]
        self._session.connection().execute(delete(table).where(table.c.at < before_at))

    # --- API keys

    def api_key(self, api_key_id: str) -> ApiKey | None:
        return self._session.get(ApiKey, api_key_id, with_for_update=self._for_change)

    def api_key_by_digest(self, digest: bytes) -> ApiKey | None:
        secret = self._session.get(ApiKeySecret, digest)
        return None if secret is None else self.api_key(secret.api_key_id)

    def api_keys(self, organization_id: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """API keys in the order of their ids, from the one after `after`."""
        query = select(ApiKey).where(col(ApiKey.id) > after).order_by(col(ApiKey.id)).limit(limit)
        if organization_id is not None:
            query = query.where(col(ApiKey.organization_id) == organization_id)
        return self._session.exec(query).all()

    def api_keys_page(
        self,
        organization_id: str,
        wanted: Filter,
        now: int,
        after: Position | None,
        limit: int,
    ) -> tuple[Sequence[ApiKey], Position | None]:
        """As `pages.read_page`."""
        return read_page(self._session, organization_id, wanted, now, after, limit)

    def credit_given_by(self, api_key_id: str) -> int:
        """The sum of the credit limits of the API keys that this one has made.

        Of those that have ended it is what they had used: only the rest comes back.
        """
        ends = col(ApiKey.state).in_(("revoked", "deleted"))
        is_given = (ApiKey.created_by == api_key_id, col(ApiKey.credit_limit).is_not(None))
        of_live = select(func.sum(ApiKey.credit_limit)).where(*is_given, ~ends)
        of_ended = (
            select(func.sum(ApiKeyUsage.credits))
            .join(ApiKey, col(ApiKey.id) == ApiKeyUsage.api_key_id)
            .where(*is_given, ends)
        )
        given = self._session.exec(of_live).one() or 0
        return int(given + (self._session.exec(of_ended).one() or 0))

    def secrets_of(self, api_key_ids: Sequence[str]) -> dict[str, list[ApiKeySecret]]:
        """The secrets of many API keys, the oldest first."""
        found: dict[str, list[ApiKeySecret]] = {}
        for secret in self._session.exec(
            select(ApiKeySecret)
            .where(col(ApiKeySecret.api_key_id).in_(api_key_ids))
            .order_by(col(ApiKeySecret.created_at), col(ApiKeySecret.expires_at).nulls_last())
        ):
            found.setdefault(secret.api_key_id, []).append(secret)
        return found

    def delete_secrets(self, api_key_id: str) -> None:
        """Forget every secret of an API key: nobody can tell any more that there were some."""
        self._session.flush()
        table = SQLModel.metadata.tables[str(ApiKeySecret.__tablename__)]
        self._session.connection().execute(delete(table).where(table.c.api_key_id == api_key_id))
        self._session.expire_all()

    def secrets(self, api_key_id: str) -> Sequence[ApiKeySecret]:
        """The secrets of an API key, the oldest first."""
        return self._session.exec(
            select(ApiKeySecret)
            .where(col(ApiKeySecret.api_key_id) == api_key_id)
            .order_by(col(ApiKeySecret.created_at), col(ApiKeySecret.expires_at).nulls_last())
        ).all()

    def copies(self, sealing_key_id: str, after: bytes, limit: int) -> Sequence[ApiKeySecret]:
        """Secrets of which a copy was sealed with this sealing key, by digest, behind `after`."""
        return self._session.exec(
            select(ApiKeySecret)
            .where(ApiKeySecret.sealing_key_id == sealing_key_id, ApiKeySecret.digest > after)
            .order_by(col(ApiKeySecret.digest))
            .limit(limit)
            .with_for_update(key_share=True)
        ).all()

    def sealing_keys_of_copies(self) -> list[str]:
        """The ids of the sealing keys that copies of secrets need."""
        found: list[str] = []
        last = ""
        while True:
            # One step down the index for each, however many copies there are.
            query = select(func.min(ApiKeySecret.sealing_key_id)).where(
                col(ApiKeySecret.sealing_key_id) > last
            )
            following = self._session.exec(query).one()
            if following is None:
                return found
            found.append(following)
            last = following

    def add_api_keys(self, api_keys: list[dict[str, Any]], secrets: list[dict[str, Any]]) -> None:
        """Add many API keys at once, as rows of their tables.

        Raises:
            Taken: one is for a member's device that has one at this very moment.
        """
        self._session.flush()
        try:
            self._insert(ApiKey, api_keys)
        except IntegrityError:
            raise Taken from None
        self._insert(ApiKeySecret, secrets)

    def device_key(self, member_id: str, device: str) -> ApiKey | None:
        """The API key of a member's device that is neither revoked nor deleted."""
        query = (
            select(ApiKey.id)
            .where(_IS_DEVICE_KEY)
            .where(ApiKey.member_id == member_id, ApiKey.device == device)
        )
        api_key_id = self._session.exec(query).first()
        return None if api_key_id is None else self.api_key(api_key_id)

    def device_keys(
        self, member_id: str, project_id: str | None, after: str, limit: int
    ) -> Sequence[ApiKey]:
        """API keys of a member's devices, by device, from the one after `after`.

        Args:
            project_id: only those bound to it; None: all.
        """
        query = (
            select(ApiKey)
            .where(_IS_DEVICE_KEY)
            .where(ApiKey.member_id == member_id, col(ApiKey.device) > after)
            .order_by(col(ApiKey.device))
            .limit(limit)
        )
        if project_id is not None:
            query = query.where(ApiKey.project_id == project_id)
        return self._session.exec(query).all()

    def disable_api_keys(self, api_key_ids: Sequence[str], at: int) -> None:
        """Disable many at once; what was read of them before is out of date then."""
        statement = (
            update(ApiKey)
            .where(col(ApiKey.id).in_(api_key_ids))
            .values(disabled_at=at, disabled_reason="manual", state="disabled")
        )
        self._session.connection().execute(statement)

    def usage(self, api_key_ids: Sequence[str]) -> dict[str, ApiKeyUsage]:
        """Usage by API key id; one that was never used is absent."""
        found = self._session.exec(
            select(ApiKeyUsage).where(col(ApiKeyUsage.api_key_id).in_(api_key_ids))
        ).all()
        return {usage.api_key_id: usage for usage in found}

    def add_usage(self, counts: Mapping[str, tuple[int, int, int]]) -> None:
        """Add to what was counted before.  An API key that does not exist is passed over.

        Args:
            counts: by API key id: tokens issued, raw-key uses, last use in seconds since the
                epoch.
        """
        self._add_sums(_COUNTED_OF_API_KEYS, {one: (*count,) for one, count in counts.items()})

    def add_uses_of_secrets(self, last_used_at: Mapping[bytes, int]) -> None:
        """Move on when replaced secrets were used last, in seconds since the epoch, by digest."""
        rows = [
            {"of_digest": digest, "used_at": at, "later_than": at}
            for digest, at in sorted(last_used_at.items())
        ]
        connection = self._session.connection()
        _execute_many(connection, _use_of_secret(connection.dialect), rows)

    def metered(self, api_key_ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """The organization and the environment of each of these API keys, deleted ones too."""
        query = select(ApiKey.id, ApiKey.organization_id, ApiKey.environment).where(
            col(ApiKey.id).in_(api_key_ids)
        )
        return {row[0]: (row[1], row[2]) for row in self._session.exec(query)}

    def add_usage_reports(self, report_ids: Iterable[str], at: int) -> set[str]:
        """Remember reports.  Returns those that were not known."""
        # In one order everywhere, so that two who report never wait for each other in a circle.
        rows = [{"id": report_id, "at": at} for report_id in sorted(report_ids)]
        if not rows:
            return set()
        connection = self._session.connection()
        table = SQLModel.metadata.tables[str(UsageReport.__tablename__)]
        insert_new = _UPSERT[connection.dialect.name](table).values(rows)
        added = insert_new.on_conflict_do_nothing().returning(table.c.id)
        return set(connection.scalars(added))

    def forget_usage_reports(self, before_at: int) -> None:
        """Let go of some of those that were counted before a moment."""
        table = SQLModel.metadata.tables[str(UsageReport.__tablename__)]
        # What somebody else is about to delete need not be waited for.
        old = (
            select(table.c.id)
            .where(table.c.at < before_at)
            .order_by(table.c.at)
            .limit(_BATCH)
            .with_for_update(skip_locked=True)
        )
        self._session.connection().execute(delete(table).where(table.c.id.in_(old)))

    def add_reported(
        self, of_api_keys: Mapping[str, Reported], of_organizations: Mapping[str, Reported]
    ) -> None:
        """Add to what was reported before, by id."""
        self._add_sums(
            _REPORTED_OF_API_KEYS, {one: (0, 0, *sums) for one, sums in of_api_keys.items()}
        )
        self._add_sums(_REPORTED_OF_ORGANIZATIONS, of_organizations)

    def _add_sums(self, sums: _Sums, added: Mapping[str, tuple[int, ...]]) -> None:
        # In one order everywhere, so that two processes never wait for each other in a circle.
        rows = [
            {sums.id: one, **dict(zip(sums.columns, values, strict=True))}
            for one, values in sorted(added.items())
        ]
        if rows:
            connection = self._session.connection()
            _ADD[connection.dialect.name](connection, sums, rows)

    def organization_usage(self, organization_id: str) -> OrganizationUsage | None:
        """What was reported of an organization's API keys; None: nothing yet."""
        return self._session.get(OrganizationUsage, organization_id)

    def credits_of_api_keys(self, api_key_ids: Iterable[str]) -> list[Credit]:
        """Of those that have a limit and a use."""
        query = (
            select(ApiKey.id, ApiKey.organization_id, col(ApiKey.credit_limit), ApiKeyUsage.credits)
            .join(ApiKeyUsage, col(ApiKeyUsage.api_key_id) == col(ApiKey.id))
            .where(col(ApiKey.id).in_(api_key_ids), col(ApiKey.credit_limit).is_not(None))
            .order_by(col(ApiKey.id))
        )
        rows: Iterable[Any] = self._session.connection().execute(query)
        return [Credit(*row) for row in rows]

    def credits_of_organizations(self, organization_ids: Iterable[str]) -> list[Credit]:
        """Of those that have a limit and a use."""
        query = (
            sql_select(
                col(Organization.id),
                col(Organization.id),
                col(Organization.credit_limit),
                col(OrganizationUsage.credits),
                col(Organization.low_credit),
                col(Organization.credit_spent_at),
            )
            .join(OrganizationUsage, col(OrganizationUsage.organization_id) == col(Organization.id))
            .where(
                col(Organization.id).in_(organization_ids),
                col(Organization.credit_limit).is_not(None),
            )
            .order_by(col(Organization.id))
        )
        rows: Iterable[Any] = self._session.connection().execute(query)
        return [Credit(*row) for row in rows]

    def count_api_keys(self, now: int, ends_before: int, after: str = "") -> ApiKeyCounts:
        """Count some API keys, in the order of their ids, from the one after `after`.

        Some, so that nobody waits for all of them: each has to be looked at.
        """
        some = (
            sql_select(col(ApiKey.id), col(ApiKey.state), col(ApiKey.expires_at))
            .where(col(ApiKey.id) > after)
            .order_by(col(ApiKey.id))
            .limit(_MOST_COUNTED)
            .subquery()
        )
        state, end = some.c.state, some.c.expires_at
        has_ended = func.coalesce(end <= now, sql_false())
        counted: dict[str, Any] = {
            "active": and_(state == "active", ~has_ended),
            "disabled": and_(state == "disabled", ~has_ended),
            "expired": and_(state.in_(("active", "disabled")), has_ended),
            "revoked": state == "revoked",
        }
        is_expiring = and_(state == "active", end > now, end <= ends_before)
        sums = [
            func.coalesce(func.sum(case((one, 1), else_=0)), 0)
            for one in (*counted.values(), is_expiring)
        ]
        query = sql_select(func.max(some.c.id), *sums)
        last, *numbers, expiring = self._session.connection().execute(query).one()
        return ApiKeyCounts(dict(zip(counted, numbers, strict=True)), expiring, last)

    # --- signing keys

    def signing_key(self, kid: str) -> SigningKey | None:
        return self._session.get(SigningKey, kid, with_for_update=self._for_change)

    def lock_signing_keys(self) -> None:
        """Keep everybody else from changing the ring until this write ends.

        Where writers run side by side, two that looked first would both find their place free.
        The deployment's own row is the lock, because a first signing key has none.
        """
        self._session.exec(select(Deployment.id).with_for_update(key_share=True)).all()

    def hold_signing_keys(self) -> None:
        """Keep everybody from changing the ring until this write ends, beside others who do so."""
        self._session.exec(select(Deployment.id).with_for_update(read=True)).all()

    def add_signing_key(self, row: SigningKey) -> None:
        """Add a signing key.

        Raises:
            Taken: its kid, or its place in the order.
        """
        try:
            self.add(row)
        except IntegrityError:
            raise Taken from None

    def signing_keys(self) -> Sequence[SigningKey]:
        return self._session.exec(select(SigningKey).order_by(col(SigningKey.position))).all()

    # --- the change log

    def head(self) -> int:
        return self._session.exec(select(func.max(ChangeRow.seq))).one() or 0

    def changes(self, subject: str) -> Sequence[ChangeRow]:
        """What happened to one subject, the oldest first."""
        return self._session.exec(
            select(ChangeRow).where(ChangeRow.subject == subject).order_by(col(ChangeRow.seq))
        ).all()

    def events(
        self,
        organization_id: str | None,
        before: int | None,
        limit: int,
        *,
        subject: str | None = None,
        what: str | None = None,
        of_platform: bool = False,
        most_scanned: int = 1000,
    ) -> tuple[Sequence[ChangeRow], int | None]:
        """Rows of the change log, the newest first, and where the next page begins.

        Args:
            organization_id: whose; None: everybody's.
            before: below this sequence number.
            what: what the kind of change begins with, as `api_key.`.
            of_platform: only what is of no organization.
        """
        seq = col(ChangeRow.seq)
        whose = col(ChangeRow.organization_id)
        walk = select(seq)
        if subject is not None:
            walk = walk.where(ChangeRow.subject == subject)
        elif of_platform or organization_id is not None:
            # Of no organization: SQL's `IS NULL`.
            walk = walk.where(whose == organization_id)
        if before is not None:
            walk = walk.where(seq < before)
        scanned = self._session.exec(walk.order_by(seq.desc()).limit(most_scanned)).all()
        query = select(ChangeRow).where(seq.in_(scanned))
        if of_platform or organization_id is not None:
            query = query.where(whose == organization_id)
        if what is not None:
            query = query.where(col(ChangeRow.what).startswith(what, autoescape=True))
        rows = self._session.exec(query.order_by(seq.desc()).limit(limit)).all()
        if len(rows) == limit:
            return rows, rows[-1].seq
        return rows, scanned[-1] if len(scanned) == most_scanned else None

    def changes_after(self, seq: int, limit: int) -> Sequence[ChangeRow]:
        """The rows above a sequence number, in order."""
        query = select(ChangeRow).where(col(ChangeRow.seq) > seq).order_by(col(ChangeRow.seq))
        return self._session.exec(query.limit(limit)).all()

    def last_change(self) -> ChangeRow | None:
        query = select(ChangeRow).order_by(col(ChangeRow.seq).desc()).limit(1)
        return self._session.exec(query).first()

    def known_changes(self, change_ids: Sequence[str]) -> set[str]:
        """Those of these changes that are in the log."""
        query = select(ChangeRow.change_id).where(col(ChangeRow.change_id).in_(change_ids))
        return set(self._session.exec(query).all())

    def has_narrowed(self, subject: str) -> bool:
        """Whether any change has narrowed this subject."""
        query = select(ChangeRow.seq).where(
            ChangeRow.subject == subject, col(ChangeRow.narrows).is_(True)
        )
        return self._session.exec(query.limit(1)).first() is not None

    def _insert(self, table: type[SQLModel], rows: list[dict[str, Any]]) -> None:
        """Insert rows that all name the same columns; None is what a column has anyway."""
        if not rows:
            return
        connection = self._session.connection()
        # Most restrictions are absent from most API keys: what is not bound costs nothing.
        given = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        statement = insert(SQLModel.metadata.tables[str(table.__tablename__)])
        compiled = statement.compile(dialect=connection.dialect, column_keys=given)
        _execute_many(connection, compiled, rows)


def _execute_many(connection: Connection, compiled: Compiled, rows: list[dict[str, Any]]) -> None:
    """Run one statement for each row, past the ORM and its parameter handling.

    A million API keys are made in one go, and a thousand counted each second; SQLAlchemy would
    cost more than the database.
    """
    positions = getattr(compiled, "positiontup", None)
    in_order = itemgetter(*positions) if positions else dict
    for start in range(0, len(rows), _BATCH):
        batch = [in_order(row) for row in rows[start : start + _BATCH]]
        connection.exec_driver_sql(str(compiled), batch)
