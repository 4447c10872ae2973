"""The core's promises, held against whatever order things happen in.

`Core` lets hypothesis create, narrow, issue, sign, deliver, replay, lose, restart and restore, in
any order and in the middle of each other, and looks at the promises I1 to I6 after every step.
The parts are the real ones; `world` keeps the book of what is true.

`BROKEN` holds one stand-in for each mistake that the design avoids.  The same promises have to
fail for each of them: what cannot fail proves nothing.

COATCHECK_TEST_MODEL_EXAMPLES is how many stories are tried; each has up to 40 steps.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coatcheck import feed_profile
from coatcheck.durations import FEED_STALE, FEED_WINDOW, LEEWAY_MAX, TOKEN_LIFETIME
from coatcheck.server import feed as feeds
from coatcheck.server.changes import What
from coatcheck.server.issue.exchange import Asked, Issuer
from coatcheck.server.issue.mint import Issued
from coatcheck.server.signing import FEED_ALGORITHM, Purpose, RingKeeper
from coatcheck.server.store import ApiKeyRecord, Found, Narrowing
from coatcheck.verifier.changes import (
    ChangesStatus,
    Known,
    Signed,
    UnfitFeed,
    Vouched,
    check_vouched,
    merge,
    read,
    read_source,
)
from coatcheck.verifier.errors import IssuerUnavailable, UnknownSigningKey
from model.world import (
    DOCUMENT_URL,
    FEED_URL,
    Fetch,
    Meanwhile,
    Parts,
    PausingStore,
    Tell,
    World,
)
from support.deployment import ISSUER

EXAMPLES: Final = int(os.environ.get("COATCHECK_TEST_MODEL_EXAMPLES", "40"))
#: Seconds: how far a verifier's clock may be off.
SKEWS: Final = (-30, 0, 30)

_SETTINGS: Final = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
#: The same stories each time: a broken part that goes unnoticed now and then proves nothing.
_SEARCH: Final = settings(
    _SETTINGS,
    max_examples=300,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    report_multiple_bugs=False,
)

_WHICH: Final = st.integers(0, 5)
_NODES: Final = st.integers(0, 1)
_VERIFIERS: Final = st.integers(0, len(SKEWS) - 1)
_PURPOSES: Final = st.sampled_from(("token", "feed"))
#: Seconds that a write waited for the database, after it had taken the time.
_WAITS: Final = st.sampled_from((0, 0, 1, 2))
_WHILE_ISSUING: Final = st.none() | st.tuples(
    st.integers(0, 3),
    st.sampled_from(
        (
            "disable",
            "blink",
            "revoke",
            "rotate without overlap",
            "rotate with overlap",
            "replace the signing key",
        )
    ),
)
_WHILE_SIGNING: Final = st.none() | st.tuples(
    st.integers(0, 3),
    st.sampled_from(("disable", "blink", "revoke", "replace the signing key")),
)


class Core(RuleBasedStateMachine):
    """Everybody who changes, issues, signs, carries and verifies, in whatever order."""

    parts: ClassVar[Parts] = Parts()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.parts, SKEWS)

    def teardown(self) -> None:
        self.world.close()

    # --- time

    @rule(seconds=st.sampled_from((0.4, 1, 7, 25, 61, 300, 599, 601, 1170, 1201, 3600)))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.now += seconds
        self.world.forget_expired()

    # --- owners and operators

    @rule(expires_in_s=st.sampled_from((None, None, 30, 700)))
    def create(self, expires_in_s: int | None) -> None:
        self.world.create(expires_in_s)

    @rule(which=_WHICH, waited_s=_WAITS)
    def disable(self, which: int, waited_s: int) -> None:
        self.world.disable(_of(self.world.api_keys, which), waited_s)

    @rule(which=_WHICH)
    def enable(self, which: int) -> None:
        self.world.enable(_of(self.world.api_keys, which))

    @rule(which=_WHICH)
    def blink(self, which: int) -> None:
        self.world.blink(_of(self.world.api_keys, which))

    @rule(which=_WHICH, waited_s=_WAITS)
    def revoke(self, which: int, waited_s: int) -> None:
        self.world.revoke(_of(self.world.api_keys, which), waited_s)

    @rule(which=_WHICH, overlap_s=st.sampled_from((0, 60, 600, 3600)), waited_s=_WAITS)
    def rotate(self, which: int, overlap_s: int, waited_s: int) -> None:
        self.world.rotate(_of(self.world.api_keys, which), overlap_s, waited_s)

    @precondition(lambda self: self.world.tokens)
    @rule(which=_WHICH, waited_s=_WAITS)
    def revoke_a_token(self, which: int, waited_s: int) -> None:
        self.world.end_tokens([_of(self.world.tokens, which)], waited_s)

    @rule(node=_NODES, which=_WHICH, count=st.sampled_from((16, 17)))
    def revoke_many_tokens(self, node: int, which: int, count: int) -> None:
        api_key = _of(self.world.api_keys, which)
        tokens = [
            self.world.issue(self.world.nodes[node], api_key, api_key.secrets[-1])
            for _ in range(count)
        ]
        self.world.end_tokens([token for token in tokens if token is not None])

    @rule(count=st.sampled_from((1, 999, 1001)))
    def revoke_strangers(self, count: int) -> None:
        self.world.revoke_strangers(count)

    @rule(purpose=_PURPOSES, at_once=st.booleans(), waited_s=_WAITS)
    def rotate_signing_key(self, purpose: Purpose, at_once: bool, waited_s: int) -> None:
        self.world.rotate_signing_key(purpose, at_once=at_once, waited_s=waited_s)

    @rule(purpose=_PURPOSES, which=_WHICH)
    def withdraw_signing_key(self, purpose: Purpose, which: int) -> None:
        self.world.withdraw_signing_key(purpose, which)

    @rule(purpose=_PURPOSES)
    def replace_signing_key(self, purpose: Purpose) -> None:
        self.world.replace_signing_key(purpose)

    @rule()
    def take_backup(self) -> None:
        self.world.take_backup()

    @precondition(lambda self: self.world.backup)
    @rule()
    def restore(self) -> None:
        self.world.restore()

    @rule(node=_NODES)
    def restart(self, node: int) -> None:
        self.world.restart(node)

    # --- callers

    @rule(
        node=_NODES,
        which=_WHICH,
        secret=st.integers(0, 1),
        slow_s=st.sampled_from((0, 0, 1, 25)),
        meanwhile=_WHILE_ISSUING,
    )
    def issue(self, node: int, which: int, secret: int, slow_s: int, meanwhile: Meanwhile) -> None:
        """A token request; between any two of its reads somebody else may commit."""
        api_key = _of(self.world.api_keys, which)
        chosen = api_key.secrets[max(-len(api_key.secrets), -1 - secret)]
        self.world.issue(
            self.world.nodes[node], api_key, chosen, slow_s=slow_s, meanwhile=meanwhile
        )

    # --- feeds on their way

    @rule(node=_NODES, verifier=_VERIFIERS, meanwhile=_WHILE_SIGNING)
    def deliver(self, node: int, verifier: int, meanwhile: Meanwhile) -> None:
        """What a node signs now is never refused: else a verifier would learn nothing more."""
        feed = self.world.sign_feed(self.world.nodes[node], meanwhile=meanwhile)
        assert self.world.deliver(feed, self.world.verifiers[verifier]) is None

    @rule(node=_NODES)
    def deliver_to_all(self, node: int) -> None:
        feed = self.world.sign_feed(self.world.nodes[node])
        for verifier in self.world.verifiers:
            assert self.world.deliver(feed, verifier) is None

    @rule(node=_NODES, meanwhile=_WHILE_SIGNING)
    def lose(self, node: int, meanwhile: Meanwhile) -> None:
        self.world.sign_feed(self.world.nodes[node], meanwhile=meanwhile)

    @precondition(lambda self: self.world.feeds)
    @rule(age=_WHICH, verifier=_VERIFIERS)
    def deliver_an_old_one(self, age: int, verifier: int) -> None:
        """A copy in a CDN, a replay, or an answer that was overtaken by another."""
        feed = self.world.feeds[max(-len(self.world.feeds), -1 - age)]
        self.world.deliver(feed, self.world.verifiers[verifier])

    @rule(verifier=_VERIFIERS)
    def start_cold(self, verifier: int) -> None:
        self.world.start_cold(verifier)

    # --- the promises

    @invariant()
    def nothing_narrowed_passes_at_whoever_was_told(self) -> None:
        """
        I1: a verifier that merged a feed signed after a narrowing passes no token from before it.

        Nor one of an API key, secret or signing key that is dead by then, whenever it was issued.
        """
        for verifier, token in self.world.accepted():
            told = verifier.told
            for narrowed in self.world.narrowed:
                assert not (
                    narrowed.kills
                    and token.minted < narrowed.moment <= told
                    and narrowed.subject in token.subjects
                )
            dead_since = token.api_key.dead_since
            # A token from before a restore is dead by what the restore wrote.
            assert dead_since is None or dead_since > told
            assert self.world.withdrawn.get(token.kid, told + 1) > told

    @invariant()
    def nothing_good_is_refused(self) -> None:
        """
        I2: a token is refused only for its time, a narrowing since, or the documented bounds.

        The bounds: more than 16 tokens of an API key, more than 1000 API keys.  Whether a
        signing key is known may only be held against a token that the last feed could know.
        """
        for verifier in self.world.verifiers:
            if verifier.known is None:
                continue
            now = self.world.clock.now + verifier.skew_s
            for token in self.world.tokens:
                if now >= token.signed.expires_at or self._may_be_dead(token.began, token.subjects):
                    continue
                refusal = self.world.refusal(verifier, token)
                is_untold = token.minted > verifier.told
                assert refusal is None or (isinstance(refusal, UnknownSigningKey) and is_untold)

    def _may_be_dead(self, began: int, subjects: Sequence[str]) -> bool:
        return any(
            narrowed.moment > began and narrowed.subject in subjects
            for narrowed in self.world.narrowed
        ) or any(moment > began and subject in subjects for subject, moment in self.world.coarse)

    @invariant()
    def no_token_outlives_its_end(self) -> None:
        """I3: not 600 seconds, not its API key, and not its secret once a verifier was told."""
        for token in self.world.tokens:
            expires_at, key_ends_at = token.signed.expires_at, token.api_key.expires_at
            assert token.issued_at < expires_at <= token.issued_at + TOKEN_LIFETIME
            assert key_ends_at is None or expires_at <= key_ends_at
        for verifier, token in self.world.accepted():
            secret = token.secret
            if secret.ends_at is not None and secret.ended <= verifier.told:
                assert token.signed.expires_at <= secret.ends_at

    @invariant()
    def what_a_verifier_knows_never_shrinks_too_soon(self) -> None:
        """I4: its sequence number never goes back, and it keeps what it heard for a window."""
        for verifier in self.world.verifiers:
            assert verifier.seqs == sorted(verifier.seqs)
            known = verifier.known
            for subject, (seq, heard_at) in verifier.heard.items():
                if self.world.clock.now - heard_at < FEED_WINDOW:
                    assert known is not None
                    assert known.entries.get(subject, -1) >= seq

    @invariant()
    def a_window_outlives_every_token(self) -> None:
        """
        I5: once a narrowing has left the feeds, no clock takes a token from before it.

        Not one that is 30 seconds late either, with the most leeway there is: so it is safe to
        drop an entry.
        """
        now = self.world.clock.now
        gone = [one.moment for one in self.world.narrowed if one.at + FEED_WINDOW <= now]
        latest_gone = max(gone, default=-1)
        for token in self.world.tokens:
            if token.minted < latest_gone:
                assert token.signed.expires_at + LEEWAY_MAX <= now + min(SKEWS)

    @invariant()
    def nothing_passes_before_the_first_feed(self) -> None:
        """I6: who was never told anything cannot know what is dead."""
        for verifier, _ in self.world.accepted():
            assert verifier.told >= 0


def test_promises_hold_in_whatever_order_things_happen() -> None:
    """
    A narrowing reaches every token it concerns and no other, through races, replays and losses.

    No example would be found by hand: the order of two reads and one commit decides.
    """
    run_state_machine_as_test(Core, settings=_SETTINGS)


def _of(things: Sequence[Any], which: int) -> Any:
    return things[which % len(things)]


# --- parts with one mistake each


class HeadAfterRecord(PausingStore):
    """Reads the record before the head: the token vouches for changes that nobody looked at."""

    async def find(self, digests: Sequence[bytes]) -> Found:
        self._records.clear()
        found = await super().find(digests)
        return Found(self.head(), found.records)


class NeverForgets(PausingStore):
    """Remembers records although the change log has moved."""

    def __init__(self, database_url: str) -> None:
        super().__init__(database_url)
        self._kept: dict[bytes, ApiKeyRecord] = {}

    async def find(self, digests: Sequence[bytes]) -> Found:
        found = await super().find(digests)
        self._kept = {**found.records, **self._kept}
        return Found(found.as_of, self._kept)


class ForgetsTheOverlap(Issuer):
    """Lets a token run on when the replaced secret it was made from no longer works."""

    def issue(self, record: ApiKeyRecord, asked: Asked, *, now: int, as_of: int) -> Issued:
        return super().issue(replace(record, secret_expires_at=None), asked, now=now, as_of=as_of)


class HandMadeFeed:
    """A feed like the real one, built afresh each time, so that one step can be wrong."""

    def __init__(self, issuer: str, store: PausingStore, ring: RingKeeper, clock: Tell) -> None:
        self._issuer, self.store, self._ring, self.clock = issuer, store, ring, clock
        self._log = store.log()

    def read(self) -> tuple[int, list[Narrowing]]:
        """The head, and what was narrowed up to it."""
        head = self.store.head()
        rows = self.store.narrowings(-1, int(self.clock()) - FEED_WINDOW)
        return head, [row for row in rows if row.seq <= head]

    def entries(self, rows: Iterable[Narrowing]) -> dict[str, int]:
        return feeds.entries(rows)

    async def get(self, after: int, wait_s: float) -> bytes:
        now = int(self.clock())
        head, rows = self.read()
        ring = self._ring.at(head)
        signer = ring.signer(FEED_ALGORITHM, now, "feed")
        claims = {
            "iss": self._issuer,
            "aud": FEED_URL,
            "iat": now,
            "exp": now + FEED_STALE,
            "log": self._log,
            "seq": head,
            "entries": self.entries(rows),
            "kids": [key.kid for key in ring.published(now, purpose=None)],
        }
        return signer.sign(feed_profile.TYPE, as_json(claims))


class ReadsRowsFirst(HandMadeFeed):
    """Reads what is new before the head, and from there on only what is above that head."""

    def __init__(self, issuer: str, store: PausingStore, ring: RingKeeper, clock: Tell) -> None:
        super().__init__(issuer, store, ring, clock)
        self._head = -1
        self._rows: list[Narrowing] = []

    def read(self) -> tuple[int, list[Narrowing]]:
        self._rows += self.store.narrowings(self._head, 0)
        self._head = self.store.head()
        return self._head, [row for row in self._rows if row.at >= self.clock() - FEED_WINDOW]


class DropsTheRest(HandMadeFeed):
    """Keeps to the bounds by leaving entries out instead of raising the wider subject."""

    def entries(self, rows: Iterable[Narrowing]) -> dict[str, int]:
        told: dict[str, dict[str, int]] = {}
        for row in rows:
            most = (
                feed_profile.MOST_TOKENS
                if row.what == What.TOKEN_REVOKED.text
                else feed_profile.MOST_API_KEYS
            )
            group = told.setdefault(row.wider, {})
            if len(group) < most:
                group[feed_profile.subject(row.subject)] = row.seq
        return {subject: seq for group in told.values() for subject, seq in group.items()}


class ShortMemory(HandMadeFeed):
    """Drops an entry after half a token's life."""

    def entries(self, rows: Iterable[Narrowing]) -> dict[str, int]:
        oldest = self.clock() - TOKEN_LIFETIME / 2
        return super().entries(row for row in rows if row.at >= oldest)


