"""The catalog: the product that a deployment issues keys for, as data.

`catalog_file` reads one from `coatcheck.toml`.  Without a file there is one brand, two
environments, the default audience and the management API's audience, both shared by the
environments, and any well-formed scope.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Final

from coatcheck import apikey
from coatcheck.durations import told as span_told
from coatcheck.restrictions import Role
from coatcheck.scope import ORGANIZATION_PERMISSIONS, PLATFORM_PERMISSIONS, Grant, Scopes
from coatcheck.server.settings import Settings
from coatcheck.token_profile import Algorithm, TokenType
from coatcheck.vocabulary import Vocabulary

DEFAULT_BRAND: Final = "ck"
DEFAULT_ENVIRONMENTS: Final = ("live", "test")


@dataclass(frozen=True, slots=True)
class Audience:
    """A resource server, as tokens name it.

    Attributes:
        id: the `aud` of its tokens.
        environment: the one it belongs to; None: shared by all.
        algorithm: what signs its tokens.
        token_type: the `typ` of its tokens.
        enforces: whether our verifier stands there, which knows the restrictions of a token's
            `must`; any other JWT library would ignore them.
    """

    id: str
    environment: str | None
    algorithm: Algorithm
    token_type: TokenType
    enforces: bool = True


@dataclass(frozen=True, slots=True)
class Permission:
    """Something that an API key may be allowed to do.

    Attributes:
        name: the action, as scopes write it.
        about: for people who choose.
        audiences: where it means something; None: at every audience of the product.
    """

    name: str
    about: str = ""
    audiences: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class NamedScope:
    """A set of permissions under one name.

    Attributes:
        id: its slug, as scopes write it.
        name: for people.
    """

    id: str
    name: str
    grants: Scopes
    about: str = ""


@dataclass(frozen=True, slots=True)
class RoleOffer:
    """A role, and how people call the permission that gives it (`write` gives `member`)."""

    role: Role
    permission: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """One place in a filter.  `values`: what may stand there; None: any id."""

    name: str
    values: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A type of thing that filters name: `THING/Battery/7`.

    Attributes:
        segments: what follows the type's name.
        within: the types that it may be nested in; it may always stand alone as well.
    """

    name: str
    segments: tuple[Segment, ...]
    within: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policies:
    """What owners of API keys may do.  An organization may be stricter, never looser.

    Attributes:
        recoverable: whether an organization may choose to keep sealed copies of its secrets.
        max_lifetime_s: how long an API key may live, in seconds; None: without end.
        may_disable: whether API keys can be disabled, which can be undone.
        may_delete: whether they can be deleted; revoking is always possible.
    """

    recoverable: bool = True
    max_lifetime_s: int | None = None
    may_disable: bool = True
    may_delete: bool = True


@dataclass(frozen=True, slots=True)
class Connector:
    """The product's MCP server, and what an agent's API key for it may do.

    Attributes:
        name: what clients call it.
        url: where it is.
        audience: whom tokens for it are for.
        scopes: what such an API key has; narrow.
    """

    name: str
    url: str
    audience: str
    scopes: Scopes


