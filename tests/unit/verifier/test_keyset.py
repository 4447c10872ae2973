"""The key set: what counts as a signing key, and a cache that never makes a known one wait."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from coatcheck.durations import FIRST_LOAD_TIMEOUT, JWKS_COOLDOWN, JWKS_MAX_AGE, JWKS_STALE_IF_ERROR
from coatcheck.verifier.errors import IssuerUnavailable, UnknownSigningKey
from coatcheck.verifier.keyset import MAX_BYTES, KeySet, UnfitKeySet, parse
from support.tokens import ABSENT, SetClock, as_json, key_set, signer

FOREVER_S = 10  # Longer than any test takes: what waits for it has failed.


def short_rsa() -> dict[str, object]:
    weak = rsa.generate_private_key(65537, 1024).public_key()  # noqa: S505
    return {**RSAAlgorithm.to_jwk(weak, as_dict=True), "key_ops": ["verify"], "kid": "unfit"}


UNFIT: dict[str, Callable[[], object]] = {
    "no object": lambda: "unfit",
    "kid absent": lambda: signer().jwk(kid=ABSENT),
    "kid number": lambda: signer().jwk(kid=1),
    "kid empty": lambda: signer().jwk(kid=""),
    "kid long": lambda: signer().jwk(kid="x" * 257),
    "use enc": lambda: signer().jwk(kid="unfit", use="enc"),
    "use null": lambda: signer().jwk(kid="unfit", use=None),
    "key_ops without verify": lambda: signer().jwk(kid="unfit", key_ops=["sign", "encrypt"]),
    "key_ops text": lambda: signer().jwk(kid="unfit", key_ops="verify"),
    "secret": lambda: {"kty": "oct", "kid": "unfit", "k": "c2VjcmV0" * 8, "alg": "HS256"},
    "secret as ES256": lambda: {"kty": "oct", "kid": "unfit", "k": "c2Vj", "alg": "ES256"},
    "private half": lambda: signer().jwk(kid="unfit", d="c2VjcmV0"),
    "RSA 1024": short_rsa,
    "RSA e 1": lambda: signer("RS256").jwk(kid="unfit", e="AQ"),
    "RSA e even": lambda: signer("RS256").jwk(kid="unfit", e="AQAA"),
    "RSA n absent": lambda: signer("RS256").jwk(kid="unfit", n=ABSENT),
    "RSA n number": lambda: signer("RS256").jwk(kid="unfit", n=5),
    "RSA n gigantic": lambda: signer("RS256").jwk(kid="unfit", n="-" * 12_000),
    "point off the curve": lambda: signer().jwk(kid="unfit", y=signer().jwk()["x"]),
    "point short": lambda: signer().jwk(kid="unfit", x="AAAA"),
    "padded": lambda: signer().jwk(kid="unfit", x=f"{signer().jwk()['x']}="),
    "other curve": lambda: signer().jwk(kid="unfit", crv="P-384"),
    "curve list": lambda: signer().jwk(kid="unfit", crv=["P-256"]),
    "kty RSA for a curve": lambda: signer().jwk(kid="unfit", kty="RSA"),
    "kty list": lambda: signer().jwk(kid="unfit", kty=["EC"]),
    "alg of another family": lambda: signer().jwk(kid="unfit", alg="RS256"),
    "alg RSA-OAEP": lambda: signer("RS256").jwk(kid="unfit", alg="RSA-OAEP"),
    "alg PS256": lambda: signer("RS256").jwk(kid="unfit", alg="PS256"),
    "alg null": lambda: signer().jwk(kid="unfit", alg=None),
    "Ed448": lambda: {"kty": "OKP", "crv": "Ed448", "kid": "unfit", "x": "A" * 76},
    "Ed25519 short": lambda: signer("EdDSA").jwk(kid="unfit", x="AAAA"),
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_an_unfit_key_is_left_out_and_the_others_count(unfit: Callable[[], object]) -> None:
    """V39: one bad key must neither be used nor take the set down with it.  RFC 7517 §4 and §5."""
    body = as_json({"keys": [signer(kid="before").jwk(), unfit(), signer(kid="after").jwk()]})

    assert set(parse(body)) == {"before", "after"}


def test_of_two_keys_with_one_name_none_counts() -> None:
    """V39: RFC 7517 §4.5: they should be distinct; picking one would be a guess (Wycheproof)."""
    twice = (signer(kid="twice"), signer("EdDSA", "twice"))
    body = key_set(*(one.jwk() for one in (*twice, signer(kid="once"))))

    assert set(parse(body)) == {"once"}


IMPLIED = {"ES256": "ES256", "RS256": "RS256", "EdDSA": "EdDSA"}


@pytest.mark.parametrize("algorithm", IMPLIED)
def test_without_alg_the_kind_of_the_key_decides(algorithm: str) -> None:
    """RFC 7517 §4.4: `alg` is optional; each kind goes with one algorithm of ours."""
    jwk = signer(algorithm).jwk(alg=ABSENT, use=ABSENT)

    assert parse(key_set(jwk))["first"].algorithm == algorithm


NO_SETS = {
    "no JSON": b"<html>",
    "nothing": b"",
    "array": b"[]",
    "keys absent": b"{}",
    "keys object": b'{"keys":{}}',
    "keys null": b'{"keys":null}',
    "1,000 keys": as_json({"keys": [{"kid": str(number)} for number in range(1000)]}),
    "a byte too many": key_set().ljust(MAX_BYTES + 1),
    "deep": b'{"keys":' + b"[" * 60_000,
    "duplicate keys": b'{"keys":[],"keys":[]}',
    "UTF-16": '{"keys":[]}'.encode("utf-16"),
    "number of 5,000 digits": b'{"keys":[],"x":' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("body", NO_SETS.values(), ids=NO_SETS)
def test_what_is_no_key_set_is_refused_as_a_whole(body: bytes) -> None:
    """V40: the last good set is worth more than a page from a captive portal."""
    with pytest.raises(UnfitKeySet):
        parse(body)


def test_an_empty_key_set_is_a_good_one() -> None:
    """The issuer withdrew its last signing key: going on with it would undo that."""
    assert parse(b'{"keys":[]}') == {}


# The cache


class Issuer:
    """Answers for the key set as a test wants it to, and counts."""

    def __init__(self) -> None:
        self.body = key_set()
        self.failure: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._calls = threading.Semaphore(0)
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        self._calls.release()
        assert self.may_answer.wait(FOREVER_S)
        if self.failure is not None:
            raise self.failure
        return self.body

    def wait_for_calls(self, number: int) -> None:
        """Return as soon as so many more fetches have begun."""
        for _ in range(number):
            assert self._calls.acquire(timeout=FOREVER_S)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.may_answer.set()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def cache(issuer: Issuer, clock: SetClock) -> Iterator[KeySet]:
    cache = KeySet(issuer, monotonic=clock, first_load_timeout_s=FOREVER_S)
    yield cache
    cache.close()


def find(cache: KeySet, kid: str = "first") -> str:
    """What the verifier does with a kid it has not seen."""
    return (cache.look_up(kid) or cache.wait_for(kid)).kid


def test_nothing_is_fetched_before_it_is_needed(cache: KeySet, issuer: Issuer) -> None:
    """A resource server can start before its issuer does."""
    assert cache.known("first") is None
    assert cache.status().state == "none"
    assert issuer.calls == 0


def test_all_first_callers_share_one_fetch(cache: KeySet, issuer: Issuer) -> None:
    """A server that starts under load must not ask once per request."""
    issuer.may_answer.clear()
    with ThreadPoolExecutor(16) as pool:
        found = [pool.submit(find, cache) for _ in range(16)]
        issuer.wait_for_calls(1)
        issuer.may_answer.set()

        assert {future.result(FOREVER_S) for future in found} == {"first"}
    assert issuer.calls == 1


def test_the_first_call_waits_a_bounded_time(issuer: Issuer, clock: SetClock) -> None:
    """503 after the limit, while the fetch goes on for those who come later."""
    issuer.may_answer.clear()
    cache = KeySet(issuer, monotonic=clock, first_load_timeout_s=0.01)

    with pytest.raises(IssuerUnavailable):
        find(cache)

    issuer.may_answer.set()
    cache.close()


def test_a_failed_first_fetch_is_our_trouble_and_is_tried_again_soon(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Never 401 for our own outage, and no stampede on an issuer that is coming up again."""
    issuer.failure = OSError("no route to https://user:secret@issuer.example")
    for _ in range(100):
        with pytest.raises(IssuerUnavailable) as refused:
            find(cache)
    assert issuer.calls == 1
    assert refused.value.retry_after_s == FIRST_LOAD_TIMEOUT
    assert cache.status().last_error == "OSError"

    issuer.failure = None
    clock.now += FIRST_LOAD_TIMEOUT
    assert find(cache) == "first"
    assert issuer.calls == 2


