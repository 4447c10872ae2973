"""`/organizations`: the operator's customers; everybody else sees its own."""

from dataclasses import replace
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS
from coatcheck.server.manage import forms, organizations
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
from coatcheck.server.manage.errors import Beyond
from coatcheck.server.manage.organizations import Editable, OrganizationView


def _as_span(given: object) -> object:
    """A number of seconds as the text that it stands for."""
    if type(given) is int:
        return f"{given}s"
    if given is not None and not isinstance(given, str):
        raise ValueError("write a number of seconds, or a span such as 90d")
    return given


class NewOrganizationBody(Body):
    """What `POST /organizations` takes."""

    name: str
    bootstrap: bool = False


class EditBody(Body):
    """What `PATCH /organizations/{organization}` takes; what is left out stays (RFC 7396)."""

    name: str = ""
    recoverable: bool = False
    max_lifetime: Annotated[str | None, BeforeValidator(_as_span)] = None
    credit_limit: float | None = None
    low_credit: float | None = None


class ListQuery(Query):
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def create(call: Call) -> Answer:
    body = call.body(NewOrganizationBody)
    made = organizations.create(call.store, body.name, call.caller.actor, now=call.now)
    if body.bootstrap:
        return _bootstrapped(call, made.id)
    return _told(made, 201, {"Location": _location(call, made.id)})


def show_list(call: Call) -> Answer:
    """All of them for the operator, one's own for everybody else."""
    asked = call.query(ListQuery)
    own = None if call.caller.is_operator else call.caller.organization_id
    scope = repr(("organizations", own))
    after = position_of(asked.cursor, scope)
    if own is None:
        found, following = organizations.page(call.store, after=after, limit=asked.limit)
        return page([one.to_json() for one in found], following, scope)
    if not any(call.caller.may(permission) for permission in ORGANIZATION_PERMISSIONS):
        raise forbidden("keys:read")
    return page([organizations.view(call.organization()).to_json()], None, scope)


def show(call: Call) -> Answer:
    row = call.organization(call.parameters["organization"])
    if not call.caller.is_operator:
        call.require("keys:read")
    return _told(organizations.view(row))


def edit(call: Call) -> Answer:
    row = call.organization(call.parameters["organization"])
    if not call.caller.is_operator:
        call.require("org:admin")
    if call.caller.project_id is not None:
        raise Beyond(("project_id",))
    body = call.body(EditBody)
    if not call.caller.is_operator and body.model_fields_set & {"credit_limit", "low_credit"}:
        # What an organization may spend is between it and the operator.
        raise forbidden(OPERATOR)
    require_match(call.request, etag_of(organizations.view(row).to_json()))
    edited = organizations.edit(
        call.store,
        call.catalog,
        row.id,
        lambda before: _changed(before, body),
        call.caller.actor,
        now=call.now,
    )
    return _told(edited)


def suspend(call: Call) -> Answer:
    row = call.organization(call.parameters["organization"])
    return _told(organizations.suspend(call.store, row.id, call.caller.actor, now=call.now))


def resume(call: Call) -> Answer:
    row = call.organization(call.parameters["organization"])
    return _told(organizations.resume(call.store, row.id, call.caller.actor, now=call.now))


def bootstrap(call: Call) -> Answer:
    row = call.organization(call.parameters["organization"])
    return _bootstrapped(call, row.id)


def _bootstrapped(call: Call, organization_id: str) -> Answer:
    done = organizations.bootstrap(
        call.store,
        call.catalog,
        organization_id,
        call.caller.actor,
        now=call.now,
        issuer=call.office.issuer,
    )
    told = done.to_json()
    headers = {"Location": _location(call, organization_id)}
    without_secret = done.admin.to_json() | {"key": None}
    return Answer(201, told, headers, replayed=told | {"key": without_secret})


def _changed(before: Editable, body: EditBody) -> Editable:
    """What an organization shall be after an edit.  Raises Invalid."""
    given = body.model_fields_set
    changes: dict[str, Any] = {
        name: getattr(body, name) for name in ("name", "recoverable") if name in given
    }
    if "max_lifetime" in given:
        text = body.max_lifetime
        changes["max_lifetime_s"] = None if text is None else forms.duration("maxLifetime", text)
    for name, told in (("credit_limit", "creditLimit"), ("low_credit", "lowCredit")):
        if name in given:
            amount = getattr(body, name)
            changes[name] = None if amount is None else forms.credit(told, amount)
    return replace(before, **changes)


def _told(
    organization: OrganizationView, status: int = 200, headers: dict[str, str] | None = None
) -> Answer:
    told = organization.to_json()
    return Answer(status, told, (headers or {}) | {"ETag": etag_of(told)})


def _location(call: Call, organization_id: str) -> str:
    return f"{call.office.issuer}/v1/organizations/{organization_id}"


_ONE: Final = "/organizations/{organization}"

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/organizations", None, show_list, writes=False),
    Route("POST", "/organizations", OPERATOR, create, ensures_signing_keys=True),
    Route("GET", _ONE, None, show, writes=False, needs_bootstrap=False),
    Route("PATCH", _ONE, None, edit),
    Route("POST", f"{_ONE}/suspend", OPERATOR, suspend),
    Route("POST", f"{_ONE}/resume", OPERATOR, resume),
    Route(
        "POST",
        f"{_ONE}/bootstrap",
        OPERATOR,
        bootstrap,
        needs_bootstrap=False,
        ensures_signing_keys=True,
    ),
)
