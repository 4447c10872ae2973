"""Alembic's entry: runs the steps on the connection that `migrations.upgrade` hands in."""

from alembic import context

from coatcheck.server.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
