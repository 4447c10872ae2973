"""`coatcheck.server.manage.forms`: texts that people write.  answers.md K2, K4."""

import unicodedata
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Invalid

NOW = 1_800_000_000
LATEST = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())

GOOD_NAMES = {
    "plain": "ci-prod",
    "with blanks": "nightly build",
    "punctuation": "api (staging) / eu-1 #2 \u2013 \u201cnew\u201d",
    "other scripts": "\u4ee3\u7406 \u0421\u0435\u0440\u0432\u0435\u0440 \u0645\u0641\u062a",
    "a sign": "deploy \U0001f680",
    "the longest": "n" * 100,
}


@pytest.mark.parametrize("text", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_name_is_what_people_write(text: str) -> None:
    """In every script, with every visible sign."""
    assert forms.name(text) == text


def test_blanks_around_a_name_are_no_part_of_it() -> None:
    """They come from copying."""
    assert forms.name("  ci-prod ") == "ci-prod"


BAD_NAMES = {
    "empty": "",
    "blank": "   ",
    "CR LF": "ci\r\nrefused key_1",
    "LF": "ci\nprod",
    "NUL": "ci\0prod",
    "ANSI escape": "ci\x1b[2Jprod",
    "C1 control": "ci\x9bprod",
    "tab": "ci\tprod",
    "DEL": "ci\x7fprod",
    "right-to-left override": "ci\u202eprod",
    "right-to-left mark": "ci\u200fprod",
    "isolate": "ci\u2067prod",
    "zero width space": "ci\u200bprod",
    "zero width joiner": "ci\u200dprod",
    "byte order mark": "ci\ufeffprod",
    "soft hyphen": "ci\u00adprod",
    "line separator": "ci\u2028prod",
    "paragraph separator": "ci\u2029prod",
    "private use": "ci\ue000prod",
    "unassigned": "ci\u0378prod",
    "lone surrogate": "ci\ud800prod",
    "a tag": "ci\U000e0041prod",
    "one too long": "n" * 101,
    "a megabyte": "n" * 1_000_000,
}


@pytest.mark.parametrize("text", BAD_NAMES.values(), ids=BAD_NAMES)
def test_a_name_that_could_forge_a_line_is_refused(text: str) -> None:
    """K2: refused, and the refusal itself is one short line without it."""
    with pytest.raises(Invalid) as refused:
        forms.name(text)

    assert refused.value.field == "name"
    assert len(str(refused.value)) < 120
    assert str(refused.value).isprintable()


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=110))
def test_an_accepted_name_is_one_visible_line(text: str) -> None:
    """Whatever comes in: what is stored can be logged and listed as it is."""
    try:
        name = forms.name(text)
    except Invalid:
        return

    assert 1 <= len(name) <= 100
    assert name.splitlines() == [name]
    assert not any(unicodedata.category(character)[0] == "C" for character in name)


# --- spans

SPANS = {"45s": 45, "30m": 1800, "24h": 86_400, "90d": 7_776_000, "0": 0, "none": 0, "0h": 0}


@pytest.mark.parametrize(("text", "seconds"), SPANS.items(), ids=SPANS)
def test_a_span_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    """`0` and `none` are no overlap at all."""
    assert forms.duration("overlap", text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "h", "24", "-1h", "+1h", "1.5h", "1 h", "1w", "1H", "24h ", "\u0662h", "1e3s", "24h\n"],
)
def test_other_spans_are_refused_with_an_example(text: str) -> None:
    """K4: refused with the reason."""
    with pytest.raises(Invalid, match="such as 24h") as refused:
        forms.duration("overlap", text)

    assert refused.value.field == "overlap"


# --- moments


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


MOMENTS = {
    "a span": ("90d", NOW + 90 * 86_400),
    "a second": ("1s", NOW + 1),
    "a time in UTC": ("2027-03-31T12:00:00Z", at("2027-03-31T12:00:00+00:00")),
    "a time elsewhere": ("2027-03-31T12:00:00+05:30", at("2027-03-31T06:30:00+00:00")),
    "a date means its end": ("2027-03-31", at("2027-03-31T23:59:59+00:00")),
    "29 Feb of a leap year": ("2028-02-29", at("2028-02-29T23:59:59+00:00")),
    "the last one": ("9999-12-31", LATEST),
}


@pytest.mark.parametrize(("text", "expected"), MOMENTS.values(), ids=MOMENTS)
def test_a_moment_is_a_span_a_date_or_a_time(text: str, expected: int) -> None:
    """RFC 3339 §5.6, and what people type."""
    assert forms.moment("expires", text, NOW) == expected


BAD_MOMENTS = {
    "in the past": ("2020-01-01", "past"),
    "a time in the past": ("2020-01-01T00:00:00Z", "past"),
    "now": ("2027-01-15T08:00:00Z", "past"),
    "a span of nothing": ("0d", "past"),
    "the year 10000": ("10000-01-01", "no existing date"),
    "beyond the year 9999, by a span": ("999999999d", "beyond the year 9999"),
    "beyond the year 9999, by a time zone": ("9999-12-31T23:59:59-01:00", "beyond the year 9999"),
    "a word": ("tomorrow", "no existing date"),
    "29 Feb 2027": ("2027-02-29", "no existing date"),
    "a month that is none": ("2027-13-01", "no existing date"),
    "an hour that is none": ("2027-03-31T25:00:00Z", "no existing date"),
    "no time zone": ("2027-03-31T12:00:00", "no time zone"),
    "the American order": ("03/31/2027", "no existing date"),
    "seconds since the epoch": ("1900000000", "no existing date"),
    "below nothing": ("-90d", "no existing date"),
    "nothing": ("", "no existing date"),
    "zero": ("0", "no existing date"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_MOMENTS.values(), ids=BAD_MOMENTS)
def test_a_moment_that_is_none_is_refused_with_the_reason(text: str, reason: str) -> None:
    """K4: expiry in the past, year 10000, `tomorrow`, 29 Feb 2027."""
    with pytest.raises(Invalid, match=reason) as refused:
        forms.moment("expires", text, NOW)

    assert refused.value.field == "expires"


@settings(max_examples=300)
@given(st.text(max_size=30) | st.text("0123456789-:TZ+.", max_size=30))
def test_any_text_is_a_moment_in_the_future_or_refused(text: str) -> None:
    """No text makes an exception of another kind."""
    try:
        moment = forms.moment("expires", text, NOW)
    except Invalid:
        return

    assert NOW < moment <= LATEST


@settings(max_examples=200)
@given(st.integers(NOW + 1, LATEST))
def test_a_time_that_was_shown_can_be_given_back(moment: int) -> None:
    """What `keys list` prints is what `--expires` takes."""
    shown = forms.rfc3339(moment)

    assert shown is not None
    assert forms.moment("expires", shown, NOW) == moment


def test_no_time_stays_none() -> None:
    """Never expires, never used."""
    assert forms.rfc3339(None) is None
    assert forms.rfc3339(0) == "1970-01-01T00:00:00Z"
