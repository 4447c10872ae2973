"""The error family: each class knows its whole answer, in words that can stand in a header."""

import json
import re

import pytest

from coatcheck.verifier import errors
from coatcheck.verifier.errors import ERRORS, Protection, VerifierError

HERE = Protection("https://api.example.com", "https://api.example.com/.well-known/x")
#: RFC 6750 §3: the characters of `error_description` and `scope` values.
DESCRIPTION = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]+")


def made(kind: type[VerifierError]) -> VerifierError:
    match kind:
        case errors.IssuerUnavailable:
            error: VerifierError = errors.IssuerUnavailable(7)
        case errors.InsufficientScope:
            error = errors.InsufficientScope("widgets:read widgets:write")
        case _:
            error = kind()
    error.protection = HERE
    return error


@pytest.mark.parametrize("kind", [*ERRORS.values(), errors.TokenInQuery])
def test_every_error_is_a_whole_answer(kind: type[VerifierError]) -> None:
    """RFC 6750 §3, RFC 9457 §3.  A resource server has nothing to add."""
    error = made(kind)

    assert DESCRIPTION.fullmatch(error.detail)
    assert error.headers["Cache-Control"] == "no-store"
    assert error.headers["Content-Type"] == "application/problem+json"
    assert json.loads(error.body) == error.problem()
    assert error.problem() == {
        "type": "about:blank",
        "title": error.status.phrase,
        "status": error.status.value,
        "detail": error.detail,
        "code": kind.code,
    }
    assert error.headers.get("WWW-Authenticate") == error.challenge


CHALLENGES = {
    errors.MissingCredentials: (401, ""),
    errors.MultipleCredentials: (400, ', error="invalid_request", error_description="{detail}"'),
    errors.TokenInQuery: (400, ', error="invalid_request", error_description="{detail}"'),
    errors.TokenExpired: (401, ', error="invalid_token", error_description="{detail}"'),
    errors.TokensOnly: (401, ', error="invalid_token", error_description="{detail}"'),
    errors.IpNotAllowed: (403, ', error="insufficient_scope", error_description="{detail}"'),
    errors.RoleNotAllowed: (403, ', error="insufficient_scope", error_description="{detail}"'),
    errors.ModelNotAllowed: (403, ', error="insufficient_scope", error_description="{detail}"'),
    errors.WrongProject: (403, ', error="insufficient_scope", error_description="{detail}"'),
    errors.ProjectRequired: (400, ', error="invalid_request", error_description="{detail}"'),
    errors.InsufficientScope: (
        403,
        (
            ', error="insufficient_scope", error_description="{detail}"'
            ', scope="widgets:read widgets:write"'
        ),
    ),
}


@pytest.mark.parametrize(("kind", "expected"), CHALLENGES.items(), ids=lambda it: str(it)[:40])
def test_the_challenge_says_what_would_help(
    kind: type[VerifierError], expected: tuple[int, str]
) -> None:
    """RFC 6750 §3.1: no error without credentials; RFC 9728 §5.1: where to read more."""
    error, (status, rest) = made(kind), expected

    assert error.status == status
    assert error.challenge == (
        f'Bearer realm="{HERE.realm}", resource_metadata="{HERE.resource_metadata}"'
        + rest.format(detail=error.detail)
    )


def test_our_own_trouble_is_503_without_a_challenge() -> None:
    """Another credential would not help; RFC 9110 §10.2.3 says when to come back."""
    error = made(errors.IssuerUnavailable)

    assert error.status == 503
    assert error.challenge is None
    assert "WWW-Authenticate" not in error.headers
    assert error.headers["Retry-After"] == "7"


def test_spent_credit_is_429_without_a_challenge_and_without_a_time() -> None:
    """Another credential would not help, and nobody knows when the limit is raised."""
    error = made(errors.QuotaExceeded)

    assert (error.status, error.challenge) == (429, None)
    assert error.headers.keys() == {"Content-Type", "Cache-Control"}


def test_a_challenge_without_metadata_still_has_a_parameter() -> None:
    """RFC 6750 §3: the scheme is followed by one or more."""
    assert errors.MissingCredentials().challenge == 'Bearer realm="coatcheck"'


def test_every_code_is_told_once() -> None:
    """Programs branch on it."""
    assert all(error.code == code for code, error in ERRORS.items())
    assert len(ERRORS) == 32
