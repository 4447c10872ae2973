"""`coatcheck.durations`: one budget, whose parts have to fit together."""

import pytest

from coatcheck import durations


def test_a_token_lives_ten_minutes() -> None:
    """The promise on the first page; resource servers size their caches by it."""
    assert durations.TOKEN_LIFETIME == 600


RELATIONS = {
    "a replaced signing key stays until its last token has expired on a late clock": (
        durations.PUBLISH_AFTER >= durations.TOKEN_LIFETIME + durations.LEEWAY_MAX
    ),
    "a signing key signs only when every cached key set has it": (
        durations.PUBLISH_AHEAD >= 2 * durations.JWKS_MAX_AGE
    ),
    "leeway stays far below the life of a token": (
        durations.LEEWAY <= durations.LEEWAY_MAX <= durations.TOKEN_LIFETIME // 10
    ),
    "a key set can be fetched again before it is old": (
        durations.JWKS_COOLDOWN <= durations.JWKS_MAX_AGE
    ),
    "a key set is old before it is too old": (
        durations.JWKS_MAX_AGE < durations.JWKS_STALE_IF_ERROR
    ),
    "a client waits longer for a verifier than the database may take": (
        durations.BUSY_TIMEOUT < durations.FIRST_LOAD_TIMEOUT
    ),
    "a rotation leaves time to deploy the new secret": (
        durations.ROTATION_OVERLAP > durations.TOKEN_LIFETIME
    ),
}


@pytest.mark.parametrize("holds", RELATIONS.values(), ids=RELATIONS)
def test_the_durations_fit_together(holds: bool) -> None:
    """Also under `python -O`, where the module's own assertions are gone."""
    assert holds


def test_every_duration_is_positive_and_of_whole_seconds_where_it_is_told() -> None:
    """Headers and claims take integers only; how often a node looks is its own affair."""
    named = {name: value for name, value in vars(durations).items() if name.isupper()}
    del named["_SPAN"], named["_UNITS"]

    assert named
    assert all(value > 0 for value in named.values()), named
    assert {name for name, value in named.items() if type(value) is not int} == {
        "CHANGE_LEASE",
        "CHANGE_POLL",
        "FEED_POLL",
        "FEED_WAKE_MIN",
    }
