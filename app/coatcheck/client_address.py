"""Whose address a request comes from, when it may have passed proxies, and in which networks it
lies.  Pure.

The peer counts, unless it is a trusted proxy: then X-Forwarded-For is read from right to left,
past every trusted proxy, to the first address that is none.  The leftmost entry is whatever the
caller wrote there and decides nothing.

IPv4 and IPv6 are matched apart: nobody who comes by IPv6 is in `0.0.0.0/0`.  An IPv4 address or
network that is mapped into IPv6 is the IPv4 one.

Source: RFC 7239 §8.1 (forwarded information is only as good as who wrote it), RFC 4632 §3.1 and
RFC 4291 §2.3 (prefix notation), RFC 4291 §2.5.5.2 (mapped addresses).
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: RFC 7239 §6: 192.0.2.1:4711, [2001:db8::1]:4711, and both without a port.
_WITH_PORT: Final = re.compile(r"(?:\[([^\]]+)\]|([^:]+))(?::[0-9]{1,5})?")
#: Bits of an IPv6 address before an IPv4 one that is mapped into it.
_MAPPED_BITS: Final = 96


def client_address(
    peer: str | None, forwarded_for: str, trusted_proxies: Sequence[Network]
) -> Address | None:
    """The caller's address; None when it cannot be known.

    Args:
        peer: the address at the other end of the connection; None on a Unix socket.
        forwarded_for: the request's X-Forwarded-For, its lines joined by commas in order.
        trusted_proxies: networks whose X-Forwarded-For is believed.
    """
    address = parse(peer or "")
    if not trusted_proxies or address is None or not _is_trusted(address, trusted_proxies):
        return address
    # A trusted proxy that names nobody, or writes what is no address, leaves the caller unknown.
    for entry in reversed(forwarded_for.split(",")):
        address = parse(_without_port(entry.strip()))
        if address is None or not _is_trusted(address, trusted_proxies):
            return address
    return address


@lru_cache(maxsize=4096)
def parse(text: str) -> Address | None:
    """An address; an IPv4 one mapped into IPv6 is the IPv4 one.  None for any other text."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_network(text: str) -> Network:
    """A network, or a single address as the network that holds nothing else.

    Raises:
        ValueError: it is neither; the address has bits beyond its prefix, or a zone.
    """
    network = ip_network(text)
    if isinstance(network, IPv6Network):
        if network.network_address.scope_id is not None:
            raise ValueError("a zone says something on one machine only")
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= _MAPPED_BITS:
            return ip_network((int(mapped), network.prefixlen - _MAPPED_BITS))
    return network


@lru_cache(maxsize=4096)
def parse_networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Networks as `parse_network` reads them.  Raises ValueError as it does."""
    return tuple(map(parse_network, texts))


def is_in(address: str | None, networks: Iterable[Network]) -> bool:
    """Whether an address, as text, lies in one of these networks.  None: unknown, in no network."""
    parsed = parse(address or "")
    return parsed is not None and any(parsed in network for network in networks)


def _is_trusted(address: Address, trusted_proxies: Sequence[Network]) -> bool:
    return any(address in network for network in trusted_proxies)


def _without_port(text: str) -> str:
    found = _WITH_PORT.fullmatch(text)
    # What has neither form is left as it is: a plain IPv6 address, or none at all.
    return text if found is None else found[1] or found[2]
