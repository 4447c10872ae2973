"""Signing keys in operators' hands: two of them at once, keys from elsewhere, a kill at any step.

answers.md K12-K16, K21, F2, F3; contract.md, "Signing keys and `keys/`".
"""

import json
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from coatcheck.cli import signing_keys as commands
from coatcheck.cli.commands import app
from coatcheck.cli.output import Exit
from coatcheck.server import catalog as catalogs
from coatcheck.server import sealing, setup, signing
from coatcheck.server.settings import Settings
from coatcheck.server.store import Transaction, open_store
from coatcheck.server.store.tables import SigningKey
from support.deployment import TESTER
from support.live import clean_environment
from support.secrets import SWEEP

#: Far enough back that everything made since then is news.
SET_UP_AT: Final = int(time.time()) - 3600
LINES: Final = len(signing.first_lines(()))
MOST_STEPS: Final = 200


@dataclass(frozen=True)
class Home:
    """A deployment in a folder, and its operator at the command line."""

    folder: Path

    @property
    def keys_dir(self) -> Path:
        return self.folder / "keys"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COATCHECK_DATABASE_URL": f"sqlite:///{self.folder}/coatcheck.db",
            "COATCHECK_KEYS_DIR": str(self.keys_dir),
        }

    def set_up(self) -> "Home":
        settings = Settings.load(self.environment)
        with closing(open_store(settings.database_url)) as store:
            setup.initialize(
                settings,
                catalogs.without_file(settings),
                store,
                TESTER,
                now=SET_UP_AT,
                organization_name="Acme",
            )
        return self

    def run(self, *arguments: str, code: int = Exit.OK, stdin: bytes = b"", says: str = "") -> Any:
        """Run `coatcheck signing-keys … --json` as a command that begins now.

        Returns what it printed, parsed; None where it printed nothing.
        """
        # A command is a process of its own, of which this is the moment when it began.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commands, "STARTED_AT", time.time())
            done = CliRunner().invoke(
                app, ["signing-keys", *arguments, "--json"], input=stdin, env=self.environment
            )
        SWEEP.command(arguments, done.stdout, done.stderr)
        assert done.exit_code == code, (done.stdout, done.stderr)
        assert says in done.stderr
        assert "Traceback" not in done.output
        return json.loads(done.stdout) if done.stdout else None

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        with (
            closing(open_store(self.environment["COATCHECK_DATABASE_URL"])) as store,
            store.transaction(read_only=True) as tx,
        ):
            yield tx

    def rows(self) -> list[SigningKey]:
        with self.reading() as tx:
            return list(tx.signing_keys())

    def log_of(self, subject: str) -> list[str]:
        with self.reading() as tx:
            return [change.what for change in tx.changes(subject)]

    def require_whole(self) -> None:
        """Every half opens and fits, and exactly one signing key of each line signs."""
        with closing(open_store(self.environment["COATCHECK_DATABASE_URL"])) as store:
            ring = signing.Ring.read(
                store.signing_keys(), sealing.load(self.keys_dir), signing.Ring(())
            )
        ring.require_open()
        now = int(time.time())
        lines = [one.line for one in ring.signing_keys if one.signs(now)]
        assert sorted(lines) == sorted({one.line for one in ring.signing_keys})
        with self.reading() as tx:
            for row in tx.signing_keys():
                assert [change.what for change in tx.changes(row.kid)] == ["signing_key.created"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("template")).set_up()


@pytest.fixture
def home(template: Home, tmp_path: Path) -> Home:
    """A deployment that was set up an hour ago."""
    shutil.copytree(template.folder, tmp_path / "home")
    SWEEP.learn_deployment(tmp_path / "home")
    return Home(tmp_path / "home")


# --- two operators


def test_of_two_operators_who_rotate_at_once_one_wins(home: Home) -> None:
    """K21: also with `--now`, where nothing waits to start that could be in the second one's way.

    What counts is what there was when the command was given: a second operator who sees the new
    signing key in the list and rotates again does so.
    """
    command = [sys.executable, "-m", "coatcheck.cli", "signing-keys", "rotate", "--now", "--json"]
    processes = [
        subprocess.Popen(
            command,
            env=clean_environment() | home.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=60) for process in processes]

    assert sorted(process.returncode for process in processes) == [Exit.OK, Exit.CONFLICT], told
    (made,) = [json.loads(stdout)["kid"] for stdout, _ in told if stdout]
    (conflict,) = [stderr for stdout, stderr in told if not stdout]
    assert f"signing key {made} was made meanwhile" in conflict
    assert len(home.rows()) == LINES + 1
    home.run("rotate", "--now")
    assert len(home.rows()) == LINES + 2


