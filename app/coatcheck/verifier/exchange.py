"""Raw API keys at a resource server: handed in at the issuer, a token comes out, and is kept.

Callers who never move keep working.  Their key is exchanged for the very token they would have
got themselves (RFC 8693), and from then on there is one path for both.

- One exchange per API key, place and client address at a time, however many threads and tasks
  wait for it.
- A token is kept until shortly before it expires; a refusal for NEGATIVE seconds.  Both hold
  wherever the key is used; that an address is not allowed holds for this address.
- A refused service key, an issuer that is away or answers nonsense: 503, never 401, because it
  says nothing about the caller.

Memory is by SHA-256 of the key; the key itself is held only while its exchange runs.

Source: RFC 8693 §2.1 (request), §2.2 (answers); RFC 6749 §2.3.1 (our own credentials).
"""

import math
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final, NamedTuple, TypeVar

from coatcheck import apikey, http
from coatcheck import client_address as address
from coatcheck.verifier import check, errors
from coatcheck.verifier.errors import VerifierError
from coatcheck.verifier.presented import Place

GRANT_TYPE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
#: Seconds for which a refusal is remembered: a caller in a loop does not reach the issuer.
NEGATIVE: Final = 5
#: Seconds before its expiry at which a kept token is exchanged anew.
RENEW_BEFORE: Final = 30
#: Exchanges under way at once, of different API keys.
_MOST_AT_ONCE: Final = 8
_MOST_REMEMBERED: Final = 10_000
_MAX_ANSWER_BYTES: Final = 16 * 1024
_MAX_CONTAINERS: Final = 10
#: Seconds.  Nobody issues tokens for longer; a larger number is a mistake.
_LONGEST_LIFE: Final = 24 * 3600

#: RFC 8693 §2.2.2: the errors that speak of the subject rather than of us.
_OF_THE_SUBJECT: Final = ("invalid_request", "invalid_target")
#: RFC 6749 §5.2: what an error_description consists of; it goes into a header of ours.
_DESCRIPTION: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,600}")

#: The issuer's code → what the caller is told.  Any other code is our own trouble.
_OF_THE_KEY: Final[Mapping[str, type[VerifierError]]] = {
    "api_key_unknown": errors.ApiKeyUnknown,
    "api_key_malformed": errors.ApiKeyMalformed,
    "api_key_revoked": errors.ApiKeyRevoked,
    "api_key_expired": errors.ApiKeyExpired,
    "api_key_disabled": errors.ApiKeyDisabled,
    "quota_exceeded": errors.QuotaExceeded,
    "org_suspended": errors.OrgSuspended,
    "ip_not_allowed": errors.IpNotAllowed,
    "connector_only_in_query": errors.ConnectorOnlyInQuery,
    "wrong_environment": errors.WrongEnvironment,
    "invalid_target": errors.WrongAudience,
    # The issuer believes that another JWT library stands here: for this key it is no audience.
    "not_enforced_there": errors.WrongAudience,
}
#: Of these, what another client address could change.
_OF_THE_ADDRESS: Final = frozenset((errors.IpNotAllowed,))


_At = TypeVar("_At")


class Exchanged(NamedTuple):
    """What an exchange brought: a token, or why there is none.

    Attributes:
        refusal: makes the error; each request raises one of its own.
        good_until: seconds on a clock that never goes back; what is not good is not remembered.
        is_of_the_address: it says nothing about any other client address.
    """

    token: str | None
    refusal: Callable[[], VerifierError] | None
    good_until: float
    is_of_the_address: bool = False

    def require_token(self) -> str:
        """The token.  Raises the refusal if there is none."""
        if self.token is not None:
            return self.token
        assert self.refusal is not None  # noqa: S101 - one of the two is there
        raise self.refusal()


@dataclass(frozen=True, slots=True)
class ExchangeStatus:
    """What is remembered of raw API keys.

    Attributes:
        remembered: how many are good without asking the issuer.
        first_end_in_s: seconds until the first of them is not; None: there is none.
        last_end_in_s: seconds until the last of them is not.
    """

    remembered: int
    first_end_in_s: float | None
    last_end_in_s: float | None


