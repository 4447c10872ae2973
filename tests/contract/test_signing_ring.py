"""What holds the ring of signing keys together on every database: nobody is there twice.

answers.md F9, K15, K21.  Where writers run side by side, a look before a write proves nothing
unless something is held in between.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from coatcheck.server import keyfile, signing
from coatcheck.server.sealing import SealingKey, SealingKeys
from coatcheck.server.signing import SigningKeyConflict
from coatcheck.server.store import STORES, Store, Transaction, open_store
from coatcheck.server.store.tables import Deployment, SigningKey
from support.deployment import ISSUER, NOON, TESTER

OLD: Final = SealingKey.of(bytes(32))
NEW: Final = SealingKey.of(bytes(31) + b"x")
BOTH: Final = SealingKeys({NEW.id: NEW, OLD.id: OLD})
NODES: Final = 3


@dataclass(frozen=True)
class Nodes:
    """Stores of one database, as several nodes open it."""

    stores: list[Store]
    first: str

    def rows(self) -> list[SigningKey]:
        with self.stores[0].transaction(read_only=True) as tx:
            return list(tx.signing_keys())

    def at_once(self, *actions: Callable[[Store], object]) -> list[object]:
        """What comes of an action on each node, all let go together; of one, of it on all."""
        barrier = threading.Barrier(len(self.stores))
        outcomes: list[object] = []

        def run(action: Callable[[Store], object], store: Store) -> None:
            barrier.wait()
            try:
                outcomes.append(action(store))
            except SigningKeyConflict as told:
                outcomes.append(told)

        whole = actions * NODES if len(actions) == 1 else actions
        threads = [
            threading.Thread(target=run, args=pair) for pair in zip(whole, self.stores, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


@pytest.fixture(params=STORES)
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    """Three nodes on a database with one ES256 signing key, for each database there is."""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    else:
        url = f"{request.param}:///{tmp_path}/coatcheck.db"
    with ExitStack() as stack:
        stores = [open_store(url) for _ in range(NODES)]
        for store in stores:
            stack.callback(store.close)
        stores[0].upgrade(create=True)
        with stores[0].transaction() as tx:
            tx.add(Deployment(issuer=ISSUER, log="log", created_at=NOON))
        first = signing.create(stores[0], OLD, "ES256", TESTER, now=NOON, starts_at=NOON)
        yield Nodes(stores, first)


@pytest.mark.parametrize("at_once", [False, True])
def test_of_all_who_rotate_at_once_one_wins(nodes: Nodes, at_once: bool) -> None:
    """K21, F9: one new signing key; the others are told, also where it signs at once."""
    rotate = partial(
        signing.rotate,
        sealing_key=OLD,
        algorithm="ES256",
        actor=TESTER,
        now=NOON + 1,
        at_once=at_once,
        succeeds=nodes.first,
    )
    outcomes = nodes.at_once(rotate)

    made = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(made) == 1, outcomes
    assert [row.kid for row in nodes.rows()] == [nodes.first, made[0]]
    assert all(made[0] in str(outcome) for outcome in outcomes)


def test_the_database_itself_refuses_the_second(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should two get through all the same, the place in the order is unique."""
    # What a version of old does, which knows no lock, where the database lets writers in together.
    met = threading.Barrier(NODES, timeout=0.5)
    look = Transaction.signing_keys

    def look_together(tx: Transaction) -> object:
        rows = look(tx)
        with suppress(threading.BrokenBarrierError):
            met.wait()
        return rows

    monkeypatch.setattr(Transaction, "lock_signing_keys", lambda _: None)
    monkeypatch.setattr(Transaction, "signing_keys", look_together)
    rotate = partial(signing.rotate, sealing_key=OLD, algorithm="ES256", actor=TESTER, now=NOON + 1)
    outcomes = nodes.at_once(rotate)
    monkeypatch.undo()

    assert sum(isinstance(outcome, str) for outcome in outcomes) == 1, outcomes
    assert len(nodes.rows()) == 2
    assert sorted(row.position for row in nodes.rows()) == [1, 2]


def test_one_key_cannot_come_in_twice_at_once(nodes: Nodes) -> None:
    """K15: under three kids, on three nodes, in one moment."""
    pair = keyfile.of(signing.GENERATE["EdDSA"]())
    take_in = partial(
        signing.take_in, sealing_key=OLD, pair=pair, actor=TESTER, now=NOON, succeeds=None
    )

    outcomes = nodes.at_once(*[partial(take_in, kid=kid) for kid in "abc"])

    assert sum(isinstance(outcome, str) for outcome in outcomes) == 1, outcomes
    assert len(nodes.rows()) == 2


def test_nothing_is_left_under_the_old_sealing_key(nodes: Nodes) -> None:
    """A rotation beside a re-sealing: what it makes is re-sealed, or it is told to try again."""
    outcomes = nodes.at_once(
        lambda store: signing.reseal(store, BOTH, NEW, TESTER, now=NOON),
        lambda store: signing.rotate(store, OLD, "ES256", TESTER, now=NOON),
        lambda store: signing.rotate(store, OLD, "EdDSA", TESTER, now=NOON),
    )

    told = [outcome for outcome in outcomes if isinstance(outcome, SigningKeyConflict)]
    assert all("re-sealed meanwhile" in str(one) for one in told)
    assert {row.sealing_key_id for row in nodes.rows()} == {NEW.id}
    assert len(nodes.rows()) == 3 - len(told)
