"""Backups of PostgreSQL: `pg_dump` and `pg_restore`, from PATH.

A restore fills a database of its own beside the one that is in use, and then gives it its name.
The other one keeps its data under another name; between the two names nobody can write to
either.  For that the user of the URL has to own the database and may create others.

Passwords and everything else of the URL reach the programs by environment variables alone:
arguments can be read by every user of a machine.

Source: PostgreSQL documentation, "Environment Variables" of libpq, `pg_dump`, ALTER DATABASE.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Final, LiteralString
from urllib.parse import quote

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from coatcheck.server.store.backups import BackupFailed, CarryOver
from coatcheck.server.store.base import Store, StoreUnavailable
from coatcheck.server.store.postgres import PostgresStore
from coatcheck.server.store.tables import METADATA

#: Databases that every server has, to stand on while others get new names.
_MAINTENANCE: Final = ("postgres", "template1")
#: Seconds to wait for a server.
_CONNECT: Final = 10
#: Tries to take a name from a database in use; the server itself waits 5 s in each.
_TRIES: Final = 3
#: Names in PostgreSQL are no longer.
_NAME: Final = 63
_OURS: Final = {*METADATA.tables, "alembic_version"}
_OTHERS: Final = (
    "SELECT schemaname || '.' || tablename FROM pg_tables"
    " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    " AND tablename <> ALL(%s) ORDER BY 1 LIMIT 3"
)
#: Only our own user's: another one's may not be ended by us, and is told about.
_CUT: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = %s AND usename = current_user"
)


class PostgresBackups:
    """Backups of one PostgreSQL database."""

    def __init__(self, database_url: str) -> None:
        self._given = conninfo_to_dict(database_url)
        # In libpq's own order.
        names = (self._given.get("dbname"), os.environ.get("PGDATABASE"), self._given.get("user"))
        self._name = next((str(name) for name in names if name), "")
        if not self._name:
            raise BackupFailed("COATCHECK_DATABASE_URL names no database: add /NAME")

    def is_part(self, file: Path) -> bool:
        return False

    def save(self, file: Path) -> None:
        self._require_own()
        self._run("pg_dump", "--format=custom", "--no-password", f"--file={file}")

    @contextmanager
    def staged(self, file: Path) -> Iterator["_Staged"]:
        staging = f"{self._name[: _NAME - 24]}_restore_{token_hex(6)}"
        with self._maintenance() as connection:
            self._require_own()
            _alter(connection, "CREATE DATABASE {} TEMPLATE template0", staging)
            try:
                self._run(
                    "pg_restore",
                    *("--no-password", "--no-owner", "--no-privileges", "--exit-on-error"),
                    *("--single-transaction", f"--dbname={staging}", str(file)),
                    database=staging,
                )
                made = _Staged(self, staging, connection)
                try:
                    yield made
                finally:
                    made.store.close()
            finally:
                # Gone by this name if it took the other's.
                _alter(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", staging)

    def url_of(self, database: str) -> str:
        """The same server, another database, as a URL."""
        others = {
            name: value
            for name, value in self._given.items()
            if name != "dbname" and value is not None
        }
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in others.items())
        return f"postgresql:///{quote(database, safe='')}?{query}"

    @property
    def name(self) -> str:
        return self._name

    def _require_own(self) -> None:
        """What is dumped and replaced as a whole has to be ours as a whole."""
        try:
            with closing(self._connect(self._name)) as connection:
                others = connection.execute(_OTHERS, (list(_OURS),)).fetchall()
        except psycopg.OperationalError:
            # It does not exist, or is away: whoever needs it is told so.
            return
        if others:
            tables = ", ".join(row[0] for row in others)
            raise BackupFailed(
                f"the database {self._name} also holds tables of others ({tables}): give Coatcheck"
                " a database of its own, or use pg_dump and coatcheck db new-log by hand"
            )

    def _connect(self, database: str) -> psycopg.Connection:
        given = {"connect_timeout": _CONNECT} | self._given | {"dbname": database}
        return psycopg.connect(make_conninfo("", **given), autocommit=True)

    @contextmanager
    def _maintenance(self) -> Iterator[psycopg.Connection]:
        """A connection beside the database.  Raises StoreUnavailable."""
        for name in _MAINTENANCE:
            try:
                connection = self._connect(name)
            except psycopg.Error as error:
                failure = error
                continue
            with closing(connection):
                yield connection
            return
        raise StoreUnavailable(f"the database server did not answer: {_sentence(failure)}")

    def _run(self, program: str, *arguments: str, database: str | None = None) -> None:
        path = shutil.which(program)
        if path is None:
            raise BackupFailed(
                f"{program} is not on PATH: install PostgreSQL's client programs, of the server's"
                " version or newer"
            )
        done = subprocess.run(  # noqa: S603 - no shell, no argument that somebody sent
            [path, *arguments],
            env=os.environ | self._environment(database or self._name),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            return
        said = " ".join(done.stderr.split())
        if "version mismatch" in said or "unsupported version" in said:
            said += ".  Install the client programs of the server's version or newer"
        raise BackupFailed(f"{program} failed: {said[-600:]}")

    def _environment(self, database: str) -> dict[str, str]:
        """The URL as libpq's own variables; names and passwords are no arguments."""
        given = self._given | {"dbname": database}
        return {
            option.envvar.decode(): str(given[name])
            for option in pq.Conninfo.get_defaults()
            if option.envvar and given.get(name := option.keyword.decode()) is not None
        }


