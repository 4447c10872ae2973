"""How long a verifier goes on while its issuer is away: told ahead, and kept to the second."""

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coatcheck.durations import (
    FEED_STALE,
    JWKS_MAX_AGE,
    JWKS_STALE_IF_ERROR,
    LEEWAY,
    TOKEN_LIFETIME,
)
from coatcheck.testing import FakeIssuer
from coatcheck.verifier import Verifier, VerifierError
from coatcheck.verifier.exchange import RENEW_BEFORE
from support.tokens import NOW, SetClock

# Of its own: other tests of this process have verifiers for the usual one.
ISSUER = "https://away.example.com"
AUDIENCE = "https://widgets.example.com"
KEY_SET_GOOD_FOR = JWKS_MAX_AGE + JWKS_STALE_IF_ERROR


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def issuer(clock: SetClock) -> Iterator[FakeIssuer]:
    with FakeIssuer(ISSUER, audience=AUDIENCE, clock=clock) as issuer:
        yield issuer


def a_verifier(clock: SetClock, **settings: Any) -> Verifier:
    settings = {"service_key": "any", **settings}
    return Verifier(ISSUER, AUDIENCE, clock=clock, monotonic=clock, **settings)


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def code_of(verifier: Verifier, credential: str) -> tuple[int, str]:
    with pytest.raises(VerifierError) as refused:
        verifier.authenticate(bearer(credential))
    return refused.value.status, refused.value.code


POLICIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "stale feeds accepted": ({}, KEY_SET_GOOD_FOR, "issuer_unavailable"),
    "stale feeds refused": ({"on_stale_feed": "refuse"}, FEED_STALE + 1, "stale_feed"),
    "no feed": ({"feed": None}, KEY_SET_GOOD_FOR, "issuer_unavailable"),
}


@pytest.mark.parametrize(("settings", "ends_in", "code"), POLICIES.values(), ids=POLICIES)
def test_verification_goes_on_to_the_second_that_was_told(
    issuer: FakeIssuer, clock: SetClock, settings: dict[str, Any], ends_in: int, code: str
) -> None:
    """Tokens that were never seen before, too; then 503, and all is well when it is back."""
    with a_verifier(clock, **settings) as verifier:
        verifier.authenticate(bearer(issuer.token()))
        issuer.down()
        told: Any = verifier.status()
        # A feed is fresh through its last second, a key set up to it.
        assert told["safe_until"] == NOW + min(ends_in, KEY_SET_GOOD_FOR) - (code == "stale_feed")
        for later in sorted({1, FEED_STALE, min(3600, ends_in - 1), ends_in - 1}):
            clock.now = NOW + later
            assert verifier.authenticate(bearer(issuer.token()))
            assert verifier.status()["safe_until"] == told["safe_until"]

        clock.now = NOW + ends_in
        assert code_of(verifier, issuer.token()) == (503, code)
        issuer.up()
        assert verifier.authenticate(bearer(issuer.token()))
        after: Any = verifier.status()
        assert after["safe_until"] > told["safe_until"]


def test_each_token_still_ends_by_itself(issuer: FakeIssuer, clock: SetClock) -> None:
    """An outage makes nothing live longer."""
    with a_verifier(clock) as verifier:
        token = issuer.token()
        verifier.authenticate(bearer(token))
        issuer.down()
        clock.now += TOKEN_LIFETIME + LEEWAY - 1
        assert verifier.authenticate(bearer(token))
        clock.now += 1
        assert code_of(verifier, token) == (401, "token_expired")


def test_remembered_api_keys_go_on_until_their_ends_and_others_are_503(
    issuer: FakeIssuer, clock: SetClock
) -> None:
    """They are told apart from tokens, because they end sooner."""
    with a_verifier(clock) as verifier:
        first, second, third = (issuer.api_key() for _ in range(3))
        verifier.authenticate(bearer(first))
        clock.now += 100
        verifier.authenticate(bearer(second))
        refused = issuer.api_key()
        issuer.disable(refused)
        assert code_of(verifier, refused) == (401, "api_key_disabled")
        issuer.down()
        kept_for = TOKEN_LIFETIME - RENEW_BEFORE

        assert verifier.status()["api_keys"] == {
            "remembered": 2,
            "first_end": NOW + kept_for,
            "last_end": NOW + 100 + kept_for,
        }
        assert code_of(verifier, third) == (503, "issuer_unavailable")
        clock.now = NOW + kept_for - 1
        assert verifier.authenticate(bearer(first))
        clock.now = NOW + kept_for
        assert code_of(verifier, first) == (503, "issuer_unavailable")
        assert verifier.authenticate(bearer(second))
        status: Any = verifier.status()
        assert status["api_keys"]["remembered"] == 1
        clock.now = NOW + 100 + kept_for
        status = verifier.status()
        assert status["api_keys"] == {"remembered": 0, "first_end": None, "last_end": None}
        assert status["safe_until"] > clock.now, "which does not speak for them"


