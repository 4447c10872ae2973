"""Device keys: the API key of a member on one of its devices, made when it signs in there.

There is one for each member and device.  Signing in again finds it; revoking it signs the device
out until the next sign-in.

What a device key may do is a right that membership gives: whoever is a member may sign in, with
the catalog's scopes for devices at the default audience, though its own API key for management
has neither.  On every other axis (`Bounds.rights`) a device key lies within the API key that asks
for it: its networks, project, role, models, group, credit and end are passed on.

An administrator's decision outlives a sign-in: a disabled device key stays disabled, and what was
taken from one stays taken.
"""

import hmac
import re
from dataclasses import dataclass, field, replace
from typing import Any, Final

from coatcheck import apikey
from coatcheck.restrictions import Rights
from coatcheck.scope import Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.server.manage import api_keys, forms
from coatcheck.server.manage.api_key_rules import DEVICE, NewApiKey
from coatcheck.server.manage.api_key_view import ApiKeyView, view
from coatcheck.server.manage.api_keys import SealWith
from coatcheck.server.manage.authority import Bounds, Caller, rights_of
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import ApiKey, Member, Organization

#: Unreserved characters (RFC 3986 §2.3), so that it is one spelling in any URL.
_DEVICE: Final = re.compile(r"[A-Za-z0-9._~-]{1,64}")
#: The axes on which a replaced device key is narrowed to whoever signs in → how `NewApiKey` names
#: them.  Its project is not one: a device key is not moved by signing in.
_NARROWED: Final = {
    "expires_at": "expires_at",
    "networks": "networks",
    "role": "permissions",
    "models": "models",
    "group_id": "group_id",
}


