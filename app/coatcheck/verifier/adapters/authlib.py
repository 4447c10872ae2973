"""Authlib: a token validator for those who have a ResourceProtector, of Flask or of Django.

    class Protector(CoatcheckProtector, ResourceProtector):
        pass

    require_oauth = Protector()
    require_oauth.register_token_validator(CoatcheckBearerValidator(issuer=…, audience=…))

    @require_oauth("widgets:read")  # current_token is the Principal

It protects single routes, and leaves all others open.

A plain ResourceProtector looks for `Authorization` before it asks any validator: without that
header, or with Basic, it answers by itself, and the answer is Authlib's.  CoatcheckProtector
leaves finding the credential to the validator, so that it counts in every place.

Source: RFC 6750 §3 (challenges).
"""

from contextvars import ContextVar
from typing import Any, Final

from authlib.oauth2 import OAuth2Error
from authlib.oauth2.rfc6749 import MissingAuthorizationError
from authlib.oauth2.rfc6750 import BearerTokenValidator

from coatcheck.verifier import MissingCredentials, Principal, Verifier, VerifierError
from coatcheck.verifier.adapters.gate import Gate, refusal
from coatcheck.verifier.adapters.wsgi import headers_of, query_of

#: Authlib asks for the caller by the text of a token, and has shown the request before.
_caller: Final[ContextVar[Principal | None]] = ContextVar("coatcheck.caller", default=None)


class Refused(OAuth2Error):
    """A refusal in Authlib's form, with our status, headers and body.

    Attributes:
        reason: the VerifierError.
    """

    def __init__(self, reason: VerifierError) -> None:
        # Not `super()`: a missing credential is told in other words there.
        OAuth2Error.__init__(
            self,
            reason.detail,
            status_code=int(reason.status),
            error=reason.error or reason.code,
        )
        self.reason = reason

    def get_body(self) -> list[tuple[str, object]]:
        return list(self.reason.problem().items())

    def get_headers(self) -> list[tuple[str, str]]:
        return list(self.reason.headers.items())


class RefusedWithoutCredentials(Refused, MissingAuthorizationError):
    """`optional=True` means these requests."""


class CoatcheckBearerValidator(BearerTokenValidator):
    """Access tokens and API keys of one issuer, for one audience.

    Args:
        verifier: a Verifier; or leave it out and pass its settings by name.
        verifier_settings: as for Verifier.
    """

    def __init__(self, verifier: Verifier | None = None, **verifier_settings: Any) -> None:
        self._gate = Gate(verifier, (), verifier_settings)
        self.verifier = self._gate.verifier
        super().__init__(realm=self.verifier.protection.realm)

    def validate_request(self, request: Any) -> None:
        """Step 1 of Authlib's: authenticates the request as a whole."""
        _caller.set(None)
        environ = environ_of(request)
        try:
            principal = self.verifier.authenticate(
                # Authlib's own view of a request knows neither repeats nor a peer.
                request.headers if environ is None else headers_of(environ),
                client_address=None if environ is None else environ.get("REMOTE_ADDR") or None,
                query=b"" if environ is None else query_of(environ),
                method=request.method,
            )
        except VerifierError as error:
            raise self._refused(error) from None
        _caller.set(principal)

    def authenticate_token(self, token_string: str) -> Principal:
        """Step 2: who that was."""
        principal = _caller.get()
        _caller.set(None)
        if principal is None:
            raise self._refused(MissingCredentials())
        return principal

    def validate_token(self, token: Principal, scopes: list[str] | None, request: object) -> None:
        """Step 3: the scopes.  As Authlib has it, one text of a list is enough."""
        lacking = [refusal(token, [scope]) for scope in scopes or ()]
        if lacking and None not in lacking:
            raise self._refused(lacking[0])

    def _refused(self, error: VerifierError | None) -> Refused:
        reason = self._gate.own(error or MissingCredentials())
        is_missing = isinstance(reason, MissingCredentials)
        return RefusedWithoutCredentials(reason) if is_missing else Refused(reason)


class CoatcheckProtector:
    """Put before ResourceProtector, of Flask or of Django: credentials count in every place.

    It takes a CoatcheckBearerValidator and no other one.
    """

    get_token_validator: Any

    def parse_request_authorization(self, request: object) -> tuple[object, str]:
        """Which validator is asked about a request.  It looks for the credential itself."""
        return self.get_token_validator(CoatcheckBearerValidator.TOKEN_TYPE), ""

    def raise_error_response(self, error: OAuth2Error) -> None:
        """Flask alone asks for this; its own would sort the members of the body."""
        # Users of Django have no Flask.
        from authlib.integrations.flask_oauth2.errors import raise_http_exception  # noqa: PLC0415

        if isinstance(error, Refused):
            raise_http_exception(error.status_code, error.reason.body, error.get_headers())
        super().raise_error_response(error)  # type: ignore[misc]


def environ_of(request: Any) -> dict[str, Any] | None:
    """What the server made of a request.

    Authlib hands it on as `payload`, of Flask and of Django, and documents neither.
    """
    sent = getattr(request.payload, "_request", None)
    environ: dict[str, Any] | None = getattr(sent, "environ", getattr(sent, "META", None))
    return environ
