"""What comes out the same each time is worked out once per process of tests.

A pytest plugin.  A service does these things once in its life; the tests of one process start
thousands of services.
"""

from functools import cache
from typing import Final

import pytest
from cryptography.hazmat.primitives import serialization
from sqlalchemy import Dialect

from coatcheck.server.store import hot

_patches: Final = pytest.MonkeyPatch()
_compile: Final = hot.compiled_for


def pytest_configure() -> None:
    # Whether the parts of an RSA key are primes takes longer than all the rest of a start.
    load = cache(serialization.load_der_private_key)
    _patches.setattr(serialization, "load_der_private_key", load)
    _patches.setattr(hot, "compiled_for", _compiled_for)


def pytest_unconfigure() -> None:
    _patches.undo()


def _compiled_for(dialect: Dialect) -> hot.HotSql:
    named = (dialect.name, dialect.driver, dialect.paramstyle)
    if named not in _compiled:
        _compiled[named] = _compile(dialect)
    return _compiled[named]


_compiled: Final[dict[tuple[str, ...], hot.HotSql]] = {}
