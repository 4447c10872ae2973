"""The life of a process: it starts or says why not, stops in peace, and is replaced unnoticed."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import pytest

from support.callers import calling
from support.live import (
    Live,
    a_service,
    a_started_service,
    free_port,
    run_command,
    serve,
    wait_until_ready,
)
from support.wire import answer_of, connect, head, read_to_the_end

STOP_S = 5.0
#: Longer than anything takes that works.
FOREVER_S = 30

needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes are looked at in /proc"
)


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that comes true by itself."""
    ends_at = time.monotonic() + FOREVER_S
    while not holds():
        assert time.monotonic() < ends_at, "it did not come true"
        time.sleep(0.05)


def events(live: Live) -> list[dict[str, Any]]:
    """The lines of the log."""
    return [json.loads(line) for line in live.log.splitlines()]


def good_request(live: Live) -> bytes:
    body = b"grant_type=client_credentials&client_secret=%b" % live.api_key()["key"].encode()
    return head(f"Content-Length: {len(body)}") + body


# --- stopping


class Stopped(NamedTuple):
    """How a service ended that was told to."""

    code: int
    took_s: float
    statuses: list[int]
    rest: bytes


def told_to_stop(folder: Path) -> Stopped:
    """A service is told to stop while it is busy with answers, with silence, and with polls."""
    folder.mkdir()
    with a_started_service(folder) as live, ExitStack() as stack:
        request = good_request(live)
        idle, asking, half, polling = (
            stack.enter_context(closing(connect(live, FOREVER_S))) for _ in range(4)
        )
        idle.sendall(request)
        idle.recv(65_536)
        half.sendall(request[:-10])
        polling.sendall(b"GET /oauth/revocations?after=1000000&wait=25 HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(20):
            silent = stack.enter_context(closing(connect(live)))
            silent.sendall(request[:-10])
            unread = stack.enter_context(closing(connect(live)))
            unread.sendall(b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        httpx2.get(f"{live.issuer}/healthz")

        told_at = time.monotonic()
        live.process.terminate()
        # On its way when the service is told.
        asking.sendall(request)
        time.sleep(0.05)
        half.sendall(request[-10:])
        answers = [answer_of(read_to_the_end(one)) for one in (asking, half, polling)]
        code = live.process.wait(timeout=FOREVER_S)
        took_s = time.monotonic() - told_at
        statuses = [answer.status for answer in answers]
        return Stopped(code, took_s, statuses, read_to_the_end(idle))


def test_told_to_stop_it_answers_what_was_asked_and_ends(tmp_path: Path) -> None:
    """
    Exit 0 within five seconds: answers due are given, idle connections closed, polls ended.

    Whoever says nothing, or reads nothing, does not hold that up.
    """
    for attempt in range(3):
        stopped = told_to_stop(tmp_path / str(attempt))
        # The machine may have stood still.  A service that is slow is slow each time.
        if stopped.took_s < STOP_S:
            break

    assert (stopped.code, stopped.rest) == (0, b"")
    assert stopped.took_s < STOP_S
    assert stopped.statuses == [200, 200, 200]


# --- replacing


@contextmanager
def another_node(live: Live) -> Iterator[Live]:
    """One more service of the same deployment, on a port of its own."""
    port = free_port()
    folder = live.folder / f"node-{port}"
    folder.mkdir()
    process = serve(live.environment, folder / "serve.log", "--port", str(port))
    node = Live(f"http://127.0.0.1:{port}", folder, live.environment, live.initialized, process)
    try:
        wait_until_ready(node)
        yield node
    finally:
        process.terminate()
        process.wait(timeout=FOREVER_S)


def test_node_by_node_a_deployment_is_restarted_unnoticed(tmp_path: Path) -> None:
    """No request fails: whoever's connection is closed asks again at the other node."""
    with a_service(tmp_path) as first, another_node(first) as second:
        nodes = [first.issuer, second.issuer]
        with calling(nodes, first.api_key()["key"]) as callers:
            time.sleep(0.3)
            first.process.terminate()
            assert first.process.wait(timeout=FOREVER_S) == 0
            port = str(urlsplit(first.issuer).port)
            again = serve(first.environment, tmp_path / "again.log", "--port", port)
            try:
                wait_until_ready(
                    Live(first.issuer, tmp_path, first.environment, first.initialized, again)
                )
                second.process.terminate()
                assert second.process.wait(timeout=FOREVER_S) == 0
                time.sleep(0.3)
            finally:
                callers.stop()
                again.terminate()
                again.wait(timeout=FOREVER_S)

    assert not callers.failures
    assert callers.answered > 100


def workers_of(live: Live) -> list[int]:
    """The process ids of its workers; the supervisor has helpers of other names."""
    path = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children")
    children = [int(one) for one in path.read_text().split()]
    return [one for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def metric(live: Live, sample: str) -> float:
    text = httpx2.get(f"{live.issuer}/metrics").text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


ISSUED = 'coatcheck_token_requests_total{result="issued",error="",auth_method="form"}'


@needs_proc
def test_a_worker_that_is_killed_is_replaced_unnoticed(tmp_path: Path) -> None:
    """No request fails, the log says what happened, and no count goes back."""
    with a_service(tmp_path, "--workers", "2") as live:
        until(lambda: metric(live, "coatcheck_workers") == 2)
        with calling([live.issuer], live.api_key()["key"]) as callers:
            until(lambda: callers.answered > 100)
            time.sleep(1.2)
            before = metric(live, ISSUED)
            killed = workers_of(live)[0]
            os.kill(killed, signal.SIGKILL)
            counts = []
            ends_at = time.monotonic() + FOREVER_S
            while not (len(workers_of(live)) == 2 and killed not in workers_of(live)):
                assert time.monotonic() < ends_at, live.log
                counts.append(metric(live, ISSUED))
                time.sleep(0.1)
            until(lambda: live.log.count("Application startup complete") == 3)
        # What was counted since it last wrote went with the one that was killed.
        time.sleep(1.2)
        after = metric(live, ISSUED)
        assert metric(live, "coatcheck_workers") == 2

    assert not callers.failures
    assert [before, *counts, after] == sorted([before, *counts, after])
    assert before > 0
    assert callers.answered * 0.5 < after <= callers.answered
    assert any(f"[{killed}] died" in line["event"] for line in events(live))


# --- file descriptors


@contextmanager
def few_descriptors(live: Live) -> Iterator[None]:
    """A service that may open no more than 64 files, until the block ends."""
    soft, hard = resource.prlimit(live.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(live.process.pid, resource.RLIMIT_NOFILE, (64, hard))
    try:
        yield
    finally:
        resource.prlimit(live.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


@needs_proc
def test_out_of_file_descriptors_it_accepts_again_by_itself(live: Live) -> None:
    """F17: those who cannot be served go away; nobody has to restart anything."""
    request = good_request(live)
    with few_descriptors(live):
        address = ("127.0.0.1", urlsplit(live.issuer).port or 80)
        with ExitStack() as stack:
            for _ in range(200):
                one = socket.create_connection(address, timeout=FOREVER_S)
                stack.enter_context(closing(one))
            time.sleep(0.5)
        opened = time.monotonic()

        def is_answered() -> bool:
            with suppress(OSError), closing(connect(live)) as connection:
                connection.sendall(request)
                return connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
            return False

        until(is_answered)
        assert time.monotonic() - opened < STOP_S
        assert live.process.poll() is None


# --- starting


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A deployment that nobody serves."""
    folder = tmp_path_factory.mktemp("home")
    environment = {
        "COATCHECK_ISSUER": "http://127.0.0.1:8000",
        "COATCHECK_DATABASE_URL": f"sqlite:///{folder}/coatcheck.db",
        "COATCHECK_KEYS_DIR": str(folder / "keys"),
    }
    assert run_command("init", "--json", environment=environment).returncode == 0
    return environment


def failed_start(environment: dict[str, str]) -> str:
    """What `serve` says of a start that fails, with several workers."""
    options = ("serve", "--port", str(free_port()), "--workers", "2")
    done: subprocess.CompletedProcess[str] = run_command(*options, environment=environment)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_with_another_issuer_no_worker_starts(home: dict[str, str]) -> None:
    """F10: tokens of two issuers from one deployment would be refused by half of the verifiers."""
    said = failed_start({**home, "COATCHECK_ISSUER": "http://127.0.0.1:9000"})

    assert "http://127.0.0.1:8000" in said


def test_with_another_sealing_key_no_worker_starts(home: dict[str, str], tmp_path: Path) -> None:
    """F10, K18: a node that cannot sign must not be there at all."""
    other = {**home, "COATCHECK_DATABASE_URL": f"sqlite:///{tmp_path}/other.db"}
    other["COATCHECK_KEYS_DIR"] = str(tmp_path / "keys")
    assert run_command("init", "--json", environment=other).returncode == 0

    said = failed_start({**home, "COATCHECK_KEYS_DIR": other["COATCHECK_KEYS_DIR"]})

    assert "COATCHECK_KEYS_DIR" in said
