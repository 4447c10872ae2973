"""`coatcheck.server.keyfile`: which files are taken as a private key, and which are refused.

answers.md K13, K14; RFC 7468, RFC 7517 §4, RFC 7518 §6.
"""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.x509.oid import NameOID

from coatcheck.server import keyfile
from coatcheck.server.keyfile import UnfitKey
from support.deployment import DAY, NOON

PEM: Final = serialization.Encoding.PEM
OPEN: Final = serialization.NoEncryption()
PKCS8: Final = serialization.PrivateFormat.PKCS8
TRADITIONAL: Final = serialization.PrivateFormat.TraditionalOpenSSL

P256 = ec.generate_private_key(ec.SECP256R1())
OTHER_P256 = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
ED = ed25519.Ed25519PrivateKey.generate()
OTHER_ED = ed25519.Ed25519PrivateKey.generate()
OURS: Final[dict[str, Any]] = {"ES256": P256, "RS256": RSA, "EdDSA": ED}


def pem(private: Any, form: serialization.PrivateFormat = PKCS8) -> bytes:
    written: bytes = private.private_bytes(PEM, form, OPEN)
    return written


def jwk(algorithm: str, private: Any = None, **changes: object) -> dict[str, Any]:
    """A private JWK; changed members, or without those that are None."""
    whole = jwt.get_algorithm_by_name(algorithm).to_jwk(private or OURS[algorithm], as_dict=True)
    whole = whole | changes
    return {name: value for name, value in whole.items() if value is not None}


def text(document: object) -> bytes:
    return json.dumps(document).encode()


def same(one: Any, other: Any) -> bool:
    return pem(one) == pem(other)


# --- what is taken

EC_PARAMETERS = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
TAKEN: Final[dict[str, tuple[str, bytes]]] = {
    "PKCS #8, EC": ("ES256", pem(P256)),
    "PKCS #8, RSA": ("RS256", pem(RSA)),
    "PKCS #8, Ed25519": ("EdDSA", pem(ED)),
    "SEC 1": ("ES256", pem(P256, TRADITIONAL)),
    "SEC 1, as OpenSSL writes it": ("ES256", EC_PARAMETERS + pem(P256, TRADITIONAL)),
    "PKCS #1": ("RS256", pem(RSA, TRADITIONAL)),
    "PEM with a heading": ("ES256", b"Bag Attributes\n  friendlyName: x\n" + pem(P256)),
    "JWK, EC": ("ES256", text(jwk("ES256"))),
    "JWK, RSA": ("RS256", text(jwk("RS256"))),
    "JWK, RSA without primes": (
        "RS256",
        text(jwk("RS256", **dict.fromkeys(("p", "q", "dp", "dq", "qi")))),
    ),
    "JWK, Ed25519": ("EdDSA", text(jwk("EdDSA"))),
    "JWK over many lines": ("ES256", json.dumps(jwk("ES256"), indent=2).encode()),
    "JWK that says what it is for": (
        "ES256",
        text(jwk("ES256", use="sig", alg="ES256", key_ops=["sign", "verify"], kid="old")),
    ),
}


@pytest.mark.parametrize(("algorithm", "content"), TAKEN.values(), ids=TAKEN)
def test_a_private_key_of_ours_is_taken_as_it_is(algorithm: str, content: bytes) -> None:
    """Whatever wrote it: OpenSSL, a JOSE library, another issuer."""
    pair = keyfile.read(content)

    assert pair.algorithm == algorithm
    assert same(OURS[algorithm], pair.private)
    assert not {"d", "p", "q", "kid", "alg", "use"} & set(pair.public_jwk)


def test_the_name_that_a_file_gives_is_told_and_not_taken() -> None:
    """K16: the kid is the thumbprint unless the operator says otherwise."""
    assert keyfile.read(text(jwk("ES256", kid="2019-01"))).kid == "2019-01"
    assert keyfile.read(pem(P256)).kid is None


@pytest.mark.parametrize("form", ["jwk", "pem"])
@pytest.mark.parametrize("algorithm", OURS)
def test_what_is_written_can_be_read_again(algorithm: str, form: str) -> None:
    """An export is a file for another import."""
    pair = keyfile.of(OURS[algorithm])
    public_jwk = {**pair.public_jwk, "kid": "k", "alg": algorithm, "use": "sig"}

    if form == "pem":
        written = keyfile.private_pem(pair.private)
    else:
        written = json.dumps(keyfile.private_jwk(pair.private, public_jwk))

    assert same(OURS[algorithm], keyfile.read(written.encode()).private)
    public = serialization.load_pem_public_key(keyfile.public_pem(public_jwk).encode())
    assert public == OURS[algorithm].public_key()


# --- what is refused: K13


