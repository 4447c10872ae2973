"""What a caller of somebody's API is told when there is no token: one family, `CallerError`.

Sentences are for the person who has to fix it.  None holds an API key or a token.
"""


class CallerError(Exception):
    """There is no token, or it may not be sent.

    Attributes:
        detail: one sentence.
        code: a stable word; the issuer's own where it has answered, such as `api_key_revoked`.
        retry_after_s: seconds after which asking again reaches the issuer; None: asking again
            changes nothing, or reaches it at once.
    """

    def __init__(
        self, detail: str, code: str = "caller_error", retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.retry_after_s = retry_after_s


class ApiKeyMissing(CallerError):
    """Nobody has said which API key, or it cannot be read."""


class KeyRejected(CallerError):
    """The issuer takes this API key no more: unknown, revoked, expired or disabled.

    It is not asked again for the same API key.
    """


class NotAllowedNow(CallerError):
    """The API key is right, and may not get a token from here or at this time.

    Its address, its credit or its organization is why; others can change that, so the issuer is
    asked again after a while.
    """


class AskRefused(CallerError):
    """The API key is right, and what was asked for cannot be had: a scope, a resource, the form."""


class IssuerUnavailable(CallerError):
    """The issuer did not answer, or not as one does.  It says nothing about the API key."""


class HostNotAllowed(CallerError):
    """A request would have carried the token to a host that it is not for.  Nothing was sent."""
