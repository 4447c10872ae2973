"""The page people decide by: every command of docs/products.md, pasted in order.

Where the page says `# → …` the output so far is looked at; the port is the one thing that is
another here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.live import clean_environment, free_port
from support.secrets import SWEEP

TOP = Path(__file__).parents[2]
PAGE = (TOP / "docs" / "products.md").read_text(encoding="utf-8")
MOST_COMMANDS = 10
TIMEOUT = 110
#: What stands between the outputs of commands.
MARK = "\x1e"
#: The service that a block has started is ended by its id, whatever happened.
END_THE_SERVICE = "trap '[ -z \"$SERVICE\" ] || { kill $SERVICE; wait $SERVICE; }' EXIT"


def blocks() -> dict[str, str]:
    """Heading → its block of commands."""
    sections = re.split(r"(?m)^## ", PAGE)[1:]
    found = {}
    for section in sections:
        for block in re.findall(r"(?ms)^```sh\n(.*?)^```$", section):
            heading = section.partition("\n")[0]
            assert heading not in found, f"one block each: {heading}"
            found[heading] = block
    return found


PRODUCTS = blocks()
#: What is pasted before any of them.
ONCE = PRODUCTS.pop("Once")


def steps(block: str) -> list[tuple[str, list[str]]]:
    """Commands, and what the page says of their output."""
    found: list[tuple[str, list[str]]] = []
    commands: list[str] = []
    for line in block.splitlines():
        if not line.startswith("# → "):
            commands.append(line)
            continue
        if commands:
            found.append(("\n".join(commands), []))
            commands = []
        found[-1][1].append(line.removeprefix("# → ").strip())
    return [*found, ("\n".join(commands), [])] if commands else found


def commands_in(block: str) -> int:
    """How many things there are to paste; a line that is not finished goes on in the next."""
    whole = re.sub(r"(?ms)<<'EOF'\n.*?^EOF$", "", block).replace("\\\n", "")
    whole = re.sub(r"'\{.*?\}'", "", whole, flags=re.DOTALL)
    return sum(not line.startswith("#") for line in whole.splitlines() if line.strip())


@pytest.mark.parametrize("heading", PRODUCTS)
def test_the_commands_show_what_the_page_says(tmp_path: Path, heading: str) -> None:
    """From a catalog to the end of a key, in ten commands or fewer."""
    block = PRODUCTS[heading]
    assert 3 < commands_in(block) <= MOST_COMMANDS
    (tmp_path / "examples").symlink_to(TOP / "examples")
    said = steps(block)
    script = [END_THE_SERVICE, ONCE]
    for commands, _ in said:
        script += [commands, f"echo {MARK}"]
    port = str(free_port())
    bin_folder = Path(sys.executable).parent

    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(script).replace("8000", port)],
        cwd=tmp_path,
        env=clean_environment() | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    SWEEP.secrets.learn(done.stdout)
    outputs = done.stdout.split(f"{MARK}\n")
    for (commands, wanted), output in zip(said, outputs, strict=False):
        for told in wanted:
            pattern = ".*?".join(map(re.escape, re.split(r" ?… ?", told)))
            shown = re.search(pattern, output, re.DOTALL)
            assert shown, f"{commands}\n→ {told}\n{output}"
            output = output[shown.end() :]  # noqa: PLW2901 - each after the one before
    assert (done.returncode, len(outputs)) == (0, len(said) + 1), done.stdout


def test_there_is_a_block_for_each_catalog() -> None:
    """None is forgotten, and the page links to each."""
    catalogs = sorted(file.name for file in (TOP / "examples" / "catalogs").glob("*.toml"))

    started = [re.findall(r"(?m)^start (\S+)$", block) for block in PRODUCTS.values()]
    assert sorted(f"{name}.toml" for (name,) in started) == catalogs
    assert sorted(re.findall(r"\]\(\.\./examples/catalogs/([^)]+)\)", PAGE)) == catalogs
