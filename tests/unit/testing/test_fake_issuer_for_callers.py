"""The same issuer for tests of those who call: TokenAuth and TokenSource find it, too."""

from collections.abc import Iterator

import pytest

from coatcheck.caller import AskRefused, IssuerUnavailable, KeyRejected, NotAllowedNow, TokenSource
from coatcheck.testing import FakeIssuer
from coatcheck.verifier import Verifier

ISSUER, AUDIENCE = "https://callers.example.com", "https://api.example.com"


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(ISSUER, audience=AUDIENCE) as issuer:
        yield issuer


def test_a_caller_gets_a_token_that_its_api_takes(issuer: FakeIssuer) -> None:
    """Both sides of a test, and no network between them."""
    api_key = issuer.api_key("widgets:read widgets:write", project_id="prj_1")
    with TokenSource(ISSUER, api_key) as source, Verifier(ISSUER, AUDIENCE) as verifier:
        principal = verifier.verify_jwt(source.token())

    assert principal.key_id == issuer.key_id_of(api_key)
    assert principal.project_id == "prj_1"
    assert principal.allows("widgets:write")


def test_what_is_asked_for_is_granted_as_asked_or_refused(issuer: FakeIssuer) -> None:
    """As the service does: never silently narrower."""
    api_key = issuer.api_key("widgets:read widgets:write")
    with (
        TokenSource(ISSUER, api_key, scope="widgets:read") as source,
        Verifier(ISSUER, AUDIENCE) as verifier,
    ):
        assert not verifier.verify_jwt(source.token()).allows("widgets:write")
    refused = {
        "invalid_scope": TokenSource(ISSUER, api_key, scope="widgets:paint"),
        "invalid_target": TokenSource(ISSUER, api_key, resource="https://other.example.com"),
    }
    for error, source in refused.items():
        with source, pytest.raises(AskRefused, match=error):
            source.token()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("api_key_revoked", KeyRejected),
        ("api_key_expired", KeyRejected),
        ("api_key_disabled", KeyRejected),
        ("org_suspended", NotAllowedNow),
        ("quota_exceeded", NotAllowedNow),
    ],
)
def test_an_ended_api_key_is_refused_as_the_service_would(
    issuer: FakeIssuer, code: str, error: type[Exception]
) -> None:
    """With the code that programs go by."""
    api_key = issuer.api_key("widgets:read")
    issuer.refuse(api_key, code)
    with TokenSource(ISSUER, api_key) as source, pytest.raises(error) as refused:
        source.token()

    assert getattr(refused.value, "code", None) == code


def test_a_key_of_another_issuer_and_a_connector_key_get_no_token(issuer: FakeIssuer) -> None:
    """The first is unknown, the second is for URLs."""
    for api_key in (FakeIssuer().api_key("x"), issuer.api_key("x", connector=True)):
        with TokenSource(ISSUER, api_key) as source, pytest.raises(KeyRejected):
            source.token()


def test_an_outage_is_one_for_callers_too(issuer: FakeIssuer) -> None:
    """And what a service that is overrun says."""
    api_key = issuer.api_key("widgets:read")
    with issuer.away(), TokenSource(ISSUER, api_key) as source, pytest.raises(IssuerUnavailable):
        source.token()
    issuer.throttle()
    with TokenSource(ISSUER, api_key) as source, pytest.raises(IssuerUnavailable) as refused:
        source.token()
    assert refused.value.retry_after_s == pytest.approx(1, abs=0.5)
