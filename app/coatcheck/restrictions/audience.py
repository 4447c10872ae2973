"""The audiences of an API key bound the audience of its tokens; a token has exactly one.

Source: RFC 8707 §2, RFC 9068 §3.
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


class AudienceRestriction:
    name = "audience"
    is_binding = staticmethod(has_no_own_words)

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if ask.audience not in allowance.audiences:
            raise Refusal(Reason.INVALID_TARGET, allowed=allowance.audiences)
        return replace(allowance, audiences=(ask.audience,))

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        (audience,) = allowance.audiences
        return {"aud": audience}

    # `aud` is a registered claim.
    check = staticmethod(in_numbered_steps)
