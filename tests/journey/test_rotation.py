"""Signing keys succeed each other under load, and nobody who caches the key set notices.

Days are seconds here: the key set may be cached for one, a successor is published three ahead,
and tokens live for three.  Nothing else differs from a deployment that rotates each quarter.
"""

import json
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import jwt
import pytest

from coatcheck.durations import JWKS_MAX_AGE
from coatcheck.server.store import open_store
from coatcheck.verifier import Verifier
from support import node
from support.deployment import form
from support.live import Live, a_service

AUDIENCE = "https://api.example.com"
ROTATIONS = 10
MAX_AGE_S = 1
LIFETIME_S = 3
#: Seconds that a token must have left to be good beyond doubt, however slow this machine is.
MARGIN_S = 0.7
#: Seconds; far more than it takes.
PATIENCE_S = 60

#: Verifies a token, or raises.
Verify = Callable[[str], object]


class Refused(Exception):
    """A verifier did not take a token."""


def pyjwt(live: Live, audience: str) -> Verify:
    """PyJWT, whose key set is kept for the advertised time, without a second look."""
    client = jwt.PyJWKClient(f"{live.issuer}/.well-known/jwks.json", lifespan=MAX_AGE_S)

    def verify(token: str) -> object:
        kid = jwt.get_unverified_header(token)["kid"]
        keys = {key.key_id: key for key in client.get_jwk_set().keys}
        if kid not in keys:
            raise Refused(f"{kid} is not in the key set")
        return jwt.decode(
            token,
            keys[kid],
            algorithms=["ES256", "RS256"],
            audience=audience,
            issuer=live.issuer,
        )

    return verify


class Jose:
    """A node process that verifies with jose, one token after the other."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            ["node", node.FOLDER / "verifiers" / "jose-cached.mjs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def verify(self, token: str, audience: str) -> None:
        line = {
            "jwks_uri": f"{self._live.issuer}/.well-known/jwks.json",
            "max_age_s": MAX_AGE_S,
            "token": token,
            "issuer": self._live.issuer,
            "audience": audience,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
        if code:
            raise Refused(code)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)
        self._process.stdout.close()


@contextmanager
def verifiers(live: Live, audience: str, jose: Jose | None) -> Iterator[Mapping[str, Verify]]:
    """Everybody who verifies tokens of this audience, by name."""
    # A clock that runs so fast keeps the key set for the advertised second, too.
    fast = JWKS_MAX_AGE / MAX_AGE_S
    with (
        closing(Verifier(live.issuer, audience)) as with_feed,
        closing(
            Verifier(live.issuer, audience, feed=None, monotonic=lambda: time.monotonic() * fast)
        ) as alone,
    ):
        named: dict[str, Verify] = {
            "ours": with_feed.verify_jwt,
            "ours without the feed": alone.verify_jwt,
            "PyJWT": pyjwt(live, audience),
        }
        if jose is not None:
            named["jose"] = lambda token: jose.verify(token, audience)
        yield named


class Load:
    """A caller and its resource servers: each token is tried when it is new and when it is old."""

    def __init__(self, live: Live, key: str, audience: str, named: Mapping[str, Verify]) -> None:
        self.refused: list[str] = []
        self.verified: Counter[str] = Counter()
        self.kids: set[str] = set()
        self._is_over = threading.Event()
        self._live, self._key, self._audience, self._named = live, key, audience, named
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(timeout=PATIENCE_S)

    def _run(self) -> None:
        kept: deque[tuple[float, str]] = deque()
        try:
            with httpx2.Client(base_url=self._live.issuer, timeout=PATIENCE_S) as http:
                while not self._is_over.wait(0.05):
                    asked = http.post("/oauth/token", data=form(self._key, resource=self._audience))
                    assert asked.status_code == 200, asked.text
                    token = asked.json()["access_token"]
                    claims = jwt.decode(token, options={"verify_signature": False})
                    self.kids.add(jwt.get_unverified_header(token)["kid"])
                    self._try(token, claims["exp"], "new")
                    kept.append((claims["exp"], token))
                    while kept and kept[0][0] - time.time() < 2 * MARGIN_S:
                        expires_at, old = kept.popleft()
                        self._try(old, expires_at, "old")
        except Exception as error:
            self.refused.append(f"the load broke off: {error!r}")

    def _try(self, token: str, expires_at: float, age: str) -> None:
        for name, verify in self._named.items():
            if expires_at - time.time() < MARGIN_S:
                continue
            try:
                verify(token)
            except Exception as error:
                kid = jwt.get_unverified_header(token)["kid"]
                self.refused.append(f"{name}, a token that is {age}, of {kid}: {error!r}")
            else:
                self.verified[name] += 1


def test_ten_rotations_under_load_refuse_no_good_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Published before it signs and after: whoever caches for the advertised time never meets a
    signing key that he does not hold.

    Both lines of tokens rotate, and that of the feed, which ours follows.  A verifier that
    fetched the set again for each unknown `kid` would hide a mistake, so jose and PyJWT do not.
    """
    with a_service(
        tmp_path,
        audience=AUDIENCE,
        algorithm="RS256",
        rotate_every="1",
        unsafe_key_set_max_age=str(MAX_AGE_S),
        unsafe_token_lifetime=str(LIFETIME_S),
    ) as live:
        management = f"{live.issuer}/v1"
        keys = {AUDIENCE: live.api_key()["key"], management: live.initialized["key"]}
        jose = Jose(live) if node.why_not() is None else None
        with (
            closing(open_store(live.environment["COATCHECK_DATABASE_URL"])) as store,
            verifiers(live, AUDIENCE, jose) as of_default,
            verifiers(live, management, jose) as of_management,
        ):
            named = {AUDIENCE: of_default, management: of_management}
            loads = [Load(live, keys[one], one, named[one]) for one in keys]
            began_at = time.time()
            started = 0
            while started < ROTATIONS and time.time() - began_at < PATIENCE_S:
                time.sleep(0.2)
                records = store.signing_keys()
                # A moment more: the last successor has signed by then.
                started = sum(began_at < one.starts_at < time.time() - 0.5 for one in records)
            for load in loads:
                load.stop()
            published = httpx2.get(f"{live.issuer}/.well-known/jwks.json")
        if jose is not None:
            jose.close()

    assert started >= ROTATIONS
    assert [load.refused[:3] for load in loads] == [[], []]
    tokens = [record for record in records if record.purpose == "token"]
    lines = Counter((record.purpose, record.algorithm) for record in records)
    verified = sum((load.verified for load in loads), Counter[str]())
    with capsys.disabled():
        sys.stderr.write(f"\n{started} rotations; verified: {dict(verified)}\n")
    assert all(count > ROTATIONS / 4 for count in lines.values())
    # Each signed, and had its tokens verified by everybody.
    assert all(len(load.kids) >= ROTATIONS / 4 for load in loads)
    assert all(load.verified[name] > 50 for load in loads for name in of_default)
    # Those of old have left the set.
    assert published.headers["cache-control"] == f"public, max-age={MAX_AGE_S}"
    assert len(published.json()["keys"]) < len(tokens)
