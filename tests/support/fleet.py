"""Several nodes of one deployment: processes that share a database and nothing else.

Each node is a `coatcheck serve` on its own port.  The issuer is the address of a balancer before
them, so that callers who know only the issuer meet any of them, and who knows a node's own URL
meets that one.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

from coatcheck.durations import FEED_WAIT_MAX
from coatcheck.server import catalog as catalogs
from coatcheck.server.manage import api_keys
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from coatcheck.verifier import Verifier
from support.deployment import TESTER
from support.live import Process, free_port, run_command, serve
from support.proxy import proxy
from support.secrets import SWEEP

_START_TIMEOUT: Final = 60
_ESTABLISHED: Final = "01"
_FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass(slots=True)
class Node:
    """One of the processes, and the workers below it."""

    port: int
    environment: Mapping[str, str]
    log: Path
    number_of_workers: int = 1
    process: Process | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **settings: str) -> None:
        """Start it, and do not wait.  `settings` are of this time only, as those of a fleet."""
        environment = {**self.environment, **_named(settings)}
        options = ("--port", str(self.port), "--workers", str(self.number_of_workers))
        self.process = serve(environment, self.log, *options)

    def wait_until_ready(self, within_s: float = _START_TIMEOUT) -> None:
        until = time.monotonic() + within_s
        while not self.is_ready():
            assert self.process is not None
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.02)

    def is_ready(self) -> bool:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            try:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def stop(self) -> None:
        """In peace."""
        self._end(signal.SIGTERM)

    def token(self, secret: str) -> str:
        """A new token for this API key."""
        form = {"grant_type": "client_credentials", "client_secret": secret}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("POST", "/oauth/token", urlencode(form), _FORM)
            answer = connection.getresponse()
            body = answer.read()
        assert answer.status == 200, body
        token: str = json.loads(body)["access_token"]
        return token

    def kill(self) -> None:
        """Its supervisor; the workers follow."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_until_ready()

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=_START_TIMEOUT)
            self.process = None

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")[-4000:] if self.log.exists() else ""

    # --- its workers

    def workers(self) -> list[int]:
        """Process ids of those that live; that of the node itself, if it has only one."""
        assert self.process is not None
        pid = self.process.pid
        if self.number_of_workers == 1:
            return [pid]
        return [one for one in _children(pid) if _is_worker(one)]

    def kill_a_worker(self, chance: random.Random) -> bool:
        """Whether there was one."""
        workers = self.workers()
        if workers:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(workers), signal.SIGKILL)
        return bool(workers)

    def connections(self, timeout_s: float) -> list[HTTPConnection]:
        """An open connection to each worker, so that each can be asked."""
        found: dict[int, HTTPConnection] = {}
        until = time.monotonic() + _START_TIMEOUT
        with ExitStack() as others:
            while len(found) < self.number_of_workers:
                assert time.monotonic() < until, f"only workers {sorted(found)} take connections"
                connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
                # Answered, and so accepted.
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                worker = self._holder(connection, set(self.workers()) - found.keys())
                if worker is not None:
                    found[worker] = connection
                else:
                    others.callback(connection.close)
                    time.sleep(0.01)
        return list(found.values())

    def _holder(self, connection: HTTPConnection, workers: set[int]) -> int | None:
        """Which of these workers holds the other end of a connection."""
        inode = _inode(self.port, connection.sock.getsockname()[1])
        return next((pid for pid in workers if inode in _sockets(pid)), None)