def test_what_happens_afterwards_is_told_in_a_sentence(issuer: FakeIssuer, clock: SetClock) -> None:
    """For whoever reads it at night: what will be refused, and the weakest link."""
    with (
        a_verifier(clock) as mild,
        a_verifier(clock, on_stale_feed="refuse") as strict,
        a_verifier(clock, feed=None) as feedless,
    ):
        for verifier in (mild, strict, feedless):
            status: Any = verifier.status()
            assert status["safe_until"] is None
            assert "no usable key set" in status["after"]
            verifier.authenticate(bearer(issuer.token()))
        after = [str(verifier.status()["after"]) for verifier in (mild, strict, feedless)]
        assert all("Every token is refused with 503" in sentence for sentence in after)
        assert "from feed.fresh_until on a revoked one lives on" in after[0]
        assert "it may have been revoked" in after[1]
        assert "no feed is followed" in after[2]
        mild.forget(key_set=False)
        status = mild.status()
        assert status["safe_until"] is None
        assert "no revocation feed yet" in status["after"]


def test_what_ends_first_counts(issuer: FakeIssuer, clock: SetClock) -> None:
    """The feed goes on, and the key set, which is elsewhere, does not."""
    is_there = True

    def fetch(url: str) -> bytes:
        if url.endswith("jwks.json") and not is_there:
            raise OSError
        return issuer.get(url)

    with a_verifier(clock, on_stale_feed="refuse", fetch=fetch, service_key=None) as verifier:
        verifier.authenticate(bearer(issuer.token()))
        is_there = False
        clock.now += KEY_SET_GOOD_FOR - 5
        before: Any = verifier.status()
        issuer.up()
        assert verifier.catch_up(before["feed"]["seq"] + 1)
        status: Any = verifier.status()

    assert before["safe_until"] == NOW + FEED_STALE
    assert status["safe_until"] == NOW + KEY_SET_GOOD_FOR
    assert status["after"].endswith("because the key set is too old.")


def test_the_policy_and_the_end_of_the_feed_are_told(issuer: FakeIssuer, clock: SetClock) -> None:
    """By either clock: the sooner one counts."""
    with a_verifier(clock, on_stale_feed="refuse") as verifier:
        verifier.authenticate(bearer(issuer.token()))
        feed: Any = verifier.status()["feed"]

    assert (feed["on_stale"], feed["fresh_until"]) == ("refuse", NOW + FEED_STALE)
    assert (feed["state"], feed["entries"], feed["last_error"]) == ("fresh", 0, None)


# Metrics


def read(text: str) -> dict[tuple[str, str, str], float]:
    """Samples by name, audience and state; the text has to be what Prometheus reads."""
    return {
        (sample.name, sample.labels["audience"], sample.labels.get("state", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_what_the_status_says(issuer: FakeIssuer, clock: SetClock) -> None:
    """With HELP and TYPE, the audience as only label, and no secret."""
    api_key = issuer.api_key()
    token = issuer.token()
    with a_verifier(clock) as verifier:
        verifier.authenticate(bearer(token))
        verifier.authenticate(bearer(api_key))
        clock.now += 10
        text = verifier.metrics()
    prefix = "coatcheck_verifier_"

    assert {
        (name.removeprefix(prefix), state): value for (name, _, state), value in read(text).items()
    } == {
        ("safe_until_timestamp_seconds", ""): NOW + KEY_SET_GOOD_FOR,
        ("key_set_good_until_timestamp_seconds", ""): NOW + KEY_SET_GOOD_FOR,
        ("key_set_age_seconds", ""): 10,
        ("key_set_state", "fresh"): 1,
        ("key_set_state", "stale"): 0,
        ("key_set_state", "none"): 0,
        ("feed_fresh_until_timestamp_seconds", ""): NOW + FEED_STALE,
        ("feed_age_seconds", ""): 10,
        ("feed_state", "fresh"): 1,
        ("feed_state", "stale"): 0,
        ("feed_state", "none"): 0,
        ("remembered_tokens", ""): 2,
        ("remembered_api_keys", ""): 1,
    }
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
    assert not any(secret in text for secret in (token, api_key, issuer.key_id, issuer.org_id))


def test_what_there_is_not_has_no_metric(clock: SetClock) -> None:
    """No feed, no exchange: a gauge of 0 would look like trouble."""
    with a_verifier(clock, feed=None, service_key=None) as verifier:
        names = {name for name, _, _ in read(verifier.metrics())}

    assert not any("feed" in name or "api_keys" in name for name in names)


def test_before_anybody_asked_nothing_is_promised_and_nothing_alarms(
    issuer: FakeIssuer, clock: SetClock
) -> None:
    """A process that was started a moment ago is no outage; one whose issuer is away is."""
    safe = ("coatcheck_verifier_safe_until_timestamp_seconds", AUDIENCE, "")
    with a_verifier(clock, feed=None) as verifier:
        assert safe not in read(verifier.metrics())
    issuer.down()
    with a_verifier(clock, feed=None) as verifier:
        assert code_of(verifier, issuer.token()) == (503, "issuer_unavailable")
        assert read(verifier.metrics())[safe] == 0
        issuer.up()
        verifier.authenticate(bearer(issuer.token()))
        assert read(verifier.metrics())[safe] > NOW


def test_several_verifiers_share_a_page(issuer: FakeIssuer, clock: SetClock) -> None:
    """Each family is told once, with a sample for each audience."""
    other = "https://other.example.com"
    with (
        a_verifier(clock) as verifier,
        Verifier(ISSUER, other, clock=clock, monotonic=clock) as another,
    ):
        verifier.authenticate(bearer(issuer.token()))
        text = verifier.metrics(another)

    assert text.count("# TYPE coatcheck_verifier_remembered_tokens gauge") == 1
    assert read(text)["coatcheck_verifier_remembered_tokens", AUDIENCE, ""] == 1
    assert read(text)["coatcheck_verifier_remembered_tokens", other, ""] == 0
