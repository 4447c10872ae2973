"""The API key: the long-lived secret of a caller.  Its grammar, checksum, digest and mask; no I/O.

    api-key     = brand "_" [ environment "_" ] secret checksum
    brand       = 1*16( ALPHA / DIGIT )
    environment = 1*16( LOALPHA / DIGIT )
    secret      = 32BASE62                    ; 190 random bits
    checksum    = 6BASE62                     ; CRC-32 of everything before it

The checksum lets typing errors be told apart offline and keeps secret scanners free of false
hits.  It is no security control: whoever can read it can compute it.

What is stored is the SHA-256 of the whole text.  The secret is random and long, so a slow
password hash would add cost for the service and nothing for an attacker.

Source: RFC 6749 §10.10 (guessing probability at most 2^-160); ISO 3309 (CRC-32, as in zlib).
"""

import hashlib
import re
import zlib
from dataclasses import dataclass
from typing import Final

from coatcheck import base62

SECRET_LENGTH: Final = 32
CHECKSUM_LENGTH: Final = 6
MAX_LENGTH: Final = 16 + 1 + 16 + 1 + SECRET_LENGTH + CHECKSUM_LENGTH

_GRAMMAR: Final = re.compile(
    r"(?P<brand>[A-Za-z0-9]{1,16})_(?:(?P<environment>[a-z0-9]{1,16})_)?(?P<rest>[0-9A-Za-z]{38})"
)
_BRAND: Final = re.compile(r"[A-Za-z0-9]{1,16}")
_ENVIRONMENT: Final = re.compile(r"[a-z0-9]{1,16}")


class MalformedApiKey(ValueError):
    """The text is no API key: wrong grammar, or a checksum that does not fit.

    The message never holds the text: it may be a secret with one letter wrong.
    """


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A text that has the form of an API key.  Whether it is one, only the store knows."""

    text: str
    brand: str
    environment: str | None

    def __repr__(self) -> str:
        return f"ApiKey({mask(self.text)})"


def prefix_for(brand: str, environment: str | None) -> str:
    """What stands before the secret, without the last underscore: `ck_live`, or `sk` alone.

    Raises:
        ValueError: brand or environment holds anything but letters and digits.
    """
    fits = _BRAND.fullmatch(brand) and (environment is None or _ENVIRONMENT.fullmatch(environment))
    if not fits:
        raise ValueError("brand: 1 to 16 letters or digits; environment: likewise, lower case")
    return brand if environment is None else f"{brand}_{environment}"


def make(prefix: str) -> str:
    """A new API key, as text.  The only place where one comes into being.

    Args:
        prefix: from `prefix_for`.
    """
    body = f"{prefix}_{base62.random_text(SECRET_LENGTH)}"
    return body + _checksum(body)


def parse(text: str) -> ApiKey:
    """Read a presented text as an API key.

    Raises:
        MalformedApiKey: grammar or checksum is wrong.
    """
    match = _GRAMMAR.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
        raise MalformedApiKey("not an API key: a prefix, an underscore and 38 letters or digits")
    if _checksum(text[:-CHECKSUM_LENGTH]) != text[-CHECKSUM_LENGTH:]:
        raise MalformedApiKey("the checksum does not fit: a character was lost or changed")
    return ApiKey(text, match["brand"], match["environment"])


def looks_like_one(text: str) -> bool:
    """Whether a credential is an API key by its form alone; the checksum is not looked at."""
    return len(text) <= MAX_LENGTH and _GRAMMAR.fullmatch(text) is not None


def digest(text: str) -> bytes:
    """SHA-256 of the whole API key, 32 bytes: what the store holds and looks up.

    Characters outside ASCII cannot be in an API key; they are replaced, so that any presented
    text has a digest and none raises.
    """
    return hashlib.sha256(text.encode("ascii", "replace")).digest()


def mask(text: str) -> str:
    """The one form in which an API key may be shown: `ck_live_7Qm4...9f2a`.

    Three ASCII dots, so that the mask may stand in an OAuth `error_description`.
    """
    prefix, _, rest = text.rpartition("_")
    if not prefix or len(rest) < SECRET_LENGTH:
        return "..."
    return f"{prefix}_{rest[:4]}...{rest[-4:]}"


def _checksum(body: str) -> str:
    return base62.encode(zlib.crc32(body.encode("ascii")), CHECKSUM_LENGTH)
