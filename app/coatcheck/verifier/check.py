"""The numbered check of an access token.  Pure: no I/O, no clock, no settings of its own.

Three functions, because they are called at different times:

- `read` looks at the token's form and header; it tells which signing key to look for.
- `check_signed` checks what can never change for this text: signature and types of the claims.
- `check_use` checks what may differ each time the same token is presented.

PyJWT reads the key set and is the oracle in the tests.  Its `decode` is not used: it checks less
than RFC 9068 asks for, and the parsing around the signature costs half as much as the signature.
This file runs for each token that is seen for the first time, so it does each thing once.

Source: RFC 7515 §5.2 and RFC 7519 §7.2 (validation), RFC 9068 §2 and §4 (access tokens),
RFC 8725 §3 (best practices), RFC 7518 §3 and RFC 8037 §3.1 (algorithms).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn, cast

from cryptography.exceptions import InvalidSignature

from coatcheck import base64url
from coatcheck.restrictions import KNOWN, RESTRICTIONS, Situation, in_numbered_steps
from coatcheck.token_profile import MAX_TOKEN_BYTES, REQUIRED_CLAIMS, Algorithm
from coatcheck.verifier import errors

#: Characters.  Ours are shorter than 128; the header cache holds nothing longer than this.
MAX_HEADER_LENGTH: Final = 1024
MAX_KID_LENGTH: Final = 256
#: Arrays and objects in one JSON text.  Bounds its depth as well, long before Python does.
MAX_CONTAINERS: Final = 100
#: RFC 8259 §6: larger integers are not the same number to everybody.
MAX_INTEGER: Final = 2**63 - 1
#: The last second of the year 9999.  A larger time is in milliseconds, or an attack.
MAX_TIME: Final = 253_402_300_799

#: RFC 7515 §4.1.11 and RFC 7797: changes of meaning.  RFC 7516, RFC 7519 §5.2: encryption and
#: nesting.  RFC 8725 §3.10: keys that the token brings along, or an address to fetch them from.
_REFUSED_MEMBERS: Final = frozenset(
    ("crit", "b64", "cty", "zip", "enc", "jwk", "jku", "x5u", "x5c")
)
_required_claims: Final = itemgetter(*REQUIRED_CLAIMS)
#: Never empty, and never anything but a text.
_TEXTS: Final = frozenset(("iss", "sub", "client_id", "jti", "org_id", "env", "project_id"))

_JSON_BLANKS: Final = " \t\r\n"  # RFC 8259 §2

#: Makes a named tuple.  Calling its class runs a Python function first, and a signature has just
#: emptied the processor's caches: each such call costs a microsecond there.
_made: Final = tuple.__new__

_CHECKS: Final = tuple(
    restriction.check for restriction in RESTRICTIONS if restriction.check is not in_numbered_steps
)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """The public half of a signing key, as the key set published it.

    Attributes:
        kid: its name in the key set; opaque.
        algorithm: the only one it may be used with (RFC 8725 §3.1).
        members: its public JWK members; two keys are equal if these are.
        signature_bytes: how long each of its signatures is.
    """

    kid: str
    algorithm: Algorithm
    members: tuple[tuple[str, str], ...]
    signature_bytes: int
    #: Takes signature and message; raises InvalidSignature if they do not belong together.
    verify: Callable[[bytes, bytes], None] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a token has to agree with at this resource server.

    Attributes:
        audiences: the names of this resource server; the first one is told to callers.
        types: accepted `typ` values, lower case, without `application/`.
        leeway_s: how far the clocks of issuer and resource server may be apart.
    """

    issuer: str
    audiences: tuple[str, ...]
    types: frozenset[str]
    algorithms: frozenset[str]
    leeway_s: float


@dataclass(frozen=True, slots=True)
class Header:
    """The header members that mean something here.  `typ`: None when absent or no text."""

    typ: str | None
    algorithm: str
    kid: str


class Unverified(NamedTuple):
    """A token in pieces.  Nothing in it has been proven.

    A tuple, as `SignedClaims` is: a frozen dataclass takes three times as long to make.
    """

    header: Header
    signing_input: bytes
    payload: bytes
    signature: bytes


class SignedClaims(NamedTuple):
    """Claims of the right types under a good signature.  Made by `check_signed` only.

    Whether they hold here and now, `check_use` says.
    """

    signing_key: SigningKey
    issuer: str
    audiences: tuple[str, ...]
    starts_at: float
    expires_at: int
    must: tuple[str, ...]
    # Any: `check_signed` has looked at the types of those that are named there.
    claims: Mapping[str, Any]