class HandMadeFollower:
    """A follower like the real one, with a `merge` of one's own."""

    def __init__(self, merging: "Merge", fetch: Fetch, clock: Tell, monotonic: Tell) -> None:
        self._merge, self._fetch = merging, fetch
        self._clock, self._monotonic = clock, monotonic
        self._known: Known | None = None
        self._error: str | None = None

    def step(self) -> None:
        try:
            source = read_source(self._fetch(DOCUMENT_URL), ISSUER)
            signed = read(self._fetch(source.url), source, ISSUER, self._clock())
            self._known = self._merge(self._known, signed, self._monotonic())
            self._error = None
        except UnfitFeed as failure:
            self._error = failure.kind

    def wait_for_first(self) -> Known:
        if self._known is None:
            raise IssuerUnavailable(1)
        return self._known

    def status(self) -> ChangesStatus:
        return ChangesStatus("none", None, None, 0, self._error)


class Trusting(HandMadeFollower):
    """Starts with an empty feed, as if that had been told."""

    def wait_for_first(self) -> Known:
        return self._known or Known("", 2**62, {}, {}, _AnyKid(), 0, 0)


class _AnyKid(frozenset[str]):
    def __contains__(self, kid: object) -> bool:
        return True


Merge = Callable[[Known | None, Signed, float], Known]


