"""Metrics in Prometheus' text format, right over several workers.

Counted in plain integers on the path of a request.  Once a second, and before anybody is told,
each worker writes its sums to a slot of its own on a board that all of them share, and whoever is
asked adds the slots up: so counts never go back, whichever worker answers.  A slot belongs to the
process that holds the lock on it, which the kernel takes away when the process ends; its successor
goes on from what stands there, so that the death of a worker loses a second of counts at most and
leaves nothing behind.  What is only true now (a gauge) counts while it was written lately.

The board is memory without a name where the system has that, else a file that is unlinked from the
start: there is nothing to clean up, however the service ends.

No label is anything that a caller chooses: no API key, no organization, no address, no path.

Source: Prometheus exposition formats, text format 0.0.4.
"""

import fcntl
import json
import logging
import os
import struct
import tempfile
import time
import zlib
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from multiprocessing.reduction import DupFd
from typing import Any, Final, NamedTuple

_log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds between two writings of a worker's slot.
FLUSH: Final = 1.0
#: Seconds after which what a worker said of itself is not true any more.
_GAUGE_LIFE: Final = 5.0
#: Samples of one process; from there on labels become `other`.  There are about 150 at most.
_MOST_SAMPLES: Final = 500

TOKEN_REQUESTS: Final = "coatcheck_token_requests_total"  # noqa: S105 - a name
TOKEN_DURATION: Final = "coatcheck_token_duration_seconds"  # noqa: S105
CREDENTIAL_CHECKS: Final = "coatcheck_credential_checks_total"
AUTHZ_REQUESTS: Final = "coatcheck_authz_requests_total"
REQUESTS_SHED: Final = "coatcheck_requests_shed_total"
JWKS_REQUESTS: Final = "coatcheck_jwks_requests_total"
REQUESTS_IN_FLIGHT: Final = "coatcheck_requests_in_flight"
FEED_FOLLOWERS: Final = "coatcheck_feed_followers"
DB_POOL_CONNECTIONS: Final = "coatcheck_db_pool_connections"
WORKERS: Final = "coatcheck_workers"
CHANGE_LOG_HEAD: Final = "coatcheck_change_log_head"
SIGNING_KEY_AGE: Final = "coatcheck_signing_key_age_seconds"
NEXT_ROTATION: Final = "coatcheck_signing_key_next_rotation_timestamp_seconds"
API_KEYS: Final = "coatcheck_api_keys"
API_KEYS_EXPIRING: Final = "coatcheck_api_keys_expiring"
BUILD_INFO: Final = "coatcheck_build_info"


class Metric(NamedTuple):
    """What a name stands for."""

    kind: str
    labels: tuple[str, ...]
    told: str


METRICS: Final[Mapping[str, Metric]] = {
    TOKEN_REQUESTS: Metric(
        "counter",
        ("result", "error", "auth_method"),
        "Requests for a token: issued, refused (the caller has to change something) or failed (we"
        " do), with the OAuth error.",
    ),
    TOKEN_DURATION: Metric(
        "histogram",
        (),
        "Seconds from the last byte of a request for a token to its answer.",
    ),
    CREDENTIAL_CHECKS: Metric(
        "counter",
        ("method", "result", "reason"),
        "API keys that were looked at, at any endpoint; method exchange: as somebody's subject.",
    ),
    AUTHZ_REQUESTS: Metric(
        "counter",
        ("result", "code"),
        "Questions of gateways: allowed, refused, or failed (the operator has to act), with the"
        " code of the problem.",
    ),
    REQUESTS_SHED: Metric(
        "counter",
        ("endpoint",),
        "Requests refused at once because COATCHECK_MAX_IN_FLIGHT others were under way.",
    ),
    JWKS_REQUESTS: Metric("counter", (), "Requests for the key set."),
    REQUESTS_IN_FLIGHT: Metric(
        "gauge", (), "Requests that arrived as a whole and are not answered yet."
    ),
    FEED_FOLLOWERS: Metric("gauge", (), "Verifiers that wait for news of the revocation feed."),
    DB_POOL_CONNECTIONS: Metric("gauge", ("state",), "Connections to the database."),
    WORKERS: Metric("gauge", (), "Worker processes that answer."),
    CHANGE_LOG_HEAD: Metric("gauge", (), "The last sequence number of the change log."),
    SIGNING_KEY_AGE: Metric(
        "gauge", ("purpose", "algorithm"), "Seconds since the key that signs now began to."
    ),
    NEXT_ROTATION: Metric(
        "gauge",
        ("purpose", "algorithm"),
        "When the next key begins to sign, in seconds since the epoch; absent while none is due.",
    ),
    API_KEYS: Metric(
        "gauge", ("status",), "API keys that were not deleted, counted once a minute at most."
    ),
    API_KEYS_EXPIRING: Metric(
        "gauge", (), "Active API keys that end within 14 days, counted once a minute at most."
    ),
    BUILD_INFO: Metric("gauge", ("version",), "1, for the version that runs."),
}

