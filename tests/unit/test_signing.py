"""`coatcheck.server.signing`: which signing key signs, which are published, and who may change it.

answers.md K12, K14-K16, K19-K22, F9; RFC 7517, RFC 7638, RFC 8725 §3.5.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.utils import base64url_decode
from starlette.testclient import TestClient

from coatcheck.durations import PUBLISH_AFTER, PUBLISH_AHEAD, ROTATE_EVERY, Publication
from coatcheck.server import keyfile, sealing, signing
from coatcheck.server.app import Service
from coatcheck.server.keyfile import KeyPair, UnfitKey
from coatcheck.server.sealing import BadSealingKey, SealingKey, SealingKeys
from coatcheck.server.signing import (
    BadSigningKey,
    NoSigner,
    Ring,
    RingKeeper,
    SigningKeyConflict,
)
from coatcheck.server.store import SigningKeyRecord, Store, StoreUnavailable, open_store
from coatcheck.server.store.tables import SigningKey as Row
from coatcheck.token_profile import Algorithm, TokenType
from support.deployment import DAY, HOUR, NOON, TESTER, Deployment, a_client, a_deployment, form

SEALING_KEY = SealingKey.of(bytes(32))
SEALING_KEYS = SealingKeys({SEALING_KEY.id: SEALING_KEY})
NO_RING = Ring(())


def a_record(
    *,
    starts_at: int = NOON,
    withdrawn_at: int | None = None,
    position: int = 1,
    algorithm: Algorithm = "ES256",
) -> SigningKeyRecord:
    """A signing key as it lies in the store."""
    row = signing.new_row(algorithm, SEALING_KEY, now=NOON - DAY, starts_at=starts_at)
    return SigningKeyRecord(
        kid=row.kid,
        purpose=row.purpose,
        algorithm=row.algorithm,
        public_jwk=row.public_jwk,
        sealed_private=row.sealed_private,
        sealing_key_id=row.sealing_key_id,
        position=position,
        created_at=row.created_at,
        starts_at=row.starts_at,
        withdrawn_at=withdrawn_at,
    )


def a_ring(*records: SigningKeyRecord) -> Ring:
    return Ring.read(records, SEALING_KEYS, NO_RING)


def states(ring: Ring, now: int) -> list[str]:
    return [signing_key.state(now) for signing_key in ring.signing_keys]


# --- states come from the clock

START = NOON + DAY
STATES = {
    "long before": (NOON - HOUR, ["pending", "pending"]),
    "a second before the first starts": (NOON - 1, ["pending", "pending"]),
    "the first starts": (NOON, ["signing", "pending"]),
    "a second before the successor starts": (START - 1, ["signing", "pending"]),
    "the successor starts": (START, ["retiring", "signing"]),
    "the last second in the key set": (START + PUBLISH_AFTER - 1, ["retiring", "signing"]),
    "gone from the key set": (START + PUBLISH_AFTER, ["retired", "signing"]),
    "for ever after": (START + 1000 * DAY, ["retired", "signing"]),
}


@pytest.mark.parametrize(("now", "expected"), STATES.values(), ids=STATES)
def test_states_come_from_the_clock(now: int, expected: list[str]) -> None:
    """Nothing but two times is stored, so every node agrees without being told."""
    first, second = a_record(), a_record(starts_at=START, position=2)
    ring = a_ring(first, second)

    assert states(ring, now) == expected
    published = [one["kid"] for one in ring.key_set(now)["keys"]]
    assert published == [
        record.kid
        for record, state in zip((first, second), expected, strict=True)
        if state != "retired"
    ]
    if "signing" in expected:
        signs = (first, second)[expected.index("signing")]
        assert ring.signer("ES256", now).kid == signs.kid
    else:
        with pytest.raises(NoSigner):
            ring.signer("ES256", now)


@pytest.mark.parametrize("now", [NOON - HOUR, NOON, START, START + DAY])
def test_a_withdrawn_signing_key_is_gone_whatever_the_clock_says(now: int) -> None:
    """It neither signs nor is published, for ever."""
    ring = a_ring(a_record(withdrawn_at=NOON - HOUR))

    assert states(ring, now) == ["withdrawn"]
    assert ring.key_set(now) == {"keys": []}
    with pytest.raises(NoSigner):
        ring.signer("ES256", now)


def test_a_successor_withdrawn_before_its_start_leaves_everything_as_it_was() -> None:
    """It never signed: the one before it goes on."""
    first = a_record()
    ring = a_ring(first, a_record(starts_at=START, withdrawn_at=START - 1, position=2))

    assert states(ring, START + DAY) == ["signing", "withdrawn"]
    assert ring.signer("ES256", START + DAY).kid == first.kid


def test_a_successor_withdrawn_after_its_start_does_not_bring_the_old_one_back() -> None:
    """Verifiers may have dropped it: a signing key that ended never signs again."""
    ring = a_ring(a_record(), a_record(starts_at=START, withdrawn_at=START + 1, position=2))

    assert states(ring, START + 1) == ["retiring", "withdrawn"]
    with pytest.raises(NoSigner, match="coatcheck signing-keys rotate"):
        ring.signer("ES256", START + 1)


def test_each_algorithm_has_its_own_succession() -> None:
    """A new RS256 key ends no ES256 one."""
    es256 = a_record()
    rs256 = a_record(algorithm="RS256", starts_at=NOON + HOUR, position=2)
    ring = a_ring(es256, rs256)

    assert states(ring, NOON + DAY) == ["signing", "signing"]
    assert ring.signer("RS256", NOON + DAY).kid == rs256.kid
    assert ring.signer("ES256", NOON + DAY).kid == es256.kid


POOL = [a_record() for _ in range(5)]
TIMES = st.integers(NOON, NOON + 20)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(TIMES, st.none() | TIMES), max_size=5),
    st.integers(NOON - 5, NOON + 30) | st.integers(NOON + PUBLISH_AFTER, NOON + PUBLISH_AFTER + 30),
)
def test_at_most_one_signs_and_it_is_published(
    drawn: list[tuple[int, int | None]], now: int
) -> None:
    """Whatever was rotated and withdrawn in whichever order."""
    records = [
        replace(POOL[n], starts_at=starts_at, withdrawn_at=withdrawn_at, position=n)
        for n, (starts_at, withdrawn_at) in enumerate(drawn)
    ]
    ring = a_ring(*records)

    signs = [one for one in ring.signing_keys if one.signs(now)]

    assert len(signs) <= 1
    assert all(one.is_published(now) for one in signs)
    if records and all(record.withdrawn_at is None for record in records):
        assert len(signs) == (min(record.starts_at for record in records) <= now)


@settings(max_examples=100)
@given(st.lists(TIMES, min_size=1, max_size=5), st.integers(NOON, NOON + 30), st.integers(0, 600))
def test_what_was_signed_stays_verifiable_for_as_long_as_the_token_lives(
    starts: list[int], now: int, later: int
) -> None:
    """No rotation, however fast, takes a signing key from the set before its last token."""
    ring = a_ring(
        *(replace(POOL[n], starts_at=at, position=n) for n, at in enumerate(sorted(starts)))
    )

    for signing_key in ring.signing_keys:
        if signing_key.signs(now):
            assert signing_key.is_published(now + later)


# --- what is published

#: What a deployment signs tokens with from the start.
FIRST: Final[tuple[Algorithm, ...]] = ("ES256", "RS256")

PUBLIC_MEMBERS = {
    "ES256": {"kty", "crv", "x", "y", "kid", "alg", "use"},
    "RS256": {"kty", "n", "e", "kid", "alg", "use"},
    "EdDSA": {"kty", "crv", "x", "kid", "alg", "use"},
}


@pytest.mark.parametrize("algorithm", signing.GENERATE)
def test_the_key_set_has_public_members_only(algorithm: Algorithm) -> None:
    """RFC 7517 §4, RFC 7518 §6: no `d`, no primes; `use`, `alg` and `kid` always."""
    ring = a_ring(a_record(algorithm=algorithm))

    (jwk,) = ring.key_set(NOON)["keys"]

    assert set(jwk) == PUBLIC_MEMBERS[algorithm]
    assert (jwk["alg"], jwk["use"]) == (algorithm, "sig")
    assert all(isinstance(value, str) for value in jwk.values())


@pytest.mark.parametrize("algorithm", signing.GENERATE)
def test_the_kid_is_the_thumbprint_of_the_public_key(algorithm: Algorithm) -> None:
    """K16: nobody chooses a `kid`, so two keys cannot have one and one key cannot have two."""
    record = a_record(algorithm=algorithm)

    assert record.kid == signing.thumbprint(json.loads(record.public_jwk))


THUMBPRINTS = {
    "RFC 7638 §3.1": (
        {
            "kty": "RSA",
            "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1"
            "L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4"
            "QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbO"
            "pbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csF"
            "Cur-kEgU8awapJzKnqDKgw",
            "e": "AQAB",
            "alg": "RS256",
            "kid": "2011-04-29",
        },
        "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
    ),
    "RFC 8037 A.3": (
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",
    ),
}


@pytest.mark.parametrize(("jwk", "expected"), THUMBPRINTS.values(), ids=THUMBPRINTS)
def test_thumbprints_are_those_of_the_rfcs(jwk: dict[str, str], expected: str) -> None:
    """Others compute the `kid` from the key, too."""
    assert signing.thumbprint(jwk) == expected


@pytest.mark.parametrize("algorithm", signing.GENERATE)
@pytest.mark.parametrize("token_type", ["at+jwt", "JWT"])
def test_a_signer_signs_what_its_published_half_verifies(
    algorithm: Algorithm, token_type: TokenType
) -> None:
    """Header and signature as another JOSE library reads them.  RFC 7515 §5.1, RFC 9068 §2.1."""
    ring = a_ring(a_record(algorithm=algorithm))
    signer = ring.signer(algorithm, NOON)
    signing_input, _, signature = signer.sign(token_type, b"{}").rpartition(b".")

    header = json.loads(base64url_decode(signer.header_segments[token_type]))
    jwk = jwt.PyJWK(dict(ring.key_set(NOON)["keys"][0]))

    assert header == {"typ": token_type, "alg": algorithm, "kid": signer.kid}
    assert signing_input == signer.header_segments[token_type] + b".e30"
    assert jwk.Algorithm.verify(signing_input, jwk.key, base64url_decode(signature))


def test_private_halves_lie_sealed_under_their_kid() -> None:
    """Whoever has the database alone can sign nothing; two rows cannot be swapped."""
    one, other = a_record(), a_record()
    swapped = replace(one, sealed_private=other.sealed_private)

    assert b"PRIVATE" not in one.sealed_private
    with pytest.raises(NoSigner):
        a_ring(swapped).signer("ES256", NOON)


def test_a_signing_key_that_does_not_open_is_published_and_does_not_sign() -> None:
    """Tokens of other nodes go on verifying; this one refuses to start."""
    other = SealingKey.of(bytes(31) + b"x")

    ring = Ring.read([a_record()], SealingKeys({other.id: other}), NO_RING)

    assert len(ring.key_set(NOON)["keys"]) == 1
    with pytest.raises(NoSigner):
        ring.signer("ES256", NOON)
    with pytest.raises(BadSealingKey, match="put the deployment's own"):
        ring.require_open()


def test_a_withdrawn_signing_key_need_not_open() -> None:
    """It is never used again: a lost sealing key of old must not stop the start."""
    other = SealingKey.of(bytes(31) + b"x")

    Ring.read([a_record(withdrawn_at=NOON)], SealingKeys({other.id: other}), NO_RING).require_open()


def test_no_repr_shows_a_private_key() -> None:
    """K27: values end in tracebacks."""
    ring = a_ring(a_record())
    (signing_key,) = ring.signing_keys

    told = f"{signing_key!r} {ring.signer('ES256', NOON)!r}"

    assert "private" not in told.lower()


# --- rotating and withdrawing, on a store


@dataclass(frozen=True)
class Hand:
    """An operator's hand on the ring of one deployment."""

    store: Store
    sealing_key: SealingKey

    def rotate(self, now: int, *, algorithm: Algorithm = "ES256", at_once: bool = False) -> str:
        return signing.rotate(
            self.store, self.sealing_key, algorithm, TESTER, now=now, at_once=at_once
        )

    def withdraw(self, kid: str, now: int, *, force: bool = False) -> bool:
        return signing.withdraw(self.store, kid, TESTER, now=now, force=force)

    def ring(self) -> Ring:
        sealing_keys = SealingKeys({self.sealing_key.id: self.sealing_key})
        return Ring.read(self.store.signing_keys(), sealing_keys, NO_RING)

    def signs(self, now: int, algorithm: Algorithm = "ES256") -> str:
        return self.ring().signer(algorithm, now).kid

    def log_of(self, kid: str) -> list[tuple[str, bool, str]]:
        with self.store.transaction(read_only=True) as tx:
            return [(row.what, row.narrows, row.actor) for row in tx.changes(kid)]


