"""Signing keys, key sets and access tokens for tests: good ones, and any kind of bad one.

A test changes only what it is about: `claims(exp=None)`, `signer().token(claims(), typ="JWT")`.
Signers are made once per process, because an RSA key takes a tenth of a second.
"""

import json
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from coatcheck.scope import Scopes
from coatcheck.verifier import Principal

ISSUER: Final = "https://auth.example.com"
AUDIENCE: Final = "https://api.example.com"
NOW: Final = 1_790_000_000

#: In place of a value: leave the member out.
ABSENT: Final = object()


@dataclass(frozen=True, eq=False)
class Signer:
    """A signing key with both halves."""

    kid: str
    algorithm: str
    private: Any

    def jwk(self, **changes: object) -> dict[str, object]:
        """Its public half, as a key set publishes it."""
        to_jwk: dict[str, Callable[..., dict[str, Any]]] = {
            "ES256": ECAlgorithm.to_jwk,
            "RS256": RSAAlgorithm.to_jwk,
            "EdDSA": OKPAlgorithm.to_jwk,
        }
        public = to_jwk[self.algorithm](self.private.public_key(), as_dict=True)
        public.pop("key_ops", None)
        return changed({**public, "kid": self.kid, "use": "sig", "alg": self.algorithm}, changes)

    def header(self, **changes: object) -> dict[str, object]:
        return changed({"typ": "at+jwt", "alg": self.algorithm, "kid": self.kid}, changes)

    def signature(self, signing_input: bytes) -> bytes:
        return jwt.get_algorithm_by_name(self.algorithm).sign(signing_input, self.private)

    def token(self, claims: dict[str, object], **header: object) -> str:
        """A token that is signed rightly, whatever it says."""
        return self.token_of(as_json(self.header(**header)), as_json(claims))

    def token_of(self, header: bytes, payload: bytes) -> str:
        """A token of these very bytes, signed rightly."""
        signing_input = f"{base64url(header)}.{base64url(payload)}"
        return f"{signing_input}.{base64url(self.signature(signing_input.encode()))}"


@lru_cache
def signer(algorithm: str = "ES256", kid: str = "first") -> Signer:
    """A signing key; the same one for the same arguments."""
    make: dict[str, Callable[[], object]] = {
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }
    return Signer(kid, algorithm, make[algorithm]())


def claims(**changes: object) -> dict[str, object]:
    """The claims of an ordinary access token that was issued at NOW for ten minutes."""
    ordinary = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "client_id": "key_0FvQ2uWwXk3sT1bL9cZp4E",
        "iat": NOW,
        "exp": NOW + 600,
        "jti": "9ZbTq0cXh2Lw",
        "scope": "widgets:read widgets:write",
        "org_id": "org_0FvQ2uWwXk3sT1bL9cZp4E",
        "env": "live",
        "as_of": 17,
    }
    return changed(ordinary, changes)


def a_principal(_: str = "", *, audience: str = AUDIENCE, now: int = NOW) -> Principal:
    """Whom an API's own look-up of an API key vouches for: `Verifier(check_api_key=…)`."""
    return Principal(
        key_id="key_1",
        org_id="org_1",
        project_id=None,
        environment="live",
        scopes=Scopes.parse("widgets:read"),
        method="api_key",
        expires_at=now + 600,
        token_id="",
        client_id="key_1",
        audience=audience,
        claims={},
    )


def key_set(*jwks: dict[str, object]) -> bytes:
    """A JWK set of these keys; of the first signer's, if none are named."""
    return as_json({"keys": list(jwks or (signer().jwk(),))})


def changed(members: dict[str, Any], changes: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in {**members, **changes}.items() if value is not ABSENT}


def as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class SetClock:
    """A clock that stands still until it is put forward."""

    now: float = float(NOW)

    def __call__(self) -> float:
        return self.now
