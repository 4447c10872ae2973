"""Nodes that must not start, on a database that is shared with one that may.

COATCHECK_TEST_CLOCKS is how many wrong clocks are tried.
"""

import os
import time
from collections.abc import Iterator
from contextlib import closing

import httpx2
import psycopg
import pytest

from support.deployment import form
from support.fleet import Fleet, Node, a_fleet
from support.postgres import Server

FOREVER_S = 30
#: Seconds by which a node's clock is off.
CLOCKS = (600, -600, -3600)[: int(os.environ.get("COATCHECK_TEST_CLOCKS", "1"))]


@pytest.fixture(scope="module")
def fleet(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One good node, and one that is started by tests."""
    with a_fleet(
        tmp_path_factory.mktemp("nodes"), nodes=1, database_url=postgres.new_database()
    ) as running:
        running.add_node()
        yield running


def why_not(node: Node) -> str:
    """What a node says that does not start.  No token comes from it."""
    assert node.process is not None
    code = node.process.wait(timeout=FOREVER_S)
    node.process = None
    assert code == 1
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{node.url}/healthz")
    said = node.said
    node.log.unlink()
    return said


@pytest.mark.parametrize("ahead_s", CLOCKS)
def test_a_node_whose_clock_is_wrong_does_not_start(ahead_s: int, fleet: Fleet) -> None:
    """F11: its tokens would live too long, or be refused as from the future; set right, it does."""
    good, wrong = fleet.nodes
    wrong.start(unsafe_clock_offset=str(ahead_s))
    assert f"clock is {ahead_s:+} s off the database's" in why_not(wrong)

    wrong.start()
    wrong.wait_until_ready()
    with fleet.store() as store:
        ((_, secret),) = fleet.api_keys(store)
    for node in (good, wrong):
        answer = httpx2.post(f"{node.url}/oauth/token", data=form(secret), timeout=FOREVER_S)
        assert answer.status_code == 200
    wrong.stop()


def test_a_node_does_not_start_on_a_database_that_it_cannot_write_to(fleet: Fleet) -> None:
    """F18: a replica lags, and what was revoked would be good there."""
    _, wrong = fleet.nodes
    url = fleet.settings.database_url
    name = url.rpartition("/")[2]
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(
            f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode()
        )
        try:
            began = time.monotonic()
            wrong.start()
            assert "read-only" in why_not(wrong)
            assert time.monotonic() - began < FOREVER_S
        finally:
            connection.execute(
                f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode()
            )
