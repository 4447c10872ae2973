"""`make mutants`: change the verifier's checks one by one, and see whether the tests notice.

mutmut does not fit: it knows packages in `.`, `src` and `source` only, so that ours in `app` is
mutated and never imported; it passes over module-level constants and functions with a decorator
(`check._header` and `client_address.parse` have one); and it has no operator that takes a check
out.

    PYTHONPATH=tests python -m mutation [--workers 2] [--only check._header] [--steps]

Ends with 1 if a removed check or step goes unnoticed, if less than 95 % of the mutants are
killed, or if `equivalent.toml` does not tell the truth.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from mutation import trial
from mutation.mutants import Mutant, Source, numbers
from mutation.targets import PROCEDURE, ROOT, STEPS, TARGETS, TESTS
from mutation.trial import Job, Outcome, Reach

#: Per cent of the mutants that are not equivalent.
BAR: Final = 95
_EQUIVALENT: Final = Path(__file__).with_name("equivalent.toml")
_STEPS: Final = Path(__file__).with_name("steps.toml")
#: What the tests import of others; a child that imports coatcheck anew finds it loaded.
_LOADED_BEFORE: Final = (
    "authlib.oauth2.rfc6749",
    "cryptography.hazmat.primitives.asymmetric.rsa",
    "httpx2",
    "jwt",
    "sqlmodel",
    "starlette.testclient",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # A run that is ended leaves no child behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "app"))
    sources = [Source(target.module, target.path) for target in TARGETS]
    if options.steps:
        return _steps_by_name(sources, options.workers)
    equivalent = _equivalent()
    mutants = [
        mutant
        for source, target in zip(sources, TARGETS, strict=True)
        for mutant in source.mutants(frozenset(target.left_out))
    ]
    stale = sorted(set(equivalent) - {str(mutant) for mutant in mutants})
    chosen = [
        mutant
        for mutant in mutants
        if options.only in str(mutant) and (str(mutant) in equivalent) == options.equivalent
    ]
    if options.list:
        for mutant in chosen:
            _tell(str(mutant))
        return 0
    if not options.only and not options.equivalent:
        chosen += [step for source in sources for step in source.steps().values()]
    run = _Run(sources, options.workers, is_near=options.near)
    run.everything(chosen)
    if options.json:
        options.json.write_text(json.dumps(run.verdicts(), indent=1), encoding="utf-8")
    _tell(run.report())
    if not options.only:
        _tell_equivalent(equivalent)
    flaws = run.flaws(is_whole=not options.only, is_survival_right=options.equivalent)
    flaws += [f"equivalent.toml names what is no mutant: {mutant}" for mutant in stale]
    for flaw in flaws:
        _tell(f"FAILED  {flaw}")
    return 1 if flaws else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose line holds this text")
    parser.add_argument("--near", action="store_true", help="only the tests next to each module")
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    parser.add_argument("--steps", action="store_true", help="only the removed steps, by name")
    parser.add_argument("--equivalent", action="store_true", help="only those that are listed so")
    parser.add_argument("--json", type=Path, help="write every verdict to this file")
    return parser


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _equivalent() -> dict[str, str]:
    """Why each mutant that is listed cannot be noticed, by the mutant's line."""
    listed = tomllib.loads(_EQUIVALENT.read_text(encoding="utf-8"))["because"]
    return {mutant: entry["why"] for entry in listed for mutant in entry["mutants"]}


def _tell_equivalent(equivalent: dict[str, str]) -> None:
    _tell(f"{len(equivalent)} equivalent mutants, as tests/mutation/equivalent.toml lists them:")
    for mutant, why in equivalent.items():
        _tell(f"  {mutant}\n      {why}")


