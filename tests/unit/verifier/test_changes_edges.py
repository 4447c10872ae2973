"""Where following a feed begins and ends: every limit from both sides, every kind of failure.

`test_changes` tells the story; here are the numbers of the contract instead of ours, so that a
check that moves by one is noticed.
"""

import asyncio
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coatcheck import feed_profile
from coatcheck.verifier import (
    IssuerUnavailable,
    TokenRevoked,
    UnknownSigningKey,
    Verifier,
    keyset,
)
from coatcheck.verifier import changes as module
from coatcheck.verifier.changes import (
    Changes,
    ChangesStatus,
    Known,
    Signed,
    UnfitFeed,
    check_vouched,
    merge,
    read,
    read_source,
    subjects_of,
)
from coatcheck.verifier.check import Expected, SignedClaims, check_signed
from support.tokens import (
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
#: Contract: twice the lifetime of a token.
WINDOW = 1200.0
#: Seconds; longer than any test takes.
FOREVER_S = 10.0


def document(**changes: object) -> bytes:
    keys = {"keys": [signer(kid="feed").jwk()]}
    ordinary = {"issuer": ISSUER, "revocations_endpoint": FEED_URL, "revocation_keys": keys}
    return as_json(changed(ordinary, changes))


def a_feed(signed_by: str = "feed", **said: object) -> bytes:
    ordinary = {
        "iss": ISSUER,
        "aud": FEED_URL,
        "iat": NOW,
        "exp": NOW + 40,
        "log": "log_1",
        "seq": 20,
        "entries": {},
        "kids": ["first", "feed"],
    }
    claims = changed(ordinary, said)
    return signer(kid=signed_by).token(claims, typ="revocations+jwt").encode()


SOURCE = read_source(document(), ISSUER)


# Kinds: status pages and alarms are made of them.

NO_DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"<html>", "no_document"),
    "a list": (b"[]", "no_document"),
    "another issuer": (document(issuer="https://other.example"), "other_issuer"),
    "no address": (document(revocations_endpoint=None), "other_issuer"),
    "no keys": (document(revocation_keys=None), "no_feed_keys"),
    "keys in a list": (document(revocation_keys=[]), "no_feed_keys"),
}


@pytest.mark.parametrize(("body", "kind"), NO_DOCUMENTS.values(), ids=NO_DOCUMENTS)
def test_what_is_wrong_with_a_document_is_told_by_its_kind(body: bytes, kind: str) -> None:
    """An operator has to find out which machine answers there."""
    with pytest.raises(UnfitFeed) as refused:
        read_source(body, ISSUER)

    assert refused.value.kind == str(refused.value) == kind


def test_a_stranger_who_signs_a_feed_is_told_by_its_kind() -> None:
    """In a log as on a status page; the keys are looked up anew then."""
    with pytest.raises(UnfitFeed) as refused:
        read(a_feed("stranger"), SOURCE, ISSUER, NOW)

    assert refused.value.kind == str(refused.value) == "unknown_feed_key"


def test_a_feed_has_at_most_365_909_characters() -> None:
    """256 KiB of entries in base64, and what stands around them."""
    for length, kind in ((365_909, "no_jws"), (365_910, "too_long")):
        with pytest.raises(UnfitFeed) as refused:
            read(b"a" * length, SOURCE, ISSUER, NOW)
        assert refused.value.kind == kind


def test_a_feed_has_at_most_100_arrays_and_objects() -> None:
    """A feed has three; more is for a newer issuer, and too many are for nobody."""
    assert read(a_feed(x=[[]] * 96), SOURCE, ISSUER, NOW)
    with pytest.raises(UnfitFeed):
        read(a_feed(x=[[]] * 97), SOURCE, ISSUER, NOW)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"iat": NOW + 60}, None),
        ({"iat": NOW + 61}, "expired"),
        ({"exp": NOW - 59}, None),
        ({"exp": NOW - 60}, "expired"),
        ({"entries": {"a": 20}}, None),
        ({"entries": {"a": 21}}, "malformed"),
        ({"entries": {"a": 1, "b": 21}}, "malformed"),
        ({"entries": {"a": 1, "b": "2"}}, "malformed"),
        ({"kids": ["feed", None]}, "malformed"),
    ],
)
def test_a_feed_is_good_up_to_its_limits(said: dict[str, Any], kind: str | None) -> None:
    """A minute is granted to both clocks; no entry is ahead of the feed that names it."""
    if kind is None:
        assert read(a_feed(**said), SOURCE, ISSUER, NOW)
        return
    with pytest.raises(UnfitFeed) as refused:
        read(a_feed(**said), SOURCE, ISSUER, NOW)
    assert refused.value.kind == kind


