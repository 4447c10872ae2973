"""PostgreSQL: the store of many workers and many machines, over psycopg 3.

The token path asks the follower's memory (`following`) and goes to the database only for an API
key that this process has not met; that look-up reads the head of the log and the record in one
statement.  It waits in a thread, so that nothing that the database does holds up the event loop.

Every wait is bounded from this side, whatever state the server is in (`deadlines`).

Commit order is sequence order: a transaction takes one advisory lock right before it appends to
the log.  If the answer to a commit is lost, the log is asked whether it holds the change.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Float,
    Select,
    bindparam,
    create_engine,
    event,
    extract,
    func,
    select,
)
from sqlalchemy.dialects.postgresql.psycopg import dialect as psycopg_dialect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session, col

from coatcheck.durations import BUSY_TIMEOUT
from coatcheck.server.store import hot, migrations
from coatcheck.server.store.base import (
    ApiKeyRecord,
    Found,
    Narrowing,
    SigningKeyRecord,
    StoreMissing,
    StoreUnavailable,
)
from coatcheck.server.store.deadlines import Deadline, Deadlines
from coatcheck.server.store.following import Follower, LogRow, News
from coatcheck.server.store.tables import ChangeRow, Deployment
from coatcheck.server.store.transaction import LOG_LOCK, Transaction

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_SCHEMES: Final = ("postgresql://", "postgres://")
#: Seconds that one read may take.  With the wait for its turn it stays below BUSY_TIMEOUT.
_READ_TIMEOUT: Final = 1.0
#: Seconds that a write may take from its first statement; longer while it gets on, because a
#: command may write a million rows.
_WRITE_TIMEOUT: Final = 0.9 * BUSY_TIMEOUT
#: Seconds that a connection of the pool may take for its first answer before it counts as stale.
_GREETING: Final = 0.5
#: Seconds after which a write that has no connection yet is given up.
_CONNECT_WITHIN: Final = 0.85 * BUSY_TIMEOUT
#: Seconds that a request waits for a reader's turn and answer.
_FIND_TIMEOUT: Final = 1.5
#: Rows per second that a statement which writes many is given.
_ROWS_PER_SECOND: Final = 500
#: Threads of one process that read what is not in memory, each with a connection.
_READERS: Final = 3
#: Connections of one process that write.
_WRITERS: Final = 3
#: Rows of the log that one poll brings.
_MOST_NEWS: Final = 5000
#: Seconds between two looks of a request that waits for a poll.
_LOOK: Final = 0.005
#: Another process that changes the schema is waited for so long, in seconds.
_UPGRADE_PATIENCE: Final = 60
#: Advisory lock of whoever changes the schema.
_SCHEMA_LOCK: Final = LOG_LOCK + 1
#: SQLSTATE (PostgreSQL, appendix A).
_NO_TABLE: Final = "42P01"
_NO_DATABASE: Final = "does not exist"
#: A position above every row.
_NOWHERE: Final = 2**62
#: Where a connection of the pool keeps its deadline.
_DEADLINE: Final = "coatcheck_deadline"

#: PgBouncer hands a connection to another client after each transaction, so that nothing but
#: SET LOCAL is sure to hold.  A lock holder that is frozen must not block every revocation.
_LIMITS: Final = (
    f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT * 500}ms';"
    f" SET LOCAL statement_timeout = '{BUSY_TIMEOUT}s';"
    " SET LOCAL idle_in_transaction_session_timeout = '1s'"
)
#: Whoever only reads sees one moment, through all of its statements.
_ONE_MOMENT: Final = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; "


class PostgresStore:
    """A store in one PostgreSQL database."""

    def __init__(self, database_url: str, clock: Callable[[], float] = time.time) -> None:
        """Args:
        database_url: `postgresql://user@host/database`, with any parameter that libpq knows.
        clock: this machine's, in seconds since the epoch; compared with the database's.

        Raises:
            ValueError: the URL names no database.
        """
        if not database_url.startswith(_SCHEMES):
            raise ValueError("COATCHECK_DATABASE_URL: postgresql://user@host/database")
        try:
            given = conninfo_to_dict(database_url)
        except psycopg.ProgrammingError:
            # Its message repeats the URL, and the URL may hold the password.
            raise ValueError(
                "COATCHECK_DATABASE_URL cannot be read: write postgresql://user@host/database and"
                " percent-encode : / ? # @ in the password"
            ) from None
        self.clock = clock
        self._conninfo = make_conninfo("", **_defaults(given))
        self._where = _where(given)
        dialect = psycopg_dialect(paramstyle="format")  # type: ignore[no-untyped-call]
        self._sql = hot.compiled_for(dialect)
        self.news_sql = str(_news().compile(dialect=dialect))
        self._deadlines = Deadlines()
        self._open()

    def _open(self) -> None:
        self._engine: Engine | None = None
        self._mine = threading.local()
        self._connections: set[psycopg.Connection] = set()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="coatcheck-read")
        self._opening = threading.Lock()
        self._follower = Follower(_Log(self, self._sql), self.clock)

    # --- the token path

    def find_now(self, digests: Sequence[bytes]) -> Found | None:
        follower = self._follower
        if not follower.is_caught_up:
            return None
        # The head before the records: what comes in between makes no token too wide.
        as_of = follower.head
        found: dict[bytes, ApiKeyRecord] = {}
        for digest in digests:
            record = follower.remembered(digest)
            if record is None:
                return None
            found[digest] = record
        return Found(as_of, found)

    async def find(self, digests: Sequence[bytes]) -> Found:
        found = self.find_now(digests)
        return await self._later(partial(self._find, digests)) if found is None else found

    async def narrowed_since(self, subjects: Sequence[str], as_of: int) -> bool:
        parameters = hot.subjects_for(subjects, as_of)
        return bool(await self._later(partial(self._read, self._sql.narrowed_since, parameters)))

    def _find(self, digests: Sequence[bytes]) -> Found:
        generation = self._follower.generation
        rows = self._read(self._sql.find_api_keys_at_head, hot.digests_for(digests))
        records = [hot.record_from(row[1:]) for row in rows]
        self._follower.remember(records, generation)
        # Head and records come from one statement, and so from one moment.
        as_of = rows[0][0] or 0 if rows else self._follower.head
        return Found(as_of, {record.digest: record for record in records})

    async def _later(self, read: Callable[[], _T]) -> _T:
        """Read in a thread, once it is known that the database answers."""
        try:
            async with asyncio.timeout(_FIND_TIMEOUT):
                # Raises at once if the last poll failed: nobody queues for what is away.
                while not self._follower.is_ready():  # noqa: ASYNC110 - a thread tells it
                    await asyncio.sleep(_LOOK)
                return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        except TimeoutError:
            raise StoreUnavailable(f"the database {self._where} did not answer in time") from None

    # --- from the follower's memory

    def head(self) -> int:
        self._follower.require_fresh()
        return self._follower.head

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        self._follower.require_fresh()
        return self._follower.narrowings(after, since)

    def log(self) -> str:
        self._follower.require_fresh()
        return self._follower.log

    def signing_keys(self) -> list[SigningKeyRecord]:
        self._follower.require_fresh()
        return self._follower.signing_keys()

    def clock_drift_s(self) -> float | None:
        with contextlib.suppress(StoreUnavailable):
            self._follower.require_fresh()
        return self._follower.clock_drift_s

    def pool_connections(self) -> dict[str, int]:
        """How many connections this process holds, by state: in a write, or waiting for work."""
        pool: Any = None if self._engine is None else self._engine.pool
        used, idle = (0, 0) if pool is None else (pool.checkedout(), pool.checkedin())
        return {"used": used, "idle": idle + len(self._connections)}

    # --- writes

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Transaction]:
        if self._follower.is_away:
            self._follower.require_fresh()
        self._mine.asked_at = time.monotonic()
        with self._translated(), self._session(read_only=read_only) as session:
            tx = Transaction(session, locks=not read_only)
            yield tx
            session.flush()
            self._commit(session, tx.last_change_id)
        if tx.last_change_id is not None:
            self._follower.wrote()

    def _commit(self, session: Session, change_id: str | None) -> None:
        try:
            session.commit()
        except DBAPIError as error:
            if change_id is None or not error.connection_invalidated:
                raise
            # Whether it was done is not known here; the log knows.
            _log.warning("the answer to a commit was lost: asking the change log")
            if not self._holds(change_id):
                raise

    def _holds(self, change_id: str) -> bool:
        with self._session(read_only=False) as session:
            connection = session.connection()
            # Whose commit is still under way holds the lock: behind it, the outcome is final.
            connection.execute(select(func.pg_advisory_xact_lock(LOG_LOCK)))
            query = select(col(ChangeRow.seq)).where(col(ChangeRow.change_id) == change_id)
            return connection.execute(query).first() is not None

    @contextmanager
    def _session(self, *, read_only: bool) -> Iterator[Session]:
        """A transaction with its limits, on a connection that answered a moment ago."""
        with contextlib.ExitStack() as stack:
            try:
                session = self._begin(stack, read_only=read_only)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                # It went stale in the pool, and so did the others.
                stack.close()
                self._writer().dispose()
                session = self._begin(stack, read_only=read_only)
            yield session

    def _begin(self, stack: contextlib.ExitStack, *, read_only: bool) -> Session:
        session = Session(self._writer(), expire_on_commit=False)
        connection = session.connection()
        driver = cast(psycopg.Connection, connection.connection.driver_connection)
        # Left after the session: giving the connection back is a round trip as well.
        deadline = stack.enter_context(self._deadlines.within(_GREETING, driver.fileno()))
        connection.info[_DEADLINE] = deadline
        stack.callback(session.close)
        connection.exec_driver_sql((_ONE_MOMENT if read_only else "") + _LIMITS)
        deadline.extend(_WRITE_TIMEOUT)
        return session

    def _writer(self) -> Engine:
        with self._opening:
            if self._engine is None:
                self._engine = create_engine(
                    "postgresql+psycopg://",
                    creator=self._connect_to_write,
                    pool_size=_WRITERS,
                    max_overflow=0,
                    pool_timeout=BUSY_TIMEOUT / 2,
                    # A failed statement's text would print digests otherwise.
                    hide_parameters=True,
                )
                event.listen(self._engine, "before_cursor_execute", _extend)
            return self._engine

    # --- schema

    def exists(self) -> bool:
        try:
            return self._revision()[0] is not None
        except StoreMissing:
            return False

    def upgrade(self, *, create: bool = False) -> tuple[str | None, str]:
        if not create and not self.exists():
            raise StoreMissing(f"the database {self._where} holds nothing of ours: coatcheck init")
        # No deadline: a step may take as long as the tables are large.
        engine = create_engine("postgresql+psycopg://", creator=self.connect, hide_parameters=True)
        event.listen(engine, "begin", _lock_schema)
        try:
            with self._translated():
                return migrations.upgrade(engine)
        finally:
            engine.dispose()

    def check_schema(self) -> None:
        migrations.require_current(*self._revision())

    def _revision(self) -> tuple[str | None, str | None]:
        """The schema's revision, and the oldest that it works with if it is a newer one."""
        try:
            revision = self._one("SELECT version_num FROM alembic_version")
            is_newer = revision is not None and revision > migrations.REVISION
            return revision, self._one(migrations.WORKS_WITH) if is_newer else None
        except StoreUnavailable as error:
            if getattr(error.__cause__, "sqlstate", None) == _NO_TABLE:
                return None, None
            raise

    def _one(self, sql: str) -> str | None:
        # In a reader's thread: whoever asks may have none of its own to connect from.
        rows = self._readers.submit(self._read, sql).result()
        return rows[0][0] if rows else None

    def close(self) -> None:
        self._follower.stop()
        self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        if self._engine is not None:
            self._engine.dispose()
        self._open()

    # --- connections

    def connect(self, *, autocommit: bool = False) -> psycopg.Connection:
        """A new connection.  Raises psycopg.Error."""
        # Prepared statements of one client are unknown to the next one behind a pooler.
        return psycopg.connect(self._conninfo, autocommit=autocommit, prepare_threshold=None)

    def _connect_to_write(self) -> psycopg.Connection:
        """A new connection, once it is known that the database answers.

        libpq gives a connection two seconds at least, which is all that a caller has.
        """
        waited_s = time.monotonic() - self._mine.asked_at
        self._follower.require_heard(max(0.0, _CONNECT_WITHIN - waited_s))
        return self.connect()

    def rows(
        self, connection: psycopg.Connection, sql: str, parameters: Sequence[Any] = ()
    ) -> list[tuple[Any, ...]]:
        """What one statement finds.  Raises psycopg.Error, also when it takes too long."""
        with self._deadlines.within(_READ_TIMEOUT, connection.fileno()):
            return connection.execute(sql.encode(), parameters or None).fetchall()

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """What is told of a failure, without any statement's parameters."""
        told = f"the database {self._where} did not answer: {_sentence(error)}"
        made = StoreUnavailable(told)
        # libpq tells this one in words only: a failed connection has no SQLSTATE.
        if _NO_DATABASE in told:
            made = StoreMissing(f"{told}: create it (createdb), then run coatcheck init")
        made.__cause__ = error
        return made

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Read on this thread's own connection, on another one if it has gone stale."""
        connection: psycopg.Connection | None = getattr(self._mine, "connection", None)
        if connection is not None:
            try:
                return self.rows(connection, sql, parameters)
            except psycopg.Error as error:
                if not connection.broken:
                    raise self.unavailable(error) from error
                self._connections.discard(connection)
        try:
            connection = self._mine.connection = self.connect(autocommit=True)
            self._connections.add(connection)
            return self.rows(connection, sql, parameters)
        except psycopg.Error as error:
            raise self.unavailable(error) from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except PoolTimeout:
            raise StoreUnavailable("other writes take too long: no connection is free") from None
        except DBAPIError as error:
            raise self.unavailable(error.orig or error) from None
        except psycopg.Error as error:
            raise self.unavailable(error) from None


