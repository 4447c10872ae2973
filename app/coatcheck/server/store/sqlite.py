"""SQLite: the default store, one file, several processes on one machine.

Reads of the token path go over one connection with plain `sqlite3`, on the event loop: a read
takes microseconds, a hop to a thread ten times that.  Found records are remembered, and used
only while the head of the change log is proven unmoved: `PRAGMA data_version` tells whether any
other connection has committed, in this process or another; if one has, the head is read again.
One proof serves all requests that had arrived when it was made.

WAL mode, so that readers and the one writer do not wait for each other; `synchronous=FULL`, so
that an acknowledged revocation survives a power cut.
"""

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool
from sqlmodel import Session

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
from coatcheck.server.store.transaction import Transaction

_SCHEME: Final = "sqlite:///"
#: Records remembered by each process; about 1 KiB each.
_MOST_RECORDS: Final = 32_768
#: Seconds between two looks at whether the file is still the one that was opened.
_FILE_CHECK: Final = 1.0
#: The execution option of a transaction that takes no write lock.
_READ_ONLY: Final = "coatcheck_read_only"
#: SQLite says this of a file without our tables.
_NO_TABLE: Final = "no such table"


class _Reading:
    """The reading connection, in a `with`.  A generator would cost the token path twice as much."""

    __slots__ = ("_store",)

    def __init__(self, store: "SqliteStore") -> None:
        self._store = store

    def __enter__(self) -> sqlite3.Connection:
        try:
            return self._store.reader()
        except sqlite3.Error as error:
            raise self._store.reading_failed(error) from None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise self._store.reading_failed(error) from None


