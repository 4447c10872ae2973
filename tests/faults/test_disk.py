"""A SQLite file whose disk is full, that somebody else holds, or that is taken away.

What the store makes of each is in `contract/test_store`; here the service is asked from outside.

COATCHECK_TEST_FAULT_SECONDS is how long each fault lasts.
"""

import os
import resource
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import pytest

from support.deployment import form
from support.live import Live, a_service

LASTS_S = float(os.environ.get("COATCHECK_TEST_FAULT_SECONDS", "2.2"))
TOLD_WITHIN_S = 2.5
FOREVER_S = 30
#: Revocations after which a full disk has been noticed.
MOST = 500


class Caller:
    """Gets and revokes tokens, and remembers what it was told."""

    def __init__(self, live: Live, http: httpx2.Client) -> None:
        self._http = http
        self._key = live.api_key()["key"]
        self.dead: list[str] = []
        self.undecided: list[str] = []

    def token(self) -> httpx2.Response:
        return self._http.post("/oauth/token", data=form(self._key))

    def revoke(self, token: str) -> httpx2.Response:
        """Told in time, and kept in mind."""
        began = time.monotonic()
        answer = self._http.post("/oauth/revoke", data={"client_secret": self._key, "token": token})
        assert time.monotonic() - began < TOLD_WITHIN_S
        if answer.status_code == 200:
            self.dead.append(token)
        else:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            self.undecided.append(token)
        return answer

    def revoke_another(self) -> int:
        return self.revoke(self.token().json()["access_token"]).status_code

    def is_active(self, token: str) -> bool:
        asked = {"client_secret": self._key, "token": token}
        answer: bool = self._http.post("/oauth/introspect", data=asked).json()["active"]
        return answer

    def require_nothing_lost(self) -> None:
        """What was acknowledged holds; what was refused can be said again."""
        assert not any(map(self.is_active, self.dead))
        for token in self.undecided:
            assert self.revoke(token).status_code == 200
            assert not self.is_active(token)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with a_service(tmp_path_factory.mktemp("disk"), "--workers", "1") as running:
        yield running


@pytest.fixture
def http(live: Live) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=live.issuer, timeout=FOREVER_S) as client:
        yield client


@pytest.fixture
def caller(live: Live, http: httpx2.Client) -> Caller:
    return Caller(live, http)


@contextmanager
def full_disk(live: Live) -> Iterator[None]:
    """No file of the service's may grow beyond what the log of its database has now."""
    soft, hard = resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE)
    size = (live.folder / "coatcheck.db-wal").stat().st_size
    resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def require_whole(database: Path) -> None:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_full_disk_refuses_revocations_and_nothing_else(
    live: Live, http: httpx2.Client, caller: Caller
) -> None:
    """F4: 503, and no half of a row; with room it goes on by itself."""
    assert caller.revoke_another() == 200
    with full_disk(live):
        for _ in range(MOST):
            if caller.revoke_another() != 200:
                break
        until = time.monotonic() + LASTS_S
        while time.monotonic() < until:
            assert caller.revoke_another() == 503
            assert http.get("/.well-known/jwks.json").status_code == 200
            time.sleep(0.05)

    caller.require_nothing_lost()
    require_whole(live.folder / "coatcheck.db")


def test_a_database_that_another_writer_holds_refuses_writes_in_time(
    live: Live, http: httpx2.Client, caller: Caller
) -> None:
    """F5: tokens are issued meanwhile, from what is written."""
    database = live.folder / "coatcheck.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        until = time.monotonic() + LASTS_S
        while time.monotonic() < until:
            assert caller.revoke_another() == 503
            assert http.get("/.well-known/jwks.json").status_code == 200

    assert caller.revoke_another() == 200
    caller.require_nothing_lost()


def test_a_database_that_is_taken_away_is_not_made_anew(
    live: Live, http: httpx2.Client, caller: Caller
) -> None:
    """F5: an empty one in its place would call every revoked key unknown, and lose the others."""
    assert caller.revoke_another() == 200
    files = [path for path in live.folder.iterdir() if path.name.startswith("coatcheck.db")]
    away = live.folder / "away"
    away.mkdir()
    for path in files:
        path.rename(away / path.name)
    # The path is looked at once a second at least.
    time.sleep(1.2)
    until = time.monotonic() + LASTS_S
    while time.monotonic() < until:
        assert caller.token().status_code == 503
        assert http.get("/readyz").status_code == 503
        time.sleep(0.05)
    assert not (live.folder / "coatcheck.db").exists()
    for path in files:
        (away / path.name).rename(path)

    until = time.monotonic() + FOREVER_S
    while caller.token().status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert caller.revoke_another() == 200
    caller.require_nothing_lost()
