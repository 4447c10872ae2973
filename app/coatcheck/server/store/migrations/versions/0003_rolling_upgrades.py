"""Rolling upgrades: the schema says which versions of the code may still run on it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("deployment") as batch:
        batch.add_column(
            sa.Column("works_with", sa.String(), nullable=False, server_default="0003")
        )
