"""Starlette (and FastAPI): a middleware that lets nobody in unseen, and `require_scopes`.

    app = Starlette(
        routes=[Route("/widgets", widgets)],
        middleware=[Middleware(CoatcheckMiddleware, issuer=…, audience=…, public=["/health"])],
    )

    @require_scopes("widgets:read")
    async def widgets(request): ...  # request.user is the Principal

It fails closed: a path that is not listed as public needs a credential, also one that leads
nowhere.  A CORSMiddleware belongs outside of it, because a preflight carries no credential.

The client address is the peer of the connection.  Behind a proxy that is the proxy, unless it is
one of the verifier's `trusted_proxies`.

An API key in the query is taken out of `scope["query_string"]` before anybody behind this
middleware, or the server's access log, sees it; the answer is kept out of shared caches.

Source: RFC 6750 §3 (challenges), RFC 9728 §3 (resource metadata), RFC 6455 §4.1 (an opening
handshake is a GET) and §7.4.1 (1008), RFC 9111 §5.2.2.7 (private).
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, ParamSpec
from urllib.parse import urlsplit

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from coatcheck.scope import Scopes
from coatcheck.verifier import MissingCredentials, Principal, Verifier, VerifierError
from coatcheck.verifier.errors import Protection
from coatcheck.verifier.presented import without_api_key

POLICY_VIOLATION: Final = 1008

#: Messages after which no other answer can be given.
_ENDINGS: Final = frozenset(
    ("http.response.start", "websocket.http.response.start", "websocket.close")
)
#: Messages that carry the headers of an answer.
_STARTS: Final = frozenset(("http.response.start", "websocket.http.response.start"))
_PROTECTION: Final = "coatcheck.protection"

P = ParamSpec("P")


class CoatcheckMiddleware:
    """Every request and WebSocket needs a valid credential, unless its path is public.

    `request.user` is the Principal and `request.auth.scopes` its scope-tokens, so that
    Starlette's own `@requires` works too (it compares whole tokens, and sends no challenge).

    Args:
        app: what is protected.
        verifier: a Verifier; or leave it out and pass its settings by name.
        public: paths that are open to everybody, compared as a whole.
        verifier_settings: as for Verifier.
    """

    def __init__(
        self,
        app: ASGIApp,
        /,
        verifier: Verifier | None = None,
        *,
        public: Collection[str] = (),
        **verifier_settings: Any,
    ) -> None:
        if isinstance(public, str):
            raise ValueError("public: several paths, as a list")  # noqa: TRY004
        if verifier is not None and verifier_settings:
            raise ValueError("pass a verifier or the settings of one, not both")
        self._app = app
        self._verifier = Verifier(**verifier_settings) if verifier is None else verifier
        self._public = frozenset(public)
        url = self._verifier.resource_metadata_url
        self._metadata_path = None if url is None else urlsplit(url).path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            # Unknown means no: nothing tells where a credential would be.
            raise RuntimeError("neither HTTP nor WebSocket: cannot be authenticated")
        if self._asks_for_metadata(scope):
            metadata = JSONResponse(self._verifier.protected_resource_metadata())
            await metadata(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        try:
            await self._authenticate(scope, answer)
            await self._app(scope, receive, answer.send)
        except VerifierError as error:
            # Also what the application raised by `request.user.require(…)`.
            if answer.has_started:
                raise
            if error.protection == VerifierError.protection:
                error.protection = self._verifier.protection
            await answer.refuse(error)

    def _asks_for_metadata(self, scope: Scope) -> bool:
        return (
            scope["path"] == self._metadata_path
            and scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
        )

    async def _authenticate(self, scope: Scope, answer: "_Answer") -> None:
        scope[_PROTECTION] = self._verifier.protection
        if scope["path"] in self._public:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
            return
        peer, query = scope.get("client"), scope.get("query_string", b"")
        if query:
            # Before anything can fail: the refusal is logged, too.
            scope["query_string"] = without_api_key(query)
            answer.is_private = scope["query_string"] != query
        principal = await self._verifier.authenticate_async(
            scope["headers"],
            client_address=None if peer is None else peer[0],
            query=query,
            method=scope.get("method", "GET"),
        )
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
    for scope in scopes:
        Scopes.parse(scope)

    def decorate(endpoint: Callable[P, Any]) -> Callable[P, Any]:
        name, place = _connection_parameter(endpoint)

        def connection(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return named[name] if name in named else arguments[place]

        if name == "websocket":

            @functools.wraps(endpoint)
            async def of_websocket(*args: P.args, **kwargs: P.kwargs) -> Any:
                websocket: WebSocket = connection(args, kwargs)
                error = _refusal(websocket, scopes)
                if error is None:
                    return await endpoint(*args, **kwargs)
                return await websocket.close(POLICY_VIOLATION, error.code)

            return of_websocket

        if inspect.iscoroutinefunction(endpoint):

            @functools.wraps(endpoint)
            async def of_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                error = _refusal(connection(args, kwargs), scopes)
                return await endpoint(*args, **kwargs) if error is None else problem(error)

            return of_coroutine

        @functools.wraps(endpoint)
        def of_function(*args: P.args, **kwargs: P.kwargs) -> Any:
            error = _refusal(connection(args, kwargs), scopes)
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


def _refusal(connection: HTTPConnection, scopes: tuple[str, ...]) -> VerifierError | None:
    user = connection.scope.get("user")
    if not isinstance(user, Principal):
        error: VerifierError = MissingCredentials()
        error.protection = connection.scope.get(_PROTECTION, Protection())
        return error
    try:
        user.require(*(token for scope in scopes for token in scope.split()))
    except VerifierError as refused:
        return refused
    return None


class _Answer:
    """The answer to one request.

    Attributes:
        has_started: it can be no other one any more.
        is_private: its URL held an API key.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.has_started = False
        self.is_private = False

    async def send(self, message: Message) -> None:
        # An accepted WebSocket can still be closed with a code.
        if message["type"] in _ENDINGS:
            self.has_started = True
        if self.is_private and message["type"] in _STARTS:
            message = {**message, "headers": _kept_private(message.get("headers", ()))}
        await self._send(message)

    async def refuse(self, error: VerifierError) -> None:
        if self._scope["type"] == "websocket":
            await self.send(
                {"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.code}
            )
        else:
            await problem(error)(self._scope, self._receive, self.send)


def _kept_private(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an answer whose URL held an API key.

    No shared cache keeps the answer under that URL, and no page hands the URL on.  Where nothing
    may be stored at all, it stays so.
    """
    kept = [(name, value) for name, value in headers if name.lower() != b"referrer-policy"]
    cached = [value.lower() for name, value in kept if name.lower() == b"cache-control"]
    if not any(b"no-store" in value for value in cached):
        kept = [(name, value) for name, value in kept if name.lower() != b"cache-control"]
        kept.append((b"cache-control", b"private"))
    return [*kept, (b"referrer-policy", b"no-referrer")]
