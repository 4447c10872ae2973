"""`from coatcheck.aiohttp import coatcheck_middleware, require_scopes`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.aiohttp import coatcheck_middleware, require_scopes

__all__ = ["Principal", "coatcheck_middleware", "require_scopes"]
