"""`coatcheck.base64url`: one text for each row of bytes.  RFC 7515 §2, RFC 4648 §3."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.utils import base64url_encode

from coatcheck import base64url


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_it_writes_as_pyjwt_writes_and_reads_it_back(data: bytes) -> None:
    """PyJWT is the oracle."""
    text = base64url.encode(data)

    assert text == base64url_encode(data)
    assert base64url.decode(text) == data


@settings(max_examples=300)
@given(st.binary(max_size=12) | st.text("ABab01-_+/=. \n", max_size=12).map(str.encode))
def test_no_second_text_means_the_same_bytes(text: bytes) -> None:
    """Padding, blanks, the other alphabet and unused bits are refused.  RFC 4648 §3.3, §3.5."""
    try:
        data = base64url.decode(text)
    except ValueError:
        return

    assert base64url.encode(data) == text


@pytest.mark.parametrize(
    "text", [b"A", b"AAAAA", b"AB", b"AAB", b"AA==", b"AA\n", b"A+/A", b"\xff\xff"]
)
def test_what_is_not_its_one_spelling_is_refused(text: bytes) -> None:
    """Lengths that cannot be, unused bits that are set, characters of another alphabet."""
    with pytest.raises(ValueError, match=r"."):
        base64url.decode(text)


#: RFC 4648 §5.
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def is_base64url(text: str) -> bool:
    try:
        base64url.decode(text.encode())
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("begun", "unused_bits"), [("A", 4), ("AA", 2), ("AAA", 0)])
def test_the_unused_bits_of_the_last_character_are_zero(begun: str, unused_bits: int) -> None:
    """RFC 4648 §3.5: each character of the alphabet, one by one."""
    found = {last for last in ALPHABET if is_base64url(begun + last)}

    assert found == set(ALPHABET[:: 2**unused_bits])
