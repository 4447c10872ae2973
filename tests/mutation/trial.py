"""Trying mutants: each in a forked child that runs tests until one of them fails.

A mutated function is put in place by its code object, so that everybody who imported it before
calls the changed one, and no child collects the tests anew.  What is evaluated when a module is
imported (constants, patterns, decorators) cannot be changed that way: such a mutant has a child
that imports the changed module and collects the tests itself.

Which statements each test reaches is found out once.  A mutant meets only tests that get there:
first those that noticed other mutants of the same function, then the fastest.
"""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, MappingProxyType, ModuleType
from typing import Any, Final, Literal, NamedTuple, NoReturn

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

from mutation.mutants import Mutant, Source
from mutation.targets import ROOT

Verdict = Literal["killed", "survived", "timeout", "broken"]

#: A child may not take the machine down with it.
_MOST_BYTES: Final = 4 * 2**30
#: Seconds that a test may take beyond ten times its usual duration.
_PATIENCE: Final = 15.0
_PYTEST: Final = (
    *("-q", "-x", "--capture=no", "-p", "no:cacheprovider"),
    # Hypothesis is imported before pytest begins; no test looks inside its assertions.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


class Outcome(NamedTuple):
    """What became of a mutant; `by`: the test that failed, or what went wrong."""

    verdict: Verdict
    by: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Something to do in a child; `limit_s`: when it is given up."""

    mutant: Mutant | None
    work: Callable[[], object]
    limit_s: float


@dataclass(slots=True)
class _Child:
    job: Job
    pid: int
    pipe: int
    deadline: float
    said: bytes = b""


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Try each mutant in a child of its own, so many at once."""
    for job, said in in_children(jobs, workers):
        yield job, Outcome(*said) if isinstance(said, list) else Outcome("broken", str(said))


def in_children(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, object]]:
    """Do each job in a child of its own.  What they return travels as JSON."""
    waiting, children = iter(jobs), dict[int, _Child]()
    with selectors.DefaultSelector() as selector, _ended(children):
        while True:
            while len(children) < workers and (job := next(waiting, None)) is not None:
                child = _start(job)
                children[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            if not children:
                return
            for key, _ in selector.select(timeout=1):
                child = children[key.fd]
                if said := os.read(child.pipe, 2**16):
                    child.said += said
                    continue
                selector.unregister(child.pipe)
                del children[child.pipe]
                yield child.job, _end(child)
            for child in [one for one in children.values() if time.monotonic() > one.deadline]:
                # Its pipe reports the end in the next round.
                os.killpg(child.pid, signal.SIGKILL)
                child.deadline = float("inf")


@contextmanager
def _ended(children: dict[int, _Child]) -> Iterator[None]:
    """Leave no child behind, however the run ends."""
    try:
        yield
    finally:
        for child in children.values():
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def _start(job: Job) -> _Child:
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_a_child(job, writing)
    os.close(writing)
    with suppress(OSError):
        os.setpgid(pid, pid)  # The child does the same: whoever comes first.
    return _Child(job, pid, reading, time.monotonic() + job.limit_s)


def _be_a_child(job: Job, pipe: int) -> NoReturn:
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))

        def give_up(number: int, frame: FrameType | None) -> NoReturn:
            _say(pipe, Outcome("timeout", os.environ.get("PYTEST_CURRENT_TEST", "")))
            os._exit(0)

        signal.signal(signal.SIGALRM, give_up)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        said = job.work()
    except BaseException:
        said = Outcome("broken", traceback.format_exc(limit=-3))
    _say(pipe, said)
    os._exit(0)


def _say(pipe: int, said: object) -> None:
    data = json.dumps(said).encode()
    while data:
        data = data[os.write(pipe, data) :]


def _end(child: _Child) -> object:
    os.close(child.pipe)
    os.waitpid(child.pid, 0)
    if child.said:
        return json.loads(child.said)
    return ["timeout" if child.deadline == float("inf") else "broken", "no answer"]


# In the child, or in the parent before there is one.


class _Loop:
    """In place of pytest's own loop over what was collected."""

    def __init__(self, run: Callable[[list[pytest.Item]], None]) -> None:
        self._run = run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        get_ready()
        self._run(session.items)
        return True


