"""The schema: the only place that says what the database holds.

Columns that the token path reads are integers, texts and blobs, so that the raw record and the
ORM's are the same on every database.  Times are whole seconds since the epoch, UTC.
"""

from typing import Final

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Integer, LargeBinary, MetaData
from sqlmodel import Field, SQLModel

NAMING: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
METADATA: Final = MetaData(naming_convention=NAMING)
SQLModel.metadata = METADATA

# SQLite counts rowids only in a column declared INTEGER; PostgreSQL needs 64 bits said.
_Integer64 = BigInteger().with_variant(Integer(), "sqlite")

#: SQLite keeps the rows in the primary key's own tree, so that a look-up descends one tree only.
_BY_PRIMARY_KEY: Final = {"sqlite_with_rowid": False}


class Deployment(SQLModel, table=True):
    """One row: whose database this is."""

    __tablename__ = "deployment"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: int = Field(default=1, primary_key=True)
    issuer: str
    log: str
    """Names this change log; a restored backup starts a new one."""
    created_at: int = Field(sa_type=BigInteger)
    works_with: str = Field(default="0003", sa_column_kwargs={"server_default": "0003"})
    """The oldest schema whose code may run on this one: nodes of two versions share a database
    while an upgrade goes around."""


class Organization(SQLModel, table=True):
    """A customer.  The operator's own organization is one of them."""

    __tablename__ = "organizations"

    id: str = Field(primary_key=True)
    name: str
    is_operator: bool = False
    suspended_at: int | None = Field(default=None, sa_type=BigInteger)
    created_at: int = Field(sa_type=BigInteger)


class ApiKey(SQLModel, table=True):
    """An API key, without its secret."""

    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "organization_id", "id"), _BY_PRIMARY_KEY)

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organizations.id")
    name: str
    environment: str
    scopes: str
    """Scope-tokens with one blank between them."""
    audiences: str
    """Audiences with one blank between them."""
    mask: str
    created_at: int = Field(sa_type=BigInteger)
    expires_at: int | None = Field(default=None, sa_type=BigInteger)
    disabled_at: int | None = Field(default=None, sa_type=BigInteger)
    revoked_at: int | None = Field(default=None, sa_type=BigInteger)


class ApiKeySecret(SQLModel, table=True):
    """A secret of an API key, by digest only; two of them while a rotation's overlap lasts."""

    __tablename__ = "api_key_secrets"
    __table_args__ = _BY_PRIMARY_KEY

    digest: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    api_key_id: str = Field(foreign_key="api_keys.id", index=True)
    mask: str
    created_at: int = Field(sa_type=BigInteger)
    expires_at: int | None = Field(default=None, sa_type=BigInteger)
    """The end of the overlap; None for the current secret."""


class ApiKeyUsage(SQLModel, table=True):
    """How often an API key was used, up to the last flush."""

    __tablename__ = "api_key_usage"
    __table_args__ = _BY_PRIMARY_KEY

    api_key_id: str = Field(foreign_key="api_keys.id", primary_key=True)
    tokens_issued: int = Field(sa_type=BigInteger)
    raw_key_uses: int = Field(sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})
    """Those of them that a resource server got because a caller sent it the key itself."""
    last_used_at: int = Field(sa_type=BigInteger)


class SigningKey(SQLModel, table=True):
    """A signing key, its private half sealed."""

    __tablename__ = "signing_keys"

    kid: str = Field(primary_key=True)
    """RFC 7638 thumbprint of the public half."""
    purpose: str = Field(sa_column_kwargs={"server_default": "token"})
    """What it signs: `token` or `feed`."""
    algorithm: str
    public_jwk: str
    sealed_private: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    sealing_key_id: str
    position: int = Field(unique=True)
    """Counts signing keys in the order they were made: two made at once cannot both be next."""
    created_at: int = Field(sa_type=BigInteger)
    starts_at: int = Field(sa_type=BigInteger)
    withdrawn_at: int | None = Field(default=None, sa_type=BigInteger)


class ChangeRow(SQLModel, table=True):
    """One row of the change log.  Rows are only ever added."""

    __tablename__ = "changes"
    __table_args__ = (
        Index(None, "subject", "seq"),
        Index(None, "narrows", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(
        default=None, sa_column=Column(_Integer64, primary_key=True, autoincrement=True)
    )
    change_id: str = Field(unique=True)
    at: int = Field(sa_type=BigInteger)
    what: str
    subject: str
    wider: str = Field(sa_column_kwargs={"server_default": "*"})
    narrows: bool
    organization_id: str | None = None
    actor: str
    address: str | None = None
    request_id: str | None = None
    detail: str
    """JSON object; never a secret, never a digest."""
