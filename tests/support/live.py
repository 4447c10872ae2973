"""The service as a process of its own, on a free port of 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2

from support import forks
from support.secrets import SWEEP

START_TIMEOUT = 30
COMMAND_TIMEOUT = 120


class Process(Protocol):
    """What tests do with a process, however it was started."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Live:
    """A running service and the folder it lives in."""

    issuer: str
    folder: Path
    environment: Mapping[str, str]
    initialized: Mapping[str, str]
    process: Process

    def command(
        self, *arguments: str, stdin: str | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run `coatcheck …` on the same deployment."""
        return run_command(*arguments, environment={**self.environment, **environment}, stdin=stdin)

    def api_key(self, *scopes: str, **options: str) -> dict[str, Any]:
        """A new API key, made by the command line."""
        arguments = ["keys", "create", "--json"]
        for name, value in {"name": "live", **options}.items():
            arguments += [f"--{name}", value]
        for scope in scopes:
            arguments += ["--scope", scope]
        done = self.command(*arguments)
        assert done.returncode == 0, done.stderr
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text(encoding="utf-8")


def run_command(
    *arguments: str,
    environment: Mapping[str, str],
    stdin: str | None = None,
    is_started: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run `coatcheck …` with just this environment of ours.

    Args:
        is_started: by `python -m`, and not forked from a process that has everything imported.
    """
    whole = clean_environment() | dict(environment)
    if is_started:
        done = subprocess.run(
            [sys.executable, "-m", "coatcheck.cli", *arguments],
            env=whole,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
    else:
        done = forks.run(arguments, whole, stdin or "", COMMAND_TIMEOUT)
    SWEEP.command(arguments, done.stdout, done.stderr)
    return done


def clean_environment() -> dict[str, str]:
    """This process's environment without our own settings."""
    return {name: value for name, value in os.environ.items() if "COATCHECK" not in name}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve(
    environment: Mapping[str, str], log: Path, *options: str, is_started: bool = False
) -> Process:
    """Run `coatcheck serve`, which adds to this log.  Whoever runs it ends it.

    Args:
        is_started: as for `run_command`.
    """
    whole = clean_environment() | dict(environment)
    with Path(os.devnull).open("rb") as nothing, log.open("ab") as stream:
        if not is_started:
            streams = (nothing.fileno(), stream.fileno(), stream.fileno())
            return forks.start(("serve", *options), whole, streams)
        return subprocess.Popen(
            [sys.executable, "-m", "coatcheck.cli", "serve", *options],
            env=whole,
            stdin=nothing,
            stdout=stream,
            stderr=stream,
        )


def a_service(folder: Path, *options: str, **settings: str) -> AbstractContextManager[Live]:
    """A service that was just initialized, until the block ends.

    Args:
        options: of `coatcheck serve`.
        settings: `COATCHECK_*`, lower case and without the prefix.
    """
    return _a_service(folder, options, settings, is_started=False)


def a_started_service(folder: Path) -> AbstractContextManager[Live]:
    """As `a_service`, by `python -m`: one that was forked takes longer to end.

    It takes apart all that was imported.
    """
    return _a_service(folder, (), {}, is_started=True)


@contextmanager
def _a_service(
    folder: Path, options: Sequence[str], settings: Mapping[str, str], *, is_started: bool
) -> Iterator[Live]:
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    environment = {
        "COATCHECK_ISSUER": issuer,
        "COATCHECK_DATABASE_URL": f"sqlite:///{folder}/coatcheck.db",
        "COATCHECK_KEYS_DIR": str(folder / "keys"),
        **{f"COATCHECK_{name.upper()}": value for name, value in settings.items()},
    }
    made = run_command("init", "--json", environment=environment)
    assert made.returncode == 0, made.stderr
    process = serve(
        environment, folder / "serve.log", "--port", str(port), *options, is_started=is_started
    )
    live = Live(issuer, folder, environment, json.loads(made.stdout), process)
    try:
        wait_until_ready(live)
        SWEEP.process(process.pid)
        SWEEP.learn_deployment(folder)
        yield live
        # Its end takes the log of its database away.
        SWEEP.file(folder / "coatcheck.db-wal")
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_until_ready(live: Live) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    # One client: each new one reads all certificates of the machine first.
    with httpx2.Client(base_url=live.issuer, timeout=2) as http:
        while time.monotonic() < deadline:
            assert live.process.poll() is None, live.log
            try:
                if http.get("/readyz").status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.02)
    raise AssertionError(live.log)
