"""`coatcheck.server.throttle`: wrong secrets are counted by address.  RFC 6749 §2.3.1."""

from ipaddress import ip_address

import pytest

from coatcheck.client_address import Address
from coatcheck.server.throttle import Throttle, by_address

LIMIT = 5
HERE = ip_address("198.51.100.7")


def guesses_allowed(throttle: Throttle, address: Address | None, tries: int = 3 * LIMIT) -> int:
    """How many of so many guesses in a row pass."""
    return sum(throttle.retry_after(by_address(address)) is None for _ in range(tries))


def is_at_the_limit(allowed: int) -> bool:
    # The window slides: a guess that fell into the minute before weighs a little less than one.
    return LIMIT <= allowed <= LIMIT + 1


@pytest.mark.parametrize("text", ["198.51.100.7", "2001:db8::1"])
def test_an_address_may_guess_so_often_a_minute(text: str) -> None:
    """`COATCHECK_GUESSES_PER_MINUTE`, for each family."""
    assert is_at_the_limit(guesses_allowed(Throttle(LIMIT), ip_address(text)))


def test_no_limit_means_none() -> None:
    """0 turns it off, for whoever throttles in front."""
    assert guesses_allowed(Throttle(0), HERE, 1000) == 1000


def test_a_guesser_is_told_when_to_come_back() -> None:
    """Whole seconds for `Retry-After`, at least one, at most the window."""
    throttle = Throttle(LIMIT)
    guesses_allowed(throttle, HERE)

    wait = throttle.retry_after(by_address(HERE))

    assert type(wait) is int
    assert 1 <= wait <= 60


def test_another_address_guesses_on_its_own_account() -> None:
    """Nobody pays for a neighbor: IPv4 is counted by the whole address."""
    throttle = Throttle(LIMIT)
    guesses_allowed(throttle, HERE)

    assert is_at_the_limit(guesses_allowed(throttle, ip_address("198.51.100.8")))


def test_a_subscribers_ipv6_addresses_are_one_guesser() -> None:
    """A /64 holds 2^64 addresses: whoever has it would never meet the limit otherwise."""
    throttle = Throttle(LIMIT)
    addresses = [ip_address(f"2001:db8:0:1:{n:x}::1") for n in range(1, 3 * LIMIT)]

    allowed = sum(throttle.retry_after(by_address(one)) is None for one in addresses)

    assert is_at_the_limit(allowed)


def test_the_next_64_is_another_guesser() -> None:
    """And no further up: providers hand out /64s to different people."""
    throttle = Throttle(LIMIT)
    guesses_allowed(throttle, ip_address("2001:db8:0:1::1"))

    assert is_at_the_limit(guesses_allowed(throttle, ip_address("2001:db8:0:2::1")))


def test_guessers_whose_address_is_unknown_share_one_account() -> None:
    """To hide behind a broken proxy gives no free guesses."""
    throttle = Throttle(LIMIT)

    assert is_at_the_limit(guesses_allowed(throttle, None))
    assert is_at_the_limit(guesses_allowed(throttle, HERE))


def test_an_ipv4_address_is_not_mistaken_for_an_ipv6_network() -> None:
    """Both are written as numbers inside."""
    throttle = Throttle(LIMIT)
    guesses_allowed(throttle, ip_address("::"))

    assert is_at_the_limit(guesses_allowed(throttle, ip_address("0.0.0.0")))  # noqa: S104
