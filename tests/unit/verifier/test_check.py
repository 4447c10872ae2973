"""The numbered check, row by row of the bad inputs that are known to have fooled others."""

import dataclasses
import json
import string
import time
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck.restrictions import Situation
from coatcheck.token_profile import ALGORITHMS, MAX_TOKEN_BYTES, REQUIRED_CLAIMS, Algorithm
from coatcheck.verifier import VerifierError, check, keyset
from support.tokens import (
    ABSENT,
    AUDIENCE,
    ISSUER,
    NOW,
    Signer,
    as_json,
    base64url,
    claims,
    key_set,
    signer,
)

EXPECTED = check.Expected(
    issuer=ISSUER,
    audiences=(AUDIENCE, "urn:second-name"),
    types=frozenset({"at+jwt"}),
    algorithms=frozenset(ALGORITHMS),
    leeway_s=30,
)
#: A busy machine must not fail a property.
unhurried = settings(deadline=None)

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


def accept(
    token: str,
    by: Signer | None = None,
    *,
    now: float = NOW,
    expected: check.Expected = EXPECTED,
    situation: Situation | None = None,
) -> Mapping[str, Any]:
    """All steps in order, as the verifier takes them."""
    by = by or signer()
    signed = check.check_signed(token, expected, keyset.parse(key_set(by.jwk())).get)
    check.check_use(signed, expected, now, situation or Situation())
    return signed.claims


def code_of(token: str, by: Signer | None = None, *, now: float = NOW) -> str:
    """The code with which a token is refused."""
    with pytest.raises(VerifierError) as refused:
        accept(token, by, now=now)
    return refused.value.code


def parts(token: str | None = None) -> list[str]:
    return (token or signer().token(claims())).split(".")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_ordinary_token_is_accepted(algorithm: Algorithm) -> None:
    """Nothing else counts if this does not.  RFC 9068 §4."""
    by = signer(algorithm)

    assert accept(by.token(claims()), by)["sub"] == claims()["sub"]


# Form


