"""The servers under load, each a process of its own on 127.0.0.1 and on the server's core.

Coatcheck is set up through its command line, as an operator does it, with nothing turned off.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final
from urllib.request import Request, urlopen

from bench import machine, references

#: So many keys ask for tokens, however many there are.
KEYS: Final = 1000
#: Seconds until a server that was started must listen.
_START_TIMEOUT: Final = 30
_STOP_TIMEOUT: Final = 20


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers token requests."""

    name: str
    port: int
    pid: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """An initialized Coatcheck with its keys.

    Attributes:
        environment: its settings; with PYTHONPATH when the code is another tree's.
        keys: a file of JSON lines, as `coatcheck keys create --count` prints them: KEYS of them,
            spread over all there are.
    """

    environment: Mapping[str, str]
    port: int
    keys: Path


def deploy(
    folder: Path,
    source: Path | None = None,
    count: int = KEYS,
    database_url: str | None = None,
) -> Deployment:
    """Set up Coatcheck in a folder.

    Args:
        count: how many API keys to make, KEYS or more.
        database_url: an empty database; None: a file in the folder.
        source: the `app` folder of another tree to run; None: the installed one.
    """
    folder.mkdir()
    port = _free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if "COATCHECK" not in name},
        "COATCHECK_ISSUER": f"http://127.0.0.1:{port}",
        "COATCHECK_DATABASE_URL": database_url or f"sqlite:///{folder}/coatcheck.db",
        "COATCHECK_KEYS_DIR": str(folder / "keys"),
    }
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    for _ in _lines(environment, "init", "--json"):
        pass
    scopes = ("--scope", "widgets:read", "--scope", "widgets:write")
    keys = folder / "keys.jsonl"
    keys.touch(mode=0o600)
    with keys.open("w", encoding="utf-8") as kept:
        making = ("keys", "create", "--name", "b", "--count", str(count), *scopes)
        for number, line in enumerate(_lines(environment, *making)):
            if number % max(1, count // KEYS) == 0:
                kept.write(line)
    return Deployment(environment, port, keys)


@contextmanager
def coatcheck(
    name: str, deployment: Deployment, core: int | None, workers: int = 1
) -> Iterator[Target]:
    """`coatcheck serve`, until the block ends."""
    command = ["-m", "coatcheck.cli", "serve", "--port", str(deployment.port)]
    command += ["--workers", str(workers)] if workers > 1 else []
    with _serving(name, deployment.port, command, deployment.environment, core) as target:
        yield target


@contextmanager
def reference(name: str, keys: Path, core: int | None) -> Iterator[Target]:
    """R or F, until the block ends."""
    port = _free_port()
    command = ["-m", "bench.references", name, str(port), str(keys)]
    with _serving(name, port, command, os.environ, core) as target:
        yield target


def some_tokens(deployment: Deployment, count: int) -> tuple[list[str], bytes]:
    """Access tokens of a running Coatcheck, one per key, and the key set that verifies them."""
    issuer = deployment.environment["COATCHECK_ISSUER"]
    tokens = []
    with deployment.keys.open(encoding="utf-8") as lines:
        for _, made in zip(range(count), map(json.loads, lines), strict=False):
            body = f"grant_type=client_credentials&client_secret={made['key']}".encode()
            request = Request(f"{issuer}{references.PATH}", body)  # noqa: S310 - our own server
            with urlopen(request, timeout=10) as answer:  # noqa: S310
                tokens.append(json.load(answer)["access_token"])
    with urlopen(f"{issuer}/.well-known/jwks.json", timeout=10) as answer:  # noqa: S310
        return tokens, answer.read()


@contextmanager
def _serving(
    name: str, port: int, arguments: list[str], environment: Mapping[str, str], core: int | None
) -> Iterator[Target]:
    # A file and no pipe: nobody would read a pipe under load, and a full one blocks.
    with TemporaryFile() as log:
        with machine.pinned_to(core):
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=log, stderr=log
            )
        try:
            _wait_until_it_listens(process, port, log)
            yield Target(name, port, process.pid)
        finally:
            process.terminate()
            process.wait(timeout=_STOP_TIMEOUT)


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    log.seek(0)
    sys.exit(f"a server did not start:\n{log.read().decode(errors='replace')}")


def _lines(environment: Mapping[str, str], *arguments: str) -> Iterator[str]:
    """What a command prints, line by line: a million keys are a quarter of a gigabyte."""
    with subprocess.Popen(
        [sys.executable, "-m", "coatcheck.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None  # noqa: S101
        yield from process.stdout
    if process.returncode:
        sys.exit(f"coatcheck {' '.join(arguments)}: exit {process.returncode}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
