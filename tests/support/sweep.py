"""A run of tests fails if it leaves a secret where none may be.

A pytest plugin.  While tests run it listens to every log line, of libraries too, to what tests
print, to what commands say and to what HTTP clients are answered.  At the end it looks through
all files that the tests have left: databases and their logs, the services' own logs, everything.

With xdist each worker looks at its own, and the controller tells.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final

import httpx2
import pytest

from coatcheck import apikey
from support.secrets import SWEEP, Sweep

#: What HTTP clients log is not the service's, but for our own code that calls one: they write
#: URLs, and tests put secrets into those to see what becomes of them.
_CLIENTS: Final = ("httpx", "httpcore", "urllib3", "requests", "mcp.client")
_OUR_CALLERS: Final = ("/coatcheck/verifier/", "/coatcheck/cli/", "/coatcheck/caller/")
#: Tests that put secrets into files because that is what they are about.
_ABOUT_FILES: Final = (
    "unit/test_sealing.py::",
    "unit/test_secret_sweep.py::",
    "journey/test_command_line.py::test_the_api_key_may_come_from_a_file",
)
#: Answers that are there to carry a secret, if they succeed: method and path.
_SHOW_SECRETS: Final = re.compile(
    r"POST .*/oauth/token"
    r"|POST .*/v1/keys(/key_\w+/(rotate|reveal))?"
    r"|PUT .*/v1/devices/[^/]+/key"
    r"|POST .*/v1/organizations(/org_\w+/bootstrap)?"
    r"|POST .*/v1/mcp/connections"
)
_MOST_SHOWN: Final = 100
_OUTPUT_KEY: Final = "secrets"

_patches: Final = pytest.MonkeyPatch()


class Listener(logging.Handler):
    """Keeps what is logged, from all threads."""

    def __init__(self, sweep: Sweep = SWEEP) -> None:
        super().__init__()
        self._sweep = sweep

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(_CLIENTS) and not _is_ours():
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._sweep.text(f"a log line of {record.name}", text)


def _is_ours() -> bool:
    """Whether code of ours has called the client that logs."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if any(caller in frame.f_code.co_filename for caller in _OUR_CALLERS):
            return True
    return False


def _remembered(make: Callable[[str], str]) -> Callable[[str], str]:
    def remember(prefix: str) -> str:
        key = make(prefix)
        SWEEP.secrets.remember_api_key(key)
        return key

    return remember


def looked_at(
    send: Callable[..., httpx2.Response], sweep: Sweep = SWEEP
) -> Callable[..., httpx2.Response]:
    """A client's way of sending, of which every answer is kept."""

    def look(client: object, request: httpx2.Request, **options: Any) -> httpx2.Response:
        response = send(client, request, **options)
        if not _may_show_a_secret(request, response) and not options.get("stream"):
            where = f"the answer {response.status_code} to {request.method}"
            sweep.text(where, b"\n".join((str(response.headers).encode(), response.content)))
        return response

    return look


def _may_show_a_secret(request: httpx2.Request, response: httpx2.Response) -> bool:
    is_repeated = "idempotency-replayed" in response.headers
    line = f"{request.method} {request.url.path}"
    return response.is_success and not is_repeated and bool(_SHOW_SECRETS.fullmatch(line))


def pytest_configure(config: pytest.Config) -> None:
    if config.getini("tmp_path_retention_policy") != "all":
        raise pytest.UsageError("tmp_path_retention_policy: all, or there is nothing to look at")
    root = logging.getLogger()
    root.addHandler(Listener())
    _patches.setattr(root, "level", root.level)
    root.setLevel(logging.DEBUG)
    _patches.setattr(apikey, "make", _remembered(apikey.make))
    _patches.setattr(httpx2.Client, "send", looked_at(httpx2.Client.send))


def pytest_sessionstart(session: pytest.Session) -> None:
    """What pytest keeps of logs stays what it was: caplog, and what is shown of a failed test."""
    shown = session.config.pluginmanager.get_plugin("logging-plugin")
    for handler in (shown.caplog_handler, shown.report_handler) if shown else ():
        handler.setLevel(logging.WARNING)


def pytest_unconfigure() -> None:
    _patches.undo()
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, Listener):
            root.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _swept(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Temporary files of this process and of its children lie where they are looked at."""
    folder = tmp_path_factory.mktemp("tmp", numbered=False)
    request.config.stash[_FOLDER] = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield


_FOLDER: Final = pytest.StashKey[Any]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        SWEEP.process(os.getpid())
    if report.when == "teardown":
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        if folder is not None and any(about in item.nodeid for about in _ABOUT_FILES):
            SWEEP.excuse(folder)
        for name, text in report.sections:
            if " log " not in name:
                SWEEP.text(name.lower(), text)
        SWEEP.look(f"at the end of {item.nodeid}")
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Look through the files, once every fixture has ended."""
    SWEEP.look("at the end")
    folder = session.config.stash.get(_FOLDER, None)
    if folder is not None:
        SWEEP.files(folder)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_OUTPUT_KEY] = SWEEP.findings
    elif SWEEP.findings and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of xdist has ended."""
    SWEEP.findings += getattr(node, "workeroutput", {}).get(_OUTPUT_KEY, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SWEEP.findings:
        terminalreporter.section("secrets where none may be", red=True)
        for finding in SWEEP.findings[:_MOST_SHOWN]:
            terminalreporter.line(finding)
        if len(SWEEP.findings) > _MOST_SHOWN:
            terminalreporter.line(f"… and {len(SWEEP.findings) - _MOST_SHOWN} more")
