"""A PostgreSQL that is stopped, frozen, slow, cut off or full, seen from outside the service.

Callers, a resource server and an operator go on asking while it lasts.  What they sent and were
told is all that is judged: 503 in time, the key set and local verification as ever, nothing
wrong, and back by itself.  What the store makes of each fault is in `contract/test_postgres`.

COATCHECK_TEST_FAULT_SECONDS is how long each fault lasts.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg
import pytest

from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.manage import api_keys
from coatcheck.server.store import Store, StoreUnavailable
from coatcheck.server.store.transaction import LOG_LOCK
from coatcheck.verifier import Verifier, VerifierError
from support.deployment import TESTER
from support.fleet import Fleet, Node, a_fleet, a_verifier_at
from support.postgres import Server, server
from support.proxy import Cut, Proxy, proxy

AUDIENCE = "https://api.example.com"
LASTS_S = float(os.environ.get("COATCHECK_TEST_FAULT_SECONDS", "2.2"))
#: Until the service says that it cannot.
TOLD_WITHIN_S = 2.0
#: Until everything works again.
BACK_WITHIN_S = 5.0
#: From then on nobody takes what was revoked.
DEAD_WITHIN_S = 1.0
#: For pages that need no database, and for tokens that a resource server verifies by itself.
AT_ONCE_S = 1.0
FOREVER_S = 30
PAUSE_S = 0.05
WORKERS = 2
#: Tokens that are revoked and shown while one fault lasts; more than there is time for.
STOCK = round(20 * (LASTS_S + 5))
#: The nodes' own role in the database: what they may can be taken from them.
ROLE = "node"

TOKENS, WRITES, PAGES, LOCAL = "tokens", "writes", "pages", "local"


class Asked(NamedTuple):
    """One question and its answer.  Moments are seconds on a clock that never goes back.

    Attributes:
        kind: which promise it is about.
        subject: whose API key or token, if that matters.
        status: 0 if no answer came.
    """

    kind: str
    subject: str
    sent_at: float
    took_s: float
    status: int
    retry_after: str | None
    body: Any

    @property
    def is_taken(self) -> bool:
        """Whether it says that a credential is good."""
        return self.status == 200 and self.body.get("active", True)


class Scene(NamedTuple):
    """A node that reaches its database through a proxy, and everybody who asks it."""

    server: Server
    way: Proxy
    fleet: Fleet
    node: Node
    store: Store
    verifier: Verifier
    service_key: str

    def ask(self, kind: str, subject: str, method: str, path: str, **form: str) -> Asked:
        """On a connection of its own, to whichever worker takes it."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        status, retry_after, body, began = 0, None, None, time.monotonic()
        with (
            closing(HTTPConnection("127.0.0.1", self.node.port, timeout=FOREVER_S)) as connection,
            suppress(OSError, HTTPException),
        ):
            connection.request(method, path, urlencode(form) or None, headers)
            answer = connection.getresponse()
            body = json.loads(answer.read())
            status, retry_after = answer.status, answer.headers["Retry-After"]
        return Asked(kind, subject, began, time.monotonic() - began, status, retry_after, body)

    def token(self, kind: str, api_key: tuple[str, str]) -> Asked:
        api_key_id, secret = api_key
        form = {"grant_type": "client_credentials", "client_secret": secret}
        return self.ask(kind, api_key_id, "POST", "/oauth/token", **form)

    def tokens(self, api_key: tuple[str, str], count: int) -> list[str]:
        return [self.token("", api_key).body["access_token"] for _ in range(count)]

    def revoke(self, token: str, secret: str) -> Asked:
        form = {"client_secret": secret, "token": token}
        return self.ask(WRITES, token, "POST", "/oauth/revoke", **form)

    def introspect(self, kind: str, subject: str, token: str) -> Asked:
        form = {"client_secret": self.service_key, "token": token}
        return self.ask(kind, subject, "POST", "/oauth/introspect", **form)

    def seconds_until_all_are_back(self, token: str, secret: str, since: float) -> float:
        """Until each worker reads and writes again."""
        with ExitStack() as opened:
            for connection in self.node.connections(FOREVER_S):
                opened.callback(connection.close)
                for path in ("/oauth/introspect", "/oauth/revoke"):
                    form = urlencode({"client_secret": secret, "token": token})
                    while _status(connection, path, form) != 200:
                        assert time.monotonic() < since + FOREVER_S
                        time.sleep(PAUSE_S)
        return time.monotonic() - since

    def page(self, path: str) -> Asked:
        return self.ask(PAGES, path, "GET", path)

    def verify(self, token: str) -> Asked:
        """As a resource server does, by itself."""
        began, status = time.monotonic(), 200
        try:
            self.verifier.verify_jwt(token)
        except VerifierError as refused:
            status = refused.status
        return Asked(LOCAL, "", began, time.monotonic() - began, status, None, {})


