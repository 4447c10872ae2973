"""GET /oauth/revocations: the revocation feed over HTTP, at once or by long poll.

Raw ASGI, because a thousand followers may wait here at a time.
"""

import logging
from typing import Final
from urllib.parse import parse_qsl

from coatcheck.durations import FEED_WAIT_MAX
from coatcheck.server.feed import Feed
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.wire import Receive, Reply, Scope, json_reply
from coatcheck.server.signing import NoSigner
from coatcheck.server.store import StoreUnavailable

_log = logging.getLogger(__name__)
_HEADERS: Final = ((b"content-type", b"application/jwt"), (b"cache-control", b"no-store"))
#: Digits of the largest sequence number.
_MOST_DIGITS: Final = 19


class RevocationsEndpoint:
    """`?after=SEQ&wait=SECONDS`: what was narrowed; public."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def reply(self, scope: Scope, receive: Receive) -> Reply:
        """The answer to one request, whatever happens."""
        try:
            if scope["method"] not in ("GET", "HEAD"):
                raise OAuthError.method_not_allowed("GET, HEAD")
            query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
            after = _number(query.get("after", "-1"), "after")
            wait_s = _number(query.get("wait", "0"), "wait")
            return Reply(200, await self._feed.get(after, min(wait_s, FEED_WAIT_MAX)), _HEADERS)
        except OAuthError as error:
            return _refused(error)
        except (StoreUnavailable, NoSigner) as error:
            _log.error("503 at the feed: %s", error)
            return _refused(OAuthError.unavailable())


def _number(text: str, name: str) -> int:
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > _MOST_DIGITS:
        raise OAuthError.invalid_request(f"{name} is a whole number.")
    return int(text)


def _refused(error: OAuthError) -> Reply:
    body = {"error": error.error, "error_description": error.text, "code": error.code}
    return json_reply(error.status_code, body, error.extra_headers)
