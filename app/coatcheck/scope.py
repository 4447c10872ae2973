"""Scopes: what an API key or a token may do.  Grammar, canonical form and containment; no I/O.

    scope       = scope-token *( SP scope-token )             ; RFC 6749 §3.3
    scope-token = action [ "@" filter ]
    action      = "*" / 1*( %x21 / %x23-5B / %x5D-7E )        ; without "@", "*" and "#"
    filter      = "*" / type *( "/" segment )
    type        = 1*( unreserved / pct-encoded )
    segment     = "#" / "*" / 1*( unreserved / pct-encoded )

`read@PLACE/Site/42` grants the action `read` on one site, `read@PLACE/Site/#` on every site:
`#` and `*` stand for exactly one segment.  A filter has an exact shape and covers nothing below
or above it.  No filter, or a lone `*`, is everything.

No action implies another.  The action `*` covers every action but the platform's own
(`coatcheck:…`), which only their exact name grants.

There is one spelling of an id: unreserved characters as they are, all others percent-encoded
with capital digits.  So texts are compared byte for byte and no two spellings can disagree.

Source: RFC 6749 §3.3 (scope), RFC 3986 §2.1 and §2.3 (percent-encoding, unreserved).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

EVERYTHING: Final = "*"
PLATFORM_PREFIX: Final = "coatcheck:"
RESOURCE_SERVER: Final = "coatcheck:resource-server"
OPERATOR: Final = "coatcheck:operator"
#: What only the operator of a deployment may give.
PLATFORM_PERMISSIONS: Final = (RESOURCE_SERVER, OPERATOR)
#: What can be done within one organization by the management API, whose audience they belong to.
ORGANIZATION_PERMISSIONS: Final = (
    "keys:read",
    "keys:write",
    "usage:read",
    "usage:write",
    "audit:read",
    "members:write",
    "org:admin",
)

#: Longest scope parameter that is read at all; a token has to fit into 4 KiB with it.
MAX_LENGTH: Final = 4096

_ACTION: Final = re.compile(r"\*|[\x21\x24-\x29\x2b-\x3f\x41-\x5b\x5d-\x7e]+")
_UNRESERVED: Final = r"[A-Za-z0-9._~-]"
_ID: Final = re.compile(rf"(?:{_UNRESERVED}|%[0-9A-F]{{2}})+")
_ENCODED: Final = re.compile(r"%([0-9A-F]{2})")
_WILDCARDS: Final = frozenset("#*")


class MalformedScope(ValueError):
    """The text is no scope.  The message says what to write instead, and never quotes it."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One action, on everything or on what a filter names."""

    action: str
    filter: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, token: str) -> Self:
        """Read one scope-token.

        Raises:
            MalformedScope: grammar is broken, or an id is not in its one canonical spelling.
        """
        action, at, filter_text = token.partition("@")
        if _ACTION.fullmatch(action) is None:
            raise MalformedScope(
                "an action is printable ASCII without blanks, quotes, backslashes, @, # and *,"
                " or a lone * for every action"
            )
        if not at or filter_text == EVERYTHING:
            return cls(action)
        segments = tuple(filter_text.split("/"))
        if segments[0] in _WILDCARDS:
            raise MalformedScope("a filter starts with the name of a type; write * alone for all")
        for segment in segments:
            if segment not in _WILDCARDS:
                _require_canonical(segment)
        return cls(action, segments)

    def __str__(self) -> str:
        return self.action if self.filter is None else f"{self.action}@{'/'.join(self.filter)}"

    def covers(self, asked: "Grant") -> bool:
        """Whether whoever holds this grant may be given the asked one.

        `*` covers no platform permission, and a wildcard is covered by a wildcard only.
        """
        if self.action != asked.action and (self.action != EVERYTHING or is_platform(asked.action)):
            return False
        if self.filter is None:
            return True
        if asked.filter is None or len(asked.filter) != len(self.filter):
            return False
        return all(
            mine in _WILDCARDS or mine == theirs
            for mine, theirs in zip(self.filter, asked.filter, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Scopes:
    """A set of grants that keeps the order in which they were written."""

    grants: tuple[Grant, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Scopes":
        """Read a scope parameter or claim: scope-tokens with one blank between them.

        Raises:
            MalformedScope: as `Grant.parse`; also when blanks are doubled, or it is too long.
        """
        return _parse(text)

    @classmethod
    def of(cls, tokens: Iterable[str]) -> "Scopes":
        """The scopes that these scope-tokens name.  Raises MalformedScope as `parse`."""
        return cls.parse(" ".join(tokens))

    def __str__(self) -> str:
        return " ".join(map(str, self.grants))

    def __iter__(self) -> Iterator[Grant]:
        return iter(self.grants)

    def __len__(self) -> int:
        return len(self.grants)

    def covers(self, asked: Grant) -> bool:
        """Whether one grant alone covers the asked one.  Two halves never make a whole."""
        return any(grant.covers(asked) for grant in self.grants)

    def missing(self, asked: "Scopes") -> "Scopes":
        """What of the asked scopes no grant covers; empty when all of them are covered."""
        return Scopes(tuple(grant for grant in asked if not self.covers(grant)))

    @property
    def has_platform_permission(self) -> bool:
        """Whether any of them is one of Coatcheck's own, which only its operator may give."""
        return any(is_platform(grant.action) for grant in self.grants)


def is_platform(action: str) -> bool:
    """Whether an action belongs to the platform itself and is covered by nothing but its name."""
    return action.startswith(PLATFORM_PREFIX)


def concrete(permission: str, resource: str | None) -> Grant:
    """The grant that a call needs: this permission, on this one resource or on everything.

    Raises:
        MalformedScope: the resource holds a wildcard, an `@` or an empty segment.  An id that
            holds one has to be percent-encoded by whoever builds the path.
    """
    if resource is None:
        return Grant.parse(permission)
    grant = Grant(Grant.parse(permission).action, tuple(resource.split("/")))
    for segment in grant.filter or ():
        _require_canonical(segment)
    return grant


def _require_canonical(segment: str) -> None:
    if _ID.fullmatch(segment) is None:
        raise MalformedScope(
            "a segment is not empty and percent-encodes all but letters, digits and . _ ~ -,"
            " with capital digits (a colon is %3A)"
        )
    for encoded in _ENCODED.findall(segment):
        if re.match(_UNRESERVED, chr(int(encoded, 16))):
            raise MalformedScope("a letter, a digit and . _ ~ - are never percent-encoded")


@lru_cache(maxsize=4096)
def _parse(text: str) -> Scopes:
    if len(text) > MAX_LENGTH:
        raise MalformedScope(f"a scope has at most {MAX_LENGTH} characters")
    if not text:
        return Scopes()
    grants = (Grant.parse(token) for token in text.split(" "))
    return Scopes(tuple(dict.fromkeys(grants)))