def _status(connection: HTTPConnection, path: str, form: str) -> int:
    content_type = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", path, form, content_type)
    answer = connection.getresponse()
    answer.read()
    return answer.status


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with ExitStack() as stack:
        running = stack.enter_context(server())
        way = stack.enter_context(proxy(running.port))
        url = running.new_database()
        sql(url, f"CREATE ROLE {ROLE} LOGIN")
        sql(url, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {ROLE}")
        sql(url, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {ROLE}")
        database = url.rpartition("/")[2]
        fleet = stack.enter_context(
            a_fleet(
                tmp_path_factory.mktemp("faults"),
                nodes=1,
                workers=WORKERS,
                database_url=url,
                way=f"postgresql://{ROLE}@127.0.0.1:{way.port}/{database}",
                audience=AUDIENCE,
                guesses_per_minute="0",
            )
        )
        store = stack.enter_context(fleet.store())
        ((_, service_key),) = fleet.api_keys(store, str(RESOURCE_SERVER))
        (node,) = fleet.nodes
        verifier = stack.enter_context(a_verifier_at(node, fleet, AUDIENCE, service_key))
        yield Scene(running, way, fleet, node, store, verifier, service_key)


def sql(url: str, statement: str) -> None:
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(statement.encode())


# --- what goes wrong


Fault = Callable[[Scene, str], AbstractContextManager[None]]


@contextmanager
def stopped(scene: Scene, _: str) -> Iterator[None]:
    scene.server.stop()
    yield
    scene.server.start()


@contextmanager
def frozen(scene: Scene, _: str) -> Iterator[None]:
    with scene.server.frozen():
        yield


@contextmanager
def slow(scene: Scene, _: str) -> Iterator[None]:
    scene.way.latency_s = 5
    yield
    scene.way.latency_s = 0


@contextmanager
def silent(scene: Scene, _: str) -> Iterator[None]:
    scene.way.is_silent = True
    yield
    scene.way.is_silent = False


@contextmanager
def full(scene: Scene, _: str) -> Iterator[None]:
    """No connection is left, and those that there were have ended."""
    url = scene.server.url("postgres")
    sql(url, f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    its_own = f"usename = '{ROLE}'"
    sql(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {its_own}")  # noqa: S608
    yield
    sql(url, f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")


@contextmanager
def cut(scene: Scene, how: Cut) -> Iterator[None]:
    """Again and again, in the middle of a commit."""
    is_over = threading.Event()
    before = scene.way.cuts

    def go_on() -> None:
        while not is_over.wait(0.1):
            scene.way.cut = how

    thread = threading.Thread(target=go_on)
    thread.start()
    yield
    is_over.set()
    thread.join()
    scene.way.cut = None
    assert scene.way.cuts - before >= 3


@contextmanager
def locked(scene: Scene, statement: str) -> Iterator[None]:
    """Somebody holds a lock, and hangs."""
    with closing(psycopg.connect(scene.fleet.settings.database_url)) as holder:
        holder.execute(statement.encode())
        yield


FAULTS: dict[str, Fault] = {
    "stopped": stopped,
    "frozen": frozen,
    "slow": slow,
    "cut off": silent,
    "cut before the commit": lambda scene, _: cut(scene, Cut.BEFORE),
    "cut after the commit": lambda scene, _: cut(scene, Cut.AFTER),
    "no connection left": full,
    "the lock of the log is held": lambda scene, _: locked(
        scene, f"SELECT pg_advisory_xact_lock({LOG_LOCK})"
    ),
    "the row of an API key is held": lambda scene, api_key_id: locked(
        scene,
        f"SELECT 1 FROM api_keys WHERE id = '{api_key_id}' FOR UPDATE",  # noqa: S608
    ),
}
#: What is still answered while it lasts; all else is told 503.
ALL, SOME = {200}, {200, 503}
STILL = {
    "cut before the commit": {TOKENS: ALL, WRITES: SOME},
    "cut after the commit": {TOKENS: ALL, WRITES: ALL},
    "the lock of the log is held": {TOKENS: ALL},
    "the row of an API key is held": {TOKENS: ALL, WRITES: ALL},
}


# --- who asks


@dataclass(slots=True)
class Operator:
    """Revokes an API key on the database itself, and tries again until that is acknowledged."""

    scene: Scene
    api_key_id: str
    done_at: float = float("inf")

    def __call__(self) -> None:
        until = time.monotonic() + LASTS_S + FOREVER_S
        while time.monotonic() < until:
            with suppress(StoreUnavailable):
                api_keys.revoke(self.scene.store, self.api_key_id, TESTER, now=int(time.time()))
                self.done_at = time.monotonic()
                return
            time.sleep(PAUSE_S)


class Askers:
    """Each asks one thing after the other, beside the others."""

    def __init__(self, *questions: Callable[[], Asked]) -> None:
        self.asked: list[Asked] = []
        self._is_over = threading.Event()
        self._wrong: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in questions]
        for thread in self._threads:
            thread.start()

    def _run(self, question: Callable[[], Asked]) -> None:
        try:
            while not self._is_over.wait(PAUSE_S):
                self.asked.append(question())
        except BaseException as error:  # whoever waits for the end raises it
            self._wrong.append(error)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(FOREVER_S)
        for wrong in self._wrong:
            raise wrong

    def wait_until(self, *kinds: str, since: float, within_s: float) -> float:
        """Seconds from a moment until each was asked for and given."""
        while True:
            given = [one for one in self.asked if one.sent_at >= since and one.status == 200]
            if all(any(one.kind == kind for one in given) for kind in kinds):
                return time.monotonic() - since
            assert time.monotonic() < since + within_s, f"not back: {self.asked[-20:]}"
            time.sleep(PAUSE_S / 5)


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_the_database_does_the_service_says_so_and_comes_back(
    name: str, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    F7: an outage is told in time, and nothing that is told is wrong.

    Whoever was told that an API key or a token is dead may rely on it, also on a node that cannot
    hear of it; and nobody needs the database to verify a token.
    """
    owner, careless, leaked, *strangers = scene.fleet.api_keys(scene.store, count=3 + STOCK)
    # Of an API key with many revoked tokens the feed says that all have ended.
    unwanted, unseen = iter(scene.tokens(careless, STOCK)), iter(scene.tokens(owner, STOCK))
    (stolen,) = scene.tokens(leaked, 1)
    never_met = iter(strangers)
    metadata = ("oauth-authorization-server", "openid-configuration", "coatcheck", "jwks.json")
    pages = itertools.cycle(f"/.well-known/{document}" for document in metadata)
    workers = scene.node.workers()

    askers = Askers(
        lambda: scene.token(TOKENS, owner),
        lambda: scene.token(TOKENS, next(never_met)),
        lambda: scene.revoke(next(unwanted), careless[1]),
        lambda: scene.page(next(pages)),
        lambda: scene.verify(next(unseen)),
        lambda: scene.token("leaked", leaked),
        lambda: scene.introspect("stolen", leaked[0], stolen),
    )
    operator = Operator(scene, leaked[0])
    operating = threading.Thread(target=operator)
    try:
        askers.wait_until(TOKENS, WRITES, PAGES, LOCAL, since=time.monotonic(), within_s=FOREVER_S)
        with FAULTS[name](scene, leaked[0]):
            began = time.monotonic()
            operating.start()
            time.sleep(LASTS_S)
            ended = time.monotonic()
        over = time.monotonic()
        askers.wait_until(TOKENS, WRITES, since=over, within_s=BACK_WITHIN_S)
        back_after_s = scene.seconds_until_all_are_back(next(unwanted), careless[1], over)
        operating.join(FOREVER_S)
        time.sleep(max(0.0, operator.done_at + DEAD_WITHIN_S + 0.2 - time.monotonic()))
    finally:
        askers.stop()

    # 1. Told in time, or done.
    asked = [one for one in askers.asked if one.kind in (TOKENS, WRITES, "leaked", "stolen")]
    refused = [one for one in asked if one.status == 503]
    longest_s = max((one.took_s for one in asked), default=0.0)
    assert {one.status for one in asked} <= {200, 400, 503}
    assert all(one.retry_after for one in refused)
    assert longest_s < TOLD_WITHIN_S
    # 2. Whatever works goes on, and the rest is not pretended to.
    # What was known when it began may be told for a moment, but nothing can be written.
    for kind, since in ((TOKENS, began + DEAD_WITHIN_S), (WRITES, began)):
        sent = [one for one in askers.asked if one.kind == kind and since <= one.sent_at < ended]
        still = STILL.get(name, {}).get(kind, {503})
        assert {one.status for one in sent if one.sent_at + one.took_s < ended} <= still
        assert 503 not in still or 503 in {one.status for one in sent}
    # 3. What needs no database.
    alone = [one for one in askers.asked if one.kind in (PAGES, LOCAL)]
    assert {(one.subject, one.status) for one in alone if one.status != 200} == set()
    assert max(one.took_s for one in alone) < AT_ONCE_S
    # 4. Nothing is taken a second after its revocation was acknowledged.
    assert not [
        one
        for one in askers.asked
        if one.subject == leaked[0]
        and one.sent_at > operator.done_at + DEAD_WITHIN_S
        and one.is_taken
    ]
    # 5. What was acknowledged happened; what was not may be asked for again.
    revocations = [one for one in askers.asked if one.kind == WRITES]
    for one in revocations:
        if one.status != 200:
            assert scene.revoke(one.subject, careless[1]).status == 200
        assert scene.introspect("", "", one.subject).body == {"active": False}
    assert back_after_s < BACK_WITHIN_S
    # 6. Nobody was restarted.
    assert scene.node.workers() == workers
    with capsys.disabled():
        sys.stderr.write(
            f"\n{name}: {len(refused)} of {len(asked)} refused, the longest answer took"
            f" {longest_s:.2f} s, back after {back_after_s:.2f} s\n"
        )