class Exchange:
    """Exchanges raw API keys at one issuer.  For any number of threads and tasks; fork-safe.

    Args:
        token_url: the issuer's token endpoint.
        subject_token_type: what the issuer calls its API keys.
        audience: the resource server that tokens are for.
        service_key: this resource server's own API key.
        monotonic: seconds on a clock that never goes back.
    """

    def __init__(
        self,
        token_url: str,
        subject_token_type: str,
        audience: str,
        service_key: str,
        *,
        monotonic: Callable[[], float],
        trust_env: bool = False,
    ) -> None:
        self._token_url = token_url
        self._subject_token_type = subject_token_type
        self._audience = audience
        self._service_key = service_key
        self._monotonic = monotonic
        self._trust_env = trust_env
        self._remembered: OrderedDict[tuple[bytes, Place], Exchanged] = OrderedDict()
        # Apart: whoever found a key and has many addresses pushes out no token.
        self._refused_there: OrderedDict[tuple[bytes, Place, str], Exchanged] = OrderedDict()
        self._is_closed = False
        self._renew()
        _EVERY_EXCHANGE.add(self)

    def remembered(
        self, digest: bytes, place: Place, client_address: str | None = None
    ) -> Exchanged | None:
        """What an earlier exchange brought for this address, while it is good.  Never waits."""
        found = self._remembered.get((digest, place))
        if found is not None and self._monotonic() < found.good_until:
            return found
        if self._refused_there:
            found = self._refused_there.get((digest, place, _written(client_address)))
            if found is not None and self._monotonic() < found.good_until:
                return found
        return None

    def status(self) -> ExchangeStatus:
        """What is remembered at the moment; refusals do not count."""
        with self._lock:
            kept = list(self._remembered.values())
        now = self._monotonic()
        ends = [one.good_until - now for one in kept if one.token and one.good_until > now]
        return ExchangeStatus(len(ends), min(ends, default=None), max(ends, default=None))

    def forget(self, digest: bytes, place: Place, ended: Exchanged) -> None:
        """Exchange anew next time: the token that was kept is good no more."""
        with self._lock:
            # Another request may have exchanged it already.
            if self._remembered.get((digest, place)) is ended:
                del self._remembered[digest, place]

    def begin(
        self, digest: bytes, place: Place, key: str, client_address: str | None
    ) -> "Future[Exchanged]":
        """Exchange a key, or join the exchange of the same key that is under way.

        One that is under way for another address is not joined: what it brings may be of no use.
        """
        where = _written(client_address)
        with self._lock:
            under_way = self._under_way.get((digest, place, where))
            if under_way is None and (kept := self.remembered(digest, place, where)) is not None:
                # It ended between the caller's look and this one.
                under_way = Future()
                under_way.set_result(kept)
                return under_way
            if under_way is None:
                try:
                    under_way = self._pool.submit(self._run, digest, place, key, where)
                except RuntimeError:
                    # Closed, or out of threads.
                    under_way = Future()
                    under_way.set_result(self._unavailable())
                    return under_way
                self._under_way[digest, place, where] = under_way
            return under_way

    def close(self) -> None:
        """Let go of connections and threads, once the exchanges under way are finished."""
        self._is_closed = True
        self._end()

    def forget_all(self) -> None:
        """Remember nothing, as when it was made; exchanges under way are finished first."""
        self._end()
        with self._lock:
            self._remembered.clear()
            self._refused_there.clear()
        if not self._is_closed:
            self._begin()

    def _run(self, digest: bytes, place: Place, key: str, where: str) -> Exchanged:
        try:
            # It may have waited in line behind the exchange of the same key for another address.
            if (kept := self.remembered(digest, place, where)) is not None:
                return kept
            exchanged = self._exchange(place, key, where)
            if exchanged.good_until > self._monotonic():
                with self._lock:
                    if exchanged.is_of_the_address:
                        _remember(self._refused_there, (digest, place, where), exchanged)
                    else:
                        _remember(self._remembered, (digest, place), exchanged)
            return exchanged
        finally:
            with self._lock:
                self._under_way.pop((digest, place, where), None)

    def _exchange(self, place: Place, key: str, where: str) -> Exchanged:
        form = {
            "grant_type": GRANT_TYPE,
            "client_secret": self._service_key,
            "subject_token": key,
            "subject_token_type": self._subject_token_type,
            "resource": self._audience,
            "client_address": where,
            "presented_in": place,
        }
        started_at = self._monotonic()
        try:
            status, wait, told = self._post(form)
        except (http.FetchFailed, ValueError):
            return self._unavailable()
        token, expires_in = told.get("access_token"), told.get("expires_in")
        if status == HTTPStatus.OK and type(token) is str and type(expires_in) is int:
            if not 0 < expires_in <= _LONGEST_LIFE:
                return self._unavailable()
            # One that lives no longer than the margin is used for as long as it lives.
            margin = RENEW_BEFORE if expires_in > 2 * RENEW_BEFORE else 0
            return Exchanged(token, None, started_at + expires_in - margin)
        if status == HTTPStatus.TOO_MANY_REQUESTS and told.get("code") == "rate_limited":
            refusal = partial(errors.RateLimited, wait)
            return Exchanged(None, refusal, started_at + min(wait, NEGATIVE))
        error = _OF_THE_KEY.get(str(told.get("code")))
        is_of_the_key = told.get("error") in _OF_THE_SUBJECT
        if status != HTTPStatus.BAD_REQUEST or error is None or not is_of_the_key:
            return self._unavailable()
        return Exchanged(
            None,
            partial(error, _sentence(told)),
            self._monotonic() + NEGATIVE,
            error in _OF_THE_ADDRESS,
        )

    def _post(self, form: Mapping[str, str]) -> tuple[int, int, Mapping[str, object]]:
        """Status, seconds of Retry-After, and body.  Raises when there is no usable answer."""
        answer = self._posts.post(self._token_url, form, max_bytes=_MAX_ANSWER_BYTES)
        wait = _seconds(answer.headers.get("retry-after"))
        return answer.status, wait, check.json_object(answer.body, _MAX_CONTAINERS)

    def _unavailable(self) -> Exchanged:
        return Exchanged(None, partial(errors.IssuerUnavailable, 1), -math.inf)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[tuple[bytes, Place, str], Future[Exchanged]] = {}
        self._begin()

    def _begin(self) -> None:
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="coatcheck-exchange")
        self._posts = http.Posts(trust_env=self._trust_env)

    def _end(self) -> None:
        self._pool.shutdown(wait=True)
        self._posts.close()


