"""An issuer that is away, and the many resource servers that wait for it.

COATCHECK_TEST_OUTAGE_SECONDS is how long it is away; COATCHECK_TEST_VERIFIERS how many wait.
"""

import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from coatcheck.durations import FEED_STALE
from coatcheck.verifier import Verifier
from support.deployment import AUDIENCE
from support.fleet import Fleet, a_fleet, fetch_from

OUTAGE_S = float(os.environ.get("COATCHECK_TEST_OUTAGE_SECONDS", "4"))
VERIFIERS = int(os.environ.get("COATCHECK_TEST_VERIFIERS", "100"))
#: The pause between two tries of one verifier, at most; and the time that its answer takes.
BACK_WITHIN_S = 8.0
BUCKET_S = 0.1
#: Of all verifiers, those that may come in one bucket.
MOST_AT_ONCE = 0.25
FOREVER_S = 60


class Fetches:
    """What verifiers fetch, and when they look for their issuer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fetch = partial(fetch_from, fleet.nodes[0])
        self.at: list[float] = []

    def __call__(self, url: str) -> bytes:
        # Asked for anew at each try after a failure; then the conversation goes on elsewhere.
        if url.endswith("/coatcheck"):
            self.at.append(time.monotonic())
        return self._fetch(url)


def feed_of(verifier: Verifier) -> dict[str, object]:
    feed = verifier.status()["feed"]
    assert isinstance(feed, dict)
    return feed


def test_an_issuer_that_comes_back_is_not_overrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F12: tokens verify meanwhile, each verifier says that it is cut off, and none is in step."""
    with a_fleet(tmp_path, nodes=1, audience=AUDIENCE) as fleet, ExitStack() as stack:
        fetches, (node,) = Fetches(fleet), fleet.nodes
        with fleet.store() as store:
            ((_, secret),) = fleet.api_keys(store)
        token = node.token(secret)
        verifiers = [
            stack.enter_context(Verifier(fleet.issuer, AUDIENCE, fetch=fetches))
            for _ in range(VERIFIERS)
        ]
        for verifier in verifiers:
            verifier.verify_jwt(token)
        # Everybody waits for news.
        time.sleep(0.5)

        node.kill()
        gone = time.monotonic()
        while time.monotonic() < gone + OUTAGE_S:
            for verifier in verifiers:
                verifier.verify_jwt(token)
            time.sleep(0.5)
            # Longer than a token lives: it ends, issuer or not.
            if time.monotonic() - gone > 500:
                break
        time.sleep(max(0.0, gone + OUTAGE_S - time.monotonic()))
        assert all(feed_of(verifier)["last_error"] for verifier in verifiers)
        if OUTAGE_S > FEED_STALE + 5:
            assert {feed_of(verifier)["state"] for verifier in verifiers} == {"stale"}
        while_away = len([at for at in fetches.at if at >= gone])

        node.start()
        node.wait_until_ready()
        back = time.monotonic()
        until = back + FOREVER_S
        while any(feed_of(verifier)["last_error"] for verifier in verifiers):
            assert time.monotonic() < until
            time.sleep(0.05)
        took_s = time.monotonic() - back
        fresh = node.token(secret)
        for verifier in verifiers:
            verifier.verify_jwt(fresh)

    buckets = Counter(int((at - back) / BUCKET_S) for at in fetches.at if at >= back)
    most = max(buckets.values())
    with capsys.disabled():
        sys.stderr.write(
            f"\nthe issuer was away from {VERIFIERS} verifiers for {OUTAGE_S:.0f} s: {while_away}"
            f" tries meanwhile; all were back after {took_s:.1f} s, at most {most} of them in"
            f" {BUCKET_S} s\n"
        )
    assert took_s < BACK_WITHIN_S
    assert most < MOST_AT_ONCE * VERIFIERS
