"""`/whoami` and `/catalog`: who the caller is, and what its product offers."""

from typing import Final

from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api.call import Call, Route
from coatcheck.server.manage.api.wire import Answer


def whoami(call: Call) -> Answer:
    """The caller: its API key, organization, and what it may do here."""
    caller = call.caller
    told: dict[str, object] = {
        "actor": caller.actor.id,
        "organization": caller.organization_id,
        "member": caller.member_id,
        "project": caller.project_id,
        "operator": caller.is_operator,
        "permissions": [str(grant) for grant in caller.permissions],
    }
    if caller.organization_id is not None:
        organization = call.organization()
        told["organizationName"] = organization.name
        told["bootstrapped"] = organization.bootstrapped_at is not None
    if caller.api_key_id is not None:
        row = call.api_key(caller.api_key_id)
        told["key"] = api_keys.shown(call.tx, row, call.now).to_json()
    return Answer(200, told)


def catalog(call: Call) -> Answer:
    """What API keys of this product look like and what they may be for."""
    return Answer(200, call.catalog.to_json())


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/whoami", None, whoami, writes=False, needs_bootstrap=False),
    Route("GET", "/catalog", None, catalog, writes=False, needs_bootstrap=False),
)
