"""The pages of docs/verifiers: what they tell people to configure refuses what it has to.

Each page's own snippet runs, where its runtime is here, against a key set that is served over
HTTP and tokens of which one thing at a time is wrong.
"""

import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization

from coatcheck.server import catalog_file
from coatcheck.server.settings import Settings
from support import node
from support.live import free_port
from support.tls import a_front, certificates
from support.tokens import ABSENT, AUDIENCE, ISSUER, as_json, base64url, claims, key_set, signer

PAGES = Path(__file__).parents[2] / "docs" / "verifiers"
NEEDED = "widgets:read"

#: What is wrong with a token: its claims, its header.
FLAWS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "another audience": ({"aud": "https://other.example"}, {}),
    "another issuer": ({"iss": "https://evil.example"}, {}),
    "expired": ({"iat": -1000, "exp": -400}, {}),
    "no expiry": ({"exp": ABSENT}, {}),
    "another type": ({}, {"typ": "JWT"}),
    "restricted": ({"must": ["network"], "cidrs": ["192.0.2.0/24"]}, {}),
    "without the scope": ({"scope": "widgets:write"}, {}),
    "a narrower scope": ({"scope": "widgets:read@PLACE/1"}, {}),
    "a longer scope": ({"scope": "mywidgets:read widgets:readall"}, {}),
}
#: What a verifier cannot refuse, as its page says.
ACCEPTED = {"apache": {"another type", "no expiry"}}

#: Which of these tokens a verifier lets in.
LetsIn = Callable[[list[str]], list[bool]]


def snippet(page: str, language: str) -> str:
    found = re.search(
        rf"^```{language}\n(.*?)^```", (PAGES / f"{page}.md").read_text(), re.M | re.S
    )
    assert found is not None
    return found[1]


def token(flaw: str | None = None, **header: object) -> str:
    changed, of_header = FLAWS[flaw] if flaw else ({}, {})
    now = int(time.time())
    times: dict[str, object] = {"iat": now, "exp": now + 600}
    moved = {
        name: now + value if name in times and type(value) is int else value
        for name, value in changed.items()
    }
    return signer().token(claims(**{**times, **moved}), **{**of_header, **header})


def forged() -> dict[str, str]:
    """Tokens that nobody signed, or somebody else."""
    good = token()
    head, body, _ = good.split(".")
    header = signer().header()
    return {
        "tampered": f"{good[:-8]}{'A' if good[-8] != 'A' else 'B'}{good[-7:]}",
        "no signature": f"{head}.{body}.",
        "another's": signer(kid="other").token(claims(exp=int(time.time()) + 600), kid="first"),
        "none": f"{base64url(as_json(header | {'alg': 'none'}))}.{body}.",
        "the public key as secret": hs256(pem()),
    }


def hs256(secret: bytes) -> str:
    """CVE-2016-5431 and its many cousins: what is public taken for a shared secret."""
    header = {"alg": "HS256", "typ": "at+jwt", "kid": "first"}
    payload = claims(exp=int(time.time()) + 600)
    signing_input = f"{base64url(as_json(header))}.{base64url(as_json(payload))}"
    mac = hmac.new(secret, signing_input.encode(), hashlib.sha256).digest()
    return f"{signing_input}.{base64url(mac)}"


