"""`/devices`: the device keys of a member."""

from typing import Final

from pydantic import Field

from coatcheck.server.manage import devices
from coatcheck.server.manage.api.call import Call, Route
from coatcheck.server.manage.api.wire import (
    MAX_LIMIT,
    Answer,
    Body,
    Problem,
    Query,
    page,
    position_of,
)

_LONGEST_SECRET: Final = 200


class SignInBody(Body):
    """What `PUT /devices/{device}/key` takes.

    Attributes:
        name: what people call the device; needed when its key is made.
        current_key: the secret that the device holds, so that it stays.
        member: whose device it is; left out: the caller's.
    """

    name: str | None = None
    current_key: str | None = Field(default=None, max_length=_LONGEST_SECRET, repr=False)
    member: str | None = None


class DevicesQuery(Query):
    member: str | None = None
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)


def sign_in(call: Call) -> Answer:
    body = call.body(SignInBody)
    signed_in = devices.sign_in(
        call.store,
        call.catalog,
        _member_id(call, body.member),
        call.parameters["device"],
        call.caller,
        name=body.name,
        current_key=body.current_key,
        now=call.now,
        issuer=call.office.issuer,
        seal_with=call.office.seal_with,
    )
    headers = {}
    if signed_in.is_new:
        headers["Location"] = f"{call.office.issuer}/v1/keys/{signed_in.api_key.id}"
    return Answer(201 if signed_in.is_new else 200, signed_in.to_json(), headers)


def sign_out(call: Call) -> Answer:
    member_id = _member_id(call, None)
    devices.sign_out(call.store, member_id, call.parameters["device"], call.caller, now=call.now)
    return Answer(204)


def show_list(call: Call) -> Answer:
    asked = call.query(DevicesQuery)
    member_id = _member_id(call, asked.member)
    found = devices.page(
        call.store,
        member_id,
        project_id=call.caller.project_id,
        now=call.now,
        after=position_of(asked.cursor, member_id),
        # One more than are shown tells whether there are more.
        limit=asked.limit + 1,
    )
    shown = found[: asked.limit]
    following = shown[-1].device if len(found) > asked.limit else None
    return page([one.to_json() for one in shown], following, member_id)


def _member_id(call: Call, named: str | None) -> str:
    """Whose device it is: the named member's, for who may manage members; else the caller's own.

    Raises:
        NotFound: the caller does not see this member.
        Problem: the caller may not name another, or is no member and names none.
    """
    own = call.caller.member_id
    if named is not None and named != own:
        call.require("members:write")
        member = call.member(named)
        call.require_bootstrapped(call.organization(member.organization_id))
        return member.id
    if own is None:
        raise Problem(
            400,
            "member_required",
            "This API key is no member's: sign in with a member's own, or name the member.",
            (("/member", "is missing"),),
        )
    return own


ROUTES: Final[tuple[Route, ...]] = (
    # No permission: it is membership that gives it.
    Route("GET", "/devices", None, show_list, writes=False),
    Route("PUT", "/devices/{device}/key", None, sign_in),
    Route("DELETE", "/devices/{device}/key", None, sign_out),
)
