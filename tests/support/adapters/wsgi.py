"""Plain WSGI, asked without a server, as PEP 3333 has it.

Headers that are sent twice are joined by a comma, as servers do.
"""

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from coatcheck.verifier import Verifier
from coatcheck.wsgi import CoatcheckWSGI, Principal
from support.adapters.harness import PEER, Answer, Ask, Headers


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    told = answer_of(environ["PATH_INFO"], environ["coatcheck"])
    body = json.dumps(told).encode()
    status = "404 Not Found" if told is None else "200 OK"
    start_response(status, [("Content-Type", "application/json")])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]


def answer_of(path: str, principal: Principal | None) -> dict[str, object] | None:
    """What the contract's application says; None: nothing is there."""
    if path == "/health":
        return {}
    assert principal is not None
    if path == "/whoami":
        return {"key_id": principal.key_id, "method": principal.method}
    if path == "/widgets":
        principal.require("widgets:read")
        return {"key_id": principal.key_id}
    if path == "/project":
        return {"project": principal.require_project()}
    if path.startswith("/places/"):
        principal.require("read", resource=f"PLACE/{path.removeprefix('/places/')}")
        return {}
    return None


def application(verifier: Verifier) -> CoatcheckWSGI:
    return CoatcheckWSGI(app, verifier, public=["/health"])


def environ_of(method: str, path: str, headers: Headers) -> dict[str, Any]:
    """What a server makes of a request."""
    path, _, query = path.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "REMOTE_ADDR": PEER,
        "SERVER_PROTOCOL": "HTTP/1.1",
        "RAW_URI": f"{path}?{query}" if query else path,
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    setup_testing_defaults(environ)
    for name, value in headers:
        variable = f"HTTP_{name.upper().replace('-', '_')}"
        sent = environ.get(variable)
        environ[variable] = value if sent is None else f"{sent},{value}"
    return environ


@contextmanager
def asking(app: Any) -> Iterator[Ask]:
    checked = validator(app)

    def ask(method: str, path: str, headers: Headers = ()) -> Answer:
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: Any, *_: Any) -> Any:
            begun.append((status, headers))
            return lambda _: None

        chunks: Any = checked(environ_of(method, path, headers), start_response)
        try:
            body = b"".join(chunks)
        finally:
            chunks.close()
        ((status, told),) = begun
        return Answer(int(status[:3]), {name.lower(): value for name, value in told}, body)

    yield ask
