"""The numbered check of an access token.  Pure: no I/O, no clock, no settings of its own.

Two functions, because they are called at different times:

- `check_signed` checks what can never change for this text: signature and types of the claims.
  Its first half, `open_jws`, holds for whatever an issuer signs.
- `check_use` checks what may differ each time the same token is presented.

PyJWT reads the key set and is the oracle in the tests.  Its `decode` is not used: it checks less
than RFC 9068 asks for, and the parsing around the signature costs half as much as the signature.

This file runs for each token that is seen for the first time, so it does each thing once.  A
signature has then emptied the processor's caches: each function that is called, and each object
that is made, costs a multiple of what it costs in a loop.

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
from coatcheck.restrictions import KNOWN, RESTRICTIONS, Situation
from coatcheck.restrictions.environment import EnvironmentRestriction
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

#: A number, because `b"." in data` raises and catches a TypeError inside, for a microsecond.
_DOT: Final = ord(".")
_JSON_BLANKS: Final = " \t\r\n"  # RFC 8259 §2

#: Makes a named tuple.  Calling its class runs a Python function first.
_made: Final = tuple.__new__

#: Each restriction is enforced where a token's `must` names it.
_CHECK_OF: Final = {restriction.name: restriction.check for restriction in RESTRICTIONS}
#: Never stands there, because every token has an environment, and is enforced always.
_check_environment: Final = EnvironmentRestriction().check


@dataclass(frozen=True, slots=True)
class SigningKey:
    """The public half of a signing key, as the key set published it.

    Attributes:
        kid: its name in the key set; opaque.
        algorithm: the only one it may be used with (RFC 8725 §3.1).
        members: its public JWK members; two keys are equal if these are.
    """

    kid: str
    algorithm: Algorithm
    members: tuple[tuple[str, str], ...]
    #: Takes signature and message; raises InvalidSignature if they do not belong together.
    verify: Callable[[bytes, bytes], None] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is read at all.

    Attributes:
        types: accepted `typ` values, lower case, without `application/`.
    """

    types: frozenset[str]
    algorithms: frozenset[str]
    max_bytes: int = MAX_TOKEN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected(Form):
    """What a token has to agree with at this resource server.

    Attributes:
        audiences: the names of this resource server; the first one is told to callers.
        leeway_s: how far the clocks of issuer and resource server may be apart.
    """

    issuer: str
    audiences: tuple[str, ...]
    leeway_s: float


@dataclass(frozen=True, slots=True)
class Header:
    """The header members that mean something here.  `typ`: None when absent or no text."""

    typ: str | None
    algorithm: str
    kid: str


#: Gives the signing key of this name; None: there is none at hand.
FindSigningKey = Callable[[str], SigningKey | None]


class NoSigningKey(errors.UnknownSigningKey):
    """No signing key of this name is at hand; it may be worth asking the issuer for it."""

    def __init__(self, kid: str) -> None:
        super().__init__()
        self.kid = kid


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
    #: Up to where its issuer had read the change log; None: it has not all that a feed asks for.
    as_of: int | None
    # Any: `check_signed` has looked at the types of those that are named there.
    claims: Mapping[str, Any]
    #: What it hangs on, in the feed's form; empty until `changes` works it out.
    subjects: list[str]


def open_jws(text: str, form: Form, find: FindSigningKey) -> tuple[SigningKey, bytes]:
    """The payload of a compact JWS, and the signing key that stands for it.

    1. Form: bounded ASCII (a) in three parts (b), each base64url in its one spelling (c).
    2. Header: a JSON object with `alg` and `kid`, and no member that would change its meaning.
    3. `typ` and `alg` are among those accepted here.
    4. The signing key has the `kid` of the header.
    5. `alg` is the algorithm of that signing key.
    6. The signature fits.

    Raises:
        VerifierError: the first step that fails.
    """
    # 1a, before anything that costs more.
    if len(text) > form.max_bytes or not text.isascii():
        raise errors.TokenMalformed
    # 1b
    signing_input, _, signature_text = text.encode().rpartition(b".")
    header_text, dot, payload_text = signing_input.partition(b".")
    if not dot or _DOT in payload_text:
        raise errors.TokenMalformed
    # 2
    header = _header(header_text)
    # 1c
    try:
        payload, signature = base64url.decode(payload_text), base64url.decode(signature_text)
    except ValueError:
        raise errors.TokenMalformed from None
    # 3
    if header.typ not in form.types:
        raise errors.WrongType
    if header.algorithm not in form.algorithms:
        raise errors.BadAlgorithm
    # 4
    signing_key = find(header.kid)
    if signing_key is None or signing_key.kid != header.kid:
        raise NoSigningKey(header.kid)
    # 5
    if signing_key.algorithm != header.algorithm:
        raise errors.BadAlgorithm
    # 6
    try:
        signing_key.verify(signature, signing_input)
    except InvalidSignature:
        raise errors.BadSignature from None
    return signing_key, payload


