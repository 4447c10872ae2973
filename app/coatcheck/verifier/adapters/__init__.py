"""One file per framework, each a thin translation of `Verifier.authenticate`.

A framework is no dependency of the verifier: its adapter imports it, and nothing imports the
adapter but who uses it.  The contract tests run over this tuple.
"""

from typing import Final

ADAPTERS: Final = ("coatcheck.verifier.adapters.starlette",)
