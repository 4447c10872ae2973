"""What the service needs of a store, and the record that the token path reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from coatcheck.client_address import Network
from coatcheck.scope import Scopes

if TYPE_CHECKING:
    from coatcheck.server.store.transaction import Transaction


class StoreUnavailable(Exception):
    """The database did not answer in time, or not at all.  The caller is told 503, never 401."""


class StoreMissing(StoreUnavailable):
    """There is no database at the configured place; none is made silently."""


class Taken(Exception):
    """Somebody else's row has the place that this one was to have.  Nothing was written."""


class SchemaMismatch(Exception):
    """The database has another schema than this version of the code needs."""


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """What the store knows of a presented secret: the API key, and all that it belongs to.

    Times are seconds since the epoch; None means never.  An absent restriction does not restrict.
    """

    digest: bytes
    secret_expires_at: int | None
    id: str
    organization_id: str
    environment: str
    scopes: Scopes
    audiences: tuple[str, ...]
    expires_at: int | None
    disabled_at: int | None
    revoked_at: int | None
    organization_suspended_at: int | None
    disabled_reason: str | None = None
    kind: str = "standard"
    project_id: str | None = None
    project_archived_at: int | None = None
    networks: tuple[Network, ...] | None = None
    role: str | None = None
    models: tuple[str, ...] | None = None
    group_id: str | None = None
    group_models: tuple[str, ...] | None = None
    organization_spent_at: int | None = None


@dataclass(frozen=True, slots=True)
class SigningKeyRecord:
    """A signing key as it lies in the store: public, and sealed.  Times as above."""

    kid: str
    purpose: str
    algorithm: str
    public_jwk: str
    sealed_private: bytes
    sealing_key_id: str
    position: int
    created_at: int
    starts_at: int
    withdrawn_at: int | None


class Found(NamedTuple):
    """The answer to a look-up.

    Attributes:
        as_of: the head of the change log, read before the records were.
        records: by digest; a digest that matched nothing is absent.
    """

    as_of: int
    records: Mapping[bytes, ApiKeyRecord]


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A row of the change log that made some token too wide.  `at` as above."""

    seq: int
    at: int
    what: str
    subject: str
    wider: str


class FindApiKeys(Protocol):
    """The one read of the token path."""

    def find_now(self, digests: Sequence[bytes]) -> Found | None:
        """As `find`, if nothing has to be waited for; else None.  Raises as it does."""
        ...

    async def find(self, digests: Sequence[bytes]) -> Found:
        """Look up at most two presented secrets in one query.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        ...


class NarrowedSince(Protocol):
    """The one read of introspection."""

    async def narrowed_since(self, subjects: Sequence[str], as_of: int) -> bool:
        """Whether any of the subjects has a narrowing change above this sequence number.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        ...


class Transactions(Protocol):
    """What a use case needs of a store."""

    def transaction(self, *, read_only: bool = False) -> AbstractContextManager[Transaction]:
        """One write: all of it, or nothing.

        Args:
            read_only: take no write lock; whoever writes all the same breaks on it.

        Raises:
            StoreUnavailable: another writer held the database for longer than BUSY_TIMEOUT.
        """
        ...


class Store(FindApiKeys, NarrowedSince, Transactions, Protocol):
    """A database, with everything the service does to it."""

    def exists(self) -> bool:
        """Whether there is a database of ours at the configured place, of whatever schema.

        Raises:
            StoreUnavailable: something is there and does not answer.
        """
        ...

    def upgrade(self, *, create: bool = False) -> tuple[str | None, str]:
        """Bring the schema to this version.  Returns the revisions before and after.

        Raises:
            StoreMissing: there is no database, and `create` was not said.
            SchemaMismatch: the database is newer than this version.
        """
        ...

    def check_schema(self) -> None:
        """Raises SchemaMismatch or StoreUnavailable unless the schema is this version's."""
        ...

    def head(self) -> int:
        """The last sequence number of the change log, by the cheapest proof there is."""
        ...

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        """Rows of the change log that narrow, above a sequence number, not before a moment.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        ...

    def log(self) -> str:
        """The name of this change log.  Raises StoreUnavailable."""
        ...

    def signing_keys(self) -> list[SigningKeyRecord]:
        """Every signing key, withdrawn ones too, in the order in which they were made."""
        ...

    def clock_drift_s(self) -> float | None:
        """By how much this machine's clock is ahead of the database's, in seconds.

        None where the database has no clock of its own.
        """
        ...

    def close(self) -> None:
        """Give back connections.  The store opens them again when it is used."""
        ...
