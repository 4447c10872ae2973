"""One bounded GET: the only place where the verifier touches the network.

Everything is limited, because a resource server must not hang or fill up on behalf of somebody
else's server: total time, size, no redirects, no compression, https off the loopback interface.

A client is made for each fetch and closed after it.  There is one every few minutes, so that
nothing is gained by keeping a connection, and a connection that is not kept survives no fork.
"""

import ipaddress
import os
import socket
import ssl
import threading
import time
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2

from coatcheck.durations import FIRST_LOAD_TIMEOUT

#: Seconds after which certificates of authorities are read again: they change on the disk.
_TLS_LIFETIME: Final = 3600
_TLS_VARIABLES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_ACCEPT: Final = "application/jwk-set+json, application/json"


class FetchFailed(Exception):
    """Nothing usable came back.

    Attributes:
        kind: one word for status pages: `timeout`, `http_404`, `too_long`, `ConnectError`, …
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def require_safe(url: str, *, unsafe_plain_http: bool = False) -> str:
    """The same URL, if it may be fetched.

    Raises:
        ValueError: neither https nor a loopback address, or no URL at all.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if not host or parts.username is not None or parts.fragment:
        raise ValueError("not an http(s) URL with a host, without user name and fragment")
    if parts.scheme == "https":
        return url
    if parts.scheme != "http" or not (unsafe_plain_http or is_loopback(host)):
        raise ValueError("use https; plain http is for 127.0.0.1, localhost and [::1]")
    return url


def is_loopback(host: str) -> bool:
    """Whether a host name cannot lead off this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float = FIRST_LOAD_TIMEOUT,
    trust_env: bool = False,
) -> bytes:
    """The body of a 200 answer.

    Args:
        url: from `require_safe`.
        timeout_s: for everything together, the last byte included.
        trust_env: whether proxies and certificates named in the environment (HTTPS_PROXY,
            SSL_CERT_FILE, …) count.  Off: a variable meant for another program does not decide
            whom a resource server believes.

    Raises:
        FetchFailed: any other answer, or none in time.
    """
    connection = _Connection()
    # httpx2 limits each single read; a server that sends a byte now and then would renew that
    # limit for ever.  The timer ends the connection under it.
    timer = threading.Timer(timeout_s, connection.end)
    timer.daemon = True
    timer.start()
    try:
        with (
            httpx2.Client(
                verify=_tls(trust_env=trust_env),
                timeout=timeout_s,
                trust_env=trust_env,
                follow_redirects=False,
            ) as client,
            client.stream(
                "GET",
                url,
                headers={"Accept": _ACCEPT, "Accept-Encoding": "identity"},
                extensions={"trace": connection.trace},
            ) as response,
        ):
            _require_ok(response)
            body = read_body(response, max_bytes)
    except httpx2.TimeoutException:
        raise FetchFailed("timeout") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        kind = "timeout" if connection.is_ended else type(error).__name__
        raise FetchFailed(kind) from None
    finally:
        timer.cancel()
    if connection.is_ended:
        # A body without a length looks complete when its connection is ended.
        raise FetchFailed("timeout")
    return body


def _tls(*, trust_env: bool) -> ssl.SSLContext:
    """What servers are checked by.  Made once an hour: each time costs as much as 100 fetches."""
    named = tuple(map(os.environ.get, _TLS_VARIABLES)) if trust_env else ()
    return _make_tls(trust_env, named, time.monotonic() // _TLS_LIFETIME)


@lru_cache(maxsize=4)
def _make_tls(trust_env: bool, named: object, since: float) -> ssl.SSLContext:
    return httpx2.create_ssl_context(trust_env=trust_env)


def _require_ok(response: httpx2.Response) -> None:
    if response.status_code != HTTPStatus.OK:
        raise FetchFailed(f"http_{response.status_code}")


def read_body(response: httpx2.Response, max_bytes: int) -> bytes:
    """The body of an answer that is being streamed.

    Raises:
        FetchFailed: it is compressed, or too long.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchFailed("compressed")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise FetchFailed("too_long")
    return bytes(body)


class _Connection:
    """The socket of one fetch, to be ended from another thread."""

    def __init__(self) -> None:
        self.is_ended = False
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx2 at each step; keeps the socket as soon as there is one."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.is_ended:
                self._shut_down()

    def end(self) -> None:
        self.is_ended = True
        self._shut_down()

    def _shut_down(self) -> None:
        # Shut down, not closed: the number of a closed socket may already belong to another
        # one while the fetching thread still reads from it.
        if self._socket is not None:
            try:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                return
