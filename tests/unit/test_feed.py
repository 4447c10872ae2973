"""`coatcheck.server.feed`: what the revocation feed says, how long it is, whom it wakes and when.

RFC 7519 §4.1; the feed's bounds are those of `coatcheck.feed_profile`.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.utils import base64url_decode

from coatcheck import feed_profile
from coatcheck.durations import (
    FEED_FRESH,
    FEED_POLL,
    FEED_STALE,
    FEED_WAIT_MAX,
    FEED_WAKE_MIN,
    FEED_WINDOW,
)
from coatcheck.feed_profile import (
    EVERYTHING,
    MAX_ENTRIES_BYTES,
    MAX_FEED_BYTES,
    MOST_API_KEYS,
    MOST_TOKENS,
    subject,
)
from coatcheck.server import sealing, signing
from coatcheck.server.changes import Change, What
from coatcheck.server.feed import Entries, Feed, entries
from coatcheck.server.signing import NoSigner, Purpose, RingKeeper
from coatcheck.server.store import Narrowing, StoreUnavailable
from coatcheck.server.store.sqlite import SqliteStore
from support.deployment import DAY, ISSUER, NOON, TESTER, Deployment

FOREVER_S = 10  # Longer than any test takes: what waits for it has failed.
#: What a machine that is busy with other tests may add.
SLOWNESS_S = 1.0

TOKEN = What.TOKEN_REVOKED.text
API_KEY = What.API_KEY_REVOKED.text
SIGNING_KEY = What.SIGNING_KEY_WITHDRAWN.text


# --- the entries


def a_narrowing(seq: int, what: str, of: str, wider: str = EVERYTHING) -> Narrowing:
    return Narrowing(seq, NOON, what, of, wider)


def tokens(count: int, api_key: str = "key_1", first_seq: int = 1) -> list[Narrowing]:
    """So many tokens of one API key, revoked one by one."""
    return [
        a_narrowing(seq, TOKEN, f"jti_{api_key}_{seq}", api_key)
        for seq in range(first_seq, first_seq + count)
    ]


def api_keys(count: int, organization: str = "org_1", first_seq: int = 1) -> list[Narrowing]:
    """So many API keys of one organization, revoked one by one."""
    return [
        a_narrowing(seq, API_KEY, f"key_{organization}_{seq}", organization)
        for seq in range(first_seq, first_seq + count)
    ]


def toggled(times: int, first_seq: int) -> list[Narrowing]:
    """One API key of an organization, disabled again and again."""
    seqs = range(first_seq, first_seq + times)
    return [a_narrowing(seq, API_KEY, "key_toggled", "org_1") for seq in seqs]


def others(count: int, first_seq: int = 1) -> list[Narrowing]:
    """So many subjects that have nothing above them but everything."""
    seqs = range(first_seq, first_seq + count)
    return [a_narrowing(seq, SIGNING_KEY, f"kid_{seq}") for seq in seqs]


@st.composite
def histories(draw: st.DrawFn) -> list[Narrowing]:
    """Anything that can happen to a few API keys of a few organizations, with floods of it."""
    parts = st.lists(st.tuples(st.sampled_from("tktkgdo"), st.integers(0, 40)), max_size=60)
    rows: list[Narrowing] = []
    for kind, number in draw(parts):
        seq = 1 + (rows[-1].seq if rows else 0) + number % 3
        key, organization = f"key_{number % 7}", f"org_{number % 7 % 3}"
        match kind:
            case "t":
                rows.append(a_narrowing(seq, TOKEN, f"jti_{seq}", key))
            case "k":
                rows.append(a_narrowing(seq, API_KEY, key, organization))
            case "g":
                rows.append(a_narrowing(seq, SIGNING_KEY, f"kid_{number}"))
            case "d":
                rows += tokens(number, key, seq)
            case "o":
                rows += toggled(number, seq)
    flood = draw(st.sampled_from((None, tokens, api_keys, others)))
    if flood is not None:
        many = draw(st.sampled_from((MOST_TOKENS, MOST_API_KEYS, MOST_API_KEYS + 1, 12_000)))
        after = 1 + (rows[-1].seq if rows else 0)
        rows += flood(many, first_seq=after)
    return rows


@given(histories())
@settings(max_examples=80, deadline=None)
def test_whatever_happened_the_feed_covers_it_and_stays_short(rows: list[Narrowing]) -> None:
    """
    Too many of one kind become one entry of the wider subject: more die, and never fewer.

    What is above a subject is above all that hangs on it: a token's API key, that one's
    organization, and everything.
    """
    told = entries(rows)

    above = {row.subject: row.wider for row in rows}
    for row in rows:
        covering = [row.subject, row.wider, above.get(row.wider, EVERYTHING), EVERYTHING]
        highest = max(told.get(subject(one), -1) for one in covering)
        assert highest >= row.seq, row
    assert len(json.dumps(told, separators=(",", ":"))) <= MAX_ENTRIES_BYTES
    assert max(told.values(), default=0) <= max((row.seq for row in rows), default=0)
    # Nobody dies for nothing: an entry is a subject of the log, or above one.
    known = {subject(one) for row in rows for one in (row.subject, row.wider, EVERYTHING)}
    assert set(told) <= known


@given(histories(), st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_kept_up_row_by_row_is_what_is_made_anew(
    rows: list[Narrowing], data: st.DataObject
) -> None:
    """A node adds what is new and drops what is old; another one starts from the rows left."""
    kept = Entries()
    at = {row.seq: place for place, row in enumerate(rows)}
    rows = [replace(row, at=at[row.seq]) for row in rows]
    shown = 0
    for begin in sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4))):
        end = data.draw(st.integers(shown, len(rows)))
        kept.add(rows[shown:end])
        kept.drop_before(begin)
        shown = end

        assert kept.told() == entries(row for row in rows[:shown] if row.at >= begin)


def test_more_tokens_than_that_become_their_api_key() -> None:
    """Revoking tokens one by one is for few of them; the API key's own entry says it shorter."""
    few, many = entries(tokens(MOST_TOKENS)), entries(tokens(MOST_TOKENS + 1))

    assert few == {subject(row.subject): row.seq for row in tokens(MOST_TOKENS)}
    assert many == {subject("key_1"): MOST_TOKENS + 1}


