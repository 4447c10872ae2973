"""A token whenever one is needed: fetched once, renewed early, for any number of threads and tasks.

- A good token is handed out without waiting.  When little of its life is left one thread fetches
  the next, and everybody else goes on with the old one.
- The first token, and one after the old has expired, is fetched once and waited for by all.
- What the issuer refuses, or that it is away, is remembered: until the pause is over calls fail
  at once, from memory, and nobody reaches the issuer.  A rejected API key has no end of pause.
- As long as the old token is good nobody notices an issuer that is away or says no to the next
  token.  Only when the API key itself is rejected the old token is not handed out any more: the
  same event ended it.

Expiry is counted from the moment before the request was sent, on a clock that never goes back:
the caller's wall clock may be wrong.

The exchange runs on a thread of its own, which no task that is cancelled can end and which is
not waited for when the program ends.
"""

import asyncio
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypedDict

from coatcheck.caller import api_key_origin
from coatcheck.caller.answer import Fetched
from coatcheck.caller.api_key_origin import ApiKeyOrigin
from coatcheck.caller.errors import CallerError, IssuerUnavailable, KeyRejected
from coatcheck.caller.exchange import Post, exchange

#: A token is renewed when this part of its life is left, or `renew_before` if that is less.
RENEW_SHARE: Final = 0.2
#: Seconds between two renewals that an API's 401 asks for: one that refuses every token does not
#: make the issuer answer each of its calls.
FORCED_EVERY: Final = 5
#: Seconds, of the first pause and of the longest: after no answer, and after a refusal.
OUTAGE_PAUSES: Final = (1.0, 60.0)
REFUSAL_PAUSES: Final = (5.0, 300.0)
#: Part of a pause that chance adds to it.
PAUSE_JITTER: Final = 0.25
#: Seconds after the end of its own limit that a fetch may take: names are looked up without one.
_GRACE: Final = 1

_log: Final = logging.getLogger(__name__)

Fallback = Literal["none", "api_key"]


class Settings(TypedDict, total=False):
    """What a `TokenSource` is told by name; each has a default."""

    api_key_file: str | Path | None
    keychain: bool | None
    client_id: str | None
    scope: str | Sequence[str] | None
    resource: str | None
    renew_before: float
    jitter: float
    fallback: Fallback
    timeout: float
    trust_env: bool
    unsafe_plain_http: bool
    clock: Callable[[], float]
    monotonic: Callable[[], float]
    post: Post | None


