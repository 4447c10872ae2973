"""The revocation feed: which tokens are dead before their time, known without asking anybody.

The document that says where the feed is, and who signs it, also tells of the issuer's product;
it is read again every now and then, in the same thread.

`read` checks one signed feed.  `Changes` keeps what the feeds said and follows them in a daemon
thread of its own, by long poll:

- entries are merged by maximum, and dropped a window after they arrived;
- a feed with a lower sequence number than the last one is refused: somebody replays an old one;
- nothing is accepted before the first good feed;
- no signed feed for FEED_STALE seconds is called stale; what then, the verifier's policy says.

Source: RFC 7519 §7.2 (validation), RFC 8725 §3.11 (typing).
"""

import os
import random
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from coatcheck import feed_profile
from coatcheck.durations import (
    FEED_STALE,
    FEED_WAIT_MAX,
    FEED_WINDOW,
    FIRST_LOAD_TIMEOUT,
    LEEWAY_MAX,
)
from coatcheck.token_profile import ALGORITHMS
from coatcheck.verifier import check, keyset, product
from coatcheck.verifier.check import SignedClaims, SigningKey
from coatcheck.verifier.errors import (
    IssuerUnavailable,
    TokenMalformed,
    TokenRevoked,
    UnknownSigningKey,
    VerifierError,
    WrongType,
)
from coatcheck.verifier.product import Product

#: Seconds after which the issuer's document is read again: its catalog may have changed.
_DOCUMENT_MAX_AGE: Final = 300
#: Arrays and objects in it: it also tells of all the things that filters may name.
_MAX_CONTAINERS: Final = 10_000

#: Seconds: how long to wait before the next try, doubled with each failure in a row.
_FIRST_PAUSE: Final = 0.25
_LONGEST_PAUSE: Final = 5.0

#: The claims that name a token's subjects, beside its signing key, its `jti` and everything.
_SUBJECT_CLAIMS: Final = ("sub", "org_id", "project_id", "group")
_subject: Final = lru_cache(maxsize=4096)(feed_profile.subject)

_FORM: Final = check.Form(
    types=frozenset((feed_profile.TYPE,)),
    algorithms=frozenset(ALGORITHMS),
    max_bytes=feed_profile.MAX_FEED_BYTES,
)

Fetch = Callable[[str], bytes]


class UnfitFeed(ValueError):
    """What came is no feed of this issuer, or is older than what is known already.

    Attributes:
        kind: one word for status pages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class UnknownFeedKey(UnfitFeed):
    """The feed is signed by a key that the issuer's document did not name when it was read."""

    def __init__(self) -> None:
        super().__init__("unknown_feed_key")


@dataclass(frozen=True, slots=True)
class Source:
    """What `/.well-known/coatcheck` says: where the feed is, who signs it, and of the product.

    Attributes:
        product: the parts of a product that it tells, as `product.read` reads them.
    """

    url: str
    signing_keys: Mapping[str, SigningKey]
    product: Mapping[str, Any]


class Signed(NamedTuple):
    """What one good feed says.  Made by `read` only.  `issued_at` in seconds since the epoch."""

    log: str
    seq: int
    entries: Mapping[str, int]
    kids: frozenset[str]
    issued_at: int


def read_source(body: bytes, issuer: str) -> Source:
    """Read the issuer's document.

    Raises:
        UnfitFeed: it is another issuer's, names no feed, or holds a malformed member.
    """
    try:
        document = check.json_object(body, _MAX_CONTAINERS)
    except ValueError:
        raise UnfitFeed("no_document") from None
    url, keys = document.get("revocations_endpoint"), document.get("revocation_keys")
    if document.get("issuer") != issuer or type(url) is not str:
        raise UnfitFeed("other_issuer")
    try:
        signing_keys = keyset.parse_object(keys)
    except keyset.UnfitKeySet:
        raise UnfitFeed("no_feed_keys") from None
    try:
        return Source(url, signing_keys, MappingProxyType(product.read(document)))
    except ValueError:
        # An issuer of an older release tells nothing of it, which is fine; half of it is not.
        raise UnfitFeed("unfit_product") from None


