"""Copies of a database, and a database in the place of another.

What has to survive from the database that is replaced is none of this room's business: it calls
`carry_over` while nobody can write there any more.

How a database does it is one file in this folder and one line in `BACKUPS`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from coatcheck.server.store.base import Store


class BackupFailed(Exception):
    """A backup was not made, or not restored.  The message says how to mend it."""


#: Brings what has to survive out of a database; called again for what was written meanwhile.
CarryOver = Callable[[Store], None]


class Staged(Protocol):
    """A backup as a database of its own that nobody else uses."""

    @property
    def store(self) -> Store: ...

    def replace(self, carry_over: CarryOver | None) -> str | None:
        """Put this database in the place of the one that the settings name.

        Args:
            carry_over: called with the database that is replaced, a last time when nobody can
                write to it any more; None if it cannot be read, or is not to be.

        Returns:
            Where the replaced one is kept; None if there was none.

        Raises:
            BackupFailed: nothing was replaced.
        """
        ...


class Backups(Protocol):
    """How one kind of database is copied."""

    def is_part(self, file: Path) -> bool:
        """Whether this file belongs to the database itself."""
        ...

    def save(self, file: Path) -> None:
        """Write one moment of the database into this file; others go on writing.

        Args:
            file: exists, is empty and private.

        Raises:
            BackupFailed, StoreUnavailable: why it could not.
        """
        ...

    def staged(self, file: Path) -> AbstractContextManager[Staged]:
        """What `save` wrote, as a database of its own; gone when the block ends.

        Raises:
            BackupFailed: the file is no backup of this kind of database, or is damaged.
        """
        ...


def _sqlite(database_url: str) -> Backups:
    from coatcheck.server.store.backup_sqlite import SqliteBackups  # noqa: PLC0415

    return SqliteBackups(database_url)


def _postgres(database_url: str) -> Backups:
    # Its driver is not installed where nobody needs it.
    from coatcheck.server.store.backup_postgres import PostgresBackups  # noqa: PLC0415

    return PostgresBackups(database_url)


#: By the scheme of the database's URL.
BACKUPS: Final[dict[str, Callable[[str], Backups]]] = {
    "sqlite": _sqlite,
    "postgresql": _postgres,
}


def backups_of(database_url: str) -> Backups:
    """How the database of this URL is copied.  Nothing is opened yet.

    Raises:
        BackupFailed: nobody knows how.
    """
    scheme = database_url.partition(":")[0]
    if scheme not in BACKUPS:
        raise BackupFailed(f"a {scheme} database is backed up with its own tools")
    return BACKUPS[scheme](database_url)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A private file to write into; it gets its name once the block has ended well.

    Until then it stands beside that name under another one, so that nobody takes half a file for
    a whole one; it is on the disk before it has its name.

    Args:
        force: take the place of a file that is there.

    Raises:
        BackupFailed: it cannot be written there, or there is one already.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        if path.exists() and not force:
            raise FileExistsError  # noqa: TRY301 - told below, as the one that comes meanwhile
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            yield beside
            _sync(beside)
            if force:
                beside.replace(path)
            else:
                # A link, unlike a new name, never takes the place of another file.
                path.hardlink_to(beside)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except FileExistsError:
        raise BackupFailed(f"{path} exists: choose another name, or say --force") from None
    except OSError as error:
        raise BackupFailed(f"{path} cannot be written: {error.strerror}") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
