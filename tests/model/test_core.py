"""The core's promises, held against whatever order things happen in.

`Core` lets hypothesis create, narrow, issue, sign, deliver, replay, lose, restart and restore, in
any order and in the middle of each other, and looks at the promises I1 to I6 after every step.
The parts are the real ones; `world` keeps the book of what is true.

`BROKEN` holds one stand-in for each mistake that the design avoids.  The same promises have to
fail for each of them: what cannot fail proves nothing.

COATCHECK_TEST_MODEL_EXAMPLES is how many stories are tried; each has up to 40 steps.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import jwt
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
from coatcheck.feed_profile import MOST_TOKENS
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
    check_vouched,
    merge,
    read,
    read_source,
    subjects_of,
)
from coatcheck.verifier.check import SignedClaims
from coatcheck.verifier.errors import (
    IssuerUnavailable,
    UnknownSigningKey,
    VerifierError,
)
from model.world import (
    DOCUMENT_URL,
    FEED_URL,
    ApiKey,
    Fetch,
    Meanwhile,
    Parts,
    PausingStore,
    Tell,
    Token,
    Verifier,
    World,
)
from support.deployment import ISSUER

EXAMPLES: Final = int(os.environ.get("COATCHECK_TEST_MODEL_EXAMPLES", "40"))
#: Seconds: how far a verifier's clock may be off.
SKEWS: Final = (-30, 0, 30)
MOST_API_KEYS: Final = 2
MOST_RESTORES: Final = 1

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

_KEYS: Final = st.integers(0, 1)
_NODES: Final = st.integers(0, 1)
_VERIFIERS: Final = st.sampled_from(((0, 1, 2), (0,), (1,), (2,)))
#: Seconds that a write waited for the database, after it had taken the time.
_WAITS: Final = st.sampled_from((0, 0, 1, 2))
#: Somebody commits in the middle of something: after how many pauses, and what.
_WHILE_ISSUING: Final = st.tuples(
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
_WHILE_SIGNING: Final = st.tuples(
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

    @rule(seconds=st.sampled_from((0.4, 1, 7, 25, 61, 300, 300, 590, 1170, 1201, 3600)))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.now += seconds
        self.world.forget_expired()

    # --- owners and operators

    @precondition(lambda self: len(self.world.living_api_keys) < MOST_API_KEYS)
    @rule(expires_in_s=st.sampled_from((None, 30, 700)))
    def create(self, expires_in_s: int | None) -> None:
        self.world.create(expires_in_s)

    @rule(
        which=_KEYS,
        narrow=st.sampled_from((World.disable, World.disable, World.revoke)),
        waited_s=_WAITS,
    )
    def narrow(
        self, which: int, narrow: Callable[[World, ApiKey, int], None], waited_s: int
    ) -> None:
        narrow(self.world, self.living(which), waited_s)

    @rule(which=_KEYS, change=st.sampled_from((World.enable, World.blink)))
    def enable(self, which: int, change: Callable[[World, ApiKey], None]) -> None:
        change(self.world, self.api_key(which))

    @rule(which=_KEYS, overlap_s=st.sampled_from((0, 60, 300, 600, 3600)), waited_s=_WAITS)
    def rotate(self, which: int, overlap_s: int, waited_s: int) -> None:
        self.world.rotate(self.living(which), overlap_s, waited_s)

    @precondition(lambda self: self.world.tokens)
    @rule(which=st.integers(0, 5), waited_s=_WAITS)
    def revoke_a_token(self, which: int, waited_s: int) -> None:
        tokens = self.world.tokens
        self.world.end_tokens([tokens[which % len(tokens)]], waited_s)

    @rule(which=_KEYS, count=st.sampled_from((MOST_TOKENS, MOST_TOKENS + 1)))
    def revoke_many_tokens(self, which: int, count: int) -> None:
        api_key, node = self.living(which), self.world.nodes[0]
        tokens = [self.world.issue(node, api_key, api_key.secrets[-1]) for _ in range(count)]
        self.world.end_tokens([token for token in tokens if token is not None])

    @rule(count=st.sampled_from((1, 998, 1001)))
    def revoke_strangers(self, count: int) -> None:
        self.world.revoke_strangers(count)

    @rule(
        purpose=st.sampled_from(("token", "feed")),
        how=st.sampled_from(("rotate", "rotate now", "withdraw", "replace")),
        which=st.integers(0, 2),
    )
    def change_signing_keys(self, purpose: Purpose, how: str, which: int) -> None:
        match how:
            case "rotate" | "rotate now":
                self.world.rotate_signing_key(purpose, at_once=how == "rotate now", waited_s=which)
            case "withdraw":
                self.world.withdraw_signing_key(purpose, which)
            case "replace":
                self.world.replace_signing_key(purpose)

    @precondition(lambda self: self.world.backup is None and self.world.restores < MOST_RESTORES)
    @rule()
    def take_backup(self) -> None:
        self.world.take_backup()

    @precondition(lambda self: self.world.backup)
    @rule()
    def restore(self) -> None:
        self.world.restore()

    @rule(node=_NODES, verifier=st.none() | st.integers(0, len(SKEWS) - 1))
    def restart(self, node: int, verifier: int | None) -> None:
        """A process ends, and another one starts that knows nothing."""
        if verifier is None:
            self.world.restart(node)
        else:
            self.world.start_cold(verifier)

    # --- callers

    @rule(node=_NODES, which=_KEYS, secret=st.integers(0, 1), slow_s=st.sampled_from((0, 1, 25)))
    def issue(self, node: int, which: int, secret: int, slow_s: int) -> None:
        api_key = self.api_key(which)
        chosen = api_key.secrets[max(-len(api_key.secrets), -1 - secret)]
        self.world.issue(self.world.nodes[node], api_key, chosen, slow_s=slow_s)

    @rule(node=_NODES, which=_KEYS, meanwhile=_WHILE_ISSUING)
    def issue_in_a_race(self, node: int, which: int, meanwhile: Meanwhile) -> None:
        """Between any two reads of a token request somebody else may commit."""
        api_key = self.living(which)
        self.world.issue(self.world.nodes[node], api_key, api_key.secrets[-1], meanwhile=meanwhile)

    # --- feeds on their way

    @rule(node=_NODES, verifiers=_VERIFIERS)
    def deliver(self, node: int, verifiers: Sequence[int]) -> None:
        """What is signed now is never refused, or a verifier would learn nothing more."""
        self.deliver_in_a_race(node, verifiers, None)

    @rule(node=_NODES, verifiers=_VERIFIERS | st.just(()), meanwhile=_WHILE_SIGNING)
    def deliver_in_a_race(self, node: int, verifiers: Sequence[int], meanwhile: Meanwhile) -> None:
        """As `deliver`, and somebody commits while it is signed.  To nobody: it is lost."""
        feed = self.world.sign_feed(self.world.nodes[node], meanwhile=meanwhile)
        for verifier in verifiers:
            error = self.world.deliver(feed, self.world.verifiers[verifier])
            assert error is None, "I2: a feed of now"

    @precondition(lambda self: self.world.feeds)
    @rule(age=st.integers(0, 5), verifiers=_VERIFIERS)
    def deliver_an_old_one(self, age: int, verifiers: Sequence[int]) -> None:
        """A copy in a CDN, a replay, or an answer that was overtaken by another."""
        feed = self.world.feeds[max(-len(self.world.feeds), -1 - age)]
        for verifier in verifiers:
            self.world.deliver(feed, self.world.verifiers[verifier])

    def api_key(self, which: int) -> ApiKey:
        """One of the last few; nothing happens any more to those before them."""
        few = self.world.api_keys[-MOST_API_KEYS:]
        return few[which % len(few)]

    def living(self, which: int) -> ApiKey:
        """One that is alive, if there is one."""
        living = self.world.living_api_keys
        return living[which % len(living)] if living else self.api_key(which)

    # --- the promises

    @invariant()
    def promises_hold(self) -> None:
        self.every_token_ends_in_time()
        self.a_window_outlives_every_token()
        for verifier in self.world.verifiers:
            known = verifier.known
            self.what_is_known_never_shrinks_too_soon(verifier, known)
            for token in self.world.tokens:
                refusal = self.world.refusal(verifier, token, known)
                if refusal is None:
                    self.nothing_passes_before_the_first_feed(verifier)
                    self.nothing_narrowed_passes_at_whoever_was_told(verifier, token)
                    self.no_token_outlives_its_secret(verifier, token)
                elif known is not None:
                    self.nothing_good_is_refused(verifier, token, refusal)

    def nothing_narrowed_passes_at_whoever_was_told(self, by: Verifier, token: Token) -> None:
        """I1: a verifier that merged a feed signed after a narrowing passes no token before it.

        Nor one of an API key or signing key that is dead by then, whenever it was issued.
        """
        for narrowed in self.world.narrowings_of(token):
            is_too_late = token.minted < narrowed.moment <= by.told
            assert not (is_too_late and narrowed.kills), "I1: narrowed"
        dead_since = token.api_key.dead_since
        assert dead_since is None or dead_since > by.told, "I1: API key"
        assert self.world.withdrawn.get(token.kid, by.told + 1) > by.told, "I1: signing key"

    def nothing_good_is_refused(self, by: Verifier, token: Token, refusal: VerifierError) -> None:
        """I2: a token is refused for its time, a narrowing since, or the documented bounds only.

        The bounds: more than 16 tokens of an API key, more than 1000 API keys.  That a signing
        key is unknown is held against no token that the last feed could know.
        """
        if self.world.clock.now + by.skew_s >= token.signed.expires_at:
            return
        if any(narrowed.moment > token.began for narrowed in self.world.narrowings_of(token)):
            return
        subjects, began = token.subjects, token.began
        if any(moment > began and subject in subjects for subject, moment in self.world.coarse):
            return
        is_untold = token.minted > by.told
        assert is_untold, "I2: a good token"
        assert isinstance(refusal, UnknownSigningKey), "I2: a good token"

    def every_token_ends_in_time(self) -> None:
        """I3: no token lives longer than 600 seconds, or than its API key."""
        for token in self.world.tokens:
            expires_at, key_ends_at = token.signed.expires_at, token.api_key.expires_at
            assert expires_at <= token.issued_at + TOKEN_LIFETIME, "I3: lifetime"
            assert key_ends_at is None or expires_at <= key_ends_at, "I3: API key"

    def no_token_outlives_its_secret(self, by: Verifier, token: Token) -> None:
        """I3: nor than the overlap of its secret, where that is known."""
        ends_at = token.secret.ends_at
        if ends_at is not None and token.secret.ended <= by.told:
            assert token.signed.expires_at <= ends_at, "I3: overlap"

    def what_is_known_never_shrinks_too_soon(self, by: Verifier, known: Known | None) -> None:
        """I4: a verifier's sequence number never goes back; what it heard stays for a window."""
        assert by.seqs == sorted(by.seqs), "I4: sequence"
        for subject, (seq, heard_at) in by.heard.items():
            if self.world.clock.now - heard_at < FEED_WINDOW:
                assert known is not None, "I4: entries"
                assert known.entries.get(subject, -1) >= seq, "I4: entries"

    def a_window_outlives_every_token(self) -> None:
        """I5: once a narrowing has left the feeds, no clock takes a token from before it.

        Not one that is 30 seconds late, with the most leeway there is: so entries may be dropped.
        """
        now = self.world.clock.now
        gone = (one for one in reversed(self.world.narrowed) if one.at + FEED_WINDOW <= now)
        latest = next(gone, None)
        for token in self.world.tokens:
            if latest is not None and token.minted < latest.moment:
                assert token.signed.expires_at + LEEWAY_MAX <= now + min(SKEWS), "I5"

    def nothing_passes_before_the_first_feed(self, by: Verifier) -> None:
        """I6: who was never told anything cannot know what is dead."""
        assert by.told >= 0, "I6"


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
        (signer,) = (key for key in ring.signing_keys if key.purpose == "feed" and key.signs(now))
        header = {"typ": feed_profile.TYPE, "kid": signer.kid}
        return jwt.encode(claims, signer.private, FEED_ALGORITHM, header).encode()


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
        return ChangesStatus("none", None, None, None, 0, self._error)


