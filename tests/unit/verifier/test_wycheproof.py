"""Project Wycheproof's vectors for JWS, JWK and the three algorithms, through our own functions.

They lie beside the project, or where COATCHECK_TEST_VECTORS says.

The vectors are no access tokens, so they enter at the level of the signature: key set and steps 1
to 6 (form, header, signing key, algorithm, signature), or the signature alone.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.exceptions import InvalidSignature

from coatcheck.token_profile import ALGORITHMS
from coatcheck.verifier import VerifierError, check, keyset
from support.tokens import as_json, base64url


def folder_of(environment: Mapping[str, str]) -> Path:
    """Where the vectors lie."""
    beside_us = Path(__file__).parents[4] / "shared" / "wycheproof"
    return Path(environment.get("COATCHECK_TEST_VECTORS") or beside_us)


FOLDER: Final = folder_of(os.environ)
needs_vectors = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no vectors: set COATCHECK_TEST_VECTORS"
)

RAW_FILES: Final = {
    "ecdsa_secp256r1_sha256_p1363_test.json": ("ES256", "publicKeyJwk"),
    "ed25519_test.json": ("EdDSA", "publicKeyJwk"),
    "rsa_signature_2048_sha256_test.json": ("RS256", "keyJwk"),
    "rsa_signature_3072_sha256_test.json": ("RS256", "keyJwk"),
    "rsa_signature_4096_sha256_test.json": ("RS256", "keyJwk"),
}

#: No vector has a `typ`.
NO_TYPE: Any = frozenset((None,))
FORM: Final = check.Form(types=NO_TYPE, algorithms=frozenset(ALGORITHMS), max_bytes=10**6)

JWS_FILE: Final = "json_web_signature_test.json"
JWK_FILE: Final = "json_web_key_test.json"
#: Files that may lie there and are not for us → why.
NOT_OURS: Final[dict[str, str]] = {}


def groups(file: str) -> Iterator[dict[str, Any]]:
    yield from json.loads((FOLDER / file).read_text())["testGroups"]


def is_verified(jws: object, jwks: list[object]) -> bool:
    """What the verifier makes of a JWS, without looking at what it says."""
    try:
        check.open_jws(str(jws), FORM, keyset.parse(as_json({"keys": jwks})).get)
    except VerifierError:
        return False
    return True


def is_ours(jwk: dict[str, Any]) -> bool:
    """Whether a valid vector is for an algorithm and a key that the profile has."""
    return jwk.get("alg") in ("ES256", "RS256") or jwk.get("crv") == "Ed25519"


def jwk_of(public: dict[str, str]) -> dict[str, str]:
    x, y = (base64url(int(public[name], 16).to_bytes(32, "big")) for name in ("wx", "wy"))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def test_the_vectors_may_lie_anywhere(tmp_path: Path) -> None:
    """Whoever checks us out alone keeps them elsewhere; a setting without value is none."""
    assert folder_of({"COATCHECK_TEST_VECTORS": str(tmp_path)}) == tmp_path
    assert folder_of({"COATCHECK_TEST_VECTORS": ""}) == folder_of({})
    assert folder_of({}).parts[-2:] == ("shared", "wycheproof")


@needs_vectors
def test_every_file_of_vectors_is_used() -> None:
    """A file that nobody reads finds nothing."""
    there = {path.name for path in FOLDER.glob("*.json")}

    assert there - set(NOT_OURS) == {JWS_FILE, JWK_FILE, *RAW_FILES}


@needs_vectors
def test_json_web_signatures() -> None:
    """RFC 7515, RFC 7518: no invalid one passes, and each valid one of our algorithms does."""
    accepted = 0
    for group in groups(JWS_FILE):
        jwk = group.get("public") or group["private"]
        for vector in group["tests"]:
            expected = vector["result"] == "valid" and is_ours(jwk)
            verified = is_verified(vector["jws"], [jwk])
            assert verified == expected, (vector["tcId"], vector["comment"])
            accepted += verified
    assert accepted >= 10


@needs_vectors
def test_json_web_keys() -> None:
    """V39: RFC 7517: which key of a set may be used, ROCA and ambiguous names included."""
    accepted = 0
    for group in groups(JWK_FILE):
        keys = (group.get("public") or group["private"])["keys"]
        for vector in group["tests"]:
            expected = vector["result"] == "valid" and any(map(is_ours, keys))
            verified = is_verified(vector["jws"], keys)
            assert verified == expected, (vector["tcId"], vector["comment"])
            accepted += verified
    assert accepted == 1


@needs_vectors
@pytest.mark.parametrize("file", RAW_FILES)
def test_signatures(file: str) -> None:
    """V31, V32, V34, V35: RFC 7518 §3.3 and §3.4, RFC 8032 §5.1.7, RFC 8017 §8.2.2."""
    algorithm, member = RAW_FILES[file]
    accepted = 0
    for group in groups(file):
        # A few groups show their key as numbers only.
        jwk = group.get(member) or jwk_of(group["publicKey"])
        signing_key = keyset.parse(as_json({"keys": [{**jwk, "kid": "vector"}]})).get("vector")
        assert signing_key is None or signing_key.algorithm == algorithm
        for vector in group["tests"]:
            if signing_key is None:
                assert vector["result"] != "valid", vector["tcId"]
                continue
            try:
                signing_key.verify(bytes.fromhex(vector["sig"]), bytes.fromhex(vector["msg"]))
                is_good = True
            except InvalidSignature:
                is_good = False
            assert vector["result"] in ("acceptable", "valid" if is_good else "invalid"), vector
            accepted += is_good
    assert accepted >= 5


@needs_vectors
def test_a_vector_that_passes_would_pass_in_a_token_too() -> None:
    """The helper above reads a JWS as the verifier does: a changed header no longer fits."""
    group = next(g for g in groups(JWS_FILE) if g["comment"] == "es256")
    good = next(v["jws"] for v in group["tests"] if v["result"] == "valid")
    header = as_json({"alg": "ES256", "kid": group["public"]["kid"], "x": 1})

    assert is_verified(good, [group["public"]])
    assert not is_verified(f"{base64url(header)}.{good.partition('.')[2]}", [group["public"]])
