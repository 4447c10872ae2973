"""What a caller is told when a request fails: one table from reason to code and sentence.

Sentences are written for the person who has to fix it.  They never repeat what was sent, which
may be a secret, and hold only the characters that RFC 6749 §5.2 allows: no quotes, backslashes
or letters beyond ASCII.

Source: RFC 6749 §5.2, RFC 8707 §2 (invalid_target), RFC 7009 §2.2.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from authlib.oauth2.rfc6749.errors import OAuth2Error

from coatcheck import apikey
from coatcheck.restrictions import Reason, Refusal

#: The form of an API key anywhere in a text.
_API_KEY: Final = re.compile(r"(?:[A-Za-z0-9_]+_)?[0-9A-Za-z]{20,}")
#: How much of a list of names goes into a sentence.
_LONGEST_LIST: Final = 400


class OAuthError(OAuth2Error):
    """An answer that is no success.  Carries everything but the challenge, which needs a realm."""

    def __init__(
        self,
        error: str,
        code: str,
        description: str,
        status: int = 400,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(description, status_code=status, error=error)
        self.code = code
        self.text = description
        self.extra_headers = headers

    @classmethod
    def invalid_request(cls, description: str) -> "OAuthError":
        return cls("invalid_request", "invalid_request", description)

    @classmethod
    def method_not_allowed(cls, allowed: str) -> "OAuthError":
        return cls(
            "invalid_request", "method_not_allowed", f"Use {allowed}.", 405, (("Allow", allowed),)
        )

    @classmethod
    def unsupported_encoding(cls) -> "OAuthError":
        return cls(
            "invalid_request", "invalid_request", "Send the body without Content-Encoding.", 415
        )

    @classmethod
    def too_large(cls) -> "OAuthError":
        # The rest of the body is not read, so the connection cannot be used again.
        return cls(
            "invalid_request",
            "invalid_request",
            "The body is larger than 16 KiB.",
            413,
            (("Connection", "close"),),
        )

    @classmethod
    def throttled(cls, retry_after_s: int, code: str = "rate_limited") -> "OAuthError":
        return cls(
            "temporarily_unavailable",
            code,
            "Too many wrong API keys from this address. A right one still works; check which key"
            f" is configured, and try again in {retry_after_s} s.",
            429,
            (("Retry-After", str(retry_after_s)),),
        )

    @classmethod
    def unavailable(cls) -> "OAuthError":
        return cls(
            "temporarily_unavailable",
            "issuer_unavailable",
            "The service cannot answer right now; this says nothing about the API key. Try again.",
            503,
            (("Retry-After", "1"),),
        )

    @classmethod
    def overloaded(cls) -> "OAuthError":
        return cls(
            "temporarily_unavailable",
            "overloaded",
            "Too many requests at once; this says nothing about the API key. Try again.",
            503,
            (("Retry-After", "1"),),
        )


@dataclass(frozen=True, slots=True)
class _Row:
    error: str
    code: str
    sentence: str


_REPLACE: Final = "Ask its owner for a new one."

#: Reason → what is told.  {date} and {names} are filled from our own records, or from scopes that
#: passed the grammar, never from raw input.
_ROWS: Final[Mapping[Reason, _Row]] = {
    Reason.API_KEY_UNKNOWN: _Row(
        "invalid_client",
        "api_key_unknown",
        "No such API key, or the client_id does not belong to it. Send the whole key as"
        " client_secret, and its id as client_id or nothing.",
    ),
    Reason.API_KEY_REVOKED: _Row(
        "invalid_client",
        "api_key_revoked",
        f"This API key was revoked on {{date}} and will not work again. {_REPLACE}",
    ),
    Reason.API_KEY_EXPIRED: _Row(
        "invalid_client", "api_key_expired", f"This API key expired on {{date}}. {_REPLACE}"
    ),
    Reason.API_KEY_REPLACED: _Row(
        "invalid_client",
        "api_key_expired",
        "This secret was replaced, and its overlap ended on {date}. Use the new secret of the same"
        " API key.",
    ),
    Reason.API_KEY_DISABLED: _Row(
        "invalid_client",
        "api_key_disabled",
        "This API key was disabled on {date}. Its owner can enable it again.",
    ),
    Reason.QUOTA_EXCEEDED: _Row(
        "unauthorized_client",
        "quota_exceeded",
        "The credit limit of this API key, or of its organization, was reached on {date}. Whoever"
        " set it can raise it.",
    ),
    Reason.PROJECT_ARCHIVED: _Row(
        "unauthorized_client",
        "api_key_disabled",
        "The project of this API key was archived on {date}. Its organization can take it back.",
    ),
    Reason.IP_NOT_ALLOWED: _Row(
        "unauthorized_client",
        "ip_not_allowed",
        "This API key may not be used from this address. Its owner can add the address to the"
        " networks of the API key.",
    ),
    Reason.ORG_SUSPENDED: _Row(
        "unauthorized_client",
        "org_suspended",
        "The organization of this API key was suspended on {date}. Contact the provider of the"
        " API.",
    ),
    Reason.INVALID_SCOPE: _Row(
        "invalid_scope",
        "invalid_scope",
        "The scope parameter is malformed: scopes are separated by one blank, each an action or"
        " action@filter.",
    ),
    Reason.INSUFFICIENT_SCOPE: _Row(
        "invalid_scope",
        "invalid_scope",
        "This API key does not have: {names}. Ask for less, or leave scope out for all it has.",
    ),
    Reason.INVALID_TARGET: _Row(
        "invalid_target",
        "invalid_target",
        "This API key is not for that resource. It is for: {names}. Name one as resource.",
    ),
    Reason.NO_PERMISSION_THERE: _Row(
        "invalid_target",
        "invalid_target",
        "This API key has no permission at that resource. Name one where it has some, or ask its"
        " owner for a permission.",
    ),
    Reason.NOT_ENFORCED_THERE: _Row(
        "invalid_target",
        "not_enforced_there",
        "That resource does not enforce what restricts this API key: {names}. Use an API key"
        " without it there.",
    ),
    Reason.SEVERAL_TARGETS: _Row(
        "invalid_target",
        "invalid_target",
        "A token is for one resource: ask for one token each.",
    ),
    Reason.WRONG_ENVIRONMENT: _Row(
        "invalid_target",
        "wrong_environment",
        "That resource belongs to another environment than this API key. It is for: {names}.",
    ),
    Reason.NOT_A_CALLER: _Row(
        "invalid_request",
        "api_key_unknown",
        "This API key belongs to a resource server or an operator; it calls no API.",
    ),
    Reason.NOT_IN_QUERY: _Row(
        "invalid_request",
        "connector_only_in_query",
        "Only a connector key may stand in a URL, where logs keep it. Send this API key in a header"
        " and rotate it.",
    ),
    Reason.ONLY_IN_QUERY: _Row(
        "unauthorized_client",
        "connector_only_in_query",
        "This is a connector key, which is good in the URL of an agent only. Make an ordinary API"
        " key for anything else.",
    ),
}
#: Reasons that say something about the asked resource rather than about the API key.
_OF_THE_RESOURCE: Final = frozenset({"invalid_target", "invalid_scope"})

MISSING_CREDENTIAL: Final = _Row(
    "invalid_client",
    "missing_credential",
    "Send the API key: as client_secret in the body, or in the Authorization header as Basic or"
    " Bearer.",
)
NO_API_KEY: Final = _Row(
    "invalid_client",
    "api_key_unknown",
    "What was sent is no API key. Send the whole key as client_secret; access tokens and"
    " assertions are not accepted here.",
)


def from_row(row: _Row) -> OAuthError:
    """The error that a row without fillings stands for."""
    return OAuthError(row.error, row.code, row.sentence)


def from_refusal(refusal: Refusal) -> OAuthError:
    """The error that the outside sees for a refusal."""
    row = _ROWS[refusal.reason]
    names = [_tellable(str(grant)) for grant in refusal.scopes or ()] or list(refusal.allowed)
    sentence = row.sentence.format(date=_date(refusal.at), names=_list(names))
    return OAuthError(row.error, row.code, sentence)


def bad_subject(refusal: Refusal | Exception) -> OAuthError:
    """The error of a token exchange whose subject is refused (RFC 8693 §2.2.2).

    The resource server itself was authenticated; `code` says what is wrong with its caller.
    """
    if not isinstance(refusal, Refusal):
        return OAuthError(
            "invalid_request",
            "api_key_malformed",
            "The API key is mistyped or cut short: its checksum does not fit.",
        )
    error = from_refusal(refusal)
    if error.error in _OF_THE_RESOURCE:
        return error
    # The caller sent it to an API, where nothing is called client_secret.
    is_unknown = refusal.reason is Reason.API_KEY_UNKNOWN
    text = "No such API key. Check which key is configured." if is_unknown else error.text
    return OAuthError("invalid_request", error.code, text)


def _tellable(scope: str) -> str:
    """A scope that was asked for; an API key that was typed into the wrong field is masked."""
    return _API_KEY.sub(lambda key: apikey.mask(key[0]), scope)


def _date(at: int | None) -> str:
    if at is None:
        return "an unknown date"
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d at %H:%M UTC")


def _list(names: list[str]) -> str:
    told = ""
    for number, name in enumerate(names):
        longer = f"{told} {name}" if told else name
        if len(longer) > _LONGEST_LIST:
            return f"{told} and {len(names) - number} more".lstrip()
        told = longer
    return told or "nothing"
