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
    String,
    bindparam,
    case,
    insert,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel, col, func, select

from coatcheck.server.changes import Change
from coatcheck.server.store.tables import (
    ApiKey,
    ApiKeySecret,
    ApiKeyUsage,
    ChangeRow,
    Deployment,
    Organization,
    SigningKey,
)

#: Rows of one table that one statement carries; bounds memory while millions are written.
_BATCH: Final = 5000
#: "Insert, or update where it exists", in the words of each database.
_UPSERT: Final[Mapping[str, Callable[..., Any]]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


@lru_cache
def _add_usage(dialect: Dialect) -> Compiled:
    """Insert a row of usage or add to it; nothing for an API key that does not exist."""
    usage = SQLModel.metadata.tables[str(ApiKeyUsage.__tablename__)]
    counts = ("tokens_issued", "raw_key_uses", "last_used_at")
    known = select(col(ApiKey.id), *[bindparam(name, type_=BigInteger()) for name in counts]).where(
        col(ApiKey.id) == bindparam("api_key_id", type_=String())
    )
    upsert = _UPSERT[dialect.name](usage).from_select(("api_key_id", *counts), known)
    new = upsert.excluded
    upsert = upsert.on_conflict_do_update(
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
    compiled: Compiled = upsert.compile(dialect=dialect)
    return compiled


class Transaction:
    """What a use case may do to the database; committed as a whole, or not at all."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # --- the deployment

    def deployment(self) -> Deployment | None:
        return self._session.get(Deployment, 1)

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
        return self._session.get(Organization, organization_id)

    def organizations(self) -> Sequence[Organization]:
        return self._session.exec(select(Organization).order_by(col(Organization.id))).all()

    # --- API keys

    def api_key(self, api_key_id: str) -> ApiKey | None:
        return self._session.get(ApiKey, api_key_id)

    def api_key_by_digest(self, digest: bytes) -> ApiKey | None:
        secret = self._session.get(ApiKeySecret, digest)
        return None if secret is None else self.api_key(secret.api_key_id)

    def api_keys(self, organization_id: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """API keys in the order of their ids, from the one after `after`."""
        query = select(ApiKey).where(col(ApiKey.id) > after).order_by(col(ApiKey.id)).limit(limit)
        if organization_id is not None:
            query = query.where(col(ApiKey.organization_id) == organization_id)
        return self._session.exec(query).all()

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
        _execute_many(connection, _add_usage(connection.dialect), rows)

    # --- signing keys

    def signing_key(self, kid: str) -> SigningKey | None:
        return self._session.get(SigningKey, kid)

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
