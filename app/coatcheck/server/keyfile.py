"""Private keys as files: what an import reads, and what an export writes.

A file is read only if there is one way to read it: one private key, open, of a kind that we sign
with.  Everything else is refused with the reason, because whoever imports a key is in the middle
of a migration and cannot guess.

This module knows nothing of the ring, and asks nobody for a passphrase: a secret that is typed
into one more program is one more place where it leaks.

Source: RFC 7468 §5, §10, §11, §13 (PEM), RFC 5958 (PKCS #8), RFC 5915 (SEC 1), RFC 8017 A.1
(PKCS #1), RFC 7517 §4 and RFC 7518 §6 (JWK), RFC 8037 §2 (EdDSA), RFC 8725 §3.5 (key strength).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from coatcheck import base64url
from coatcheck.token_profile import Algorithm

#: Bytes.  The longest private key that is taken has less than a tenth of that.
MAX_BYTES: Final = 64 * 1024

MIN_RSA_BITS: Final = 2048  # RFC 7518 §3.3
MAX_RSA_BITS: Final = 4096  # A token has room for no longer signature.
MIN_RSA_EXPONENT: Final = 65537  # FIPS 186-5 §5.1: more than 2^16.

Format = Literal["jwk", "pem"]

#: RFC 7468 §2: labels are printable ASCII without `-`, here with it so that none goes unseen.
_BEGIN: Final = re.compile(r"^-----BEGIN ([ -~]{1,64}?)-----$", re.MULTILINE)
_PRIVATE: Final = ("PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY")
#: OpenSSL writes the name of the curve before the key.
_HARMLESS: Final = "EC PARAMETERS"
#: What a file holds instead, and what to do about it.
_INSTEAD: Final[Mapping[str, str]] = {
    "CERTIFICATE": "it holds a certificate: hand in the private key that belongs to it",
    "PUBLIC KEY": "it holds the public half only: hand in the private key",
    "RSA PUBLIC KEY": "it holds the public half only: hand in the private key",
    "ENCRYPTED PRIVATE KEY": (
        "it is encrypted: decrypt it first, openssl pkey -in FILE -out OPEN, and remove OPEN"
        " afterwards"
    ),
    "OPENSSH PRIVATE KEY": "it is in OpenSSH's own format: write it as PKCS #8 first",
    "DSA PRIVATE KEY": "it is a DSA key, which signs no tokens",
}
_KINDS: Final = "P-256 (ES256), RSA (RS256) or Ed25519 (EdDSA)"

#: The members of a JWK that are its public half.
_PUBLIC: Final[Mapping[str, tuple[str, ...]]] = {
    "EC": ("kty", "crv", "x", "y"),
    "RSA": ("kty", "n", "e"),
    "OKP": ("kty", "crv", "x"),
}
_CRT: Final = ("p", "q", "dp", "dq", "qi")
_P256_BYTES: Final = 32


class UnfitKey(ValueError):
    """A file is no private key that can be used.  The message says why, never what it holds."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and the public half that was stated with it.

    Attributes:
        public_jwk: members of the key alone, without `kid`, `alg` and `use`.
        kid: the name that the file gives to it; None where it gives none.
    """

    algorithm: Algorithm
    public_jwk: Mapping[str, str]
    private: Any = field(repr=False)
    kid: str | None = None


def of(private: Any) -> KeyPair:
    """The pair of a private key.

    Raises:
        UnfitKey: none of our algorithms signs with it, or it is too weak.
    """
    algorithm = _algorithm(private)
    to_jwk = cast(Any, jwt.get_algorithm_by_name(algorithm)).to_jwk
    jwk = to_jwk(private.public_key(), as_dict=True)
    return KeyPair(algorithm, {name: jwk[name] for name in _PUBLIC[jwk["kty"]]}, private)


def read(content: bytes) -> KeyPair:
    """The one private key that a file holds: PEM (PKCS #8, SEC 1, PKCS #1) or a private JWK.

    Raises:
        UnfitKey: there is none, there are several, or it is unfit.
    """
    if len(content) > MAX_BYTES:
        raise UnfitKey(f"it has more than {MAX_BYTES // 1024} KiB: a private key is far shorter")
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        raise UnfitKey("it is neither PEM nor JWK: write it as PEM first") from None
    if text.lstrip().startswith(("{", "[")):
        return _read_jwk(text)
    return _read_pem(text)


def _read_pem(text: str) -> KeyPair:
    if "\r" in text:
        raise UnfitKey("its lines end in CR LF: convert it, tr -d '\\r' < FILE > NEW")
    labels = [label for label in _BEGIN.findall(text) if label != _HARMLESS]
    for label in labels:
        if label not in _PRIVATE:
            raise UnfitKey(_INSTEAD.get(label, f"it holds no private key, but: {label}"))
    if not labels:
        raise UnfitKey("it is neither PEM nor JWK: there is no BEGIN line in it")
    if len(labels) > 1:
        raise UnfitKey(f"it holds {len(labels)} keys: hand in one a time")
    if "Proc-Type:" in text:
        raise UnfitKey(_INSTEAD["ENCRYPTED PRIVATE KEY"])
    begin = text.index(f"-----BEGIN {labels[0]}-----")
    try:
        private = serialization.load_pem_private_key(text[begin:].encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UnfitKey(
            f"it is damaged, its halves do not match, or it is no key of ours: {_KINDS}"
        ) from None
    return of(private)


def _read_jwk(text: str) -> KeyPair:
    try:
        jwk = json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        raise UnfitKey("it is no JSON object in which each name comes once") from None
    if not isinstance(jwk, dict) or "keys" in jwk:
        raise UnfitKey("it holds a list or set of keys: hand in one JWK at a time")
    kind, curve = jwk.get("kty"), jwk.get("crv")
    reader = _JWK.get(f"{kind}" if kind == "RSA" else f"{kind} {curve}")
    if reader is None:
        raise UnfitKey(f"it is no key of ours: {_KINDS}")
    if "d" not in jwk:
        raise UnfitKey(_INSTEAD["PUBLIC KEY"])
    if jwk.get("use", "sig") != "sig":
        raise UnfitKey("it is for encryption: its use is not sig")
    operations = jwk.get("key_ops", ["sign"])
    if not isinstance(operations, list) or "sign" not in operations:
        raise UnfitKey("it may not sign: its key_ops do not say so")
    kid = jwk.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise UnfitKey("its kid is no text")
    try:
        private = reader(jwk)
    except (ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        raise UnfitKey("a member is missing or damaged, or its halves do not match") from None
    pair = of(private)
    if jwk.get("alg", pair.algorithm) != pair.algorithm:
        raise UnfitKey(f"its alg is not {pair.algorithm}, the only one that goes with it")
    if {name: jwk.get(name) for name in pair.public_jwk} != pair.public_jwk:
        raise UnfitKey("its halves do not match: the public one belongs to another private key")
    return KeyPair(pair.algorithm, pair.public_jwk, private, kid)


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # RFC 7517 §4: names are unique.  Whichever of two counted, somebody would read the other.
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name comes twice")
    return members


def _bytes(jwk: Mapping[str, Any], name: str) -> bytes:
    if not isinstance(jwk[name], str):
        raise TypeError(f"{name} is no text")
    return base64url.decode(jwk[name].encode())


def _integer(jwk: Mapping[str, Any], name: str) -> int:
    return int.from_bytes(_bytes(jwk, name), "big")


def _ec(jwk: Mapping[str, Any]) -> ec.EllipticCurvePrivateKey:
    if len(_bytes(jwk, "d")) != _P256_BYTES:
        raise ValueError("RFC 7518 §6.2.2.1: d has the length of the curve")
    return ec.derive_private_key(_integer(jwk, "d"), ec.SECP256R1())


def _rsa(jwk: Mapping[str, Any]) -> rsa.RSAPrivateKey:
    if "oth" in jwk:
        raise ValueError("RFC 7518 §6.3.2.7: more than two primes")
    public = rsa.RSAPublicNumbers(_integer(jwk, "e"), _integer(jwk, "n"))
    d = _integer(jwk, "d")
    if any(name in jwk for name in _CRT):
        # RFC 7518 §6.3.2: all of them, or none.
        p, q, dp, dq, qi = (_integer(jwk, name) for name in _CRT)
    else:
        if public.n.bit_length() > MAX_RSA_BITS:
            raise ValueError("finding its primes would take too long")
        p, q = rsa.rsa_recover_prime_factors(public.n, public.e, d)
        dp, dq, qi = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, public).private_key()


def _okp(jwk: Mapping[str, Any]) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.from_private_bytes(_bytes(jwk, "d"))


_JWK: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "EC P-256": _ec,
    "RSA": _rsa,
    "OKP Ed25519": _okp,
}


def _algorithm(private: Any) -> Algorithm:
    """The algorithm that signs with this private key.  Raises UnfitKey."""
    match private:
        case ec.EllipticCurvePrivateKey():
            if not isinstance(private.curve, ec.SECP256R1):
                raise UnfitKey(f"its curve is {private.curve.name}, and only P-256 is used here")
            return "ES256"
        case rsa.RSAPrivateKey():
            exponent = private.public_key().public_numbers().e
            if not MIN_RSA_BITS <= private.key_size <= MAX_RSA_BITS:
                raise UnfitKey(
                    f"it is RSA with {private.key_size} bits: from {MIN_RSA_BITS} to"
                    f" {MAX_RSA_BITS} are safe and fit into a token"
                )
            if exponent < MIN_RSA_EXPONENT:
                raise UnfitKey(
                    f"its public exponent is {exponent}: {MIN_RSA_EXPONENT} is the least"
                )
            return "RS256"
        case ed25519.Ed25519PrivateKey():
            return "EdDSA"
    raise UnfitKey(f"it is no key of ours: {_KINDS}")


def private_pem(private: Any) -> str:
    """A private key as PKCS #8, unencrypted.  Source: RFC 7468 §10."""
    pem: bytes = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem.decode()


def private_jwk(private: Any, public_jwk: Mapping[str, str]) -> dict[str, str]:
    """A private key as JWK, with what the public one says beside the key."""
    algorithm = cast(Any, jwt.get_algorithm_by_name(_algorithm(private)))
    jwk: dict[str, str] = algorithm.to_jwk(private, as_dict=True)
    jwk.pop("key_ops", None)
    return dict(public_jwk) | jwk


def public_pem(public_jwk: Mapping[str, str]) -> str:
    """A public half as SubjectPublicKeyInfo.  Source: RFC 7468 §13."""
    pem: bytes = jwt.PyJWK(dict(public_jwk)).key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem.decode()
