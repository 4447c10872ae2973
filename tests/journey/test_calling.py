"""Callers against a running service: docs/calling.md as it stands there, and what shells use.

The API is a server on 127.0.0.1 with our verifier, which is what tells a token from a good one.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from coatcheck.cli.commands import app
from coatcheck.verifier import Verifier, VerifierError
from support.live import Live, clean_environment, free_port

PAGE = (Path(__file__).parents[2] / "docs" / "calling.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)
AUDIENCE = "https://api.example.com"
JWT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
OK, ERROR, USAGE, REFUSED, UNREACHABLE = 0, 1, 2, 3, 7
WAIT = 20


@dataclass
class Api:
    """An API that trusts the service.

    Attributes:
        seen: host and Authorization of each request.
        gate: answers wait until it is open.
    """

    port: int
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"


@pytest.fixture(scope="module")
def running(live: Live) -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.seen.append((self.headers["Host"], self.headers["Authorization"]))
            assert api.gate.wait(WAIT)
            path, _, to = self.path.partition("?")
            try:
                caller = verifier.authenticate(self.headers.items(), scopes=["widgets:read"])
            except VerifierError as error:
                self.answer(error.status, error.problem(), error.headers)
            else:
                status, headers = (302, {"Location": to}) if path == "/to" else (200, {})
                self.answer(status, {"caller": caller.key_id}, headers)

        def answer(self, status: int, told: Any, headers: dict[str, str]) -> None:
            body = json.dumps(told).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *told: object) -> None:
            return

    with (
        Verifier(live.issuer, AUDIENCE, feed=None) as verifier,
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
    ):
        api = Api(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join(WAIT)


@pytest.fixture
def api(running: Api) -> Api:
    running.seen.clear()
    running.gate.set()
    return running


@pytest.fixture(scope="module")
def api_key(live: Live) -> str:
    made: str = live.api_key("widgets:read", "widgets:write")["key"]
    return made


@pytest.fixture
def surroundings(live: Live, api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set where a caller runs."""
    monkeypatch.setenv("COATCHECK_ISSUER", live.issuer)
    monkeypatch.setenv("COATCHECK_API_KEY", api_key)


# --- docs/calling.md


@pytest.mark.usefixtures("surroundings")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[-2])
def test_each_snippet_works_as_it_stands(
    live: Live, api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str], snippet: str
) -> None:
    """All that is another here are the two URLs."""
    there = snippet.replace("https://auth.example.com", live.issuer)
    there = there.replace("https://api.example.com", api.url(""))
    there = there.replace('"api.example.com"', f'"{api.host}"')
    file = tmp_path / "snippet.py"
    file.write_text(there, encoding="utf-8")

    runpy.run_path(str(file), run_name="__main__")

    told = capsys.readouterr().out
    if "CallerError" in snippet:
        assert told.startswith("AskRefused ")
        assert "does not have: widgets:paint." in told
        assert not api.seen
    else:
        assert "key_" in told or "200" in told
        assert api.seen
        assert all(JWT.fullmatch(str(sent).removeprefix("Bearer ")) for _, sent in api.seen)


def test_the_page_has_snippets_for_each_library_and_names_each_setting() -> None:
    """What is not shown is not found."""
    for library in ("httpx2", "httpx", "requests"):
        assert any(f"from coatcheck.{library} import TokenAuth" in one for one in SNIPPETS)
    code = "\n".join(SNIPPETS)
    assert "AsyncClient" in code
    for variable in ("COATCHECK_ISSUER", "COATCHECK_API_KEY", "COATCHECK_API_KEY_FILE"):
        assert f"`{variable}`" in PAGE
    for error in ("ApiKeyMissing", "AskRefused", "HostNotAllowed", "IssuerUnavailable"):
        assert f"`{error}`" in PAGE
    for error in ("KeyRejected", "NotAllowedNow", "CallerError"):
        assert f"`{error}`" in PAGE


# --- commands, in this process


def run(*arguments: str, stdin: str | bytes = "", **environment: str) -> Result:
    """What a command says; nothing is set but this."""
    unset = {name: None for name in os.environ if "COATCHECK" in name}
    return CliRunner().invoke(app, arguments, input=stdin, env={**unset, **environment})


