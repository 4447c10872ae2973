"""Following the revocation feed: what counts as one, what is known from several, and what then.

RFC 7519 §7.2, RFC 8725 §3.11.
"""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.durations import FEED_STALE, FEED_WAIT_MAX, FEED_WINDOW, LEEWAY, LEEWAY_MAX
from coatcheck.feed_profile import EVERYTHING, MAX_FEED_BYTES, TYPE, subject
from coatcheck.verifier import (
    IssuerUnavailable,
    StaleFeed,
    TokenMalformed,
    TokenRevoked,
    UnknownSigningKey,
    Verifier,
    VerifierError,
)
from coatcheck.verifier.changes import (
    Changes,
    Fetch,
    Known,
    Signed,
    Source,
    UnfitFeed,
    merge,
    read,
    read_source,
)
from support.tokens import (
    ABSENT,
    AUDIENCE,
    ISSUER,
    NOW,
    SetClock,
    as_json,
    base64url,
    changed,
    claims,
    key_set,
    signer,
)

FEED_URL = f"{ISSUER}/oauth/revocations"
DOCUMENT_URL = f"{ISSUER}/.well-known/coatcheck"
KEY_SET_URL = f"{ISSUER}/.well-known/jwks.json"
FOREVER_S = 10  # Longer than any test takes: what waits for it has failed.


def feed_claims(**changes: object) -> dict[str, object]:
    """What an ordinary feed says that was signed at NOW and names nothing."""
    ordinary = {
        "iss": ISSUER,
        "aud": FEED_URL,
        "iat": NOW,
        "exp": NOW + FEED_STALE,
        "log": "log_1",
        "seq": 20,
        "entries": {},
        "kids": ["first", "feed"],
    }
    return changed(ordinary, changes)


def a_feed(signed_by: str = "feed", header: dict[str, object] | None = None, **said: object) -> str:
    """A feed that is signed rightly, whatever it says."""
    return signer(kid=signed_by).token(feed_claims(**said), **{"typ": TYPE, **(header or {})})


def document(*feed_keys: str, **changes: object) -> bytes:
    """The issuer's document, which names these signing keys for feeds."""
    keys = {"keys": [signer(kid=kid).jwk() for kid in feed_keys or ("feed",)]}
    ordinary = {"issuer": ISSUER, "revocations_endpoint": FEED_URL, "revocation_keys": keys}
    return as_json(changed(ordinary, changes))


SOURCE = read_source(document(), ISSUER)


# --- one feed by itself


def reading(text: str | bytes, source: Source = SOURCE, now: float = NOW) -> Signed:
    return read(text if isinstance(text, bytes) else text.encode(), source, ISSUER, now)


def test_a_good_feed_says_what_it_says() -> None:
    """Nothing is made up, and nothing is lost."""
    signed = reading(a_feed(entries={"a": 3, "b": 20}, log="log_2"))

    assert signed == Signed("log_2", 20, {"a": 3, "b": 20}, frozenset({"first", "feed"}), NOW)


def forged(text: str) -> str:
    """The same header and signature over other claims."""
    header, _, signature = text.split(".")
    return f"{header}.{base64url(as_json(feed_claims(seq=21)))}.{signature}"


