"""Reading what the issuer answers to a token request; no I/O.

Whatever is neither a token nor a refusal in the form of an OAuth error says nothing about the
API key: a proxy's page, a redirect, half a document.

Source: RFC 6749 §5.1 (success), §5.2 (errors); RFC 6750 §2.1 (b64token); RFC 9110 §10.2.3
(Retry-After).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from coatcheck import apikey
from coatcheck.caller.errors import (
    AskRefused,
    CallerError,
    IssuerUnavailable,
    KeyRejected,
    NotAllowedNow,
)

#: Seconds.  Nobody issues tokens for longer; a larger number is a mistake.
LONGEST_LIFE: Final = 24 * 3600
#: Seconds.  A mistyped Retry-After does not end a caller for a day.
LONGEST_WAIT: Final = 300

_B64TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{1,8192}={0,2}")
#: RFC 6749 §5.2: what `error` and `error_description` consist of.
_WORD: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DESCRIPTION: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,600}")

_REFUSALS: Final[Mapping[str, type[CallerError]]] = {
    "invalid_client": KeyRejected,
    "unauthorized_client": NotAllowedNow,
    "temporarily_unavailable": IssuerUnavailable,
    "server_error": IssuerUnavailable,
}


class Answer(NamedTuple):
    """What came back.

    Attributes:
        retry_after: the header's text.
    """

    status: int
    body: bytes
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A token, as it was issued.

    Attributes:
        document: the whole answer.
    """

    token: str = field(repr=False)
    expires_in_s: int
    document: Mapping[str, Any] = field(repr=False)


def read(answer: Answer, api_key: str, *, now: float) -> Fetched:
    """The token in an answer.

    Args:
        api_key: what was presented: no sentence may hold it.
        now: seconds since the epoch, for a Retry-After that is a date.

    Raises:
        CallerError: the one that fits; `retry_after_s` is what the issuer said.
    """
    told = _object(answer.body)
    if answer.status == HTTPStatus.OK:
        return _token(told)
    wait_s = _wait_s(answer.retry_after, now)
    error = told.get("error")
    is_refusal = 400 <= answer.status < 500  # noqa: PLR2004 - RFC 9110 §15.5
    if not isinstance(error, str) or not _WORD.fullmatch(error):
        raise _nonsense(f"it answers {answer.status}", wait_s)
    sentence = _sentence(told.get("error_description"), api_key)
    code = told.get("code")
    code = code if isinstance(code, str) and _WORD.fullmatch(code) else error
    if not is_refusal or answer.status == HTTPStatus.TOO_MANY_REQUESTS:
        raise IssuerUnavailable(f"{error}: {sentence}", code, wait_s)
    raise _REFUSALS.get(error, AskRefused)(f"{error}: {sentence}", code, wait_s)


def _token(told: Mapping[str, Any]) -> Fetched:
    token, expires_in, kind = (
        told.get(name) for name in ("access_token", "expires_in", "token_type")
    )
    is_token = (
        isinstance(token, str)
        and _B64TOKEN.fullmatch(token)
        and type(expires_in) is int
        and 0 < expires_in <= LONGEST_LIFE
        and isinstance(kind, str)
        and kind.lower() == "bearer"  # RFC 6749 §5.1: letter case does not count
    )
    if not is_token:
        raise _nonsense("its answer holds no bearer token with a number as expires_in", None)
    return Fetched(str(token), int(str(expires_in)), told)


def _nonsense(what: str, wait_s: float | None) -> IssuerUnavailable:
    return IssuerUnavailable(
        f"{what}, and not as Coatcheck does: is it the issuer's URL?", "not_an_issuer", wait_s
    )


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _sentence(text: object, api_key: str) -> str:
    """The issuer's own words, if they can be shown."""
    if not isinstance(text, str) or not _DESCRIPTION.fullmatch(text) or api_key in text:
        return "the issuer gives no reason"
    if any(apikey.looks_like_one(word) for word in re.split(r"[^0-9A-Za-z_]+", text)):
        return "the issuer gives no reason"
    return text


def _wait_s(text: str | None, now: float) -> float | None:
    """Seconds of a Retry-After: a number or a date; None: it is neither."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(min(int(text), LONGEST_WAIT))
    try:
        at = parsedate_to_datetime(text)
        # A date without a zone is one of UTC: RFC 9110 §5.6.7.
        seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), float(LONGEST_WAIT))
