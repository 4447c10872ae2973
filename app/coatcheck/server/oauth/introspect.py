"""POST /oauth/introspect: whether a token is good right now, for those it concerns.

An API key learns of its own tokens, a resource server's of tokens for its audiences.  Everybody
else, and every other text, gets `{"active": false}` and nothing more.

Source: RFC 7662 §2 (request, response), §4 (what to check and to whom to tell).
"""

from authlib.oauth2.rfc7662 import IntrospectionEndpoint as AuthlibIntrospection

from coatcheck.server.issue.inspect import OwnToken, OwnTokens, may_ask_about
from coatcheck.server.oauth.bridge import BridgeRequest
from coatcheck.server.oauth.endpoint import Desk, FormEndpoint
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.wire import Answer, FormRequest, Reply
from coatcheck.server.store import ApiKeyRecord, Found

#: RFC 7662 §2.2: what is told beside `active` and `token_type`, as the token says it.
_TOLD = (
    *("scope", "client_id", "exp", "iat", "sub", "aud", "iss", "jti", "org_id", "env", "as_of"),
    *("project_id", "roles", "cidrs", "models", "group", "must"),
)


class Introspection(AuthlibIntrospection):
    """Authlib's endpoint with our token, our permissions and no opinion on hints."""

    def check_params(self, request: BridgeRequest, client: ApiKeyRecord) -> None:
        # A token_type_hint that nobody knows is treated as absent (RFC 7662 §2.1).
        if "token" not in request.form:
            raise OAuthError.invalid_request("token is missing: send the token to look at.")

    def authenticate_token(self, request: BridgeRequest, client: ApiKeyRecord) -> OwnToken | None:
        self.check_params(request, client)
        token = request.presented_token
        return token if token is not None and may_ask_about(client, token) else None

    def create_endpoint_response(self, request: BridgeRequest) -> Answer:
        client = self.authenticate_endpoint_client(request)
        token = self.authenticate_token(request, client)
        if token is None:
            return 200, {"active": False}, ()
        told = {name: token.claims[name] for name in _TOLD if name in token.claims}
        return 200, {"active": True, "token_type": "Bearer"} | told, ()


class IntrospectionEndpoint(FormEndpoint):
    name = "introspect"
    always_challenge = True
    may_be_shed = True

    def __init__(self, desk: Desk, own_tokens: OwnTokens) -> None:
        super().__init__(desk)
        self._own_tokens = own_tokens

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        bridge = self.desk.bridge
        # Nothing is verified or read for somebody who is not allowed to ask.
        bridge.authenticate(BridgeRequest(request, found))
        token = self._own_tokens.read(request.form.get("token", ""), found.as_of, request.now)
        if token is not None and await self.desk.store.narrowed_since(token.subjects, token.as_of):
            token = None
        reply: Reply = bridge.create_endpoint_response(
            Introspection.ENDPOINT_NAME, BridgeRequest(request, found, token)
        )
        return reply
