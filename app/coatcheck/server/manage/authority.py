"""Rights over rights: what whoever manages API keys may give away.

A key may make, edit, rotate or reveal only what lies within itself, on every axis on which a key
can be narrowed; the comparison is the one that `decide` makes for tokens.  `org:admin` is the
right to give any scope for any audience of the organization; the other axes bind it as well.

An API key of the default environment that administers its organization manages every environment
of it; any other key manages its own, so that a test key never makes a live one.
"""

from dataclasses import dataclass, replace
from typing import Final

from coatcheck.client_address import parse_networks
from coatcheck.restrictions import Rights
from coatcheck.scope import OPERATOR, Grant, Scopes, is_platform
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage.errors import Beyond
from coatcheck.server.store.tables import ApiKey

ORG_ADMIN: Final = "org:admin"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be given away, at most.

    Attributes:
        rights: on every axis; `environment` counts unless `any_environment`.
        any_scope: whether scopes and audiences are not compared, but for the platform's.
        any_environment: whether environments are not compared.
        platform: whether the platform's permissions may be given.
        credit_left: in millionths; None: without limit.
        permissions: what its token says, for the audience `management`; None: all of its scopes.
        api_key_id: whose bounds they are; None: nobody's in particular.
    """

    rights: Rights
    any_scope: bool
    any_environment: bool
    platform: bool = False
    credit_left: int | None = None
    permissions: Scopes | None = None
    api_key_id: str | None = None

    def over(self, row: ApiKey) -> "Bounds":
        """The same, for what is done to an API key that is there already.

        What it has of this one's credit is not asked for twice, and nobody gives to itself.
        """
        left = self.credit_left
        if self.api_key_id is None:
            return self
        if row.id == self.api_key_id:
            return replace(self, any_scope=False, credit_left=row.credit_limit)
        if left is not None and row.created_by == self.api_key_id:
            left += row.credit_limit or 0
        return replace(self, credit_left=left)

    def require(self, rights: Rights, catalog: Catalog, credit_limit: int | None = None) -> None:
        """Do nothing, if these rights lie within.

        Raises:
            Beyond: on which axes they do not.
        """
        axes = list(self._spelled_out(rights, catalog))
        if self.credit_left is not None and (
            credit_limit is None or credit_limit > self.credit_left
        ):
            axes.append("credit_limit")
        if not self.platform and any(is_platform(grant.action) for grant in rights.scopes):
            axes.append("scopes")
        if axes:
            raise Beyond(tuple(dict.fromkeys(axes)))

    def _spelled_out(self, rights: Rights, catalog: Catalog) -> tuple[str, ...]:
        wider = self.rights
        if self.any_environment:
            wider = replace(wider, environment=rights.environment)
        if self.any_scope:
            return rights.beyond(replace(wider, scopes=rights.scopes, audiences=rights.audiences))
        beyond = [
            axis for axis in replace(rights, scopes=wider.scopes).beyond(wider) if axis != "scopes"
        ]
        for audience in rights.audiences:
            meaning = catalog.vocabulary(audience)
            is_management = audience == catalog.management_audience
            own = wider.scopes
            if is_management and self.permissions is not None:
                own = self.permissions
            if meaning.expand(own).missing(meaning.expand(rights.scopes)):
                beyond.append("scopes")
                break
        return tuple(beyond)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who uses the management API, or the command line on the machine itself.

    Attributes:
        organization_id: the one it manages; None: every one.
        permissions: what it may do there.
        bounds: what it may give away; None: everything, the platform's permissions included.
        api_key_id: None for the command line.
        member_id: the member whose key it is, if it is one's.
        project_id: the one project that it sees; None: all.
    """

    actor: Actor
    organization_id: str | None
    permissions: Scopes
    bounds: Bounds | None
    api_key_id: str | None = None
    member_id: str | None = None
    project_id: str | None = None

    def may(self, permission: str) -> bool:
        """Whether it has a permission, as its token says."""
        return self.bounds is None or self.permissions.covers(Grant(permission))

    @property
    def is_local(self) -> bool:
        """Whether it is the command line on the machine itself."""
        return self.api_key_id is None

    @property
    def is_operator(self) -> bool:
        """Whether it may do what concerns the whole deployment."""
        return self.bounds is None or self.permissions.covers(Grant(OPERATOR))


def local(actor: Actor) -> Caller:
    """Whoever runs commands on the machine: the database is theirs."""
    return Caller(actor, None, Scopes(), None)


def rights_of(row: ApiKey, catalog: Catalog) -> Rights:
    """What an API key is good for, as it is stored."""
    networks = None if row.networks is None else parse_networks(tuple(row.networks.split(" ")))
    return Rights(
        environment=row.environment,
        audiences=tuple(row.audiences.split(" ")),
        scopes=Scopes.parse(row.scopes),
        expires_at=row.expires_at,
        networks=networks,
        project_id=row.project_id,
        role=catalog.role(row.role),
        models=None if row.models is None else tuple(row.models.split(" ")),
        group_id=row.group_id,
    )


def bounds_of(
    row: ApiKey,
    permissions: Scopes,
    catalog: Catalog,
    *,
    of_operator: bool,
    credit_left: int | None,
) -> Bounds:
    """What the holder of an API key may give away.

    Args:
        permissions: what its token says; less than the API key may have.
        of_operator: whether its organization is the operator's.
    """
    is_admin = permissions.covers(Grant(ORG_ADMIN))
    return Bounds(
        rights_of(row, catalog),
        any_scope=is_admin,
        any_environment=is_admin and row.environment == catalog.default_environment,
        # A person of the operator's, never a machine of theirs.
        platform=of_operator and row.member_id is not None and permissions.covers(Grant(OPERATOR)),
        credit_left=credit_left,
        permissions=permissions,
        api_key_id=row.id,
    )
