"""What each operation of the management API needs, and a request that does it.

Written from the contract, not from the table of routes: a route that needs less than its line
says is what the tests are after.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from rights.cast import MANAGEMENT


@dataclass(frozen=True, slots=True)
class Things:
    """The ids that a request may name.

    Attributes:
        organization: that a request's path names.
        of: that its body or query names; None: it names none.
    """

    organization: str
    key: str
    project: str
    member: str
    group: str
    device: str = "a-laptop"
    of: str | None = None


Values = Callable[[Things], Mapping[str, object]]


def _nothing(things: Things) -> Mapping[str, object]:
    return {}


@dataclass(frozen=True, slots=True)
class Line:
    """One operation.

    Attributes:
        needs: any one of these permissions lets in; None: any credential for this audience does.
        status: of the answer when it is done.
        body: None: it takes none.
        names_organization: `body` or `query`, where an organization may be named; None: nowhere.
        is_always_open: whether it answers before the organization is bootstrapped.
    """

    needs: tuple[str, ...] | None
    status: int = 200
    body: Values | None = None
    query: Values = _nothing
    names_organization: str | None = None
    is_always_open: bool = False


READ: Final = ("keys:read",)
WRITE: Final = ("keys:write",)
ADMIN: Final = ("org:admin",)
OPERATORS: Final = (OPERATOR,)


def _key(things: Things) -> Mapping[str, object]:
    # Within whoever may write API keys at all.
    return {"name": "made", "scopes": ["keys:write"], "audiences": [MANAGEMENT]}


LINES: Final[Mapping[str, Line]] = {
    "GET /whoami": Line(None, is_always_open=True),
    "GET /catalog": Line(None, is_always_open=True),
    # --- API keys
    "POST /keys": Line(WRITE, 201, _key, names_organization="body"),
    "GET /keys": Line(READ, names_organization="query"),
    "POST /keys/search": Line(READ, 200, lambda _: {"query": "key"}, names_organization="body"),
    "GET /keys/{key}": Line(READ),
    "PATCH /keys/{key}": Line(WRITE, 200, lambda _: {"name": "edited"}),
    "DELETE /keys/{key}": Line(WRITE, 204),
    "POST /keys/{key}/disable": Line(WRITE),
    "POST /keys/{key}/enable": Line(WRITE),
    "POST /keys/{key}/revoke": Line(WRITE),
    "POST /keys/{key}/rotate": Line(WRITE, 200, lambda _: {"overlap": "1h"}),
    "POST /keys/{key}/end-overlap": Line(WRITE),
    "POST /keys/{key}/reveal": Line(WRITE),
    "GET /keys/{key}/usage": Line(("usage:read",)),
    # --- usage and events
    "POST /usage": Line(
        (RESOURCE_SERVER, "usage:write"),
        200,
        lambda things: {"reports": [{"id": "a-report", "key": things.key, "requests": 3}]},
    ),
    "GET /usage": Line(("usage:read",), names_organization="query"),
    "GET /events": Line(("audit:read",), names_organization="query"),
    # --- organizations and what is in them
    "GET /organizations": Line((*ORGANIZATION_PERMISSIONS, OPERATOR)),
    "POST /organizations": Line(OPERATORS, 201, lambda _: {"name": "a customer"}),
    "GET /organizations/{organization}": Line((*READ, OPERATOR), is_always_open=True),
    "PATCH /organizations/{organization}": Line((*ADMIN, OPERATOR), 200, lambda _: {"name": "new"}),
    "POST /organizations/{organization}/suspend": Line(OPERATORS),
    "POST /organizations/{organization}/resume": Line(OPERATORS),
    "POST /organizations/{organization}/bootstrap": Line(OPERATORS, 409, is_always_open=True),
    "GET /projects": Line(READ, names_organization="query"),
    "POST /projects": Line(ADMIN, 201, lambda _: {"name": "new"}, names_organization="body"),
    "GET /projects/{project}": Line(READ),
    "PATCH /projects/{project}": Line(ADMIN, 200, lambda _: {"name": "new"}),
    "POST /projects/{project}/archive": Line(ADMIN),
    "POST /projects/{project}/restore": Line(ADMIN),
    "GET /members": Line(READ, names_organization="query"),
    "POST /members": Line(
        ("members:write",),
        201,
        lambda _: {"name": "Grace", "email": "grace@example.com", "role": "viewer"},
        names_organization="body",
    ),
    "GET /members/{member}": Line(READ),
    "PATCH /members/{member}": Line(("members:write",), 200, lambda _: {"name": "Grace"}),
    "DELETE /members/{member}": Line(("members:write",), 204),
    # --- what the operator sells
    "GET /groups": Line((*READ, RESOURCE_SERVER, OPERATOR)),
    "POST /groups": Line(OPERATORS, 201, lambda _: {"name": "gold"}),
    "GET /groups/{group}": Line((*READ, RESOURCE_SERVER, OPERATOR)),
    "PATCH /groups/{group}": Line(OPERATORS, 200, lambda _: {"name": "silver"}),
    "DELETE /groups/{group}": Line(OPERATORS, 204),
    # --- devices and agents
    # Of somebody else: one's own need no permission.
    "GET /devices": Line(("members:write",), query=lambda things: {"member": things.member}),
    "PUT /devices/{device}/key": Line(
        ("members:write",), 201, lambda things: {"name": "a laptop", "member": things.member}
    ),
    # A device is signed out by its member, and nobody here is one.
    "DELETE /devices/{device}/key": Line(None, 400),
    "GET /mcp/clients": Line(None, is_always_open=True),
    "POST /mcp/connections": Line(
        WRITE, 201, lambda _: {"client": "cursor"}, names_organization="body"
    ),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A request that a line describes."""

    method: str
    path: str
    body: dict[str, object] | None
    query: dict[str, str]


def question(name: str, things: Things) -> Question:
    """The request of this line, about these things."""
    line = LINES[name]
    method, _, path = name.partition(" ")
    for what in ("organization", "key", "project", "member", "group", "device"):
        path = path.replace(f"{{{what}}}", getattr(things, what))
    body = None if line.body is None else dict(line.body(things))
    query = {parameter: str(value) for parameter, value in line.query(things).items()}
    if things.of is not None and line.names_organization == "query":
        query["organization"] = things.of
    if things.of is not None and line.names_organization == "body":
        body = (body or {}) | {"organization": things.of}
    return Question(method, path, body, query)
