"""Any WSGI application: a wrapper that lets nobody in unseen.

    app = CoatcheckWSGI(app, issuer=…, audience=…, public=["/health"])

    def app(environ, start_response): ...  # environ["coatcheck"] is the Principal

It fails closed: a path that is not listed as public needs a credential, also one that leads
nowhere.

A WSGI server joins headers that were sent twice by commas, and makes one name of `X-API-Key` and
`X_API_Key`.  The first is taken apart here: no credential holds a comma.  The second is for the
server to refuse, as gunicorn and uWSGI do; it matters where `trusted_proxies` are set, because a
proxy overwrites X-Forwarded-For in one spelling only.

An API key in the query is taken out of the environment before anybody behind this wrapper, or an
access log that reads the environment, sees it; the answer is kept out of shared caches.

Source: PEP 3333; RFC 6750 §3 (challenges).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any, Final
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from coatcheck.verifier import Principal, Verifier, VerifierError
from coatcheck.verifier.adapters.gate import QUERY, Gate, SentQuery, kept_private, well_formed
from coatcheck.verifier.presented import without_api_key, without_credentials

PRINCIPAL: Final = "coatcheck"

#: A list by itself, which is read as one.
_ONE_VALUE: Final = "X-FORWARDED-FOR"
#: Schemes whose credentials hold no comma.  Those of others may.
_SCHEMES: Final = ("bearer ", "basic ")
#: Where servers put the request target, query included, for their access logs.
_TARGETS: Final = ("RAW_URI", "REQUEST_URI", "REQUEST_LINE")


class CoatcheckWSGI:
    """Every request needs a valid credential, unless its path is public.

    `environ["coatcheck"]` is the Principal; None on a public path.  What it refuses by
    `principal.require(…)` is answered like any other refusal, before the answer has begun.

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
        app: WSGIApplication,
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

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], path_of(environ)
        if self.gate.asks_for_metadata(method, path):
            body = self.gate.metadata()
            start_response("200 OK", [("Content-Type", "application/json"), _length(body)])
            return [b"" if method == "HEAD" else body]
        begin = start_response
        try:
            environ[PRINCIPAL] = None
            # The query of a public path is the application's own.
            if not self.gate.is_public(path):
                # Before anything can fail: the refusal is logged, too.
                query = take_query(environ)
                if query != _shown(environ):
                    begin = _keeping_private(start_response)
                environ[PRINCIPAL] = self._authenticate(environ, query)
            return self._app(environ, begin)
        except VerifierError as error:
            # Also what the application raised by `principal.require(…)`.
            own = self.gate.own(error)
            body = own.body
            begin(status_line(own), [*own.headers.items(), _length(body)])
            return [b"" if method == "HEAD" else body]

    def _authenticate(self, environ: WSGIEnvironment, query: bytes) -> Principal:
        return self.gate.verifier.authenticate(
            headers_of(environ),
            self._scopes,
            client_address=environ.get("REMOTE_ADDR") or None,
            query=query,
            method=environ["REQUEST_METHOD"],
        )


def allow_api_key_query(app: WSGIApplication) -> WSGIApplication:
    """Let connector keys in the URL reach an application that authenticates by itself.

    Only an adapter finds them there: nobody else behind this wrapper sees the query string with
    the key in it.  Answers are kept out of shared caches.
    """

    def hiding(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if take_query(environ) != _shown(environ):
            start_response = _keeping_private(start_response)
        return app(environ, start_response)

    return hiding


def headers_of(environ: WSGIEnvironment) -> list[tuple[str, str]]:
    """The headers as pairs, in which one that was sent twice stands twice."""
    return list(_pairs(environ))


def _pairs(environ: WSGIEnvironment) -> Iterator[tuple[str, str]]:
    for variable, value in environ.items():
        if variable.startswith("HTTP_"):
            name = variable[5:].replace("_", "-")
            for part in _sent_apart(name, value):
                yield name, part.strip(" \t")


def _sent_apart(name: str, value: str) -> list[str]:
    """The values that a server joined."""
    parts = value.split(",")
    if len(parts) == 1 or name == _ONE_VALUE:
        return [value]
    if name == "AUTHORIZATION" and not any(
        part.strip(" \t").lower().startswith(_SCHEMES) for part in parts
    ):
        return [value]
    return parts


def path_of(environ: WSGIEnvironment) -> str:
    """The path, decoded; what follows the place where the application is mounted, too."""
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    # PEP 3333: bytes that look like text.
    return path.encode("latin-1").decode("utf-8", "replace")


def take_query(environ: WSGIEnvironment) -> bytes:
    """The query string as it was sent; whoever looks later finds no API key in it."""
    if QUERY not in environ:
        environ[QUERY] = SentQuery(_shown(environ))
        _hide(environ)
    sent: SentQuery = environ[QUERY]
    return sent.text


def query_of(environ: WSGIEnvironment) -> bytes:
    """The query string for an adapter that does not stand before the whole application.

    An API key in it counts only if `allow_api_key_query` stands there.  It is taken out of sight
    either way.
    """
    if QUERY in environ:
        return take_query(environ)
    query = without_api_key(_shown(environ))
    _hide(environ)
    return query


def status_line(error: VerifierError) -> str:
    """The status of an answer, as WSGI wants it."""
    return f"{int(error.status)} {HTTPStatus(error.status).phrase}"


def _shown(environ: WSGIEnvironment) -> bytes:
    query: str = environ.get("QUERY_STRING", "")
    return query.encode("latin-1")


def _hide(environ: WSGIEnvironment) -> None:
    sent = environ.get("QUERY_STRING", "")
    if not sent:
        return
    environ["QUERY_STRING"] = hidden = without_credentials(sent.encode("latin-1")).decode("latin-1")
    for name in _TARGETS:
        if name in environ:
            environ[name] = environ[name].replace(f"?{sent}", f"?{hidden}" if hidden else "")


def _keeping_private(start_response: StartResponse) -> StartResponse:
    def start(status: str, headers: list[tuple[str, str]], *failure: Any) -> Callable[..., object]:
        return start_response(status, kept_private(headers), *failure)

    return start


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))