def _remember(remembered: OrderedDict[_At, Exchanged], at: _At, exchanged: Exchanged) -> None:
    remembered[at] = exchanged
    if len(remembered) > _MOST_REMEMBERED:
        remembered.popitem(last=False)


def _written(client_address: str | None) -> str:
    """An address in its one spelling.  A name is none, and the issuer takes nothing else."""
    return str(address.parse(client_address or "") or "unknown")


def _seconds(text: str | None) -> int:
    is_number = text is not None and re.fullmatch(r"[0-9]{1,4}", text)
    return max(1, int(text or 1)) if is_number else 1


def _sentence(told: Mapping[str, object]) -> str | None:
    """The issuer's own words, if they can stand in an answer of ours."""
    text = told.get("error_description")
    if type(text) is not str or not _DESCRIPTION.fullmatch(text):
        return None
    is_leaking = any(apikey.looks_like_one(word) for word in re.split(r"[^0-9A-Za-z_]+", text))
    return None if is_leaking else text


_EVERY_EXCHANGE: "weakref.WeakSet[Exchange]" = weakref.WeakSet()


def _renew_every() -> None:
    for exchange in list(_EVERY_EXCHANGE):
        # In the child: threads stayed behind, and a connection belongs to the parent.
        exchange._renew()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_every)
