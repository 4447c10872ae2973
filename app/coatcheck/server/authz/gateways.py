"""Who may ask for a verdict: a trusted proxy, or whoever holds a resource server's API key.

A verdict depends on what the gateway says of its caller: method, URI, address.  Nobody else is
believed, and to nobody else anything is said of a credential.

Source: RFC 6749 §2.3.1 (protection against brute force), RFC 7239 §8.1 (who is believed).
"""

import logging
from collections.abc import Sequence
from typing import Final, NamedTuple

from coatcheck import apikey, client_address
from coatcheck.client_address import Address, Network, parse_networks
from coatcheck.restrictions import Reason, Refusal
from coatcheck.scope import RESOURCE_SERVER, Grant
from coatcheck.server.alarms import Alarms
from coatcheck.server.authz.asked import FORWARDED_FOR, SERVICE_KEY, Lines
from coatcheck.server.issue.exchange import CONNECTOR, Issuer
from coatcheck.server.store import ApiKeyRecord, Found
from coatcheck.server.throttle import Throttle, by_address
from coatcheck.verifier.errors import RateLimited

_log = logging.getLogger(__name__)

_MAY_ASK: Final = Grant(RESOURCE_SERVER)


class NotAGateway(Exception):
    """Whoever asks is not believed."""


class Gateway(NamedTuple):
    """Somebody whose word counts.  Made by `Gateways.recognized` only.

    Attributes:
        record: the API key that it sent; None: it is a trusted proxy.
        caller: the address of its caller; None: unknown.
    """

    record: ApiKeyRecord | None
    caller: Address | None


class Gateways:
    """Tells gateways from everybody else.

    Args:
        trusted_proxies: gateways without an API key, and what stands between others and us.
    """

    def __init__(
        self,
        issuer: Issuer,
        *,
        throttle: Throttle,
        alarms: Alarms,
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._issuer = issuer
        self._throttle = throttle
        self._alarms = alarms
        self._trusted_proxies = tuple(trusted_proxies)

    def digest(self, peer: str | None, lines: Lines) -> bytes | None:
        """The digest of the API key that has to be looked up; None: there is none to.

        Raises:
            NotAGateway: it is nobody we know.
        """
        sent = lines.get(SERVICE_KEY, ())
        if len(sent) == 1:
            return apikey.digest(sent[0].decode("latin-1"))
        if sent or not client_address.is_in(peer, self._trusted_proxies):
            raise NotAGateway
        return None

    def recognized(
        self, peer: str | None, lines: Lines, digest: bytes | None, found: Found, now: int
    ) -> Gateway:
        """The gateway that asks.

        1. An API key that was sent has to be right, wherever the gateway is.
        2. It may be used from there.
        3. It is a resource server's.

        Args:
            digest: as `digest` gave it.
            found: the answer to its look-up.

        Raises:
            NotAGateway: it is nobody we know.
            RateLimited: its address guessed too often.
        """
        forwarded_for = b",".join(lines.get(FORWARDED_FOR, ())).decode("latin-1")
        trusted = self._trusted_proxies
        where = client_address.client_address(peer, forwarded_for, trusted)
        if digest is None:
            return Gateway(None, where)
        record = found.records.get(digest)
        try:
            # 1
            record = self._issuer.recognize(found, digest, None, now)
            # 2 and 3
            _require_fit(record, where)
        except Refusal as refusal:
            self._look_at(record, refusal, where, now)
            raise NotAGateway from None
        if where is not None:
            # Between it and us there may be proxies of ours; it is the last one of its own side.
            trusted = (*trusted, *parse_networks((str(where),)))
        return Gateway(record, client_address.client_address(peer, forwarded_for, trusted))

    def _look_at(
        self, record: ApiKeyRecord | None, refusal: Refusal, where: Address | None, now: int
    ) -> None:
        """Count a guess, log what happened to an API key that exists, and alarm its owner."""
        if record is None:
            retry_after_s = self._throttle.retry_after(by_address(where))
            if retry_after_s is not None:
                raise RateLimited(retry_after_s)
            return
        _log.info("refused %s as a gateway's: %s from %s", record.id, refusal.reason.value, where)
        if refusal.reason is Reason.IP_NOT_ALLOWED:
            self._alarms.wrong_address(record.id, record.organization_id, where, now)


def _require_fit(record: ApiKeyRecord, where: Address | None) -> None:
    """Steps 2 and 3.  Raises Refusal."""
    if record.networks is not None and not client_address.is_in(str(where), record.networks):
        raise Refusal(Reason.IP_NOT_ALLOWED)
    if record.kind == CONNECTOR or not record.scopes.covers(_MAY_ASK):
        raise Refusal(Reason.NOT_A_CALLER)