# What is known


def signed(seq: int = 20, entries: dict[str, int] | None = None, **more: Any) -> Signed:
    ordinary = {"log": "log_1", "kids": frozenset({"feed", "first"}), "issued_at": NOW}
    return Signed(seq=seq, entries=entries or {}, **{**ordinary, **more})


def test_an_entry_that_is_only_said_again_does_not_live_longer() -> None:
    """Each feed of a window repeats it; otherwise nothing would ever be forgotten."""
    known = merge(None, signed(20, {"a": 18}), 0.0)
    known = merge(known, signed(20, {"a": 18}), WINDOW - 1)
    assert known.arrived_at == {"a": 0.0}

    assert merge(known, signed(20), WINDOW - 0.001).entries == {"a": 18}
    assert merge(known, signed(20), WINDOW).entries == {}


def test_the_first_entries_of_a_log_count() -> None:
    """Positions begin at the bottom."""
    known = merge(None, signed(1, {"a": 0, "b": 1}), 0.0)

    assert known.entries == {"a": 0, "b": 1}


def test_what_is_known_is_what_the_last_feed_said_and_when_the_freshest_was_signed() -> None:
    """Nothing else: status pages and the policy for stale feeds rely on each of them."""
    known = merge(None, signed(20, {"a": 18}), 5.0)
    assert known.kids == {"feed", "first"}
    assert known == Known("log_1", 20, {"a": 18}, {"a": 5.0}, known.kids, NOW, 5.0)

    same = merge(known, signed(21, issued_at=NOW), 9.0)
    assert (same.seq, same.issued_at, same.fresh_at) == (21, NOW, 5.0)
    newer = merge(known, signed(20, issued_at=NOW + 1), 9.0)
    assert (newer.issued_at, newer.fresh_at) == (NOW + 1, 9.0)


# What it means for a token


@pytest.mark.parametrize("of", ["key_0FvQ2uWwXk3sT1bL9cZp4E", "*", "", "\u00e9"])
def test_a_subject_is_96_bits_of_a_digest(of: str) -> None:
    """Contract: base64url(SHA-256(id))[:16], as a follower in any language works it out."""
    digest = hashlib.sha256(of.encode()).digest()[:12]

    assert feed_profile.subject(of) == base64url(digest)
    assert len(feed_profile.subject(of)) == 16


def test_the_words_and_limits_of_a_feed_are_the_contracts() -> None:
    """Both sides, and other people's followers, rely on them."""
    assert (feed_profile.TYPE, feed_profile.EVERYTHING) == ("revocations+jwt", "*")
    assert (feed_profile.MOST_TOKENS, feed_profile.MOST_API_KEYS) == (16, 1000)
    assert feed_profile.MAX_ENTRIES_BYTES == 262_144


def test_a_token_hangs_on_all_of_its_subjects() -> None:
    """Its API key, organization, project, group, signing key, `jti`, and everything."""
    about = subjects_of(vouched(17, sub="a", org_id="b", project_id="c", group="d", jti="e"))

    assert set(about) == {
        feed_profile.subject(of) for of in ("a", "b", "c", "d", "e", "first", "*")
    }
    assert subjects_of(vouched(17)) == subjects_of(vouched(18))


def test_what_a_token_hangs_on_is_worked_out_once_and_only_if_something_is_named() -> None:
    """A feed is almost always empty, and a digest for each claim would be paid for nothing."""
    token = vouched(17)
    check_vouched(token, merge(None, signed(20), 0.0))
    assert not token.subjects

    check_vouched(token, merge(None, signed(20, {"somebody else": 20}), 0.0))
    assert token.subjects == subjects_of(vouched(17))


def vouched(as_of: int, **changes: object) -> SignedClaims:
    """A verified token."""
    expected = Expected(
        issuer=ISSUER,
        audiences=(),
        types=frozenset({"at+jwt"}),
        algorithms=frozenset({"ES256"}),
        leeway_s=0,
    )
    by = signer()
    token = by.token(claims(as_of=as_of, **changes))
    return check_signed(token, expected, keyset.parse(as_json({"keys": [by.jwk()]})).get)


