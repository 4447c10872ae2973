"""Many nodes on one database: what is revoked on one is dead on all, and stays dead.

Three nodes of two workers each share one PostgreSQL, and nothing tells one of another.  Each
worker is asked by itself, so that none of them can hide behind its neighbor.

COATCHECK_TEST_TRIALS, COATCHECK_TEST_KILLS and COATCHECK_TEST_SEED are how many and which.
"""

import json
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlencode

import jwt
import pytest

from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.manage import api_keys
from coatcheck.server.store import Store
from coatcheck.verifier import Verifier, VerifierError
from support.deployment import TESTER
from support.fleet import Fleet, a_fleet, a_verifier_at
from support.history import REVOKE, History, Verdict
from support.postgres import Server

AUDIENCE = "https://api.example.com"
NODES, WORKERS = 3, 2
TRIALS = int(os.environ.get("COATCHECK_TEST_TRIALS", "100"))
KILLS = int(os.environ.get("COATCHECK_TEST_KILLS", "10"))
SEED = int(os.environ.get("COATCHECK_TEST_SEED", "0")) or random.randrange(1, 10**6)  # noqa: S311
#: For 99 of 100.
GOAL_S = 1.0
#: Trials that run beside each other, each with connections of its own to every worker.
AT_ONCE = 4
#: Longer than anything takes that works.
FOREVER_S = 30
#: Seconds between two asks of the same worker.
PAUSE_S = 0.01
REVOCATIONS_PER_SECOND = 50
CALLERS = 20
#: Callers send their revocations together, so that a kill meets some of them under way.
VOLLEY_S = CALLERS / REVOCATIONS_PER_SECOND
#: Volleys between two kills: a worker is back after about a second.
BETWEEN_KILLS = (1, 2)
#: Seconds after the beginning of a volley in which a worker is killed.
INTO_THE_VOLLEY_S = 0.04
#: A token of which less is left is asked about no more.
NEARLY_EXPIRED_S = 45

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


