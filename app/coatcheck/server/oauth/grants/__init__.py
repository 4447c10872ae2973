"""The grants of the token endpoint.  One file each; this tuple is the whole list."""

from typing import Any, Final

from coatcheck.server.oauth.grants.client_credentials import ClientCredentials
from coatcheck.server.oauth.grants.token_exchange import TokenExchange

GRANTS: Final[tuple[Any, ...]] = (ClientCredentials, TokenExchange)
