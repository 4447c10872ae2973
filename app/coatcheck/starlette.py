"""`from coatcheck.starlette import CoatcheckMiddleware, require_scopes`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.starlette import CoatcheckMiddleware, problem, require_scopes

__all__ = ["CoatcheckMiddleware", "Principal", "problem", "require_scopes"]