@dataclass(frozen=True, slots=True)
class SignedIn:
    """What a sign-in came to.

    Attributes:
        key: the secret, shown this once; None: the device has it already.
        is_new: whether there was no device key before.
    """

    key: str | None = field(repr=False)
    api_key: ApiKeyView
    is_new: bool = False
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As the API writes it."""
        told = self.api_key.to_json()
        return {"id": told.pop("id"), "key": self.key} | told | {"warnings": list(self.warnings)}


def sign_in(
    store: Transactions,
    catalog: Catalog,
    member_id: str,
    device: str,
    caller: Caller,
    *,
    name: str | None,
    current_key: str | None,
    now: int,
    issuer: str,
    seal_with: SealWith | None = None,
) -> SignedIn:
    """The device key of a member on a device: the one it holds, or a new secret.

    1. There is none, or it has ended: a new one.
    2. There is one, and the device proves that it holds it: it stays.
    3. There is one without proof: it gets a new secret, and the old one ends here and now.

    Args:
        device: the client's own name for the device, the same at each sign-in.
        name: what people call it; needed when it is made.
        current_key: the secret that the device says it holds.
        now: seconds since the epoch.

    Raises:
        Invalid: the device, the name, or what an API key cannot be.
        NotFound: there is no such member.
        Conflict: the catalog has no device keys, or this one was disabled.
        Beyond: the device key is good for more than the caller, and cannot be narrowed to it.
        Taken: the same device signs in somewhere else at this moment.
    """
    device = _device(device)
    scopes = _scopes(catalog)
    with store.transaction() as tx:
        # The member's row is held: two sign-ins at once come one after the other, and nobody
        # who is being removed gets a new one.
        member = _member(tx, member_id)
        organization = _organization(tx, member)
        latest = latest_end(catalog, organization, now)
        row = _in_force(tx, member.id, device)
        if row is not None and caller.project_id not in (None, row.project_id):
            # First: it tells and changes nothing of another project.
            raise Beyond(("project_id",))
        if row is not None:
            _require_not_disabled(row)
        if row is not None and row.expires_at is not None and row.expires_at <= now:
            api_keys.revoke(tx, row.id, caller.actor, now=now)
            row = None
        # 1
        if row is None:
            if name is None:
                raise Invalid("name", "is missing: say what people call this device")
            new = inheriting(
                NewApiKey(
                    organization_id=organization.id,
                    name=name,
                    scopes=scopes,
                    environment=_environment(catalog, caller.bounds),
                    expires_at=latest,
                    kind=DEVICE,
                    member_id=member.id,
                    device=device,
                    created_by=caller.actor.id,
                ),
                caller.bounds,
            )
            made = api_keys.create(
                tx,
                catalog,
                new,
                caller.actor,
                now=now,
                issuer=issuer,
                within=_of_member(caller.bounds),
                seal_with=seal_with,
            )
            return SignedIn(made.key, made.api_key, True, made.warnings)
        changes: dict[str, Any] = {}
        if name is not None and forms.name(name) != row.name:
            changes["name"] = name
        # 2
        is_proven = current_key is not None and _is_secret_of(tx, row, current_key, now)
        if not is_proven and caller.bounds is not None:
            changes |= _narrowing(row, caller, caller.bounds, catalog, latest)
        if changes:
            api_keys.edit(
                tx,
                catalog,
                row.id,
                lambda before: replace(before, **changes),
                caller.actor,
                now=now,
                issuer=issuer,
            )
        if is_proven:
            return SignedIn(None, api_keys.shown(tx, row, now))
        # 3
        made = api_keys.rotate(
            tx, row.id, caller.actor, overlap_s=0, now=now, catalog=catalog, seal_with=seal_with
        )
        return SignedIn(made.key, made.api_key)


def sign_out(store: Transactions, member_id: str, device: str, caller: Caller, *, now: int) -> None:
    """Revoke the device key of a member on a device, if there is one.

    Raises:
        Invalid: the device.
        NotFound: there is no such member.
        Conflict: it was disabled; signing out and in again must not undo that.
    """
    device = _device(device)
    with store.transaction() as tx:
        row = _in_force(tx, _member(tx, member_id).id, device)
        # A device key of a project that the caller does not see does not exist for it.
        if row is not None and caller.project_id in (None, row.project_id):
            _require_not_disabled(row)
            api_keys.revoke(tx, row.id, caller.actor, now=now)


def page(
    store: Transactions,
    member_id: str,
    *,
    project_id: str | None,
    now: int,
    after: str = "",
    limit: int = 100,
) -> list[ApiKeyView]:
    """The device keys of a member that were not revoked, in the order of their devices.

    Args:
        project_id: the only one whose are seen; None: all.
        after: from the device after this one.
    """
    with store.transaction(read_only=True) as tx:
        rows = tx.device_keys(member_id, project_id, after, limit)
        api_key_ids = [row.id for row in rows]
        used, secrets = tx.usage(api_key_ids), tx.secrets_of(api_key_ids)
        return [view(row, secrets.get(row.id, ()), used.get(row.id), now) for row in rows]


# --- what an API key gets from the one that asks for it


def inheriting(new: NewApiKey, bounds: Bounds | None) -> NewApiKey:
    """What is wanted, as narrow as whoever asks on every axis but what it may do.

    Args:
        bounds: the caller's; None: nothing is passed on.
    """
    if bounds is None:
        return new
    rights = bounds.rights
    return replace(
        new,
        expires_at=earliest(new.expires_at, rights.expires_at),
        networks=None if rights.networks is None else tuple(map(str, rights.networks)),
        project_id=new.project_id or rights.project_id,
        permissions=None if rights.role is None else rights.role.name,
        models=rights.models,
        group_id=rights.group_id,
        credit_limit=bounds.credit_left,
    )


def earliest(*ends: int | None) -> int | None:
    """The first of some ends; None: there is none."""
    return min((end for end in ends if end is not None), default=None)


def latest_end(catalog: Catalog, organization: Organization, now: int) -> int | None:
    """The latest end that an API key may have, by the policies; None: it needs none."""
    limit = earliest(catalog.policies.max_lifetime_s, organization.max_lifetime_s)
    return None if limit is None else now + limit


# --- one step each


def _device(text: str) -> str:
    if _DEVICE.fullmatch(text) is None:
        raise Invalid("device", "is 1 to 64 letters, digits, or . _ ~ - (a UUID will do)")
    return text


def _scopes(catalog: Catalog) -> tuple[str, ...]:
    if catalog.device_scopes is None:
        raise Conflict(
            "there are no device keys here: the catalog does not say what they may do.  The"
            ' operator writes [device_keys] with scopes = ["..."] into it',
            "no_device_keys",
        )
    return tuple(map(str, catalog.device_scopes))


def _member(tx: Transaction, member_id: str) -> Member:
    row = tx.member(member_id)
    if row is None or row.removed_at is not None:
        raise NotFound("there is no member of this id (an id starts with mem_)")
    return row


def _organization(tx: Transaction, member: Member) -> Organization:
    row = tx.organization(member.organization_id)
    if row is None:
        raise NotFound("there is no organization of this id (an id starts with org_)")
    return row


def _in_force(tx: Transaction, member_id: str, device: str) -> ApiKey | None:
    """The device key that was neither revoked nor deleted."""
    row = tx.device_key(member_id, device)
    # It was read before it was held.
    return None if row is None or row.revoked_at is not None else row


def _require_not_disabled(row: ApiKey) -> None:
    if row.disabled_at is not None:
        raise Conflict(
            f"{row.id}, the key of this device, was disabled at"
            f" {forms.rfc3339(row.disabled_at)}: whoever administers the organization enables it,"
            " or revokes it for a new one",
            "api_key_disabled",
        )


def _environment(catalog: Catalog, bounds: Bounds | None) -> str:
    return catalog.default_environment if bounds is None else bounds.rights.environment


def _of_member(bounds: Bounds | None) -> Bounds | None:
    """What a caller may give to its device: scopes and audiences are membership's to give."""
    return None if bounds is None else replace(bounds, any_scope=True)


