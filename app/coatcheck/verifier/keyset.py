"""The issuer's key set: which signing keys count at the moment, and how that stays up to date.

`parse` reads one JWK set and drops what cannot be used safely.  `KeySet` keeps the last good one
and renews it in a daemon thread of its own, the only one that fetches:

- a signing key that is known is found without waiting, also while the issuer is away;
- it is renewed ahead of its age limit, so that nobody meets an old set in daily work;
- an unknown `kid` makes one fetch per JWKS_COOLDOWN, however many kids are thrown at it; one
  that the signed feed lists is fetched at once;
- a failed fetch changes nothing, up to JWKS_STALE_IF_ERROR, and starts the cool-down too
  (a short one while there is no set at all);
- our own trouble is IssuerUnavailable (503), never an answer about the token.

Source: RFC 7517 §4 and §5 (JWK set), RFC 7518 §6 (members), RFC 8725 §3.1, RFC 8037 §2.
"""

import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Final, Literal

import jwt
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from coatcheck import base64url
from coatcheck.durations import (
    FIRST_LOAD_TIMEOUT,
    JWKS_COOLDOWN,
    JWKS_MAX_AGE,
    JWKS_STALE_IF_ERROR,
)
from coatcheck.token_profile import Algorithm
from coatcheck.verifier.check import MAX_KID_LENGTH, SigningKey, json_object
from coatcheck.verifier.errors import IssuerUnavailable, UnknownSigningKey

MAX_BYTES: Final = 64 * 1024
MAX_KEYS: Final = 100
#: A JWK holds few lists (`key_ops`, `x5c`); this lets MAX_KEYS of them have several each.
MAX_CONTAINERS: Final = 10 * MAX_KEYS

MIN_RSA_BITS: Final = 2048  # RFC 7518 §3.3
MAX_RSA_BITS: Final = 8192  # Longer ones make each verification dear and nobody safer.

#: Seconds between two fetches for a signing key that the feed lists and the key set does not.
ANNOUNCED_COOLDOWN: Final = 1

#: The part of its age limit at which a key set is renewed ahead.
RENEW_AT: Final = 0.8

#: RFC 7518 §3.1, RFC 8037 §3.1: what `kty` and `crv` go with, and the members that count.
_KINDS: Final[dict[tuple[str, str | None], tuple[Algorithm, tuple[str, ...]]]] = {
    ("EC", "P-256"): ("ES256", ("x", "y")),
    ("RSA", None): ("RS256", ("n", "e")),
    ("OKP", "Ed25519"): ("EdDSA", ("x",)),
}
_SHA256: Final = SHA256()
#: hashlib hashes a token in two thirds of the time that `cryptography` takes.
_ECDSA: Final = ECDSA(Prehashed(_SHA256))
_PKCS1: Final = PKCS1v15()
#: Of ES256 and of Ed25519.
_R_AND_S_BYTES: Final = 64

# CVE-2017-15361 (ROCA): a faulty chip made primes that are powers of 65537 modulo each of these.
# A modulus whose every remainder is such a power is practically never made by anything else.
_ROCA_POWERS: Final = {
    prime: frozenset(pow(65537, power, prime) for power in range(prime))
    for prime in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
}


class UnfitKeySet(ValueError):
    """The document is no JWK set, or too large to be one of ours."""


def parse(body: bytes) -> Mapping[str, SigningKey]:
    """The usable signing keys of a JWK set, by `kid`.

    A key that cannot be used safely is left out and the others count: encryption keys, secrets,
    private halves, short or weak RSA keys, points off the curve, an `alg` that does not go with
    the key, no `kid`.  Of several keys with one `kid` none counts: there is no telling which is
    meant.

    Raises:
        UnfitKeySet: no JWK set, over MAX_BYTES or over MAX_KEYS.
    """
    if len(body) > MAX_BYTES:
        raise UnfitKeySet("too long")
    try:
        return parse_object(json_object(body, MAX_CONTAINERS))
    except UnfitKeySet:
        raise
    except ValueError:
        raise UnfitKeySet("no JSON object") from None