class Trusting(HandMadeFollower):
    """Starts with an empty feed, as if that had been told."""

    def wait_for_first(self) -> Known:
        return self._known or merge(None, Signed("", 2**62, {}, _AnyKid(), 0), 0)


class _AnyKid(frozenset[str]):
    def __contains__(self, kid: object) -> bool:
        return True


Merge = Callable[[Known | None, Signed, float], Known]


def merge_by_replacing(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Believes the last feed alone."""
    merged = merge(known, signed, arrived_at)
    return replace(
        merged, entries=dict(signed.entries), arrived_at=dict.fromkeys(signed.entries, arrived_at)
    )


def merge_a_replay(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Takes whatever is signed, however old."""
    return merge(known and replace(known, seq=-1, log=""), signed, arrived_at)


def merge_and_forget(known: Known | None, signed: Signed, arrived_at: float) -> Known:
    """Counts an entry's half of a token's life from when it first came, and never again."""
    merged = merge(known and replace(known, entries={}, arrived_at={}), signed, arrived_at)
    first: dict[str, float] = dict(known.arrived_at if known else {})
    for subject in signed.entries:
        first.setdefault(subject, arrived_at)
    young = {
        subject: seq
        for subject, seq in signed.entries.items()
        if arrived_at - first[subject] < TOKEN_LIFETIME / 2
    }
    return replace(merged, entries=young, arrived_at=first)


def check_too_much(signed: SignedClaims, known: Known) -> None:
    """Holds against a token what its issuer had already read."""
    assert signed.as_of is not None
    check_vouched(signed._replace(as_of=signed.as_of - 1), known)


def check_the_api_key_alone(signed: SignedClaims, known: Known) -> None:
    """Looks at the first subject only."""
    check_vouched(signed._replace(subjects=subjects_of(signed)[:1]), known)


def with_merge(merging: Merge) -> Parts:
    return Parts(follow=lambda *arguments: HandMadeFollower(merging, *arguments))


#: Each with the promises that it may break; which one is noticed first is chance.
BROKEN: Final = {
    "head after record": (Parts(store=HeadAfterRecord), "I1|I3"),
    "records kept": (Parts(store=NeverForgets), "I1|I3"),
    "overlap forgotten": (Parts(issuer=ForgetsTheOverlap), "I3: overlap"),
    "rows before head": (Parts(feed=ReadsRowsFirst), "I1"),
    "bounds without a wider subject": (Parts(feed=DropsTheRest), "I1"),
    "replacing merge": (with_merge(merge_by_replacing), "I4: entries"),
    "replay accepted": (with_merge(merge_a_replay), "I4: sequence"),
    "forgetful merge": (with_merge(merge_and_forget), "I1|I4: entries"),
    "trust before the first feed": (Parts(follow=lambda *those: Trusting(merge, *those)), "I6"),
    "too much held against": (Parts(check=check_too_much), "I2: a good token"),
    "one subject looked at": (Parts(check=check_the_api_key_alone), "I1"),
}


#: What may happen and has nothing to do with a mistake: without it the story is found sooner.
BESIDE_THE_POINT: Final = {
    "overlap forgotten": (
        *(Core.revoke_many_tokens, Core.revoke_strangers, Core.change_signing_keys),
        *(Core.take_backup, Core.restore, Core.restart, Core.deliver_an_old_one),
    ),
}


def never_by_itself(step: Callable[..., None]) -> Callable[..., None]:
    """A step of the story that other steps may take, and no rule."""

    def taken(self: Core, *args: Any, **named: Any) -> None:
        step(self, *args, **named)

    return taken


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_part_is_found_out(mistake: str) -> None:
    """What cannot fail proves nothing: each of these mistakes breaks a promise above."""
    parts, promise = BROKEN[mistake]
    steps = {step.__name__: never_by_itself(step) for step in BESIDE_THE_POINT.get(mistake, ())}
    broken = type("Broken", (Core,), {"parts": parts, **steps})

    with pytest.raises(AssertionError, match=f"^({promise})"):
        run_state_machine_as_test(broken, settings=_SEARCH)


def test_hand_made_parts_without_a_mistake_keep_the_promises() -> None:
    """Else the broken parts would be found out for being made by hand."""
    whole = replace(with_merge(merge), feed=HandMadeFeed)
    by_hand = type("ByHand", (Core,), {"parts": whole})

    run_state_machine_as_test(by_hand, settings=settings(_SETTINGS, max_examples=EXAMPLES // 2))