REFUSED: dict[str, tuple[Callable[[], str | bytes], str]] = {
    # 1
    "too long": (lambda: "a" * (MAX_FEED_BYTES + 1), "too_long"),
    "not ASCII": (lambda: a_feed().encode() + b"\xc3\xa4", "too_long"),
    "empty": (lambda: "", "no_jws"),
    "a page": (lambda: "<html>502 Bad Gateway</html>", "no_jws"),
    "two parts": (lambda: a_feed().rpartition(".")[0], "no_jws"),
    "four parts": (lambda: a_feed() + ".AAAA", "no_jws"),
    "padded": (lambda: a_feed() + "==", "no_jws"),
    "a key of its own": (lambda: a_feed(header={"jwk": signer().jwk()}), "no_jws"),
    "crit": (lambda: a_feed(header={"crit": ["exp"]}), "no_jws"),
    "a token": (lambda: a_feed(header={"typ": "at+jwt"}), "wrong_type"),
    "a plain JWT": (lambda: a_feed(header={"typ": "JWT"}), "wrong_type"),
    "no type": (lambda: a_feed(header={"typ": ABSENT}), "wrong_type"),
    "type in a list": (lambda: a_feed(header={"typ": [TYPE]}), "wrong_type"),
    # 2
    "another kid": (lambda: a_feed("first"), "unknown_feed_key"),
    "another key under its name": (
        lambda: a_feed("first", header={"kid": "feed"}),
        "bad_signature",
    ),
    "other claims": (lambda: forged(a_feed()), "bad_signature"),
    "no signature": (lambda: a_feed().rpartition(".")[0] + ".", "bad_signature"),
    "alg none": (lambda: a_feed(header={"alg": "none"}), "bad_signature"),
    "alg HS256": (lambda: a_feed(header={"alg": "HS256"}), "bad_signature"),
    # 3
    "another issuer": (lambda: a_feed(iss="https://other.example"), "other_issuer"),
    "the issuer and a slash": (lambda: a_feed(iss=f"{ISSUER}/"), "other_issuer"),
    "no issuer": (lambda: a_feed(iss=ABSENT), "other_issuer"),
    "for an API": (lambda: a_feed(aud=AUDIENCE), "other_issuer"),
    "for several": (lambda: a_feed(aud=[FEED_URL, AUDIENCE]), "other_issuer"),
    "for nobody": (lambda: a_feed(aud=ABSENT), "other_issuer"),
    # 4
    "no iat": (lambda: a_feed(iat=ABSENT), "no_times"),
    "iat true": (lambda: a_feed(iat=True), "no_times"),
    "iat with a fraction": (lambda: a_feed(iat=NOW + 0.5), "no_times"),
    "iat text": (lambda: a_feed(iat=str(NOW)), "no_times"),
    "no exp": (lambda: a_feed(exp=ABSENT), "no_times"),
    "from the future": (lambda: a_feed(iat=NOW + LEEWAY_MAX + 1), "expired"),
    "expired": (lambda: a_feed(exp=NOW - LEEWAY_MAX), "expired"),
    # 5
    "no log": (lambda: a_feed(log=ABSENT), "malformed"),
    "log number": (lambda: a_feed(log=1), "malformed"),
    "no seq": (lambda: a_feed(seq=ABSENT), "malformed"),
    "seq true": (lambda: a_feed(seq=True), "malformed"),
    "seq text": (lambda: a_feed(seq="20"), "malformed"),
    "seq with a fraction": (lambda: a_feed(seq=20.0), "malformed"),
    "no entries": (lambda: a_feed(entries=ABSENT), "malformed"),
    "entries null": (lambda: a_feed(entries=None), "malformed"),
    "entries list": (lambda: a_feed(entries=["a"]), "malformed"),
    "entry text": (lambda: a_feed(entries={"a": "3"}), "malformed"),
    "entry true": (lambda: a_feed(entries={"a": True}), "malformed"),
    "entry null": (lambda: a_feed(entries={"a": None}), "malformed"),
    "entry ahead of seq": (lambda: a_feed(entries={"a": 21}), "malformed"),
    "no kids": (lambda: a_feed(kids=ABSENT), "malformed"),
    "kids text": (lambda: a_feed(kids="feed"), "malformed"),
    "kid number": (lambda: a_feed(kids=["feed", 1]), "malformed"),
    # 6
    "its signer not listed": (lambda: a_feed(kids=["first"]), "withdrawn_feed_key"),
    "nothing listed": (lambda: a_feed(kids=[]), "withdrawn_feed_key"),
}


