"""What an API key is good for, worked out from its row alone, and compared axis by axis.

Written again, on purpose: it shares no code with what it is to judge.  It knows the catalog's
data, and the contract's words.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any, Final

from coatcheck.server.catalog import Catalog

Row = Mapping[str, Any]
#: An action, and the segments of its filter; none: on everything.
Right = tuple[str, tuple[str, ...] | None]

ORGANIZATION: Final = frozenset(
    {
        *("keys:read", "keys:write", "usage:read", "usage:write"),
        *("audit:read", "members:write", "org:admin"),
    }
)
WILD: Final = ("#", "*")


def rights_at(audience: str, scopes: str, catalog: Catalog) -> set[Right]:
    """Everything that these scope-tokens allow at an audience, spelled out.

    Where any scope may be given, a star stays a star.
    """
    found: set[Right] = set()
    for token in scopes.split(" "):
        action, _, text = token.partition("@")
        segments = tuple(text.split("/")) if text not in ("", "*") else None
        found |= set(_meant(action, segments, audience, catalog))
    return found


def _known(audience: str, catalog: Catalog) -> frozenset[str] | None:
    """Every action that a star stands for there; None: any."""
    if catalog.permissions is None:
        return None
    if audience == catalog.management_audience:
        return ORGANIZATION
    return frozenset(
        one.name
        for one in catalog.permissions.values()
        if one.audiences is None or audience in one.audiences
    )


def _meant(
    action: str, segments: tuple[str, ...] | None, audience: str, catalog: Catalog
) -> Iterator[Right]:
    is_management = audience == catalog.management_audience
    known = _known(audience, catalog)
    if known is None:
        yield action, segments
        return
    if is_management:
        actions = known if action == "*" else {action}
        yield from ((one, segments) for one in actions if one in known or _is_platform(one))
        return
    named = catalog.named_scopes.get(action) if segments is None else None
    if named is not None:
        for grant in named.grants:
            yield from _meant(grant.action, grant.filter, audience, catalog)
        return
    left, seen = (set(known) if action == "*" else {action}), set()
    while left:
        one = left.pop()
        seen.add(one)
        left |= set(catalog.implies.get(one, ())) - seen
    yield from ((one, segments) for one in seen if one in known)


def _is_platform(action: str) -> bool:
    return action.startswith("coatcheck:")


def covers(have: Iterable[Right], wanted: Right) -> bool:
    """Whether one of the rights alone is as wide as the wanted one."""
    return any(_covers(one, wanted) for one in have)


def _covers(right: Right, wanted: Right) -> bool:
    (action, segments), (asked, named) = right, wanted
    if action != asked and (action != "*" or _is_platform(asked)):
        return False
    if segments is None:
        return True
    if named is None or len(named) != len(segments):
        return False
    return all(mine in (theirs, *WILD) for mine, theirs in zip(segments, named, strict=True))


def networks_of(text: str | None) -> tuple[list[IPv4Network], list[IPv6Network]] | None:
    if text is None:
        return None
    networks = [ip_network(one) for one in text.split(" ")]
    return (
        list(collapse_addresses(one for one in networks if isinstance(one, IPv4Network))),
        list(collapse_addresses(one for one in networks if isinstance(one, IPv6Network))),
    )


def _networks_lie_within(narrow: str | None, wide: str | None) -> bool:
    mine, theirs = networks_of(narrow), networks_of(wide)
    if theirs is None:
        return True
    if mine is None:
        return False
    four = all(any(one.subnet_of(other) for other in theirs[0]) for one in mine[0])
    return four and all(any(one.subnet_of(other) for other in theirs[1]) for one in mine[1])


def _is_part(narrow: str | None, wide: str | None) -> bool:
    """Of two lists of words, where no list is all of them."""
    return wide is None or (narrow is not None and set(narrow.split(" ")) <= set(wide.split(" ")))


def _methods(role: str | None, catalog: Catalog) -> frozenset[str]:
    every = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PATCH", "PUT", "DELETE", "TRACE"})
    return every if role is None else catalog.roles[role].role.methods


def scopes_beyond(row: Row, wider: Row, catalog: Catalog) -> set[tuple[str, Right]]:
    """What a row allows that the wider one does not, at each of its audiences."""
    return {
        (audience, right)
        for audience in row["audiences"].split(" ")
        for right in rights_at(audience, row["scopes"], catalog)
        if not covers(rights_at(audience, wider["scopes"], catalog), right)
    }


@dataclass(frozen=True, slots=True)
class Exceptions:
    """What the contract lets go beyond, and nothing else.

    Attributes:
        scopes: an administrator gives any scope and audience of its organization.
        environments: an administrator of the default environment manages all of them.
        of_a_device: scopes and audiences that a device key has by its membership.
    """

    scopes: bool = False
    environments: bool = False
    of_a_device: frozenset[tuple[str, Right]] = frozenset()


def axes_beyond(
    row: Row, wider: Row, catalog: Catalog, allowed: Exceptions = Exceptions()
) -> set[str]:
    """The axes on which a row of an API key goes beyond another one."""
    beyond = set()
    if row["environment"] != wider["environment"] and not allowed.environments:
        beyond.add("environment")
    if row["organization_id"] != wider["organization_id"]:
        beyond.add("organization")
    platform = {
        one for one in row["scopes"].split(" ") if _is_platform(one.partition("@")[0])
    } - set(wider["scopes"].split(" "))
    if platform:
        beyond.add("platform")
    if not allowed.scopes:
        missing = scopes_beyond(row, wider, catalog) - allowed.of_a_device
        if missing:
            beyond.add("scopes")
        extra = set(row["audiences"].split(" ")) - set(wider["audiences"].split(" "))
        if extra - {audience for audience, _ in allowed.of_a_device}:
            beyond.add("audiences")
    if wider["expires_at"] is not None and (
        row["expires_at"] is None or row["expires_at"] > wider["expires_at"]
    ):
        beyond.add("expires_at")
    if not _networks_lie_within(row["networks"], wider["networks"]):
        beyond.add("networks")
    for name in ("project_id", "group_id"):
        if wider[name] is not None and row[name] != wider[name]:
            beyond.add(name)
    if not _is_part(row["models"], wider["models"]):
        beyond.add("models")
    if not _methods(row["role"], catalog) <= _methods(wider["role"], catalog):
        beyond.add("role")
    return beyond
