"""Each numbered step of the checks is missed when it is gone; `make mutants` tries all the rest."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_each_numbered_step_that_is_removed_breaks_the_test_that_is_named_for_it() -> None:
    """
    A check without a test can be lost in any edit, and nothing tells.

    A step that is new needs a line in `steps.toml`, and the test that stands there.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "mutation", "--steps", "--workers", "1"],
        cwd=TESTS,
        env={"PYTHONPATH": str(TESTS)},
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}"
    assert "steps removed one by one, 0 flaws" in ended.stdout
