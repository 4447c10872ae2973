"""API keys: create, list, search, show, edit, disable, enable, revoke, rotate, delete, reveal.

Each function is one transaction and leaves one row in the change log per API key; what it did
holds from the next token request on.  Who may do what is for the surface to say; `within` hands
the comparison of rights in, so that it is made on the very rows that are written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Final, NamedTuple

from coatcheck import apikey, ids
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_key_rules, forms
from coatcheck.server.manage.api_key_rules import CheckedApiKey, NewApiKey, Policy
from coatcheck.server.manage.api_key_view import ApiKeyView, view
from coatcheck.server.manage.authority import Bounds, rights_of
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.sealing import SealingKey, SealingKeys
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.pages import Filter, Position
from coatcheck.server.store.tables import ApiKey, ApiKeySecret, Organization

__all__ = ["ApiKeyView", "Created", "Edited", "NewApiKey", "Page", "Prepared"]

#: API keys that one transaction makes; a larger number is made in several.
_BATCH: Final = 10_000
#: Seconds: who used an API key as lately as this is told before it is deleted.
LATELY: Final = 24 * 3600

#: The sealing key for copies that a transaction stores.
SealWith = Callable[[Transaction], SealingKey]


@dataclass(frozen=True, slots=True)
class Created:
    """An API key that was made or got a new secret: the only time the secret is shown."""

    key: str = field(repr=False)
    api_key: ApiKeyView
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        told = self.api_key.to_json()
        return {"id": told.pop("id"), "key": self.key} | told | {"warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit did, or would do.

    Attributes:
        narrows: whether something is taken away, so that tokens made before are dead.
        warnings: what it may break, and what is seldom meant.
    """

    api_key: ApiKeyView
    narrows: bool
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return self.api_key.to_json() | {"narrows": self.narrows, "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class Page:
    """Some API keys, and where the rest begins; None: there are no more."""

    api_keys: list[ApiKeyView]
    following: Position | None


def create(
    store: Transactions,
    catalog: Catalog,
    new: NewApiKey,
    actor: Actor,
    *,
    now: int,
    issuer: str,
    within: Bounds | None = None,
    seal_with: SealWith | None = None,
) -> Created:
    """Make one API key.

    Args:
        now: seconds since the epoch.
        issuer: this deployment's URL, for the length of a full token.
        within: what may be given away; None: everything.
        seal_with: the sealing key, for an organization that keeps copies of its secrets.

    Raises:
        Invalid: which input breaks which rule; nothing was stored.
        Beyond: it goes beyond `within`.
        NotFound: there is no such organization.
        StoreUnavailable: the database did not answer.
    """
    with store.transaction() as tx:
        organization = _organization(tx, new.organization_id)
        checked = _checked(tx, catalog, new, organization, now=now, issuer=issuer)
        if within is not None:
            within.require(checked.rights, catalog, new.credit_limit)
        made = _prepared(checked, catalog.prefix(checked.rights.environment), actor, now)
        if _keeps_copies(organization, catalog):
            _seal([made], tx, seal_with)
        _store(tx, [made])
        return _created(made, now, checked.warnings)


def create_many(
    store: Transactions,
    catalog: Catalog,
    new: NewApiKey,
    actor: Actor,
    *,
    now: int,
    issuer: str,
    count: int,
    seal_with: SealWith | None = None,
) -> Iterator[tuple[str, str]]:
    """Make many API keys alike: their ids and secrets, each batch once it is committed.

    Raises:
        As `create`; what was yielded before stays.
    """
    for start in range(0, count, _BATCH):
        with store.transaction() as tx:
            organization = _organization(tx, new.organization_id)
            checked = _checked(tx, catalog, new, organization, now=now, issuer=issuer)
            prefix = catalog.prefix(checked.rights.environment)
            made = [
                # Ids rise with their place in the row, as far as milliseconds tell: a database
                # adds in order at half the cost.
                _prepared(checked, prefix, actor, now, place * 1000 // count)
                for place in range(start, min(start + _BATCH, count))
            ]
            made.sort(key=itemgetter(0))
            if _keeps_copies(organization, catalog):
                _seal(made, tx, seal_with)
            _store(tx, made)
        yield from ((one.id, one.key) for one in made)


def prepare(catalog: Catalog, new: NewApiKey, actor: Actor, *, now: int, issuer: str) -> "Prepared":
    """One API key as rows, for a transaction that stores it.  Raises Invalid as `create`."""
    checked = api_key_rules.checked(catalog, new, Policy(), now=now, issuer=issuer)
    return _prepared(checked, catalog.prefix(checked.rights.environment), actor, now)


# --- reading


def list_api_keys(
    store: Transactions,
    *,
    organization_id: str | None,
    now: int,
    after: str = "",
    limit: int = 100,
) -> list[ApiKeyView]:
    """API keys in the order they were made, from the one after the id `after`."""
    with store.transaction(read_only=True) as tx:
        return _views(tx, tx.api_keys(organization_id, after, limit), now)


def page(
    store: Transactions,
    organization_id: str,
    filters: Filter,
    *,
    now: int,
    after: Position | None,
    limit: int,
) -> Page:
    """Some API keys of an organization.

    A page looks at a bounded number of rows, however many there are: one that finds few of what
    is asked for is short, and says where to go on.
    """
    with store.transaction(read_only=True) as tx:
        rows, following = tx.api_keys_page(organization_id, filters, now, after, limit)
        return Page(_views(tx, rows, now), following)


def show(store: Transactions, api_key_id: str, *, now: int) -> ApiKeyView:
    """One API key.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction(read_only=True) as tx:
        return shown(tx, _existing(tx, api_key_id), now)


def find(store: Transactions, key: str, *, now: int) -> ApiKeyView:
    """The API key that this secret belongs to, whatever its state.

    Raises:
        NotFound: the secret matches none.
    """
    with store.transaction(read_only=True) as tx:
        row = tx.api_key_by_digest(apikey.digest(key))
        if row is None or row.deleted_at is not None:
            raise NotFound("no API key has this secret")
        return shown(tx, row, now)


# --- the life of one


def edit(
    store: Transactions,
    catalog: Catalog,
    api_key_id: str,
    change: Callable[[NewApiKey], NewApiKey],
    actor: Actor,
    *,
    now: int,
    issuer: str,
    within: Bounds | None = None,
    dry_run: bool = False,
) -> Edited:
    """Change what an API key is good for; its secret stays.

    Args:
        change: from what it is to what it shall be.
        dry_run: only say what it would do.

    Raises:
        Invalid, Beyond: as `create`; what it is now has to lie within, too.
        NotFound: there is none of this id.
        Conflict: it was revoked.
    """
    with store.transaction(read_only=dry_run) as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        before = rights_of(row, catalog)
        organization = _organization(tx, row.organization_id)
        current = wanted_of(row)
        new = change(current)
        has_new_end = new.expires_at != row.expires_at
        checked = _checked(
            tx,
            catalog,
            # What it was made with stays allowed; an end that lies in the past as well.
            new if has_new_end else replace(new, expires_at=None),
            organization,
            now=now,
            issuer=issuer,
            is_same_end=not has_new_end,
        )
        end = new.expires_at if has_new_end else row.expires_at
        rights = replace(checked.rights, expires_at=end)
        if within is not None:
            within = within.over(row)
            within.require(before, catalog, row.credit_limit)
            if within.credit_left is not None and row.created_by != within.api_key_id:
                # Raising what somebody else gave would be giving what nobody counts.
                within = replace(within, credit_left=row.credit_limit)
            within.require(rights, catalog, new.credit_limit)
        usage = tx.usage([row.id]).get(row.id)
        is_spent = _is_spent(tx, row.id, new.credit_limit)
        narrows = bool(before.beyond(rights)) or (is_spent and row.disabled_at is None)
        told = list(api_key_rules.warnings(new, rights))
        if narrows:
            told.insert(0, _what_breaks(usage.last_used_at if usage else None, now))
        if dry_run:
            tried = ApiKey(**(row.model_dump() | checked.columns | {"expires_at": end}))
            return Edited(view(tried, tx.secrets(row.id), usage, now), narrows, tuple(told))
        old = {name: getattr(row, name) for name in checked.columns}
        for name, value in checked.columns.items():
            setattr(row, name, value)
        row.expires_at = end
        if is_spent and row.disabled_at is None:
            row.disabled_at, row.disabled_reason = now, "quota"
        elif not is_spent and row.disabled_reason == "quota":
            row.disabled_at = row.disabled_reason = None
        detail = {
            name: [value, getattr(row, name)]
            for name, value in old.items()
            if value != getattr(row, name)
        }
        if detail:
            what = What.API_KEY_NARROWED if narrows else What.API_KEY_EDITED
            tx.append([change_of(what, row, actor, now, **detail)])
        return Edited(shown(tx, row, now), narrows, tuple(told))


def disable(store: Transactions, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """Stop an API key until it is enabled again; tokens made from it are dead for good.

    Raises:
        NotFound: there is none of this id.
        Conflict: it was revoked.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        if row.disabled_at is None:
            row.disabled_at, row.disabled_reason = now, "manual"
            tx.append([change_of(What.API_KEY_DISABLED, row, actor, now)])
        return shown(tx, row, now)


def enable(
    store: Transactions,
    api_key_id: str,
    actor: Actor,
    *,
    now: int,
    catalog: Catalog | None = None,
    within: Bounds | None = None,
) -> ApiKeyView:
    """Undo `disable`.

    Raises:
        As `disable`; also Beyond, and Conflict if it has used its credit up.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        _require_within(row, within, catalog)
        if row.disabled_reason == "quota" or _is_spent(tx, row.id, row.credit_limit):
            raise Conflict(
                f"{row.id} has used its credit up: raise its creditLimit instead", "quota_exceeded"
            )
        if row.disabled_at is not None:
            row.disabled_at = row.disabled_reason = None
            tx.append([change_of(What.API_KEY_ENABLED, row, actor, now)])
        return shown(tx, row, now)


def revoke(store: Transactions, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """End an API key for ever; its record stays.  Doing it twice is doing it once.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        if row.revoked_at is None:
            row.revoked_at = now
            tx.append([change_of(What.API_KEY_REVOKED, row, actor, now)])
        return shown(tx, row, now)


def rotate(
    store: Transactions,
    api_key_id: str,
    actor: Actor,
    *,
    overlap_s: int,
    now: int,
    catalog: Catalog | None = None,
    within: Bounds | None = None,
    seal_with: SealWith | None = None,
) -> Created:
    """Give an API key a new secret; the one before it works until the overlap ends.

    A key has at most two secrets: an overlap that is still running ends now.

    Args:
        overlap_s: seconds for which the replaced secret goes on working; 0: not at all.

    Raises:
        NotFound: there is none of this id.
        Conflict: it was revoked or has expired.
        Invalid: the overlap is longer than anything lasts.
        Beyond: it goes beyond `within`; whoever rotates gets to know the new secret.
    """
    ends_at = now + overlap_s
    if ends_at > forms.LATEST:
        raise Invalid("overlap", "lies beyond the year 9999")
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        _require_within(row, within, catalog)
        if row.expires_at is not None and row.expires_at <= now:
            raise Conflict(f"{row.id} has expired: create a new API key", "api_key_expired")
        tokens_outlive_it = overlap_s < TOKEN_LIFETIME
        for secret in tx.secrets(row.id):
            if secret.expires_at is None:
                secret.expires_at = ends_at
            elif secret.expires_at > now:
                secret.expires_at = now
                tokens_outlive_it = True
        key = apikey.make(row.mask.rpartition("_")[0])
        row.mask = apikey.mask(key)
        new: dict[str, Any] = {
            "digest": apikey.digest(key),
            "api_key_id": row.id,
            "mask": row.mask,
            "created_at": now,
        }
        if _keeps_copies(_organization(tx, row.organization_id), catalog):
            new |= _copy_of(key, row.id, _required(seal_with)(tx))
        tx.add(ApiKeySecret(**new))
        changes = [change_of(What.API_KEY_ROTATED, row, actor, now, overlapSeconds=overlap_s)]
        if tokens_outlive_it:
            # Those made from the old secret end here.
            changes.append(change_of(What.API_KEY_OVERLAP_ENDED, row, actor, now))
        tx.append(changes)
        return Created(key, shown(tx, row, now))


def end_overlap(store: Transactions, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """End the overlap of a rotation now: only the newest secret works from here on.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        running = [
            secret
            for secret in tx.secrets(row.id)
            if secret.expires_at is not None and secret.expires_at > now
        ]
        for secret in running:
            secret.expires_at = now
        if running:
            tx.append([change_of(What.API_KEY_OVERLAP_ENDED, row, actor, now)])
        return shown(tx, row, now)


def delete(
    store: Transactions,
    catalog: Catalog,
    api_key_id: str,
    actor: Actor,
    *,
    now: int,
    is_confirmed: bool = False,
) -> None:
    """End an API key for ever and take it out of every list; the audit and the usage stay.

    Raises:
        NotFound: there is none of this id.
        Conflict: the catalog only revokes; or it was used lately and nobody has confirmed.
    """
    if not catalog.policies.may_delete:
        raise Conflict(
            "API keys are not deleted here: revoke it, which is as final, and its record stays",
            "delete_not_offered",
        )
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        usage = tx.usage([row.id]).get(row.id)
        last_used_at = usage.last_used_at if usage else None
        was_used = last_used_at is not None and last_used_at > now - LATELY
        if was_used and row.revoked_at is None and not is_confirmed:
            raise Conflict(
                f"{row.id} was used in the last 24 hours, at {forms.rfc3339(last_used_at)}: what"
                " uses it stops.  Confirm it (confirm=true, or --confirm), or disable it first",
                "api_key_in_use",
                {
                    "lastUsedAt": forms.rfc3339(last_used_at),
                    "tokensIssued": usage.tokens_issued if usage else 0,
                    "rawKeyUses": usage.raw_key_uses if usage else 0,
                },
            )
        row.deleted_at = now
        row.revoked_at = row.revoked_at or now
        # Its secrets are unknown from now on, as if they had never been.
        tx.delete_secrets(row.id)
        tx.append([change_of(What.API_KEY_DELETED, row, actor, now, name=row.name)])


def reveal(
    store: Transactions,
    api_key_id: str,
    actor: Actor,
    sealing_keys: SealingKeys,
    *,
    now: int,
    catalog: Catalog | None = None,
    within: Bounds | None = None,
) -> Created:
    """Show the current secret of an API key again, where the policy keeps a copy; it is audited.

    Raises:
        NotFound: there is none of this id.
        Conflict: there is no copy, or it was revoked.
        Beyond: it goes beyond `within`.
        BadSealingKey: the sealing key of the copy is not at hand.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        _require_within(row, within, catalog)
        current = next((one for one in tx.secrets(row.id) if one.expires_at is None), None)
        is_kept = _keeps_copies(_organization(tx, row.organization_id), catalog)
        if current is None or current.sealed is None or not is_kept:
            raise Conflict(
                f"there is no copy of the secret of {row.id}: rotate it to get a new one, or let"
                " the organization keep copies (recoverable) before you make the next",
                "not_recoverable",
            )
        name = sealed_name(row.id)
        secret = sealing_keys.unseal(current.sealed, name, current.sealing_key_id or "")
        tx.append([change_of(What.API_KEY_REVEALED, row, actor, now)])
        return Created(secret.decode("ascii"), shown(tx, row, now))


def sealed_name(api_key_id: str) -> str:
    """Under which name the copy of a secret is sealed."""
    return f"secret of {api_key_id}"


def wanted_of(row: ApiKey) -> NewApiKey:
    """What somebody would ask for who wanted this very API key."""
    return NewApiKey(
        organization_id=row.organization_id,
        name=row.name,
        scopes=tuple(row.scopes.split(" ")),
        audiences=tuple(row.audiences.split(" ")),
        environment=row.environment,
        expires_at=row.expires_at,
        project_id=row.project_id,
        networks=None if row.networks is None else tuple(row.networks.split(" ")),
        permissions=row.role,
        models=None if row.models is None else tuple(row.models.split(" ")),
        group_id=row.group_id,
        credit_limit=row.credit_limit,
        kind=row.kind,
        member_id=row.member_id,
        device=row.device,
        created_by=row.created_by,
    )


# --- rows


class Prepared(NamedTuple):
    """A new API key that is not stored yet: its secret, and the rows of its tables."""

    id: str
    key: str
    api_key: dict[str, Any]
    secret: dict[str, Any]
    change: Change

    def __repr__(self) -> str:
        return f"Prepared({self.id})"


def _checked(
    tx: Transaction,
    catalog: Catalog,
    new: NewApiKey,
    organization: Organization,
    *,
    now: int,
    issuer: str,
    is_same_end: bool = False,
) -> CheckedApiKey:
    """What the rules say, and what an API key points to: its project, group and credit."""
    if new.project_id is not None:
        project = tx.project(new.project_id)
        if project is None or project.organization_id != organization.id:
            raise Invalid("project", "there is no project of this id (an id starts with prj_)")
        if project.archived_at is not None:
            raise Invalid("project", "it is archived: take it back first, or name another")
    group = None if new.group_id is None else tx.group(new.group_id)
    if new.group_id is not None and (group is None or group.deleted_at is not None):
        raise Invalid("group", "there is no group of this id (an id starts with grp_)")
    limits = (catalog.policies.max_lifetime_s, organization.max_lifetime_s)
    given = [limit for limit in limits if limit is not None]
    longest = None if is_same_end else min(given, default=None)
    policy = Policy(max_lifetime_s=longest)
    return api_key_rules.checked(catalog, new, policy, now=now, issuer=issuer)


def _store(tx: Transaction, made: Sequence[Prepared]) -> None:
    secrets = sorted((one.secret for one in made), key=itemgetter("digest"))
    tx.add_api_keys([one.api_key for one in made], secrets)
    tx.append(one.change for one in made)


def _created(made: Prepared, now: int, warnings: tuple[str, ...]) -> Created:
    seen = view(ApiKey(**made.api_key), [ApiKeySecret(**made.secret)], None, now)
    return Created(made.key, seen, warnings)


def _prepared(
    checked: CheckedApiKey, prefix: str, actor: Actor, now: int, milliseconds: int = 0
) -> Prepared:
    key = apikey.make(prefix)
    mask = apikey.mask(key)
    api_key_id = ids.new_id("key", now * 1000 + milliseconds)
    organization_id = str(checked.columns["organization_id"])
    change = Change(
        What.API_KEY_CREATED,
        api_key_id,
        actor,
        now,
        organization_id,
        detail=checked.detail,
        # Said twice, a creation is still one; and in order, which a database indexes cheaply.
        change_id=f"{What.API_KEY_CREATED.text}:{api_key_id}",
        wider=organization_id,
    )
    api_key = {
        "id": api_key_id,
        **checked.columns,
        "created_by": checked.columns["created_by"] or actor.id,
        "state": "active",
        "mask": mask,
        "created_at": now,
    }
    secret = {
        "digest": apikey.digest(key),
        "api_key_id": api_key_id,
        "mask": mask,
        "created_at": now,
        "expires_at": None,
    }
    return Prepared(api_key_id, key, api_key, secret, change)


def _keeps_copies(organization: Organization, catalog: Catalog | None) -> bool:
    """Whether sealed copies of secrets are kept: the catalog allows it, and it was chosen."""
    return organization.recoverable and (catalog is None or catalog.policies.recoverable)


def _seal(made: Sequence[Prepared], tx: Transaction, seal_with: SealWith | None) -> None:
    """Add sealed copies of secrets to their rows."""
    sealing_key = _required(seal_with)(tx)
    for one in made:
        one.secret.update(_copy_of(one.key, one.id, sealing_key))


def _copy_of(key: str, api_key_id: str, sealing_key: SealingKey) -> dict[str, Any]:
    sealed = sealing_key.seal(key.encode(), sealed_name(api_key_id))
    return {"sealed": sealed, "sealing_key_id": sealing_key.id}


def _required(seal_with: SealWith | None) -> SealWith:
    if seal_with is None:
        raise Conflict("the copy of the secret cannot be sealed here: the sealing key is needed")
    return seal_with


def change_of(what: What, row: ApiKey, actor: Actor, now: int, **detail: object) -> Change:
    """A change of an API key, for the log."""
    organization_id = row.organization_id
    return Change(what, row.id, actor, now, organization_id, wider=organization_id, detail=detail)


def _what_breaks(last_used_at: int | None, now: int) -> str:
    if last_used_at is None or last_used_at <= now - LATELY:
        return "It takes something away: tokens that were made before are dead at once."
    return (
        "It takes something away, and the API key was used in the last 24 hours, at"
        f" {forms.rfc3339(last_used_at)}: what needs more than is left fails from the next request"
        " on, and tokens that were made before are dead at once."
    )


def _organization(tx: Transaction, organization_id: str) -> Organization:
    row = tx.organization(organization_id)
    if row is None:
        raise NotFound(f"there is no organization {organization_id}")
    return row


def _is_spent(tx: Transaction, api_key_id: str, limit: int | None) -> bool:
    """Whether an API key has used up, or given away, all that it may have."""
    if limit is None:
        return False
    usage = tx.usage([api_key_id]).get(api_key_id)
    return (usage.credits if usage else 0) + tx.credit_given_by(api_key_id) >= limit


def _existing(tx: Transaction, api_key_id: str) -> ApiKey:
    row = tx.api_key(api_key_id)
    if row is None or row.deleted_at is not None:
        # The text is not repeated: it may be the API key itself.
        raise NotFound("there is no API key of this id (an id starts with key_)")
    return row


def _require_not_revoked(row: ApiKey) -> None:
    if row.revoked_at is not None:
        raise Conflict(
            f"{row.id} was revoked at {forms.rfc3339(row.revoked_at)}, and that is final:"
            " create a new API key",
            "api_key_revoked",
        )


def _require_within(row: ApiKey, within: Bounds | None, catalog: Catalog | None) -> None:
    if within is not None:
        assert catalog is not None  # noqa: S101 - who bounds says by which catalog
        within.over(row).require(rights_of(row, catalog), catalog, row.credit_limit)


def shown(tx: Transaction, row: ApiKey, now: int) -> ApiKeyView:
    """What is shown of a row within its transaction."""
    return view(row, tx.secrets(row.id), tx.usage([row.id]).get(row.id), now)


def _views(tx: Transaction, rows: Sequence[ApiKey], now: int) -> list[ApiKeyView]:
    api_key_ids = [row.id for row in rows]
    used, secrets = tx.usage(api_key_ids), tx.secrets_of(api_key_ids)
    return [view(row, secrets.get(row.id, ()), used.get(row.id), now) for row in rows]