def test_tokens_of_one_api_key_do_not_count_for_another() -> None:
    """A customer with many tokens to revoke takes nothing from the others."""
    told = entries([*tokens(MOST_TOKENS + 1, "key_1"), *tokens(1, "key_2", 100)])

    assert told == {subject("key_1"): MOST_TOKENS + 1, subject("jti_key_2_100"): 100}


def test_more_api_keys_than_that_become_their_organization() -> None:
    """A customer that revokes everything is one entry, at the last one's number."""
    few, many = entries(api_keys(MOST_API_KEYS)), entries(api_keys(MOST_API_KEYS + 1))

    assert len(few) == MOST_API_KEYS
    assert many == {subject("org_1"): MOST_API_KEYS + 1}


def test_an_api_key_that_is_toggled_all_day_is_one_entry() -> None:
    """Disabling and enabling in a loop must not crowd out other customers' revocations."""
    told = entries([*toggled(20_000, 1), *api_keys(3, "org_2", 30_000)])

    assert len(told) == 4
    assert told[subject("key_toggled")] == 20_000


@pytest.mark.parametrize("rows", [others(12_000), [*others(3), *tokens(1), *others(12_000, 50)]])
def test_more_than_fits_becomes_one_entry_of_everything(rows: list[Narrowing]) -> None:
    """Every follower reads all of it: a flood may cost tokens, and never the feed."""
    assert entries(rows) == {subject(EVERYTHING): rows[-1].seq}


