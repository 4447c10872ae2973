"""`from coatcheck.flask import Coatcheck, current_principal`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.flask import Coatcheck, current_principal, problem

__all__ = ["Coatcheck", "Principal", "current_principal", "problem"]
