"""Listening: uvicorn with the limits and the framing that this service needs.

`Protocol` bounds what httptools and uvicorn do not: the head of a request, the time that its
parts take, the requests that one connection may have under way, the answers that nobody reads.
And it is stricter about where a request ends, because a proxy in front may see its end elsewhere.

Proxy headers are uvicorn's no more than ours: the client's address is worked out in one place,
`coatcheck.client_address`.  There is no access log: a URL may hold what somebody put there by
mistake.

Requests may arrive faster than they can be answered.  Whole ones wait in one queue, of which each
turn of the event loop takes what takes it a few milliseconds, so that new connections, health
checks and everything else get their turns as well; those beyond the application's limit are
refused when it is theirs.

Source: RFC 9112 §3.2 (Host), §6 (where a body ends), §9 (connections); RFC 9110 §6.5.1
(trailers), §7.8 (Upgrade), §10.1.1 (Expect).
"""

import asyncio
import json
import logging
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from time import perf_counter
from typing import Any, Final, NamedTuple

import httptools
import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState
from uvicorn.supervisors import Multiprocess

from coatcheck.server import logs, metrics
from coatcheck.server.inflight import ARRIVED_AT, InFlight

_log = logging.getLogger(__name__)

#: RFC 6585 §5: request line and headers together.
MAX_HEAD_BYTES: Final = 32 * 1024
#: A body with all its framing.  What may be in it, the endpoints say; this bounds trailers, chunk
#: extensions, and what follows after an early answer.
MAX_FRAMED_BODY_BYTES: Final = 1024 * 1024
#: Requests that wait on one connection for the answer to the one before them.
MAX_PIPELINED: Final = 16
#: Seconds from the first byte of a request, or of a connection, to the end of its head.
HEAD_TIMEOUT: Final = 15
#: Seconds from the end of the head to the end of the body.
BODY_TIMEOUT: Final = 10
#: Seconds that answers may lie here because the client reads none.
READ_TIMEOUT: Final = 10
#: Seconds between an answer and the next request on the same connection.
IDLE_TIMEOUT: Final = 10
#: Seconds between two looks at a connection; by so much a limit may be exceeded.
_WATCH: Final = 5

#: RFC 3986 §3.2.2 and §3.2.3: what host and port are made of; empty where there is no authority.
_HOST: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")

_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CLOSE: Final = (b"connection", b"close")

_BACKLOG: Final = 2048
#: Seconds that requests under way get when the service stops; what the database may take to be
#: told the last counts comes behind.
_GRACE: Final = 2
#: Seconds that an idle connection is kept when the service stops: a request that was sent before
#: its client could know is still answered.
_LINGER: Final = 0.25
#: Answers that one turn of the event loop gives: some milliseconds, whoever has to sign them.
_ANSWERS_PER_TURN: Final = 32
#: Refusals for want of room that it gives beside them; one takes a fifth of the time.
_REFUSALS_PER_TURN: Final = 128
#: Seconds from the signal until a worker that does not end is killed.
_PATIENCE: Final = 8


_ACCEPTED_PER_TURN: Final = 16
#: For metrics, beside two for each worker.
_SPARE_SLOTS: Final = 8
#: For an application that does not count.
_UNLIMITED: Final = InFlight(sys.maxsize)


