"""What a thousand times as many API keys cost: processor time, memory, and the start.

Two deployments take turns.  At each, the same number of keys asks for tokens; where there are
more, those are spread over all of them.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from bench import load, machine, references, targets
from bench.load import Visit


def measure(
    deployments: Sequence[targets.Deployment], rounds: int, seconds: float
) -> list[list[dict[str, float]]]:
    """Per round: `cpu_us` per token, `memory_mib`, and `start_s` to the first token, of each.

    Args:
        seconds: of load per visit.

    Raises:
        LoadFailed: a server did not answer with a token.
    """
    server_core, load_core = machine.cores()
    told = []
    with ExitStack() as stack:
        loads = [
            stack.enter_context(load.started(one.keys, server_core, load_core))
            for one in deployments
        ]
        for number in range(rounds):
            turn = number % len(deployments)
            places = [*range(len(deployments))]
            of_round = {
                place: _visit(deployments[place], loads[place], seconds, server_core)
                for place in places[turn:] + places[:turn]
            }
            told.append([of_round[place] for place in places])
    return told


def _visit(
    deployment: targets.Deployment, from_load: load.Load, seconds: float, core: int | None
) -> dict[str, float]:
    began = time.perf_counter()
    with targets.coatcheck("growth", deployment, core) as server:
        targets.some_tokens(deployment, 1)
        start_s = time.perf_counter() - began
        visit = Visit(server.name, server.port, server.pid, references.PATH, seconds)
        # The first one fills the memory of records and counts nowhere.
        from_load.visit(visit)
        result = from_load.visit(visit)
        return {
            "cpu_us": result.cpu_us,
            "memory_mib": machine.memory_mib(server.pid),
            "start_s": start_s,
        }
