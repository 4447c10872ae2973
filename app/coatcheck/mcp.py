"""`from coatcheck.mcp import CoatcheckTokenVerifier, allow_api_key_query`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.mcp import (
    CoatcheckTokenVerifier,
    VerifiedToken,
    allow_api_key_query,
    get_principal,
)

__all__ = [
    "CoatcheckTokenVerifier",
    "Principal",
    "VerifiedToken",
    "allow_api_key_query",
    "get_principal",
]