def _steps_by_name(sources: Sequence[Source], workers: int) -> int:
    """Remove each numbered step and run the one test that is said to notice it."""
    noticed_by: dict[str, str] = tomllib.loads(_STEPS.read_text(encoding="utf-8"))
    steps = {name: (step, source) for source in sources for name, step in source.steps().items()}
    flaws = [f"{name}: no test is named for it" for name in sorted(set(steps) - set(noticed_by))]
    flaws += [f"{name}: there is no such step" for name in sorted(set(noticed_by) - set(steps))]
    flaws += [f"step {number} is nowhere" for number in sorted(STEPS - _numbers(steps))]

    def run(items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        jobs = []
        for name, (step, source) in steps.items():
            item = found.get(noticed_by.get(name, ""))
            if item is None:
                flaws.append(f"{name}: there is no test {noticed_by.get(name)}")
            else:
                jobs.append(trial.by(step, source, partial(list, [item])))
        for job, outcome in trial.run_jobs(jobs, workers):
            if outcome.verdict != "killed":
                flaws.append(f"{job.mutant}: {outcome.verdict} {outcome.by}")

    trial.collect(trial.files(noticed_by.values()), run)
    for flaw in flaws:
        _tell(f"FAILED  {flaw}")
    _tell(f"{len(steps)} steps removed one by one, {len(flaws)} flaws")
    return 1 if flaws else 0


def _numbers(steps: Iterable[str]) -> set[str]:
    """The numbers of the steps of a token's check; other procedures count their own."""
    named = (name.split(" ", 1) for name in steps)
    return {
        number for place, label in named if place.startswith(PROCEDURE) for number in numbers(label)
    }


def _subject(mutant: Mutant) -> str:
    """The function or constant that a mutant changes."""
    return f"{mutant.place} {mutant.constant}"


class _Run:
    """Trials, and what became of them."""

    def __init__(self, sources: Sequence[Source], workers: int, *, is_near: bool) -> None:
        self._sources = {source.module: source for source in sources}
        self._near = {
            target.module: tuple(f"{test}::" for test in target.near) for target in TARGETS
        }
        self._workers = workers
        self._is_near = is_near
        self._outcomes: dict[Mutant, Outcome] = {}
        self._noticing = defaultdict[str, set[str]](set)
        self._control: Outcome | None = None
        self._failed: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._tried = 0

    def everything(self, mutants: Sequence[Mutant]) -> None:
        for name in _LOADED_BEFORE:
            importlib.import_module(name)
        near = trial.files(test for mutant in mutants for test in self._near[mutant.module])
        tests = near if self._is_near else TESTS
        known = trial.reach(tests, tuple(self._sources.values()))
        self._failed = known.failed
        if known.failed:
            return
        self._try_imported([mutant for mutant in mutants if not mutant.function], known)
        called = [mutant for mutant in mutants if mutant.function]
        if trial.collect(tests, lambda items: self._try_called(called, items, known)):
            self._failed = ("the tests cannot be collected",)

    def _try_imported(self, mutants: Sequence[Mutant], known: Reach) -> None:
        """First with the tests next to it, then, if they notice nothing, with the others."""
        rounds: tuple[list[Job], list[Job]] = ([], [])
        for mutant in mutants:
            source = self._sources[mutant.module]
            asked: tuple[list[str], list[str]] = ([], [])
            for test in trial.concerned(mutant, tuple(self._sources.values()), known):
                asked[not test.startswith(self._near[mutant.module])].append(test)
            self._outcomes[mutant] = Outcome("survived", "no test gets there")
            for jobs, tests in zip(rounds, asked, strict=True):
                if tests:
                    noticing = self._noticing[_subject(mutant)]
                    jobs.append(trial.imported(mutant, source, tests, known, noticing))
        self._take(rounds[0])
        survived = [one for one in mutants if self._outcomes[one].verdict == "survived"]
        if not self._is_near:
            self._take(job for job in rounds[1] if job.mutant in survived)

    def _try_called(
        self, mutants: Sequence[Mutant], items: list[pytest.Item], known: Reach
    ) -> None:
        jobs = []
        for mutant in mutants:
            near = self._near[mutant.module]
            asked = [one for one in items if one.nodeid.startswith(near) or not self._is_near]
            source, noticing = self._sources[mutant.module], self._noticing[_subject(mutant)]
            job = trial.called(mutant, source, asked, known, noticing)
            if job is None:
                self._outcomes[mutant] = Outcome("survived", "no test gets there")
            else:
                jobs.append(job)
        self._take([*jobs, trial.control(tuple(self._sources.values()), items, known)])

    def _take(self, jobs: Iterable[Job]) -> None:
        for job, outcome in trial.run_jobs(jobs, self._workers):
            if job.mutant is None:
                self._control = outcome
                continue
            self._outcomes[job.mutant] = outcome
            self._noticing[_subject(job.mutant)].add(outcome.by)
            self._tried += 1
            if self._tried % 100 == 0:
                passed_s = time.monotonic() - self._began
                sys.stderr.write(f"{self._tried} trials, {passed_s:.0f} s\n")

    def verdicts(self) -> list[dict[str, str]]:
        return [
            {"mutant": str(mutant), "verdict": outcome.verdict, "by": outcome.by}
            for mutant, outcome in self._outcomes.items()
        ]

    def report(self) -> str:
        lines = [f"{'':28}{'mutants':>8}{'killed':>8}{'timeout':>8}{'survived':>9}"]
        for module in (*self._sources, ""):
            counted = Counter(
                outcome.verdict
                for mutant, outcome in self._outcomes.items()
                if module in ("", mutant.module)
            )
            if counted:
                lines.append(
                    f"{module.removeprefix('coatcheck.') or 'all':28}{counted.total():8}"
                    f"{counted['killed']:8}{counted['timeout']:8}{counted['survived']:9}"
                )
        removed = [mutant for mutant in self._outcomes if mutant.is_removed_check]
        noticed = [one for one in removed if self._outcomes[one].verdict != "survived"]
        lines.append(
            f"{self._score():.1f} % noticed; of {len(removed)} removed checks and steps"
            f" {len(noticed)}; {time.monotonic() - self._began:.0f} s"
        )
        lines += [
            f"{outcome.verdict}  line {mutant.line}  {mutant}  {outcome.by}"
            for mutant, outcome in self._outcomes.items()
            if outcome.verdict != "killed"
        ]
        return "\n".join(lines)

    def flaws(self, *, is_whole: bool, is_survival_right: bool) -> list[str]:
        """Why the run as a whole has failed."""
        flaws = [f"without any mutant: {test}" for test in self._failed]
        if self._control is not None and self._control.verdict != "survived":
            flaws.append(f"the control, which changes nothing: {self._control.by}")
        outcomes = self._outcomes.items()
        flaws += [f"not tried: {one}" for one, outcome in outcomes if outcome.verdict == "broken"]
        if is_survival_right:
            flaws += [
                f"not equivalent: {mutant}  {outcome.by}"
                for mutant, outcome in outcomes
                if outcome.verdict != "survived"
            ]
            return flaws
        flaws += [
            f"removed and not noticed: {mutant}"
            for mutant, outcome in outcomes
            if mutant.is_removed_check and outcome.verdict == "survived"
        ]
        if is_whole and self._score() < BAR:
            flaws.append(f"less than {BAR} % of the mutants are noticed")
        return flaws

    def _score(self) -> float:
        noticed = [one for one in self._outcomes.values() if one.verdict in ("killed", "timeout")]
        return 100 * len(noticed) / max(len(self._outcomes), 1)


if __name__ == "__main__":
    sys.exit(main())
