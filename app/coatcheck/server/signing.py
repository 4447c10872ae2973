"""The ring: which signing key signs, which are published, from the clock alone.

A signing key signs tokens or the revocation feed, never both, so that neither can be taken for
the other.  It is published from its creation, signs from `starts_at` until a successor of its
algorithm has started, and leaves the key set PUBLISH_AFTER later.  A withdrawn one neither signs
nor is published, for ever.  Nothing is stored but the two times, so that every node agrees
without being told.

Private halves lie sealed in the database and are opened once per process.

Whoever changes the ring holds it: two changes at once come one after the other, and the second
looks at what the first has left.  Should two get through all the same, the database refuses the
second, because the place of a signing key in the order is unique.

Source: RFC 7517 (JWK), RFC 7638 (thumbprint as `kid`), RFC 7518 §3.4, RFC 8725 §3.5.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Final, Literal, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from coatcheck import base64url
from coatcheck.durations import Publication
from coatcheck.feed_profile import TYPE as FEED_TYPE
from coatcheck.server import keyfile
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.keyfile import KeyPair, UnfitKey
from coatcheck.server.sealing import BadSealingKey, SealingKey, SealingKeys
from coatcheck.server.store import SigningKeyRecord, Store, Taken, Transaction
from coatcheck.server.store.tables import SigningKey as SigningKeyRow
from coatcheck.token_profile import MAX_HEADER_AND_SIGNATURE, Algorithm
from coatcheck.verifier import keyset

_log = logging.getLogger(__name__)

_RSA_BITS: Final = 2048
_RSA_EXPONENT: Final = 65537

Purpose = Literal["token", "feed"]

#: What signs the revocation feed.  Only our own verifier reads it, so there is one choice.
FEED_ALGORITHM: Final[Algorithm] = "ES256"

#: How a private half is made; the algorithms that `rotate` knows.
GENERATE: Final[Mapping[Algorithm, Callable[[], Any]]] = {
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RS256": lambda: rsa.generate_private_key(_RSA_EXPONENT, _RSA_BITS),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}

#: How long signing keys of a deployment are published; only tests have another.
_USUAL: Final = Publication()

#: In the change-log row of a new signing key: when exactly it was made, where that is known.
MADE_AT_MS: Final = "madeAtMs"

#: "Whichever is the newest": a successor of which nobody said what it succeeds.
ANY: Final = "*"

#: A `kid` that somebody else gave: it goes into headers, feeds, log lines and command lines.
_KID: Final = re.compile(r"[A-Za-z0-9_=+/.:~-]{1,128}")

#: What the self-test signs.
_PROBE: Final = b"coatcheck self-test"

#: Takes a message, returns its signature in the form of JWS.
Sign = Callable[[bytes], bytes]


def _es256(private: ec.EllipticCurvePrivateKey) -> Sign:
    """RFC 7518 §3.4: R and S, 32 octets each."""
    ecdsa = ec.ECDSA(hashes.SHA256())

    def sign(message: bytes) -> bytes:
        r, s = decode_dss_signature(private.sign(message, ecdsa))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def _rs256(private: rsa.RSAPrivateKey) -> Sign:
    """RFC 7518 §3.3."""
    return partial(private.sign, padding=padding.PKCS1v15(), algorithm=hashes.SHA256())


#: How a private half signs.  PyJWT makes the same signatures, ES256 a quarter slower; it is the
#: oracle in the tests.
_SIGN: Final[Mapping[Algorithm, Callable[[Any], Sign]]] = {
    "ES256": _es256,
    "RS256": _rs256,
    "EdDSA": lambda private: private.sign,  # RFC 8037 §3.1: as it comes
}

#: Each has its own succession of signing keys.
LINES: Final[tuple[tuple[Purpose, Algorithm], ...]] = (
    *(("token", algorithm) for algorithm in GENERATE),
    ("feed", FEED_ALGORITHM),
)


#: RFC 9068 §2.1 wants RS256 supported, so it is published before anybody needs it.
_ALWAYS_PUBLISHED: Final[frozenset[Algorithm]] = frozenset(("ES256", "RS256"))

Line = tuple[Purpose, Algorithm]


class NoSigner(Exception):
    """No signing key of this algorithm may sign now.  The caller is told 503."""


class SigningKeyConflict(Exception):
    """The ring does not allow this change now.  The message says what to do instead."""


class UnknownSigningKey(LookupError):
    """There is no signing key of this `kid`."""


class BadSigningKey(ValueError):
    """A signing key of the ring is not what it says.  The message says how to go on."""


@dataclass(frozen=True, slots=True)
class Signer:
    """A signing key that may sign, with everything that is the same for all of its tokens."""

    kid: str
    algorithm: Algorithm
    header_segments: Mapping[str, bytes]
    """The JOSE header, base64url-encoded, by `typ`.  A signing key for feeds has no token's."""
    _sign: Sign = field(repr=False)

    def sign(self, typ: str, payload: bytes) -> bytes:
        """A JWS in compact serialization.  Source: RFC 7515 §5.1.

        The header was serialized once per signing key; only the payload is new.
        """
        signing_input = b"%b.%b" % (self.header_segments[typ], base64url.encode(payload))
        return b"%b.%b" % (signing_input, base64url.encode(self._sign(signing_input)))


