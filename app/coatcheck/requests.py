"""`from coatcheck.requests import TokenAuth`: the short import."""

from coatcheck.caller import CallerError, TokenSource
from coatcheck.caller.for_requests import TokenAuth

__all__ = ["CallerError", "TokenAuth", "TokenSource"]
