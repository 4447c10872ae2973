"""`/projects`: the parts of an organization that API keys may be bound to."""

from typing import Final

from pydantic import Field

from coatcheck.server.manage import projects
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
from coatcheck.server.manage.projects import ProjectView


class NewProjectBody(Body):
    """What `POST /projects` takes."""

    name: str
    organization: str | None = None


class EditBody(Body):
    """What `PATCH /projects/{project}` takes; what is left out stays (RFC 7396)."""

    name: str = ""


class ListQuery(Query):
    organization: str | None = None
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def create(call: Call) -> Answer:
    body = call.body(NewProjectBody)
    organization = call.organization(body.organization)
    call.require_bootstrapped(organization)
    if call.caller.project_id is not None:
        raise Beyond(("project_id",))
    made = projects.create(call.store, organization.id, body.name, call.caller.actor, now=call.now)
    return _told(made, 201, {"Location": f"{call.office.issuer}/v1/projects/{made.id}"})


def show_list(call: Call) -> Answer:
    """All of an organization's; for a caller that is bound to one, that one."""
    asked = call.query(ListQuery)
    organization = call.organization(asked.organization)
    bound_to = call.caller.project_id
    scope = repr(("projects", organization.id, bound_to))
    after = position_of(asked.cursor, scope)
    if bound_to is not None:
        only = call.project(bound_to)
        seen = [only] if only.organization_id == organization.id else []
        return page([projects.view(row).to_json() for row in seen], None, scope)
    found, following = projects.page(call.store, organization.id, after=after, limit=asked.limit)
    return page([one.to_json() for one in found], following, scope)


def show(call: Call) -> Answer:
    return _told(projects.view(call.project(call.parameters["project"])))


def edit(call: Call) -> Answer:
    row = call.project(call.parameters["project"])
    body = call.body(EditBody)
    require_match(call.request, etag_of(projects.view(row).to_json()))
    name = body.name if "name" in body.model_fields_set else row.name
    return _told(projects.rename(call.store, row.id, name, call.caller.actor, now=call.now))


def archive(call: Call) -> Answer:
    row = call.project(call.parameters["project"])
    return _told(projects.archive(call.store, row.id, call.caller.actor, now=call.now))


def restore(call: Call) -> Answer:
    row = call.project(call.parameters["project"])
    return _told(projects.restore(call.store, row.id, call.caller.actor, now=call.now))


def _told(project: ProjectView, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    told = project.to_json()
    return Answer(status, told, (headers or {}) | {"ETag": etag_of(told)})


READ: Final = "keys:read"
WRITE: Final = "org:admin"

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/projects", READ, show_list, writes=False),
    Route("POST", "/projects", WRITE, create),
    Route("GET", "/projects/{project}", READ, show, writes=False),
    Route("PATCH", "/projects/{project}", WRITE, edit),
    Route("POST", "/projects/{project}/archive", WRITE, archive),
    Route("POST", "/projects/{project}/restore", WRITE, restore),
)
