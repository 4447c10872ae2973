"""Organizations: create, bootstrap, edit, list, suspend, resume.

An organization exists before its key management does: `bootstrap` switches that on, once.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

from coatcheck import ids
from coatcheck.durations import told as span_told
from coatcheck.scope import ORGANIZATION_PERMISSIONS
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_key_rules, api_keys, forms, projects, usage
from coatcheck.server.manage.api_keys import Created, NewApiKey, Prepared
from coatcheck.server.manage.authority import rights_of
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.manage.projects import ProjectView
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import Organization

#: Seconds: a century.  What lives longer has no end.
LONGEST_LIFETIME: Final = 36_500 * 86_400


@dataclass(frozen=True, slots=True)
class OrganizationView:
    """An organization as people and programs see it.

    Times are seconds since the epoch, credits millionths.
    """

    id: str
    name: str
    is_operator: bool
    created_at: int
    suspended_at: int | None
    bootstrapped_at: int | None
    is_recoverable: bool
    max_lifetime_s: int | None
    credit_limit: int | None
    low_credit: int | None

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "operator": self.is_operator,
            "status": "active" if self.suspended_at is None else "suspended",
            "createdAt": forms.rfc3339(self.created_at),
            "suspendedAt": forms.rfc3339(self.suspended_at),
            "bootstrappedAt": forms.rfc3339(self.bootstrapped_at),
            "recoverable": self.is_recoverable,
            "maxLifetime": None if self.max_lifetime_s is None else span_told(self.max_lifetime_s),
            "creditLimit": forms.credits_told(self.credit_limit),
            "lowCredit": forms.credits_told(self.low_credit),
        }


@dataclass(frozen=True, slots=True)
class Editable:
    """What can be changed of an organization.

    Attributes:
        recoverable: whether sealed copies of its secrets are kept.
        max_lifetime_s: how long its new API keys may live, in seconds; None: as the catalog says.
        credit_limit: of all its API keys together, in millionths; None: unlimited.
        low_credit: what is left of it when its owners are told; None: they are not.
    """

    name: str
    recoverable: bool
    max_lifetime_s: int | None
    credit_limit: int | None
    low_credit: int | None


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """An organization whose key management is on: the only time its admin key is shown."""

    organization: OrganizationView
    project: ProjectView
    admin: Created

    def to_json(self) -> dict[str, object]:
        return {
            "organization": self.organization.to_json(),
            "project": self.project.to_json(),
            "key": self.admin.to_json(),
        }


def create(store: Transactions, name: str, actor: Actor, *, now: int) -> OrganizationView:
    """A new organization, without API keys; its key management is off until `bootstrap`.

    Raises:
        Invalid: the name.
    """
    row = Organization(id=ids.new_id("org", now * 1000), name=forms.name(name), created_at=now)
    with store.transaction() as tx:
        tx.add(row)
        tx.append([Change(What.ORGANIZATION_CREATED, row.id, actor, now, row.id)])
        return view(row)


def bootstrap(
    store: Transactions,
    catalog: Catalog,
    organization_id: str,
    actor: Actor,
    *,
    now: int,
    issuer: str,
    admin_name: str = "admin",
) -> Bootstrapped:
    """Switch an organization's key management on: its default project and first admin API key.

    The admin key has every permission of an organization and lives as long as policy lets it.
    It is shown once, also where copies of secrets are kept: the first rotation makes one.  That
    there are signing keys is for the caller to see to: this room does not sign.

    Args:
        issuer: this deployment's URL, for the length of a full token.

    Raises:
        Invalid: the admin key's name.
        NotFound: there is none of this id.
        Conflict: it was done before; nothing was changed.
    """
    with store.transaction() as tx:
        row = _existing(tx, organization_id)
        if row.bootstrapped_at is not None:
            raise Conflict(
                f"{row.id} was bootstrapped at {forms.rfc3339(row.bootstrapped_at)}, which is done"
                " once: make further API keys with POST /v1/keys, or coatcheck keys create --org"
                f" {row.id}",
                "already_bootstrapped",
            )
        row.bootstrapped_at = now
        project = projects.default_of(row.id, now)
        tx.add(project)
        limits = (catalog.policies.max_lifetime_s, row.max_lifetime_s)
        longest = min((limit for limit in limits if limit is not None), default=None)
        new = NewApiKey(
            organization_id=row.id,
            name=admin_name,
            scopes=ORGANIZATION_PERMISSIONS,
            audiences=(catalog.management_audience,),
            expires_at=None if longest is None else now + longest,
        )
        made = api_keys.prepare(catalog, new, actor, now=now, issuer=issuer)
        tx.add_api_keys([made.api_key], [made.secret])
        tx.append(
            [
                projects.change_of(What.PROJECT_CREATED, project, actor, now, name=project.name),
                made.change,
                Change(What.ORGANIZATION_BOOTSTRAPPED, row.id, actor, now, row.id),
            ]
        )
        return Bootstrapped(
            view(row), projects.view(project), _shown_once(tx, catalog, made, new, now)
        )


def list_organizations(store: Transactions) -> list[OrganizationView]:
    """Every organization, the oldest first."""
    with store.transaction(read_only=True) as tx:
        return [view(row) for row in tx.organizations()]


def page(
    store: Transactions, *, after: str = "", limit: int
) -> tuple[list[OrganizationView], str | None]:
    """Organizations, the oldest first, and the id after which the next page begins."""
    with store.transaction(read_only=True) as tx:
        rows = tx.organizations_page(after, limit + 1)
        following = rows[limit - 1].id if len(rows) > limit else None
        return [view(row) for row in rows[:limit]], following


def edit(
    store: Transactions,
    catalog: Catalog,
    organization_id: str,
    change: Callable[[Editable], Editable],
    actor: Actor,
    *,
    now: int,
) -> OrganizationView:
    """Change an organization's name, policies and credit.

    A shorter lifetime is for API keys that are made or edited from now on.  Keeping no copies
    any more deletes those there are: nobody can tell later which of them were still wanted.

    Args:
        change: from what it is to what it shall be.

    Raises:
        NotFound: there is none of this id.
        Invalid: it is looser than the catalog, or breaks a rule of its own.
    """
    with store.transaction() as tx:
        row = _existing(tx, organization_id)
        before = Editable(
            row.name, row.recoverable, row.max_lifetime_s, row.credit_limit, row.low_credit
        )
        after = change(before)
        if after.recoverable and not before.recoverable and not catalog.policies.recoverable:
            raise Invalid(
                "recoverable",
                "the catalog lets nobody keep copies of secrets: leave it off, or have the operator"
                " change policies.recoverable",
            )
        if after.max_lifetime_s != before.max_lifetime_s:
            _require_lifetime(after.max_lifetime_s, catalog.policies.max_lifetime_s)
        row.name = forms.name(after.name)
        row.recoverable = after.recoverable
        row.max_lifetime_s = after.max_lifetime_s
        row.credit_limit, row.low_credit = after.credit_limit, after.low_credit
        if before.recoverable and not after.recoverable:
            tx.forget_sealed_copies(row.id)
        detail: dict[str, object] = {
            name: [old, getattr(row, name)]
            for name, old in asdict(before).items()
            if old != getattr(row, name)
        }
        if detail:
            what = What.ORGANIZATION_EDITED
            tx.append([Change(what, row.id, actor, now, row.id, detail=detail)])
            # Another limit may end what it has spent, or let it go on.
            usage.settle_organization(tx, row, actor, now)
        return view(row)


def suspend(
    store: Transactions, organization_id: str, actor: Actor, *, now: int
) -> OrganizationView:
    """Stop every API key of an organization, and every token made from one.

    Raises:
        NotFound: there is none of this id.
        Conflict: it is the operator's own; nobody would be left to resume it.
    """
    with store.transaction() as tx:
        row = _existing(tx, organization_id)
        if row.is_operator:
            raise Conflict(
                "the operator's own organization cannot be suspended: revoke or disable its API"
                " keys instead"
            )
        if row.suspended_at is None:
            row.suspended_at = now
            tx.append([Change(What.ORGANIZATION_SUSPENDED, row.id, actor, now, row.id)])
        return view(row)


def resume(
    store: Transactions, organization_id: str, actor: Actor, *, now: int
) -> OrganizationView:
    """Undo `suspend` for API keys; tokens that were made before stay dead.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, organization_id)
        if row.suspended_at is not None:
            row.suspended_at = None
            tx.append([Change(What.ORGANIZATION_RESUMED, row.id, actor, now, row.id)])
        return view(row)


