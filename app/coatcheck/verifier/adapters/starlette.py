"""Starlette: a middleware that lets nobody in unseen, and `require_scopes`.

    app = Starlette(
        routes=[Route("/widgets", widgets)],
        middleware=[Middleware(CoatcheckMiddleware, issuer=…, audience=…, public=["/health"])],
    )

    @require_scopes("widgets:read")
    async def widgets(request): ...  # request.user is the Principal

A CORSMiddleware belongs outside of it, because a preflight carries no credential.  Everything
else is as in `adapters/asgi`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, ParamSpec

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.websockets import WebSocket

from coatcheck.verifier import Principal, VerifierError
from coatcheck.verifier.adapters import asgi
from coatcheck.verifier.adapters.gate import refusal, well_formed
from coatcheck.verifier.errors import Protection

_PROTECTION: Final = "coatcheck.protection"

P = ParamSpec("P")


class CoatcheckMiddleware(asgi.CoatcheckASGI):
    """Every request and WebSocket needs a valid credential, unless its path is public.

    `request.user` is the Principal and `request.auth.scopes` its scope-tokens, so that
    Starlette's own `@requires` works too (it compares whole tokens, and sends no challenge).

    Arguments are those of CoatcheckASGI.
    """

    def admit(self, scope: asgi.Scope, principal: Principal | None) -> None:
        super().admit(scope, principal)
        scope[_PROTECTION] = self.gate.verifier.protection
        if principal is None:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
        else:
            scope["user"] = principal
            scope["auth"] = AuthCredentials([str(grant) for grant in principal.scopes])


def require_scopes(*scopes: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """Let an endpoint be called only by who holds all these scopes; others get 403.

    The endpoint, a function or a method, has a parameter `request` or `websocket`.  On a public
    path nobody is signed in, and the answer is 401.

    Raises:
        MalformedScope: a text is no scope.
        TypeError: the endpoint has no such parameter.
    """
    needed = well_formed(scopes)

    def decorate(endpoint: Callable[P, Any]) -> Callable[P, Any]:
        name, place = _connection_parameter(endpoint)

        def refused(arguments: tuple[Any, ...], named: dict[str, Any]) -> VerifierError | None:
            connection: HTTPConnection = named[name] if name in named else arguments[place]
            error = refusal(connection.scope.get("user"), needed)
            if error is not None and error.protection == VerifierError.protection:
                error.protection = connection.scope.get(_PROTECTION, Protection())
            return error

        if name == "websocket":

            @functools.wraps(endpoint)
            async def of_websocket(*args: P.args, **kwargs: P.kwargs) -> Any:
                error = refused(args, kwargs)
                if error is None:
                    return await endpoint(*args, **kwargs)
                websocket: WebSocket = kwargs[name] if name in kwargs else args[place]  # type: ignore[assignment]
                return await websocket.close(asgi.POLICY_VIOLATION, error.code)

            return of_websocket

        if inspect.iscoroutinefunction(endpoint):

            @functools.wraps(endpoint)
            async def of_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                error = refused(args, kwargs)
                return await endpoint(*args, **kwargs) if error is None else problem(error)

            return of_coroutine

        @functools.wraps(endpoint)
        def of_function(*args: P.args, **kwargs: P.kwargs) -> Any:
            error = refused(args, kwargs)
            return endpoint(*args, **kwargs) if error is None else problem(error)

        return of_function

    return decorate


def problem(error: VerifierError) -> Response:
    """The answer to a refused request: status, challenge and RFC 9457 body."""
    return Response(error.body, error.status, error.headers)


def _connection_parameter(endpoint: Callable[..., Any]) -> tuple[str, int]:
    for place, name in enumerate(inspect.signature(endpoint).parameters):
        if name in ("request", "websocket"):
            return name, place
    raise TypeError("an endpoint needs a parameter named request or websocket")
