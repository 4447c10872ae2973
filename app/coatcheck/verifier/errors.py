"""Why a credential was refused: one class per reason, each of which knows its whole answer.

A resource server that catches `VerifierError` needs nothing else: status, headers and body are
here.  The sentences are written for the person who has to fix it.  They are fixed text: what was
presented is never repeated, because it may be a secret or 100 kB long; what this resource server
expects may be named.  They hold no quotes, backslashes or non-ASCII, so that they can stand in
an `error_description`.

Source: RFC 6750 §3 and §3.1 (challenge, status, error codes), RFC 9728 §5.1
(`resource_metadata`), RFC 9457 §3 (problem body), RFC 9110 §10.2.3 (Retry-After).
"""

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar, Final
from urllib.parse import urlsplit

_WELL_KNOWN_RESOURCE: Final = "/.well-known/oauth-protected-resource"


@dataclass(frozen=True, slots=True)
class Protection:
    """What a challenge says about the resource server, whatever the reason for it.

    Attributes:
        realm: name of the protected space; printable ASCII without quotes and backslashes.
        resource_metadata: URL of the RFC 9728 document; None when there is none.
    """

    realm: str = "coatcheck"
    resource_metadata: str | None = None


def resource_metadata_url(audience: str) -> str | None:
    """Where the RFC 9728 document of an audience is; None: its name is no URL.

    Source: RFC 9728 §3.1: the well-known part goes between host and path, and the query stays.
    """
    try:
        parts = urlsplit(audience)
        is_url = parts.scheme in ("https", "http") and bool(parts.hostname)
    except ValueError:
        return None
    if not is_url:
        return None
    path = "" if parts.path == "/" else parts.path
    return parts._replace(path=_WELL_KNOWN_RESOURCE + path).geturl()


class VerifierError(Exception):
    """A request that may not go on.  The verifier lets out nothing else.

    Attributes:
        code: stable name of the reason, for programs.
        status: the HTTP status.
        error: RFC 6750 §3.1 error code; None when the challenge has to be bare.
        detail: the sentence for people.
        protection: the resource server that the challenge speaks for; the verifier sets it.
    """

    code: ClassVar[str]
    status: ClassVar[HTTPStatus] = HTTPStatus.UNAUTHORIZED
    error: ClassVar[str | None] = "invalid_token"
    text: ClassVar[str]

    #: RFC 6750 §3: names what the request would have needed; for `insufficient_scope` only.
    scope: str | None = None
    retry_after_s: int | None = None
    protection: Protection = Protection()

    def __init__(self, detail: str | None = None) -> None:
        self.detail = self.text if detail is None else detail
        super().__init__(self.detail)

    @property
    def title(self) -> str:
        """The status in words: RFC 9457 §4.2.1 wants no other beside the type `about:blank`."""
        return self.status.phrase

    @property
    def challenge(self) -> str | None:
        """The value of WWW-Authenticate; None when other credentials would not help either."""
        if self.status >= HTTPStatus.TOO_MANY_REQUESTS:
            return None
        parameters = {
            "realm": self.protection.realm,
            "resource_metadata": self.protection.resource_metadata,
            "error": self.error,
            # RFC 6750 §3.1: without credentials the answer tells no error.
            "error_description": None if self.error is None else self.detail,
            "scope": self.scope,
        }
        written = (f'{name}="{value}"' for name, value in parameters.items() if value is not None)
        return f"Bearer {', '.join(written)}"

    @property
    def headers(self) -> dict[str, str]:
        """All headers of the answer that depend on the reason."""
        headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}
        if self.challenge is not None:
            headers["WWW-Authenticate"] = self.challenge
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers

    def problem(self) -> dict[str, object]:
        """The body, as an RFC 9457 problem."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": int(self.status),
            "detail": self.detail,
            "code": self.code,
        }

    @property
    def body(self) -> bytes:
        """The problem as JSON."""
        return json.dumps(self.problem()).encode()


class MissingCredentials(VerifierError):
    code = "missing_credentials"
    error = None
    text = "Send an access token: Authorization: Bearer TOKEN."


class MultipleCredentials(VerifierError):
    code = "multiple_credentials"
    status = HTTPStatus.BAD_REQUEST
    error = "invalid_request"
    text = "Send one credential, in one place: the request carries several."


class TokenMalformed(VerifierError):
    code = "token_malformed"
    text = "The credential is neither a well-formed access token nor an API key."


class TokenInQuery(TokenMalformed):
    # RFC 6750 §2.3 allows it reluctantly, RFC 9700 §4.3.2 no longer: addresses get logged.
    status = HTTPStatus.BAD_REQUEST
    error = "invalid_request"
    text = "Send the access token in the Authorization header, never in the query."


class TokenExpired(VerifierError):
    code = "token_expired"
    text = "The access token has expired: request a new one."


class TokenFromFuture(VerifierError):
    code = "token_from_future"
    text = "The access token is not valid yet: compare the clocks of issuer and resource server."


class WrongAudience(VerifierError):
    code = "wrong_audience"
    text = "The access token is for another audience."


class WrongIssuer(VerifierError):
    code = "wrong_issuer"
    text = "The access token comes from another issuer."


class WrongEnvironment(VerifierError):
    code = "wrong_environment"
    text = "The credential belongs to another environment than this resource server."


class UnknownSigningKey(VerifierError):
    code = "unknown_signing_key"
    text = "The signing key of the access token is not in the key set of the issuer."


class BadSignature(VerifierError):
    code = "bad_signature"
    text = "The signature does not fit the access token."


class BadAlgorithm(VerifierError):
    code = "bad_algorithm"
    text = "The access token is signed with an algorithm that is not accepted for its signing key."


class WrongType(VerifierError):
    code = "wrong_type"
    text = "The JWT is no access token: its typ is not one that is accepted here."


class UnknownRestriction(VerifierError):
    code = "unknown_restriction"
    text = "The access token names a restriction that this verifier does not know: update it."


class TokenRevoked(VerifierError):
    code = "token_revoked"
    text = "The access token was revoked, or its API key was: request a new one."


class ApiKeyMalformed(VerifierError):
    code = "api_key_malformed"
    text = "The API key is mistyped or cut short: its checksum does not fit."


class ApiKeyUnknown(VerifierError):
    code = "api_key_unknown"
    text = "There is no such API key: check that the whole key was copied."


class ApiKeyRevoked(VerifierError):
    code = "api_key_revoked"
    text = "The API key was revoked and will not work again: ask its owner for a new one."


class ApiKeyExpired(VerifierError):
    code = "api_key_expired"
    text = "The API key has expired: ask its owner for a new one."


class ApiKeyDisabled(VerifierError):
    code = "api_key_disabled"
    text = "The API key is disabled: its owner can enable it again."


class OrgSuspended(VerifierError):
    code = "org_suspended"
    text = "The organization of the API key is suspended: contact the provider of the API."


class ConnectorOnlyInQuery(VerifierError):
    code = "connector_only_in_query"
    text = (
        "Only a connector key may stand in a URL, where logs keep it: send this API key in a"
        " header, and rotate it."
    )


class TokensOnly(VerifierError):
    code = "tokens_only"
    text = (
        "This resource server takes access tokens only: exchange the API key for one at the"
        " token endpoint of the issuer."
    )


class InsufficientScope(VerifierError):
    code = "insufficient_scope"
    status = HTTPStatus.FORBIDDEN
    error = "insufficient_scope"
    text = "The credential lacks a scope that this request needs."

    def __init__(self, scope: str) -> None:
        """`scope`: all scope-tokens that the request needs, with one blank between them."""
        super().__init__()
        # An empty list is no value of this attribute (RFC 6750 §3).
        self.scope = scope or None


class IpNotAllowed(VerifierError):
    code = "ip_not_allowed"
    status = HTTPStatus.FORBIDDEN
    error = "insufficient_scope"
    text = (
        "The credential may not be used from this address: its owner can add the address to the"
        " networks of the API key."
    )


class RoleNotAllowed(VerifierError):
    code = "role_not_allowed"
    status = HTTPStatus.FORBIDDEN
    error = "insufficient_scope"
    text = (
        "The role of the credential does not allow this HTTP method: ask its owner for an API key"
        " with a role that does."
    )


class ModelNotAllowed(VerifierError):
    code = "model_not_allowed"
    status = HTTPStatus.FORBIDDEN
    error = "insufficient_scope"
    text = (
        "The credential may not use this model: name one that it may use, or ask its owner for"
        " this one."
    )


class ProjectRequired(VerifierError):
    """No project is named where one is needed, or what names it is no one project's id."""

    code = "project_required"
    status = HTTPStatus.BAD_REQUEST
    error = "invalid_request"
    text = (
        "Name a project by its id in the header X-Project-Id, or use an API key that is bound to"
        " one."
    )


