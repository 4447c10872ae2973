"""Throttling of guesses: wrong secrets are counted by address, right ones never.

Only a secret that matched nothing counts.  So whoever holds a key always gets through, however
many others guess at it from elsewhere, and nobody can lock a key out by its public id.

Source: RFC 6749 §2.3.1 (protection against brute force), OWASP ASVS 5 §6.3.1.
"""

import math
import time
from ipaddress import IPv4Address

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from coatcheck.client_address import Address

#: An IPv6 subscriber usually has a whole /64: its addresses are one guesser.
_IPV6_BITS_DROPPED = 64


class Throttle:
    """Counts guesses in this process."""

    def __init__(self, guesses_per_minute: int) -> None:
        """Args:
        guesses_per_minute: how many one address may make; 0 counts nothing.
        """
        self._limit = RateLimitItemPerMinute(guesses_per_minute) if guesses_per_minute else None
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def retry_after(self, bucket: str) -> int | None:
        """Count one wrong secret.

        Args:
            bucket: who guesses; see `by_address`.

        Returns:
            None while it may go on guessing, else the seconds it should wait.
        """
        if self._limit is None:
            return None
        if self._limiter.hit(self._limit, bucket):
            return None
        reset_at = self._limiter.get_window_stats(self._limit, bucket).reset_time
        # The limiter has a clock of its own, the machine's.
        return max(1, math.ceil(reset_at - time.time()))


def by_address(address: Address | None) -> str:
    """The bucket of an address; those that are not known share one."""
    if address is None or isinstance(address, IPv4Address):
        return str(address)
    return f"{int(address) >> _IPV6_BITS_DROPPED:x}/64"