class _Staged:
    def __init__(
        self, backups: PostgresBackups, staging: str, connection: psycopg.Connection
    ) -> None:
        self._backups = backups
        self._staging = staging
        self._connection = connection
        self._store = PostgresStore(backups.url_of(staging))

    @property
    def store(self) -> Store:
        return self._store

    def replace(self, carry_over: CarryOver | None) -> str | None:
        live = self._backups.name
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        kept = f"{live[: _NAME - 32]}_replaced_{at}_{token_hex(2)}"
        if carry_over is not None:
            # What there is until now, while others may still write.
            self._carry(carry_over, live)
        was_there = self._rename(live, kept)
        is_done = False
        try:
            if carry_over is not None:
                # Nobody knows it by this name.
                self._carry(carry_over, kept)
            self._store.close()
            is_done = self._rename(self._staging, live)
        finally:
            if was_there and not is_done:
                self._rename(kept, live)
        return f"database {kept}" if was_there else None

    def _carry(self, carry_over: CarryOver, database: str) -> None:
        replaced = PostgresStore(self._backups.url_of(database))
        try:
            carry_over(replaced)
        finally:
            replaced.close()

    def _rename(self, old: str, new: str) -> bool:
        """Give a database another name and cut its connections.  Returns whether it exists."""
        connection = self._connection
        rows = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (old,))
        if rows.fetchone() is None:
            return False
        _alter(connection, "ALTER DATABASE {} ALLOW_CONNECTIONS false", old)
        name = old
        try:
            for _ in range(_TRIES):
                connection.execute(_CUT, (old,))
                with suppress(psycopg.errors.ObjectInUse):
                    _alter(connection, "ALTER DATABASE {} RENAME TO {}", old, new)
                    name = new
                    return True
            raise BackupFailed(
                f"others do not let go of the database {old}: stop the service, then try again"
            )
        finally:
            _alter(connection, "ALTER DATABASE {} ALLOW_CONNECTIONS true", name)


def _alter(connection: psycopg.Connection, statement: LiteralString, *names: str) -> None:
    """Run a statement about whole databases.  Raises BackupFailed, ObjectInUse."""
    try:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
    except psycopg.errors.InsufficientPrivilege:
        raise BackupFailed(
            "a restore makes a database beside the one in use and gives it its name: the user has"
            " to own the database and may create others (ALTER USER ... CREATEDB).  Without that:"
            " pg_restore by hand, then coatcheck db new-log"
        ) from None
    except psycopg.errors.ObjectInUse:
        raise
    except psycopg.Error as error:
        raise BackupFailed(f"the database server refused: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
