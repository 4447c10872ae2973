"""The token exchange grant: a resource server hands in its caller's API key, a token comes out.

It is the token that the caller would have got itself, so that raw keys and tokens mean the same
everywhere.  This module only translates; `server.issue` decides what an API key may have.

Source: RFC 8693 §2.1 (request), §2.2.1 (success), §2.2.2 (error).
"""

from typing import Final

from authlib.oauth2.rfc6749.grants import BaseGrant, TokenEndpointMixin

from coatcheck import apikey, client_address
from coatcheck.restrictions import Refusal
from coatcheck.scope import RESOURCE_SERVER, Grant
from coatcheck.server.issue.exchange import Subject
from coatcheck.server.oauth.errors import OAuthError, bad_subject
from coatcheck.server.oauth.wire import Answer

GRANT_TYPE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"  # RFC 8693 §2.1
ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - §3, a name
#: Where the caller's API key was: in a header, or in the URL.
PLACES: Final = ("header", "query")
#: RFC 7239 §6.2: what is written where an address is not known.
UNKNOWN: Final = "unknown"


def api_key_token_type(issuer: str) -> str:
    """What `subject_token_type` has to be here."""
    return f"{issuer}/token-types/api-key"


class TokenExchange(BaseGrant, TokenEndpointMixin):
    GRANT_TYPE = GRANT_TYPE

    def validate_token_request(self) -> None:
        client = self.server.authenticate(self.request)
        if not client.scopes.covers(Grant(RESOURCE_SERVER)):
            raise OAuthError(
                "unauthorized_client",
                "unauthorized_client",
                f"Token exchange is for resource servers: give this API key the scope"
                f" {RESOURCE_SERVER}.",
            )
        self.request.client = client
        form = self.request.form
        wanted = api_key_token_type(self.server.issuer.url)
        if _required(form, "subject_token_type") != wanted:
            raise OAuthError.invalid_request(f"subject_token_type is {wanted}.")
        if form.get("requested_token_type", ACCESS_TOKEN) != ACCESS_TOKEN:
            raise OAuthError.invalid_request(f"requested_token_type is {ACCESS_TOKEN}, or absent.")
        if form.get("presented_in", "header") not in PLACES:
            raise OAuthError.invalid_request("presented_in is header or query.")
        address = _required(form, "client_address")
        if address != UNKNOWN and client_address.parse(address) is None:
            raise OAuthError.invalid_request("client_address is an IP address, or unknown.")
        self.subject = Subject(
            secret=_required(form, "subject_token"), presented_in=form.get("presented_in", "header")
        )

    def create_token_response(self) -> Answer:
        try:
            if not self.subject.secret.startswith(self.server.issuer.catalog.foreign_prefixes):
                # What an older system made has a form of its own; all others have a checksum.
                apikey.parse(self.subject.secret)
            issued = self.server.issue_for(self.request, self.subject)
        except (apikey.MalformedApiKey, Refusal) as refusal:
            # Not invalid_grant, and no failed authentication: §2.2.2 asks for invalid_request.
            raise bad_subject(refusal) from None
        body = {
            "access_token": issued.token.decode(),
            "issued_token_type": ACCESS_TOKEN,
            "token_type": "Bearer",
            "expires_in": issued.expires_in_s,
            "scope": issued.scope.decode(),
        }
        return 200, body, ()


def _required(form: dict[str, str], name: str) -> str:
    if name not in form:
        raise OAuthError.invalid_request(f"{name} is missing.")
    return form[name]
