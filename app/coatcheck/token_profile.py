"""The access token: header, claims, algorithms, limits, and the check before signing.

A token is an RFC 9068 JWT with `org_id`, `env` and `as_of` beside the registered claims.  Both
sides read this file: the issuer signs only what `check` let through, and the verifier requires
what is listed here.

Source: RFC 9068 §2 (header and claims), RFC 7518 §3.1 and RFC 8037 §3.1 (algorithms),
RFC 8725 §3 (typing, fixed algorithms).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from coatcheck.durations import TOKEN_LIFETIME

Algorithm = Literal["ES256", "RS256", "EdDSA"]
TokenType = Literal["at+jwt", "JWT"]

#: Always asymmetric.  EdDSA is published under this name: `Ed25519` (RFC 9864) makes PyJWT's
#: users drop the signing key.
ALGORITHMS: Final[tuple[Algorithm, ...]] = ("ES256", "RS256", "EdDSA")
TYPES: Final[tuple[TokenType, ...]] = ("at+jwt", "JWT")

#: Bytes.  A longer text is refused before anything in it is decoded.
MAX_TOKEN_BYTES: Final = 4096

#: RFC 9068 §2.2: what every token has.
REQUIRED_CLAIMS: Final = ("iss", "aud", "sub", "client_id", "iat", "exp", "jti")

#: Base64url characters around the payload, at most: a header of three members whose `kid` is a
#: 43-character thumbprint (128), two dots, and the longest signature, RS256 with 4096 bits (683).
_HEADER_AND_SIGNATURE: Final = 128 + 2 + 683
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode
#: RFC 3986 would allow more; these are the characters that need no escape anywhere they go.
_URI_TEXT: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


class UnfitClaims(Exception):
    """The claims break the profile.  A fault of ours: no caller can bring it about."""


@dataclass(frozen=True, slots=True)
class CheckedClaims:
    """Claims that passed `check`; the only thing that `mint` signs.  Made in this module only."""

    payload: bytes
    """The claims as JSON, just as they go into the token."""
    expires_in_s: int


def check(claims: Mapping[str, object], *, lifetime_s: int = TOKEN_LIFETIME) -> CheckedClaims:
    """Hold claims against the profile before they are signed.

    1. Every required claim is there; texts are not empty.
    2. Times are integers, and `exp` is after `iat` by at most the lifetime.
    3. There is no `nbf`: clocks a second apart would refuse a fresh token.
    4. The audience is one text.
    5. The token fits into MAX_TOKEN_BYTES under any algorithm.

    Args:
        claims: what the token shall say.
        lifetime_s: the longest life of a token in this deployment, in seconds.

    Raises:
        UnfitClaims: which rule is broken.

    Source: RFC 9068 §2.2, RFC 7519 §4.1.
    """
    # 1
    for name in ("iss", "aud", "sub", "client_id", "jti", "org_id", "env", "scope"):
        value = claims.get(name)
        if not isinstance(value, str) or not (value or name == "scope"):
            raise UnfitClaims(f"{name} is missing or no text")
    # 2
    iat, exp, as_of = claims.get("iat"), claims.get("exp"), claims.get("as_of")
    if type(iat) is not int or type(exp) is not int or type(as_of) is not int:
        raise UnfitClaims("iat, exp and as_of are integers")
    if not iat < exp <= iat + lifetime_s:
        raise UnfitClaims("exp is not within the lifetime after iat")
    # 3
    if "nbf" in claims:
        raise UnfitClaims("a token has no nbf")
    # 4 is part of 1: `aud` is a text there, never a list.
    # 5
    payload = _to_json(claims).encode()
    if _HEADER_AND_SIGNATURE + (len(payload) * 4 + 2) // 3 > MAX_TOKEN_BYTES:
        raise UnfitClaims(f"the token would be longer than {MAX_TOKEN_BYTES} bytes")
    return CheckedClaims(payload, exp - iat)


def is_audience(text: str) -> bool:
    """Whether a text can name an audience: not empty, printable ASCII, no fragment.

    Source: RFC 8707 §2 forbids the fragment; RFC 6749 §5.2 the quotes and backslashes.
    """
    return len(text) <= 512 and "#" not in text and _URI_TEXT.fullmatch(text) is not None  # noqa: PLR2004
