"""Tokens that are nearly right, at the verifier: only its own errors, and never a forgery.

Two judges that share no code with the verifier: what the issuer has signed in this run, text by
text, and what a claim has to be before anybody may go by it.
"""

import base64
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import strategies as st

from coatcheck.verifier import Principal, Verifier, VerifierError
from fuzz.target import Tally, fuzz
from support.tokens import (
    AUDIENCE,
    ISSUER,
    NOW,
    SetClock,
    Signer,
    as_json,
    base64url,
    claims,
    key_set,
    signer,
)

#: Seconds of this thread that one look may take, a hundred times what it takes.
AT_MOST_S: Final = 0.25
LEEWAY: Final = 30
ALGORITHMS: Final = ("ES256", "RS256", "EdDSA")
ATTACKER: Final = "attacker"


# --- how a good token is spoilt


@dataclass(frozen=True)
class Change:
    """Of one member, in the header or in the claims."""

    where: str
    name: str
    value: object


@dataclass(frozen=True)
class Flip:
    """Of the text of a token, at a thousandth of it or in one of its parts."""

    what: str
    at: int
    text: str


@dataclass(frozen=True)
class Plan:
    """How a good token is spoilt.

    Attributes:
        algorithm: of the signing key that made it.
        spelling: how its JSON is written.
        signed_by: whose signature it bears after the changes.
        flips: changes of the finished text.
        place: where in a request it stands.
    """

    algorithm: str
    changes: tuple[Change, ...]
    spelling: str
    signed_by: str
    flips: tuple[Flip, ...]
    place: str


NAMES: Final = (
    *("iss", "aud", "sub", "client_id", "iat", "exp", "jti", "scope", "org_id", "env", "as_of"),
    *("nbf", "must", "roles", "project_id", "x"),
)
HEADER_NAMES: Final = (
    *("alg", "kid", "typ", "crit", "b64", "cty", "jwk", "jku", "x5u", "x5c", "zip", "enc", "x"),
)
values = st.recursive(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, NOW, NOW + 60, NOW - 60, NOW + 0.5, 10**20, 2**63),
            *(ISSUER, AUDIENCE, f"{ISSUER}/", f"{AUDIENCE}/x", "", "*", "none", "HS256", "ES256"),
            *("RS256", "EdDSA", "ES384", "first", ATTACKER, "at+jwt", "JWT", "AT+JWT", "scope"),
            *("application/at+jwt", "at+jwt ", "\0", "\ud800", "é", "a" * 3000, "environment"),
        ]
    )
    | st.text(max_size=6)
    | st.integers()
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=4,
)
#: Claims that are nearly right, which is where a check is forgotten.
NEARLY: Final = (
    *((name, NOW + late) for name in ("exp", "iat", "nbf") for late in (-31, -29, 29, 31, 10**6)),
    *(("exp", 0), ("aud", [AUDIENCE, "x"]), ("aud", [[AUDIENCE]]), ("aud", []), ("must", ["x"])),
    *(("must", ["scope"]), ("must", "scope"), ("sub", ["x"]), ("jti", ""), ("client_id", None)),
    *(("iss", [ISSUER]), ("iss", f"{ISSUER}/"), ("aud", f"{AUDIENCE}/"), ("scope", ["x"])),
)
changes = st.one_of(
    st.sampled_from(NEARLY).map(lambda claim: Change("claims", *claim)),
    st.builds(Change, st.just("claims"), st.sampled_from(NAMES), values),
    st.builds(Change, st.just("header"), st.sampled_from(HEADER_NAMES), values),
)
flips = st.builds(
    Flip,
    st.sampled_from(["set", "insert", "cut", "case", "append", "prepend", "part", "no part"]),
    st.integers(0, 999),
    st.sampled_from(
        [*"AZaz09-_.=+/ \n\0é", "\uff0e", "==", "\r\n", "Bearer ", ".x", ", ", "\u200b"]
    ),
)
SPELLINGS: Final = (*("plain",) * 12, "blanks", "twice", "escaped", "wide", "bom", "more")
SIGNERS: Final = (
    *("the issuer",) * 5,
    *("nobody", "an attacker", "the public key", "left over"),
)
PLACES: Final = (*("bearer",) * 3, "basic", "x-api-key", *("text",) * 3, "query", "twice")
plans = st.builds(
    Plan,
    st.sampled_from(ALGORITHMS),
    st.just(()) | st.lists(changes, max_size=2).map(tuple),
    st.sampled_from(SPELLINGS),
    st.sampled_from(SIGNERS),
    st.just(()) | st.just(()) | st.lists(flips, max_size=2).map(tuple),
    st.sampled_from(PLACES),
)