def parse_object(jwks: object) -> Mapping[str, SigningKey]:
    """As `parse`, of a JWK set that is a JSON object already.  Raises UnfitKeySet."""
    members = jwks.get("keys") if type(jwks) is dict else None
    if type(members) is not list or len(members) > MAX_KEYS:
        raise UnfitKeySet("no list of keys, or too many")
    signing_keys = [key for member in members if (key := _signing_key(member)) is not None]
    kids = Counter(signing_key.kid for signing_key in signing_keys)
    return {key.kid: key for key in signing_keys if kids[key.kid] == 1}


def _signing_key(jwk: object) -> SigningKey | None:
    """The signing key that a JWK describes, or None if it is unfit."""
    if type(jwk) is not dict:
        return None
    kid, curve, key_type = jwk.get("kid"), jwk.get("crv"), jwk.get("kty")
    if type(kid) is not str or not 0 < len(kid) <= MAX_KID_LENGTH:
        return None
    # RFC 7517 §4.2 and §4.3; a set that shows a private half (`d`) has lost that key.
    if jwk.get("use", "sig") != "sig" or "d" in jwk:
        return None
    operations = jwk.get("key_ops", ["verify"])
    if type(operations) is not list or "verify" not in operations:
        return None
    if type(key_type) is not str or not (curve is None or type(curve) is str):
        return None
    kind = _KINDS.get((key_type, curve))
    if kind is None or jwk.get("alg", kind[0]) != kind[0]:
        return None
    algorithm, names = kind
    public_members = {name: jwk[name] for name in names if type(jwk.get(name)) is str}
    try:
        for text in public_members.values():
            base64url.decode(text.encode())
        key = jwt.PyJWK({"kty": key_type, "crv": curve, **public_members}, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        # Off the curve, a member missing or of the wrong length, an even exponent, and so on.
        return None
    if isinstance(key.key, RSAPublicKey) and not _is_fit_rsa(key.key):
        return None
    members = tuple(public_members.items())
    return SigningKey(kid, algorithm, members, _verification(key.key))


def _is_fit_rsa(public: RSAPublicKey) -> bool:
    numbers = public.public_numbers()
    return (
        MIN_RSA_BITS <= public.key_size <= MAX_RSA_BITS
        and numbers.e > 1
        and numbers.e % 2 == 1
        and not all(numbers.n % prime in powers for prime, powers in _ROCA_POWERS.items())
    )


def _verification(public: object) -> Callable[[bytes, bytes], None]:
    """Verifies a signature of the one length that this signing key makes.

    PyJWT's algorithms do the same, but look at the key's class and build hash and padding anew
    for each signature, which costs a tenth of an ES256 verification.
    """
    match public:
        case EllipticCurvePublicKey():
            return _es256(public.verify)
        case RSAPublicKey():
            return _rs256(public.verify, (public.key_size + 7) // 8)
        case Ed25519PublicKey():
            return _eddsa(public.verify)
    raise TypeError("no algorithm of ours")


def _es256(verify: Callable[[bytes, bytes, ECDSA], None]) -> Callable[[bytes, bytes], None]:
    def verify_es256(signature: bytes, message: bytes) -> None:
        """RFC 7518 §3.4: R and S have full length; DER or a shortened half is no signature.

        OpenSSL takes DER all the same: no zeros ahead, but one where the number would be negative
        (X.690 §8.3).
        """
        if len(signature) != _R_AND_S_BYTES:
            raise InvalidSignature
        r, s = signature[:32].lstrip(b"\0"), signature[32:].lstrip(b"\0")
        if r >= b"\x80":
            r = b"\0" + r
        if s >= b"\x80":
            s = b"\0" + s
        der = b"\x30%c\x02%c%b\x02%c%b" % (len(r) + len(s) + 4, len(r), r, len(s), s)
        verify(der, sha256(message).digest(), _ECDSA)

    return verify_es256


def _rs256(
    verify: Callable[[bytes, bytes, PKCS1v15, SHA256], None], size: int
) -> Callable[[bytes, bytes], None]:
    def verify_rs256(signature: bytes, message: bytes) -> None:
        """RFC 8017 §8.2.2: as long as the modulus."""
        if len(signature) != size:
            raise InvalidSignature
        verify(signature, message, _PKCS1, _SHA256)

    return verify_rs256


def _eddsa(verify: Callable[[bytes, bytes], None]) -> Callable[[bytes, bytes], None]:
    def verify_eddsa(signature: bytes, message: bytes) -> None:
        """RFC 8032 §5.1.6: R and S of 32 bytes each."""
        if len(signature) != _R_AND_S_BYTES:
            raise InvalidSignature
        verify(signature, message)

    return verify_eddsa


@dataclass(frozen=True, slots=True)
class KeySetStatus:
    """How far a verifier can be relied on.

    Attributes:
        state: "none" when no key set is usable; "stale" when it is older than its age limit.
        age_s: seconds since the key set was asked for; None when there is none.
        good_for_s: how much longer it will be used if no fetch succeeds.
        last_error: kind of the failure, when the last fetch failed.
    """

    state: Literal["fresh", "stale", "none"]
    age_s: float | None
    good_for_s: float | None
    kids: tuple[str, ...]
    last_error: str | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    signing_keys: Mapping[str, SigningKey]
    at: float
    unusable_at: float


class KeySet:
    """The signing keys of one issuer, kept up to date.  For any number of threads, and fork-safe.

    Args:
        fetch: returns the JWK set as bytes, or raises; bounded in time and size by itself.
        monotonic: seconds on a clock that never goes back.
        first_load_timeout_s: how long a call waits for a fetch, in real seconds.
    """

    def __init__(
        self,
        fetch: Callable[[], bytes],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        max_age_s: float = JWKS_MAX_AGE,
        cooldown_s: float = JWKS_COOLDOWN,
        stale_if_error_s: float = JWKS_STALE_IF_ERROR,
        first_load_timeout_s: float = FIRST_LOAD_TIMEOUT,
    ) -> None:
        self._fetch = fetch
        self._monotonic = monotonic
        self._max_age_s = max_age_s
        self._cooldown_s = cooldown_s
        self._stale_if_error_s = stale_if_error_s
        self._first_load_timeout_s = first_load_timeout_s
        self._loaded: _Loaded | None = None
        self._last_error: str | None = None
        self._attempted_at = -math.inf
        #: When the thread shall fetch; infinite while it does.
        self._due_at = math.inf
        #: A fetch was asked for and has not ended.
        self._is_pending = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        #: The thread's; it is let go of by putting another one in its place.
        self._wake: threading.Event
        self._renew_locks()
        _EVERY_KEY_SET.add(self)

    def known(self, kid: str) -> SigningKey | None:
        """The signing key of this name, if the set in hand holds it.  Never waits."""
        loaded = self._loaded
        if loaded is None:
            return None
        now = self._monotonic()
        if now >= self._due_at:
            # The thread's own timer gets here first, unless it runs late, the process was
            # forked, or the clock was handed in.
            self._wake_thread()
        return loaded.signing_keys.get(kid) if now < loaded.unusable_at else None

    def look_up(self, kid: str, *, is_announced: bool = False) -> SigningKey | None:
        """As `known`, but settles an unknown name too.  Never waits.

        Args:
            is_announced: the issuer's signed feed lists this name, so that it is worth a fetch
                although the last one was a moment ago.

        Returns:
            None when only a fetch can tell; one is under way, and `wait_for` awaits it.

        Raises:
            UnknownSigningKey: the issuer was asked a moment ago and does not publish it.
            IssuerUnavailable: the issuer was asked a moment ago and could not be reached.
        """
        signing_key = self.known(kid)
        if signing_key is not None:
            return signing_key
        with self._settled:
            may_ask_at = self._may_ask_at()
            if is_announced:
                may_ask_at = min(may_ask_at, self._attempted_at + ANNOUNCED_COOLDOWN)
            may_ask = self._monotonic() >= may_ask_at
            if may_ask and not self._is_pending and not self._is_closed:
                self._is_pending = True
                self._due_at = -math.inf
                self._wake_thread_locked()
            return None if self._is_pending else self._settle(kid)

    def wait_for(self, kid: str) -> SigningKey:
        """Wait for the fetch that `look_up` began, at most `first_load_timeout_s`.

        Raises:
            UnknownSigningKey: the issuer does not publish it.
            IssuerUnavailable: the fetch failed, or takes too long.
        """
        with self._settled:
            if not self._settled.wait_for(
                lambda: not self._is_pending, timeout=self._first_load_timeout_s
            ):
                raise IssuerUnavailable(self._retry_after_s())
            return self._settle(kid)

    def status(self) -> KeySetStatus:
        """What the set in hand is worth at the moment."""
        with self._settled:
            loaded, last_error = self._loaded, self._last_error
        now = self._monotonic()
        if loaded is None or now >= loaded.unusable_at:
            return KeySetStatus("none", None, None, (), last_error)
        age_s = now - loaded.at
        return KeySetStatus(
            state="fresh" if age_s <= self._max_age_s else "stale",
            age_s=age_s,
            good_for_s=loaded.unusable_at - now,
            kids=tuple(loaded.signing_keys),
            last_error=last_error,
        )

    def load(self) -> None:
        """Fetch the first set, if there is none, and wait for it.

        Raises:
            IssuerUnavailable: the fetch failed, or takes too long.
        """
        # Nobody has a signing key without a name, so the answer is how the fetch went.
        with suppress(UnknownSigningKey):
            if self._loaded is None and self.look_up("") is None:
                self.wait_for("")

    def renew(self, timeout_s: float = FIRST_LOAD_TIMEOUT) -> None:
        """Fetch now, whatever the cool-down, and wait for it; nothing, where nobody has asked."""
        with self._settled:
            if self._thread is None or self._is_closed:
                return
            # What is under way may have begun before the reason for this.
            self._settled.wait_for(lambda: not self._is_pending, timeout_s)
            self._is_pending = True
            self._due_at = -math.inf
            self._wake_thread_locked()
            self._settled.wait_for(lambda: not self._is_pending, timeout_s)

    def forget(self, wait_s: float = 0) -> None:
        """Know nothing, as when it was made; the thread ends with the fetch that is under way.

        Args:
            wait_s: how long to wait for that.
        """
        with self._settled:
            thread, wake = self._thread, self._wake
            self._thread, self._wake = None, threading.Event()
            wake.set()
            self._loaded = self._last_error = None
            self._attempted_at, self._due_at = -math.inf, math.inf
            self._is_pending = False
            self._settled.notify_all()
        if thread is not None:
            thread.join(wait_s)

    def close(self) -> None:
        """End the thread.  The set in hand goes on being used until it is too old."""
        with self._settled:
            self._is_closed = True
            self._is_pending = False
            self._due_at = math.inf
            self._settled.notify_all()
            self._wake.set()

    def _settle(self, kid: str) -> SigningKey:
        """The last word on a name.  The lock is held and no fetch is pending."""
        loaded = self._loaded
        if loaded is None or self._monotonic() >= loaded.unusable_at:
            raise IssuerUnavailable(self._retry_after_s())
        signing_key = loaded.signing_keys.get(kid)
        if signing_key is not None:
            return signing_key
        if self._last_error is not None:
            # It may well be a new signing key that we failed to hear of.
            raise IssuerUnavailable(self._retry_after_s())
        raise UnknownSigningKey

    def _retry_after_s(self) -> int:
        """Whole seconds until the next fetch may begin, at least one."""
        return math.ceil(max(1, self._may_ask_at() - self._monotonic()))

    def _may_ask_at(self) -> float:
        """When the next fetch may begin at the earliest.

        Without any set nothing can be verified at all, so the issuer is asked sooner: a resource
        server that was started a moment before its issuer must not fail for half a minute.
        """
        if self._loaded is None:
            return self._attempted_at + min(self._cooldown_s, FIRST_LOAD_TIMEOUT)
        return self._attempted_at + self._cooldown_s

    # The thread.  It holds the key set weakly, so that a verifier that was let go ends it.

    def _wake_thread(self) -> None:
        with self._settled:
            if not self._is_pending and not self._is_closed:
                self._wake_thread_locked()

    def _wake_thread_locked(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            wake = self._wake
            self._thread = threading.Thread(
                target=_follow,
                args=(weakref.ref(self, lambda _: wake.set()), wake),
                name="coatcheck-key-set",
                daemon=True,
            )
            try:
                self._thread.start()
            except RuntimeError:
                # The process is out of threads, or about to end.
                self._fail("no_thread", self._monotonic())
        self._wake.set()

    def _step(self, wake: threading.Event) -> float | None:
        """Fetch if it is due.  Returns the seconds until it is again; None: closed.

        Args:
            wake: of the thread that asks; it fetches until it is let go of.
        """
        with self._settled:
            if self._is_closed or self._wake is not wake:
                return None
            started_at = self._monotonic()
            if started_at < self._due_at:
                return self._due_at - started_at
            self._is_pending = True
            self._due_at = math.inf
        signing_keys: Mapping[str, SigningKey] | None = None
        error = ""
        try:
            signing_keys = parse(self._fetch())
        except Exception as failure:
            # Whatever it was, the verifier goes on with what it has; the text may hold a URL
            # with secrets or what a stranger's server sent, so that only the kind is kept.
            error = str(getattr(failure, "kind", type(failure).__name__))
        with self._settled:
            if self._wake is not wake:
                # It was let go of meanwhile, and what it brought no longer counts.
                return None
            if signing_keys is None:
                self._fail(error, started_at)
            else:
                self._succeed(signing_keys, started_at)
            return self._due_at - self._monotonic()

    def _fail(self, error: str, at: float) -> None:
        """Take note of a fetch that brought nothing.  The lock is held."""
        self._last_error = error
        self._attempted_at = at
        self._due_at = self._may_ask_at()
        self._is_pending = False
        self._settled.notify_all()

    def _succeed(self, signing_keys: Mapping[str, SigningKey], at: float) -> None:
        """Put a new set in place of the last one.  The lock is held."""
        # A signing key that stays is the same object: what it verified need not be verified anew.
        before = {} if self._loaded is None else self._loaded.signing_keys
        kept = {
            kid: before[kid] if before.get(kid) == signing_key else signing_key
            for kid, signing_key in signing_keys.items()
        }
        unusable_at = at + self._max_age_s + self._stale_if_error_s
        self._loaded = _Loaded(MappingProxyType(kept), at, unusable_at)
        self._last_error = None
        self._due_at = at + max(self._max_age_s * RENEW_AT, self._cooldown_s)
        self._attempted_at = at
        self._is_pending = False
        self._settled.notify_all()

    def _renew_locks(self) -> None:
        self._settled = threading.Condition(threading.Lock())
        self._wake = threading.Event()
        self._thread = None

    def _after_fork(self) -> None:
        """In the child: the thread stayed behind, and a lock may be held by nobody."""
        self._renew_locks()
        if self._is_pending or self._due_at == math.inf:
            self._is_pending = False
            self._due_at = self._attempted_at = -math.inf


def _follow(reference: "weakref.ref[KeySet]", wake: threading.Event) -> None:
    """Renew a key set whenever it is due, until it is closed or gone."""
    while True:
        key_set = reference()
        wait_s = None if key_set is None else key_set._step(wake)  # noqa: SLF001
        del key_set
        if wait_s is None:
            return
        wake.wait(max(wait_s, 0))
        wake.clear()


def _renew_every_key_set() -> None:
    for key_set in list(_EVERY_KEY_SET):
        key_set._after_fork()  # noqa: SLF001


_EVERY_KEY_SET: "weakref.WeakSet[KeySet]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_every_key_set)
