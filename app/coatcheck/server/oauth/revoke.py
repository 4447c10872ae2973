"""POST /oauth/revoke: an API key ends a token of its own before its time.

What is recorded is the token's `jti`, read from its verified claims and never from its text: an
ECDSA signature has a second valid spelling.

Source: RFC 7009 §2 (request, response), §2.2.1 (errors).
"""

import asyncio

from authlib.oauth2.rfc7009 import RevocationEndpoint as AuthlibRevocation

from coatcheck import apikey
from coatcheck.server import logs
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.issue.inspect import OwnToken, OwnTokens
from coatcheck.server.oauth.bridge import BridgeRequest
from coatcheck.server.oauth.endpoint import Desk, FormEndpoint
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.wire import Answer, FormRequest, Reply
from coatcheck.server.store import ApiKeyRecord, Found, Store


class Revocation(AuthlibRevocation):
    """Authlib's endpoint over the change log."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def check_params(self, request: BridgeRequest, client: ApiKeyRecord) -> None:
        if "token" not in request.form:
            raise OAuthError.invalid_request("token is missing: send the token to revoke.")
        if apikey.looks_like_one(request.form["token"]):
            # 200 would let somebody believe that a leaked API key is dead now.
            raise OAuthError(
                "unsupported_token_type",
                "unsupported_token_type",
                "This endpoint revokes access tokens. Revoke an API key with coatcheck keys"
                " revoke and its id.",
            )

    def authenticate_token(self, request: BridgeRequest, client: ApiKeyRecord) -> OwnToken | None:
        self.check_params(request, client)
        token = request.presented_token
        # RFC 7009 §2.2: a token that is unknown, or somebody else's, needs no error; it stays.
        return token if token is not None and token.api_key_id == client.id else None

    def create_endpoint_response(self, request: BridgeRequest) -> Answer:
        client = self.authenticate_endpoint_client(request)
        token = self.authenticate_token(request, client)
        if token is not None:
            self.revoke_token(token, request)
        return 200, {}, ()

    def revoke_token(self, token: OwnToken, request: BridgeRequest) -> None:
        address = request.http.address
        actor = Actor(
            token.api_key_id, None if address is None else str(address), logs.request_id()
        )
        organization_id = str(token.claims["org_id"])
        with self._store.transaction() as tx:
            if not tx.has_narrowed(token.jti):
                tx.append(
                    [
                        Change(
                            What.TOKEN_REVOKED,
                            token.jti,
                            actor,
                            request.http.now,
                            organization_id,
                            wider=token.api_key_id,
                        )
                    ]
                )


class RevocationEndpoint(FormEndpoint):
    name = "revoke"
    always_challenge = True

    def __init__(self, desk: Desk, own_tokens: OwnTokens) -> None:
        super().__init__(desk)
        self._own_tokens = own_tokens

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        bridge = self.desk.bridge
        bridge.authenticate(BridgeRequest(request, found))
        token = self._own_tokens.read(request.form.get("token", ""), found.as_of, request.now)
        # The write waits for the disk: in a thread, so that others need not.
        reply: Reply = await asyncio.to_thread(
            bridge.create_endpoint_response,
            Revocation.ENDPOINT_NAME,
            BridgeRequest(request, found, token),
        )
        return reply
