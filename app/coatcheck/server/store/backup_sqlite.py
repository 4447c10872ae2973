"""Backups of SQLite: one file, copied page by page while the service goes on.

A restore writes into the database that is there, in one write of its own.  The file stays the
same file, so that a process which has it open sees the change as any other, and nobody writes a
revocation into a file that has just been moved away.

Source: https://sqlite.org/backup.html (online backup).
"""

import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from coatcheck.durations import BUSY_TIMEOUT
from coatcheck.server.store.backups import BackupFailed, CarryOver, new_file
from coatcheck.server.store.base import Store, StoreUnavailable
from coatcheck.server.store.sqlite import SqliteStore

#: Pages that are copied at a time while the lock is held.
_PAGES: Final = 1024
#: Files that SQLite keeps beside a database.
_BESIDE: Final = ("-wal", "-shm", "-journal")


class SqliteBackups:
    """Backups of the database in one file."""

    def __init__(self, database_url: str) -> None:
        self._path = SqliteStore(database_url).path

    def is_part(self, file: Path) -> bool:
        return file.resolve() in {Path(f"{self._path.resolve()}{end}") for end in ("", *_BESIDE)}

    def save(self, file: Path) -> None:
        try:
            with closing(_open(self._path)) as source:
                _copy(source, file)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the database {self._path} was not copied: {error}") from None

    @contextmanager
    def staged(self, file: Path) -> Iterator["_Staged"]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that it can take the place of the other.
        staging = self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}")
        try:
            with new_file(staging) as copy:
                try:
                    with closing(_open(file, "ro")) as source:
                        _copy(source, copy)
                except sqlite3.Error as error:
                    raise BackupFailed(
                        f"{file} is no backup of a SQLite database, or is damaged: {error}"
                    ) from None
            store = SqliteStore(f"sqlite:///{staging}")
            try:
                yield _Staged(store, self._path)
            finally:
                store.close()
        finally:
            for end in ("", *_BESIDE):
                Path(f"{staging}{end}").unlink(missing_ok=True)


class _Staged:
    def __init__(self, store: SqliteStore, target: Path) -> None:
        self._store = store
        self._target = target

    @property
    def store(self) -> Store:
        return self._store

    def replace(self, carry_over: CarryOver | None) -> str | None:
        kept = self._target.with_name(
            f"{self._target.name}.replaced-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            f"-{secrets.token_hex(2)}"
        )
        try:
            if carry_over is None:
                return self._move_in(kept)
            return self._write_over(carry_over, kept)
        except sqlite3.Error as error:
            raise BackupFailed(f"{self._target} was not replaced: {error}") from None
        except OSError as error:
            raise BackupFailed(f"{self._target} was not replaced: {error.strerror}") from None

    def _write_over(self, carry_over: CarryOver, kept: Path) -> str:
        live = SqliteStore(f"sqlite:///{self._target}")
        deadline = time.monotonic() + BUSY_TIMEOUT
        is_alone = False

        def copied(status: int, remaining: int, total: int) -> None:
            """Called after the first pages, when the write lock is held, and after all others."""
            nonlocal is_alone
            if is_alone:
                return
            if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                if time.monotonic() > deadline:
                    raise BackupFailed(
                        f"another process does not let go of {self._target}: stop it, try again"
                    )
                return
            is_alone = True
            # What others read is still what was there before, all of it by now.  What is written
            # into the copy makes SQLite begin again with the pages; the lock stays.
            carry_over(live)
            with new_file(kept) as beside, closing(_open(self._target)) as source:
                _copy(source, beside)

        try:
            # What there is until now is carried over while others may still write.
            carry_over(live)
            with (
                closing(_open(self._store.path)) as source,
                closing(_open(self._target)) as target,
            ):
                (pages,) = source.execute("PRAGMA page_count").fetchone()
                # All pages at once would be a commit before anybody is asked.
                source.backup(target, pages=min(_PAGES, pages // 2), progress=copied, sleep=0.05)
        finally:
            live.close()
        return str(kept)

    def _move_in(self, kept: Path) -> str | None:
        # The last connection that closes leaves one file.
        self._store.close()
        was_there = False
        for end in ("", *_BESIDE):
            # Also what stands there alone: SQLite would take it for part of the new database.
            with suppress(FileNotFoundError):
                Path(f"{self._target}{end}").rename(f"{kept}{end}")
                was_there = True
        with new_file(self._target) as file:
            shutil.copyfile(self._store.path, file)
        return str(kept) if was_there else None


def _open(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection to a file that is there."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
    )
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _copy(source: sqlite3.Connection, file: Path) -> None:
    """One moment of a database as one file, whole and sound.  Raises sqlite3.Error."""
    with closing(_open(file)) as copy:
        source.backup(copy)
        # Of the three files that a database in WAL mode is, a backup has one.
        copy.execute("PRAGMA journal_mode = DELETE")
        (verdict,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