class _Log:
    """How the follower reads: on one connection that nobody else uses."""

    def __init__(self, store: PostgresStore, sql: hot.HotSql) -> None:
        self._store = store
        self._sql = sql
        self._connection: psycopg.Connection | None = None

    def news(self, after: int | None) -> News:
        asked_at = self._store.clock()
        position = _NOWHERE if after is None else after
        rows = self._rows(self._store.news_sql, (position, _MOST_NEWS))
        clock, head, log = rows[0][:3]
        drift_s = (asked_at + self._store.clock()) / 2 - clock
        found = [LogRow(*row[3:]) for row in rows if row[3] is not None]
        return News(log or "", head or 0, found, drift_s)

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        return [Narrowing(*row) for row in self._rows(self._sql.narrowings, (after, since))]

    def signing_keys(self) -> list[SigningKeyRecord]:
        return [hot.signing_key_from(row) for row in self._rows(self._sql.signing_keys)]

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            if self._connection is None:
                self._connection = self._store.connect(autocommit=True)
            return self._store.rows(self._connection, sql, parameters)
        except psycopg.Error as error:
            self.close()
            raise self._store.unavailable(error) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _news() -> Select[*tuple[Any, ...]]:
    """One poll: the clock, where the log stands, its name, and what is above a position."""
    now = select(
        extract("epoch", func.clock_timestamp()).cast(Float).label("clock"),
        select(func.max(col(ChangeRow.seq))).scalar_subquery().label("head"),
        select(col(Deployment.log)).scalar_subquery().label("log"),
    ).subquery("now")
    return (
        select(
            now,
            col(ChangeRow.seq),
            col(ChangeRow.at),
            col(ChangeRow.what),
            col(ChangeRow.subject),
            col(ChangeRow.wider),
            col(ChangeRow.narrows),
        )
        .select_from(now)
        .outerjoin(ChangeRow, col(ChangeRow.seq) > bindparam("after", type_=BigInteger()))
        .order_by(col(ChangeRow.seq))
        .limit(bindparam("most", type_=BigInteger()))
    )


def _extend(
    connection: Connection,
    cursor: object,
    statement: str,
    parameters: Any,
    context: object,
    executemany: bool,
) -> None:
    deadline: Deadline = connection.info[_DEADLINE]
    deadline.extend(_READ_TIMEOUT + (len(parameters) / _ROWS_PER_SECOND if executemany else 0))


def _lock_schema(connection: Connection) -> None:
    connection.exec_driver_sql(
        f"SET LOCAL lock_timeout = '{_UPGRADE_PATIENCE}s';"
        f" SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"
    )


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a connection gets that its URL does not say otherwise."""
    return {
        "application_name": "coatcheck",
        "connect_timeout": BUSY_TIMEOUT,
        "tcp_user_timeout": BUSY_TIMEOUT * 1000,
        # A replica that lags would call what was revoked good; and nobody can write to it.
        "target_session_attrs": "read-write",
    } | dict(given)


def _where(given: Mapping[str, Any]) -> str:
    host = given.get("host") or given.get("hostaddr") or "this machine"
    return f"{given.get('dbname') or 'of the user'} at {host}"


def _sentence(error: BaseException) -> str:
    """The first line of a message: what follows may quote a statement."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