class SqliteStore:
    """A store in one SQLite file."""

    def __init__(self, database_url: str, clock: Callable[[], float] = time.time) -> None:
        """Args:
        database_url: `sqlite:///relative.db` or `sqlite:////absolute.db`.
        clock: not looked at: a file is on the machine whose clock it is.

        Raises:
            ValueError: the URL names no file.
        """
        path = database_url.removeprefix(_SCHEME)
        if not database_url.startswith(_SCHEME) or not path or path == ":memory:":
            raise ValueError("COATCHECK_DATABASE_URL: sqlite:///file.db or sqlite:////abs/file.db")
        self.path = Path(path)
        self._sql = hot.compiled_for(sqlite_dialect.dialect(paramstyle="qmark"))
        self._reader: sqlite3.Connection | None = None
        self._engine: Engine | None = None
        self._write_lock = threading.Lock()
        self._file: tuple[int, int] | None = None
        self._look_again_at = 0.0
        self._patience_s = float(BUSY_TIMEOUT)
        self._data_version = -1
        self._head = -1
        self._is_proven = False
        self._records: OrderedDict[bytes, ApiKeyRecord] = OrderedDict()
        self._reading = _Reading(self)

    # --- the token path

    async def find(self, digests: Sequence[bytes]) -> Found:
        return self.find_now(digests)

    def find_now(self, digests: Sequence[bytes]) -> Found:
        if not self._is_proven:
            self._prove()
        as_of = self._head
        found: dict[bytes, ApiKeyRecord] = {}
        unknown = False
        for digest in digests:
            record = self._records.get(digest)
            if record is None:
                unknown = True
            else:
                found[digest] = record
        if unknown:
            with self._reading as connection:
                rows = connection.execute(
                    self._sql.find_api_keys, hot.digests_for(digests)
                ).fetchall()
            for record in map(hot.record_from, rows):
                found[record.digest] = self._remember(record)
        return Found(as_of, found)

    async def narrowed_since(self, subjects: Sequence[str], as_of: int) -> bool:
        with self._reading as connection:
            parameters = hot.subjects_for(subjects, as_of)
            return connection.execute(self._sql.narrowed_since, parameters).fetchone() is not None

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        with self._reading as connection:
            rows = connection.execute(self._sql.narrowings, (after, since)).fetchall()
        return [Narrowing(*row) for row in rows]

    def log(self) -> str:
        with self._reading as connection:
            name: str = connection.execute(self._sql.log).fetchone()[0]
        return name

    def signing_keys(self) -> list[SigningKeyRecord]:
        with self._reading as connection:
            rows = connection.execute(self._sql.signing_keys).fetchall()
        return [hot.signing_key_from(row) for row in rows]

    def _prove(self) -> None:
        """Prove the head, once for all requests whose last byte has arrived by now.

        Their tasks run before the event loop reads from any connection again.  Whatever is read
        after that, such as the request of somebody who was told of a revocation in between,
        comes to a head that is proven anew.
        """
        self.head()
        with contextlib.suppress(RuntimeError):  # no event loop runs: each look-up proves it
            asyncio.get_running_loop().call_soon(self._doubt)
            self._is_proven = True

    def _doubt(self) -> None:
        self._is_proven = False

    def head(self) -> int:
        # The version is read before the head: a commit in between is seen at the next look.
        with self._reading as connection:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            if version != self._data_version:
                head = connection.execute(self._sql.head).fetchone()[0] or 0
                if head != self._head:
                    self._records.clear()
                    self._head = head
                self._data_version = version
        return self._head

    def _remember(self, record: ApiKeyRecord) -> ApiKeyRecord:
        self._records[record.digest] = record
        if len(self._records) > _MOST_RECORDS:
            self._records.popitem(last=False)
        return record

    # --- writes

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Transaction]:
        with self._writing() as engine:
            bind = engine.execution_options(**{_READ_ONLY: read_only})
            with Session(bind, expire_on_commit=False) as session, session.begin():
                yield Transaction(session, locks=not read_only)

    # --- schema

    def exists(self) -> bool:
        return self.path.exists() and self._revision()[0] is not None

    def upgrade(self, *, create: bool = False) -> tuple[str | None, str]:
        if not self.path.exists():
            if not create:
                raise StoreMissing(self._missing())
            self._create_file()
        with self._writing() as engine:
            # The mode is kept in the file; it cannot be changed within a transaction.
            with closing(self._connect()) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
            return migrations.upgrade(engine)

    def check_schema(self) -> None:
        self._require_file()
        migrations.require_current(*self._revision())

    def clock_drift_s(self) -> float | None:
        # A file is on the machine whose clock it is.
        return None

    def _revision(self) -> tuple[str | None, str | None]:
        """The schema's revision, and the oldest that it works with if it is a newer one.

        None for a file without our tables.
        """
        try:
            with self._reading as connection:
                revision = _one(connection, "SELECT version_num FROM alembic_version")
                is_newer = revision is not None and revision > migrations.REVISION
                return revision, _one(connection, migrations.WORKS_WITH) if is_newer else None
        except StoreUnavailable as error:
            if _NO_TABLE in str(error):
                return None, None
            raise

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._engine is not None:
            self._engine.dispose()
        self._reader, self._engine, self._file = None, None, None
        self._look_again_at = 0.0
        self._data_version = self._head = -1
        self._is_proven = False
        self._records.clear()

    # --- connections

    def reader(self) -> sqlite3.Connection:
        """The connection that reads.  Raises StoreMissing, sqlite3.Error."""
        now = time.monotonic()
        if now >= self._look_again_at:
            self._require_file()
            self._look_again_at = now + _FILE_CHECK
        if self._reader is None:
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
        return self._reader

    def reading_failed(self, error: sqlite3.Error) -> StoreUnavailable:
        """Let go of the connection that reads; the next reading opens another one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            self._data_version = -1
        return self._unavailable(error)

    @contextmanager
    def _writing(self) -> Iterator[Engine]:
        """The right to write, one thread at a time; all who wait are told at the same time."""
        asked_at = time.monotonic()
        if not self._write_lock.acquire(timeout=BUSY_TIMEOUT):
            raise self._unavailable("another write takes too long")
        try:
            self._require_file()
            self._patience_s = max(0.0, BUSY_TIMEOUT - (time.monotonic() - asked_at))
            yield self._writer()
        except IntegrityError:
            raise
        except DatabaseError as error:
            raise self._unavailable(error.orig) from None
        except sqlite3.Error as error:
            raise self._unavailable(error) from None
        finally:
            self._write_lock.release()

    def _writer(self) -> Engine:
        if self._engine is None:
            # hide_parameters: a failed statement's text would print digests otherwise.
            self._engine = create_engine(
                "sqlite://", creator=self._connect, poolclass=StaticPool, hide_parameters=True
            )
            event.listen(self._engine, "begin", self._begin)
        return self._engine

    def _connect(self) -> sqlite3.Connection:
        # mode=rw: a missing file is an error, never a new and empty database.
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _create_file(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _require_file(self) -> None:
        """The file that was opened is still the one at that path.

        A connection to a deleted file goes on answering, from a database that nobody can
        write to any more: revocations would be lost on it.
        """
        try:
            stat = self.path.stat()
        except OSError:
            self.close()
            raise StoreMissing(self._missing()) from None
        file = (stat.st_dev, stat.st_ino)
        if self._file != file:
            self.close()
            self._file = file

    def _missing(self) -> str:
        return f"there is no database at {self.path}: run coatcheck init, or mount the file"

    def _begin(self, connection: Connection) -> None:
        # KiB, negative as SQLite wants them.  Digests are random: many keys touch many pages.
        connection.exec_driver_sql("PRAGMA cache_size = -65536")
        # What was waited for other threads is not waited again for other processes.
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {self._patience_s * 1000:.0f}")
        # The write lock is taken at once: two transactions that read first and write later would
        # otherwise fail on each other instead of waiting.
        read_only = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    def _unavailable(self, error: object) -> StoreUnavailable:
        return StoreUnavailable(f"the database {self.path} did not answer: {error}")


def _one(connection: sqlite3.Connection, sql: str) -> str | None:
    row = connection.execute(sql).fetchone()
    return row[0] if row else None
