"""Tokens that were verified before, so that a signature is checked only once.

Only successes are remembered, so that nobody can fill it without the issuer's help.  A token's
text is its key: a digest of it would cost more than all that is still checked.  There is no lock:
each step is one operation on a dictionary, and a race that is lost costs one remembered token.
"""

import contextlib
from collections import OrderedDict

from coatcheck.verifier.check import SignedClaims
from coatcheck.verifier.principal import Principal

#: A token that passed every step once.  The steps that depend on the moment come again.
Remembered = tuple[SignedClaims, Principal]


class Memo:
    """At most `size` remembered tokens, at least one; the oldest gives way."""

    def __init__(self, size: int) -> None:
        self._size = max(size, 1)
        self._by_token: OrderedDict[str, Remembered] = OrderedDict()
        self.get = self._by_token.get

    def __len__(self) -> int:
        return len(self._by_token)

    def put(self, token: str, remembered: Remembered) -> None:
        self._by_token[token] = remembered
        while len(self._by_token) > self._size:
            # Another thread may have taken the last one between the two steps.
            with contextlib.suppress(KeyError):
                self._by_token.popitem(last=False)

    def drop(self, token: str) -> None:
        self._by_token.pop(token, None)