def view(row: Organization) -> OrganizationView:
    """What is shown of a row."""
    return OrganizationView(
        id=row.id,
        name=row.name,
        is_operator=row.is_operator,
        created_at=row.created_at,
        suspended_at=row.suspended_at,
        bootstrapped_at=row.bootstrapped_at,
        is_recoverable=row.recoverable,
        max_lifetime_s=row.max_lifetime_s,
        credit_limit=row.credit_limit,
        low_credit=row.low_credit,
    )


def _shown_once(
    tx: Transaction, catalog: Catalog, made: Prepared, new: NewApiKey, now: int
) -> Created:
    row = tx.api_key(made.id)
    assert row is not None  # noqa: S101 - it was added in this transaction
    warnings = api_key_rules.warnings(new, rights_of(row, catalog))
    return Created(made.key, api_keys.shown(tx, row, now), warnings)


def _require_lifetime(lifetime_s: int | None, of_catalog: int | None) -> None:
    if lifetime_s is None:
        return
    if not 0 < lifetime_s <= LONGEST_LIFETIME:
        raise Invalid(
            "maxLifetime",
            f"is a span from 1 s to {LONGEST_LIFETIME // 86_400}d, such as 90d, or null for none",
        )
    if of_catalog is not None and lifetime_s > of_catalog:
        raise Invalid(
            "maxLifetime",
            f"the catalog lets API keys live for {of_catalog} seconds at most: name that or less",
        )


def _existing(tx: Transaction, organization_id: str) -> Organization:
    row = tx.organization(organization_id)
    if row is None:
        raise NotFound("there is no organization of this id (an id starts with org_)")
    return row
