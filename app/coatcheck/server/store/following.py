"""What a node of many knows of the change log, kept up with a database on another machine.

A thread polls the log on a connection of its own and is the only one that does.  What the event
loop asks for between two polls (head, narrowings, signing keys, remembered API keys) is answered
from memory, and only while the last successful poll began less than CHANGE_LEASE ago: a node that
is cut off from the database says so within that time instead of vouching for what it cannot know.

No notifications: they are lost silently on a half-open connection, and polling works through a
pooler too.
"""

import asyncio
import logging
import math
import threading
import time
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from coatcheck.durations import (
    BUSY_TIMEOUT,
    CHANGE_LEASE,
    CHANGE_POLL,
    CLOCK_DRIFT_MAX,
    FEED_WINDOW,
    LEEWAY_MAX,
)
from coatcheck.server.store.base import (
    ApiKeyRecord,
    Narrowing,
    SigningKeyRecord,
    StoreUnavailable,
)

_log = logging.getLogger(__name__)

#: Records remembered by each process; about 1 KiB each.
_MOST_RECORDS: Final = 32_768
#: Changes of what a record is read from: their subjects are in it.
_ROOMS_OF_RECORDS: Final = frozenset({"api_key", "organization", "project", "group"})
#: Changes of what no record holds.
_ROOMS_OF_OTHERS: Final = frozenset({"token", "signing_key", "member", "use", "credit"})
#: Seconds of the log that the feed may ask for.
_KEPT: Final = FEED_WINDOW + LEEWAY_MAX


class ClockOff(StoreUnavailable):
    """This machine's clock is not the database's.  The database itself is there."""


class LogRow(NamedTuple):
    """A row of the change log, as far as a node has to know it.  `at` as everywhere."""

    seq: int
    at: int
    what: str
    subject: str
    wider: str
    narrows: bool


class News(NamedTuple):
    """One poll's answer.

    Attributes:
        head: where the log stands.
        rows: what is above the position that was asked for, or a first part of it.
        clock_drift_s: by how much this machine's clock is ahead of the database's, in seconds.
    """

    log: str
    head: int
    rows: Sequence[LogRow]
    clock_drift_s: float