def _written(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Header fields as they are written.

    Raises:
        ValueError: a value would end its line, or begin another one (RFC 9110 §5.5).
    """
    if any(_CONTROL.search(value) for _, value in headers):
        raise ValueError("a header value holds a control character")
    return b"".join([b"%b: %b\r\n" % header for header in headers])


@lru_cache(maxsize=64)
def _lines(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """As `_written`, for headers that come again and again."""
    return _written(headers)


#: The application's answer: status, body, headers, and what is its own affair.
_Reply = tuple[Any, ...]


class _Refusal(NamedTuple):
    """What is told to whom nobody further in gets to see."""

    status: int
    sentence: str


_NO_REQUEST: Final = _Refusal(400, "The request is no HTTP/1.1 request.")
_NO_HOST: Final = _Refusal(400, "The request needs one Host header that names a host.")
_NO_CODING: Final = _Refusal(400, "A body is sent plainly or in chunks, in no other coding.")
_NO_TUNNEL: Final = _Refusal(400, "This is no proxy.")
_HEAD_TOO_LARGE: Final = _Refusal(431, "The head of the request is larger than 32 KiB.")
_BODY_TOO_LARGE: Final = _Refusal(413, "The body of the request is larger than 1 MiB.")
_BODY_TOO_SLOW: Final = _Refusal(408, "The body did not arrive in time.")


class _Queue:
    """Answers that are due, in the order of their requests.

    Refusals for want of room have a line of their own: callers who ask again at once, however many
    they are, leave most of each turn to those who were let in.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[tuple[Protocol, RequestResponseCycle, ASGI3Application]] = deque()
        self._refusals: deque[tuple[Protocol, RequestResponseCycle, _Reply]] = deque()
        self._has_turn = False

    def put(
        self, connection: "Protocol", cycle: RequestResponseCycle, app: ASGI3Application
    ) -> None:
        """What waits for the application's answer."""
        self._due.append((connection, cycle, app))
        if not self._has_turn:
            self._await_turn()

    def put_refusal(
        self, connection: "Protocol", cycle: RequestResponseCycle, reply: _Reply
    ) -> None:
        """What has its answer already."""
        self._refusals.append((connection, cycle, reply))
        if not self._has_turn:
            self._await_turn()

    def _await_turn(self) -> None:
        self._has_turn = True
        self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        try:
            due, refusals = self._due, self._refusals
            for _ in range(min(_ANSWERS_PER_TURN, len(due))):
                connection, cycle, app = due.popleft()
                connection.answer(cycle, app)
            for _ in range(min(_REFUSALS_PER_TURN, len(refusals))):
                connection, cycle, reply = refusals.popleft()
                connection.write(cycle, reply)
        finally:
            self._has_turn = False
            if self._due or self._refusals:
                self._await_turn()


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with an end to the patience for requests, long or slow.

    At any moment the parser is in a head (`_head_since`), in the body of the request that
    `cycle` answers (`_body_since`), or between two requests (neither).
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        #: When the head began that is not complete yet; None while there is none.
        self._head_since: float | None = self.loop.time()
        #: When the body began that is not complete yet; None while there is none.
        self._body_since: float | None = None
        #: When the last answer was given; None while there is more to answer, or none was.
        self._idle_since: float | None = None
        #: When answers began to lie here unread; None while there are none.
        self._unread_since: float | None = None
        self._head_bytes = self._body_bytes = self._piece_bytes = 0
        #: The request that is being answered, or was answered last; `cycle` is the latest to come.
        self._running: RequestResponseCycle | None = None
        #: The application's short way, if it has one: scope and body → the whole answer, or None.
        self._reply_now = getattr(self.app, "reply_now", None)
        #: The application's count of requests under way, and its answer to one too many, or None.
        self._in_flight: InFlight = getattr(self.app, "in_flight", _UNLIMITED)
        self._shed_now = getattr(self.app, "shed_now", None)
        self._queue = _queue_of(self.server_state, self.loop)
        #: The service is stopping: each answer is the last one on its connection.
        self._is_leaving = False
        #: The request is on hold whose head was read last: the next bytes may be all of its body.
        self._held: tuple[RequestResponseCycle, ASGI3Application] | None = None
        self._may_hold = False
        #: Why the parsing was stopped from here; httptools cannot carry it.
        self._why_stopped = _NO_REQUEST
        #: The head asks for another protocol: it is read once more, without asking.
        self._is_asking = False
        #: Nothing is read any more; the connection ends with the answers that are due.
        self._is_ending = False
        #: What is sent behind those answers.
        self._last_words = b""
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watcher.cancel()
        self.pipeline.clear()
        if self._is_answering():
            self._abandon(self._running)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to go on: a client may end its side as soon as it has asked.

        Answers to a GET may take long, and nobody would be told that its client is gone.
        """
        running = self._running
        if not self._is_answering() or running is None or self._body_since is not None:
            return False
        self._is_ending = True
        self.cycle.keep_alive = False
        return running.scope["method"] == "POST"

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        self._idle_since = None
        self._piece_bytes = len(data)
        if self._body_since is not None:
            self._body_bytes += len(data)
        else:
            if self._head_since is None:
                self._head_since = self.loop.time()
            self._head_bytes += len(data)
        self._feed(data)
        if self._held is not None:
            self._let_go()
        # httptools holds a header, or a trailer, until it is complete.
        if self._head_since is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_HEAD_TOO_LARGE)
        elif self._body_since is not None and self._body_bytes > MAX_FRAMED_BODY_BYTES:
            self._refuse(_BODY_TOO_LARGE)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_that_asks_nothing() + data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self._refuse(self._why_stopped)
                return
            else:
                return

    # --- what the parser calls; an exception stops it

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            # The client sends the rest again, on a new connection.
            self.cycle.keep_alive = False
            self._is_ending = True
            raise ValueError("enough")
        if self._head_since is None:
            self._head_since = self.loop.time()
        HttpToolsProtocol.on_message_begin(self)

    def on_headers_complete(self) -> None:
        refusal = self._unfit()
        if refusal is not None:
            self._why_stopped = refusal
            raise ValueError(refusal.sentence)
        if self.parser.should_upgrade():
            self._is_asking = True
            return
        # Who waits for leave to send the body gets it from ASGI; who reads no answers waits there.
        may_hold = not self.expect_100_continue and not self.flow.write_paused
        self._may_hold = self._reply_now is not None and may_hold
        self.scope[logs.SCOPE_KEY] = logs.new_request_id()  # type: ignore[typeddict-unknown-key]
        HttpToolsProtocol.on_headers_complete(self)
        self._may_hold = False
        self._head_since = None
        self._head_bytes = self._body_bytes = 0
        self._body_since = self.loop.time()
        # RFC 9110 §6.5.1: trailers are no headers.  What looked at these headers has the old list.
        self.headers = []

    def on_message_complete(self) -> None:
        if self._is_asking:
            return
        self._body_since = None
        HttpToolsProtocol.on_message_complete(self)

    def _unfit(self) -> _Refusal | None:
        """Why nobody further in should see this head, if it is so."""
        # One piece of data may hold a long head as a whole, or a short one and what is around it.
        may_be_long = self._head_bytes > MAX_HEAD_BYTES or self._piece_bytes > MAX_HEAD_BYTES
        if may_be_long and self._length_of_head() > MAX_HEAD_BYTES:
            return _HEAD_TOO_LARGE
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            return _NO_REQUEST
        if self.parser.get_method() == b"CONNECT":
            return _NO_TUNNEL
        headers = dict(self.headers)
        # RFC 9112 §3.2: a server must refuse none, several, and what cannot be one.
        host = headers.get(b"host", None if version == "1.1" else b"")
        if host is None or not _HOST.fullmatch(host) or self._repeats(headers, b"host"):
            return _NO_HOST
        # RFC 9112 §6.1: HTTP/1.0 has no codings.  httptools looks at the last one only, and would
        # hand on a body that is compressed as well.
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (
            version == "1.0"
            or coding.lower() != b"chunked"
            or self._repeats(headers, b"transfer-encoding")
        ):
            return _NO_CODING
        return None

    def _repeats(self, headers: Mapping[bytes, bytes], name: bytes) -> bool:
        lines = self.headers
        return len(headers) != len(lines) and sum(line[0] == name for line in lines) > 1

    def _length_of_head(self) -> int:
        lines = sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        return len(self.url) + lines

    def _head_that_asks_nothing(self) -> bytes:
        """The head once more, for a new parser.

        RFC 9110 §7.8: an Upgrade may be ignored.  httptools would take the body for bytes of the
        other protocol, and then for the next request.
        """
        self._is_asking = False
        request = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%b: %b\r\n" % line for line in self.headers if line[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"%b %b HTTP/%b\r\n" % request + b"".join(kept) + b"\r\n"

    # --- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        if self._is_leaving and not self.pipeline:
            cycle.keep_alive = False
        if self._may_hold:
            self._held = (cycle, app)
        else:
            super()._start_asgi_task(cycle, app)

    def _let_go(self) -> None:
        """Answer the held request the short way if it came as a whole, else as any other."""
        if self._held is None:
            return
        (cycle, app), self._held = self._held, None
        if cycle.more_body:
            super()._start_asgi_task(cycle, app)
            return
        in_flight = self._in_flight
        if in_flight.count >= in_flight.most and self._shed_now is not None:
            reply = self._shed_now(cycle.scope)
            if reply is not None:
                # Not here: whoever asks again at once would keep the loop reading for seconds.
                self._queue.put_refusal(self, cycle, reply)
                return
        cycle.scope[ARRIVED_AT] = perf_counter()  # type: ignore[typeddict-unknown-key]
        in_flight.count += 1
        self._queue.put(self, cycle, app)

    def answer(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """The whole answer at once, and no task, event or message on the way to it."""
        self._in_flight.count -= 1
        if cycle.disconnected or self.transport.is_closing() or self._reply_now is None:
            return
        reply = self._reply_now(cycle.scope, bytes(cycle.body))
        if reply is None:
            super()._start_asgi_task(cycle, app)
        else:
            self.write(cycle, reply)

    def write(self, cycle: RequestResponseCycle, reply: _Reply) -> None:
        """Head and body in one piece."""
        status, body, headers = reply[:3]
        if cycle.disconnected or self.transport.is_closing():
            return
        if not cycle.keep_alive and _CLOSE not in headers:
            headers = (*headers, _CLOSE) if isinstance(headers, tuple) else [*headers, _CLOSE]
        request_id: bytes = cycle.scope[logs.SCOPE_KEY]  # type: ignore[typeddict-item]
        head = self._head(status, headers, len(body), request_id)
        cycle.response_started = cycle.response_complete = True
        self.transport.write(head if cycle.scope["method"] == "HEAD" else head + body)
        if _CLOSE in headers:
            self.transport.close()
        self.on_response_complete()

    def _head(
        self, status: int, headers: Sequence[tuple[bytes, bytes]], length: int, request_id: bytes
    ) -> bytes:
        """Status line and header fields of an answer with so many bytes."""
        # RFC 9110 §8.6: no length where there can be no body.
        end = b"" if status == HTTPStatus.NO_CONTENT else b"content-length: %d\r\n" % length
        # What is in a list is this answer's own, and not worth remembering.
        lines = _lines(headers) if isinstance(headers, tuple) else _written(headers)
        return b"%b%b%b%b: %b\r\n%b\r\n" % (
            STATUS_LINE[status],
            _lines(tuple(self.server_state.default_headers)),
            lines,
            logs.HEADER,
            request_id,
            end,
        )

    def on_response_complete(self) -> None:
        # Not uvicorn's: it would set a timer for each answer, and unset it at the next request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()
        if self._is_answering():
            # A request that came behind the one before: until now nothing of it was read.
            if self._body_since is not None:
                self._body_since = self.loop.time()
            return
        if self._head_since is not None:
            self._head_since = self.loop.time()
        if self._last_words:
            self._end(self._last_words)
        elif self._body_since is not None and self.expect_100_continue:
            # RFC 9110 §10.1.1: a client that waits for leave may send the body after such an
            # answer, or its next request; there is no telling which.
            self.transport.close()

    def shutdown(self) -> None:
        """The service stops: answer what was sent, and what is on its way here, then close."""
        self._is_leaving = True
        if self._is_answering():
            super().shutdown()
        else:
            self.loop.call_later(_LINGER, super().shutdown)

    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _refuse(self, refusal: _Refusal) -> None:
        """End the connection with an answer, in its turn.  RFC 9112 §9.3.2."""
        if self._is_ending or self.transport.is_closing():
            return
        self._is_ending = True
        request_id = logs.new_request_id()
        with logs.of_request(request_id):
            _log.info("%d for %s: %s", refusal.status, self.client, refusal.sentence)
        error = {"error": "invalid_request", "error_description": refusal.sentence}
        body = json.dumps(error | {"code": "invalid_request"}, separators=(",", ":")).encode()
        headers = (
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (b"pragma", b"no-cache"),
            _CLOSE,
        )
        words = self._head(refusal.status, headers, len(body), request_id) + body
        if self._body_since is not None:
            # It is the answer to this request, instead of the one that waits for its body.
            if self.cycle is self._running:
                if self._running.response_started:
                    words = b""
                self._abandon(self._running)
                self._end(words)
                return
            self.pipeline.popleft()
        if self._is_answering():
            self._last_words = words
        else:
            self._end(words)

    def _abandon(self, cycle: RequestResponseCycle | None) -> None:
        """Let an endpoint find out that nobody waits for its answer."""
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()

    def _end(self, words: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(words)
            self.transport.close()

    def _watch(self) -> None:
        now = self.loop.time()
        if self.transport.get_write_buffer_size() == 0:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        elif now - self._unread_since > READ_TIMEOUT:
            self.transport.abort()
        # While an answer is due, nothing is read of what comes behind.
        if self._head_since is None or self._is_answering():
            self._watch_body(now)
        elif now - self._head_since > HEAD_TIMEOUT:
            self.transport.close()
        if self._idle_since is not None and now - self._idle_since > IDLE_TIMEOUT:
            self.transport.close()
        # One timer for the connection, not one for each request.
        self._watcher = self.loop.call_later(_WATCH, self._watch)

    def _watch_body(self, now: float) -> None:
        since = self._body_since if self.cycle is self._running else None
        if since is not None and now - since > BODY_TIMEOUT:
            self._refuse(_BODY_TOO_SLOW)


def _queue_of(state: ServerState, loop: asyncio.AbstractEventLoop) -> _Queue:
    """The queue that all connections of a server share."""
    queue = getattr(state, "coatcheck_queue", None)
    if queue is None:
        queue = _Queue(loop)
        state.coatcheck_queue = queue  # type: ignore[attr-defined]
    return queue


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


class _Config(uvicorn.Config):
    """uvicorn's, with what a worker shares with the others; each gets a copy as it starts."""

    board: metrics.Board | None = None

    def load(self) -> None:
        metrics.share(self.board)
        super().load()


class _Supervisor(Multiprocess):
    """uvicorn's, which would wait for ever for a worker that does not end."""

    def join_all(self) -> None:
        ends_at = time.monotonic() + _PATIENCE
        for one in self.processes:
            one.process.join(max(0.0, ends_at - time.monotonic()))
            if one.process.is_alive():
                _log.warning("worker %d did not stop within %d s: killed", one.pid, _PATIENCE)
                one.process.kill()
                one.process.join()


def run(bound: socket.socket, *, workers: int, log_format: logs.Format | None = None) -> int:
    """Serve until a signal says stop.

    Returns:
        0 if it served, else 1.
    """
    config = _Config(
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
        log_config=logs.configuration(log_format),
    )
    host, port = bound.getsockname()[:2]
    _log.info("listening on http://%s:%d", host, port)
    # libuv accepts one connection of a listening socket in each turn of its loop.  When turns are
    # long, because many ask at once, those who come would wait for seconds.
    sockets = [bound, *(bound.dup() for _ in range(_ACCEPTED_PER_TURN - 1))]
    if workers == 1:
        for number in (signal.SIGINT, signal.SIGTERM):
            # When all is done, uvicorn raises the signal once more: being told to stop is no
            # failure, so that nothing must come of it.
            signal.signal(number, lambda *_: None)
        server = uvicorn.Server(config)
        server.run(sockets=sockets)
        return 0 if server.started else 1
    # A worker that is replaced holds its slot until it ends.
    config.board = metrics.Board(2 * workers + _SPARE_SLOTS)
    supervisor = _Supervisor(config, sockets=sockets)
    supervisor.run()
    # The supervisor ends in peace even when its workers could not start.
    failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    return 1 if failed else 0
