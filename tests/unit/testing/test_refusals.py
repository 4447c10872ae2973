"""Each refusal of a verifier can be made to happen, and is what a real verifier then says."""

from collections.abc import Iterator
from typing import Any

import pytest

from coatcheck.testing import REFUSALS, FakeIssuer
from coatcheck.verifier import Verifier, VerifierError, errors
from coatcheck.verifier.errors import ERRORS

# Of its own: other tests of this process have verifiers for the usual one.
ISSUER = "https://refusing.example.com"
AUDIENCE = "https://widgets.example.com"
NEEDED = ("widgets:read", "widgets:write")
AWAY = "issuer_unavailable"


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(ISSUER, audience=AUDIENCE) as issuer:
        yield issuer


def test_there_is_a_way_to_every_code() -> None:
    """What a verifier may say and nobody can try, nobody has tried."""
    assert list(REFUSALS) == list(ERRORS)


@pytest.mark.parametrize(
    ("code", "is_warm"),
    # A verifier that has never heard of its issuer would wait five seconds for the first word.
    [*((code, True) for code in REFUSALS), *((code, False) for code in REFUSALS if code != AWAY)],
)
def test_each_refusal_happens(issuer: FakeIssuer, code: str, is_warm: bool) -> None:
    """From a verifier as an API has it: it follows the feed and takes raw keys."""
    settings: dict[str, Any] = {"service_key": issuer.service_key}
    refused = issuer.credential_for("missing_credentials")
    with Verifier(ISSUER, AUDIENCE, **settings) as warm:
        warm.authenticate({"x-api-key": issuer.token(NEEDED)}, NEEDED)
        refused = issuer.credential_for(code, NEEDED)
        settings |= refused.settings
        verifier = warm if is_warm and settings == {"service_key": issuer.service_key} else None
        with verifier or Verifier(ISSUER, AUDIENCE, **settings) as verifier:
            with pytest.raises(VerifierError) as raised:
                ask(verifier, refused)
            assert raised.value.code == code
            assert type(raised.value) is ERRORS[code]
            issuer.up()
            good = {"Authorization": f"Bearer {issuer.token(NEEDED)}"}
            assert verifier.authenticate(good, NEEDED), "nothing else was wrong"


def ask(verifier: Verifier, refused: Any) -> None:
    verifier.authenticate(
        refused.headers,
        NEEDED,
        refused.client_address,
        query=refused.query,
        method=refused.method,
        model=refused.model,
    )


@pytest.mark.parametrize("code", REFUSALS)
def test_it_is_wrong_in_this_one_respect(issuer: FakeIssuer, code: str) -> None:
    """What needs a setting passes without it: nothing else refuses."""
    free = {"wrong_environment", "stale_feed", "tokens_only"}
    refused = issuer.credential_for(code, NEEDED)
    if code in free:
        with Verifier(ISSUER, AUDIENCE, service_key=issuer.service_key) as verifier:
            ask(verifier, refused)
    assert set(refused.settings) <= {"service_key", "environment", "on_stale_feed"}
    assert not any(text in repr(refused) for text in refused.headers.values())


def test_scopes_may_be_one_text(issuer: FakeIssuer) -> None:
    """As for a verifier."""
    refused = issuer.credential_for("insufficient_scope", " ".join(NEEDED))
    with Verifier(ISSUER, AUDIENCE) as verifier, pytest.raises(errors.InsufficientScope) as raised:
        ask(verifier, refused)

    assert raised.value.scope == " ".join(NEEDED)


def test_a_code_that_there_is_not_is_told(issuer: FakeIssuer) -> None:
    """A slip of the pen must not pass for a refusal."""
    with pytest.raises(ValueError, match="token_expired"):
        issuer.credential_for("token_expird")