@dataclass(frozen=True)
class SigningKey:
    """A signing key as this process holds it.

    Attributes:
        private: None when no sealing key here opens it, or it does not fit the public half.
        fault: why there is no private half; None while there is one.
        ends_at: when its successor starts; None while there is none.  Seconds since the epoch,
            as the other times.
    """

    kid: str
    purpose: Purpose
    algorithm: Algorithm
    public_jwk: Mapping[str, str]
    created_at: int
    starts_at: int
    withdrawn_at: int | None
    ends_at: int | None
    private: Any = field(repr=False)
    fault: Exception | None = None
    publish_after: int = _USUAL.after

    @property
    def line(self) -> Line:
        """The succession that it belongs to."""
        return self.purpose, self.algorithm

    def signs(self, now: int) -> bool:
        return (
            self.private is not None
            and self.withdrawn_at is None
            and self.starts_at <= now
            and (self.ends_at is None or now < self.ends_at)
        )

    def is_published(self, now: int) -> bool:
        return self.withdrawn_at is None and (
            self.ends_at is None or now < self.ends_at + self.publish_after
        )

    def state(self, now: int) -> str:
        """In one word, for people: pending, signing, retiring, retired or withdrawn."""
        if self.withdrawn_at is not None:
            return "withdrawn"
        if now < self.starts_at:
            return "pending"
        if self.signs(now):
            return "signing"
        return "retiring" if self.is_published(now) else "retired"

    @cached_property
    def signer(self) -> Signer:
        types = ("at+jwt", "JWT") if self.purpose == "token" else (FEED_TYPE,)
        return Signer(
            kid=self.kid,
            algorithm=self.algorithm,
            header_segments={typ: self._header_segment(typ) for typ in types},
            _sign=_SIGN[self.algorithm](self.private),
        )

    def _header_segment(self, typ: str) -> bytes:
        header = {"alg": self.algorithm, "kid": self.kid, "typ": typ}
        return base64url.encode(json.dumps(header, separators=(",", ":")).encode())


