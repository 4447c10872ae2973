"""One bounded POST: the only place where the caller's side touches the network.

Everything is limited, because a program must not hang or fill up on behalf of somebody else's
server: total time, size, no redirects, no compression.

A client is made for each exchange and closed after it.  There is one in ten minutes, so that
nothing is gained by keeping a connection, and a connection that is not kept survives no fork.
"""

import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx2

from coatcheck.caller.answer import Answer

MAX_ANSWER_BYTES: Final = 16 * 1024
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}

Post = Callable[[str, Mapping[str, str]], Answer]


class NoAnswer(Exception):
    """Nothing usable came back.

    Attributes:
        kind: one word: `timeout`, `too_long`, `ConnectError`, …
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def post(url: str, form: Mapping[str, str], *, timeout_s: float, trust_env: bool = False) -> Answer:
    """The answer to a form, whatever its status.

    Args:
        timeout_s: for everything together, the last byte included.
        trust_env: whether proxies and certificates named in the environment (HTTPS_PROXY,
            SSL_CERT_FILE, …) count.

    Raises:
        NoAnswer: none in time, or one that is too long.
    """
    line = _Line()
    # httpx2 limits each single read; a server that sends a byte now and then would renew that
    # limit for ever.  The timer ends the connection under it.
    timer = threading.Timer(timeout_s, line.end)
    timer.daemon = True
    timer.start()
    try:
        with (
            httpx2.Client(timeout=timeout_s, trust_env=trust_env, follow_redirects=False) as client,
            client.stream(
                "POST", url, data=dict(form), headers=_HEADERS, extensions={"trace": line.trace}
            ) as response,
        ):
            body = _read(response)
    except httpx2.TimeoutException:
        raise NoAnswer("timeout") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError) as error:
        raise NoAnswer("timeout" if line.is_ended else type(error).__name__) from None
    finally:
        timer.cancel()
    if line.is_ended:
        # A body without a length looks complete when its connection is ended.
        raise NoAnswer("timeout")
    return Answer(response.status_code, body, response.headers.get("Retry-After"))


def _read(response: httpx2.Response) -> bytes:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise NoAnswer("compressed")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise NoAnswer("too_long")
    return bytes(body)


class _Line:
    """The socket of one exchange, to be ended from another thread."""

    def __init__(self) -> None:
        self.is_ended = False
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpx2 at each step; keeps the socket as soon as there is one."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.is_ended:
                self._shut_down()

    def end(self) -> None:
        self.is_ended = True
        self._shut_down()

    def _shut_down(self) -> None:
        # Shut down, not closed: the number of a closed socket may already belong to another one.
        if self._socket is not None:
            try:
                # Past TLS, whose own goodbye would wait for the other side.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                return
