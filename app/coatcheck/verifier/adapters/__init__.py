"""One file per framework, each a thin translation of `Verifier.authenticate`.

A framework is no dependency of the verifier: its adapter imports it, and nothing imports the
adapter but who uses it.  The contract tests run over this tuple.
"""

from typing import Final

ADAPTERS: Final = (
    "coatcheck.verifier.adapters.asgi",
    "coatcheck.verifier.adapters.wsgi",
    "coatcheck.verifier.adapters.starlette",
    "coatcheck.verifier.adapters.flask",
    "coatcheck.verifier.adapters.django",
    "coatcheck.verifier.adapters.drf",
    "coatcheck.verifier.adapters.authlib",
    "coatcheck.verifier.adapters.fastapi",
    "coatcheck.verifier.adapters.aiohttp",
)

#: They stand at single routes, and leave all others open.
PER_ROUTE: Final[tuple[str, ...]] = (
    "coatcheck.verifier.adapters.fastapi",
    "coatcheck.verifier.adapters.drf",
    "coatcheck.verifier.adapters.authlib",
)