@pytest.fixture
def set_(live: Live, api_key: str) -> dict[str, str]:
    return {"COATCHECK_ISSUER": live.issuer, "COATCHECK_API_KEY": api_key}


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What this process would have become: arguments and environment."""
    told: list[tuple[list[str], dict[str, str]]] = []

    def execvpe(_: str, command: list[str], environment: dict[str, str]) -> None:
        told.append((command, environment))

    monkeypatch.setattr(os, "execvpe", execvpe)
    return told


def test_export_is_a_line_for_a_shell(set_: dict[str, str]) -> None:
    """`eval "$(coatcheck token --export)"`; a name that a shell would read otherwise is none."""
    words = shlex.split(run("token", "--export", "--name", "WIDGETS", **set_).stdout)

    assert words[0] == "export"
    assert JWT.fullmatch(words[1].removeprefix("WIDGETS="))
    for wrong in (("--name", "A;rm"), ("--name", "1A"), ("--json",)):
        done = run("token", "--export", *wrong, **set_)
        assert (done.exit_code, done.stdout) == (USAGE, "")


COMMANDS = {
    "token": ("token",),
    "curl": ("curl", "https://api.example.com/"),
    "exec": ("exec", "--", "true"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_command_takes_the_key_from_each_place(
    live: Live, api_key: str, tmp_path: Path, command: tuple[str, ...], becomes: Any
) -> None:
    """Standard input, a file, the variables; without any it says which there are."""
    file = tmp_path / "key"
    file.write_text(api_key, encoding="utf-8")
    name, *rest = command
    issuer = {"COATCHECK_ISSUER": live.issuer}
    try:
        ways = (
            run(name, "--api-key-stdin", *rest, stdin=f"{api_key}\n", **issuer),
            run(name, "--api-key-file", str(file), *rest, **issuer),
            run(*command, COATCHECK_API_KEY_FILE=str(file), **issuer),
            run(*command, COATCHECK_API_KEY=api_key, **issuer),
        )
    finally:
        file.unlink()

    assert {way.exit_code for way in ways} == {OK}
    odd = run(name, "--api-key-stdin", *rest, stdin=b"\xff\xfe", **issuer)
    assert (odd.exit_code, odd.stdout) == (USAGE, "")
    missing = run(*command, **issuer)
    assert missing.exit_code == USAGE
    for place in ("COATCHECK_API_KEY", "COATCHECK_API_KEY_FILE", "--api-key-stdin", "keyring set"):
        assert place in missing.stderr
    unreadable = run(*command, COATCHECK_API_KEY_FILE=str(file), **issuer)
    assert (unreadable.exit_code, unreadable.stdout) == (ERROR, "")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_command_fails_as_all_do(
    live: Live, set_: dict[str, str], command: tuple[str, ...], becomes: list[Any]
) -> None:
    """Refused 3, unreachable 7, in the clear 2; nothing is run then."""
    nobody = {**set_, "COATCHECK_ISSUER": f"http://127.0.0.1:{free_port()}"}
    clear = {**set_, "COATCHECK_ISSUER": "http://auth.example.com"}
    unknown = {**set_, "COATCHECK_API_KEY": "another-system's-key"}
    for environment, code, words in (
        (unknown, REFUSED, "invalid_client: "),
        (nobody, UNREACHABLE, "no answer from"),
        (clear, USAGE, "COATCHECK_ALLOW_INSECURE_ISSUER"),
    ):
        done = run(*command, **environment)
        assert (done.exit_code, done.stdout) == (code, "")
        assert words in done.stderr
        assert environment["COATCHECK_API_KEY"] not in done.stderr
    assert not becomes


HOSTS = {
    "in the clear": ("http://api.example.com/",),
    "no URL": ("api.example.com",),
    "a user name": ("https://a@api.example.com/",),
    "not the resource": ("https://evil.example/", "--resource", AUDIENCE),
    "not named": ("https://evil.example/", "--allowed-host", "api.example.com"),
    "no host": ("https://api.example.com/", "--allowed-host", "*"),
}


@pytest.mark.parametrize("arguments", HOSTS.values(), ids=HOSTS)
def test_curl_is_not_run_where_no_token_may_go(
    set_: dict[str, str], becomes: list[Any], arguments: tuple[str, ...]
) -> None:
    """As `TokenAuth` decides it."""
    done = run("curl", *arguments, **set_)

    assert (done.exit_code, done.stdout, becomes) == (USAGE, "", [])


ASKS = {
    "git": ("protocol=https\nhost=api.example.com\n\n", "username=token"),
    "git with a user": ("protocol=https\nhost=api.example.com\nusername=me\n\n", "username=me"),
    "a newer git": (
        "capability[]=authtype\ncapability[]=state\nprotocol=https\nhost=api.example.com\n\n",
        "authtype=Bearer",
    ),
}


@pytest.mark.parametrize(("asked", "line"), ASKS.values(), ids=ASKS)
def test_a_credential_helper_answers_as_git_wants_it(
    set_: dict[str, str], asked: str, line: str
) -> None:
    """git-credential(1): lines of key=value, and when the password ends."""
    done = run("credential-helper", "--resource", AUDIENCE, "get", stdin=asked, **set_)

    told = dict(one.split("=", 1) for one in done.stdout.splitlines())
    assert done.exit_code == OK
    assert line in done.stdout.splitlines()
    assert JWT.fullmatch(told.get("password") or told["credential"])
    assert 500 < int(told["password_expiry_utc"]) - time.time() <= 600


UNASKED = {
    "another host": ("get", "protocol=https\nhost=evil.example\n"),
    "another port": ("get", "protocol=https\nhost=api.example.com:8443\n"),
    "in the clear": ("get", "protocol=http\nhost=api.example.com\n"),
    "nothing": ("get", ""),
    "no text": ("get", b"host=\xff\n"),
    "two hosts": ("get", "protocol=https\nhost=api.example.com\nhost=evil.example\n"),
    "store": ("store", "protocol=https\nhost=api.example.com\npassword=x\n"),
    "erase": ("erase", "protocol=https\nhost=api.example.com\n"),
    "what is not known": ("later", "protocol=https\nhost=api.example.com\n"),
}


@pytest.mark.parametrize(("operation", "asked"), UNASKED.values(), ids=UNASKED)
def test_a_credential_helper_has_nothing_for_others(operation: str, asked: str | bytes) -> None:
    """Nothing is no failure: git asks the next helper.  The issuer is not asked, either."""
    done = run("credential-helper", "--resource", AUDIENCE, operation, stdin=asked)

    assert (done.exit_code, done.output) == (OK, "")


def test_a_credential_helper_is_told_for_whom(set_: dict[str, str]) -> None:
    """Else it would hand a token to whoever asks."""
    done = run("credential-helper", "get", stdin="protocol=https\nhost=a\n", **set_)

    assert (done.exit_code, done.stdout) == (USAGE, "")


# --- commands, as processes


def started(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "coatcheck.cli", *arguments],
        env=clean_environment() | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_curl_calls_with_a_token_that_nobody_sees(api: Api, set_: dict[str, str]) -> None:
    """Neither among arguments nor, as the API key, in the environment; standard input is curl's."""
    api.gate.clear()
    arguments = ("--data-binary", "@-", "--request", "GET", "--silent", "--include")
    with started("curl", api.url("/widgets"), "--", *arguments, **set_) as process:
        assert process.stdin is not None
        process.stdin.write("from a pipe")
        process.stdin.close()
        process.stdin = None
        deadline = time.monotonic() + WAIT
        while not api.seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        proc = Path("/proc") / str(process.pid)
        shown = ("cmdline", "environ") if proc.exists() else ()
        seen = [(proc / name).read_bytes() for name in shown]
        api.gate.set()
        told, said = process.communicate(timeout=WAIT)

    assert process.returncode == OK, said
    assert "200 OK" in told
    sent = str(api.seen[0][1]).removeprefix("Bearer ")
    assert JWT.fullmatch(sent)
    for secret in (sent, set_["COATCHECK_API_KEY"]):
        assert not any(secret.encode() in one for one in seen)
    assert not seen or seen[0].startswith(b"curl\0")


