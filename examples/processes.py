"""The service and the example resource server as processes, for `make run` and `make demo`."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
#: Seconds until a process that was started must answer.
START_TIMEOUT = 30
EXIT_CONFLICT = 5


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment by its settings, driven through the command line."""

    environment: Mapping[str, str]

    @property
    def issuer(self) -> str:
        return self.environment["COATCHECK_ISSUER"]

    @property
    def audience(self) -> str:
        return self.environment["COATCHECK_AUDIENCE"]

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `coatcheck …`; what it says to people goes to ours."""
        return subprocess.run(
            [sys.executable, "-m", "coatcheck.cli", *arguments],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )

    def json(self, *arguments: str) -> dict[str, Any]:
        """The document that a command prints; a command that fails ends the program."""
        done = self.command(*arguments, "--json")
        if done.returncode:
            sys.exit(done.returncode)
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def initialize(self) -> dict[str, Any] | None:
        """Set it up; None if that was done before."""
        done = subprocess.run(
            [sys.executable, "-m", "coatcheck.cli", "init", "--json"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == EXIT_CONFLICT:
            return None
        if done.returncode:
            sys.exit(done.stderr.strip())
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    def start(self, name: str, folder: Path, **secrets: str) -> "subprocess.Popen[bytes]":
        """Start `service` or `resource-server` and wait until it answers.

        Args:
            folder: where its log goes.
            secrets: settings for this process alone.
        """
        arguments, url = {
            "service": (
                ["-m", "coatcheck.cli", "serve", "--port", _port(self.issuer)],
                f"{self.issuer}/readyz",
            ),
            "resource-server": (
                [
                    *("-m", "uvicorn", "--app-dir", str(EXAMPLES), "resource_server:app"),
                    *("--port", _port(self.audience), "--no-access-log"),
                ],
                f"{self.audience}/",
            ),
        }[name]
        log_path = folder / f"{name}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **self.environment, **secrets},
                stdout=log,
                stderr=log,
            )
        _wait_for(url, process, log_path)
        return process

    @contextmanager
    def running(
        self, folder: Path, service_key: str
    ) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
        """Service and resource server, until the block ends.

        Args:
            service_key: the resource server's own API key.
        """
        processes = {"service": self.start("service", folder)}
        try:
            processes["resource-server"] = self.start(
                "resource-server", folder, COATCHECK_SERVICE_KEY=service_key
            )
            yield processes
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait()


def _port(url: str) -> str:
    return url.rpartition(":")[2]


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own http URL
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    sys.exit(f"{url} did not come up:\n{log_path.read_text()}")