class Ring:
    """All signing keys of a deployment, as of one reading of the store."""

    def __init__(self, signing_keys: Iterable[SigningKey]) -> None:
        self.signing_keys = tuple(signing_keys)
        self._by_kid = {signing_key.kid: signing_key for signing_key in self.signing_keys}
        #: Who signed last in each line: almost always whoever signs next.
        self._signed_last: dict[Line, SigningKey] = {}

    @classmethod
    def read(
        cls,
        records: Iterable[SigningKeyRecord],
        sealing_keys: SealingKeys,
        known: "Ring",
        publication: Publication = _USUAL,
    ) -> "Ring":
        """The ring that these records describe.

        A private half that does not open, or does not sign what the public one verifies, leaves
        a signing key that is published and does not sign: what the others may do must not hang
        on it.  `require_open` tells.

        Args:
            known: an earlier ring; private halves that it has opened are not opened again.
        """
        records = list(records)
        ends_at = _ends(records)
        signing_keys = []
        for record in records:
            before = known.get(record.kid)
            private, fault = (before.private, before.fault) if before else (None, None)
            if private is None:
                was_told = fault
                private, fault = _open(record, sealing_keys)
                if fault is not None and str(fault) != str(was_told):
                    _log.error("signing key %s does not sign here: %s", record.kid, fault)
            signing_keys.append(
                SigningKey(
                    kid=record.kid,
                    purpose=cast(Purpose, record.purpose),
                    algorithm=cast(Algorithm, record.algorithm),
                    public_jwk=json.loads(record.public_jwk),
                    created_at=record.created_at,
                    starts_at=record.starts_at,
                    withdrawn_at=record.withdrawn_at,
                    ends_at=ends_at.get(record.kid),
                    private=private,
                    fault=fault,
                    publish_after=publication.after,
                )
            )
        return cls(signing_keys)

    def get(self, kid: str) -> SigningKey | None:
        return self._by_kid.get(kid)

    def require_open(self) -> None:
        """Raises BadSealingKey or BadSigningKey if any that was not withdrawn did not open."""
        for signing_key in self.signing_keys:
            if signing_key.private is not None or signing_key.withdrawn_at is not None:
                continue
            if isinstance(signing_key.fault, BadSigningKey):
                raise signing_key.fault
            raise BadSealingKey(
                f"signing key {signing_key.kid} does not open with the sealing keys in"
                " COATCHECK_KEYS_DIR: put the deployment's own sealing-*.key there"
                + (f" ({signing_key.fault})" if signing_key.fault else "")
            )

    def newest(self, line: Line) -> str | None:
        """The `kid` of the one that was made last in this line; None: there is none."""
        kids = [signing_key.kid for signing_key in self.signing_keys if signing_key.line == line]
        return kids[-1] if kids else None

    def due(self, line: Line, every_s: int, ahead_s: int, now: int) -> SigningKey | None:
        """The signing key of this line whose successor is to be published now.

        One whose line waits for a successor already is not due.  Neither is a line in which
        nothing signs: that was an operator's decision, and stays one.

        Args:
            every_s: how long a signing key signs; 0: as long as nobody says otherwise.
            ahead_s: how long before it signs the successor is published.
        """
        members = [one for one in self.signing_keys if one.line == line]
        if not every_s or any(one.withdrawn_at is None and one.starts_at > now for one in members):
            return None
        current = next((one for one in members if one.signs(now)), None)
        if current is None or now < current.starts_at + every_s - ahead_s:
            return None
        return current

    def signer(self, algorithm: Algorithm, now: int, purpose: Purpose = "token") -> Signer:
        """The one that signs now.

        Raises:
            NoSigner: none may.
        """
        last = self._signed_last.get((purpose, algorithm))
        if last is not None and last.signs(now):
            return last.signer
        for signing_key in self.signing_keys:
            fits = signing_key.algorithm == algorithm and signing_key.purpose == purpose
            if fits and signing_key.signs(now):
                self._signed_last[(purpose, algorithm)] = signing_key
                return signing_key.signer
        raise NoSigner(
            f"no {algorithm} signing key for {purpose}s may sign: run coatcheck signing-keys rotate"
            f" --for {purpose} --algorithm {algorithm} --now"
        )

    def published(self, now: int, purpose: Purpose | None = "token") -> list[SigningKey]:
        """The signing keys that count now, of one purpose; None: of every purpose."""
        return [
            signing_key
            for signing_key in self.signing_keys
            if signing_key.is_published(now) and purpose in (None, signing_key.purpose)
        ]

    def key_set(self, now: int, purpose: Purpose = "token") -> dict[str, list[Mapping[str, str]]]:
        """The JWK set: public members only.  Source: RFC 7517 §5.

        Signing keys of one algorithm stand together, the default's first: python-jose tries one
        after the other, and gives up at the first of another type.
        """
        order = list(GENERATE)
        published = self.published(now, purpose)
        published.sort(key=lambda signing_key: order.index(signing_key.algorithm))
        return {"keys": [signing_key.public_jwk for signing_key in published]}


