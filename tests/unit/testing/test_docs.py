"""docs/testing.md and docs/outages.md: every snippet runs, every number is the code's."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from coatcheck.durations import (
    FEED_STALE,
    FIRST_LOAD_TIMEOUT,
    JWKS_MAX_AGE,
    JWKS_STALE_IF_ERROR,
    LEEWAY,
    TOKEN_LIFETIME,
)
from coatcheck.testing import REFUSALS, FakeIssuer
from coatcheck.verifier import Verifier
from coatcheck.verifier.exchange import NEGATIVE, RENEW_BEFORE

DOCS = Path(__file__).parents[3] / "docs"
TESTING = (DOCS / "testing.md").read_text(encoding="utf-8")
OUTAGES = (DOCS / "outages.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page)


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: first cell → the others."""
    section = page.split(f"## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {first.strip("| "): rest for first, *rest in cells}


# Testing


def test_the_suite_of_the_page_passes(tmp_path: Path) -> None:
    """Its files, in an empty directory, with nothing but the plugin."""
    for block in blocks(TESTING, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
    (ini,) = blocks(TESTING, "ini")
    (tmp_path / "pytest.ini").write_text(ini, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COATCHECK_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "coatcheck.testing.plugin"],
        cwd=tmp_path,
        env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert "6 passed" in done.stdout, done.stdout + done.stderr


def test_the_other_snippets_run() -> None:
    """One after the other, as they stand there."""
    known: dict[str, Any] = {}
    snippets = [block for block in blocks(TESTING, "python") if not block.startswith("# ")]
    assert len(snippets) == 6
    for snippet in snippets:
        exec(snippet, known)  # noqa: S102 - it is our own page


def test_every_code_is_told_with_what_it_needs() -> None:
    """A reader who looks for one finds it, and none that there is not."""
    needs: dict[str, str] = {}
    for codes, (need,) in rows(TESTING, "Every refusal").items():
        needs |= dict.fromkeys(re.findall(r"`(\w+)`", codes), need)
    with FakeIssuer("https://told.example.com") as issuer:
        for code in REFUSALS:
            refused = issuer.credential_for(code, "widgets:read")
            for setting, value in refused.settings.items():
                named = setting.replace("_", " ") if setting == "service_key" else setting
                assert named in needs[code], code
                assert value is not None or "no service key" in needs[code]
            assert (refused.model is not None) == ("`model`" in needs[code])
            assert bool(refused.settings or refused.model) or not needs[code].startswith("a verif")
            issuer.up()

    assert set(needs) == set(REFUSALS)


@pytest.mark.parametrize(
    "fixture",
    ["coatcheck_issuer", "coatcheck_session_issuer", "coatcheck_token", "coatcheck_api_key"],
)
def test_every_fixture_is_told(fixture: str) -> None:
    """There is no other page about them."""
    assert f"| `{fixture}` |" in TESTING


# Outages


def in_words(seconds: int) -> str:
    """`5 minutes`, `24 hours and 5 minutes`."""
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = ((hours, "hours"), (minutes, "minutes"), (seconds, "seconds"))
    return " and ".join(f"{number} {unit}" for number, unit in parts if number)


DURATIONS = {
    "an access token that its caller has": (TOKEN_LIFETIME, LEEWAY),
    "the key set": (JWKS_MAX_AGE + JWKS_STALE_IF_ERROR,),
    'the revocation feed, `on_stale_feed="accept"` (the default)': (FEED_STALE,),
    'the revocation feed, `on_stale_feed="refuse"`': (FEED_STALE,),
    "a raw API key that was used lately": (TOKEN_LIFETIME - RENEW_BEFORE,),
    "a raw API key that was refused lately": (NEGATIVE,),
    "a resource server that is started meanwhile": (FIRST_LOAD_TIMEOUT,),
}
NOT_AT_ALL = {"any other raw API key", "a token of a signing key that was never seen"}


def test_the_durations_are_those_of_the_code() -> None:
    """What they mean is in test_outlook; here it is that the page says the same."""
    told = rows(OUTAGES, "What goes on, and for how long")

    assert set(told) == set(DURATIONS) | NOT_AT_ALL
    for what, durations in DURATIONS.items():
        text = " ".join(told[what])
        assert all(in_words(seconds) in text for seconds in durations), what
        numbers = re.findall(r"\d+ (?:hours|minutes|seconds)", text)
        assert numbers == [part for one in durations for part in in_words(one).split(" and ")]
    assert all(told[what][0] == "not at all" for what in NOT_AT_ALL)
    codes = set(re.findall(r"`(\w+_\w+)`", "".join(cells[-1] for cells in told.values())))
    assert codes <= set(REFUSALS)


def test_status_and_metrics_are_as_the_page_says() -> None:
    """Its snippets run, its metrics are there, and none is left out."""
    with FakeIssuer("https://told.example.com") as issuer:
        with Verifier(issuer.issuer, issuer.audience, service_key="any") as verifier:
            verifier.verify_jwt(issuer.token())
            known: dict[str, Any] = {"verifier": verifier}
            for snippet in blocks(OUTAGES, "python"):
                exec(snippet, known)  # noqa: S102 - it is our own page
            text, headers = known["metrics"](None)
        families = {family.name for family in text_string_to_metric_families(text)}

    assert headers == {"Content-Type": "text/plain; version=0.0.4"}
    assert {name.strip("`") for name in rows(OUTAGES, "Metrics")} == families
    (rules,) = blocks(OUTAGES, "yaml")
    for rule in yaml.safe_load(rules)["groups"][0]["rules"]:
        assert re.search(r"coatcheck_\w+", rule["expr"])[0] in families  # type: ignore[index]
