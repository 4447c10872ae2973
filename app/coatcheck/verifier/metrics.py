"""The status of verifiers as metrics, in Prometheus' text exposition format 0.0.4.

The one label is the audience, which is the resource server's own name: nothing that a caller
sends makes a time series.

A time that is not known is left out until the issuer was asked for the first time; it is 0, which
is long past, once it was asked and there is nothing to go on with.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

#: A status, as `Verifier.status` gives it.
Status = Any
#: What follows the first label, and the value.
Samples = list[tuple[str, float]]

_STATES: Final = ("fresh", "stale", "none")


def text(statuses: Iterable[dict[str, object]]) -> str:
    """What these verifiers tell, each under its first audience."""
    told: list[Status] = list(statuses)
    lines = []
    for name, help_text, read in _GAUGES:
        # An audience holds no quotes, backslashes or line ends: see `token_profile.is_audience`.
        samples = [
            f'{name}{{audience="{status["audiences"][0]}"{labels}}} {value}'
            for status in told
            for labels, value in read(status)
        ]
        if samples:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge", *samples]
    return "".join(f"{line}\n" for line in lines)


def _time(status: Status, at: int | None) -> Samples:
    if at is None:
        parts = (status["key_set"], status["feed"] or {})
        return [("", 0)] if any(part.get("last_error") for part in parts) else []
    return [("", at)]


def _number(number: float | None) -> Samples:
    return [] if number is None else [("", round(number, 3))]


def _state(part: Status) -> Samples:
    return [(f',state="{state}"', int(part["state"] == state)) for state in _STATES]


_GAUGES: Final[tuple[tuple[str, str, Callable[[Status], Samples]], ...]] = (
    (
        "coatcheck_verifier_safe_until_timestamp_seconds",
        "Until when every access token is answered rightly if the issuer stays away.",
        lambda status: _time(status, status["safe_until"]),
    ),
    (
        "coatcheck_verifier_key_set_good_until_timestamp_seconds",
        "When the last good key set is too old to be used.",
        lambda status: _time(status, status["key_set"]["good_until"]),
    ),
    (
        "coatcheck_verifier_key_set_age_seconds",
        "Seconds since the key set was asked for.",
        lambda status: _number(status["key_set"]["age_s"]),
    ),
    (
        "coatcheck_verifier_key_set_state",
        "1 for the state that the key set is in.",
        lambda status: _state(status["key_set"]),
    ),
    (
        "coatcheck_verifier_feed_fresh_until_timestamp_seconds",
        "When the last revocation feed is stale.",
        lambda status: _time(status, status["feed"]["fresh_until"]) if status["feed"] else [],
    ),
    (
        "coatcheck_verifier_feed_age_seconds",
        "Seconds since the last revocation feed was signed.",
        lambda status: _number(status["feed"] and status["feed"]["age_s"]),
    ),
    (
        "coatcheck_verifier_feed_state",
        "1 for the state that the revocation feed is in.",
        lambda status: _state(status["feed"]) if status["feed"] else [],
    ),
    (
        "coatcheck_verifier_remembered_tokens",
        "Access tokens whose signature need not be verified again.",
        lambda status: _number(status["remembered_tokens"]),
    ),
    (
        "coatcheck_verifier_remembered_api_keys",
        "Raw API keys that are good without asking the issuer.",
        lambda status: _number(status["api_keys"] and status["api_keys"]["remembered"]),
    ),
)
