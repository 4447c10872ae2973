"""The machine: its cores, what runs on it, and how much processor time a process has used."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

_LIBRARIES: Final = (
    *("cryptography", "PyJWT", "Authlib", "starlette", "uvicorn", "uvloop", "httptools"),
)
#: linux/posix-timers.h: the clock of a whole process, by its id.
_CPUCLOCK_SCHED: Final = 2


def cores() -> tuple[int | None, int | None]:
    """The cores for the server and for the load; None twice where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else (None, None)


@contextmanager
def pinned_to(core: int | None) -> Iterator[None]:
    """This thread stays on a core until the block ends, as do processes started in it."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_ns(pid: int) -> int:
    """User and system time of a process and its living descendants, in nanoseconds.

    The kernel's own clock of the process (clock_getcpuclockid(3)): ticks of 10 ms in
    /proc/PID/stat would be 1 % of a visit.  Exact while the process waits.
    """
    used = time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text(encoding="ascii").split()
        except OSError:
            # The thread has ended, or the kernel does not tell.
            continue
        used += sum(cpu_ns(int(child)) for child in children)
    return used


def memory_mib(pid: int) -> float:
    """Memory of a process and its living descendants, what they share counted once."""
    kib = 0.0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            kib = float(line.split()[1])
    total = kib / 1024
    for task in Path(f"/proc/{pid}/task").iterdir():
        children = (task / "children").read_text(encoding="ascii").split()
        total += sum(memory_mib(int(child)) for child in children)
    return total


def busy_s(core: int | None) -> float:
    """Seconds for which a core has been busy since the machine started, stolen ones included."""
    name = "cpu" if core is None else f"cpu{core}"
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[0] == name:
            user, nice, system, _, _, irq, soft_irq, steal = map(int, fields[1:9])
            ticks = user + nice + system + irq + soft_irq + steal
            return ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def description() -> dict[str, object]:
    """What somebody needs to know to judge the figures."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
