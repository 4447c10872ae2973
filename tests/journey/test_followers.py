"""Many resource servers that follow one node: each is told at once, and the node stays idle."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
import pytest

from coatcheck.durations import FEED_WAIT_MAX
from coatcheck.feed_profile import MAX_FEED_BYTES
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.store import open_store
from support.live import Live, a_service

#: A thousand is the goal; a runner of two cores gets fewer.
FOLLOWERS = int(os.environ.get("COATCHECK_TEST_FOLLOWERS", "200"))
GOAL_S = 1.0
FOREVER_S = 20
#: CPU seconds of the node, for each follower that is told something: a connection, a request
#: read, an answer written.  Several times what is measured.
MOST_CPU_EACH_S = 0.004
#: CPU seconds a second of a node whose followers all wait.
MOST_CPU_IDLE = 0.15


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A node of its own: its CPU time is nobody else's."""
    with a_service(tmp_path_factory.mktemp("followers"), "--workers", "1") as running:
        yield running


def cpu_s(process_id: int) -> float:
    """The CPU seconds that a process has used, from `/proc`."""
    with open(f"/proc/{process_id}/stat", encoding="ascii") as stat:  # noqa: PTH123 - no file
        # The name, in parentheses, may hold blanks; utime and stime are the fields 14 and 15.
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def head_of(service: Live) -> int:
    """Where the change log is now."""
    store = open_store(service.environment["COATCHECK_DATABASE_URL"])
    try:
        return store.head()
    finally:
        store.close()


def revoke(service: Live, api_key_id: str) -> float:
    """Revoke an API key, as another process does.  Returns when the answer was there."""
    store = open_store(service.environment["COATCHECK_DATABASE_URL"])
    try:
        api_keys.revoke(store, api_key_id, Actor("cli:tester"), now=int(time.time()))
        return time.monotonic()
    finally:
        store.close()


@dataclass
class Answer:
    status: int
    body: bytes
    at: float


async def poll(service: Live, after: int) -> Answer:
    """One long poll on a connection of its own.  No client library: a thousand would be dear."""
    parts = urlsplit(service.issuer)
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port, limit=2 * MAX_FEED_BYTES
    )
    writer.write(
        f"GET /oauth/revocations?after={after}&wait={FEED_WAIT_MAX} HTTP/1.1\r\n"
        f"Host: {parts.netloc}\r\nConnection: close\r\n\r\n".encode()
    )
    await writer.drain()
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    at = time.monotonic()
    writer.close()
    await writer.wait_closed()
    return Answer(int(head.split(b" ", 2)[1]), body, at)


async def all_waiting(service: Live, after: int) -> "list[asyncio.Task[Answer]]":
    """Followers that all wait for news, and have been for a moment."""
    polls = [asyncio.create_task(poll(service, after)) for _ in range(FOLLOWERS)]
    # A request that is sent after theirs is read after theirs.
    await asyncio.sleep(0.5)
    await asyncio.to_thread(httpx2.get, f"{service.issuer}/healthz", timeout=FOREVER_S)
    await asyncio.sleep(0.5)
    assert not any(one.done() for one in polls)
    return polls


def test_all_followers_of_a_node_are_told_within_a_second(
    service: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the tokens that the node issues meanwhile do not wait for them."""
    leaked = service.api_key("widgets:read")["id"]

    async def follow() -> tuple[list[float], float, float]:
        polls = await all_waiting(service, head_of(service))
        before_s, began = cpu_s(service.process.pid), time.monotonic()
        await asyncio.sleep(1)
        idle = (cpu_s(service.process.pid) - before_s) / (time.monotonic() - began)

        before_s = cpu_s(service.process.pid)
        revoked_at = await asyncio.to_thread(revoke, service, leaked)
        answers = await asyncio.wait_for(asyncio.gather(*polls), FOREVER_S)
        assert {answer.status for answer in answers} == {200}
        # All nodes say the same, and one signature is for everybody.
        assert len({answer.body for answer in answers}) == 1
        used_s = cpu_s(service.process.pid) - before_s
        return [answer.at - revoked_at for answer in answers], used_s, idle

    delays_s, used_s, idle = asyncio.run(follow())
    with capsys.disabled():
        sys.stderr.write(
            f"\n{FOLLOWERS} followers: the last one was told after {max(delays_s):.3f} s, for"
            f" {used_s:.2f} CPU seconds of the node; while all waited it used {idle:.1%} of a core"
        )
    assert max(delays_s) < GOAL_S
    assert used_s < 0.25 + MOST_CPU_EACH_S * FOLLOWERS
    assert idle < MOST_CPU_IDLE


def test_a_node_that_stops_answers_its_followers_first(
    service: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deploy must not take half a minute, nor look like an outage to anybody who follows."""

    async def follow() -> tuple[list[Answer], float]:
        polls = await all_waiting(service, head_of(service))
        began = time.monotonic()
        service.process.terminate()
        answers = await asyncio.wait_for(asyncio.gather(*polls), FOREVER_S)
        await asyncio.to_thread(service.process.wait, FOREVER_S)
        return answers, time.monotonic() - began

    answers, took_s = asyncio.run(follow())
    with capsys.disabled():
        sys.stderr.write(f"\na node with {FOLLOWERS} followers stopped in {took_s:.2f} s\n")

    assert {answer.status for answer in answers} == {200}
    # uvicorn ends in peace, and then by the signal that it was sent.
    assert service.process.returncode in (0, -signal.SIGTERM)
    assert took_s < 4
