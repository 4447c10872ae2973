"""`coatcheck.server.logs`: one event is one line, whatever is in it; ids that nobody chooses."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest

from coatcheck.server import logs

#: What somebody sends who wants a line of their own, or a terminal of their own.
NASTY = 'x"\n{"level":"info","event":"all is well"}\r\x1b[2J\u2028\u202e\x00\udc80'


@contextmanager
def logged(chosen: logs.Format) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of its own that writes as the service does, and what it wrote."""
    made = logs.configuration(chosen)
    handler = logging.StreamHandler(written := io.StringIO())
    handler.setFormatter(made["formatters"]["line"]["()"]())
    handler.addFilter(made["filters"]["bound"]["()"]())
    logger = logging.getLogger("coatcheck.test_logs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield logger, written
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_line_says_when_how_bad_and_what() -> None:
    """The names that collectors of lines look for."""
    with logged("json") as (logger, written):
        logger.warning("the %s goes on", "feed")

    (line,) = lines(written)
    assert datetime.fromisoformat(line.pop("ts")).tzinfo is not None
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "warning",
        "event": "the feed goes on",
        "logger": "coatcheck.test_logs",
    }


def test_whatever_a_caller_sent_a_line_of_json_stays_one() -> None:
    """ASVS 16.4.1: nobody begins a line that we did not write."""
    with logged("json") as (logger, written):
        logger.warning("refused: %s", NASTY)

    assert written.getvalue().isascii()
    (line,) = lines(written)
    assert line["event"] == f"refused: {NASTY}"
    assert line["level"] == "warning"


def test_whatever_a_caller_sent_a_line_of_text_stays_one() -> None:
    """Control characters, separators and marks of direction are told, not obeyed."""
    with logged("text") as (logger, written):
        logger.warning("refused: %s", NASTY)

    text = written.getvalue()
    assert text.endswith("\n")
    assert text.removesuffix("\n").isprintable()
    assert r"\n" in text
    assert r"\x1b[2J\u2028\u202e\x00\udc80" in text


@pytest.mark.parametrize("chosen", ["json", "text"])
def test_of_an_exception_only_kind_and_place_are_told(chosen: logs.Format) -> None:
    """Its message may repeat what was sent, an API key for one."""
    with logged(chosen) as (logger, written):
        try:
            int("ck_live_SECRET")
        except ValueError as error:
            logger.error("500: %s", type(error).__name__, exc_info=error)  # noqa: TRY400

    text = written.getvalue()
    assert "SECRET" not in text
    assert "ValueError" in text
    assert "test_logs.py" in text
    assert text.count("\n") == 1


def test_a_line_names_the_request_that_it_is_about() -> None:
    """What the caller was told in `X-Request-Id` finds the line."""
    request_id = logs.new_request_id()
    with logged("json") as (logger, written):
        with logs.of_request(request_id):
            logger.info("within")
        logger.info("without")

    within, without = lines(written)
    assert within["request_id"] == request_id.decode()
    assert "request_id" not in without


def test_each_request_has_an_id_of_its_own() -> None:
    """A number behind a random part that other processes do not have."""
    ids = [logs.new_request_id() for _ in range(1000)]

    assert len(set(ids)) == len(ids)
    assert len({one.partition(b"-")[0] for one in ids}) == 1
    assert all(len(one.partition(b"-")[0]) == 10 for one in ids)


def test_many_lines_of_one_kind_are_told_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away must not write a line for each of a thousand requests a second."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with logged("json") as (logger, written):
        for number in range(100):
            logger.error("503 at %s", number)
        logger.error("another kind")
        now = 1.0
        logger.error("503 at %s", "last")

    told = lines(written)
    assert len(told) == logs.MOST_LINES + 2
    assert [line["event"] for line in told[-2:]] == ["another kind", "503 at last"]
    assert told[-1]["left_out"] == 100 - logs.MOST_LINES


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_people_get_text_and_machines_get_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """COATCHECK_LOG_FORMAT, when it is not set."""

    def formatter(chosen: logs.Format | None) -> object:
        return logs.configuration(chosen)["formatters"]["line"]["()"]

    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert formatter(None) is logs.JsonLines
    monkeypatch.setattr("sys.stderr", Terminal())
    assert formatter(None) is logs.TextLines
    assert formatter("json") is logs.JsonLines


def test_the_configuration_is_one_that_logging_takes() -> None:
    """Each worker takes it once more, on its own."""
    logging.config.DictConfigurator(logs.configuration("json"))  # reads it, and changes nothing
    made = logs.configuration("text")
    assert logging.config.dictConfigClass is logging.config.DictConfigurator
    assert set(made) == {
        *("version", "disable_existing_loggers", "formatters", "filters", "handlers"),
        *("root", "loggers"),
    }