@dataclass(frozen=True, slots=True)
class Catalog:
    """What keys of this deployment look like and what they may be for.

    Attributes:
        default_audiences: environment → the audience of a request that names none.
        permissions: by name, in their order; None: any well-formed scope may be given.
        free_environments: those in which nothing costs credits.
        models: what may be named in a restriction; None: anything.
        device_scopes: what an API key of a device may do; None: there are no such keys.
    """

    brand: str
    environments: tuple[str, ...]
    audiences: Mapping[str, Audience]
    default_audiences: Mapping[str, str]
    management_audience: str
    name: str = "Coatcheck"
    environment_in_key: bool = True
    free_environments: frozenset[str] = frozenset()
    api_key_header: str | None = None
    foreign_prefixes: tuple[str, ...] = ()
    permissions: Mapping[str, Permission] | None = None
    named_scopes: Mapping[str, NamedScope] = field(default_factory=dict)
    implies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    roles: Mapping[str, RoleOffer] = field(default_factory=dict)
    resource_types: Mapping[str, ResourceType] = field(default_factory=dict)
    models: tuple[str, ...] | None = None
    policies: Policies = Policies()
    device_scopes: Scopes | None = None
    connector: Connector | None = None
    _vocabularies: dict[str, Vocabulary] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def default_environment(self) -> str:
        return self.environments[0]

    @property
    def product_audiences(self) -> tuple[str, ...]:
        """Every audience but the management API's."""
        return tuple(one for one in self.audiences if one != self.management_audience)

    def prefix(self, environment: str) -> str:
        """What API keys of an environment begin with."""
        return apikey.prefix_for(self.brand, environment if self.environment_in_key else None)

    def vocabulary(self, audience_id: str) -> Vocabulary:
        """What scope-tokens mean at an audience."""
        known = self._vocabularies.get(audience_id)
        if known is None:
            known = self._vocabularies[audience_id] = self._vocabulary(audience_id)
        return known

    def role(self, name: str | None) -> Role | None:
        """What a role allows; one that the catalog does not have any more allows nothing."""
        if name is None:
            return None
        offer = self.roles.get(name)
        return Role(name, frozenset()) if offer is None else offer.role

    def is_free(self, environment: str) -> bool:
        return environment in self.free_environments

    def to_json(self) -> dict[str, object]:
        """What owners of API keys need to know of it: as `GET /v1/catalog` tells it."""
        permissions = None if self.permissions is None else list(self.permissions.values())
        return {
            "name": self.name,
            "brand": self.brand,
            "environments": list(self.environments),
            "defaultEnvironment": self.default_environment,
            "freeEnvironments": sorted(self.free_environments),
            "environmentInKey": self.environment_in_key,
            "apiKeyHeader": self.api_key_header,
            "foreignPrefixes": list(self.foreign_prefixes),
            "audiences": [
                {
                    "id": one.id,
                    "env": one.environment,
                    "default": one.id in self.default_audiences.values(),
                    "algorithm": one.algorithm,
                    "tokenType": one.token_type,
                    "verifier": "coatcheck" if one.enforces else "any",
                }
                for one in self.audiences.values()
            ],
            "permissions": permissions
            and [
                {
                    "name": one.name,
                    "about": one.about,
                    "audiences": None if one.audiences is None else sorted(one.audiences),
                }
                for one in permissions
            ],
            "scopes": [
                {
                    "id": one.id,
                    "name": one.name,
                    "about": one.about,
                    "grants": [str(grant) for grant in one.grants],
                }
                for one in self.named_scopes.values()
            ],
            "implies": {action: list(implied) for action, implied in self.implies.items()},
            "roles": [
                {
                    "name": one.role.name,
                    "permission": one.permission,
                    "about": one.about,
                    "methods": sorted(one.role.methods),
                }
                for one in self.roles.values()
            ],
            "resourceTypes": self.resource_shapes(),
            "models": None if self.models is None else list(self.models),
            "policies": {
                "recoverable": self.policies.recoverable,
                "maxLifetime": None
                if self.policies.max_lifetime_s is None
                else span_told(self.policies.max_lifetime_s),
                "disable": self.policies.may_disable,
                "delete": self.policies.may_delete,
            },
            "deviceScopes": None
            if self.device_scopes is None
            else [str(one) for one in self.device_scopes],
            "mcp": self.connector
            and {
                "name": self.connector.name,
                "url": self.connector.url,
                "audience": self.connector.audience,
                "scopes": [str(one) for one in self.connector.scopes],
            },
        }

    def resource_shapes(self) -> list[dict[str, object]]:
        """The types of things that filters may name, as the issuer's document tells them."""
        return [
            {
                "type": one.name,
                "segments": [
                    {
                        "name": segment.name,
                        "values": None if segment.values is None else list(segment.values),
                    }
                    for segment in one.segments
                ],
                "within": list(one.within),
            }
            for one in self.resource_types.values()
        ]

    def fingerprint(self) -> str:
        """Tells two catalogs apart by what tokens depend on, whatever people are told."""
        meant = {
            "audiences": [
                (one.id, one.environment, one.enforces, astuple(self.vocabulary(one.id)))
                for one in self.audiences.values()
            ],
            "default": self.default_audiences,
            "roles": [(one.role.name, sorted(one.role.methods)) for one in self.roles.values()],
        }
        return hashlib.sha256(json.dumps(meant, default=str).encode()).hexdigest()

    def _vocabulary(self, audience_id: str) -> Vocabulary:
        if audience_id == self.management_audience and self.permissions is not None:
            return Vocabulary((*ORGANIZATION_PERMISSIONS, *PLATFORM_PERMISSIONS))
        permissions = None
        if self.permissions is not None:
            permissions = tuple(
                one.name
                for one in self.permissions.values()
                if one.audiences is None or audience_id in one.audiences
            )
        return Vocabulary(
            permissions=permissions,
            named={one.id: one.grants for one in self.named_scopes.values()},
            implies=self.implies,
        )

    def knows(self, grant: Grant) -> bool:
        """Whether a scope-token means something at any audience, the management API's included."""
        return any(
            self.vocabulary(audience_id).expand(Scopes((grant,))) for audience_id in self.audiences
        )


def without_file(settings: Settings) -> Catalog:
    """The catalog of a deployment that has none."""
    default = Audience(settings.default_audience, None, settings.algorithm, settings.token_type)
    management = management_audience(settings)
    return Catalog(
        brand=DEFAULT_BRAND,
        environments=DEFAULT_ENVIRONMENTS,
        audiences={audience.id: audience for audience in (management, default)},
        default_audiences=dict.fromkeys(DEFAULT_ENVIRONMENTS, default.id),
        management_audience=management.id,
    )


def management_audience(settings: Settings) -> Audience:
    """The management API's own, which every catalog has."""
    return Audience(settings.management_audience, None, "ES256", "at+jwt")