# --- from a plan to a token


def members_of(plan: Plan, where: str, good: dict[str, object]) -> dict[str, object]:
    changed = {one.name: one.value for one in plan.changes if one.where == where}
    return good | changed


def written(members: dict[str, object], spelling: str) -> bytes:
    """The same JSON in another spelling; or one that is JSON to some readers only."""
    match spelling:
        case "blanks":
            return b" \n" + json.dumps(members, indent=1).encode() + b"\t"
        case "twice":
            return as_json(members)[:-1] + b"," + as_json(dict(list(members.items())[:1]))[1:]
        case "escaped":
            return as_json(members).replace(b"s", b"\\u0073")
        case "wide":
            return json.dumps(members).encode("utf-16")
        case "bom":
            return b"\xef\xbb\xbf" + as_json(members)
        case "more":
            return as_json(members) + as_json(members)
    return as_json(members)


def public_key_of(by: Signer) -> bytes:
    pem: bytes = by.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def of_the_issuer(algorithm: str) -> Signer:
    """The issuer's signing key for an algorithm, which is its name too."""
    return signer(algorithm, algorithm)


def signing_input_of(header: bytes, payload: bytes) -> bytes:
    return f"{base64url(header)}.{base64url(payload)}".encode()


def token_of(plan: Plan, signed: set[bytes]) -> str:
    """The token, before its text is changed.  What the issuer signs is kept in `signed`."""
    by, attacker = of_the_issuer(plan.algorithm), signer(plan.algorithm, ATTACKER)
    header = members_of(plan, "header", by.header())
    if plan.signed_by == "the public key":
        header["alg"] = "HS256"
    said = members_of(plan, "claims", claims())
    signing_input = signing_input_of(written(header, plan.spelling), written(said, plan.spelling))
    match plan.signed_by:
        case "nobody":
            signature = b""
        case "the issuer":
            signed.add(signing_input)
            signature = by.signature(signing_input)
        case "an attacker":
            signature = attacker.signature(signing_input)
        case "the public key":
            signature = jwt.get_algorithm_by_name("HS256").sign(signing_input, public_key_of(by))
        case _:
            other = signing_input_of(as_json(by.header()), as_json(claims()))
            signed.add(other)
            signature = by.signature(other)
    return f"{signing_input.decode()}.{base64url(signature)}"


def flipped(text: str, flip: Flip) -> str:
    at = flip.at * len(text) // 1000
    parts = text.split(".")
    match flip.what:
        case "set":
            return text[:at] + flip.text + text[at + len(flip.text) :]
        case "insert":
            return text[:at] + flip.text + text[at:]
        case "cut":
            return text[:at] + text[at + len(flip.text) :]
        case "case":
            return text[:at] + text[at : at + 1].swapcase() + text[at + 1 :]
        case "append":
            return text + flip.text
        case "prepend":
            return flip.text + text
        case "part":
            parts.insert(flip.at % (len(parts) + 1), parts[flip.at % len(parts)])
        case _:
            del parts[flip.at % len(parts)]
    return ".".join(parts)


def request_of(text: str, place: str) -> tuple[list[tuple[str, str]], str]:
    """Headers and query of a request that carries this token."""
    match place:
        case "basic":
            encoded = base64.b64encode(f"{text}:".encode("utf-8", "surrogatepass")).decode()
            return [("Authorization", f"Basic {encoded}")], ""
        case "x-api-key":
            return [("X-API-Key", text)], ""
        case "query":
            return [], f"access_token={text}"
        case "twice":
            return [("Authorization", f"Bearer {text}")] * 2, ""
    return [("Authorization", f"Bearer {text}")], ""


# --- the judges


