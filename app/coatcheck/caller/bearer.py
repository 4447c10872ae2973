"""What the three `TokenAuth` have in common: where the token goes, and when to fetch another.

A 401 that calls the token invalid is answered by one renewal and one repetition, if nothing was
done yet that would be done twice: the body can be sent again, and no redirect lies in between.
A second 401 is the caller's.

Source: RFC 6750 §2.1 (Authorization), §3.1 (invalid_token).
"""

import json
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final, Unpack

from coatcheck.caller.origin import Reach
from coatcheck.caller.token_source import Settings, TokenSource

#: Bytes of a problem document that is looked into.
MAX_PROBLEM_BYTES: Final = 16 * 1024
_INVALID_TOKEN: Final = re.compile(r"\berror\s*=\s*\"?invalid_token\b", re.IGNORECASE)
_CODES: Final = frozenset({"token_expired", "token_revoked"})


class Bearer:
    """A token source, and the origins that its tokens are for.

    Args:
        source: a `TokenSource`, which several may share, or the issuer's URL; None:
            COATCHECK_ISSUER.
        api_key: as for `TokenSource`.
        allowed_hosts: who gets the token; None: the host of `resource`, else that of the first
            request.
        settings: as for `TokenSource`, if there is none yet.

    Raises:
        ValueError: a setting is missing or wrong.
        ApiKeyMissing: nobody has said which API key.
    """

    def __init__(
        self,
        source: TokenSource | str | None = None,
        api_key: str | None = None,
        *,
        allowed_hosts: Iterable[str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if isinstance(source, TokenSource):
            if api_key is not None or settings:
                raise ValueError("a TokenSource has its settings already: tell them to that one")
        else:
            source = TokenSource(source, api_key, **settings)
        self.source = source
        self.reach = Reach(
            allowed_hosts, source.resource, unsafe_plain_http=source.unsafe_plain_http
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.reach!r} {self.source!r}>"


def header(token: str) -> str:
    """The value of an Authorization header."""
    return f"Bearer {token}"


def says_invalid_token(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer calls the token invalid, by its challenge."""
    challenge = headers.get("WWW-Authenticate") or ""
    return status == HTTPStatus.UNAUTHORIZED and bool(_INVALID_TOKEN.search(challenge))


def may_tell_by_body(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the body of an answer may say so, and is small enough to be read for it."""
    length = headers.get("Content-Length") or ""
    return (
        status == HTTPStatus.UNAUTHORIZED
        and "json" in (headers.get("Content-Type") or "")
        and "Content-Encoding" not in headers
        and bool(re.fullmatch(r"[0-9]{1,5}", length))
        and int(length) <= MAX_PROBLEM_BYTES
    )


def tells_by_body(body: bytes) -> bool:
    """Whether a problem document calls the token expired or revoked."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("code") in _CODES
