"""Log lines: JSON for machines or plain for a terminal; and the ids that tie them to requests.

A request gets its id here and nowhere else: whoever sends one along could make their line look
like somebody else's.  It is answered as `X-Request-Id`, and stands in every line that was logged
for the request and in every row of the change log that it wrote.

What a caller sent reaches a line only with its control characters escaped, so that nobody can
begin a line of their own.  Of an exception only its kind and its place are told: its message may
repeat what was sent.

Source: OWASP ASVS 5 §16.4.1 (log injection).
"""

import itertools
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal

from coatcheck import base62

Format = Literal["json", "text"]

#: The header that an answer tells its request's id in.
HEADER: Final = b"x-request-id"
#: Where the listener leaves it for the application: a key of the ASGI scope.
SCOPE_KEY: Final = "coatcheck.request_id"
#: Lines of one kind that are written in a second; what is beyond is counted and told later.
MOST_LINES: Final = 20
#: Kinds of lines that are counted apart.
_MOST_KINDS: Final = 1000

#: Ids are the process's own random part and a number: a UUID for each would cost ten times that.
_PROCESS: Final = base62.random_text(10).encode()
_numbers = itertools.count(1)
_current: ContextVar[bytes | None] = ContextVar("coatcheck_request_id", default=None)


def new_request_id() -> bytes:
    """The id of a request that has just arrived."""
    return b"%b-%d" % (_PROCESS, next(_numbers))


#: Say which request the code works on from here on, as far as its context goes.
begin_request: Final = _current.set


@contextmanager
def of_request(request_id: bytes) -> Iterator[None]:
    """As `begin_request`, until the block ends."""
    before = _current.set(request_id)
    try:
        yield
    finally:
        _current.reset(before)


def request_id() -> str | None:
    """The id of the request that is being answered; None outside of any."""
    current = _current.get()
    return None if current is None else current.decode("ascii")


class Bound(logging.Filter):
    """At most MOST_LINES a second of one kind, however many requests fail at a time.

    Lines are of one kind if they come from one logger and one sentence.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Kind → when its second began, lines since then, lines left out since the last one.
        self._kinds: dict[tuple[str, object], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, record.msg)
        now = time.monotonic()
        began, lines, left_out = self._kinds.get(kind, (now, 0, 0))
        if now - began >= 1:
            began, lines = now, 0
        passes = lines < MOST_LINES
        if passes and left_out:
            record.left_out = left_out
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (began, lines + 1, 0 if passes else left_out + 1)
        return passes


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII, so that no character can end it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _moment(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            "pid": record.process,
        }
        return json.dumps(line | _details(record))


class TextLines(logging.Formatter):
    """One line for people."""

    def format(self, record: logging.LogRecord) -> str:
        details = " ".join(f"{name}={value}" for name, value in _details(record).items())
        line = f"{_moment(record)} {record.levelname} {record.name} [{record.process}]"
        return _printable(f"{line} {record.getMessage()} {details}".rstrip())


def _moment(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, to the millisecond."""
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _details(record: logging.LogRecord) -> dict[str, object]:
    """What some lines have: the request's id, how many were left out, what was raised where."""
    details: dict[str, object] = {}
    if (current := request_id()) is not None:
        details["request_id"] = current
    if (left_out := getattr(record, "left_out", 0)) > 0:
        details["left_out"] = left_out
    if record.exc_info and record.exc_info[0] is not None:
        details["error"] = record.exc_info[0].__name__
        frames = traceback.extract_tb(record.exc_info[2])
        details["trace"] = [f"{one.filename}:{one.lineno} {one.name}" for one in frames]
    return details


def _printable(text: str) -> str:
    """A text without anything that would move the cursor, end the line or turn it around."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )


_FORMATTERS: Final[dict[Format, type[logging.Formatter]]] = {"json": JsonLines, "text": TextLines}


def configuration(chosen: Format | None) -> dict[str, Any]:
    """What `logging.config.dictConfig` takes; each worker, a process of its own, takes it again.

    Args:
        chosen: None: text for a terminal, JSON for anything that collects lines.
    """
    form = chosen or ("text" if sys.stderr.isatty() else "json")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": _FORMATTERS[form]}},
        "filters": {"bound": {"()": Bound}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "filters": ["bound"],
            }
        },
        "root": {"level": "INFO", "handlers": ["stderr"]},
        # It tells of each part that it loads.
        "loggers": {"alembic": {"level": "WARNING"}},
    }