def test_ten_thousand_random_kids_make_one_fetch(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """V9: whoever invents kids must not reach the issuer through us.  CVE-2026-48524."""
    find(cache)
    clock.now += JWKS_COOLDOWN
    for number in range(10_000):
        with pytest.raises(UnknownSigningKey):
            find(cache, f"invented-{number}")

    assert issuer.calls == 2
    assert cache.known("first")


def test_a_new_signing_key_is_found_by_its_first_token(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """V9, V41: a rotation in a hurry: an unknown kid asks once, as soon as the cool-down allows."""
    find(cache)
    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    with pytest.raises(UnknownSigningKey):
        find(cache, "second")

    clock.now += JWKS_COOLDOWN
    assert find(cache, "second") == "second"


def test_an_unknown_kid_while_the_issuer_is_away_is_no_verdict(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """It may be the new signing key that we failed to hear of: 503, and the caller tries again."""
    find(cache)
    issuer.failure = TimeoutError()
    clock.now += JWKS_COOLDOWN
    for _ in range(10):
        with pytest.raises(IssuerUnavailable):
            find(cache, "second")

    assert issuer.calls == 2
    assert cache.known("first")


def test_a_known_kid_never_waits(cache: KeySet, issuer: Issuer, clock: SetClock) -> None:
    """Renewal happens ahead and elsewhere: not even a hanging issuer delays a request."""
    find(cache)
    issuer.wait_for_calls(1)
    issuer.may_answer.clear()
    clock.now += JWKS_MAX_AGE - 1

    assert cache.known("first")
    issuer.wait_for_calls(1)
    assert all(cache.known("first") for _ in range(1000))

    issuer.may_answer.set()
    assert issuer.calls == 2


def test_a_withdrawn_signing_key_is_gone_after_the_next_fetch(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """V41.  It is not kept because it was good once."""
    find(cache)
    issuer.wait_for_calls(1)
    issuer.body = key_set(signer(kid="second").jwk())
    clock.now += JWKS_MAX_AGE
    cache.known("first")
    issuer.wait_for_calls(1)

    assert find(cache, "second") == "second"
    assert cache.known("first") is None


def test_a_signing_key_that_stays_is_the_same_object(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """What it verified before stays verified; another key under its name starts anew."""
    before = cache.look_up("first") or cache.wait_for("first")
    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    clock.now += JWKS_COOLDOWN
    find(cache, "second")
    assert cache.known("first") is before

    issuer.body = key_set(signer("EdDSA").jwk(), signer(kid="third").jwk())
    clock.now += JWKS_COOLDOWN
    find(cache, "third")
    assert cache.known("first") not in (None, before)


FAILURES: dict[str, Exception | bytes] = {
    "no answer": TimeoutError(),
    "an error of any kind": KeyError("whatever"),
    "another page": b"<html>Welcome to our hotel</html>",
    "too long": b"x" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failed_fetch_changes_nothing_for_a_day(
    cache: KeySet, issuer: Issuer, clock: SetClock, failure: Exception | bytes
) -> None:
    """RFC 5861 §4 in spirit: the issuer may be away, its tokens go on.  Then it ends."""
    find(cache)
    if isinstance(failure, bytes):
        issuer.body = failure
    else:
        issuer.failure = failure

    clock.now += JWKS_MAX_AGE + JWKS_STALE_IF_ERROR - 1
    with pytest.raises(IssuerUnavailable):
        find(cache, "second")
    assert cache.known("first")
    assert cache.status().state == "stale"
    assert cache.status().good_for_s == 1
    assert cache.status().last_error

    clock.now += 1
    assert cache.known("first") is None
    assert cache.status().state == "none"
    with pytest.raises(IssuerUnavailable):
        find(cache)


def test_status_says_how_far_it_can_be_relied_on(cache: KeySet, clock: SetClock) -> None:
    """N11: degraded mode with a number."""
    find(cache)
    clock.now += 100
    status = cache.status()

    assert (status.state, status.age_s, status.kids) == ("fresh", 100, ("first",))
    assert status.good_for_s == JWKS_MAX_AGE + JWKS_STALE_IF_ERROR - 100
    assert status.last_error is None


def test_a_set_can_be_loaded_ahead(cache: KeySet, issuer: Issuer, clock: SetClock) -> None:
    """So that no request waits for it; a set that is there is left alone."""
    issuer.failure = TimeoutError()
    with pytest.raises(IssuerUnavailable):
        cache.load()
    clock.now += JWKS_COOLDOWN
    issuer.failure = None
    cache.load()
    assert cache.known("first")
    clock.now += JWKS_COOLDOWN
    cache.load()

    assert issuer.calls == 2


def test_a_set_can_be_renewed_within_the_cool_down(cache: KeySet, issuer: Issuer) -> None:
    """Somebody knows better; where nobody has asked yet, there is nothing to renew."""
    cache.renew()
    assert issuer.calls == 0
    find(cache)
    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    cache.renew()
    assert cache.known("second")
    cache.close()
    cache.renew()

    assert issuer.calls == 2


def test_a_set_that_was_forgotten_is_fetched_anew(cache: KeySet, issuer: Issuer) -> None:
    """As when it was made: no cool-down is left of before, and its thread is gone."""
    find(cache)
    thread = cache._thread
    assert thread is not None
    cache.forget(wait_s=5)
    assert not thread.is_alive()
    assert cache.known("first") is None
    assert cache.status().state == "none"
    assert find(cache) == "first"

    assert issuer.calls == 2


def test_what_a_fetch_brings_after_it_was_forgotten_does_not_count(clock: SetClock) -> None:
    """It may be from an issuer that is another one by now."""
    asked, may_answer = threading.Event(), threading.Event()

    def slow() -> bytes:
        asked.set()
        assert may_answer.wait(5)
        return key_set()

    cache = KeySet(slow, monotonic=clock)
    assert cache.look_up("first") is None
    assert asked.wait(5)
    thread = cache._thread
    assert thread is not None
    cache.forget()
    may_answer.set()
    thread.join(5)

    assert not thread.is_alive()
    assert cache.known("first") is None
    cache.close()


def test_a_closed_key_set_fetches_no_more(cache: KeySet, issuer: Issuer, clock: SetClock) -> None:
    """What it holds still counts: requests in flight end well."""
    find(cache)
    cache.close()
    clock.now += JWKS_MAX_AGE

    assert cache.known("first")
    with pytest.raises(UnknownSigningKey):
        find(cache, "second")
    assert issuer.calls == 1


def test_a_key_set_that_is_let_go_ends_its_thread(issuer: Issuer, clock: SetClock) -> None:
    """A test suite or a reloader makes hundreds of verifiers and closes none."""
    cache = KeySet(issuer, monotonic=clock, first_load_timeout_s=FOREVER_S)
    find(cache)
    thread = cache._thread
    assert thread is not None

    del cache
    thread.join(FOREVER_S)
    assert not thread.is_alive()


def test_a_forked_child_goes_on_by_itself() -> None:
    """gunicorn --preload: the thread stays in the parent, and its lock may be held just then."""
    program = """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        from coatcheck.verifier.keyset import KeySet
        from support.tokens import SetClock, key_set, signer
        clock = SetClock()
        bodies = [key_set(), key_set(signer().jwk(), signer(kid="second").jwk())]
        fetched = []
        def fetch():
            fetched.append(os.getpid())
            return bodies[len(fetched) > 1]
        keys = KeySet(fetch, monotonic=clock)
        keys.look_up("first") or keys.wait_for("first")
        with keys._settled:
            child = os.fork()
            if child == 0:
                clock.now += 30
                assert keys.known("first")
                assert (keys.look_up("second") or keys.wait_for("second")).kid == "second"
                assert fetched[-1] == os.getpid()
                os._exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": ":".join(sys.path)},
        timeout=60,
        check=False,
    )

    assert ended.returncode == 0
