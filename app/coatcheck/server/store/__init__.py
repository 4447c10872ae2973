"""Where records live.  The only room that knows SQLModel, SQLAlchemy and database drivers.

The token path reads through `FindApiKeys`: raw SQL, compiled once from the tables, never an ORM
call.  Everything that writes goes through one transaction at a time and appends to the change
log in it.

A database is one file in this folder and one line in `STORES`.
"""

from __future__ import annotations

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
)
from coatcheck.server.store.sqlite import SqliteStore
from coatcheck.server.store.transaction import Transaction

STORES: Final[dict[str, Callable[[str], Store]]] = {
    "sqlite": SqliteStore,
}


def open_store(database_url: str) -> Store:
    """The store that a database URL names.  Nothing is opened or created yet.

    Raises:
        ValueError: no store goes by that scheme; the message lists those there are.
    """
    scheme = database_url.partition(":")[0]
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ValueError(f"COATCHECK_DATABASE_URL starts with one of: {known}")
    return STORES[scheme](database_url)


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
    "Transaction",
    "open_store",
]
