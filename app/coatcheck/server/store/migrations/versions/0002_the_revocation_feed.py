"""Revocation feed and raw keys: wider subjects, what a signing key signs, raw-key uses."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Before this step tokens were the only thing signed, and introspection the only reader of
    # narrowings: those that are older than the feed's window need no wider subject.
    with op.batch_alter_table("changes") as batch:
        batch.add_column(sa.Column("wider", sa.String(), nullable=False, server_default="*"))
    with op.batch_alter_table("signing_keys") as batch:
        batch.add_column(sa.Column("purpose", sa.String(), nullable=False, server_default="token"))
    op.create_index(op.f("ix_changes_narrows_seq"), "changes", ["narrows", "seq"])
    with op.batch_alter_table("api_key_usage") as batch:
        batch.add_column(
            sa.Column("raw_key_uses", sa.BigInteger(), nullable=False, server_default="0")
        )