def pem() -> bytes:
    return bytes(
        signer()
        .private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


@pytest.fixture(scope="module")
def key_set_port() -> Iterator[int]:
    class KeySet(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/jwk-set+json")
            self.end_headers()
            self.wfile.write(key_set())

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), KeySet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@contextmanager
def jose(folder: Path, key_set_port: int) -> Iterator[LetsIn]:
    """One process for all tokens."""
    node.require_node()
    page = snippet("jose", "js").replace(
        f"{ISSUER}/.well", f"http://127.0.0.1:{key_set_port}/.well"
    )
    (folder / "verify.mjs").write_text(page)
    (folder / "all.mjs").write_text(
        """
        import { verify } from "./verify.mjs";
        import { readFileSync } from "node:fs";
        const told = [];
        for (const token of JSON.parse(readFileSync(0))) {
          told.push(await verify(token, "widgets:read").then(() => true, () => false));
        }
        console.log(JSON.stringify(told));
        """
    )
    (folder / "node_modules").symlink_to(node.FOLDER / "node_modules")

    def lets_in(tokens: list[str]) -> list[bool]:
        done = subprocess.run(
            ["node", folder / "all.mjs"],
            input=json.dumps(tokens),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        told: list[bool] = json.loads(done.stdout)
        return told

    yield lets_in


@contextmanager
def haproxy(folder: Path, _: int) -> Iterator[LetsIn]:
    program = required("haproxy")
    port, upstream = free_port(), free_port()
    (folder / "coatcheck.pem").write_bytes(pem())
    page = (
        snippet("haproxy", "haproxy")
        .replace("bind :8080", f"bind 127.0.0.1:{port}")
        .replace("/etc/haproxy/coatcheck.pem", str(folder / "coatcheck.pem"))
        # Nothing is behind: whoever is let in gets a 503 for it.
        .replace("127.0.0.1:9000", f"127.0.0.1:{upstream}")
    )
    timeouts = "".join(f"    timeout {name} 5s\n" for name in ("connect", "client", "server"))
    (folder / "haproxy.cfg").write_text(f"defaults\n    mode http\n{timeouts}{page}")
    with running([program, "-f", str(folder / "haproxy.cfg")], port):
        yield lambda tokens: [ask(port, "/", token) == 503 for token in tokens]


@contextmanager
def apache(_: Path, key_set_port: int) -> Iterator[LetsIn]:
    program = required("apache2")
    modules = Path("/usr/lib/apache2/modules")
    if not (modules / "mod_auth_openidc.so").exists():
        missing("libapache2-mod-auth-openidc")
    loaded = ("mpm_event", "authn_core", "authz_core", "auth_openidc")
    port = free_port()
    # Started by root, it becomes somebody else, who has to read this; what is in pytest's own
    # folders is closed to others.
    with TemporaryDirectory(dir="/var/tmp") as made_folder:
        folder = Path(made_folder)
        folder.chmod(0o755)
        (folder / "widgets").write_text("{}")
        made = certificates(folder)
        with a_front(made, key_set_port) as tls_port:
            key_set_url = f"https://127.0.0.1:{tls_port}/.well"
            lines = [
                f'ServerRoot "{folder}"',
                f'DocumentRoot "{folder}"',
                f'DefaultRuntimeDir "{folder}"',
                f'PidFile "{folder}/pid"',
                f'ErrorLog "{folder}/error.log"',
                "ServerName localhost",
                f"Listen 127.0.0.1:{port}",
                *(f"LoadModule {name}_module {modules}/mod_{name}.so" for name in loaded),
                f'OIDCCABundlePath "{made.authority}"',
                *(["User www-data", "Group www-data"] if os.geteuid() == 0 else []),
            ]
            page = snippet("apache", "apache").replace(f"{ISSUER}/.well", key_set_url)
            (folder / "apache.conf").write_text("\n".join([*lines, page]))
            with running([program, "-f", f"{folder}/apache.conf", "-DFOREGROUND"], port):
                yield lambda tokens: [ask(port, "/widgets", token) == 200 for token in tokens]


VERIFIERS = {"jose": jose, "haproxy": haproxy, "apache": apache}


def required(program: str) -> str:
    """Where it is; not everybody has /usr/sbin in the PATH."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        missing(program)
    assert found is not None
    return found


def missing(package: str) -> None:
    """Skip, but in CI, which installs it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"install {package}")
    pytest.skip(f"there is no {package}")


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port)
            yield
        finally:
            process.terminate()


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("it did not start")


def ask(port: int, path: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=10).status_code


@pytest.mark.parametrize("name", VERIFIERS)
def test_what_a_page_says_lets_in_good_tokens_and_no_others(
    tmp_path: Path, key_set_port: int, name: str
) -> None:
    """A snippet that is pasted and forgets one check is a hole in somebody's API."""
    bad = {flaw: token(flaw) for flaw in FLAWS} | forged()
    with VERIFIERS[name](tmp_path, key_set_port) as lets_in:
        good, *told = lets_in([token(), *bad.values()])

    assert good
    accepted = {flaw for flaw, is_let_in in zip(bad, told, strict=True) if is_let_in}
    assert accepted == ACCEPTED.get(name, set())


@pytest.mark.parametrize("page", ["README", "aws"])
def test_what_stands_in_the_catalog_can_be_read(page: str) -> None:
    """The first step of every page."""
    catalog = catalog_file.read(snippet(page, "toml"), Settings.load({}))

    assert AUDIENCE in catalog.audiences