@dataclass(frozen=True, slots=True)
class _Held:
    """A token in use.

    Attributes:
        margin_s: what is left of its life when it is time to renew it, before chance.
        renew_at, expires_at: on the clock that never goes back.
    """

    token: str = field(repr=False)
    margin_s: float
    renew_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why there is no new token.

    Attributes:
        until: when the issuer may be asked again; None: not for this API key.
        stamp: of the API key that was rejected.
    """

    kind: type[CallerError]
    detail: str
    code: str
    until: float | None
    stamp: object = None

    def error(self, now: float) -> CallerError:
        """A new exception: one that is raised by many threads would collect their frames."""
        wait_s = None if self.until is None else max(0.0, self.until - now)
        return self.kind(self.detail, self.code, wait_s)


@dataclass(slots=True, eq=False)
class _Flight:
    """An exchange under way, and what it will bring."""

    landed: "Future[str | _Trouble]"
    is_overdue: bool = False


def since_boot() -> float:
    """Seconds on a clock that never goes back and, where there is one, counts sleep.

    A laptop that was closed for an hour must not believe in its token.
    """
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class TokenSource:
    """Tokens for one API key.  For any number of threads and asyncio tasks; fork-safe.

    Args:
        issuer: its URL; None: COATCHECK_ISSUER.
        api_key: None: `api_key_file`, COATCHECK_API_KEY, COATCHECK_API_KEY_FILE or the keychain.
        api_key_file: read each time a token is fetched.
        keychain: True: the API key is there; False: it is not looked for there.
        client_id: the API key's id, which the issuer does not need.
        scope: what to ask for; None: all that the API key has.
        resource: the API that tokens are for; None: the issuer's usual one.
        renew_before: seconds of life left at which a token is renewed, or a fifth of its life if
            that is less.
        jitter: seconds, by chance up to this, that a renewal is later: a fleet that was started
            together does not renew together.
        fallback: "api_key": while the issuer is away and no token is good, `token` returns the
            API key itself, which resource servers honor as long as they take raw keys.
        timeout: seconds for one exchange, the last byte included.
        trust_env: whether proxies and certificates named in the environment count.
        unsafe_plain_http: whether the API key may travel in the clear off this machine.
        clock: seconds since the epoch, for a Retry-After that is a date.
        monotonic: seconds on a clock that never goes back.
        post: sends a form and returns the answer.

    Raises:
        ValueError: a setting is missing or wrong.
        ApiKeyMissing: nobody has said which API key.
    """

    def __init__(
        self,
        issuer: str | None = None,
        api_key: str | None = None,
        *,
        api_key_file: str | Path | None = None,
        keychain: bool | None = None,
        client_id: str | None = None,
        scope: str | Sequence[str] | None = None,
        resource: str | None = None,
        renew_before: float = 60,
        jitter: float = 10,
        fallback: Fallback = "none",
        timeout: float = 10,
        trust_env: bool = False,
        unsafe_plain_http: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = since_boot,
        post: Post | None = None,
    ) -> None:
        if fallback not in ("none", "api_key"):
            raise ValueError('fallback: "none" or "api_key"')
        if renew_before < 0 or jitter < 0 or timeout <= 0:
            raise ValueError("renew_before, jitter, timeout: seconds, not below 0")
        self._exchange = exchange(
            issuer,
            scope=scope,
            resource=resource,
            client_id=client_id,
            timeout_s=timeout,
            trust_env=trust_env,
            unsafe_plain_http=unsafe_plain_http,
            send=post,
            clock=clock,
        )
        self._origin: ApiKeyOrigin = api_key_origin.find(
            api_key, api_key_file, keychain=keychain, issuer=self._exchange.issuer
        )
        self.unsafe_plain_http = unsafe_plain_http
        self._renew_before = renew_before
        self._jitter = jitter
        self._falls_back = fallback == "api_key"
        self._patience_s = timeout + _GRACE
        self._monotonic = monotonic
        self._held: _Held | None = None
        self._trouble: _Trouble | None = None
        self._api_key: str | None = None
        self._failures = 0
        self._forced_at = -float("inf")
        #: Counts what makes an exchange that is under way one of the past.
        self._epoch = 0
        self._is_closed = False
        self._has_told_fallback = False
        self._lock = threading.Lock()
        self._under_way: _Flight | None = None
        _EVERY_SOURCE.add(self)

    def __repr__(self) -> str:
        asked = {"scope": self._exchange.scope, "resource": self._exchange.resource}
        more = "".join(f", {name}={value!r}" for name, value in asked.items() if value)
        return f"<TokenSource of {self._exchange.issuer}, API key: {self._origin!r}{more}>"

    @property
    def resource(self) -> str | None:
        """The API that tokens are for, if it was said."""
        return self._exchange.resource

    def token(self) -> str:
        """A token that is good now; the API key itself if the fallback is on and it comes to it.

        Raises:
            CallerError: there is none.
        """
        found = self._look()
        if isinstance(found, str):
            return found
        try:
            landed = found.landed.result(self._patience_s)
        except TimeoutError:
            landed = self._give_up(found)
        return landed if isinstance(landed, str) else self._without(landed)

    async def token_async(self) -> str:
        """As `token`, for asyncio.

        Raises:
            CallerError: there is none.
        """
        found = self._look()
        if isinstance(found, str):
            return found
        # An exchange that runs cannot be cancelled, so a task that is ends only its own waiting.
        waiting = asyncio.wrap_future(found.landed)
        try:
            await asyncio.wait((waiting,), timeout=self._patience_s)
            landed = waiting.result() if waiting.done() else self._give_up(found)
        finally:
            waiting.cancel()
        return landed if isinstance(landed, str) else self._without(landed)

    def invalidate(self, token: str | None = None) -> None:
        """Forget a token that is good no more; without one, everything.

        Args:
            token: what an API has refused.  If another one has taken its place nothing happens,
                so that any number of threads that meet the same refusal cause one renewal.
                None: also a refusal is forgotten, and a pause: the next call asks the issuer.
        """
        with self._lock:
            if token is None:
                self._epoch += 1
                self._under_way = None
                self._held = self._trouble = None
                self._failures = 0
            elif self._held is not None and self._held.token == token:
                self._held = None

    def after_refusal(self, token: str) -> bool:
        """Forget a token that an API has just refused, unless that happens too often.

        Returns:
            Whether `token` may bring another one now.
        """
        with self._lock:
            if self._held is None or self._held.token != token:
                return True
            now = self._monotonic()
            if now < self._forced_at + FORCED_EVERY:
                return False
            self._forced_at = now
            self._held = None
            return True

    def close(self) -> None:
        """Forget the token and the API key; an exchange that is under way ends by itself."""
        with self._lock:
            self._epoch += 1
            self._is_closed = True
            self._held = self._api_key = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _look(self) -> str | _Flight:
        """A token, or what to wait for.

        Raises:
            CallerError: neither, for now or for ever.
        """
        held = self._held
        if held is not None and self._monotonic() < held.renew_at:
            return held.token
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this TokenSource was closed")
            now = self._monotonic()
            if self._held is not None and now >= self._held.expires_at:
                self._held = None
            held = self._held
            if held is not None and now < held.renew_at:
                return held.token
            if self._may_ask(now) and self._under_way is None:
                self._begin()
            if held is not None and self._held is held:
                return held.token
            trouble, flight = self._trouble, self._under_way
            if flight is not None and not flight.is_overdue and not self._can_do_without(trouble):
                return flight
        assert trouble is not None  # noqa: S101 - or the issuer would have been asked
        return self._without(trouble)

    def _may_ask(self, now: float) -> bool:
        """Whether no pause keeps from asking.  The lock is held."""
        trouble = self._trouble
        if trouble is None:
            return True
        if trouble.until is not None:
            return now >= trouble.until
        if trouble.stamp == self._origin.stamp():
            return False
        # The file holds another API key than the one that was rejected.
        self._trouble, self._failures = None, 0
        return True

    def _can_do_without(self, trouble: _Trouble | None) -> bool:
        """Whether the API key itself is sent instead."""
        is_outage = trouble is not None and trouble.kind is IssuerUnavailable
        return is_outage and self._falls_back and self._api_key is not None

    def _without(self, trouble: _Trouble) -> str:
        """What `token` returns when there is none."""
        api_key = self._api_key
        if api_key is None or not self._can_do_without(trouble):
            raise trouble.error(self._monotonic())
        with self._lock:
            is_news, self._has_told_fallback = not self._has_told_fallback, True
        if is_news:
            _log.warning(
                "%s: until it answers again the API key itself is sent to the API",
                self._exchange.issuer,
            )
        return api_key

    def _begin(self) -> None:
        """Start an exchange on a thread of its own.  The lock is held."""
        flight = _Flight(Future())
        # From now on it cannot be cancelled.
        flight.landed.set_running_or_notify_cancel()
        thread = threading.Thread(
            target=self._run, args=(flight, self._epoch), name="coatcheck-token", daemon=True
        )
        self._under_way = flight
        try:
            thread.start()
        except RuntimeError:
            # Out of threads, or the program ends.
            self._under_way = None
            error = IssuerUnavailable("no thread can be started to fetch a token", "no_thread")
            self._trouble = self._pause(error, None)

    def _run(self, flight: _Flight, epoch: int) -> None:
        stamp: object = None
        api_key: str | None = None
        fetched: Fetched | CallerError
        began_at = self._monotonic()
        try:
            stamp = self._origin.stamp()
            api_key = self._origin.read()
            fetched = self._exchange.run(api_key)
        except CallerError as error:
            fetched = error
        except Exception as error:
            kind = type(error).__name__
            fetched = IssuerUnavailable(f"the exchange failed: {kind}", "exchange_failed")
        with self._lock:
            landed = self._land(fetched, began_at, stamp, api_key, is_past=epoch != self._epoch)
            if self._under_way is flight:
                self._under_way = None
        flight.landed.set_result(landed)

    def _land(
        self,
        fetched: Fetched | CallerError,
        began_at: float,
        stamp: object,
        api_key: str | None,
        *,
        is_past: bool,
    ) -> str | _Trouble:
        """Keep what an exchange brought.  The lock is held.

        Args:
            is_past: only those who already wait for it are told.
        """
        if isinstance(fetched, Fetched):
            if not is_past:
                self._held = self._with_chance(fetched.token, began_at, fetched.expires_in_s)
                self._api_key = api_key
                if self._failures:
                    _log.info("%s: there are tokens again", self._exchange.issuer)
                self._trouble, self._failures, self._has_told_fallback = None, 0, False
            return fetched.token
        if is_past:
            return _Trouble(type(fetched), fetched.detail, fetched.code, self._monotonic())
        self._api_key = api_key or self._api_key
        if self._failures == 0:
            _log.warning("%s: no new token: %s", self._exchange.issuer, fetched)
        self._trouble = self._pause(fetched, stamp)
        if isinstance(fetched, KeyRejected):
            # Whatever ended the API key has ended its tokens.
            self._held = None
        return self._trouble

    def _with_chance(self, token: str, began_at: float, life_s: float) -> _Held:
        margin_s = min(self._renew_before, RENEW_SHARE * life_s)
        expires_at = began_at + life_s
        return _Held(token, margin_s, expires_at - self._left_s(margin_s), expires_at)

    def _left_s(self, margin_s: float) -> float:
        """Seconds of life left at the renewal, which chance makes fewer."""
        return margin_s - min(self._jitter, margin_s / 2) * _chance()

    def _pause(self, error: CallerError, stamp: object) -> _Trouble:
        """What is remembered of a failure, and for how long.  The lock is held."""
        self._failures += 1
        if isinstance(error, KeyRejected):
            return _Trouble(KeyRejected, error.detail, error.code, None, stamp)
        first, longest = OUTAGE_PAUSES if type(error) is IssuerUnavailable else REFUSAL_PAUSES
        pause_s = min(longest, first * 2.0 ** min(self._failures - 1, 16))
        pause_s = max(pause_s, error.retry_after_s or 0)
        until = self._monotonic() + pause_s * (1 + PAUSE_JITTER * _chance())
        return _Trouble(type(error), error.detail, error.code, until)

    def _give_up(self, flight: _Flight) -> _Trouble:
        """Stop waiting for an exchange that does not end; nobody else begins to wait for it."""
        error = IssuerUnavailable(
            f"no answer from {self._exchange.issuer} in time", "issuer_unavailable"
        )
        with self._lock:
            if self._under_way is not flight:
                # It has landed just now, or was forgotten: who waited too long is told the same.
                return _Trouble(type(error), error.detail, error.code, self._monotonic())
            if not flight.is_overdue or self._trouble is None:
                flight.is_overdue = True
                self._trouble = self._pause(error, None)
            return self._trouble

    def _after_fork(self) -> None:
        """In the child: threads stayed behind, and locks may be held by them."""
        self._lock = threading.Lock()
        self._under_way = None
        held = self._held
        if held is not None:
            # Else all children of one parent would renew in the same moment.
            at = held.expires_at - self._left_s(held.margin_s)
            self._held = _Held(held.token, held.margin_s, at, held.expires_at)


def _chance() -> float:
    """From 0 to 1.  Nothing secret comes of it."""
    return random.random()  # noqa: S311


_EVERY_SOURCE: "weakref.WeakSet[TokenSource]" = weakref.WeakSet()


def _after_fork() -> None:
    for source in list(_EVERY_SOURCE):
        source._after_fork()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
