"""Usage: what resource servers report of their callers, what it costs, and who has none left.

A report is counted once, however often it is sent, and in the transaction that counts it an API
key ends that has reached its limit, and an organization that has reached its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import EVERYTHING, Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.api_keys import change_of
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import ApiKey, ApiKeyUsage, Organization, OrganizationUsage
from coatcheck.server.store.transaction import Credit, Reported

#: Seconds for which a report is known by its name.
REMEMBERED: Final = 24 * 3600
#: Whoever reports is the operator's, and nobody whom the owners of API keys know.
_ACTOR: Final = "service:usage"
#: An API key's credit is low below this part of its limit.
_LOW: Final = 10


@dataclass(frozen=True, slots=True)
class Report:
    """What one API key consumed.

    Attributes:
        name: names the report; the reporter's own.
        used: `last_used_at` in the future counts as now.
    """

    name: str
    api_key_id: str
    used: Reported


@dataclass(frozen=True, slots=True)
class Counted:
    """What came of reports.

    Attributes:
        known: how many had been counted before.
        unknown: API keys that there are none of; nothing is remembered of their reports.
    """

    counted: int
    known: int
    unknown: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {"counted": self.counted, "known": self.known, "unknown": list(self.unknown)}


def report(
    store: Transactions,
    catalog: Catalog,
    reports: Sequence[Report],
    reporter: Actor,
    *,
    now: int,
    own: str | None = None,
) -> Counted:
    """Count what API keys consumed; in an environment that is free, at no credits.

    Args:
        own: the one organization whose API keys the reporter knows; None: every one.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    with store.transaction() as tx:
        metered = {
            api_key_id: (organization_id, environment)
            for api_key_id, (organization_id, environment) in tx.metered(
                {one.api_key_id for one in reports}
            ).items()
            if own in (None, organization_id)
        }
        named = {
            f"{reporter.id} {one.name}": one
            # The first of a name counts.
            for one in reversed(reports)
            if one.api_key_id in metered
        }
        tx.forget_usage_reports(before_at=now - REMEMBERED)
        new = tx.add_usage_reports(named, at=now)
        of_api_keys: dict[str, Reported] = {}
        of_organizations: dict[str, Reported] = {}
        for name in sorted(new):
            one = named[name]
            organization_id, environment = metered[one.api_key_id]
            used = one.used._replace(last_used_at=min(one.used.last_used_at, now))
            if catalog.is_free(environment):
                used = used._replace(credits=0)
            _add(of_api_keys, one.api_key_id, used)
            _add(of_organizations, organization_id, used)
        tx.add_reported(of_api_keys, of_organizations)
        actor = Actor(_ACTOR, request_id=reporter.request_id)
        changes = [
            *_of_organizations(tx, of_organizations, actor, now),
            *_of_api_keys(tx, of_api_keys, actor, now),
        ]
        if changes:
            tx.append(changes)
    unknown = dict.fromkeys(one.api_key_id for one in reports if one.api_key_id not in metered)
    told = sum(one.api_key_id in metered for one in reports)
    return Counted(len(new), told - len(new), tuple(unknown))


def settle_organization(
    tx: Transaction, organization: Organization, actor: Actor, now: int
) -> None:
    """Stop an organization whose credit is used up, or let one go on whose limit was raised.

    Call it last, with whatever changes the limit: it appends to the change log.
    """
    if changes := _settled(tx, organization, actor, now):
        tx.append(changes)


def of_api_key(row: ApiKey, usage: ApiKeyUsage | None) -> dict[str, object]:
    """The usage of one API key, as the API tells it."""
    return {"keyId": row.id, "name": row.name, **_told(usage)}


def of_organization(row: Organization, usage: OrganizationUsage | None) -> dict[str, object]:
    """The usage of all API keys of an organization together, as the API tells it."""
    used = usage.credits if usage else 0
    left = None if row.credit_limit is None else max(0, row.credit_limit - used)
    return {
        "organization": row.id,
        **_told(usage),
        "creditLimit": forms.credits_told(row.credit_limit),
        "creditsLeft": forms.credits_told(left),
    }


