"""Any ASGI application: a wrapper that lets nobody in unseen.

    app = CoatcheckASGI(app, issuer=…, audience=…, public=["/health"])

    async def app(scope, receive, send): ...  # scope["coatcheck"] is the Principal

It fails closed: a path that is not listed as public needs a credential, also one that leads
nowhere.  What answers CORS preflights belongs outside of it, because they carry no credential.

The client address is the peer of the connection.  Behind a proxy that is the proxy, unless it is
one of the verifier's `trusted_proxies`.

An API key in the query is taken out of `scope["query_string"]` before anybody behind this
wrapper, or the server's access log, sees it; the answer is kept out of shared caches.

Source: ASGI HTTP and WebSocket message format 2.5; RFC 6750 §3 (challenges), RFC 6455 §4.1 (an
opening handshake is a GET) and §7.4.1 (1008).
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, Final

from coatcheck.verifier import Principal, Verifier, VerifierError
from coatcheck.verifier.adapters.gate import QUERY, Gate, SentQuery, kept_private, well_formed
from coatcheck.verifier.presented import without_api_key, without_credentials

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PRINCIPAL: Final = "coatcheck"
POLICY_VIOLATION: Final = 1008

#: Messages after which no other answer can be given.
_ENDINGS: Final = frozenset(
    ("http.response.start", "websocket.http.response.start", "websocket.close")
)
#: Messages that carry the headers of an answer.
_STARTS: Final = frozenset(("http.response.start", "websocket.http.response.start"))


class CoatcheckASGI:
    """Every request and WebSocket needs a valid credential, unless its path is public.

    `scope["coatcheck"]` is the Principal; None on a public path.  What it refuses by
    `principal.require(…)` is answered like any other refusal.

    Args:
        app: what is protected.
        verifier: a Verifier; or leave it out and pass its settings by name.
        public: paths that are open to everybody, compared as a whole; `/static/*` opens what is
            below `/static/`.
        scopes: what every request needs.
        verifier_settings: as for Verifier.
    """

    def __init__(
        self,
        app: App,
        /,
        verifier: Verifier | None = None,
        *,
        public: Collection[str] = (),
        scopes: str = "",
        **verifier_settings: Any,
    ) -> None:
        self._app = app
        self.gate = Gate(verifier, public, verifier_settings)
        self._scopes = well_formed(scopes.split())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            # Unknown means no: nothing tells where a credential would be.
            raise RuntimeError("neither HTTP nor WebSocket: cannot be authenticated")
        method, path = scope.get("method", "GET"), scope["path"]
        answer = Answer(scope, receive, send)
        if scope["type"] == "http" and self.gate.asks_for_metadata(method, path):
            await answer.write(200, {"Content-Type": "application/json"}, self.gate.metadata())
            return
        try:
            is_public = self.gate.is_public(path)
            self.admit(scope, None if is_public else await self._authenticate(scope, answer))
            await self._app(scope, receive, answer.send)
        except VerifierError as error:
            # Also what the application raised by `principal.require(…)`.
            if answer.has_started:
                raise
            await answer.refuse(self.gate.own(error))

    def admit(self, scope: Scope, principal: Principal | None) -> None:
        """Tell the application who is calling."""
        scope[PRINCIPAL] = principal

    async def _authenticate(self, scope: Scope, answer: "Answer") -> Principal:
        # Before anything can fail: the refusal is logged, too.
        query = take_query(scope)
        answer.is_private = query != scope.get("query_string", b"")
        return await self.gate.verifier.authenticate_async(
            scope["headers"],
            self._scopes,
            client_address=peer_of(scope),
            query=query,
            method=scope.get("method", "GET"),
        )


def allow_api_key_query(app: App) -> App:
    """Let connector keys in the URL reach an application that authenticates by itself.

    Only an adapter finds them there: nobody else behind this wrapper, and no access log, sees
    the query string with the key in it.  Answers are kept out of shared caches.
    """

    async def hiding(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            answer = Answer(scope, receive, send)
            answer.is_private = take_query(scope) != scope.get("query_string", b"")
            send = answer.send
        await app(scope, receive, send)

    return hiding


def take_query(scope: Scope) -> bytes:
    """The query string as it was sent; whoever looks later finds no API key in it."""
    if QUERY not in scope:
        scope[QUERY] = SentQuery(scope.get("query_string", b""))
        scope["query_string"] = without_credentials(scope[QUERY].text)
    sent: SentQuery = scope[QUERY]
    return sent.text


def query_of(scope: Scope) -> bytes:
    """The query string for an adapter that does not stand before the whole application.

    An API key in it counts only if `allow_api_key_query` stands there.  It is taken out of sight
    either way.
    """
    if QUERY in scope:
        return take_query(scope)
    query = scope.get("query_string", b"")
    scope["query_string"] = without_credentials(query)
    return without_api_key(query)


def peer_of(scope: Scope) -> str | None:
    """The address at the other end of the connection."""
    peer = scope.get("client")
    return None if peer is None else peer[0]


class Answer:
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
            told = [(_text(name), _text(value)) for name, value in message.get("headers", ())]
            message = {**message, "headers": _bytes(kept_private(told))}
        await self._send(message)

    async def write(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """The whole answer to an HTTP request."""
        length = {"Content-Length": str(len(body))}
        pairs = _bytes((headers | length).items())
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        is_head = self._scope["method"] == "HEAD"
        await self.send({"type": "http.response.body", "body": b"" if is_head else body})

    async def refuse(self, error: VerifierError) -> None:
        """Say why, in the form of the request."""
        if self._scope["type"] == "websocket":
            closed = {"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.code}
            await self.send(closed)
        else:
            await self.write(error.status, error.headers, error.body)


def _text(value: bytes) -> str:
    return value.decode("latin-1")


def _bytes(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """ASGI wants names in lower case."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
