"""Where a key set begins and ends: limits from both sides, and to the second when it is renewed.

`test_keyset` tells the story; here are the numbers of the contract instead of ours, so that a
check that moves by one is noticed.
"""

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from coatcheck.verifier import keyset as module
from coatcheck.verifier.errors import IssuerUnavailable, UnknownSigningKey
from coatcheck.verifier.keyset import KeySet, KeySetStatus, UnfitKeySet, parse, parse_object
from support.tokens import SetClock, as_json, base64url, key_set, signer

#: Seconds; longer than any test takes.
FOREVER_S = 10.0


# One set


def test_a_key_set_has_at_most_64_kib() -> None:
    """Whoever answers in the issuer's place must not fill our memory."""
    assert set(parse(key_set().ljust(65_536))) == {"first"}
    with pytest.raises(UnfitKeySet, match="too long"):
        parse(key_set().ljust(65_537))


def test_a_key_set_has_at_most_100_keys() -> None:
    """Each costs a computation on a curve."""
    jwks: list[dict[str, object]] = [signer().jwk(kid=str(number)) for number in range(101)]

    assert len(parse(as_json({"keys": jwks[:100]}))) == 100
    for read in (parse_object, lambda jwks: parse(as_json(jwks))):
        with pytest.raises(UnfitKeySet, match="too many"):
            read({"keys": jwks})


def test_a_key_set_has_at_most_1000_arrays_and_objects() -> None:
    """RFC 8725 §3.7.  One is the set, one the list of keys, and one each key."""
    jwk = signer().jwk()

    assert parse(as_json({"keys": [jwk], "x": [[]] * 996}))
    with pytest.raises(UnfitKeySet):
        parse(as_json({"keys": [jwk], "x": [[]] * 997}))


@pytest.mark.parametrize("jwks", [None, [], "keys", 1, [{"keys": []}]])
def test_what_is_no_object_is_no_key_set(jwks: object) -> None:
    """It comes from a document of which it is a part."""
    with pytest.raises(UnfitKeySet):
        parse_object(jwks)


@pytest.mark.parametrize("length", [1, 256])
def test_a_kid_has_one_to_256_characters(length: int) -> None:
    """It is opaque: a thumbprint, a date or a single letter."""
    assert set(parse(key_set(signer().jwk(kid="k" * length)))) == {"k" * length}


# Signatures, as OpenSSL is asked


#: Halves of a signature at which DER changes: its sign bit, the zeros ahead, and the letter X.
HALVES = (1, 0x58, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x5801 << 232, 1 << 255, (1 << 256) - 1)


@pytest.mark.parametrize("s", HALVES, ids=hex)
@pytest.mark.parametrize("r", HALVES, ids=hex)
def test_r_and_s_become_der_whatever_their_length(r: int, s: int) -> None:
    """X.690 §8.3: no zeros ahead, but one where the number would be negative."""
    asked: list[tuple[object, ...]] = []
    verify = module._es256(lambda *given: asked.append(given))

    verify(r.to_bytes(32, "big") + s.to_bytes(32, "big"), b"message")

    ((der, digest, _),) = asked
    assert (der, digest) == (encode_dss_signature(r, s), sha256(b"message").digest())


@pytest.mark.parametrize("halves", [(0, 0), (0, 1), (1, 0)], ids=str)
def test_a_signature_of_zeros_is_none(halves: tuple[int, int]) -> None:
    """CVE-2022-21449: libraries without this check took it under any signing key."""
    verify = parse(key_set())["first"].verify

    with pytest.raises(InvalidSignature):
        verify(b"".join(half.to_bytes(32, "big") for half in halves), b"message")


def not_asked(*given: object) -> None:
    raise LookupError(given)


Verify = Callable[[bytes, bytes], None]
MADE: dict[str, tuple[Callable[[], Verify], int]] = {
    "ES256": (lambda: module._es256(not_asked), 64),
    "RS256": (lambda: module._rs256(not_asked, 256), 256),
    "EdDSA": (lambda: module._eddsa(not_asked), 64),
}


