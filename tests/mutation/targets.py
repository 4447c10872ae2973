"""What is mutated, what is left out and why, and which tests have to notice."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

#: The tests that have to notice, in the order in which they are collected.
TESTS: Final = (
    "tests/unit/verifier",
    "tests/unit/test_base64url.py",
    "tests/unit/test_scope.py",
    "tests/unit/test_token_profile.py",
    "tests/unit/test_client_address.py",
    "tests/contract/test_restrictions.py",
)

_LOCKS: Final = "threads, locks and forks: a race that is lost shows in no test that is repeatable"
_ENDS: Final = "closes threads and connections, and decides nothing"
_TOLD: Final = "does what somebody asks of it, waits, and decides nothing"
_NETWORK: Final = "one line of real HTTP; `http` has tests of its own, over sockets"


@dataclass(frozen=True, slots=True)
class Target:
    """One mutated module.

    Attributes:
        name: below `coatcheck`, with dots.
        near: the tests that are asked first.
        left_out: functions and constants that are not mutated, and why.
    """

    name: str
    near: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return f"coatcheck.{self.name}"

    @property
    def path(self) -> Path:
        path = ROOT / "app" / "coatcheck" / self.name.replace(".", "/")
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _near(*names: str) -> tuple[str, ...]:
    """The test files of the verifier whose names begin so."""
    folder = ROOT / "tests" / "unit" / "verifier"
    found = (path for name in names for path in sorted(folder.glob(f"test_{name}*.py")))
    return tuple(str(path.relative_to(ROOT)) for path in found)


def _restrictions() -> list[Target]:
    folder = ROOT / "app" / "coatcheck" / "restrictions"
    names = (path.stem for path in sorted(folder.glob("*.py")))
    near = ("tests/contract/test_restrictions.py", *_near("check"))
    return [
        Target("restrictions" if name == "__init__" else f"restrictions.{name}", near)
        for name in names
    ]


TARGETS: Final = (
    Target("verifier.check", _near("check", "changes", "verifier")),
    Target(
        "verifier.changes",
        _near("changes", "restricted"),
        {
            "Changes._start_thread": _LOCKS,
            "Changes._start_thread_locked": _LOCKS,
            "Changes._let_go_of_thread": _LOCKS,
            "Changes.forget": _TOLD,
            "Changes.catch_up": _TOLD,
            "Changes._after_fork": _LOCKS,
            "Changes._renew_locks": _LOCKS,
            "_follow": _LOCKS,
            "_renew_every": _LOCKS,
            "Changes.close": _ENDS,
            "Changes.is_closed": _ENDS,
        },
    ),
    Target(
        "verifier.keyset",
        _near("keyset", "verifier", "check", "changes"),
        {
            "KeySet._wake_thread": _LOCKS,
            "KeySet.forget": _TOLD,
            "KeySet.renew": _TOLD,
            "KeySet.load": _TOLD,
            "KeySet._wake_thread_locked": _LOCKS,
            "KeySet._renew_locks": _LOCKS,
            "KeySet._after_fork": _LOCKS,
            "_follow": _LOCKS,
            "_renew_every_key_set": _LOCKS,
            "KeySet.close": _ENDS,
        },
    ),
    Target("verifier.memo", _near("verifier")),
    Target("verifier.metrics", _near("outlook")),
    Target("verifier.presented", _near("verifier", "exchange", "restricted")),
    Target("verifier.principal", _near("principal", "verifier", "restricted")),
    Target("verifier.product", _near("restricted")),
    Target(
        "verifier.verifier",
        _near("verifier", "exchange", "changes", "restricted", "outlook"),
        {
            "Verifier.forget": _TOLD,
            "Verifier.renew": _TOLD,
            "Verifier.catch_up": _TOLD,
            "Verifier.warm": _TOLD,
            "Verifier.close": _ENDS,
            "Verifier.__enter__": _ENDS,
            "Verifier.__exit__": _ENDS,
            "_fetch": _NETWORK,
        },
    ),
    *_restrictions(),
    Target("base64url", ("tests/unit/test_base64url.py", *_near("check"))),
    Target("vocabulary", ("tests/unit/test_vocabulary.py",)),
    Target("scope", ("tests/unit/test_scope.py", *_near("scope", "principal"))),
    Target("feed_profile", _near("changes")),
    Target("token_profile", ("tests/unit/test_token_profile.py",)),
    Target("client_address", ("tests/unit/test_client_address.py",)),
)

#: The numbered steps of a token's check.  Each of them has to be found, and its removal noticed.
STEPS: Final = frozenset(("1a", "1b", "1c", *map(str, range(2, 16))))
#: Where they are.  Other functions with numbered steps count their own.
PROCEDURE: Final = ("check.", "verifier.", "changes.check_vouched")