@pytest.fixture(scope="module")
def fleet(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(
        tmp_path_factory.mktemp("fleet"),
        nodes=NODES,
        workers=WORKERS,
        database_url=postgres.new_database(),
        audience=AUDIENCE,
        guesses_per_minute="0",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def store(fleet: Fleet) -> Iterator[Store]:
    with fleet.store() as opened:
        yield opened


@pytest.fixture(scope="module")
def service_key(fleet: Fleet, store: Store) -> str:
    """A resource server's own API key."""
    ((_, secret),) = fleet.api_keys(store, str(RESOURCE_SERVER), name="resource server")
    return secret


class Answer(NamedTuple):
    status: int
    body: Any


def post(connection: HTTPConnection, path: str, **form: str) -> Answer:
    """Raises OSError or HTTPException."""
    content_type = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", path, urlencode(form), content_type)
    answer = connection.getresponse()
    return Answer(answer.status, json.loads(answer.read()))


def token_for(connection: HTTPConnection, secret: str) -> str:
    answer = post(connection, "/oauth/token", grant_type="client_credentials", client_secret=secret)
    assert answer.status == 200, answer
    token: str = answer.body["access_token"]
    return token


# --- revoked on one, refused on all


@dataclass(frozen=True, slots=True)
class Leaked:
    """What a thief has."""

    api_key_id: str
    secret: str
    token: str


#: A place where a credential is shown.  Whether it is taken.
Place = Callable[[Leaked], bool]


class Everywhere:
    """All places of a fleet: every worker of every node, and a resource server behind each."""

    def __init__(
        self, fleet: Fleet, verifiers: Sequence[Verifier], service_key: str, opened: ExitStack
    ) -> None:
        self.workers = [one for node in fleet.nodes for one in node.connections(FOREVER_S)]
        for connection in self.workers:
            opened.callback(connection.close)
        self._issuer, self._service_key = fleet.issuer, service_key
        self._verifiers = verifiers

    def of_tokens(self) -> list[Place]:
        return [
            *(lambda leaked, at=one: self._introspect(at, leaked) for one in self.workers),
            *(
                lambda leaked, at=one: _takes(at, [("Authorization", f"Bearer {leaked.token}")])
                for one in self._verifiers
            ),
        ]

    def of_api_keys(self) -> list[Place]:
        return [
            *(lambda leaked, at=one: self._exchange(at, leaked) for one in self.workers),
            *(
                lambda leaked, at=one: _takes(at, [("X-API-Key", leaked.secret)])
                for one in self._verifiers
            ),
        ]

    def _introspect(self, connection: HTTPConnection, leaked: Leaked) -> bool:
        answer = post(
            connection, "/oauth/introspect", client_secret=self._service_key, token=leaked.token
        )
        assert answer.status == 200, answer
        is_active: bool = answer.body["active"]
        return is_active

    def _exchange(self, connection: HTTPConnection, leaked: Leaked) -> bool:
        """As a resource server does whose caller sent an API key."""
        answer = post(
            connection,
            "/oauth/token",
            grant_type=EXCHANGE,
            client_secret=self._service_key,
            subject_token=leaked.secret,
            subject_token_type=f"{self._issuer}/token-types/api-key",
            resource=AUDIENCE,
            client_address="127.0.0.1",
            presented_in="header",
        )
        if answer.status != 200:
            assert answer.body["code"] == "api_key_revoked", answer
        return answer.status == 200


def _takes(verifier: Verifier, headers: list[tuple[str, str]]) -> bool:
    try:
        verifier.authenticate(headers, client_address="127.0.0.1")
    except VerifierError as refused:
        # Our own outage would refuse as well, and prove nothing.
        assert refused.status == 401, refused  # noqa: PT017 - acceptance is an answer, too
        return False
    return True


def seconds_until_refused(places: Sequence[Place], leaked: Leaked) -> float:
    """How long a credential was taken anywhere, from now on.

    One place after the other is asked until it refuses: what takes longer than all before it is
    still seen.  In the end none of them takes it again.
    """
    began = last = time.monotonic()
    for takes in places:
        while takes(leaked):
            last = time.monotonic()
            assert last - began < FOREVER_S
            time.sleep(PAUSE_S)
    assert not any(takes(leaked) for takes in places)
    return last - began


def of_99(delays_s: list[float]) -> float:
    return sorted(delays_s)[math.ceil(0.99 * len(delays_s)) - 1]


def test_what_is_revoked_on_one_node_is_refused_on_all_within_a_second(
    fleet: Fleet, store: Store, service_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    F8: API keys as they are, introspection, and tokens that were issued before.

    An operator's command ends API keys, on the database and past every node; their owners end
    tokens, at one worker.  Every worker of every node is asked, and a resource server behind each.
    """
    leaking = iter(fleet.api_keys(store, count=TRIALS))
    ended: dict[str, list[float]] = {"API keys": [], "tokens": []}
    turn = threading.Lock()
    trials = iter(range(TRIALS))

    def run(verifiers: Sequence[Verifier], chance: random.Random) -> None:
        with ExitStack() as opened:
            everywhere = Everywhere(fleet, verifiers, service_key, opened)
            of_tokens, of_api_keys = everywhere.of_tokens(), everywhere.of_api_keys()
            while True:
                with turn:
                    trial = next(trials, None)
                    if trial is None:
                        return
                    api_key_id, secret = next(leaking)
                one, another = chance.choices(everywhere.workers, k=2)
                leaked = Leaked(api_key_id, secret, token_for(one, secret))
                is_api_key = trial % 2 == 0
                places = [*of_api_keys, *of_tokens] if is_api_key else of_tokens
                # Known everywhere, and remembered wherever something is remembered.
                assert all(takes(leaked) for takes in places)
                # At any phase of the nodes' looking and the followers' polling.
                time.sleep(chance.uniform(0, 0.25))
                chance.shuffle(places)
                if is_api_key:
                    api_keys.revoke(store, api_key_id, TESTER, now=int(time.time()))
                    ended["API keys"].append(seconds_until_refused(places, leaked))
                else:
                    answer = post(
                        another, "/oauth/revoke", client_secret=secret, token=leaked.token
                    )
                    assert answer.status == 200, answer
                    ended["tokens"].append(seconds_until_refused(places, leaked))

    with ExitStack() as stack:
        verifiers = [
            stack.enter_context(a_verifier_at(node, fleet, AUDIENCE, service_key))
            for node in fleet.nodes
        ]
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            chances = [random.Random(f"{SEED} {n}") for n in range(AT_ONCE)]  # noqa: S311
            for done in [threads.submit(run, verifiers, chance) for chance in chances]:
                done.result()
        took_s = time.monotonic() - began

    with capsys.disabled():
        for name, delays_s in ended.items():
            sys.stderr.write(
                f"\n{name} revoked on one of {NODES} nodes x {WORKERS} workers: {len(delays_s)}"
                f" trials, median {statistics.median(delays_s):.3f} s, p99 {of_99(delays_s):.3f} s,"
                f" maximum {max(delays_s):.3f} s until refused everywhere"
            )
        sys.stderr.write(f"\n(COATCHECK_TEST_SEED={SEED}, {took_s:.0f} s)\n")
    assert sum(map(len, ended.values())) == TRIALS
    assert of_99([delay_s for delays_s in ended.values() for delay_s in delays_s]) < GOAL_S


# --- killed while revocations are acknowledged


class Volleys:
    """Callers who get tokens and revoke them, at whatever node, while workers die under them."""

    def __init__(self, fleet: Fleet, made: Sequence[tuple[str, str]], seed: str) -> None:
        self.history = History()
        self.tokens: dict[str, tuple[str, str, float]] = {}
        """By `jti`: the text, the secret that it came from, and when it expires."""
        self._fleet = fleet
        self._is_over = threading.Event()
        self._threads = ThreadPoolExecutor(CALLERS)
        self._done = [
            self._threads.submit(self._call, api_key, random.Random(f"{seed} {number}"))  # noqa: S311
            for number, api_key in enumerate(made)
        ]

    def stop(self) -> None:
        self._is_over.set()
        for done in self._done:
            done.result(FOREVER_S)
        self._threads.shutdown()

    def _call(self, api_key: tuple[str, str], chance: random.Random) -> None:
        api_key_id, secret = api_key
        while not self._is_over.is_set():
            token = None
            with suppress(OSError, HTTPException), self._anybody(chance) as connection:
                token = token_for(connection, secret)
            jti = None if token is None else self._keep(token, api_key_id, secret)
            time.sleep(until_the_next_volley())
            # Some are kept: what nobody has revoked must go on.
            if jti is not None and chance.random() < 0.9:
                self.revoke(jti, chance)

    def _keep(self, token: str, api_key_id: str, secret: str) -> str:
        claims = jwt.decode(token, options={"verify_signature": False})
        jti: str = claims["jti"]
        self.history.issued(jti, api_key_id)
        self.tokens[jti] = token, secret, claims["exp"]
        return jti

    def revoke(self, jti: str, chance: random.Random) -> None:
        token, secret, _ = self.tokens[jti]
        with (
            self.history.asking(REVOKE, jti) as asked,
            suppress(OSError, HTTPException),
            self._anybody(chance) as connection,
        ):
            answer = post(connection, "/oauth/revoke", client_secret=secret, token=token)
            asked.answer(answer.status)
            assert answer.status in (200, 503), answer

    @contextmanager
    def _anybody(self, chance: random.Random) -> Iterator[HTTPConnection]:
        port = chance.choice(self._fleet.nodes).port
        with closing(HTTPConnection("127.0.0.1", port, timeout=FOREVER_S)) as connection:
            yield connection


def until_the_next_volley() -> float:
    return VOLLEY_S - time.monotonic() % VOLLEY_S


class Witness:
    """Asks nodes of tokens, and says what the history does not allow."""

    def __init__(self, fleet: Fleet, volleys: Volleys, service_key: str, seed: str) -> None:
        self._fleet, self._volleys, self._service_key = fleet, volleys, service_key
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self.looks = 0

    def is_refused(self, connection: HTTPConnection, jti: str) -> bool:
        token = self._volleys.tokens[jti][0]
        answer = post(connection, "/oauth/introspect", client_secret=self._service_key, token=token)
        assert answer.status == 200, answer
        return answer.body["active"] is False

    def watch(self, seconds: float) -> None:
        """While workers die: what was acknowledged a second ago is dead at whoever answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.02)
            acknowledged = [
                asked.subject
                for asked in self._volleys.history.asked(REVOKE)
                if asked.is_done and (asked.answered_at or 0) < time.monotonic() - GOAL_S
            ]
            if not acknowledged:
                continue
            port = self._chance.choice(self._fleet.nodes).port
            jti = self._chance.choice(acknowledged)
            with (
                suppress(OSError, HTTPException),
                closing(HTTPConnection("127.0.0.1", port, timeout=FOREVER_S)) as connection,
            ):
                assert self.is_refused(connection, jti), f"{jti} is accepted"
                self.looks += 1

    def contradictions(self) -> list[str]:
        """Every token, at any worker of any node."""
        with ExitStack() as opened:
            workers = [one for node in self._fleet.nodes for one in node.connections(FOREVER_S)]
            for connection in workers:
                opened.callback(connection.close)
            refused = {
                jti: self.is_refused(self._chance.choice(workers), jti)
                for jti, (_, _, expires_at) in self._volleys.tokens.items()
                if expires_at - time.time() > NEARLY_EXPIRED_S
            }
        self.looks += len(refused)
        return self._volleys.history.contradictions(refused)


def test_killed_workers_lose_no_acknowledged_revocation(
    fleet: Fleet, store: Store, service_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    F1, F8: workers die in the middle of revocations, anywhere in the fleet, again and again.

    The callers' own history says what must be true; it is asked of every node, while workers die
    and at the end.  Where no answer came, either may be, and asking once more settles it.
    """
    chance = random.Random(SEED)  # noqa: S311 - no secret
    volleys = Volleys(fleet, fleet.api_keys(store, count=CALLERS), str(SEED))
    witness = Witness(fleet, volleys, service_key, f"{SEED} witness")
    began = time.monotonic()
    kills = 0
    try:
        while kills < KILLS:
            assert time.monotonic() - began < FOREVER_S + 10 * KILLS
            witness.watch(chance.randint(*BETWEEN_KILLS) * VOLLEY_S)
            time.sleep(until_the_next_volley() + chance.uniform(0, INTO_THE_VOLLEY_S))
            kills += chance.choice(fleet.nodes).kill_a_worker(chance)
        took_s = time.monotonic() - began
    finally:
        volleys.stop()
    for node in fleet.nodes:
        node.wait_until_ready()
    # What came through although nobody heard of it is seen by all; what did not, by none.
    assert not witness.contradictions()
    assert not witness.contradictions()

    asked = volleys.history.asked(REVOKE)
    cut_off = [one.subject for one in asked if not one.is_done]
    for jti in cut_off:
        volleys.revoke(jti, chance)
        assert volleys.history.verdict(jti) is Verdict.REFUSED
    assert not witness.contradictions()
    acknowledged = len(asked) - len(cut_off)
    with capsys.disabled():
        sys.stderr.write(
            f"\n{kills} workers of {NODES} nodes killed during {acknowledged / took_s:.0f}"
            f" revocations a second (COATCHECK_TEST_SEED={SEED}, {took_s:.0f} s): {acknowledged}"
            f" acknowledged and {len(cut_off)} cut off; {witness.looks} looks, none was lost\n"
        )
    assert acknowledged > KILLS