@pytest.fixture
def hand(deployment: Deployment) -> Hand:
    return Hand(deployment.store, sealing.load(deployment.settings.keys_dir).newest())


def test_a_new_deployment_signs_with_its_algorithms_at_once(hand: Hand) -> None:
    """Nothing was published before, so nobody has cached a set without them."""
    for algorithm in FIRST:
        assert hand.signs(NOON, algorithm)


@pytest.mark.parametrize(
    ("used", "expected"), [((), FIRST), (("EdDSA",), (*FIRST, "EdDSA")), (("RS256",), FIRST)]
)
def test_eddsa_is_published_only_where_it_is_used(
    used: tuple[Algorithm, ...], expected: tuple[Algorithm, ...]
) -> None:
    """Some verifiers stumble over a key type that they do not know."""
    lines = signing.first_lines(used)

    assert lines == [*(("token", algorithm) for algorithm in expected), ("feed", "ES256")]


def test_a_new_line_signs_after_its_first_rotation(hand: Hand) -> None:
    """A deployment that never used EdDSA gets there by the same command, a day ahead."""
    kid = hand.rotate(NOON, algorithm="EdDSA")

    assert kid in [one["kid"] for one in hand.ring().key_set(NOON)["keys"]]
    with pytest.raises(NoSigner, match="no EdDSA signing key"):
        hand.signs(NOON, "EdDSA")
    assert hand.signs(NOON + PUBLISH_AHEAD, "EdDSA") == kid


