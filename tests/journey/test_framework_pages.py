"""The pages of docs/frameworks: the application at their top works, pasted into an empty folder.

It runs from the wheel as it is built, in a process that can import the base install and the
framework, and nothing else that is installed here.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support.adapters.pages import first_block

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "frameworks"
BASE = ("pyjwt[crypto]", "httpx2")

#: Page → what its reader has installed beside `coatcheck`, and what asks the application here.
INSTALLED = {
    "starlette": ("starlette",),
    "fastapi": ("fastapi",),
    "flask": ("flask",),
    "django": ("django",),
    "drf": ("djangorestframework",),
    "aiohttp": ("aiohttp",),
    "asgi": ("starlette",),
    "wsgi": (),
    "authlib": ("authlib", "flask"),
}
#: Pages whose application is driven elsewhere: tests/journey/test_mcp_server.py.
DRIVEN_ELSEWHERE = {"mcp", "README"}

#: What is asked → the status; each page protects GET /widgets by the scope widgets:read.
EXPECTED = {
    "token": 200,
    "API key": 200,
    "nothing": 401,
    "expired token": 401,
    "token of another audience": 401,
    "token without the scope": 403,
    "API key without the scope": 403,
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer does it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "installed")
    return folder / "installed"


def closure(*texts: str) -> set[str]:
    """Names of the distributions that pip would install for these requirements."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in texts]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        installed: Distribution = distribution(requirement.name)
        found.add(installed.name)
        for text in installed.requires or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append(needed)
    return found


def importable(*texts: str) -> Iterator[str]:
    """Names of the top-level packages of these requirements and all that they need."""
    names = closure(*texts)
    for package, owners in packages_distributions().items():
        if names.intersection(owners):
            yield package


def test_every_page_is_run() -> None:
    """A new page says here what its reader has installed."""
    assert {page.stem for page in PAGES.glob("*.md")} == {*INSTALLED, *DRIVEN_ELSEWHERE} - {
        name for name in DRIVEN_ELSEWHERE if not (PAGES / f"{name}.md").exists()
    }


@pytest.mark.parametrize("page", INSTALLED)
def test_the_application_of_a_page_works_as_it_stands(
    tmp_path: Path, wheel: Path, page: str
) -> None:
    """Base install plus that framework only, and no line of one's own."""
    (tmp_path / "app.py").write_text(first_block(PAGES / f"{page}.md"), encoding="utf-8")
    job = {"page": page, "may": sorted({"coatcheck", *importable(*BASE, *INSTALLED[page])})}
    program = ROOT / "tests" / "support" / "adapters" / "pages.py"
    done = subprocess.run(
        # -P: beside that program are modules named like the frameworks.
        [sys.executable, "-P", program, json.dumps(job)],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, (wheel, tmp_path, ROOT / "tests"))),
            # Whatever it is, the issuer of this test knows it.
            "COATCHECK_SERVICE_KEY": "a service key",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["statuses"] == EXPECTED
    assert told["from"].startswith(str(wheel))
