"""`from coatcheck.wsgi import CoatcheckWSGI, allow_api_key_query`: the short import."""

from coatcheck.verifier import Principal
from coatcheck.verifier.adapters.wsgi import CoatcheckWSGI, allow_api_key_query

__all__ = ["CoatcheckWSGI", "Principal", "allow_api_key_query"]
