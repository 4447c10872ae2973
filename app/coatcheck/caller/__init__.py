"""For callers of an API: `TokenSource` exchanges the API key and keeps the token fresh.

Most need one of `coatcheck.httpx2`, `coatcheck.httpx` and `coatcheck.requests` only, whose
`TokenAuth` is over it.
"""

from coatcheck.caller.errors import (
    ApiKeyMissing,
    AskRefused,
    CallerError,
    HostNotAllowed,
    IssuerUnavailable,
    KeyRejected,
    NotAllowedNow,
)
from coatcheck.caller.token_source import TokenSource

__all__ = [
    "ApiKeyMissing",
    "AskRefused",
    "CallerError",
    "HostNotAllowed",
    "IssuerUnavailable",
    "KeyRejected",
    "NotAllowedNow",
    "TokenSource",
]
