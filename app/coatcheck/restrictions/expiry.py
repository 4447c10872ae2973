"""No token outlives its API key, nor the overlap of a replaced secret, nor the lifetime.

Source: RFC 7519 §4.1.4.
"""

from collections.abc import Mapping
from dataclasses import replace

from coatcheck.restrictions.base import Allowance, Ask, Reason, Refusal, Refuse, Situation


class ExpiryRestriction:
    name = "expiry"
    must = False

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        expires_at = ask.now + ask.lifetime_s
        if allowance.expires_at is not None:
            expires_at = min(expires_at, allowance.expires_at)
        if expires_at <= ask.now:
            raise Refusal(Reason.API_KEY_EXPIRED, at=allowance.expires_at)
        return replace(allowance, expires_at=expires_at)

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {} if allowance.expires_at is None else {"exp": allowance.expires_at}

    def check(self, claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
        # `exp` is a registered claim: every verifier checks it, ours in its numbered steps.
        return
