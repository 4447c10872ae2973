"""Where a token may be sent: the origins that it is for, and never in the clear.

Source: RFC 6750 §5.3 (TLS, and nobody but the resource server), RFC 6454 §4 (origin).
"""

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from coatcheck.caller.errors import HostNotAllowed
from coatcheck.http import is_loopback, require_tls

_PORTS: Final = {"https": 443, "http": 80}
_NAME: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
#: Readers of URLs do not agree on what these mean, so that a host could be two.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\\\x7f]")


class Origin(NamedTuple):
    """Scheme, host and port of a URL, in the one form that can be compared."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


def origin_of(url: str) -> Origin:
    """The origin of an http(s) URL.

    Raises:
        ValueError: it is no such URL, or not the same one to everybody who reads it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in _PORTS or not host or _AMBIGUOUS.search(url):
        raise ValueError("not an http(s) URL with a host")
    if "@" in parts.netloc:
        raise ValueError("a URL with a user name, which a token would contradict")
    return Origin(parts.scheme, _host(host), _PORTS[parts.scheme] if port is None else port)


def require_safe(url: str, *, unsafe_plain_http: bool = False) -> Origin:
    """The origin of a URL that a secret may be sent to.

    Raises:
        ValueError: neither https nor a loopback address, or no such URL.
    """
    origin = origin_of(url)
    require_tls(origin.scheme, origin.host, unsafe_plain_http=unsafe_plain_http)
    return origin


class Reach:
    """The origins that get the token.  For any number of threads.

    Args:
        allowed_hosts: as `api.example.com`, which means its usual port, `api.example.com:8443` or
            a whole URL.  None: the host of `resource`; if that is no URL, whatever the first
            request goes to.
        resource: RFC 8707: which API tokens are asked for.
        unsafe_plain_http: off the loopback interface, too.

    Raises:
        ValueError: one of the hosts is none.
    """

    def __init__(
        self,
        allowed_hosts: Iterable[str] | None = None,
        resource: str | None = None,
        *,
        unsafe_plain_http: bool = False,
    ) -> None:
        self._unsafe_plain_http = unsafe_plain_http
        if isinstance(allowed_hosts, str):
            allowed_hosts = (allowed_hosts,)
        if allowed_hosts is None and resource and resource.startswith(("https://", "http://")):
            allowed_hosts = (resource,)
        self._allowed = (
            None if allowed_hosts is None else frozenset(map(self._entry, allowed_hosts))
        )
        self._first: dict[str, Origin] = {}

    def __repr__(self) -> str:
        allowed = self._first.values() if self._allowed is None else sorted(self._allowed)
        return f"Reach({', '.join(map(str, allowed))})"

    def require(self, url: str) -> None:
        """Let a URL pass that may get the token.

        Raises:
            HostNotAllowed: any other one.
        """
        try:
            origin = require_safe(url, unsafe_plain_http=self._unsafe_plain_http)
        except ValueError as error:
            raise HostNotAllowed(f"no token is sent there: {error}", "host_not_allowed") from None
        if self._allowed is None:
            # Atomic, and no lock that a fork could copy while it is held.
            allowed = {self._first.setdefault("first", origin)}
        else:
            allowed = set(self._allowed)
        if origin not in allowed:
            raise HostNotAllowed(
                f"the token is for {', '.join(sorted(map(str, allowed)))}, and this request goes to"
                f" {origin}: name it in allowed_hosts if it may have the token, or call it with a"
                " client of its own",
                "host_not_allowed",
            )

    def lets(self, url: str) -> bool:
        """Whether `require` would let it pass; no first request is taken note of."""
        try:
            origin = require_safe(url, unsafe_plain_http=self._unsafe_plain_http)
        except ValueError:
            return False
        return origin in (self._first.values() if self._allowed is None else self._allowed)

    def _entry(self, text: str) -> Origin:
        if "://" in text:
            return require_safe(text, unsafe_plain_http=self._unsafe_plain_http)
        origin = origin_of(f"https://{text}")
        if urlsplit(f"https://{text}").netloc != text:
            raise ValueError("allowed_hosts: a host, a host and port, or a URL")
        if is_loopback(origin.host):
            port = urlsplit(f"http://{text}").port
            return Origin("http", origin.host, port or _PORTS["http"])
        return origin


def _host(host: str) -> str:
    host = host.rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode().lower()
    except UnicodeError:
        raise ValueError("not a URL with a host") from None
    if not _NAME.fullmatch(name):
        raise ValueError("not a URL with a host")
    return name