def test_a_rotation_publishes_now_and_signs_a_day_later(hand: Hand) -> None:
    """K20: no verifier meets a `kid` that its cached key set does not have."""
    old = hand.signs(NOON)

    new = hand.rotate(NOON)

    assert new in [one["kid"] for one in hand.ring().key_set(NOON)["keys"]]
    assert hand.signs(NOON + PUBLISH_AHEAD - 1) == old
    assert hand.signs(NOON + PUBLISH_AHEAD) == new


def test_a_rotation_at_once_signs_at_once(hand: Hand) -> None:
    """For emergencies: `--now` is the operator's word."""
    new = hand.rotate(NOON + HOUR, at_once=True)

    assert hand.signs(NOON + HOUR) == new


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("later", [0, HOUR, PUBLISH_AHEAD - 1])
def test_while_a_signing_key_waits_another_rotation_is_refused(
    hand: Hand, later: int, at_once: bool
) -> None:
    """K20: rotation faster than the lead time would publish a queue of keys."""
    waiting = hand.rotate(NOON)
    before = hand.store.head()

    with pytest.raises(SigningKeyConflict, match=f"{waiting} is waiting to start"):
        hand.rotate(NOON + later, at_once=at_once)

    assert hand.store.head() == before
    assert len(hand.store.signing_keys()) == len(signing.first_lines(())) + 1