def check_signed(token: str, expected: Expected, find: FindSigningKey) -> SignedClaims:
    """Check what stays as it is for as long as the signing key is published.

    1. to 6. `open_jws`.
    7. The payload is one JSON object in UTF-8, without duplicate names, NaN or giant numbers.
    8. The claims that RFC 9068 §2.2 requires are there, and all claims known here have their
       types.

    Raises:
        VerifierError: the first step that fails.
    """
    # 1 to 6
    signing_key, payload = open_jws(token, expected, find)
    # 7
    try:
        claims = json_object(payload, MAX_CONTAINERS)
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
    # Of this issuer's profile, and required only where a feed is followed.
    as_of = claims.get("as_of")
    if type(as_of) is not int or "org_id" not in claims or "env" not in claims:
        as_of = None
    frozen = MappingProxyType(claims)
    return _made(
        SignedClaims,
        (signing_key, issuer, audiences, starts_at, expires_at, must, as_of, frozen, []),
    )


def check_use(signed: SignedClaims, expected: Expected, now: float, situation: Situation) -> str:
    """Check what may have changed since the token was looked at last.

    9. `iss` is the issuer, byte for byte.
    10. `aud` names this resource server.
    11. Now is before `exp`, and not before `iat` and `nbf`, give or take the leeway.
    12. Each restriction that the token wants enforced is known here.
    13. The environment and each of these restrictions let the request at hand pass.

    Args:
        now: seconds since the epoch.
        situation: what is known of the request.

    Returns:
        The name of this resource server that the token was made for.

    Raises:
        VerifierError: the first step that fails.
    """
    # At once: a named tuple looks for each name anew.
    _, issuer, audiences, starts_at, expires_at, must, _, claims, _ = signed
    # 9
    if issuer != expected.issuer:
        raise errors.WrongIssuer(
            f"The access token comes from another issuer than {expected.issuer}"
        )
    # 10
    for audience in audiences:
        if audience in expected.audiences:
            break
    else:
        raise errors.WrongAudience(
            f"The access token is for another audience: request one for {expected.audiences[0]}"
        )
    # 11
    leeway_s = expected.leeway_s
    if expires_at + leeway_s <= now:
        raise errors.TokenExpired
    if starts_at - leeway_s > now:
        raise errors.TokenFromFuture
    # 12
    if must and not KNOWN.issuperset(must):
        raise errors.UnknownRestriction
    # 13
    _check_environment(claims, situation, _refuse)
    for name in must:
        _CHECK_OF[name](claims, situation, _refuse)
    return audience


def json_object(data: bytes, max_containers: int) -> dict[str, Any]:
    """Read a JSON object as strictly as RFC 7493 (I-JSON) writes one.

    Args:
        data: UTF-8 without a byte order mark; json.loads would guess UTF-16 as well.
        max_containers: how many arrays and objects it may hold.

    Raises:
        ValueError: it is no such object.  The message is Python's and may repeat input.
    """
    text = data.decode().strip(_JSON_BLANKS)
    # As almost every payload is.  Its commas tell that no name occurs twice, so that the scan need
    # not hand each member to Python, which would cost a third more.
    is_flat = text.rfind("{") == 0 and "[" not in text
    if not is_flat and text.count("{") + text.count("[") > max_containers:
        raise ValueError("too many arrays and objects")
    try:
        value, end = (_scan_flat if is_flat else _scan_json)(text, 0)
        if is_flat and text.count(",") >= len(value):
            # Members have one comma less than there are members.  Here are more: in a text, or
            # because a name occurs twice and its last member alone was kept.  This scan tells.
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


def _scanner(hook: Callable[[Any], object] | None = None) -> Callable[[str, int], tuple[Any, int]]:
    """Takes a text and where to begin; returns a value and where it ends."""
    decoder: Any = json.JSONDecoder(
        object_pairs_hook=hook, parse_float=_number, parse_constant=_no_constant
    )
    return cast(Callable[[str, int], tuple[Any, int]], decoder.scan_once)


_scan_json: Final = _scanner(_members)
#: For flat objects.  Of members that have the same name it keeps the last one.
_scan_flat: Final = _scanner()
