"""A follower that is told to catch up, or to forget: what tests and an outage's end need."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from coatcheck.testing import FakeIssuer
from coatcheck.verifier.changes import Changes
from coatcheck.verifier.errors import IssuerUnavailable

ISSUER = "https://again.example.com"
WAIT = 10


class Issuer(FakeIssuer):
    """Asked through `get` alone, by a follower of the test; polls can be held back."""

    def __init__(self) -> None:
        super().__init__(ISSUER)
        self.before: Callable[[], None] = lambda: None
        self.asked = 0

    def get(self, url: str) -> bytes:
        self.asked += "revocations?" in url
        answer = super().get(url)
        self.before()
        return answer

    @property
    def seq(self) -> int:
        return self._seq


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.down()


@pytest.fixture
def changes(issuer: Issuer) -> Iterator[Changes]:
    document = f"{ISSUER}/.well-known/coatcheck"
    changes = Changes(ISSUER, document, issuer.get, clock=time.time, monotonic=time.monotonic)
    yield changes
    changes.close()


def test_whoever_catches_up_knows_what_was_said(changes: Changes, issuer: Issuer) -> None:
    """When the call returns; and not what nobody has said."""
    changes.wait_for_first()
    issuer.revoke("org_1")

    assert changes.catch_up(issuer.seq)
    known = changes.known()
    assert known is not None
    assert len(known.entries) == 1
    assert not changes.catch_up(issuer.seq + 1, timeout_s=0.05)


def test_there_is_nothing_to_catch_up_on_before_anybody_asked_or_after_the_end(
    changes: Changes, issuer: Issuer
) -> None:
    """No thread is started for it."""
    assert changes.catch_up(1000)
    assert issuer.asked == 0
    changes.wait_for_first()
    changes.close()
    assert changes.catch_up(1000)


def test_catching_up_waits_for_no_pause(changes: Changes, issuer: Issuer) -> None:
    """After many failures the next try would be seconds away."""
    changes.wait_for_first()
    issuer.down()
    until = time.monotonic() + WAIT
    while changes.status().last_error is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    changes._failures = 20
    thread = changes._thread
    issuer.up()
    began = time.monotonic()

    assert changes.catch_up(issuer.seq)
    assert time.monotonic() - began < 2
    assert thread is not None
    thread.join(WAIT)
    assert not thread.is_alive(), "one thread asks, not two"


def test_what_was_forgotten_is_asked_for_anew(changes: Changes, issuer: Issuer) -> None:
    """As when it was made: nothing is accepted before the first feed."""
    changes.wait_for_first()
    thread = changes._thread
    issuer.down()
    changes.forget(wait_s=WAIT)

    assert thread is not None
    assert not thread.is_alive()
    assert changes.at_hand is None
    assert not changes.is_told
    assert (changes.status().state, changes.status().last_error) == ("none", None)
    issuer.up()
    assert changes.wait_for_first().seq == issuer.seq


def test_what_an_answer_brings_after_it_was_forgotten_does_not_count(
    changes: Changes, issuer: Issuer
) -> None:
    """Document, feed and failure alike: they may be another issuer's by now."""
    for turn in range(3):
        asked, may_answer = threading.Event(), threading.Event()
        left = [turn % 2]

        def hold(
            asked: threading.Event = asked,
            may_answer: threading.Event = may_answer,
            left: list[int] = left,
            turn: int = turn,
        ) -> None:
            if left[0]:
                left[0] -= 1
                return
            asked.set()
            assert may_answer.wait(WAIT)
            if turn == 2:
                raise OSError

        issuer.before = hold
        assert changes.known() is None
        thread = changes._thread
        assert asked.wait(WAIT)
        changes.forget()
        may_answer.set()
        assert thread is not None
        thread.join(WAIT)

        assert not thread.is_alive()
        status = changes.status()
        assert (changes.at_hand, status.state, status.last_error) == (None, "none", None)
        assert not changes.is_told
    issuer.before = lambda: None
    assert changes.wait_for_first()


def test_a_closed_follower_keeps_nobody_waiting(changes: Changes) -> None:
    """There is nobody who would still bring a feed."""
    changes.close()
    began = time.monotonic()
    for wait in (changes.wait_for_first, changes.wait_for_product):
        with pytest.raises(IssuerUnavailable):
            wait()

    assert time.monotonic() - began < 2


def test_the_thread_of_a_follower_that_is_let_go_ends_at_once(issuer: Issuer) -> None:
    """Also in the pause after a failure."""
    issuer.down()
    changes = Changes(
        ISSUER,
        f"{ISSUER}/.well-known/coatcheck",
        issuer.get,
        clock=time.time,
        monotonic=time.monotonic,
    )
    changes._failures = 20
    changes.known()
    thread = changes._thread
    assert thread is not None
    until = time.monotonic() + WAIT
    while changes._failures == 20:
        assert time.monotonic() < until
        time.sleep(0.001)
    del changes
    thread.join(2)

    assert not thread.is_alive()