def read(token: str, expected: Expected) -> Unverified:
    """Take a presented token apart, as far as no signing key is needed.

    1. Form: at most MAX_TOKEN_BYTES of ASCII (a) in three parts (b), each base64url in its one
       spelling (c).
    2. Header: a JSON object with `alg` and `kid`, and no member that would change its meaning.
    3. `typ` and `alg` are among those accepted here.

    Raises:
        VerifierError: the first step that fails.
    """
    # 1a, before anything that costs more.
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise errors.TokenMalformed
    unverified = take_apart(token.encode())
    # 3
    if unverified.header.typ not in expected.types:
        raise errors.WrongType
    if unverified.header.algorithm not in expected.algorithms:
        raise errors.BadAlgorithm
    return unverified


def take_apart(text: bytes) -> Unverified:
    """Steps 1b to 2 of `read`: what holds for every compact JWS.

    Args:
        text: ASCII of a bounded length.
    """
    # 1b
    signing_input, _, signature_text = text.rpartition(b".")
    header_text, dot, payload_text = signing_input.partition(b".")
    if not dot or b"." in payload_text:
        raise errors.TokenMalformed
    # 2
    header = _header(header_text)
    # 1c
    try:
        payload, signature = base64url.decode(payload_text), base64url.decode(signature_text)
    except ValueError:
        raise errors.TokenMalformed from None
    return _made(Unverified, (header, signing_input, payload, signature))


def check_signed(unverified: Unverified, signing_key: SigningKey) -> SignedClaims:
    """Check what stays as it is for as long as the signing key is published.

    4. The signing key has the `kid` of the header.
    5. `alg` is the algorithm of that signing key.
    6. The signature fits.
    7. The payload is one JSON object in UTF-8, without duplicate names, NaN or giant numbers.
    8. The claims that RFC 9068 §2.2 requires are there, and all claims known here have their
       types.

    Raises:
        VerifierError: the first step that fails.
    """
    # 4 to 6
    check_signature(unverified, signing_key)
    # 7
    try:
        claims = json_object(unverified.payload, MAX_CONTAINERS)
    except ValueError:
        raise errors.TokenMalformed from None
    # 8
    for name, value in claims.items():
        kind = type(value)
        if kind is str:
            if not value and name in _TEXTS:
                raise errors.TokenMalformed(f"The claim {name} is empty.")
        elif name in _TEXTS:
            raise errors.TokenMalformed(f"The claim {name} is no text.")
        elif kind is not int or not -MAX_INTEGER <= value <= MAX_INTEGER:
            claims[name] = _frozen_all(value)
    try:
        issuer, audience, _, _, issued_at, expires_at, _ = _required_claims(claims)
    except KeyError as missing:
        raise errors.TokenMalformed(f"The claim {missing.args[0]} is missing.") from None
    # `type` rather than isinstance: true is an int to Python and no time to anybody else.
    if type(issued_at) is not int or not 0 <= issued_at <= MAX_TIME:
        raise errors.TokenMalformed("The claim iat is no time in whole seconds.")
    if type(expires_at) is not int or not 0 <= expires_at <= MAX_TIME:
        raise errors.TokenMalformed("The claim exp is no time in whole seconds.")
    starts_at: float = issued_at
    if "nbf" in claims:
        not_before = claims["nbf"]
        if type(not_before) not in (int, float) or not -MAX_TIME <= not_before <= MAX_TIME:
            raise errors.TokenMalformed("The claim nbf is no time.")
        starts_at = max(issued_at, not_before)
    # RFC 7519 §4.1.3: one text or a list of them.
    audiences = (audience,) if type(audience) is str and audience else _texts("aud", audience)
    must = _texts("must", claims["must"]) if "must" in claims else ()
    frozen = MappingProxyType(claims)
    return _made(
        SignedClaims, (signing_key, issuer, audiences, starts_at, expires_at, must, frozen)
    )


def check_signature(unverified: Unverified, signing_key: SigningKey) -> None:
    """Steps 4 to 6 of `check_signed`: what holds for every JWS."""
    # 4
    if unverified.header.kid != signing_key.kid:
        raise errors.UnknownSigningKey
    # 5
    if unverified.header.algorithm != signing_key.algorithm:
        raise errors.BadAlgorithm
    # 6 RFC 7518 §3.4: R and S have full length; DER or a shortened half is no signature.
    if len(unverified.signature) != signing_key.signature_bytes:
        raise errors.BadSignature
    try:
        signing_key.verify(unverified.signature, unverified.signing_input)
    except InvalidSignature:
        raise errors.BadSignature from None