class ReadLog(Protocol):
    """How a follower reads.  Each method waits a bounded time, and may raise StoreUnavailable."""

    def news(self, after: int | None) -> News:
        """What happened above a position; None: only where the log stands."""
        ...

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        """As `Store.narrowings`."""
        ...

    def signing_keys(self) -> list[SigningKeyRecord]:
        """As `Store.signing_keys`."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


class Follower:
    """Follows one log.  The thread starts when something is asked for the first time.

    Attributes:
        head: up to where the log is known; -1 before the first poll.
        log: its name; empty in a database that holds no deployment.
        clock_drift_s: as `News.clock_drift_s`, at the last poll.

    Args:
        source: reads from the database; used by the thread alone.
        clock: seconds since the epoch.
    """

    def __init__(self, source: ReadLog, clock: Callable[[], float]) -> None:
        self._source = source
        self._clock = clock
        self.head = -1
        self.log = ""
        self.clock_drift_s = 0.0
        # By the monotonic clock: when the last good poll began, and the last write here ended.
        self._polled_at = self._wrote_at = -math.inf
        # When the last poll began that was answered, whatever the answer.
        self._heard_at = -math.inf
        self._narrowings: list[Narrowing] = []
        self._signing_keys: list[SigningKeyRecord] = []
        self._records: OrderedDict[bytes, ApiKeyRecord] = OrderedDict()
        #: Counts what makes a record that is being read at this moment out of date.
        self._generation = 0
        self._remembering = threading.Lock()
        #: Why the last poll failed; None if it did not.
        self._trouble: StoreUnavailable | None = None
        self._polled = threading.Condition()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    # --- what is known

    @property
    def is_fresh(self) -> bool:
        """Whether what is known may be vouched for."""
        return time.monotonic() - self._polled_at < CHANGE_LEASE

    @property
    def is_caught_up(self) -> bool:
        """Whether it also holds what this very process wrote."""
        return self._polled_at > self._wrote_at and self.is_fresh

    def require_fresh(self) -> None:
        """Wait for a poll at the very beginning, and after a write where no event loop is held up.

        Raises:
            StoreUnavailable: what is known may not be vouched for.
        """
        self._start()
        if self.head < 0 or not (self.is_caught_up or _in_event_loop()):
            with self._polled:
                self._polled.wait_for(
                    lambda: self.is_caught_up or self._trouble, timeout=BUSY_TIMEOUT
                )
        if not self.is_fresh:
            raise self._told()

    def require_heard(self, within_s: float) -> None:
        """Wait for a poll that begins from now on.

        Raises:
            StoreUnavailable: none was answered in time.
        """
        self._start()
        since = time.monotonic()
        self._wake.set()
        with self._polled:
            if not self._polled.wait_for(lambda: self._heard_at >= since, timeout=within_s):
                raise self._told()

    def is_ready(self) -> bool:
        """Whether `is_caught_up`; False if a poll is under way that will tell.  Never waits.

        Raises:
            StoreUnavailable: the last poll has failed.
        """
        self._start()
        if self.is_caught_up:
            return True
        if self._trouble is not None and not self.is_fresh:
            raise self._told()
        return False

    def _told(self) -> StoreUnavailable:
        """Why nothing can be vouched for.

        Anew for each who asks: one exception that is raised for thousands of requests would keep
        the frames of all of them.
        """
        trouble = self._trouble
        if trouble is None:
            return StoreUnavailable("the change log was not heard of in time")
        return type(trouble)(*trouble.args)

    @property
    def is_away(self) -> bool:
        """Whether the database is known not to answer, so that it need not be tried."""
        return self._trouble is not None and not (
            self.is_fresh or isinstance(self._trouble, ClockOff)
        )

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        kept = self._narrowings
        start = bisect_right(kept, after, key=lambda row: row.seq)
        return [row for row in kept[start:] if row.at >= since]

    def signing_keys(self) -> list[SigningKeyRecord]:
        return list(self._signing_keys)

    # --- remembered API keys

    def remembered(self, digest: bytes) -> ApiKeyRecord | None:
        return self._records.get(digest)

    @property
    def generation(self) -> int:
        """What to show `remember`; taken before a record is read."""
        return self._generation

    def remember(self, records: Iterable[ApiKeyRecord], generation: int) -> None:
        """Keep what was read, unless something has changed since the reading began."""
        with self._remembering:
            if generation != self._generation:
                return
            for record in records:
                self._records[record.digest] = record
            while len(self._records) > _MOST_RECORDS:
                self._records.popitem(last=False)

    # --- the thread

    def wrote(self) -> None:
        """This process has changed something: its own next look sees it."""
        self._wrote_at = time.monotonic()
        self._wake.set()

    def stop(self) -> None:
        """End the thread, for good, and wait for it."""
        self._is_stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._source.close()

    def _start(self) -> None:
        if self._thread is not None:
            return
        with self._polled:
            if self._thread is None and not self._is_stopped:
                self._thread = threading.Thread(
                    target=_follow,
                    args=(weakref.ref(self), self._wake),
                    name="coatcheck-log",
                    daemon=True,
                )
                self._thread.start()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def step(self) -> None:
        """One poll, and what follows from it."""
        began = time.monotonic()
        try:
            is_all = self._poll()
        except Exception as error:
            told = error if isinstance(error, StoreUnavailable) else _unexpected(error)
            if self._trouble is None:
                # Once, not five times a second.
                _log.warning("the change log cannot be followed: %s", told)
            self._trouble = told.with_traceback(None)
            if isinstance(error, ClockOff):
                self._heard_at = began
        else:
            self._heard_at = began
            if self._trouble is not None:
                _log.warning("the change log is followed again, at %d", self.head)
            self._trouble = None
            if is_all:
                self._polled_at = began
            else:
                self._wake.set()
        with self._polled:
            self._polled.notify_all()

    def _poll(self) -> bool:
        """Returns whether nothing is left to be read."""
        if self.head < 0:
            self._begin()
            return True
        news = self._source.news(self.head)
        self._require_same_time(news)
        if news.log != self.log:
            self._begin()
            return True
        if news.head < self.head:
            raise StoreUnavailable(
                f"the change log ends at {news.head} and had reached {self.head}: the database lost"
                " changes in a failover or a restore; run coatcheck db new-log"
            )
        if news.rows:
            self._take(news.rows)
            self.head = news.rows[-1].seq
        return self.head >= news.head

    def _begin(self) -> None:
        """Read everything anew: at the start, and when another log took this one's place."""
        # Before the look at the head: what is read while something changes is not kept.
        self._forget(None)
        news = self._source.news(None)
        self._require_same_time(news)
        since = int(self._clock()) - _KEPT
        narrowings = self._source.narrowings(-1, since)
        self._signing_keys = self._source.signing_keys()
        self._narrowings = [row for row in narrowings if row.seq <= news.head]
        self.log = news.log
        self._forget(None)
        self.head = news.head

    def _take(self, rows: Sequence[LogRow]) -> None:
        # All of it before the head moves: who sees the new head finds what it stands for.
        if any(row.what.startswith("signing_key.") for row in rows):
            self._signing_keys = self._source.signing_keys()
        self._forget(rows)
        since = int(self._clock()) - _KEPT
        kept = self._narrowings
        oldest = next((n for n, row in enumerate(kept) if row.at >= since), len(kept))
        new = [
            Narrowing(row.seq, row.at, row.what, row.subject, row.wider)
            for row in rows
            if row.narrows
        ]
        self._narrowings = kept[oldest:] + new

    def _forget(self, rows: Sequence[LogRow] | None) -> None:
        """Let go of the records that these rows concern; None: of all."""
        subjects = None if rows is None else _concerned(rows)
        with self._remembering:
            self._generation += 1
            if subjects is None:
                self._records.clear()
            elif subjects:
                outdated = [
                    digest
                    for digest, record in self._records.items()
                    if not subjects.isdisjoint(
                        (
                            record.id,
                            record.organization_id,
                            record.project_id,
                            record.group_id,
                        )
                    )
                ]
                for digest in outdated:
                    del self._records[digest]

    def _require_same_time(self, news: News) -> None:
        """A clock that is off makes tokens that live too long, or none that is accepted."""
        self.clock_drift_s = news.clock_drift_s
        if abs(news.clock_drift_s) > CLOCK_DRIFT_MAX:
            raise ClockOff(
                f"this machine's clock is {news.clock_drift_s:+.0f} s off the database's: set both"
                " by NTP; until then no token is issued here"
            )


def _concerned(rows: Sequence[LogRow]) -> set[str | None] | None:
    """Ids of what is in the records that these rows change; None: it may be any."""
    subjects: set[str | None] = set()
    for row in rows:
        room = row.what.partition(".")[0]
        if room in _ROOMS_OF_RECORDS:
            subjects.add(row.subject)
        elif room not in _ROOMS_OF_OTHERS:
            return None
    return subjects


def _unexpected(error: Exception) -> StoreUnavailable:
    """Whatever it was, the thread goes on; the message may hold a row."""
    return StoreUnavailable(f"the change log cannot be read ({type(error).__name__})")


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _follow(reference: "weakref.ref[Follower]", wake: threading.Event) -> None:
    while True:
        follower = reference()
        if follower is None or follower.is_stopped:
            return
        wake.clear()
        began = time.monotonic()
        follower.step()
        del follower
        wake.wait(max(0.0, CHANGE_POLL - (time.monotonic() - began)))