def merge_by_replacing(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Believes the last feed alone."""
    merged = merge(known, signed, arrived_at)
    return merged._replace(
        entries=dict(signed.entries), arrived_at=dict.fromkeys(signed.entries, arrived_at)
    )


def merge_a_replay(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Takes whatever is signed, however old."""
    return merge(known and known._replace(seq=-1, log=""), signed, arrived_at)


def merge_and_forget(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Counts an entry's half of a token's life from when it first came, and never again."""
    merged = merge(known and known._replace(entries={}, arrived_at={}), signed, arrived_at)
    first: dict[str, float] = dict(known.arrived_at if known else {})
    for subject in signed.entries:
        first.setdefault(subject, arrived_at)
    young = {
        subject: seq
        for subject, seq in signed.entries.items()
        if arrived_at - first[subject] < TOKEN_LIFETIME / 2
    }
    return merged._replace(entries=young, arrived_at=first)


def check_too_much(vouched: Vouched, known: Known) -> None:
    """Holds against a token what its issuer had already read."""
    check_vouched(vouched._replace(as_of=vouched.as_of - 1), known)


def check_the_api_key_alone(vouched: Vouched, known: Known) -> None:
    """Looks at the first subject only."""
    check_vouched(vouched._replace(subjects=vouched.subjects[:1]), known)


def with_merge(merging: Merge) -> Parts:
    return Parts(follow=lambda *arguments: HandMadeFollower(merging, *arguments))


#: Each with the promise that it breaks.
BROKEN: Final = {
    "head after record": Parts(store=HeadAfterRecord),
    "records kept": Parts(store=NeverForgets),
    "overlap forgotten": Parts(issuer=ForgetsTheOverlap),
    "rows before head": Parts(feed=ReadsRowsFirst),
    "bounds without a wider subject": Parts(feed=DropsTheRest),
    "a short window": Parts(feed=ShortMemory),
    "replacing merge": with_merge(merge_by_replacing),
    "replay accepted": with_merge(merge_a_replay),
    "forgetful merge": with_merge(merge_and_forget),
    "trust before the first feed": Parts(follow=lambda *those: Trusting(merge, *those)),
    "too much held against": Parts(check=check_too_much),
    "one subject looked at": Parts(check=check_the_api_key_alone),
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_a_broken_part_is_found_out(parts: Parts) -> None:
    """What cannot fail proves nothing: each of these mistakes breaks some promise above."""
    broken = type("Broken", (Core,), {"parts": parts})

    with pytest.raises(AssertionError):
        run_state_machine_as_test(broken, settings=_SEARCH)


def test_hand_made_parts_without_a_mistake_keep_the_promises() -> None:
    """Else the broken parts would be found out for being made by hand."""
    whole = replace(with_merge(merge), feed=HandMadeFeed)
    by_hand = type("ByHand", (Core,), {"parts": whole})

    run_state_machine_as_test(by_hand, settings=settings(_SETTINGS, max_examples=EXAMPLES // 2))


def as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