def is_unspoilt(plan: Plan) -> bool:
    return (
        not plan.changes
        and not plan.flips
        and plan.spelling in ("plain", "blanks", "escaped")
        and plan.signed_by == "the issuer"
        and plan.place not in ("query", "twice")
    )


def require_meaning(signing_input: bytes, said: Mapping[str, Any]) -> None:
    """Raise unless the text says what was read from it, and that is good here and now."""
    header, payload = (decoded(part) for part in signing_input.split(b"."))
    assert payload == thawed(said)
    assert header["alg"] == header["kid"]
    assert header["typ"].lower() in ("at+jwt", "application/at+jwt")
    assert not {"crit", "b64", "cty", "zip", "enc", "jwk", "jku", "x5u", "x5c"} & set(header)
    assert payload["iss"] == ISSUER
    audiences = payload["aud"] if isinstance(payload["aud"], list) else [payload["aud"]]
    assert AUDIENCE in audiences
    assert type(payload["exp"]) is int
    assert payload["exp"] > NOW - LEEWAY
    assert type(payload["iat"]) is int
    assert payload["iat"] <= NOW + LEEWAY
    assert payload.get("nbf", 0) <= NOW + LEEWAY
    assert all(payload[name] and type(payload[name]) is str for name in ("sub", "client_id", "jti"))
    assert set(payload.get("must", ())) <= {"scope", "expiry", "environment", "audience"}


def decoded(part: bytes) -> dict[str, Any]:
    """A part of a token, read as strictly as it can be read."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    text = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    read: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    return read


def thawed(value: object) -> object:
    """Claims as JSON has them: the verifier's cannot be changed."""
    if isinstance(value, Mapping):
        return {name: thawed(member) for name, member in value.items()}
    if isinstance(value, tuple):
        return [thawed(item) for item in value]
    return value


def require_own_error(refused: VerifierError, text: str) -> None:
    """Raise unless the answer is a proper one that repeats nothing."""
    assert 400 <= refused.status < 500, refused
    for name, value in refused.headers.items():
        assert (name + value).isascii()
        assert (name + value).isprintable()
    assert json.loads(refused.body)["code"] == refused.code
    said = f"{refused!r}{refused.headers}{refused.body!r}"
    assert len(said) < 2000
    signature = text.rpartition(".")[2]
    assert len(signature) < 20 or signature not in said


@pytest.fixture(scope="module")
def fetched() -> list[str]:
    return []


@pytest.fixture(scope="module")
def verifier(fetched: list[str]) -> Iterator[Verifier]:
    body = key_set(*(of_the_issuer(algorithm).jwk() for algorithm in ALGORITHMS))

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return body

    with Verifier(ISSUER, AUDIENCE, feed=None, fetch=fetch, clock=SetClock()) as one:
        yield one


def presented(verifier: Verifier, text: str, place: str) -> Principal | VerifierError:
    """What the verifier makes of a token in this place; any other exception gets out."""
    headers, query = request_of(text, place)
    try:
        if place == "text":
            return verifier.verify_jwt(text)
        return verifier.authenticate(headers, query=query)
    except VerifierError as refused:
        return refused


def test_fuzz_tokens(verifier: Verifier, fetched: list[str], tally: Tally) -> None:
    """Whatever is presented: an error of the verifier's own, or what the issuer has signed."""

    def look(plan: Plan) -> None:
        signed: set[bytes] = set()
        text = token_of(plan, signed)
        for flip in plan.flips:
            text = flipped(text, flip)

        began = time.thread_time()
        outcome = presented(verifier, text, plan.place)

        assert time.thread_time() - began < AT_MOST_S
        if isinstance(outcome, VerifierError):
            tally.outcomes[outcome.code] += 1
            require_own_error(outcome, text)
            assert not is_unspoilt(plan), outcome
        else:
            tally.outcomes["accepted"] += 1
            # In a header a token may stand behind blanks.
            signing_input = text.lstrip(" ").rpartition(".")[0].encode()
            assert signing_input in signed, "a forgery"
            require_meaning(signing_input, outcome.claims)

    fuzz(tally, plans, look, examples=500)

    assert set(fetched) == {f"{ISSUER}/.well-known/jwks.json"}
