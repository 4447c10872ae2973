"""What every restriction is made of: the ask, the allowance, the refusal, and the protocol.

An allowance is what a token may become.  It starts as everything the API key has and passes
through each restriction, which returns it unchanged, returns less, or refuses.  Nothing returns
more: `decide` compares after every step, and a property test compares over random input.

This module knows nothing of HTTP, of a database or of a JWT's text form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, Protocol

from coatcheck.scope import Scopes


class Reason(Enum):
    """Why a token was not issued.  Exact, for the audit; `oauth.errors` says what is told."""

    API_KEY_UNKNOWN = "api_key_unknown"
    API_KEY_REVOKED = "api_key_revoked"
    API_KEY_EXPIRED = "api_key_expired"
    API_KEY_DISABLED = "api_key_disabled"
    API_KEY_REPLACED = "api_key_replaced"
    ORG_SUSPENDED = "org_suspended"
    INVALID_SCOPE = "invalid_scope"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    INVALID_TARGET = "invalid_target"
    SEVERAL_TARGETS = "several_targets"
    WRONG_ENVIRONMENT = "wrong_environment"
    NOT_A_CALLER = "not_a_caller"
    NOT_IN_QUERY = "not_in_query"


class Refusal(Exception):
    """A decision against the asker.

    Attributes:
        reason: which rule refused.
        at: seconds since the epoch, when the reason has a date (revoked, expired, disabled).
        scopes: what was missing, for INSUFFICIENT_SCOPE.
        allowed: what could be asked for instead, for INVALID_TARGET.
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
class Ask:
    """What somebody wants a token for.

    Attributes:
        audience: the one resource server the token is for.
        audience_environment: the environment that audience belongs to; None: shared by all.
        scopes: None when nothing was asked, which means all the API key has.

    There is no time in it: what an ask may have is the same at any moment, for as long as the
    API key's record is.
    """

    audience: str
    audience_environment: str | None
    scopes: Scopes | None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a token may become, at most.

    Attributes:
        audiences: the resource servers it may be for; exactly one after `audience` narrowed it.
        expires_at: seconds since the epoch; no token outlives it.  None as long as nothing has
            limited it.
    """

    api_key_id: str
    organization_id: str
    environment: str
    audiences: tuple[str, ...]
    scopes: Scopes
    expires_at: int | None

    def lies_within(self, wider: "Allowance") -> bool:
        """Whether nothing in this allowance goes beyond the other one."""
        return (
            self.api_key_id == wider.api_key_id
            and self.organization_id == wider.organization_id
            and self.environment == wider.environment
            and set(self.audiences) <= set(wider.audiences)
            and (self.scopes is wider.scopes or not wider.scopes.missing(self.scopes))
            and (
                wider.expires_at is None
                or (self.expires_at is not None and self.expires_at <= wider.expires_at)
            )
        )


@dataclass(frozen=True, slots=True)
class Situation:
    """What a resource server knows about the request at hand when it checks a token.

    Attributes:
        environment: the environment this resource server belongs to; None: it does not ask.
        client_address: the caller's address; None: unknown.
    """

    environment: str | None = None
    client_address: str | None = None


class Refuse(Protocol):
    """How a check says no: it raises the verifier's error for this code."""

    def __call__(self, code: str) -> NoReturn: ...


def in_numbered_steps(claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
    """The check of a restriction whose claim every verifier checks anyway, ours step by step."""


class Restriction(Protocol):
    """One way in which an API key, and each token made from it, is narrower than everything.

    Attributes:
        name: how the token's `must` claim calls it.
        must: whether a resource server has to enforce it by more than the registered claims,
            so that a verifier which does not know the name has to refuse.
    """

    name: str
    must: bool

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        """What is left of the allowance for this ask.  Raises Refusal when nothing is."""
        ...

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        """The claims by which the token carries it; none when it does not restrict."""
        ...

    def check(self, claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
        """Hold a verified token's claims against the request at hand; `refuse` never returns."""
        ...
