"""How commands speak: one JSON document on stdout, talk on stderr, exit codes that mean something.

A command's result goes to stdout and nothing else does, so that it can be piped.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Annotated, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


class Exit(IntEnum):
    """What a command's exit code says."""

    OK = 0
    ERROR = 1
    USAGE = 2
    REFUSED = 3
    NOT_FOUND = 4
    CONFLICT = 5
    UNREACHABLE = 7


def fail(code: Exit, message: str) -> NoReturn:
    """End the command with a sentence on stderr."""
    say(f"coatcheck: {message}")
    raise typer.Exit(code)


def say(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def confirm(yes: bool, question: str) -> None:
    """Ask before something that cannot be undone; without a terminal only `--yes` is an answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(Exit.USAGE, "nobody is there to confirm: say --yes")
    typer.confirm(question, abort=True, err=True)


def document(value: object) -> None:
    """The one JSON document of a command, or one line of several."""
    sys.stdout.write(json.dumps(value) + "\n")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows in columns as wide as they need, for people."""
    lines = [tuple(headings), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def facts(pairs: Mapping[str, object]) -> None:
    """Names and values, one a line, for people; what is empty is left out."""
    shown = {name: _plain(value) for name, value in pairs.items()}
    width = max(map(len, shown))
    for name, text in shown.items():
        if text:
            typer.echo(f"{name.ljust(width)}  {text}")


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return " until ".join(str(part) for part in value.values() if part is not None)
    return "" if value is None else str(value)
