"""Callers of several nodes: whose connection breaks asks once more, on a new one and elsewhere."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Final
from urllib.parse import urlsplit

_FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
#: Seconds until an answer counts as missing.
_TIMEOUT: Final = 20


class Callers:
    """Threads that ask for tokens all the time.

    Attributes:
        answered: how many requests were.
        retried: how many of them on the second connection.
        failures: what went wrong in spite of that; empty if all is well.
    """

    def __init__(self, nodes: Sequence[str], api_key: str) -> None:
        self.answered = self.retried = 0
        self.failures: list[str] = []
        self._nodes = [urlsplit(node).netloc for node in nodes]
        self._body = f"grant_type=client_credentials&client_secret={api_key}"
        self._is_over = threading.Event()
        self._counting = threading.Lock()

    def stop(self) -> None:
        self._is_over.set()

    def run(self, first: int) -> None:
        """One caller, which begins at this node."""
        node = first
        connection = HTTPConnection(self._nodes[node % len(self._nodes)], timeout=_TIMEOUT)
        while not self._is_over.is_set():
            try:
                status = self._ask(connection)
            except (OSError, HTTPException):
                connection.close()
                node += 1
                connection = HTTPConnection(self._nodes[node % len(self._nodes)], timeout=_TIMEOUT)
                try:
                    status = self._ask(connection)
                except (OSError, HTTPException) as error:
                    self.failures.append(repr(error))
                    connection.close()
                    continue
                with self._counting:
                    self.retried += 1
            if status != 200:
                self.failures.append(str(status))
            with self._counting:
                self.answered += 1
            time.sleep(0.001)
        connection.close()

    def _ask(self, connection: HTTPConnection) -> int:
        connection.request("POST", "/oauth/token", self._body, _FORM)
        answer = connection.getresponse()
        answer.read()
        return answer.status


@contextmanager
def calling(nodes: Sequence[str], api_key: str, callers: int = 4) -> Iterator[Callers]:
    """Callers at these nodes, until the block ends."""
    made = Callers(nodes, api_key)
    threads = [threading.Thread(target=made.run, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop()
        for thread in threads:
            with suppress(RuntimeError):
                thread.join(timeout=2 * _TIMEOUT)
