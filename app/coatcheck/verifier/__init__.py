"""What a resource server installs: one object that tells who is calling, or why not.

    from coatcheck.verifier import Verifier

    verifier = Verifier("https://auth.example.com", audience="https://api.example.com")
    principal = verifier.authenticate(request.headers, scopes="widgets:read")

It needs PyJWT and an HTTP client, and nothing of the service.  `coatcheck.starlette` is the
same as middleware.
"""

from coatcheck.verifier.errors import (
    ApiKeyDisabled,
    ApiKeyExpired,
    ApiKeyMalformed,
    ApiKeyRevoked,
    ApiKeyUnknown,
    BadAlgorithm,
    BadSignature,
    ConnectorOnlyInQuery,
    InsufficientScope,
    IpNotAllowed,
    IssuerUnavailable,
    MissingCredentials,
    ModelNotAllowed,
    MultipleCredentials,
    OrgSuspended,
    ProjectRequired,
    QuotaExceeded,
    RateLimited,
    RoleNotAllowed,
    StaleFeed,
    TokenExpired,
    TokenFromFuture,
    TokenInQuery,
    TokenMalformed,
    TokenRevoked,
    TokensOnly,
    UnknownRestriction,
    UnknownSigningKey,
    VerifierError,
    WrongAudience,
    WrongEnvironment,
    WrongIssuer,
    WrongProject,
    WrongType,
)
from coatcheck.verifier.principal import Principal
from coatcheck.verifier.verifier import Verifier

__all__ = [
    "ApiKeyDisabled",
    "ApiKeyExpired",
    "ApiKeyMalformed",
    "ApiKeyRevoked",
    "ApiKeyUnknown",
    "BadAlgorithm",
    "BadSignature",
    "ConnectorOnlyInQuery",
    "InsufficientScope",
    "IpNotAllowed",
    "IssuerUnavailable",
    "MissingCredentials",
    "ModelNotAllowed",
    "MultipleCredentials",
    "OrgSuspended",
    "Principal",
    "ProjectRequired",
    "QuotaExceeded",
    "RateLimited",
    "RoleNotAllowed",
    "StaleFeed",
    "TokenExpired",
    "TokenFromFuture",
    "TokenInQuery",
    "TokenMalformed",
    "TokenRevoked",
    "TokensOnly",
    "UnknownRestriction",
    "UnknownSigningKey",
    "Verifier",
    "VerifierError",
    "WrongAudience",
    "WrongEnvironment",
    "WrongIssuer",
    "WrongProject",
    "WrongType",
]
