"""An API key as people and programs see it, but for its secret."""

from collections.abc import Sequence
from dataclasses import dataclass

from coatcheck.server.manage import forms
from coatcheck.server.store.tables import ApiKey, ApiKeySecret, ApiKeyUsage

#: Members that change by themselves: an ETag leaves them out.
COUNTED = ("lastUsedAt", "tokensIssued", "rawKeyUses", "creditsUsed", "status", "secrets")


@dataclass(frozen=True, slots=True)
class SecretView:
    """A secret that still works.

    Attributes:
        ends_at: the end of the overlap; None: it is the current one.
        last_used_at: kept for a replaced secret only.
    """

    mask: str
    ends_at: int | None
    last_used_at: int | None


@dataclass(frozen=True, slots=True)
class ApiKeyView:
    """An API key.  Times are seconds since the epoch, credits millionths."""

    id: str
    name: str
    organization_id: str
    project_id: str | None
    environment: str
    kind: str
    status: str
    scopes: tuple[str, ...]
    audiences: tuple[str, ...]
    networks: tuple[str, ...] | None
    role: str | None
    models: tuple[str, ...] | None
    group_id: str | None
    credit_limit: int | None
    credits_used: int
    member_id: str | None
    device: str | None
    mask: str
    created_at: int
    created_by: str | None
    expires_at: int | None
    disabled_at: int | None
    disabled_reason: str | None
    revoked_at: int | None
    last_used_at: int | None
    tokens_issued: int
    raw_key_uses: int
    secrets: tuple[SecretView, ...]

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "organization": self.organization_id,
            "project": self.project_id,
            "env": self.environment,
            "kind": self.kind,
            "status": self.status,
            "scopes": list(self.scopes),
            "audiences": list(self.audiences),
            "cidrs": None if self.networks is None else list(self.networks),
            "permissions": self.role,
            "models": None if self.models is None else list(self.models),
            "group": self.group_id,
            "creditLimit": forms.credits_told(self.credit_limit),
            "creditsUsed": forms.credits_told(self.credits_used),
            "member": self.member_id,
            "device": self.device,
            "mask": self.mask,
            "createdAt": forms.rfc3339(self.created_at),
            "createdBy": self.created_by,
            "expiresAt": forms.rfc3339(self.expires_at),
            "disabledAt": forms.rfc3339(self.disabled_at),
            "disabledReason": self.disabled_reason,
            "revokedAt": forms.rfc3339(self.revoked_at),
            "lastUsedAt": forms.rfc3339(self.last_used_at),
            "tokensIssued": self.tokens_issued,
            "rawKeyUses": self.raw_key_uses,
            "secrets": [
                {
                    "mask": one.mask,
                    "expiresAt": forms.rfc3339(one.ends_at),
                    "lastUsedAt": forms.rfc3339(one.last_used_at),
                }
                for one in self.secrets
            ],
        }


def view(
    row: ApiKey, secrets: Sequence[ApiKeySecret], usage: ApiKeyUsage | None, now: int
) -> ApiKeyView:
    """What is shown of an API key now."""
    working = tuple(
        SecretView(secret.mask, secret.expires_at, secret.last_used_at)
        for secret in secrets
        if row.revoked_at is None and (secret.expires_at is None or secret.expires_at > now)
    )
    return ApiKeyView(
        id=row.id,
        name=row.name,
        organization_id=row.organization_id,
        project_id=row.project_id,
        environment=row.environment,
        kind=row.kind,
        status=status(row, now),
        scopes=tuple(row.scopes.split(" ")),
        audiences=tuple(row.audiences.split(" ")),
        networks=_words(row.networks),
        role=row.role,
        models=_words(row.models),
        group_id=row.group_id,
        credit_limit=row.credit_limit,
        credits_used=usage.credits if usage else 0,
        member_id=row.member_id,
        device=row.device,
        mask=row.mask,
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        disabled_at=row.disabled_at,
        disabled_reason=row.disabled_reason,
        revoked_at=row.revoked_at,
        last_used_at=usage.last_used_at if usage else None,
        tokens_issued=usage.tokens_issued if usage else 0,
        raw_key_uses=usage.raw_key_uses if usage else 0,
        secrets=working,
    )


def status(row: ApiKey, now: int) -> str:
    """One word for the state of an API key; a final state comes before one that can be undone."""
    if row.revoked_at is not None:
        return "revoked"
    if row.expires_at is not None and row.expires_at <= now:
        return "expired"
    return "active" if row.disabled_at is None else "disabled"


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(" "))