class WrongProject(VerifierError):
    code = "wrong_project"
    status = HTTPStatus.FORBIDDEN
    error = "insufficient_scope"
    text = (
        "The credential is bound to another project: leave X-Project-Id out, or use a credential"
        " of the project that it names."
    )


class QuotaExceeded(VerifierError):
    """The API key spent its credit.

    429 is what clients of metered APIs know for it.  There is no Retry-After, because nobody
    knows when its owner raises the limit, and no challenge, because a new token would not help.
    """

    code = "quota_exceeded"
    status = HTTPStatus.TOO_MANY_REQUESTS
    error = None
    text = "The API key reached its credit limit: its owner can raise the limit."


class IssuerUnavailable(VerifierError):
    code = "issuer_unavailable"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = None
    text = "The key set of the issuer cannot be loaded at the moment: try again."

    def __init__(self, retry_after_s: int) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class RateLimited(VerifierError):
    code = "rate_limited"
    status = HTTPStatus.TOO_MANY_REQUESTS
    error = None
    text = "Too many wrong API keys from this address: check which key is configured."

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class StaleFeed(VerifierError):
    code = "stale_feed"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = None
    text = "The issuer has not been heard of for too long to know which tokens are revoked."
    retry_after_s = 5


#: By code, for the restrictions, which know nothing of these classes.
ERRORS: Final[dict[str, type[VerifierError]]] = {
    error.code: error
    for error in (
        MissingCredentials,
        MultipleCredentials,
        TokenMalformed,
        TokenExpired,
        TokenFromFuture,
        WrongAudience,
        WrongIssuer,
        WrongEnvironment,
        UnknownSigningKey,
        BadSignature,
        BadAlgorithm,
        WrongType,
        UnknownRestriction,
        TokenRevoked,
        ApiKeyMalformed,
        ApiKeyUnknown,
        ApiKeyRevoked,
        ApiKeyExpired,
        ApiKeyDisabled,
        OrgSuspended,
        ConnectorOnlyInQuery,
        TokensOnly,
        InsufficientScope,
        IpNotAllowed,
        RoleNotAllowed,
        ModelNotAllowed,
        ProjectRequired,
        WrongProject,
        QuotaExceeded,
        RateLimited,
        IssuerUnavailable,
        StaleFeed,
    )
}
