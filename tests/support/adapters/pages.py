"""Run the application of a page in docs/frameworks; as a program: in a process of its own.

Its argument is a JSON object with the page's name and the packages that may be imported.  It
prints the status of each answer.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from coatcheck.testing import FakeIssuer
from support.adapters.harness import harness_of


def first_block(page: Path) -> str:
    """The Python code at the top of a page."""
    found = re.search(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if found is None:
        raise AssertionError(f"{page.name} has no application")
    return found[1]


class Only:
    """Finds no other packages than these, as if they were not installed.

    Args:
        packages: their names.
        finders: who finds them.
    """

    def __init__(self, packages: Sequence[str], finders: Sequence[Any]) -> None:
        self._packages = {*packages, *sys.stdlib_module_names, "app", "support"}
        self._finders = finders

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # What Python was built with is a module of no fixed name.
        is_pythons = name.startswith("_sysconfigdata")
        if not is_pythons and name.partition(".")[0] not in self._packages:
            # No error: a package may ask whether another one is there, and go on without.
            return None
        found = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context: Any) -> Iterator[Any]:
        """For `importlib.metadata`: whoever asks there imports nothing by it."""
        for finder in self._finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*context)


def run(page: str) -> dict[str, int]:
    """Ask the application of a page, which is the module `app`."""
    with FakeIssuer("https://auth.example.com", audience="https://api.example.com") as issuer:
        app = importlib.import_module("app").app
        requests = {
            "token": issuer.token("widgets:read"),
            "API key": issuer.api_key("widgets:read"),
            "nothing": None,
            "expired token": issuer.token("widgets:read", expired=True),
            "token of another audience": issuer.token("widgets:read", audience="https://other"),
            "token without the scope": issuer.token("widgets:write"),
            "API key without the scope": issuer.api_key("widgets:write"),
        }
        statuses = {}
        with harness_of(page).asking(app) as ask:
            for name, credential in requests.items():
                headers = [("Authorization", f"Bearer {credential}")] if credential else []
                statuses[name] = ask("GET", "/widgets", headers).status
        return statuses


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    sys.meta_path[:] = [Only(job["may"], tuple(sys.meta_path))]
    asked = run(job["page"])
    sys.stdout.write(
        json.dumps({"statuses": asked, "from": importlib.import_module("coatcheck").__file__})
    )
