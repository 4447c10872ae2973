"""The revocation feed: its claims, the form of its subjects, and its limits; both sides read this.

The feed is a JWT that names what was narrowed lately.  A token is dead if any of its subjects
(its API key, organization, project, group, its signing key, its `jti`, or `*`) has an entry above
the token's `as_of`.

Subjects are hashed: the feed is public, and tells nobody which customers there are.

Source: RFC 7519 (JWT), RFC 8725 §3.11 and §3.12 (typing: no token is taken for a feed).
"""

from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import Final

TYPE: Final = "revocations+jwt"

#: The subject that every token has.
EVERYTHING: Final = "*"

#: Of one API key's tokens; more of them become one entry of the API key.
MOST_TOKENS: Final = 16
#: Of one organization's API keys; more of them become one entry of the organization.
MOST_API_KEYS: Final = 1000
#: Of the entries as JSON; more become one entry of everything.
MAX_ENTRIES_BYTES: Final = 256 * 1024
#: Of the whole feed: the entries in base64, and what stands around them.
MAX_FEED_BYTES: Final = MAX_ENTRIES_BYTES * 4 // 3 + 16 * 1024

_SUBJECT_CHARACTERS: Final = 16


def subject(of: str) -> str:
    """What stands in the feed for an id: 96 bits of its SHA-256 in base64url."""
    digest = urlsafe_b64encode(sha256(of.encode()).digest())
    return digest[:_SUBJECT_CHARACTERS].decode("ascii")
