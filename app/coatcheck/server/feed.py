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
from collections import deque
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
#: So many entries at most can fit: a quoted subject, a colon, a number and a comma each.
_MOST_ENTRIES: Final = feed_profile.MAX_ENTRIES_BYTES // len('"0123456789abcdef":1,')


class Entries:
    """The feed's entries, bounded: subject in the feed's form → highest sequence number.

    1. More than MOST_TOKENS tokens of one API key become one entry of the API key.
    2. More than MOST_API_KEYS API keys of one organization become one of the organization.
    3. More than MAX_ENTRIES_BYTES become one entry of everything.

    Kept up row by row: a busy log must not be folded anew for each feed.
    """

    def __init__(self) -> None:
        #: In the order of their sequence numbers; the oldest leave first.
        self._rows: deque[Narrowing] = deque()
        self._tokens = _Groups(feed_profile.MOST_TOKENS)
        self._api_keys = _Groups(feed_profile.MOST_API_KEYS)
        #: One group: there is nothing above them but everything.
        self._others = _Groups(math.inf)

    def add(self, rows: Iterable[Narrowing]) -> None:
        """Add rows above all that are here."""
        for row in rows:
            self._rows.append(row)
            self._groups_of(row).add(row)

    def drop_before(self, at: int) -> None:
        """Let the rows go that are older; `at` in seconds since the epoch.

        Sequence order is the order of time but for a clock that was set back.
        """
        while self._rows and self._rows[0].at < at:
            row = self._rows.popleft()
            self._groups_of(row).drop(row)

    def told(self) -> dict[str, int]:
        """What the feed says."""
        told: dict[str, int] = {}
        if not self._rows:
            return told
        # 3, before any work: so many cannot fit.
        count = len(self._others) + len(self._tokens) + len(self._api_keys)
        if count <= _MOST_ENTRIES:
            for groups in (self._others, self._tokens, self._api_keys):
                # 1, 2
                groups.tell(told)
            if len(_to_json(told)) <= feed_profile.MAX_ENTRIES_BYTES:
                return told
        return {feed_profile.subject(feed_profile.EVERYTHING): self._rows[-1].seq}

    def _groups_of(self, row: Narrowing) -> "_Groups":
        if row.what == What.TOKEN_REVOKED.text:
            return self._tokens
        return self._api_keys if row.what.startswith("api_key.") else self._others


class _Groups:
    """Subjects by the subject above them, each with its highest sequence number."""

    def __init__(self, most: float) -> None:
        """Args:
        most: entries that a group may have before it is told as one.
        """
        self._most = most
        self._groups: dict[str, dict[str, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        """How many entries are told."""
        return self._count

    def add(self, row: Narrowing) -> None:
        group = self._groups.setdefault(row.wider, {})
        self._count -= self._told_of(group)
        subject = feed_profile.subject(row.subject)
        # Again at the end: the last one of a group has its highest number.
        group.pop(subject, None)
        group[subject] = row.seq
        self._count += self._told_of(group)

    def drop(self, row: Narrowing) -> None:
        group = self._groups[row.wider]
        subject = feed_profile.subject(row.subject)
        if group.get(subject) != row.seq:
            return
        self._count -= self._told_of(group)
        del group[subject]
        self._count += self._told_of(group)
        if not group:
            del self._groups[row.wider]

    def tell(self, told: dict[str, int]) -> None:
        for wider, group in self._groups.items():
            if len(group) > self._most:
                _raise_to(told, feed_profile.subject(wider), group[next(reversed(group))])
            else:
                for subject, seq in group.items():
                    _raise_to(told, subject, seq)

    def _told_of(self, group: Mapping[str, int]) -> int:
        return 1 if len(group) > self._most else len(group)


def entries(narrowings: Iterable[Narrowing]) -> dict[str, int]:
    """The feed's entries for these rows, which are in the order of their sequence numbers."""
    kept = Entries()
    kept.add(narrowings)
    return kept.told()


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
        self._entries = Entries()
        self._kids: tuple[str, ...] = ()
        self._news_at = -1
        self._told_at = -1
        self._woken_at = -math.inf
        self._news = asyncio.Event()
        self._signed: bytes | None = None
        self._signed_at = 0.0
        self._is_stopped = False
        #: How many wait here for news.
        self.followers = 0

    @property
    def head(self) -> int:
        """The position in the change log up to which it was last read."""
        return self._head

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
            self.followers += 1
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass
            finally:
                self.followers -= 1
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
        if head != self._head:
            # A restore starts a new log.  Its name is read after the head: the new name with an
            # old head is refused once by followers, the old name with a new head for ever.
            self._log = self._store.log()
        # One that came after the look at the head comes again at the next one.
        new = [row for row in new if row.seq <= head]
        self._entries.add(new)
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
        self._entries.drop_before(now - FEED_WINDOW)
        signer = self._ring.at(self._head).signer(FEED_ALGORITHM, now, "feed")
        claims = {
            "iss": self._issuer,
            "aud": self.url,
            "iat": now,
            "exp": now + FEED_STALE,
            "log": self._log,
            "seq": self._head,
            "entries": self._entries.told(),
            "kids": list(self._kids),
        }
        return signer.sign(feed_profile.TYPE, _to_json(claims).encode())
