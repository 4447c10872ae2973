"""A test key works in the test environment only, and so do its tokens."""

from collections.abc import Mapping

from coatcheck.restrictions.base import (
    Allowance,
    Ask,
    Reason,
    Refusal,
    Refuse,
    Situation,
    has_no_own_words,
)


class EnvironmentRestriction:
    name = "environment"
    is_binding = staticmethod(has_no_own_words)

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if ask.audience_environment not in (None, allowance.environment):
            raise Refusal(Reason.WRONG_ENVIRONMENT, allowed=allowance.audiences)
        return allowance

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {"env": allowance.environment}

    def check(self, claims: Mapping[str, object], situation: Situation, refuse: Refuse) -> None:
        # Once: each look at a named tuple has its price, and this runs for every request.
        environment = situation.environment
        if environment is not None and claims.get("env") != environment:
            refuse("wrong_environment")