@pytest.mark.parametrize(("text", "kind"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_good_feed_is_refused(text: Callable[[], str | bytes], kind: str) -> None:
    """Whoever can pass something off as the feed can undo every revocation."""
    with pytest.raises(UnfitFeed) as refused:
        reading(text())

    assert refused.value.kind == kind


def test_claims_named_twice_are_refused() -> None:
    """RFC 8725 §2.6: two readers would see two feeds.  A value in a value is no feed either."""
    twice = as_json(feed_claims())[:-1] + b',"seq":999}'
    deep = as_json(feed_claims(entries={"a": {"b": {"c": []}}}))
    for payload in (twice, deep, b"[]", b"null", b'{"seq":NaN}', b"\xff"):
        text = signer(kid="feed").token_of(as_json(signer(kid="feed").header(typ=TYPE)), payload)
        with pytest.raises(UnfitFeed):
            reading(text)


BARELY: dict[str, dict[str, Any]] = {
    "a little ahead": {"iat": NOW + LEEWAY_MAX},
    "a little late": {"exp": NOW - LEEWAY_MAX + 1},
    "an entry at seq": {"entries": {"a": 20}},
    "a new claim": {"x": {"y": 1}},
}


@pytest.mark.parametrize("said", BARELY.values(), ids=BARELY)
def test_what_is_barely_good_is_good(said: dict[str, Any]) -> None:
    """Clocks differ; and a newer issuer may say more."""
    assert reading(a_feed(**said))


def test_the_longest_feed_is_read() -> None:
    """A limit below the issuer's would cut everybody off on its worst day."""
    entries = {subject(str(number)): 10_000_000 for number in range(9_000)}
    text = a_feed(seq=10_000_000, entries=entries)
    assert 300_000 < len(text) <= MAX_FEED_BYTES

    assert reading(text).entries == entries


NO_DOCUMENTS: dict[str, bytes] = {
    "no JSON": b"<html>",
    "nothing": b"",
    "a list": b"[]",
    "another issuer": document(issuer="https://other.example"),
    "the issuer and a slash": document(issuer=f"{ISSUER}/"),
    "no issuer": document(issuer=ABSENT),
    "no address": document(revocations_endpoint=ABSENT),
    "address null": document(revocations_endpoint=None),
    "no keys": document(revocation_keys=ABSENT),
    "keys in a list": document(revocation_keys=[]),
}


@pytest.mark.parametrize("body", NO_DOCUMENTS.values(), ids=NO_DOCUMENTS)
def test_a_document_of_somebody_else_is_refused(body: bytes) -> None:
    """Who says where the feed is and who signs it decides what is revoked."""
    with pytest.raises(UnfitFeed):
        read_source(body, ISSUER)


# --- what is known from several


def signed(
    seq: int = 20,
    entries: dict[str, int] | None = None,
    log: str = "log_1",
    kids: tuple[str, ...] = ("feed",),
    issued_at: int = NOW,
) -> Signed:
    return Signed(log, seq, entries or {}, frozenset(kids), issued_at)


def known_from(*feeds: Signed) -> Known:
    """What is known after these feeds, which arrived one after another in one moment."""
    known: Known | None = None
    for one in feeds:
        known = merge(known, one, 0.0)
    assert known is not None
    return known


REPLAYED = {
    "older": signed(19),
    "much older": signed(-1),
    "older, of another log": signed(19, log="log_2"),
    "of another log, as old": signed(20, log="log_2"),
}


@pytest.mark.parametrize("late", REPLAYED.values(), ids=REPLAYED)
def test_a_feed_that_is_older_than_what_is_known_is_refused(late: Signed) -> None:
    """Somebody replays it, to bring back what was revoked in between."""
    with pytest.raises(UnfitFeed) as refused:
        merge(known_from(signed(20)), late, 1.0)

    assert refused.value.kind == "replayed"


def test_a_new_log_starts_above_the_old_one() -> None:
    """After a restore from backup: what the old log had said still counts."""
    known = known_from(signed(20, {"a": 18}), signed(2**32, {"b": 2**32}, log="log_2"))

    assert (known.log, known.seq) == ("log_2", 2**32)
    assert known.entries == {"a": 18, "b": 2**32}


def test_of_two_entries_the_higher_one_counts() -> None:
    """A feed that is folded into wider subjects, or lacks one, takes nothing back."""
    known = known_from(signed(20, {"a": 18, "b": 19}), signed(21, {"a": 17, "c": 21}))

    assert known.entries == {"a": 18, "b": 19, "c": 21}


def test_an_entry_is_kept_for_a_window_from_its_arrival() -> None:
    """By a clock that nobody sets; by then no token is left that it could concern."""
    known = merge(None, signed(20, {"a": 18}), 0.0)
    known = merge(known, signed(20), FEED_WINDOW - 0.5)
    assert known.entries == {"a": 18}

    known = merge(known, signed(20), FEED_WINDOW)
    assert (known.entries, known.arrived_at) == ({}, {})


def test_an_entry_that_is_raised_is_kept_from_then_on() -> None:
    """The API key was disabled once more: tokens from in between live on otherwise."""
    known = merge(None, signed(20, {"a": 18}), 0.0)
    known = merge(known, signed(25, {"a": 25}), FEED_WINDOW - 1)
    known = merge(known, signed(25), 2 * FEED_WINDOW - 2)

    assert known.entries == {"a": 25}


def test_the_listed_signing_keys_are_those_of_the_last_feed() -> None:
    """One that is no longer listed was withdrawn."""
    known = known_from(signed(20, kids=("feed", "first")), signed(21, kids=("feed", "second")))

    assert known.kids == {"feed", "second"}


def test_freshness_comes_from_a_signature_only() -> None:
    """Handing out the same feed again and again proves nothing about now."""
    known = known_from(signed(20, issued_at=NOW), signed(21, issued_at=NOW - 5))
    assert known.issued_at == NOW

    assert merge(known, signed(21, issued_at=NOW - 5), 1000.0).issued_at == NOW
    assert merge(known, signed(21, issued_at=NOW + 5), 1000.0).issued_at == NOW + 5


feeds = st.lists(
    st.tuples(
        st.integers(0, 3),  # how much higher its seq is
        st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3), max_size=3),
        st.integers(0, FEED_WINDOW),  # seconds since the one before
    ),
    max_size=12,
)


@given(feeds)
def test_nothing_that_was_said_within_the_window_is_forgotten(
    said: list[tuple[int, dict[str, int], int]],
) -> None:
    """
    Whatever order feeds come in, and whatever they leave out.

    What is said again is not news: it happened before it was said first.
    """
    known: Known | None = None
    seq, at = 10, 0
    news: list[tuple[str, int, int]] = []
    for higher, named, seconds in said:
        seq, at = seq + higher, at + seconds
        entries = {name: seq - lower for name, lower in named.items()}
        before = {} if known is None else known.entries
        news += [
            (name, number, at) for name, number in entries.items() if number > before.get(name, -1)
        ]
        known = merge(known, signed(seq, entries), float(at))
        for name, number, said_at in news:
            if at - said_at < FEED_WINDOW:
                assert known.entries[name] >= number
        assert set(known.entries) == set(known.arrived_at)


# --- following


