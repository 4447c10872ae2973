"""What looks for secrets finds them: a search that cannot fail proves nothing."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization

from coatcheck import apikey, feed_profile
from coatcheck.server import sealing
from coatcheck.server.signing import GENERATE, RingKeeper
from support import tokens
from support.deployment import Deployment
from support.live import clean_environment
from support.secrets import Secrets, Sweep, private_number
from support.sweep import Listener, looked_at

ID = "key_0FvQ2uWwXk3sT1bL9cZp4E"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder for secrets that are put there to be found, by these tests and nobody else."""
    return tmp_path


@pytest.fixture
def key() -> str:
    """An API key that nobody has told the search of: its form gives it away."""
    return apikey.make("ck_live")


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: f"key={text};",
    "as JSON": lambda text: json.dumps({"key": text}),
    "percent-encoded": lambda text: quote(text).replace("_", "%5F").replace(".", "%2e"),
    "percent-encoded as a whole": lambda text: "".join(f"%{ord(one):02X}" for one in text),
    "escaped": lambda text: "".join(f"\\u{ord(one):04x}" for one in text),
    "in hexadecimal": lambda text: text.encode().hex(),
    "as a user name": lambda text: basic(text, ""),
    "as a password": lambda text: basic(ID, text),
    "in base64, behind one letter": lambda text: "a" + b64encode(text.encode()).decode(),
    "in base64, behind two letters": lambda text: "ab" + b64encode(text.encode()).decode(),
    "in base64url": lambda text: b64encode(text.encode(), b"-_").decode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_api_key_is_found_in_any_form(key: str, form: Callable[[str], str]) -> None:
    """And told by its mask: what says where a secret lies must not be the next place."""
    (found,) = Secrets().find(form(key).encode())

    assert apikey.mask(key) in str(found)
    assert key not in str(found)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_token_is_found_in_any_form(form: Callable[[str], str]) -> None:
    """Whoever signed it."""
    token = tokens.signer().token(tokens.claims())

    (found,) = Secrets().find(form(token).encode())

    assert found.kind == "token"
    assert token not in str(found)


@pytest.mark.parametrize("before", ["", "live", "org_0FvQ2uWwXk3sT1bL9cZp4Elive", "\x00\x1f"])
def test_an_api_key_is_found_between_other_letters(key: str, before: str) -> None:
    """A row of a database is one column behind the other, with nothing between them."""
    (found,) = Secrets().find(f"{before}{key}1790000000".encode())

    assert apikey.mask(key) in str(found)


