"""Fixtures that every room of tests may use."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from starlette.testclient import TestClient

from support.deployment import Deployment, a_client, a_deployment
from support.live import Live, a_service
from support.postgres import Server, server

pytest_plugins = ("support.once", "support.sweep")

# Of what collecting makes, next to nothing is garbage: looked at again and again it would take
# longer than the collecting itself.
gc.disable()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment of its own, in process, its clock at noon."""
    with a_deployment(tmp_path) as made:
        yield made


@pytest.fixture
def http(deployment: Deployment) -> Iterator[TestClient]:
    """An HTTP client of `deployment`."""
    with a_client(deployment) as client:
        yield client


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A running service, shared by all tests of one worker: make your own API keys in it."""
    with a_service(tmp_path_factory.mktemp("live"), audience="https://api.example.com") as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server, shared by all tests of one worker: make your own database in it."""
    with server() as running:
        yield running


#: Modules that take longest, and their seconds: most of it is waiting for processes and clocks.
#: With xdist each worker begins with its share of them, and what is left to be shared out at the
#: end is small.
LONG: Final = {
    "journey/test_kills.py": 80,
    "journey/test_revocation_latency.py": 80,
    "journey/test_fleet.py": 70,
    "model/test_core.py": 60,
    "journey/test_postgres_faults.py": 45,
    "journey/test_first_day.py": 40,
    "journey/test_process.py": 35,
    "products/test_docs_products.py": 35,
    "fuzz/": 50,
    "rights/": 50,
    "journey/test_command_line_server.py": 30,
    "journey/test_signing_keys.py": 30,
    "journey/test_command_line.py": 25,
    "journey/test_gateways.py": 25,
    "journey/test_calling.py": 20,
    "journey/test_authz_verify.py": 15,
    "journey/test_framework_pages.py": 15,
    "journey/test_rotation.py": 20,
    "wire/test_raw_sockets.py": 40,
    "journey/test_node_clients.py": 20,
    "faults/": 30,
}


def pytest_collection_finish() -> None:
    # Thousands of tests stay until the end.  Looked at by each collection they would stop a test
    # for longer than a database waits within a transaction.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    long: list[list[pytest.Item]] = [[] for _ in range(workers)]
    seconds = [0] * workers
    others = list(items)
    for module, takes in sorted(LONG.items(), key=lambda one: -one[1]):
        least = seconds.index(min(seconds))
        seconds[least] += takes
        long[least] += [item for item in others if f"tests/{module}" in item.nodeid]
        others = [item for item in others if f"tests/{module}" not in item.nodeid]
    # Work stealing hands out equal parts, in order, and steals from their ends.
    left = len(items)
    ordered: list[pytest.Item] = []
    for number, own in enumerate(long):
        size = left // (workers - number)
        left -= size
        room = max(0, size - len(own))
        ordered += own + others[:room]
        others = others[room:]
    items[:] = ordered + others
