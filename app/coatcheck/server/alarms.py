"""Alarms: a right secret from an address that its API key does not allow, told to its owner.

It is the best sign of a leak.  Noted in memory on the token path and written to the change log
once a second; whoever holds a stolen secret must not be able to fill the log with it, nor to hide
another API key's alarm behind its own.  What is not told in a row of its own is counted in the
API key's next row.
"""

import logging
import threading
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from coatcheck.client_address import Address
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)

_ACTOR: Final = Actor("service:alarms")
#: Seconds in which one address of an API key is told once.
QUIET: Final = 600
#: Rows that one process writes in a minute.
ROWS_PER_MINUTE: Final = 100
_MINUTE: Final = 60
#: Uses that are noted between two flushes.
_MOST_NOTED: Final = 10_000
#: Addresses that are remembered as told, or API keys of which uses are counted.
_MOST_REMEMBERED: Final = 10_000
#: Addresses of one API key that wait for a row.
_MOST_WAITING: Final = 10


@dataclass(slots=True)
class _Waiting:
    """Uses of an API key from one address that wait for a row."""

    organization_id: str
    at: int
    uses: int = 1


class Alarms:
    """What one process has noticed and not written yet.

    An address that is told but not known (behind a proxy that names nobody) is `unknown`.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Appending and taking are one step each, so that the token path needs no lock.
        self._noted: deque[tuple[str, str, str, int]] = deque(maxlen=_MOST_NOTED)
        self._flushing = threading.Lock()
        self._told_at: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._waiting: OrderedDict[tuple[str, str], _Waiting] = OrderedDict()
        #: By API key: how many addresses wait, and how many uses no row will tell by itself.
        self._waiting_of: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        #: When the rows of the last minute were written.
        self._written: deque[int] = deque()

    def wrong_address(
        self, api_key_id: str, organization_id: str, address: Address | None, now: int
    ) -> None:
        """Note a right secret that was refused for its address.  `now`: seconds since the epoch."""
        where = "unknown" if address is None else str(address)
        self._noted.append((api_key_id, organization_id, where, now))

    def flush(self, now: int) -> None:
        """Write what may be written now.  While the database is away it is kept for later."""
        with self._flushing:
            for _ in range(len(self._noted)):
                self._take(*self._noted.popleft())
            # A clock that was set back must not silence anybody.
            while self._written and not 0 <= now - self._written[0] < _MINUTE:
                self._written.popleft()
            room = ROWS_PER_MINUTE - len(self._written)
            due = list(self._waiting.items())[:room]
            if not due:
                return
            try:
                with self._store.transaction() as tx:
                    tx.append(self._rows(due))
            except StoreUnavailable as error:
                _log.warning("alarms not written, kept for the next try: %s", error)
            else:
                self._done(due, now)

    def _take(self, api_key_id: str, organization_id: str, address: str, at: int) -> None:
        pair = (api_key_id, address)
        told_at = self._told_at.get(pair)
        was_told = told_at is not None and 0 <= at - told_at < QUIET
        if pair in self._waiting:
            self._waiting[pair].uses += 1
        elif was_told or self._waiting_of[api_key_id] >= _MOST_WAITING:
            self._count(api_key_id)
        else:
            self._waiting[pair] = _Waiting(organization_id, at)
            self._waiting_of[api_key_id] += 1

    def _count(self, api_key_id: str) -> None:
        if api_key_id in self._untold or len(self._untold) < _MOST_REMEMBERED:
            self._untold[api_key_id] += 1

    def _rows(self, due: list[tuple[tuple[str, str], _Waiting]]) -> list[Change]:
        untold = dict(self._untold)
        return [
            Change(
                What.USE_FROM_WRONG_ADDRESS,
                api_key_id,
                _ACTOR,
                waiting.at,
                waiting.organization_id,
                wider=waiting.organization_id,
                detail={"address": address, "uses": waiting.uses + untold.pop(api_key_id, 0)},
            )
            for (api_key_id, address), waiting in due
        ]

    def _done(self, due: list[tuple[tuple[str, str], _Waiting]], now: int) -> None:
        for pair, waiting in due:
            api_key_id, _ = pair
            del self._waiting[pair]
            self._waiting_of[api_key_id] -= 1
            if not self._waiting_of[api_key_id]:
                del self._waiting_of[api_key_id]
            self._untold.pop(api_key_id, None)
            self._told_at[pair] = waiting.at
            self._told_at.move_to_end(pair)
            self._written.append(now)
        while len(self._told_at) > _MOST_REMEMBERED:
            self._told_at.popitem(last=False)