def check_use(signed: SignedClaims, expected: Expected, now: float, situation: Situation) -> str:
    """Check what may have changed since the token was looked at last.

    9. `iss` is the issuer, byte for byte.
    10. `aud` names this resource server.
    11. Now is before `exp`, and not before `iat` and `nbf`, give or take the leeway.
    12. Each restriction that the token wants enforced is known here.
    13. Each restriction lets the request at hand pass.

    Args:
        now: seconds since the epoch.
        situation: what is known of the request.

    Returns:
        The name of this resource server that the token was made for.

    Raises:
        VerifierError: the first step that fails.
    """
    # 9
    if signed.issuer != expected.issuer:
        raise errors.WrongIssuer(
            f"The access token comes from another issuer than {expected.issuer}"
        )
    # 10
    for audience in signed.audiences:
        if audience in expected.audiences:
            break
    else:
        raise errors.WrongAudience(
            f"The access token is for another audience: request one for {expected.audiences[0]}"
        )
    # 11
    leeway_s = expected.leeway_s
    if signed.expires_at + leeway_s <= now:
        raise errors.TokenExpired
    if signed.starts_at - leeway_s > now:
        raise errors.TokenFromFuture
    # 12
    for name in signed.must:
        if name not in KNOWN:
            raise errors.UnknownRestriction
    # 13
    for restriction_check in _CHECKS:
        restriction_check(signed.claims, situation, _refuse)
    return audience


def json_object(data: bytes, max_containers: int) -> dict[str, Any]:
    """Read a JSON object as strictly as RFC 7493 (I-JSON) writes one.

    Args:
        data: UTF-8 without a byte order mark; json.loads would guess UTF-16 as well.
        max_containers: how many arrays and objects it may hold.

    Raises:
        ValueError: it is no such object.  The message is Python's and may repeat input.
    """
    if data.count(b"[") + data.count(b"{") > max_containers:
        raise ValueError("too many arrays and objects")
    text = data.decode().strip(_JSON_BLANKS)
    try:
        value, end = _scan_json(text, 0)
        if "\\" in text:
            # An escaped half of a surrogate pair is a text that nobody can write down again.
            json.dumps(value, ensure_ascii=False).encode()
    except StopIteration:
        raise ValueError("no JSON") from None
    except RecursionError:
        # Only where the caller's own stack is nearly full: MAX_CONTAINERS bounds the depth.
        raise ValueError("nested too deeply") from None
    if type(value) is not dict or end != len(text):
        raise ValueError("no object, or not only one")
    return value


@lru_cache(maxsize=64)
def _header(text: bytes) -> Header:
    """Step 2.  A signing key has one header text, so almost every call is a look-up.

    What is kept is the reading of a text, which proves nothing and cannot go stale.
    """
    if len(text) > MAX_HEADER_LENGTH:
        raise errors.TokenMalformed
    try:
        members = json_object(base64url.decode(text), MAX_CONTAINERS)
    except ValueError:
        raise errors.TokenMalformed from None
    if not _REFUSED_MEMBERS.isdisjoint(members):
        raise errors.TokenMalformed("The header of the access token holds a refused member.")
    algorithm, kid, typ = members.get("alg"), members.get("kid"), members.get("typ")
    if type(algorithm) is not str:
        raise errors.BadAlgorithm
    if type(kid) is not str or not 0 < len(kid) <= MAX_KID_LENGTH:
        raise errors.TokenMalformed("The header of the access token has no fit kid.")
    if type(typ) is str and typ.isascii():
        # RFC 7515 §4.1.9: media types ignore case, and `application/` may be left out.
        return Header(typ.lower().removeprefix("application/"), algorithm, kid)
    return Header(None, algorithm, kid)


def _texts(name: str, claim: object) -> tuple[str, ...]:
    if type(claim) is not tuple or not all(type(item) is str for item in claim):
        raise errors.TokenMalformed(f"The claim {name} does not hold texts.")
    return claim


def _refuse(code: str) -> NoReturn:
    """Raise the error for a restriction's code.  An unknown code refuses all the same."""
    raise errors.ERRORS.get(code, errors.UnknownRestriction)


def _frozen_all(value: object) -> object:
    """As `_frozen`, where the caller's own stack may be nearly full."""
    try:
        return _frozen(value)
    except RecursionError:
        raise errors.TokenMalformed from None


def _frozen(value: object) -> object:
    """The same value, unchangeable down to the last list: later requests share it."""
    if type(value) is int:
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise errors.TokenMalformed("A number in the access token is too large.")
    elif type(value) is list:
        return tuple(_frozen(item) for item in value)
    elif type(value) is dict:
        return MappingProxyType({name: _frozen(member) for name, member in value.items()})
    return value


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """RFC 7519 §4: names are unique.  Two parsers that pick different ones would be a hole."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


#: Takes a text and where to begin; returns a value and where it ends.
_scan_json: Final[Callable[[str, int], tuple[Any, int]]] = cast(
    Any,
    json.JSONDecoder(object_pairs_hook=_members, parse_float=_number, parse_constant=_no_constant),
).scan_once
