"""Many clients at once, on plain sockets in one thread: each has a connection and asks again.

Everything is bounded: how many there are, how long they ask, how long an answer may take.
"""

import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from urllib.parse import urlsplit

#: Seconds that an answer may take before the test has failed.
PATIENCE: Final = 30
_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = b"content-length: "


class Told(NamedTuple):
    """One answer: its status and head, when it came by the monotonic clock, how long it took."""

    status: int
    head: bytes
    at: float
    seconds: float


@dataclass(slots=True)
class Client:
    """One client: what it asks next, and since when it waits."""

    connection: socket.socket
    request: bytes
    received: bytes = b""
    sent_at: float | None = None

    def ask(self) -> None:
        self.received, self.sent_at = b"", time.monotonic()
        self.connection.sendall(self.request)

    def hear(self) -> Told | None:
        """The answer, once it is there as a whole.

        Raises:
            ConnectionError: the connection was closed, or broke.
        """
        part = self.connection.recv(65_536)
        if not part:
            raise ConnectionResetError("closed without an answer")
        self.received += part
        head, end, body = self.received.partition(_HEAD_END)
        if not end:
            return None
        length = int(head.partition(_LENGTH)[2].partition(b"\r\n")[0])
        if len(body) < length or self.sent_at is None:
            return None
        now = time.monotonic()
        told = Told(int(head[9:12]), head, now, now - self.sent_at)
        self.sent_at = None
        return told


@dataclass
class Outcome:
    """What a crowd was told."""

    answers: list[Told] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(told.status for told in self.answers)

    def seconds(self, status: int = 200) -> list[float]:
        """How long the answers of this status took, in order."""
        return sorted(told.seconds for told in self.answers if told.status == status)

    def p99(self, status: int = 200) -> float:
        took = self.seconds(status)
        return took[len(took) * 99 // 100]


@contextmanager
def connected(issuer: str, number: int) -> Iterator[list[socket.socket]]:
    """So many connections, until the block ends."""
    url = urlsplit(issuer)
    assert url.hostname is not None
    address = url.hostname, url.port or 80
    with ExitStack() as stack:
        yield [
            stack.enter_context(closing(socket.create_connection(address, timeout=PATIENCE)))
            for _ in range(number)
        ]


def ask(connections: Sequence[socket.socket], request: bytes, seconds: float) -> Outcome:
    """All of them ask, and whoever was answered asks again at once, until the time is over.

    Raises:
        ConnectionError: a connection broke.
    """
    outcome = Outcome()
    ends_at = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        waiting = 0
        for connection in connections:
            client = Client(connection, request)
            selector.register(connection, selectors.EVENT_READ, client)
            client.ask()
            waiting += 1
        while waiting:
            assert time.monotonic() < ends_at + PATIENCE, f"{waiting} were not answered"
            for key, _ in selector.select(timeout=1):
                told = key.data.hear()
                if told is None:
                    continue
                outcome.answers.append(told)
                if told.at < ends_at:
                    key.data.ask()
                else:
                    waiting -= 1
    return outcome


@contextmanager
def many_descriptors(number: int) -> Iterator[int]:
    """Let this process, and those it starts, open so many; or as many as the system allows.

    Yields:
        How many there may be now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    try:
        yield max(soft, allowed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
