"""JWT libraries as their own documentation tells people to use them: key set, issuer, audience.

Each function is one library's way to check a token, and returns its claims.
"""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
import requests
from authlib.oauth2.rfc6750.errors import InvalidTokenError as AuthlibInvalidToken
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from jose import exceptions as jose
from jose import jwt as jose_jwt
from joserfc import errors as joserfc_errors
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet

from coatcheck.verifier import Verifier
from coatcheck.verifier.errors import BadSignature, TokenExpired, WrongAudience, WrongIssuer

TIMEOUT: Final = 5
ALGORITHMS: Final = ["ES256", "RS256", "EdDSA"]
FLAWS: Final = ("wrong audience", "wrong issuer", "tampered", "expired")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a resource server is configured with."""

    issuer: str
    audience: str
    jwks_url: str


def fetched(jwks_url: str) -> Any:
    return requests.get(jwks_url, timeout=TIMEOUT).json()


def pyjwt(token: str, expected: Expected) -> dict[str, Any]:
    # The context is for an authority of one's own; without it the system's count.
    keys = jwt.PyJWKClient(expected.jwks_url, ssl_context=ssl.create_default_context())
    signing_key = keys.get_signing_key_from_jwt(token)
    claims: dict[str, Any] = jwt.decode(
        token,
        signing_key,
        algorithms=ALGORITHMS,
        issuer=expected.issuer,
        audience=expected.audience,
    )
    return claims


def joserfc(token: str, expected: Expected) -> dict[str, Any]:
    """`EdDSA` has to be named, and warns: RFC 9864 would have it called `Ed25519`."""
    keys = KeySet.import_key_set(fetched(expected.jwks_url))
    decoded = joserfc_jwt.decode(token, keys, algorithms=ALGORITHMS)
    rules = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": expected.issuer},
        aud={"essential": True, "value": expected.audience},
    )
    rules.validate(decoded.claims)
    return dict(decoded.claims)


def python_jose(token: str, expected: Expected) -> dict[str, Any]:
    """Its users look the signing key up by `kid`, as the well-known tutorials do."""
    kid = jose_jwt.get_unverified_header(token)["kid"]
    key = next(key for key in fetched(expected.jwks_url)["keys"] if key["kid"] == kid)
    claims: dict[str, Any] = jose_jwt.decode(
        token, key, algorithms=ALGORITHMS, issuer=expected.issuer, audience=expected.audience
    )
    return claims


def python_jose_with_the_whole_key_set(token: str, expected: Expected) -> dict[str, Any]:
    """Its documentation offers this, too."""
    claims: dict[str, Any] = jose_jwt.decode(
        token,
        fetched(expected.jwks_url),
        algorithms=ALGORITHMS,
        issuer=expected.issuer,
        audience=expected.audience,
    )
    return claims


class AuthlibValidator(JWTBearerTokenValidator):  # type: ignore[misc]  # publishes no types
    """Authlib's validator of RFC 9068 tokens, with the one method that its user has to write."""

    def __init__(self, expected: Expected) -> None:
        super().__init__(issuer=expected.issuer, resource_server=expected.audience)
        self.jwks_url = expected.jwks_url

    def get_jwks(self) -> KeySet:
        return KeySet.import_key_set(fetched(self.jwks_url))


def authlib(token: str, expected: Expected) -> dict[str, Any]:
    """The two calls that its ResourceProtector makes for each request."""
    validator = AuthlibValidator(expected)
    claims = validator.authenticate_token(token)
    validator.validate_token(claims, scopes=None, request=None)
    return dict(claims)


def coatcheck(token: str, expected: Expected) -> dict[str, Any]:
    with Verifier(
        expected.issuer,
        expected.audience,
        jwks_url=expected.jwks_url,
        feed=None,
        trust_env=True,
    ) as verifier:
        return dict(verifier.verify_jwt(token).claims)


@dataclass(frozen=True, slots=True)
class JwtLibrary:
    """A library, and how it refuses what it must refuse.

    Attributes:
        refusals: flaw of the token → what it raises.
        cannot: algorithm that it does not have → what it raises at a good token.
    """

    verify: Callable[[str, Expected], dict[str, Any]]
    refusals: Mapping[str, type[Exception]]
    cannot: Mapping[str, type[Exception]] = field(default_factory=dict)


JWT_LIBRARIES: Final = {
    "PyJWT": JwtLibrary(
        pyjwt,
        {
            "wrong audience": jwt.InvalidAudienceError,
            "wrong issuer": jwt.InvalidIssuerError,
            "tampered": jwt.InvalidSignatureError,
            "expired": jwt.ExpiredSignatureError,
        },
    ),
    "joserfc": JwtLibrary(
        joserfc,
        {
            "wrong audience": joserfc_errors.InvalidClaimError,
            "wrong issuer": joserfc_errors.InvalidClaimError,
            "tampered": joserfc_errors.BadSignatureError,
            "expired": joserfc_errors.ExpiredTokenError,
        },
    ),
    "python-jose": JwtLibrary(
        python_jose,
        {
            "wrong audience": jose.JWTClaimsError,
            "wrong issuer": jose.JWTClaimsError,
            "tampered": jose.JWTError,
            "expired": jose.ExpiredSignatureError,
        },
        # No JWTError, which is what its users catch: without Ed25519 there is no key to begin with.
        cannot={"EdDSA": jose.JWKError},
    ),
    "authlib": JwtLibrary(
        authlib,
        dict.fromkeys(FLAWS, AuthlibInvalidToken),
        # It goes by joserfc's recommended algorithms, and no setting adds one.
        cannot={"EdDSA": AuthlibInvalidToken},
    ),
    "coatcheck": JwtLibrary(
        coatcheck,
        {
            "wrong audience": WrongAudience,
            "wrong issuer": WrongIssuer,
            "tampered": BadSignature,
            "expired": TokenExpired,
        },
    ),
}