#: A name and the values of its labels, in their order.
Sample = tuple[str, ...]
#: Seconds; a token from memory takes a tenth of a millisecond.
_BUCKETS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
_SUM: Final = f"{TOKEN_DURATION}_sum"
_COUNT: Final = f"{TOKEN_DURATION}_count"
_BUCKET: Final = f"{TOKEN_DURATION}_bucket"


class Board:
    """Slots that the workers of one service share; goes to each of them when it is started."""

    def __init__(self, slots: int, fd: int | None = None) -> None:
        """Args:
        slots: one per worker and some more, for those that come before others have gone.
        fd: the memory of a board that another process made; None: make one.
        """
        self._slots = slots
        self._fd = _nameless_file() if fd is None else fd
        os.ftruncate(self._fd, slots * _Slot.BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        # For a process that is just being started: it gets the descriptor, too.
        return _received, (self._slots, DupFd(self._fd))

    def claim(self) -> "_Slot | None":
        """A slot for this process alone; None if all are held."""
        for number in range(self._slots):
            try:
                # Another process's lock ends with it, in whatever way it ends.
                fcntl.lockf(
                    self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number * _Slot.BYTES, os.SEEK_SET
                )
            except OSError:
                continue
            return _Slot(self._fd, number)
        return None

    def states(self) -> "list[_State]":
        """What stands in the slots."""
        return [_Slot(self._fd, number).read() for number in range(self._slots)]


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coatcheck-metrics")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _received(slots: int, sent: Any) -> Board:
    return Board(slots, sent.detach())


class _State(NamedTuple):
    """What one worker wrote.

    Attributes:
        counts: since the first of the workers that had this slot.
        gauges: as they were at `at`, by a clock that all processes of a machine share.
    """

    counts: dict[Sample, float] = {}  # noqa: RUF012 - nobody writes into it
    gauges: dict[Sample, float] = {}  # noqa: RUF012
    at: float = float("-inf")


class _Slot:
    """The place of one worker on the board.

    It has two halves, written in turn, each with its number and a checksum: whoever reads while
    somebody writes, or after somebody was killed while writing, takes the other half.
    """

    HALF: Final = 64 * 1024
    BYTES: Final = 2 * HALF
    _HEAD: Final = struct.Struct(">QII")

    def __init__(self, fd: int, number: int) -> None:
        self._fd = fd
        self._start = number * self.BYTES
        self._written = 0

    def read(self) -> _State:
        self._written, text = max(self._half(0), self._half(1))
        if not text:
            return _State()
        found = json.loads(text)
        return _State(
            {tuple(sample): value for *sample, value in found["counts"]},
            {tuple(sample): value for *sample, value in found["gauges"]},
            found["at"],
        )

    def write(self, state: _State) -> None:
        document = {
            "counts": [(*sample, value) for sample, value in state.counts.items()],
            "gauges": [(*sample, value) for sample, value in state.gauges.items()],
            "at": state.at,
        }
        text = json.dumps(document).encode()
        self._written += 1
        head = self._HEAD.pack(self._written, len(text), zlib.crc32(text))
        if len(head) + len(text) <= self.HALF:
            os.pwrite(self._fd, head + text, self._start + self._written % 2 * self.HALF)

    def _half(self, number: int) -> tuple[int, bytes]:
        """How many writings there were up to this one, and its text; (0, nothing) if it is torn."""
        half = os.pread(self._fd, self.HALF, self._start + number * self.HALF)
        written, length, checksum = self._HEAD.unpack_from(half)
        text = half[self._HEAD.size : self._HEAD.size + length]
        return (written, text) if text and zlib.crc32(text) == checksum else (0, b"")


class Metrics:
    """The counts of one process, and with the others' those of the service."""

    def __init__(self, board: Board | None = None) -> None:
        """Args:
        board: what the workers share; None for a process that is alone.
        """
        self._counts: dict[Sample, float] = dict.fromkeys(((JWKS_REQUESTS,),), 0)
        #: Authentication method, OAuth error, whether that was our own trouble → how many.
        self._tokens: dict[tuple[str, str, bool], int] = {}
        #: Issued tokens that are not among them yet: by how the API key was sent, the seconds
        #: since the request's last byte arrived.  Whoever issues one appends them and does no
        #: more; numbers alone, because the collector would look at anything else.
        self.issued: defaultdict[str, deque[float]] = defaultdict(deque)
        self._in_buckets = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0
        self._board = board
        self._slot = None if board is None else board.claim()
        self._before = self._slot.read().counts if self._slot is not None else {}
        if board is not None and self._slot is None:
            _log.warning("no slot is left for this worker's metrics: they are not told")

    def token(self, auth_method: str, error: str, seconds: float, *, failed: bool = False) -> None:
        """Count an answered request for a token that came to none; see `issued`.

        Args:
            error: the OAuth error.
            seconds: since its last byte arrived.
            failed: the trouble is our own.
        """
        kind = (auth_method, error, failed)
        self._tokens[kind] = self._tokens.get(kind, 0) + 1
        self._in_buckets[bisect_left(_BUCKETS, seconds)] += 1
        self._seconds += seconds

    def count(self, name: str, *labels: str) -> None:
        """Count one of anything else."""
        sample = (name, *labels)
        if sample not in self._counts and len(self._counts) >= _MOST_SAMPLES:
            sample = (name, *("other" for _ in labels))
        self._counts[sample] = self._counts.get(sample, 0) + 1

    def flush(self, gauges: Mapping[Sample, float]) -> None:
        """Add up, and write this worker's sums to the board.  `gauges` as they are now."""
        state = self._state(gauges)
        if self._slot is not None:
            self._slot.write(state)

    def text(self, gauges: Mapping[Sample, float], common: Mapping[Sample, float]) -> str:
        """Everything, as Prometheus reads it.

        Args:
            gauges: of this process as they are now; those of all workers are added up.
            common: what is the same whichever process says it.
        """
        self.flush(gauges)
        if self._board is None or self._slot is None:
            states = [self._state(gauges)]
        else:
            states = self._board.states()
        lately = time.monotonic() - _GAUGE_LIFE
        counts = _sum(*(state.counts for state in states))
        now = _sum(*(state.gauges for state in states if state.at > lately))
        return _text({**counts, **now, **common})

    def _state(self, gauges: Mapping[Sample, float]) -> _State:
        for method, durations in self.issued.items():
            for _ in range(len(durations)):
                self.token(method, "", durations.popleft())
        counts = _sum(self._before, self._counts, self._of_tokens())
        return _State(counts, {**gauges, (WORKERS,): 1}, time.monotonic())

    def _of_tokens(self) -> dict[Sample, float]:
        counts: dict[Sample, float] = {}
        for (auth_method, error, failed), number in self._tokens.items():
            result = ("failed" if failed else "refused") if error else "issued"
            counts[(TOKEN_REQUESTS, result, error, auth_method)] = number
            if not error:
                # Whoever gets a token had a good API key: not counted a second time by itself.
                counts[(CREDENTIAL_CHECKS, auth_method, "accepted", "")] = number
        total = 0
        for bound, number in zip((*_BUCKETS, "+Inf"), self._in_buckets, strict=True):
            total += number
            counts[(_BUCKET, str(bound))] = total
        return counts | {(_SUM,): self._seconds, (_COUNT,): total}


def _sum(*parts: Mapping[Sample, float]) -> dict[Sample, float]:
    total: dict[Sample, float] = {}
    for part in parts:
        for sample, value in part.items():
            total[sample] = total.get(sample, 0) + value
    return total


def _text(samples: Mapping[Sample, float]) -> str:
    lines: list[str] = []
    for name, metric in METRICS.items():
        names, labels = [name], metric.labels
        if metric.kind == "histogram":
            names, labels = [f"{name}_bucket", f"{name}_sum", f"{name}_count"], ("le",)
        found = [
            line
            for one in names
            for line in _lines(((key, samples[key]) for key in samples if key[0] == one), labels)
        ]
        if found:
            lines += (f"# HELP {name} {metric.told}", f"# TYPE {name} {metric.kind}", *found)
    return "\n".join(lines) + "\n"


def _lines(samples: Iterable[tuple[Sample, float]], labels: tuple[str, ...]) -> Iterable[str]:
    for (name, *values), value in samples:
        pairs = ",".join(
            f'{label}="{_escaped(text)}"' for label, text in zip(labels, values, strict=False)
        )
        yield f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


#: The board of the service that this process is a worker of.
_shared: Board | None = None


def share(board: Board | None) -> None:
    """Leave the board for the service that this process is about to make."""
    global _shared  # noqa: PLW0603 - a worker is handed nothing else on its way to the service
    _shared = board


def shared() -> Board | None:
    """The board that this process was given; None for one that serves alone."""
    return _shared
