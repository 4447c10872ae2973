"""Projects: parts of an organization that API keys may be bound to.  Create, rename, archive."""

from dataclasses import dataclass
from typing import Final

from coatcheck import ids
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Conflict, NotFound
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import Project

DEFAULT_NAME: Final = "Default"


@dataclass(frozen=True, slots=True)
class ProjectView:
    """A project as people and programs see it.  Times are seconds since the epoch."""

    id: str
    name: str
    organization_id: str
    is_default: bool
    created_at: int
    archived_at: int | None

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "organization": self.organization_id,
            "default": self.is_default,
            "status": "active" if self.archived_at is None else "archived",
            "createdAt": forms.rfc3339(self.created_at),
            "archivedAt": forms.rfc3339(self.archived_at),
        }


def create(
    store: Transactions, organization_id: str, name: str, actor: Actor, *, now: int
) -> ProjectView:
    """A new project of an organization.

    Raises:
        Invalid: the name.
        NotFound: there is no such organization.
    """
    row = Project(
        id=ids.new_id("prj", now * 1000),
        organization_id=organization_id,
        name=forms.name(name),
        created_at=now,
    )
    with store.transaction() as tx:
        if tx.organization(organization_id) is None:
            raise NotFound("there is no organization of this id (an id starts with org_)")
        tx.add(row)
        tx.append([change_of(What.PROJECT_CREATED, row, actor, now, name=row.name)])
        return view(row)


def default_of(organization_id: str, now: int) -> Project:
    """The project that an organization begins with, for the transaction that sets it up."""
    return Project(
        id=ids.new_id("prj", now * 1000),
        organization_id=organization_id,
        name=DEFAULT_NAME,
        is_default=True,
        created_at=now,
    )


def page(
    store: Transactions, organization_id: str, *, after: str = "", limit: int
) -> tuple[list[ProjectView], str | None]:
    """Projects, archived ones too, the oldest first, and where the next page begins."""
    with store.transaction(read_only=True) as tx:
        rows = tx.projects(organization_id, after, limit + 1)
        following = rows[limit - 1].id if len(rows) > limit else None
        return [view(row) for row in rows[:limit]], following


def show(store: Transactions, project_id: str) -> ProjectView:
    """One project.  Raises NotFound."""
    with store.transaction(read_only=True) as tx:
        return view(_existing(tx, project_id))


def rename(
    store: Transactions, project_id: str, name: str, actor: Actor, *, now: int
) -> ProjectView:
    """Call a project something else.

    Raises:
        Invalid: the name.
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, project_id)
        before, row.name = row.name, forms.name(name)
        if row.name != before:
            detail = [before, row.name]
            tx.append([change_of(What.PROJECT_EDITED, row, actor, now, name=detail)])
        return view(row)


def archive(store: Transactions, project_id: str, actor: Actor, *, now: int) -> ProjectView:
    """Stop every API key that is bound to a project, and every token made from one.

    The default project stays: everybody who belongs to an organization can count on it.

    Raises:
        NotFound: there is none of this id.
        Conflict: it is the organization's default project.
    """
    with store.transaction() as tx:
        row = _existing(tx, project_id)
        if row.is_default:
            raise Conflict(
                "the default project of an organization cannot be archived: rename it, or revoke"
                " the API keys that are bound to it",
                "default_project",
            )
        if row.archived_at is None:
            row.archived_at = now
            tx.append([change_of(What.PROJECT_ARCHIVED, row, actor, now)])
        return view(row)


def restore(store: Transactions, project_id: str, actor: Actor, *, now: int) -> ProjectView:
    """Undo `archive` for API keys; tokens that were made before stay dead.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, project_id)
        if row.archived_at is not None:
            row.archived_at = None
            tx.append([change_of(What.PROJECT_RESTORED, row, actor, now)])
        return view(row)


def view(row: Project) -> ProjectView:
    """What is shown of a row."""
    return ProjectView(
        id=row.id,
        name=row.name,
        organization_id=row.organization_id,
        is_default=row.is_default,
        created_at=row.created_at,
        archived_at=row.archived_at,
    )


def change_of(what: What, row: Project, actor: Actor, now: int, **detail: object) -> Change:
    """A change of a project, for the log."""
    organization_id = row.organization_id
    return Change(what, row.id, actor, now, organization_id, wider=organization_id, detail=detail)


def _existing(tx: Transaction, project_id: str) -> Project:
    row = tx.project(project_id)
    if row is None:
        raise NotFound("there is no project of this id (an id starts with prj_)")
    return row
