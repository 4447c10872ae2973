"""`from coatcheck.fastapi import Coatcheck, Principal, allow_api_key_query`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.asgi import allow_api_key_query
from coatcheck.verifier.adapters.fastapi import Coatcheck

__all__ = ["Coatcheck", "Principal", "allow_api_key_query"]
