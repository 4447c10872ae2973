"""A way between two that talk over TCP, which can be made slow, silent, or cut at a chosen moment.

It runs on an event loop of its own, in a thread, so that whoever tests may wait.  It stands
between a node and its PostgreSQL, or as a balancer before several nodes.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from enum import Enum
from itertools import count
from typing import Final

_CHUNK: Final = 64 * 1024
#: PostgreSQL's protocol, as a client writes it: the statement and the zero that ends it.
_COMMIT: Final = b"COMMIT\0"
_LOOK_S: Final = 0.01


class Cut(Enum):
    """Where a connection breaks when its client commits."""

    BEFORE = "the server never hears of the commit"
    AFTER = "the server has committed, and its client never hears of it"


class Proxy:
    """Hands on what comes, to one target after the other.

    Attributes:
        port: where it listens, on 127.0.0.1.
        latency_s: by how much each piece comes later, in both directions.
        is_silent: nothing is handed on, and no connection ends: as a network that lost the way.
        cut: what becomes of a connection on which the next COMMIT is sent; it is done once.
        cuts: how many were.
    """

    def __init__(self, targets: Sequence[int]) -> None:
        """Args:
        targets: ports of 127.0.0.1.
        """
        self.latency_s = 0.0
        self.is_silent = False
        self.cut: Cut | None = None
        self.cuts = 0
        self.port = 0
        self._targets = list(targets)
        self._turn = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise AssertionError("the proxy does not start")

    def close(self) -> None:
        """End it and all its connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self, started: threading.Event) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
        loop.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            target, to_target = await self._connect()
        except OSError:
            to_client.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(client, to_target, to_client))
                both.create_task(self._pump(target, to_client, None))
        except* OSError:
            pass
        finally:
            to_client.transport.abort()
            to_target.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in self._targets:
            port = self._targets[next(self._turn) % len(self._targets)]
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", port)
        raise ConnectionRefusedError("no target answers")

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        asker: asyncio.StreamWriter | None,
    ) -> None:
        """One direction.  `asker` is the client, where this is what it asks."""
        while data := await reader.read(_CHUNK):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            while self.is_silent:  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(_LOOK_S)
            if asker is not None and self.cut is not None and _COMMIT in data:
                cut, self.cut = self.cut, None
                self.cuts += 1
                if cut is Cut.AFTER:
                    # The answer goes to nobody: the client's side is gone before it comes.
                    asker.transport.abort()
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0.2)
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        # Whoever is done is told so by the other; half a connection is nothing that we speak.
        raise ConnectionResetError


@contextmanager
def proxy(*targets: int) -> Iterator[Proxy]:
    """A proxy to these ports of 127.0.0.1, until the block ends."""
    with closing(Proxy(targets)) as running:
        yield running
