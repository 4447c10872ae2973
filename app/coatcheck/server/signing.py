"""The ring: which signing key signs, which are published, from the clock alone.

A signing key signs tokens or the revocation feed, never both, so that neither can be taken for
the other.  It is published from its creation, signs from `starts_at` until a successor of its
algorithm has started, and leaves the key set PUBLISH_AFTER later.  A withdrawn one neither signs
nor is published, for ever.  Nothing is stored but the two times, so that every node agrees
without being told.

Private halves lie sealed in the database and are opened once per process.

Source: RFC 7517 (JWK), RFC 7638 (thumbprint as `kid`), RFC 7518 §3.4, RFC 8725 §3.5.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Final, Literal, cast

import jwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from coatcheck import base64url
from coatcheck.durations import PUBLISH_AFTER, PUBLISH_AHEAD
from coatcheck.feed_profile import TYPE as FEED_TYPE
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.sealing import BadSealingKey, SealingKey, SealingKeys
from coatcheck.server.store import SigningKeyRecord, Store
from coatcheck.server.store.tables import SigningKey as SigningKeyRow
from coatcheck.token_profile import Algorithm

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


class NoSigner(Exception):
    """No signing key of this algorithm may sign now.  The caller is told 503."""


class SigningKeyConflict(Exception):
    """The ring does not allow this change now.  The message says what to do instead."""


class UnknownSigningKey(LookupError):
    """There is no signing key of this `kid`."""


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
        private: None when no sealing key here opens it.
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

    def signs(self, now: int) -> bool:
        return (
            self.private is not None
            and self.withdrawn_at is None
            and self.starts_at <= now
            and (self.ends_at is None or now < self.ends_at)
        )

    def is_published(self, now: int) -> bool:
        return self.withdrawn_at is None and (
            self.ends_at is None or now < self.ends_at + PUBLISH_AFTER
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
        self._signed_last: dict[tuple[Purpose, Algorithm], SigningKey] = {}

    @classmethod
    def read(
        cls, records: Iterable[SigningKeyRecord], sealing_keys: SealingKeys, known: "Ring"
    ) -> "Ring":
        """The ring that these records describe.

        A private half that does not open leaves a signing key that is published and does not
        sign: what the others may do must not hang on it.  `require_open` tells.

        Args:
            known: an earlier ring; private halves that it has opened are not opened again.
        """
        records = list(records)
        ends_at = _ends(records)
        signing_keys = []
        for record in records:
            before = known.get(record.kid)
            private = before and before.private
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
                    private=private or _open(record, sealing_keys),
                )
            )
        return cls(signing_keys)

    def get(self, kid: str) -> SigningKey | None:
        return self._by_kid.get(kid)

    def require_open(self) -> None:
        """Raises BadSealingKey if any signing key that may still sign did not open."""
        for signing_key in self.signing_keys:
            if signing_key.private is None and signing_key.withdrawn_at is None:
                raise BadSealingKey(
                    f"signing key {signing_key.kid} does not open with the sealing keys in"
                    " COATCHECK_KEYS_DIR: put the deployment's own sealing-*.key there"
                )

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
    """Keeps a process's ring up with the change log."""

    def __init__(self, store: Store, sealing_keys: SealingKeys) -> None:
        self._store = store
        self._sealing_keys = sealing_keys
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
            self._ring = Ring.read(self._store.signing_keys(), self._sealing_keys, self._ring)
            self._as_of = as_of
        return self._ring


def first_lines(algorithms: Collection[Algorithm]) -> list[tuple[Purpose, Algorithm]]:
    """The lines that a deployment begins with.

    An EdDSA key is published only where an audience uses it: there are verifiers that stumble
    over a key set with a key type they do not know.

    Args:
        algorithms: those that its audiences use.
    """
    used = _ALWAYS_PUBLISHED.union(algorithms)
    return [line for line in LINES if line[0] == "feed" or line[1] in used]


def create(
    store: Store,
    sealing_key: SealingKey,
    algorithm: Algorithm,
    actor: Actor,
    *,
    now: int,
    starts_at: int,
    purpose: Purpose = "token",
) -> str:
    """Make a signing key.  Returns its `kid`.

    Args:
        now, starts_at: seconds since the epoch.

    Raises:
        SigningKeyConflict: another one is waiting to start.
        StoreUnavailable: the database did not answer.
    """
    row = new_row(algorithm, sealing_key, now=now, starts_at=starts_at, purpose=purpose)
    with store.transaction() as tx:
        others = tx.signing_keys()
        for other in others:
            if (
                other.algorithm == algorithm
                and other.purpose == purpose
                and other.withdrawn_at is None
                and other.starts_at > now
            ):
                raise SigningKeyConflict(
                    f"signing key {other.kid} is waiting to start: let it, or withdraw it first"
                )
        row.position = 1 + max((other.position for other in others), default=0)
        tx.add(row)
        tx.append([created(row, actor)])
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
) -> str:
    """Make the successor of the key that signs: published now, signing PUBLISH_AHEAD later.

    Args:
        at_once: let it sign now; verifiers that cached the key set meet a `kid` they must fetch.

    Raises:
        As `create`.
    """
    starts_at = now if at_once else now + PUBLISH_AHEAD
    return create(
        store, sealing_key, algorithm, actor, now=now, starts_at=starts_at, purpose=purpose
    )


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
    private = GENERATE[algorithm]()
    to_jwk = cast(Any, jwt.get_algorithm_by_name(algorithm)).to_jwk
    jwk = to_jwk(private.public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    kid = thumbprint(jwk)
    sealed = sealing_key.seal(
        private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        kid,
    )
    return SigningKeyRow(
        kid=kid,
        purpose=purpose,
        algorithm=algorithm,
        public_jwk=json.dumps(jwk | {"kid": kid, "alg": algorithm, "use": "sig"}),
        sealed_private=sealed,
        sealing_key_id=sealing_key.id,
        created_at=now,
        starts_at=starts_at,
        position=position,
    )


def created(row: SigningKeyRow, actor: Actor) -> Change:
    """The change-log row that goes with a new signing key."""
    detail: dict[str, object] = {
        "purpose": row.purpose,
        "algorithm": row.algorithm,
        "startsAt": row.starts_at,
    }
    return Change(What.SIGNING_KEY_CREATED, row.kid, actor, row.created_at, detail=detail)


def _open(record: SigningKeyRecord, sealing_keys: SealingKeys) -> Any:
    try:
        der = sealing_keys.unseal(record.sealed_private, record.kid, record.sealing_key_id)
    except BadSealingKey as error:
        _log.error("signing key not opened: %s", error)
        return None
    return serialization.load_der_private_key(der, password=None)


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
