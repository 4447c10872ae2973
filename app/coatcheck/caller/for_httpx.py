"""`TokenAuth` for httpx, `Client` and `AsyncClient` alike."""

import httpx

from coatcheck.caller.flow import Flow


class TokenAuth(Flow[httpx.Request, httpx.Response], httpx.Auth):
    """Sends a token with each request: `httpx.Client(auth=TokenAuth(issuer))`."""

    _whole = httpx.ByteStream