class FeedIssuer:
    """An issuer as its followers see it: works, and can be away, behind or in other hands."""

    def __init__(self, clock: SetClock) -> None:
        self._clock = clock
        self._news = threading.Condition()
        self.urls: list[str] = []
        self.failure: Exception | None = None
        self.said: dict[str, object] = {"seq": 20, "entries": {}, "kids": ["first", "feed"]}
        self.signed_by = "feed"
        self.feed_keys: tuple[str, ...] = ("feed",)
        self.token_keys: tuple[str, ...] = ("first",)
        self._asked_for_now = 0
        self.is_over = False

    def __call__(self, url: str) -> bytes:
        self.urls.append(url)
        if self.failure is not None:
            raise self.failure
        if url == DOCUMENT_URL:
            return document(*self.feed_keys)
        if url == KEY_SET_URL:
            return key_set(*(signer(kid=kid).jwk() for kid in self.token_keys))
        query = parse_qs(urlsplit(url).query)
        if query["wait"] != ["0"]:
            self._wait(int(query["after"][0]))
        if self.failure is not None:
            raise self.failure
        now = int(self._clock.now)
        said: dict[str, Any] = {"iat": now, "exp": now + FEED_STALE, **self.said}
        return a_feed(self.signed_by, **said).encode()

    def _wait(self, after: int) -> None:
        with self._news:
            asked = self._asked_for_now
            self._news.wait_for(
                lambda: self.is_over or self.seq > after or self._asked_for_now != asked, FOREVER_S
            )

    @property
    def seq(self) -> int:
        seq = self.said["seq"]
        assert isinstance(seq, int)
        return seq

    def answer_now(self) -> None:
        """Let all who wait have a feed that is signed now, as after a poll without news."""
        with self._news:
            self._asked_for_now += 1
            self._news.notify_all()

    def say(self, **said: object) -> None:
        """Say something new from now on."""
        with self._news:
            self.said = {**self.said, **said}
            self._news.notify_all()

    def narrow(self, of: str) -> None:
        """Say that one subject was narrowed just now."""
        entries = self.said["entries"]
        assert isinstance(entries, dict)
        seq = self.seq + 1
        self.say(seq=seq, entries={**entries, subject(of): seq})

    def end(self) -> None:
        with self._news:
            self.is_over = True
            self._news.notify_all()

    @property
    def polls(self) -> list[str]:
        """The queries of the feed, in order."""
        return [urlsplit(url).query for url in self.urls if url.startswith(FEED_URL)]


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def issuer(clock: SetClock) -> Iterator[FeedIssuer]:
    issuer = FeedIssuer(clock)
    yield issuer
    issuer.end()


def a_follower(fetch: Fetch, clock: SetClock, first_load_timeout_s: float = FOREVER_S) -> Changes:
    return Changes(
        ISSUER,
        DOCUMENT_URL,
        fetch,
        clock=clock,
        monotonic=clock,
        first_load_timeout_s=first_load_timeout_s,
    )


@pytest.fixture
def changes(issuer: FeedIssuer, clock: SetClock) -> Iterator[Changes]:
    """A follower whose thread has not begun; `step` is what it would do."""
    changes = a_follower(issuer, clock)
    yield changes
    changes.close()


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until another thread has got that far."""
    until = time.monotonic() + FOREVER_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_nothing_is_fetched_before_it_is_needed(changes: Changes, issuer: FeedIssuer) -> None:
    """A resource server can start before its issuer does."""
    assert changes.status().state == "none"
    assert issuer.urls == []


def test_the_first_feed_is_wanted_at_once_and_the_next_ones_by_long_poll(
    changes: Changes, issuer: FeedIssuer
) -> None:
    """A waiting first request must not wait for news; a waiting follower costs nothing."""
    assert changes.step() == 0
    issuer.narrow("key_1")
    assert changes.step() == 0

    assert issuer.urls[0] == DOCUMENT_URL
    assert issuer.polls == ["after=-1&wait=0", f"after=20&wait={FEED_WAIT_MAX}"]


def test_nothing_is_known_before_the_first_good_feed(clock: SetClock) -> None:
    """
    Accepting tokens meanwhile would accept revoked ones after each restart.

    And the wait for it is bounded.
    """

    def no_feed(url: str) -> bytes:
        return document() if url == DOCUMENT_URL else b"<html>"

    changes = a_follower(no_feed, clock, first_load_timeout_s=0.05)
    assert changes.known() is None
    with pytest.raises(IssuerUnavailable) as refused:
        changes.wait_for_first()
    assert int(refused.value.headers["Retry-After"]) >= 1
    changes.close()


def test_all_first_callers_share_one_feed(changes: Changes, issuer: FeedIssuer) -> None:
    """A server that starts under load must not ask once per request."""
    found: list[Known] = []
    callers = [
        threading.Thread(target=lambda: found.append(changes.wait_for_first())) for _ in range(16)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(FOREVER_S)

    assert {known.seq for known in found} == {20}
    assert len(found) == 16
    assert issuer.polls[:1] == ["after=-1&wait=0"]
    assert issuer.urls.count(DOCUMENT_URL) == 1


def test_news_arrives_by_itself(changes: Changes, issuer: FeedIssuer) -> None:
    """Nobody has to ask: the thread is there from the first request on."""
    changes.wait_for_first()
    issuer.narrow("key_1")

    eventually(lambda: subject("key_1") in (changes.known() or changes.wait_for_first()).entries)


FAILURES: dict[str, Callable[[FeedIssuer], None]] = {
    "away": lambda issuer: setattr(issuer, "failure", OSError("secret.example")),
    "a bug": lambda issuer: setattr(issuer, "failure", RuntimeError()),
    "no memory": lambda issuer: setattr(issuer, "failure", MemoryError()),
    "replayed": lambda issuer: issuer.say(seq=19),
    "signed by a stranger": lambda issuer: setattr(issuer, "signed_by", "stranger"),
    "its signer withdrawn": lambda issuer: issuer.say(seq=21, kids=["first"]),
    "another issuer's": lambda issuer: issuer.say(seq=21, iss="https://other.example"),
    "old": lambda issuer: issuer.say(seq=21, exp=NOW - FEED_STALE - LEEWAY_MAX),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_failure_takes_nothing_away(
    changes: Changes, issuer: FeedIssuer, fail: Callable[[FeedIssuer], None]
) -> None:
    """What is known stays known, the status tells the kind, and following goes on."""
    issuer.narrow("key_1")
    changes.step()
    before = changes.known()
    fail(issuer)
    threading.Timer(0.05, issuer.answer_now).start()

    assert changes.step() > 0
    assert changes.known() is before
    error = changes.status().last_error
    assert error
    assert "secret" not in error


def test_after_a_failure_the_document_is_read_again(changes: Changes, issuer: FeedIssuer) -> None:
    """The address or the signing keys may have changed; and a first feed is wanted at once."""
    changes.step()
    issuer.failure = OSError()
    changes.step()
    issuer.failure = None
    assert changes.step() == 0

    assert issuer.urls.count(DOCUMENT_URL) == 2
    assert issuer.polls[-1] == "after=20&wait=0"
    assert changes.status().last_error is None


def test_a_new_signer_is_learned_from_the_document(changes: Changes, issuer: FeedIssuer) -> None:
    """Rotating the feed's signing key costs followers one short pause."""
    changes.step()
    issuer.feed_keys, issuer.signed_by = ("feed", "next"), "next"
    issuer.say(seq=21, kids=["first", "feed", "next"])

    assert 0 < changes.step() <= 1
    assert changes.step() == 0
    known = changes.known()
    assert known is not None
    assert known.seq == 21


