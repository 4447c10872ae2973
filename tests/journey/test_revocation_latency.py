"""From the answer of a revocation to the last refusal, over processes that only share HTTP.

The service is a process of its own, the verifier lives in this one, and what revokes is a third
hand on the same database.  The goal is one second; what a machine that is busy adds is measured
beside it and printed.
"""

import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import jwt
import pytest

from coatcheck.durations import FEED_STALE, LEEWAY, TOKEN_LIFETIME
from coatcheck.server import catalog as catalogs
from coatcheck.server import sealing, signing
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from coatcheck.verifier import Verifier, VerifierError
from support.live import Live, a_service, clean_environment, wait_until_ready

AUDIENCE = "https://api.example.com"
TESTER = Actor("cli:tester")
TRIALS = int(os.environ.get("COATCHECK_TEST_TRIALS", "100"))
SIGNING_KEY_TRIALS = max(3, TRIALS // 25)
#: The goal, for 99 of 100.
GOAL_S = 1.0
#: Longer than anything takes that works.
FOREVER_S = 20
#: How long a refusal is watched for a token that comes back to life.
AFTERWARDS_S = 0.02


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One worker, so that there is one node whose delay is measured."""
    folder = tmp_path_factory.mktemp("latency")
    with a_service(folder, "--workers", "1", audience=AUDIENCE) as running:
        yield running


@pytest.fixture
def store(service: Live) -> Iterator[Store]:
    """The service's database, in another process than the service."""
    store = open_store(service.environment["COATCHECK_DATABASE_URL"])
    yield store
    store.close()


@pytest.fixture(scope="module")
def http(service: Live) -> Iterator[httpx2.Client]:
    """A caller of the service."""
    with httpx2.Client(base_url=service.issuer, timeout=FOREVER_S) as client:
        yield client


@pytest.fixture
def verifier(service: Live) -> Iterator[Verifier]:
    with Verifier(service.issuer, AUDIENCE) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def key(service: Live) -> dict[str, str]:
    """An API key for those trials in which the key itself stays alive."""
    return service.api_key("widgets:read")


def now() -> int:
    return int(time.time())


def an_api_key(store: Store, service: Live) -> Created:
    """A new API key, made by another process than the service."""
    settings = Settings.load(service.environment)
    new = api_keys.NewApiKey(service.initialized["organization"], "latency")
    catalog = catalogs.without_file(settings)
    return api_keys.create(store, catalog, new, TESTER, now=now(), issuer=settings.issuer)


def token_for(http: httpx2.Client, key: str) -> str:
    answer = http.post(
        "/oauth/token", data={"grant_type": "client_credentials", "client_secret": key}
    )
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


class Sleeper:
    """Measures how late this machine wakes a thread that wants to sleep for a millisecond."""

    def __init__(self) -> None:
        self.latest_s = 0.0

    def sleep(self) -> None:
        began = time.monotonic()
        time.sleep(0.001)
        self.latest_s = max(self.latest_s, time.monotonic() - began - 0.001)


def seconds_until_refused(verifier: Verifier, token: str, sleeper: Sleeper) -> float:
    """Present a token again and again; how long it was accepted, from now on."""
    began = time.monotonic()
    accepted_at = began
    while True:
        assert time.monotonic() - began < FOREVER_S
        try:
            verifier.verify_jwt(token)
        except VerifierError as refused:
            assert refused.status == 401, refused  # noqa: PT017 - the loop ends here
            break
        accepted_at = time.monotonic()
        sleeper.sleep()
    for _ in range(3):
        time.sleep(AFTERWARDS_S / 3)
        with pytest.raises(VerifierError):
            verifier.verify_jwt(token)
    return accepted_at - began


def judge(
    name: str, delays_s: list[float], sleeper: Sleeper, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print what was measured, and hold it against the goal."""
    in_order = sorted(delays_s)
    of_99 = in_order[math.ceil(0.99 * len(in_order)) - 1]
    with capsys.disabled():
        sys.stderr.write(
            f"\n{name}: {len(in_order)} trials, median {in_order[len(in_order) // 2]:.3f} s,"
            f" p99 {of_99:.3f} s, maximum {in_order[-1]:.3f} s;"
            f" the scheduler alone was up to {sleeper.latest_s:.3f} s late\n"
        )
    assert of_99 < GOAL_S


def test_a_revoked_api_key_is_dead_everywhere_within_a_second(
    service: Live,
    http: httpx2.Client,
    store: Store,
    verifier: Verifier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody presses the button because a key has leaked: each second is the thief's."""
    sleeper, delays_s = Sleeper(), []
    for trial in range(TRIALS):
        made = an_api_key(store, service)
        token = token_for(http, made.key)
        assert verifier.verify_jwt(token).key_id == made.api_key.id
        # At any phase of the node's looking and the follower's polling.
        time.sleep(random.uniform(0, 0.3))  # noqa: S311 - no secret
        end = (api_keys.revoke, api_keys.disable)[trial % 2]
        end(store, made.api_key.id, TESTER, now=now())
        delays_s.append(seconds_until_refused(verifier, token, sleeper))

    judge("API key revoked or disabled", delays_s, sleeper, capsys)


def test_a_token_that_is_revoked_by_its_owner_is_dead_everywhere_within_a_second(
    http: httpx2.Client,
    key: dict[str, str],
    verifier: Verifier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """RFC 7009: a client that logs out wants to be logged out.  Its other tokens live on."""
    sleeper, delays_s = Sleeper(), []
    for _ in range(TRIALS):
        token = token_for(http, key["key"])
        assert verifier.verify_jwt(token)
        time.sleep(random.uniform(0, 0.3))  # noqa: S311 - no secret
        revocation = {"client_secret": key["key"], "token": token}
        answer = http.post("/oauth/revoke", data=revocation)
        assert answer.status_code == 200, answer.text
        delays_s.append(seconds_until_refused(verifier, token, sleeper))
    assert verifier.verify_jwt(token_for(http, key["key"]))

    judge("token revoked", delays_s, sleeper, capsys)


def test_the_tokens_of_a_withdrawn_signing_key_are_dead_everywhere_within_a_second(
    service: Live,
    http: httpx2.Client,
    store: Store,
    key: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stolen signing key can make any token: verifiers must not wait for their key set's age."""
    sealing_key = sealing.load(Path(service.environment["COATCHECK_KEYS_DIR"])).newest()
    sleeper, delays_s = Sleeper(), []
    for _ in range(SIGNING_KEY_TRIALS):
        # Each has its first key set: a new signing key is looked for once in half a minute.
        with Verifier(service.issuer, AUDIENCE) as verifier:
            token = token_for(http, key["key"])
            assert verifier.verify_jwt(token)
            old = signing_kid(token)
            signing.rotate(store, sealing_key, "ES256", TESTER, now=now(), at_once=True)
            time.sleep(random.uniform(0, 0.3))  # noqa: S311 - no secret
            signing.withdraw(store, old, TESTER, now=now())
            delays_s.append(seconds_until_refused(verifier, token, sleeper))

    judge("signing key withdrawn", delays_s, sleeper, capsys)


def signing_kid(token: str) -> str:
    kid: str = jwt.get_unverified_header(token)["kid"]
    return kid


# --- cut off from the feed


@dataclass
class LaterClock:
    """The machine's clocks, put forward; both by the same seconds."""

    ahead_s: float = 0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@contextmanager
def served_again(live: Live, ahead_s: int) -> Iterator[None]:
    """The same service on the same port, its clock put forward, until the block ends."""
    port = str(urlsplit(live.issuer).port)
    environment = {**live.environment, "COATCHECK_UNSAFE_CLOCK_OFFSET": str(ahead_s)}
    with (live.folder / "again.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "coatcheck.cli", "serve", "--port", port],
            env=clean_environment() | environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_ready(replace(live, process=process))
        yield
    finally:
        process.terminate()
        process.wait(timeout=FOREVER_S)


def stop(live: Live) -> None:
    live.process.terminate()
    live.process.wait(timeout=FOREVER_S)


def eventually(ask: Callable[[], bool]) -> None:
    until = time.monotonic() + FOREVER_S
    while not ask():
        assert time.monotonic() < until
        time.sleep(0.02)


def code_of(verifier: Verifier, token: str) -> str:
    """What the verifier says to a token: ok, or why not."""
    try:
        verifier.verify_jwt(token)
    except VerifierError as refused:
        return refused.code
    return "ok"


def test_a_verifier_that_is_cut_off_does_what_it_was_told_to(tmp_path: Path) -> None:
    """
    Accept until tokens expire, or refuse once nobody vouches for them; and both recover.

    The issuer is a part of every API, and whether its outage is an outage of the API, or the end
    of revocation for that long, is for each API to decide.
    """
    clock = LaterClock()
    with (
        a_service(tmp_path, audience=AUDIENCE) as live,
        Verifier(live.issuer, AUDIENCE, clock=clock.time, monotonic=clock.monotonic) as accepts,
        Verifier(
            live.issuer,
            AUDIENCE,
            on_stale_feed="refuse",
            clock=clock.time,
            monotonic=clock.monotonic,
        ) as refuses,
    ):
        key, leaked = live.api_key("widgets:read"), live.api_key("widgets:read")
        with httpx2.Client(base_url=live.issuer, timeout=FOREVER_S) as http:
            token, stolen = token_for(http, key["key"]), token_for(http, leaked["key"])

        def answers(one: str) -> tuple[str, str]:
            return code_of(accepts, one), code_of(refuses, one)

        assert answers(token) == answers(stolen) == ("ok", "ok")

        # Cut off, and not yet stale.
        stop(live)
        assert answers(token) == ("ok", "ok")
        assert live.command("keys", "revoke", leaked["id"], "--yes").returncode == 0
        # Stale: one goes on, also with what was revoked meanwhile, and the other does not.
        later_s = FEED_STALE + 20
        clock.ahead_s = later_s
        assert answers(token) == answers(stolen) == ("ok", "stale_feed")
        feed = accepts.status()["feed"]
        assert isinstance(feed, dict)
        assert feed["state"] == "stale"

        # The issuer is back: what was revoked meanwhile is dead for both.
        with served_again(live, later_s):
            eventually(lambda: code_of(refuses, token) == "ok")
            eventually(lambda: answers(stolen) == ("token_revoked", "token_revoked"))
            assert answers(token) == ("ok", "ok")

        # Away for good: a token ends where it always ends.
        clock.ahead_s = TOKEN_LIFETIME + LEEWAY + later_s
        assert answers(token) == ("token_expired", "token_expired")
        assert answers(stolen) == ("token_expired", "token_expired")
