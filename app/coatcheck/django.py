"""`from coatcheck.django import require_scopes, well_known`: the short import.

MIDDLEWARE names `coatcheck.django.CoatcheckMiddleware`.
"""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.django import (
    CoatcheckMiddleware,
    problem,
    require_scopes,
    well_known,
)

__all__ = ["CoatcheckMiddleware", "Principal", "problem", "require_scopes", "well_known"]
