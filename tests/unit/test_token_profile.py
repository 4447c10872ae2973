"""`coatcheck.token_profile`: what may be signed.  RFC 9068 §2, RFC 7519 §4.1."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import token_profile
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.token_profile import MAX_TOKEN_BYTES, REQUIRED_CLAIMS, UnfitClaims, check

NOW = 1_800_000_000
ABSENT = object()


def claims(**changes: Any) -> dict[str, object]:
    """Claims that fit, with these changes."""
    fit: dict[str, Any] = {
        "iss": "https://auth.example.com",
        "aud": "https://api.example.com",
        "sub": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "client_id": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "iat": NOW,
        "exp": NOW + 600,
        "jti": "9ZbTq0cXh2Lw",
        "scope": "widgets:read",
        "org_id": "org_0FvQ2uWwXk3sT1bL9cZp4E",
        "env": "live",
        "as_of": 17,
    }
    return {name: value for name, value in (fit | changes).items() if value is not ABSENT}


def test_fit_claims_pass_as_they_are() -> None:
    """`check` proves, it does not change."""
    checked = check(claims())

    assert json.loads(checked.payload) == claims()
    assert checked.expires_in_s == 600


FITS: dict[str, dict[str, Any]] = {
    "the shortest life": {"exp": NOW + 1},
    "the longest life": {"exp": NOW + TOKEN_LIFETIME},
    "no scope at all": {"scope": ""},
    "nothing has happened yet": {"as_of": 0},
    "the largest position": {"as_of": 2**63},
    "more claims": {"roles": ["viewer"], "must": ["models"]},
}


@pytest.mark.parametrize("changes", FITS.values(), ids=FITS)
def test_the_edges_are_allowed(changes: dict[str, Any]) -> None:
    """What the contract allows is not refused out of caution."""
    assert check(claims(**changes)).payload


REQUIRED = (*REQUIRED_CLAIMS, "scope", "org_id", "env", "as_of")
FLAWS: dict[str, dict[str, Any]] = {
    **{f"no {name}": {name: ABSENT} for name in REQUIRED},
    **{f"{name} is null": {name: None} for name in REQUIRED},
    **{f"{name} is empty": {name: ""} for name in REQUIRED if name != "scope"},
    "two audiences": {"aud": ["https://a.example", "https://b.example"]},
    "one audience in a list": {"aud": ["https://a.example"]},
    "a subject that is a number": {"sub": 7},
    "iat with a fraction": {"iat": NOW + 0.5},
    "exp as a float": {"exp": float(NOW + 600)},
    "exp as text": {"exp": str(NOW + 600)},
    "exp as a truth value": {"exp": True},
    "as_of as a truth value": {"as_of": True},
    "expired at birth": {"exp": NOW},
    "expired before birth": {"exp": NOW - 1},
    "a second too long": {"exp": NOW + TOKEN_LIFETIME + 1},
    "nbf": {"nbf": NOW},
    "nbf in the past": {"nbf": NOW - 60},
}


@pytest.mark.parametrize("changes", FLAWS.values(), ids=FLAWS)
def test_unfit_claims_are_never_signed(changes: dict[str, Any]) -> None:
    """A fault of ours stops here, not at somebody's resource server.  RFC 9068 §2.2."""
    with pytest.raises(UnfitClaims):
        check(claims(**changes))


@pytest.mark.parametrize("lifetime_s", [1, 5, 600])
def test_a_deployment_with_a_shorter_lifetime_is_held_to_it(lifetime_s: int) -> None:
    """Tests on loopback shorten it; nothing may be longer there either."""
    check(claims(exp=NOW + lifetime_s), lifetime_s=lifetime_s)
    with pytest.raises(UnfitClaims):
        check(claims(exp=NOW + lifetime_s + 1), lifetime_s=lifetime_s)


def longest_token(payload: bytes) -> int:
    """The length of a token of this payload with the longest header and signature of ours."""
    header = json.dumps({"alg": "RS256", "kid": "k" * 43, "typ": "at+jwt"}, separators=(",", ":"))
    signature = 4096 // 8
    return sum((length * 4 + 2) // 3 for length in (len(header), len(payload), signature)) + 2


@settings(max_examples=100)
@given(st.integers(0, 4096))
def test_what_passes_fits_into_4_kib_under_every_algorithm(length: int) -> None:
    """Verifiers refuse longer texts unread, and header limits of proxies start near there."""
    try:
        checked = check(claims(scope="x" * length))
    except UnfitClaims:
        assert length > 2000
        return

    assert longest_token(checked.payload) <= MAX_TOKEN_BYTES


@pytest.mark.parametrize(
    "text",
    [
        "https://api.example.com",
        "https://api.example.com/v1?x=1",
        "http://127.0.0.1:8000/v1",
        "urn:example:api",
        "widgets",
        "a" * 512,
    ],
)
def test_an_absolute_uri_or_a_plain_name_can_be_an_audience(text: str) -> None:
    """RFC 8707 §2; RFC 7519 §4.1.3 lets it be any StringOrURI."""
    assert token_profile.is_audience(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://api.example.com#x",
        "two words",
        'https://"quoted"',
        "back\\slash",
        "line\nfeed",
        "https://\u00e9.example",
        "tab\t",
        "nul\0",
        "del\x7f",
        "a" * 513,
    ],
)
def test_what_would_need_an_escape_somewhere_is_no_audience(text: str) -> None:
    """RFC 8707 §2 forbids the fragment; RFC 6749 §5.2 quotes and backslashes in error texts."""
    assert not token_profile.is_audience(text)


@settings(max_examples=200)
@given(st.text(max_size=20))
def test_an_audience_is_one_word_of_a_list(text: str) -> None:
    """Audiences are stored with one blank between them."""
    if token_profile.is_audience(text):
        assert text.split() == [text]