def certificate() -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.example")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(P256.public_key())
        .serial_number(1)
        .not_valid_before(datetime.fromtimestamp(NOON, UTC))
        .not_valid_after(datetime.fromtimestamp(NOON + DAY, UTC))
        .sign(P256, hashes.SHA256())
        .public_bytes(PEM)
    )


def public(form: serialization.PublicFormat, private: Any = RSA) -> bytes:
    written: bytes = private.public_key().public_bytes(PEM, form)
    return written


def encrypted(form: serialization.PrivateFormat) -> bytes:
    return RSA.private_bytes(PEM, form, serialization.BestAvailableEncryption(b"passphrase"))


def der(tag: int, *parts: bytes) -> bytes:
    """ASN.1: one value of this tag."""
    content = b"".join(parts)
    length = len(content)
    if length < 128:
        return bytes((tag, length)) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + content


def integer(value: int) -> bytes:
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def armored(label: str, content: bytes) -> bytes:
    lines = base64.encodebytes(content).decode()
    return f"-----BEGIN {label}-----\n{lines}-----END {label}-----\n".encode()


def exponent_1() -> bytes:
    """PKCS #1 with e = d = 1: everything is its own signature."""
    numbers = RSA.private_numbers()
    values = (0, numbers.public_numbers.n, 1, 1, numbers.p, numbers.q, 1, 1, numbers.iqmp)
    return armored("RSA PRIVATE KEY", der(0x30, *map(integer, values)))


def sec1(private: ec.EllipticCurvePrivateKey, stated: ec.EllipticCurvePrivateKey) -> bytes:
    """SEC 1 of one private key with the public half of another, or the same."""
    point = stated.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    return armored(
        "EC PRIVATE KEY",
        der(
            0x30,
            integer(1),
            der(0x04, private.private_numbers().private_value.to_bytes(32, "big")),
            der(0xA0, bytes.fromhex("06082a8648ce3d030107")),
            der(0xA1, der(0x03, b"\0", point)),
        ),
    )


def p192() -> bytes:
    return pem(ec.generate_private_key(ec.SECP192R1()))


REFUSED: Final[dict[str, tuple[Callable[[], bytes] | bytes, str]]] = {
    "RSA 1024": (
        lambda: pem(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - to be refused
        "RSA with 1024 bits",
    ),
    "e = 1": (exponent_1, "is damaged"),
    "e = 1, as JWK": (text(jwk("RS256", e="AQ")), "halves do not match"),
    "e = 3": (lambda: pem(rsa.generate_private_key(3, 2048)), "public exponent is 3"),
    "P-192": (p192, "curve is secp192r1"),
    "P-384": (lambda: pem(ec.generate_private_key(ec.SECP384R1())), "curve is secp384r1"),
    "secp256k1": (lambda: pem(ec.generate_private_key(ec.SECP256K1())), "curve is secp256k1"),
    "Ed448": (lambda: pem(ed448.Ed448PrivateKey.generate()), "no key of ours"),
    "X25519": (lambda: pem(x25519.X25519PrivateKey.generate()), "no key of ours"),
    "DSA": (lambda: pem(dsa.generate_private_key(2048)), "no key of ours"),
    "encrypted PKCS #8": (lambda: encrypted(PKCS8), "is encrypted: decrypt it first"),
    "encrypted PKCS #1": (lambda: encrypted(TRADITIONAL), "is encrypted: decrypt it first"),
    "public half only": (
        public(serialization.PublicFormat.SubjectPublicKeyInfo),
        "public half only",
    ),
    "public half only, PKCS #1": (public(serialization.PublicFormat.PKCS1), "public half only"),
    "a certificate": (certificate, "holds a certificate"),
    "a key and its certificate": (lambda: pem(P256) + certificate(), "holds a certificate"),
    "a key and its public half": (
        pem(P256) + public(serialization.PublicFormat.SubjectPublicKeyInfo, P256),
        "public half only",
    ),
    "OpenSSH": (
        P256.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, OPEN),
        "OpenSSH's own format",
    ),
    "two keys": (pem(P256) + pem(RSA), "holds 2 keys"),
    "one key twice": (pem(P256) * 2, "holds 2 keys"),
    "CR LF": (pem(P256).replace(b"\n", b"\r\n"), "end in CR LF"),
    "CR": (pem(P256).replace(b"\n", b"\r"), "end in CR LF"),
    "DER": (P256.private_bytes(serialization.Encoding.DER, PKCS8, OPEN), "neither PEM nor JWK"),
    "UTF-16": (pem(P256).decode().encode("utf-16"), "neither PEM nor JWK"),
    "a BOM": (b"\xef\xbb\xbf" + pem(P256), "neither PEM nor JWK"),
    "nothing": (b"", "neither PEM nor JWK"),
    "another text": (b"hunter2", "neither PEM nor JWK"),
    "too long": (pem(P256) + b"\n" * keyfile.MAX_BYTES, "more than 64 KiB"),
    "cut off": (pem(P256)[:-40], "is damaged"),
    "damaged in the middle": (pem(RSA)[:300] + b"AAAA" + pem(RSA)[304:], "is damaged"),
    "a label of its own": (armored("AGE SECRET", b"x"), "but: AGE SECRET"),
    "JWK of the public half": (text(jwk("ES256", d=None)), "public half only"),
    "a JWK set": (text({"keys": [jwk("ES256")]}), "list or set"),
    "a list of JWKs": (text([jwk("ES256")]), "list or set"),
    "JWK, P-384": (text(jwk("ES256", crv="P-384")), "no key of ours"),
    "JWK, a shared secret": (text({"kty": "oct", "k": "c2VjcmV0"}), "no key of ours"),
    "JWK, a kty that is no text": (text(jwk("ES256", kty=["EC"])), "no key of ours"),
    "JWK for encryption": (text(jwk("ES256", use="enc")), "its use is not sig"),
    "JWK that may only verify": (text(jwk("ES256", key_ops=["verify"])), "may not sign"),
    "JWK for another algorithm": (text(jwk("RS256", alg="PS256")), "its alg is not RS256"),
    "JWK with a kid that is no text": (text(jwk("ES256", kid=1)), "kid is no text"),
    "JWK with a name twice": (
        text(jwk("ES256"))[:-1] + b', "d": "AAAA"}',
        "each name comes once",
    ),
    "JWK, cut off": (text(jwk("ES256"))[:-1], "no JSON object"),
    "JWK, nested without end": (b'{"a":' * 10_000, "no JSON object"),
    "JWK, d too short": (text(jwk("ES256", d="AQ")), "damaged, or its halves"),
    "JWK, d with padding": (text(jwk("ES256", d=jwk("ES256")["d"] + "=")), "is missing or damaged"),
    "JWK, d that is no text": (text(jwk("ES256", d=5)), "is missing or damaged"),
    "JWK, d = 0": (text(jwk("ES256", d="A" * 43)), "is missing or damaged"),
    "JWK, RSA with three primes": (text(jwk("RS256", oth=[])), "is missing or damaged"),
    "JWK, RSA with some of the primes": (text(jwk("RS256", qi=None)), "is missing or damaged"),
}


