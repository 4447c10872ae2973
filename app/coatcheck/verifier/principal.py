"""Who is calling, whichever credential was sent."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal

from coatcheck.scope import MalformedScope, Scopes, concrete
from coatcheck.verifier.errors import (
    InsufficientScope,
    ModelNotAllowed,
    ProjectRequired,
    Protection,
    VerifierError,
)

_NO_SCOPES: Final = Scopes()


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose credential was verified.

    Attributes:
        key_id: public id of the API key behind the credential; opaque.
        org_id: the organization that the API key belongs to; None when the token names none.
        project_id: the project it is bound to; of one that is not bound, the project that the
            request names.  That is a choice and no proof: nobody has looked whether the project
            is of this organization, so filter by `org_id` as well.  None when neither is.
        environment: the environment it belongs to; None when the token names none.
        scopes: what it may do.
        method: which kind of credential came.
        expires_at: seconds since the epoch; the credential is refused from then on.
        token_id: the token's `jti`.
        client_id: the token's `client_id`.
        audience: the name of this resource server that the token was made for.
        claims: all claims of the token; unchangeable, lists are tuples.
        roles: names of what its HTTP methods were held against; empty when there is no role.
        models: the models that it may use; None: all.
        group: its pricing group; None when it has none.
    """

    key_id: str
    org_id: str | None
    project_id: str | None
    environment: str | None
    scopes: Scopes
    method: Literal["jwt", "api_key"]
    expires_at: int
    token_id: str
    client_id: str
    audience: str
    claims: Mapping[str, object] = field(repr=False, hash=False)
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    group: str | None = None
    protection: Protection = field(default=Protection(), repr=False, compare=False)

    def allows(self, permission: str, resource: str | None = None) -> bool:
        """Whether the scopes cover a permission, on one resource or on everything.

        Args:
            permission: an action, as `widgets:read`.
            resource: `TYPE/id/…` with percent-encoded ids.  One that is malformed, or holds a
                wildcard, is not allowed.
        """
        try:
            return self.scopes.covers(concrete(permission, resource))
        except MalformedScope:
            return False

    def require(self, *permissions: str, resource: str | None = None) -> None:
        """Do nothing, if the scopes cover all these permissions.

        Raises:
            InsufficientScope: one of them is missing; the challenge names all that are needed.
        """
        if all(self.allows(permission, resource) for permission in permissions):
            return
        raise self._refused(InsufficientScope(" ".join(_scope_tokens(permissions, resource))))

    def allows_model(self, name: str) -> bool:
        """Whether it may use this model."""
        return self.models is None or name in self.models

    def require_model(self, name: str) -> None:
        """Do nothing, if it may use this model.  Raises ModelNotAllowed."""
        if not self.allows_model(name):
            raise self._refused(ModelNotAllowed())

    def require_project(self) -> str:
        """The project that the request is about: see `project_id`.

        Raises:
            ProjectRequired: the credential is bound to none, and the request names none.
        """
        if self.project_id is None:
            raise self._refused(ProjectRequired())
        return self.project_id

    def _refused(self, error: VerifierError) -> VerifierError:
        error.protection = self.protection
        return error

    # What Starlette and its middleware expect of `request.user`.

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.key_id

    @property
    def identity(self) -> str:
        return self.key_id


class _Verified(Principal):
    """A principal while it is made from verified claims, before it is closed.

    A frozen dataclass sets each of its fields by a call; that would cost more than all checks of
    the claims together.
    """

    __slots__ = ()
    # Both: Python looks at the two of them when it decides how to set an attribute.
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__

    def __init__(
        self, claims: Mapping[str, Any], expires_at: int, audience: str, protection: Protection
    ) -> None:
        this: Any = self
        get, scope = claims.get, claims.get("scope")
        this.key_id = claims["sub"]
        this.org_id = get("org_id")
        this.project_id = get("project_id")
        this.environment = get("env")
        this.scopes = _scopes(scope) if type(scope) is str else _NO_SCOPES
        this.method = "jwt"
        this.expires_at = expires_at
        this.token_id = claims["jti"]
        this.client_id = claims["client_id"]
        this.audience = audience
        this.claims = claims
        this.roles = _texts(get("roles")) if "roles" in claims else ()
        this.models = _texts(get("models")) if "models" in claims else None
        group = get("group")
        this.group = group if type(group) is str else None
        this.protection = protection
        this.__class__ = Principal


#: Whom verified claims speak for.
from_claims: Final[Callable[[Mapping[str, Any], int, str, Protection], Principal]] = _Verified


def _texts(claim: object) -> tuple[str, ...]:
    """What a list names.  One that is no list of texts names nothing, so it allows nothing."""
    if type(claim) is tuple and all(type(text) is str for text in claim):
        return claim
    return ()


@lru_cache(maxsize=4096)
def _scopes(claim: str) -> Scopes:
    """What the `scope` claim grants.  One that is no scope grants nothing (RFC 9068 §2.2.3)."""
    try:
        return Scopes.parse(claim)
    except MalformedScope:
        return _NO_SCOPES


def _scope_tokens(permissions: tuple[str, ...], resource: str | None) -> list[str]:
    """What to ask a token for.  A malformed resource could not be asked for and stays away."""
    tokens = []
    for permission in permissions:
        with suppress(MalformedScope):
            tokens.append(str(concrete(permission, resource)))
    return tokens
