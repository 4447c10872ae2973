"""Counting: how many tokens each API key got, and when the last one.

Counted in memory on the token path and written once a second, one row per used key, so that a
busy key costs the database no more than an idle one.  A crash loses at most the last second.
"""

import logging
import threading

from coatcheck.server.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)


class Usage:
    """The counts of one process since the last flush."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}

    def count(self, api_key_id: str, now: int) -> None:
        """Count one issued token.  `now` in seconds since the epoch."""
        with self._lock:
            before = self._counts.get(api_key_id)
            self._counts[api_key_id] = (before[0] + 1 if before else 1, now)

    def flush(self) -> None:
        """Write what was counted.  While the database is away the counts are kept for later."""
        with self._lock:
            counts, self._counts = self._counts, {}
        if not counts:
            return
        try:
            with self._store.transaction() as tx:
                for api_key_id, (tokens_issued, last_used_at) in counts.items():
                    tx.add_usage(api_key_id, tokens_issued, last_used_at)
        except StoreUnavailable as error:
            self._take_back(counts)
            _log.warning("usage not written, kept for the next try: %s", error)

    def _take_back(self, counts: dict[str, tuple[int, int]]) -> None:
        with self._lock:
            for api_key_id, (tokens_issued, last_used_at) in counts.items():
                later = self._counts.get(api_key_id, (0, 0))
                self._counts[api_key_id] = (tokens_issued + later[0], max(last_used_at, later[1]))
