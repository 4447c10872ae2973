"""`coatcheck.server.oauth.wire`: what a body says, as the standard library reads it."""

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coatcheck.server.oauth import wire
from coatcheck.server.oauth.errors import OAuthError

NAMES = st.sampled_from(["a", "scope", "grant type", "", "é", "%41", "a+b", "\0"])
VALUES = st.text(max_size=6)
#: What is written between the parts that mean something.
PIECES = st.sampled_from([*"&=+;a%", "%26", "%3D", "%2B", "%C3%A9", "%c3", "%zz", "%", "%00", "é"])


def by_the_library(body: bytes) -> list[tuple[str, str]] | None:
    """The pairs of a body; None where it is not UTF-8, or there are too many."""
    try:
        return parse_qsl(
            body.decode(),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=wire.MAX_PARAMETERS,
        )
    except ValueError:
        return None


def by_us(body: bytes) -> list[tuple[str, str]] | None:
    """The pairs of a body; None where it is refused."""
    try:
        return list(wire._pairs(body))
    except OAuthError:
        return None


@settings(max_examples=300)
@given(st.lists(st.tuples(NAMES, VALUES), max_size=6))
def test_what_a_library_writes_is_read_as_it_was_meant(pairs: list[tuple[str, str]]) -> None:
    """RFC 6749 appendix B."""
    named = [pair for pair in pairs if "\0" not in "".join(pair)]

    assert by_us(urlencode(named).encode()) == named


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=12).map("".join).map(str.encode) | st.binary(max_size=20))
@example(b"a=%C3%A9&b=%c3")
@example(b"&".join([b"a"] * wire.MAX_PARAMETERS))
@example(b"&".join([b"a"] * (wire.MAX_PARAMETERS + 1)))
def test_every_body_is_read_as_the_standard_library_reads_it(body: bytes) -> None:
    """Or refused: a lone percent sign, a NUL, and what the library refuses."""
    theirs, ours = by_the_library(body), by_us(body)

    if (
        theirs is None
        or wire._BROKEN_PERCENT.search(body)
        or any("\0" in name + value for name, value in theirs)
    ):
        assert ours is None
    else:
        assert ours == theirs


@pytest.mark.parametrize("body", [b"\0=1", b"a%00b=1", b"grant_type=x&%00"])
def test_a_name_with_a_nul_is_refused(body: bytes) -> None:
    """T38: no database of ours takes it."""
    assert by_us(body) is None
