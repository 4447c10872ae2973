"""Signing: checked claims and a signer become a token.  The only place that makes one.

Source: RFC 7515 §5.1 (JWS compact serialization), RFC 9068 §2.1 (header).
"""

from dataclasses import dataclass

from coatcheck.server.signing import Signer
from coatcheck.token_profile import CheckedClaims, TokenType


@dataclass(frozen=True, slots=True)
class Issued:
    """A token, and what its caller is told about it.

    Attributes:
        token: the JWT.
        scope: the asked set as it was written, or all the API key has for the audience.
        expires_in_s: seconds from `iat`.
        api_key_id: whose it is, for the count.
    """

    token: str
    scope: str
    expires_in_s: int
    api_key_id: str

    def __repr__(self) -> str:
        return f"Issued(api_key_id={self.api_key_id!r}, expires_in_s={self.expires_in_s})"


def mint(
    claims: CheckedClaims, signer: Signer, token_type: TokenType, *, scope: str, api_key_id: str
) -> Issued:
    """Sign what was checked."""
    token = signer.sign(token_type, claims.payload).decode("ascii")
    return Issued(token, scope, claims.expires_in_s, api_key_id)
