"""Authlib's server core behind our own requests and answers.

The core is synchronous and framework-neutral: everything that has to be awaited was awaited
before, and lies in the request.  What it would decide on its own is overridden here: one client
authentication method, no scope check of its own, our error table, our headers.
"""

import logging
from collections.abc import Sequence
from typing import Any, Final

from authlib.oauth2.rfc6749 import AuthorizationServer, OAuth2Request
from authlib.oauth2.rfc6749.endpoint import Endpoint
from authlib.oauth2.rfc6749.errors import OAuth2Error, UnsupportedGrantTypeError
from authlib.oauth2.rfc6749.grants import BaseGrant

from coatcheck.client_address import is_in
from coatcheck.restrictions import Reason, Refusal
from coatcheck.server.issue.exchange import CONNECTOR, Asked, Issuer, Subject
from coatcheck.server.issue.inspect import OwnToken
from coatcheck.server.issue.mint import Issued
from coatcheck.server.oauth import errors
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.grants import GRANTS
from coatcheck.server.oauth.wire import FormRequest, Mechanism, Reply, json_reply
from coatcheck.server.store import ApiKeyRecord, Found

# Authlib writes whole tokens at DEBUG.
logging.getLogger("authlib").setLevel(logging.INFO)

_DOTS_OF_A_JWT: Final = 2


class BridgeRequest(OAuth2Request):
    """One request with what was looked up for it.

    Attributes:
        http: the request as it was read.
        found: the answer to the look-up of its secrets.
        presented_token: what introspection or revocation is asked about, if it is good.
        issued: what a grant issued, for the count.
        is_raw_key_use: whether its owner sent the API key to a resource server.
    """

    def __init__(
        self, http: FormRequest, found: Found, presented_token: OwnToken | None = None
    ) -> None:
        # Not Authlib's own: it wants a URL, and refuses plain http behind a TLS proxy.
        self.http = http
        self.found = found
        self.presented_token = presented_token
        self.client: ApiKeyRecord | None = None
        self.issued: Issued | None = None
        self.is_raw_key_use = False

    @property
    def form(self) -> dict[str, str]:
        return self.http.form


