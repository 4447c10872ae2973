"""Counting: how many tokens each API key got, and when the last one.

Counted in memory on the token path and written once a second, one row per used key, so that a
busy key costs the database no more than an idle one.  A crash loses at most the last second.

Of a secret that a rotation has replaced it is also written when it was used last: whoever rotates
sees whether somebody still needs it.
"""

import logging
import threading
from collections import deque
from typing import Final, NamedTuple

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


_NONE: Final = Count()


class Usage:
    """The counts of one process that are not written yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Used API keys in the order of their use.  Appending and taking are one step each, so
        #: the token path needs no lock.
        self._uses: deque[tuple[str, int, bool]] = deque()
        self._uses_of_replaced: deque[tuple[bytes, int]] = deque()
        self._flushing = threading.Lock()
        self._counts: dict[str, Count] = {}
        self._replaced: dict[bytes, int] = {}

    def count(
        self,
        api_key_id: str,
        now: int,
        *,
        is_raw_key_use: bool = False,
        replaced_digest: bytes | None = None,
    ) -> None:
        """Count one issued token.

        Args:
            now: seconds since the epoch.
            replaced_digest: of the secret that it was issued for, if a rotation has replaced it.
        """
        self._uses.append((api_key_id, now, is_raw_key_use))
        if replaced_digest is not None:
            self._uses_of_replaced.append((replaced_digest, now))

    def flush(self) -> None:
        """Write what was counted.  While the database is away the counts are kept for later."""
        with self._flushing:
            self._add_up()
            if not self._counts:
                return
            try:
                with self._store.transaction() as tx:
                    tx.add_usage(self._counts)
                    tx.add_uses_of_secrets(self._replaced)
            except StoreUnavailable as error:
                _log.warning("usage not written, kept for the next try: %s", error)
            else:
                self._counts, self._replaced = {}, {}

    def _add_up(self) -> None:
        for _ in range(len(self._uses)):
            api_key_id, now, is_raw_key_use = self._uses.popleft()
            before = self._counts.get(api_key_id, _NONE)
            self._counts[api_key_id] = Count(
                before.tokens_issued + 1,
                before.raw_key_uses + is_raw_key_use,
                max(before.last_used_at, now),
            )
        # After the uses that they belong to: whatever is written has its count.
        for _ in range(len(self._uses_of_replaced)):
            digest, now = self._uses_of_replaced.popleft()
            self._replaced[digest] = max(self._replaced.get(digest, now), now)
