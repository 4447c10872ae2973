"""`coatcheck.server.metrics`: counts that hold over several workers and their deaths."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from coatcheck.server import metrics
from coatcheck.server.metrics import Board, Metrics
from support.deployment import DAY, ISSUER, MINUTE, NOON, Deployment

Sample = tuple[str, frozenset[tuple[str, str]]]


def read(text: str) -> dict[Sample, float]:
    """The samples of an exposition, as Prometheus' own reader finds them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def told(counted: Metrics) -> dict[Sample, float]:
    return read(counted.text({}, {}))


def sample(name: str, **labels: str) -> Sample:
    return name, frozenset(labels.items())


def test_prometheus_reads_what_is_told() -> None:
    """Every name with its kind and what it stands for."""
    counted = Metrics()
    counted.token("basic", "", 0.0002)
    counted.count(metrics.REQUESTS_SHED, "token")
    text = counted.text({(metrics.FEED_FOLLOWERS,): 3}, {(metrics.BUILD_INFO, "0.1.0"): 1})

    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
    assert read(text)[sample("coatcheck_build_info", version="0.1.0")] == 1
    assert read(text)[sample("coatcheck_feed_followers")] == 3
    assert read(text)[sample("coatcheck_requests_shed_total", endpoint="token")] == 1


def test_a_value_of_a_label_ends_where_it_should() -> None:
    """None of ours needs it today; a release that is named so would."""
    nasty = 'a"b\\c\nd'
    text = Metrics().text({}, {(metrics.BUILD_INFO, nasty): 1})

    assert read(text)[sample("coatcheck_build_info", version=nasty)] == 1


OUTCOMES = {
    "a token": (("form", "", False), ("issued", "", "form")),
    "a refusal": (("basic", "invalid_client", False), ("refused", "invalid_client", "basic")),
    "too many guesses": (
        ("form", "temporarily_unavailable", False),
        ("refused", "temporarily_unavailable", "form"),
    ),
    "our own trouble": (
        ("none", "temporarily_unavailable", True),
        ("failed", "temporarily_unavailable", "none"),
    ),
}


