"""GET /metrics, for those who run the deployment.

Told to a peer in `COATCHECK_METRICS_FROM`, loopback by default, and judged by the peer alone:
whatever a header says of the client's address decides nothing here.  A request that a proxy has
passed on is refused wherever the proxy stands, because its own address would open the page to
everybody behind it.
"""

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

#: What proxies add to a request that they pass on.
_SIGNS_OF_A_PROXY: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_REFUSED: Final = {
    "error": "invalid_request",
    "error_description": "Metrics are told to peers in COATCHECK_METRICS_FROM, without a proxy.",
    "code": "forbidden",
}
_HEADERS: Final = {"Cache-Control": "no-store"}


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
        store: object,
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

    def flush(self) -> None:
        """Leave this worker's counts where the others find them."""
        self._metrics.flush(self._gauges())

    async def __call__(self, request: Request) -> Response:
        if not self._may_ask(request):
            return JSONResponse(_REFUSED, 403, _HEADERS)
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