def _is_secret_of(tx: Transaction, row: ApiKey, presented: str, now: int) -> bool:
    """Whether a text is a secret of this API key that still works."""
    digest = apikey.digest(presented)
    fits = [
        hmac.compare_digest(digest, secret.digest)
        for secret in tx.secrets(row.id)
        if secret.expires_at is None or secret.expires_at > now
    ]
    # Each was compared, so that time tells nothing.
    return any(fits)


def _narrowing(
    row: ApiKey, caller: Caller, bounds: Bounds, catalog: Catalog, latest: int | None
) -> dict[str, Any]:
    """The changes after which a device key lies within whoever is shown its new secret.

    Args:
        latest: the latest end that an API key may get.

    Raises:
        Beyond: it would have to become wider somewhere, or belongs to another environment or
            project.
    """
    rights = rights_of(row, catalog)
    _require_given(rights, bounds, catalog)
    axes = [axis for axis in rights.beyond(bounds.rights) if axis in _NARROWED]
    allowed = replace(bounds.rights, expires_at=earliest(latest, bounds.rights.expires_at))
    narrowed = replace(rights, **{axis: getattr(allowed, axis) for axis in axes})
    sideways = narrowed.beyond(rights)
    if sideways:
        raise Beyond(sideways)
    # What it has given to this very API key does not count against it twice.
    left = None if row.created_by == caller.actor.id else bounds.credit_left
    replace(bounds, any_scope=True, credit_left=left).require(narrowed, catalog, row.credit_limit)
    inherited = inheriting(NewApiKey(row.organization_id, row.name, expires_at=latest), bounds)
    return {_NARROWED[axis]: getattr(inherited, _NARROWED[axis]) for axis in axes}


def _require_given(rights: Rights, bounds: Bounds, catalog: Catalog) -> None:
    """What a device key may do is the catalog's for devices, or the caller's own: who administers
    may have added more, and that is not membership's to give.  Raises Beyond."""
    if bounds.any_scope:
        return
    default = catalog.default_audiences[rights.environment]
    for audience in rights.audiences:
        meaning = catalog.vocabulary(audience)
        own = bounds.rights.scopes if audience in bounds.rights.audiences else Scopes()
        given = catalog.device_scopes if audience == default else None
        left = meaning.expand(own).missing(meaning.expand(rights.scopes))
        if meaning.expand(given or Scopes()).missing(left):
            raise Beyond(("scopes",))