@pytest.mark.parametrize(("asked", "labels"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_request_for_a_token_is_counted_by_its_outcome(
    asked: tuple[str, str, bool], labels: tuple[str, str, str]
) -> None:
    """Whoever is woken at night looks for `failed`; `refused` is for the caller to mend."""
    counted = Metrics()
    method, error, failed = asked
    counted.token(method, error, 0.001, failed=failed)

    result, error, auth_method = labels
    one = sample(
        "coatcheck_token_requests_total", result=result, error=error, auth_method=auth_method
    )
    assert told(counted)[one] == 1


def test_a_token_counts_as_an_accepted_api_key() -> None:
    """Nobody gets one without, so that it is not counted twice on the way."""
    counted = Metrics()
    counted.token("bearer", "", 0.001)
    counted.token("bearer", "invalid_scope", 0.001)

    checked = sample(
        "coatcheck_credential_checks_total", method="bearer", result="accepted", reason=""
    )
    assert told(counted)[checked] == 1


def test_durations_are_a_histogram() -> None:
    """Each bucket holds those below it; the last holds all."""
    counted = Metrics()
    for seconds in (0.0001, 0.0003, 0.3, 60.0):
        counted.token("form", "", seconds)
    found = told(counted)

    def below(bound: str) -> float:
        return found[sample("coatcheck_token_duration_seconds_bucket", le=bound)]

    assert [below(bound) for bound in ("0.0001", "0.00025", "0.0005", "0.5", "2.5")] == [
        *(1, 1, 2, 3, 3)
    ]
    assert below("+Inf") == 4
    assert found[sample("coatcheck_token_duration_seconds_count")] == 4
    assert found[sample("coatcheck_token_duration_seconds_sum")] == pytest.approx(60.3004)


def test_however_many_values_a_label_may_get_their_number_is_bounded() -> None:
    """A mistake in one of our own labels must not fill the memory.  CWE-770."""
    counted = Metrics()
    for number in range(2000):
        counted.count(metrics.CREDENTIAL_CHECKS, "form", "refused", f"reason {number}")

    found = told(counted)
    other = sample(
        "coatcheck_credential_checks_total", method="other", result="other", reason="other"
    )
    assert len(found) < 600
    assert found[other] > 1400


# --- several workers

#: A worker: counts as often as it is told, writes that down, and then waits for its end.
WORKER = """
import sys
from coatcheck.server.metrics import Board, Metrics

slots, fd, number = map(int, sys.argv[1:])
counted = Metrics(Board(slots, fd))
for _ in range(number):
    counted.token("form", "", 0.001)
counted.flush({("coatcheck_requests_in_flight",): number})
print("written", flush=True)
sys.stdin.read()
"""
SLOTS = 3


class Service:
    """Workers on one board."""

    def __init__(self) -> None:
        self.board = Board(SLOTS)
        self._running: list[subprocess.Popen[str]] = []

    def worker(self, number: int) -> "subprocess.Popen[str]":
        """A worker that has counted so many tokens."""
        fd = self.board._fd
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(SLOTS), str(fd), str(number)],
            pass_fds=(fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        return process

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()
        os.close(self.board._fd)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


ISSUED = sample("coatcheck_token_requests_total", result="issued", error="", auth_method="form")
IN_FLIGHT = sample("coatcheck_requests_in_flight")


def test_whoever_is_asked_tells_what_all_have_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts never go back: not by asking another worker, not when one is killed or replaced."""
    first = service.worker(3)
    service.worker(4)
    asked = Metrics(service.board)
    asked.token("form", "", 0.001)

    found = told(asked)
    assert found[ISSUED] == 8
    assert found[IN_FLIGHT] == 7
    assert found[sample("coatcheck_workers")] == 3

    first.kill()
    first.wait()
    assert told(asked)[ISSUED] == 8

    # It takes the dead one's place, and goes on from there.
    service.worker(5)
    found = told(asked)
    assert found[ISSUED] == 13
    assert found[IN_FLIGHT] == 9

    # What nobody has written lately is not true any more; what was counted is.
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 60)
    found = told(asked)
    assert found[sample("coatcheck_workers")] == 1
    assert IN_FLIGHT not in found
    assert found[ISSUED] == 13


def test_without_a_free_slot_a_worker_works_all_the_same(service: Service) -> None:
    """More workers than there ever were: their counts are missing, nothing else is."""
    for _ in range(SLOTS):
        service.worker(1)
    counted = Metrics(service.board)
    counted.token("form", "", 0.001)
    counted.flush({})

    assert told(counted)[ISSUED] == 1


def test_a_torn_slot_tells_what_it_held_before(service: Service) -> None:
    """A worker that is killed while it writes leaves the half that it did not write."""
    asked = Metrics(service.board)
    for number in (1, 2):
        asked.token("form", "", 0.001)
        asked.flush({})
        assert told(asked)[ISSUED] == number

    slot = asked._slot
    assert slot is not None
    before = slot.read().counts[(metrics.TOKEN_REQUESTS, "issued", "", "form")]
    half = slot._start + slot._written % 2 * slot.HALF
    os.pwrite(service.board._fd, b"\xff" * 100, half + 20)

    assert slot.read().counts[(metrics.TOKEN_REQUESTS, "issued", "", "form")] == before


# --- how many API keys there are


def api_keys_told(operator: TestClient) -> dict[str, float]:
    """By status, and those that are expiring."""
    found = read(operator.get("/metrics").text)
    return {
        dict(labels).get("status", "expiring"): value
        for (name, labels), value in found.items()
        if name in (metrics.API_KEYS, metrics.API_KEYS_EXPIRING)
    }


@pytest.fixture
def operator(deployment: Deployment) -> Iterator[TestClient]:
    """Somebody on the machine itself."""
    with TestClient(deployment.service, base_url=ISSUER, client=("127.0.0.1", 4711)) as client:
        yield client


def test_api_keys_are_counted_by_status_once_a_minute(
    deployment: Deployment, operator: TestClient
) -> None:
    """However often somebody asks: a million of them take a while."""
    ends = (None, NOON + 14 * DAY, NOON + 14 * DAY + 1, NOON + 1)
    made = [deployment.api_key(expires_at=expires_at) for expires_at in ends]
    first = {"active": 5, "disabled": 0, "expired": 0, "revoked": 0, "expiring": 2}
    assert api_keys_told(operator) == first

    deployment.disable(made[0])
    deployment.revoke(made[1])
    deployment.clock.now = NOON + MINUTE - 1
    assert api_keys_told(operator) == first

    deployment.clock.now = NOON + MINUTE
    now = {"active": 2, "disabled": 1, "expired": 1, "revoked": 1, "expiring": 1}
    assert api_keys_told(operator) == now

    # A clock that was set back does not stop the counting.
    deployment.clock.now = NOON
    assert api_keys_told(operator) == now | {"active": 3, "expired": 0}


def test_what_cannot_be_counted_is_not_told(
    deployment: Deployment, operator: TestClient, tmp_path: Path
) -> None:
    """Everything else is, while the database is away: that is when somebody looks."""
    assert len(api_keys_told(operator)) == 5
    (tmp_path / "coatcheck.db").rename(tmp_path / "away.db")
    deployment.clock.now = NOON + MINUTE
    assert not api_keys_told(operator)
    assert operator.get("/metrics").status_code == 200

    (tmp_path / "away.db").rename(tmp_path / "coatcheck.db")
    deployment.clock.now = NOON + 2 * MINUTE
    assert len(api_keys_told(operator)) == 5
