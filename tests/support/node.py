"""OAuth clients and JWT verifiers of the node world, as processes of their own.

`tests/node` pins them by hash.  Whoever has node runs `npm ci` there and gets their tests, too.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

FOLDER: Final = Path(__file__).parent.parent / "node"
LOCKS: Final = (FOLDER / "package-lock.json", FOLDER / "runtime" / "package-lock.json")
#: What a driver needs of node, and the versions that have it.
_ENOUGH: Final = "process.features.require_module === true"
_ENOUGH_IS: Final = "node 20.19, or 22.12 or newer"
#: Seconds that one process may take for all its jobs.
PATIENCE: Final = 60

Job = Mapping[str, object]
Answer = dict[str, Any]


def require_node() -> None:
    """Skip the test that asks where node or its packages are missing; in CI they must not be."""
    reason = why_not()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def why_not() -> str | None:
    """Why the node tests cannot run here, and what to do about it; None if they can."""
    node = shutil.which("node")
    if node is None:
        return f"there is no node: install {_ENOUGH_IS}, then run npm ci in tests/node"
    told = subprocess.run(
        [node, "-p", _ENOUGH], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if told.stdout.strip() != "true":
        return f"this machine's node is too old: install {_ENOUGH_IS}"
    wrong = [name for name, pinned in _pinned().items() if _installed(name) != pinned]
    if wrong:
        return f"run npm ci in tests/node: missing or outdated there are {', '.join(wrong)}"
    return None


def run(driver: str, jobs: Sequence[Job]) -> list[Answer]:
    """Hand jobs to a driver of `tests/node`, such as `clients/openid-client`.

    The jobs hold API keys: they go through standard input, never through arguments, which every
    user of a machine can read.
    """
    done = subprocess.run(
        ["node", FOLDER / f"{driver}.mjs"],
        # No proxies, no options for node: nothing but the machine's own node.
        env={"PATH": os.environ["PATH"]},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Answer] = json.loads(done.stdout)
    assert len(answers) == len(jobs)
    return answers


def _pinned() -> dict[str, str]:
    dependencies: dict[str, str] = _read(FOLDER / "package.json")["dependencies"]
    return dependencies


def _installed(name: str) -> str | None:
    try:
        version: str = _read(FOLDER / "node_modules" / name / "package.json")["version"]
    except FileNotFoundError:
        return None
    return version


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
