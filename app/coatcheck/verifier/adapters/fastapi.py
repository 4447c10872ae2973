"""FastAPI: one object that is a route's dependency and its entry in the OpenAPI document.

    auth = Coatcheck("https://auth.example.com", audience="https://api.example.com")
    app = FastAPI(lifespan=auth.lifespan)  # optional

    @app.get("/widgets")
    async def widgets(who: Annotated[Principal, Security(auth, scopes=["widgets:read"])]): ...

It stands where it is named, and all other routes are open; `FastAPI(dependencies=[…])` names it
for all of them.  What is no route, as an unknown path or the documentation's pages, stays open.
Scopes of nested dependencies add up.

An API key in the query counts only behind `app.add_middleware(allow_api_key_query)`; it is taken
out of sight either way.

A dependency can only raise, and FastAPI's own errors have another body.  So the handler for
VerifierError is added to the application's when the first request comes; it also answers what
endpoints raise by `principal.require(…)`.  A handler of the application's own wins.

Source: OpenAPI 3.1.1 §4.8.27 (security scheme), RFC 9728 §3, RFC 6455 §7.4.1 (1008).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from fastapi import FastAPI, HTTPException, WebSocketException
from fastapi.openapi.models import OAuth2, OAuthFlowClientCredentials, OAuthFlows
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.websockets import WebSocket

from coatcheck.verifier import Principal, Verifier, VerifierError
from coatcheck.verifier.adapters import asgi
from coatcheck.verifier.adapters.gate import Gate, settings_of
from coatcheck.verifier.errors import Protection

_PROTECTION: Final = "coatcheck.protection"
#: Where Starlette keeps the handlers of the application that is being asked, by exception.
_HANDLERS: Final = "starlette.exception_handlers"


class Coatcheck(SecurityBase):
    """Who is calling, as a dependency: `Security(auth, scopes=[…])` or `Depends(auth)`.

    Args:
        issuer, audience: as for Verifier, as are all other settings.
        verifier: in place of its settings.
        scheme_name: what the OpenAPI document calls it; two of them need two names.
        description: what the OpenAPI document says of it.
        scopes: what the OpenAPI document says of scopes, by scope.  Each route names its own.
        verifier_settings: as for Verifier.
    """

    def __init__(
        self,
        issuer: str | None = None,
        audience: str | Sequence[str] | None = None,
        *,
        verifier: Verifier | None = None,
        scheme_name: str = "Coatcheck",
        description: str | None = None,
        scopes: Mapping[str, str] | None = None,
        **verifier_settings: Any,
    ) -> None:
        settings = settings_of(issuer, audience, verifier_settings)
        self._settings = None if verifier is not None else settings
        self.gate = Gate(verifier, (), settings)
        self.scheme_name = scheme_name
        token_url = f"{self.gate.verifier.issuer.rstrip('/')}/oauth/token"
        flow = OAuthFlowClientCredentials(tokenUrl=token_url, scopes=dict(scopes or {}))
        self.model = OAuth2(flows=OAuthFlows(clientCredentials=flow), description=description)

    async def __call__(self, connection: HTTPConnection, scopes: SecurityScopes) -> Principal:
        scope, verifier = connection.scope, self.gate.verifier
        scope[_PROTECTION] = verifier.protection
        handlers = scope.get(_HANDLERS)
        if handlers is not None:
            handlers[0].setdefault(VerifierError, refuse)
        try:
            return await verifier.authenticate_async(
                scope["headers"],
                scopes.scopes,
                client_address=asgi.peer_of(scope),
                query=asgi.query_of(scope),
                method=scope.get("method", "GET"),
            )
        except VerifierError as error:
            if handlers is not None:
                raise
            if scope["type"] == "websocket":
                raise WebSocketException(asgi.POLICY_VIOLATION, error.code) from None
            raise HTTPException(error.status, error.detail, error.headers) from None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Ask the issuer before the first caller comes, and serve the RFC 9728 document.

        An issuer that does not answer keeps nothing from starting.  At the end the verifier is
        closed, if it was made here; another one stands ready, should the application start again.
        """
        path = self.gate.metadata_path
        if path is not None and not any(getattr(route, "path", "") == path for route in app.routes):
            # In front: a route for all paths, or a mount at the root, would hide it.
            app.router.routes.insert(0, Route(path, self._metadata, include_in_schema=False))
        with suppress(VerifierError):
            await asyncio.to_thread(self.gate.verifier.warm)
        try:
            yield
        finally:
            if self._settings is not None:
                self.gate.verifier.close()
                self.gate = Gate(None, (), self._settings)

    async def _metadata(self, _: Request) -> Response:
        return Response(self.gate.metadata(), media_type="application/json")


async def refuse(connection: Request | WebSocket, error: VerifierError) -> Response | None:
    """Answer a refusal: status, challenge and RFC 9457 body, or the end of a WebSocket."""
    if error.protection == VerifierError.protection:
        error.protection = connection.scope.get(_PROTECTION, Protection())
    if isinstance(connection, WebSocket):
        await connection.close(asgi.POLICY_VIOLATION, error.code)
        return None
    return Response(error.body, error.status, error.headers)
