"""The load: token requests over kept connections to a server on 127.0.0.1, and what they cost it.

A process of its own, so that its work is not counted as the server's.  It reads one visit per
line of standard input and writes one result per line, both JSON.  A visit is bounded in time and
in requests, and any answer but a token ends it as a failure: a fast refusal must not pass for a
fast token.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final, cast
from urllib.parse import urlencode

import uvloop

from bench import machine

CONNECTIONS: Final = 16
#: However fast the server is, a visit ends here.
MAX_REQUESTS: Final = 500_000
#: Seconds of requests before those that count.
_WARM_UP: Final = 0.25
#: Seconds that answers under way get at the end of a visit.
_PATIENCE: Final = 10.0
#: Seconds until the server has done what it does after its last answer.
_CALM: Final = 0.02

_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")
_HEAD_END: Final = b"\r\n\r\n"


class LoadFailed(Exception):
    """A server did not answer with a token.  Nothing measured in that run counts."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One stretch of load.

    Attributes:
        rate: requests per second, sent on time whether or not there was an answer; 0: each
            connection sends the next one as soon as it has its answer.
    """

    name: str
    port: int
    pid: int
    path: str
    seconds: float
    rate: float = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What one visit showed.

    Attributes:
        cpu_us: processor time of the server per token, in microseconds.
        others: the share of the server's core that anything else had.
    """

    tokens: int
    seconds: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    others: float


class Load:
    """The load process, as the run drives it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def visit(self, visit: Visit) -> Result:
        """Raises LoadFailed if anything but tokens came back."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018, S101
        self._process.stdin.write(json.dumps(asdict(visit)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"failure": "the load process died"}
        if "failure" in told:
            raise LoadFailed(f"{visit.name}: {told['failure']}")
        return Result(**told)


@contextmanager
def started(keys: Path, server_core: int | None, load_core: int | None) -> Iterator[Load]:
    """A load process on its core, until the block ends."""
    command = [sys.executable, "-m", "bench.load", str(keys), json.dumps(server_core)]
    with machine.pinned_to(load_core):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        yield Load(process)
    finally:
        process.kill()
        process.communicate()


class _Round:
    """The state that the connections of one stretch share."""

    def __init__(self, requests: Iterator[bytes], ends_at: float, rate: float) -> None:
        self.requests = requests
        self.ends_at = ends_at
        #: Seconds between two requests of one connection; 0: none.
        self.pause_s = CONNECTIONS / rate if rate else 0.0
        self.sent = 0
        self.latencies_s: list[float] = []


class _Connection(asyncio.Protocol):
    """One kept connection: a request, its answer, the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._awaited_bytes = 0
        self._sent_at = 0.0
        self._round: _Round | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the server closed the connection")

    async def run(self, of: _Round) -> None:
        self._round = of
        self._done = asyncio.get_running_loop().create_future()
        self._send(of, time.perf_counter())
        await self._done

    def close(self) -> None:
        self._done = None
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._awaited_bytes:
            head_end = self._received.find(_HEAD_END)
            if head_end < 0:
                return
            length = _LENGTH.search(self._received, 0, head_end + 2)
            if length is None:
                self._fail("an answer without Content-Length")
                return
            self._awaited_bytes = head_end + len(_HEAD_END) + int(length[1])
        if len(self._received) < self._awaited_bytes:
            return
        if self._round is None:
            self._fail("an answer that nobody asked for")
        elif (
            len(self._received) > self._awaited_bytes
            or not self._received.startswith(b"HTTP/1.1 2")
            or b'"access_token"' not in self._received
        ):
            self._fail(f"no token: {self._received.partition(_HEAD_END)[0][:60]!r}")
        else:
            self._answered(self._round)

    def _answered(self, of: _Round) -> None:
        now = time.perf_counter()
        of.latencies_s.append(now - self._sent_at)
        self._received = b""
        self._awaited_bytes = 0
        due = self._sent_at + of.pause_s
        if max(now, due) < of.ends_at and of.sent < MAX_REQUESTS:
            if due <= now:
                self._send(of, due if of.pause_s else now)
            else:
                asyncio.get_running_loop().call_later(due - now, self._send, of, due)
        elif self._done is not None:
            self._round = None
            self._done.set_result(None)

    def _send(self, of: _Round, due: float) -> None:
        """Send the next request.  One that goes out late was waited for since it was due."""
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection is closed")
            return
        of.sent += 1
        self._sent_at = due
        self._transport.write(next(of.requests))

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(LoadFailed(why))


async def _stretch(
    connections: list[_Connection], requests: Iterator[bytes], seconds: float, rate: float = 0
) -> tuple[float, list[float]]:
    """Seconds that it took, and the latency of each answer in seconds."""
    began = time.perf_counter()
    of = _Round(requests, began + seconds, rate)
    try:
        async with asyncio.timeout(seconds + _PATIENCE):
            await asyncio.gather(*(connection.run(of) for connection in connections))
    except TimeoutError:
        raise LoadFailed(f"no answer for {_PATIENCE:.0f} s") from None
    return time.perf_counter() - began, of.latencies_s


async def _visit(visit: Visit, requests: Iterator[bytes], server_core: int | None) -> Result:
    loop = asyncio.get_running_loop()
    connections: list[_Connection] = []
    try:
        for _ in range(CONNECTIONS):
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", visit.port)
            connections.append(connection)
        await _stretch(connections, requests, _WARM_UP)
        await asyncio.sleep(_CALM)
        used, busy = machine.cpu_ns(visit.pid), machine.busy_s(server_core)
        seconds, latencies_s = await _stretch(connections, requests, visit.seconds, visit.rate)
        await asyncio.sleep(_CALM)
        used = machine.cpu_ns(visit.pid) - used
        busy = machine.busy_s(server_core) - busy
    finally:
        for connection in connections:
            connection.close()
    latencies_s.sort()
    tokens = len(latencies_s)
    others = 0.0 if server_core is None else max(0.0, (busy - used / 1e9) / (seconds + _CALM))
    return Result(
        tokens=tokens,
        seconds=seconds,
        cpu_us=used / 1000 / tokens,
        p50_ms=latencies_s[tokens // 2] * 1000,
        p99_ms=latencies_s[tokens * 99 // 100] * 1000,
        others=others,
    )


def _request(path: str, made: Mapping[str, str]) -> bytes:
    form = {
        "grant_type": "client_credentials",
        "client_id": made["id"],
        "client_secret": made["key"],
    }
    body = urlencode(form).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main(keys: Path, server_core: int | None) -> None:
    """Do the visits that standard input asks for, until it ends."""
    with keys.open(encoding="utf-8") as lines:
        made = [json.loads(line) for line in lines]
    Random(1).shuffle(made)  # noqa: S311 - the order of requests is no secret
    requests: dict[str, Iterator[bytes]] = {}
    for line in sys.stdin:
        visit = Visit(**json.loads(line))
        if visit.path not in requests:
            requests[visit.path] = cycle([_request(visit.path, one) for one in made])
        told: Mapping[str, object]
        try:
            told = asdict(uvloop.run(_visit(visit, requests[visit.path], server_core)))
        except (LoadFailed, OSError) as error:
            told = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
