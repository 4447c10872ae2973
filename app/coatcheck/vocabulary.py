"""What scope-tokens mean at one audience: named scopes, implied actions, permissions.  No I/O.

A product's catalog gives names to sets of permissions (`cloud-agents`), may let one action imply
others, and says at which audience a permission means something.  `expand` turns what an API key
holds, or what somebody asked for, into the permissions of one audience, spelled out: that is
what is compared, and what a token carries.

Source: RFC 6749 §3.3 (the meaning of scope-tokens is the authorization server's to define).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from coatcheck.scope import EVERYTHING, Grant, Scopes, is_platform


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The scope-tokens of one audience.

    Attributes:
        permissions: every action that means something there, in the order in which `*` is spelled
            out; None: any well-formed one.
        named: slug → what it stands for.
        implies: action → the actions that whoever may do it may do as well.
    """

    permissions: tuple[str, ...] | None = None
    named: Mapping[str, Scopes] = field(default_factory=dict)
    implies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def expand(self, scopes: Scopes) -> Scopes:
        """These scopes as permissions of this audience; what means nothing there is left out.

        `*` becomes every permission but the platform's own, which only their names stand for.
        """
        if self.permissions is None and not self.named and not self.implies:
            return scopes
        expanded: dict[Grant, None] = {}
        for grant in scopes:
            for one in self._spelled_out(grant):
                self._add(one, expanded)
        return Scopes(tuple(expanded))

    def _spelled_out(self, grant: Grant) -> Iterator[Grant]:
        if grant.filter is None and grant.action in self.named:
            for one in self.named[grant.action]:
                yield from self._spelled_out(one)
        elif grant.action == EVERYTHING and self.permissions is not None:
            for permission in self.permissions:
                if not is_platform(permission):
                    yield Grant(permission, grant.filter)
        else:
            yield grant

    def _add(self, grant: Grant, expanded: dict[Grant, None]) -> None:
        left = [grant]
        seen = set()
        while left:
            one = left.pop()
            if one in seen:
                continue
            seen.add(one)
            if self.permissions is None or one.action in self.permissions:
                expanded.setdefault(one)
            implied = reversed(self.implies.get(one.action, ()))
            left += [Grant(action, one.filter) for action in implied]


#: Where no catalog says anything else.
ANYTHING: Final = Vocabulary()
