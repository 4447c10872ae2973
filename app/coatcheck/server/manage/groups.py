"""Groups: pricing tiers that the operator sells under one name.  API keys belong to one or none.

A group narrows the models of its API keys; its price and its rates are for resource servers to
apply, which learn a token's group from the token and read the rest here.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from coatcheck import ids
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import forms
from coatcheck.server.manage.api_key_rules import MAX_GROUP_MODELS_LENGTH, checked_models
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import Group

#: The plain price, in millionths.
PLAIN_PRICE: Final = 1_000_000
#: What every database and every client can count to.
_MOST_PER_MINUTE: Final = 10**12


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What a group is; as it is asked for, or as it is.

    Attributes:
        price_multiplier: in millionths.
        models: those that its API keys may name; None: all.
        requests_per_minute: for each API key; None: without limit.
        tokens_per_minute: of a model, for each API key; None: without limit.
    """

    name: str
    price_multiplier: int = PLAIN_PRICE
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as people and programs see it.  Times are seconds since the epoch."""

    id: str
    terms: GroupTerms
    created_at: int

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        terms = self.terms
        return {
            "id": self.id,
            "name": terms.name,
            "priceMultiplier": forms.credits_told(terms.price_multiplier),
            "models": None if terms.models is None else list(terms.models),
            "requestsPerMinute": terms.requests_per_minute,
            "tokensPerMinute": terms.tokens_per_minute,
            "createdAt": forms.rfc3339(self.created_at),
        }


def create(
    store: Transactions, catalog: Catalog, terms: GroupTerms, actor: Actor, *, now: int
) -> GroupView:
    """A new group.

    Raises:
        Invalid: which input breaks which rule.
    """
    row = Group(id=ids.new_id("grp", now * 1000), created_at=now, **_columns(catalog, terms))
    with store.transaction() as tx:
        tx.add(row)
        told = view(row)
        tx.append([_change(What.GROUP_CREATED, row, actor, now, **_detail(told.terms))])
        return told


def page(store: Transactions, *, after: str = "", limit: int) -> tuple[list[GroupView], str | None]:
    """Groups that were not deleted, the oldest first, and where the next page begins."""
    with store.transaction(read_only=True) as tx:
        rows = tx.groups(after, limit + 1)
        following = rows[limit - 1].id if len(rows) > limit else None
        return [view(row) for row in rows[:limit]], following


def show(store: Transactions, group_id: str) -> GroupView:
    """One group.  Raises NotFound."""
    with store.transaction(read_only=True) as tx:
        return view(_existing(tx, group_id))


def edit(
    store: Transactions,
    catalog: Catalog,
    group_id: str,
    change: Callable[[GroupTerms], GroupTerms],
    actor: Actor,
    *,
    now: int,
) -> GroupView:
    """Change a group for all of its API keys; tokens die if it allows less than before.

    Args:
        change: from what it is to what it shall be.

    Raises:
        Invalid: which input breaks which rule.
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, group_id)
        before = view(row).terms
        for name, value in _columns(catalog, change(before)).items():
            setattr(row, name, value)
        told = view(row)
        old, new = _detail(before), _detail(told.terms)
        detail = {name: [old[name], new[name]] for name in new if old[name] != new[name]}
        if detail:
            narrows = _is_narrower(told.terms, before)
            what = What.GROUP_NARROWED if narrows else What.GROUP_EDITED
            tx.append([_change(what, row, actor, now, **detail)])
        return told


def delete(store: Transactions, group_id: str, actor: Actor, *, now: int) -> None:
    """Take a group out of use.

    Raises:
        NotFound: there is none of this id.
        Conflict: API keys belong to it, which would be left without price, models and rates.
    """
    with store.transaction() as tx:
        row = _existing(tx, group_id)
        if tx.has_api_keys_in_group(row.id):
            raise Conflict(
                f"API keys belong to {row.id}: move them to another group or revoke them first"
                f" (GET /v1/keys?group={row.id} lists an organization's)",
                "group_in_use",
            )
        row.deleted_at = now
        tx.append([_change(What.GROUP_NARROWED, row, actor, now, name=row.name, deleted=True)])


def view(row: Group) -> GroupView:
    """What is shown of a row."""
    terms = GroupTerms(
        name=row.name,
        price_multiplier=row.price_multiplier,
        models=None if row.models is None else tuple(row.models.split(" ")),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
    )
    return GroupView(row.id, terms, row.created_at)


def _columns(catalog: Catalog, terms: GroupTerms) -> dict[str, Any]:
    """The rules that a group follows, and what is stored of it.  Raises Invalid."""
    return {
        "name": forms.name(terms.name),
        "price_multiplier": terms.price_multiplier,
        "models": None if terms.models is None else _models(catalog, terms.models),
        "requests_per_minute": _rate("requestsPerMinute", terms.requests_per_minute),
        "tokens_per_minute": _rate("tokensPerMinute", terms.tokens_per_minute),
    }


def _models(catalog: Catalog, given: Sequence[str]) -> str:
    models = checked_models(catalog, given)
    if len(json.dumps(models, separators=(",", ":"))) > MAX_GROUP_MODELS_LENGTH:
        raise Invalid(
            "models",
            f"all names together, with quotes and commas, have at most {MAX_GROUP_MODELS_LENGTH}"
            " characters, because tokens carry them: name fewer, or null for all",
        )
    return " ".join(models)


def _rate(field: str, given: int | None) -> int | None:
    if given is not None and not 0 < given <= _MOST_PER_MINUTE:
        raise Invalid(field, f"is a whole number from 1 to {_MOST_PER_MINUTE}, or null for any")
    return given


def _is_narrower(new: GroupTerms, old: GroupTerms) -> bool:
    """Whether the new terms lack something that the old ones allow; prices allow nothing."""
    if new.models is not None and (old.models is None or not set(old.models) <= set(new.models)):
        return True
    rates = (
        (new.requests_per_minute, old.requests_per_minute),
        (new.tokens_per_minute, old.tokens_per_minute),
    )
    return any(now is not None and (before is None or now < before) for now, before in rates)


def _detail(terms: GroupTerms) -> dict[str, object]:
    return asdict(terms)


def _change(what: What, row: Group, actor: Actor, now: int, **detail: object) -> Change:
    return Change(what, row.id, actor, now, detail=detail)


def _existing(tx: Transaction, group_id: str) -> Group:
    row = tx.group(group_id)
    if row is None or row.deleted_at is not None:
        raise NotFound("there is no group of this id (an id starts with grp_)")
    return row