class RingKeeper:
    """Keeps a process's ring up with the change log.

    Args:
        load_again: reads the sealing keys anew, when a signing key was sealed with one that is
            not known here: it may have been put there since.
    """

    def __init__(
        self,
        store: Store,
        sealing_keys: SealingKeys,
        publication: Publication = _USUAL,
        load_again: Callable[[], SealingKeys] | None = None,
    ) -> None:
        self._store = store
        self.sealing_keys = sealing_keys
        self._publication = publication
        self._load_again = load_again
        self._as_of = -1
        self._ring = Ring(())

    @property
    def last_known(self) -> Ring:
        """The ring as last read; good for the key set while the database is away."""
        return self._ring

    def at(self, as_of: int) -> Ring:
        """The ring at this position of the change log, read again if it has moved.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        if as_of != self._as_of:
            records = self._store.signing_keys()
            if any(self._lacks(record) for record in records):
                self.look_for_sealing_keys()
            self._ring = Ring.read(records, self.sealing_keys, self._ring, self._publication)
            self._as_of = as_of
        return self._ring

    def try_again(self) -> None:
        """Read the ring anew at the next look if something of it could not be opened."""
        if any(one.private is None and one.withdrawn_at is None for one in self._ring.signing_keys):
            self._as_of = -1

    def _lacks(self, record: SigningKeyRecord) -> bool:
        known = self._ring.get(record.kid)
        return (
            record.withdrawn_at is None
            and (known is None or known.private is None)
            and record.sealing_key_id not in self.sealing_keys.by_id
        )

    def look_for_sealing_keys(self) -> None:
        """Read the sealing keys anew: the deployment may have been re-sealed since."""
        if self._load_again is None:
            return
        try:
            self.sealing_keys = self._load_again()
        except BadSealingKey as error:
            _log.error("the sealing keys cannot be read again: %s", error)


def first_lines(algorithms: Collection[Algorithm]) -> list[Line]:
    """The lines that a deployment begins with, and that rotate by themselves.

    An EdDSA key is published only where an audience uses it: there are verifiers that stumble
    over a key set with a key type they do not know.

    Args:
        algorithms: those that its audiences use.
    """
    used = _ALWAYS_PUBLISHED.union(algorithms)
    return [line for line in LINES if line[0] == "feed" or line[1] in used]


def sealing_key_in_use(store: Store, sealing_keys: SealingKeys) -> SealingKey:
    """The sealing key of the newest signing key that counts: it seals the next one, too.

    Another one that lies in the keys directory waits for `reseal`: the other nodes may not have
    it yet.

    Raises:
        BadSealingKey: it is not here.
        StoreUnavailable: the database did not answer.
    """
    with store.transaction(read_only=True) as tx:
        in_use = _sealed_with(tx.signing_keys())
    return sealing_keys.newest() if in_use is None else sealing_keys.get(in_use)


def sealing_key_for_copies(tx: Transaction, sealing_keys: SealingKeys) -> SealingKey:
    """The sealing key in use, for a copy of a secret that this very transaction stores.

    Until it ends, nobody re-seals: a copy that was sealed with the old one a moment later would
    be left behind, and its file taken away.

    Raises:
        BadSealingKey: it is not here.
    """
    tx.hold_signing_keys()
    in_use = _sealed_with(tx.signing_keys())
    return sealing_keys.newest() if in_use is None else sealing_keys.get(in_use)


def sealing_keys_in_use(store: Store) -> Collection[str]:
    """The ids of the sealing keys that signing keys and copies of secrets need.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    with store.transaction(read_only=True) as tx:
        of_signing_keys = {row.sealing_key_id for row in tx.signing_keys()}
        return of_signing_keys.union(tx.sealing_keys_of_copies())


