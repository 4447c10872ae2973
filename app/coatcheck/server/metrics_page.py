"""GET /metrics, for those who run the deployment.

Told to a peer in `COATCHECK_METRICS_FROM`, loopback by default, and judged by the peer alone:
whatever a header says of the client's address decides nothing here.  A request that a proxy has
passed on is refused wherever the proxy stands, because its own address would open the page to
everybody behind it.

All of it comes from memory, but for the number of API keys, which only the database knows: they
are counted in a thread when somebody asks, and not again for a minute.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Final, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coatcheck import client_address
from coatcheck.client_address import Network
from coatcheck.server import metrics
from coatcheck.server.feed import Feed
from coatcheck.server.inflight import InFlight
from coatcheck.server.metrics import Metrics, Sample
from coatcheck.server.signing import LINES, RingKeeper
from coatcheck.server.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)

#: What proxies add to a request that they pass on.
_SIGNS_OF_A_PROXY: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_REFUSED: Final = {
    "error": "invalid_request",
    "error_description": "Metrics are told to peers in COATCHECK_METRICS_FROM, without a proxy.",
    "code": "forbidden",
}
_HEADERS: Final = {"Cache-Control": "no-store"}
#: Seconds for which a count of API keys is told.
_COUNTED_FOR: Final = 60
#: Seconds that whoever asks waits for a new one.
_COUNT_TIMEOUT: Final = 2
#: Seconds before its end from which on an API key counts as expiring.
_EXPIRING: Final = 14 * 86_400
_STATUSES: Final = ("active", "disabled", "expired", "revoked")


@runtime_checkable
class _HasPool(Protocol):
    """A store that keeps connections to a database elsewhere."""

    def pool_connections(self) -> dict[str, int]:
        """How many there are, by state: `idle`, `used`."""
        ...


class MetricsPage:
    """What this process knows, and with the others' counts what the service does."""

    def __init__(
        self,
        counted: Metrics,
        in_flight: InFlight,
        feed: Feed,
        ring: RingKeeper,
        store: Store,
        *,
        clock: Callable[[], float],
        rotate_every_s: int,
        told_to: Sequence[Network],
    ) -> None:
        self._metrics = counted
        self._in_flight = in_flight
        self._feed = feed
        self._ring = ring
        self._store = store
        self._clock = clock
        self._rotate_every_s = rotate_every_s
        self._told_to = told_to
        self._version = version("coatcheck")
        self._api_keys: dict[Sample, float] = {}
        self._counted_at: float | None = None
        self._counting: asyncio.Task[None] | None = None

    def flush(self) -> None:
        """Leave this worker's counts where the others find them."""
        self._metrics.flush(self._gauges())

    async def __call__(self, request: Request) -> Response:
        if not self._may_ask(request):
            return JSONResponse(_REFUSED, 403, _HEADERS)
        await self._count_api_keys()
        text = self._metrics.text(self._gauges(), self._common())
        return Response(text, headers=_HEADERS | {"Content-Type": metrics.CONTENT_TYPE})

    def _may_ask(self, request: Request) -> bool:
        peer = client_address.parse(request.client.host) if request.client else None
        is_passed_on = any(name in request.headers for name in _SIGNS_OF_A_PROXY)
        return (
            peer is not None
            and not is_passed_on
            and any(peer in network for network in self._told_to)
        )

    async def _count_api_keys(self) -> None:
        """Count anew, if the last count is old; however many ask, one count is under way."""
        if self._counting is None or self._counting.done():
            now = self._clock()
            at = self._counted_at
            if at is not None and 0 <= now - at < _COUNTED_FOR:
                return
            self._counted_at = now
            self._counting = asyncio.create_task(self._count(int(now)))
        await asyncio.wait({self._counting}, timeout=_COUNT_TIMEOUT)

    async def _count(self, now: int) -> None:
        try:
            self._api_keys = await asyncio.to_thread(_counted, self._store, now)
        except StoreUnavailable as error:
            # Nothing is better than what was true before.
            self._api_keys = {}
            _log.warning("API keys are not counted: %s", error)

    def _gauges(self) -> dict[Sample, float]:
        """What is this process's own."""
        gauges: dict[Sample, float] = {
            (metrics.REQUESTS_IN_FLIGHT,): self._in_flight.count,
            (metrics.FEED_FOLLOWERS,): self._feed.followers,
        }
        if isinstance(self._store, _HasPool):
            for state, number in self._store.pool_connections().items():
                gauges[(metrics.DB_POOL_CONNECTIONS, state)] = number
        return gauges

    def _common(self) -> dict[Sample, float]:
        """What is the same in every process.  From memory: the database may be away."""
        now = int(self._clock())
        common: dict[Sample, float] = {
            (metrics.BUILD_INFO, self._version): 1,
            (metrics.CHANGE_LOG_HEAD,): self._feed.head,
            **self._api_keys,
        }
        for purpose, algorithm in LINES:
            for one in self._ring.last_known.signing_keys:
                if (one.purpose, one.algorithm) != (purpose, algorithm) or not one.signs(now):
                    continue
                common[(metrics.SIGNING_KEY_AGE, purpose, algorithm)] = now - one.starts_at
                if one.ends_at is not None:
                    common[(metrics.NEXT_ROTATION, purpose, algorithm)] = one.ends_at
                elif self._rotate_every_s:
                    due = one.starts_at + self._rotate_every_s
                    common[(metrics.NEXT_ROTATION, purpose, algorithm)] = due
        return common


def _counted(store: Store, now: int) -> dict[Sample, float]:
    """How many API keys there are.  Raises StoreUnavailable."""
    found: Counter[Sample] = Counter({(metrics.API_KEYS, status): 0 for status in _STATUSES})
    found[(metrics.API_KEYS_EXPIRING,)] = 0
    after: str | None = ""
    while after is not None:
        # In many transactions: those who write must not wait for a count.
        with store.transaction(read_only=True) as tx:
            some = tx.count_api_keys(now, now + _EXPIRING, after)
        for status, number in some.by_status.items():
            found[(metrics.API_KEYS, status)] += number
        found[(metrics.API_KEYS_EXPIRING,)] += some.expiring
        after = some.last
    return dict(found)