def test_once_it_has_started_the_next_rotation_is_fine(hand: Hand) -> None:
    """Day after day."""
    for day in range(3):
        new = hand.rotate(NOON + day * PUBLISH_AHEAD)
        assert hand.signs(NOON + (day + 1) * PUBLISH_AHEAD) == new


def test_one_that_was_withdrawn_while_waiting_blocks_nothing(hand: Hand) -> None:
    """The message says `or withdraw it first`."""
    hand.withdraw(hand.rotate(NOON), NOON + 1)

    assert hand.rotate(NOON + 2)


def test_another_algorithm_may_rotate_meanwhile(hand: Hand) -> None:
    """Each has its own succession."""
    hand.rotate(NOON)

    assert hand.rotate(NOON, algorithm="RS256")


@pytest.mark.parametrize("processes", [1, 2])
def test_of_two_operators_who_rotate_at_once_one_wins(
    deployment: Deployment, hand: Hand, processes: int
) -> None:
    """K21, F9: one new signing key; the other operator is told of it."""
    stores = [deployment.store, deployment.store]
    if processes > 1:
        stores[1] = open_store(deployment.settings.database_url)
    hands = [Hand(store, hand.sealing_key) for store in stores]
    outcomes = at_once([partial(one.rotate, NOON) for one in hands])
    stores[1].close()

    told = [outcome for outcome in outcomes if isinstance(outcome, SigningKeyConflict)]
    made = [outcome for outcome in outcomes if isinstance(outcome, str)]

    assert (len(made), len(told)) == (1, 1), outcomes
    assert made[0] in str(told[0])
    assert len(hand.store.signing_keys()) == len(signing.first_lines(())) + 1


def at_once(actions: list[Callable[[], str]]) -> list[object]:
    """What each action returns or raises, when all of them are let go together."""
    barrier = threading.Barrier(len(actions))
    outcomes: list[object] = []

    def run(action: Callable[[], str]) -> None:
        barrier.wait()
        try:
            outcomes.append(action())
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_the_only_signing_key_is_not_withdrawn_by_accident(hand: Hand) -> None:
    """K12: refused without force, and nothing has changed."""
    only = hand.signs(NOON)
    before = hand.store.head()

    with pytest.raises(
        SigningKeyConflict, match=r"rotate --for token --algorithm ES256 --now first"
    ):
        hand.withdraw(only, NOON)

    assert hand.signs(NOON) == only
    assert hand.store.head() == before


def test_a_waiting_successor_does_not_count_as_a_signer(hand: Hand) -> None:
    """K12: until it starts there would be none."""
    only = hand.signs(NOON)
    hand.rotate(NOON)

    with pytest.raises(SigningKeyConflict):
        hand.withdraw(only, NOON + 1)


def test_a_signing_key_of_another_algorithm_does_not_count_either(hand: Hand) -> None:
    """The default audience's tokens are ES256, whatever else could sign."""
    assert hand.signs(NOON, "RS256")
    with pytest.raises(SigningKeyConflict):
        hand.withdraw(hand.signs(NOON, "ES256"), NOON)


def test_with_force_the_only_signing_key_goes_and_nothing_is_signed(hand: Hand) -> None:
    """K12: then 503, never an unsigned token."""
    only = hand.signs(NOON)

    assert hand.withdraw(only, NOON, force=True) is True

    with pytest.raises(NoSigner):
        hand.signs(NOON)
    assert only not in [one["kid"] for one in hand.ring().key_set(NOON)["keys"]]


def test_with_force_the_token_endpoint_answers_503(
    deployment: Deployment, http: TestClient
) -> None:
    """K12, seen from outside: an outage of ours is never the caller's 401."""
    made = deployment.api_key()
    signing.withdraw(
        deployment.store,
        RingKeeper(deployment.store, sealing.load(deployment.settings.keys_dir))
        .at(0)
        .signer("ES256", NOON)
        .kid,
        TESTER,
        now=NOON,
        force=True,
    )

    answer = http.post("/oauth/token", data=form(made.key))

    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.headers["retry-after"]


def test_after_a_rotation_at_once_the_old_one_can_be_withdrawn(hand: Hand) -> None:
    """The order that the refusal tells: rotate --now, then withdraw."""
    old = hand.signs(NOON)
    new = hand.rotate(NOON + 1, at_once=True)

    assert hand.withdraw(old, NOON + 2) is True
    assert hand.signs(NOON + 2) == new


def test_withdrawing_twice_is_withdrawing_once(hand: Hand) -> None:
    """The second time says so, and leaves no second row."""
    waiting = hand.rotate(NOON)

    assert hand.withdraw(waiting, NOON + 1) is True
    assert hand.withdraw(waiting, NOON + 2) is False

    assert len(hand.log_of(waiting)) == 2


def test_an_unknown_signing_key_is_told(hand: Hand) -> None:
    """It has an exit code of its own."""
    with pytest.raises(signing.UnknownSigningKey):
        hand.withdraw("no-such-kid", NOON)


def test_each_operation_is_one_row_of_the_change_log(hand: Hand) -> None:
    """Who did it stands there; a withdrawal narrows, a rotation does not."""
    before = hand.store.head()
    kid = hand.rotate(NOON)
    hand.withdraw(kid, NOON + 1)

    assert hand.store.head() == before + 2
    assert hand.log_of(kid) == [
        ("signing_key.created", False, TESTER.id),
        ("signing_key.withdrawn", True, TESTER.id),
    ]


