"""Inputs of the use cases: texts that people write, checked and turned into values.

Source: RFC 3339 §5.6 (times), Unicode Standard §4.5 (general categories).
"""

import re
import unicodedata
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Final

from coatcheck.durations import span
from coatcheck.server.manage.errors import Invalid

MAX_NAME_LENGTH: Final = 100
#: What is stored for one credit.
CREDIT: Final = 1_000_000
#: In millionths: what a float still tells exactly.
MAX_CREDIT: Final = 1_000_000_000 * CREDIT
#: The last second that every database and every client can write down.
LATEST: Final = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())
#: Control, format (writing direction, zero width), surrogate, private use, separators of lines.
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def name(text: str) -> str:
    """A name that people give to a thing.

    Raises:
        Invalid: it is empty, too long, or holds characters that could forge a log line or turn
            the direction of writing.
    """
    text = text.strip()
    if not text:
        raise Invalid("name", "must not be empty")
    if len(text) > MAX_NAME_LENGTH:
        raise Invalid("name", f"has at most {MAX_NAME_LENGTH} characters")
    if any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in text):
        raise Invalid(
            "name", "holds a control or invisible character: write letters and signs only"
        )
    return text


def credit(field: str, value: object) -> int:
    """An amount of credits in millionths.

    Args:
        value: a number, or one as text; at most six decimals.

    Raises:
        Invalid: it is none, negative, too fine or too large.
    """
    try:
        millionths = Decimal(str(value)) * CREDIT
    except InvalidOperation:
        raise Invalid(field, "is a number of credits, such as 100 or 2.5") from None
    if not millionths.is_finite() or not 0 <= millionths <= MAX_CREDIT:
        raise Invalid(field, f"is a number from 0 to {MAX_CREDIT // CREDIT}")
    if millionths != millionths.to_integral_value():
        raise Invalid(field, "has at most six decimals")
    return int(millionths)


def credits_told(millionths: int | None) -> int | float | None:
    """An amount of credits as JSON writes it; None stays None."""
    if millionths is None:
        return None
    whole, rest = divmod(millionths, CREDIT)
    return millionths / CREDIT if rest else whole


def duration(field: str, text: str) -> int:
    """A span of time as seconds: `90d`, `24h`, `30m`, `45s`, or `0`.

    Raises:
        Invalid: it is none of these.
    """
    if text in ("0", "none"):
        return 0
    seconds = span(text)
    if seconds is None:
        raise Invalid(field, "write a number with s, m, h or d, such as 24h, or 0 for none")
    return seconds


def moment(field: str, text: str, now: int) -> int:
    """A moment in the future: a span from now (`90d`), or an RFC 3339 time or date.

    A date alone means its end, in UTC.

    Raises:
        Invalid: it is neither, lies in the past, or beyond the year 9999.
    """
    seconds = span(text)
    at = _calendar(field, text) if seconds is None else now + seconds
    if at <= now:
        raise Invalid(field, "lies in the past")
    if at > LATEST:
        raise Invalid(field, "lies beyond the year 9999")
    return at


def instant(field: str, text: str) -> int:
    """A moment, past or future: an RFC 3339 time or date; a date alone means its end, in UTC.

    Raises:
        Invalid: it is neither.
    """
    return _calendar(field, text)


@lru_cache(maxsize=1024)
def rfc3339(at: int | None) -> str | None:
    """A stored time as text: `2026-11-21T05:15:00Z`; None stays None."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _calendar(field: str, text: str) -> int:
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            text += "T23:59:59Z"
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Invalid(
            field, "is no existing date: write 2027-03-31, 2027-03-31T12:00:00Z, or a span as 90d"
        ) from None
    if moment.tzinfo is None:
        raise Invalid(field, "has no time zone: add Z for UTC")
    return int(moment.timestamp())