def read(text: bytes, source: Source, issuer: str, now: float) -> Signed:
    """Check one feed by itself.

    1. Form: ASCII, bounded.
    2. A JWS whose `typ` is the feed's; the signing key is one that the issuer names for feeds, and
       the signature fits; JSON.
    3. `iss` is the issuer, `aud` the feed's own address.
    4. `iat` is not ahead, `exp` not past; LEEWAY_MAX is granted to both.
    5. `log`, `seq`, `entries` and `kids` have their types; no entry is above `seq`.
    6. `kids` lists the feed's own signer: a withdrawn one cannot vouch for itself.

    Raises:
        UnfitFeed: the first step that fails.
    """
    # 1
    if len(text) > feed_profile.MAX_FEED_BYTES or not text.isascii():
        raise UnfitFeed("too_long")
    # 2
    try:
        signing_key, payload = check.open_jws(text.decode(), _FORM, source.signing_keys.get)
        claims = check.json_object(payload, check.MAX_CONTAINERS)
    except UnknownSigningKey:
        raise UnknownFeedKey from None
    except WrongType:
        raise UnfitFeed("wrong_type") from None
    except TokenMalformed:
        raise UnfitFeed("no_jws") from None
    except (VerifierError, ValueError):
        raise UnfitFeed("bad_signature") from None
    # 3
    if claims.get("iss") != issuer or claims.get("aud") != source.url:
        raise UnfitFeed("other_issuer")
    # 4
    issued_at, expires_at = claims.get("iat"), claims.get("exp")
    if type(issued_at) is not int or type(expires_at) is not int:
        raise UnfitFeed("no_times")
    if issued_at - LEEWAY_MAX > now or expires_at + LEEWAY_MAX <= now:
        raise UnfitFeed("expired")
    # 5
    log, seq = claims.get("log"), claims.get("seq")
    entries, kids = claims.get("entries"), claims.get("kids")
    if type(log) is not str or type(seq) is not int or type(entries) is not dict:
        raise UnfitFeed("malformed")
    if any(type(at) is not int or at > seq for at in entries.values()):
        raise UnfitFeed("malformed")
    if type(kids) is not list or not all(type(kid) is str for kid in kids):
        raise UnfitFeed("malformed")
    # 6
    if signing_key.kid not in kids:
        raise UnfitFeed("withdrawn_feed_key")
    return Signed(log, seq, entries, frozenset(kids), issued_at)


@dataclass(frozen=True, slots=True)
class Known:
    """What all feeds so far said.  Replaced as a whole, so that readers need no lock."""

    log: str
    seq: int
    entries: Mapping[str, int]
    arrived_at: Mapping[str, float]
    kids: frozenset[str]
    issued_at: int
    fresh_at: float


