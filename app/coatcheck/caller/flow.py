"""How httpx and httpx2 are told to send the token: two libraries, one flow.

The client follows redirects within one step of the flow and takes the Authorization header off
when one leads to another origin, so a redirect goes on without the token.
"""

from collections.abc import AsyncGenerator, Generator, Mapping, MutableMapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from coatcheck.caller import bearer


class Request(Protocol):
    """A request of either library."""

    url: Any
    stream: Any

    @property
    def headers(self) -> MutableMapping[str, str]: ...


class Response(Protocol):
    """An answer of either library."""

    status_code: int

    @property
    def request(self) -> Any: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    def read(self) -> bytes: ...
    async def aread(self) -> bytes: ...


Asked = TypeVar("Asked", bound=Request)
Answered = TypeVar("Answered", bound=Response)


class Flow(bearer.Bearer, Generic[Asked, Answered]):
    """The flow.  One object serves any number of clients, of both kinds."""

    #: What the library makes of a body that it holds as a whole.
    _whole: ClassVar[type]

    def sync_auth_flow(self, request: Asked) -> Generator[Asked, Answered, None]:
        """Send the request, and once more if that may help.  Called by the client."""
        self.reach.require(str(request.url))
        sent = self.source.token()
        request.headers["Authorization"] = bearer.header(sent)
        response = yield request
        if not self._is_for_us(response):
            return
        body = response.read() if _may_tell_by_body(response) else b""
        if _is_refusal(response, body) and self._may_try_again(sent, request, response):
            token = self.source.token()
            if token != sent:
                request.headers["Authorization"] = bearer.header(token)
                yield request

    async def async_auth_flow(self, request: Asked) -> AsyncGenerator[Asked, Answered]:
        """As `sync_auth_flow`."""
        self.reach.require(str(request.url))
        sent = await self.source.token_async()
        request.headers["Authorization"] = bearer.header(sent)
        response = yield request
        if not self._is_for_us(response):
            return
        body = await response.aread() if _may_tell_by_body(response) else b""
        if _is_refusal(response, body) and self._may_try_again(sent, request, response):
            token = await self.source.token_async()
            if token != sent:
                request.headers["Authorization"] = bearer.header(token)
                yield request

    def _is_for_us(self, response: Answered) -> bool:
        """Whether what answers is who got the token; a redirect may have led away."""
        return self.reach.lets(str(response.request.url))

    def _may_try_again(self, sent: str, request: Asked, response: Answered) -> bool:
        # After a redirect the first request was done: a second one would do it twice.
        is_repeatable = response.request is request and isinstance(request.stream, self._whole)
        return self.source.after_refusal(sent) and is_repeatable


def _may_tell_by_body(response: Response) -> bool:
    return bearer.may_tell_by_body(response.status_code, response.headers)


def _is_refusal(response: Response, body: bytes) -> bool:
    if bearer.says_invalid_token(response.status_code, response.headers):
        return True
    return bool(body) and bearer.tells_by_body(body)
