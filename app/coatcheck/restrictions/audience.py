"""The audiences of an API key bound the audience of its tokens; a token has exactly one.

Source: RFC 8707 §2, RFC 9068 §3.
"""

from collections.abc import Mapping
from dataclasses import replace

from coatcheck.restrictions.base import Allowance, Ask, Reason, Refusal, Refuse, Situation


class AudienceRestriction:
    name = "audience"
    must = False

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if ask.audience not in allowance.audiences:
            raise Refusal(Reason.INVALID_TARGET, allowed=allowance.audiences)
        return replace(allowance, audiences=(ask.audience,))

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        (audience,) = allowance.audiences
        return {"aud": audience}

    def check(self, claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
        # `aud` is a registered claim: every verifier checks it, ours in its numbered steps.
        return
