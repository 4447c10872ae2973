"""One write: rows in and out, and the change-log rows that go with them.

Synchronous SQLModel, the same for every database.  It runs in a writer thread or in the command
line, never on the token path.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Compiled,
    Connection,
    Dialect,
    Select,
    String,
    bindparam,
    case,
    column,
    delete,
    insert,
    text,
    update,
)
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
    Project,
    SigningKey,
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
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


#: What is counted of an API key.
_COUNTS: Final = ("tokens_issued", "raw_key_uses", "last_used_at")


def _usage_by_row(connection: Connection, rows: list[dict[str, Any]]) -> None:
    _execute_many(connection, _one_row_of_usage(connection.dialect), rows)


@lru_cache
def _one_row_of_usage(dialect: Dialect) -> Compiled:
    given = [bindparam(name, type_=BigInteger()) for name in _COUNTS]
    known = select(col(ApiKey.id), *given).where(
        col(ApiKey.id) == bindparam("api_key_id", type_=String())
    )
    compiled: Compiled = _upsert(dialect, known).compile(dialect=dialect)
    return compiled


def _usage_in_arrays(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """In one statement: each would be a round trip."""
    types: dict[str, Any] = {"api_key_id": String(), **dict.fromkeys(_COUNTS, BigInteger())}
    arrays = [bindparam(name, type_=postgresql.ARRAY(of)) for name, of in types.items()]
    columns: list[Any] = [column(name, of) for name, of in types.items()]
    given = func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
    known = (
        select(col(ApiKey.id), *[given.c[name] for name in _COUNTS])
        .join(given, given.c.api_key_id == col(ApiKey.id))
        .order_by(col(ApiKey.id))
    )
    in_columns = {name: [row[name] for row in rows] for name in types}
    connection.execute(_upsert(connection.dialect, known), in_columns)


#: How usage is added, in the words of each database.
_ADD_USAGE: Final[Mapping[str, Callable[[Connection, list[dict[str, Any]]], None]]] = {
    "sqlite": _usage_by_row,
    "postgresql": _usage_in_arrays,
}


def _upsert(dialect: Dialect, known: Select[*tuple[Any, ...]]) -> Any:
    """Insert rows of usage or add to them; nothing for an API key that does not exist."""
    usage = SQLModel.metadata.tables[str(ApiKeyUsage.__tablename__)]
    upsert = _UPSERT[dialect.name](usage).from_select(
        ("api_key_id", *_COUNTS), known, include_defaults=False
    )
    new = upsert.excluded
    return upsert.on_conflict_do_update(
        index_elements=["api_key_id"],
        set_={
            "tokens_issued": usage.c.tokens_issued + new.tokens_issued,
            "raw_key_uses": usage.c.raw_key_uses + new.raw_key_uses,
            # A worker that was cut off for a while must not turn the last use back.
            "last_used_at": case(
                (new.last_used_at > usage.c.last_used_at, new.last_used_at),
                else_=usage.c.last_used_at,
            ),
        },
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

    # --- the deployment

    def deployment(self) -> Deployment | None:
        return self._session.get(Deployment, 1)

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

    def api_keys_of_member(self, member_id: str) -> Sequence[ApiKey]:
        """A member's own API keys that are neither revoked nor deleted."""
        return self._session.exec(
            select(ApiKey).where(
                ApiKey.member_id == member_id, col(ApiKey.state).in_(("active", "disabled"))
            )
        ).all()

    def credit_given_by(self, api_key_id: str) -> int:
        """The sum of the credit limits of the API keys that this one has made."""
        query = select(func.sum(ApiKey.credit_limit)).where(
            ApiKey.created_by == api_key_id, col(ApiKey.state).in_(("active", "disabled"))
        )
        return int(self._session.exec(query).one() or 0)

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

    def add_api_keys(self, api_keys: list[dict[str, Any]], secrets: list[dict[str, Any]]) -> None:
        """Add many API keys at once, as rows of their tables."""
        self._session.flush()
        self._insert(ApiKey, api_keys)
        self._insert(ApiKeySecret, secrets)

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
        if not counts:
            return
        # In one order everywhere, so that two processes never wait for each other in a circle.
        rows = [
            {
                "api_key_id": api_key_id,
                "tokens_issued": tokens_issued,
                "raw_key_uses": raw_key_uses,
                "last_used_at": last_used_at,
            }
            for api_key_id, (tokens_issued, raw_key_uses, last_used_at) in sorted(counts.items())
        ]
        connection = self._session.connection()
        _ADD_USAGE[connection.dialect.name](connection, rows)

    # --- signing keys

    def signing_key(self, kid: str) -> SigningKey | None:
        return self._session.get(SigningKey, kid, with_for_update=self._for_change)

    def lock_signing_keys(self) -> None:
        """Keep everybody else from changing the ring until this write ends.

        Where writers run side by side, two that looked first would both find their place free.
        The deployment's own row is the lock, because a first signing key has none.
        """
        self._session.exec(select(Deployment.id).with_for_update(key_share=True)).all()

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
        most_scanned: int = 1000,
    ) -> tuple[Sequence[ChangeRow], int | None]:
        """Rows of the change log, the newest first, and where the next page begins.

        Args:
            organization_id: whose; None: everybody's.
            before: below this sequence number.
            what: what the kind of change begins with, as `api_key.`.
        """
        seq = col(ChangeRow.seq)
        walk = select(seq)
        if subject is not None:
            walk = walk.where(ChangeRow.subject == subject)
        elif organization_id is not None:
            walk = walk.where(ChangeRow.organization_id == organization_id)
        if before is not None:
            walk = walk.where(seq < before)
        scanned = self._session.exec(walk.order_by(seq.desc()).limit(most_scanned)).all()
        query = select(ChangeRow).where(seq.in_(scanned))
        if organization_id is not None:
            query = query.where(ChangeRow.organization_id == organization_id)
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
        """Insert rows that all name the same columns."""
        if not rows:
            return
        connection = self._session.connection()
        statement = insert(SQLModel.metadata.tables[str(table.__tablename__)])
        compiled = statement.compile(dialect=connection.dialect, column_keys=list(rows[0]))
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
