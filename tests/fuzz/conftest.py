"""One service to be fuzzed per worker, and what was done to it at the end."""

from collections.abc import Iterator

import pytest

from fuzz.target import SECONDS, SEED, Tally, Target, a_target

_PROPERTY = "fuzz"


def pytest_report_header() -> str:
    return f"fuzz: {SECONDS:g} s for all parts together, from seed {SEED}"


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with a_target(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts what a part does; told at the end."""
    counted = Tally()
    yield counted
    request.node.user_properties.append((_PROPERTY, f"{request.node.name}: {counted}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = [
        text
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, text in report.user_properties
        if name == _PROPERTY
    ]
    if told:
        terminalreporter.section("fuzz")
        for text in told:
            terminalreporter.line(text)
