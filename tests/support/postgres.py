"""A PostgreSQL server of the tests' own, from the machine's binaries; or one that is given.

COATCHECK_TEST_POSTGRES_URL names a server in whose place none is started; its user has to be
allowed to create databases.  Such a server is never stopped or frozen, so that the tests which do
that start their own all the same.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg
import pytest

from support.secrets import SWEEP

GIVEN = os.environ.get("COATCHECK_TEST_POSTGRES_URL", "")
#: Seconds.
START_TIMEOUT = 30
#: Where Debian keeps them, when they are not on the PATH.
_DEBIAN = "/usr/lib/postgresql"
#: Speed for tests: their machine does not lose its power.
_OPTIONS = (
    *("fsync=off", "full_page_writes=off", "wal_level=minimal", "max_wal_senders=0"),
    *("shared_buffers=64MB", "max_connections=200", "listen_addresses=127.0.0.1"),
    *("log_min_messages=fatal", "autovacuum=off"),
    *("max_wal_size=32MB", "min_wal_size=32MB"),
)
_HAS_STRATEGY = 150000
_numbers = count(1)


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where there is no server."""
    candidates = [Path(found).parent for found in (shutil.which("initdb"),) if found]
    versions = Path(_DEBIAN)
    if versions.is_dir():
        candidates += [path / "bin" for path in sorted(versions.iterdir(), reverse=True)]
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


def require() -> Path:
    """Skip the test where there is no server; in CI that is a failure, for CI installs one."""
    found = binaries()
    if found is None:
        reason = "no PostgreSQL server on this machine: install it, or set the URL of one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@dataclass(slots=True)
class Server:
    """A running server and its folder."""

    folder: Path
    port: int
    binaries: Path
    user: int
    process: "subprocess.Popen[bytes]" = field(repr=False)

    def url(self, database: str) -> str:
        return f"postgresql://coatcheck@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database of its own."""
        return new_database(self.url("postgres"))

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: connections are cut at once; SIGQUIT: as a crash."""
        self.process.send_signal(how)
        self.process.wait(timeout=START_TIMEOUT)

    def start(self) -> None:
        """Again, after it was stopped."""
        self.process = _started(self.binaries, self.folder, self.port, self.user)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing answers, and nothing says so: connections stay, as with a machine that hangs."""
        pids = [self.process.pid, *_children(self.process.pid)]
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        # One that was being started meanwhile.
        for pid in set(_children(self.process.pid)) - set(pids):
            _signal(pid, signal.SIGSTOP)
            pids.append(pid)
        try:
            yield
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def new_database(server_url: str) -> str:
    """An empty database on a server; the URL is that of its maintenance database."""
    name = f"coatcheck_{os.getpid()}_{next(_numbers)}"
    with closing(psycopg.connect(server_url, autocommit=True)) as connection:
        # Without this the template's pages go through the log, once for each database.
        how = "STRATEGY file_copy" if connection.info.server_version >= _HAS_STRATEGY else ""
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0 {how}'.encode())
    head, _, rest = server_url.rpartition("/")
    _, question, parameters = rest.partition("?")
    return f"{head}/{name}{question}{parameters}"


@contextmanager
def server() -> Iterator[Server]:
    """A server of its own, until the block ends."""
    found = require()
    # Not below pytest's folder, which is closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="coatcheck-postgres-", dir="/tmp"))
    user = _unprivileged()
    if user != os.getuid():
        os.chown(folder, user, -1)
    port = _free_port()
    running: Server | None = None
    try:
        subprocess.run(
            [found / "initdb", "-D", folder / "data", "-U", "coatcheck", "-A", "trust", "-N"],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
            env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]},
        )
        running = Server(folder, port, found, user, _started(found, folder, port, user))
        yield running
    finally:
        if running is not None and running.process.poll() is None:
            # Orderly, so that everything is in its files when they are looked at.
            running.stop()
            for name in ("base", "pg_wal"):
                SWEEP.pages(folder / "data" / name)
            SWEEP.text("the log of PostgreSQL", (folder / "server.log").read_bytes())
        shutil.rmtree(folder, ignore_errors=True)


def _started(found: Path, folder: Path, port: int, user: int) -> "subprocess.Popen[bytes]":
    options = [word for option in (*_OPTIONS, f"port={port}") for word in ("-c", option)]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [found / "postgres", "-D", folder / "data", "-k", folder, *options],
            stdout=log,
            stderr=log,
            user=user,
            cwd=folder,
        )
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            psycopg.connect(
                f"postgresql://coatcheck@127.0.0.1:{port}/postgres", connect_timeout=2
            ).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return process
    raise AssertionError((folder / "server.log").read_text())


def _unprivileged() -> int:
    """A user who is not root: PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return os.getuid()
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    raise AssertionError("no unprivileged user to run PostgreSQL as")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
