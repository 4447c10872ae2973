"""`/groups`: the operator's pricing tiers, for everybody who chooses or applies one to read."""

from dataclasses import replace
from typing import Any, Final

from pydantic import Field

from coatcheck.scope import OPERATOR, RESOURCE_SERVER
from coatcheck.server.manage import forms, groups
from coatcheck.server.manage.api.call import Call, Route, forbidden
from coatcheck.server.manage.api.wire import (
    MAX_LIMIT,
    Answer,
    Body,
    Query,
    etag_of,
    page,
    position_of,
    require_match,
)
from coatcheck.server.manage.groups import GroupTerms, GroupView


class NewGroupBody(Body):
    """What `POST /groups` takes."""

    name: str
    price_multiplier: float = 1
    models: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class EditBody(Body):
    """What `PATCH /groups/{group}` takes; what is left out stays (RFC 7396)."""

    name: str = ""
    price_multiplier: float = 1
    models: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class ListQuery(Query):
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def create(call: Call) -> Answer:
    body = call.body(NewGroupBody)
    terms = _changed(GroupTerms(body.name), body, set(NewGroupBody.model_fields))
    made = groups.create(call.store, call.catalog, terms, call.caller.actor, now=call.now)
    return _told(made, 201, {"Location": f"{call.office.issuer}/v1/groups/{made.id}"})


def show_list(call: Call) -> Answer:
    _require_reader(call)
    asked = call.query(ListQuery)
    after = position_of(asked.cursor, "groups")
    found, following = groups.page(call.store, after=after, limit=asked.limit)
    return page([one.to_json() for one in found], following, "groups")


def show(call: Call) -> Answer:
    _require_reader(call)
    return _told(groups.show(call.store, call.parameters["group"]))


def edit(call: Call) -> Answer:
    current = groups.show(call.store, call.parameters["group"])
    body = call.body(EditBody)
    require_match(call.request, etag_of(current.to_json()))
    edited = groups.edit(
        call.store,
        call.catalog,
        current.id,
        lambda before: _changed(before, body, body.model_fields_set),
        call.caller.actor,
        now=call.now,
    )
    return _told(edited)


def delete(call: Call) -> Answer:
    groups.delete(call.store, call.parameters["group"], call.caller.actor, now=call.now)
    return Answer(204)


def _require_reader(call: Call) -> None:
    """Owners of API keys, resource servers and the operator.  Raises Problem."""
    if not any(call.caller.may(one) for one in (READ, RESOURCE_SERVER, OPERATOR)):
        raise forbidden(READ)


def _changed(before: GroupTerms, body: NewGroupBody | EditBody, given: set[str]) -> GroupTerms:
    """What a group shall be with what was given of a body.  Raises Invalid."""
    changes: dict[str, Any] = {name: getattr(body, name) for name in given}
    if "price_multiplier" in given:
        price = forms.credit("priceMultiplier", body.price_multiplier)
        changes["price_multiplier"] = price
    if "models" in given:
        changes["models"] = None if body.models is None else tuple(body.models)
    return replace(before, **changes)


def _told(group: GroupView, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    told = group.to_json()
    return Answer(status, told, (headers or {}) | {"ETag": etag_of(told)})


READ: Final = "keys:read"

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/groups", None, show_list, writes=False),
    Route("POST", "/groups", OPERATOR, create),
    Route("GET", "/groups/{group}", None, show, writes=False),
    Route("PATCH", "/groups/{group}", OPERATOR, edit),
    Route("DELETE", "/groups/{group}", OPERATOR, delete),
)