FORMS = {
    "empty": "",
    "no dots": "abc",
    "two parts": "{0}.{1}",
    "four parts": "{0}.{1}.{2}.{2}",
    "five parts": "{0}.{1}.{2}.{2}.{2}",
    "signature removed": "{0}.{1}.",
    "payload removed": "{0}..{2}",
    "header removed": ".{1}.{2}",
    "only dots": "." * 100_000,
    "one megabyte of token": "a" * 1_000_000,
    "one megabyte of header": "a" * 1_000_000 + ".{1}.{2}",
    "one megabyte of signature": "{0}.{1}." + "a" * 1_000_000,
    "padding": "{0}.{1}.{2}==",
    "standard alphabet": "{0}.{1}.{2}+/",
    "line break inside": "{0}.{1}\n.{2}",
    "line break behind": "{0}.{1}.{2}\n",
    "blank in front": " {0}.{1}.{2}",
    "scheme inside": "Bearer {0}.{1}.{2}",
    "full-width dots": "{0}\uff0e{1}\uff0e{2}",
    "lone surrogate": "{0}.{1}.{2}\ud800",
    "comma list": "{0}.{1}.{2}, {0}.{1}.{2}",
    "NUL": "{0}.{1}.{2}\0",
    "JSON serialization": '{{"payload":"{1}","protected":"{0}","signature":"{2}"}}',
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_no_compact_jws_is_refused_before_it_is_decoded(form: str) -> None:
    """
    V2, V30, V36, V37, V38: length first, because decoding costs per byte.

    RFC 7515 §3.1 and §5.2; RFC 4648 §3.3; CVE-2025-61920, CVE-2025-27144.
    """
    token = form.format(*parts())
    began = time.thread_time()

    assert code_of(token) in {"token_malformed", "bad_signature"}

    assert time.thread_time() - began < 0.05


def test_a_token_has_one_spelling() -> None:
    """RFC 4648 §3.5: set pad bits would be a second text for one token, and pass a deny-list."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    token = signer().token(claims())

    last = alphabet.index(token[-1])
    others = [token[:-1] + alphabet[last + bits] for bits in range(1, 16)]

    assert last % 16 == 0
    assert {code_of(other) for other in others} == {"token_malformed"}


def test_the_largest_token_that_is_read_has_4096_bytes() -> None:
    """The profile's limit, which the issuer keeps too."""
    room = MAX_TOKEN_BYTES - len(signer().token(claims(pad="")))
    fitting = next(
        token
        for length in range(room * 3 // 4 + 3, 0, -1)
        if len(token := signer().token(claims(pad="x" * length))) <= MAX_TOKEN_BYTES
    )

    assert accept(fitting)
    assert code_of(fitting + "AAAA") == "token_malformed"


# Header


HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "alg none": ({"alg": "none"}, "bad_algorithm"),
    "alg None": ({"alg": "None"}, "bad_algorithm"),
    "alg nOnE": ({"alg": "nOnE"}, "bad_algorithm"),
    "alg absent": ({"alg": ABSENT}, "bad_algorithm"),
    "alg number": ({"alg": 256}, "bad_algorithm"),
    "alg list": ({"alg": ["ES256"]}, "bad_algorithm"),
    "alg object": ({"alg": {"ES256": 1}}, "bad_algorithm"),
    "alg null": ({"alg": None}, "bad_algorithm"),
    "alg lower case": ({"alg": "es256"}, "bad_algorithm"),
    "alg of another family": ({"alg": "RS256"}, "bad_algorithm"),
    "alg EdDSA": ({"alg": "EdDSA"}, "bad_algorithm"),
    "alg of another curve": ({"alg": "ES384"}, "bad_algorithm"),
    "alg RS384": ({"alg": "RS384"}, "bad_algorithm"),
    "alg PS256": ({"alg": "PS256"}, "bad_algorithm"),
    "alg Ed25519": ({"alg": "Ed25519"}, "bad_algorithm"),
    "JWE": ({"alg": "PBES2-HS256+A128KW", "enc": "A128GCM", "p2c": 2**31}, "token_malformed"),
    "compressed": ({"zip": "DEF"}, "token_malformed"),
    "nested": ({"cty": "JWT"}, "token_malformed"),
    "key brought along": ({"jwk": signer(kid="attacker").jwk()}, "token_malformed"),
    "certificate brought along": ({"x5c": ["MIIB"]}, "token_malformed"),
    "jku": ({"jku": "http://127.0.0.1:9/jwks"}, "token_malformed"),
    "jku file": ({"jku": "file:///etc/passwd"}, "token_malformed"),
    "jku data": ({"jku": "data:application/json,{}"}, "token_malformed"),
    "jku like the issuer": ({"jku": f"{ISSUER}@evil.example"}, "token_malformed"),
    "x5u": ({"x5u": "http://127.0.0.1:9/cert"}, "token_malformed"),
    "kid absent": ({"kid": ABSENT}, "token_malformed"),
    "kid null": ({"kid": None}, "token_malformed"),
    "kid list": ({"kid": ["first"]}, "token_malformed"),
    "kid empty": ({"kid": ""}, "token_malformed"),
    "kid long": ({"kid": "x" * 257}, "token_malformed"),
    "kid of another case": ({"kid": "FIRST"}, "unknown_signing_key"),
    "kid traversal": ({"kid": "../../dev/null"}, "unknown_signing_key"),
    "kid SQL": ({"kid": "first' OR '1'='1"}, "unknown_signing_key"),
    "kid NUL": ({"kid": "first\0"}, "unknown_signing_key"),
    "crit unknown": ({"crit": ["x"], "x": 1}, "token_malformed"),
    "crit absent name": ({"crit": ["x"]}, "token_malformed"),
    "crit empty": ({"crit": []}, "token_malformed"),
    "crit text": ({"crit": "x"}, "token_malformed"),
    "crit registered": ({"crit": ["alg"]}, "token_malformed"),
    "b64 false": ({"b64": False, "crit": ["b64"]}, "token_malformed"),
    "b64 alone": ({"b64": False}, "token_malformed"),
    "typ JWT": ({"typ": "JWT"}, "wrong_type"),
    "typ absent": ({"typ": ABSENT}, "wrong_type"),
    "typ id_token": ({"typ": "id_token"}, "wrong_type"),
    "typ logout": ({"typ": "logout+jwt"}, "wrong_type"),
    "typ dpop": ({"typ": "dpop+jwt"}, "wrong_type"),
    "typ of our feed": ({"typ": "revocations+jwt"}, "wrong_type"),
    "typ list": ({"typ": ["at+jwt"]}, "wrong_type"),
    "typ null": ({"typ": None}, "wrong_type"),
    "typ twice application": ({"typ": "application/application/at+jwt"}, "wrong_type"),
}


@pytest.mark.parametrize(("changes", "code"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_means_something_else_is_refused(
    changes: dict[str, object], code: str
) -> None:
    """
    V1, V4, V5, V6, V7, V8, V10, V11, V13, V15, V36: the signature is right, the header decides.

    RFC 8725 §3.1, §3.10 and §3.11; RFC 7515 §4.1.11; RFC 7797 §7; RFC 9068 §4.
    """
    assert code_of(signer().token(claims(), **changes)) == code


GOOD_HEADERS: dict[str, dict[str, object]] = {
    "unknown member": {"x-trace": {"a": [1, 2]}},
    "typ in full": {"typ": "application/at+jwt"},
    "typ of another case": {"typ": "AT+JWT"},
    "certificate thumbprint": {"x5t": "c2hh"},
}


@pytest.mark.parametrize("changes", GOOD_HEADERS.values(), ids=GOOD_HEADERS)
def test_a_header_may_say_more_than_we_know(changes: dict[str, object]) -> None:
    """V12, V14: RFC 7515 §4: what is not understood is ignored; §4.1.9: types ignore case."""
    assert accept(signer().token(claims(), **changes))


HEADER_TEXTS = {
    "alg twice": b'{"typ":"at+jwt","alg":"none","alg":"ES256","kid":"first"}',
    "kid twice": b'{"typ":"at+jwt","alg":"ES256","kid":"other","kid":"first"}',
    "array": b'["at+jwt","ES256","first"]',
    "nothing": b"",
    "nested arrays": b'{"typ":"at+jwt","alg":"ES256","kid":"first","x":' + b"[" * 600 + b"}",
    "no UTF-8": b'{"typ":"at+jwt","alg":"ES256","kid":"\xff"}',
}


@pytest.mark.parametrize("header", HEADER_TEXTS.values(), ids=HEADER_TEXTS)
def test_a_header_that_two_parsers_would_read_differently_is_refused(header: bytes) -> None:
    """V27, V29: RFC 7515 §4: names are unique; RFC 8259 §8.1: UTF-8."""
    assert code_of(signer().token_of(header, as_json(claims()))) == "token_malformed"


def test_a_token_typed_plain_jwt_passes_only_where_that_was_asked_for() -> None:
    """RFC 9068 §4 refuses it; an audience may be served with plain JWTs for old libraries."""
    token = signer().token(claims(), typ="JWT")
    lenient = dataclasses.replace(EXPECTED, types=frozenset({"jwt"}))

    assert code_of(token) == "wrong_type"
    assert accept(token, expected=lenient)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_the_public_key_is_no_secret_to_sign_with(algorithm: str) -> None:
    """V3: over any spelling of the public key: CVE-2024-33663, CVE-2024-37568, CVE-2026-48526."""
    by = signer()
    public = by.private.public_key()
    spellings = [
        public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        as_json(by.jwk()),
        str(by.jwk()["x"]).encode(),
        b"",
    ]
    hmac = jwt.get_algorithm_by_name(algorithm)
    header = as_json(by.header(alg=algorithm))
    signing_input = f"{base64url(header)}.{base64url(as_json(claims()))}"

    for secret in spellings:
        token = f"{signing_input}.{base64url(hmac.sign(signing_input.encode(), secret))}"
        assert code_of(token) == "bad_algorithm"


UNSIGNED = ("none", "None", "nOnE", "NONE", "")


@pytest.mark.parametrize("algorithm", UNSIGNED)
def test_a_token_that_says_it_is_unsigned_is_refused(algorithm: str) -> None:
    """V1: with no signature, and with one that is left over.  RFC 8725 §3.2; RFC 9068 §4."""
    _, payload, left_over = parts()
    header = base64url(as_json(signer().header(alg=algorithm)))

    assert code_of(f"{header}.{payload}.") == "bad_algorithm"
    assert code_of(f"{header}.{payload}.{left_over}") == "bad_algorithm"


SIBLINGS: dict[str, tuple[str, str]] = {
    "RS384 by an RS256 key": ("RS256", "RS384"),
    "RS512 by an RS256 key": ("RS256", "RS512"),
    "PS256 by an RS256 key": ("RS256", "PS256"),
    "PS512 by an RS256 key": ("RS256", "PS512"),
}


@pytest.mark.parametrize(("own", "other"), SIBLINGS.values(), ids=SIBLINGS)
def test_another_algorithm_of_the_same_key_is_another_algorithm(own: str, other: str) -> None:
    """V4, V35: the signature fits what the header says, and the key is for something else."""
    by = signer(own)
    signing_input = f"{base64url(as_json(by.header(alg=other)))}.{base64url(as_json(claims()))}"
    signature = jwt.get_algorithm_by_name(other).sign(signing_input.encode(), by.private)

    assert code_of(f"{signing_input}.{base64url(signature)}", by) == "bad_algorithm"


def test_a_key_that_a_token_brings_along_verifies_nothing() -> None:
    """V6: signed by the attacker, who says by which key, under our name or another."""
    attacker = signer(kid="attacker")
    for kid in ("first", "attacker"):
        brought = attacker.token(claims(), kid=kid, jwk=attacker.jwk(kid=kid))
        silent = attacker.token(claims(), kid=kid)
        assert code_of(brought) == "token_malformed"
        assert code_of(silent) in {"bad_signature", "unknown_signing_key"}


def test_a_kid_is_never_repeated_and_never_long() -> None:
    """V8: 100 kB of it are refused by their length, in a short sentence.  PyJWT echoes them."""
    for kid in ("x" * 100_000, "x" * 2000, ["first"] * 100, "a-name-of-nobody"):
        with pytest.raises(VerifierError) as refused:
            accept(signer().token(claims(), kid=kid))
        said = f"{refused.value!r}{refused.value.headers}{refused.value.body!r}"
        assert len(said) < 1000
        assert "xxx" not in said
        assert "a-name-of-nobody" not in said


def test_a_payload_that_is_not_in_the_token_is_refused() -> None:
    """V11: detached (RFC 7515 appendix F) or unencoded (RFC 7797 §7), the signature right."""
    payload = as_json(claims())
    for header in (signer().header(), signer().header(b64=False, crit=["b64"])):
        text = base64url(as_json(header))
        encoded = base64url(payload)
        for signed in (f"{text}.{encoded}".encode(), text.encode() + b"." + payload):
            signature = base64url(signer().signature(signed))
            assert code_of(f"{text}..{signature}") in {"token_malformed", "bad_signature"}


def test_a_token_in_a_token_is_refused() -> None:
    """V15: RFC 7519 §5.2; with `cty`, and without it."""
    inner = signer().token(claims()).encode()

    for header in (signer().header(), signer().header(cty="JWT"), signer().header(typ="JWT")):
        assert code_of(signer().token_of(as_json(header), inner)) in {
            "token_malformed",
            "wrong_type",
        }


@pytest.mark.parametrize("digits", [400, 5_000])
@pytest.mark.parametrize("name", ["exp", "iat", "nbf", "other"])
def test_a_number_of_many_digits_is_refused(name: str, digits: int) -> None:
    """V18: no OverflowError, and not the ValueError of Python's limit.  RFC 8259 §6."""
    payload = as_json(claims(**{name: 7})).replace(b":7", b":" + b"7" * digits)
    began = time.thread_time()

    assert code_of(signer().token_of(as_json(signer().header()), payload)) == "token_malformed"

    assert time.thread_time() - began < 0.05


ENCRYPTED = {
    "direct": {"alg": "dir", "enc": "A256GCM"},
    "costly password": {"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 2**31, "p2s": "AA"},
    "compressed": {"alg": "RSA-OAEP", "enc": "A256GCM", "zip": "DEF"},
}


@pytest.mark.parametrize("header", ENCRYPTED.values(), ids=ENCRYPTED)
def test_nothing_is_ever_decrypted(header: dict[str, object]) -> None:
    """V36: in five parts or in three, and in no time.  CVE-2022-36083."""
    text = base64url(as_json({"typ": "at+jwt", "kid": "first", **header}))
    began = time.thread_time()

    assert code_of(f"{text}.AAAA.AAAA.AAAA.AAAA") == "token_malformed"
    assert code_of(f"{text}.{parts()[1]}.AAAA") == "token_malformed"

    assert time.thread_time() - began < 0.05


# Signature


def es256_signatures() -> dict[str, bytes]:
    header, payload, _ = parts()
    good = signer().signature(f"{header}.{payload}".encode())
    r, s = good[:32], good[32:]
    zero, one, order, most = (
        number.to_bytes(32, "big") for number in (0, 1, P256_ORDER, 2**256 - 1)
    )
    return {
        "r 0": zero + s,
        "s 0": r + zero,
        "both 0": zero + zero,
        "r n": order + s,
        "s n": r + order,
        "both n": order + order,
        "r 2^256-1": most + s,
        "s 2^256-1": r + most,
        "1, 1": one + one,
        "swapped": s + r,
        "DER": encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big")),
        "63 bytes": good[:63],
        "65 bytes": good + b"\0",
        "66 bytes": b"\0" + r + b"\0" + s,
        "128 bytes": good + good,
        "left over from another": signer().signature(b"something else"),
    }


ES256_SIGNATURES = es256_signatures()


@pytest.mark.parametrize("signature", ES256_SIGNATURES.values(), ids=ES256_SIGNATURES)
def test_an_es256_signature_is_r_and_s_of_32_bytes_each(signature: bytes) -> None:
    """V31, V32: RFC 7518 §3.4; CVE-2022-21449."""
    header, payload, _ = parts()

    assert code_of(f"{header}.{payload}.{base64url(signature)}") == "bad_signature"


def test_the_second_signature_of_a_token_is_the_same_token() -> None:
    """V33: R and N - S fit too (RFC 7518 §3.4); what is revoked is the `jti`, never a text."""
    header, payload, signature = parts()
    good = urlsafe_b64decode(signature + "==")
    other = P256_ORDER - int.from_bytes(good[32:], "big")
    twin = f"{header}.{payload}.{base64url(good[:32] + other.to_bytes(32, 'big'))}"

    assert twin != f"{header}.{payload}.{signature}"
    assert accept(twin)["jti"] == claims()["jti"]


def test_ed25519_signatures_have_one_form() -> None:
    """V34: RFC 8032 §5.1.7: S is below the order; zero and the identity are no signatures."""
    by = signer("EdDSA")
    header, payload, signature = parts(by.token(claims()))
    good = by.signature(f"{header}.{payload}".encode())
    larger = int.from_bytes(good[32:], "little") + ED25519_ORDER
    identity = b"\1" + bytes(31)

    for bad in (good[:32] + larger.to_bytes(32, "little"), bytes(64), identity + good[32:], b""):
        assert code_of(f"{header}.{payload}.{base64url(bad)}", by) == "bad_signature"
    assert accept(f"{header}.{payload}.{signature}", by)


def test_an_rs256_signature_is_pkcs1_with_sha256() -> None:
    """V35: RFC 8017 §8.2.2: neither PSS nor another hash, nor a number out of range."""
    by = signer("RS256")
    header, payload, _ = parts(by.token(claims()))
    signing_input = f"{header}.{payload}".encode()
    others = [
        jwt.get_algorithm_by_name(name).sign(signing_input, by.private)
        for name in ("PS256", "RS512")
    ]

    for bad in (*others, bytes(256), bytes(255) + b"\1", b"\xff" * 256, b"\xff" * 255):
        assert code_of(f"{header}.{payload}.{base64url(bad)}", by) == "bad_signature"


def test_a_signing_key_verifies_with_its_own_algorithm_only() -> None:
    """V4: RFC 8725 §3.1: the key decides, the header only says the same."""
    rs256 = signer("RS256", "first")

    assert code_of(rs256.token(claims()), signer("ES256", "first")) == "bad_algorithm"


@pytest.mark.parametrize("place", [0, 1])
def test_what_was_signed_cannot_be_changed(place: int) -> None:
    """One bit, anywhere."""
    pieces = parts()
    tampered = as_json(claims(sub="key_somebodyelse")) if place else as_json(signer().header(x=1))
    pieces[place] = base64url(tampered)

    assert code_of(".".join(pieces)) == "bad_signature"


# Claims


CLAIMS: dict[str, tuple[dict[str, object], str]] = {
    "exp null": ({"exp": None}, "token_malformed"),
    "exp text": ({"exp": str(NOW + 60)}, "token_malformed"),
    "exp Arabic digits": ({"exp": "١٧٩٠٠٠٠٦٠٠"}, "token_malformed"),
    "exp true": ({"exp": True}, "token_malformed"),
    "exp list": ({"exp": [NOW + 60]}, "token_malformed"),
    "exp object": ({"exp": {}}, "token_malformed"),
    "exp fraction": ({"exp": NOW + 60.5}, "token_malformed"),
    "exp negative": ({"exp": -1}, "token_malformed"),
    "exp 0": ({"exp": 0}, "token_expired"),
    "exp in milliseconds": ({"exp": (NOW + 60) * 1000}, "token_malformed"),
    "exp of 400 digits": ({"exp": 10**400}, "token_malformed"),
    "number of 400 digits": ({"other": 10**400}, "token_malformed"),
    "number of 400 digits inside": ({"other": [{"x": 10**400}]}, "token_malformed"),
    "nbf future": ({"nbf": NOW + 31}, "token_from_future"),
    "nbf text": ({"nbf": str(NOW)}, "token_malformed"),
    "nbf list": ({"nbf": [NOW]}, "token_malformed"),
    "nbf true": ({"nbf": True}, "token_malformed"),
    "nbf null": ({"nbf": None}, "token_malformed"),
    "nbf of 400 digits": ({"nbf": 10**400}, "token_malformed"),
    "iat a day ahead": ({"iat": NOW + 86_400}, "token_from_future"),
    "iat text": ({"iat": str(NOW)}, "token_malformed"),
    "iat true": ({"iat": True}, "token_malformed"),
    "iss other": ({"iss": "https://evil.example"}, "wrong_issuer"),
    "iss trailing slash": ({"iss": ISSUER + "/"}, "wrong_issuer"),
    "iss upper case": ({"iss": ISSUER.upper()}, "wrong_issuer"),
    "iss prefix": ({"iss": ISSUER[:-4]}, "wrong_issuer"),
    "iss longer": ({"iss": ISSUER + ".evil.example"}, "wrong_issuer"),
    "iss list": ({"iss": [ISSUER]}, "token_malformed"),
    "iss empty": ({"iss": ""}, "token_malformed"),
    "aud other": ({"aud": "https://other.example"}, "wrong_audience"),
    "aud empty": ({"aud": ""}, "token_malformed"),
    "aud []": ({"aud": []}, "wrong_audience"),
    "aud substring": ({"aud": AUDIENCE[:-4]}, "wrong_audience"),
    "aud longer": ({"aud": AUDIENCE + "/v1"}, "wrong_audience"),
    "aud object": ({"aud": {AUDIENCE: True}}, "token_malformed"),
    "aud nested": ({"aud": [[AUDIENCE]]}, "token_malformed"),
    "aud mixed": ({"aud": [AUDIENCE, 1]}, "token_malformed"),
    "aud null": ({"aud": None}, "token_malformed"),
    "aud *": ({"aud": "*"}, "wrong_audience"),
    "sub number": ({"sub": 1}, "token_malformed"),
    "sub null": ({"sub": None}, "token_malformed"),
    "sub empty": ({"sub": ""}, "token_malformed"),
    "jti list": ({"jti": ["x"]}, "token_malformed"),
    "client_id number": ({"client_id": 1}, "token_malformed"),
    "org_id list": ({"org_id": ["org"]}, "token_malformed"),
    "org_id null": ({"org_id": None}, "token_malformed"),
    "env number": ({"env": 1}, "token_malformed"),
    "project_id true": ({"project_id": True}, "token_malformed"),
    "must unknown": ({"must": ["scope", "moon_phase"]}, "unknown_restriction"),
    "must text": ({"must": "scope"}, "token_malformed"),
    "must of lists": ({"must": [["scope"]]}, "token_malformed"),
    "half a surrogate pair": ({"sub": "key_\ud800"}, "token_malformed"),
}


@pytest.mark.parametrize(("changes", "code"), CLAIMS.values(), ids=CLAIMS)
def test_a_claim_of_the_wrong_type_or_value_is_refused(
    changes: dict[str, object], code: str
) -> None:
    """
    V16, V18, V20, V21, V22, V23, V25: what is nearly right is wrong.

    RFC 9068 §2.2 and §4; RFC 7519 §4.1; RFC 8259 §6.
    """
    assert code_of(signer().token(claims(**changes))) == code


@pytest.mark.parametrize("name", REQUIRED_CLAIMS)
def test_no_required_claim_may_be_missing(name: str) -> None:
    """
    V16, V21, V22, V23, V25: the sentence names the claim, which is ours and not input.

    RFC 9068 §2.2.
    """
    with pytest.raises(VerifierError, match=f"The claim {name} is missing") as refused:
        accept(signer().token(claims(**{name: ABSENT})))

    assert refused.value.code == "token_malformed"


GOOD_CLAIMS: dict[str, dict[str, object]] = {
    "aud list": {"aud": ["https://other.example", AUDIENCE]},
    "second audience": {"aud": "urn:second-name"},
    "nbf past": {"nbf": -1},
    "nbf fraction": {"nbf": NOW - 0.5},
    "nbf within the leeway": {"nbf": NOW + 30},
    "iat within the leeway": {"iat": NOW + 30},
    "iat long ago": {"iat": NOW - 86_400},
    "scope list": {"scope": ["widgets:read"]},
    "scope object": {"scope": {}},
    "scope absent": {"scope": ABSENT},
    "no Coatcheck claims": {"org_id": ABSENT, "env": ABSENT, "as_of": ABSENT},
    "must known": {"must": ["scope", "environment"]},
    "must empty": {"must": []},
    "opaque sub": {"sub": "a b\u00e9\u0000"},
    "unknown claims": {"x": {"y": [1, 2.5, None, True]}},
}


@pytest.mark.parametrize("changes", GOOD_CLAIMS.values(), ids=GOOD_CLAIMS)
def test_a_token_may_say_it_in_any_way_that_the_rfc_allows(changes: dict[str, object]) -> None:
    """V20, V24, V26: RFC 7519 §4.1.3 (list of audiences), §4.1.4 (leeway), §4.2 (unknown ones)."""
    assert accept(signer().token(claims(**changes)))


def payload_texts() -> dict[str, bytes]:
    text = json.dumps(claims())
    return {
        "array": b"[1]",
        "text": b'"sub"',
        "null": b"null",
        "empty": b"",
        "trailing garbage": text.encode() + b"x",
        "two objects": text.encode() * 2,
        "comment": b"/* */" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without mark": text.encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "NUL behind": text.encode() + b"\0",
        "NUL inside": text.replace("{", "{\0").encode(),
        "single quotes": text.replace('"', "'").encode(),
        "no UTF-8": text.replace("widgets", "\udcff").encode("utf-8", "surrogateescape"),
        **{
            f"exp {literal}": text.replace(str(NOW + 600), literal).encode()
            for literal in ("NaN", "Infinity", "-Infinity", "1e400", "+1", "01", "1.", "1" * 3000)
        },
        "nbf NaN": text.replace("{", '{"nbf":NaN,').encode(),
        "number beyond all bounds": text.replace("{", '{"x":1e400,').encode(),
        **{
            f"{name} twice": text.replace("{", f'{{"{name}":{json.dumps(value)},').encode()
            for name, value in claims().items()
        },
        "duplicate inside": text.replace("{", '{"x":{"y":1,"y":2},').encode(),
        "nested arrays": b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        "nested objects": b'{"x":' * 400 + b"1" + b"}" * 400,
    }


PAYLOAD_TEXTS = payload_texts()


@pytest.mark.parametrize("payload", PAYLOAD_TEXTS.values(), ids=PAYLOAD_TEXTS)
def test_a_payload_that_is_not_plain_json_is_refused(payload: bytes) -> None:
    """
    V17, V18, V20, V27, V28, V29: json.loads alone takes half of these.

    RFC 7519 §4 and §7.2; RFC 8259 §6 and §8.1.
    """
    token = signer().token_of(as_json(signer().header()), payload)

    assert code_of(token) == "token_malformed"


NAMES = st.sampled_from(["a", "b", ",", "{", "[", '"', "\\", "a,b"])
MEMBERS = st.lists(st.tuples(NAMES, NAMES | st.integers(0, 9) | st.just({"a": [1, 2]})), max_size=5)
COMMAS = st.sampled_from([",", " ,\n"])
COLONS = st.sampled_from([":", "\t: "])


@given(MEMBERS, COMMAS, COLONS)
@unhurried
def test_no_name_occurs_twice(members: list[tuple[str, object]], comma: str, colon: str) -> None:
    """RFC 7519 §4, whatever the texts hold that looks like the grammar around them."""
    texts = [json.dumps(name) + colon + json.dumps(value) for name, value in members]
    data = f"{{{comma.join(texts)}}}".encode()

    if len(dict(members)) == len(members):
        assert check.json_object(data, 100) == dict(members)
    else:
        with pytest.raises(ValueError, match="twice"):
            check.json_object(data, 100)


def test_blanks_around_the_json_do_no_harm() -> None:
    """RFC 8259 §2."""
    payload = b" \r\n\t" + as_json(claims()) + b"\n"

    assert accept(signer().token_of(as_json(signer().header()), payload))


@pytest.mark.parametrize("depth", [100, 1_000, 100_000])
def test_deep_nesting_is_refused_in_no_time(depth: int) -> None:
    """V29: neither a RecursionError nor a pause that can be asked for.  RFC 8725 §3.7."""
    nested = b'{"alg":"ES256","kid":"first","x":' + b"[" * depth + b"]" * depth + b"}"
    began = time.thread_time()

    assert code_of(f"{base64url(nested)}.{base64url(nested)}.AAAA") == "token_malformed"

    assert time.thread_time() - began < 0.05


# Time


TIMES = {"29 s late": (NOW + 629, True), "31 s late": (NOW + 631, False)}


@pytest.mark.parametrize(("now", "is_accepted"), TIMES.values(), ids=TIMES)
def test_a_token_lives_until_exp_and_the_leeway(now: float, is_accepted: bool) -> None:
    """V19: RFC 7519 §4.1.4: on or after `exp` it is refused; a small leeway may be given."""
    token = signer().token(claims())

    if is_accepted:
        assert accept(token, now=now)
    else:
        assert code_of(token, now=now) == "token_expired"


@pytest.mark.parametrize("leeway_s", [0, 0.0, 60])
def test_the_last_moment_is_before_exp(leeway_s: float) -> None:
    """RFC 7519 §4.1.4: `exp` itself is too late."""
    expected = dataclasses.replace(EXPECTED, leeway_s=leeway_s)
    token = signer().token(claims(iat=NOW - 600, exp=NOW))

    assert accept(token, now=NOW + leeway_s - 0.001, expected=expected)
    with pytest.raises(VerifierError, match="expired"):
        accept(token, now=NOW + leeway_s, expected=expected)


def test_restrictions_are_held_against_the_request() -> None:
    """The same token, another resource server: its environment is another one."""
    token = signer().token(claims(env="test"))

    assert accept(token, situation=Situation(environment="test"))
    with pytest.raises(VerifierError) as refused:
        accept(token, situation=Situation(environment="live"))
    assert refused.value.code == "wrong_environment"


def test_each_restriction_that_must_be_enforced_is_held_against_the_request() -> None:
    """All of them, in any order; nothing else is looked at."""
    bound = {"cidrs": ["10.0.0.0/8"], "models": ["small"]}
    here = Situation(client_address="10.1.2.3", model="small")

    for must in (["network", "models"], ["models", "network"]):
        token = signer().token(claims(must=must, **bound))
        assert accept(token, situation=here)
        for elsewhere in (here._replace(client_address=None), here._replace(model="huge")):
            with pytest.raises(VerifierError):
                accept(token, situation=elsewhere)
    assert accept(signer().token(claims(**bound)), situation=Situation())
    registered = ["environment", "audience", "scope", "resource"]
    assert accept(signer().token(claims(must=registered)))


def test_no_sentence_repeats_what_was_presented() -> None:
    """A kid, an issuer or an audience may be a secret in the wrong place, or 100 kB long."""
    secret = "ck_live_thisIsSecret"
    changes: list[tuple[dict[str, object], dict[str, object]]] = [
        ({}, {"kid": secret}),
        ({}, {"typ": secret}),
        ({}, {"alg": secret}),
        ({"iss": secret}, {}),
        ({"aud": secret}, {}),
        ({"must": [secret]}, {}),
        ({"aud": {secret: 1}}, {}),
    ]
    for of_claims, of_header in changes:
        with pytest.raises(VerifierError) as refused:
            accept(signer().token(claims(**of_claims), **of_header))
        assert secret not in f"{refused.value!r}{refused.value.headers}{refused.value.body!r}"


# PyJWT as the oracle


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([ISSUER, AUDIENCE, NOW, NOW + 60, "scope", "at+jwt", "ES256", "first"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def thawed(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: thawed(member) for name, member in value.items()}
    if isinstance(value, tuple):
        return [thawed(item) for item in value]
    return value


def agree_with_pyjwt(token: str) -> None:
    """If the check accepts it, PyJWT does and reads the same."""
    try:
        ours = accept(token)
    except VerifierError:
        return
    theirs = jwt.decode(
        token,
        jwt.PyJWK(signer().jwk()),
        algorithms=["ES256"],
        audience=list(EXPECTED.audiences),
        issuer=ISSUER,
        # PyJWT looks at the wall clock.
        options={
            "require": list(REQUIRED_CLAIMS),
            "verify_exp": False,
            "verify_iat": False,
            "verify_nbf": False,
        },
    )
    assert thawed(ours) == theirs


@unhurried
@given(
    st.dictionaries(st.sampled_from([*claims(), "nbf", "must", "x"]), JSON_VALUES, max_size=2),
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "cty", "x"]), JSON_VALUES, max_size=1
    ),
)
def test_whatever_is_accepted_pyjwt_accepts_too(
    of_claims: dict[str, object], of_header: dict[str, object]
) -> None:
    """Our own parsing must never be the more generous one: PyJWT is the oracle."""
    agree_with_pyjwt(signer().token(claims(**of_claims), **of_header))


@unhurried
@given(st.data())
def test_whatever_text_is_accepted_pyjwt_accepts_too(data: st.DataObject) -> None:
    """As above, for broken texts of good tokens."""
    token = signer().token(claims())
    place = data.draw(st.integers(0, len(token)))
    replacement = data.draw(st.text(string.ascii_letters + string.digits + "-_.=+/ \n", max_size=2))
    agree_with_pyjwt(token[:place] + replacement + token[place + len(replacement) :])


@unhurried
@given(st.text() | st.text(string.ascii_letters + string.digits + "-_."))
def test_no_text_makes_anything_but_a_verifier_error(text: str) -> None:
    """A KeyError that gets out is a bug, and a 500 that a stranger can ask for."""
    assert code_of(text)


@unhurried
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_no_signed_bytes_make_anything_but_a_verifier_error(header: bytes, payload: bytes) -> None:
    """As above, behind the signature: even the issuer cannot crash a resource server."""
    assert code_of(signer().token_of(header, as_json(claims())))
    assert code_of(signer().token_of(as_json(signer().header()), payload))


def test_claims_cannot_be_changed_by_whoever_gets_them() -> None:
    """Later requests with the same token share them."""
    accepted = accept(signer().token(claims(roles=["admin"], x={"y": [1]})))

    assert accepted["roles"] == ("admin",)
    unchangeable: list[Any] = [accepted, accepted["x"], accepted["x"]["y"]]
    for target in unchangeable:
        with pytest.raises(TypeError):
            target[0] = 2
    assert accepted["x"]["y"] == (1,)