# --- keys from elsewhere, and to elsewhere


def test_a_signing_key_goes_out_and_comes_in_elsewhere(home: Home, tmp_path: Path) -> None:
    """A migration: its tokens go on verifying under the name that they have."""
    kid = home.rows()[0].kid
    out = tmp_path / "private.jwk"
    SWEEP.excuse(out)

    home.run("export", kid, "--private", "--yes", code=Exit.USAGE, says="--out")
    home.run("export", kid, "--private", "--out", str(out), code=Exit.USAGE, says="--yes")
    assert not out.exists()
    told = home.run("export", kid, "--private", "--out", str(out), "--yes")
    home.run(
        *("export", kid, "--private", "--out", str(out), "--yes"),
        code=Exit.USAGE,
        says="name a new file",
    )

    assert told == {"kid": kid, "private": True, "file": str(out)}
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert home.log_of(kid) == ["signing_key.created", "signing_key.exported"]
    home.run("import", str(out), "--kid", "other", code=Exit.CONFLICT, says=f"signing key {kid}")

    elsewhere = Home(tmp_path / "elsewhere").set_up()
    taken = elsewhere.run("import", str(out), "--kid", "main", "--now", says="remove the file")
    assert (taken["kid"], taken["state"]) == ("main", "signing")
    taken_public = elsewhere.run("export", "main")
    assert {name: taken_public[name] for name in ("x", "y")} == {
        name: home.run("export", kid)[name] for name in ("x", "y")
    }


def test_what_goes_out_unasked_is_public(home: Home) -> None:
    """As the key set shows it, or as other tools read it."""
    kid = home.rows()[1].kid

    public = home.run("export", kid)
    pem = home.run("export", kid, "--format", "pem")["pem"]

    assert set(public) == {"kty", "n", "e", "kid", "alg", "use"}
    assert serialization.load_pem_public_key(pem.encode()) == jwt.PyJWK(public).key
    assert home.log_of(kid) == ["signing_key.created"]
    home.run("export", "nobody", code=Exit.NOT_FOUND, says="signing-keys list")


def test_an_import_is_refused_with_the_reason(home: Home, tmp_path: Path) -> None:
    """K13: exit 3 for the key itself, 2 for the command, 5 for the ring."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    SWEEP.excuse(tmp_path / "open.pem")
    (tmp_path / "open.pem").write_bytes(pem)
    (tmp_path / "open.pem").chmod(0o644)
    before = len(home.rows())

    home.run("import", str(tmp_path / "absent"), code=Exit.USAGE, says="cannot be read")
    home.run("import", "-", stdin=b"", code=Exit.REFUSED, says="neither PEM nor JWK")
    crlf = pem.replace(b"\n", b"\r\n")
    home.run("import", "-", stdin=crlf, code=Exit.REFUSED, says="end in CR LF")
    home.run("import", "-", "--kid", "a b", stdin=pem, code=Exit.REFUSED, says="its kid")
    home.run("import", "-", "--for", "nothing", stdin=pem, code=Exit.USAGE, says="--for token")
    assert len(home.rows()) == before

    file = str(tmp_path / "open.pem")
    made = home.run("import", file, says="is open to other users")
    assert (made["state"], made["algorithm"]) == ("pending", "ES256")
    home.run("import", file, code=Exit.CONFLICT, says="in the ring already")
    home.run("rotate", code=Exit.CONFLICT, says="waiting to start")


# --- re-sealing


def test_a_new_sealing_key_is_made_handed_out_and_used(home: Home) -> None:
    """Two steps for many nodes, one for a single node; it says which file can go."""
    (old,) = home.keys_dir.iterdir()

    prepared = home.run("reseal", "--prepare", says="hand the file to every node")
    assert home.run("reseal", "--prepare")["sealingKey"] == prepared["sealingKey"]
    home.run("rotate")
    assert {row.sealing_key_id for row in home.rows()} == {old.stem.removeprefix("sealing-")}
    done = home.run("reseal", says="once every node has the new file")

    assert done["sealingKey"] == prepared["sealingKey"]
    assert done["obsolete"] == [str(old)]
    assert done["resealed"] == [row.kid for row in home.rows()]
    old.unlink()
    home.require_whole()
    again = home.run("reseal", "--new")
    assert again["sealingKey"] != done["sealingKey"]
    assert again["obsolete"] == [prepared["file"]]
    home.run("reseal", "--to", "0123", code=Exit.ERROR, says="has no sealing-0123.key")
    home.run("reseal", "--new", "--to", "0123", code=Exit.USAGE, says="leave --new out")


# --- killed

#: Copies a deployment for each step of a command, and kills the command at that step: before each
#: statement that writes, after the last one, and at both sides of each call for the disk.
KILLER = """
import os, shutil, signal, sqlite3, sys

