"""What a verification costs, as multiples of one raw `cryptography` verification.

Everything runs in this process and thread; the clock is the thread's own processor time, so that
a busy neighbor and the verifier's background threads are not counted.  The verifier is set up as
anybody's is: it follows the feed of the running service.
"""

import json
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from typing import Final

import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from coatcheck.verifier import Verifier

#: How often a remembered token is presented, for each time that a new one is.
_REPEATS: Final = 10
_HALF: Final = 32


def measure(tokens: Sequence[str], key_set: bytes, rounds: int) -> list[dict[str, float]]:
    """Microseconds per call, one dictionary per round.

    Args:
        tokens: distinct ES256 tokens of one issuer and audience, not expired.
        key_set: what verifies them.  Their issuer is running.
    """
    raw = _raw(tokens, key_set)
    claims = jwt.decode(tokens[0], options={"verify_signature": False})
    return [_round(tokens, raw, claims["iss"], claims["aud"]) for _ in range(rounds)]


def _round(
    tokens: Sequence[str], raw: Sequence[Callable[[], None]], issuer: str, audience: str
) -> dict[str, float]:
    with Verifier(issuer, audience) as verifier:
        # The first one fetches key set and feed; it counts nowhere.
        verifier.verify_jwt(tokens[0])
        requests = [
            [
                ("host", "api.example.com"),
                ("user-agent", "bench/1"),
                ("accept", "*/*"),
                ("authorization", f"Bearer {token}"),
            ]
            for token in tokens[1:]
        ]

        def verify_raw() -> None:
            for one in raw[1:]:
                one()

        def verify_jwt() -> None:
            for token in tokens[1:]:
                verifier.verify_jwt(token)

        def authenticate() -> None:
            for headers in requests:
                verifier.authenticate(headers)

        count = len(tokens) - 1
        return {
            "raw": _us(verify_raw) / count,
            "cold": _us(verify_jwt) / count,
            "remembered": _us(verify_jwt, _REPEATS) / count,
            "authenticate": _us(authenticate, _REPEATS) / count,
        }


def _us(work: Callable[[], None], repeats: int = 1) -> float:
    began = time.thread_time_ns()
    for _ in range(repeats):
        work()
    return (time.thread_time_ns() - began) / 1000 / repeats


def _raw(tokens: Sequence[str], key_set: bytes) -> list[Callable[[], None]]:
    """The least that checks each signature: r and s to DER, and one call."""
    public_keys = {jwk["kid"]: jwt.PyJWK(jwk).key for jwk in json.loads(key_set)["keys"]}
    ecdsa = ec.ECDSA(hashes.SHA256())
    checks: list[Callable[[], None]] = []
    for token in tokens:
        signing_input, _, last = token.rpartition(".")
        signature = urlsafe_b64decode(last + "==")
        public_key = public_keys[jwt.get_unverified_header(token)["kid"]]

        def check(
            signature: bytes = signature,
            message: bytes = signing_input.encode(),
            public_key: ec.EllipticCurvePublicKey = public_key,
        ) -> None:
            r, s = signature[:_HALF], signature[_HALF:]
            der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
            public_key.verify(der, message, ecdsa)

        checks.append(check)
    return checks
