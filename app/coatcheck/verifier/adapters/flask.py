"""Flask: an extension that lets nobody in unseen, and `@auth.require`.

    auth = Coatcheck(app, issuer=…, audience=…, public=["/health"])

    @app.get("/widgets")
    @auth.require("widgets:read")
    def widgets(): ...  # current_principal is the Principal

It fails closed: every request needs a credential, also one that leads nowhere, unless its path is
listed as public or its view is marked `@auth.public`.

It is a `before_request` function, so what was registered before it runs before it: the place for
answers to CORS preflights, which carry no credential.  Refusals are answered right there, and no
`errorhandler(Exception)` of a blueprint gets to see them.

Flask copies the query string when it makes `request`, before any hook.  So an API key is taken
out of it around `app.wsgi_app`.  Everything else is as in `adapters/wsgi`.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, ParamSpec

from flask import Flask, Response, current_app, has_request_context, request
from werkzeug.local import LocalProxy

from coatcheck.verifier import Principal, Verifier, VerifierError
from coatcheck.verifier.adapters.gate import Gate, refusal, well_formed
from coatcheck.verifier.adapters.wsgi import (
    PRINCIPAL,
    allow_api_key_query,
    headers_of,
    path_of,
    take_query,
)

EXTENSION: Final = "coatcheck"

#: Marks on view functions.
_PUBLIC: Final = "_coatcheck_public"
_NEEDED: Final = "_coatcheck_needed"

P = ParamSpec("P")


def _current_principal() -> Principal | None:
    # Not in `flask.g`: requests that a test sends within one application context share it.
    return request.environ.get(PRINCIPAL) if has_request_context() else None


#: Who sent the request; nobody, which is false, on a public path and outside of requests.
current_principal: Principal = LocalProxy(_current_principal)  # type: ignore[assignment]


class Coatcheck:
    """Every request needs a valid credential, unless its path or its view is public.

    What is not passed is read from `app.config`, as COATCHECK_ISSUER, COATCHECK_AUDIENCE,
    COATCHECK_SERVICE_KEY and so on, and then from the environment.

    Args:
        app: what is protected; or leave it out and call `init_app`.
        verifier: a Verifier; or leave it out and pass its settings by name.
        public: paths that are open to everybody, compared as a whole; `/static/*` opens what is
            below `/static/`.  In `app.config`: COATCHECK_PUBLIC.
        verifier_settings: as for Verifier.
    """

    def __init__(
        self,
        app: Flask | None = None,
        verifier: Verifier | None = None,
        *,
        public: Collection[str] = (),
        **verifier_settings: Any,
    ) -> None:
        self._verifier = verifier
        self._public = public
        self._settings = verifier_settings
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Protect an application.  `app.extensions["coatcheck"].verifier` is its Verifier.

        Raises:
            ValueError: a setting is missing or unfit, or the application is protected already.
        """
        if EXTENSION in app.extensions:
            raise ValueError("this application is protected already: call init_app once")
        settings = self._settings
        if self._verifier is None:
            settings = configured(app) | settings
        public = self._public or app.config.get("COATCHECK_PUBLIC", ())
        app.extensions[EXTENSION] = Gate(self._verifier, public, settings)
        app.before_request(_admit)
        app.register_error_handler(VerifierError, problem)
        app.wsgi_app = allow_api_key_query(app.wsgi_app)  # type: ignore[method-assign, assignment]

    def require(self, *scopes: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
        """Let a view be called only by who holds all these scopes; others get 403.

        For functions, coroutines and methods of a MethodView.  It belongs below the route; above
        it, it counts for the function itself, wherever that is registered.

        Raises:
            MalformedScope: a text is no scope.
        """
        needed = well_formed(scopes)

        def decorate(view: Callable[P, Any]) -> Callable[P, Any]:
            _require_function(view)

            @functools.wraps(view)
            def of_view(*args: P.args, **kwargs: P.kwargs) -> Any:
                refused = _lacking(needed)
                return (
                    current_app.ensure_sync(view)(*args, **kwargs) if refused is None else refused
                )

            # Above `@app.get` this wrapper is not what Flask calls.  Then the marks count.
            for layer in _layers(view):
                setattr(layer, _NEEDED, (*getattr(layer, _NEEDED, ()), *needed))
            of_view.__dict__.pop(_NEEDED, None)
            return of_view

        return decorate

    def public(self, view: Callable[P, Any]) -> Callable[P, Any]:
        """Open a view to everybody, below its route.  Nobody is signed in, whatever they send."""
        _require_function(view)

        # A view of its own, so that the same function stays closed elsewhere.
        @functools.wraps(view)
        def of_view(*args: P.args, **kwargs: P.kwargs) -> Any:
            return current_app.ensure_sync(view)(*args, **kwargs)

        setattr(of_view, _PUBLIC, True)
        return of_view


def problem(error: VerifierError) -> Response:
    """The answer to a refused request: status, challenge and RFC 9457 body."""
    gate: Gate | None = current_app.extensions.get(EXTENSION)
    own = error if gate is None else gate.own(error)
    return Response(own.body, own.status, own.headers)


def configured(app: Flask) -> dict[str, Any]:
    """Settings of a Verifier in `app.config`."""
    return {
        name: app.config[f"COATCHECK_{name.upper()}"]
        for name in inspect.signature(Verifier).parameters
        if f"COATCHECK_{name.upper()}" in app.config
    }


def _admit() -> Response | None:
    """Before each request: who sends it; an answer, if it may not go on."""
    gate: Gate = current_app.extensions[EXTENSION]
    environ = request.environ
    environ[PRINCIPAL] = None
    path = path_of(environ)
    if gate.asks_for_metadata(request.method, path):
        return Response(gate.metadata(), content_type="application/json")
    view = current_app.view_functions.get(request.endpoint or "")
    try:
        if not gate.is_public(path) and not getattr(view, _PUBLIC, False):
            environ[PRINCIPAL] = gate.verifier.authenticate(
                headers_of(environ),
                client_address=environ.get("REMOTE_ADDR") or None,
                query=take_query(environ),
                method=request.method,
            )
    except VerifierError as error:
        return problem(error)
    needed: tuple[str, ...] = getattr(view, _NEEDED, ())
    return _lacking(needed) if needed else None


def _lacking(scopes: tuple[str, ...]) -> Response | None:
    """The answer to a request without these scopes; None: it may go on."""
    error = refusal(request.environ.get(PRINCIPAL), scopes)
    return None if error is None else problem(error)


def _require_function(view: object) -> None:
    if inspect.isclass(view) or not callable(view):
        raise TypeError("decorate a function or a method; of a class: decorators = [auth.…]")


def _layers(view: Any) -> Iterator[Any]:
    """A view function, and what it was before it was decorated."""
    while view is not None:
        # A bound method takes no marks.
        yield getattr(view, "__func__", view)
        view = getattr(view, "__wrapped__", None)