def test_a_stolen_feed_key_is_of_no_use_once_it_is_withdrawn(
    changes: Changes, issuer: FeedIssuer
) -> None:
    """The issuer's document no longer names it, and no feed of its successor lists it."""
    changes.step()
    issuer.feed_keys, issuer.signed_by = ("next",), "next"
    issuer.say(seq=21, kids=["first", "next"])
    changes.step()
    changes.step()
    issuer.signed_by = "feed"
    issuer.say(seq=30, kids=["first", "feed"])

    for _ in range(3):
        assert changes.step() > 0
    known = changes.known()
    assert known is not None
    assert known.seq == 21


def test_pauses_grow_up_to_a_bound_and_differ(issuer: FeedIssuer, clock: SetClock) -> None:
    """Thousands of followers that lost their issuer together come back one by one, and soon."""
    issuer.failure = OSError()
    followers = [a_follower(issuer, clock) for _ in range(20)]
    pauses = [[follower.step() for follower in followers] for _ in range(12)]

    assert all(0 < pause <= 5 for row in pauses for pause in row)
    assert max(pauses[0]) <= 0.25
    assert min(pauses[-1]) >= 2.5
    assert all(max(row) - min(row) > 0.1 * max(row) for row in pauses)
    issuer.failure = None
    assert followers[0].step() == 0
    issuer.failure = OSError()
    assert followers[0].step() <= 0.25


def test_status_says_how_far_it_can_be_relied_on(
    changes: Changes, issuer: FeedIssuer, clock: SetClock
) -> None:
    """For health pages: numbers and kinds, no secret."""
    issuer.narrow("key_1")
    changes.step()
    clock.now += FEED_STALE
    on_time = changes.status()
    clock.now += 1
    late = changes.status()

    assert (on_time.state, on_time.age_s, on_time.last_error) == ("fresh", FEED_STALE, None)
    assert (on_time.seq, on_time.entries) == (21, 1)
    assert (late.state, late.age_s) == ("stale", FEED_STALE + 1)


@pytest.mark.parametrize("ahead_s", [-LEEWAY, 0, LEEWAY])
def test_a_clock_within_the_leeway_makes_no_feed_stale(ahead_s: int, clock: SetClock) -> None:
    """
    Feeds come as they should, at their latest: signed ten seconds ago, after a whole poll.

    Tokens are accepted with clocks that differ so much; refusing all of them as stale for some
    seconds of each poll would be an outage that nobody understands.
    """
    own = SetClock(clock.now + ahead_s)
    issuer = FeedIssuer(clock)
    changes = Changes(ISSUER, DOCUMENT_URL, issuer, clock=own, monotonic=own)
    for _ in range(3):
        issuer.say(iat=int(clock.now) - 10)
        issuer.answer_now()
        issuer.say(seq=issuer.seq + 1)
        assert changes.step() == 0
        clock.now += FEED_WAIT_MAX
        own.now += FEED_WAIT_MAX
        assert changes.status().state == "fresh"


