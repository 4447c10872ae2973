"""Lists of API keys, a page at a time, at the same cost whether there are a thousand or a million.

Each page walks along one index, in steps, until it is full or has looked at MOST_SCANNED rows.
What cannot be asked of an index (a project, the last use) is asked of those rows, so that a page
may be short, or even empty, while there are more.  Whoever looks for a name waits a little longer
rather than turning empty pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import sqlmodel
from sqlalchemy import ColumnElement, Select, literal, or_, select, union_all
from sqlmodel import Session, col, func

from coatcheck.server.store.tables import ApiKey, ApiKeyUsage

#: Rows that one page looks at, and those of them at once.
MOST_SCANNED: Final = 512
_STEP: Final = 128
#: The same while a name is looked for.
MOST_SCANNED_FOR_TEXT: Final = 20_000
_STEP_FOR_TEXT: Final = 2000

Status = Literal["active", "disabled", "expired", "revoked", "all"]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which API keys are wanted.

    Attributes:
        text: part of the name in any letter case, or the last four characters of the secret.
        unused_since: used neither then nor later, and made before; seconds since the epoch.
        ends_before: of those that have an end and have not come to it: it lies before.
        newest_first: else the oldest first; those with an end wanted, the earliest end first.
    """

    status: Status = "active"
    project_id: str | None = None
    environment: str | None = None
    kind: str | None = None
    member_id: str | None = None
    group_id: str | None = None
    text: str | None = None
    unused_since: int | None = None
    ends_before: int | None = None
    newest_first: bool = False


class Position(NamedTuple):
    """The last row that a page looked at.  `at` is 0 in a list by id."""

    at: int
    id: str


def read_page(
    session: Session,
    organization_id: str,
    wanted: Filter,
    now: int,
    after: Position | None,
    limit: int,
) -> tuple[Sequence[ApiKey], Position | None]:
    """API keys of one page, and where the next one begins; None: nowhere.

    Args:
        now: seconds since the epoch.
        limit: API keys on a page, at most.
    """
    is_by_end = wanted.status == "expired" or wanted.ends_before is not None
    walk = _by_end if is_by_end else _by_id
    step, most = _STEP, MOST_SCANNED
    if wanted.text:
        step, most = _STEP_FOR_TEXT, MOST_SCANNED_FOR_TEXT
    found: list[Position] = []
    looked_at = 0
    is_end = False
    while len(found) < limit and looked_at < most and not is_end:
        query = walk(organization_id, wanted, now, after, step)
        seen = [Position(row[1], row[0]) for row in session.connection().execute(query)]
        looked_at += len(seen)
        is_end = len(seen) < step
        if seen:
            after = seen[-1]
            fitting = _fitting(session, wanted, now, seen)
            found += [one for one in seen if one.id in fitting]
    following = None if is_end else after
    if len(found) >= limit:
        # The next page begins behind the last one shown, unless nothing is left there.
        following = None if is_end and len(found) == limit else found[limit - 1]
    shown = found[:limit]
    api_keys = {
        row.id: row
        for row in session.exec(
            sqlmodel.select(ApiKey).where(col(ApiKey.id).in_([one.id for one in shown]))
        )
    }
    return [api_keys[one.id] for one in shown], following


def _fitting(session: Session, wanted: Filter, now: int, seen: Sequence[Position]) -> set[str]:
    """The ids of those rows that are wanted."""
    query = (
        select(col(ApiKey.id))
        .outerjoin(ApiKeyUsage, col(ApiKeyUsage.api_key_id) == col(ApiKey.id))
        .where(col(ApiKey.id).in_([one.id for one in seen]), *_conditions(wanted, now))
    )
    return set(session.connection().scalars(query))


def _by_id(
    organization_id: str, wanted: Filter, now: int, after: Position | None, step: int
) -> Select[*tuple[Any, ...]]:
    """The rows of some states, in the order of their ids: one walk along the index for each."""
    states = ("active", "disabled", "revoked") if wanted.status == "all" else (wanted.status,)
    key = col(ApiKey.id)
    order = key.desc() if wanted.newest_first else key
    walks: list[Select[*tuple[Any, ...]]] = []
    for state in states:
        walk: Select[*tuple[Any, ...]] = select(key.label("id")).where(
            col(ApiKey.organization_id) == organization_id, col(ApiKey.state) == state
        )
        if after is not None:
            walk = walk.where(key < after.id if wanted.newest_first else key > after.id)
        walks.append(select(walk.order_by(order).limit(step).subquery().c.id))
    together = union_all(*walks).subquery()
    by = together.c.id.desc() if wanted.newest_first else together.c.id
    return select(together.c.id, literal(0)).order_by(by).limit(step)


def _by_end(
    organization_id: str, wanted: Filter, now: int, after: Position | None, step: int
) -> Select[*tuple[Any, ...]]:
    """The rows with an end, in the order of their ends."""
    end, key = col(ApiKey.expires_at), col(ApiKey.id)
    query = select(key, end).where(col(ApiKey.organization_id) == organization_id)
    if wanted.status == "expired":
        query = query.where(end <= now)
    else:
        query = query.where(end > now, end <= (wanted.ends_before or now))
    if after is not None:
        query = query.where(or_(end > after.at, (end == after.at) & (key > after.id)))
        # Said once more, so that the walk along the index begins there.
        query = query.where(end >= after.at)
    return query.order_by(end, key).limit(step)


def _conditions(wanted: Filter, now: int) -> list[ColumnElement[bool]]:
    """What is asked of the rows that a walk came by."""
    end = col(ApiKey.expires_at)
    conditions: list[ColumnElement[bool]] = [col(ApiKey.state) != "deleted"]
    if wanted.status == "expired":
        conditions += [end <= now, col(ApiKey.state).in_(("active", "disabled"))]
    elif wanted.status in ("active", "disabled"):
        conditions += [col(ApiKey.state) == wanted.status, or_(end.is_(None), end > now)]
    elif wanted.status == "revoked":
        conditions.append(col(ApiKey.state) == "revoked")
    for column, value in (
        (ApiKey.project_id, wanted.project_id),
        (ApiKey.environment, wanted.environment),
        (ApiKey.kind, wanted.kind),
        (ApiKey.member_id, wanted.member_id),
        (ApiKey.group_id, wanted.group_id),
    ):
        if value is not None:
            conditions.append(col(column) == value)
    if wanted.text:
        conditions.append(_has_text(wanted.text))
    if wanted.unused_since is not None:
        last = col(ApiKeyUsage.last_used_at)
        conditions += [
            col(ApiKey.created_at) < wanted.unused_since,
            or_(last.is_(None), last < wanted.unused_since),
        ]
    return conditions


def _has_text(text: str) -> ColumnElement[bool]:
    name = func.lower(col(ApiKey.name)).contains(text.lower(), autoescape=True)
    if len(text) == 4:  # noqa: PLR2004 - of a mask, as many as it shows at its end
        return or_(name, col(ApiKey.mask).endswith(text, autoescape=True))
    return name
