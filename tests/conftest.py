"""Fixtures that every room of tests may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from support.deployment import Deployment, a_client, a_deployment
from support.live import Live, a_service
from support.postgres import Server, server

pytest_plugins = ("support.sweep",)


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
