"""`from coatcheck.authlib import CoatcheckBearerValidator`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.authlib import CoatcheckBearerValidator, CoatcheckProtector

__all__ = ["CoatcheckBearerValidator", "CoatcheckProtector", "Principal"]
