"""`coatcheck.token_profile`: what may be signed.  RFC 9068 §2, RFC 7519 §4.1."""

import dataclasses
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
    """Claims that fit, with these changes; those that are a token's own are not among them."""
    fit: dict[str, Any] = {
        "iss": "https://auth.example.com",
        "aud": "https://api.example.com",
        "sub": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "client_id": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "scope": "widgets:read",
        "org_id": "org_0FvQ2uWwXk3sT1bL9cZp4E",
        "env": "live",
    }
    return {name: value for name, value in (fit | changes).items() if value is not ABSENT}


TOKEN_ID = bytes(range(16))


def test_fit_claims_pass_as_they_are() -> None:
    """`check` proves, it does not change; a token has four claims more."""
    checked = check(claims()).at(NOW, as_of=17, token_id=TOKEN_ID)

    own = {"iat": NOW, "exp": NOW + 600, "as_of": 17, "jti": "AAECAwQFBgcICQoLDA0ODw"}
    assert json.loads(checked.payload) == claims() | own
    assert checked.expires_in_s == 600


def test_every_claim_that_a_token_needs_is_there() -> None:
    """RFC 9068 §2.2, and what our own verifier asks for beside it."""
    checked = check(claims()).at(NOW, as_of=17, token_id=TOKEN_ID)

    assert set(json.loads(checked.payload)) == {
        *REQUIRED_CLAIMS,
        *("scope", "org_id", "env", "as_of"),
    }


FITS: dict[str, dict[str, Any]] = {
    "no scope at all": {"scope": ""},
    "more claims": {"roles": ["viewer"], "must": ["models"]},
    "a claim with characters that JSON escapes": {"group": 'a "quoted" \\ one'},
}


@pytest.mark.parametrize("changes", FITS.values(), ids=FITS)
def test_the_edges_are_allowed(changes: dict[str, Any]) -> None:
    """What the contract allows is not refused out of caution."""
    checked = check(claims(**changes)).at(NOW, as_of=0, token_id=TOKEN_ID)

    assert json.loads(checked.payload).items() >= changes.items()


OWN = ("iat", "exp", "as_of", "jti")
NEEDED = ("iss", "aud", "sub", "client_id", "scope", "org_id", "env")
FLAWS: dict[str, dict[str, Any]] = {
    **{f"no {name}": {name: ABSENT} for name in NEEDED},
    **{f"{name} is null": {name: None} for name in NEEDED},
    **{f"{name} is empty": {name: ""} for name in NEEDED if name != "scope"},
    **{f"{name}, which is each token's own": {name: NOW} for name in OWN},
    "two audiences": {"aud": ["https://a.example", "https://b.example"]},
    "one audience in a list": {"aud": ["https://a.example"]},
    "a subject that is a number": {"sub": 7},
    "nbf": {"nbf": NOW},
    "nbf in the past": {"nbf": NOW - 60},
}


@pytest.mark.parametrize("changes", FLAWS.values(), ids=FLAWS)
def test_unfit_claims_are_never_signed(changes: dict[str, Any]) -> None:
    """A fault of ours stops here, not at somebody's resource server.  RFC 9068 §2.2."""
    with pytest.raises(UnfitClaims):
        check(claims(**changes))


@pytest.mark.parametrize("lifetime_s", [1, 5, TOKEN_LIFETIME])
def test_a_token_lives_as_long_as_this_deployment_says(lifetime_s: int) -> None:
    """Tests on loopback shorten it."""
    checked = check(claims(), lifetime_s=lifetime_s).at(NOW, as_of=17, token_id=TOKEN_ID)

    assert json.loads(checked.payload)["exp"] == NOW + lifetime_s
    assert checked.expires_in_s == lifetime_s


@pytest.mark.parametrize("lifetime_s", [-1, 0, TOKEN_LIFETIME + 1])
def test_no_deployment_makes_tokens_that_live_longer(lifetime_s: int) -> None:
    """Ten minutes are what verifiers, feed and key set count on."""
    with pytest.raises(UnfitClaims):
        check(claims(), lifetime_s=lifetime_s)