def newest_before(store: Store, line: Line, moment_ms: int) -> str | None:
    """The `kid` of the newest of a line as it was at a moment; None: there was none.

    Who asks for a successor means the signing key that was the newest when they began to ask,
    not one that somebody else has made since.

    Args:
        moment_ms: milliseconds since the epoch.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    with store.transaction(read_only=True) as tx:
        for row in reversed(tx.signing_keys()):
            if (row.purpose, row.algorithm) == line and _made_at_ms(tx, row) <= moment_ms:
                return row.kid
    return None


def _made_at_ms(tx: Transaction, row: SigningKeyRow) -> int:
    for change in tx.changes(row.kid):
        if change.what == What.SIGNING_KEY_CREATED.text:
            made_at_ms: int = json.loads(change.detail).get(MADE_AT_MS, row.created_at * 1000)
            return made_at_ms
    return row.created_at * 1000


def create(
    store: Store,
    sealing_key: SealingKey,
    algorithm: Algorithm,
    actor: Actor,
    *,
    now: int,
    starts_at: int,
    purpose: Purpose = "token",
    succeeds: str | None = ANY,
    detail: Mapping[str, object] | None = None,
) -> str:
    """Make a signing key.  Returns its `kid`.  Arguments and exceptions are those of `add`."""
    pair = keyfile.of(GENERATE[algorithm]())
    return add(
        store,
        sealing_key,
        pair,
        actor,
        now=now,
        starts_at=starts_at,
        purpose=purpose,
        succeeds=succeeds,
        detail=detail,
    )


def add(
    store: Store,
    sealing_key: SealingKey,
    pair: KeyPair,
    actor: Actor,
    *,
    now: int,
    starts_at: int,
    purpose: Purpose = "token",
    kid: str | None = None,
    succeeds: str | None = ANY,
    detail: Mapping[str, object] | None = None,
) -> str:
    """Put a key pair into the ring.  Returns its `kid`.

    Args:
        sealing_key: the one in use.
        now, starts_at: seconds since the epoch.
        kid: its name; default: the thumbprint of its public half.
        succeeds: the `kid` of the newest one in its line, as whoever asks has seen it; None:
            there was none.
        detail: what else the change-log row says.

    Raises:
        SigningKeyConflict: another one is waiting to start or was made meanwhile; the key or its
            kid are in the ring already; or the ring was re-sealed meanwhile.
        StoreUnavailable: the database did not answer.
    """
    row = _row(pair, sealing_key, now=now, starts_at=starts_at, purpose=purpose, kid=kid)
    line = (purpose, pair.algorithm)
    try:
        with store.transaction() as tx:
            tx.lock_signing_keys()
            others = tx.signing_keys()
            _require_new(row, others)
            _require_successor(others, line, succeeds, now)
            in_use = _sealed_with(others)
            if in_use not in (None, sealing_key.id):
                raise SigningKeyConflict(
                    f"the signing keys were re-sealed meanwhile, with sealing key {in_use}: try"
                    " again"
                )
            row.position = 1 + max((other.position for other in others), default=0)
            tx.add_signing_key(row)
            tx.append([created(row, actor, detail)])
    except Taken:
        raise SigningKeyConflict(
            "another signing key was made at the same moment: see coatcheck signing-keys list"
        ) from None
    return row.kid


def rotate(
    store: Store,
    sealing_key: SealingKey,
    algorithm: Algorithm,
    actor: Actor,
    *,
    now: int,
    at_once: bool = False,
    purpose: Purpose = "token",
    succeeds: str | None = ANY,
    publication: Publication = _USUAL,
    not_before: int = 0,
    detail: Mapping[str, object] | None = None,
) -> str:
    """Make the successor of the key that signs: published now, signing PUBLISH_AHEAD later.

    Args:
        at_once: let it sign now; verifiers that cached the key set meet a `kid` they must fetch.
        not_before: seconds since the epoch; it signs then, or later.

    Raises:
        As `add`.
    """
    starts_at = now if at_once else max(now + publication.ahead, not_before)
    return create(
        store,
        sealing_key,
        algorithm,
        actor,
        now=now,
        starts_at=starts_at,
        purpose=purpose,
        succeeds=succeeds,
        detail=detail,
    )


def begin_lines(
    keeper: RingKeeper, store: Store, lines: Iterable[Line], actor: Actor, *, now: int
) -> list[str]:
    """Make the first signing key of each line that never had one; it signs at once.

    A catalog may ask for an algorithm that nothing was signed with before.  A line whose signing
    keys were withdrawn stays without: that was somebody's decision.

    Args:
        now: seconds since the epoch.

    Returns:
        Their `kid`s.

    Raises:
        BadSealingKey: the sealing key in use is not at hand.
        StoreUnavailable: the database did not answer.
    """
    ring = keeper.at(store.head())
    made = []
    for purpose, algorithm in lines:
        if ring.newest((purpose, algorithm)) is not None:
            continue
        sealing_key = sealing_key_in_use(store, keeper.sealing_keys)
        with suppress(SigningKeyConflict):  # another node has just made it
            made.append(
                rotate(
                    store,
                    sealing_key,
                    algorithm,
                    actor,
                    now=now,
                    at_once=True,
                    purpose=purpose,
                    succeeds=None,
                )
            )
    return made


def rotate_due(
    keeper: RingKeeper,
    store: Store,
    lines: Iterable[Line],
    actor: Actor,
    *,
    every_s: int,
    publication: Publication,
    now: int,
) -> list[str]:
    """Make a successor in each line that is due.  Returns their `kid`s.

    Every node calls it.  Where several do so at once, one of them makes the signing key and the
    others find it made, which is no news to anybody.

    Args:
        every_s: how long a signing key signs.

    Raises:
        BadSealingKey: the sealing key in use is not here.
        StoreUnavailable: the database did not answer.
    """
    ring = keeper.last_known
    made = []
    for line in lines:
        current = ring.due(line, every_s, publication.ahead, now)
        if current is None:
            continue
        purpose, algorithm = line
        try:
            sealing_key = sealing_key_in_use(store, keeper.sealing_keys)
        except BadSealingKey:
            keeper.look_for_sealing_keys()
            sealing_key = sealing_key_in_use(store, keeper.sealing_keys)
        try:
            kid = rotate(
                store,
                sealing_key,
                algorithm,
                actor,
                now=now,
                purpose=purpose,
                succeeds=ring.newest(line),
                publication=publication,
                not_before=current.starts_at + every_s,
            )
        except SigningKeyConflict as conflict:
            _log.debug("no rotation: %s", conflict)
            continue
        _log.info("signing key %s succeeds %s: %s for %ss", kid, current.kid, algorithm, purpose)
        made.append(kid)
    return made


def take_in(
    store: Store,
    sealing_key: SealingKey,
    pair: KeyPair,
    actor: Actor,
    *,
    now: int,
    at_once: bool = False,
    purpose: Purpose = "token",
    kid: str | None = None,
    succeeds: str | None = ANY,
    publication: Publication = _USUAL,
    detail: Mapping[str, object] | None = None,
) -> str:
    """Import a key pair that was made elsewhere, as a rotation does with one made here.

    Args:
        kid: the name that tokens out there give to it; default: the thumbprint.

    Raises:
        UnfitKey: its halves do not match, our own verifier would not take it, or it cannot have
            that purpose or name.
        SigningKeyConflict, StoreUnavailable: as `add`.
    """
    if (purpose, pair.algorithm) not in LINES:
        raise UnfitKey(f"it signs {pair.algorithm}, and {purpose}s are signed by {FEED_ALGORITHM}")
    if kid is not None and _KID.fullmatch(kid) is None:
        raise UnfitKey("its kid has characters other than A-Z a-z 0-9 _ = + / . : ~ - or over 128")
    name = kid or thumbprint(pair.public_jwk)
    fault = _misfit(_public_jwk(pair, name), pair.private)
    if fault is not None:
        raise UnfitKey(fault)
    header = json.dumps({"alg": pair.algorithm, "kid": name, "typ": "at+jwt"}).replace(" ", "")
    signature = base64url.encode(_SIGN[pair.algorithm](pair.private)(_PROBE))
    around = len(base64url.encode(header.encode())) + 2 + len(signature)
    if around > MAX_HEADER_AND_SIGNATURE:
        raise UnfitKey("its kid is too long for a token that has so long a signature")
    return add(
        store,
        sealing_key,
        pair,
        actor,
        now=now,
        starts_at=now if at_once else now + publication.ahead,
        purpose=purpose,
        kid=name,
        succeeds=succeeds,
        detail={"imported": True, **(detail or {})},
    )


def note_export(store: Store, kid: str, actor: Actor, *, now: int) -> None:
    """Write down that the private half of a signing key leaves the deployment.

    Raises:
        StoreUnavailable: the database did not answer; nothing may leave.
    """
    with store.transaction() as tx:
        tx.append([Change(What.SIGNING_KEY_EXPORTED, kid, actor, now)])


@dataclass(frozen=True, slots=True)
class Resealed:
    """What re-sealing came to, as far as signing keys are concerned.

    Attributes:
        kids: what was sealed anew; nothing, if it had been done before.
        left: withdrawn signing keys that no sealing key here opens; they are never used again.
        in_use: the sealing keys that are still needed, by id.
    """

    kids: Sequence[str]
    left: Sequence[str]
    in_use: Collection[str]


def reseal(
    store: Store, sealing_keys: SealingKeys, successor: SealingKey, actor: Actor, *, now: int
) -> Resealed:
    """Seal every private half with another sealing key: all of them, or none.

    What else lies sealed in the database is for `resealing`.

    Raises:
        BadSealingKey: one that was not withdrawn does not open; nothing was changed.
        StoreUnavailable: the database did not answer.
    """
    kids, left = [], []
    with store.transaction() as tx:
        tx.lock_signing_keys()
        rows = tx.signing_keys()
        for row in rows:
            if row.sealing_key_id == successor.id:
                continue
            try:
                secret = sealing_keys.unseal(row.sealed_private, row.kid, row.sealing_key_id)
            except BadSealingKey:
                if row.withdrawn_at is None:
                    raise
                left.append(row.kid)
                continue
            row.sealed_private = successor.seal(secret, row.kid)
            row.sealing_key_id = successor.id
            kids.append(row.kid)
        if kids:
            detail: dict[str, object] = {"signingKeys": len(kids)}
            tx.append([Change(What.SIGNING_KEYS_RESEALED, successor.id, actor, now, detail=detail)])
        in_use = {row.sealing_key_id for row in rows if row.kid not in left} | {successor.id}
    return Resealed(kids, left, in_use)


def withdraw(store: Store, kid: str, actor: Actor, *, now: int, force: bool = False) -> bool:
    """Take a signing key out of use for ever; its tokens die with it.

    Args:
        force: do so even if nothing can sign for its algorithm afterwards.

    Returns:
        Whether it was in use until now; False when it had been withdrawn before.

    Raises:
        UnknownSigningKey: there is none of this kid.
        SigningKeyConflict: it is the only one that can sign, and `force` was not said.
        StoreUnavailable: the database did not answer.
    """
    with store.transaction() as tx:
        tx.lock_signing_keys()
        row = tx.signing_key(kid)
        if row is None:
            raise UnknownSigningKey(kid)
        if row.withdrawn_at is not None:
            return False
        some_signed = _some_sign(map(_record, tx.signing_keys()), row, now)
        row.withdrawn_at = now
        if some_signed and not force and not _some_sign(map(_record, tx.signing_keys()), row, now):
            raise SigningKeyConflict(
                f"{kid} is the only {row.algorithm} key that can sign {row.purpose}s: run coatcheck"
                f" signing-keys rotate --for {row.purpose} --algorithm {row.algorithm} --now"
                " first, or say --force and do without until then"
            )
        tx.append([Change(What.SIGNING_KEY_WITHDRAWN, kid, actor, now)])
    return True


def thumbprint(jwk: Mapping[str, str]) -> str:
    """The `kid` of a public key: RFC 7638 §3, base64url of SHA-256 over the required members."""
    required = {
        "EC": ("crv", "kty", "x", "y"),
        "RSA": ("e", "kty", "n"),
        "OKP": ("crv", "kty", "x"),
    }
    members = {name: jwk[name] for name in sorted(required[jwk["kty"]])}
    digest = sha256(json.dumps(members, separators=(",", ":")).encode()).digest()
    return base64url.encode(digest).decode()


def new_row(
    algorithm: Algorithm,
    sealing_key: SealingKey,
    *,
    now: int,
    starts_at: int,
    purpose: Purpose = "token",
    position: int = 0,
) -> SigningKeyRow:
    """A new signing key as it goes into the store, its private half sealed under its `kid`."""
    row = _row(
        keyfile.of(GENERATE[algorithm]()),
        sealing_key,
        now=now,
        starts_at=starts_at,
        purpose=purpose,
    )
    row.position = position
    return row


def _row(
    pair: KeyPair,
    sealing_key: SealingKey,
    *,
    now: int,
    starts_at: int,
    purpose: Purpose,
    kid: str | None = None,
) -> SigningKeyRow:
    kid = kid or thumbprint(pair.public_jwk)
    der = pair.private.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return SigningKeyRow(
        kid=kid,
        purpose=purpose,
        algorithm=pair.algorithm,
        public_jwk=json.dumps(_public_jwk(pair, kid)),
        sealed_private=sealing_key.seal(der, kid),
        sealing_key_id=sealing_key.id,
        created_at=now,
        starts_at=starts_at,
        position=0,
    )


def _public_jwk(pair: KeyPair, kid: str) -> dict[str, str]:
    """The public half as the key set shows it."""
    return dict(pair.public_jwk) | {"kid": kid, "alg": pair.algorithm, "use": "sig"}


def _sealed_with(rows: Iterable[SigningKeyRow]) -> str | None:
    """The id of the sealing key in use; None while there is nothing that it has to open."""
    ids = [row.sealing_key_id for row in rows if row.withdrawn_at is None]
    return ids[-1] if ids else None


def _require_new(row: SigningKeyRow, others: Iterable[SigningKeyRow]) -> None:
    """One key has one name, and one name stands for one key, for ever.  Raises as `add`."""
    key = thumbprint(json.loads(row.public_jwk))
    for other in others:
        is_withdrawn = "; it was withdrawn, which is for ever" if other.withdrawn_at else ""
        if thumbprint(json.loads(other.public_jwk)) == key:
            raise SigningKeyConflict(
                f"this key is in the ring already, as signing key {other.kid}{is_withdrawn}"
            )
        if other.kid == row.kid:
            raise SigningKeyConflict(
                f"another key has the kid {other.kid} already{is_withdrawn}: leave --kid out"
            )


def _require_successor(
    others: Iterable[SigningKeyRow], line: Line, succeeds: str | None, now: int
) -> None:
    """There is nobody else in this place.  Raises as `add`."""
    newest = None
    for other in others:
        if (other.purpose, other.algorithm) != line:
            continue
        newest = other.kid
        if other.withdrawn_at is None and other.starts_at > now:
            raise SigningKeyConflict(
                f"signing key {other.kid} is waiting to start: let it, or withdraw it first"
            )
    if succeeds not in (ANY, newest):
        raise SigningKeyConflict(
            f"signing key {newest} was made meanwhile, and is the newest now: nothing was changed."
            "  If there shall be one more, say so again"
        )


def created(row: SigningKeyRow, actor: Actor, more: Mapping[str, object] | None = None) -> Change:
    """The change-log row that goes with a new signing key."""
    detail: dict[str, object] = {
        "purpose": row.purpose,
        "algorithm": row.algorithm,
        "startsAt": row.starts_at,
        **(more or {}),
    }
    return Change(What.SIGNING_KEY_CREATED, row.kid, actor, row.created_at, detail=detail)


def _open(
    record: SigningKeyRecord, sealing_keys: SealingKeys
) -> tuple[Any, None] | tuple[None, Exception]:
    """The private half, or why there is none."""
    try:
        der = sealing_keys.unseal(record.sealed_private, record.kid, record.sealing_key_id)
    except BadSealingKey as error:
        return None, error
    # What was sealed here was looked at when it was made or imported, and nobody else could seal
    # it; looking for primes again would take most of a start.
    private = serialization.load_der_private_key(
        der, password=None, unsafe_skip_rsa_key_validation=True
    )
    fault = _misfit(json.loads(record.public_jwk), private)
    if fault is not None:
        return None, BadSigningKey(
            f"signing key {record.kid} cannot be used: {fault}.  Withdraw it: coatcheck"
            f" signing-keys withdraw {record.kid} --force"
        )
    return private, None


def _misfit(public_jwk: Mapping[str, str], private: Any) -> str | None:
    """Why these halves are no signing key; None if they are one.

    The public one is read as our own verifier reads it from a key set, and has to verify what the
    private one signs.
    """
    kid = public_jwk["kid"]
    published = keyset.parse_object({"keys": [dict(public_jwk)]}).get(kid)
    if published is None:
        return "verifiers leave its public half out of the key set"
    try:
        signature = _SIGN[published.algorithm](private)(_PROBE)
        published.verify(signature, _PROBE)
    except (InvalidSignature, AttributeError, TypeError, ValueError):
        return "its halves do not match"
    return None


def _ends(records: Iterable[SigningKeyRecord]) -> dict[str, int]:
    """By kid: when its successor starts.  One withdrawn before its start succeeds nobody."""
    ends: dict[str, int] = {}
    latest: dict[tuple[str, str], str] = {}
    for record in sorted(records, key=lambda record: (record.starts_at, record.position)):
        if record.withdrawn_at is not None and record.withdrawn_at < record.starts_at:
            continue
        line = (record.purpose, record.algorithm)
        if line in latest:
            ends[latest[line]] = record.starts_at
        latest[line] = record.kid
    return ends


def _record(row: SigningKeyRow) -> SigningKeyRecord:
    return SigningKeyRecord(
        **{name: getattr(row, name) for name in SigningKeyRecord.__dataclass_fields__}
    )


def _some_sign(records: Iterable[SigningKeyRecord], like: SigningKeyRow, now: int) -> bool:
    """Whether any signing key of this purpose and algorithm may sign."""
    records = list(records)
    ends_at = _ends(records)
    return any(
        (record.purpose, record.algorithm) == (like.purpose, like.algorithm)
        and record.withdrawn_at is None
        and record.starts_at <= now < ends_at.get(record.kid, now + 1)
        for record in records
    )
