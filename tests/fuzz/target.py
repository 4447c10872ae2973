"""What is fuzzed, for how long, and what must never come of it.

FUZZ_SECONDS is for all parts together.  Each part goes in rounds, and each round has a seed: the
one in FUZZ_SEED, the next one, and so on.  To see a failure again, set FUZZ_SEED to the seed of
its round and FUZZ_SECONDS to 0, which leaves one round.
"""

import base64
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from coatcheck.scope import RESOURCE_SERVER
from support.live import Live, a_service
from support.wire import exchange, of_length

PARTS: Final = 3
SECONDS: Final = float(os.environ.get("FUZZ_SECONDS") or 16)
SEED: Final = int(os.environ.get("FUZZ_SEED") or random.randrange(10**9))  # noqa: S311

#: What a trace looks like, or a path of the code, in an answer or in a log.
TRACE: Final = re.compile(rb"Traceback|File \"|site-packages|/coatcheck/|\.py[\"\s:]")
#: What the service logs when something went wrong on its side.
TROUBLE: Final = re.compile(rb"Traceback|File \"|Exception in ASGI|\b500: |Fatal error")
#: Characters of a secret that are looked for: enough to be no chance, few enough to find a part.
_A_PART: Final = 20


@dataclass
class Tally:
    """What a part did, for the end of the run."""

    rounds: int = 0
    examples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        told = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return f"{self.examples} examples in {self.rounds} rounds from seed {SEED}: {told}"


def fuzz(
    tally: Tally,
    strategy: SearchStrategy[Any],
    look_at: Callable[[Any], None],
    *,
    examples: int,
    after_each_round: Callable[[], None] = lambda: None,
    share: float = 1 / PARTS,
) -> None:
    """Look at examples, round by round, until the time is over.

    Args:
        look_at: takes one example; raises AssertionError if it does harm.
        share: of FUZZ_SECONDS.
    """
    ends_at = time.monotonic() + SECONDS * share
    number = 0
    while number == 0 or time.monotonic() < ends_at:
        round_seed = SEED + number

        def look(example: Any) -> None:
            tally.examples += 1
            try:
                look_at(example)
            except Exception as failure:
                failure.add_note(f"Of: {example!r}")
                raise

        once = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        try:
            seed(round_seed)(once(given(strategy)(look)))()
            after_each_round()
        except BaseException as failure:
            failure.add_note(f"Again: FUZZ_SECONDS=0 FUZZ_SEED={round_seed}")
            raise
        tally.rounds += 1
        number += 1


# --- a running service


@dataclass
class Target:
    """A service that bears any number of guesses, and secrets of which nothing may come back.

    Attributes:
        api_key: of an ordinary caller, as the command line made it.
        resource_server: likewise, of a resource server.
        token: an access token of `api_key`.
    """

    live: Live
    api_key: dict[str, str]
    resource_server: dict[str, str]
    token: str
    _read_up_to: int = 0
    _memory: int = 0

    @property
    def secrets(self) -> dict[bytes, bytes]:
        """What a plan calls each secret → the secret."""
        return {
            b"<KEY>": self.api_key["key"].encode(),
            b"<ID>": self.api_key["id"].encode(),
            b"<SERVICE>": self.resource_server["key"].encode(),
            b"<TOKEN>": self.token.encode(),
            b"<ISSUER>": self.live.issuer.encode(),
        }

    def filled(self, text: bytes) -> bytes:
        """The text with secrets in place of their names."""
        for name, value in self.secrets.items():
            text = text.replace(name, value)
        return text

    @property
    def process_folder(self) -> Path:
        return Path(f"/proc/{self.live.process.pid}")

    def require_no_secret(self, where: str, data: bytes) -> None:
        """Raise if any part of a secret is there, plainly or encoded."""
        for part in self.parts_of_secrets:
            assert part not in data, f"a secret in {where}"

    @property
    def parts_of_secrets(self) -> Iterator[bytes]:
        for made in (self.api_key, self.resource_server):
            # The middle of it: a mask shows the ends.
            text = made["key"].encode()[-_A_PART - 6 : -6]
            yield text
            yield text.hex().encode()
            for offset in range(3):
                # Base64 of the whole, wherever it begins in what is encoded.
                yield base64.b64encode(b"x" * offset + text)[4:-4]

    def require_health(self) -> None:
        """Raise unless the service goes on as before: answers, log, arguments, memory."""
        assert self.live.process.poll() is None, "the service has ended"
        body = self.filled(b"grant_type=client_credentials&client_secret=<KEY>")
        assert exchange(self.live, of_length(body)).statuses == (200,)
        log = self._rest_of_log()
        assert not TROUBLE.search(log), log.decode("utf-8", "replace")[-4000:]
        self.require_no_secret("the log", log)
        assert b"eyJ" not in log, "a token in the log"
        if self.process_folder.exists():
            self.require_no_secret("the arguments", (self.process_folder / "cmdline").read_bytes())
            self._require_bounded_memory()

    def _rest_of_log(self) -> bytes:
        with (self.live.folder / "serve.log").open("rb") as log:
            log.seek(self._read_up_to)
            rest = log.read()
        self._read_up_to += len(rest)
        return rest

    def _require_bounded_memory(self) -> None:
        status = (self.process_folder / "status").read_text("ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        self._memory = self._memory or int(found[1])
        assert int(found[1]) - self._memory < 64 * 1024, "64 MiB more than at the start"
        connections = list((self.process_folder / "fd").iterdir())
        assert len(connections) < 500, "connections are not closed"


@contextmanager
def a_target(folder: Path) -> Iterator[Target]:
    """A service of its own: so many wrong secrets would throttle the tests of others."""
    with a_service(folder, guesses_per_minute="0") as live:
        api_key = live.api_key("widgets:read", "a@P/Site/#")
        resource_server = live.api_key(RESOURCE_SERVER)
        body = f"grant_type=client_credentials&client_secret={api_key['key']}".encode()
        token = exchange(live, of_length(body)).json()["access_token"]
        yield Target(live, api_key, resource_server, token)