def test_an_api_key_that_was_made_here_is_found_without_its_prefix(key: str) -> None:
    """Half a mask is none: the characters after the prefix are all that is secret."""
    secrets = Secrets()
    secrets.remember_api_key(key)

    assert secrets.find(f"…{key.rpartition('_')[2]}…".encode())


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_a_private_key_is_found(algorithm: str) -> None:
    """As a file, as bytes and as bytes in base64; and its number alone, once it is known."""
    private = tokens.signer(algorithm).private

    def written(encoding: serialization.Encoding) -> bytes:
        return private.private_bytes(  # type: ignore[no-any-return]
            encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    pem, der = written(serialization.Encoding.PEM), written(serialization.Encoding.DER)
    for text in (pem, der, b64encode(der), b'{"kty": "EC", "d": "' + b"x" * 43 + b'"}'):
        assert {found.kind for found in Secrets().find(text)} == {"private key"}


def test_a_remembered_secret_is_found_in_any_form() -> None:
    """A sealing key is 32 random bytes: it has no form of its own."""
    secret = os.urandom(32)
    secrets = Secrets()
    secrets.remember("sealing key", secret)

    for text in (secret, secret.hex().encode(), b64encode(secret), b64encode(secret, b"-_")):
        assert [found.kind for found in secrets.find(b"x " + text + b" x")] == ["sealing key"]
    assert not secrets.find(os.urandom(32).hex().encode())


def test_the_secrets_of_a_deployment_are_known(deployment: Deployment) -> None:
    """Its sealing key, and each private key that it seals."""
    sweep = Sweep()
    sweep.learn_deployment(deployment.settings.keys_dir.parent)

    (file,) = deployment.settings.keys_dir.glob("sealing-*.key")
    assert sweep.secrets.find(file.read_bytes())
    ring = RingKeeper(deployment.store, sealing.load(deployment.settings.keys_dir)).at(0)
    assert ring.signing_keys
    for signing_key in ring.signing_keys:
        assert sweep.secrets.find(private_number(signing_key.private))


def test_what_is_public_is_no_secret(key: str) -> None:
    """Masks, ids, digests, public keys, the revocation feed, and texts that only look alike."""
    feed = tokens.signer().token(tokens.claims(), typ=feed_profile.TYPE)
    public = [
        apikey.mask(key),
        apikey.digest(key).hex(),
        b64encode(apikey.digest(key)).decode(),
        ID,
        key[:-1] + ("x" if key[-1] != "x" else "y"),
        json.dumps([tokens.signer(name).jwk() for name in GENERATE]),
        feed,
    ]

    assert not Secrets().find("\n".join(public).encode())


# --- places


def found_by(sweep: Sweep) -> list[str]:
    sweep.look("now")
    return sweep.findings


def test_a_secret_in_a_file_is_found(planted: Path, key: str) -> None:
    (planted / "log").mkdir()
    (planted / "log" / "serve.log").write_text(f"presented {key}\n", encoding="utf-8")
    sweep = Sweep()
    sweep.files(planted)

    (finding,) = sweep.findings
    assert finding.endswith("log/serve.log")


def test_a_secret_in_a_database_and_in_its_log_is_found(planted: Path, key: str) -> None:
    """Also in a row that was deleted: its bytes stay until something else needs the place."""
    another = apikey.make("ck_live")
    with closing(sqlite3.connect(planted / "coatcheck.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (id TEXT, key TEXT)")
        connection.execute("INSERT INTO t VALUES (?, ?)", (ID, key))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("INSERT INTO t VALUES (?, ?)", (ID, another))
        connection.execute("DELETE FROM t")
        sweep = Sweep()
        sweep.file(planted / "coatcheck.db")
        assert [apikey.mask(key) in finding for finding in sweep.findings] == [True]
        sweep.file(planted / "coatcheck.db-wal")
    assert any(apikey.mask(another) in finding for finding in sweep.findings)


def test_a_sealing_key_is_found_everywhere_but_at_home(deployment: Deployment) -> None:
    folder = deployment.settings.keys_dir.parent
    (file,) = deployment.settings.keys_dir.glob("sealing-*.key")
    sweep = Sweep()
    sweep.files(folder)
    assert not sweep.findings

    (folder / "settings").write_bytes(file.read_bytes())
    sweep.files(folder)
    assert len(sweep.findings) == 1


def test_a_secret_in_a_log_line_is_found(key: str) -> None:
    """At any level, as an argument, and in the trace of an exception."""
    sweep = Sweep()
    ours, another = logging.Logger("coatcheck.server"), logging.Logger("some.library")
    for logger in (ours, another):
        logger.addHandler(Listener(sweep))
    ours.debug("presented %s", key)
    try:
        int(key)
    except ValueError:
        another.exception("refused")

    assert len(found_by(sweep)) == 2


def test_a_secret_among_arguments_is_found(key: str) -> None:
    """In a command that a test starts, and in what a service starts itself."""
    sweep = Sweep()
    sweep.command(("keys", "show", key), "", "")
    assert len(found_by(sweep)) == 1

    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["sh", "-c", f"'{sys.executable}' -c '{script}' $KEY; true"],
        env=clean_environment() | {"KEY": key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sweep.process(process.pid)
        process.communicate()
    # The shell's child is given what the shell itself is not.
    assert len(found_by(sweep)) == 2


def test_a_secret_that_a_command_says_is_found(key: str) -> None:
    """Some commands show one on stdout, once; none does on stderr."""
    sweep = Sweep()
    sweep.command(("keys", "create", "--name", "x"), key, "")
    assert not found_by(sweep)
    sweep.command(("keys", "create", "--name", "x"), key + key, "")
    assert len(found_by(sweep)) == 1
    sweep.command(("keys", "create", "--name", "x"), "", key)
    assert len(found_by(sweep)) == 2
    sweep.command(("keys", "list"), key, "")
    assert len(found_by(sweep)) == 3


KEYS = f"/v1/keys/{ID}"
#: Method and path of a request, and whether it is answered with a secret if it succeeds.
ANSWERS = {
    "POST /oauth/token": True,
    "POST /v1/keys": True,
    f"POST {KEYS}/rotate": True,
    f"POST {KEYS}/reveal": True,
    "PUT /v1/devices/laptop-1/key": True,
    "POST /v1/organizations": True,
    "POST /v1/organizations/org_0FvQ2uWwXk3sT1bL9cZp4E/bootstrap": True,
    "POST /v1/mcp/connections": True,
    "POST /coat/v1/keys": True,
    "POST /docs": False,
    "GET /v1/whoami": False,
    "GET /v1/keys": False,
    f"GET {KEYS}": False,
    f"PATCH {KEYS}": False,
    f"GET {KEYS}/rotate": False,
    f"POST {KEYS}/revoke": False,
    f"POST {KEYS}/end-overlap": False,
    "POST /v1/keys/search": False,
    "POST /v1/keys/": False,
    "GET /v1/devices": False,
    "DELETE /v1/devices/laptop-1/key": False,
    "GET /v1/organizations": False,
    "POST /v1/organizations/org_0FvQ2uWwXk3sT1bL9cZp4E/suspend": False,
    "GET /v1/mcp/clients": False,
    "POST /v1/usage": False,
    "GET /v1/events": False,
}


def answered(key: str, line: str, status: int, headers: dict[str, str]) -> list[str]:
    """What is found when a request is answered with an API key."""
    sweep = Sweep()

    def send(client: object, request: httpx2.Request) -> httpx2.Response:
        text = f"here you are: {key}"
        return httpx2.Response(status, text=text, headers=headers, request=request)

    method, path = line.split(" ")
    looked_at(send, sweep)(None, httpx2.Request(method, f"https://auth.example.com{path}"))
    return found_by(sweep)


@pytest.mark.parametrize("line", ANSWERS)
def test_a_secret_in_an_answer_is_found(key: str, line: str) -> None:
    """Unless it is an answer that is there to show one."""
    assert len(answered(key, line, 200, {})) == (0 if ANSWERS[line] else 1)
    assert len(answered(key, line, 400, {})) == 1


def test_a_secret_in_an_answer_that_is_repeated_is_found(key: str) -> None:
    """A secret is shown once, and not to whoever asks for the same again."""
    assert answered(key, "POST /v1/keys", 201, {"Idempotency-Replayed": "true"})


# --- a whole run

LEAKING = """
import logging
from pathlib import Path
from coatcheck import apikey

KEY = apikey.make("ck_live")

def test_that_writes_it(tmp_path: Path) -> None:
    (tmp_path / "found.txt").write_text(KEY)

def test_that_logs_it() -> None:
    logging.getLogger("some.library").debug("sent %s", KEY)

def test_that_prints_it() -> None:
    print(KEY)
"""
CLEAN = """
def test_that_keeps_it(tmp_path) -> None:
    (tmp_path / "file").write_text("nothing")
"""


def run(folder: Path, tests: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """A run of tests of its own, in its own process."""
    (folder / "test_run.py").write_text(tests, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "support.sweep", "-p", "no:cacheprovider"),
            *(f"--basetemp={folder / 'base'}", "-q", *options, str(folder)),
        ],
        cwd=folder,
        env=clean_environment()
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("options", [(), ("-p", "xdist.plugin", "-n", "1")], ids=["one", "xdist"])
def test_a_run_that_leaves_secrets_behind_fails(planted: Path, options: tuple[str, ...]) -> None:
    """All of its tests pass, and it fails all the same; it says where, and not what."""
    done = run(planted, LEAKING, *options)

    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    told = done.stdout.partition("secrets where none may be")[2]
    assert "found.txt" in told
    assert "a log line of some.library" in told
    assert "captured stdout" in told
    assert not Secrets().find(told.encode())


def test_a_run_that_leaves_none_behind_passes(planted: Path) -> None:
    done = run(planted, CLEAN)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "secrets where none may be" not in done.stdout
