"""`python -m bench`: interleaved rounds of load on Coatcheck and the references, then a report."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from bench import fleet, growth, load, machine, profiling, references, report, targets, verification
from bench.load import LoadFailed, Result, Visit
from bench.report import Figure

#: How many tokens the verifier's part works on.
_TOKENS: Final = 200
#: A figure of fewer rounds than this says little.
_FEW_ROUNDS: Final = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a bar is missed and `--strict` was said, 2 if nothing could be measured."""
    options = _parser().parse_args(arguments)
    with TemporaryDirectory(prefix="coatcheck-bench-") as folder:
        deployment = targets.deploy(Path(folder) / "coatcheck")
        if options.profile:
            print(profiling.report(deployment))
            return 0
        try:
            told = _run(options, Path(folder), deployment)
            print(f"\nWhere the time of a token request goes:\n{profiling.report(deployment)}")
        except LoadFailed as error:
            print(f"the run failed, no figure of it counts: {error}", file=sys.stderr)
            return 2
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    missed = any(figure["met"] is False for figure in told["ratios"])
    return 1 if options.strict and missed else 0


def _run(
    options: argparse.Namespace, folder: Path, deployment: targets.Deployment
) -> dict[str, Any]:
    about = machine.description()
    server_core, load_core = machine.cores()
    _print_machine(about, pinned=server_core is not None)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(targets.reference("R", deployment.keys, server_core)),
            stack.enter_context(targets.reference("F", deployment.keys, server_core)),
            stack.enter_context(targets.coatcheck("coatcheck", deployment, server_core)),
        ]
        keys = deployment.keys
        of_keys = stack.enter_context(load.started(keys, server_core, load_core))
        load_of = dict.fromkeys((server.name for server in servers), of_keys)
        if options.against:
            other = targets.deploy(folder / "against", options.against)
            servers.append(stack.enter_context(targets.coatcheck("against", other, server_core)))
            load_of["against"] = stack.enter_context(
                load.started(other.keys, server_core, load_core)
            )

        def visit(server: targets.Target) -> Result:
            return load_of[server.name].visit(
                Visit(server.name, server.port, server.pid, references.PATH, options.seconds)
            )

        for server in servers:
            # Counts nowhere: caches fill, and whoever does not answer is known at once.
            visit(server)
        rounds: list[dict[str, Result]] = []
        for number in range(options.rounds):
            # Each server comes first in turn, so that no place in the order favors one.
            turn = number % len(servers)
            results = {server.name: visit(server) for server in servers[turn:] + servers[:turn]}
            rounds.append({server.name: results[server.name] for server in servers})
            _progress(number + 1, options.rounds)
        tokens, key_set = targets.some_tokens(deployment, _TOKENS)
        with machine.pinned_to(server_core):
            verified = verification.measure(tokens, key_set, options.rounds)
    grown: list[list[dict[str, float]]] = []
    if options.many:
        many = targets.deploy(folder / "many", count=options.many)
        grown = growth.measure([deployment, many], options.rounds, options.seconds)
    counted = report.undisturbed(rounds)
    figures = report.of_tokens(counted) + report.of_verification(verified)
    figures += report.of_growth(grown) if grown else []
    full: list[dict[str, Result]] = []
    half: list[dict[str, Result]] = []
    facts: dict[str, dict[str, float]] = {}
    if options.fleet:
        full, half, facts = fleet.measure(folder, options.rounds, options.seconds)
        figures += report.of_fleet(report.undisturbed(full), half, facts)
    _print_report(rounds, counted, verified, figures)
    if facts:
        _print_fleet(full, half, facts)
    return {
        "machine": about,
        "rounds": options.rounds,
        "rounds_counted": len(counted),
        "seconds": options.seconds,
        "ratios": [figure.to_json() for figure in figures],
        "visits": [{name: asdict(one) for name, one in of.items()} for of in rounds],
        "verification_us": verified,
        "growth": grown,
        "fleet": {
            "saturated": [{name: asdict(one) for name, one in of.items()} for of in full],
            "at_half": [{name: asdict(one) for name, one in of.items()} for of in half],
            "facts": facts,
        },
    }


def _print_machine(about: dict[str, Any], *, pinned: bool) -> None:
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    where = "server and load on a core each" if pinned else "server and load share one core"
    print(f"{about['cores']} cores, {about['cpu']}, Linux {about['kernel']}; {where}")
    print(f"Python {about['python']}, {libraries}")


def _print_report(
    rounds: report.Rounds,
    counted: report.Rounds,
    verified: list[dict[str, float]],
    figures: list[Figure],
) -> None:
    print("\nFor information, on this machine in this hour:")
    for line in report.servers_table(rounds):
        print(line)
    costs = ", ".join(f"{name} {median(one[name] for one in verified):.2f}" for name in verified[0])
    print(f"verifier, us per call: {costs}")
    print(
        f"\nRatios within a round: median (lowest to highest); for tokens of {len(counted)} rounds,"
        f" {len(rounds) - len(counted)} disturbed ones left out"
    )
    for figure in figures:
        print(figure)
    if len(counted) < _FEW_ROUNDS:
        print(f"Fewer than {_FEW_ROUNDS} rounds: differences below 10 % are not shown by this run.")


def _print_fleet(
    full: report.Rounds, half: report.Rounds, facts: dict[str, dict[str, float]]
) -> None:
    print("\nWorkers and databases, for information; at saturation:")
    for line in report.servers_table(full):
        print(line)
    print("at half of that rate:")
    for line in report.servers_table(half):
        print(line)
    print(f"start to first token; {fleet.FOLLOWERS} followers of the feed without news:")
    for line in report.facts_table(facts):
        print(line)


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {of}", end="\n" if done == of else "", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=_positive, default=9, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of load per visit; default: %(default)s"
    )
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="APP",
        help="another tree's app folder, measured in the same rounds",
    )
    parser.add_argument(
        "--many",
        type=_positive_or_zero,
        default=1_000_000,
        metavar="N",
        help="how many keys the larger deployment has; 0: leave it out; default: %(default)s",
    )
    parser.add_argument(
        "--no-fleet", dest="fleet", action="store_false", help="leave out workers and PostgreSQL"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a bar is missed")
    return parser


def _positive_or_zero(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
