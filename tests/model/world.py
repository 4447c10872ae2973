"""A deployment, its resource servers, and what is true of both, for the model in `test_core`.

The service's parts are the real ones: store, ring, feed, issuer, follower, checks.  Beside them
`World` keeps its own book of what was done and when, and never asks them what is true.

Moments are sequence numbers of the change log as the operator's own connection sees it: they
only ever go up, and what a token or a feed claims about itself is never believed.
"""

import copy
import json
import shutil
import sqlite3
import tempfile
from base64 import urlsafe_b64decode
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from starlette.requests import Request

from coatcheck import apikey, base62, feed_profile
from coatcheck.durations import FEED_WINDOW, TOKEN_LIFETIME
from coatcheck.restrictions import Refusal, Situation
from coatcheck.server import sealing, signing
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import EVERYTHING, Change, What
from coatcheck.server.feed import Feed
from coatcheck.server.issue.exchange import Asked, Issuer
from coatcheck.server.issue.mint import Issued
from coatcheck.server.manage import api_keys
from coatcheck.server.oauth.metadata import CoatcheckEndpoint
from coatcheck.server.sealing import SealingKeys
from coatcheck.server.signing import NoSigner, Purpose, RingKeeper
from coatcheck.server.store import ApiKeyRecord, Found
from coatcheck.server.store.sqlite import SqliteStore
from coatcheck.verifier import check, keyset
from coatcheck.verifier.changes import Changes, ChangesStatus, Known, check_vouched
from coatcheck.verifier.check import SignedClaims
from coatcheck.verifier.errors import IssuerUnavailable, VerifierError
from support.deployment import AUDIENCE, ISSUER, TESTER, Clock, Deployment, a_deployment

FEED_URL: Final = f"{ISSUER}/oauth/revocations"
DOCUMENT_URL: Final = f"{ISSUER}/.well-known/coatcheck"
#: How far a restored change log jumps (contract: "jumps `seq` by 2^32").
RESTORE_JUMP: Final = 2**32
#: A rotation with a shorter overlap may end the tokens that were issued before it.
MAY_END_TOKENS: Final = TOKEN_LIFETIME + 60
_Result = TypeVar("_Result")
_ONE_HTTP_REQUEST: Final = Request({"type": "http"})


# --- the parts that the model drives


class PausingStore(SqliteStore):
    """The store of a node, between whose reads somebody else may commit."""

    def __init__(self, database_url: str) -> None:
        super().__init__(database_url)
        self._reads_left = 0
        self._meanwhile: Callable[[], None] | None = None

    def meanwhile(self, reads_left: int, act: Callable[[], None] | None) -> None:
        """Do something at the pause after so many others; None: nothing any more."""
        self._reads_left, self._meanwhile = reads_left, act

    def pause(self) -> None:
        act = self._meanwhile
        if act is not None and self._reads_left == 0:
            self._meanwhile = None
            act()
        self._reads_left -= 1

    def head(self) -> int:
        self.pause()
        head = super().head()
        self.pause()
        return head

    def narrowings(self, after: int, since: int) -> list[Any]:
        self.pause()
        return super().narrowings(after, since)

    def signing_keys(self) -> list[Any]:
        self.pause()
        return super().signing_keys()


class SignsFeeds(Protocol):
    def get(self, after: int, wait_s: float) -> Coroutine[Any, Any, bytes]: ...


class Issues(Protocol):
    def recognize(
        self, found: Found, digest: bytes, client_id: str | None, now: int
    ) -> ApiKeyRecord: ...

    def issue(self, record: ApiKeyRecord, asked: Asked, *, now: int, as_of: int) -> Issued: ...


class Follows(Protocol):
    def step(self) -> object: ...
    def wait_for_first(self) -> Known: ...
    def status(self) -> ChangesStatus: ...


Fetch = Callable[[str], bytes]
Tell = Callable[[], float]


def follow(fetch: Fetch, clock: Tell, monotonic: Tell) -> Follows:
    """The verifier's own follower, without its thread: the model takes each step itself."""
    changes = Changes(
        ISSUER, DOCUMENT_URL, fetch, clock=clock, monotonic=monotonic, first_load_timeout_s=0
    )
    changes.close()
    return changes