def test_a_token_is_dead_if_something_was_narrowed_after_it_was_vouched_for() -> None:
    """To the position: what its issuer had read already is no news."""
    about_me = subjects_of(vouched(17))[0]
    for at, is_dead in ((16, False), (17, False), (18, True)):
        known = merge(None, signed(20, {about_me: at}), 0.0)
        if is_dead:
            with pytest.raises(TokenRevoked):
                check_vouched(vouched(17), known)
        else:
            check_vouched(vouched(17), known)


def test_a_token_of_the_very_beginning_is_not_dead_because_another_one_is() -> None:
    """The first API key of a deployment was read at position 0."""
    check_vouched(vouched(0), merge(None, signed(20, {"somebody else": 20}), 0.0))


@pytest.mark.parametrize(("as_of", "is_dead"), [(19, True), (20, True), (21, False)])
def test_a_feed_knows_every_signing_key_up_to_its_own_position(as_of: int, is_dead: bool) -> None:
    """What was issued later may be signed by a key that came later."""
    known = merge(None, signed(20, kids=frozenset({"feed"})), 0.0)
    if is_dead:
        with pytest.raises(UnknownSigningKey):
            check_vouched(vouched(as_of), known)
    else:
        check_vouched(vouched(as_of), known)


# Following


class Feeds:
    """Stands in for HTTP: answers as told, and counts."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.document: bytes | Exception = document()
        self.feed: bytes | Exception = a_feed()

    def __call__(self, url: str) -> bytes:
        self.urls.append(url)
        answer = self.document if url == DOCUMENT_URL else self.feed
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def feeds() -> Feeds:
    return Feeds()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def follower(feeds: Feeds, clock: SetClock) -> Iterator[Changes]:
    """A follower whose thread has not begun; `step` is what it would do."""
    follower = a_follower(feeds, clock)
    yield follower
    follower.close()


def a_follower(fetch: Callable[[str], bytes], clock: SetClock) -> Changes:
    return Changes(
        ISSUER,
        DOCUMENT_URL,
        fetch,
        clock=clock,
        monotonic=clock,
        first_load_timeout_s=FOREVER_S,
    )


def test_the_status_before_the_first_feed_promises_nothing(follower: Changes, feeds: Feeds) -> None:
    """For health pages, from the first second on."""
    assert follower.status() == ChangesStatus("none", None, None, None, 0, None)

    feeds.document = OSError("secret.example")
    follower.step()
    assert follower.status() == ChangesStatus("none", None, None, None, 0, "OSError")


UNCHANGEABLE = (
    SOURCE,
    ChangesStatus("none", None, None, None, 0, None),
    Known("log_1", 20, {}, {}, frozenset(), NOW, 0.0),
)


@pytest.mark.parametrize("value", UNCHANGEABLE, ids=type)
def test_what_was_read_once_cannot_be_changed_afterwards(value: Any) -> None:
    """Who signs a feed is decided by the issuer's document alone, and readers take no lock."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, "changed")


ERRORS: dict[str, tuple[bytes | Exception, str]] = {
    "away": (OSError(), "OSError"),
    "a page": (b"<html>", "no_jws"),
    "replayed": (a_feed(seq=19), "replayed"),
    "a stranger's": (a_feed("stranger"), "unknown_feed_key"),
    "its signer withdrawn": (a_feed(kids=["first"]), "withdrawn_feed_key"),
    "old": (a_feed(exp=NOW - 60), "expired"),
}


@pytest.mark.parametrize(("answer", "kind"), ERRORS.values(), ids=ERRORS)
def test_what_went_wrong_last_is_told_by_its_kind(
    follower: Changes, feeds: Feeds, answer: bytes | Exception, kind: str
) -> None:
    """And is forgotten with the next good feed."""
    assert follower.step() == 0
    feeds.feed = answer
    assert follower.step() > 0
    assert follower.status().last_error == kind

    feeds.feed = a_feed()
    assert follower.step() == 0
    assert follower.status().last_error is None


def test_pauses_double_from_a_quarter_of_a_second_up_to_five(
    follower: Changes, feeds: Feeds
) -> None:
    """Each of them somewhere in its upper half, so that followers do not come back together."""
    for _ in range(50):
        feeds.feed = OSError()
        for longest in (0.25, 0.5, 1, 2, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5):
            assert longest / 2 <= follower.step() <= longest
        feeds.feed = a_feed()
        assert follower.step() == 0


