"""For whoever tests an API that takes tokens and API keys: an issuer in the process of the test.

    from coatcheck.testing import FakeIssuer

    with FakeIssuer("https://auth.example.com", audience="https://api.example.com") as issuer:
        token = issuer.token(scopes=["widgets:read"])

With pytest nothing has to be imported: the fixtures `coatcheck_token`, `coatcheck_api_key` and
`coatcheck_issuer` are there.  It needs the base install only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coatcheck.testing.issuer import FakeIssuer
    from coatcheck.testing.refusals import REFUSALS, Refused

__all__ = ["REFUSALS", "FakeIssuer", "Refused"]

_HOMES = {
    "FakeIssuer": "coatcheck.testing.issuer",
    "REFUSALS": "coatcheck.testing.refusals",
    "Refused": "coatcheck.testing.refusals",
}


def __getattr__(name: str) -> Any:
    # Loaded when it is used: pytest loads the plugin of this package wherever it is installed.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
