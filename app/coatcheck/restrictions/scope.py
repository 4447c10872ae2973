"""The scopes of an API key bound the scopes of its tokens: exactly what was asked, or nothing.

Silently granting less would leave the caller to find out at the resource server, and breaks
requests-oauthlib, which raises when the granted set differs from the asked one.

Source: RFC 6749 §3.3.
"""

from collections.abc import Mapping
from dataclasses import replace

from coatcheck.restrictions.base import (
    Allowance,
    Ask,
    Reason,
    Refusal,
    has_no_own_words,
    in_numbered_steps,
)
from coatcheck.scope import Grant, Scopes


class ScopeRestriction:
    name = "scope"
    is_binding = staticmethod(has_no_own_words)

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if ask.scopes is None:
            if not allowance.scopes:
                raise Refusal(Reason.NO_PERMISSION_THERE)
            return allowance
        asked = ask.vocabulary.expand(ask.scopes)
        missing = tuple(grant for grant in ask.scopes if not _is_held(grant, allowance, ask))
        if missing:
            raise Refusal(Reason.INSUFFICIENT_SCOPE, scopes=Scopes(missing))
        return replace(allowance, scopes=asked)

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {"scope": str(allowance.scopes)}

    # Which scopes a call needs is the route's own knowledge: `Principal.require` asks.
    check = staticmethod(in_numbered_steps)


def _is_held(grant: Grant, allowance: Allowance, ask: Ask) -> bool:
    """Whether an asked scope-token means something at the audience, and all of it is held."""
    meant = ask.vocabulary.expand(Scopes((grant,)))
    return bool(meant) and not allowance.scopes.missing(meant)
