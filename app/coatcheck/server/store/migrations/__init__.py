"""The schema's history: one file a step under `versions/`, run by Alembic.

All steps of an upgrade are one transaction; SQLite, too, takes schema changes back with it.

A step that only adds leaves `deployment.works_with` as it is, and the nodes of the version before
go on while the upgrade goes around; one that takes something away raises it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, inspect, text

from coatcheck.server.store.base import SchemaMismatch

if TYPE_CHECKING:
    # Loaded where a schema is changed: every command and every worker would wait for it.
    from alembic.config import Config

#: The step that this version of the code needs; a test holds it equal to Alembic's own head.
REVISION: Final = "0004"
#: Where a schema that is newer than the code says how old the code may be.
WORKS_WITH: Final = "SELECT works_with FROM deployment"

_FOLDER: Final = Path(__file__).parent


def config() -> Config:
    """Alembic's configuration, without a file of its own."""
    from alembic.config import Config  # noqa: PLC0415 - as above

    alembic = Config()
    alembic.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return alembic


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Run the steps that are missing.

    Returns:
        The revisions before and after; None before the first.

    Raises:
        SchemaMismatch: the database has a step that this version does not know.
    """
    from alembic import command  # noqa: PLC0415 - as above

    with engine.connect() as connection, connection.begin():
        before = _current(connection)
        if before is not None and before > REVISION:
            require_current(before)
        alembic = config()
        alembic.attributes["connection"] = connection
        command.upgrade(alembic, "head")
    return before, REVISION


def steps_after(revision: str | None) -> list[tuple[str, str]]:
    """The steps that `upgrade` would run, each with what it is about, in order.

    Raises:
        SchemaMismatch: the database has a step that this version does not know.
    """
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as above

    if revision is not None and revision > REVISION:
        require_current(revision)
    steps = ScriptDirectory.from_config(config()).walk_revisions()
    missing = [step for step in steps if revision is None or step.revision > revision]
    return [(step.revision, step.doc) for step in reversed(missing)]


def require_current(revision: str | None, works_with: str | None = None) -> None:
    """Raises SchemaMismatch, with the fix, unless the code may run on this schema.

    Args:
        works_with: the oldest revision whose code may run on it, as a newer schema says.
    """
    if revision == REVISION:
        return
    if revision is not None and revision > REVISION:
        if works_with is not None and works_with <= REVISION:
            return
        raise SchemaMismatch(
            f"the database is at schema {revision}, newer than this version's {REVISION}:"
            " run the newer coatcheck"
        )
    raise SchemaMismatch(
        f"the database is at schema {revision or 'none'}, this version needs {REVISION}:"
        " run coatcheck db upgrade"
    )


def _current(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    row = connection.execute(text("SELECT version_num FROM alembic_version")).fetchone()
    return None if row is None else str(row[0])