class Bridge(AuthorizationServer):
    """The authorization server, as Authlib calls it."""

    def __init__(self, issuer: Issuer, endpoints: Sequence[Endpoint] = ()) -> None:
        super().__init__()
        self.issuer = issuer
        self._grants = {grant.GRANT_TYPE: grant for grant in GRANTS}
        for endpoint in endpoints:
            self.register_endpoint(endpoint)

    @property
    def grant_types(self) -> list[str]:
        return list(self._grants)

    def authenticate(self, request: BridgeRequest) -> ApiKeyRecord:
        """The caller, by its presented secret; Authlib's client is its record.

        Raises:
            OAuthError: nothing usable was sent.
            Refusal: the API key is unknown or may not be used, or not from here, or in a URL only.
        """
        credential = request.http.credential
        if credential.secret is None or credential.digest is None:
            if credential.mechanism is Mechanism.NONE:
                raise errors.from_row(errors.MISSING_CREDENTIAL)
            raise errors.from_row(errors.NO_API_KEY)
        try:
            record = self.issuer.recognize(
                request.found, credential.digest, credential.client_id, request.http.now
            )
        except Refusal:
            if credential.secret.count(".") == _DOTS_OF_A_JWT:
                raise errors.from_row(errors.NO_API_KEY) from None
            raise
        if record.kind == CONNECTOR:
            raise Refusal(Reason.ONLY_IN_QUERY)
        if record.networks is not None and not is_in(str(request.http.address), record.networks):
            raise Refusal(Reason.IP_NOT_ALLOWED)
        return record

    def issue(self, request: BridgeRequest) -> Issued:
        """A token for the authenticated caller of this request.  Raises as `Issuer.issue`."""
        assert request.client is not None  # noqa: S101 - grants authenticate first
        address = request.http.address
        # As text only where somebody looks at it.
        where = None if request.client.networks is None or address is None else str(address)
        asked = Asked(request.http.audiences, request.form.get("scope"), where)
        return self.issuer.issue(
            request.client, asked, now=request.http.now, as_of=request.found.as_of
        )

    def issue_for(self, request: BridgeRequest, subject: Subject) -> Issued:
        """A token for the caller whose API key this authenticated resource server hands in."""
        asked = Asked(
            request.http.audiences,
            request.form.get("scope"),
            request.form["client_address"],
        )
        assert request.client is not None  # noqa: S101 - grants authenticate first
        issued = self.issuer.issue_for(
            request.client, subject, request.found, asked, now=request.http.now
        )
        request.issued, request.is_raw_key_use = issued, True
        return issued

    # --- what Authlib calls

    def authenticate_client(
        self, request: BridgeRequest, methods: object, endpoint: str = "token"
    ) -> ApiKeyRecord:
        # There is one method, so there is nothing to choose from.
        return self.authenticate(request)

    def get_token_grant(self, request: BridgeRequest) -> BaseGrant:
        grant_type = request.form.get("grant_type", "")
        grant = self._grants.get(grant_type)
        if grant is None:
            raise UnsupportedGrantTypeError(grant_type)
        return grant(request, self)

    def query_client(self, client_id: str) -> None:
        return None

    def save_token(self, token: object, request: object) -> None:
        return

    def send_signal(self, name: str, *args: object, **kwargs: object) -> None:
        return

    def validate_requested_scope(self, scope: str | None) -> None:
        # The API key decides, in `issue`.
        return

    def create_oauth2_request(self, request: BridgeRequest) -> BridgeRequest:
        return request

    def handle_response(self, status: int, body: Any, headers: object) -> Reply:
        return json_reply(status, body)

    def handle_error_response(self, request: BridgeRequest, error: OAuth2Error) -> Reply:
        return self.refused(error, request.http.credential.mechanism)

    # --- errors

    def refused(
        self, error: OAuth2Error | Refusal, mechanism: Mechanism, *, always_challenge: bool = False
    ) -> Reply:
        """The answer to a request that failed.

        A refused body credential is 400 without a challenge: RFC 6749 §5.2 allows it, and
        clients that see a challenge hide our sentence behind one of their own.

        Args:
            always_challenge: answer 401 with a challenge however the credential came, as the
                endpoints for resource servers do.
        """
        if isinstance(error, Refusal):
            error = errors.from_refusal(error)
        if isinstance(error, UnsupportedGrantTypeError):
            error = self._unsupported_grant_type(error)
        if not isinstance(error, OAuthError):
            error = OAuthError.invalid_request("A required parameter is missing.")
        body = {"error": error.error, "error_description": error.text, "code": error.code}
        status, headers = error.status_code, list(error.extra_headers)
        scheme = mechanism.challenge_scheme or ("Basic" if always_challenge else None)
        failed = error.error == "invalid_client" or (
            always_challenge and error.error == "unauthorized_client"
        )
        if failed and scheme is not None:
            status = 401
            headers.append(("WWW-Authenticate", self._challenge(scheme, error)))
        return json_reply(status, body, headers)._replace(error=error.error, code=error.code)

    def _challenge(self, scheme: str, error: OAuthError) -> str:
        # The description is in the character set that a quoted string takes as it is.
        return (
            f'{scheme} realm="{self.issuer.url}", error="{error.error}",'
            f' error_description="{error.text}"'
        )

    def _unsupported_grant_type(self, error: UnsupportedGrantTypeError) -> OAuthError:
        if not error.grant_type:
            return OAuthError.invalid_request("grant_type is missing: send client_credentials.")
        known = " ".join(self.grant_types)
        return OAuthError(
            "unsupported_grant_type", "unsupported_grant_type", f"Supported here: {known}."
        )
