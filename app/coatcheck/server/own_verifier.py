"""Our own verifier in process: who sent a credential to this service, and what it is good for.

    presented → (raw key: recognized, and a token made) → numbered checks → change log → caller

A raw API key becomes the very token that its holder would get at the token endpoint, and from
there on there is one path.  What the revocation feed tells verifiers elsewhere is asked of the
change log itself, so that a change holds from the next request on.

What was verified is remembered with the position of the log up to which that is known to hold.
While the log stands there, a signature is neither made nor checked again; when it has moved on,
what came after that position decides.

This module knows nothing of HTTP.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeVar

from coatcheck import apikey, client_address
from coatcheck.restrictions import Reason, Refusal, Situation
from coatcheck.server.alarms import Alarms
from coatcheck.server.catalog import Catalog
from coatcheck.server.issue.exchange import CONNECTOR, Asked, Issuer
from coatcheck.server.issue.inspect import OwnToken, OwnTokens
from coatcheck.server.issue.mint import Issued
from coatcheck.server.store import ApiKeyRecord, Found, Store
from coatcheck.server.throttle import Throttle, by_address
from coatcheck.server.usage import Usage
from coatcheck.verifier import errors, product
from coatcheck.verifier.errors import VerifierError
from coatcheck.verifier.presented import Presented
from coatcheck.verifier.product import Product

#: Callers that are remembered of each kind; about 3 KiB each.
_MOST_REMEMBERED: Final = 10_000
#: Seconds before its end at which a remembered token of a raw key gives way to a new one.
_RENEW_BEFORE: Final = 30

#: The issuer's reason → what the caller is told.
_REFUSED: Final[Mapping[Reason, type[VerifierError]]] = {
    Reason.API_KEY_UNKNOWN: errors.ApiKeyUnknown,
    Reason.API_KEY_REVOKED: errors.ApiKeyRevoked,
    Reason.API_KEY_EXPIRED: errors.ApiKeyExpired,
    Reason.API_KEY_REPLACED: errors.ApiKeyExpired,
    Reason.API_KEY_DISABLED: errors.ApiKeyDisabled,
    Reason.PROJECT_ARCHIVED: errors.ApiKeyDisabled,
    Reason.QUOTA_EXCEEDED: errors.QuotaExceeded,
    Reason.ORG_SUSPENDED: errors.OrgSuspended,
    Reason.IP_NOT_ALLOWED: errors.IpNotAllowed,
    Reason.ONLY_IN_QUERY: errors.ConnectorOnlyInQuery,
    Reason.NOT_IN_QUERY: errors.ConnectorOnlyInQuery,
    Reason.NO_PERMISSION_THERE: errors.WrongAudience,
    Reason.INVALID_TARGET: errors.WrongAudience,
    Reason.NOT_ENFORCED_THERE: errors.WrongAudience,
    Reason.WRONG_ENVIRONMENT: errors.WrongEnvironment,
}

_At = TypeVar("_At")
_What = TypeVar("_What")


def product_of(catalog: Catalog) -> Product:
    """What the catalog says that somebody needs to read a request."""
    return product.of(
        {name: offer.role.methods for name, offer in catalog.roles.items()},
        catalog.api_key_header and catalog.api_key_header.lower(),
        catalog.foreign_prefixes,
    )


class Verified(NamedTuple):
    """Who sent a credential.  Made by `OwnVerifier` only.

    Attributes:
        token: the access token that was sent, or that the raw API key stands for.
        method: which kind of credential came.
    """

    own: OwnToken
    token: str
    method: Literal["jwt", "api_key"]

    def __repr__(self) -> str:
        return f"Verified({self.own.api_key_id}, {self.method})"


class _Seen(NamedTuple):
    """A token that was verified, and up to where the log is known not to have ended it."""

    own: OwnToken
    as_of: int


class _Kept(NamedTuple):
    """The token of a raw API key, good for as long as the record and the log are the same."""

    caller: Verified
    record: ApiKeyRecord
    as_of: int
    good_until: int


class OwnVerifier:
    """Verifies credentials in place of one resource server.

    Args:
        audience: an audience of the catalog.
        environment: refuse credentials of any other environment; None: do not look.
        leeway_s: how far the clocks of our nodes may be apart.
    """

    def __init__(
        self,
        audience: str,
        store: Store,
        issuer: Issuer,
        own_tokens: OwnTokens,
        *,
        throttle: Throttle,
        usage: Usage,
        alarms: Alarms,
        environment: str | None = None,
        leeway_s: int = 0,
    ) -> None:
        self._audience = audience
        self._environment = environment
        self._store = store
        self._issuer = issuer
        offered = issuer.catalog.audiences[audience]
        self._tokens = own_tokens.used_at(offered, leeway_s=leeway_s)
        self._is_management = audience == issuer.catalog.management_audience
        self._throttle = throttle
        self._usage = usage
        self._alarms = alarms
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    async def verified(self, sent: Presented, situation: Situation, now: int) -> Verified:
        """Who sent this, for the request at hand.

        Args:
            now: seconds since the epoch.

        Raises:
            VerifierError: the credential is good for nothing, or not for this request.
            StoreUnavailable, NoSigner: nothing can be vouched for now.
        """
        known = self.verified_now(sent, situation, now)
        if known is not None:
            return known
        if sent.is_api_key:
            digest = apikey.digest(sent.text)
            return self._of_api_key(sent, digest, await self._store.find([digest]), situation, now)
        # Before the log is asked: what comes in between is looked at the next time.
        head = self._store.head()
        own = self._tokens.verified(sent.text, head, now, situation)
        if await self._store.narrowed_since(own.subjects, own.as_of):
            raise errors.TokenRevoked
        _remember(self._seen, sent.text, _Seen(own, head))
        return Verified(own, sent.text, "jwt")

    def verified_now(self, sent: Presented, situation: Situation, now: int) -> Verified | None:
        """As `verified`.

        Returns:
            None if something has to be waited for; nothing has happened then.
        """
        if sent.is_api_key:
            digest = apikey.digest(sent.text)
            found = self._store.find_now([digest])
            return found and self._of_api_key(sent, digest, found, situation, now)
        seen = self._seen.get(sent.text)
        # Whoever looks up nothing learns how far the log is known.
        found = None if seen is None else self._store.find_now(())
        if seen is None or found is None:
            return None
        is_good = self._tokens.is_good_again(seen.own, found.as_of, now, situation)
        if not is_good or found.as_of < seen.as_of:
            del self._seen[sent.text]
            return None
        if seen.as_of != found.as_of:
            self._require_untouched(seen)
            self._seen[sent.text] = _Seen(seen.own, found.as_of)
        return Verified(seen.own, sent.text, "jwt")

    def _require_untouched(self, seen: _Seen) -> None:
        """Do nothing, if nothing that came since has ended the token.  Raises TokenRevoked."""
        subjects = set(seen.own.subjects)
        since = self._store.narrowings(seen.as_of, 0)
        if any(narrowing.subject in subjects for narrowing in since):
            raise errors.TokenRevoked

    def _of_api_key(
        self, sent: Presented, digest: bytes, found: Found, situation: Situation, now: int
    ) -> Verified:
        address = situation.client_address
        try:
            record = self._issuer.recognize(found, digest, None, now)
            self._require_fit(record, sent)
            kept = self._kept_for(record, found, address, now)
            issued = None if kept else self._issued(record, found, address, now)
        except Refusal as refusal:
            self._look_at(found, digest, refusal, address, now)
            raise _REFUSED.get(refusal.reason, errors.ApiKeyUnknown) from None
        is_replaced = record.secret_expires_at is not None
        self._usage.count(
            record.id,
            now,
            is_raw_key_use=True,
            replaced_digest=record.digest if is_replaced else None,
        )
        if kept and self._tokens.is_good_again(kept.own, found.as_of, now, situation):
            return kept
        issued = issued or self._issued(record, found, address, now)
        token = issued.token.decode("ascii")
        # The log cannot have ended it: it says itself how far the log had been read.
        own = self._tokens.verified(token, found.as_of, now, situation)
        caller = Verified(own, token, "api_key")
        good_until = now + issued.expires_in_s - _RENEW_BEFORE
        _remember(self._kept, digest, _Kept(caller, record, found.as_of, good_until))
        return caller

    def _issued(self, record: ApiKeyRecord, found: Found, address: str | None, now: int) -> Issued:
        """Raises as `Issuer.issue`."""
        asked = Asked((self._audience,), None, address)
        return self._issuer.issue(record, asked, now=now, as_of=found.as_of)

    def _kept_for(
        self, record: ApiKeyRecord, found: Found, address: str | None, now: int
    ) -> Verified | None:
        """The caller that was made of this very record before, if it may come from there."""
        kept = self._kept.get(record.digest)
        if kept is None or kept.record is not record or kept.as_of != found.as_of:
            return None
        if now >= kept.good_until:
            return None
        is_allowed = record.networks is None or client_address.is_in(address, record.networks)
        return kept.caller if is_allowed else None

    def _require_fit(self, record: ApiKeyRecord, sent: Presented) -> None:
        """Raises Refusal, if an API key of this kind is not taken here."""
        if self._is_management:
            if record.kind == CONNECTOR:
                raise Refusal(Reason.ONLY_IN_QUERY)
            return
        self._issuer.require_callers(record, sent.place)
        if self._environment not in (None, record.environment):
            raise Refusal(Reason.WRONG_ENVIRONMENT)

    def _look_at(
        self, found: Found, digest: bytes, refusal: Refusal, address: str | None, now: int
    ) -> None:
        """Count a guess, and tell the owner of a right secret that came from the wrong place.

        Raises:
            RateLimited: the address guessed too often.
        """
        record, place = found.records.get(digest), client_address.parse(address or "")
        if record is None:
            retry_after_s = self._throttle.retry_after(by_address(place))
            if retry_after_s is not None:
                raise errors.RateLimited(retry_after_s)
        elif refusal.reason is Reason.IP_NOT_ALLOWED:
            self._alarms.wrong_address(record.id, record.organization_id, place, now)


def _remember(remembered: OrderedDict[_At, _What], at: _At, what: _What) -> None:
    remembered[at] = what
    if len(remembered) > _MOST_REMEMBERED:
        remembered.popitem(last=False)
