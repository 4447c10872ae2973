"""API keys: create, list, show, disable, enable, revoke, rotate.

Each function is one transaction and leaves one row in the change log per API key; what it did
holds from the next token request on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final, NamedTuple

from coatcheck import apikey, ids, token_profile
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.scope import EVERYTHING, MalformedScope, Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.store import Store, Transaction
from coatcheck.server.store.tables import ApiKey, ApiKeySecret, ApiKeyUsage

#: API keys that one transaction makes; a larger number is made in several.
_BATCH: Final = 10_000


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """What a new API key shall be; absent means unrestricted or the default.

    Attributes:
        scopes: scope-tokens; none: every action but the platform's own.
        audiences: none: the default audience of the environment.
        expires_at: seconds since the epoch; None: never.
    """

    organization_id: str
    name: str
    scopes: Sequence[str] = ()
    audiences: Sequence[str] = ()
    environment: str | None = None
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """An API key that was made or got a new secret: the only time the secret is shown."""

    key: str = field(repr=False)
    api_key: "ApiKeyView"

    def to_json(self) -> dict[str, object]:
        view = self.api_key.to_json()
        return {"id": view.pop("id"), "key": self.key} | view


@dataclass(frozen=True, slots=True)
class ApiKeyView:
    """An API key as people and programs see it.  Times are seconds since the epoch."""

    id: str
    name: str
    organization_id: str
    environment: str
    status: str
    scopes: tuple[str, ...]
    audiences: tuple[str, ...]
    mask: str
    created_at: int
    expires_at: int | None
    disabled_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    tokens_issued: int
    raw_key_uses: int
    secrets: tuple[tuple[str, int | None], ...]
    """Mask and end of each secret that still works; the current one has no end."""

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "organization": self.organization_id,
            "project": None,
            "env": self.environment,
            "status": self.status,
            "scopes": list(self.scopes),
            "audiences": list(self.audiences),
            "mask": self.mask,
            "createdAt": forms.rfc3339(self.created_at),
            "expiresAt": forms.rfc3339(self.expires_at),
            "disabledAt": forms.rfc3339(self.disabled_at),
            "revokedAt": forms.rfc3339(self.revoked_at),
            "lastUsedAt": forms.rfc3339(self.last_used_at),
            "tokensIssued": self.tokens_issued,
            "rawKeyUses": self.raw_key_uses,
            "secrets": [
                {"mask": mask, "expiresAt": forms.rfc3339(end)} for mask, end in self.secrets
            ],
        }


def create(
    store: Store, catalog: Catalog, new: NewApiKey, actor: Actor, *, now: int, issuer: str
) -> Created:
    """Make one API key.

    Args:
        now: seconds since the epoch.
        issuer: this deployment's URL, for the length of a full token.

    Raises:
        Invalid: which input breaks which rule; nothing was stored.
        NotFound: there is no such organization.
        StoreUnavailable: the database did not answer.
    """
    made = prepare(catalog, new, actor, now=now, issuer=issuer)
    _store(store, new.organization_id, [made])
    return _created(made, now)


def create_many(
    store: Store,
    catalog: Catalog,
    new: NewApiKey,
    actor: Actor,
    *,
    now: int,
    issuer: str,
    count: int,
) -> Iterator[tuple[str, str]]:
    """Make many API keys alike: their ids and secrets, each batch once it is committed.

    Raises:
        As `create`; what was yielded before stays.
    """
    template = _checked(catalog, new, now, issuer)
    prefix = apikey.prefix_for(catalog.brand, template.environment)
    for start in range(0, count, _BATCH):
        made = [
            # Ids rise with their place in the row, as far as milliseconds tell: a database adds
            # in order at half the cost.
            _prepared(template, prefix, actor, now, place * 1000 // count)
            for place in range(start, min(start + _BATCH, count))
        ]
        made.sort()
        _store(store, new.organization_id, made)
        yield from ((one.id, one.key) for one in made)


def prepare(catalog: Catalog, new: NewApiKey, actor: Actor, *, now: int, issuer: str) -> "Prepared":
    """One API key as rows, for a transaction that stores it.  Raises Invalid as `create`."""
    template = _checked(catalog, new, now, issuer)
    prefix = apikey.prefix_for(catalog.brand, template.environment)
    return _prepared(template, prefix, actor, now)


def list_api_keys(
    store: Store, *, organization_id: str | None, now: int, after: str = "", limit: int = 100
) -> list[ApiKeyView]:
    """API keys in the order they were made, from the one after the id `after`."""
    with store.transaction(read_only=True) as tx:
        rows = tx.api_keys(organization_id, after, limit)
        used = tx.usage([row.id for row in rows])
        return [_view(row, tx.secrets(row.id), used.get(row.id), now) for row in rows]


def show(store: Store, api_key_id: str, *, now: int) -> ApiKeyView:
    """One API key.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction(read_only=True) as tx:
        return _shown(tx, _existing(tx, api_key_id), now)


