"""`/keys`: the API keys of an organization, from their making to their end."""

from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field

from coatcheck import apikey
from coatcheck.server.manage import api_keys, forms
from coatcheck.server.manage.api.call import Call, Route
from coatcheck.server.manage.api.wire import (
    MAX_LIMIT,
    Answer,
    Body,
    Query,
    etag_of,
    invalid,
    page,
    position_of,
    require_match,
)
from coatcheck.server.manage.api_key_rules import MEMBER
from coatcheck.server.manage.api_key_view import COUNTED, ApiKeyView
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.store.pages import Filter, Position, Status
from coatcheck.server.store.tables import ApiKey

_DAY: Final = 86_400
#: How long the replaced secret works on, unless said otherwise: a day.
_DEFAULT_OVERLAP: Final = "24h"
_LONGEST_QUERY: Final = 200

# Not `int | float`: a union would point to an input that is not there, `/creditLimit/int`.
Amount = float | None


class NewApiKeyBody(Body):
    """What `POST /keys` takes."""

    name: str
    organization: str | None = None
    project: str | None = None
    env: str | None = None
    scopes: list[str] = Field(default_factory=list)
    audiences: list[str] = Field(default_factory=list)
    permissions: str | None = None
    cidrs: list[str] | None = None
    models: list[str] | None = None
    group: str | None = None
    credit_limit: Amount = None
    expires_at: str | None = None
    member: str | None = None


class EditBody(Body):
    """What `PATCH /keys/{key}` takes; what is left out stays (RFC 7396)."""

    name: str = ""
    project: str | None = None
    scopes: list[str] | None = None
    audiences: list[str] | None = None
    permissions: str | None = None
    cidrs: list[str] | None = None
    models: list[str] | None = None
    group: str | None = None
    credit_limit: Amount = None
    expires_at: str | None = None


class RotateBody(Body):
    overlap: str = _DEFAULT_OVERLAP


class SearchBody(Body):
    query: str = Field(min_length=1, max_length=_LONGEST_QUERY)
    organization: str | None = None
    status: Status = "all"


class ListQuery(Query):
    organization: str | None = None
    status: Status = "active"
    project: str | None = None
    env: str | None = None
    kind: Literal["standard", "device", "connector", "member"] | None = None
    member: str | None = None
    group: str | None = None
    name: str | None = Field(default=None, max_length=_LONGEST_QUERY)
    unused_days: int | None = Field(default=None, ge=1, le=3650)
    expiring_days: int | None = Field(default=None, ge=1, le=3650)
    order: Literal["asc", "desc"] = "asc"
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


class DryRunQuery(Query):
    dry_run: bool = False


class ConfirmQuery(Query):
    confirm: bool = False


def create(call: Call) -> Answer:
    body = call.body(NewApiKeyBody)
    organization = call.organization(body.organization)
    call.require_bootstrapped(organization)
    new = NewApiKey(
        organization_id=organization.id,
        name=body.name,
        scopes=body.scopes,
        audiences=body.audiences,
        environment=body.env or _own_environment(call),
        expires_at=_moment(body.expires_at, call.now),
        project_id=body.project or call.caller.project_id,
        networks=body.cidrs,
        permissions=body.permissions,
        models=body.models,
        group_id=body.group,
        credit_limit=_credit(body.credit_limit),
        created_by=call.caller.actor.id,
    )
    if body.member is not None:
        new = _for_member(call, new, body.member)
    made = api_keys.create(
        call.store,
        call.catalog,
        new,
        call.caller.actor,
        now=call.now,
        issuer=call.office.issuer,
        within=call.caller.bounds,
        seal_with=call.office.seal_with,
    )
    return shown_once(call, made, 201)


def show_list(call: Call) -> Answer:
    asked = call.query(ListQuery)
    organization = call.organization(asked.organization)
    filters = Filter(
        status=asked.status,
        project_id=call.caller.project_id or asked.project,
        environment=asked.env,
        kind=asked.kind,
        member_id=asked.member,
        group_id=asked.group,
        text=asked.name,
        unused_since=asked.unused_days and call.now - asked.unused_days * _DAY,
        ends_before=asked.expiring_days and call.now + asked.expiring_days * _DAY,
        newest_first=asked.order == "desc",
    )
    # Of the same list, whenever it is asked for.
    scope = repr((organization.id, asked.model_dump(exclude={"cursor", "limit"})))
    if call.caller.project_id is not None and asked.project not in (None, call.caller.project_id):
        return page([], None, scope)
    found = api_keys.page(
        call.store,
        organization.id,
        filters,
        now=call.now,
        after=_position(position_of(asked.cursor, scope)),
        limit=asked.limit,
    )
    following = found.following and f"{found.following.at}:{found.following.id}"
    return page([one.to_json() for one in found.api_keys], following, scope)


