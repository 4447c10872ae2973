"""The recipes of `deploy/gateways` as running gateways, and the API that stands behind them.

A gateway runs as somebody without privileges, in a folder of its own, with the very files that
people copy.  Nothing in those is changed but addresses, ports and paths.
"""

import json
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from coatcheck.server.oauth.wire import Reply
from coatcheck.verifier import errors
from support.secrets import SWEEP

RECIPES: Final = Path(__file__).parents[2] / "deploy" / "gateways"
#: Whom the recipes ask for, and what stands in them for addresses.
AUDIENCE: Final = "https://api.example.com"
_COATCHECK: Final = "127.0.0.1:8000"
_API: Final = "127.0.0.1:9000"
#: A caller who is not on the gateway's own address, which Coatcheck trusts.
_WEBSOCKET: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: Where the API streams, and where it speaks no HTTP.
STREAM: Final = "/stream"
SOCKET: Final = "/socket"
CALLER: Final = "127.0.0.2"
TIMEOUT: Final = 10
#: The longest that `X-Coatcheck-Problem` may be, as openapi.yaml says.
MAX_PROBLEM_LENGTH: Final = 1024
#: Every refusal of our verifier, by its code.
REFUSALS: Final[Mapping[str, errors.VerifierError]] = {
    **{
        code: error()
        for code, error in errors.ERRORS.items()
        if error not in (errors.InsufficientScope, errors.IssuerUnavailable, errors.RateLimited)
    },
    "insufficient_scope": errors.InsufficientScope("widgets:read widgets:write"),
    "issuer_unavailable": errors.IssuerUnavailable(7),
    "rate_limited": errors.RateLimited(8),
}
_START_TIMEOUT: Final = 20

Headers = Sequence[tuple[str, str]]


