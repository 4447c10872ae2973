"""The verifier: settings, the key set and the memo around the numbered check, in two faces.

`authenticate` is for threads, `authenticate_async` for an event loop.  Both run the same steps
in place; only the wait for a key set differs, which happens at the first request and when an
unknown signing key turns up.

This module knows nothing of frameworks: the adapters translate.

Source: RFC 6750 §2 and §3 (bearer tokens), RFC 9728 §2 and §3 (resource metadata).
"""

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Final, Literal, Self

from coatcheck import apikey, http
from coatcheck import client_address as addresses
from coatcheck.durations import FEED_WAIT_MAX, FIRST_LOAD_TIMEOUT, LEEWAY, LEEWAY_MAX
from coatcheck.feed_profile import MAX_FEED_BYTES
from coatcheck.restrictions import Situation
from coatcheck.scope import Scopes
from coatcheck.token_profile import ALGORITHMS, MAX_TOKEN_BYTES, TYPES, is_audience
from coatcheck.verifier import changes, check, exchange, keyset, metrics, product
from coatcheck.verifier.errors import (
    ApiKeyMalformed,
    ApiKeyUnknown,
    BadAlgorithm,
    BadSignature,
    InsufficientScope,
    IssuerUnavailable,
    MissingCredentials,
    Protection,
    StaleFeed,
    TokenExpired,
    TokenMalformed,
    TokenRevoked,
    TokensOnly,
    UnknownSigningKey,
    VerifierError,
    WrongAudience,
    WrongIssuer,
    WrongProject,
    WrongType,
    resource_metadata_url,
)
from coatcheck.verifier.memo import Memo, Remembered
from coatcheck.verifier.presented import (
    Headers,
    Presented,
    forwarded_for,
    one_project,
    presented,
    readable_twice,
)
from coatcheck.verifier.principal import Principal, from_claims

#: Makes a named tuple.  Calling its class runs a Python function first.
_made: Final = tuple.__new__

#: About 3 KB each.
REMEMBERED_TOKENS: Final = 10_000

#: Seconds that a request waits for the exchange of its API key.
_LONGEST_EXCHANGE: Final = 2 * FIRST_LOAD_TIMEOUT
#: Why a kept token is exchanged anew instead of being refused.
_ENDED: Final = (TokenRevoked, TokenExpired)

#: What a token that was exchanged a moment ago can only have wrong by the issuer's fault or ours.
_NOT_OF_THE_CALLER: Final = (
    BadAlgorithm,
    BadSignature,
    TokenMalformed,
    UnknownSigningKey,
    WrongAudience,
    WrongIssuer,
    WrongType,
)

#: What a credential in the product's own header, or with a foreign prefix, looks like before the
#: issuer has told of them.
_NOT_RECOGNIZED: Final = (MissingCredentials, TokenMalformed, ApiKeyMalformed)
_NOTHING: Final = Scopes()

_WELL_KNOWN_KEY_SET: Final = "/.well-known/jwks.json"
_WELL_KNOWN_COATCHECK: Final = "/.well-known/coatcheck"