def test_an_id_does_not_stand_in_the_feed() -> None:
    """It is public, and tells nobody which customers there are."""
    told = entries(api_keys(2))

    assert all(len(one) == 16 and "key" not in one for one in told)


# --- the feed of a node


class SwitchedStore(SqliteStore):
    """A store that can be away, and in which others write at the worst moment."""

    is_away = False
    #: Called between the look at the head and the look at the rows.
    meanwhile: Callable[[], object] | None = None

    def head(self) -> int:
        if self.is_away:
            raise StoreUnavailable("away, says the test")
        return super().head()

    def narrowings(self, after: int, since: int) -> list[Narrowing]:
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().narrowings(after, since)


@pytest.fixture
def store(deployment: Deployment) -> Iterator[SwitchedStore]:
    store = SwitchedStore(deployment.settings.database_url)
    yield store
    store.close()


@pytest.fixture
def feed(deployment: Deployment, store: SwitchedStore) -> Feed:
    """A node's feed.  What the test writes with `deployment` another process has written."""
    ring = RingKeeper(store, sealing.load(deployment.settings.keys_dir))
    return Feed(ISSUER, store, ring, deployment.clock)


def read(signed: bytes) -> dict[str, Any]:
    """What a feed says; who signed it is another test's subject."""
    claims: dict[str, Any] = json.loads(base64url_decode(signed.split(b".")[1]))
    return claims


def now(feed: Feed) -> dict[str, Any]:
    """What the feed says at the moment."""
    return read(asyncio.run(feed.get(-1, 0)))


def signer_of(feed: Feed) -> str:
    kid: str = jwt.get_unverified_header(asyncio.run(feed.get(-1, 0)))["kid"]
    return kid


def revoke_token(deployment: Deployment, jti: str, api_key_id: str) -> None:
    with deployment.store.transaction() as tx:
        change = Change(What.TOKEN_REVOKED, jti, TESTER, deployment.now, wider=api_key_id)
        tx.append([change])


def rotate(deployment: Deployment, purpose: Purpose = "token", *, at_once: bool = True) -> str:
    sealing_key = sealing.load(deployment.settings.keys_dir).newest()
    return signing.rotate(
        deployment.store,
        sealing_key,
        "ES256",
        TESTER,
        now=deployment.now,
        at_once=at_once,
        purpose=purpose,
    )


def withdraw(deployment: Deployment, kid: str, *, force: bool = False) -> None:
    signing.withdraw(deployment.store, kid, TESTER, now=deployment.now, force=force)


def of_purpose(deployment: Deployment, purpose: Purpose) -> list[str]:
    """The kids of the signing keys that were made for this."""
    return [one.kid for one in deployment.store.signing_keys() if one.purpose == purpose]


def test_the_feed_says_who_where_when_and_up_to_where(deployment: Deployment, feed: Feed) -> None:
    """Issuer and address bind it to this deployment; it names no customer."""
    told = now(feed)

    assert set(told) == {"iss", "aud", "iat", "exp", "log", "seq", "entries", "kids"}
    assert (told["iss"], told["aud"]) == (ISSUER, f"{ISSUER}/oauth/revocations")
    assert (told["iat"], told["exp"]) == (NOON, NOON + FEED_STALE)
    assert (told["log"], told["seq"]) == (deployment.store.log(), deployment.store.head())
    assert told["entries"] == {}
    published = {*of_purpose(deployment, "token"), *of_purpose(deployment, "feed")}
    assert set(told["kids"]) == published


