"""An issuer that counts and answers as told, an API that refuses what has expired, a set clock."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coatcheck.caller.answer import Answer

ISSUER = "https://auth.example.com"
LIFETIME = 600
WAIT = 10


@dataclass(slots=True)
class Clock:
    """Stands still until it is set."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def success(token: str, expires_in: object = LIFETIME, **changes: object) -> Answer:
    told = {"access_token": token, "token_type": "Bearer", "expires_in": expires_in, **changes}
    return Answer(200, json.dumps(told).encode())


def problem(
    error: str,
    sentence: object = "A sentence.",
    *,
    code: str | None = None,
    status: int = 400,
    retry_after: str | None = None,
) -> Answer:
    told = {"error": error, "error_description": sentence, "code": code or error}
    return Answer(status, json.dumps(told).encode(), retry_after)


@dataclass
class FakeIssuer:
    """What `TokenSource` sends its forms to.

    Attributes:
        forms: what was asked.
        answer: makes the answer to one of them; it may raise.
        gate: answers wait until it is open.
        asked: a form has come in.
    """

    clock: Clock = field(default_factory=Clock)
    forms: list[Mapping[str, str]] = field(default_factory=list)
    answer: Callable[[], Answer] | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    ends: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(self, url: str, form: Mapping[str, str]) -> Answer:
        assert url == f"{ISSUER}/oauth/token"
        began_at = self.clock()
        self.forms.append(form)
        self.asked.set()
        assert self.gate.wait(WAIT)
        if self.answer is not None:
            return self.answer()
        token = f"token-{len(self.forms)}"
        self.ends[token] = began_at + LIFETIME
        return success(token)

    def tells(self, answer: Answer | Exception) -> None:
        """From now on this is the answer."""

        def told() -> Answer:
            if isinstance(answer, Exception):
                raise answer
            return answer

        self.answer = told

    def status_of(self, token: str) -> int:
        """What an API says to a token."""
        return 200 if self.clock() < self.ends.get(token, 0.0) else 401


def eventually(is_so: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + WAIT
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)
