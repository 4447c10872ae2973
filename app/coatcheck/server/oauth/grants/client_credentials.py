"""The client credentials grant: an API key asks for a token for itself.

This module only translates.  `server.issue` decides what an API key may have.

Source: RFC 6749 §4.4, §5.1 (success).
"""

from authlib.oauth2.rfc6749 import grants

from coatcheck.server.oauth.wire import Answer


class ClientCredentials(grants.ClientCredentialsGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = ("api_key",)

    def create_token_response(self) -> Answer:
        issued = self.server.issue(self.request)
        self.request.issued = issued
        body = {
            "access_token": issued.token,
            "token_type": "Bearer",
            "expires_in": issued.expires_in_s,
            # The set as it was asked: requests-oauthlib raises when it differs.
            "scope": issued.scope,
        }
        return 200, body, ()