def test_closing_ends_the_thread(changes: Changes, issuer: FeedIssuer) -> None:
    """Once its poll was answered; what is known can still be read."""
    changes.wait_for_first()
    thread = changes._thread
    assert thread is not None
    changes.close()
    issuer.answer_now()
    thread.join(FOREVER_S)

    assert not thread.is_alive()
    assert changes.known() is not None


def test_a_pause_ends_when_it_is_closed(clock: SetClock) -> None:
    """A process that ends does not wait for an issuer that is away."""

    def away(url: str) -> bytes:
        raise OSError

    changes = a_follower(away, clock)
    changes.known()
    thread = changes._thread
    assert thread is not None
    eventually(lambda: changes._failures >= 3)
    began = time.monotonic()
    changes.close()
    thread.join(FOREVER_S)

    assert not thread.is_alive()
    assert time.monotonic() - began < 0.5


def test_letting_it_go_ends_the_thread(issuer: FeedIssuer, clock: SetClock) -> None:
    """A verifier that nobody closed must not poll for ever."""
    changes = a_follower(issuer, clock)
    changes.wait_for_first()
    thread, gone = changes._thread, weakref.ref(changes)
    assert thread is not None
    del changes
    for _ in range(3):
        issuer.answer_now()
        thread.join(0.05)
        gc.collect()
    issuer.end()
    thread.join(FOREVER_S)

    assert not thread.is_alive()
    assert gone() is None


def run_forked(program: str) -> None:
    """Run a program that forks, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": ":".join(sys.path)},
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_forked_child_goes_on_by_itself() -> None:
    """gunicorn --preload: the thread stays in the parent, and its lock may be held just then."""
    run_forked("""
        import os, sys
        from support.tokens import NOW, SetClock
        from test_changes import FeedIssuer, a_follower, eventually, subject
        clock = SetClock()
        issuer = FeedIssuer(clock)
        changes = a_follower(issuer, clock)
        changes.wait_for_first()
        with changes._settled:
            child = os.fork()
        if child == 0:
            issuer._news = type(issuer._news)()
            assert changes.wait_for_first().seq == 20
            issuer.narrow("key_1")
            eventually(lambda: subject("key_1") in changes.known().entries)
            os._exit(0)
        issuer.end()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)


