"""`from coatcheck.httpx import TokenAuth`: the short import."""

from coatcheck.caller import CallerError, TokenSource
from coatcheck.caller.for_httpx import TokenAuth

__all__ = ["CallerError", "TokenAuth", "TokenSource"]