def disabled(deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.disable(made)
    return made.api_key.id


def revoked(deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.revoke(made)
    return made.api_key.id


def rotated_at_once(deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.rotate(made, overlap_s=0)
    return made.api_key.id


def rotated_within_an_overlap(deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.rotate(made, overlap_s=DAY)
    deployment.rotate(made, overlap_s=DAY)
    return made.api_key.id


def token_revoked(deployment: Deployment) -> str:
    revoke_token(deployment, "jti_1", "key_1")
    return "jti_1"


def signing_key_withdrawn(deployment: Deployment) -> str:
    old = of_purpose(deployment, "token")[0]
    rotate(deployment)
    withdraw(deployment, old)
    return old


NARROWED = {
    "disabled": disabled,
    "revoked": revoked,
    "rotated without overlap": rotated_at_once,
    "an overlap ended early": rotated_within_an_overlap,
    "a token revoked": token_revoked,
    "a signing key withdrawn": signing_key_withdrawn,
}


@pytest.mark.parametrize("narrow", NARROWED.values(), ids=NARROWED)
def test_what_narrows_is_told(
    deployment: Deployment, feed: Feed, narrow: Callable[[Deployment], str]
) -> None:
    """Tokens issued before it say more than is true now."""
    before = now(feed)["seq"]
    narrowed = narrow(deployment)
    told = now(feed)

    assert set(told["entries"]) == {subject(narrowed)}
    assert before < told["entries"][subject(narrowed)] <= told["seq"]


def created(deployment: Deployment) -> None:
    deployment.api_key("widgets:read")


def enabled(deployment: Deployment) -> None:
    made = deployment.api_key()
    deployment.disable(made)
    deployment.clock.now += FEED_WINDOW + 1
    deployment.enable(made)


def rotated_with_an_overlap(deployment: Deployment) -> None:
    deployment.rotate(deployment.api_key(), overlap_s=DAY)


def signing_key_created(deployment: Deployment) -> None:
    rotate(deployment, at_once=False)


def counted(deployment: Deployment) -> None:
    made = deployment.api_key()
    deployment.service._usage.count(made.api_key.id, deployment.now)
    deployment.service._usage.flush()


WIDENED = {
    "created": created,
    "enabled": enabled,
    "rotated with an overlap": rotated_with_an_overlap,
    "a signing key created": signing_key_created,
    "a use counted": counted,
}


@pytest.mark.parametrize("widen", WIDENED.values(), ids=WIDENED)
def test_what_narrows_nothing_is_not_told(
    deployment: Deployment, feed: Feed, widen: Callable[[Deployment], None]
) -> None:
    """Every token there is stays true; and the feed would fill up with daily work."""
    now(feed)
    widen(deployment)
    told = now(feed)

    assert told["entries"] == {}
    assert told["seq"] == deployment.store.head()


def test_enabling_brings_back_no_token(deployment: Deployment, feed: Feed) -> None:
    """Whoever was disabled for a minute gets new tokens; the old ones may be in wrong hands."""
    made = deployment.api_key()
    deployment.disable(made)
    at = deployment.store.head()
    deployment.enable(made)

    assert now(feed)["entries"] == {subject(made.api_key.id): at}


def test_an_entry_stays_for_the_window_and_no_longer(deployment: Deployment, feed: Feed) -> None:
    """Twice a token's life: after it no token is left that it could concern."""
    deployment.revoke(deployment.api_key())
    now(feed)

    deployment.clock.now = NOON + FEED_WINDOW
    assert len(now(feed)["entries"]) == 1
    deployment.clock.now = NOON + FEED_WINDOW + FEED_FRESH
    assert now(feed)["entries"] == {}
    # Also for a node that starts then: all nodes say the same.
    ring = RingKeeper(deployment.store, sealing.load(deployment.settings.keys_dir))
    assert now(Feed(ISSUER, deployment.store, ring, deployment.clock))["entries"] == {}


def test_a_change_that_is_made_while_the_feed_is_read_comes_in_the_next_one(
    deployment: Deployment, feed: Feed, store: SwitchedStore
) -> None:
    """A feed whose entries are ahead of its own `seq` contradicts itself: followers refuse it."""
    now(feed)
    first, second = deployment.api_key(), deployment.api_key()
    deployment.revoke(first)
    store.meanwhile = lambda: deployment.revoke(second)

    told = now(feed)
    assert max(told["entries"].values()) <= told["seq"]
    both = {subject(first.api_key.id), subject(second.api_key.id)}
    assert set(now(feed)["entries"]) == both


def test_a_signature_is_never_older_than_promised(deployment: Deployment, feed: Feed) -> None:
    """Followers call an issuer stale whose last signature is older than twice that."""
    for _ in range(100):
        told = now(feed)
        assert 0 <= deployment.now - told["iat"] <= FEED_FRESH
        deployment.clock.now += 1.7


def test_a_thousand_followers_cost_one_signature(feed: Feed) -> None:
    """The same bytes for everybody who asks at about the same moment."""
    assert len({asyncio.run(feed.get(-1, 0)) for _ in range(1000)}) == 1


def test_a_clock_that_was_set_back_is_signed_as_it_is(deployment: Deployment, feed: Feed) -> None:
    """A signature from the future would keep the feed fresh while nothing is vouched for."""
    deployment.clock.now = NOON + DAY
    now(feed)
    deployment.clock.now -= 60

    assert now(feed)["iat"] == NOON + DAY - 60


def test_the_largest_feed_is_within_what_followers_read(deployment: Deployment, feed: Feed) -> None:
    """A feed that is cut off at a limit is none: everybody would go stale at once."""
    with deployment.store.transaction() as tx:
        tx.append(
            Change(What.TOKEN_REVOKED, f"jti_{n}", TESTER, NOON, wider=f"key_{n}")
            for n in range(10_000)
        )
    signed = asyncio.run(feed.get(-1, 0))
    told = read(signed)["entries"]

    assert len(told) == 10_000
    assert len(json.dumps(told, separators=(",", ":"))) > 0.9 * MAX_ENTRIES_BYTES
    assert len(signed) <= MAX_FEED_BYTES


FLOODS: dict[str, Callable[[Deployment, int], Change]] = {
    "tokens of one API key": lambda deployment, n: Change(
        What.TOKEN_REVOKED, f"jti_{n}", TESTER, NOON, wider="key_1"
    ),
    "tokens of many API keys": lambda deployment, n: Change(
        What.TOKEN_REVOKED, f"jti_{n}", TESTER, NOON, wider=f"key_{n // 2}"
    ),
    "API keys of one organization": lambda deployment, n: Change(
        What.API_KEY_DISABLED, f"key_{n}", TESTER, NOON, wider=deployment.organization_id
    ),
    "API keys of many organizations": lambda deployment, n: Change(
        What.API_KEY_DISABLED, f"key_{n}", TESTER, NOON, wider=f"org_{n // 2}"
    ),
    "one API key toggled": lambda deployment, n: Change(
        (What.API_KEY_DISABLED, What.API_KEY_ENABLED)[n % 2],
        "key_1",
        TESTER,
        NOON,
        wider=deployment.organization_id,
    ),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_no_flood_makes_the_feed_too_long(
    deployment: Deployment, feed: Feed, flood: Callable[[Deployment, int], Change]
) -> None:
    """One customer in a loop must not switch revocation off for all others."""
    with deployment.store.transaction() as tx:
        tx.append(flood(deployment, n) for n in range(20_000))
    signed = asyncio.run(feed.get(-1, 0))

    assert len(signed) <= MAX_FEED_BYTES
    assert 1 <= len(read(signed)["entries"]) <= MAX_ENTRIES_BYTES // 20


# --- following


async def following(feed: Feed, then: Callable[[], Awaitable[None]]) -> None:
    """Do something while the node watches its change log."""
    task = asyncio.create_task(feed.follow())
    try:
        async with asyncio.timeout(FOREVER_S):
            await then()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_a_follower_is_woken_by_a_revocation(deployment: Deployment, feed: Feed) -> None:
    """Well within the second that it may take until the last refusal."""
    made = deployment.api_key()

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = asyncio.create_task(feed.get(head, FEED_WAIT_MAX))
        await asyncio.sleep(2 * FEED_POLL)
        assert not waiting.done()
        began = time.monotonic()
        deployment.revoke(made)
        told = read(await waiting)
        assert subject(made.api_key.id) in told["entries"]
        assert time.monotonic() - began < FEED_POLL + FEED_WAKE_MIN + SLOWNESS_S / 2

    asyncio.run(following(feed, wait))


def test_a_follower_is_woken_when_a_signing_key_comes(deployment: Deployment, feed: Feed) -> None:
    """Nothing was narrowed, but a token that it signs would be refused as unlisted."""

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = asyncio.create_task(feed.get(head, FEED_WAIT_MAX))
        await asyncio.sleep(2 * FEED_POLL)
        kid = rotate(deployment)
        assert kid in read(await waiting)["kids"]

    asyncio.run(following(feed, wait))


def test_a_follower_that_is_behind_is_answered_at_once(deployment: Deployment, feed: Feed) -> None:
    """It has not heard of something: waiting would add to the second."""

    async def ask(after: int) -> int:
        async with asyncio.timeout(SLOWNESS_S):
            told: int = read(await feed.get(after, FEED_WAIT_MAX))["seq"]
        return told

    async def be_late() -> None:
        before = await ask(-1)
        deployment.revoke(deployment.api_key())
        head = deployment.store.head()
        assert await ask(before) == await ask(-1) == head
        rotate(deployment)
        assert await ask(head) == deployment.store.head()

    asyncio.run(following(feed, be_late))


def test_daily_work_wakes_nobody(deployment: Deployment, feed: Feed) -> None:
    """Thousands of followers, and an API key is created each second."""

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = asyncio.create_task(feed.get(head, 6 * FEED_POLL))
        for _ in range(3):
            await asyncio.sleep(FEED_POLL)
            deployment.api_key()
            assert not waiting.done()
        # What it hears in the end is up to date all the same.
        assert read(await waiting)["seq"] == deployment.store.head()

    asyncio.run(following(feed, wait))


def test_waiting_in_vain_ends_with_a_feed_that_was_signed_now(
    deployment: Deployment, feed: Feed
) -> None:
    """That nothing happened is news, too: it is what keeps a follower fresh."""

    async def wait() -> None:
        first = read(await feed.get(-1, 0))
        waiting = asyncio.create_task(feed.get(first["seq"], 2 * FEED_POLL))
        await asyncio.sleep(FEED_POLL)
        deployment.clock.now += FEED_WAIT_MAX
        told = read(await waiting)
        assert (told["seq"], told["iat"]) == (first["seq"], NOON + FEED_WAIT_MAX)

    asyncio.run(following(feed, wait))


def test_a_follower_is_woken_four_times_a_second_at_most(
    deployment: Deployment, feed: Feed
) -> None:
    """
    However fast revocations come, and however many follow: one's news must not wake the others.

    A thousand followers that are woken by each of a hundred revocations a second would be a
    hundred thousand answers a second.
    """
    answers = [0, 0, 0]
    seconds = 1.5

    async def poll(number: int) -> None:
        after = -1
        while True:
            after = read(await feed.get(after, FEED_WAIT_MAX))["seq"]
            answers[number] += 1
            # The way there and back, which is different for each of them.
            await asyncio.sleep(0.007 * (number + 1))

    async def flood() -> None:
        pollers = [asyncio.create_task(poll(number)) for number in range(len(answers))]
        until = time.monotonic() + seconds
        number = 0
        while time.monotonic() < until:
            number += 1
            revoke_token(deployment, f"jti_{number}", f"key_{number}")
            await asyncio.sleep(0.01)
        for poller in pollers:
            poller.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)

    asyncio.run(following(feed, flood))

    assert min(answers) >= 2
    # One more for the first answer, and one for a wake at either end.
    assert max(answers) <= seconds / FEED_WAKE_MIN + 2, answers


def test_stopping_lets_everybody_go(feed: Feed) -> None:
    """A long poll would hold up the end of the process for half a minute."""

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = [asyncio.create_task(feed.get(head, FEED_WAIT_MAX)) for _ in range(20)]
        await asyncio.sleep(FEED_POLL)
        feed.stop()
        async with asyncio.timeout(SLOWNESS_S):
            assert {read(await one)["seq"] for one in waiting} == {head}
            # Nor does a newcomer wait.
            assert read(await feed.get(head, FEED_WAIT_MAX))["seq"] == head

    asyncio.run(following(feed, wait))


# --- when nothing can be vouched for


def test_without_the_database_nothing_is_signed(feed: Feed, store: SwitchedStore) -> None:
    """Also not what was signed a moment ago: nobody knows what has happened since."""
    now(feed)
    store.is_away = True

    with pytest.raises(StoreUnavailable):
        now(feed)
    store.is_away = False
    assert now(feed)


def test_who_waits_while_the_database_goes_away_gets_no_signature(
    feed: Feed, store: SwitchedStore
) -> None:
    """A feed vouches for the moment at which it is handed out."""

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = asyncio.create_task(feed.get(head, 3 * FEED_POLL))
        await asyncio.sleep(FEED_POLL)
        store.is_away = True
        with pytest.raises(StoreUnavailable):
            await waiting

    asyncio.run(following(feed, wait))


def test_following_goes_on_when_the_database_is_back(
    deployment: Deployment, feed: Feed, store: SwitchedStore
) -> None:
    """What happened in between is told first of all."""
    made = deployment.api_key()

    async def wait() -> None:
        head = read(await feed.get(-1, 0))["seq"]
        waiting = asyncio.create_task(feed.get(head, FEED_WAIT_MAX))
        await asyncio.sleep(FEED_POLL)
        store.is_away = True
        await asyncio.sleep(3 * FEED_POLL)
        deployment.revoke(made)
        store.is_away = False
        assert subject(made.api_key.id) in read(await waiting)["entries"]

    asyncio.run(following(feed, wait))


def test_a_withdrawn_feed_key_is_not_listed_and_signs_no_more(
    deployment: Deployment, feed: Feed
) -> None:
    """A feed that does not list its own signer is refused: a thief cannot vouch for himself."""
    old = signer_of(feed)
    new = rotate(deployment, "feed")
    assert {old, new} <= set(now(feed)["kids"])
    assert signer_of(feed) == new

    withdraw(deployment, old)
    assert old not in now(feed)["kids"]
    assert new in now(feed)["kids"]
    assert signer_of(feed) == new


def test_a_token_key_never_signs_the_feed(deployment: Deployment, feed: Feed) -> None:
    """Nor the other way round, so that neither can be taken for the other."""
    assert signer_of(feed) in of_purpose(deployment, "feed")
    rotate(deployment, "token")
    assert signer_of(feed) in of_purpose(deployment, "feed")


def test_without_a_feed_key_nothing_is_signed(deployment: Deployment, feed: Feed) -> None:
    """Followers go stale and say so; a token key in its place would be worse."""
    withdraw(deployment, signer_of(feed), force=True)
    with pytest.raises(NoSigner):
        now(feed)

    new = rotate(deployment, "feed")
    assert signer_of(feed) == new


def test_the_type_in_the_header_is_the_feeds_own(feed: Feed) -> None:
    """RFC 8725 §3.11: what asks for `at+jwt` refuses it by that alone."""
    header = jwt.get_unverified_header(asyncio.run(feed.get(-1, 0)))

    assert (header["typ"], header["alg"]) == (feed_profile.TYPE, signing.FEED_ALGORITHM)
