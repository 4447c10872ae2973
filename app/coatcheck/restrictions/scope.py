"""The scopes of an API key bound the scopes of its tokens: exactly what was asked, or nothing.

Silently granting less would leave the caller to find out at the resource server, and breaks
requests-oauthlib, which raises when the granted set differs from the asked one.

Source: RFC 6749 §3.3.
"""

from collections.abc import Mapping
from dataclasses import replace

from coatcheck.restrictions.base import Allowance, Ask, Reason, Refusal, in_numbered_steps


class ScopeRestriction:
    name = "scope"
    must = False

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if ask.scopes is None:
            return allowance
        if missing := allowance.scopes.missing(ask.scopes):
            raise Refusal(Reason.INSUFFICIENT_SCOPE, scopes=missing)
        return replace(allowance, scopes=ask.scopes)

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {"scope": str(allowance.scopes)}

    # Which scopes a call needs is the route's own knowledge: `Principal.require` asks.
    check = staticmethod(in_numbered_steps)
