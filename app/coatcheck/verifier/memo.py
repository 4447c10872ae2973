"""Tokens that were verified before, by digest, so that a signature is checked only once.

Only successes are remembered, so that nobody can fill it without the issuer's help.  There is no
lock: each step is one operation on a dictionary, and a race that is lost costs one remembered
token.
"""

import contextlib
from typing import NamedTuple

from coatcheck.verifier.changes import Vouched
from coatcheck.verifier.check import SignedClaims
from coatcheck.verifier.principal import Principal


class Remembered(NamedTuple):
    """A token that passed every step once.  The steps that depend on the moment come again."""

    signed: SignedClaims
    principal: Principal
    vouched: Vouched | None


class Memo:
    """At most `size` remembered tokens, at least one; the oldest gives way."""

    def __init__(self, size: int) -> None:
        self._size = max(size, 1)
        self._by_digest: dict[bytes, Remembered] = {}
        self.get = self._by_digest.get

    def __len__(self) -> int:
        return len(self._by_digest)

    def put(self, digest: bytes, remembered: Remembered) -> None:
        while len(self._by_digest) >= self._size:
            # Another thread may have changed the dictionary between the two steps.
            with contextlib.suppress(RuntimeError, StopIteration):
                self.drop(next(iter(self._by_digest)))
        self._by_digest[digest] = remembered

    def drop(self, digest: bytes) -> None:
        self._by_digest.pop(digest, None)
