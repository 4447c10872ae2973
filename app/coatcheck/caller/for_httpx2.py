"""`TokenAuth` for httpx2, `Client` and `AsyncClient` alike."""

import httpx2

from coatcheck.caller.flow import Flow


class TokenAuth(Flow[httpx2.Request, httpx2.Response], httpx2.Auth):
    """Sends a token with each request: `httpx2.Client(auth=TokenAuth(issuer))`."""

    _whole = httpx2.ByteStream
