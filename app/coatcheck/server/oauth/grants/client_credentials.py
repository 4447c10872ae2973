"""The client credentials grant: an API key asks for a token for itself.

This module only translates.  `server.issue` decides what an API key may have.

Source: RFC 6749 §4.4, §5.1 (success).
"""

from typing import Any, Final

from authlib.oauth2.rfc6749 import grants

from coatcheck.server.oauth.wire import Answer

#: As JSON already: neither a JWT nor a scope can hold what JSON escapes (RFC 6749 §3.3).  The
#: scope is the set as it was asked: requests-oauthlib raises when it differs.
_ANSWER: Final = b'{"access_token":"%b","token_type":"Bearer","expires_in":%d,"scope":"%b"}'


class ClientCredentials(grants.ClientCredentialsGrant):
    def __init__(self, request: Any, server: Any) -> None:
        # Not Authlib's own: it makes room for hooks, and nobody hooks in here.
        self.request = request
        self.server = server

    def validate_token_request(self) -> None:
        # Authlib's own asks once more what was decided there, and logs.
        self.request.client = self.server.authenticate(self.request)

    def create_token_response(self) -> Answer:
        issued = self.server.issue(self.request)
        self.request.issued = issued
        return 200, _ANSWER % (issued.token, issued.expires_in_s, issued.scope), ()
