"""`TokenAuth` for requests: of a session, or of a single request.

requests follows redirects by itself, without calling its `auth` again: it copies the request
with its headers and hooks, and takes the Authorization header off when the host, the port or
https is left behind.  So a redirect goes on without the token.
"""

from functools import partial
from typing import Any

import requests
from requests.auth import AuthBase
from requests.cookies import extract_cookies_to_jar

from coatcheck.caller import bearer
from coatcheck.caller.errors import CallerError


class TokenAuth(bearer.Bearer, AuthBase):
    """Sends a token with each request: `session.auth = TokenAuth(issuer)`."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token to a request.  Called by requests."""
        self.reach.require(request.url or "")
        request.headers["Authorization"] = bearer.header(self.source.token())
        answered = partial(self._answered, _position(request.body))
        request.register_hook("response", answered)  # type: ignore[no-untyped-call]
        return request

    def _answered(
        self, position: int | None, response: requests.Response, **options: Any
    ) -> requests.Response:
        request = response.request
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not self.reach.lets(request.url or ""):
            # A redirect has led away.
            return response
        if not _says_so(response) or not self.source.after_refusal(sent):
            return response
        if not _rewound(request.body, position):
            # The next request has another token; this one cannot be sent twice.
            return response
        try:
            token = self.source.token()
        except CallerError:
            response.close()
            raise
        return response if token == sent else _repeated(response, token, options)


def _repeated(response: requests.Response, token: str, options: Any) -> requests.Response:
    """The answer to the same request with another token."""
    # A connection with a rest of an answer in it cannot be used again; this lets go of it.
    response.close()
    # Of no type: requests has no names in public for what each of its own schemes does here.
    request: Any = response.request.copy()
    connection: Any = response.connection
    extract_cookies_to_jar(request._cookies, response.request, response.raw)  # type: ignore[no-untyped-call]  # noqa: SLF001
    request.prepare_cookies(request._cookies)  # noqa: SLF001
    request.headers["Authorization"] = bearer.header(token)
    # Past the session, so that no hook meets a second refusal.
    again: requests.Response = connection.send(request, **options)
    again.history.append(response)
    again.request = request
    return again


def _says_so(response: requests.Response) -> bool:
    status, headers = response.status_code, response.headers
    return bearer.says_invalid_token(status, headers) or (
        bearer.may_tell_by_body(status, headers) and bearer.tells_by_body(response.content)
    )


def _position(body: Any) -> int | None:
    """Where a file is read from; None: it is no file, or one that cannot go back."""
    try:
        return int(body.tell())
    except (AttributeError, OSError, ValueError, TypeError):
        return None


def _rewound(body: Any, position: int | None) -> bool:
    """Whether a body can be sent again; a file is at its beginning then."""
    if body is None or isinstance(body, (bytes, str)):
        return True
    if position is None:
        return False
    try:
        body.seek(position)
    except (AttributeError, OSError, ValueError):
        return False
    return True
