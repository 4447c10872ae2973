"""MCP servers: a token verifier for the MCP SDK, and a wrapper that shows it the whole request.

    verifier = CoatcheckTokenVerifier("https://auth.example.com", audience=URL)
    mcp = MCPServer("Widgets", token_verifier=verifier, auth=AuthSettings(…))
    app = allow_api_key_query(mcp.streamable_http_app())

The SDK looks at `Authorization: Bearer` alone, hands its verifier the token alone, and answers
every refusal with the same 401.  The wrapper keeps the request at hand while the SDK asks, so
that the verifier sees every header, the query, the method and the caller's address; and it
answers a refusal in the verifier's own words.

Without the wrapper the verifier knows nothing but a token, and refuses what it cannot judge: a
connector key, and whatever is bound to addresses or to a role.

Source: RFC 9728 §5.1 and MCP 2026-07-28, authorization (challenge, `scope`); RFC 8707 §2
(`resource`); RFC 8615 §3 (what is well known).
"""

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Self

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from mcp.server.auth.provider import AccessToken
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import PrivateAttr

from coatcheck.verifier import MissingCredentials, Principal, Verifier, VerifierError
from coatcheck.verifier.adapters import asgi
from coatcheck.verifier.adapters.gate import Gate, settings_of

#: Handed on where the credential is no bearer token, so that the SDK asks its verifier.
_ELSEWHERE: Final = "elsewhere"
_BEARER: Final = "bearer "

_log = logging.getLogger("coatcheck.mcp")


@dataclass(slots=True, eq=False)
class _Asked:
    """A request as it came, while it is not known who sent it.

    Attributes:
        handed_on: what the SDK takes for the token.
        scopes: what the SDK will ask for.
        error: why it was refused.
    """

    headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    handed_on: str = field(repr=False)
    query: bytes = field(default=b"", repr=False)
    client_address: str | None = None
    method: str | None = None
    scopes: tuple[str, ...] = ()
    error: VerifierError | None = None


_ASKED: Final[ContextVar[_Asked | None]] = ContextVar("coatcheck.mcp", default=None)


class VerifiedToken(AccessToken):
    """What the SDK keeps of a caller.  `token` is empty for an API key: no tool should hold it."""

    _principal: Principal = PrivateAttr()

    @classmethod
    def of(cls, principal: Principal, token: str) -> Self:
        made = cls(
            token=token if principal.method == "jwt" else "",
            client_id=principal.client_id,
            scopes=[str(grant) for grant in principal.scopes],
            expires_at=principal.expires_at,
            # RFC 8707: the SDK compares it with its own URL.
            resource=principal.audience,
            subject=principal.key_id,
            claims=dict(principal.claims),
        )
        made._principal = principal
        return made

    @property
    def principal(self) -> Principal:
        """Who is calling, with all that the verifier knows of them."""
        return self._principal


class CoatcheckTokenVerifier:
    """The `token_verifier` of an MCP server.

    Args:
        issuer: as for Verifier, as are all other settings.
        audience: the URL of the MCP server; the same as its `resource_server_url`.
        verifier: in place of its settings.
        verifier_settings: as for Verifier.
    """

    def __init__(
        self,
        issuer: str | None = None,
        audience: str | Sequence[str] | None = None,
        *,
        verifier: Verifier | None = None,
        **verifier_settings: Any,
    ) -> None:
        settings = settings_of(issuer, audience, verifier_settings)
        self.verifier = Gate(verifier, (), settings).verifier

    async def verify_token(self, token: str) -> VerifiedToken | None:
        """Who sent this token; None: it is refused, and the log says why."""
        asked = _ASKED.get()
        if asked is None or asked.handed_on != token:
            # No wrapper; or a tool that asks about some other token than its caller's.
            asked = _Asked([(b"authorization", f"Bearer {token}".encode())], token)
        try:
            principal = await self.verifier.authenticate_async(
                asked.headers,
                asked.scopes,
                client_address=asked.client_address,
                query=asked.query,
                method=asked.method,
            )
        except VerifierError as error:
            asked.error = error
            if not isinstance(error, MissingCredentials):
                _log.warning("refused: %s", error.code)
            return None
        return VerifiedToken.of(principal, token)


def get_principal(*permissions: str, resource: str | None = None) -> Principal:
    """Who calls the tool that asks, if they hold all these permissions.

    Args:
        permissions, resource: as for Principal.require.

    Raises:
        ToolError: they do not, or nobody was let in by CoatcheckTokenVerifier; the tool's result
            says what is missing.  Of any other exception the SDK says nothing to the caller.
    """
    token = get_access_token()
    try:
        if not isinstance(token, VerifiedToken):
            raise MissingCredentials
        token.principal.require(*permissions, resource=resource)
    except VerifierError as error:
        needed = f" Needed: {error.scope}." if error.scope else ""
        raise ToolError(f"{error.detail}{needed}") from None
    return token.principal


def allow_api_key_query(app: asgi.App) -> asgi.App:
    """Show CoatcheckTokenVerifier the whole request, connector keys in the URL included.

    Nobody behind this wrapper, and no access log, sees the query string with the key in it.
    Refusals are answered in full, and answers to a URL with a key are kept out of shared caches.
    """
    scopes = _scopes_of(app)
    hiding = asgi.allow_api_key_query(app)

    async def asking(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        # RFC 8615: what is well known is for everybody, and nobody waits for the issuer there.
        if scope["type"] != "http" or scope["path"].startswith("/.well-known/"):
            await hiding(scope, receive, send)
            return
        answer = asgi.Answer(scope, receive, send)
        query = asgi.take_query(scope)
        answer.is_private = query != scope.get("query_string", b"")
        asked = _handing_on(scope["headers"])
        asked.query, asked.scopes = query, scopes
        asked.client_address, asked.method = asgi.peer_of(scope), scope["method"]
        is_answered = False

        async def telling_why(message: asgi.Message) -> None:
            nonlocal is_answered
            if is_answered:
                return
            # The SDK's answer to None; another answer is of a route that asks for nobody.
            if message.get("status") == HTTPStatus.UNAUTHORIZED and asked.error is not None:
                is_answered = True
                await answer.refuse(asked.error)
            else:
                await answer.send(message)

        behind = {**scope, "headers": _with_bearer(asked)}
        token = _ASKED.set(asked)
        try:
            await app(behind, receive, telling_why)
        finally:
            _ASKED.reset(token)

    return asking


def _handing_on(headers: Sequence[tuple[bytes, bytes]]) -> _Asked:
    sent = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
    is_bearer = len(sent) == 1 and sent[0].lower().startswith(_BEARER)
    return _Asked(headers, sent[0][len(_BEARER) :] if is_bearer else _ELSEWHERE)


def _with_bearer(asked: _Asked) -> list[tuple[bytes, bytes]]:
    """The headers of which the SDK finds a token to ask about, whatever was sent."""
    others = [(name, value) for name, value in asked.headers if name != b"authorization"]
    return [*others, (b"authorization", f"Bearer {asked.handed_on}".encode("latin-1"))]


def _scopes_of(app: object) -> tuple[str, ...]:
    """What an MCP server was told to ask for, which its SDK tells nobody.

    The SDK compares whole scope-tokens, and its challenge does not name them.
    """
    return tuple(
        scope
        for route in getattr(app, "routes", ())
        if isinstance(endpoint := getattr(route, "endpoint", None), RequireAuthMiddleware)
        for scope in endpoint.required_scopes
    )
