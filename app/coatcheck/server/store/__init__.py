"""Where records live.  The only room that knows SQLModel, SQLAlchemy and database drivers.

The token path reads through `FindApiKeys`: raw SQL, compiled once from the tables, never an ORM
call.  Everything that writes goes through one transaction at a time and appends to the change
log in it.

A database is one file in this folder and one line in `STORES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from coatcheck.server.store.base import (
    ApiKeyRecord,
    FindApiKeys,
    Found,
    NarrowedSince,
    Narrowing,
    SchemaMismatch,
    SigningKeyRecord,
    Store,
    StoreMissing,
    StoreUnavailable,
    Taken,
    Transactions,
)
from coatcheck.server.store.sqlite import SqliteStore
from coatcheck.server.store.transaction import Transaction


def _postgres(database_url: str, clock: Callable[[], float]) -> Store:
    """Raises ValueError where its driver is not installed: who stays with SQLite needs none."""
    try:
        from coatcheck.server.store.postgres import PostgresStore  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ValueError(
            "a postgresql:// database needs its driver: pip install 'coatcheck[postgres]'"
        ) from None
    return PostgresStore(database_url, clock)


#: By the scheme of its URL.
STORES: Final[dict[str, Callable[[str, Callable[[], float]], Store]]] = {
    "sqlite": SqliteStore,
    "postgresql": _postgres,
}


def open_store(database_url: str, clock: Callable[[], float] = time.time) -> Store:
    """The store that a database URL names.  Nothing is opened or created yet.

    Args:
        clock: this machine's, in seconds since the epoch; a database that is shared compares it
            with its own.

    Raises:
        ValueError: no store goes by that scheme; the message lists those there are.
    """
    scheme = database_url.partition(":")[0]
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ValueError(f"COATCHECK_DATABASE_URL starts with one of: {known}")
    return STORES[scheme](database_url, clock)


__all__ = [
    "STORES",
    "ApiKeyRecord",
    "FindApiKeys",
    "Found",
    "NarrowedSince",
    "Narrowing",
    "SchemaMismatch",
    "SigningKeyRecord",
    "Store",
    "StoreMissing",
    "StoreUnavailable",
    "Taken",
    "Transaction",
    "Transactions",
    "open_store",
]
