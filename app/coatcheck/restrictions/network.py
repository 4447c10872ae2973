"""An API key may be used from some networks only, and so may its tokens.

A caller whose address is not known comes from nowhere, and is refused.
"""

from collections.abc import Mapping
from typing import Any

from coatcheck.client_address import is_in, parse_networks
from coatcheck.restrictions.base import Allowance, Ask, Reason, Refusal, Refuse, Situation


class NetworkRestriction:
    name = "network"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        if allowance.networks is not None and not is_in(ask.client_address, allowance.networks):
            raise Refusal(Reason.IP_NOT_ALLOWED)
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return allowance.networks is not None

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        if allowance.networks is None:
            return {}
        return {"cidrs": [str(network) for network in allowance.networks]}

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        texts = claims.get("cidrs")
        if type(texts) is not tuple or not all(type(text) is str for text in texts):
            refuse("unknown_restriction")
        try:
            networks = parse_networks(texts)
        except ValueError:
            refuse("unknown_restriction")
        if not is_in(situation.client_address, networks):
            refuse("ip_not_allowed")
