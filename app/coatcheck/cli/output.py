"""How commands speak: one JSON document on stdout, talk on stderr, exit codes that mean something.

A command's result goes to stdout and nothing else does, so that it can be piped.  What a person
reads holds no control characters: a text may come from a service, and a terminal obeys them.

Source: Unicode Standard §4.5 (general categories), ECMA-48 §8.3 (control sequences).
"""

import json
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Annotated, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


#: Control, format (direction of writing, zero width), surrogate, separators of lines.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


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
    """A line for people, or several, on stderr."""
    for line in text.split("\n"):
        typer.echo(plain(line), err=True)


def plain(text: str) -> str:
    """A text on one line, without what a terminal would obey or not show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("" if unicodedata.category(one) in _UNSEEN else one for one in text)


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


def line(text: str) -> None:
    """A line of the result, for people."""
    typer.echo(plain(text))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows in columns as wide as they need, for people."""
    lines = [tuple(headings), *(tuple(map(plain, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def facts(pairs: Mapping[str, object]) -> None:
    """Names and values, one a line, for people; what is empty is left out."""
    shown = {plain(name): plain(_told(value)) for name, value in pairs.items()}
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        if text:
            typer.echo(f"{name.ljust(width)}  {text}")


def thing(told: Mapping[str, object], *, as_json: bool) -> None:
    """One thing as the result: a document, or names and values."""
    if as_json:
        document(told)
    else:
        facts(told)


def things(
    told: Sequence[Mapping[str, object]], columns: Mapping[str, str], *, as_json: bool
) -> None:
    """Several things as the result: one document, or a table.

    Args:
        columns: heading → name of the member.
    """
    if as_json:
        document(told)
    else:
        table(tuple(columns), [[_told(one.get(name)) for name in columns.values()] for one in told])


def _told(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_told, value))
    if isinstance(value, dict) and "mask" in value:
        # A secret of an API key, which may have an end.
        return " until ".join(str(value[part]) for part in ("mask", "expiresAt") if value.get(part))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
