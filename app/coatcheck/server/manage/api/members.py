"""`/members`: the people of an organization, and their roles."""

from dataclasses import replace
from typing import Any, Final

from pydantic import Field

from coatcheck.scope import Scopes
from coatcheck.server.manage import members
from coatcheck.server.manage.api.call import Call, Route
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
from coatcheck.server.manage.errors import Beyond
from coatcheck.server.manage.members import Editable, MemberView
from coatcheck.server.store.tables import Member


class NewMemberBody(Body):
    """What `POST /members` takes."""

    name: str
    email: str
    role: str
    organization: str | None = None


class EditBody(Body):
    """What `PATCH /members/{member}` takes; what is left out stays (RFC 7396)."""

    name: str = ""
    role: str = ""


class ListQuery(Query):
    organization: str | None = None
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def create(call: Call) -> Answer:
    body = call.body(NewMemberBody)
    organization = call.organization(body.organization)
    call.require_bootstrapped(organization)
    _require_whole_organization(call)
    added = members.add(
        call.store,
        organization.id,
        body.name,
        body.email,
        body.role,
        call.caller.actor,
        now=call.now,
        within=_own_permissions(call),
    )
    return _told(added, 201, {"Location": f"{call.office.issuer}/v1/members/{added.id}"})


def show_list(call: Call) -> Answer:
    asked = call.query(ListQuery)
    organization = call.organization(asked.organization)
    scope = repr(("members", organization.id))
    after = position_of(asked.cursor, scope)
    found, following = members.page(call.store, organization.id, after=after, limit=asked.limit)
    return page([one.to_json() for one in found], following, scope)


def show(call: Call) -> Answer:
    return _told(members.view(_seen(call)))


def edit(call: Call) -> Answer:
    row = _seen(call)
    _require_whole_organization(call)
    body = call.body(EditBody)
    require_match(call.request, etag_of(members.view(row).to_json()))
    edited = members.edit(
        call.store,
        row.id,
        lambda before: _changed(before, body),
        call.caller.actor,
        now=call.now,
        within=_own_permissions(call),
    )
    return _told(edited)


def remove(call: Call) -> Answer:
    row = _seen(call)
    _require_whole_organization(call)
    members.remove(call.store, row.id, call.caller.actor, now=call.now)
    return Answer(204)


def _seen(call: Call) -> Member:
    return call.member(call.parameters["member"])


def _require_whole_organization(call: Call) -> None:
    """A member has to do with every project; whoever is bound to one is not to change it."""
    if call.caller.project_id is not None:
        raise Beyond(("project_id",))


def _own_permissions(call: Call) -> Scopes | None:
    return None if call.caller.is_local else call.caller.permissions


def _changed(before: Editable, body: EditBody) -> Editable:
    changes: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    return replace(before, **changes)


def _told(member: MemberView, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    told = member.to_json()
    return Answer(status, told, (headers or {}) | {"ETag": etag_of(told)})


READ: Final = "keys:read"
WRITE: Final = "members:write"

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/members", READ, show_list, writes=False),
    Route("POST", "/members", WRITE, create),
    Route("GET", "/members/{member}", READ, show, writes=False),
    Route("PATCH", "/members/{member}", WRITE, edit),
    Route("DELETE", "/members/{member}", WRITE, remove),
)
