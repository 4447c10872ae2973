"""Restrictions, projects, members, groups, usage reports, copies of secrets.  Stop older nodes."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _number(name: str, *, default: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=default is None, server_default=default)


def _text(name: str, *, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=default is None, server_default=default)


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("organization_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        _number("archived_at"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_projects_organization_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
    )
    op.create_index(op.f("ix_projects_organization_id_id"), "projects", ["organization_id", "id"])
    op.create_table(
        "members",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("organization_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        _number("removed_at"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_members_organization_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_members")),
    )
    op.create_index(op.f("ix_members_organization_id_id"), "members", ["organization_id", "id"])
    op.create_table(
        "groups",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("price_multiplier", sa.BigInteger(), nullable=False),
        _text("models"),
        _number("requests_per_minute"),
        _number("tokens_per_minute"),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        _number("deleted_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_groups")),
    )
    op.create_table(
        "organization_usage",
        sa.Column("organization_id", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("requests", "input_tokens", "output_tokens", "credits", "agent_runs")
        ),
        _number("last_used_at"),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organizations.id"],
            name=op.f("fk_organization_usage_organization_id"),
        ),
        sa.PrimaryKeyConstraint("organization_id", name=op.f("pk_organization_usage")),
    )
    op.create_table(
        "usage_reports",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_reports")),
    )
    op.create_index(op.f("ix_usage_reports_at"), "usage_reports", ["at"])
    op.create_table(
        "idempotent_requests",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("body_digest", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_idempotent_requests")),
    )
    op.create_index(op.f("ix_idempotent_requests_at"), "idempotent_requests", ["at"])
    # SQLite cannot drop a table that rows of others point to, and need not here.
    with op.batch_alter_table("organizations", recreate="never") as batch:
        for name in ("bootstrapped_at", "max_lifetime_s"):
            batch.add_column(_number(name))
        for name in ("credit_limit", "low_credit", "credit_spent_at"):
            batch.add_column(_number(name))
        batch.add_column(
            sa.Column("recoverable", sa.Boolean(), nullable=False, server_default=sa.text("false"))
        )
    with op.batch_alter_table("api_keys") as batch:
        batch.add_column(_text("state", default="active"))
        batch.add_column(_text("kind", default="standard"))
        for name in ("project_id", "networks", "role", "models", "group_id"):
            batch.add_column(_text(name))
        for name in ("member_id", "device", "created_by", "disabled_reason"):
            batch.add_column(_text(name))
        for name in ("credit_limit", "deleted_at"):
            batch.add_column(_number(name))
    with op.batch_alter_table("api_key_secrets") as batch:
        batch.add_column(_number("last_used_at"))
        batch.add_column(sa.Column("sealed", sa.LargeBinary(), nullable=True))
        batch.add_column(_text("sealing_key_id"))
    with op.batch_alter_table("api_key_usage") as batch:
        for name in ("requests", "input_tokens", "output_tokens", "credits", "agent_runs"):
            batch.add_column(_number(name, default="0"))
    # Who managed API keys before this step goes on.
    op.execute("UPDATE organizations SET bootstrapped_at = created_at")
    op.execute(
        "UPDATE api_keys SET state = CASE WHEN revoked_at IS NOT NULL THEN 'revoked'"
        " WHEN disabled_at IS NOT NULL THEN 'disabled' ELSE 'active' END,"
        " disabled_reason = CASE WHEN disabled_at IS NULL THEN NULL ELSE 'manual' END"
    )
    op.drop_index(op.f("ix_api_keys_organization_id_id"), "api_keys")
    op.create_index(
        op.f("ix_api_keys_organization_id_state_id"), "api_keys", ["organization_id", "state", "id"]
    )
    ends = sa.text("expires_at IS NOT NULL")
    op.create_index(
        "ix_api_keys_organization_id_expires_at",
        "api_keys",
        ["organization_id", "expires_at"],
        sqlite_where=ends,
        postgresql_where=ends,
    )
    one_per_device = sa.text("device IS NOT NULL AND state IN ('active', 'disabled')")
    op.create_index(
        "ix_api_keys_member_id_device",
        "api_keys",
        ["member_id", "device"],
        unique=True,
        sqlite_where=one_per_device,
        postgresql_where=one_per_device,
    )
    is_sealed = sa.text("sealing_key_id IS NOT NULL")
    op.create_index(
        "ix_api_key_secrets_sealing_key_id_digest",
        "api_key_secrets",
        ["sealing_key_id", "digest"],
        sqlite_where=is_sealed,
        postgresql_where=is_sealed,
    )
    for column, wanted in (
        ("member_id", "member_id"),
        ("group_id", "group_id"),
        ("created_by", "credit_limit"),
    ):
        given = sa.text(f"{wanted} IS NOT NULL")
        op.create_index(
            f"ix_api_keys_{column}",
            "api_keys",
            [column],
            sqlite_where=given,
            postgresql_where=given,
        )
    op.create_index(op.f("ix_changes_organization_id_seq"), "changes", ["organization_id", "seq"])
    with op.batch_alter_table("deployment") as batch:
        batch.add_column(_text("catalog"))
    # Code of before would hand out tokens without the restrictions that are kept here.
    op.execute("UPDATE deployment SET works_with = '0004'")
