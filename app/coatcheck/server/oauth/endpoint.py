"""The token endpoint, and what it shares with introspection and revocation.

Raw ASGI, dispatched before Starlette's router: the router and its Request would cost a third of
a whole token request.  The steps, in order:

1. The request is read (`wire.read`).
2. What it presents is looked up: one query.
3. The endpoint answers (`bridge`, then `server.issue`).
4. A wrong secret is counted; too many of them get 429 instead.
5. The answer is sent; a token is counted after that.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coatcheck import apikey, client_address
from coatcheck.client_address import Network
from coatcheck.restrictions import Reason, Refusal
from coatcheck.server.oauth.bridge import Bridge, BridgeRequest
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.wire import (
    FormRequest,
    Mechanism,
    Receive,
    Reply,
    Scope,
    Send,
    read,
)
from coatcheck.server.signing import NoSigner
from coatcheck.server.store import Found, Store, StoreUnavailable
from coatcheck.server.throttle import Throttle, by_address
from coatcheck.server.usage import Usage

_log = logging.getLogger(__name__)

#: Nothing was presented that could be looked up.
_NOTHING = Found(0, {})


@dataclass(frozen=True, slots=True)
class Desk:
    """What the endpoints work with."""

    bridge: Bridge
    store: Store
    throttle: Throttle
    usage: Usage
    clock: Callable[[], float]
    trusted_proxies: Sequence[Network]


class FormEndpoint:
    """Steps 1, 2 and 4 of every endpoint that an API key authenticates."""

    #: Whether a refused credential is always 401 with a challenge; else only when it came in
    #: the Authorization header.
    always_challenge = False

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = await self.reply(scope, receive)
        await reply.send(send)

    async def reply(self, scope: Scope, receive: Receive) -> Reply:
        """The answer to one request, whatever happens."""
        mechanism = Mechanism.NONE
        try:
            # 1
            request = await read(
                scope,
                receive,
                trusted_proxies=self.desk.trusted_proxies,
                now=int(self.desk.clock()),
            )
            mechanism = request.credential.mechanism
            # 2
            presented = self.presented(request)
            found = await self.desk.store.find(presented) if presented else _NOTHING
            # 3
            try:
                return await self.answer(request, found)
            except Refusal as refusal:
                # 4
                self._look_at(refusal, request, found)
                return self._refused(refusal, mechanism)
        except OAuthError as error:
            return self._refused(error, mechanism)
        except (StoreUnavailable, NoSigner) as error:
            _log.error("503 at %s: %s", scope["path"], error)
            return self._refused(OAuthError.unavailable(), mechanism)

    def presented(self, request: FormRequest) -> tuple[bytes, ...]:
        """The digest of every secret that a request presents, MOST_SECRETS at most."""
        digest = request.credential.digest
        return () if digest is None else (digest,)

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        """Step 3.  Raises Refusal, OAuthError, NoSigner or StoreUnavailable."""
        raise NotImplementedError

    def _look_at(self, refusal: Refusal, request: FormRequest, found: Found) -> None:
        """Count a guess, and log what happened to an API key that exists.

        Raises:
            OAuthError: the address guessed too often.
        """
        digest = request.credential.digest
        record = None if digest is None else found.records.get(digest)
        if record is not None:
            _log.info("refused %s: %s from %s", record.id, refusal.reason.value, request.address)
        elif refusal.reason is Reason.API_KEY_UNKNOWN:
            retry_after_s = self.desk.throttle.retry_after(by_address(request.address))
            if retry_after_s is not None:
                # A resource server has to tell its own refusal from its caller's.
                is_exchange = "subject_token" in request.form
                code = "client_rate_limited" if is_exchange else "rate_limited"
                raise OAuthError.throttled(retry_after_s, code)

    def _refused(self, error: OAuthError | Refusal, mechanism: Mechanism) -> Reply:
        return self.desk.bridge.refused(error, mechanism, always_challenge=self.always_challenge)


class TokenEndpoint(FormEndpoint):
    """POST /oauth/token.  Source: RFC 6749 §3.2."""

    def presented(self, request: FormRequest) -> tuple[bytes, ...]:
        digests = super().presented(request)
        subject = request.form.get("subject_token")
        return digests if subject is None else (*digests, apikey.digest(subject))

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        bridged = BridgeRequest(request, found)
        reply: Reply = self.desk.bridge.create_token_response(bridged)
        if bridged.issued is not None:
            # 5: in memory only, so that counting before sending delays nobody.
            self.desk.usage.count(
                bridged.issued.api_key_id, request.now, is_raw_key_use=bridged.is_raw_key_use
            )
        elif "subject_token" in request.form and bridged.client is not None:
            self._count_subject(bridged)
        return reply

    def _count_subject(self, bridged: BridgeRequest) -> None:
        """Step 4 for a guess that was made at a resource server: its own account, per address."""
        form = bridged.http.form
        assert bridged.client is not None  # noqa: S101 - asked by the only caller
        if apikey.digest(form["subject_token"]) in bridged.found.records:
            return
        address = client_address.parse(form.get("client_address", ""))
        bucket = f"{bridged.client.id} {by_address(address)}"
        retry_after_s = self.desk.throttle.retry_after(bucket)
        if retry_after_s is not None:
            raise OAuthError.throttled(retry_after_s)
