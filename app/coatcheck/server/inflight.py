"""How many requests one process may have under way, so that what it takes on it answers soon.

A request counts from its last byte until its answer; one whose body is still on its way waits for
its client and not for us, so that slow clients cannot use the room up.
"""

from typing import Final

#: Where the listener leaves the moment of a request's last byte, by `time.perf_counter`: a key of
#: the ASGI scope.
ARRIVED_AT: Final = "coatcheck.arrived_at"


class InFlight:
    """The requests of one process that arrived as a whole and are not answered yet."""

    __slots__ = ("count", "most")

    def __init__(self, most: int) -> None:
        """Args:
        most: from so many on, a request that may be refused is refused at once.
        """
        self.count = 0
        self.most = most

    @property
    def is_full(self) -> bool:
        return self.count >= self.most

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *raised: object) -> None:
        self.count -= 1
