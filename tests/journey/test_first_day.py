"""A newcomer's first day: `make run`, the commands it prints, and the README's snippets.

What is not run, rots: everything here is taken from the printed text and from the pages.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from coatcheck.cli.commands import app
from coatcheck.server.settings import PREFIX, Settings
from support.live import clean_environment, free_port

TOP = Path(__file__).parents[2]
START_TIMEOUT = 60


@dataclass(frozen=True, slots=True)
class FirstDay:
    """What `make run` started and printed."""

    folder: Path
    issuer: str
    audience: str
    printed: str

    def paste(self, *commands: str) -> str:
        """Paste commands into a shell in that directory; their output."""
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", "\n".join(commands)],
            cwd=self.folder,
            env=clean_environment()
            | {"COATCHECK_ISSUER": self.issuer, "COATCHECK_AUDIENCE": self.audience},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def commands(self) -> list[str]:
        """The commands to paste, as printed: blocks that stand apart, indented by five."""
        blocks = re.findall(r"(?m)\n\n((?:^ {5}\S.*\n)+(?:^ {7}.*\n)*)", self.printed)
        return [re.sub(r"(?m)^ {5}", "", block) for block in blocks]


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstDay]:
    folder = tmp_path_factory.mktemp("first-day")
    with _make_run(folder) as started:
        yield started


@pytest.fixture(scope="module")
def names(first_day: FirstDay) -> dict[str, str]:
    """What the README's snippets leave to their reader: an API key of one's own, and a token."""
    coatcheck = f"{sys.executable} -m coatcheck.cli"
    made = json.loads(
        first_day.paste(f"{coatcheck} keys create --name readme --scope widgets:read --json")
    )
    token = first_day.paste(f"COATCHECK_API_KEY={made['key']} {coatcheck} token").strip()
    return {
        "ISSUER": first_day.issuer,
        "API": first_day.audience,
        "KEY_ID": made["id"],
        "API_KEY": made["key"],
        "TOKEN": token,
    }


class _make_run:  # noqa: N801 - used as a function
    """The quick start as a process, on free ports, until the block ends."""

    def __init__(self, folder: Path, ports: tuple[int, int] | None = None) -> None:
        service, api = ports or (free_port(), free_port())
        self._folder = folder
        self._issuer = f"http://127.0.0.1:{service}"
        self._audience = f"http://127.0.0.1:{api}"

    def __enter__(self) -> FirstDay:
        path = self._folder / "printed.txt"
        with path.open("wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, str(TOP / "examples" / "quickstart.py")],
                cwd=self._folder,
                env=clean_environment()
                | {"COATCHECK_ISSUER": self._issuer, "COATCHECK_AUDIENCE": self._audience},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while "Stop with Ctrl-C" not in path.read_text():
            assert self._process.poll() is None, path.read_text()
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.1)
        return FirstDay(self._folder, self._issuer, self._audience, path.read_text())

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)


def test_the_printed_commands_do_what_they_say(first_day: FirstDay) -> None:
    """Pasted in order: a token, a call, the claims, introspection; revoked, all of it ends."""
    get, call, claims, ask, raw, revoke, create = first_day.commands

    told = first_day.paste(get, call, claims, ask)
    assert '"access_token":' in told
    assert '"widgets":["cog","sprocket"]' in told
    assert f'"aud":"{first_day.audience}"' in told
    assert '"active":true' in told
    assert '"widgets":["cog","sprocket"]' in first_day.paste(raw)

    told = first_day.paste(call, revoke, "sleep 1", get, ask, claims, raw)
    assert "was revoked on" in told
    assert '{"active":false}' in told
    assert '"code": "token_revoked"' in told
    assert '"code": "api_key_revoked"' in told

    assert "key_" in first_day.paste(create)


def test_the_demo_secrets_are_closed_to_others(first_day: FirstDay) -> None:
    """Three API keys lie on the disk; only their owner can read them."""
    for path in (first_day.folder / ".coatcheck").glob("*.key"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_started_again_it_keeps_its_data(tmp_path: Path) -> None:
    """Same database, same keys, same demo API key."""
    ports = (free_port(), free_port())
    with _make_run(tmp_path, ports) as first:
        before = (tmp_path / ".coatcheck" / "demo.key").read_text()
        token = first.paste(first.commands[0])
    with _make_run(tmp_path, ports) as second:
        assert (tmp_path / ".coatcheck" / "demo.key").read_text() == before
        (text,) = re.findall(r'"access_token":"([^"]+)"', token)
        claims = second.commands[2].replace("$TOKEN", text)
        assert second.audience in second.paste(claims)


README = (TOP / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch, snippet: str
) -> None:
    """Copied as it stands, with the capitals filled in."""
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    module: dict[str, Any] = dict(names)

    exec(compile(snippet, "README.md", "exec"), module)  # noqa: S102 - that is the test

    if "handle" in module:
        assert module["handle"]({"Authorization": f"Bearer {names['TOKEN']}"})[0] == 200
        assert module["handle"]({})[0] == 401
        module["verifier"].close()


def test_every_command_of_the_readme_exists() -> None:
    """A command that is documented can be typed."""
    known = _commands(typer.main.get_command(app))
    # A group alone lists what is in it.
    known |= {command.partition(" ")[0] for command in known}

    # Within a table a bar is escaped.
    for line in re.findall(r"`coatcheck ([a-z|\- ]+)", README.replace("\\|", "|")):
        group, _, verbs = line.partition(" --")[0].strip().partition(" ")
        for verb in verbs.strip("|").split("|"):
            assert f"{group} {verb}".strip() in known


def test_every_setting_is_documented() -> None:
    """An operator finds each setting, and none that is gone, in docs/settings.md."""
    page = (TOP / "docs" / "settings.md").read_text(encoding="utf-8")
    table = page.partition("Callers and resource servers")[0]

    assert set(re.findall(r"^\| `(COATCHECK_\w+)`", table, re.MULTILINE)) == {
        PREFIX + name.upper() for name in Settings.model_fields
    }


def test_links_between_pages_lead_somewhere() -> None:
    """A page that is linked exists."""
    for page in [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def _commands(command: Any, prefix: str = "") -> set[str]:
    children = getattr(command, "commands", None)
    if children is None:
        return {prefix.strip()}
    return set().union(*(_commands(child, f"{prefix} {name}") for name, child in children.items()))
