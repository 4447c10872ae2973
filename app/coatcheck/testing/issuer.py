"""An issuer that lives in the process of a test: real tokens, real refusals, and no network.

It has signing keys of its own, made when the process starts and known to nobody else, so that
nothing here can make a token that a real resource server would take.

Verifiers of this process find it where the network would be (`coatcheck.http`), and so run every
line that they run in production: key set, feed, exchange, and each step of the check.

Source: RFC 9068 §2 (tokens), RFC 7517 (key set), RFC 7638 §3 (`kid`), RFC 8693 §2 (exchange).
"""

import json
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)

from coatcheck import apikey, base64url, feed_profile, http, ids
from coatcheck.client_address import is_in, parse_networks
from coatcheck.durations import (
    FEED_STALE,
    FEED_WAIT_MAX,
    FEED_WINDOW,
    LEEWAY_MAX,
    TOKEN_LIFETIME,
)
from coatcheck.scope import Scopes
from coatcheck.testing.refusals import REFUSALS, Refused
from coatcheck.verifier import errors
from coatcheck.verifier.verifier import Verifier, over_http_of

ISSUER: Final = "https://auth.example.com"
AUDIENCE: Final = "https://api.example.com"

#: What an API key can be refused for, once it is known.
REFUSED_AS: Final = (
    "api_key_revoked",
    "api_key_disabled",
    "api_key_expired",
    "org_suspended",
    "quota_exceeded",
)

#: Of the feed, which followers read to a bound only.
_MOST_ENTRIES: Final = 5000
#: Seconds that a thread of a verifier may take to end.  Nothing holds it up here.
_LONGEST_END: Final = 5

_ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - RFC 8693 §3

_ES256: Final = jwt.get_algorithm_by_name("ES256")
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


class _SigningKey(NamedTuple):
    """A signing key with both halves.  Its `kid` is the thumbprint of its public one."""

    kid: str
    private: EllipticCurvePrivateKey
    jwk: Mapping[str, str]


@lru_cache(maxsize=64)
def _signing_key(name: str) -> _SigningKey:
    """The signing key of this name: the same one as long as the process lives."""
    private = generate_private_key(SECP256R1())
    public: dict[str, str] = _ES256.to_jwk(private.public_key(), as_dict=True)
    # RFC 7638 §3.2: the required members in lexicographic order, without blanks.
    members = {member: public[member] for member in ("crv", "kty", "x", "y")}
    kid = base64url.encode(sha256(_to_json(members).encode()).digest()).decode()
    return _SigningKey(kid, private, {**members, "kid": kid, "use": "sig", "alg": "ES256"})


@dataclass(slots=True)
class _ApiKey:
    """What is remembered of an API key; its text is not.

    Attributes:
        terms: the arguments of `FakeIssuer.token` for each of its tokens.
        refused_as: the code of why it is refused; None: it is good.
    """

    id: str
    terms: dict[str, Any] = field(repr=False)
    is_connector: bool
    refused_as: str | None = None


