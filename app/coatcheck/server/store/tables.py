"""The schema: the only place that says what the database holds.

Columns that the token path reads are integers, texts and blobs, so that the raw record and the
ORM's are the same on every database.  Times are whole seconds since the epoch, UTC; credits are
whole millionths.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    event,
    text,
)
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


def _where_given(column: str, wanted: str = "") -> Index:
    given = text(f"{wanted or column} IS NOT NULL")
    return Index(f"ix_api_keys_{column}", column, sqlite_where=given, postgresql_where=given)


class Deployment(SQLModel, table=True):
    """One row: whose database this is."""

    __tablename__ = "deployment"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: int = Field(default=1, primary_key=True)
    issuer: str
    log: str
    """Names this change log; a restored backup starts a new one."""
    created_at: int = Field(sa_type=BigInteger)
    works_with: str = Field(default="0004", sa_column_kwargs={"server_default": "0003"})
    """The oldest schema whose code may run on this one: nodes of two versions share a database
    while an upgrade goes around."""
    catalog: str | None = None
    """Fingerprint of the catalog that the last node started with."""


class Organization(SQLModel, table=True):
    """A customer.  The operator's own organization is one of them."""

    __tablename__ = "organizations"

    id: str = Field(primary_key=True)
    name: str
    is_operator: bool = False
    suspended_at: int | None = Field(default=None, sa_type=BigInteger)
    created_at: int = Field(sa_type=BigInteger)
    bootstrapped_at: int | None = Field(default=None, sa_type=BigInteger)
    """When its key management was switched on."""
    recoverable: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    """Whether sealed copies of its secrets are kept."""
    max_lifetime_s: int | None = Field(default=None, sa_type=BigInteger)
    credit_limit: int | None = Field(default=None, sa_type=BigInteger)
    low_credit: int | None = Field(default=None, sa_type=BigInteger)
    """What is left of the credit when its owners are told."""
    credit_spent_at: int | None = Field(default=None, sa_type=BigInteger)
    """Since when the credit is used up."""


class Project(SQLModel, table=True):
    """A part of an organization that API keys may be bound to."""

    __tablename__ = "projects"
    __table_args__ = (Index(None, "organization_id", "id"),)

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organizations.id")
    name: str
    is_default: bool = False
    created_at: int = Field(sa_type=BigInteger)
    archived_at: int | None = Field(default=None, sa_type=BigInteger)


class Member(SQLModel, table=True):
    """A person who manages an organization's API keys."""

    __tablename__ = "members"
    __table_args__ = (Index(None, "organization_id", "id"),)

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organizations.id")
    name: str
    email: str
    role: str
    created_at: int = Field(sa_type=BigInteger)
    removed_at: int | None = Field(default=None, sa_type=BigInteger)


class Group(SQLModel, table=True):
    """A pricing group: what its operator sells under one name."""

    __tablename__ = "groups"

    id: str = Field(primary_key=True)
    name: str
    price_multiplier: int = Field(sa_type=BigInteger)
    """In millionths: 1,000,000 is the plain price."""
    models: str | None = None
    """Models with one blank between them; None: all."""
    requests_per_minute: int | None = Field(default=None, sa_type=BigInteger)
    tokens_per_minute: int | None = Field(default=None, sa_type=BigInteger)
    created_at: int = Field(sa_type=BigInteger)
    deleted_at: int | None = Field(default=None, sa_type=BigInteger)


class ApiKey(SQLModel, table=True):
    """An API key, without its secret.  Absent means unrestricted."""

    __tablename__ = "api_keys"
    __table_args__ = (
        Index(None, "organization_id", "state", "id"),
        Index(
            "ix_api_keys_organization_id_expires_at",
            "organization_id",
            "expires_at",
            sqlite_where=text("expires_at IS NOT NULL"),
            postgresql_where=text("expires_at IS NOT NULL"),
        ),
        Index(
            "ix_api_keys_member_id_device",
            "member_id",
            "device",
            unique=True,
            sqlite_where=text("device IS NOT NULL AND state IN ('active', 'disabled')"),
            postgresql_where=text("device IS NOT NULL AND state IN ('active', 'disabled')"),
        ),
        # Of the few that belong to a member or a group.
        _where_given("member_id"),
        _where_given("group_id"),
        # What an API key has given away of its own credit.
        _where_given("created_by", "credit_limit"),
        _BY_PRIMARY_KEY,
    )

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
    state: str = Field(default="active", sa_column_kwargs={"server_default": "active"})
    """`active`, `disabled`, `revoked` or `deleted`: what the times say, for the index."""
    kind: str = Field(default="standard", sa_column_kwargs={"server_default": "standard"})
    """`standard`, `device`, `connector` or `member`."""
    project_id: str | None = None
    networks: str | None = None
    """Networks with one blank between them."""
    role: str | None = None
    models: str | None = None
    """Models with one blank between them."""
    group_id: str | None = None
    credit_limit: int | None = Field(default=None, sa_type=BigInteger)
    member_id: str | None = None
    """Whose it is: a member's own, for management or for a device."""
    device: str | None = None
    created_by: str | None = None
    """Who made it: the id of an API key or a member, or `cli:<user>`."""
    disabled_reason: str | None = None
    """`manual`, `quota` or `leak`."""
    deleted_at: int | None = Field(default=None, sa_type=BigInteger)


