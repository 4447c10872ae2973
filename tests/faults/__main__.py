"""Faults for the store and the fleet, each in its long form, with its figures.

`make faults` runs this.  Each row is made of tests that CI runs in their short form; here their
numbers are larger.  A row that passed is remembered until the seed or the scale changes, so that
what was broken off goes on where it ended.

FAULTS_SEED repeats the moments of an earlier run, FAULTS_ONLY=F1,F7 picks rows, and
FAULTS_SCALE=0.1 makes the numbers smaller.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

STATE: Final = Path(".faults.json")
JOURNEY: Final = "tests/journey"
KILLS: Final = f"{JOURNEY}/test_kills.py"
FLEET: Final = f"{JOURNEY}/test_fleet.py"
NODES: Final = "tests/faults/test_nodes.py"
POSTGRES: Final = "tests/contract/test_postgres.py"
STORE: Final = "tests/contract/test_store.py"


class Row(NamedTuple):
    """One kind of fault.

    Attributes:
        tests: what pytest is told to run.
        numbers: settings of those tests, at scale 1; none is made smaller than 1.
    """

    name: str
    fault: str
    tests: Sequence[str]
    numbers: dict[str, int] = {}  # noqa: RUF012 - a named tuple's default, and nobody adds to it


ROWS: Final = (
    Row(
        "F1",
        "a service, and workers of a fleet, are killed while they issue and revoke",
        (
            f"{KILLS}::test_a_killed_service_has_lost_nothing_and_is_back_within_3_seconds",
            f"{KILLS}::test_killed_workers_are_replaced_and_outlive_nobody",
            f"{FLEET}::test_killed_workers_lose_no_acknowledged_revocation",
        ),
        {"COATCHECK_TEST_KILLS": 200},
    ),
    Row(
        "F2",
        "a command is killed while it makes API keys, or a signing key",
        (f"{KILLS}::test_a_killed_command_did_all_of_it_or_nothing",),
        {"COATCHECK_TEST_KILLS": 200},
    ),
    Row(
        "F4",
        "the disk is full",
        ("tests/faults/test_disk.py::test_a_full_disk_refuses_revocations_and_nothing_else",),
        {"COATCHECK_TEST_FAULT_SECONDS": 30},
    ),
    Row(
        "F5",
        "a SQLite file is held by another writer, taken away, or no database",
        (
            "tests/faults/test_disk.py",
            *(
                f"{STORE}::test_{name}"
                for name in (
                    "a_lock_that_is_not_given_back_is_told_within_the_timeout",
                    "writers_that_wait_together_are_told_together",
                    "a_missing_file_is_told_and_none_is_made",
                    "a_file_that_is_no_database_is_told",
                    "a_file_deleted_while_open_is_noticed",
                )
            ),
        ),
        {"COATCHECK_TEST_FAULT_SECONDS": 10},
    ),
    Row(
        "F7",
        "PostgreSQL stops, freezes, is slow, cut off in a commit, full, or locked",
        (f"{JOURNEY}/test_postgres_faults.py", POSTGRES),
        {"COATCHECK_TEST_FAULT_SECONDS": 20},
    ),
    Row(
        "F8",
        "what is revoked on one of three nodes is asked for on all",
        (f"{FLEET}::test_what_is_revoked_on_one_node_is_refused_on_all_within_a_second",),
        {"COATCHECK_TEST_TRIALS": 1000},
    ),
    Row(
        "F10",
        "a node has another issuer, another sealing key, or another schema",
        (f"{JOURNEY}/test_process.py", STORE, POSTGRES),
    ),
    Row(
        "F11",
        "a node's clock is wrong",
        (f"{NODES}::test_a_node_whose_clock_is_wrong_does_not_start", POSTGRES),
        {"COATCHECK_TEST_CLOCKS": 3},
    ),
    Row(
        "F12",
        "the issuer is away from many resource servers, and comes back",
        ("tests/faults/test_herd.py",),
        {"COATCHECK_TEST_OUTAGE_SECONDS": 600, "COATCHECK_TEST_VERIFIERS": 200},
    ),
    Row(
        "F13",
        "the key set is an error, empty, a page, huge, a redirect, or comes by drips",
        ("tests/unit/verifier",),
    ),
    Row("F14", "ten times as many callers as it takes", (f"{JOURNEY}/test_overload.py",)),
    Row("F15, F17", "workers are replaced; files run out", (f"{JOURNEY}/test_process.py",)),
    Row("F16", "a backup is taken under load, and restored", (f"{JOURNEY}/test_backup.py",)),
    Row(
        "F18",
        "a node is given a replica",
        (f"{NODES}::test_a_node_does_not_start_on_a_database_that_it_cannot_write_to",),
    ),
)


def main() -> int:
    scale = float(os.environ.get("FAULTS_SCALE") or 1)
    chosen = {name for name in os.environ.get("FAULTS_ONLY", "").replace(",", " ").split() if name}
    before = json.loads(STATE.read_text()) if STATE.exists() else {}
    seed = int(os.environ.get("FAULTS_SEED") or before.get("seed") or random.randrange(1, 10**6))  # noqa: S311
    done: dict[str, float] = {}
    if (before.get("seed"), before.get("scale")) == (seed, scale):
        done = before["done"]
    rows = [row for row in ROWS if not chosen or chosen & set(row.name.split(", "))]
    if not rows:
        _say(f"FAULTS_ONLY: some of {', '.join(row.name for row in ROWS)}")
        return 2
    _say(f"FAULTS_SEED={seed} FAULTS_SCALE={scale:g}")
    failed = []
    for row in rows:
        if row.name in done and not chosen:
            _say(f"\n=== {row.name}: passed before, in {done[row.name]:.0f} s")
            continue
        _say(f"\n=== {row.name}: {row.fault}")
        began = time.monotonic()
        if _passes(row, seed, scale):
            done[row.name] = time.monotonic() - began
        else:
            done.pop(row.name, None)
            failed.append(row.name)
        STATE.write_text(json.dumps({"seed": seed, "scale": scale, "done": done}))
    if not failed and not chosen:
        # The next run is another one, with other moments.
        STATE.unlink()
    _say(f"\nFAULTS_SEED={seed}: {', '.join(failed) or 'none'} failed")
    return 1 if failed else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _passes(row: Row, seed: int, scale: float) -> bool:
    numbers = {name: str(max(1, round(most * scale))) for name, most in row.numbers.items()}
    command = [sys.executable, "-m", "pytest", "--quiet", "--show-capture=no", *row.tests]
    environment = os.environ | numbers | {"COATCHECK_TEST_SEED": str(seed)}
    return subprocess.run(command, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
