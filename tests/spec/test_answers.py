"""Each row of the table of bad inputs has a test that names it.

Token endpoint, introspection and revocation are T, I and R; tokens at a verifier are V.  A row
counts as tested when the docstring of a test says its number, so that `grep -rn T41 tests` finds
what keeps it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]
#: The table itself, where the project lies beside it.
TABLE: Final = TESTS.parents[1] / "shared" / "answers.md"
#: Letter of a row → how many there are.
ROWS: Final = {"T": 52, "I": 6, "R": 5, "V": 43}
#: The model has invariants of its own that are called I1, I2 and so on.
OTHER_NUMBERS: Final = ("model",)


def rows() -> set[str]:
    return {f"{letter}{number}" for letter, most in ROWS.items() for number in range(1, most + 1)}


def docstrings_of_tests() -> Iterator[str]:
    for path in TESTS.rglob("test_*.py"):
        if path.relative_to(TESTS).parts[0] not in OTHER_NUMBERS:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield ast.get_docstring(node) or ""


def test_every_row_of_the_bad_inputs_is_named_by_a_test() -> None:
    """A row without a test is an answer that nobody keeps."""
    named = {
        row for text in docstrings_of_tests() for row in re.findall(r"\b[TIRV]\d{1,2}\b", text)
    }

    assert sorted(rows() - named) == []


@pytest.mark.skipif(not TABLE.exists(), reason="the table of bad inputs is not beside the project")
def test_the_rows_are_those_of_the_table() -> None:
    """A row that is added there needs a test here."""
    text = TABLE.read_text("utf-8")
    sections = dict(re.findall(r"^## (\d)\. .*?\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    found = re.findall(r"^\| ([TIRV]\d+) \|", sections["1"] + sections["3"], re.MULTILINE)

    assert sorted(found) == sorted(rows())
