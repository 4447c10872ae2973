"""`coatcheck.base62` and `coatcheck.ids`: public ids and the alphabet they are written in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import base62, ids

LARGEST_MS = 2**48 - 1


def number_of(text: str) -> int:
    number = 0
    for character in text:
        number = number * 62 + base62.ALPHABET.index(character)
    return number


def uuid_of(public_id: str) -> int:
    return number_of(public_id.partition("_")[2])


@settings(max_examples=200)
@given(st.integers(0, 2**192), st.integers(1, 40))
def test_base62_says_the_number_in_the_asked_width_or_refuses(number: int, width: int) -> None:
    """A text that lost its leading digits would be another id."""
    if number >= 62**width:
        with pytest.raises(ValueError, match="does not fit"):
            base62.encode(number, width)
        return

    text = base62.encode(number, width)

    assert (len(text), number_of(text)) == (width, number)


@pytest.mark.parametrize(("number", "width"), [(-1, 4), (62, 1), (1, 0)])
def test_base62_refuses_what_does_not_fit(number: int, width: int) -> None:
    """The edges of the range."""
    with pytest.raises(ValueError, match="does not fit"):
        base62.encode(number, width)


@settings(max_examples=100)
@given(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1))
def test_base62_sorts_like_the_numbers(one: int, other: int) -> None:
    """Lists are paged by id: the order of texts has to be the order of making."""
    assert (one < other) == (base62.encode(one, 22) < base62.encode(other, 22))


@settings(max_examples=20)
@given(st.integers(0, 100))
def test_random_text_has_the_asked_length_and_alphabet(length: int) -> None:
    """Some random bytes are thrown away; the text must not get shorter by them."""
    text = base62.random_text(length)

    assert len(text) == length
    assert set(text) <= set(base62.ALPHABET)


def test_random_text_draws_every_character_about_equally_often() -> None:
    """A bias would cost bits of the 190.  61 degrees of freedom: chi-squared over 120 is 1 in 10^5.

    A remainder taken without rejection would score about 2,000 here.
    """
    drawn = base62.random_text(200_000)
    expected = len(drawn) / 62

    chi_squared = sum((drawn.count(one) - expected) ** 2 / expected for one in base62.ALPHABET)

    assert chi_squared < 150


@settings(max_examples=50)
@given(st.sampled_from(["key", "org"]), st.integers(0, LARGEST_MS))
def test_an_id_is_a_uuid_of_version_7(kind: ids.Kind, now_ms: int) -> None:
    """RFC 9562 §5.7: time in the first 48 bits, then version 7, and variant 10."""
    made = ids.new_id(kind, now_ms)

    assert made.startswith(f"{kind}_")
    assert uuid_of(made) >> 80 == now_ms
    assert uuid_of(made) >> 76 & 0xF == 7
    assert uuid_of(made) >> 62 & 0b11 == 0b10


@settings(max_examples=50)
@given(st.integers(0, LARGEST_MS - 1))
def test_ids_sort_by_the_time_they_were_made(now_ms: int) -> None:
    """`keys list` shows the oldest first by id alone."""
    assert ids.new_id("key", now_ms) < ids.new_id("key", now_ms + 1)


def test_ids_of_one_millisecond_differ() -> None:
    """A thousand keys are made within one."""
    assert len({ids.new_id("key", 0) for _ in range(1000)}) == 1000


def test_what_new_id_makes_is_recognized() -> None:
    """Else the throttle would take every real client id for a secret."""
    assert ids.is_api_key_id(ids.new_id("key", LARGEST_MS))


NOT_IDS = {
    "nothing": "",
    "an API key": "ck_live_" + "0" * 38,
    "another kind": "org_" + "0" * 22,
    "too short": "key_" + "0" * 21,
    "too long": "key_" + "0" * 23,
    "another alphabet": "key_" + "0" * 21 + "-",
    "a line feed behind": "key_" + "0" * 22 + "\n",
    "a blank before": " key_" + "0" * 22,
    "digits of another alphabet": "key_" + "0" * 21 + "\u0663",
}


@pytest.mark.parametrize("text", NOT_IDS.values(), ids=NOT_IDS)
def test_other_texts_are_no_ids(text: str) -> None:
    """A presented `client_id` is often the key itself: it must reach no log by mistake."""
    assert not ids.is_api_key_id(text)
