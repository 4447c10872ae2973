"""Counting: how many tokens each API key got, and when the last one.

Counted in memory on the token path and written once a second, one row per used key, so that a
busy key costs the database no more than an idle one.  A crash loses at most the last second.
"""

import logging
import threading
from typing import NamedTuple

from coatcheck.server.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)


class Count(NamedTuple):
    """Uses of one API key.  `last_used_at` in seconds since the epoch.

    Attributes:
        raw_key_uses: tokens that a resource server got because a caller sent it the key itself.
    """

    tokens_issued: int = 0
    raw_key_uses: int = 0
    last_used_at: int = 0

    def plus(self, other: "Count") -> "Count":
        return Count(
            self.tokens_issued + other.tokens_issued,
            self.raw_key_uses + other.raw_key_uses,
            max(self.last_used_at, other.last_used_at),
        )


class Usage:
    """The counts of one process since the last flush."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: dict[str, Count] = {}

    def count(self, api_key_id: str, now: int, *, is_raw_key_use: bool = False) -> None:
        """Count one issued token.  `now` in seconds since the epoch."""
        self._add(api_key_id, Count(1, int(is_raw_key_use), now))

    def flush(self) -> None:
        """Write what was counted.  While the database is away the counts are kept for later."""
        with self._lock:
            counts, self._counts = self._counts, {}
        if not counts:
            return
        try:
            with self._store.transaction() as tx:
                tx.add_usage(counts)
        except StoreUnavailable as error:
            for api_key_id, count in counts.items():
                self._add(api_key_id, count)
            _log.warning("usage not written, kept for the next try: %s", error)

    def _add(self, api_key_id: str, count: Count) -> None:
        with self._lock:
            before = self._counts.get(api_key_id)
            self._counts[api_key_id] = count if before is None else before.plus(count)