def test_a_forked_child_that_was_idle_asks_before_it_answers() -> None:
    """
    Its parent knew of nothing yet, and nobody in the child has followed the feed since.

    A worker's first request may come minutes after the fork: a token that was revoked in between
    would be accepted although the issuer can be reached.
    """
    run_forked("""
        import os, sys
        from coatcheck.verifier import TokenRevoked
        from support.tokens import SetClock
        from test_changes import FeedIssuer, a_token, a_verifier
        clock = SetClock()
        issuer = FeedIssuer(clock)
        verifier = a_verifier(issuer, clock)
        verifier.verify_jwt(a_token())
        child = os.fork()
        if child == 0:
            issuer._news = type(issuer._news)()
            clock.now += 300
            issuer.narrow("key_1")
            try:
                verifier.verify_jwt(a_token(sub="key_1"))
            except TokenRevoked:
                os._exit(0)
            print("accepted", file=sys.stderr, flush=True)
            os._exit(1)
        issuer.end()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)


# --- what the verifier does with it


def a_verifier(fetch: Fetch, clock: SetClock, **settings: Any) -> Verifier:
    return Verifier(ISSUER, AUDIENCE, fetch=fetch, clock=clock, monotonic=clock, **settings)


def a_token(kid: str = "first", **changes: object) -> str:
    return signer(kid=kid).token(claims(**changes))


@pytest.fixture
def verifier(issuer: FeedIssuer, clock: SetClock) -> Iterator[Verifier]:
    with a_verifier(issuer, clock) as verifier:
        yield verifier


def is_known(verifier: Verifier, issuer: FeedIssuer) -> None:
    """Wait until the verifier has heard what the issuer says now."""
    followed = verifier._changes
    assert followed is not None
    eventually(lambda: (known := followed.known()) is not None and known.seq == issuer.seq)


def is_fresh(verifier: Verifier, issuer: FeedIssuer, clock: SetClock) -> None:
    """Let the verifier have a feed that is signed at this moment."""
    followed = verifier._changes
    assert followed is not None

    def heard() -> bool:
        issuer.answer_now()
        known = followed.known()
        return known is not None and known.issued_at == int(clock.now)

    eventually(heard)


def refusal(verifier: Verifier, text: str) -> VerifierError:
    """The error, which both faces have to agree about."""
    with pytest.raises(VerifierError) as of_threads:
        verifier.verify_jwt(text)
    with pytest.raises(VerifierError) as of_loop:
        asyncio.run(verifier.verify_jwt_async(text))
    assert of_threads.value.headers == of_loop.value.headers
    assert of_threads.value.body == of_loop.value.body
    return of_threads.value


def test_a_remembered_token_dies_when_the_feed_says_so(
    verifier: Verifier, issuer: FeedIssuer
) -> None:
    """The signature is checked once; the feed each time."""
    text = a_token()
    who = verifier.verify_jwt(text)
    assert verifier.verify_jwt(text) is who
    issuer.narrow(str(claims()["sub"]))
    is_known(verifier, issuer)

    error = refusal(verifier, text)
    assert isinstance(error, TokenRevoked)
    assert (error.status, error.code, error.error) == (401, "token_revoked", "invalid_token")
    assert verifier.status()["remembered_tokens"] == 0


SUBJECTS: dict[str, str] = {
    "its API key": str(claims()["sub"]),
    "its organization": str(claims()["org_id"]),
    "its project": "prj_1",
    "its group": "grp_1",
    "the token itself": str(claims()["jti"]),
    "its signing key": "first",
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("narrowed", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("is_remembered", [True, False], ids=["seen before", "new here"])
def test_a_token_is_dead_if_any_of_its_subjects_is(
    verifier: Verifier, issuer: FeedIssuer, narrowed: str, is_remembered: bool
) -> None:
    """Whatever it hangs on; and what was issued after it is not concerned."""
    text = a_token(project_id="prj_1", group="grp_1")
    if is_remembered:
        verifier.verify_jwt(text)
    issuer.narrow(narrowed)
    is_known(verifier, issuer) if is_remembered else None

    assert refusal(verifier, text).code == "token_revoked"
    as_of = issuer.seq
    assert verifier.verify_jwt(a_token(project_id="prj_1", group="grp_1", as_of=as_of))
    earlier = a_token(project_id="prj_1", group="grp_1", as_of=as_of - 1)
    assert refusal(verifier, earlier).code == "token_revoked"


def test_what_does_not_concern_a_token_leaves_it_alone(
    verifier: Verifier, issuer: FeedIssuer
) -> None:
    """An id of another kind that reads alike is another subject."""
    verifier.verify_jwt(a_token())
    for other in ("key_2", str(claims()["sub"])[:-1], "", "widgets:read", AUDIENCE, ISSUER):
        issuer.narrow(other)
    is_known(verifier, issuer)

    assert verifier.verify_jwt(a_token())


@pytest.mark.parametrize("is_remembered", [True, False], ids=["seen before", "new here"])
def test_a_signing_key_that_is_not_listed_is_dead(
    verifier: Verifier, issuer: FeedIssuer, is_remembered: bool
) -> None:
    """The key set may be cached for a day while the issuer is away; the feed says it now."""
    text = a_token()
    verifier.verify_jwt(text if is_remembered else a_token(jti="another"))
    issuer.say(seq=21, kids=["feed", "second"])
    is_known(verifier, issuer)

    assert isinstance(refusal(verifier, text), UnknownSigningKey)


def test_a_feed_that_is_older_than_the_token_cannot_know_its_signing_key(
    verifier: Verifier, issuer: FeedIssuer
) -> None:
    """
    Rotated at once: the first tokens of the new signing key arrive before the feed does.

    What a token was issued at is above what the feed has seen; as soon as the feed has seen it,
    the signing key has to be listed.
    """
    issuer.token_keys = ("first", "second")
    text = a_token("second", as_of=21)
    assert verifier.verify_jwt(text)
    assert verifier.verify_jwt(text)

    issuer.say(seq=21)
    is_known(verifier, issuer)
    assert isinstance(refusal(verifier, text), UnknownSigningKey)
    issuer.say(seq=22, kids=["first", "second", "feed"])
    is_known(verifier, issuer)
    assert verifier.verify_jwt(text)


NOT_OURS: dict[str, dict[str, Any]] = {
    "no org_id": {"org_id": ABSENT},
    "no env": {"env": ABSENT},
    "no as_of": {"as_of": ABSENT},
    "as_of text": {"as_of": "17"},
    "as_of true": {"as_of": True},
    "as_of with a fraction": {"as_of": 17.0},
    "as_of null": {"as_of": None},
}


@pytest.mark.parametrize("said", NOT_OURS.values(), ids=NOT_OURS)
def test_the_claims_of_our_issuer_are_required_when_its_feed_is_followed(
    verifier: Verifier, issuer: FeedIssuer, clock: SetClock, said: dict[str, Any]
) -> None:
    """Without them the feed could never kill the token; another issuer's have none of them."""
    text = a_token(**said)

    assert isinstance(refusal(verifier, text), TokenMalformed)
    with a_verifier(issuer, clock, feed=None) as alone:
        assert alone.verify_jwt(text)


def test_without_a_feed_nothing_but_the_key_set_is_fetched(
    issuer: FeedIssuer, clock: SetClock
) -> None:
    """For issuers that have none; the setting says it, and never a failure."""
    issuer.narrow(EVERYTHING)
    with a_verifier(issuer, clock, feed=None) as verifier:
        assert verifier.verify_jwt(a_token())
        assert verifier.status()["feed"] is None
        clock.now += FEED_STALE + 1
        assert verifier.verify_jwt(a_token())

    assert issuer.urls == [KEY_SET_URL]


def test_before_the_first_feed_the_answer_is_503(
    verifier: Verifier, issuer: FeedIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never 401, and never yes: a restart is when an issuer and its verifiers meet anew."""
    monkeypatch.setattr(verifier._changes, "_first_load_timeout_s", 0.05)
    issuer.say(kids=[])

    error = refusal(verifier, a_token())

    assert isinstance(error, IssuerUnavailable)
    assert (error.status, error.challenge) == (503, None)
    issuer.say(kids=["first", "feed"])
    monkeypatch.setattr(verifier._changes, "_first_load_timeout_s", FOREVER_S)
    assert verifier.verify_jwt(a_token())


def test_waiting_for_the_first_feed_does_not_block_the_event_loop(clock: SetClock) -> None:
    """While the issuer is slow the loop serves others."""
    is_asked, may_answer = threading.Event(), threading.Event()
    issuer = FeedIssuer(clock)

    def slow(url: str) -> bytes:
        is_asked.set()
        assert may_answer.wait(FOREVER_S)
        return issuer(url)

    async def serve(verifier: Verifier) -> int:
        waiting = [
            asyncio.ensure_future(verifier.verify_jwt_async(a_token(jti=str(number))))
            for number in range(10)
        ]
        # Only a loop that still turns gets behind this line.
        await asyncio.to_thread(is_asked.wait, FOREVER_S)
        may_answer.set()
        return len([await one for one in waiting])

    with a_verifier(slow, clock) as verifier:
        assert asyncio.run(serve(verifier)) == 10
    issuer.end()


def test_a_stale_feed_is_accepted_and_reported(
    verifier: Verifier, issuer: FeedIssuer, clock: SetClock
) -> None:
    """The default: an outage of the issuer is none of the API, and `exp` still ends each token."""
    text = a_token()
    verifier.verify_jwt(text)
    clock.now += FEED_STALE + 1

    assert verifier.verify_jwt(text)
    assert verifier.verify_jwt(a_token(jti="another"))
    status: Any = verifier.status()["feed"]
    assert status["state"] == "stale"
    clock.now = NOW + 600 + LEEWAY
    assert refusal(verifier, text).code == "token_expired"


def test_a_stale_feed_is_refused_where_that_was_asked_for(
    issuer: FeedIssuer, clock: SetClock
) -> None:
    """503 and not 401: the same token is good again as soon as the issuer is heard of."""
    text = a_token()
    with a_verifier(issuer, clock, on_stale_feed="refuse") as verifier:
        verifier.verify_jwt(text)
        clock.now += FEED_STALE
        assert verifier.verify_jwt(text)
        clock.now += 1

        for one in (text, a_token(jti="another")):
            error = refusal(verifier, one)
            assert isinstance(error, StaleFeed)
            assert (error.status, error.challenge) == (503, None)
            assert int(error.headers["Retry-After"]) >= 1
        # What is no good token is told as ever.
        assert refusal(verifier, a_token(aud="https://other.example")).code == "wrong_audience"

        is_fresh(verifier, issuer, clock)
        assert verifier.verify_jwt(text)


def test_a_feed_that_is_handed_out_again_is_no_sign_of_life(
    issuer: FeedIssuer, clock: SetClock
) -> None:
    """Somebody on the way repeats the last one, to hide a revocation behind it."""
    with a_verifier(issuer, clock, on_stale_feed="refuse") as verifier:
        verifier.verify_jwt(a_token())
        issuer.say(iat=NOW)
        for _ in range(5):
            clock.now += FEED_STALE / 4
            issuer.answer_now()
            time.sleep(0.02)

        assert isinstance(refusal(verifier, a_token()), StaleFeed)


def test_a_token_is_never_taken_for_a_feed_nor_a_feed_for_a_token(
    verifier: Verifier, clock: SetClock
) -> None:
    """RFC 8725 §3.11 and §3.12: type, signing key and audience each keep them apart."""
    with pytest.raises(UnfitFeed):
        reading(a_token())
    assert refusal(verifier, a_feed()).code == "wrong_type"
    # Also if only one of the three were left: a feed key's signature under a token's type.
    text = signer(kid="feed").token(claims())
    assert isinstance(refusal(verifier, text), UnknownSigningKey)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another feed": ({"feed": "https://auth.example.com/oauth/revocations"}, "feed"),
    "feed false": ({"feed": False}, "feed"),
    "another policy": ({"on_stale_feed": "ignore"}, "on_stale_feed"),
    "policy absent": ({"on_stale_feed": None}, "on_stale_feed"),
    "plain http": (
        {"issuer": "http://auth.example.com", "jwks_url": "https://auth.example.com/jwks"},
        "https|feed",
    ),
    "an issuer that is no URL": (
        {"issuer": "accounts.example.com", "jwks_url": "https://auth.example.com/jwks"},
        "http|feed",
    ),
}


@pytest.mark.parametrize(("settings", "word"), UNFIT.values(), ids=UNFIT)
def test_a_feed_that_can_never_be_followed_is_told_at_the_start(
    settings: dict[str, Any], word: str
) -> None:
    """Otherwise every request would be answered with 503, for ever."""
    with pytest.raises(ValueError, match=word):
        Verifier(**{"issuer": ISSUER, "audience": AUDIENCE, **settings})