class FakeIssuer:
    """An issuer in this process, for tests of an API that takes its tokens and API keys.

        with FakeIssuer("https://auth.example.com", audience="https://api.example.com") as issuer:
            headers = {"Authorization": f"Bearer {issuer.token(['widgets:read'])}"}

    While it is installed, every verifier of this process that names this issuer asks it instead
    of the network, however and wherever it was made.  Before and after, those verifiers know
    nothing, as when they were made.

    Args:
        issuer: the URL that your API is configured with.
        audience: for tokens and API keys that name none.
        environment: likewise.
        org_id: likewise; default: one of its own.
        roles: for each role the HTTP methods that it allows.
        api_key_header: the product's own header for credentials.
        foreign_prefixes: what API keys of an older system begin with.
        jwks_url: where your API looks for the key set, if not below the issuer.
        clock: seconds since the epoch.  A verifier that was made with another clock refuses what
            is not of its time.
    """

    #: Held while one of them takes the place of another.
    installing: ClassVar = threading.RLock()

    def __init__(
        self,
        issuer: str = ISSUER,
        *,
        audience: str = AUDIENCE,
        environment: str = "live",
        org_id: str | None = None,
        roles: Mapping[str, Iterable[str]] | None = None,
        api_key_header: str | None = None,
        foreign_prefixes: Iterable[str] = (),
        jwks_url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.audience = audience
        self.environment = environment
        self._clock = clock
        now_ms = int(clock() * 1000)
        self.org_id = ids.new_id("org", now_ms) if org_id is None else org_id
        #: The `sub` of tokens that are made without an API key.
        self.key_id = ids.new_id("key", now_ms)
        self._base = issuer.rstrip("/")
        self._key_set_url = jwks_url or f"{self._base}/.well-known/jwks.json"
        self._bases = tuple(dict.fromkeys((self._base, self._key_set_url)))
        self._feed_url = f"{self._base}/oauth/revocations"
        self._token_url = f"{self._base}/oauth/token"
        self._document: dict[str, object] = {
            "issuer": issuer,
            "revocations_endpoint": self._feed_url,
            "revocation_keys": {"keys": [_signing_key("feed").jwk]},
            "durations": {
                "token_lifetime": TOKEN_LIFETIME,
                "feed_window": FEED_WINDOW,
                "feed_stale": FEED_STALE,
            },
            "roles": {name: sorted(allowed) for name, allowed in (roles or {}).items()},
            "resource_types": {},
            "api_key_header": api_key_header,
            "foreign_prefixes": list(foreign_prefixes),
        }
        self._api_keys: dict[bytes, _ApiKey] = {}
        self._log = secrets.token_hex(8)
        self._seq = 1
        #: Polls that wait are answered when it changes.
        self._moves = 0
        self._interruptions = 0
        self._installs = 0
        self._before: list[http.StandIn | None] = []
        self._begin()
        self._renew_locks()
        _EVERY_ISSUER.add(self)

    def _begin(self) -> None:
        self._entries: dict[str, int] = {}
        self._signing_keys = [_signing_key("first")]
        self._is_away = self._is_stale = self._is_throttling = False
        for api_key in self._api_keys.values():
            api_key.refused_as = None

    # Where verifiers find it.

    def install(self) -> Self:
        """Answer, in place of the network, every verifier of this process that names this issuer.

        As often as it is installed it has to be uninstalled.  `with issuer:` does both.
        """
        with self.installing:
            self._installs += 1
            if self._installs == 1:
                self._before = [http.put_in(base, self) for base in self._bases]
                before = self._before[0]
                if isinstance(before, FakeIssuer):
                    with before._interrupted():  # noqa: SLF001 - of the same class
                        self._let_verifiers_forget()
                else:
                    self._let_verifiers_forget()
        return self

    def uninstall(self) -> None:
        """Give the network back, or the issuer that was installed before.

        Verifiers know nothing afterwards, and none of their threads is left.
        """
        with self.installing:
            if self._installs == 1:
                with self._interrupted():
                    self._let_verifiers_forget(wait_s=_LONGEST_END)
                    for base, before in zip(self._bases, self._before, strict=True):
                        http.put_in(base, before)
            self._installs = max(0, self._installs - 1)

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstall()

    def reset(self) -> None:
        """As when it was made: nothing is revoked, nobody is away; its API keys are still known."""
        with self._interrupted():
            with self._changed:
                self._begin()
                self._seq += 1
            self._let_verifiers_forget()

    # Credentials.

    def token(
        self,
        scopes: str | Iterable[str] = (),
        *,
        audience: str | None = None,
        org_id: str | None = None,
        project_id: str | None = None,
        environment: str | None = None,
        roles: Iterable[str] | None = None,
        cidrs: Iterable[str] | None = None,
        models: Iterable[str] | None = None,
        group: str | None = None,
        lifetime: int = TOKEN_LIFETIME,
        expired: bool = False,
        header: Mapping[str, object] | None = None,
        **claims: object,
    ) -> str:
        """A signed access token, as the service would make it for such an API key.

        Args:
            scopes: scope-tokens, with filters if you like; or one text with blanks.
            audience: of another resource server: such a token is refused by yours.
            project_id, roles, cidrs, models, group: as an API key is narrowed; None: it is not.
            lifetime: seconds.
            expired: it ended, longer ago than any leeway.
            header: members to set in the header; None as a value leaves one out.
            claims: claims to set, whatever they are; None leaves one out.

        Raises:
            MalformedScope: `scopes` are none.  Set the claim `scope` to have it all the same.
        """
        now = self.now()
        ends_at = now - LEEWAY_MAX - 1 if expired else now + lifetime
        granted = Scopes.parse(scopes) if isinstance(scopes, str) else Scopes.of(scopes)
        narrowed = {
            "network": ("cidrs", None if cidrs is None else list(cidrs)),
            "resource": (None, any(grant.filter is not None for grant in granted) or None),
            "project": ("project_id", project_id),
            "role": ("roles", None if roles is None else list(roles)),
            "models": ("models", None if models is None else list(models)),
            "group": ("group", group),
        }
        must = [name for name, (_, value) in narrowed.items() if value is not None]
        told: dict[str, object] = {
            "iss": self.issuer,
            "sub": self.key_id,
            "client_id": self.key_id,
            "org_id": org_id or self.org_id,
            "env": environment or self.environment,
            "aud": audience or self.audience,
            "scope": str(granted),
            **{claim: value for claim, value in narrowed.values() if claim is not None},
            "must": must or None,
            "iat": ends_at - lifetime,
            "exp": ends_at,
            "as_of": self._seq,
            "jti": secrets.token_urlsafe(16),
            **claims,
        }
        return self._sign("at+jwt", self._signing_keys[-1], told, header or {})

    def api_key(
        self,
        scopes: str | Iterable[str] = (),
        *,
        audience: str | None = None,
        org_id: str | None = None,
        project_id: str | None = None,
        environment: str | None = None,
        roles: Iterable[str] | None = None,
        cidrs: Iterable[str] | None = None,
        models: Iterable[str] | None = None,
        group: str | None = None,
        connector: bool = False,
        text: str | None = None,
        **claims: object,
    ) -> str:
        """A raw API key that this issuer knows.

        Your API takes it only if its verifier has a service key, which may be any text.

        Args:
            scopes, audience, project_id, roles, cidrs, models, group: as for `token`.
            connector: it is good in the query only, `?api_key=`.
            text: the key itself, as one of an older system; default: a new one.
            claims: of its tokens, as for `token`; so are `lifetime`, `expired` and `header`.
        """
        now_ms = int(self._clock() * 1000)
        made = ids.new_id("key", now_ms)
        environment = environment or self.environment
        if text is None:
            text = apikey.make(apikey.prefix_for("ck", environment))
        terms: dict[str, Any] = {
            "scopes": scopes if isinstance(scopes, str) else tuple(scopes),
            "audience": audience,
            "org_id": org_id,
            "project_id": project_id,
            "environment": environment,
            "roles": _kept(roles),
            "cidrs": _kept(cidrs),
            "models": _kept(models),
            "group": group,
            "sub": made,
            "client_id": made,
            **claims,
        }
        # Told here rather than when it is first used.
        self.token(**terms)
        self._api_keys[apikey.digest(text)] = _ApiKey(made, terms, connector)
        return text

    def token_for(self, api_key: str) -> str:
        """The access token that a caller would get for this API key."""
        return self.token(**self._known(api_key).terms)

    def key_id_of(self, api_key: str) -> str:
        """The public id of an API key: `Principal.key_id`."""
        return self._known(api_key).id

    @property
    def service_key(self) -> str:
        """A service key, for a verifier that takes raw API keys.  Any other text would do."""
        return _service_key(self.environment)

    @property
    def jwks(self) -> dict[str, object]:
        """The key set, for other libraries."""
        return {"keys": [dict(signing_key.jwk) for signing_key in self._signing_keys]}

    def credential_for(self, code: str, scopes: str | Iterable[str] = ()) -> Refused:
        """A request that is refused with this code, and is good in every other respect.

        For `rate_limited`, `issuer_unavailable` and `stale_feed` the service gets into trouble,
        until `up`.

        Args:
            code: any code of a refusal; REFUSALS has them all.
            scopes: what your API needs for the request, so that nothing else refuses it.
        """
        if code not in REFUSALS:
            raise ValueError(f"code: one of {', '.join(REFUSALS)}")
        named = Scopes.parse(scopes) if isinstance(scopes, str) else Scopes.of(scopes)
        return REFUSALS[code](self, tuple(map(str, named)))

    def now(self) -> int:
        """Seconds since the epoch, by its clock."""
        return int(self._clock())

    # What may happen to them.  Each of these has reached every verifier of this process when it
    # returns.

    def revoke(self, credential: str) -> None:
        """Revoke an API key with all of its tokens, a token, or an id with all that hangs on it.

        Args:
            credential: an API key or a token of this issuer; or an id as tokens name it: of an
                organization, a project, a group or an API key; `*`: everything so far.
        """
        if apikey.digest(credential) in self._api_keys:
            self.refuse(credential, "api_key_revoked")
        elif credential.count(".") == 2:  # noqa: PLR2004 - a JWT's
            claims = json.loads(base64url.decode(credential.split(".")[1].encode()))
            if not claims.get("jti"):
                raise ValueError("the token has no jti, by which it could be revoked")
            self._tell(claims["jti"])
        elif apikey.looks_like_one(credential):
            raise _not_ours()
        else:
            self._tell(credential)

    def disable(self, api_key: str) -> None:
        """Disable an API key."""
        self.refuse(api_key, "api_key_disabled")

    def expire(self, api_key: str) -> None:
        """Let an API key have ended."""
        self.refuse(api_key, "api_key_expired")

    def enable(self, api_key: str) -> None:
        """Take an API key again.  Tokens from before stay dead."""
        self._known(api_key).refused_as = None
        # A refusal is remembered for seconds.
        self._let_verifiers(lambda verifier: verifier.forget(key_set=False, feed=False))

    def refuse(self, api_key: str, code: str) -> None:
        """Refuse an API key from now on, and all of its tokens.

        Args:
            code: one of REFUSED_AS.
        """
        if code not in REFUSED_AS:
            raise ValueError(f"code: one of {', '.join(REFUSED_AS)}")
        known = self._known(api_key)
        known.refused_as = code
        self._tell(known.id)

    def rotate_signing_key(self, *, withdraw: bool = False) -> None:
        """Sign with another key from now on.

        Args:
            withdraw: take the ones before out of the key set, which ends their tokens.
        """
        with self._changed:
            new = _signing_key(f"after {self._signing_keys[-1].kid}")
            self._signing_keys = [*([] if withdraw else self._signing_keys), new]
        self._let_verifiers(Verifier.renew)
        self._tell()

    # What may happen to the service.

    def down(self, *, for_long: bool = False) -> None:
        """Be away from now on: nobody gets an answer.

        What verifiers know they go on with, as in an outage: see docs/outages.md.  Those that
        have not asked yet do so before; one that is made afterwards finds nobody.

        Args:
            for_long: for more than a day: no key set counts any more, and every request is
                refused with 503.
        """
        if not self._is_away:
            self._let_verifiers(_warm)
        with self._changed:
            self._is_away = True
            self._move()
        if for_long:
            self._let_verifiers(lambda verifier: verifier.forget(feed=False, api_keys=False))

    def up(self) -> None:
        """Be back, with a fresh feed; every verifier of this process has heard of it."""
        with self._changed:
            self._is_away = self._is_stale = self._is_throttling = False
        self._let_verifiers(Verifier.renew)
        self._tell()

    @contextmanager
    def away(self, *, for_long: bool = False) -> Iterator[None]:
        """As `down`, for the length of a block."""
        self.down(for_long=for_long)
        try:
            yield
        finally:
            self.up()

    def stale_feed(self) -> None:
        """Hand out feeds that were signed too long ago, until `up`: verifiers call them stale."""
        with self._interrupted():
            self._is_stale = True
            self._let_verifiers(lambda verifier: verifier.forget(key_set=False, api_keys=False))

    def throttle(self) -> None:
        """Refuse every exchange of an API key with 429, until `up`: too many wrong guesses."""
        self._is_throttling = True
        self._let_verifiers(lambda verifier: verifier.forget(key_set=False, feed=False))

    # What verifiers ask.

    def get(self, url: str) -> bytes:
        """The answer to a verifier's GET: key set, document and feed.  Raises FetchFailed."""
        self._require_up()
        if url == self._key_set_url:
            return _to_json(self.jwks).encode()
        if url == f"{self._base}/.well-known/coatcheck":
            return _to_json(self._document).encode()
        address, _, query = url.partition("?")
        if address == self._feed_url:
            asked = parse_qs(query)
            return self._feed(int(asked["after"][0]), float(asked["wait"][0]))
        raise http.FetchFailed("http_404")

    def post(self, url: str, form: Mapping[str, str]) -> http.Answer:
        """The answer to an exchange of an API key: a caller's own, or one by a verifier.

        Raises FetchFailed.
        """
        self._require_up()
        if url != self._token_url:
            raise http.FetchFailed("http_404")
        is_callers = form["grant_type"] == "client_credentials"
        if self._is_throttling:
            return _refusal("rate_limited", 429, "temporarily_unavailable", {"retry-after": "1"})
        sent = form["client_secret" if is_callers else "subject_token"]
        api_key = self._api_keys.get(apikey.digest(sent))
        code = "api_key_unknown" if api_key is None else api_key.refused_as
        if is_callers:
            return self._to_caller(api_key, code, form)
        return self._to_verifier(api_key, code, form)

    def _to_verifier(
        self, api_key: _ApiKey | None, code: str | None, form: Mapping[str, str]
    ) -> http.Answer:
        """RFC 8693 §2.2.1, and §2.2.2 if there is a code."""
        if api_key is None or code is not None:
            return _refusal(code or "api_key_unknown")
        if api_key.is_connector != (form["presented_in"] == "query"):
            return _refusal("connector_only_in_query")
        if (api_key.terms["audience"] or self.audience) != form["resource"]:
            return _refusal("invalid_target", error="invalid_target")
        cidrs = api_key.terms["cidrs"]
        if cidrs is not None and not is_in(form["client_address"], parse_networks(cidrs)):
            return _refusal("ip_not_allowed")
        return self._issued(api_key.terms, issued_token_type=_ACCESS_TOKEN)

    def _to_caller(
        self, api_key: _ApiKey | None, code: str | None, form: Mapping[str, str]
    ) -> http.Answer:
        """RFC 6749 §4.4.3, and §5.2 if there is a code."""
        if api_key is None or code is not None:
            is_known = code in ("org_suspended", "quota_exceeded")
            error = "unauthorized_client" if is_known else "invalid_client"
            return _refusal(code or "api_key_unknown", error=error)
        if api_key.is_connector:
            return _refusal("connector_only_in_query", error="invalid_client")
        audience = form.get("resource") or form.get("audience")
        if audience not in (None, api_key.terms["audience"] or self.audience):
            return _refusal("invalid_target", error="invalid_target")
        terms, asked = api_key.terms, form.get("scope")
        if asked:
            held = terms["scopes"]
            granted = Scopes.parse(held) if isinstance(held, str) else Scopes.of(held)
            if granted.missing(Scopes.parse(asked)):
                return _refusal("insufficient_scope", error="invalid_scope")
            terms = {**terms, "scopes": asked}
        return self._issued(terms)

    def _issued(self, terms: dict[str, Any], **further: str) -> http.Answer:
        scopes = terms["scopes"]
        answer = {
            "access_token": self.token(**terms),
            "token_type": "Bearer",
            "expires_in": terms.get("lifetime", TOKEN_LIFETIME),
            "scope": scopes if isinstance(scopes, str) else " ".join(scopes),
            **further,
        }
        return http.Answer(200, {}, _to_json(answer).encode())

    def _feed(self, after: int, wait_s: float) -> bytes:
        with self._changed:
            moves = self._moves
            self._changed.wait_for(
                lambda: self._seq > after or self._moves != moves, min(wait_s, FEED_WAIT_MAX)
            )
            self._require_up()
            now = self.now()
            told: dict[str, object] = {
                "iss": self.issuer,
                "aud": self._feed_url,
                "iat": now - (FEED_STALE + LEEWAY_MAX + 1 if self._is_stale else 0),
                "exp": now + FEED_STALE,
                "log": self._log,
                "seq": self._seq,
                "entries": dict(self._entries),
                "kids": [one.kid for one in (*self._signing_keys, _signing_key("feed"))],
            }
        return self._sign(feed_profile.TYPE, _signing_key("feed"), told, {}).encode()

    def _require_up(self) -> None:
        if self._is_away or self._interruptions:
            raise http.FetchFailed("ConnectError")

    def _sign(
        self,
        typ: str,
        signing_key: _SigningKey,
        claims: Mapping[str, object],
        header: Mapping[str, object],
    ) -> str:
        members = {"typ": typ, "alg": "ES256", "kid": signing_key.kid, **header}
        signing_input = b".".join(map(_part, (members, claims)))
        signature = _ES256.sign(signing_input, signing_key.private)
        return b".".join((signing_input, base64url.encode(signature))).decode()

    def _known(self, api_key: str) -> _ApiKey:
        try:
            return self._api_keys[apikey.digest(api_key)]
        except KeyError:
            raise _not_ours() from None

    # How it reaches verifiers.

    def _tell(self, *narrowed: str) -> None:
        """Add to the feed, and wait until every verifier that has asked for it has read it."""
        with self._changed:
            self._seq += 1
            seq = self._seq
            self._entries |= {feed_profile.subject(subject): seq for subject in narrowed}
            if len(self._entries) > _MOST_ENTRIES:
                # As the service does when its feed grows too long: everything so far is dead.
                self._entries = {feed_profile.subject(feed_profile.EVERYTHING): seq}
            self._move()
            if not self._installs or self._is_away:
                return
        for verifier in over_http_of(self.issuer):
            if not verifier.catch_up(seq):
                raise RuntimeError(
                    "a verifier of this process does not follow this issuer's feed: its status()"
                    " tells why; a clock that was set back, or stopped, must be the issuer's too"
                )

    def _move(self) -> None:
        """Answer the polls that wait.  The lock is held."""
        self._moves += 1
        self._changed.notify_all()

    @contextmanager
    def _interrupted(self) -> Iterator[None]:
        """Answer nobody for a moment, so that no thread of a verifier waits here."""
        with self._changed:
            self._interruptions += 1
            self._move()
        try:
            yield
        finally:
            with self._changed:
                self._interruptions -= 1

    def _let_verifiers(self, do: Callable[[Verifier], None]) -> None:
        if self._installs:
            for verifier in over_http_of(self.issuer):
                do(verifier)

    def _let_verifiers_forget(self, wait_s: float = 0) -> None:
        self._let_verifiers(lambda verifier: verifier.forget(wait_s=wait_s))

    def _renew_locks(self) -> None:
        self._changed = threading.Condition(threading.Lock())


def _warm(verifier: Verifier) -> None:
    # One that cannot follow this issuer, for its clock, will say so when it is asked.
    with suppress(errors.IssuerUnavailable):
        verifier.warm()


def _part(members: Mapping[str, object]) -> bytes:
    told = {name: value for name, value in members.items() if value is not None}
    return base64url.encode(_to_json(told).encode())


def _kept(texts: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if texts is None else tuple(texts)


def _not_ours() -> ValueError:
    # The text may be somebody's API key.
    return ValueError("no API key of this issuer: make one with issuer.api_key()")


@lru_cache(maxsize=8)
def _service_key(environment: str) -> str:
    return apikey.make(apikey.prefix_for("ck", environment))


def _refusal(
    code: str,
    status: int = 400,
    error: str = "invalid_request",
    headers: Mapping[str, str] | None = None,
) -> http.Answer:
    kind = errors.WrongAudience if code == "invalid_target" else errors.ERRORS[code]
    body = {"error": error, "error_description": kind.text, "code": code}
    return http.Answer(status, headers or {}, _to_json(body).encode())


_EVERY_ISSUER: "weakref.WeakSet[FakeIssuer]" = weakref.WeakSet()


def _renew_every() -> None:
    for issuer in list(_EVERY_ISSUER):
        # In the child: a thread of the parent may have held it.
        issuer._renew_locks()  # noqa: SLF001
    FakeIssuer.installing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_every)
