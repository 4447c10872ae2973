"""What every restriction is made of: rights, the ask, the refusal, and the protocol.

An allowance is what a token may become.  It starts as everything the API key has and passes
through each restriction, which returns it unchanged, returns less, or refuses.  Nothing returns
more: `decide` compares after every step, and a property test compares over random input.

The same comparison decides what whoever manages API keys may give away: nothing beyond its own
rights, on any axis.

This module knows nothing of HTTP, of a database or of a JWT's text form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from coatcheck.client_address import Network
from coatcheck.scope import Scopes
from coatcheck.vocabulary import ANYTHING, Vocabulary

_NO_ROLES: Final[Mapping[str, frozenset[str]]] = MappingProxyType({})


class Reason(Enum):
    """Why a token was not issued.  Exact, for the audit; `oauth.errors` says what is told."""

    API_KEY_UNKNOWN = "api_key_unknown"
    API_KEY_REVOKED = "api_key_revoked"
    API_KEY_EXPIRED = "api_key_expired"
    API_KEY_DISABLED = "api_key_disabled"
    API_KEY_REPLACED = "api_key_replaced"
    QUOTA_EXCEEDED = "quota_exceeded"
    PROJECT_ARCHIVED = "project_archived"
    ORG_SUSPENDED = "org_suspended"
    IP_NOT_ALLOWED = "ip_not_allowed"
    INVALID_SCOPE = "invalid_scope"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    INVALID_TARGET = "invalid_target"
    NO_PERMISSION_THERE = "no_permission_there"
    NOT_ENFORCED_THERE = "not_enforced_there"
    SEVERAL_TARGETS = "several_targets"
    WRONG_ENVIRONMENT = "wrong_environment"
    NOT_A_CALLER = "not_a_caller"
    NOT_IN_QUERY = "not_in_query"
    ONLY_IN_QUERY = "only_in_query"


class Refusal(Exception):
    """A decision against the asker.

    Attributes:
        reason: which rule refused.
        at: seconds since the epoch, when the reason has a date (revoked, expired, disabled).
        scopes: what was missing, for INSUFFICIENT_SCOPE.
        allowed: what could be asked for instead, for INVALID_TARGET; what is in the way, for
            NOT_ENFORCED_THERE.
    """

    def __init__(
        self,
        reason: Reason,
        *,
        at: int | None = None,
        scopes: Scopes | None = None,
        allowed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.at = at
        self.scopes = scopes
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class Role:
    """A name for the HTTP methods that may be used."""

    name: str
    methods: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ask:
    """What somebody wants a token for.

    Attributes:
        audience: the one resource server the token is for.
        audience_environment: the environment that audience belongs to; None: shared by all.
        scopes: None when nothing was asked, which means all the API key has.
        vocabulary: what scope-tokens mean at that audience.
        client_address: who asks, or for whom a resource server asks; None: unknown.

    There is no time in it: what an ask may have is the same at any moment, for as long as the
    API key's record is.
    """

    audience: str
    audience_environment: str | None
    scopes: Scopes | None
    vocabulary: Vocabulary = ANYTHING
    client_address: str | None = None


@dataclass(frozen=True, slots=True)
class Rights:
    """What a credential is good for, on every axis on which it can be narrowed.

    Attributes:
        audiences: the resource servers it may be for.
        expires_at: seconds since the epoch; None: it does not end.
        networks: where it may be used from; None: from anywhere.
        project_id: the one project it is bound to; None: any of its organization.
        role: the HTTP methods it may be used with; None: all.
        models: the models it may name; None: all.
        group_id: the pricing group that it belongs to; None: none.
    """

    environment: str
    audiences: tuple[str, ...]
    scopes: Scopes
    expires_at: int | None = None
    networks: tuple[Network, ...] | None = None
    project_id: str | None = None
    role: Role | None = None
    models: tuple[str, ...] | None = None
    group_id: str | None = None

    def lies_within(self, wider: "Rights") -> bool:
        """Whether nothing in these rights goes beyond the other ones."""
        return not self.beyond(wider)

    def beyond(self, wider: "Rights") -> tuple[str, ...]:
        """The axes, by the names of these attributes, on which they go beyond the other ones."""
        within = {
            "environment": self.environment == wider.environment,
            "audiences": self.audiences is wider.audiences
            or set(self.audiences) <= set(wider.audiences),
            "scopes": self.scopes is wider.scopes or not wider.scopes.missing(self.scopes),
            "expires_at": wider.expires_at is None
            or (self.expires_at is not None and self.expires_at <= wider.expires_at),
            "networks": self.networks is wider.networks
            or wider.networks is None
            or (self.networks is not None and _lie_within(self.networks, wider.networks)),
            "project_id": wider.project_id is None or self.project_id == wider.project_id,
            "role": wider.role is None
            or (self.role is not None and self.role.methods <= wider.role.methods),
            "models": wider.models is None
            or (self.models is not None and set(self.models) <= set(wider.models)),
            "group_id": wider.group_id is None or self.group_id == wider.group_id,
        }
        return tuple(axis for axis, is_within in within.items() if not is_within)


def _lie_within(narrow: tuple[Network, ...], wide: tuple[Network, ...]) -> bool:
    def lies_in(one: Any, other: Any) -> bool:
        return bool(one.version == other.version and one.subnet_of(other))

    return all(any(lies_in(one, other) for other in wide) for one in narrow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance(Rights):
    """What a token may become, at most: rights, and whose they are.

    `audiences` holds exactly one after `audience` narrowed it.
    """

    api_key_id: str
    organization_id: str

    def lies_within(self, wider: Rights) -> bool:
        return (
            isinstance(wider, Allowance)
            and self.api_key_id == wider.api_key_id
            and self.organization_id == wider.organization_id
            and not self.beyond(wider)
        )


class Situation(NamedTuple):
    """What a resource server knows about the request at hand when it checks a token.

    Attributes:
        environment: the environment this resource server belongs to; None: it does not ask.
        client_address: the caller's address; None: unknown.
        method: the HTTP method of the request; None: unknown.
        project_id: the project that the request names; None: it names none.
        model: the model that the request names; None: it names none, or is asked later.
        roles: what the issuer's catalog says of each role; a role that is not here allows nothing.
    """

    environment: str | None = None
    client_address: str | None = None
    method: str | None = None
    project_id: str | None = None
    model: str | None = None
    roles: Mapping[str, frozenset[str]] = _NO_ROLES


class Refuse(Protocol):
    """How a check says no: it raises the verifier's error for this code."""

    def __call__(self, code: str) -> NoReturn: ...


def in_numbered_steps(claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
    """The check of a restriction whose claim every verifier checks anyway, ours step by step."""


def has_no_own_words(allowance: Allowance) -> bool:
    """The `is_binding` of a restriction that the registered claims already carry."""
    return False


class Restriction(Protocol):
    """One way in which an API key, and each token made from it, is narrower than everything.

    Attributes:
        name: how the token's `must` claim calls it.
    """

    name: str

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        """What is left of the allowance for this ask.  Raises Refusal when nothing is."""
        ...

    def is_binding(self, allowance: Allowance) -> bool:
        """Whether a resource server has to enforce it by more than the registered claims.

        Its name then stands in `must`, and a verifier which does not know the name refuses.
        """
        ...

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        """The claims by which the token carries it; none when it does not restrict."""
        ...

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        """Hold a verified token's claims against the request at hand; `refuse` never returns."""
        ...