class Verifier:
    """Tells who is calling.  One per process and audience; for threads, event loops and forks.

    A setting that is left out comes from the environment: COATCHECK_ISSUER, COATCHECK_AUDIENCE,
    COATCHECK_ENVIRONMENT, COATCHECK_JWKS_URL, COATCHECK_SERVICE_KEY, COATCHECK_TRUSTED_PROXIES.

    Args:
        issuer: the issuer's URL, exactly as its tokens name it.
        audience: the name of this resource server, or several; the first is told to callers.
        environment: refuse credentials of any other environment; None: do not look.
        jwks_url: where the key set is; default: below the issuer.
        service_key: this resource server's own API key, with the scope coatcheck:resource-server
            and for this audience: raw API keys are then taken like tokens.  Without it, and
            without check_api_key, they are refused.
        check_api_key: for the first days of a migration: your own look-up of a raw API key in
            place of the issuer's.  Returns a Principal, or None for an unknown key; any other
            exception than VerifierError is answered with 503.
        feed: "auto": follow the issuer's revocation feed, so that a revoked token is refused
            within a second; None: follow none, and a token lives until it expires.
        on_stale_feed: what to do when the issuer has not been heard of for 40 seconds: "accept"
            tokens until they expire, or "refuse" them with 503.
        trusted_proxies: networks whose X-Forwarded-For is believed; none: the caller's address is
            the one that `authenticate` is told.
        roles: for each role the HTTP methods that it allows; default: what the issuer's document
            says, which is read only where a feed is followed.  So are the next two.
        api_key_header: a header for credentials beside X-API-Key.
        foreign_prefixes: what API keys of an older system begin with, which have no checksum.
        leeway: seconds by which the clocks may differ, at most 60.
        token_types: accepted `typ` values.  `JWT` is for an audience that the issuer serves with
            plain JWTs; it makes every other JWT of this issuer and audience a token too.
        algorithms: accepted `alg` values; each signing key allows one of them.
        realm: shown in challenges; default: the first audience.
        unsafe_plain_http: fetch the key set over http from another machine.  Whoever is on the
            way can then make tokens.
        trust_env: let HTTPS_PROXY, SSL_CERT_FILE and the like count when fetching.
        clock: seconds since the epoch.
        monotonic: seconds on a clock that never goes back.
        fetch: gets the bytes at a URL, or raises; in place of HTTP.

    Raises:
        ValueError: a setting is missing or unfit; the message says what to set.
    """

    def __init__(
        self,
        issuer: str | None = None,
        audience: str | Sequence[str] | None = None,
        *,
        environment: str | None = None,
        jwks_url: str | None = None,
        service_key: str | None = None,
        check_api_key: Callable[[str], Principal | None] | None = None,
        feed: Literal["auto"] | None = "auto",
        on_stale_feed: Literal["accept", "refuse"] = "accept",
        trusted_proxies: str | Sequence[str] | None = None,
        roles: Mapping[str, Collection[str]] | None = None,
        api_key_header: str | None = None,
        foreign_prefixes: Sequence[str] | None = None,
        leeway: float = LEEWAY,
        token_types: Collection[str] = ("at+jwt",),
        algorithms: Collection[str] = ALGORITHMS,
        realm: str | None = None,
        unsafe_plain_http: bool = False,
        trust_env: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        if feed not in ("auto", None) or on_stale_feed not in ("accept", "refuse"):
            raise ValueError("feed: auto or None; on_stale_feed: accept or refuse")
        if not 0 <= leeway <= LEEWAY_MAX:
            raise ValueError(f"leeway: from 0 to {LEEWAY_MAX} seconds; set the clock instead")
        issuer = _setting(issuer, "issuer", "COATCHECK_ISSUER")
        audiences = _audiences(audience)
        self._expected = check.Expected(
            issuer=issuer,
            audiences=audiences,
            types=frozenset(_some_of("token_types", token_types, TYPES)),
            algorithms=frozenset(_some_of("algorithms", algorithms, ALGORITHMS)),
            leeway_s=leeway,
        )
        self.resource_metadata_url = resource_metadata_url(audiences[0])
        self._protection = Protection(_realm(realm, audiences[0]), self.resource_metadata_url)
        self._environment = environment or os.environ.get("COATCHECK_ENVIRONMENT") or None
        self._anywhere = Situation(environment=self._environment)
        self._trusted_proxies = _networks(trusted_proxies)
        told = {
            "roles": roles,
            "api_key_header": api_key_header,
            "foreign_prefixes": foreign_prefixes,
        }
        settled = product.read({name: part for name, part in told.items() if part is not None})
        self._clock = clock
        self._memo = Memo(REMEMBERED_TOKENS)
        jwks_url = jwks_url or os.environ.get("COATCHECK_JWKS_URL")
        base = issuer.rstrip("/")
        key_set_url = jwks_url or base + _WELL_KNOWN_KEY_SET
        is_over_http = fetch is None
        if fetch is None:
            _require_safe(key_set_url, unsafe_plain_http=unsafe_plain_http)
            if feed is not None:
                _require_safe(base + _WELL_KNOWN_COATCHECK, unsafe_plain_http=unsafe_plain_http)
            fetch = partial(_fetch, unsafe_plain_http=unsafe_plain_http, trust_env=trust_env)
        self._key_set = keyset.KeySet(partial(fetch, key_set_url), monotonic=monotonic)
        self._signing_key_at_hand = self._key_set.known
        service_key = service_key or os.environ.get("COATCHECK_SERVICE_KEY")
        if service_key and check_api_key:
            raise ValueError("service_key, check_api_key: one of them, not both")
        if service_key:
            # The service key and every caller's key go there.
            _require_safe(base, unsafe_plain_http=unsafe_plain_http)
        self._check_api_key = check_api_key
        self._exchange = (
            exchange.Exchange(
                f"{base}/oauth/token",
                f"{base}/token-types/api-key",
                audiences[0],
                service_key,
                monotonic=monotonic,
                trust_env=trust_env,
            )
            if service_key
            else None
        )
        self._refuses_stale = on_stale_feed == "refuse"
        self._changes = (
            None
            if feed is None
            else changes.Changes(
                issuer,
                base + _WELL_KNOWN_COATCHECK,
                fetch,
                clock=clock,
                monotonic=monotonic,
                settled=settled,
            )
        )
        self._told = self._changes or product.Fixed(product.of(**settled))
        if is_over_http:
            _OVER_HTTP[id(self)] = self

    def authenticate(
        self,
        headers: Headers,
        scopes: str | Iterable[str] = (),
        client_address: str | None = None,
        *,
        query: str | bytes = "",
        method: str | None = None,
        model: str | None = None,
    ) -> Principal:
        """Who sent a request with these headers.

        Args:
            headers: a mapping in any letter case, or pairs of str or bytes.  Pairs are better:
                only they show a header that was sent twice.
            scopes: what the request needs, all of it: scope-tokens, or one text with blanks.
            client_address: the address at the other end of the connection, which is the caller's
                unless it is a trusted proxy's; None: unknown.
            query: the query string; a token in it is refused.
            method: the HTTP method; None: unknown, which no role allows.
            model: the model that the request names; None: none, or `Principal.require_model` will
                be asked.

        Raises:
            VerifierError: no, several, or unfit credentials, a missing scope or another
                restriction in the way, or no key set.
            MalformedScope: `scopes` is no scope, which is a mistake in the calling code.
        """
        needed = _needed(scopes)
        try:
            if self._trusted_proxies or not self._told.is_told:
                headers = readable_twice(headers)
            try:
                sent = presented(headers, query, self._told.product)
            except _NOT_RECOGNIZED:
                if self._told.is_told:
                    raise
                self._told.wait_for_product()
                sent = presented(headers, query, self._told.product)
            if self._trusted_proxies:
                client_address = self._behind_proxies(client_address, headers)
            situation = self._situation(client_address, method, sent.project_id, model)
            principal = self._identify(sent, situation)
            return _fitting(principal, needed, sent.project_id, model)
        except VerifierError as error:
            error.protection = self._protection
            raise

    async def authenticate_async(
        self,
        headers: Headers,
        scopes: str | Iterable[str] = (),
        client_address: str | None = None,
        *,
        query: str | bytes = "",
        method: str | None = None,
        model: str | None = None,
    ) -> Principal:
        """As `authenticate`, without blocking the event loop."""
        needed = _needed(scopes)
        try:
            if self._trusted_proxies or not self._told.is_told:
                headers = readable_twice(headers)
            try:
                sent = presented(headers, query, self._told.product)
            except _NOT_RECOGNIZED:
                if self._told.is_told:
                    raise
                await asyncio.to_thread(self._told.wait_for_product)
                sent = presented(headers, query, self._told.product)
            if self._trusted_proxies:
                client_address = self._behind_proxies(client_address, headers)
            situation = self._situation(client_address, method, sent.project_id, model)
            principal = await self._identify_async(sent, situation)
            return _fitting(principal, needed, sent.project_id, model)
        except VerifierError as error:
            error.protection = self._protection
            raise

    def verify_jwt(
        self,
        token: str,
        *,
        client_address: str | None = None,
        method: str | None = None,
        project_id: str | None = None,
        model: str | None = None,
    ) -> Principal:
        """Who an access token speaks for.

        Args:
            client_address: the caller's own address, as it is; None: unknown.
            method, model: as for `authenticate`.
            project_id: the project that the request names; None: it names none.

        Raises:
            VerifierError: as `authenticate`.
        """
        try:
            if project_id is not None:
                one_project(project_id)
            situation = self._situation(client_address, method, project_id, model)
            principal = self._verify(token, situation)
            return _fitting(principal, _NOTHING, project_id, model)
        except VerifierError as error:
            error.protection = self._protection
            raise

    async def verify_jwt_async(
        self,
        token: str,
        *,
        client_address: str | None = None,
        method: str | None = None,
        project_id: str | None = None,
        model: str | None = None,
    ) -> Principal:
        """As `verify_jwt`, without blocking the event loop."""
        try:
            if project_id is not None:
                one_project(project_id)
            situation = self._situation(client_address, method, project_id, model)
            principal = await self._verify_async(token, situation)
            return _fitting(principal, _NOTHING, project_id, model)
        except VerifierError as error:
            error.protection = self._protection
            raise

    def status(self) -> dict[str, object]:
        """How far this verifier can be relied on, for health and status pages; holds no secret.

        All of it supposes that the issuer is not heard of from now on.  Times are seconds since
        the epoch.

        - `safe_until`: every access token is answered rightly until then: taken until its own
          `exp`, and refused afterwards, or for what is known against it.  It is the earlier of
          `key_set.good_until` and, where stale feeds are refused, `feed.fresh_until`.  None: no
          token can be verified as it is.
        - `after`: what happens then, and what `safe_until` does not say.
        - `key_set.good_until`: no signing key counts any more.
        - `feed.fresh_until`: what was revoked before it is known.  Where stale feeds are accepted,
          a token that is revoked meanwhile is taken until its `exp`: this is the weakest link, and
          `safe_until` does not count it, because accepting them is what was asked for.
        - `api_keys`: a raw API key that is remembered goes on until its end, ten minutes after it
          was exchanged at the latest: `first_end` and `last_end` of all `remembered` ones.  Any
          other is refused with 503 at once, so `safe_until` does not speak for raw API keys.
          None: no API key is exchanged here.
        """
        now = self._clock()
        of_set = self._key_set.status()
        of_feed = None if self._changes is None else self._changes.status()
        of_api_keys = None if self._exchange is None else self._exchange.status()
        good_until = _at(now, of_set.good_for_s)
        fresh_until = None if of_feed is None else _at(now, of_feed.fresh_for_s)
        safe_until, after = self._outlook(good_until, fresh_until)
        return {
            "issuer": self._expected.issuer,
            "audiences": list(self._expected.audiences),
            "safe_until": safe_until,
            "after": after,
            "key_set": {
                "state": of_set.state,
                "age_s": of_set.age_s,
                "good_until": good_until,
                "kids": list(of_set.kids),
                "last_error": of_set.last_error,
            },
            "feed": of_feed
            and {
                "state": of_feed.state,
                "age_s": of_feed.age_s,
                "fresh_until": fresh_until,
                "on_stale": "refuse" if self._refuses_stale else "accept",
                "seq": of_feed.seq,
                "entries": of_feed.entries,
                "last_error": of_feed.last_error,
            },
            "api_keys": of_api_keys
            and {
                "remembered": of_api_keys.remembered,
                "first_end": _at(now, of_api_keys.first_end_in_s),
                "last_end": _at(now, of_api_keys.last_end_in_s),
            },
            "roles": sorted(self._told.product.roles),
            "remembered_tokens": len(self._memo),
        }

    def _outlook(self, good_until: int | None, fresh_until: int | None) -> tuple[int | None, str]:
        """`safe_until` and `after` of `status`."""
        if good_until is None:
            return None, "There is no usable key set: every token is refused with 503."
        if self._changes is None:
            return good_until, f"{_TOO_OLD}; no feed is followed, so a revoked one lives on anyway."
        if self._changes.at_hand is None or fresh_until is None:
            return None, "There is no revocation feed yet: every token is refused with 503."
        if not self._refuses_stale:
            return good_until, f"{_TOO_OLD}; from feed.fresh_until on a revoked one lives on."
        if good_until < fresh_until:
            return good_until, f"{_TOO_OLD}."
        return fresh_until, "Every token is refused with 503: it may have been revoked meanwhile."

    def metrics(self, *others: "Verifier") -> str:
        """What `status` says, for Prometheus: in its text exposition format 0.0.4.

        A time that is not known is left out until the issuer was asked for the first time, and is
        0 once it was asked and there is nothing to go on with.

        Args:
            others: verifiers of this process for other audiences, to be told in the same text.
        """
        return metrics.text(verifier.status() for verifier in (self, *others))

    def protected_resource_metadata(self) -> dict[str, object]:
        """The document that `resource_metadata_url` has to serve (RFC 9728 §2).

        It names no scopes: clients that find some ask for all of them.
        """
        return {
            "resource": self._expected.audiences[0],
            "authorization_servers": [self._expected.issuer],
            "bearer_methods_supported": ["header"],
        }

    def warm(self) -> None:
        """Ask the issuer now, so that the first request need not wait for it.

        Raises:
            IssuerUnavailable: it did not answer in time; the first request asks again.
        """
        if self._changes is not None:
            self._changes.wait_for_first()
        self._key_set.load()

    def close(self) -> None:
        """End the background threads.  Also happens when the verifier is let go."""
        self._key_set.close()
        if self._changes is not None:
            self._changes.close()
        if self._exchange is not None:
            self._exchange.close()

    def catch_up(self, seq: int) -> bool:
        """Wait until revocations are known up to here; of the issuer's log.

        Returns:
            Whether they are, or nobody has asked yet, or no feed is followed.
        """
        return self._changes is None or self._changes.catch_up(seq)

    def renew(self) -> None:
        """Fetch the key set now, whatever the cool-down; nothing, where nobody has asked yet."""
        self._key_set.renew()

    def forget(
        self,
        *,
        key_set: bool = True,
        feed: bool = True,
        api_keys: bool = True,
        wait_s: float = 0,
    ) -> None:
        """Know nothing of the issuer, as when it was made: the next request asks it.

        Args:
            key_set, feed, api_keys: of which of them.
            wait_s: how long to wait for each thread that asks it to end.
        """
        if key_set:
            self._key_set.forget(wait_s)
        if feed and self._changes is not None:
            self._changes.forget(wait_s)
        if api_keys and self._exchange is not None:
            self._exchange.forget_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def issuer(self) -> str:
        """The issuer's URL."""
        return self._expected.issuer

    @property
    def protection(self) -> Protection:
        """What challenges of this resource server say, for errors made outside of it."""
        return self._protection

    def _situation(
        self,
        client_address: str | None,
        method: str | None,
        project_id: str | None,
        model: str | None,
    ) -> Situation:
        if client_address is None and method is None and project_id is None and model is None:
            # Without a method it does not matter what roles allow.
            return self._anywhere
        roles = self._told.product.roles
        return _made(
            Situation, (self._environment, client_address, method, project_id, model, roles)
        )

    def _behind_proxies(self, peer: str | None, headers: Headers) -> str | None:
        """The caller's address, where the peer may be a proxy."""
        address = addresses.client_address(peer, forwarded_for(headers), self._trusted_proxies)
        return None if address is None else str(address)

    def _identify(self, sent: Presented, situation: Situation) -> Principal:
        if not sent.is_api_key:
            return self._verify(sent.text, situation)
        if self._check_api_key is not None:
            return self._vouched_for(self._check_api_key, sent.text)
        if self._exchange is None:
            raise TokensOnly
        digest = apikey.digest(sent.text)
        kept = self._exchange.remembered(digest, sent.place, situation.client_address)
        if kept is not None:
            token = kept.require_token()
            try:
                return _by_api_key(self._verify(token, situation))
            except (*_ENDED, *_NOT_OF_THE_CALLER):
                self._exchange.forget(digest, sent.place, kept)
        under_way = self._exchange.begin(digest, sent.place, sent.text, situation.client_address)
        try:
            exchanged = under_way.result(timeout=_LONGEST_EXCHANGE)
        except TimeoutError:
            raise IssuerUnavailable(1) from None
        token = exchanged.require_token()
        try:
            return _by_api_key(self._verify(token, situation))
        except _NOT_OF_THE_CALLER:
            self._exchange.forget(digest, sent.place, exchanged)
            raise IssuerUnavailable(1) from None

    async def _identify_async(self, sent: Presented, situation: Situation) -> Principal:
        if not sent.is_api_key:
            return await self._verify_async(sent.text, situation)
        if self._check_api_key is not None:
            return await asyncio.to_thread(self._vouched_for, self._check_api_key, sent.text)
        if self._exchange is None:
            raise TokensOnly
        digest = apikey.digest(sent.text)
        kept = self._exchange.remembered(digest, sent.place, situation.client_address)
        if kept is not None:
            token = kept.require_token()
            try:
                return _by_api_key(await self._verify_async(token, situation))
            except (*_ENDED, *_NOT_OF_THE_CALLER):
                self._exchange.forget(digest, sent.place, kept)
        under_way = self._exchange.begin(digest, sent.place, sent.text, situation.client_address)
        try:
            async with asyncio.timeout(_LONGEST_EXCHANGE):
                # Shielded: one request that is given up must not end the exchange of all others.
                exchanged = await asyncio.shield(asyncio.wrap_future(under_way))
        except TimeoutError:
            raise IssuerUnavailable(1) from None
        token = exchanged.require_token()
        try:
            return _by_api_key(await self._verify_async(token, situation))
        except _NOT_OF_THE_CALLER:
            self._exchange.forget(digest, sent.place, exchanged)
            raise IssuerUnavailable(1) from None

    def _vouched_for(self, check_api_key: Callable[[str], Principal | None], key: str) -> Principal:
        """What the host's own look-up says of a raw API key."""
        try:
            principal = check_api_key(key)
        except VerifierError:
            raise
        except Exception:
            # Our own trouble is never an answer about the key.  The text may hold the key.
            raise IssuerUnavailable(1) from None
        if principal is None:
            raise ApiKeyUnknown
        return replace(principal, method="api_key", protection=self._protection)

    def _verify(self, token: str, situation: Situation) -> Principal:
        known = None
        if self._changes is not None:
            known = self._changes.at_hand
            if known is None:
                known = self._changes.wait_for_first()
                # The document came with it.
                situation = situation._replace(roles=self._told.product.roles)
        # None that is longer was remembered; looking for it would cost as much as it is long.
        remembered = self._memo.get(token) if len(token) <= MAX_TOKEN_BYTES else None
        principal = remembered and self._again(token, remembered, situation, known)
        if principal is None:
            try:
                return self._accept(token, self._signing_key_at_hand, situation, known)
            except check.NoSigningKey as missing:
                kid = missing.kid
            signing_key = self._look_up(kid, known) or self._key_set.wait_for(kid)
            principal = self._accept(token, {kid: signing_key}.get, situation, known)
        return principal

    async def _verify_async(self, token: str, situation: Situation) -> Principal:
        known = None
        if self._changes is not None:
            known = self._changes.at_hand
            if known is None:
                known = await asyncio.to_thread(self._changes.wait_for_first)
                # The document came with it.
                situation = situation._replace(roles=self._told.product.roles)
        # None that is longer was remembered; looking for it would cost as much as it is long.
        remembered = self._memo.get(token) if len(token) <= MAX_TOKEN_BYTES else None
        principal = remembered and self._again(token, remembered, situation, known)
        if principal is None:
            try:
                return self._accept(token, self._signing_key_at_hand, situation, known)
            except check.NoSigningKey as missing:
                kid = missing.kid
            signing_key = self._look_up(kid, known)
            if signing_key is None:
                signing_key = await asyncio.to_thread(self._key_set.wait_for, kid)
            principal = self._accept(token, {kid: signing_key}.get, situation, known)
        return principal

    def _look_up(self, kid: str, known: changes.Known | None) -> check.SigningKey | None:
        """A signing key that is not at hand; None: a fetch is under way that will tell."""
        is_announced = known is not None and kid in known.kids
        return self._key_set.look_up(kid, is_announced=is_announced)

    def _again(
        self,
        token: str,
        remembered: Remembered,
        situation: Situation,
        known: changes.Known | None,
    ) -> Principal | None:
        """The caller whose very token was verified before, if everything else still holds."""
        signed, principal = remembered
        if self._key_set.known(signed.signing_key.kid) is not signed.signing_key:
            # Withdrawn, or another key under its name, or the key set is too old to count.
            self._memo.drop(token)
            return None
        try:
            check.check_use(signed, self._expected, self._clock(), situation)
            if known is not None:
                if self._refuses_stale:
                    self._require_fresh(known)
                changes.check_vouched(signed, known)
        except (TokenExpired, TokenRevoked):
            self._memo.drop(token)
            raise
        return principal

    def _accept(
        self,
        token: str,
        find: check.FindSigningKey,
        situation: Situation,
        known: changes.Known | None,
    ) -> Principal:
        signed = check.check_signed(token, self._expected, find)
        audience = check.check_use(signed, self._expected, self._clock(), situation)
        if known is not None:
            if self._refuses_stale:
                self._require_fresh(known)
            changes.check_vouched(signed, known)
        principal = from_claims(signed.claims, signed.expires_at, audience, self._protection)
        self._memo.put(token, (signed, principal))
        return principal

    def _require_fresh(self, known: changes.Known) -> None:
        """Where stale feeds are refused, before steps 14 and 15."""
        if self._changes is not None and self._changes.is_stale(known):
            raise StaleFeed


#: Those that ask their issuer over HTTP, for `over_http_of`.
_OVER_HTTP: "weakref.WeakValueDictionary[int, Verifier]" = weakref.WeakValueDictionary()


def over_http_of(issuer: str) -> list[Verifier]:
    """The verifiers of this process that ask this issuer: an issuer of tests has to reach them."""
    # The references are copied in one step: another thread may make a verifier meanwhile.
    alive = (reference() for reference in _OVER_HTTP.valuerefs())
    return [verifier for verifier in alive if verifier is not None and verifier.issuer == issuer]


# What is told of it.

_TOO_OLD: Final = "Every token is refused with 503, because the key set is too old"


def _at(now: float, in_s: float | None) -> int | None:
    return None if in_s is None else int(now + in_s)


def _by_api_key(principal: Principal) -> Principal:
    return replace(principal, method="api_key")


def _needed(scopes: str | Iterable[str]) -> Scopes:
    return Scopes.parse(scopes) if isinstance(scopes, str) else Scopes.of(scopes)


def _fitting(
    principal: Principal, needed: Scopes, project_id: str | None, model: str | None
) -> Principal:
    """The principal for the request at hand: its project, model and scopes.

    Restrictions that stand in `must` were enforced by the check; what is looked at here also
    holds for tokens of other issuers, and for what the host's own look-up vouches for.
    """
    if project_id is not None and principal.project_id != project_id:
        if principal.project_id is not None:
            raise WrongProject
        # Remembered for all requests with the same token, so this request gets one of its own.
        principal = replace(principal, project_id=project_id)
    if model is not None:
        principal.require_model(model)
    if needed.grants and principal.scopes.missing(needed):
        raise InsufficientScope(str(needed))
    return principal


# Settings.


def _setting(given: str | None, name: str, variable: str) -> str:
    value = given or os.environ.get(variable)
    if not value:
        raise ValueError(f"{name} is missing: pass it to Verifier or set {variable}")
    if not is_audience(value):
        raise ValueError(f"{name}: printable ASCII without blanks, quotes, backslashes and #")
    return value


def _audiences(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None or isinstance(given, str):
        return (_setting(given, "audience", "COATCHECK_AUDIENCE"),)
    audiences = tuple(given)
    if not audiences or not all(isinstance(name, str) and is_audience(name) for name in audiences):
        # An empty list is no way to say that any audience will do.
        raise ValueError("audience: one text or several, each without blanks, quotes and #")
    return audiences


def _some_of(name: str, given: Collection[str], known: Sequence[str]) -> list[str]:
    if isinstance(given, str) or not given or not set(given) <= set(known):
        raise ValueError(f"{name}: one or more of {', '.join(known)}, as a tuple")
    return [text.lower() if name == "token_types" else text for text in given]


def _networks(given: str | Sequence[str] | None) -> tuple[addresses.Network, ...]:
    if given is None:
        given = os.environ.get("COATCHECK_TRUSTED_PROXIES", "")
    texts = given.replace(",", " ").split() if isinstance(given, str) else given
    try:
        return tuple(map(addresses.parse_network, texts))
    except (AttributeError, ValueError):
        raise ValueError(
            "trusted_proxies: networks such as 10.0.0.0/8, as a tuple or separated by commas in"
            " COATCHECK_TRUSTED_PROXIES; an address in them ends where its prefix does"
        ) from None


def _realm(given: str | None, default: str) -> str:
    realm = default if given is None else given
    if not realm.isascii() or not realm.isprintable() or '"' in realm or "\\" in realm:
        raise ValueError("realm: printable ASCII without quotes and backslashes")
    return realm


def _require_safe(url: str, *, unsafe_plain_http: bool) -> None:
    try:
        http.require_safe(url, unsafe_plain_http=unsafe_plain_http)
    except ValueError as error:
        raise ValueError(f"jwks_url (or issuer): {error}") from None


def _fetch(url: str, *, unsafe_plain_http: bool, trust_env: bool) -> bytes:
    """One GET, bounded for the largest document and the longest poll that there is."""
    return http.fetch(
        http.require_safe(url, unsafe_plain_http=unsafe_plain_http),
        max_bytes=MAX_FEED_BYTES,
        timeout_s=FEED_WAIT_MAX + FIRST_LOAD_TIMEOUT,
        trust_env=trust_env,
    )
