"""`coatcheck.server.alarms`: a right secret from a wrong address is told, and told in measure."""

import json
from pathlib import Path

import pytest

from coatcheck.client_address import parse
from coatcheck.server.alarms import QUIET, ROWS_PER_MINUTE, Alarms
from coatcheck.server.store.tables import ChangeRow
from support.deployment import MINUTE, NOON, Deployment

ORGANIZATION = "org_1"
HERE, THERE = "203.0.113.7", "2001:db8::7"


@pytest.fixture
def alarms(deployment: Deployment) -> Alarms:
    return Alarms(deployment.store)


def notice(
    alarms: Alarms,
    address: str = HERE,
    now: int = NOON,
    *,
    api_key_id: str = "key_1",
    uses: int = 1,
) -> None:
    for _ in range(uses):
        alarms.wrong_address(api_key_id, ORGANIZATION, parse(address), now)


def rows(deployment: Deployment) -> list[ChangeRow]:
    """Every alarm in the log, the oldest first."""
    with deployment.store.transaction(read_only=True) as tx:
        found = tx.changes_after(0, 100_000)
    return [row for row in found if row.what == "use.from_wrong_address"]


def told(deployment: Deployment) -> list[tuple[str, str, int]]:
    """API key, address and uses of every alarm."""
    details = [(row.subject, json.loads(row.detail)) for row in rows(deployment)]
    return [(subject, detail["address"], detail["uses"]) for subject, detail in details]


def test_nothing_is_written_before_the_flush(deployment: Deployment, alarms: Alarms) -> None:
    """The token path never writes."""
    notice(alarms)
    assert not rows(deployment)

    alarms.flush(NOON)
    (row,) = rows(deployment)
    assert (row.subject, row.organization_id, row.at) == ("key_1", ORGANIZATION, NOON)
    assert not row.narrows
    assert json.loads(row.detail) == {"address": HERE, "uses": 1}

    alarms.flush(NOON)
    assert len(rows(deployment)) == 1


def test_an_address_is_told_once_in_ten_minutes(deployment: Deployment, alarms: Alarms) -> None:
    """To the second; what was used meanwhile is counted in the API key's next row."""
    for second in (0, 1, QUIET - 1, QUIET):
        notice(alarms, now=NOON + second, uses=2)
        alarms.flush(NOON + second)

    assert told(deployment) == [("key_1", HERE, 2), ("key_1", HERE, 6)]


def test_every_address_and_every_key_is_told(deployment: Deployment, alarms: Alarms) -> None:
    """One that is not known is told as such; a mapped one is the IPv4 one."""
    notice(alarms, uses=3)
    notice(alarms, f"::ffff:{HERE}")
    notice(alarms, THERE)
    notice(alarms, "nonsense")
    notice(alarms, api_key_id="key_2")
    alarms.flush(NOON)

    assert told(deployment) == [
        ("key_1", HERE, 4),
        ("key_1", THERE, 1),
        ("key_1", "unknown", 1),
        ("key_2", HERE, 1),
    ]


def test_whoever_has_a_secret_and_many_addresses_hides_no_other_alarm(
    deployment: Deployment, alarms: Alarms
) -> None:
    """Few rows a minute, whatever comes; a use is told or counted, and none is told twice."""
    uses = 5 * ROWS_PER_MINUTE
    for number in range(uses):
        notice(alarms, f"2001:db8::{number:x}")
    notice(alarms, api_key_id="key_2")
    alarms.flush(NOON)

    found = told(deployment)
    assert len(found) < ROWS_PER_MINUTE
    assert ("key_2", HERE, 1) in found
    assert sum(count for subject, _, count in found if subject == "key_1") == uses


def test_a_process_writes_so_many_rows_a_minute_and_no_more(
    deployment: Deployment, alarms: Alarms
) -> None:
    """The rest waits for its turn."""
    for number in range(ROWS_PER_MINUTE + 5):
        notice(alarms, api_key_id=f"key_{number}")
    for second in (0, 1, MINUTE - 1):
        alarms.flush(NOON + second)
        assert len(rows(deployment)) == ROWS_PER_MINUTE

    alarms.flush(NOON + MINUTE)
    assert len(rows(deployment)) == ROWS_PER_MINUTE + 5
    assert len(set(told(deployment))) == ROWS_PER_MINUTE + 5


def test_a_clock_that_is_set_back_silences_nobody(deployment: Deployment, alarms: Alarms) -> None:
    """What was told in the future says nothing of now."""
    for number in range(ROWS_PER_MINUTE):
        notice(alarms, now=NOON + QUIET, api_key_id=f"key_{number}")
    alarms.flush(NOON + QUIET)
    notice(alarms, now=NOON, api_key_id="key_0")
    alarms.flush(NOON)

    assert told(deployment)[-1] == ("key_0", HERE, 1)


def test_alarms_are_kept_while_the_database_is_away(
    deployment: Deployment, alarms: Alarms, tmp_path: Path
) -> None:
    """They are written by the first flush that succeeds."""
    path = tmp_path / "coatcheck.db"
    notice(alarms)
    path.rename(tmp_path / "away.db")
    alarms.flush(NOON)
    notice(alarms, now=NOON + 1)
    alarms.flush(NOON + 1)
    (tmp_path / "away.db").rename(path)
    alarms.flush(NOON + 2)

    assert told(deployment) == [("key_1", HERE, 2)]


def test_memory_is_bounded(alarms: Alarms) -> None:
    """However long nobody flushes.  CWE-770."""
    notice(alarms, uses=20_000)

    assert len(alarms._noted) <= 10_000