@dataclass(frozen=True)
class Parts:
    """What a world is made of: the product's own parts, unless a test breaks one on purpose."""

    store: Callable[[str], PausingStore] = PausingStore
    feed: Callable[[str, PausingStore, RingKeeper, Tell], SignsFeeds] = Feed
    issuer: Callable[[str, Catalog, RingKeeper, int], Issues] = Issuer
    follow: Callable[[Fetch, Tell, Tell], Follows] = follow
    check: Callable[[SignedClaims, Known], None] = check_vouched


# --- what is true


@dataclass(eq=False)
class Secret:
    """A secret of an API key.  `ends_at` was set at the moment `ended`."""

    text: str
    ends_at: int | None = None
    ended: int = 0


@dataclass(eq=False)
class ApiKey:
    """An API key.  `dead_since`: the moment it was disabled or revoked; None while it is not."""

    id: str
    expires_at: int | None
    secrets: list[Secret]
    dead_since: int | None = None
    is_revoked: bool = False

    def is_good(self, secret: Secret, now: int) -> bool:
        ends = [end for end in (self.expires_at, secret.ends_at) if end is not None]
        return self.dead_since is None and all(now < end for end in ends)


@dataclass(frozen=True)
class Narrowed:
    """Something became narrower at a moment.

    Attributes:
        at: seconds since the epoch, of the commit.
        kills: whether tokens from before must die; else they may.
    """

    moment: int
    at: float
    subject: str
    wider: str = EVERYTHING
    what: Literal["token", "api_key", "other"] = "other"
    kills: bool = True


@dataclass(frozen=True, eq=False)
class Token:
    """A token, and the moments before it was asked for and after it was signed."""

    api_key: ApiKey
    secret: Secret
    signed: SignedClaims
    began: int
    minted: int

    @property
    def kid(self) -> str:
        return self.signed.signing_key.kid

    @property
    def jti(self) -> str:
        return str(self.signed.claims["jti"])

    @property
    def issued_at(self) -> int:
        return int(self.signed.claims["iat"])

    @property
    def subjects(self) -> tuple[str, ...]:
        return (self.api_key.id, str(self.signed.claims["org_id"]), self.kid, self.jti, EVERYTHING)