def search(call: Call) -> Answer:
    """By id, by a pasted secret, by name or last four characters.

    In a body, because what is pasted into a search field may be an API key, and addresses get
    logged.
    """
    body = call.body(SearchBody)
    organization = call.organization(body.organization)
    text = body.query.strip()
    found: list[ApiKeyView] = []
    if _may_be_secret(call, text):
        row = call.tx.api_key_by_digest(apikey.digest(text))
        found = _seen(call, row)
    elif text.startswith("key_"):
        found = _seen(call, call.tx.api_key(text))
    elif text:
        filters = Filter(status=body.status, project_id=call.caller.project_id, text=text)
        found = api_keys.page(
            call.store, organization.id, filters, now=call.now, after=None, limit=MAX_LIMIT
        ).api_keys
    data = [one.to_json() for one in found if one.organization_id == organization.id]
    return page(data, None, "")


def show(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    return _told(api_keys.shown(call.tx, row, call.now))


def edit(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    body = call.body(EditBody)
    is_dry_run = call.query(DryRunQuery).dry_run
    if not is_dry_run:
        current = etag_of(api_keys.shown(call.tx, row, call.now).to_json(), without=COUNTED)
        require_match(call.request, current)
    edited = api_keys.edit(
        call.store,
        call.catalog,
        row.id,
        lambda before: _within_role(call, row, _changed(before, body, call.now)),
        call.caller.actor,
        now=call.now,
        issuer=call.office.issuer,
        within=call.caller.bounds,
        dry_run=is_dry_run,
    )
    etag = etag_of(edited.api_key.to_json(), without=COUNTED)
    return Answer(200, edited.to_json(), {} if is_dry_run else {"ETag": etag})


def disable(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    if not call.catalog.policies.may_disable:
        raise Conflict(
            "API keys are not disabled here: revoke it, which is final", "disable_not_offered"
        )
    return _told(api_keys.disable(call.store, row.id, call.caller.actor, now=call.now))


def enable(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    enabled = api_keys.enable(
        call.store,
        row.id,
        call.caller.actor,
        now=call.now,
        catalog=call.catalog,
        within=call.caller.bounds,
    )
    return _told(enabled)


def revoke(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    return _told(api_keys.revoke(call.store, row.id, call.caller.actor, now=call.now))


def rotate(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    overlap = call.body(RotateBody).overlap
    made = api_keys.rotate(
        call.store,
        row.id,
        call.caller.actor,
        overlap_s=_overlap(overlap, call.now),
        now=call.now,
        catalog=call.catalog,
        within=call.caller.bounds,
        seal_with=call.office.seal_with,
    )
    return shown_once(call, made, 200)


def end_overlap(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    return _told(api_keys.end_overlap(call.store, row.id, call.caller.actor, now=call.now))


def reveal(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    if not (call.caller.may("org:admin") or row.created_by == call.caller.actor.id):
        # Whoever made it has seen it once; nobody else but who administers all of them.
        raise NotFound("only its creator and administrators may see an API key again")
    made = api_keys.reveal(
        call.store,
        row.id,
        call.caller.actor,
        call.office.sealing_keys(),
        now=call.now,
        catalog=call.catalog,
        within=call.caller.bounds,
    )
    return shown_once(call, made, 200)


def delete(call: Call) -> Answer:
    row = call.api_key(call.parameters["key"])
    is_confirmed = call.query(ConfirmQuery).confirm
    api_keys.delete(
        call.store,
        call.catalog,
        row.id,
        call.caller.actor,
        now=call.now,
        is_confirmed=is_confirmed,
    )
    return Answer(204)


def shown_once(call: Call, made: Created, status: int) -> Answer:
    """The answer that shows a secret, and what is told to who asks for the same again."""
    told = made.to_json()
    headers = {"ETag": etag_of(made.api_key.to_json(), without=COUNTED)}
    if status == 201:  # noqa: PLR2004 - RFC 9110 §15.3.2
        headers["Location"] = f"{call.office.issuer}/v1/keys/{made.api_key.id}"
    return Answer(status, told, headers, replayed=told | {"key": None})


def _told(api_key: ApiKeyView) -> Answer:
    told = api_key.to_json()
    return Answer(200, told, {"ETag": etag_of(told, without=COUNTED)})


def _seen(call: Call, row: ApiKey | None) -> list[ApiKeyView]:
    """The API key, if there is one that the caller sees."""
    if row is None:
        return []
    try:
        return [api_keys.shown(call.tx, call.api_key(row.id), call.now)]
    except NotFound:
        return []


def _may_be_secret(call: Call, text: str) -> bool:
    return apikey.looks_like_one(text) or text.startswith(call.catalog.foreign_prefixes or ("\0",))


def _own_environment(call: Call) -> str | None:
    """The environment of a caller that can make API keys for no other."""
    bounds = call.caller.bounds
    return None if bounds is None or bounds.any_environment else bounds.rights.environment


def _for_member(call: Call, new: NewApiKey, member_id: str) -> NewApiKey:
    """A member's own API key for management: it may what the member's role allows, no more."""
    from coatcheck.server.manage import members  # noqa: PLC0415 - members make API keys, too

    call.require("members:write")
    member = call.member(member_id)
    return members.own_api_key(member, new, call.catalog)


def _within_role(call: Call, row: ApiKey, new: NewApiKey) -> NewApiKey:
    """The same, if a member's own API key stays within its member's role.  Raises Invalid."""
    if row.kind != MEMBER or row.member_id is None:
        return new
    from coatcheck.server.manage import members  # noqa: PLC0415 - members make API keys, too

    return members.own_api_key(call.member(row.member_id), new, call.catalog)


def _changed(before: NewApiKey, body: EditBody, now: int) -> NewApiKey:
    """What an API key shall be after an edit.  Raises Invalid."""
    given = body.model_fields_set
    changes: dict[str, Any] = {}
    if "name" in given:
        changes["name"] = body.name
    for name in ("scopes", "audiences"):
        if name in given:
            if not getattr(body, name):
                raise Invalid(name, "must not be empty: name one, or leave it out to keep them")
            changes[name] = tuple(getattr(body, name))
    renamed = {
        "project": "project_id",
        "permissions": "permissions",
        "cidrs": "networks",
        "models": "models",
        "group": "group_id",
    }
    changes |= {own: getattr(body, name) for name, own in renamed.items() if name in given}
    if "credit_limit" in given:
        changes["credit_limit"] = _credit(body.credit_limit)
    if "expires_at" in given:
        changes["expires_at"] = _moment(body.expires_at, now)
    return replace(before, **changes)


def _moment(text: str | None, now: int) -> int | None:
    return None if text is None else forms.moment("expiresAt", text, now)


def _credit(amount: Amount) -> int | None:
    return None if amount is None else forms.credit("creditLimit", amount)


def _overlap(text: str, now: int) -> int:
    """An overlap as seconds: a span, none, or up to a date."""
    try:
        return forms.duration("overlap", text)
    except Invalid:
        if not text[:4].isdigit():
            raise
    return forms.moment("overlap", text, now) - now


def _position(text: str) -> Position | None:
    if not text:
        return None
    at, _, api_key_id = text.partition(":")
    if not at.isdecimal():
        raise invalid((("/cursor", "is the nextCursor of the page before"),))
    return Position(int(at), api_key_id)


READ: Final = "keys:read"
WRITE: Final = "keys:write"

ROUTES: Final[tuple[Route, ...]] = (
    Route("POST", "/keys", WRITE, create),
    Route("GET", "/keys", READ, show_list, writes=False),
    Route("POST", "/keys/search", READ, search),
    Route("GET", "/keys/{key}", READ, show, writes=False),
    Route("PATCH", "/keys/{key}", WRITE, edit),
    Route("DELETE", "/keys/{key}", WRITE, delete),
    Route("POST", "/keys/{key}/disable", WRITE, disable),
    Route("POST", "/keys/{key}/enable", WRITE, enable),
    Route("POST", "/keys/{key}/revoke", WRITE, revoke),
    Route("POST", "/keys/{key}/rotate", WRITE, rotate),
    Route("POST", "/keys/{key}/end-overlap", WRITE, end_overlap),
    Route("POST", "/keys/{key}/reveal", WRITE, reveal),
)