def merge(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """What is known after one more feed.

    Args:
        arrived_at: seconds on a clock that never goes back.

    Raises:
        UnfitFeed: the feed is older than what is known.
    """
    entries: dict[str, int] = {}
    arrivals: dict[str, float] = {}
    if known is not None:
        # A new log starts far above every sequence number of the one it replaces.
        if signed.seq < known.seq or (signed.seq == known.seq and signed.log != known.log):
            raise UnfitFeed("replayed")
        for subject, seq in known.entries.items():
            if arrived_at - known.arrived_at[subject] < FEED_WINDOW:
                entries[subject], arrivals[subject] = seq, known.arrived_at[subject]
    for subject, seq in signed.entries.items():
        if seq > entries.get(subject, -1):
            entries[subject], arrivals[subject] = seq, arrived_at
    issued_at, fresh_at = signed.issued_at, arrived_at
    if known is not None and known.issued_at >= issued_at:
        issued_at, fresh_at = known.issued_at, known.fresh_at
    return Known(signed.log, signed.seq, entries, arrivals, signed.kids, issued_at, fresh_at)


@dataclass(frozen=True, slots=True)
class ChangesStatus:
    """How far what is known about revocations can be relied on.

    Attributes:
        state: "none" before the first good feed; "stale" when none came for FEED_STALE seconds.
        age_s: seconds since the last feed was signed, by this machine's clock.
        fresh_for_s: how much longer it is fresh if no other feed comes; negative when it is stale.
        seq: up to where the issuer's change log is known.
        entries: how many subjects are named.
        last_error: kind of the failure, when the last try failed.
    """

    state: Literal["fresh", "stale", "none"]
    age_s: float | None
    fresh_for_s: float | None
    seq: int | None
    entries: int
    last_error: str | None


class Changes:
    """Follows one issuer's feed.  For any number of threads, and fork-safe.

    Args:
        issuer: the issuer's URL.
        document_url: where its document is.
        fetch: gets the bytes at a URL, or raises; bounded in time and size by itself, and patient
            enough for a long poll.
        clock: seconds since the epoch.
        monotonic: seconds on a clock that never goes back.
        settled: parts of the product that count whatever the issuer says, from `product.read`.
    """

    def __init__(
        self,
        issuer: str,
        document_url: str,
        fetch: Fetch,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        settled: Mapping[str, Any] = MappingProxyType({}),
        first_load_timeout_s: float = FIRST_LOAD_TIMEOUT,
    ) -> None:
        self._issuer = issuer
        self._document_url = document_url
        self._fetch = fetch
        self._clock = clock
        self._monotonic = monotonic
        self._first_load_timeout_s = first_load_timeout_s
        self._known: Known | None = None
        self._source: Source | None = None
        self._read_at = 0.0
        self._settled_parts = settled
        #: The issuer's, as last read, under what is settled here; for every request.
        self.product: Product = product.of(**settled)
        #: Whether the issuer told of it, or need not.
        self.is_told = {"api_key_header", "foreign_prefixes"} <= settled.keys()
        self._last_error: str | None = None
        self._failures = 0
        self._is_closed = False
        #: As `known`, for every request: once it is there, the thread has been started.
        self.at_hand: Known | None = None
        self._thread: threading.Thread | None = None
        #: The thread's; it is let go of by putting another one in its place.
        self._wake: threading.Event
        self._renew_locks()
        _EVERY_CHANGES.add(self)

    def known(self) -> Known | None:
        """What is known; None before the first good feed.  Never waits; starts the thread."""
        if self._thread is None:
            self._start_thread()
        return self.at_hand

    def wait_for_first(self) -> Known:
        """Wait for the first good feed.

        Raises:
            IssuerUnavailable: none came in time.
        """
        self.known()
        with self._settled:
            self._settled.wait_for(
                lambda: self.at_hand is not None or self._is_closed,
                timeout=self._first_load_timeout_s,
            )
        if self._known is None:
            raise IssuerUnavailable(1)
        return self._known

    def wait_for_product(self) -> None:
        """Wait until the issuer has told what its credentials look like.

        Raises:
            IssuerUnavailable: it did not in time.
        """
        self.known()
        with self._settled:
            self._settled.wait_for(
                lambda: self.is_told or self._is_closed, timeout=self._first_load_timeout_s
            )
        if not self.is_told:
            raise IssuerUnavailable(1)

    def is_stale(self, known: Known) -> bool:
        """Whether no feed was signed for FEED_STALE seconds."""
        return (
            self._monotonic() - known.fresh_at > FEED_STALE
            or self._clock() - known.issued_at > FEED_STALE + LEEWAY_MAX
        )

    def _fresh_for_s(self, known: Known) -> float:
        """Seconds until `is_stale`, by whichever clock comes first."""
        return min(
            known.fresh_at + FEED_STALE - self._monotonic(),
            known.issued_at + FEED_STALE + LEEWAY_MAX - self._clock(),
        )

    def status(self) -> ChangesStatus:
        """What is known at the moment, for status pages."""
        known = self._known
        if known is None:
            return ChangesStatus("none", None, None, None, 0, self._last_error)
        return ChangesStatus(
            state="stale" if self.is_stale(known) else "fresh",
            age_s=self._clock() - known.issued_at,
            fresh_for_s=self._fresh_for_s(known),
            seq=known.seq,
            entries=len(known.entries),
            last_error=self._last_error,
        )

    def catch_up(self, seq: int, timeout_s: float = FIRST_LOAD_TIMEOUT) -> bool:
        """Wait until the log is known up to here, without the pause that follows a failure.

        Returns:
            Whether it is; also True where nobody has asked yet: there is nothing to catch up on.
        """
        with self._settled:
            if self._thread is None or self._is_closed:
                return True
            if self._failures:
                self._let_go_of_thread()
                self._start_thread_locked()
            return self._settled.wait_for(
                lambda: self._known is not None and self._known.seq >= seq, timeout_s
            )

    def forget(self, wait_s: float = 0) -> None:
        """Know nothing, as when it was made; the thread ends with the poll that is under way.

        Args:
            wait_s: how long to wait for that.
        """
        with self._settled:
            thread = self._let_go_of_thread()
            self._known = self.at_hand = None
            self._source = None
            self.product = product.of(**self._settled_parts)
            self.is_told = {"api_key_header", "foreign_prefixes"} <= self._settled_parts.keys()
            self._last_error, self._failures = None, 0
        if thread is not None:
            thread.join(wait_s)

    def close(self) -> None:
        """End the thread once its poll has been answered."""
        self._is_closed = True
        self._wake.set()

    def step(self, wake: threading.Event | None = None) -> float:
        """One poll.  Returns the seconds to wait before the next one.

        Args:
            wake: of the thread that asks; what it brings counts until it is let go of.
        """
        wake = wake or self._wake
        try:
            source = self._source_now(wake)
            known = self._known
            # A first feed is wanted at once, as is one after a failure: it tells what is fresh.
            is_caught_up = self.at_hand is not None and self._failures == 0
            after = known.seq if known is not None else -1
            wait_s = FEED_WAIT_MAX if is_caught_up else 0
            text = self._fetch(f"{source.url}?after={after}&wait={wait_s}")
            signed = read(text, source, self._issuer, self._clock())
            merged = merge(self._known, signed, self._monotonic())
        except Exception as failure:
            # Whatever it was, the verifier goes on with what it knows; only the kind is kept,
            # because a text may hold what a stranger's server sent.
            if self._wake is not wake:
                return 0
            self._last_error = str(getattr(failure, "kind", type(failure).__name__))
            self._failures += 1
            # The issuer's document may have changed: keys, or the address.
            self._source = None
            pause: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10))
            # Verifiers that lost their issuer together come back one by one.
            return pause * random.uniform(0.5, 1)  # noqa: S311 - no secret
        with self._settled:
            if self._wake is not wake:
                return 0
            self._known = self.at_hand = merged
            self._last_error, self._failures = None, 0
            self._settled.notify_all()
        return 0

    def _source_now(self, wake: threading.Event) -> Source:
        """What the issuer's document says.  Raises if it cannot be read the first time."""
        now = self._monotonic()
        if self._source is not None and now - self._read_at < _DOCUMENT_MAX_AGE:
            return self._source
        self._read_at = now
        try:
            source = read_source(self._fetch(self._document_url), self._issuer)
        except Exception:
            if self._source is None:
                raise
            # What it said before goes on; the feed itself tells whether the issuer is away.
            return self._source
        with self._settled:
            if self._wake is not wake:
                return source
            self._source = source
            self.product = product.of(**{**source.product, **self._settled_parts})
            self.is_told = True
            self._settled.notify_all()
        return source

    # The thread.  It holds this object weakly, so that a verifier that was let go ends it.

    def _start_thread(self) -> None:
        with self._settled:
            if self._thread is None and not self._is_closed:
                self._start_thread_locked()

    def _start_thread_locked(self) -> None:
        wake = self._wake
        self._thread = threading.Thread(
            target=_follow,
            args=(weakref.ref(self, lambda _: wake.set()), wake),
            name="coatcheck-changes",
            daemon=True,
        )
        try:
            self._thread.start()
        except RuntimeError:
            # The process is out of threads, or about to end.  The next request tries again.
            self._thread = None
            self._last_error = "no_thread"

    def _let_go_of_thread(self) -> threading.Thread | None:
        """End the thread; what it still brings does not count.  The lock is held."""
        thread, self._thread = self._thread, None
        self._wake.set()
        self._wake = threading.Event()
        return thread

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def _after_fork(self) -> None:
        """In the child: the thread stayed behind, and a lock may be held by nobody."""
        self._renew_locks()
        self.at_hand = None

    def _renew_locks(self) -> None:
        self._settled = threading.Condition(threading.Lock())
        self._wake = threading.Event()
        self._thread = None


