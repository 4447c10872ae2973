"""Deadlines for connections whose server may never answer.

A server that is stopped, frozen or cut off leaves its client waiting: its machine still
acknowledges, so that no TCP timer runs out, and its own statement timeout cannot run.  Here the
connection is shut down under whoever waits on it, who gets an ordinary error at once.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Deadline:
    """When a connection is given up.  `extend` moves it."""

    __slots__ = ("_changed", "at", "is_over", "socket")

    def __init__(self, fileno: int, changed: Callable[[], None]) -> None:
        # A copy: the number may belong to another connection once the driver has closed its own.
        self.socket = socket.socket(fileno=os.dup(fileno))
        self.at = 0.0
        self.is_over = False
        self._changed = changed

    def extend(self, seconds: float) -> None:
        """Give it so many seconds from now on, or more if it has more."""
        is_first = not self.at
        self.at = max(self.at, time.monotonic() + seconds)
        if is_first:
            self._changed()


class Deadlines:
    """The deadlines of one store, and the thread that keeps them."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._kept: set[Deadline] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def within(self, seconds: float, fileno: int) -> Iterator[Deadline]:
        """Shut the connection down if the block takes longer."""
        deadline = Deadline(fileno, self._wake)
        with self._change:
            self._kept.add(deadline)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._keep, name="coatcheck-deadlines", daemon=True
                )
                self._thread.start()
        deadline.extend(seconds)
        try:
            yield deadline
        finally:
            with self._change:
                self._kept.discard(deadline)
                deadline.socket.close()

    def _wake(self) -> None:
        with self._change:
            self._change.notify()

    def _keep(self) -> None:
        with self._change:
            while True:
                now = time.monotonic()
                for deadline in self._kept:
                    if deadline.at <= now and not deadline.is_over:
                        deadline.is_over = True
                        with suppress(OSError):
                            deadline.socket.shutdown(socket.SHUT_RDWR)
                pending = [one.at for one in self._kept if not one.is_over]
                self._change.wait(min(pending) - now if pending else None)
