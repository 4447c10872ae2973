"""The claims by which a token carries its allowance: what the restrictions say, and `must`."""

from coatcheck.restrictions import RESTRICTIONS, Allowance


def claims_of(issuer: str, allowance: Allowance) -> dict[str, object]:
    """The claims of every token with this allowance, but those that each token has of its own.

    Args:
        allowance: narrowed to one audience.
    """
    claims: dict[str, object] = {
        "iss": issuer,
        "sub": allowance.api_key_id,
        "client_id": allowance.api_key_id,
        "org_id": allowance.organization_id,
    }
    for restriction in RESTRICTIONS:
        claims.update(restriction.to_claim(allowance))
    if must := must_of(allowance):
        claims["must"] = list(must)
    return claims


def must_of(allowance: Allowance) -> tuple[str, ...]:
    """The names of the restrictions that a resource server has to enforce."""
    return tuple(one.name for one in RESTRICTIONS if one.is_binding(allowance))