def _follow(reference: "weakref.ref[Changes]", wake: threading.Event) -> None:
    """Poll for as long as somebody wants to know."""
    while True:
        changes = reference()
        if changes is None or changes.is_closed:
            return
        pause_s = changes.step(wake)
        del changes
        if wake.wait(pause_s):
            return


def check_vouched(signed: SignedClaims, known: Known) -> None:
    """Hold a verified token against what the feeds said.

    14. Its signing key is still listed.  A feed that is older than the token cannot know one that
        came after it.
    15. None of its subjects was narrowed after the issuer had read the change log.

    Raises:
        UnknownSigningKey, TokenRevoked: the step that fails.
        TokenMalformed: a claim that only this issuer's profile requires is missing.
    """
    as_of = signed.as_of
    if as_of is None:
        raise TokenMalformed("The claims org_id, env and as_of are required to follow a feed.")
    # 14
    if signed.signing_key.kid not in known.kids and as_of <= known.seq:
        raise UnknownSigningKey
    # 15
    entries = known.entries
    if entries:
        for subject in signed.subjects or subjects_of(signed):
            if entries.get(subject, -1) > as_of:
                raise TokenRevoked


def subjects_of(signed: SignedClaims) -> list[str]:
    """What a token hangs on, in the feed's form.  Worked out when a feed first names anything."""
    claims = signed.claims
    hung_on = [str(claims[name]) for name in _SUBJECT_CLAIMS if name in claims]
    shared = map(_subject, (*hung_on, signed.signing_key.kid, feed_profile.EVERYTHING))
    # Every token has another `jti`: remembering its form would only push out the others.
    signed.subjects[:] = (*shared, feed_profile.subject(claims["jti"]))
    return signed.subjects


_EVERY_CHANGES: "weakref.WeakSet[Changes]" = weakref.WeakSet()


def _renew_every() -> None:
    for changes in list(_EVERY_CHANGES):
        changes._after_fork()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_every)
