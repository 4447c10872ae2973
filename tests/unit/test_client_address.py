"""`coatcheck.client_address`: whose address a request comes from, through any number of proxies."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck.client_address import client_address, parse

PROXIES = (ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48"))
PROXY = "10.0.0.1"

CASES: dict[str, tuple[str | None, Sequence[str], str | None]] = {
    "the peer, when nothing is forwarded": ("198.51.100.7", [], "198.51.100.7"),
    "the peer, whatever an untrusted one claims": ("198.51.100.7", ["1.2.3.4"], "198.51.100.7"),
    "what a trusted proxy saw": (PROXY, ["198.51.100.7"], "198.51.100.7"),
    "the rightmost that is no proxy": (PROXY, ["1.2.3.4, 198.51.100.7"], "198.51.100.7"),
    "past every trusted proxy": (PROXY, ["1.2.3.4, 198.51.100.7, 10.0.0.9"], "198.51.100.7"),
    "all lines count, joined in order": (
        PROXY,
        ["1.2.3.4", "198.51.100.7", "10.9.9.9"],
        "198.51.100.7",
    ),
    "a port behind": (PROXY, ["198.51.100.7:4711"], "198.51.100.7"),
    "a high port behind": (PROXY, ["198.51.100.7:59999"], "198.51.100.7"),
    "IPv6": (PROXY, ["2001:db8::1"], "2001:db8::1"),
    "IPv6 in brackets": (PROXY, ["[2001:db8::1]"], "2001:db8::1"),
    "IPv6 with a port": (PROXY, ["[2001:db8::1]:4711"], "2001:db8::1"),
    "an IPv6 proxy": ("2001:db8:ffff::1", ["198.51.100.7"], "198.51.100.7"),
    "IPv4 mapped into IPv6, as the peer": ("::ffff:198.51.100.7", [], "198.51.100.7"),
    "a mapped proxy is that proxy": ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
    "IPv4 mapped into IPv6, forwarded": (PROXY, ["::ffff:198.51.100.7"], "198.51.100.7"),
    "blanks around": (PROXY, ["  1.2.3.4 ,\t198.51.100.7  "], "198.51.100.7"),
    "only proxies: the farthest of them": (PROXY, ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
    "a trusted proxy without the header": (PROXY, [], None),
    "a trusted proxy with an empty header": (PROXY, [""], None),
    "what is no address": (PROXY, ["unknown"], None),
    "an obfuscated one": (PROXY, ["_hidden"], None),
    "no address, behind a good one on its left": (PROXY, ["198.51.100.7, nonsense"], None),
    "an empty entry at the right": (PROXY, ["198.51.100.7,"], None),
    "a network": (PROXY, ["198.51.100.0/24"], None),
    "leading zeros, which some read as octal": (PROXY, ["198.51.100.007"], None),
    "a number": (PROXY, ["3325256711"], None),
    "digits of another alphabet": (PROXY, ["198.51.100.\u0667"], None),
    "an open bracket": (PROXY, ["[2001:db8::1"], None),
    "one bracket too many": (PROXY, ["[2001:db8::1]]:4711"], None),
    "a port without its colon": (PROXY, ["[2001:db8::1]4711"], None),
    "a port that is none": (PROXY, ["198.51.100.7:http"], None),
    "a Unix socket": (None, ["198.51.100.7"], None),
    "a peer that is no address": ("testclient", ["198.51.100.7"], None),
}


@pytest.mark.parametrize(("peer", "forwarded", "address"), CASES.values(), ids=CASES)
def test_the_address_is_the_one_that_nobody_untrusted_could_choose(
    peer: str | None, forwarded: Sequence[str], address: str | None
) -> None:
    """From right to left past the trusted; unknown rather than guessed.  RFC 7239 §8.1."""
    expected = None if address is None else ip_address(address)

    assert client_address(peer, ", ".join(forwarded), PROXIES) == expected


ADDRESSES = st.ip_addresses()
UNTRUSTED = ADDRESSES.map(lambda one: parse(str(one))).filter(
    lambda one: one is not None and not any(one in network for network in PROXIES)
)


@settings(max_examples=200)
@given(st.lists(st.text(max_size=20), max_size=3), UNTRUSTED)
def test_nothing_that_the_caller_writes_moves_its_address(written: list[str], seen: object) -> None:
    """The caller owns every line but the last entry, which the proxy appends."""
    forwarded = [*written, str(seen)]

    assert client_address(PROXY, ",".join(forwarded), PROXIES) == seen


@settings(max_examples=100)
@given(st.text(max_size=30), st.text(max_size=90))
def test_no_header_raises(peer: str, forwarded: str) -> None:
    """It comes from the network."""
    client_address(peer, forwarded, PROXIES)


@settings(max_examples=100)
@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_the_plain_one(address: object) -> None:
    """A dual-stack socket shows IPv4 callers so; ranges and throttles are written in IPv4."""
    assert parse(f"::ffff:{address}") == address
