"""Bounded GET and POST: the only place where verifiers and callers ask the issuer.

Everything is limited, because no program may hang or fill up on behalf of somebody else's server:
total time, size, no redirects, no compression, https off the loopback interface.

A client is made for each fetch and closed after it.  There is one every few minutes, so that
nothing is gained by keeping a connection, and a connection that is not kept survives no fork.
Exchanges come one after the other, so `Posts` keeps theirs.

An issuer of `coatcheck.testing` stands in for the network here.  Only code in this process can
put it there: no setting, variable or answer leads to it.
"""

import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Protocol
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


class Answer(NamedTuple):
    """What came back for a POST.  `headers` are found by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class StandIn(Protocol):
    """An issuer that lives in this process instead of behind the network."""

    def get(self, url: str) -> bytes:
        """The body of a 200 answer.  Raises FetchFailed."""
        ...

    def post(self, url: str, form: Mapping[str, str]) -> Answer:
        """The answer to a form.  Raises FetchFailed."""
        ...


#: By the URL that all of theirs begin with.
_STAND_INS: Final[dict[str, StandIn]] = {}


def put_in(base: str, stand_in: StandIn | None) -> StandIn | None:
    """Let an issuer of this process answer for a URL and all below it; None: the network again.

    Returns:
        Who answered before.
    """
    before = _STAND_INS.pop(base, None)
    if stand_in is not None:
        _STAND_INS[base] = stand_in
    return before


def _stand_in_for(url: str) -> StandIn | None:
    for base, stand_in in list(_STAND_INS.items()):
        if url.startswith(base) and url[len(base) :][:1] in ("", "/", "?"):
            return stand_in
    return None


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
    require_tls(parts.scheme, host, unsafe_plain_http=unsafe_plain_http)
    return url


def require_tls(scheme: str, host: str, *, unsafe_plain_http: bool = False) -> None:
    """Do nothing, if what is sent there in the clear cannot be read on the way.

    Raises:
        ValueError: neither https nor plain http on this machine.
    """
    if scheme == "https":
        return
    if scheme != "http" or not (unsafe_plain_http or is_loopback(host)):
        raise ValueError("use https; plain http is for 127.0.0.1, localhost and [::1]")


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
    if _STAND_INS and (stand_in := _stand_in_for(url)) is not None:
        return stand_in.get(url)
    connection = _Connection()
    with (
        connection.limited_to(timeout_s),
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
        return read_body(response, max_bytes)


def post(
    url: str,
    form: Mapping[str, str],
    *,
    max_bytes: int,
    timeout_s: float = FIRST_LOAD_TIMEOUT,
    trust_env: bool = False,
) -> Answer:
    """As `Posts.post`, over a connection of its own, which survives no fork."""
    posts = Posts(timeout_s=timeout_s, trust_env=trust_env)
    try:
        return posts.post(url, form, max_bytes=max_bytes)
    finally:
        posts.close()


class Posts:
    """POSTs to one server, over connections that are kept.  For any number of threads.

    Args:
        timeout_s: for each of them, the last byte of its answer included.
        trust_env: as for `fetch`.
    """

    def __init__(self, *, timeout_s: float = FIRST_LOAD_TIMEOUT, trust_env: bool = False) -> None:
        self.timeout_s = timeout_s
        self._trust_env = trust_env
        #: One for each POST at a time.  Taking one and giving it back are single operations.
        self._idle: list[_Line] = []

    def post(self, url: str, form: Mapping[str, str], *, max_bytes: int) -> Answer:
        """The answer to a form, whatever its status.

        Raises:
            FetchFailed: there is none in time, or it is compressed or too long.
        """
        if _STAND_INS and (stand_in := _stand_in_for(url)) is not None:
            return stand_in.post(url, form)
        try:
            line = self._idle.pop()
        except IndexError:
            line = _Line(trust_env=self._trust_env)
        try:
            answer = line.post(url, form, max_bytes, self.timeout_s)
        except BaseException:
            # Nobody knows what would come next over it.
            line.close()
            raise
        self._idle.append(line)
        return answer

    def close(self) -> None:
        """Let go of the connections that nobody uses at the moment."""
        while self._idle:
            self._idle.pop().close()


class _Line:
    """A client that keeps its one connection, and the socket of it."""

    def __init__(self, *, trust_env: bool) -> None:
        self._connection = _Connection()
        self._client = httpx2.Client(
            verify=_tls(trust_env=trust_env),
            trust_env=trust_env,
            follow_redirects=False,
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        )

    def post(self, url: str, form: Mapping[str, str], max_bytes: int, timeout_s: float) -> Answer:
        connection = self._connection
        with (
            connection.limited_to(timeout_s),
            self._client.stream(
                "POST",
                url,
                data=form,
                timeout=timeout_s,
                extensions={"trace": connection.trace},
            ) as response,
        ):
            body = read_body(response, max_bytes)
        return Answer(response.status_code, response.headers, body)

    def close(self) -> None:
        self._client.close()


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
    """The socket of a fetch or of a line, to be ended from another thread."""

    def __init__(self) -> None:
        self.is_ended = False
        self._socket: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx2 at each step; keeps the socket as soon as there is one."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.is_ended:
                self._shut_down()

    @contextmanager
    def limited_to(self, timeout_s: float) -> Iterator[None]:
        """End the connection after so many seconds, whatever happens over it.

        httpx2 limits each single read; a server that sends a byte now and then would renew that
        limit for ever.

        Raises:
            FetchFailed: for all that goes wrong in the block.
        """
        timer = threading.Timer(timeout_s, self._end)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:
            raise FetchFailed("no_thread") from None
        try:
            yield
        except httpx2.TimeoutException:
            raise FetchFailed("timeout") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise FetchFailed("timeout" if self.is_ended else type(error).__name__) from None
        finally:
            timer.cancel()
            # It must not end what comes next over this connection.
            timer.join()
        if self.is_ended:
            # A body without a length looks complete when its connection is ended.
            raise FetchFailed("timeout")

    def _end(self) -> None:
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
