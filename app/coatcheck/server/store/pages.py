"""Lists of API keys, a page at a time, at the same cost whether there are a thousand or a million.

Each page walks along one index and looks at MOST_SCANNED rows at most.  What cannot be asked of
an index (part of a name, last use) is asked of those rows, so that a page may be short, or even
empty, while there are more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import sqlmodel
from sqlalchemy import ColumnElement, Select, literal, or_, select, union_all
from sqlmodel import Session, col, func

from coatcheck.server.store.tables import ApiKey, ApiKeyUsage

#: Rows that one page looks at.
MOST_SCANNED: Final = 1000

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
    scan = _by_end if is_by_end else _by_id
    rows = session.connection().execute(scan(organization_id, wanted, now, after)).all()
    scanned = [Position(row[1], row[0]) for row in rows]
    if not scanned:
        return [], None
    fitting = set(
        session.connection().scalars(
            select(col(ApiKey.id))
            .outerjoin(ApiKeyUsage, col(ApiKeyUsage.api_key_id) == col(ApiKey.id))
            .where(col(ApiKey.id).in_([one.id for one in scanned]), *_conditions(wanted, now))
        )
    )
    found = [one for one in scanned if one.id in fitting]
    last = found[limit - 1] if len(found) >= limit else scanned[-1]
    shown = found[:limit]
    is_end = last == scanned[-1] and len(scanned) < MOST_SCANNED
    api_keys = {
        row.id: row
        for row in session.exec(
            sqlmodel.select(ApiKey).where(col(ApiKey.id).in_([one.id for one in shown]))
        )
    }
    return [api_keys[one.id] for one in shown], None if is_end else last


def _by_id(
    organization_id: str, wanted: Filter, now: int, after: Position | None
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
        walks.append(select(walk.order_by(order).limit(MOST_SCANNED).subquery().c.id))
    together = union_all(*walks).subquery()
    by = together.c.id.desc() if wanted.newest_first else together.c.id
    return select(together.c.id, literal(0)).order_by(by).limit(MOST_SCANNED)


def _by_end(
    organization_id: str, wanted: Filter, now: int, after: Position | None
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
    return query.order_by(end, key).limit(MOST_SCANNED)


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