@dataclass(slots=True)
class Fleet:
    """The nodes, what they share, and what one may do to it."""

    issuer: str
    folder: Path
    environment: Mapping[str, str]
    organization_id: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings.load(self.environment)

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Its database, as an operator's command opens it: directly, past every node."""
        with closing(open_store(self.settings.database_url)) as store:
            yield store

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run_command(*arguments, environment=self.environment)

    def api_keys(
        self, store: Store, *scopes: str, count: int = 1, name: str = "fleet"
    ) -> list[tuple[str, str]]:
        """New API keys: ids and secrets."""
        settings = self.settings
        made = api_keys.create_many(
            store,
            catalogs.without_file(settings),
            api_keys.NewApiKey(self.organization_id, name, scopes),
            TESTER,
            now=int(time.time()),
            issuer=settings.issuer,
            count=count,
        )
        return list(made)

    def add_node(
        self, *, port: int = 0, workers: int = 1, database_url: str = "", **settings: str
    ) -> Node:
        """Another node, not started yet.

        Args:
            port: default: any that is free.
            database_url: the way of this node to the database, if it has one of its own.
            settings: of this node only; as those of a fleet.
        """
        environment = {**self.environment, **_named(settings)}
        if database_url:
            environment["COATCHECK_DATABASE_URL"] = database_url
        log = self.folder / f"node-{len(self.nodes) + 1}.log"
        node = Node(port or free_port(), environment, log, workers)
        self.nodes.append(node)
        return node

    def start(self) -> None:
        """All nodes, and wait until they are ready."""
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait_until_ready()

    def stop(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                node.process.terminate()
        for node in self.nodes:
            node.stop()


@contextmanager
def a_fleet(
    folder: Path,
    *,
    nodes: int,
    workers: int = 1,
    database_url: str = "",
    way: str = "",
    **settings: str,
) -> Iterator[Fleet]:
    """Nodes of a deployment that was just initialized, all ready, until the block ends.

    Args:
        workers: of each node.
        database_url: of an empty database; default: a SQLite file in the folder.
        way: the nodes' own URL of that database; default: the same.
        settings: `COATCHECK_*`, lower case and without the prefix.
    """
    ports = [free_port() for _ in range(nodes)]
    with proxy(*ports) as balancer:
        issuer = f"http://127.0.0.1:{balancer.port}"
        environment = {
            "COATCHECK_ISSUER": issuer,
            "COATCHECK_DATABASE_URL": database_url or f"sqlite:///{folder}/coatcheck.db",
            "COATCHECK_KEYS_DIR": str(folder / "keys"),
            **_named(settings),
        }
        made = run_command("init", "--json", environment=environment)
        assert made.returncode == 0, made.stderr
        fleet = Fleet(issuer, folder, environment, json.loads(made.stdout)["organization"])
        for port in ports:
            fleet.add_node(port=port, workers=workers, database_url=way)
        try:
            fleet.start()
            for node in fleet.nodes:
                assert node.process is not None
                SWEEP.process(node.process.pid)
            yield fleet
        finally:
            fleet.stop()


def a_verifier_at(node: Node, fleet: Fleet, audience: str, service_key: str) -> Verifier:
    """Follows the feed of one node; API keys that it exchanges go to any."""
    fetch = partial(fetch_from, node)
    return Verifier(fleet.issuer, audience, service_key=service_key, fetch=fetch)


def fetch_from(node: Node, url: str) -> bytes:
    """What is at a URL of the issuer's, from this node.  Raises OSError, HTTPException."""
    parts = urlsplit(url)
    with closing(HTTPConnection("127.0.0.1", node.port, timeout=2 * FEED_WAIT_MAX)) as connection:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path)
        answer = connection.getresponse()
        body = answer.read()
    if answer.status != 200:
        raise OSError(f"{answer.status} from {parts.path}")
    return body


def _named(settings: Mapping[str, str]) -> dict[str, str]:
    return {f"COATCHECK_{name.upper()}": value for name, value in settings.items()}


# --- what /proc tells


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _is_worker(pid: int) -> bool:
    """And not the process that multiprocessing keeps for its semaphores, nor a dead one."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _inode(server_port: int, client_port: int) -> str:
    """Of the server's end of a connection over 127.0.0.1."""
    here, there = f"0100007F:{server_port:04X}", f"0100007F:{client_port:04X}"
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == [here, there, _ESTABLISHED]:
            return fields[9]
    return ""


def _sockets(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                match = re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))
                if match is not None:
                    found.add(match[1])
    return found
