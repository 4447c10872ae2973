"""What comes out the same each time is worked out once per process of tests.

A pytest plugin.  A service does these things once in its life; the tests of one process start
thousands of services.
"""

from functools import cache
from typing import Any, Final

import pytest
import typer.main
import typer.testing
from cryptography.hazmat.primitives import serialization
from sqlalchemy import Dialect, Engine, create_engine

from coatcheck.server.store import hot, sqlite

_patches: Final = pytest.MonkeyPatch()
_compile: Final = hot.compiled_for

_compiled: Final[dict[tuple[str, ...], hot.HotSql]] = {}
_engines: Final[list[Engine]] = []


def pytest_configure() -> None:
    # Whether the parts of an RSA key are primes takes longer than all the rest of a start.
    load = cache(serialization.load_der_private_key)
    _patches.setattr(serialization, "load_der_private_key", load)
    # The tree of all commands, made anew for each one that is run.
    get_command = cache(typer.main.get_command)
    _patches.setattr(typer.main, "get_command", get_command)
    _patches.setattr(typer.testing, "_get_command", get_command)
    _patches.setattr(hot, "compiled_for", _compiled_for)
    _patches.setattr(sqlite, "create_engine", _engine_like_the_first)


def pytest_unconfigure() -> None:
    _patches.undo()


def _compiled_for(dialect: Dialect) -> hot.HotSql:
    named = (dialect.name, dialect.driver, dialect.paramstyle)
    if named not in _compiled:
        _compiled[named] = _compile(dialect)
    return _compiled[named]


def _engine_like_the_first(url: str, **options: Any) -> Engine:
    """It has its own connections; the text of statements it shares with all others."""
    engine = create_engine(url, **options)
    if _engines:
        engine.dialect = engine.pool._dialect = _engines[0].dialect
        engine._compiled_cache = _engines[0]._compiled_cache
    else:
        _engines.append(engine)
    return engine