def test_the_first_caller_goes_on_as_soon_as_the_feed_is_there(feeds: Feeds) -> None:
    """Not when its patience ends."""
    asked, may_answer = threading.Event(), threading.Event()

    def slow(url: str) -> bytes:
        asked.set()
        assert may_answer.wait(FOREVER_S)
        if len(feeds.urls) > 2:
            time.sleep(0.01)  # A long poll.
        return feeds(url)

    follower = a_follower(slow, SetClock())
    found: list[Known] = []
    caller = threading.Thread(target=lambda: found.append(follower.wait_for_first()))
    caller.start()
    assert asked.wait(FOREVER_S)
    time.sleep(0.05)  # So that it waits already.
    may_answer.set()
    caller.join(FOREVER_S / 2)
    follower.close()

    assert [known.seq for known in found] == [20]


def test_whoever_waits_in_vain_is_told_to_come_back_in_a_second() -> None:
    """RFC 9110 §10.2.3.  A verifier tries again at least that often."""

    def away(url: str) -> bytes:
        raise OSError

    follower = Changes(
        ISSUER,
        DOCUMENT_URL,
        away,
        clock=SetClock(),
        monotonic=SetClock(),
        first_load_timeout_s=0.01,
    )
    with pytest.raises(IssuerUnavailable) as refused:
        follower.wait_for_first()
    follower.close()

    assert refused.value.headers["Retry-After"] == "1"


def test_a_feed_is_stale_by_either_clock(feeds: Feeds) -> None:
    """
    40 seconds after it arrived, or 100 after it was signed.

    A machine that slept has a monotonic clock that did, too; and a clock that is set back must
    not make an old feed young.
    """
    clock, monotonic = SetClock(), SetClock(0.0)
    follower = Changes(ISSUER, DOCUMENT_URL, feeds, clock=clock, monotonic=monotonic)
    follower.step()
    known = merge(None, signed(), 0.0)

    for seconds, since_arrival, is_stale in (
        (0, 0, False),
        (100, 40, False),
        (101, 0, True),
        (0, 41, True),
        (-1000, 41, True),
    ):
        clock.now, monotonic.now = NOW + seconds, float(since_arrival)
        assert follower.is_stale(known) is is_stale
        assert follower.status().state == ("stale" if is_stale else "fresh")
    follower.close()


def test_after_a_fork_a_follower_trusts_nothing_until_it_has_asked(
    follower: Changes, feeds: Feeds
) -> None:
    """Minutes may have passed since its parent heard the last feed; what is known is kept."""
    follower.step()
    feeds.feed = OSError()
    module._renew_every()
    assert follower.known() is None
    assert follower.status().seq == 20

    feeds.feed = a_feed(seq=22)
    follower.step()
    known = follower.known()
    assert known is not None
    assert known.seq == 22
    assert f"{FEED_URL}?after=20&wait=0" in feeds.urls


# In a verifier


@pytest.fixture
def verifier(feeds: Feeds, clock: SetClock) -> Iterator[Verifier]:
    def fetch(url: str) -> bytes:
        if url.startswith(FEED_URL):
            time.sleep(0.01)  # A long poll.
        body = feeds(url)
        return key_set() if url.endswith("/jwks.json") else body

    feeds.feed = a_feed(kids=["first", "feed", "listed"])
    with Verifier(ISSUER, AUDIENCE, fetch=fetch, clock=clock, monotonic=clock) as verifier:
        yield verifier


FACES: dict[str, Callable[[Verifier, str], object]] = {
    "threads": lambda verifier, text: verifier.verify_jwt(text),
    "loop": lambda verifier, text: asyncio.run(verifier.verify_jwt_async(text)),
}
in_both_ways = pytest.mark.parametrize("verify", FACES.values(), ids=FACES)


@in_both_ways
def test_only_a_signing_key_that_the_feed_lists_is_asked_for_a_moment_after_the_last(
    verifier: Verifier, feeds: Feeds, clock: SetClock, verify: Callable[[Verifier, str], object]
) -> None:
    """Whoever invents names must not make one request per second out of them."""
    verify(verifier, signer().token(claims()))
    clock.now += 2

    for kid, times in (("invented", 1), ("listed", 2)):
        with pytest.raises(UnknownSigningKey):
            verify(verifier, signer(kid=kid).token(claims()))
        assert feeds.urls.count(f"{ISSUER}/.well-known/jwks.json") == times


@in_both_ways
def test_once_a_feed_is_there_nobody_waits_for_another(
    verifier: Verifier,
    verify: Callable[[Verifier, str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each request would take a lock, and on an event loop a thread."""
    verifier.verify_jwt(signer().token(claims()))
    monkeypatch.setattr(verifier._changes, "wait_for_first", None)
    monkeypatch.setattr(asyncio, "to_thread", None)

    assert verify(verifier, signer().token(claims(jti="another")))
