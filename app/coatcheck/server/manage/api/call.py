"""One call of the management API, as its handlers see it, and the table of routes' own types."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from coatcheck.scope import Grant
from coatcheck.server.catalog import Catalog
from coatcheck.server.manage.api.wire import (
    Answer,
    Body,
    Problem,
    Query,
    Request,
    read_body,
    read_query,
)
from coatcheck.server.manage.authority import Caller
from coatcheck.server.manage.errors import NotFound
from coatcheck.server.sealing import SealingKey, SealingKeys
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import ApiKey, Member, Organization, Project

_Body = TypeVar("_Body", bound=Body)
_Query = TypeVar("_Query", bound=Query)


@dataclass(frozen=True, slots=True)
class Office:
    """What the management API works with.

    Attributes:
        issuer: this deployment's URL.
        sealing_keys: the sealing keys at hand, for secrets that may be shown again.
        seal_with: the one among them that seals a copy which this transaction stores.
        ensure_signing_keys: makes sure that there is a signing key for every audience.
    """

    issuer: str
    catalog: Catalog
    sealing_keys: Callable[[], SealingKeys] = field(repr=False)
    seal_with: Callable[[Transaction], SealingKey] = field(repr=False)
    ensure_signing_keys: Callable[[], None] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        parameters: what stands in the path, by name.
        now: seconds since the epoch.
        was_read: which inputs the handler has looked at, `Body` and `Query`.
    """

    office: Office
    tx: Transaction
    caller: Caller
    request: Request
    parameters: Mapping[str, str]
    now: int
    was_read: set[type] = field(default_factory=set, init=False)

    @property
    def store(self) -> Transactions:
        """For use cases, which open a transaction of their own otherwise: they join this one."""
        return self.tx

    @property
    def catalog(self) -> Catalog:
        return self.office.catalog

    def body(self, kind: type[_Body]) -> _Body:
        """The body as values.  Raises Problem."""
        self.was_read.add(Body)
        return read_body(self.request, kind)

    def query(self, kind: type[_Query]) -> _Query:
        """The query as values.  Raises Problem."""
        self.was_read.add(Query)
        return read_query(self.request, kind)

    # --- what the caller sees.  What it does not see does not exist: NotFound.

    def organization(self, organization_id: str | None = None) -> Organization:
        """The organization that a call is about: the named one, or the caller's own.

        Raises:
            NotFound: it is another one than the caller manages, or none.
            Problem: the caller manages all of them and has to name one.
        """
        own = self.caller.organization_id
        if organization_id is None and own is None:
            rows = self.tx.organizations()
            if len(rows) != 1:
                raise Problem(
                    400,
                    "organization_required",
                    "There are several organizations: say which one.",
                    (("/organization", "is missing"),),
                )
            return rows[0]
        wanted = own if organization_id is None else organization_id
        row = None
        if wanted == own or self.caller.is_operator:
            row = self.tx.organization(wanted or "")
        if row is None:
            raise NotFound("there is no organization of this id (an id starts with org_)")
        return row

    def require_bootstrapped(self, organization: Organization) -> None:
        """Do nothing, if the organization's key management is switched on.

        Raises:
            Problem: it is not; how to switch it on.
        """
        if organization.bootstrapped_at is None and not self.caller.is_local:
            raise Problem(
                409,
                "organization_not_bootstrapped",
                f"Key management of {organization.id} is not switched on yet: its operator sends"
                f" POST {self.office.issuer}/v1/organizations/{organization.id}/bootstrap, or runs"
                f" coatcheck orgs bootstrap {organization.id}.",
            )

    def api_key(self, api_key_id: str, *, or_deleted: bool = False) -> ApiKey:
        """An API key that the caller sees.  Raises NotFound."""
        row = self.tx.api_key(api_key_id)
        is_there = row is not None and (or_deleted or row.deleted_at is None)
        if row is None or not is_there or not self._sees(row):
            # The text is not repeated: it may be the API key itself.
            raise NotFound("there is no API key of this id (an id starts with key_)")
        return row

    def project(self, project_id: str) -> Project:
        """A project that the caller sees.  Raises NotFound."""
        row = self.tx.project(project_id)
        bound_to = self.caller.project_id
        if (
            row is None
            or not self._manages(row.organization_id)
            or bound_to not in (None, project_id)
        ):
            raise NotFound("there is no project of this id (an id starts with prj_)")
        return row

    def member(self, member_id: str) -> Member:
        """A member that the caller sees.  Raises NotFound."""
        row = self.tx.member(member_id)
        if row is None or row.removed_at is not None or not self._manages(row.organization_id):
            raise NotFound("there is no member of this id (an id starts with mem_)")
        return row

    def require(self, permission: str) -> None:
        """Do nothing, if the caller has a permission.  Raises Problem."""
        if not self.caller.may(permission):
            raise forbidden(permission)

    def _manages(self, organization_id: str) -> bool:
        return self.caller.is_operator or organization_id == self.caller.organization_id

    def _sees(self, row: ApiKey) -> bool:
        bound_to = self.caller.project_id
        return self._manages(row.organization_id) and bound_to in (None, row.project_id)


def forbidden(permission: str) -> Problem:
    """The problem of a caller that lacks a permission."""
    return Problem(
        403,
        "insufficient_scope",
        f"This needs the permission {Grant(permission)} for the management API.",
        more={"scope": permission},
    )


Handler = Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    Attributes:
        path: below the root, with its parameters in braces.
        permission: what the caller needs; None: nothing but to be known.
        writes: whether it changes anything.
        needs_bootstrap: whether it waits until the organization's key management is switched on.
        ensures_signing_keys: whether `Office.ensure_signing_keys` is called before it begins.
    """

    method: str
    path: str
    permission: str | None
    handler: Handler
    writes: bool = True
    needs_bootstrap: bool = True
    ensures_signing_keys: bool = False
