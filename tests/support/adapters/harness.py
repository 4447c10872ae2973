"""How the tests ask an application behind an adapter, whatever its framework.

Each adapter has a module of its last name here, with

- `application(verifier)`: the application that the contract asks for, as its framework's users
  would write it;
- `asking(app)`: a context manager that gives an Ask for any application of that framework.

The application of the contract:

    GET, POST /whoami     a credential                 {"key_id": …, "method": "jwt" or "api_key"}
    GET /widgets          the scope widgets:read       {"key_id": …}
    GET /places/{id}      principal.require("read", resource=f"PLACE/{id}")   {}
    GET /project          principal.require_project()  {"project": …}
    GET /health           nothing                      {}

It takes connector keys in the URL.  The connection comes from 127.0.0.1.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol

from coatcheck.verifier import Verifier
from coatcheck.verifier.adapters import ADAPTERS

PEER: Final = "127.0.0.1"

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """What came back.  `headers` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Ask(Protocol):
    """Send a request.  `path` holds the query, too."""

    def __call__(self, method: str, path: str, headers: Headers = ()) -> Answer: ...


class Harness(Protocol):
    """What a module beside this one has."""

    application: Callable[[Verifier], Any]
    asking: Callable[[Any], AbstractContextManager[Ask]]


def harness_of(adapter: str) -> Harness:
    """The harness of an adapter, by the name of its module."""
    module: Any = import_module(f"support.adapters.{adapter.rpartition('.')[2]}")
    harness: Harness = module
    return harness


def last_names() -> list[str]:
    return [adapter.rpartition(".")[2] for adapter in ADAPTERS]
