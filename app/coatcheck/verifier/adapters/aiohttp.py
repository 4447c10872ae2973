"""aiohttp: a middleware that lets nobody in unseen, and `require_scopes`.

    app = web.Application(
        middlewares=[coatcheck_middleware(issuer=…, audience=…, public=["/health"])]
    )

    @require_scopes("widgets:read")
    async def widgets(request): ...  # request["coatcheck"] is the Principal

It fails closed: a path that is not listed as public needs a credential, also one that leads
nowhere.  It is the first of the application's middlewares, but what answers CORS preflights
stands before it, because they carry no credential.

An API key in the query is taken out of the request before anybody behind this middleware sees
it; the answer is kept out of shared caches.  aiohttp has no way to change a request, and its
access log reads the one that came: so `_hide` changes what aiohttp keeps to itself.  Should a
later aiohttp name that differently, requests with an API key in the URL are answered with 500.

Source: RFC 6750 §3 (challenges), RFC 9728 §3 (resource metadata).
"""

import functools
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, ParamSpec, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from yarl import URL

from coatcheck.verifier import Verifier, VerifierError
from coatcheck.verifier.adapters.gate import (
    QUERY,
    Gate,
    SentQuery,
    kept_private,
    refusal,
    well_formed,
)
from coatcheck.verifier.presented import without_credentials

PRINCIPAL: Final = "coatcheck"

#: What a request works out from its URL once, and remembers.
_OF_THE_URL: Final = ("message", "path_qs", "query", "query_string", "raw_path", "rel_url", "url")

P = ParamSpec("P")
Answer = TypeVar("Answer", bound=web.StreamResponse)


def coatcheck_middleware(
    verifier: Verifier | None = None,
    *,
    public: Collection[str] = (),
    scopes: str = "",
    **verifier_settings: Any,
) -> Middleware:
    """Every request needs a valid credential, unless its path is public.

    `request["coatcheck"]` is the Principal; None on a public path.  What it refuses by
    `principal.require(…)` is answered like any other refusal, before the answer has begun.

    Args:
        verifier: a Verifier; or leave it out and pass its settings by name.
        public: paths that are open to everybody, compared as a whole; `/static/*` opens what is
            below `/static/`.
        scopes: what every request needs.
        verifier_settings: as for Verifier.
    """
    gate = Gate(verifier, public, verifier_settings)
    needed = well_formed(scopes.split())

    @web.middleware
    async def door(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Before anything can fail: the refusal is logged, too.
        query = take_query(request)
        if gate.asks_for_metadata(request.method, request.path):
            return web.Response(body=gate.metadata(), content_type="application/json")
        try:
            principal = None
            # Routes are found by the second, where an escaped slash is no slash.
            if not (gate.is_public(request.path) and gate.is_public(request.rel_url.path_safe)):
                principal = await gate.verifier.authenticate_async(
                    request.raw_headers,
                    needed,
                    client_address=request.remote or None,
                    query=query,
                    method=request.method,
                )
            # Not by its own assignment, which warns of names that are no RequestKey.
            request._state[PRINCIPAL] = principal  # noqa: SLF001 - the name is our promise
            return await handler(request)
        except VerifierError as error:
            # Also what the application raised by `principal.require(…)`.
            if request.writer.output_size > 0:
                raise
            own = gate.own(error)
            return web.Response(body=own.body, status=own.status, headers=own.headers)

    return door


def require_scopes(
    *scopes: str,
) -> Callable[[Callable[P, Awaitable[Answer]]], Callable[P, Awaitable[Answer]]]:
    """Let a handler be called only by who holds all these scopes; others get 403.

    The handler is a function, a method, a `web.View` or a method of one.  On a public path nobody
    is signed in, and the answer is 401.

    Raises:
        MalformedScope: a text is no scope.
    """
    needed = well_formed(scopes)

    def decorate(handler: Callable[P, Awaitable[Answer]]) -> Callable[P, Awaitable[Answer]]:
        @functools.wraps(handler)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> Answer:
            request = _request_among((*args, *kwargs.values()))
            if PRINCIPAL not in request:
                raise RuntimeError("coatcheck_middleware is none of the application's middlewares")
            error = refusal(request[PRINCIPAL], needed)
            if error is not None:
                raise error
            return await handler(*args, **kwargs)

        return guarded

    return decorate


def take_query(request: web.Request) -> bytes:
    """The query string as it was sent; whoever looks later finds no API key in it."""
    state = request._state  # noqa: SLF001 - as above
    if QUERY not in state:
        sent = request.rel_url.raw_query_string
        state[QUERY] = SentQuery(sent.encode("utf-8", "surrogateescape"))
        hidden = without_credentials(state[QUERY].text).decode("utf-8", "surrogateescape")
        if hidden != sent:
            _hide(request, hidden)
    query: SentQuery = state[QUERY]
    return query.text


def _hide(request: web.Request, query: str) -> None:
    """Put another query into a request, and keep its answer out of shared caches."""
    message, prepare_hook = request._message, request._prepare_hook  # noqa: SLF001
    path = message.path.partition("?")[0]
    request._message = message._replace(  # noqa: SLF001
        url=_with_query(message.url, query), path=f"{path}?{query}" if query else path
    )
    request._rel_url = _with_query(request._rel_url, query)  # noqa: SLF001
    for name in _OF_THE_URL:
        request._cache.pop(name, None)  # noqa: SLF001

    async def keep_private(response: web.StreamResponse) -> None:
        await prepare_hook(response)
        kept = kept_private(response.headers.items())
        response.headers.clear()
        response.headers.extend(kept)

    # Not by assignment, of which aiohttp warns when it is debugged.
    vars(request)["_prepare_hook"] = keep_private


def _with_query(url: URL, query: str) -> URL:
    # A fragment is sent by no client, and would be logged, too.
    return URL.build(
        scheme=url.scheme,
        authority=url.raw_authority,
        path=url.raw_path,
        query_string=query,
        encoded=True,
    )


def _request_among(arguments: tuple[object, ...]) -> web.Request:
    for argument in arguments:
        if isinstance(argument, web.View):
            return argument.request
        if isinstance(argument, web.Request):
            return argument
    raise TypeError("a handler is called with a request")