def content_of(made: Callable[[], bytes] | bytes) -> bytes:
    """Some are made only when their test runs: RSA keys take their time."""
    return made() if callable(made) else made


@pytest.mark.parametrize(("made", "why"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused_with_the_reason(
    made: Callable[[], bytes] | bytes, why: str
) -> None:
    """K13: whoever imports a key is in the middle of a migration and cannot guess."""
    content = content_of(made)

    with pytest.raises(UnfitKey, match=why) as refused:
        keyfile.read(content)

    assert str(refused.value).isascii()
    assert jwk("ES256")["d"] not in str(refused.value)


def test_an_rsa_key_that_is_longer_than_a_token_has_room_for_is_refused() -> None:
    """Making one takes ten seconds; how long it is decides before anything else is looked at."""

    @rsa.RSAPrivateKey.register
    class Long:
        key_size = 4104
        public_key = RSA.public_key

    with pytest.raises(UnfitKey, match="RSA with 4104 bits"):
        keyfile.of(Long())


# --- K14

NOT_A_PAIR: Final[dict[str, bytes]] = {
    "EC, JWK": text(jwk("ES256", d=jwk("ES256", OTHER_P256)["d"])),
    "EC, SEC 1": sec1(P256, OTHER_P256),
    "RSA, JWK": text(jwk("RS256", n=jwk("RS256", OTHER_RSA)["n"])),
    "RSA, JWK, d alone": text(
        jwk("RS256", n=jwk("RS256", OTHER_RSA)["n"], **dict.fromkeys(("p", "q", "dp", "dq", "qi")))
    ),
    "RSA, JWK, one number": text(jwk("RS256", dp=jwk("RS256")["dq"])),
    "Ed25519, JWK": text(jwk("EdDSA", x=jwk("EdDSA", OTHER_ED)["x"])),
    "no public half, JWK": text(jwk("ES256", y=None)),
}


@pytest.mark.parametrize("content", NOT_A_PAIR.values(), ids=NOT_A_PAIR)
def test_halves_that_do_not_match_are_refused(content: bytes) -> None:
    """K14: every token would be refused by everybody, from the moment it starts to sign."""
    with pytest.raises(UnfitKey, match="halves do not match"):
        keyfile.read(content)


def test_the_hand_written_form_is_right() -> None:
    """Else the refusal above would be of something else."""
    assert same(P256, keyfile.read(sec1(P256, P256)).private)


def test_no_repr_shows_the_private_half() -> None:
    """K27: values end in tracebacks."""
    assert "private" not in repr(keyfile.read(pem(P256)))