@settings(max_examples=200)
@given(st.integers(1, TOKEN_LIFETIME), st.none() | st.integers(NOW - 5, NOW + 700))
def test_no_token_outlives_its_api_key(lifetime_s: int, ends_at: int | None) -> None:
    """RFC 7519 §4.1.4: the shorter of the two lives, and none at all at the end."""
    terms = check(claims(), lifetime_s=lifetime_s, ends_at=ends_at)
    ends = [end for end in (NOW + lifetime_s, ends_at) if end is not None]
    if min(ends) <= NOW:
        with pytest.raises(UnfitClaims):
            terms.at(NOW, as_of=17, token_id=TOKEN_ID)
        return

    checked = terms.at(NOW, as_of=17, token_id=TOKEN_ID)

    assert json.loads(checked.payload)["exp"] == min(ends) == NOW + checked.expires_in_s


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
        terms = check(claims(scope="x" * length))
    except UnfitClaims:
        assert length > 2000
        return

    checked = terms.at(9_999_999_999, as_of=2**63 - 1, token_id=TOKEN_ID)
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


# --- to the character and to the second


def test_the_names_of_algorithms_and_types_are_those_of_the_rfcs() -> None:
    """RFC 7518 §3.1, RFC 8037 §3.1, RFC 9068 §2.1: others compare them letter by letter."""
    assert token_profile.ALGORITHMS == ("ES256", "RS256", "EdDSA")
    assert token_profile.TYPES == ("at+jwt", "JWT")


@pytest.mark.parametrize(("left_s", "lives_s"), [(1, 1), (599, 599), (600, 600), (601, 600)])
def test_an_api_key_that_ends_soon_has_tokens_until_then(left_s: int, lives_s: int) -> None:
    """The last second of an API key is worth a token of one second."""
    checked = check(claims(), ends_at=NOW + left_s).at(NOW, as_of=17, token_id=TOKEN_ID)

    assert checked.expires_in_s == lives_s
    assert json.loads(checked.payload)["exp"] == NOW + lives_s


@pytest.mark.parametrize("left_s", [0, -1, -600])
def test_an_api_key_that_has_ended_has_no_tokens(left_s: int) -> None:
    """`exp` would not be after `iat`."""
    with pytest.raises(UnfitClaims, match="have ended"):
        check(claims(), ends_at=NOW + left_s).at(NOW, as_of=17, token_id=TOKEN_ID)


def test_the_longest_payload_has_2462_bytes() -> None:
    """3,283 characters; with 128 for a header, 683 for a signature and two dots they are 4,096.

    Not one less: an edit that is refused because of a token that would fit is a mistake.
    """
    room = 2462 - len(check(claims(scope="")).at(NOW, as_of=2**63 - 1, token_id=TOKEN_ID).payload)
    longest = check(claims(scope="x" * room)).at(NOW, as_of=2**63 - 1, token_id=TOKEN_ID)

    assert len(longest.payload) == 2462
    assert longest_token(longest.payload) <= 128 + 1 + 3283 + 1 + 683 == 4096
    with pytest.raises(UnfitClaims, match="longer than 4096 bytes"):
        check(claims(scope="x" * (room + 1)))


def test_an_audience_consists_of_what_needs_no_escape_anywhere() -> None:
    """RFC 6749 §5.2, RFC 8707 §2: every character, one by one."""
    allowed = {chr(code) for code in range(0x21, 0x7F)} - set('"\\#')

    assert {chr(code) for code in range(0x200) if token_profile.is_audience(chr(code))} == allowed


def test_checked_terms_cannot_be_changed_afterwards() -> None:
    """They are kept and signed again and again."""
    terms = check(claims())

    with pytest.raises(dataclasses.FrozenInstanceError):
        terms.lifetime_s = 86_400  # type: ignore[misc]