def test_after_every_operation_the_key_set_is_whole(hand: Hand) -> None:
    """K22: public members only, each `kid` once, `alg` and `use` set."""
    old = hand.signs(NOON)
    waiting: list[str] = []
    operations: list[tuple[int, Callable[[int], object]]] = [
        (NOON, lambda now: waiting.append(hand.rotate(now))),
        (NOON + 1, lambda now: hand.withdraw(waiting.pop(), now)),
        (NOON + 2, lambda now: hand.rotate(now, at_once=True)),
        (NOON + 3, lambda now: hand.withdraw(old, now)),
        (NOON + 4, lambda now: hand.rotate(now, algorithm="RS256")),
    ]
    for now, operation in operations:
        operation(now)

        keys = hand.ring().key_set(now)["keys"]
        kids = [key["kid"] for key in keys]

        assert len(kids) == len(set(kids))
        assert all(set(key) == PUBLIC_MEMBERS[key["alg"]] for key in keys)
        assert {hand.signs(now), hand.signs(now, "RS256")} <= set(kids)


def test_after_a_change_of_algorithm_the_old_signing_key_stays_published(
    deployment: Deployment, http: TestClient
) -> None:
    """K19: tokens that are out there verify until they expire."""
    made = deployment.api_key()
    before = http.post("/oauth/token", data=form(made.key)).json()["access_token"]
    changed = replace(
        deployment,
        service=Service(
            deployment.settings.model_copy(update={"algorithm": "RS256"}),
            deployment.store,
            deployment.clock,
        ),
    )

    with a_client(changed) as other:
        after = other.post("/oauth/token", data=form(made.key)).json()["access_token"]
        kids = {key["kid"] for key in other.get("/.well-known/jwks.json").json()["keys"]}

    headers = [jwt.get_unverified_header(token) for token in (before, after)]
    assert [header["alg"] for header in headers] == ["ES256", "RS256"]
    assert {header["kid"] for header in headers} <= kids


def test_who_succeeds_another_one_than_the_newest_is_told(hand: Hand) -> None:
    """K21: both looked before either wrote; the second is told whom it would have replaced."""
    seen = hand.signs(NOON)
    made = signing.rotate(
        hand.store, hand.sealing_key, "ES256", TESTER, now=NOON + 1, at_once=True, succeeds=seen
    )
    before = hand.store.head()

    with pytest.raises(SigningKeyConflict, match=f"{made} was made meanwhile"):
        signing.rotate(
            hand.store, hand.sealing_key, "ES256", TESTER, now=NOON + 2, at_once=True, succeeds=seen
        )

    assert hand.store.head() == before


def test_the_newest_is_the_one_from_before_the_question(hand: Hand) -> None:
    """A command takes a moment to start: what was made since then is news to whoever ran it."""
    first = hand.signs(NOON)
    made = signing.rotate(
        hand.store,
        hand.sealing_key,
        "ES256",
        TESTER,
        now=NOON + 1,
        at_once=True,
        detail={signing.MADE_AT_MS: 1000 * NOON + 1700},
    )

    def newest(moment_ms: int) -> str | None:
        return signing.newest_before(hand.store, ("token", "ES256"), 1000 * NOON + moment_ms)

    assert newest(1699) == first
    assert newest(1700) == made
    assert signing.newest_before(hand.store, ("token", "EdDSA"), 1000 * NOON) is None


# --- rotating by itself


def look(deployment: Deployment, service: Service | None = None) -> list[Row]:
    """Let a node look whether something is due.  Returns the signing keys that it made."""
    before = {record.kid for record in deployment.store.signing_keys()}
    asyncio.run((service or deployment.service).rotate_due())
    with deployment.store.transaction(read_only=True) as tx:
        return [row for row in tx.signing_keys() if row.kid not in before]


DUE = NOON + ROTATE_EVERY - PUBLISH_AHEAD


def test_signing_keys_rotate_by_themselves(deployment: Deployment, hand: Hand) -> None:
    """Published a day ahead, so that the successor signs when the old one is 90 days old."""
    old = {algorithm: hand.signs(NOON, algorithm) for algorithm in FIRST}
    deployment.clock.now = DUE - 1
    assert look(deployment) == []

    deployment.clock.now = DUE
    made = look(deployment)

    lines = {(row.purpose, row.algorithm) for row in made}
    assert lines == set(signing.first_lines(()))
    assert len(made) == len(lines)
    assert {row.starts_at for row in made} == {NOON + ROTATE_EVERY}
    assert {row.sealing_key_id for row in made} == {hand.sealing_key.id}
    for row in made:
        assert hand.log_of(row.kid) == [("signing_key.created", False, "service:rotation")]
    for algorithm in FIRST:
        assert hand.signs(NOON + ROTATE_EVERY - 1, algorithm) == old[algorithm]
        assert hand.signs(NOON + ROTATE_EVERY, algorithm) in {row.kid for row in made}
    # Each look after that finds them waiting, and the next ones are due in a quarter.
    for later in (DUE + 1, NOON + ROTATE_EVERY, DUE + ROTATE_EVERY - 1):
        deployment.clock.now = later
        assert look(deployment) == []
    deployment.clock.now = DUE + ROTATE_EVERY
    assert len(look(deployment)) == len(lines)


