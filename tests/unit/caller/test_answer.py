"""What an issuer answers, read: a token, a refusal in OAuth's form, or nothing that counts."""

import json

import pytest

from coatcheck import apikey
from coatcheck.caller.answer import LONGEST_LIFE, Answer, read
from coatcheck.caller.errors import AskRefused, IssuerUnavailable, KeyRejected, NotAllowedNow
from unit.caller.fakes import problem, success

API_KEY = apikey.make("ck_live")
NOW = 1_800_000_000


def test_a_token_is_read() -> None:
    """RFC 6749 §5.1: the type's letter case does not count, and what is unknown is kept."""
    issued = read(success("a.b-c_d~e+f/g==", 600, token_type="bEARER", more=1), API_KEY, now=NOW)

    assert (issued.token, issued.expires_in_s, issued.document["more"]) == (
        "a.b-c_d~e+f/g==",
        600,
        1,
    )
    assert "a.b" not in repr(issued)


NO_TOKENS = {
    "no token": {"access_token": None},
    "empty": {"access_token": ""},
    "a line break": {"access_token": "a\r\nX-Admin: 1"},
    "a blank": {"access_token": "a b"},
    "beyond ASCII": {"access_token": "é"},
    "too long": {"access_token": "a" * 8200},
    "another type": {"token_type": "DPoP"},
    "no type": {"token_type": None},
    "no end": {"expires_in": None},
    "a text as end": {"expires_in": "600"},
    "true": {"expires_in": True},
    "a fraction": {"expires_in": 1.5},
    "over already": {"expires_in": 0},
    "below zero": {"expires_in": -1},
    "for ever": {"expires_in": LONGEST_LIFE + 1},
}


@pytest.mark.parametrize("changes", NO_TOKENS.values(), ids=NO_TOKENS)
def test_what_is_no_bearer_token_is_nonsense(changes: dict[str, object]) -> None:
    """It goes into a header, and its end into a sum."""
    told = {"access_token": "a.b", "token_type": "Bearer", "expires_in": 600, **changes}

    with pytest.raises(IssuerUnavailable, match="is it the issuer's URL"):
        read(Answer(200, json.dumps(told).encode()), API_KEY, now=NOW)


BODIES = {
    "empty": b"",
    "a page": b"<html>",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 16_000,
    "a long number": b'{"expires_in": ' + b"9" * 9000 + b"}",
    "cut": b'{"error": "invalid_client"',
    "no error": b"{}",
    "no word": b'{"error": "Invalid client!"}',
    "a number": b'{"error": 7}',
}


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 500])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_no_oauth_error_says_nothing_about_the_key(status: int, body: bytes) -> None:
    """A proxy's 401 must not end a caller for ever."""
    with pytest.raises(IssuerUnavailable):
        read(Answer(status, body), API_KEY, now=NOW)


KINDS = {
    "a wrong key": (problem("invalid_client"), KeyRejected),
    "a wrong key, with a challenge": (problem("invalid_client", status=401), KeyRejected),
    "not from here": (problem("unauthorized_client"), NotAllowedNow),
    "a scope": (problem("invalid_scope"), AskRefused),
    "a resource": (problem("invalid_target"), AskRefused),
    "a grant": (problem("unsupported_grant_type"), AskRefused),
    "busy, as 400": (problem("temporarily_unavailable"), IssuerUnavailable),
    "too many": (problem("invalid_client", status=429), IssuerUnavailable),
    "broken": (problem("invalid_client", status=500), IssuerUnavailable),
    "away": (problem("temporarily_unavailable", status=503), IssuerUnavailable),
}


@pytest.mark.parametrize(("answer", "kind"), KINDS.values(), ids=KINDS)
def test_each_error_has_its_kind(answer: Answer, kind: type[Exception]) -> None:
    """RFC 6749 §5.2; only an answer that is a refusal may be one of the key."""
    with pytest.raises(kind) as caught:
        read(answer, API_KEY, now=NOW)

    assert type(caught.value) is kind
    assert "A sentence." in str(caught.value)


def test_a_key_of_another_form_is_not_repeated_either() -> None:
    """Imported ones look as their old system made them."""
    with pytest.raises(KeyRejected) as caught:
        read(problem("invalid_client", "There is no legacy-key-1."), "legacy-key-1", now=NOW)

    assert "legacy-key-1" not in str(caught.value)
