"""A role allows some HTTP methods: a viewer reads, whatever its scopes.

The token names the role; what it allows, the issuer's document says, so that a catalog can be
mended without new keys.  A role that the document does not name allows nothing.

Source: RFC 9068 §2.2.3.1 (`roles`), RFC 9110 §9 (methods; HEAD is GET without the body).
"""

from collections.abc import Mapping
from typing import Any

from coatcheck.restrictions.base import Allowance, Ask, Refuse, Situation


class RoleRestriction:
    name = "role"

    def narrow(self, allowance: Allowance, ask: Ask) -> Allowance:
        return allowance

    def is_binding(self, allowance: Allowance) -> bool:
        return allowance.role is not None

    def to_claim(self, allowance: Allowance) -> Mapping[str, object]:
        return {} if allowance.role is None else {"roles": [allowance.role.name]}

    def check(self, claims: Mapping[str, Any], situation: Situation, refuse: Refuse) -> None:
        names = claims.get("roles")
        if type(names) is not tuple or not names or not all(type(name) is str for name in names):
            refuse("unknown_restriction")
        method = "GET" if situation.method == "HEAD" else situation.method
        # All of them: a second name in a claim would be a second way in otherwise.
        if not all(method in situation.roles.get(name, ()) for name in names):
            refuse("role_not_allowed")
