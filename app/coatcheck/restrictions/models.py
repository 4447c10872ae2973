"""An API key may name some models only: its own list, and its pricing group's.

Which model a request names stands in its body, so the resource server says it: with the request
(`authenticate(model=…)`) or afterwards (`Principal.require_model`).
"""

from collections.abc import Mapping
from typing import Any

from coatcheck.restrictions.base import Allowance, Ask, Refuse, Situation


class ModelRestriction:
    name = "models"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return allowance.models is not None

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {} if allowance.models is None else {"models": list(allowance.models)}

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        models: Any = claims.get("models")
        if type(models) is not tuple:
            refuse("unknown_restriction")
        if situation.model is not None and situation.model not in models:
            refuse("model_not_allowed")
