"""Several workers, and PostgreSQL, against one worker on SQLite; and what callers wait for.

Every server runs at the same time and takes its turn under load, as in the main part; two workers
share the server's core, so that what they cost each other is in the figure.
"""

import http.client
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bench import load, machine, references, targets
from bench.load import Result, Visit

#: Tests start a server of their own with the same code.
_TESTS: Final = Path(__file__).parents[1] / "tests"
#: How many follow the feed at a node.
FOLLOWERS: Final = 200
#: Seconds of following that are looked at.
_FOLLOWED: Final = 3.0

#: By name: whether on PostgreSQL, and how many workers.
SERVERS: Final[Mapping[str, tuple[bool, int]]] = {
    "sqlite 1": (False, 1),
    "sqlite 2": (False, 2),
    "postgres 1": (True, 1),
    "postgres 2": (True, 2),
}


def measure(
    folder: Path, rounds: int, seconds: float
) -> tuple[list[dict[str, Result]], list[dict[str, Result]], dict[str, dict[str, float]]]:
    """Visits at saturation, visits of half that rate, and facts of each server.

    `R` is measured beside them.  Without a PostgreSQL server on the machine, SQLite alone is.

    Raises:
        LoadFailed: a server did not answer with a token.
    """
    server_core, load_core = machine.cores()
    with ExitStack() as stack:
        new_database = stack.enter_context(_databases())
        running: dict[str, targets.Target] = {}
        loads: dict[str, load.Load] = {}
        facts: dict[str, dict[str, float]] = {}
        for name, (is_postgres, workers) in SERVERS.items():
            if is_postgres and new_database is None:
                continue
            database_url = new_database() if is_postgres and new_database is not None else None
            deployment = targets.deploy(folder / name.replace(" ", "-"), database_url=database_url)
            began = time.perf_counter()
            running[name] = stack.enter_context(
                targets.coatcheck(name, deployment, server_core, workers)
            )
            targets.some_tokens(deployment, 1)
            facts[name] = {"start_s": time.perf_counter() - began}
            loads[name] = stack.enter_context(load.started(deployment.keys, server_core, load_core))
        keys = deployment.keys
        running["R"] = stack.enter_context(targets.reference("R", keys, server_core))
        loads["R"] = stack.enter_context(load.started(keys, server_core, load_core))

        def visit(name: str, rate: float = 0) -> Result:
            server = running[name]
            return loads[name].visit(
                Visit(name, server.port, server.pid, references.PATH, seconds, rate)
            )

        names = [*running]
        full = [_round(names, number, visit) for number in range(rounds)]
        half_of = {
            name: sorted(one[name].tokens / one[name].seconds for one in full)[rounds // 2] / 2
            for name in names
        }
        half = [
            _round(names, number, lambda name: visit(name, half_of[name]))
            for number in range(rounds)
        ]
        for name, fact in facts.items():
            fact["memory_mib"] = machine.memory_mib(running[name].pid)
            fact["followers_cpu"] = _following(running[name])
        return full, half, facts


def _round(names: Sequence[str], number: int, visit: Callable[[str], Result]) -> dict[str, Result]:
    """One visit of each; each comes first in turn."""
    turn = number % len(names)
    results = {name: visit(name) for name in (*names[turn:], *names[:turn])}
    return {name: results[name] for name in names}


def _following(server: targets.Target) -> float:
    """The share of a core that a node uses while FOLLOWERS wait for news, and there are none."""
    connections = [
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(FOLLOWERS)
    ]
    try:
        for connection in connections:
            connection.request("GET", f"/oauth/revocations?after={2**53}&wait=25")
        time.sleep(1)
        used, began = machine.cpu_ns(server.pid), time.perf_counter()
        time.sleep(_FOLLOWED)
        return (machine.cpu_ns(server.pid) - used) / 1e9 / (time.perf_counter() - began)
    finally:
        for connection in connections:
            connection.close()


@contextmanager
def _databases() -> Iterator[Callable[[], str] | None]:
    """Makes empty PostgreSQL databases; None where there is no server."""
    sys.path.insert(0, str(_TESTS))
    from support import postgres  # noqa: PLC0415 - the tests' own server; they are beside us

    if postgres.binaries() is None:
        print("no PostgreSQL server on this machine: left out", file=sys.stderr)
        yield None
        return
    with postgres.server() as running:
        yield running.new_database