template, folder, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
from coatcheck.cli import local
from coatcheck.cli.commands import app

WRITES = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "COMMIT")


def arm(step):
    passed = 0

    last = ""

    def one():
        nonlocal passed
        passed += 1
        if passed == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(text):
        nonlocal last
        if text.startswith(WRITES) or last == "COMMIT":
            one()
        last = text

    def traced(connect):
        def connect_traced(*arguments, **options):
            connection = connect(*arguments, **options)
            connection.set_trace_callback(statement)
            return connection
        return connect_traced

    def counted(call):
        def call_counted(*arguments, **options):
            one()
            done = call(*arguments, **options)
            one()
            return done
        return call_counted

    sqlite3.connect = traced(sqlite3.connect)
    for name in ("fsync", "rename"):
        setattr(os, name, counted(getattr(os, name)))


for step in range(1, most + 1):
    home = f"{folder}/{step}"
    shutil.copytree(template, home)
    child = os.fork()
    if child == 0:
        os.environ["COATCHECK_DATABASE_URL"] = f"sqlite:///{home}/coatcheck.db"
        os.environ["COATCHECK_KEYS_DIR"] = f"{home}/keys"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        arm(step)
        app(sys.argv[4:], standalone_mode=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        print(step)
        break
"""


def killed_at_each_step(template: Home, folder: Path, *arguments: str) -> list[Home]:
    """What a command has left behind, by the step at which it was killed; the last one was not."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", KILLER, str(template.folder), str(folder)),
            *(str(MOST_STEPS), "signing-keys", *arguments, "--json"),
        ],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Home(folder / str(step)) for step in range(1, int(done.stdout) + 1)]


def test_a_rotation_that_is_killed_at_any_step_is_done_by_the_next(
    template: Home, tmp_path: Path
) -> None:
    """F3: one new signing key in the end, whenever the first attempt ended; one of each line signs.

    The second attempt makes it, or is told that it was made.
    """
    outcomes: set[int] = set()
    for left in killed_at_each_step(template, tmp_path, "rotate"):
        left.require_whole()
        made = len(left.rows()) - LINES
        code = Exit.CONFLICT if made else Exit.OK
        left.run("rotate", code=code, says="waiting to start" if made else "")
        outcomes.add(code)
        left.require_whole()
        assert len(left.rows()) == LINES + 1

    assert outcomes == {Exit.OK, Exit.CONFLICT}


def test_a_re_sealing_that_is_killed_at_any_step_is_done_by_the_next(
    template: Home, tmp_path: Path
) -> None:
    """F3: everything is under one new sealing key in the end, of which there is exactly one."""
    (old,) = template.keys_dir.iterdir()
    resealed: set[bool] = set()
    for left in killed_at_each_step(template, tmp_path, "reseal", "--new"):
        left.require_whole()
        done_before = {row.sealing_key_id for row in left.rows()} != {
            old.stem.removeprefix("sealing-")
        }
        # Whoever says --new twice after it was done wants a second one.
        done = left.run("reseal", *(() if done_before else ("--new",)))
        resealed.add(done_before)
        assert {row.sealing_key_id for row in left.rows()} == {done["sealingKey"]}
        assert len(list(left.keys_dir.glob("sealing-*.key"))) == 2
        assert done["obsolete"] == [str(left.keys_dir / old.name)]
        (left.keys_dir / old.name).unlink()
        left.require_whole()

    assert resealed == {False, True}
