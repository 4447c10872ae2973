"""Signing: checked claims and a signer become a token.  The only place that makes one.

Source: RFC 7515 §5.1 (JWS compact serialization), RFC 9068 §2.1 (header).
"""

from typing import NamedTuple

from coatcheck.server.signing import Signer
from coatcheck.token_profile import CheckedClaims, TokenType


class Issued(NamedTuple):
    """A token, and what its caller is told about it.

    Attributes:
        token: the JWT, as ASCII.
        scope: the asked set as it was written, or all the API key has for the audience; ASCII.
        expires_in_s: seconds from `iat`.
        api_key_id: whose it is, for the count.
    """

    token: bytes
    scope: bytes
    expires_in_s: int
    api_key_id: str

    def __repr__(self) -> str:
        return f"Issued(api_key_id={self.api_key_id!r}, expires_in_s={self.expires_in_s})"


def mint(
    claims: CheckedClaims, signer: Signer, token_type: TokenType, *, scope: bytes, api_key_id: str
) -> Issued:
    """Sign what was checked."""
    token = signer.sign(token_type, claims.payload)
    return Issued(token, scope, claims.expires_in_s, api_key_id)
