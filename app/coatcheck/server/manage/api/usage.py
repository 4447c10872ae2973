"""`/usage` and `/keys/{key}/usage`: resource servers tell what was consumed, owners see it."""

from typing import Annotated, Final

from pydantic import Field

from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.manage import forms, usage
from coatcheck.server.manage.api.call import Call, Route, forbidden
from coatcheck.server.manage.api.wire import Answer, Body, Query
from coatcheck.server.manage.errors import Beyond
from coatcheck.server.manage.usage import Report
from coatcheck.server.store.transaction import Reported

#: Of one kind of thing, in one report.
_MOST: Final = 10**12
#: Reports of one call.  A body has at most 64 KiB, which may hold fewer.
_MOST_REPORTS: Final = 1000

Number = Annotated[int, Field(ge=0, le=_MOST)]


class ReportBody(Body):
    """What one API key consumed."""

    id: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")
    # What is told back must not be a secret in the wrong place.
    key: str = Field(pattern=r"^key_[0-9A-Za-z]{22}$")
    requests: Number = 1
    input_tokens: Number = 0
    output_tokens: Number = 0
    credits: int | float = 0
    agent_runs: Number = 0
    at: str | None = None


class ReportsBody(Body):
    """What `POST /usage` takes."""

    reports: list[ReportBody] = Field(min_length=1, max_length=_MOST_REPORTS)


class OrganizationQuery(Query):
    organization: str | None = None


def report(call: Call) -> Answer:
    if not (call.caller.may(RESOURCE_SERVER) or call.caller.may(WRITE)):
        raise forbidden(RESOURCE_SERVER)
    # Without the platform's permission one reports of one's own organization only.
    own = None
    if not call.caller.may(RESOURCE_SERVER):
        organization = call.organization()
        call.require_bootstrapped(organization)
        own = organization.id
    body = call.body(ReportsBody)
    reports = [_report(number, one, call.now) for number, one in enumerate(body.reports)]
    counted = usage.report(
        call.store, call.catalog, reports, call.caller.actor, now=call.now, own=own
    )
    return Answer(200, counted.to_json())


def of_key(call: Call) -> Answer:
    # What was used stays used, whatever became of the API key.
    row = call.api_key(call.parameters["key"], or_deleted=True)
    return Answer(200, usage.of_api_key(row, call.tx.usage([row.id]).get(row.id)))


def of_organization(call: Call) -> Answer:
    organization = call.organization(call.query(OrganizationQuery).organization)
    if call.caller.project_id is not None:
        raise Beyond(("project_id",))
    used = call.tx.organization_usage(organization.id)
    return Answer(200, usage.of_organization(organization, used))


def _report(number: int, one: ReportBody, now: int) -> Report:
    place = f"reports/{number}"
    at = now if one.at is None else max(0, forms.instant(f"{place}/at", one.at))
    used = Reported(
        requests=one.requests,
        input_tokens=one.input_tokens,
        output_tokens=one.output_tokens,
        credits=forms.credit(f"{place}/credits", one.credits),
        agent_runs=one.agent_runs,
        last_used_at=at,
    )
    return Report(one.id, one.key, used)


READ: Final = "usage:read"
WRITE: Final = "usage:write"

ROUTES: Final[tuple[Route, ...]] = (
    Route("POST", "/usage", None, report, needs_bootstrap=False),
    Route("GET", "/usage", READ, of_organization, writes=False),
    Route("GET", "/keys/{key}/usage", READ, of_key, writes=False),
)