# --- the API


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came to the API."""

    method: str
    target: str
    headers: Headers = field(repr=False)
    body_bytes: int

    def named(self, name: str) -> list[str]:
        return [value for one, value in self.headers if one.lower() == name.lower()]

    def like(self, name: str) -> list[str]:
        """The values of all headers that some framework might read under this name."""
        return [value for one, value in self.headers if _read_loosely(one) == _read_loosely(name)]


class Api(ThreadingHTTPServer):
    """It answers everything, and remembers what it was sent."""

    daemon_threads = True
    #: Callers that come at the same time do not try again a second later.
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Endpoint)
        self.seen: list[Seen] = []
        self.go_on = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Api

    def _answer(self) -> None:
        body = self._body()
        self.server.seen.append(
            Seen(self.command, self.path, tuple(self.headers.items()), len(body))
        )
        if self.path == SOCKET:
            self._echo()
            return
        if self.path == STREAM:
            self._stream()
            return
        told = b'{"from": "the API"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Cache-Control", "max-age=60")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Every method is answered alike."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _stream(self) -> None:
        """An event at once, and another one when somebody has read the first."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: first\n\n")
        self.wfile.flush()
        self.server.go_on.wait(TIMEOUT)
        self.wfile.write(b"data: second\n\n")

    def _echo(self) -> None:
        """Not the frames of RFC 6455: whether bytes pass in both directions is what matters."""
        self.close_connection = True
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        # RFC 6455 §4.2.2, which HAProxy looks at.
        digest = sha1(self.headers["Sec-WebSocket-Key"].encode() + _WEBSOCKET)  # noqa: S324
        self.send_header("Sec-WebSocket-Accept", b64encode(digest.digest()).decode())
        self.end_headers()
        while line := self.rfile.readline():
            self.wfile.write(line.upper())

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def an_api() -> Iterator[Api]:
    with Api() as api:
        thread = threading.Thread(target=api.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield api
        api.shutdown()
        thread.join()


# --- the service, when it is about its answers and not about how it finds them


@contextmanager
def in_its_place(reply: Callable[[str], Reply]) -> Iterator[int]:
    """Somebody who answers gateways by their callers' URI alone, on the port that comes back."""

    class Endpoint(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body go out one by one, and the second does not wait for the first.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            uri = self.headers["X-Original-URI"] or self.headers["X-Forwarded-Uri"]
            # HAProxy looks after the health of its servers.
            told = Reply(200, b"", ()) if uri is None else reply(uri)
            self.send_response(told.status)
            for name, value in told.headers:
                self.send_header(name.decode(), value.decode())
            self.send_header("Content-Length", str(len(told.body)))
            self.end_headers()
            self.wfile.write(told.body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


# --- the gateways


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a program is started with its recipe.

    Attributes:
        program: its name, and where else it may be.
        package: what brings it, in Debian.
        needs: for each further package files of which one has to be there.
        changes: what in the recipe is made to fit; FOLDER and PORT stand for the gateway's own.
        surroundings: what the reader of the recipe has already; a file and its content.
        arguments: of the program.
    """

    program: str
    package: str
    changes: Mapping[str, str]
    arguments: Sequence[str]
    surroundings: tuple[str, str] | None = None
    needs: Mapping[str, Path] = field(default_factory=dict)


_APACHE_MODULES: Final = Path("/usr/lib/apache2/modules")
_LOADED: Final = (*("mpm_event", "authz_core", "alias", "headers", "lua", "proxy", "proxy_http"),)

GATEWAYS: Final = {
    "nginx": Recipe(
        program="nginx",
        package="nginx",
        changes={
            "listen 8080;": "listen 127.0.0.1:PORT;",
            "/etc/nginx": "FOLDER",
            "/var/log/nginx": "FOLDER",
        },
        surroundings=(
            "nginx.conf",
            (
                "daemon off; pid FOLDER/pid; events {} http {"
                " client_body_temp_path FOLDER/body; proxy_temp_path FOLDER/proxy;"
                " fastcgi_temp_path FOLDER/fastcgi; uwsgi_temp_path FOLDER/uwsgi;"
                " scgi_temp_path FOLDER/scgi; include FOLDER/coatcheck.conf; }"
            ),
        ),
        arguments=("-e", "FOLDER/error.log", "-p", "FOLDER", "-c", "FOLDER/nginx.conf"),
    ),
    "haproxy": Recipe(
        program="haproxy",
        package="haproxy",
        changes={
            "bind :8080": "bind 127.0.0.1:PORT",
            "/etc/haproxy": "FOLDER",
            "abns@coatcheck": "abns@coatcheck-PORT",
        },
        arguments=("-db", "-f", "FOLDER/haproxy.cfg"),
    ),
    "apache": Recipe(
        program="apache2",
        package="apache2",
        changes={
            "Listen 8080": "Listen 127.0.0.1:PORT",
            "*:8080": "127.0.0.1:PORT",
            "/etc/apache2/coatcheck": "FOLDER",
            "${APACHE_LOG_DIR}": "FOLDER",
        },
        surroundings=(
            "apache2.conf",
            "\n".join(
                (
                    *("ServerRoot FOLDER", "ServerName localhost", "PidFile FOLDER/pid"),
                    *("DefaultRuntimeDir FOLDER", "ErrorLog FOLDER/error.log"),
                    *(
                        f"LoadModule {name}_module {_APACHE_MODULES}/mod_{name}.so"
                        for name in _LOADED
                    ),
                    "Include FOLDER/coatcheck.conf",
                )
            ),
        ),
        arguments=("-DFOREGROUND", "-f", "FOLDER/apache2.conf"),
        needs={"lua-socket": Path("/usr/share/lua/5.3/socket/http.lua")},
    ),
    "caddy": Recipe(
        program="caddy",
        package="caddy",
        changes={
            "http://:8080 {": "http://127.0.0.1:PORT {\n\tbind 127.0.0.1",
            # Its administration has one port, whoever else runs on this machine.
            "\tlog default {": "\tadmin off\n\tlog default {",
        },
        arguments=("run", "--config", "FOLDER/Caddyfile", "--adapter", "caddyfile"),
    ),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller got."""

    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str | None:
        """All lines of it, joined as RFC 9110 §5.3 allows."""
        found = [value for one, value in self.headers if one.lower() == name.lower()]
        return ", ".join(found) if found else None

    @property
    def problem(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.body)
        return told


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    name: str
    port: int
    folder: Path

    def ask(
        self,
        headers: Headers = (),
        target: str = "/widgets",
        method: str = "GET",
        body: bytes | None = None,
    ) -> Answer:
        """Call the API through it; headers go out as they are given, repeated ones too."""
        http = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT, source_address=(CALLER, 0))
        try:
            http.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers:
                http.putheader(name, value)
            if body is not None and ("Transfer-Encoding", "chunked") not in headers:
                http.putheader("Content-Length", str(len(body)))
            http.endheaders(body)
            got = http.getresponse()
            return Answer(got.status, got.getheaders(), got.read())
        finally:
            http.close()

    @property
    def logs(self) -> str:
        """All that it has written."""
        return "\n".join(path.read_text("utf-8") for path in sorted(self.folder.glob("*.log")))


@contextmanager
def running(
    name: str, *, coatcheck: int, api: int, changes: Mapping[str, str], **environment: str
) -> Iterator[Gateway]:
    """A gateway with its recipe, until the block ends.

    Args:
        coatcheck: its port, on 127.0.0.1.
        api: likewise.
        changes: what a reader of the recipe changes for other reasons than place.
        environment: of the gateway.
    """
    recipe = GATEWAYS[name]
    program = _required(recipe)
    # Not below pytest's folder, which is closed to the user that the gateway runs as.
    folder = Path(tempfile.mkdtemp(prefix=f"coatcheck-{name}-", dir="/tmp"))
    port = _free_port()

    def placed(text: str) -> str:
        return text.replace("FOLDER", str(folder)).replace("PORT", str(port))

    try:
        texts = {_COATCHECK: f"127.0.0.1:{coatcheck}", _API: f"127.0.0.1:{api}", **changes}
        texts |= {old: placed(new) for old, new in recipe.changes.items()}
        _copy(RECIPES / name, folder, texts)
        if recipe.surroundings is not None:
            file, content = recipe.surroundings
            (folder / file).write_text(placed(content))
        user = _unprivileged()
        for path in (folder, *folder.iterdir()):
            os.chown(path, user, -1)
        with (folder / "output.log").open("ab") as output:
            process = subprocess.Popen(
                [program, *map(placed, recipe.arguments)],
                stdout=output,
                stderr=output,
                cwd=folder,
                user=user,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
            )
        try:
            _wait_until_it_listens(port, process, folder)
            SWEEP.process(process.pid)
            yield Gateway(name, port, folder)
        finally:
            process.terminate()
            process.wait(timeout=20)
            for log in folder.glob("*.log"):
                SWEEP.text(f"a log of {name}", log.read_bytes())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _required(recipe: Recipe) -> str:
    """The program.  Where it is missing the test is skipped; in CI that is a failure."""
    program = shutil.which(recipe.program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    missing = [package for package, path in recipe.needs.items() if not path.exists()]
    if program is None:
        missing.insert(0, recipe.package)
    if missing:
        reason = f"install {' and '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    assert program is not None
    return program


def _copy(recipe: Path, folder: Path, changes: Mapping[str, str]) -> None:
    """The files of a recipe.  What is to be changed in them is there, or the recipe is wrong."""
    files = {path.name: path.read_text("utf-8") for path in recipe.iterdir()}
    for old, new in changes.items():
        assert any(old in text for text in files.values()), f"{recipe.name} does not say {old}"
        files = {name: text.replace(old, new) for name, text in files.items()}
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")


def _free_port() -> int:
    """A port that no outgoing connection takes before the gateway has started.

    Linux takes those from 32768 on, unless it is told otherwise.
    """
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - it is no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_it_listens(port: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "output.log").read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError((folder / "output.log").read_text())


def _unprivileged() -> int:
    return os.getuid() or pwd.getpwnam("nobody").pw_uid


def _read_loosely(name: str) -> str:
    """A header's name as frameworks read it that know letters, digits and one sign (CGI)."""
    return re.sub("[^a-z0-9]", "_", name.lower())
