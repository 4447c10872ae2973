"""One POST, of which everything is bounded, whatever the other side does."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from coatcheck.caller.exchange import MAX_ANSWER_BYTES, post
from coatcheck.http import FetchFailed
from support.live import free_port

TIMEOUT = 0.5
WAIT = 5

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads one request and lets `answer` do the rest."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(WAIT)

        def serve() -> None:
            with suppress(OSError), listening.accept()[0] as connection:
                connection.settimeout(WAIT)
                read = b""
                while not read.endswith(b"a=b"):
                    if not (more := connection.recv(4096)):
                        return
                    read += more
                asked.append(read)
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/oauth/token", asked
        finally:
            thread.join(WAIT)
            assert not thread.is_alive()


def test_an_answer_comes_back_whatever_its_status() -> None:
    """With the one header that counts; what is asked is a form, and nothing compressed."""
    told = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}"
    with server(lambda connection: connection.sendall(told)) as (url, asked):
        answer = post(url, {"a": "b"}, timeout_s=WAIT)

    assert answer == (503, b"{}", "7")
    head = asked[0].lower()
    assert b"content-type: application/x-www-form-urlencoded" in head
    assert b"accept-encoding: identity" in head


def test_a_redirect_is_an_answer_and_not_followed() -> None:
    """The API key goes where it was meant to go."""
    told = b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with server(lambda connection: connection.sendall(told)) as (url, _):
        assert post(url, {"a": "b"}, timeout_s=WAIT).status == 307


def drip(head: bytes) -> Callable[[socket.socket], None]:
    """A byte now and then, for as long as somebody reads."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    return answer


BAD = {
    "nothing": (lambda connection: connection.recv(1), "timeout"),
    "a header that never ends": (drip(OK + b"X: "), "timeout"),
    "a body that never ends": (drip(OK + b"\r\n"), "timeout"),
    "too long": (
        lambda connection: connection.sendall(OK + b"\r\n" + b"x" * (MAX_ANSWER_BYTES + 1)),
        "too_long",
    ),
    "compressed": (
        lambda connection: connection.sendall(OK + b"Content-Encoding: gzip\r\n\r\nx"),
        "compressed",
    ),
    "no HTTP": (lambda connection: connection.sendall(b"SSH-2.0\r\n\r\n"), "RemoteProtocolError"),
    "hangs up": (lambda connection: connection.close(), "RemoteProtocolError"),
}


@pytest.mark.parametrize(("answer", "kind"), BAD.values(), ids=BAD)
def test_what_goes_on_for_ever_ends(answer: Callable[[socket.socket], None], kind: str) -> None:
    """In time, in size, and with a word that says which."""
    began_at = time.monotonic()
    with server(answer) as (url, _), pytest.raises(FetchFailed) as caught:
        post(url, {"a": "b"}, timeout_s=TIMEOUT if kind == "timeout" else WAIT)

    assert caught.value.kind == kind
    assert time.monotonic() - began_at < 3


def test_nobody_there_is_told() -> None:
    """The port is free: nobody listens."""
    with pytest.raises(FetchFailed, match="ConnectError"):
        post(f"http://127.0.0.1:{free_port()}/", {"a": "b"}, timeout_s=WAIT)


@pytest.mark.parametrize("trust_env", [False, True])
def test_proxies_of_the_environment_are_for_who_trusts_it(
    monkeypatch: pytest.MonkeyPatch, trust_env: bool
) -> None:
    """A variable meant for another program does not decide who sees the API key."""
    told = OK + b"Content-Length: 2\r\n\r\n{}"
    with server(lambda connection: connection.sendall(told)) as (url, _):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        if trust_env:
            with pytest.raises(FetchFailed):
                post(url, {"a": "b"}, timeout_s=WAIT, trust_env=True)
            monkeypatch.delenv("http_proxy")
            monkeypatch.delenv("HTTP_PROXY")
        assert post(url, {"a": "b"}, timeout_s=WAIT, trust_env=trust_env).status == 200
