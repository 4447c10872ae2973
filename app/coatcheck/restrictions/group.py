"""An API key may belong to a pricing group, which its operator made: prices, models and rates.

The group's models narrow the API key's (`models`); its price and its rates are for the resource
server to apply.  A verifier that does not know of groups would serve the request at no price at
all, so the token says in `must` that there is one.
"""

from collections.abc import Mapping
from typing import Any

from coatcheck.restrictions.base import Allowance, Ask, Refuse, Situation


class GroupRestriction:
    name = "group"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return allowance.group_id is not None

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {} if allowance.group_id is None else {"group": allowance.group_id}

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        group = claims.get("group")
        if type(group) is not str or not group:
            refuse("unknown_restriction")
