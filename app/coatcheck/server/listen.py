"""Listening: uvicorn with the limits that this service needs.

httptools bounds neither the head of a request nor the time it takes; `Protocol` does both.

Proxy headers are uvicorn's no more than ours: the client's address is worked out in one place,
`coatcheck.client_address`.  There is no access log: a URL may hold what somebody put there by
mistake.
"""

import asyncio
import json
import logging
import socket
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

#: RFC 6585 §5: request line and headers together.
MAX_HEAD_BYTES: Final = 32 * 1024
#: Seconds from the first byte of a request, or of a connection, to the end of its head.
HEAD_TIMEOUT: Final = 15

_BACKLOG: Final = 2048
#: Seconds that requests under way get when the service stops.
_GRACE: Final = 5
#: Set up again in each worker, which starts as a new process.
_LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "%(asctime)s %(levelname)s %(name)s [%(process)d] %(message)s"}
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with an end to the patience for heads, long or slow."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._is_too_large = False
        #: When the head began that is not complete yet; None while there is none.
        self._head_since: float | None = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watcher.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_since is None and (self.cycle is None or self.cycle.response_complete):
            self._head_since = self.loop.time()
        if self._head_since is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        # Still no end of the head: httptools holds a header until it is complete.
        if self._head_since is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "The head of the request is larger than 32 KiB.")

    def on_message_begin(self) -> None:
        if self._head_since is None:
            self._head_since = self.loop.time()
        self._parsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_since = None
        self._head_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._is_too_large:
            self._refuse(431, "The head of the request is larger than 32 KiB.")
        else:
            self._refuse(400, "The request is no HTTP/1.1 request.")

    def _count(self, more_bytes: int) -> None:
        """Bound a head that arrives at once, within one piece of data."""
        self._parsed_bytes += more_bytes
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._is_too_large = True
            raise ValueError("too large")  # httptools ends the parsing, uvicorn says 400

    def _watch(self) -> None:
        since = self._head_since
        if since is not None and self.loop.time() - since > HEAD_TIMEOUT:
            self.transport.close()
        # One timer for the connection, not one for each request.
        self._watcher = self.loop.call_later(HEAD_TIMEOUT / 2, self._watch)

    def _refuse(self, status: int, sentence: str) -> None:
        if self.transport.is_closing():
            return
        error = {"error": "invalid_request", "error_description": sentence}
        body = json.dumps(error | {"code": "invalid_request"})
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"cache-control: no-store\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            f"\r\n{body}".encode()
        )
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything else so that a taken port is told at once.

    Raises:
        OSError: the address cannot be listened on.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(True)
    return bound


def run(bound: socket.socket, *, workers: int) -> int:
    """Serve until a signal says stop.

    Returns:
        0 if it served, else 1.
    """
    config = uvicorn.Config(
        "coatcheck.server.app:create",
        factory=True,
        workers=workers,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        log_config=_LOGGING,
    )
    host, port = bound.getsockname()[:2]
    logging.getLogger(__name__).info("listening on http://%s:%d", host, port)
    if workers == 1:
        server = uvicorn.Server(config)
        server.run(sockets=[bound])
        return 0 if server.started else 1
    supervisor = Multiprocess(config, sockets=[bound])
    supervisor.run()
    # The supervisor ends in peace even when its workers could not start.
    failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    return 1 if failed else 0
