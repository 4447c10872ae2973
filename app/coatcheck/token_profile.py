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
from typing import Final, Literal, NamedTuple

from coatcheck import base64url
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
MAX_HEADER_AND_SIGNATURE: Final = 128 + 2 + 683
#: What each token has of its own, as it ends the payload.
_OWN_CLAIMS: Final = b',"iat":%d,"exp":%d,"as_of":%d,"jti":"%b"}'
_OWN_NAMES: Final = frozenset(("iat", "exp", "as_of", "jti"))
#: Times have ten digits until 2286, sequence numbers at most 19, a `jti` 22.
_LONGEST_OWN_CLAIMS: Final = len(_OWN_CLAIMS % (10**9, 10**9, 2**63 - 1, b"0" * 22))
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode
#: RFC 3986 would allow more; these are the characters that need no escape anywhere they go.
_URI_TEXT: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


class UnfitClaims(Exception):
    """The claims break the profile.  A fault of ours: no caller can bring it about."""


class CheckedClaims(NamedTuple):
    """Claims that passed every check; the only thing that `mint` signs.  Made in this module only.

    A tuple, because a frozen dataclass takes three times as long to make.
    """

    payload: bytes
    """The claims as JSON, just as they go into the token."""
    expires_in_s: int


@dataclass(frozen=True, slots=True)
class CheckedTerms:
    """Checked claims but those that each token has of its own.  Made by `check` only.

    They are the same for every token of an API key and an ask, so they are checked and written
    once; a token takes its moment and its name.

    Attributes:
        text: the claims as JSON, without the brace that ends them.
        lifetime_s: how long a token lives, in seconds.
        ends_at: seconds since the epoch; no token lives longer than that.  None: no end.
    """

    text: bytes
    lifetime_s: int
    ends_at: int | None

    def at(self, now: int, *, as_of: int, token_id: bytes) -> CheckedClaims:
        """The claims of one token, issued now.

        4. `exp` is after `iat` by the lifetime, or by less where the terms end before.

        Args:
            now: seconds since the epoch; becomes `iat`.
            as_of: the head of the change log.
            token_id: random bytes; become the `jti`.

        Raises:
            UnfitClaims: the terms have ended.
        """
        # 4
        expires_in_s = self.lifetime_s
        if self.ends_at is not None and self.ends_at - now < expires_in_s:
            expires_in_s = self.ends_at - now
            if expires_in_s <= 0:
                raise UnfitClaims("the terms have ended: exp would not be after iat")
        jti = base64url.encode(token_id)
        own = _OWN_CLAIMS % (now, now + expires_in_s, as_of, jti)
        return CheckedClaims(self.text + own, expires_in_s)


def check(
    claims: Mapping[str, object],
    *,
    lifetime_s: int = TOKEN_LIFETIME,
    ends_at: int | None = None,
) -> CheckedTerms:
    """Hold claims against the profile before anything is signed.

    1. Every required claim that is not a token's own is there; texts are not empty; the audience
       is one text.
    2. A token's own claims are not among them, and neither is `nbf`: clocks a second apart would
       refuse a fresh token.
    3. The token fits into MAX_TOKEN_BYTES under any algorithm.

    Args:
        claims: what the tokens shall say.
        lifetime_s: how long a token lives in this deployment, in seconds; TOKEN_LIFETIME at most.
        ends_at: as `CheckedTerms.ends_at`.

    Raises:
        UnfitClaims: which rule is broken.

    Source: RFC 9068 §2.2, RFC 7519 §4.1.
    """
    # 1
    for name in ("iss", "aud", "sub", "client_id", "org_id", "env", "scope"):
        value = claims.get(name)
        if not isinstance(value, str) or not (value or name == "scope"):
            raise UnfitClaims(f"{name} is missing or no text")
    # 2
    if not _OWN_NAMES.isdisjoint(claims) or "nbf" in claims:
        raise UnfitClaims("iat, exp, as_of and jti are each token's own, and there is no nbf")
    if not 0 < lifetime_s <= TOKEN_LIFETIME:
        raise UnfitClaims("exp is not within the lifetime after iat")
    # 3
    text = _to_json(claims).encode()[:-1]
    longest = len(text) + _LONGEST_OWN_CLAIMS
    if MAX_HEADER_AND_SIGNATURE + (longest * 4 + 2) // 3 > MAX_TOKEN_BYTES:
        raise UnfitClaims(f"the token would be longer than {MAX_TOKEN_BYTES} bytes")
    return CheckedTerms(text, lifetime_s, ends_at)


def is_audience(text: str) -> bool:
    """Whether a text can name an audience: not empty, printable ASCII, no fragment.

    Source: RFC 8707 §2 forbids the fragment; RFC 6749 §5.2 the quotes and backslashes.
    """
    return len(text) <= 512 and "#" not in text and _URI_TEXT.fullmatch(text) is not None  # noqa: PLR2004