def test_after_a_long_pause_the_successor_is_still_published_ahead(deployment: Deployment) -> None:
    """K20: a node that was off for a year must not sign with what nobody has in a cache."""
    deployment.clock.now = NOON + 365 * DAY

    made = look(deployment)

    assert {row.starts_at for row in made} == {NOON + 365 * DAY + PUBLISH_AHEAD}


def test_told_never_to_they_never_rotate(tmp_path: Path) -> None:
    """COATCHECK_ROTATE_EVERY=0: an operator who does it by hand."""
    with a_deployment(tmp_path, rotate_every=0) as made:
        made.clock.now = NOON + 3650 * DAY

        assert look(made) == []


def test_a_node_that_was_not_started_anew_rotates_under_the_new_sealing_key(
    deployment: Deployment,
) -> None:
    """Re-sealed while it ran: it goes on with what it has opened, and reads the new file."""
    keys_dir = deployment.settings.keys_dir
    (old,) = sealing.load(keys_dir).files
    new = sealing.create(keys_dir)
    signing.reseal(deployment.store, sealing.load(keys_dir), new, TESTER, now=NOON)
    old.path.unlink()
    deployment.clock.now = DUE

    assert {row.sealing_key_id for row in look(deployment)} == {new.id}


def test_a_node_without_the_new_sealing_key_makes_nothing_with_the_old_one(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """Another node's turn; this one says which file it lacks."""
    keys_dir = deployment.settings.keys_dir
    new = sealing.create(keys_dir)
    signing.reseal(deployment.store, sealing.load(keys_dir), new, TESTER, now=NOON)
    (keys_dir / f"sealing-{new.id}.key").unlink()
    deployment.clock.now = DUE

    assert look(deployment) == []
    assert f"put sealing-{new.id}.key there" in caplog.text


def test_a_rotation_by_hand_counts(deployment: Deployment, hand: Hand) -> None:
    """The age is that of the one that signs, whoever made it."""
    hand.rotate(DUE - DAY, at_once=True)
    deployment.clock.now = DUE

    assert ("token", "ES256") not in {(row.purpose, row.algorithm) for row in look(deployment)}


def test_a_line_that_an_operator_stopped_stays_stopped(deployment: Deployment, hand: Hand) -> None:
    """K12: whoever withdrew the last one by force is the one to start it again."""
    hand.withdraw(hand.signs(NOON), NOON, force=True)
    deployment.clock.now = DUE

    assert ("token", "ES256") not in {(row.purpose, row.algorithm) for row in look(deployment)}


def test_a_line_that_nobody_uses_does_not_rotate(deployment: Deployment, hand: Hand) -> None:
    """One that was imported for the tokens that are out there ends with them."""
    hand.rotate(NOON, algorithm="EdDSA", at_once=True)
    deployment.clock.now = DUE

    assert "EdDSA" not in {row.algorithm for row in look(deployment)}


def test_while_the_database_is_away_a_rotation_waits(
    deployment: Deployment, tmp_path: Path
) -> None:
    """There is a day for it; the task that looks lives on."""
    deployment.clock.now = DUE
    deployment.store.close()
    (tmp_path / "coatcheck.db").rename(tmp_path / "away.db")
    asyncio.run(deployment.service.rotate_due())
    deployment.store.close()
    (tmp_path / "away.db").rename(tmp_path / "coatcheck.db")

    assert len(look(deployment)) == len(signing.first_lines(()))


def rotated(node: Service) -> str:
    return str(asyncio.run(node.rotate_due()))


@contextmanager
def another_node(deployment: Deployment) -> Iterator[Service]:
    """A second service on the same database."""
    with closing(open_store(deployment.settings.database_url)) as store:
        yield Service(deployment.settings, store, deployment.clock)


def test_two_nodes_that_rotate_at_once_make_one_signing_key(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """F9: the other one is told, which is no news to anybody; both publish the same."""
    deployment.clock.now = DUE
    before = len(deployment.store.signing_keys())

    with another_node(deployment) as other, ExitStack() as stack:
        nodes = (deployment.service, other)
        outcomes = at_once([partial(rotated, node) for node in nodes])
        clients = [
            stack.enter_context(a_client(replace(deployment, service=node))) for node in nodes
        ]
        sets = [client.get("/.well-known/jwks.json").content for client in clients]

    assert outcomes == ["None", "None"]
    assert len(deployment.store.signing_keys()) == before + len(signing.first_lines(()))
    assert sets[0] == sets[1]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# --- withdrawn everywhere


def test_a_withdrawal_on_one_node_is_a_withdrawal_on_all(
    deployment: Deployment, hand: Hand
) -> None:
    """Key set, feed and signer of a node that was told nothing follow the change log."""
    made = deployment.api_key()
    old, old_feed = hand.signs(NOON), hand.ring().signer("ES256", NOON, "feed").kid

    def told_by(client: TestClient) -> tuple[set[str], set[str], set[str], str]:
        """The kids of the key set, of the feed, of the feed's own keys; and who signs."""
        key_set = client.get("/.well-known/jwks.json").json()["keys"]
        own = client.get("/.well-known/coatcheck").json()["revocation_keys"]["keys"]
        feed = client.get("/oauth/revocations").text
        listed = jwt.decode(feed, options={"verify_signature": False})["kids"]
        token = client.post("/oauth/token", data=form(made.key)).json()["access_token"]
        return (
            {key["kid"] for key in key_set},
            set(listed),
            {key["kid"] for key in own},
            jwt.get_unverified_header(token)["kid"],
        )

    with another_node(deployment) as other, a_client(replace(deployment, service=other)) as client:
        before = told_by(client)
        new = hand.rotate(NOON, at_once=True)
        new_feed = signing.rotate(
            hand.store, hand.sealing_key, "ES256", TESTER, now=NOON, at_once=True, purpose="feed"
        )
        hand.withdraw(old, NOON)
        hand.withdraw(old_feed, NOON)
        after = told_by(client)

    assert (old in before[0], old_feed in before[2], before[3]) == (True, True, old)
    assert {old, old_feed} <= before[1]
    assert not {old, old_feed} & (after[0] | after[1] | after[2])
    assert (new in after[0], new_feed in after[2], after[3]) == (True, True, new)
    assert {new, new_feed} <= after[1]


# --- imported


def a_pair(algorithm: Algorithm = "ES256") -> KeyPair:
    return keyfile.of(signing.GENERATE[algorithm]())


def take_in(hand: Hand, pair: KeyPair, **options: Any) -> str:
    return signing.take_in(hand.store, hand.sealing_key, pair, TESTER, **{"now": NOON} | options)


@pytest.mark.parametrize("algorithm", signing.GENERATE)
def test_an_imported_signing_key_is_published_first_and_signs_later(
    hand: Hand, algorithm: Algorithm
) -> None:
    """K16: as one made here, under its thumbprint; the row says that it came from elsewhere."""
    pair = a_pair(algorithm)

    kid = take_in(hand, pair)

    assert kid == signing.thumbprint(pair.public_jwk)
    published = {one["kid"]: one for one in hand.ring().key_set(NOON)["keys"]}
    assert set(published[kid]) == PUBLIC_MEMBERS[algorithm]
    assert hand.signs(NOON + PUBLISH_AHEAD, algorithm) == kid
    with hand.store.transaction(read_only=True) as tx:
        (change,) = tx.changes(kid)
    assert json.loads(change.detail)["imported"] is True


def test_an_imported_signing_key_may_sign_at_once_and_keep_its_name(
    deployment: Deployment, hand: Hand, http: TestClient
) -> None:
    """A migration: tokens out there name it, and verifiers have it."""
    take_in(hand, a_pair(), kid="2019-01=key/1", at_once=True)

    answer = http.post("/oauth/token", data=form(deployment.api_key().key))

    header = jwt.get_unverified_header(answer.json()["access_token"])
    assert header["kid"] == "2019-01=key/1"


def test_one_key_has_one_name(hand: Hand) -> None:
    """K15: the same key under two kids, and one that was withdrawn, which is for ever."""
    pair = a_pair()
    kid = take_in(hand, pair)

    with pytest.raises(SigningKeyConflict, match=f"in the ring already, as signing key {kid}"):
        take_in(hand, pair, kid="another")
    hand.withdraw(kid, NOON)
    with pytest.raises(SigningKeyConflict, match="it was withdrawn, which is for ever"):
        take_in(hand, pair, kid="another")
    with pytest.raises(SigningKeyConflict, match="it was withdrawn, which is for ever"):
        take_in(hand, pair)


def test_one_name_stands_for_one_key(hand: Hand) -> None:
    """K15: two keys under one kid, also in two lines."""
    take_in(hand, a_pair(), kid="main")

    for algorithm in signing.GENERATE:
        with pytest.raises(SigningKeyConflict, match="another key has the kid main already"):
            take_in(hand, a_pair(algorithm), kid="main")


def test_an_import_waits_for_the_one_that_waits(hand: Hand) -> None:
    """K20, as a rotation does."""
    waiting = hand.rotate(NOON)

    with pytest.raises(SigningKeyConflict, match=f"{waiting} is waiting to start"):
        take_in(hand, a_pair(), at_once=True)


NO_NAMES = {
    "empty": "",
    "a blank": "a b",
    "a line feed": "a\n",
    "an escape": "\x1b[31m",
    "quotes": 'a"b',
    "any": "*",
    "beyond ASCII": "schlüssel",
    "too long": "k" * 129,
}


@pytest.mark.parametrize("kid", NO_NAMES.values(), ids=NO_NAMES)
def test_a_name_that_does_not_go_everywhere_is_refused(hand: Hand, kid: str) -> None:
    """It stands in headers, feeds, log lines and on command lines."""
    with pytest.raises(UnfitKey, match="its kid"):
        take_in(hand, a_pair(), kid=kid)


def test_a_name_that_makes_tokens_too_long_is_refused(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest RSA signature leaves no room for it in 4 KiB."""
    # Making such a key takes seconds; what counts is that both are looked at together.
    monkeypatch.setattr(signing, "MAX_HEADER_AND_SIGNATURE", 300)

    assert take_in(hand, a_pair(), kid="k" * 64)
    with pytest.raises(UnfitKey, match="too long for a token"):
        take_in(hand, a_pair(), kid="l" * 128, at_once=True)


def test_the_feed_is_signed_by_its_own_algorithm_only(hand: Hand) -> None:
    """Only our own verifier reads it, so there is one choice."""
    with pytest.raises(UnfitKey, match="feeds are signed by ES256"):
        take_in(hand, a_pair("EdDSA"), purpose="feed")

    assert take_in(hand, a_pair(), purpose="feed")


@pytest.mark.parametrize("algorithm", signing.GENERATE)
def test_halves_that_do_not_match_are_not_imported(hand: Hand, algorithm: Algorithm) -> None:
    """K14: sign with one, verify with the other; whoever read the file."""
    one, other = a_pair(algorithm), a_pair(algorithm)

    with pytest.raises(UnfitKey, match="halves do not match"):
        take_in(hand, KeyPair(algorithm, other.public_jwk, one.private))


def test_a_key_that_our_own_verifier_leaves_out_is_not_imported(hand: Hand) -> None:
    """Everything it signs would be refused."""
    pair = a_pair()

    with pytest.raises(UnfitKey, match="verifiers leave its public half out"):
        take_in(hand, KeyPair("ES256", {**pair.public_jwk, "x": "AAAA"}, pair.private))


# --- halves that came apart


def test_a_signing_key_whose_halves_came_apart_does_not_sign(
    deployment: Deployment, hand: Hand
) -> None:
    """K14: somebody has changed the database; no token is made that nobody would take."""
    kid = hand.signs(NOON)
    with deployment.store.transaction() as tx:
        row = tx.signing_key(kid)
        assert row is not None
        changed = json.loads(a_record().public_jwk) | {"kid": kid}
        row.public_jwk = json.dumps(changed)

    with pytest.raises(NoSigner):
        hand.signs(NOON)
    with pytest.raises(BadSigningKey, match=r"halves do not match.*withdraw"):
        hand.ring().require_open()
    with pytest.raises(BadSigningKey, match="halves do not match"), another_node(deployment):
        pass
    hand.withdraw(kid, NOON, force=True)
    hand.ring().require_open()


# --- shrunken durations


def test_with_shorter_durations_states_follow_them(tmp_path: Path) -> None:
    """COATCHECK_UNSAFE_KEY_SET_MAX_AGE: ahead, after and the header, all in one relation."""
    with a_deployment(
        tmp_path, unsafe_key_set_max_age=2, unsafe_token_lifetime=10, rotate_every=60
    ) as made:
        first = {record.kid for record in made.store.signing_keys()}
        made.clock.now = NOON + 60 - 5
        (successor,) = [row for row in look(made) if row.algorithm == "RS256"]

        def published(now: int) -> set[str]:
            made.clock.now = now
            with a_client(made) as client:
                answer = client.get("/.well-known/jwks.json")
            assert answer.headers["cache-control"] == "public, max-age=2"
            return {key["kid"] for key in answer.json()["keys"]}

        assert successor.starts_at == NOON + 60
        assert successor.kid in published(NOON + 60)
        assert len(published(NOON + 79) & first) == 2
        assert not published(NOON + 80) & first
        assert made.settings.publication == Publication.shrunk(2, 10)


# --- the keeper


def test_the_keeper_follows_the_change_log(deployment: Deployment, hand: Hand) -> None:
    """A rotation on another node is seen with the next position of the log."""
    keeper = RingKeeper(deployment.store, SealingKeys({hand.sealing_key.id: hand.sealing_key}))
    before = keeper.at(deployment.store.head())

    kid = hand.rotate(NOON)

    assert before.get(kid) is None
    assert keeper.at(deployment.store.head()).get(kid) is not None
    assert keeper.last_known.get(kid) is not None


def test_an_unmoved_log_costs_no_reading(deployment: Deployment, hand: Hand) -> None:
    """The token path asks for the ring every time."""
    keeper = RingKeeper(deployment.store, SealingKeys({hand.sealing_key.id: hand.sealing_key}))
    head = deployment.store.head()

    assert keeper.at(head) is keeper.at(head)


def test_while_the_database_is_away_the_last_ring_is_known(
    deployment: Deployment, hand: Hand, tmp_path: Path
) -> None:
    """The key set is served from memory: verification goes on through an outage."""
    keeper = RingKeeper(deployment.store, SealingKeys({hand.sealing_key.id: hand.sealing_key}))
    ring = keeper.at(deployment.store.head())
    deployment.store.close()
    (tmp_path / "coatcheck.db").rename(tmp_path / "away.db")

    with pytest.raises(StoreUnavailable):
        keeper.at(10_000)

    assert keeper.last_known is ring


def test_a_sealing_key_that_came_later_is_found(deployment: Deployment, hand: Hand) -> None:
    """Another node was given the new one first; this one goes on, and signs once it has it too."""
    keys_dir = deployment.settings.keys_dir
    new = SealingKey.of(bytes(31) + b"x")
    loaded = [sealing.load(keys_dir)]
    keeper = RingKeeper(deployment.store, loaded[0], load_again=lambda: loaded[-1])
    both = SealingKeys({new.id: new, **loaded[0].by_id})
    before = keeper.at(deployment.store.head()).signer("ES256", NOON).kid
    signing.reseal(deployment.store, both, new, TESTER, now=NOON)
    made = signing.rotate(deployment.store, new, "ES256", TESTER, now=NOON)

    ring = keeper.at(deployment.store.head())
    assert ring.signer("ES256", NOON).kid == before
    assert made in {one["kid"] for one in ring.key_set(NOON)["keys"]}
    with pytest.raises(NoSigner):
        ring.signer("ES256", NOON + PUBLISH_AHEAD)

    loaded.append(both)
    assert keeper.at(deployment.store.head()) is ring
    keeper.try_again()
    assert keeper.at(deployment.store.head()).signer("ES256", NOON + PUBLISH_AHEAD).kid == made
