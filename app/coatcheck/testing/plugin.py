"""The pytest plugin: `coatcheck_issuer`, `coatcheck_token` and `coatcheck_api_key`.

It is loaded wherever this package is installed, so it loads nothing before a test asks for it.
"""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from coatcheck.testing.issuer import FakeIssuer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Settings of the issuer.  Without them it is the one that your API is configured with."""
    parser.addini("coatcheck_issuer", "issuer of the test tokens (default: COATCHECK_ISSUER)")
    parser.addini("coatcheck_audience", "audience of the test tokens (default: COATCHECK_AUDIENCE)")


@pytest.fixture(scope="session")
def coatcheck_session_issuer(pytestconfig: pytest.Config) -> "FakeIssuer":
    """The issuer of the whole session, for tokens and API keys that outlive a test.

    It is installed for each test that uses `coatcheck_issuer`, and for no other.
    """
    from coatcheck.testing.issuer import AUDIENCE, ISSUER, FakeIssuer  # noqa: PLC0415

    def setting(name: str, default: str) -> str:
        told: str = pytestconfig.getini(name)
        return told or os.environ.get(name.upper()) or default

    return FakeIssuer(
        setting("coatcheck_issuer", ISSUER),
        audience=setting("coatcheck_audience", AUDIENCE),
        environment=os.environ.get("COATCHECK_ENVIRONMENT") or "live",
        jwks_url=os.environ.get("COATCHECK_JWKS_URL") or None,
    )


@pytest.fixture
def coatcheck_issuer(coatcheck_session_issuer: "FakeIssuer") -> "Iterator[FakeIssuer]":
    """An issuer that answers every verifier of this process instead of the network.

    Nothing is revoked when a test begins, and nobody is away.
    """
    coatcheck_session_issuer.reset()
    with coatcheck_session_issuer as issuer:
        yield issuer


@pytest.fixture
def coatcheck_token(coatcheck_issuer: "FakeIssuer") -> Callable[..., str]:
    """Makes access tokens: `coatcheck_token(scopes=["widgets:read"])`; see `FakeIssuer.token`."""
    return coatcheck_issuer.token


@pytest.fixture
def coatcheck_api_key(coatcheck_issuer: "FakeIssuer") -> Callable[..., str]:
    """Makes raw API keys; see `FakeIssuer.api_key`."""
    return coatcheck_issuer.api_key