@dataclass(frozen=True)
class SignedFeed:
    """A feed, and the moment before it was begun."""

    text: bytes
    began: int

    @property
    def entries(self) -> dict[str, int]:
        payload = self.text.split(b".")[1]
        claims = json.loads(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
        entries: dict[str, int] = claims["entries"]
        return entries


@dataclass
class Verifier:
    """A resource server with a clock of its own.

    Attributes:
        told: the latest moment before which a feed was begun that it has merged; -1: none.
        heard: what those feeds said, and when each first said it, by this verifier's clock.
        seqs: the sequence numbers that it knew, one after the other.
    """

    skew_s: int
    expected: check.Expected
    follower: Follows
    mail: list[bytes] = field(default_factory=list)
    told: int = -1
    heard: dict[str, tuple[int, float]] = field(default_factory=dict)
    seqs: list[int] = field(default_factory=list)

    @property
    def known(self) -> Known | None:
        """What a request is held against; None: it is answered 503."""
        try:
            return self.follower.wait_for_first()
        except VerifierError:
            return None


@dataclass(frozen=True)
class Node:
    """A process of the service."""

    store: PausingStore
    ring: RingKeeper
    feed: SignsFeeds
    issuer: Issues
    document: CoatcheckEndpoint


@dataclass(frozen=True)
class Backup:
    """A copy of the database, and what was true when it was taken."""

    file: Path
    api_keys: list[ApiKey]
    withdrawn: dict[str, int]


#: The place of a pause, counted in reads, and the name of what happens there.
Meanwhile = tuple[int, str] | None


class World:
    """Everything at once."""

    def __init__(self, parts: Parts, skews: Sequence[int] = ()) -> None:
        template = _template()
        self.parts = parts
        self.clock = Clock()
        self._folder = tempfile.TemporaryDirectory(prefix="coatcheck-model-")
        self._file = Path(self._folder.name) / "coatcheck.db"
        shutil.copy(template.file, self._file)
        self._sealing_keys = template.sealing_keys
        self.store = SqliteStore(f"sqlite:///{self._file}")
        self._deployment = replace(template.deployment, store=self.store, clock=self.clock)
        self.organization_id = self._deployment.organization_id
        self.nodes = [self._node(parts.store(f"sqlite:///{self._file}")) for _ in range(2)]
        self.api_keys: list[ApiKey] = []
        self.tokens: list[Token] = []
        self.feeds: list[SignedFeed] = []
        self.narrowed: list[Narrowed] = []
        self.narrowed_by_subject: dict[str, list[Narrowed]] = defaultdict(list)
        self.coarse: set[tuple[str, int]] = set()
        self.withdrawn: dict[str, int] = {}
        self.backup: Backup | None = None
        self.restores = 0
        self.verifiers = [self._verifier(skew_s) for skew_s in skews]
        self.create()

    def close(self) -> None:
        self._close()
        self._folder.cleanup()

    def _close(self) -> None:
        for store in (self.store, *(node.store for node in self.nodes)):
            store.close()

    def _node(self, store: PausingStore) -> Node:
        """A process that has just started; a store that was closed is as good as a new one."""
        ring = RingKeeper(store, self._sealing_keys)
        return Node(
            store=store,
            ring=ring,
            feed=self.parts.feed(ISSUER, store, ring, self.clock),
            issuer=self.parts.issuer(ISSUER, self._deployment.catalog, ring, TOKEN_LIFETIME),
            document=CoatcheckEndpoint(
                ISSUER, self._deployment.catalog, FEED_URL, ring, store, self.clock
            ),
        )

    def restart(self, which: int) -> None:
        store = self.nodes[which].store
        store.close()
        self.nodes[which] = self._node(store)

    @property
    def now(self) -> int:
        return int(self.clock.now)

    @property
    def living_api_keys(self) -> list[ApiKey]:
        return [api_key for api_key in self.api_keys if api_key.dead_since is None]

    def moment(self) -> int:
        return self.store.head()

    # --- what operators and owners do; `waited_s` passed between its clock and its commit

    def create(self, expires_in_s: int | None = None) -> ApiKey:
        expires_at = None if expires_in_s is None else self.now + expires_in_s
        made = self._deployment.api_key(expires_at=expires_at)
        api_key = ApiKey(made.api_key.id, expires_at, [Secret(made.key)])
        self.api_keys.append(api_key)
        return api_key

    def disable(self, api_key: ApiKey, waited_s: int = 0) -> None:
        if api_key.dead_since is None:
            api_keys.disable(self.store, api_key.id, TESTER, now=self.now - waited_s)
            api_key.dead_since = self._note_api_key(api_key)

    def enable(self, api_key: ApiKey) -> None:
        if not api_key.is_revoked:
            api_keys.enable(self.store, api_key.id, TESTER, now=self.now)
            api_key.dead_since = None

    def blink(self, api_key: ApiKey) -> None:
        """Disable and enable within one second: tokens from before are dead all the same."""
        self.disable(api_key)
        self.enable(api_key)

    def revoke(self, api_key: ApiKey, waited_s: int = 0) -> None:
        if not api_key.is_revoked:
            api_keys.revoke(self.store, api_key.id, TESTER, now=self.now - waited_s)
            api_key.is_revoked, api_key.dead_since = True, self._note_api_key(api_key)

    def rotate(self, api_key: ApiKey, overlap_s: int, waited_s: int = 0) -> None:
        now = self.now - waited_s
        if api_key.is_revoked or (api_key.expires_at is not None and api_key.expires_at <= now):
            return
        made = api_keys.rotate(self.store, api_key.id, TESTER, overlap_s=overlap_s, now=now)
        moment = self.moment()
        ends_tokens = overlap_s < MAY_END_TOKENS
        for secret in api_key.secrets:
            if secret.ends_at is None:
                secret.ends_at, secret.ended = now + overlap_s, moment
            elif secret.ends_at > now:
                secret.ends_at, secret.ended = now, moment
                ends_tokens = True
        api_key.secrets.append(Secret(made.key))
        if ends_tokens:
            self._note_api_key(api_key, kills=False)

    def end_tokens(self, tokens: Sequence[Token], waited_s: int = 0) -> None:
        """As POST /oauth/revoke writes it, in one transaction for all of them."""
        fresh = [token for token in tokens if token.jti not in self.narrowed_by_subject]
        with self.store.transaction() as tx:
            tx.append(
                Change(
                    What.TOKEN_REVOKED,
                    token.jti,
                    TESTER,
                    self.now - waited_s,
                    self.organization_id,
                    wider=token.api_key.id,
                )
                for token in fresh
            )
        moment = self.moment()
        for token in fresh:
            self._note(Narrowed(moment, self.clock.now, token.jti, token.api_key.id, "token"))

    def revoke_strangers(self, count: int) -> None:
        """So many other API keys of the organization are revoked; nobody has their tokens."""
        with self.store.transaction() as tx:
            strangers = [f"key_{base62.random_text(22)}" for _ in range(count)]
            tx.append(
                Change(
                    What.API_KEY_REVOKED,
                    stranger,
                    TESTER,
                    self.now,
                    self.organization_id,
                    wider=self.organization_id,
                )
                for stranger in strangers
            )
        moment = self.moment()
        for stranger in strangers:
            self._note(Narrowed(moment, self.clock.now, stranger, self.organization_id, "api_key"))

    def rotate_signing_key(self, purpose: Purpose, *, at_once: bool, waited_s: int = 0) -> None:
        try:
            signing.rotate(
                self.store,
                self._sealing_keys.newest(),
                "ES256",
                TESTER,
                now=self.now - waited_s,
                at_once=at_once,
                purpose=purpose,
            )
        except signing.SigningKeyConflict:
            return

    def withdraw_signing_key(self, purpose: Purpose, which: int) -> None:
        """Withdraw one that is left, the oldest first; the last one that can sign stays."""
        left = [
            record.kid
            for record in self.store.signing_keys()
            if record.purpose == purpose and record.kid not in self.withdrawn
        ]
        kid = left[which % len(left)]
        try:
            signing.withdraw(self.store, kid, TESTER, now=self.now)
        except signing.SigningKeyConflict:
            return
        self.withdrawn[kid] = self.moment()
        self._note(Narrowed(self.moment(), self.clock.now, kid))

    def replace_signing_key(self, purpose: Purpose) -> None:
        """What one does when it leaked: a successor at once, and the old one is no more."""
        self.rotate_signing_key(purpose, at_once=True)
        self.withdraw_signing_key(purpose, 0)

    def act(self, name: str, api_key: ApiKey) -> None:
        """What may happen while somebody else is in the middle of something."""
        acts: dict[str, Callable[[], None]] = {
            "disable": lambda: self.disable(api_key),
            "blink": lambda: self.blink(api_key),
            "revoke": lambda: self.revoke(api_key),
            "rotate without overlap": lambda: self.rotate(api_key, 0),
            "rotate with overlap": lambda: self.rotate(api_key, TOKEN_LIFETIME),
            "replace the signing key": lambda: self.replace_signing_key("token"),
            "replace the feed key": lambda: self.replace_signing_key("feed"),
            "enable": lambda: self.enable(api_key),
        }
        acts[name]()

    def _note_api_key(self, api_key: ApiKey, *, kills: bool = True) -> int:
        moment = self.moment()
        self._note(
            Narrowed(moment, self.clock.now, api_key.id, self.organization_id, "api_key", kills)
        )
        return moment

    def _note(self, narrowed: Narrowed) -> None:
        self.narrowed.append(narrowed)
        self.narrowed_by_subject[narrowed.subject].append(narrowed)

    def narrowings_of(self, token: Token) -> Iterator[Narrowed]:
        for subject in token.subjects:
            yield from self.narrowed_by_subject.get(subject, ())

    # --- backup and restore

    def take_backup(self) -> None:
        file = self._file.with_name("backup.db")
        file.unlink(missing_ok=True)
        with closing(sqlite3.connect(self._file)) as source, closing(sqlite3.connect(file)) as to:
            source.backup(to)
        self.backup = Backup(file, copy.deepcopy(self.api_keys), dict(self.withdrawn))

    def restore(self) -> None:
        """As the contract says; there is no command for it yet, so the model writes the rows.

        What was done since the backup is undone; no token from before the restore is good.
        """
        assert self.backup is not None
        self._close()
        for suffix in ("-wal", "-shm"):
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)
        self._file.unlink()
        shutil.copy(self.backup.file, self._file)
        with closing(sqlite3.connect(self._file)) as database, database:
            database.execute("UPDATE deployment SET log = ?", (base62.random_text(22),))
            database.execute(
                "INSERT INTO changes (seq, change_id, at, what, subject, wider, narrows, actor,"
                " detail) SELECT max(seq) + ?, ?, ?, 'deployment.restored', '*', '*', 1, 'cli',"
                " '{}'"
                " FROM changes",
                (RESTORE_JUMP, base62.random_text(22), self.now),
            )
        self.nodes = [self._node(node.store) for node in self.nodes]
        self.api_keys, self.withdrawn = self.backup.api_keys, self.backup.withdrawn
        # Restored a second time it would jump to where the verifiers are already.
        self.backup = None
        self.restores += 1
        self._note(Narrowed(self.moment(), self.clock.now, EVERYTHING))

    # --- what callers do

    def issue(
        self,
        node: Node,
        api_key: ApiKey,
        secret: Secret,
        *,
        slow_s: int = 0,
        meanwhile: Meanwhile = None,
    ) -> Token | None:
        """A token request, in the order of `TokenEndpoint`; None: it was refused.

        Args:
            slow_s: passes between the clock being read and the look-up.
        """
        began = self.moment()
        now = self.now
        is_good = api_key.is_good(secret, now)
        self.clock.now += slow_s
        self._plan(node, meanwhile, api_key)
        try:
            found = done(node.store.find((apikey.digest(secret.text),)))
            node.store.pause()
            record = node.issuer.recognize(found, apikey.digest(secret.text), None, now)
            issued = node.issuer.issue(record, Asked(), now=now, as_of=found.as_of)
        except (Refusal, NoSigner):
            assert meanwhile is not None or not is_good, "a good API key was refused"
            return None
        finally:
            node.store.meanwhile(0, None)
        token = self._read(node, issued.token.decode(), api_key, secret, began)
        self.tokens.append(token)
        return token

    def _read(self, node: Node, text: str, api_key: ApiKey, secret: Secret, began: int) -> Token:
        def find(kid: str) -> check.SigningKey:
            signing_key = node.ring.last_known.get(kid)
            assert signing_key is not None
            return _public(json.dumps(signing_key.public_jwk))

        signed = check.check_signed(text, _expected(0), find)
        return Token(api_key, secret, signed, began, self.moment())

    def sign_feed(self, node: Node, *, meanwhile: Meanwhile = None) -> SignedFeed:
        """The feed as a node hands it out now."""
        began = self.moment()
        self._note_coarsening()
        self._plan(node, meanwhile, self.api_keys[-1])
        try:
            text = done(node.feed.get(-1, 0))
        finally:
            node.store.meanwhile(0, None)
        self._note_coarsening()
        feed = SignedFeed(text, began)
        self.feeds.append(feed)
        return feed

    def _plan(self, node: Node, meanwhile: Meanwhile, api_key: ApiKey) -> None:
        if meanwhile is not None:
            place, name = meanwhile
            node.store.meanwhile(place, lambda: self.act(name, api_key))

    def _note_coarsening(self) -> None:
        """Which wider subjects a feed that is signed now may name, by the documented limits."""
        tokens: dict[str, dict[str, int]] = defaultdict(dict)
        keys: dict[str, dict[str, int]] = defaultdict(dict)
        for narrowed in reversed(self.narrowed):
            # A second more: the row holds whole seconds.
            if narrowed.at < self.clock.now - FEED_WINDOW - 1:
                break
            if narrowed.what == "other":
                continue
            group = tokens if narrowed.what == "token" else keys
            group[narrowed.wider].setdefault(narrowed.subject, narrowed.moment)
        limits = ((tokens, feed_profile.MOST_TOKENS), (keys, feed_profile.MOST_API_KEYS))
        self.coarse |= {
            (wider, max(members.values()))
            for groups, most in limits
            for wider, members in groups.items()
            if len(members) > most
        }

    # --- what resource servers do

    def _verifier(self, skew_s: int) -> Verifier:
        mail: list[bytes] = []

        def fetch(url: str) -> bytes:
            if url == DOCUMENT_URL:
                return bytes(done(self.nodes[0].document(_ONE_HTTP_REQUEST)).body)
            return mail[-1]

        follower = self.parts.follow(fetch, lambda: self.clock.now + skew_s, lambda: self.clock.now)
        leeway_s = 30 if skew_s <= 0 else 60
        return Verifier(skew_s, _expected(leeway_s), follower, mail)

    def start_cold(self, which: int) -> None:
        """A resource server starts again and knows nothing."""
        self.verifiers[which] = self._verifier(self.verifiers[which].skew_s)

    def deliver(self, feed: SignedFeed, verifier: Verifier) -> str | None:
        """Let a verifier poll, and get this feed.  Returns why it was refused, if it was."""
        verifier.mail.append(feed.text)
        verifier.follower.step()
        if verifier.follower.status().last_error is not None:
            # It reads the issuer's document again before its next try.
            verifier.follower.step()
        error = verifier.follower.status().last_error
        if error is None:
            verifier.told = max(verifier.told, feed.began)
            now = self.clock.now
            for subject, seq in feed.entries.items():
                before, heard_at = verifier.heard.get(subject, (-1, now))
                if seq > before or now - heard_at >= FEED_WINDOW:
                    verifier.heard[subject] = (seq, now)
        known = verifier.known
        if known is not None:
            verifier.seqs.append(known.seq)
        return error

    def refusal(
        self, verifier: Verifier, token: Token, known: Known | None
    ) -> VerifierError | None:
        """Why a verifier that knows this refuses a token now; None: it does not."""
        if known is None:
            return IssuerUnavailable(1)
        try:
            now = self.clock.now + verifier.skew_s
            check.check_use(token.signed, verifier.expected, now, Situation())
            self.parts.check(token.signed, known)
        except VerifierError as error:
            return error
        return None

    def forget_expired(self) -> None:
        """Tokens that no clock and no leeway brings back need no looking at any more."""
        self.tokens = [
            token for token in self.tokens if self.clock.now < token.signed.expires_at + 100
        ]