def test_curl_follows_no_redirect_to_another_host(api: Api, set_: dict[str, str]) -> None:
    """Wherever the API leads: it is the API that is talked to, and the token is not said again."""
    evil = f"http://localhost:{free_port()}/"
    options = ("--location", "--silent", "--fail")
    with started("curl", api.url(f"/to?{evil}"), "--", *options, **set_) as process:
        _, said = process.communicate(timeout=WAIT)

    # curl's own code for a status above 400: the API, asked by the other name, wants a token.
    assert process.returncode == 22, said
    assert [host.split(":")[0] for host, _ in api.seen] == ["127.0.0.1", "localhost"]
    assert [sent is not None for _, sent in api.seen] == [True, False]


def test_exec_runs_a_program_with_a_token_and_without_the_key(set_: dict[str, str]) -> None:
    """Its exit code, its output, its arguments as they are."""
    program = (
        "import os, sys;"
        " named = [name for name in os.environ if name.startswith('COATCHECK_API_KEY')];"
        " sys.exit(40 + (os.environ['WIDGETS'].count('.') == 2) + len(named) + len(sys.argv))"
    )
    command = ("exec", "--name", "WIDGETS", "--", sys.executable, "-c", program, "--json", "-x")
    with started(*command, **set_) as process:
        told, said = process.communicate(timeout=WAIT)

    assert (process.returncode, told, said) == (40 + 1 + 0 + 3, "", "")


def test_a_program_that_is_not_there_is_named(set_: dict[str, str]) -> None:
    """Without its arguments, which may hold a secret."""
    done = run("exec", "--", "/nowhere/no-such-program", "--password=hunter2", **set_)

    assert done.exit_code == ERROR
    assert "no-such-program" in done.stderr
    assert "hunter2" not in done.stderr
