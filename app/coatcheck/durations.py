"""Every duration of the product, in seconds, and the relations between them.

One budget, one place: a verifier's cache, a signing key's publication and a token's life only
fit together if they are chosen together.  The relations are asserted at import, so that an edit
that breaks one cannot be shipped.

Source: RFC 9068 §5 (short lifetimes), RFC 7519 §4.1.4 (leeway).
"""

import re
from dataclasses import dataclass
from typing import Final

TOKEN_LIFETIME: Final = 600
"""How long an access token lives, unless its API key ends earlier."""

LEEWAY: Final = 30
"""How far a resource server's clock may be off before a fresh token is refused."""

LEEWAY_MAX: Final = 60
"""The most leeway a verifier accepts from its configuration."""

JWKS_MAX_AGE: Final = 300
"""How long anybody may cache the key set (`Cache-Control: max-age`)."""

JWKS_COOLDOWN: Final = 30
"""Least time between two fetches of the key set, whatever the reason for the second one."""

JWKS_STALE_IF_ERROR: Final = 24 * 3600
"""How long our verifier goes on with the last good key set while the issuer is away."""

PUBLISH_AHEAD: Final = 24 * 3600
"""How long a signing key is in the key set before it signs."""

PUBLISH_AFTER: Final = 2 * TOKEN_LIFETIME
"""How long a signing key stays in the key set after its successor started."""

ROTATE_EVERY: Final = 90 * 24 * 3600
"""How long a signing key signs before its successor does."""

ROTATION_LOOK: Final = 60
"""How often a node looks whether a signing key is due for a successor."""

FEED_WINDOW: Final = 2 * TOKEN_LIFETIME
"""How long a narrowing stays in the revocation feed, and an entry in a verifier."""

FEED_FRESH: Final = 20
"""How old the signature of a feed may be when it is handed out."""

FEED_STALE: Final = 2 * FEED_FRESH
"""How old the last signed feed may be before a verifier calls its own knowledge stale."""

FEED_WAIT_MAX: Final = 25
"""How long a long poll of the feed waits for news."""

FEED_POLL: Final = 0.1
"""How often a node looks at the head of the change log for its followers."""

FEED_WAKE_MIN: Final = 0.25
"""Least time between two wakes of all followers of one node."""

FIRST_LOAD_TIMEOUT: Final = 5
"""How long the first call of a verifier waits for the key set before it answers 503."""

USAGE_FLUSH: Final = 1
"""How often counted uses are written to the database; at most this much is lost in a crash."""

ROTATION_OVERLAP: Final = 24 * 3600
"""How long the replaced secret of an API key goes on working, unless the owner says otherwise."""

BUSY_TIMEOUT: Final = 2
"""How long a write waits for the database before the answer is 503."""

READY_TIMEOUT: Final = 3
"""How long the question whether a node is ready may take."""

CHANGE_POLL: Final = 0.2
"""How often a node of several looks for changes that others made."""

CHANGE_LEASE: Final = 0.5
"""How long after the beginning of its last look a node may vouch for what it knows."""

CLOCK_DRIFT_MAX: Final = 10
"""How far a node's clock may be from the database's before it stops issuing tokens."""

# A token signed in the last instant before a successor starts must verify until it expires, on
# a clock that is late by the largest leeway.
assert PUBLISH_AFTER >= TOKEN_LIFETIME + LEEWAY_MAX  # noqa: S101
# A cache filled just before a signing key was published must be refilled before that key signs.
assert PUBLISH_AHEAD >= 2 * JWKS_MAX_AGE  # noqa: S101
# A successor is made while the signing key before it signs, never while that one still waits.
assert ROTATE_EVERY >= 2 * PUBLISH_AHEAD  # noqa: S101
assert ROTATION_LOOK < PUBLISH_AHEAD  # noqa: S101
# An entry must outlive every token that it could concern, on a clock that is late.
assert FEED_WINDOW >= TOKEN_LIFETIME + LEEWAY_MAX  # noqa: S101
assert FEED_FRESH < FEED_WAIT_MAX < FEED_STALE  # noqa: S101
assert JWKS_COOLDOWN <= JWKS_MAX_AGE  # noqa: S101
assert LEEWAY <= LEEWAY_MAX < TOKEN_LIFETIME  # noqa: S101
# A lost poll must not make a node silent, nor its silence last a second.
assert 2 * CHANGE_POLL <= CHANGE_LEASE < 1  # noqa: S101


@dataclass(frozen=True, slots=True)
class Publication:
    """How long a signing key is in the key set before and after it signs, and what follows.

    There is one, but for tests that cannot wait for days.

    Attributes:
        max_age: how long anybody may cache the key set.
        ahead: as PUBLISH_AHEAD.
        after: as PUBLISH_AFTER.
        look: as ROTATION_LOOK.
    """

    max_age: int = JWKS_MAX_AGE
    ahead: int = PUBLISH_AHEAD
    after: int = PUBLISH_AFTER
    look: float = ROTATION_LOOK

    @classmethod
    def shrunk(cls, max_age: int, token_lifetime: int) -> "Publication":
        """All of it for a shorter cache time, in the same relations.

        Args:
            token_lifetime: of the deployment; what was signed stays verifiable that long.
        """
        # Times are whole seconds: what is published at the end of one has been so for a moment.
        ahead = 2 * max_age + 1
        return cls(max_age, ahead, after=2 * token_lifetime, look=min(ROTATION_LOOK, ahead / 10))


_SPAN: Final = re.compile(r"([0-9]{1,9})([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def told(seconds: int) -> str:
    """A span as `span` reads it, in the largest unit that tells it exactly: 7776000 is `90d`."""
    unit = next(unit for unit in ("d", "h", "m", "s") if seconds % _UNITS[unit] == 0)
    return f"{seconds // _UNITS[unit]}{unit}"


def span(text: str) -> int | None:
    """The seconds of a span as people write it: `90d`, `24h`, `30m`, `45s`; None: it is none."""
    match = _SPAN.fullmatch(text)
    return None if match is None else int(match[1]) * _UNITS[match[2]]
