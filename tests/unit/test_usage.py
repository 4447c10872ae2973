"""`coatcheck.server.usage`: counted in memory, written in batches, lost by nobody but a crash."""

import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.server.manage import api_keys
from coatcheck.server.store import open_store
from coatcheck.server.usage import Usage
from support.deployment import HOUR, MINUTE, NOON, Deployment, form


def used(deployment: Deployment, api_key_id: str) -> tuple[int, int | None]:
    """What `keys show` tells: how often, and when last."""
    view = api_keys.show(deployment.store, api_key_id, now=NOON)
    return view.tokens_issued, view.last_used_at


@pytest.fixture
def key_id(deployment: Deployment) -> str:
    return deployment.api_key().api_key.id


@pytest.fixture
def usage(deployment: Deployment) -> Usage:
    return Usage(deployment.store)


def test_nothing_is_written_before_the_flush(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """The token path never writes."""
    usage.count(key_id, NOON)

    assert used(deployment, key_id) == (0, None)


def test_a_flush_adds_to_what_was_written_before(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """Counts of many seconds become one row."""
    for second in range(3):
        usage.count(key_id, NOON + second)
        usage.count(key_id, NOON + second)
        usage.flush()

    assert used(deployment, key_id) == (6, NOON + 2)


def test_a_flush_of_nothing_writes_nothing(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """Counted once is counted once."""
    usage.count(key_id, NOON)
    usage.flush()
    usage.flush()

    assert used(deployment, key_id) == (1, NOON)


def test_each_key_has_its_own_count(deployment: Deployment, usage: Usage, key_id: str) -> None:
    """One row per used key."""
    other = deployment.api_key().api_key.id
    unused = deployment.api_key().api_key.id
    usage.count(key_id, NOON)
    usage.count(other, NOON + 1)
    usage.count(other, NOON + 2)

    usage.flush()

    assert used(deployment, key_id) == (1, NOON)
    assert used(deployment, other) == (2, NOON + 2)
    assert used(deployment, unused) == (0, None)


def test_workers_add_up(deployment: Deployment, usage: Usage, key_id: str) -> None:
    """Each process counts for itself and adds to the same row."""
    other_worker = Usage(open_store(deployment.settings.database_url))
    usage.count(key_id, NOON)
    other_worker.count(key_id, NOON + 1)

    usage.flush()
    other_worker.flush()

    assert used(deployment, key_id) == (2, NOON + 1)


def test_a_late_flush_does_not_turn_back_the_last_use(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """A worker that was cut off from the database brings its counts after the others."""
    late_worker = Usage(open_store(deployment.settings.database_url))
    late_worker.count(key_id, NOON)
    usage.count(key_id, NOON + MINUTE)

    usage.flush()
    late_worker.flush()

    assert used(deployment, key_id) == (2, NOON + MINUTE)


def test_counts_are_kept_while_the_database_is_away(
    deployment: Deployment, usage: Usage, key_id: str, tmp_path: Path
) -> None:
    """They are written by the first flush that succeeds, together with those that came since."""
    path = tmp_path / "coatcheck.db"
    usage.count(key_id, NOON)
    usage.count(key_id, NOON + 1)
    path.rename(tmp_path / "away.db")

    usage.flush()
    usage.count(key_id, NOON + 2)
    usage.flush()
    (tmp_path / "away.db").rename(path)
    usage.flush()

    assert used(deployment, key_id) == (3, NOON + 2)


def test_a_key_that_is_no_more_stops_nobody_elses_count(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """All counts of a flush are one transaction."""
    usage.count("key_0000000000000000000000", NOON)
    usage.count(key_id, NOON)

    usage.flush()

    assert used(deployment, key_id) == (1, NOON)


def test_no_count_is_lost_between_threads(
    deployment: Deployment, usage: Usage, key_id: str
) -> None:
    """The event loop counts while a thread flushes."""
    counted = threading.Event()

    def flush_all_the_time() -> None:
        while not counted.is_set():
            usage.flush()

    flushing = threading.Thread(target=flush_all_the_time)
    flushing.start()
    for _ in range(20_000):
        usage.count(key_id, NOON)
    counted.set()
    flushing.join()
    usage.flush()

    assert used(deployment, key_id) == (20_000, NOON)


# --- secrets that a rotation has replaced


def secrets_used(deployment: Deployment, api_key_id: str) -> dict[str, int | None]:
    """When each secret that works was used last, by its mask; of the current one nobody asks."""
    view = api_keys.show(deployment.store, api_key_id, now=deployment.now)
    return {secret.mask: secret.last_used_at for secret in view.secrets}


def test_who_rotates_sees_whether_the_old_secret_is_still_used(
    deployment: Deployment, http: TestClient
) -> None:
    """Ending the overlap is safe once nobody does; both uses count for the API key."""
    old = deployment.api_key()
    usage = deployment.service._usage
    http.post("/oauth/token", data=form(old.key))
    new = deployment.rotate(old, overlap_s=HOUR)
    masks = (old.api_key.mask, new.api_key.mask)
    usage.flush()
    assert secrets_used(deployment, old.api_key.id) == dict.fromkeys(masks)

    for minute, key, last in (
        (1, new.key, None),
        (2, old.key, NOON + 2 * MINUTE),
        (3, new.key, NOON + 2 * MINUTE),
    ):
        deployment.clock.now = NOON + minute * MINUTE
        assert http.post("/oauth/token", data=form(key)).status_code == 200
        usage.flush()
        assert secrets_used(deployment, old.api_key.id) == {masks[0]: last, masks[1]: None}

    assert used(deployment, old.api_key.id) == (4, NOON + 3 * MINUTE)


def test_the_last_use_of_a_replaced_secret_is_kept_and_never_goes_back(
    deployment: Deployment, usage: Usage, tmp_path: Path
) -> None:
    """As the count of its API key; a current secret has none, whoever says so."""
    old = deployment.api_key()
    new = deployment.rotate(old, overlap_s=HOUR)
    late_worker = Usage(open_store(deployment.settings.database_url))
    path = tmp_path / "coatcheck.db"

    def count(usage: Usage, key: str, now: int) -> None:
        usage.count(old.api_key.id, now, replaced_digest=apikey.digest(key))

    count(late_worker, old.key, NOON + 1)
    count(usage, old.key, NOON + 3)
    count(usage, old.key, NOON + 2)
    count(usage, new.key, NOON + 3)
    path.rename(tmp_path / "away.db")
    usage.flush()
    (tmp_path / "away.db").rename(path)
    usage.flush()
    late_worker.flush()

    assert secrets_used(deployment, old.api_key.id) == {
        old.api_key.mask: NOON + 3,
        new.api_key.mask: None,
    }
    assert used(deployment, old.api_key.id) == (4, NOON + 3)