def find(store: Store, key: str, *, now: int) -> ApiKeyView:
    """The API key that this secret belongs to, whatever its state.

    Raises:
        NotFound: the secret matches none.
    """
    with store.transaction(read_only=True) as tx:
        row = tx.api_key_by_digest(apikey.digest(key))
        if row is None:
            raise NotFound("no API key has this secret")
        return _shown(tx, row, now)


def disable(store: Store, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """Stop an API key until it is enabled again; tokens made from it are dead for good.

    Raises:
        NotFound: there is none of this id.
        Conflict: it was revoked.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        if row.disabled_at is None:
            row.disabled_at = now
            tx.append([_change(What.API_KEY_DISABLED, row, actor, now)])
        return _shown(tx, row, now)


def enable(store: Store, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """Undo `disable`.  Raises as it does."""
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        if row.disabled_at is not None:
            row.disabled_at = None
            tx.append([_change(What.API_KEY_ENABLED, row, actor, now)])
        return _shown(tx, row, now)


def revoke(store: Store, api_key_id: str, actor: Actor, *, now: int) -> ApiKeyView:
    """End an API key for ever; its record stays.  Doing it twice is doing it once.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        if row.revoked_at is None:
            row.revoked_at = now
            tx.append([_change(What.API_KEY_REVOKED, row, actor, now)])
        return _shown(tx, row, now)


def rotate(store: Store, api_key_id: str, actor: Actor, *, overlap_s: int, now: int) -> Created:
    """Give an API key a new secret; the one before it works until the overlap ends.

    A key has at most two secrets: an overlap that is still running ends now.

    Args:
        overlap_s: seconds for which the replaced secret goes on working; 0: not at all.

    Raises:
        NotFound: there is none of this id.
        Conflict: it was revoked or has expired.
        Invalid: the overlap is longer than anything lasts.
    """
    ends_at = now + overlap_s
    if ends_at > forms.LATEST:
        raise Invalid("overlap", "lies beyond the year 9999")
    with store.transaction() as tx:
        row = _existing(tx, api_key_id)
        _require_not_revoked(row)
        if row.expires_at is not None and row.expires_at <= now:
            raise Conflict(f"{row.id} has expired: create a new API key")
        tokens_outlive_it = overlap_s < TOKEN_LIFETIME
        for secret in tx.secrets(row.id):
            if secret.expires_at is None:
                secret.expires_at = ends_at
            elif secret.expires_at > now:
                secret.expires_at = now
                tokens_outlive_it = True
        key = apikey.make(row.mask.rpartition("_")[0])
        row.mask = apikey.mask(key)
        tx.add(_secret(key, row.id, now))
        changes = [_change(What.API_KEY_ROTATED, row, actor, now, overlapSeconds=overlap_s)]
        if tokens_outlive_it:
            # Those made from the old secret end here.
            changes.append(_change(What.API_KEY_OVERLAP_ENDED, row, actor, now))
        tx.append(changes)
        return Created(key, _shown(tx, row, now))


# --- rows


@dataclass(frozen=True, slots=True)
class _Template:
    organization_id: str
    name: str
    environment: str
    scopes: str
    audiences: str
    expires_at: int | None
    detail: dict[str, object]
    """What the change log says of it."""


class Prepared(NamedTuple):
    """A new API key that is not stored yet: its secret, and the rows of its tables."""

    id: str
    key: str
    api_key: dict[str, Any]
    secret: dict[str, Any]
    change: Change

    def __repr__(self) -> str:
        return f"Prepared({self.id})"


def _store(store: Store, organization_id: str, made: Sequence[Prepared]) -> None:
    with store.transaction() as tx:
        if tx.organization(organization_id) is None:
            raise NotFound(f"there is no organization {organization_id}")
        secrets = sorted((one.secret for one in made), key=itemgetter("digest"))
        tx.add_api_keys([one.api_key for one in made], secrets)
        tx.append(one.change for one in made)


def _created(made: Prepared, now: int) -> Created:
    view = _view(ApiKey(**made.api_key), [ApiKeySecret(**made.secret)], None, now)
    return Created(made.key, view)


def _prepared(
    template: _Template, prefix: str, actor: Actor, now: int, milliseconds: int = 0
) -> Prepared:
    key = apikey.make(prefix)
    mask = apikey.mask(key)
    api_key_id = ids.new_id("key", now * 1000 + milliseconds)
    organization_id = template.organization_id
    change = Change(
        What.API_KEY_CREATED,
        api_key_id,
        actor,
        now,
        organization_id,
        detail=template.detail,
        # Said twice, a creation is still one; and in order, which a database indexes cheaply.
        change_id=f"{What.API_KEY_CREATED.text}:{api_key_id}",
        wider=organization_id,
    )
    api_key = {
        "id": api_key_id,
        "organization_id": organization_id,
        "name": template.name,
        "environment": template.environment,
        "scopes": template.scopes,
        "audiences": template.audiences,
        "mask": mask,
        "created_at": now,
        "expires_at": template.expires_at,
    }
    secret = {
        "digest": apikey.digest(key),
        "api_key_id": api_key_id,
        "mask": mask,
        "created_at": now,
        "expires_at": None,
    }
    return Prepared(api_key_id, key, api_key, secret, change)


def _secret(key: str, api_key_id: str, now: int) -> ApiKeySecret:
    return ApiKeySecret(
        digest=apikey.digest(key), api_key_id=api_key_id, mask=apikey.mask(key), created_at=now
    )


def _change(what: What, row: ApiKey, actor: Actor, now: int, **detail: object) -> Change:
    organization_id = row.organization_id
    return Change(what, row.id, actor, now, organization_id, wider=organization_id, detail=detail)


def _existing(tx: Transaction, api_key_id: str) -> ApiKey:
    row = tx.api_key(api_key_id)
    if row is None:
        # The text is not repeated: it may be the API key itself.
        raise NotFound("there is no API key of this id (an id starts with key_)")
    return row


def _require_not_revoked(row: ApiKey) -> None:
    if row.revoked_at is not None:
        raise Conflict(
            f"{row.id} was revoked at {forms.rfc3339(row.revoked_at)}, and that is final:"
            " create a new API key"
        )


def _shown(tx: Transaction, row: ApiKey, now: int) -> ApiKeyView:
    return _view(row, tx.secrets(row.id), tx.usage([row.id]).get(row.id), now)


def _view(
    row: ApiKey, secrets: Sequence[ApiKeySecret], usage: ApiKeyUsage | None, now: int
) -> ApiKeyView:
    working = tuple(
        (secret.mask, secret.expires_at)
        for secret in secrets
        if row.revoked_at is None and (secret.expires_at is None or secret.expires_at > now)
    )
    return ApiKeyView(
        id=row.id,
        name=row.name,
        organization_id=row.organization_id,
        environment=row.environment,
        status=_status(row, now),
        scopes=tuple(row.scopes.split(" ")),
        audiences=tuple(row.audiences.split(" ")),
        mask=row.mask,
        created_at=row.created_at,
        expires_at=row.expires_at,
        disabled_at=row.disabled_at,
        revoked_at=row.revoked_at,
        last_used_at=usage.last_used_at if usage else None,
        tokens_issued=usage.tokens_issued if usage else 0,
        raw_key_uses=usage.raw_key_uses if usage else 0,
        secrets=working,
    )


def _status(row: ApiKey, now: int) -> str:
    if row.revoked_at is not None:
        return "revoked"
    if row.expires_at is not None and row.expires_at <= now:
        return "expired"
    return "active" if row.disabled_at is None else "disabled"


# --- rules


def _checked(catalog: Catalog, new: NewApiKey, now: int, issuer: str) -> _Template:
    environment = new.environment or catalog.default_environment
    if environment not in catalog.environments:
        raise Invalid("env", f"is one of {', '.join(catalog.environments)}")
    if new.expires_at is not None and new.expires_at <= now:
        raise Invalid("expiresAt", "lies in the past")
    audiences = tuple(dict.fromkeys(new.audiences)) or (catalog.default_audiences[environment],)
    for audience in audiences:
        known = catalog.audiences.get(audience)
        if known is None or known.environment not in (None, environment):
            fitting = ", ".join(
                one.id
                for one in catalog.audiences.values()
                if one.environment in (None, environment)
            )
            raise Invalid("audiences", f"each is one of: {fitting}")
    try:
        scopes = Scopes.of(new.scopes or (EVERYTHING,))
    except MalformedScope as error:
        raise Invalid("scopes", str(error)) from None
    if not scopes:
        raise Invalid("scopes", "must not be empty")
    template = _Template(
        organization_id=new.organization_id,
        name=forms.name(new.name),
        environment=environment,
        scopes=str(scopes),
        audiences=" ".join(audiences),
        expires_at=new.expires_at,
        detail={"name": new.name.strip(), "scopes": str(scopes)},
    )
    _require_fit(template, issuer)
    return template


def _require_fit(template: _Template, issuer: str) -> None:
    """The longest token that this API key can ask for has to fit into the profile."""
    claims = {
        "iss": issuer,
        "aud": max(template.audiences.split(" "), key=len),
        "sub": f"key_{'0' * ids.WIDTH}",
        "client_id": f"key_{'0' * ids.WIDTH}",
        "org_id": template.organization_id,
        "env": template.environment,
        "scope": template.scopes,
    }
    try:
        token_profile.check(claims)
    except token_profile.UnfitClaims:
        raise Invalid(
            "scopes",
            f"a token with all of them would be longer than {token_profile.MAX_TOKEN_BYTES} bytes:"
            " give fewer, or split them over several API keys",
        ) from None
