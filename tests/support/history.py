"""What clients saw of a service that is being killed, and whether all of it can be true.

A `History` knows of each request what its client knows: when it was sent, when it was answered
and what.  It never looks into the service, its log or its database.  Given what the service says
of credentials now, it tells what contradicts what the service has said before.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

#: What a request is about, and its subject: the id of an API key, the `jti` of a token.
ISSUE: Final = "issue"  # an API key's token
REVOKE: Final = "revoke"  # a token or an API key

_DONE: Final = 200


class Verdict(Enum):
    """What must be true of a credential."""

    ACCEPTED = "nobody asked to revoke it"
    REFUSED = "its revocation was acknowledged"
    EITHER = "its revocation was asked for, and no answer came"


@dataclass(slots=True, eq=False)
class Asked:
    """One request.  Moments are seconds on a clock that never goes back."""

    what: str
    subject: str
    sent_at: float
    answered_at: float | None = None
    status: int | None = None

    def answer(self, status: int) -> None:
        self.answered_at, self.status = time.monotonic(), status

    @property
    def is_done(self) -> bool:
        return self.status == _DONE


class _Look(NamedTuple):
    """What the service said of a credential, and how often its revocation was asked for by then."""

    is_refused: bool
    asked: int


class History:
    """Every request of every client, of any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: defaultdict[tuple[str, str], list[Asked]] = defaultdict(list)
        self._api_key_of: dict[str, str] = {}
        self._last_look: dict[str, _Look] = {}

    @contextmanager
    def asking(self, what: str, subject: str) -> Iterator[Asked]:
        """A request that is sent in this block; whoever gets its answer writes it down.

        It is in the history before it is sent, whatever becomes of it.
        """
        asked = Asked(what, subject, time.monotonic())
        with self._lock:
            self._asked[what, subject].append(asked)
        yield asked

    def issued(self, jti: str, api_key_id: str) -> None:
        """A token came: from now on its API key's end is its own."""
        self._api_key_of[jti] = api_key_id

    def asked(self, what: str, *subjects: str) -> list[Asked]:
        """The requests of one kind, about these subjects; about all, if none is named."""
        with self._lock:
            chosen = subjects or [subject for kind, subject in self._asked if kind == what]
            return [asked for subject in chosen for asked in self._asked.get((what, subject), ())]

    def verdict(self, subject: str) -> Verdict:
        asked = self._revocations(subject)
        if any(one.is_done for one in asked):
            return Verdict.REFUSED
        return Verdict.EITHER if asked else Verdict.ACCEPTED

    def contradictions(self, refused: Mapping[str, bool]) -> list[str]:
        """What cannot be true of what the service says now, in sentences.

        1. An acknowledged revocation holds.
        2. What nobody asked to revoke is not revoked.
        3. What was refused once stays refused.
        4. A revocation whose answer never came has happened by the time the service is back, or
           never will: nothing dies later that nobody has asked to revoke since.

        No revocation of any of them may be under way.

        Args:
            refused: by subject, whether the service refuses it; none that has expired.
        """
        wrong = []
        for subject, is_refused in refused.items():
            verdict = self.verdict(subject)
            look = _Look(is_refused, len(self._revocations(subject)))
            before = self._last_look.get(subject, look)
            self._last_look[subject] = look
            # 1
            if verdict is Verdict.REFUSED and not is_refused:
                wrong.append(f"{subject} is accepted, but {verdict.value}")
            # 2
            if verdict is Verdict.ACCEPTED and is_refused:
                wrong.append(f"{subject} is refused, but {verdict.value}")
            # 3
            if before.is_refused and not is_refused:
                wrong.append(f"{subject} is accepted, but was refused before")
            # 4
            if is_refused and not before.is_refused and look.asked == before.asked:
                wrong.append(f"{subject} is refused, but was not when the service came back")
        return wrong

    def _revocations(self, subject: str) -> list[Asked]:
        """Of the credential itself, and of the API key that it hangs on."""
        wider = self._api_key_of.get(subject)
        return self.asked(REVOKE, subject, *([] if wider is None else [wider]))
