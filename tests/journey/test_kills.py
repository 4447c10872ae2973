"""Processes that are killed in the middle of their writes, again and again.

SIGKILL leaves no time for anything: what was acknowledged must be in the database by then, and
what was not must be there as a whole or not at all.  Clients keep a history of what they asked and
were told; after each restart it is held against what the service says.

COATCHECK_TEST_KILLS is how often; COATCHECK_TEST_SEED repeats the moments of an earlier run, as far
as the scheduler does.
"""

import itertools
import json
import os
import queue
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import jwt
import pytest

from coatcheck import apikey
from coatcheck.feed_profile import MOST_TOKENS
from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server import catalog as catalogs
from coatcheck.server import sealing, signing
from coatcheck.server.manage import api_keys
from coatcheck.server.settings import Settings
from coatcheck.server.store import open_store
from coatcheck.verifier import Verifier, VerifierError
from support.deployment import TESTER
from support.history import ISSUE, REVOKE, History, Verdict
from support.live import Live, a_service, clean_environment, run_command, serve

KILLS = int(os.environ.get("COATCHECK_TEST_KILLS", "12"))
SEED = int(os.environ.get("COATCHECK_TEST_SEED", "0")) or random.randrange(1, 10**6)  # noqa: S311
AUDIENCE = "https://api.example.com"
GOAL_S = 3.0
ATTEMPTS = 3
#: Longer than anything takes that works.
FOREVER_S = 60
CLIENTS = 4
#: More than all clients use up; and so many revocations fit into the feed as they are.
API_KEYS = 40 + 15 * KILLS
MOST_REVOKED_API_KEYS = 900
#: A token of which less is left is asked about no more.
NEARLY_EXPIRED_S = 45


# --- what is killed


