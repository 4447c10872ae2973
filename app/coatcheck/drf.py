"""`from coatcheck.drf import require_scopes`: the short import.

Settings name `coatcheck.drf.CoatcheckAuthentication` and `coatcheck.drf.exception_handler`.
"""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.drf import (
    CoatcheckAuthentication,
    HasScopes,
    exception_handler,
    require_scopes,
)

__all__ = [
    "CoatcheckAuthentication",
    "HasScopes",
    "Principal",
    "exception_handler",
    "require_scopes",
]