@pytest.mark.parametrize(("make", "length"), MADE.values(), ids=MADE)
def test_openssl_never_sees_a_signature_of_another_length(
    make: Callable[[], Verify], length: int
) -> None:
    """Whether it would take one is a question of its version and of how it was built."""
    verify = make()

    for other in (0, 1, length - 1, length + 1, 2 * length):
        with pytest.raises(InvalidSignature):
            verify(b"\1" * other, b"message")
    with pytest.raises(LookupError):
        verify(b"\1" * length, b"message")


# RSA


def rsa(n: int, e: int = 65537) -> dict[str, object]:
    """A public RSA key of these numbers; nobody has its private half."""

    def written(number: int) -> str:
        return base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))

    return {"kty": "RSA", "kid": "rsa", "n": written(n), "e": written(e)}


def number_of(bits: int) -> int:
    """An odd number of so many bits."""
    return (1 << bits - 1) + (1 << bits // 2) + 5


@pytest.mark.parametrize(
    ("bits", "is_fit"), [(2047, False), (2048, True), (8192, True), (8193, False)]
)
def test_an_rsa_key_has_2048_to_8192_bits(bits: int, is_fit: bool) -> None:
    """RFC 7518 §3.3; longer ones make each verification dear and nobody safer."""
    assert set(parse(key_set(rsa(number_of(bits))))) == ({"rsa"} if is_fit else set())


def rsa_signed(message: bytes, bits: int) -> tuple[int, bytes]:
    """A modulus of so many bits and an RS256 signature under it (RFC 8017 §8.2.1 and §9.2).

    OpenSSL makes even lengths only, so that the primes come from two keys.
    """
    halves = (bits - bits // 2, bits // 2)
    p, q = (generate_private_key(65537, 2 * half).private_numbers().p for half in halves)
    size = (bits + 7) // 8
    digest_info = bytes.fromhex("3031300d060960864801650304020105000420") + sha256(message).digest()
    padded = b"\0\1" + b"\xff" * (size - len(digest_info) - 3) + b"\0" + digest_info
    private = pow(65537, -1, (p - 1) * (q - 1))
    return p * q, pow(int.from_bytes(padded, "big"), private, p * q).to_bytes(size, "big")


@pytest.mark.parametrize(
    ("bits", "signature_bytes"), [(2048, 256), (2049, 257), (2056, 257), (2057, 258)]
)
def test_an_rsa_signature_is_as_long_as_the_modulus(bits: int, signature_bytes: int) -> None:
    """RFC 8017 §8.2.2: in whole bytes, the last one begun."""
    n, signature = rsa_signed(b"message", bits)
    verify = parse(key_set(rsa(n)))["rsa"].verify

    assert (n.bit_length(), len(signature)) == (bits, signature_bytes)
    verify(signature, b"message")
    for other in (b"\0" + signature, signature + b"\0", signature[1:], signature[:-1], b""):
        with pytest.raises(InvalidSignature):
            verify(other, b"message")


@pytest.mark.parametrize(("e", "is_fit"), [(1, False), (2, False), (3, True), (65536, False)])
def test_an_rsa_exponent_is_odd_and_at_least_three(e: int, is_fit: bool) -> None:
    """With 1 each message is its own signature.  RFC 8017 §3.1."""
    assert set(parse(key_set(rsa(number_of(2048), e)))) == ({"rsa"} if is_fit else set())


def test_an_rsa_key_of_the_faulty_chip_is_left_out() -> None:
    """
    CVE-2017-15361 (ROCA): it can be factored.

    The fingerprint is that the modulus is a power of 65537 modulo each small prime, as this
    number is; its neighbor is none.
    """
    roca = 65537**128

    assert parse(key_set(rsa(roca))) == {}
    assert set(parse(key_set(rsa(roca + 2)))) == {"rsa"}


#: Those of the published fingerprint for which not every remainder is such a power.
ROCA_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


@pytest.mark.parametrize("prime", ROCA_PRIMES)
def test_an_rsa_key_that_lacks_a_part_of_the_fingerprint_is_good(prime: int) -> None:
    """It was made elsewhere, though it looks alike modulo every number but the multiples of one."""
    powers = {pow(65537, power, prime) for power in range(prime)}
    others = math.lcm(*(number for number in range(1, 200) if number % prime))
    alike = (65537**128 + others * step for step in itertools.count())

    good = next(number for number in alike if number % prime not in powers)

    assert set(parse(key_set(rsa(good)))) == {"rsa"}


# The cache


class Issuer:
    """Answers for the key set as a test wants it to, and counts."""

    def __init__(self) -> None:
        self.body = key_set()
        self.failure: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        self.may_answer.wait(FOREVER_S)
        if self.failure is not None:
            raise self.failure
        return self.body


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
    return (cache.look_up(kid) or cache.wait_for(kid)).kid


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until another thread has got that far."""
    until = time.monotonic() + FOREVER_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)


def settle(cache: KeySet) -> None:
    """Wait until no fetch is under way."""
    eventually(lambda: not cache._is_pending)


def test_a_set_is_renewed_at_four_fifths_of_its_age_limit(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Contract: 300 s.  Not before, or the issuer gets every question; and not after."""
    find(cache)
    clock.now += 239.9
    assert cache.known("first")
    time.sleep(0.02)
    assert issuer.calls == 1

    clock.now += 0.1
    assert cache.known("first")
    eventually(lambda: issuer.calls == 2)


def test_a_set_with_a_short_age_limit_is_renewed_no_more_often_than_the_cool_down_allows(
    issuer: Issuer, clock: SetClock
) -> None:
    """A deployment that shrinks its durations must not turn the verifier into a flood."""
    cache = KeySet(issuer, monotonic=clock, max_age_s=10, first_load_timeout_s=FOREVER_S)
    find(cache)
    clock.now += 29.9
    assert cache.known("first")
    time.sleep(0.02)
    assert issuer.calls == 1

    clock.now += 0.1
    cache.known("first")
    eventually(lambda: issuer.calls == 2)
    cache.close()


def test_a_set_renews_itself_though_nobody_asks(issuer: Issuer) -> None:
    """By the thread's own timer, in real time; after failures, too."""
    cache = KeySet(issuer, max_age_s=0.01, cooldown_s=0.01, stale_if_error_s=60)
    find(cache)
    eventually(lambda: issuer.calls >= 4)

    issuer.failure = OSError()
    so_far = issuer.calls
    eventually(lambda: issuer.calls >= so_far + 3)
    cache.close()


def test_an_unknown_kid_is_asked_for_at_the_end_of_the_cool_down(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Contract: 30 s, to the moment."""
    find(cache)
    clock.now += 29.9
    with pytest.raises(UnknownSigningKey):
        find(cache, "second")
    assert issuer.calls == 1

    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    clock.now += 0.1
    assert find(cache, "second") == "second"
    assert issuer.calls == 2


def test_a_kid_that_the_feed_lists_is_asked_for_after_a_second(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Rotated in a hurry: the issuer itself has said that the name exists."""
    find(cache)
    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    clock.now += 0.9
    with pytest.raises(UnknownSigningKey):
        cache.look_up("second", is_announced=True)
    clock.now += 0.1
    with pytest.raises(UnknownSigningKey):
        cache.look_up("second")
    assert issuer.calls == 1

    assert cache.look_up("second", is_announced=True) is None
    assert cache.wait_for("second").kid == "second"
    assert issuer.calls == 2


def test_an_announced_kid_waits_no_longer_than_any_other(issuer: Issuer, clock: SetClock) -> None:
    """Where the cool-down is shorter than that second, it is what counts."""
    cache = KeySet(issuer, monotonic=clock, cooldown_s=0.5, first_load_timeout_s=FOREVER_S)
    find(cache)
    clock.now += 0.5

    assert cache.look_up("second", is_announced=True) is None
    settle(cache)
    cache.close()


def test_looking_up_what_is_known_asks_nobody(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Also when the issuer might be asked again."""
    find(cache)
    clock.now += 30
    found = cache.look_up("first", is_announced=True)

    assert found is not None
    assert found is cache.known("first")
    time.sleep(0.02)
    assert issuer.calls == 1


def test_a_first_fetch_is_waited_for_as_long_as_was_said(issuer: Issuer, clock: SetClock) -> None:
    """And no longer, whatever the issuer does; then the caller may come back in a second."""
    issuer.may_answer.clear()
    cache = KeySet(issuer, monotonic=clock, first_load_timeout_s=0.01)
    began = time.monotonic()

    with pytest.raises(IssuerUnavailable) as refused:
        find(cache)

    assert time.monotonic() - began < FOREVER_S / 2
    assert refused.value.retry_after_s == 1
    issuer.may_answer.set()
    cache.close()


def test_whoever_waits_hears_of_a_failure_at_once(cache: KeySet, issuer: Issuer) -> None:
    """Not when its patience ends."""
    issuer.may_answer.clear()
    issuer.failure = OSError()
    assert cache.look_up("first") is None
    began = time.monotonic()
    threading.Timer(0.05, issuer.may_answer.set).start()

    with pytest.raises(IssuerUnavailable):
        cache.wait_for("first")

    assert time.monotonic() - began < FOREVER_S / 2


@pytest.mark.parametrize(("seconds", "retry_after_s"), [(0, 5), (0.5, 5), (3.9, 2), (4.1, 1)])
def test_who_is_sent_away_is_told_when_the_next_fetch_may_begin(
    cache: KeySet, issuer: Issuer, clock: SetClock, seconds: float, retry_after_s: int
) -> None:
    """In whole seconds, never less: RFC 9110 §10.2.3."""
    issuer.failure = OSError()
    with pytest.raises(IssuerUnavailable):
        find(cache)
    clock.now += seconds

    with pytest.raises(IssuerUnavailable) as refused:
        find(cache)

    assert refused.value.retry_after_s == retry_after_s
    assert issuer.calls == 1


def test_after_a_failure_and_a_success_an_unknown_kid_is_unknown_again(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Otherwise one hiccup would turn every forged token into 503 for ever."""
    find(cache)
    issuer.failure = OSError()
    clock.now += 30
    with pytest.raises(IssuerUnavailable):
        find(cache, "second")

    issuer.failure = None
    clock.now += 30
    with pytest.raises(UnknownSigningKey):
        find(cache, "second")
    assert cache.status().last_error is None


class Away(Exception):
    kind = "http_503"


def test_a_failure_that_knows_its_kind_is_told_by_it(cache: KeySet, issuer: Issuer) -> None:
    """`http_503` says more than the name of a Python class."""
    issuer.failure = Away("https://user:secret@issuer.example")
    with pytest.raises(IssuerUnavailable):
        find(cache)

    assert cache.status() == KeySetStatus("none", None, None, (), "http_503")


def test_a_set_is_fresh_up_to_its_age_limit_and_usable_for_a_day_longer(
    cache: KeySet, clock: SetClock
) -> None:
    """To the moment: 300 s, and 24 h on top."""
    find(cache)
    cache.close()
    clock.now += 300
    assert cache.status().state == "fresh"
    clock.now += 0.5
    assert cache.status().state == "stale"

    clock.now += 86_400 - 1
    assert cache.known("first")
    assert cache.status().good_for_s == 0.5
    clock.now += 0.5
    assert cache.known("first") is None
    assert cache.status() == KeySetStatus("none", None, None, (), None)
    with pytest.raises(IssuerUnavailable):
        cache.look_up("first")


def test_what_was_read_once_cannot_be_changed_afterwards(cache: KeySet) -> None:
    """It is replaced as a whole: threads read it without a lock."""
    find(cache)

    for value in (cache._loaded, cache.status(), cache.known("first")):
        assert value is not None
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


def test_after_a_fork_a_set_goes_on_by_itself(
    cache: KeySet, issuer: Issuer, clock: SetClock
) -> None:
    """Also one that nobody has used yet: gunicorn --preload forks right behind its making."""
    module._renew_every_key_set()
    assert find(cache) == "first"

    issuer.body = key_set(signer().jwk(), signer(kid="second").jwk())
    clock.now += 30
    with cache._settled:  # As a thread of the parent may do at that moment.
        module._renew_every_key_set()
        assert find(cache, "second") == "second"
