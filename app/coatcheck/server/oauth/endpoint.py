"""The token endpoint, and what it shares with introspection and revocation.

Raw ASGI, dispatched before Starlette's router: the router and its Request would cost a third of
a whole token request.  The steps, in order:

1. The request is read (`wire.read`).
2. What it presents is looked up: one query.
3. The endpoint answers (`bridge`, then `server.issue`).
4. A wrong secret is counted; too many of them get 429 instead.
5. The answer is sent; a token is counted after that.

If too many requests are under way already, a request for a token or an introspection is refused
between 1 and 2, before anybody looks into its body.  A revocation never is.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coatcheck import apikey, client_address
from coatcheck.client_address import Network
from coatcheck.restrictions import Reason, Refusal
from coatcheck.server import metrics
from coatcheck.server.alarms import Alarms
from coatcheck.server.inflight import ARRIVED_AT, InFlight
from coatcheck.server.metrics import Metrics
from coatcheck.server.oauth.bridge import Bridge, BridgeRequest
from coatcheck.server.oauth.errors import OAuthError
from coatcheck.server.oauth.wire import (
    FormRequest,
    Mechanism,
    Receive,
    Reply,
    Scope,
    read,
    read_body,
    read_head,
)
from coatcheck.server.signing import NoSigner
from coatcheck.server.store import Found, Store, StoreUnavailable
from coatcheck.server.throttle import Throttle, by_address
from coatcheck.server.usage import Usage

_log = logging.getLogger(__name__)

#: Nothing was presented that could be looked up.
_NOTHING = Found(0, {})
#: What ends a request with an answer of its own; everything else is 500.
_EXPECTED = (Refusal, OAuthError, StoreUnavailable, NoSigner)
#: OAuth errors that only somebody hears whose API key was good.
_AUTHENTICATED = frozenset({"invalid_scope", "invalid_target", "unauthorized_client"})
#: What is told of an API key beside `invalid_client`: its address guessed too often or is not
#: allowed, it or what it belongs to is stopped, or it may not be used like this.
_OF_THE_API_KEY = frozenset(
    {
        *("rate_limited", "client_rate_limited", "org_suspended", "quota_exceeded"),
        *("ip_not_allowed", "api_key_disabled", "connector_only_in_query"),
    }
)
#: From this status on it is our own trouble.
_OURS = 500


@dataclass(frozen=True, slots=True)
class Desk:
    """What the endpoints work with."""

    bridge: Bridge
    store: Store
    throttle: Throttle
    usage: Usage
    alarms: Alarms
    clock: Callable[[], float]
    trusted_proxies: Sequence[Network]
    metrics: Metrics
    in_flight: InFlight


class FormEndpoint:
    """Steps 1, 2 and 4 of every endpoint that an API key authenticates."""

    #: What the metrics call it.
    name: str
    #: Whether it may refuse to answer when too many requests are under way.
    may_be_shed = False
    #: Whether a refused credential is always 401 with a challenge; else only when it came in
    #: the Authorization header.
    always_challenge = False

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        refusal = desk.bridge.refused(OAuthError.overloaded(), Mechanism.NONE)
        #: Made once: it is given when there is no time.
        self._overloaded: Reply = refusal

    async def reply(self, scope: Scope, receive: Receive) -> Reply:
        """The answer to one request, whatever happens."""
        request, found = None, _NOTHING
        try:
            # 1
            headers = read_head(scope)
            body = await read_body(receive)
            scope.setdefault(ARRIVED_AT, time.perf_counter())
            if self.may_be_shed and self.desk.in_flight.is_full:
                return self.shed()
            with self.desk.in_flight:
                request = self.request(scope, headers, body)
                # 2
                if presented := self.presented(request):
                    found = await self.desk.store.find(presented)
                # 3
                reply = await self.answer(request, found)
        except _EXPECTED as error:
            reply = self.refused(error, scope, request, found)
        self.count(reply, request, scope)
        return reply

    def shed(self) -> Reply:
        """The answer to a request for which there is no room."""
        self.desk.metrics.count(metrics.REQUESTS_SHED, self.name)
        return self._overloaded

    def count(self, reply: Reply, request: FormRequest | None, scope: Scope) -> None:
        """Count the look at an API key.

        Args:
            request: None if it could not even be read: nobody looked at anything then.
        """
        if request is None:
            return
        method, error, code = request.credential.mechanism.label, reply.error, reply.code
        if error == "invalid_client" or code in _OF_THE_API_KEY:
            self.desk.metrics.count(metrics.CREDENTIAL_CHECKS, method, "refused", code)
        elif not error or error in _AUTHENTICATED:
            self.desk.metrics.count(metrics.CREDENTIAL_CHECKS, method, "accepted", "")

    def request(self, scope: Scope, headers: Mapping[bytes, bytes], body: bytes) -> FormRequest:
        """Step 1, of a request that has arrived.  Raises OAuthError."""
        return read(
            scope,
            headers,
            body,
            trusted_proxies=self.desk.trusted_proxies,
            now=int(self.desk.clock()),
        )

    def presented(self, request: FormRequest) -> tuple[bytes, ...]:
        """The digest of every secret that a request presents, MOST_SECRETS at most."""
        digest = request.credential.digest
        return () if digest is None else (digest,)

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        """Step 3.  Raises Refusal, OAuthError, NoSigner or StoreUnavailable."""
        raise NotImplementedError

    def refused(
        self, error: Exception, scope: Scope, request: FormRequest | None, found: Found
    ) -> Reply:
        """Step 4, and the answer to a request that failed.

        Args:
            error: one of those that `answer` raises.
            request: None if it could not even be read.
        """
        mechanism = Mechanism.NONE if request is None else request.credential.mechanism
        if isinstance(error, Refusal) and request is not None:
            # 4
            error = self._look_at(error, request, found)
        elif isinstance(error, (StoreUnavailable, NoSigner)):
            _log.error("503 at %s: %s", self.name, error)
            error = OAuthError.unavailable()
        assert isinstance(error, (OAuthError, Refusal))  # noqa: S101 - the other two are gone
        return self.desk.bridge.refused(error, mechanism, always_challenge=self.always_challenge)

    def _look_at(
        self, refusal: Refusal, request: FormRequest, found: Found
    ) -> OAuthError | Refusal:
        """Count a guess, and log what happened to an API key that exists; alarm its owner.

        Returns:
            What is told: the refusal, unless the address guessed too often.
        """
        digest = request.credential.digest
        record = None if digest is None else found.records.get(digest)
        if record is not None:
            _log.info("refused %s: %s from %s", record.id, refusal.reason.value, request.address)
            if refusal.reason is Reason.IP_NOT_ALLOWED:
                self.desk.alarms.wrong_address(
                    record.id, record.organization_id, request.address, request.now
                )
        elif refusal.reason is Reason.API_KEY_UNKNOWN:
            retry_after_s = self.desk.throttle.retry_after(by_address(request.address))
            if retry_after_s is not None:
                # A resource server has to tell its own refusal from its caller's.
                is_exchange = "subject_token" in request.form
                code = "client_rate_limited" if is_exchange else "rate_limited"
                return OAuthError.throttled(retry_after_s, code)
        return refusal


class TokenEndpoint(FormEndpoint):
    """POST /oauth/token.  Source: RFC 6749 §3.2."""

    name = "token"
    may_be_shed = True

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self._issued = desk.metrics.issued

    def presented(self, request: FormRequest) -> tuple[bytes, ...]:
        digests = super().presented(request)
        subject = request.form.get("subject_token")
        return digests if subject is None else (*digests, apikey.digest(subject))

    def reply_now(self, scope: Scope, body: bytes) -> Reply | None:
        """As `reply`, for a request that has arrived as a whole.

        Returns:
            None if something has to be waited for; nothing has happened then.
        """
        request, found = None, _NOTHING
        try:
            request = self.request(scope, read_head(scope), body)
            if presented := self.presented(request):
                known = self.desk.store.find_now(presented)
                if known is None:
                    return None
                found = known
            reply = self.answer_now(request, found)
        except _EXPECTED as error:
            reply = self.refused(error, scope, request, found)
        self.count(reply, request, scope)
        return reply

    def count(self, reply: Reply, request: FormRequest | None, scope: Scope) -> None:
        now = time.perf_counter()
        seconds = now - scope.get(ARRIVED_AT, now)
        if request is not None and not reply.error:
            # Whoever got a token had a good API key: the metrics know.
            self._issued[request.credential.mechanism.label].append(seconds)
            return
        mechanism = Mechanism.NONE if request is None else request.credential.mechanism
        failed = reply.status >= _OURS
        self.desk.metrics.token(mechanism.label, reply.error, seconds, failed=failed)
        if request is not None:
            self._count_refused(reply, request, scope)

    def _count_refused(self, reply: Reply, request: FormRequest, scope: Scope) -> None:
        code = reply.code
        if "subject_token" not in request.form:
            super().count(reply, request, scope)
        elif code == "rate_limited" or reply.error == "invalid_request":
            # RFC 8693 §2.2.2: the subject is refused where the code says so, else the request.
            if code.startswith("api_key_") or code in _OF_THE_API_KEY:
                self.desk.metrics.count(metrics.CREDENTIAL_CHECKS, "exchange", "refused", code)
        else:
            super().count(reply, request, scope)

    async def answer(self, request: FormRequest, found: Found) -> Reply:
        return self.answer_now(request, found)

    def answer_now(self, request: FormRequest, found: Found) -> Reply:
        """Step 3, which waits for nothing.  Raises as `answer`."""
        bridged = BridgeRequest(request, found)
        reply: Reply = self.desk.bridge.create_token_response(bridged)
        if bridged.issued is not None:
            # 5: in memory only, so that counting before sending delays nobody.
            self.desk.usage.count(
                bridged.issued.api_key_id,
                request.now,
                is_raw_key_use=bridged.is_raw_key_use,
                replaced_digest=_replaced_digest(found, bridged.issued.api_key_id),
            )
            if bridged.is_raw_key_use:
                self.desk.metrics.count(metrics.CREDENTIAL_CHECKS, "exchange", "accepted", "")
        elif "subject_token" in request.form and bridged.client is not None:
            self._look_at_subject(bridged, reply)
        return reply

    def _look_at_subject(self, bridged: BridgeRequest, reply: Reply) -> None:
        """Step 4 for a guess that was made at a resource server: its own account, per address."""
        form = bridged.http.form
        assert bridged.client is not None  # noqa: S101 - asked by the only caller
        address = client_address.parse(form.get("client_address", ""))
        record = bridged.found.records.get(apikey.digest(form["subject_token"]))
        if record is not None:
            if reply.code == Reason.IP_NOT_ALLOWED.value:
                self.desk.alarms.wrong_address(
                    record.id, record.organization_id, address, bridged.http.now
                )
            return
        bucket = f"{bridged.client.id} {by_address(address)}"
        retry_after_s = self.desk.throttle.retry_after(bucket)
        if retry_after_s is not None:
            raise OAuthError.throttled(retry_after_s)


def _replaced_digest(found: Found, api_key_id: str) -> bytes | None:
    """The secret that this API key was presented by, if a rotation has replaced it."""
    for digest, record in found.records.items():
        if record.secret_expires_at is not None and record.id == api_key_id:
            return digest
    return None
