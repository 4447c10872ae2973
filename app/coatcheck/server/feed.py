"""The revocation feed: what was narrowed within the window, signed, for whoever verifies offline.

Each node builds it from the change log alone, so that all nodes say the same.  It is bounded
whatever happens: too many of one kind become one entry of the wider subject, which kills more
tokens than was asked for, and never fewer.

It is signed only while the log's head can be read: a feed vouches that nothing newer is known.

Source: RFC 7519 §4.1 (claims), RFC 6202 §2 (long polling).
"""

import asyncio
import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from coatcheck import feed_profile
from coatcheck.durations import FEED_FRESH, FEED_POLL, FEED_STALE, FEED_WAKE_MIN, FEED_WINDOW
from coatcheck.server.changes import What
from coatcheck.server.signing import FEED_ALGORITHM, RingKeeper
from coatcheck.server.store import Narrowing, Store, StoreUnavailable

_log = logging.getLogger(__name__)
_to_json: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode
#: A signature is reused for half of what it may be old when it is handed out.
_REUSE: Final = FEED_FRESH / 2


def entries(narrowings: Iterable[Narrowing]) -> dict[str, int]:
    """The feed's entries, bounded: subject in the feed's form → highest sequence number.

    1. More than MOST_TOKENS tokens of one API key become one entry of the API key.
    2. More than MOST_API_KEYS API keys of one organization become one of the organization.
    3. More than MAX_ENTRIES_BYTES become one entry of everything.
    """
    tokens: dict[str, dict[str, int]] = defaultdict(dict)
    api_keys: dict[str, dict[str, int]] = defaultdict(dict)
    others: dict[str, int] = {}
    for row in narrowings:
        if row.what == What.TOKEN_REVOKED.text:
            _raise_to(tokens[row.wider], row.subject, row.seq)
        elif row.what.startswith("api_key."):
            _raise_to(api_keys[row.wider], row.subject, row.seq)
        else:
            _raise_to(others, row.subject, row.seq)
    # 1: the API key's organization is not known here, so it cannot be counted in step 2.
    _fold(tokens, others, feed_profile.MOST_TOKENS)
    # 2
    _fold(api_keys, others, feed_profile.MOST_API_KEYS)
    told = {feed_profile.subject(subject): seq for subject, seq in others.items()}
    # 3
    if len(_to_json(told)) > feed_profile.MAX_ENTRIES_BYTES:
        return {feed_profile.subject(feed_profile.EVERYTHING): max(told.values())}
    return told


def _fold(groups: Mapping[str, Mapping[str, int]], into: dict[str, int], most: int) -> None:
    """Move each group's entries, or one for all of them if there are too many."""
    for wider, group in groups.items():
        if len(group) > most:
            _raise_to(into, wider, max(group.values()))
            continue
        for subject, seq in group.items():
            _raise_to(into, subject, seq)


def _raise_to(entries: dict[str, int], subject: str, seq: int) -> None:
    entries[subject] = max(seq, entries.get(subject, 0))


class Feed:
    """The feed of one node."""

    def __init__(
        self, issuer: str, store: Store, ring: RingKeeper, clock: Callable[[], float]
    ) -> None:
        self.url = f"{issuer}/oauth/revocations"
        self._issuer = issuer
        self._store = store
        self._ring = ring
        self._clock = clock
        self._log = store.log()
        self._head = -1
        self._narrowings: deque[Narrowing] = deque()
        self._kids: tuple[str, ...] = ()
        self._news_at = -1
        self._told_at = -1
        self._woken_at = -math.inf
        self._news = asyncio.Event()
        self._signed: bytes | None = None
        self._signed_at = 0.0
        self._is_stopped = False

    def stop(self) -> None:
        """Answer everybody who waits, and let nobody wait any more: the process is ending."""
        self._is_stopped = True
        self._wake()

    async def follow(self) -> None:
        """Watch the head of the change log, and wake whoever waits; runs as long as the node."""
        is_away = False
        while True:
            try:
                self.refresh()
            except StoreUnavailable as error:
                # Once, not ten times a second.
                if not is_away:
                    _log.warning("the feed stands still until the database answers: %s", error)
                is_away = True
            else:
                if is_away:
                    _log.warning("the feed goes on")
                is_away = False
            await asyncio.sleep(FEED_POLL)

    async def get(self, after: int, wait_s: float) -> bytes:
        """The signed feed, at once if there is news above `after`, else when there is some.

        Args:
            after: the highest sequence number that the follower has seen.
            wait_s: seconds to wait for news at most.

        Raises:
            StoreUnavailable, NoSigner: nothing can be vouched for right now.
        """
        self.refresh()
        if after >= self._told_at and wait_s > 0 and not self._is_stopped:
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass
            self.refresh()
        return self._fresh()

    def refresh(self) -> bool:
        """Read what is new in the change log.  Returns whether it concerns followers.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        head = self._store.head()
        now = int(self._clock())
        kids = self._kids_at(head, now)
        if head == self._head and kids == self._kids:
            self._tell()
            return False
        new = [] if head == self._head else self._store.narrowings(self._head, now - FEED_WINDOW)
        # One that came after the look at the head comes again at the next one.
        new = [row for row in new if row.seq <= head]
        self._narrowings.extend(new)
        # Sequence order is the order of time but for a clock that was set back; the oldest go.
        while self._narrowings and self._narrowings[0].at < now - FEED_WINDOW:
            self._narrowings.popleft()
        is_news = bool(new) or kids != self._kids
        self._head, self._kids, self._signed = head, kids, None
        if is_news:
            self._news_at = head
        self._tell()
        return is_news

    def _tell(self) -> None:
        """Answer whoever waits, if there is news and the last wake was long enough ago."""
        now = time.monotonic()
        if self._news_at > self._told_at and now - self._woken_at >= FEED_WAKE_MIN:
            self._told_at, self._woken_at = self._news_at, now
            self._wake()

    def _kids_at(self, head: int, now: int) -> tuple[str, ...]:
        return tuple(key.kid for key in self._ring.at(head).published(now, purpose=None))

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _fresh(self) -> bytes:
        now = self._clock()
        if self._signed is None or not 0 <= now - self._signed_at < _REUSE:
            self._signed = self._sign(int(now))
            self._signed_at = now
        return self._signed

    def _sign(self, now: int) -> bytes:
        signer = self._ring.at(self._head).signer(FEED_ALGORITHM, now, "feed")
        claims = {
            "iss": self._issuer,
            "aud": self.url,
            "iat": now,
            "exp": now + FEED_STALE,
            "log": self._log,
            "seq": self._head,
            "entries": entries(row for row in self._narrowings if row.at >= now - FEED_WINDOW),
            "kids": list(self._kids),
        }
        return signer.sign(feed_profile.TYPE, _to_json(claims).encode())
