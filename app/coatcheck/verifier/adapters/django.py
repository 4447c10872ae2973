"""Django: a middleware that lets nobody in unseen, and `require_scopes`.

    MIDDLEWARE = ["coatcheck.django.CoatcheckMiddleware", …]
    COATCHECK = {"ISSUER": …, "AUDIENCE": …, "PUBLIC": ["/health", "/admin/*"]}

    @require_scopes("widgets:read")
    def widgets(request): ...  # request.coatcheck is the Principal

It fails closed: a path that is not listed as public needs a credential, also one that leads
nowhere.  `request.user` stays with Django's own authentication.

Under WSGI it reads headers as `adapters/wsgi` does, under ASGI as `adapters/asgi` does.  An API
key in the query is seen by nobody behind it: whoever stands before it in MIDDLEWARE may look.

Source: RFC 6750 §3 (challenges), RFC 9728 §3 (resource metadata).
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Final, ParamSpec

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import re_path
from django.utils.module_loading import import_string

from coatcheck.verifier import VerifierError
from coatcheck.verifier.adapters import asgi, wsgi
from coatcheck.verifier.adapters.gate import Gate, kept_private, refusal, well_formed

P = ParamSpec("P")

_making: Final = threading.Lock()


class CoatcheckMiddleware:
    """Every request needs a valid credential, unless its path is public.

    `request.coatcheck` is the Principal; None on a public path.  What a view refuses by
    `request.coatcheck.require(…)` is answered like any other refusal.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self._get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        # A mistake in the settings is told when the application is built.
        gate()

    def __call__(self, request: HttpRequest) -> Any:
        if self._is_async:
            return self._answer_async(request)
        here, request.coatcheck = gate(), None
        if here.asks_for_metadata(request.method, request.path):
            return metadata(request)
        if here.is_public(request.path):
            return self._get_response(request)
        query, was_hidden = take_query(request)
        try:
            request.coatcheck = here.verifier.authenticate(query=query, **told_by(request))
        except VerifierError as error:
            return _kept_private(problem(request, error), was_hidden)
        return _kept_private(self._get_response(request), was_hidden)

    async def _answer_async(self, request: HttpRequest) -> HttpResponse:
        here, request.coatcheck = gate(), None
        if here.asks_for_metadata(request.method, request.path):
            return metadata(request)
        if here.is_public(request.path):
            return await self._get_response(request)
        query, was_hidden = take_query(request)
        try:
            request.coatcheck = await here.verifier.authenticate_async(
                query=query, **told_by(request)
            )
        except VerifierError as error:
            return _kept_private(problem(request, error), was_hidden)
        return _kept_private(await self._get_response(request), was_hidden)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """What a view refused."""
        return problem(request, exception) if isinstance(exception, VerifierError) else None


def require_scopes(*scopes: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """Let a view be called only by who holds all these scopes; others get 403.

    For function views, sync and async; for methods through Django's `method_decorator`.  On a
    public path nobody is signed in, and the answer is 401.

    Raises:
        MalformedScope: a text is no scope.
    """
    needed = well_formed(scopes)

    def admit(request: Any) -> None:
        if not hasattr(request, "coatcheck"):
            raise ImproperlyConfigured(
                "require_scopes: MIDDLEWARE lacks coatcheck.django.CoatcheckMiddleware, or a"
                " method is decorated without method_decorator"
            )
        error = refusal(request.coatcheck, needed)
        if error is not None:
            # Raised, because what is decorated may be a plain function that gives a coroutine,
            # as `dispatch` of an async class does.  The middleware answers it.
            raise error

    def decorate(view: Callable[P, Any]) -> Callable[P, Any]:
        if iscoroutinefunction(view):

            @functools.wraps(view)
            async def of_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                admit(args[0])
                return await view(*args, **kwargs)

            return of_coroutine

        @functools.wraps(view)
        def of_function(*args: P.args, **kwargs: P.kwargs) -> Any:
            admit(args[0])
            return view(*args, **kwargs)

        return of_function

    return decorate


# The verifier that the settings ask for.


def gate() -> Gate:
    """The gate of this process, as the setting COATCHECK says.

    Raises:
        ImproperlyConfigured: a setting is missing or unfit; the message says what to set.
    """
    with _making:
        return _gate_of_settings()


@functools.cache
def _gate_of_settings() -> Gate:
    told = {name.lower(): value for name, value in getattr(settings, "COATCHECK", {}).items()}
    look_up = told.get("check_api_key")
    try:
        if isinstance(look_up, str):
            # Settings cannot import what needs them.
            told["check_api_key"] = import_string(look_up)
        return Gate(told.pop("verifier", None), told.pop("public", ()), told)
    except (ImportError, TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"COATCHECK in the settings: {error}") from error


def _forget(*, setting: str, **_: Any) -> None:
    if setting == "COATCHECK":
        _gate_of_settings.cache_clear()


# Sent by `override_settings` and its like in tests.
setting_changed.connect(_forget)


# What requests say, and how answers look.


def told_by(request: HttpRequest) -> dict[str, Any]:
    """What the verifier wants to know of a request beside its query."""
    scope = getattr(request, "scope", None)
    return {
        "headers": wsgi.headers_of(request.META) if scope is None else scope["headers"],
        "client_address": request.META.get("REMOTE_ADDR") or None,
        "method": request.method,
    }


def take_query(request: HttpRequest) -> tuple[bytes, bool]:
    """The query string as it was sent, and whether an API key in it is hidden now."""
    return _hiding(request, wsgi.take_query, asgi.take_query)


def query_of(request: HttpRequest) -> tuple[bytes, bool]:
    """The same for who does not stand before the whole application.

    An API key counts only if `allow_api_key_query` stands there.  It is hidden either way.
    """
    return _hiding(request, wsgi.query_of, asgi.query_of)


def _hiding(
    request: HttpRequest,
    of_environ: Callable[[dict[str, Any]], bytes],
    of_scope: Callable[[asgi.Scope], bytes],
) -> tuple[bytes, bool]:
    sent = request.META.get("QUERY_STRING", "")
    scope = getattr(request, "scope", None)
    if scope is None:
        query = of_environ(request.META)
    else:
        query = of_scope(scope)
        request.META["QUERY_STRING"] = scope.get("query_string", b"").decode()
    was_hidden = request.META.get("QUERY_STRING", "") != sent
    if was_hidden:
        # Somebody before us may have looked, and Django keeps what it read.
        vars(request).pop("GET", None)
    return query, was_hidden


def problem(request: HttpRequest, error: VerifierError) -> HttpResponse:
    """The answer to a refused request: status, challenge and RFC 9457 body."""
    own = gate().own(error)
    return _answer(request, own.status, own.headers, own.body)


def metadata(request: HttpRequest) -> HttpResponse:
    """The RFC 9728 document, at its own path only."""
    here = gate()
    if not here.asks_for_metadata(request.method, request.path):
        raise Http404
    return _answer(request, 200, {"Content-Type": "application/json"}, here.metadata())


#: URL patterns for a project without the middleware: `path("", include(well_known))`.
well_known: Final = [re_path(r"^\.well-known/oauth-protected-resource(?:/.*)?$", metadata)]


def _answer(
    request: HttpRequest, status: int, headers: dict[str, str], body: bytes
) -> HttpResponse:
    content = b"" if request.method == "HEAD" else body
    return HttpResponse(content, status=status, headers=headers | {"Content-Length": len(body)})


def _kept_private(response: HttpResponse, had_api_key: bool) -> HttpResponse:
    if had_api_key:
        for name, value in kept_private(response.items()):
            response[name] = value
    return response