def collect(tests: Sequence[str], run: Callable[[list[pytest.Item]], None]) -> int:
    """Collect tests and hand them over.  Returns pytest's exit status."""
    hypothesis.settings.register_profile(
        "mutants",
        # The same examples for each mutant, and no time spent on finding the smallest one.
        derandomize=True,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        print_blob=False,
    )
    hypothesis.settings.load_profile("mutants")
    paths = [str(ROOT / test) for test in tests]
    options = [*_PYTEST, f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    return pytest.main([*options, *paths], plugins=[_Loop(run)])


def first_failure(items: Sequence[pytest.Item], usual_s: Mapping[str, float]) -> str | None:
    """Run tests until one fails; its name."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        forget()
        signal.setitimer(signal.ITIMER_REAL, 10 * usual_s.get(item.nodeid, 1) + _PATIENCE)
        reports = runtestprotocol(item, log=False, nextitem=following)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if any(report.failed for report in reports):
            return item.nodeid
    return None


_REMEMBERING: Final = list[Any]()


def get_ready() -> None:
    """Do once, after the tests are collected, what each child would do otherwise."""
    _REMEMBERING[:] = [
        found
        for found in gc.get_objects()
        if type(found).__name__ == "_lru_cache_wrapper"
        and str(getattr(found, "__module__", "")).startswith("coatcheck.")
    ]
    gc.collect()
    gc.freeze()  # So that children share the memory of their parent.


def forget() -> None:
    """Empty what our own functions remember, so that each test reaches them."""
    for remembering in _REMEMBERING:
        remembering.cache_clear()


def put_in_place(source: Source) -> set[str]:
    """Give every function of a module that is imported the code that the tree has now.

    Returns:
        The names of these functions.
    """
    module = sys.modules[source.module]
    replaced = set()
    for code in _codes(source.code()):
        function = _function(module, code.co_qualname)
        if function is not None:
            function.__code__ = code
            replaced.add(code.co_qualname)
    return replaced


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and "<" not in constant.co_qualname:
            yield constant
            yield from _codes(constant)


def _function(module: ModuleType, name: str) -> FunctionType | None:
    found: object = module
    for part in name.split("."):
        found = vars(found).get(part)
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, classmethod | staticmethod):
            found = found.__func__
        found = getattr(found, "__wrapped__", found)
        if found is None:
            return None
    return found if isinstance(found, FunctionType) else None


class Reach(NamedTuple):
    """What the tests do to the modules as they are.

    Attributes:
        reached: for each test, the numbers of the statements by module.
        usual_s: how long each test takes.
        failed: tests that fail without any mutant.
    """

    reached: Mapping[str, Mapping[str, frozenset[int]]]
    usual_s: Mapping[str, float]
    failed: tuple[str, ...]


def reach(tests: Sequence[str], sources: Sequence[Source]) -> Reach:
    """Find out which statements each test gets to.  In a child, which collects them itself."""
    ((_, said),) = in_children([Job(None, _reaching(tests, sources), 1800)], 1)
    if not isinstance(said, dict):
        raise RuntimeError(f"the tests cannot be measured: {said}")  # noqa: TRY004
    reached = {
        test: {module: frozenset(numbers) for module, numbers in modules.items()}
        for test, modules in said["reached"].items()
    }
    return Reach(reached, said["usual_s"], tuple(said["failed"]))


def _reaching(tests: Sequence[str], sources: Sequence[Source]) -> Callable[[], object]:
    now: dict[str, set[int]] = {source.module: set() for source in sources}
    reached: dict[str, dict[str, list[int]]] = {}
    usual_s: dict[str, float] = {}
    failed: list[str] = []

    def run(items: list[pytest.Item]) -> None:
        for source in sources:
            source.instrument()
            vars(sys.modules[source.module])["__reached__"] = now[source.module].add
            put_in_place(source)
        for item, following in zip(items, [*items[1:], None], strict=True):
            forget()
            for numbers in now.values():
                numbers.clear()
            began = time.perf_counter()
            reports = runtestprotocol(item, log=False, nextitem=following)
            usual_s[item.nodeid] = time.perf_counter() - began
            reached[item.nodeid] = {module: sorted(numbers) for module, numbers in now.items()}
            if any(report.failed for report in reports):
                failed.append(item.nodeid)

    def work() -> object:
        if status := collect(tests, run):
            failed.append(f"pytest ends with {status}")
        return {"reached": reached, "usual_s": usual_s, "failed": failed}

    return work


def called(
    mutant: Mutant,
    source: Source,
    items: Sequence[pytest.Item],
    known: Reach,
    noticing: Collection[str],
) -> Job | None:
    """The trial of a mutant of a function.  None: no test gets to it.

    Args:
        noticing: the tests that noticed other mutants of this function by the time the trial
            begins; they come first.
    """
    usual_s = known.usual_s
    chosen = [
        item
        for item in items
        if mutant.statement in known.reached[item.nodeid].get(mutant.module, ())
    ]

    def in_order() -> list[pytest.Item]:
        return sorted(chosen, key=lambda item: (item.nodeid not in noticing, usual_s[item.nodeid]))

    return by(mutant, source, in_order, usual_s) if chosen else None


def by(
    mutant: Mutant,
    source: Source,
    items: Callable[[], Sequence[pytest.Item]],
    usual_s: Mapping[str, float] = MappingProxyType({}),
) -> Job:
    """The trial of a mutant of a function by these tests, in this order."""

    def work() -> object:
        mutant.apply()
        if mutant.function not in put_in_place(source):
            return Outcome("broken", f"{mutant.function} cannot be replaced")
        return _verdict(first_failure(items(), usual_s))

    return Job(mutant, work, 10 * sum(usual_s.values()) + 60)


def control(sources: Sequence[Source], items: Sequence[pytest.Item], known: Reach) -> Job:
    """The same with nothing changed.  If it does not survive, no other verdict counts."""

    def work() -> object:
        for source in sources:
            put_in_place(source)
        return _verdict(first_failure(items, known.usual_s))

    return Job(None, work, 10 * sum(known.usual_s.values()) + 60)


def imported(
    mutant: Mutant,
    source: Source,
    tests: Sequence[str],
    known: Reach,
    noticing: Collection[str],
) -> Job:
    """The trial of a mutant that is evaluated at import.  Nobody has imported coatcheck yet.

    Args:
        noticing: as in `called`, of the same constant.
    """
    usual_s = known.usual_s

    def work() -> object:
        assert not any(name.partition(".")[0] == "coatcheck" for name in sys.modules)
        mutant.apply()
        sys.meta_path.insert(0, _Finder(source))
        outcome = Outcome("killed", "the tests cannot be collected")

        def run(items: list[pytest.Item]) -> None:
            nonlocal outcome
            chosen = [item for item in items if item.nodeid in tests]
            chosen.sort(key=lambda item: (item.nodeid not in noticing, usual_s[item.nodeid]))
            outcome = _verdict(first_failure(chosen, usual_s))

        collect(files(tests), run)
        return outcome

    return Job(mutant, work, 10 * sum(usual_s[test] for test in tests) + 120)


def _verdict(failed: str | None) -> Outcome:
    return Outcome("survived") if failed is None else Outcome("killed", failed)


def files(tests: Iterable[str]) -> list[str]:
    """The files that these tests are in."""
    return sorted({test.partition("::")[0] for test in tests})


def concerned(mutant: Mutant, sources: Sequence[Source], known: Reach) -> list[str]:
    """The tests that reach whatever mentions the constant of a mutant."""
    places = {source.module: source.mentions(mutant.constant) for source in sources}
    if not mutant.constant or None in places.values() or not any(places.values()):
        # What no function of these modules mentions, a test may look at by itself.
        return list(known.usual_s)
    return [
        test
        for test, modules in known.reached.items()
        if any((places[module] or frozenset()) & numbers for module, numbers in modules.items())
    ]


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, source: Source) -> None:
        super().__init__(source.module, str(source.path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return self._source.code()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, changed."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._source.module:
            return None
        is_package = self._source.path.name == "__init__.py"
        return importlib.util.spec_from_file_location(
            fullname,
            self._source.path,
            loader=_Loader(self._source),
            submodule_search_locations=[str(self._source.path.parent)] if is_package else None,
        )