def waited_for_cpu_s(process_id: int) -> float:
    """For how long a process was ready to run, and this machine let others run."""
    try:
        # The main thread's: all of a start happens there.
        return int(Path(f"/proc/{process_id}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class Service:
    """A service that is killed and comes back on the same port."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.process = live.process
        self.back_after_s: list[float] = []
        self.waited_s: list[float] = []
        self.slow_starts = 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=FOREVER_S)

    def start(self) -> None:
        """Start it again, and write down how long that took until it was ready.

        A start that took too long is tried again: what the database makes slow stays slow, a
        machine that was busy with something else does not.
        """
        for _ in range(ATTEMPTS):
            back_after_s, waited_s = self._start()
            if back_after_s - waited_s < GOAL_S:
                break
            self.slow_starts += 1
            self.kill()
        else:
            pytest.fail(f"not back within {GOAL_S} s, {ATTEMPTS} times in a row")
        self.back_after_s.append(back_after_s)
        self.waited_s.append(waited_s)

    def _start(self) -> tuple[float, float]:
        port = str(urlsplit(self.live.issuer).port)
        began = time.monotonic()
        log = self.live.folder / "serve.log"
        # How long a start takes is what is asked: all of it.
        self.process = serve(self.live.environment, log, "--port", port, is_started=True)
        while not self._is_ready():
            assert self.process.poll() is None, self.live.log[-2000:]
            assert time.monotonic() - began < FOREVER_S, self.live.log[-2000:]
            time.sleep(0.01)
        return time.monotonic() - began, waited_for_cpu_s(self.process.pid)

    def _is_ready(self) -> bool:
        address = urlsplit(self.live.issuer)
        with closing(HTTPConnection(address.netloc, timeout=FOREVER_S)) as connection:
            try:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=FOREVER_S)


#: Ends API keys as an operator does: in a process of its own, which opens the database each time,
#: so that a service that comes back has to recover it alone.
WRITER = """
import sys, time
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.store import open_store

store = open_store(sys.argv[1])
for line in sys.stdin:
    api_keys.revoke(store, line.strip(), Actor("cli:tester"), now=int(time.time()))
    store.close()
    print("done", flush=True)
"""


class Writer:
    """The process that revokes API keys; after its death there is another one."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, self._database_url],
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def revoke(self, api_key_id: str) -> bool:
        """Whether it was acknowledged."""
        if self._process.poll() is not None:
            self.close()
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{api_key_id}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return self._process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=FOREVER_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


# --- who asks


@dataclass(frozen=True, slots=True)
class Token:
    jti: str
    api_key_id: str
    expires_at: int
    text: str

    @property
    def is_nearly_expired(self) -> bool:
        return self.expires_at - time.time() < NEARLY_EXPIRED_S


class Gate:
    """Lets requests be sent while it is open; closed, none is under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = False
        self._inside = 0
        self.is_over = False

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            assert self._changed.wait_for(lambda: self._inside == 0, timeout=FOREVER_S)

    @contextmanager
    def one(self) -> Iterator[None]:
        """One request."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()


class Clients:
    """Callers that get and revoke tokens all at once, and an operator who ends API keys."""

    def __init__(
        self, issuer: str, secret_of: Mapping[str, str], writer: Writer, seed: int
    ) -> None:
        self.history = History()
        self.gate = Gate()
        self.tokens: dict[str, Token] = {}
        self.secret_of = secret_of
        self._issuer = issuer
        self._writer = writer
        self._unused: queue.SimpleQueue[str] = queue.SimpleQueue()
        for api_key_id in self.secret_of:
            self._unused.put(api_key_id)
        self._unwanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wrong: list[BaseException] = []
        bodies = [
            *((self._call, random.Random(f"{seed} {n}")) for n in range(CLIENTS)),  # noqa: S311
            (self._operate, random.Random(f"{seed}")),  # noqa: S311
        ]
        self._threads = [
            threading.Thread(target=self._run, args=body, daemon=True) for body in bodies
        ]
        for thread in self._threads:
            thread.start()

    def require_well(self) -> None:
        for wrong in self._wrong:
            raise wrong

    def close(self) -> None:
        self.gate.is_over = True
        self.gate.open()
        for thread in self._threads:
            thread.join(timeout=FOREVER_S)

    def _run(self, body: Callable[[random.Random], None], chance: random.Random) -> None:
        try:
            body(chance)
        except BaseException as error:  # the main thread raises it
            self._wrong.append(error)

    def _call(self, chance: random.Random) -> None:
        """A caller: one API key after the other, some tokens of each."""
        with httpx2.Client(base_url=self._issuer, timeout=FOREVER_S) as http:
            while not self.gate.is_over:
                api_key_id = self._unused.get(timeout=FOREVER_S)
                # Of some API keys more tokens end than the feed names one by one.
                revoked = chance.choice((2, 3, 4, MOST_TOKENS + 2))
                mine: list[Token] = []
                for _ in range(2 * revoked):
                    if self.gate.is_over:
                        return
                    time.sleep(chance.uniform(0, 0.02))
                    self._issue(http, api_key_id, mine)
                    if mine and chance.random() < 0.5:
                        self._revoke(http, chance.choice(mine))
                if chance.random() < 0.5:
                    self._unwanted.put(api_key_id)

    def _issue(self, http: httpx2.Client, api_key_id: str, mine: list[Token]) -> None:
        form = {"grant_type": "client_credentials", "client_secret": self.secret_of[api_key_id]}
        with self.gate.one(), self.history.asking(ISSUE, api_key_id) as asked:
            try:
                answer = http.post("/oauth/token", data=form)
            except httpx2.TransportError:
                return
            asked.answer(answer.status_code)
        assert answer.status_code == 200, answer.text
        text = answer.json()["access_token"]
        claims = jwt.decode(text, options={"verify_signature": False})
        token = Token(claims["jti"], api_key_id, claims["exp"], text)
        self.history.issued(token.jti, api_key_id)
        self.tokens[token.jti] = token
        mine.append(token)

    def _revoke(self, http: httpx2.Client, token: Token) -> None:
        form = {"client_secret": self.secret_of[token.api_key_id], "token": token.text}
        with self.gate.one(), self.history.asking(REVOKE, token.jti) as asked:
            try:
                answer = http.post("/oauth/revoke", data=form)
            except httpx2.TransportError:
                return
            asked.answer(answer.status_code)
        assert answer.status_code == 200, answer.text

    def _operate(self, chance: random.Random) -> None:
        """The operator: ends what callers do not want any more."""
        for _ in range(MOST_REVOKED_API_KEYS):
            while not self.gate.is_over:
                try:
                    api_key_id = self._unwanted.get(timeout=0.2)
                    break
                except queue.Empty:
                    pass
            else:
                return
            time.sleep(chance.uniform(0, 0.02))
            with self.gate.one(), self.history.asking(REVOKE, api_key_id) as asked:
                if self._writer.revoke(api_key_id):
                    asked.answer(200)


# --- what must hold


class Judge:
    """Asks the service what it knows of credentials, and holds that against the history."""

    def __init__(
        self, clients: Clients, http: httpx2.Client, service_key: str, chance: random.Random
    ) -> None:
        self._clients = clients
        self._history = clients.history
        self._http = http
        self._service_key = service_key
        self._chance = chance
        self._seen = 0.0

    def look(self, *, at_all: bool = False) -> None:
        """At what was to be revoked since the last look, or ever; and at some of the rest."""
        self._clients.require_well()
        revocations = self._history.asked(REVOKE)
        tokens, api_keys = list(self._clients.tokens), list(self._clients.secret_of)
        since = 0.0 if at_all else self._seen
        lately = {asked.subject for asked in revocations if asked.sent_at >= since}
        api_keys = [one for one in api_keys if one in lately] + self._some(api_keys, 5)
        if not at_all:
            tokens = [jti for jti in tokens if jti in lately] + self._some(tokens, 20)
        self._seen = time.monotonic()
        refused = {jti: self._is_token_refused(jti) for jti in set(tokens) if self._counts(jti)}
        refused |= {one: self._is_api_key_refused(one) for one in set(api_keys)}
        assert not self._history.contradictions(refused)

    def _some(self, subjects: list[str], number: int) -> list[str]:
        return self._chance.sample(subjects, min(number, len(subjects)))

    def _counts(self, jti: str) -> bool:
        return not self._clients.tokens[jti].is_nearly_expired

    def _is_token_refused(self, jti: str) -> bool:
        form = {"client_secret": self._service_key, "token": self._clients.tokens[jti].text}
        answer = self._http.post("/oauth/introspect", data=form)
        assert answer.status_code == 200, answer.text
        return answer.json()["active"] is False

    def _is_api_key_refused(self, api_key_id: str) -> bool:
        secret = self._clients.secret_of[api_key_id]
        form = {"grant_type": "client_credentials", "client_secret": secret}
        with self._history.asking(ISSUE, api_key_id) as asked:
            answer = self._http.post("/oauth/token", data=form)
            asked.answer(answer.status_code)
        if answer.status_code == 200:
            return False
        assert answer.json()["error"] == "invalid_client", answer.text
        assert "was revoked" in answer.json()["error_description"]
        return True

    def follow(self, verifier: Verifier) -> None:
        """What the feed tells a resource server: the same, but for API keys it names as a whole."""
        tokens = [token for token in self._clients.tokens.values() if not token.is_nearly_expired]
        as_a_whole = self._named_as_a_whole()
        until = time.monotonic() + FOREVER_S
        for token in tokens:
            verdict = self._history.verdict(token.jti)
            if verdict is Verdict.REFUSED:
                while self._code(verifier, token) == "ok":
                    assert time.monotonic() < until, f"{token.jti} is accepted, but {verdict.value}"
                    time.sleep(0.02)
                assert self._code(verifier, token) == "token_revoked"
            elif verdict is Verdict.ACCEPTED and token.api_key_id not in as_a_whole:
                assert self._code(verifier, token) == "ok", f"{token.jti}: {verdict.value}"

    def _named_as_a_whole(self) -> set[str]:
        """API keys of which the feed may tell that all tokens so far have ended."""
        tokens = self._clients.tokens
        revoked = {asked.subject for asked in self._history.asked(REVOKE)} & tokens.keys()
        ended = Counter(tokens[jti].api_key_id for jti in revoked)
        return {api_key_id for api_key_id, number in ended.items() if number > MOST_TOKENS}

    def _code(self, verifier: Verifier, token: Token) -> str:
        try:
            verifier.verify_jwt(token.text)
        except VerifierError as refused:
            return refused.code
        return "ok"

    def exchange(self, verifier: Verifier) -> None:
        """What a resource server says to API keys that callers send as they are."""
        revoked = [one.subject for one in self._history.asked(REVOKE, *self._clients.secret_of)]
        for api_key_id in {*revoked[-20:], *self._some(list(self._clients.secret_of), 5)}:
            headers = [("X-API-Key", self._clients.secret_of[api_key_id])]
            verdict = self._history.verdict(api_key_id)
            code = "ok"
            with self._history.asking(ISSUE, api_key_id):
                try:
                    verifier.authenticate(headers, client_address="127.0.0.1")
                except VerifierError as refused:
                    code = refused.code
            right = {Verdict.ACCEPTED: ("ok",), Verdict.REFUSED: ("api_key_revoked",)}
            assert code in right.get(verdict, ("ok", "api_key_revoked")), api_key_id


#: Queries that find something where a write was torn.
TORN = {
    "an API key without a secret": (
        "SELECT id FROM api_keys WHERE id NOT IN (SELECT api_key_id FROM api_key_secrets)"
    ),
    "a secret that is no digest": (
        "SELECT api_key_id FROM api_key_secrets"
        " WHERE typeof(digest) <> 'blob' OR length(digest) <> 32"
    ),
    "an API key that was never created": (
        "SELECT id FROM api_keys"
        " WHERE id NOT IN (SELECT subject FROM changes WHERE what = 'api_key.created')"
    ),
    "a creation without its API key": (
        "SELECT subject FROM changes"
        " WHERE what = 'api_key.created' AND subject NOT IN (SELECT id FROM api_keys)"
    ),
    "a revocation in one place only": (
        "SELECT id FROM api_keys WHERE (revoked_at IS NOT NULL)"
        " <> (id IN (SELECT subject FROM changes WHERE what = 'api_key.revoked'))"
    ),
    "a change that was made twice": (
        "SELECT subject FROM changes WHERE narrows GROUP BY what, subject HAVING count(*) > 1"
    ),
    "a gap in the change log": (
        "SELECT max(seq) FROM changes HAVING count(*) <> max(seq) OR min(seq) <> 1"
    ),
    "usage of no API key": (
        "SELECT api_key_id FROM api_key_usage WHERE api_key_id NOT IN (SELECT id FROM api_keys)"
    ),
    "usage that is no count": (
        "SELECT api_key_id FROM api_key_usage WHERE typeof(tokens_issued) <> 'integer'"
        " OR raw_key_uses NOT BETWEEN 0 AND tokens_issued OR tokens_issued < 1"
        " OR last_used_at NOT BETWEEN (SELECT created_at FROM deployment)"
        " AND CAST(strftime('%s', 'now') AS INTEGER)"
    ),
    "a signing key that was never created": (
        "SELECT kid FROM signing_keys"
        " WHERE kid NOT IN (SELECT subject FROM changes WHERE what = 'signing_key.created')"
    ),
    "a creation without its signing key": (
        "SELECT subject FROM changes"
        " WHERE what = 'signing_key.created' AND subject NOT IN (SELECT kid FROM signing_keys)"
    ),
    "a row that points nowhere": "PRAGMA foreign_key_check",
}


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{folder}/coatcheck.db?mode=ro", uri=True)) as connection:
        yield connection


def require_whole(folder: Path) -> None:
    """No page and no row of the database is torn."""
    with reading(folder) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = {name: connection.execute(query).fetchall() for name, query in TORN.items()}
    assert not {name: rows for name, rows in found.items() if rows}


def require_in_the_log(folder: Path, history: History) -> None:
    """Each acknowledged revocation has its row in the change log."""
    with reading(folder) as connection:
        rows = connection.execute("SELECT subject FROM changes WHERE narrows").fetchall()
    acknowledged = {asked.subject for asked in history.asked(REVOKE) if asked.is_done}
    assert acknowledged <= {subject for (subject,) in rows}


def require_counted(folder: Path, history: History, since: float) -> None:
    """No token was counted that nobody asked for; those of an orderly end were all counted."""
    with reading(folder) as connection:
        counted = dict(connection.execute("SELECT api_key_id, tokens_issued FROM api_key_usage"))
    for api_key_id in {asked.subject for asked in history.asked(ISSUE)}:
        asked = history.asked(ISSUE, api_key_id)
        answered = sum(one.is_done and one.sent_at >= since for one in asked)
        assert answered <= counted.get(api_key_id, 0) <= len(asked), api_key_id


# --- what must hold, held against what does not


def a_history() -> History:
    """An API key with one token, of which nothing was asked yet."""
    history = History()
    with history.asking(ISSUE, "api key") as asked:
        asked.answer(200)
    history.issued("token", "api key")
    return history


def revoke(history: History, subject: str, status: int | None = 200) -> None:
    with history.asking(REVOKE, subject) as asked:
        if status is not None:
            asked.answer(status)


@pytest.mark.parametrize("subject", ["token", "api key"])
def test_a_lost_revocation_is_found(subject: str) -> None:
    """The token's own, and its API key's; one that was refused with 503 may or may not hold."""
    history = a_history()
    assert history.contradictions({"token": False}) == []
    revoke(history, subject, 503)
    assert history.contradictions({"token": False}) == []
    revoke(history, subject)
    assert history.contradictions({"token": True}) == []

    assert len(history.contradictions({"token": False})) == 2


def test_a_revocation_that_nobody_asked_for_is_found() -> None:
    history = a_history()
    revoke(history, "another token")

    assert len(history.contradictions({"token": True})) == 1


@pytest.mark.parametrize("happened", [True, False])
def test_a_revocation_without_an_answer_has_happened_or_has_not(happened: bool) -> None:
    """Whatever the first look shows, the next one must show again; until it is asked for anew."""
    history = a_history()
    revoke(history, "token", None)
    assert history.contradictions({"token": happened}) == []
    assert history.contradictions({"token": happened}) == []

    assert len(history.contradictions({"token": not happened})) == 1

    revoke(history, "token", None)
    assert history.contradictions({"token": True}) == []


# --- the service


def api_keys_of(live: Live) -> Iterator[tuple[str, str]]:
    """New API keys: ids and secrets.  The first may ask about every token, the others are alike."""
    settings = Settings.load(live.environment)
    catalog = catalogs.without_file(settings)
    organization_id, now = live.initialized["organization"], int(time.time())
    service = api_keys.NewApiKey(organization_id, "judge", [str(RESOURCE_SERVER)])
    caller = api_keys.NewApiKey(organization_id, "caller")
    with closing(open_store(settings.database_url)) as store:
        for new, count in ((service, 1), (caller, API_KEYS)):
            yield from api_keys.create_many(
                store, catalog, new, TESTER, now=now, issuer=live.issuer, count=count
            )


def test_a_killed_service_has_lost_nothing_and_is_back_within_3_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    F1: whoever was told that a credential is dead may rely on it, whatever happens to us.

    The clients' history alone says what must be true.  The service does the writes of tokens, and
    a second process, which is killed now and then as well, those of API keys.
    """
    chance = random.Random(SEED)  # noqa: S311 - no secret
    with a_service(tmp_path, audience=AUDIENCE, guesses_per_minute="0") as live:
        (_, service_key), *made = api_keys_of(live)
        writer = Writer(live.environment["COATCHECK_DATABASE_URL"])
        clients = Clients(live.issuer, dict(made), writer, SEED)
        history, gate, service = clients.history, clients.gate, Service(live)
        with (
            httpx2.Client(base_url=live.issuer, timeout=FOREVER_S) as http,
            Verifier(live.issuer, AUDIENCE, service_key=service_key) as verifier,
        ):
            judge = Judge(clients, http, service_key, chance)
            try:
                for kill in range(1, KILLS + 1):
                    gate.open()
                    time.sleep(chance.uniform(0.02, 0.15))
                    if kill % 10 == 5:
                        writer.kill()
                        time.sleep(chance.uniform(0, 0.1))
                    time.sleep(chance.uniform(0, 0.1))
                    service.kill()
                    gate.close()
                    service.start()
                    judge.look()
                    require_whole(tmp_path)
                    if kill % 10 == 0:
                        judge.follow(verifier)
                judge.look(at_all=True)
                with Verifier(live.issuer, AUDIENCE, service_key=service_key) as fresh:
                    for one in (verifier, fresh):
                        judge.follow(one)
                        judge.exchange(one)
                began = time.monotonic()
                gate.open()
                time.sleep(0.1)
                gate.close()
            finally:
                clients.close()
                writer.close()
                service.stop()
    require_whole(tmp_path)
    require_in_the_log(tmp_path, history)
    require_counted(tmp_path, history, began)

    done = [asked.subject in clients.tokens for asked in history.asked(REVOKE) if asked.is_done]
    cut_off = sum(asked.status is None for asked in history.asked(REVOKE))
    took_s = [
        back_after_s - waited_s
        for back_after_s, waited_s in zip(service.back_after_s, service.waited_s, strict=True)
    ]
    with capsys.disabled():
        sys.stderr.write(
            f"\n{KILLS} kills (COATCHECK_TEST_SEED={SEED}): {sum(done)} revocations of tokens and"
            f" {len(done) - sum(done)} of API keys were acknowledged, and {cut_off} cut off; back"
            f" after {statistics.median(service.back_after_s):.2f} s, at most"
            f" {max(service.back_after_s):.2f} s; without the wait for this machine at most"
            f" {max(took_s):.2f} s, {service.slow_starts} starts tried again\n"
        )
    # Kills between writes prove nothing.
    assert cut_off >= KILLS / 4


def workers_of(live: Live) -> list[int]:
    """The process ids of the workers that have started, as the log tells them."""
    started = re.findall(r"Started server process \[(\d+)\]", live.log)
    return [int(process_id) for process_id in started]


def eventually(is_so: Callable[[], bool], within_s: float) -> None:
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < within_s
        time.sleep(0.02)


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_killed_workers_are_replaced_and_outlive_nobody(tmp_path: Path) -> None:
    """
    F1: one worker dies, and there is another one; the process above them dies, and all are gone.

    A worker that stayed behind would hold the port, and the service could not come back; and it
    would go on answering while the operator believes that it is down.
    """
    with a_service(tmp_path, "--workers", "2") as live:

        def has_started(number: int) -> bool:
            return live.log.count("Application startup complete") == number

        eventually(lambda: has_started(2), FOREVER_S)
        first, second = workers_of(live)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: has_started(3), FOREVER_S)
        assert httpx2.get(f"{live.issuer}/readyz").status_code == 200

        workers = {second, *workers_of(live)} - {first}
        assert len(workers) == 2
        live.process.kill()
        live.process.wait(timeout=FOREVER_S)
        try:
            eventually(lambda: not any(map(is_running, workers)), FOREVER_S / 6)
        finally:
            for process_id in filter(is_running, workers):
                os.kill(process_id, signal.SIGKILL)


# --- commands

#: API keys that one command makes, in one transaction: enough to be killed in the middle of it.
AT_ONCE = 2000
COMMANDS = {
    "keys create": ("keys", "create", "--json", "--name", "kills", "--count", str(AT_ONCE)),
    "signing-keys rotate": ("signing-keys", "rotate", "--now", "--json"),
}
MOMENTS = ("the log grows", "the database changes", "any time")


def state_of(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    # A log that was only just made is empty: nothing was written yet.
    return (stat.st_size, stat.st_mtime_ns) if stat.st_size else (0, 0)


def killed(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], moment: str, at_s: float
) -> tuple[bool, str]:
    """Run a command and kill it.  Returns whether that came before its end, and its stdout."""
    file = folder / ("coatcheck.db-wal" if moment == "the log grows" else "coatcheck.db")
    before, began = state_of(file), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "coatcheck.cli", *arguments],
        env=clean_environment() | dict(environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    printed: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()))
    reader.start()
    while process.poll() is None:
        if moment == "any time":
            is_now = time.monotonic() - began >= at_s
        else:
            is_now = state_of(file) != before
        if is_now:
            # From the first page of a write to a moment after the last one.
            time.sleep(at_s / 100)
            process.kill()
            break
        time.sleep(0.0005)
    process.wait(timeout=FOREVER_S)
    reader.join(timeout=FOREVER_S)
    process.stdout.close()
    return process.returncode == -signal.SIGKILL, "".join(printed)


def require_shown(folder: Path, printed: str) -> None:
    """Each API key that was shown is there."""
    with reading(folder) as connection:
        rows = connection.execute("SELECT digest, api_key_id FROM api_key_secrets")
        known = dict(rows.fetchall())
    # The last line may be half of one.
    for line in printed.split("\n")[:-1]:
        told = json.loads(line)
        assert known[apikey.digest(told["key"])] == told["id"]


def require_signing_keys(folder: Path, now: int) -> None:
    """Each signing key has both halves, which fit; one of each line signs."""
    with closing(open_store(f"sqlite:///{folder}/coatcheck.db")) as store:
        records = store.signing_keys()
    ring = signing.Ring.read(records, sealing.load(folder / "keys"), signing.Ring(()))
    ring.require_open()
    for record in records:
        signing_key = ring.get(record.kid)
        assert signing_key is not None
        assert signing.thumbprint(signing_key.public_jwk) == record.kid
        public = jwt.PyJWK(dict(signing_key.public_jwk)).key
        assert signing_key.private.public_key() == public
    lines = {(one.purpose, one.algorithm) for one in ring.signing_keys}
    signers = [(one.purpose, one.algorithm) for one in ring.signing_keys if one.signs(now)]
    assert sorted(signers) == sorted(lines)


def test_a_killed_command_did_all_of_it_or_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    F2: what was shown is there; and there is no half of an API key, nor of a signing key.

    A command that is killed between its commit and its last line has shown less than there is:
    no process can do both at once, and the other order would show what there is not.
    """
    chance = random.Random(SEED)  # noqa: S311 - no secret
    environment = {
        "COATCHECK_DATABASE_URL": f"sqlite:///{tmp_path}/coatcheck.db",
        "COATCHECK_KEYS_DIR": str(tmp_path / "keys"),
    }
    assert run_command("init", environment=environment).returncode == 0
    plan = itertools.cycle((name, moment) for moment in MOMENTS for name in COMMANDS)
    number = max(4, KILLS // 5)
    came_before_the_end = 0
    for name, moment in itertools.islice(plan, number):
        was_killed, printed = killed(
            COMMANDS[name], tmp_path, environment, moment, chance.uniform(0.3, 1.2)
        )
        came_before_the_end += was_killed
        require_whole(tmp_path)
        if name == "keys create":
            require_shown(tmp_path, printed)
        require_signing_keys(tmp_path, int(time.time()))
        with reading(tmp_path) as connection:
            (made,) = connection.execute("SELECT count(*) FROM api_keys").fetchone()
        assert made % AT_ONCE == 1  # and the admin key
    with capsys.disabled():
        sys.stderr.write(
            f"\n{came_before_the_end} of {number} commands were killed before their end"
            f" (COATCHECK_TEST_SEED={SEED})\n"
        )
    assert came_before_the_end >= number / 2