# --- helpers


def done(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
    coroutine.close()
    raise AssertionError("it waits")


def _expected(leeway_s: int) -> check.Expected:
    return check.Expected(
        issuer=ISSUER,
        audiences=(AUDIENCE,),
        types=frozenset(("at+jwt",)),
        algorithms=frozenset(("ES256",)),
        leeway_s=leeway_s,
    )


@lru_cache
def _public(jwk: str) -> check.SigningKey:
    """A verifier that caches the key set for as long as it can knows every signing key."""
    (signing_key,) = keyset.parse_object({"keys": [json.loads(jwk)]}).values()
    return signing_key


@dataclass(frozen=True)
class _Template:
    file: Path
    deployment: Deployment
    sealing_keys: SealingKeys


@cache
def _template() -> _Template:
    """A database that was set up once and is copied for every world."""
    folder = Path(tempfile.mkdtemp(prefix="coatcheck-model-"))
    with a_deployment(folder) as deployment:
        sealing_keys = sealing.load(deployment.settings.keys_dir)
        made = _Template(folder / "coatcheck.db", deployment, sealing_keys)
    # To open its private half takes longer than all the rest of a world.
    with closing(sqlite3.connect(made.file)) as database, database:
        database.execute("DELETE FROM signing_keys WHERE algorithm = 'RS256'")
    return made
