"""The exchange: one API key in, one token out.  The whole use case, in order.

1. The secret is recognized, the API key is alive (`decide.recognize`).
2. The asked audience is one this deployment knows, and its use is not paid from a credit that is
   used up.
3. Every restriction narrows what the API key has to what was asked (`decide.decide`).
4. The claims are checked against the token profile (`token_profile.check`).
5. The token gets its moment, its name and its place in the change log (`CheckedTerms.at`).
6. The ring's signer for that audience signs (`mint.mint`).

Steps 2 to 4 depend on nothing but the record, the ask and the settings, so their outcome is
remembered for as long as the record is the same one.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from coatcheck import apikey, token_profile
from coatcheck.restrictions import Ask, Reason, Refusal
from coatcheck.restrictions.claims import claims_of, must_of
from coatcheck.scope import MalformedScope, Scopes
from coatcheck.server.catalog import Audience, Catalog
from coatcheck.server.issue import decide
from coatcheck.server.issue.mint import Issued, mint
from coatcheck.server.signing import RingKeeper
from coatcheck.server.store import ApiKeyRecord, Found
from coatcheck.token_profile import CheckedTerms

#: The kind of an API key that stands in a URL.
CONNECTOR: Final = "connector"
#: Outcomes of steps 2 to 4 that each process remembers; about 1 KiB each.
_MOST_TERMS: Final = 32_768


class Asked(NamedTuple):
    """What a request asked for, as text; absent means the default.

    Attributes:
        audiences: every `resource` and `audience` that was sent.
        scope: the scope parameter.
        client_address: who asks, or for whom a resource server asks; None: unknown.
    """

    audiences: tuple[str, ...] = ()
    scope: str | None = None
    client_address: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """An API key that somebody else was sent and hands in (RFC 8693).

    Attributes:
        secret: the text that was sent as an API key.
        presented_in: where its caller had put it, `header` or `query`.
    """

    secret: str = field(repr=False)
    presented_in: str = "header"


class _Terms(NamedTuple):
    """What an API key gets for one ask, whenever it asks.

    Attributes:
        record: what they were settled for; another record of the same secret voids them.
        scope: the asked set as it was written, or all the API key has for the audience.
    """

    record: ApiKeyRecord
    audience: Audience
    claims: CheckedTerms
    scope: bytes


@dataclass(frozen=True, slots=True)
class Issuer:
    """Everything a token of this deployment is made from, but the request."""

    url: str
    catalog: Catalog
    ring: RingKeeper
    token_lifetime_s: int
    _remembered: OrderedDict[tuple[bytes, Asked], _Terms] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    #: Step 1.
    recognize = staticmethod(decide.recognize)

    def issue(self, record: ApiKeyRecord, asked: Asked, *, now: int, as_of: int) -> Issued:
        """Steps 2 to 6.

        Args:
            record: from `recognize`.
            now: seconds since the epoch, taken before the record was read; becomes `iat`.
            as_of: the head of the change log, read before the record was.

        Raises:
            Refusal: why no token is issued.
            NoSigner: no signing key may sign for this audience.
            StoreUnavailable: the ring could not be read.
        """
        if record.networks is None and asked.client_address is not None:
            # The outcome is the same from everywhere, and is remembered as one.
            asked = asked._replace(client_address=None)
        # 2 to 4
        terms = self._remembered.get((record.digest, asked))
        if terms is None or terms.record is not record:
            terms = self._remember(self._settle(record, asked), asked)
        # 5
        claims = terms.claims.at(now, as_of=as_of, token_id=os.urandom(16))
        # 6
        signer = self.ring.at(as_of).signer(terms.audience.algorithm, now)
        return mint(
            claims, signer, terms.audience.token_type, scope=terms.scope, api_key_id=record.id
        )

    def issue_for(
        self,
        resource_server: ApiKeyRecord,
        subject: Subject,
        found: Found,
        asked: Asked,
        *,
        now: int,
    ) -> Issued:
        """The token that the owner of a presented API key would have got, for a resource server.

        1. The subject is recognized as anywhere.
        2. It is a caller's, and came where such a one may stand.
        3. Both belong to one environment, and the audience is the resource server's own, which
           the management API is of none.

        Raises:
            As `issue`.
        """
        # 1
        record = self.recognize(found, apikey.digest(subject.secret), None, now)
        # 2
        self.require_callers(record, subject.presented_in)
        # 3
        if record.environment != resource_server.environment:
            raise Refusal(Reason.WRONG_ENVIRONMENT, allowed=record.audiences)
        audience = self._audience_id(record, asked)
        management = self.catalog.management_audience
        if audience not in resource_server.audiences or audience == management:
            raise Refusal(Reason.INVALID_TARGET, allowed=resource_server.audiences)
        return self.issue(record, asked, now=now, as_of=found.as_of)

    def require_callers(self, record: ApiKeyRecord, presented_in: str) -> None:
        """Do nothing, if this API key may be sent to a resource server, and in this place.

        1. It is a caller's: an API key of the platform, or for management only, calls no API.
        2. A connector key was in a URL, and no other was.

        Args:
            presented_in: where its caller had put it, `header` or `query`.

        Raises:
            Refusal: the first rule that is broken.
        """
        # 1
        is_for_management_only = set(record.audiences) == {self.catalog.management_audience}
        if record.scopes.has_platform_permission or is_for_management_only:
            raise Refusal(Reason.NOT_A_CALLER)
        # 2
        is_connector, is_in_query = record.kind == CONNECTOR, presented_in == "query"
        if is_connector != is_in_query:
            raise Refusal(Reason.ONLY_IN_QUERY if is_connector else Reason.NOT_IN_QUERY)

    def _settle(self, record: ApiKeyRecord, asked: Asked) -> _Terms:
        # 2
        audience = self.catalog.audiences.get(self._audience_id(record, asked))
        if audience is None:
            raise Refusal(Reason.INVALID_TARGET, allowed=record.audiences)
        if record.organization_spent_at is not None and self._costs(record, audience):
            raise Refusal(Reason.QUOTA_EXCEEDED, at=record.organization_spent_at)
        # 3
        ask = Ask(
            audience.id,
            audience.environment,
            _scopes(asked.scope),
            self.catalog.vocabulary(audience.id),
            asked.client_address,
        )
        allowance = decide.decide(record, ask, self.catalog.role(record.role))
        must = must_of(allowance)
        if must and not audience.enforces:
            raise Refusal(Reason.NOT_ENFORCED_THERE, allowed=must)
        # 4
        claims = token_profile.check(
            claims_of(self.url, allowance),
            lifetime_s=self.token_lifetime_s,
            ends_at=allowance.expires_at,
        )
        scope = _as_asked(asked.scope) or str(allowance.scopes)
        return _Terms(record, audience, claims, scope.encode("ascii"))

    def _costs(self, record: ApiKeyRecord, audience: Audience) -> bool:
        """Whether use is paid from the organization's credit.

        Management is not: whoever has used everything up still has to see it, and to revoke.
        """
        is_management = audience.id == self.catalog.management_audience
        return not is_management and not self.catalog.is_free(record.environment)

    def _remember(self, terms: _Terms, asked: Asked) -> _Terms:
        self._remembered[(terms.record.digest, asked)] = terms
        if len(self._remembered) > _MOST_TERMS:
            self._remembered.popitem(last=False)
        return terms

    def _audience_id(self, record: ApiKeyRecord, asked: Asked) -> str:
        wanted = set(asked.audiences)
        if len(wanted) > 1:
            raise Refusal(Reason.SEVERAL_TARGETS)
        default = self.catalog.default_audiences.get(record.environment, "")
        return wanted.pop() if wanted else default


def _as_asked(scope: str | None) -> str | None:
    """The asked set in the asker's own spelling: some clients raise when it comes back changed."""
    return scope and " ".join(dict.fromkeys(scope.split(" ")))


def _scopes(text: str | None) -> Scopes | None:
    if text is None:
        return None
    try:
        return Scopes.parse(text)
    except MalformedScope:
        raise Refusal(Reason.INVALID_SCOPE) from None
