"""APIs as an MCP client finds them: 401 names the resource metadata, which names the issuer.

There is nothing of MCP behind the door.  What a client does until it stands in front of it is
OAuth alone, and the same for every API.

Source: RFC 9728 §3 and §5.1 (resource metadata), RFC 6750 §3 (challenge, `scope`).
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import parse_qs, urlsplit

from coatcheck.verifier import Verifier, VerifierError

_WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"


class ProtectedApis(ThreadingHTTPServer):
    """Several of them on one port of 127.0.0.1, each with a path and a verifier."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.verifiers: dict[str, Verifier] = {}

    def url(self, path: str) -> str:
        """Where the API of this path is: its audience, too."""
        return f"http://127.0.0.1:{self.server_port}{path}"

    def protect(self, path: str, issuer: str) -> None:
        """From now on there is an API at this path that trusts this issuer."""
        # No feed: what is asked for here is asked for once.
        self.verifiers[path] = Verifier(issuer, self.url(path), feed=None, trust_env=True)


@contextmanager
def protected_apis() -> Iterator[ProtectedApis]:
    """They answer until the block ends."""
    with ProtectedApis() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)
            for verifier in server.verifiers.values():
                verifier.close()


class _Handler(BaseHTTPRequestHandler):
    server: ProtectedApis

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        described = self.server.verifiers.get(url.path.removeprefix(_WELL_KNOWN))
        called = self.server.verifiers.get(url.path)
        if called is not None:
            self._call(called, parse_qs(url.query).get("needs", [""])[0])
        elif described is not None:
            self._answer(200, described.protected_resource_metadata())
        else:
            self._answer(404, {})

    def _call(self, verifier: Verifier, needs: str) -> None:
        """Step through the door; the scopes that the caller needs are told with the challenge."""
        try:
            caller = verifier.authenticate(self.headers.items(), scopes=needs)
        except VerifierError as error:
            headers = error.headers
            if error.scope is None and needs:
                headers["WWW-Authenticate"] += f', scope="{needs}"'
            self._answer(error.status, error.problem(), headers)
        else:
            self._answer(200, {"caller": caller.key_id})

    def _answer(
        self, status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None
    ) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Nothing: the tests look at what clients say."""
