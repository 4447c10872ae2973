"""`coatcheck.apikey`: what an API key looks like, and what of it may be seen."""

import hashlib
import re
import string
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import apikey, base62

BRANDS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=16)
ENVIRONMENTS = st.none() | st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=16)
PREFIXES = st.builds(apikey.prefix_for, BRANDS, ENVIRONMENTS)


def with_checksum(body: str) -> str:
    """The body and the checksum that fits, worked out apart from the product's own code."""
    number, digits = zlib.crc32(body.encode()), ""
    while number:
        number, rest = divmod(number, 62)
        digits = base62.ALPHABET[rest] + digits
    return body + digits.rjust(6, "0")


def a_key() -> str:
    return apikey.make("ck_live")


@settings(max_examples=50)
@given(BRANDS, ENVIRONMENTS)
def test_whatever_is_made_can_be_read(brand: str, environment: str | None) -> None:
    """Brand and environment come from a catalog; no choice of theirs makes unreadable keys."""
    made = apikey.make(apikey.prefix_for(brand, environment))

    read = apikey.parse(made)

    assert (read.text, read.brand, read.environment) == (made, brand, environment)
    assert apikey.looks_like_one(made)


@settings(max_examples=50)
@given(PREFIXES)
def test_a_key_holds_only_letters_digits_and_underscores(prefix: str) -> None:
    """Clients encode Basic credentials in four ways; only this alphabet survives them all."""
    assert re.fullmatch(r"[A-Za-z0-9_]+", apikey.make(prefix))


def test_a_key_has_the_length_that_the_contract_promises() -> None:
    """Secret scanners match `<brand>_<env>_` and 32 + 6 base62 characters."""
    assert re.fullmatch(r"ck_live_[0-9A-Za-z]{32}[0-9A-Za-z]{6}", a_key())


def test_the_checksum_is_the_crc_32_of_everything_before_it() -> None:
    """Others compute it, too: scanners offline, in whatever language."""
    made = a_key()

    assert with_checksum(made[:-6]) == made


def test_no_two_keys_are_alike() -> None:
    """190 random bits: RFC 6749 §10.10 wants a guessing probability of at most 2^-128."""
    assert len({a_key() for _ in range(1000)}) == 1000


@settings(max_examples=200)
@given(st.data())
def test_one_changed_character_is_noticed(data: st.DataObject) -> None:
    """CRC-32 finds every error of one character: a typo is told offline, without a look-up."""
    made = a_key()
    place = data.draw(st.integers(len("ck_live_"), len(made) - 1))
    other = data.draw(st.sampled_from(base62.ALPHABET.replace(made[place], "")))

    with pytest.raises(apikey.MalformedApiKey):
        apikey.parse(made[:place] + other + made[place + 1 :])


BODY = "0123456789ABCDEFGHIJKLMNOPQRSTUV"

NOT_KEYS = {
    "nothing": "",
    "no prefix": with_checksum("_" + BODY),
    "no underscore": with_checksum("ck" + BODY),
    "a secret that is too short": with_checksum("ck_live_" + BODY[1:]),
    "a secret that is too long": with_checksum("ck_live_" + BODY + "x"),
    "a brand that is too long": with_checksum("b" * 17 + "_live_" + BODY),
    "an environment in capitals": with_checksum("ck_LIVE_" + BODY),
    "two environments": with_checksum("ck_live_test_" + BODY),
    "a blank before": " " + with_checksum("ck_live_" + BODY),
    "a line feed behind": with_checksum("ck_live_" + BODY) + "\n",
    "digits of another alphabet": with_checksum("ck_live_" + BODY)[:-1] + "\u0663",
    "a JWT": "eyJhbGciOiJFUzI1NiJ9.e30.c2ln",
    "a megabyte": "ck_live_" + "a" * 1_000_000,
    "NUL": with_checksum("ck_live_" + BODY) + "\0",
}


@pytest.mark.parametrize("text", NOT_KEYS.values(), ids=NOT_KEYS)
def test_other_texts_are_no_keys(text: str) -> None:
    """What has not the form is refused before anything is looked up."""
    assert not apikey.looks_like_one(text)
    with pytest.raises(apikey.MalformedApiKey):
        apikey.parse(text)


def test_the_form_alone_does_not_ask_for_the_checksum() -> None:
    """A key with a typo must still be treated as a secret: never logged, never tried as a JWT."""
    made = a_key()
    mistyped = made[:-1] + ("0" if made[-1] != "0" else "1")

    assert apikey.looks_like_one(mistyped)


@settings(max_examples=100)
@given(st.text(max_size=90) | PREFIXES.map(lambda prefix: f"{prefix}_{BODY}!"))
def test_a_refusal_never_repeats_what_was_sent(text: str) -> None:
    """It may be a secret with one letter wrong, and the message may end in a log."""
    if apikey.looks_like_one(text):
        return
    with pytest.raises(apikey.MalformedApiKey) as refused:
        apikey.parse(text)

    assert len(text) < 12 or text not in str(refused.value)


def test_a_wrong_checksum_is_not_repeated_either() -> None:
    """All but one letter of it is a live secret."""
    made = a_key()
    mistyped = made[:-1] + ("0" if made[-1] != "0" else "1")

    with pytest.raises(apikey.MalformedApiKey) as refused:
        apikey.parse(mistyped)

    assert mistyped not in str(refused.value)
    assert made[8:40] not in str(refused.value)


@pytest.mark.parametrize(
    ("brand", "environment"),
    [("", None), ("a" * 17, None), ("a_b", None), ("ck", ""), ("ck", "Live"), ("ck", "a-b"),
     ("ck\n", None), ("c\u00e9", None)],
)  # fmt: skip
def test_a_brand_that_would_break_the_alphabet_is_refused(
    brand: str, environment: str | None
) -> None:
    """A catalog with such a brand would make keys that no client can send."""
    with pytest.raises(ValueError, match="letters or digits"):
        apikey.prefix_for(brand, environment)


def test_the_digest_is_the_sha_256_of_the_whole_text() -> None:
    """Importing keys from elsewhere relies on it: SHA-256, no salt, prefix and checksum too."""
    made = a_key()

    assert apikey.digest(made) == hashlib.sha256(made.encode("ascii")).digest()


@settings(max_examples=100)
@given(st.text(st.characters(), max_size=60))
def test_every_text_has_a_digest(text: str) -> None:
    """What was presented is looked up before it is understood, lone surrogates and all."""
    assert len(apikey.digest(text)) == 32


def test_the_mask_shows_the_prefix_and_four_characters_at_each_end() -> None:
    """One form everywhere: `cr_live_7Qm4...9f2a`, with three ASCII dots."""
    made = with_checksum("cr_live_7Qm4EFGHIJKLMNOPQRSTUVWXYZ012345"[: 8 + 32])

    assert apikey.mask(made) == f"cr_live_7Qm4...{made[-4:]}"


@settings(max_examples=100)
@given(st.text(max_size=60) | PREFIXES.map(apikey.make))
def test_a_mask_shows_at_most_eight_characters_of_a_secret(text: str) -> None:
    """Masks stand in lists, logs and error texts."""
    masked = apikey.mask(text)

    assert masked == "..." or re.fullmatch(r"[^.]*_.{4}\.\.\..{4}", masked, re.DOTALL)


def test_the_repr_of_a_key_is_its_mask() -> None:
    """Values end in tracebacks and debuggers."""
    made = a_key()

    assert made not in repr(apikey.parse(made))
    assert apikey.mask(made) in repr(apikey.parse(made))
