"""Where a token may be sent: the origins it is for, over TLS, however a URL is written."""

import pytest

from coatcheck.caller import HostNotAllowed
from coatcheck.caller.origin import Reach, origin_of

API = "https://api.example.com"

ALLOWED = {
    "a host": (("api.example.com",), f"{API}/x"),
    "its port": (("api.example.com",), f"{API}:443/x"),
    "another port": (("api.example.com:8443",), f"{API}:8443/x"),
    "a URL": ((f"{API}/v1",), f"{API}/v2?a=b"),
    "letter case": (("API.Example.Com",), "HTTPS://api.EXAMPLE.com"),
    "a dot at the end": (("api.example.com",), "https://api.example.com./"),
    "the second": (("a.example.com", "api.example.com"), API),
    "loopback": (("127.0.0.1:8000",), "http://127.0.0.1:8000/"),
    "localhost": (("localhost",), "http://localhost/"),
    "a v6 address": (("[2001:db8::1]",), "https://[2001:0db8:0::1]/"),
    "loopback, v6": (("[::1]:8000",), "http://[::1]:8000/"),
    "its two spellings": (("bücher.example",), "https://xn--bcher-kva.example/"),
    "an @ in the path": (("api.example.com",), f"{API}/@evil.example"),
}


@pytest.mark.parametrize(("hosts", "url"), ALLOWED.values(), ids=ALLOWED)
def test_who_is_named_gets_the_token(hosts: tuple[str, ...], url: str) -> None:
    """One form for each host, so that spelling decides nothing."""
    Reach(hosts).require(url)
    assert Reach(hosts).lets(url)


REFUSED = {
    "another host": "https://evil.example/",
    "a longer name": "https://api.example.com.evil.example/",
    "a name below": "https://x.api.example.com/",
    "a name above": "https://example.com/",
    "another port": f"{API}:8443/",
    "in the clear": "http://api.example.com/",
    "in the clear, TLS's port": "http://api.example.com:443/",
    "a user name": "https://api.example.com@evil.example/",
    "a user name of ours": "https://user@api.example.com/",
    "a backslash": "https://evil.example\\@api.example.com/",
    "a tab": "https://api.example.com\t.evil.example/",
    "a line break that some cut": "https://api.exam\nple.com/",
    "no scheme": "//api.example.com/",
    "another scheme": "ftp://api.example.com/",
    "a socket": "unix://api.example.com/",
    "nothing": "",
    "no port": "https://api.example.com:x/",
    "braces": "https://{api,evil}.example.com/",
    "an address as a number": "https://2130706433/",
}


@pytest.mark.parametrize("url", REFUSED.values(), ids=REFUSED)
def test_nobody_else_does(url: str) -> None:
    """The error says what to do, and holds no more of the URL than its origin."""
    for reach in (Reach(("api.example.com",)), Reach(None, API)):
        assert not reach.lets(url)
        with pytest.raises(HostNotAllowed) as caught:
            reach.require(f"{url}secret" if url.endswith("/") else url)
        assert "secret" not in str(caught.value)


def test_without_hosts_it_is_that_of_the_resource() -> None:
    """Whoever asks for a token for an API sends it there."""
    reach = Reach(None, f"{API}/v1")
    reach.require(f"{API}/v2")

    with pytest.raises(HostNotAllowed, match=r"is for https://api\.example\.com, and .*evil"):
        reach.require("https://evil.example")


def test_without_a_resource_it_is_where_the_first_request_goes() -> None:
    """`TokenAuth(issuer)` and nothing else; what may not have a token does not bind it."""
    reach = Reach(None, "urn:widgets")
    assert not reach.lets(API)
    with pytest.raises(HostNotAllowed):
        reach.require("http://api.example.com")
    reach.require(API)
    reach.require(f"{API}/more")

    with pytest.raises(HostNotAllowed):
        reach.require("https://evil.example")


def test_nobody_named_is_nobody() -> None:
    """An empty list is no invitation."""
    with pytest.raises(HostNotAllowed):
        Reach(()).require(API)


def test_in_the_clear_is_for_who_says_so() -> None:
    """A network that may read it."""
    Reach(("http://api.internal",), unsafe_plain_http=True).require("http://api.internal/x")


@pytest.mark.parametrize(
    "host", ["", "a/b", "a?b", "a@b", "*", "*.example.com", "http://api.example.com", "a b", "a:x"]
)
def test_what_is_no_host_is_told_at_once(host: str) -> None:
    """A pattern would be none that anybody checks."""
    with pytest.raises(ValueError, match=r"."):
        Reach((host,))


def test_an_origin_is_written_as_in_a_browser() -> None:
    """Without the port that everybody knows."""
    assert str(origin_of("https://[::1]:443/x?y")) == "https://[::1]"
    assert str(origin_of("http://a.example:8080")) == "http://a.example:8080"