def _told(usage: ApiKeyUsage | OrganizationUsage | None) -> dict[str, object]:
    return {
        "totalRequests": usage.requests if usage else 0,
        "lastUsed": forms.rfc3339(usage.last_used_at) if usage else None,
        "tokensConsumed": {
            "input": usage.input_tokens if usage else 0,
            "output": usage.output_tokens if usage else 0,
        },
        "creditsConsumed": forms.credits_told(usage.credits) if usage else 0,
        "agentRuns": usage.agent_runs if usage else 0,
    }


def _add(sums: dict[str, Reported], owner_id: str, used: Reported) -> None:
    before = sums.get(owner_id)
    if before is None:
        sums[owner_id] = used
        return
    together = Reported._make(one + other for one, other in zip(before, used, strict=True))
    last_used_at = max(before.last_used_at, used.last_used_at)
    sums[owner_id] = together._replace(last_used_at=last_used_at)


def _costly(added: Mapping[str, Reported]) -> list[str]:
    return [owner_id for owner_id, used in added.items() if used.credits]


def _of_organizations(
    tx: Transaction, added: Mapping[str, Reported], actor: Actor, now: int
) -> Iterable[Change]:
    for credit in tx.credits_of_organizations(_costly(added)):
        if credit.low is not None and _falls_below(credit, added, credit.low):
            yield _low(credit, actor, now)
        if credit.used >= credit.limit and credit.spent_at is None:
            # Read once more, and held: somebody may be raising the limit.
            organization = tx.organization(credit.id)
            if organization is not None:
                yield from _settled(tx, organization, actor, now)


def _of_api_keys(
    tx: Transaction, added: Mapping[str, Reported], actor: Actor, now: int
) -> Iterable[Change]:
    for told in tx.credits_of_api_keys(_costly(added)):
        # What it has given to others is not its own any more.
        credit = told._replace(used=told.used + tx.credit_given_by(told.id))
        if _falls_below(credit, added, credit.limit // _LOW):
            yield _low(credit, actor, now)
        if credit.used < credit.limit:
            continue
        # As above.
        row = tx.api_key(credit.id)
        if row is None or row.credit_limit is None or credit.used < row.credit_limit:
            continue
        if row.disabled_at is None and row.revoked_at is None:
            row.disabled_at, row.disabled_reason = now, "quota"
            yield change_of(What.API_KEY_DISABLED, row, actor, now, reason="quota")


def _falls_below(credit: Credit, added: Mapping[str, Reported], low: int) -> bool:
    """Whether what is left was not below before this was added."""
    left = credit.limit - credit.used
    return left < low <= left + added[credit.id].credits


def _low(credit: Credit, actor: Actor, now: int) -> Change:
    detail: dict[str, object] = {
        "left": forms.credits_told(max(0, credit.limit - credit.used)),
        "limit": forms.credits_told(credit.limit),
    }
    organization_id = credit.organization_id
    return Change(
        What.CREDIT_LOW,
        credit.id,
        actor,
        now,
        organization_id,
        detail,
        wider=EVERYTHING if credit.id == organization_id else organization_id,
    )


def _settled(tx: Transaction, organization: Organization, actor: Actor, now: int) -> list[Change]:
    usage = tx.organization_usage(organization.id)
    used = usage.credits if usage else 0
    limit = organization.credit_limit
    is_spent = limit is not None and used >= limit
    if is_spent == (organization.credit_spent_at is not None):
        return []
    organization.credit_spent_at = now if is_spent else None
    what = What.ORGANIZATION_SPENT if is_spent else What.ORGANIZATION_EDITED
    detail: dict[str, object] = {
        "used": forms.credits_told(used),
        "limit": forms.credits_told(limit),
        "spent": is_spent,
    }
    return [Change(what, organization.id, actor, now, organization.id, detail)]
