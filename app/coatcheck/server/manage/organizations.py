"""Organizations: create, list, suspend, resume."""

from dataclasses import dataclass

from coatcheck import ids
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Conflict, NotFound
from coatcheck.server.store import Transactions
from coatcheck.server.store.tables import Organization


@dataclass(frozen=True, slots=True)
class OrganizationView:
    """An organization as people and programs see it.  Times are seconds since the epoch."""

    id: str
    name: str
    is_operator: bool
    created_at: int
    suspended_at: int | None

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "operator": self.is_operator,
            "status": "active" if self.suspended_at is None else "suspended",
            "createdAt": forms.rfc3339(self.created_at),
            "suspendedAt": forms.rfc3339(self.suspended_at),
        }


def create(store: Transactions, name: str, actor: Actor, *, now: int) -> OrganizationView:
    """A new organization, without API keys.

    Raises:
        Invalid: the name.
    """
    row = Organization(id=ids.new_id("org", now * 1000), name=forms.name(name), created_at=now)
    with store.transaction() as tx:
        tx.add(row)
        tx.append([Change(What.ORGANIZATION_CREATED, row.id, actor, now, row.id)])
        return _view(row)


def list_organizations(store: Transactions) -> list[OrganizationView]:
    """Every organization, the oldest first."""
    with store.transaction(read_only=True) as tx:
        return [_view(row) for row in tx.organizations()]


def suspend(
    store: Transactions, organization_id: str, actor: Actor, *, now: int
) -> OrganizationView:
    """Stop every API key of an organization, and every token made from one.

    Raises:
        NotFound: there is none of this id.
        Conflict: it is the operator's own; nobody would be left to resume it.
    """
    with store.transaction() as tx:
        row = _existing(tx.organization(organization_id))
        if row.is_operator:
            raise Conflict("the operator's own organization cannot be suspended")
        if row.suspended_at is None:
            row.suspended_at = now
            tx.append([Change(What.ORGANIZATION_SUSPENDED, row.id, actor, now, row.id)])
        return _view(row)


def resume(
    store: Transactions, organization_id: str, actor: Actor, *, now: int
) -> OrganizationView:
    """Undo `suspend` for API keys; tokens that were made before stay dead.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx.organization(organization_id))
        if row.suspended_at is not None:
            row.suspended_at = None
            tx.append([Change(What.ORGANIZATION_RESUMED, row.id, actor, now, row.id)])
        return _view(row)


def _existing(row: Organization | None) -> Organization:
    if row is None:
        raise NotFound("there is no organization of this id (an id starts with org_)")
    return row


def _view(row: Organization) -> OrganizationView:
    return OrganizationView(row.id, row.name, row.is_operator, row.created_at, row.suspended_at)
