"""`from coatcheck.asgi import CoatcheckASGI, allow_api_key_query`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.asgi import CoatcheckASGI, allow_api_key_query

__all__ = ["CoatcheckASGI", "Principal", "allow_api_key_query"]