def state_of(row: ApiKey) -> str:
    """What an API key's times say, but for its end, which the clock says."""
    if row.deleted_at is not None:
        return "deleted"
    if row.revoked_at is not None:
        return "revoked"
    return "active" if row.disabled_at is None else "disabled"


@event.listens_for(ApiKey, "before_insert")
@event.listens_for(ApiKey, "before_update")
def _keep_state(mapper: object, connection: object, row: ApiKey) -> None:
    # Here, so that no use case can forget it.
    row.state = state_of(row)


class ApiKeySecret(SQLModel, table=True):
    """A secret of an API key, by digest; two of them while a rotation's overlap lasts."""

    __tablename__ = "api_key_secrets"
    __table_args__ = (
        Index(
            "ix_api_key_secrets_sealing_key_id_digest",
            "sealing_key_id",
            "digest",
            sqlite_where=text("sealing_key_id IS NOT NULL"),
            postgresql_where=text("sealing_key_id IS NOT NULL"),
        ),
        _BY_PRIMARY_KEY,
    )

    digest: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    api_key_id: str = Field(foreign_key="api_keys.id", index=True)
    mask: str
    created_at: int = Field(sa_type=BigInteger)
    expires_at: int | None = Field(default=None, sa_type=BigInteger)
    """The end of the overlap; None for the current secret."""
    last_used_at: int | None = Field(default=None, sa_type=BigInteger)
    """Kept for a replaced secret only: whether somebody still uses it."""
    sealed: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))
    """The secret itself, sealed under the API key's id, where the policy keeps it."""
    sealing_key_id: str | None = None


class ApiKeyUsage(SQLModel, table=True):
    """How often an API key was used, up to the last flush, and what resource servers reported."""

    __tablename__ = "api_key_usage"
    __table_args__ = _BY_PRIMARY_KEY

    api_key_id: str = Field(foreign_key="api_keys.id", primary_key=True)
    tokens_issued: int = Field(sa_type=BigInteger)
    raw_key_uses: int = Field(sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})
    """Those of them that a resource server got because a caller sent it the key itself."""
    last_used_at: int = Field(sa_type=BigInteger)
    requests: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})
    input_tokens: int = Field(
        default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"}
    )
    output_tokens: int = Field(
        default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"}
    )
    credits: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})
    agent_runs: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": "0"})


class OrganizationUsage(SQLModel, table=True):
    """What resource servers reported of all API keys of an organization, deleted ones too."""

    __tablename__ = "organization_usage"

    organization_id: str = Field(foreign_key="organizations.id", primary_key=True)
    requests: int = Field(default=0, sa_type=BigInteger)
    input_tokens: int = Field(default=0, sa_type=BigInteger)
    output_tokens: int = Field(default=0, sa_type=BigInteger)
    credits: int = Field(default=0, sa_type=BigInteger)
    agent_runs: int = Field(default=0, sa_type=BigInteger)
    last_used_at: int | None = Field(default=None, sa_type=BigInteger)


class UsageReport(SQLModel, table=True):
    """A report that was counted, so that it is not counted twice."""

    __tablename__ = "usage_reports"

    id: str = Field(primary_key=True)
    """The resource server's API key and the name it gave to the report."""
    at: int = Field(sa_type=BigInteger, index=True)


class IdempotentRequest(SQLModel, table=True):
    """A request that must not be done twice, and what was answered, but for the secret."""

    __tablename__ = "idempotent_requests"

    id: str = Field(primary_key=True)
    """SHA-256 of actor, route and Idempotency-Key."""
    body_digest: str
    status: int
    answer: str
    at: int = Field(sa_type=BigInteger, index=True)


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
        Index(None, "organization_id", "seq"),
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
