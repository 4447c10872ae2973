"""`from coatcheck.httpx2 import TokenAuth`: the short import."""

from coatcheck.caller import CallerError, TokenSource
from coatcheck.caller.for_httpx2 import TokenAuth

__all__ = ["CallerError", "TokenAuth", "TokenSource"]
