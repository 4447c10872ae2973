"""Resource filters narrow a scope to some of the organization's things.

They travel within the scopes, `read@PLACE/Site/42`, and `Principal.require` compares them.  A
verifier that takes scope-tokens for mere names would not let such a token do anything; one that
cuts them at the `@` would let it do everything.  So a token that has filters says so in `must`.
"""

from collections.abc import Mapping

from coatcheck.restrictions.base import Allowance, Ask, in_numbered_steps


class ResourceRestriction:
    name = "resource"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        # `scope` has compared what was asked, filters and all.
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return any(grant.filter is not None for grant in allowance.scopes)

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {}

    check = staticmethod(in_numbered_steps)
