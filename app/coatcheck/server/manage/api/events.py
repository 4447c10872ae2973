"""`/events`: what happened to what credentials may do, and what their owners should look at."""

from typing import Final, Literal

from pydantic import Field

from coatcheck.scope import OPERATOR
from coatcheck.server.manage import events
from coatcheck.server.manage.api.call import Call, Route, forbidden
from coatcheck.server.manage.api.wire import (
    MAX_LIMIT,
    Answer,
    Query,
    invalid,
    page,
    position_of,
)
from coatcheck.server.manage.errors import Beyond

_LONGEST: Final = 128


class EventsQuery(Query):
    organization: str | None = None
    scope: Literal["organization", "platform"] = "organization"
    subject: str | None = Field(default=None, min_length=1, max_length=_LONGEST)
    what: str | None = Field(default=None, min_length=1, max_length=_LONGEST)
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def show_list(call: Call) -> Answer:
    """The newest first.

    A page looks at a bounded number of rows: one that finds few of what is asked for is short,
    and says where to go on.
    """
    asked = call.query(EventsQuery)
    organization_id = _organization_id(call, asked)
    # Of the same list, whenever it is asked for.
    scope = repr(("events", organization_id, asked.model_dump(exclude={"cursor", "limit"})))
    rows, before = call.tx.events(
        organization_id,
        _position(position_of(asked.cursor, scope)),
        asked.limit,
        subject=asked.subject,
        what=asked.what,
        of_platform=organization_id is None,
    )
    following = None if before is None else str(before)
    return page([events.told(row) for row in rows], following, scope)


def _organization_id(call: Call, asked: EventsQuery) -> str | None:
    """Whose events are wanted; None: those that are of no organization."""
    if asked.scope == "platform":
        if not call.caller.is_operator:
            raise forbidden(OPERATOR)
        if asked.organization is not None:
            raise invalid((("/organization", "has no place in the scope platform"),))
        return None
    organization = call.organization(asked.organization)
    if call.caller.project_id is not None:
        raise Beyond(("project_id",))
    return organization.id


def _position(text: str) -> int | None:
    if text and not text.isdecimal():
        raise invalid((("/cursor", "is the nextCursor of the page before"),))
    return int(text) if text else None


READ: Final = "audit:read"

ROUTES: Final[tuple[Route, ...]] = (Route("GET", "/events", READ, show_list, writes=False),)
