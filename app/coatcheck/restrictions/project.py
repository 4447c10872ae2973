"""An API key may be bound to one project; others say with each request which one they mean.

The request names it in `X-Project-Id`.  A key that is bound needs not, and may name no other.
"""

from collections.abc import Mapping
from typing import Any

from coatcheck.restrictions.base import Allowance, Ask, Refuse, Situation


class ProjectRestriction:
    name = "project"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return allowance.project_id is not None

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {} if allowance.project_id is None else {"project_id": allowance.project_id}

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        bound_to = claims.get("project_id")
        if bound_to is None:
            refuse("unknown_restriction")
        if situation.project_id not in (None, bound_to):
            refuse("wrong_project")
