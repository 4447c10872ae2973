"""`coatcheck …` without its start-up: who has imported everything forks a process for each run.

Each run is a process all the same, with an environment, arguments, standard streams, signals and an
exit code of its own; its start takes a hundredth of the time.  What it cannot show is that a
command imports what it needs: tests/journey/test_command_line.py has that.

As a program this is the process that forks.  It has no threads, and ends with whoever started it.
"""

import array
import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import typer.main

#: What commands import when they run; the rest comes with these.
_IMPORTED: Final = (
    *("coatcheck.cli.commands", "coatcheck.cli.local", "coatcheck.cli.diagnosis"),
    *("coatcheck.server.app", "coatcheck.server.listen", "coatcheck.server.store.postgres"),
    *("coatcheck.server.recovery", "coatcheck.server.restore", "coatcheck.server.resealing"),
    *("coatcheck.server.catalog_file", "alembic.command", "alembic.autogenerate", "uvloop"),
)
_INT: Final = struct.Struct("=i")
_MOST_FILES: Final = 1024


# --- for tests


class Forked:
    """A process that was forked, as `subprocess.Popen` shows one."""

    def __init__(self, arguments: Sequence[str], reply: socket.socket) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._reply = reply
        self._asking = threading.Lock()
        self.pid = self._read()

    def poll(self) -> int | None:
        with self._asking:
            if self.returncode is None and self._is_told(0):
                self.returncode = self._read()
                self._reply.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.poll() is None:
            self._is_told(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _is_told(self, timeout_s: float | None) -> bool:
        # Unlike `select`, in a test that has opened a thousand connections, too.
        asked = select.poll()
        asked.register(self._reply, select.POLLIN)
        return bool(asked.poll(None if timeout_s is None else timeout_s * 1000))

    def _read(self) -> int:
        told = self._reply.recv(_INT.size, socket.MSG_WAITALL)
        if len(told) < _INT.size:
            raise AssertionError("the process that forks has ended: see stderr")
        number: int = _INT.unpack(told)[0]
        return number


def start(
    arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]
) -> Forked:
    """Run `coatcheck …` with this environment, and stdin, stdout and stderr; do not wait."""
    ours, theirs = socket.socketpair()
    what = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
    with theirs, _sending:
        files = array.array("i", [*streams, theirs.fileno()])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
        control = _control()
        control.sendmsg([_INT.pack(len(what))], ancillary)
        control.sendall(what)
    return Forked(arguments, ours)


def run(
    arguments: Sequence[str], environment: Mapping[str, str], stdin: str, timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """Run `coatcheck …` to its end, as `subprocess.run` does."""
    # Files without a name: what a command says may be secret.
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        process = start(arguments, environment, (given.fileno(), out.fileno(), err.fileno()))
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess(arguments, code, *said)


_sending: Final = threading.Lock()


@cache
def _control() -> socket.socket:
    """The connection to the process that forks, which is started."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# --- the process that forks


def _next_run(control: socket.socket) -> list[str]:
    """Fork for each run that is asked for.  Returns in the new process: its arguments."""
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _tell_who_ended(running)
        if control not in ready:
            continue
        head, files, _, _ = socket.recv_fds(control, _INT.size, 4)
        if not head:
            sys.exit()
        what = control.recv(_INT.unpack(head)[0], socket.MSG_WAITALL)
        *streams, reply = files
        process_id = os.fork()
        if process_id == 0:
            return _become(json.loads(what), streams)
        for file in streams:
            os.close(file)
        running[process_id] = socket.socket(fileno=reply)
        _say(running[process_id], process_id)


def _tell_who_ended(running: dict[int, socket.socket]) -> None:
    while running:
        process_id, status = os.waitpid(-1, os.WNOHANG)
        if process_id == 0:
            return
        with running.pop(process_id) as reply:
            _say(reply, os.waitstatus_to_exitcode(status))


def _say(reply: socket.socket, number: int) -> None:
    try:
        reply.sendall(_INT.pack(number))
    except BrokenPipeError:
        return  # nobody asks any more


def _become(what: list[Any], streams: Sequence[int]) -> list[str]:
    """Be a process that was just started like this.  Returns its arguments."""
    arguments, environment, folder = what
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(streams):
        os.dup2(file, number)
    os.closerange(3, _MOST_FILES)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    time.tzset()
    tempfile.tempdir = None
    for name, module in list(sys.modules.items()):
        if name.startswith("coatcheck.cli") and hasattr(module, "STARTED_AT"):
            vars(module)["STARTED_AT"] = time.time()
    return list(arguments)


if __name__ == "__main__":
    # In place of this file's folder, where `wire` and others are none of the service's.
    sys.path[0] = ""
    for _module in _IMPORTED:
        import_module(_module)
    # The tree of all commands, too, is made once.
    vars(typer.main)["get_command"] = cache(typer.main.get_command)
    typer.main.get_command(import_module("coatcheck.cli.commands").app)
    gc.collect()
    gc.freeze()
    sys.argv[1:] = _next_run(socket.socket(fileno=int(sys.argv[1])))
    try:
        runpy.run_module("coatcheck.cli", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if not isinstance(ended.code, int) or threading.active_count() > 1 or "serve" in sys.argv:
            raise
        # To take apart all that was imported would take longer than the command.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)
