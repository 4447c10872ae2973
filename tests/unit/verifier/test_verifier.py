"""The verifier's faces: settings, places of a credential, memory, challenges, status."""

import asyncio
import base64
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from coatcheck import apikey
from coatcheck.durations import JWKS_COOLDOWN, JWKS_MAX_AGE
from coatcheck.scope import MalformedScope
from coatcheck.verifier import (
    InsufficientScope,
    IssuerUnavailable,
    Principal,
    TokenExpired,
    UnknownSigningKey,
    Verifier,
    VerifierError,
)
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, claims, key_set, signer

Headers = dict[str, str] | list[tuple[str, str]] | list[tuple[bytes, bytes]]

API_KEY = apikey.make("ck_live")
MISTYPED = API_KEY[:-1] + ("0" if API_KEY[-1] != "0" else "1")


class Fetch:
    """Stands in for HTTP: counts, and answers or raises as told."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.body: bytes | Exception = key_set()

    def __call__(self, url: str) -> bytes:
        self.urls.append(url)
        if isinstance(self.body, Exception):
            raise self.body
        return self.body


@pytest.fixture
def fetch() -> Fetch:
    return Fetch()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def verifier(fetch: Fetch, clock: SetClock) -> Iterator[Verifier]:
    with Verifier(
        ISSUER, AUDIENCE, feed=None, fetch=fetch, clock=clock, monotonic=clock
    ) as verifier:
        yield verifier


def token(**changes: object) -> str:
    return signer().token(claims(**changes))


def basic(user_name: str, password: str = "") -> str:
    return "Basic " + base64.b64encode(f"{user_name}:{password}".encode()).decode()


def refusal(verifier: Verifier, headers: Headers, **more: Any) -> VerifierError:
    """The error, which both faces have to agree about."""
    with pytest.raises(VerifierError) as of_threads:
        verifier.authenticate(headers, **more)
    with pytest.raises(VerifierError) as of_loop:
        asyncio.run(verifier.authenticate_async(headers, **more))
    assert of_threads.value.headers == of_loop.value.headers
    assert of_threads.value.body == of_loop.value.body
    return of_threads.value


# Who


def test_the_principal_is_what_the_token_says(verifier: Verifier) -> None:
    """One Principal, whichever credential came."""
    who = verifier.verify_jwt(token(project_id="prj_1", aud=["https://other.example", AUDIENCE]))

    assert who.key_id == who.client_id == claims()["sub"]
    assert (who.org_id, who.project_id) == (claims()["org_id"], "prj_1")
    assert (who.environment, who.method, who.audience) == ("live", "jwt", AUDIENCE)
    assert (who.expires_at, who.token_id) == (NOW + 600, claims()["jti"])
    assert str(who.scopes) == claims()["scope"]
    assert who.claims["as_of"] == 17


NO_SCOPES: dict[str, object] = {
    "list": ["widgets:read"],
    "object": {},
    "null": None,
    "broken": "widgets:read  x",
}


@pytest.mark.parametrize("scope", NO_SCOPES.values(), ids=NO_SCOPES)
def test_a_scope_that_is_none_grants_nothing(verifier: Verifier, scope: object) -> None:
    """V26; RFC 9068 §2.2.3: a text with single blanks.  No crash, no half of it."""
    who = verifier.verify_jwt(token(scope=scope))

    assert not who.scopes
    assert not who.allows("widgets:read")


def test_all_four_faces_agree(verifier: Verifier) -> None:
    """Sync and async share each step."""
    text = token()
    headers = {"Authorization": f"Bearer {text}"}

    async def both() -> tuple[Principal, Principal]:
        return await verifier.authenticate_async(headers), await verifier.verify_jwt_async(text)

    assert {verifier.authenticate(headers), verifier.verify_jwt(text), *asyncio.run(both())} == {
        verifier.verify_jwt(text)
    }


# Where a credential may stand

PLACES: dict[str, Callable[[str], Headers]] = {
    "Bearer": lambda text: {"Authorization": f"Bearer {text}"},
    "lower case": lambda text: {"authorization": f"bearer {text}"},
    "upper case": lambda text: {"AUTHORIZATION": f"BEARER {text}"},
    "two blanks": lambda text: {"Authorization": f"Bearer  {text}"},
    "X-API-Key": lambda text: {"X-Api-Key": text},
    "Basic": lambda text: {"Authorization": basic(text)},
    "pairs": lambda text: [("Host", "x"), ("Authorization", f"Bearer {text}")],
    "pairs of bytes": lambda text: [(b"authorization", f"Bearer {text}".encode())],
    "same twice": lambda text: {"Authorization": f"Bearer {text}", "X-API-Key": text},
    "same header twice": lambda text: [("x-api-key", text), ("x-api-key", text)],
    "one of them empty": lambda text: {"Authorization": f"Bearer {text}", "X-API-Key": ""},
    "beside another scheme": lambda text: {"Authorization": "Negotiate YII=", "X-API-Key": text},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_token_may_stand_where_an_api_key_stood(
    verifier: Verifier, place: Callable[[str], Headers]
) -> None:
    """RFC 6750 §2.1, RFC 7617 §2, RFC 9110 §5.1 and §11.1.  Nobody has to change a header."""
    assert verifier.authenticate(place(token())).key_id == claims()["sub"]


HEADERS: dict[str, tuple[Headers, str]] = {
    "nothing": ({}, "missing_credentials"),
    "empty": ({"Authorization": "", "X-API-Key": ""}, "missing_credentials"),
    "scheme only": ({"Authorization": "Bearer"}, "missing_credentials"),
    "another scheme": ({"Authorization": "Digest username=x"}, "missing_credentials"),
    "no scheme": ({"Authorization": token()}, "missing_credentials"),
    "empty Basic": ({"Authorization": basic("")}, "missing_credentials"),
    "two headers": (
        [("Authorization", f"Bearer {token()}"), ("authorization", f"Bearer {token()}")],
        "multiple_credentials",
    ),
    "the same header twice": (
        [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer x")],
        "multiple_credentials",
    ),
    "two different": ({"Authorization": "Bearer x", "X-API-Key": "y"}, "multiple_credentials"),
    "two API keys": ([("X-API-Key", "x"), ("x-api-key", "y")], "multiple_credentials"),
    "comma list": ({"Authorization": f"Bearer {token()}, Bearer {token()}"}, "token_malformed"),
    "Bearer inside": ({"Authorization": f"Bearer Bearer {token()}"}, "token_malformed"),
    "trailing line break": ({"Authorization": f"Bearer {token()}\n"}, "token_malformed"),
    "neither form": ({"Authorization": "Bearer abc"}, "token_malformed"),
    "four parts": ({"Authorization": f"Bearer {token()}.x"}, "token_malformed"),
    "dots only": ({"Authorization": "Bearer .."}, "token_malformed"),
    "a megabyte": ({"Authorization": "Bearer " + "a.b" * 350_000}, "token_malformed"),
    "no Latin": ([(b"authorization", b"Bearer \xff.\xfe.\xfd")], "token_malformed"),
    "Basic with password": ({"Authorization": basic(token(), "x")}, "token_malformed"),
    "Basic without colon": ({"Authorization": "Basic YWJj"}, "token_malformed"),
    "Basic no base64": ({"Authorization": "Basic ???"}, "token_malformed"),
    "Basic no UTF-8": ({"Authorization": "Basic //86"}, "token_malformed"),
    "Basic of a megabyte": ({"Authorization": "Basic " + "A" * 1_000_000}, "token_malformed"),
    "API key": ({"Authorization": f"Bearer {API_KEY}"}, "tokens_only"),
    "API key in X-API-Key": ({"X-API-Key": API_KEY}, "tokens_only"),
    "API key in Basic": ({"Authorization": basic(API_KEY)}, "tokens_only"),
    "mistyped API key": ({"X-API-Key": MISTYPED}, "api_key_malformed"),
    "API key with look-alike": ({"X-API-Key": API_KEY.replace("c", "\u0441")}, "token_malformed"),
}


@pytest.mark.parametrize(("headers", "code"), HEADERS.values(), ids=HEADERS)
def test_any_other_credential_is_refused_by_its_form(
    verifier: Verifier, fetch: Fetch, headers: Headers, code: str
) -> None:
    """
    RFC 6750 §3.1; RFC 9110 §5.3.

    By form alone: nothing is fetched, and what fails as one kind is not tried as another.
    """
    error = refusal(verifier, headers)

    assert error.code == code
    assert fetch.urls == []
    assert API_KEY not in f"{error!r}{error.headers}{error.body!r}"


QUERIES = {
    "alone": ({}, "access_token=a.b.c", "token_malformed"),
    "empty": ({}, "x=1&access_token=", "token_malformed"),
    "beside a header": ({"X-API-Key": token()}, b"access_token=x", "multiple_credentials"),
}


@pytest.mark.parametrize(("headers", "query", "code"), QUERIES.values(), ids=QUERIES)
def test_a_token_in_the_query_is_a_bad_request(
    verifier: Verifier, headers: Headers, query: str | bytes, code: str
) -> None:
    """V43; RFC 6750 §2.3 and §3.1: addresses get logged."""
    error = refusal(verifier, headers, query=query)

    assert (error.status, error.error, error.code) == (400, "invalid_request", code)


def test_another_query_does_not_matter(verifier: Verifier) -> None:
    """A name that only begins alike is the application's own."""
    headers = {"X-API-Key": token()}

    assert verifier.authenticate(headers, query=b"access_tokens=5&q=access_token")


# Scopes


def test_a_missing_scope_is_403_with_all_that_is_needed(verifier: Verifier) -> None:
    """RFC 6750 §3.1: insufficient_scope, and what to ask for."""
    headers = {"X-API-Key": token(scope="widgets:read")}

    error = refusal(verifier, headers, scopes=("widgets:read", "widgets:write"))

    assert isinstance(error, InsufficientScope)
    assert error.status == 403
    assert error.scope == "widgets:read widgets:write"
    assert verifier.authenticate(headers, "widgets:read")


def test_a_text_of_scopes_is_not_taken_for_its_letters(verifier: Verifier) -> None:
    """`scopes="widgets:read"` is what everybody writes first."""
    headers = {"X-API-Key": token(scope="widgets:read")}

    assert verifier.authenticate(headers, "widgets:read")
    assert refusal(verifier, headers, scopes="widgets:read admin").code == "insufficient_scope"


def test_a_mistake_in_the_calling_code_is_no_answer_to_the_caller(verifier: Verifier) -> None:
    """It fails closed, as an error of the resource server."""
    with pytest.raises(MalformedScope):
        verifier.authenticate({"X-API-Key": token()}, ["not a scope@"])


# Challenges


def test_a_challenge_names_the_realm_and_the_metadata(verifier: Verifier) -> None:
    """RFC 6750 §3.1: bare without credentials; RFC 9728 §5.1."""
    assert refusal(verifier, {}).challenge == (
        f'Bearer realm="{AUDIENCE}",'
        f' resource_metadata="{AUDIENCE}/.well-known/oauth-protected-resource"'
    )


def test_an_error_of_the_principal_carries_the_same_challenge(verifier: Verifier) -> None:
    """`require` is called deep inside, where nobody knows the verifier."""
    who = verifier.verify_jwt(token())

    with pytest.raises(InsufficientScope) as refused:
        who.require("admin")
    assert refused.value.protection == verifier.protection


RESOURCES = {
    "https://api.example.com": "https://api.example.com/.well-known/oauth-protected-resource",
    "https://api.example.com/": "https://api.example.com/.well-known/oauth-protected-resource",
    "https://api.example.com/v1": "https://api.example.com/.well-known/oauth-protected-resource/v1",
    "http://127.0.0.1:8080/a?b=c": (
        "http://127.0.0.1:8080/.well-known/oauth-protected-resource/a?b=c"
    ),
    "urn:example:api": None,
    "my-api": None,
    "https://[::1": None,
}


@pytest.mark.parametrize(("audience", "url"), RESOURCES.items())
def test_metadata_stands_between_host_and_path(
    fetch: Fetch, audience: str, url: str | None
) -> None:
    """RFC 9728 §3.1.  An audience that is no URL has no place for it."""
    with Verifier(ISSUER, (audience, "second"), feed=None, fetch=fetch) as verifier:
        assert verifier.resource_metadata_url == url
        # No scopes_supported: clients that find some ask for all of them.
        assert verifier.protected_resource_metadata() == {
            "resource": audience,
            "authorization_servers": [ISSUER],
            "bearer_methods_supported": ["header"],
        }


# Memory


def test_a_remembered_token_is_looked_at_again_each_time(
    verifier: Verifier, clock: SetClock
) -> None:
    """The signature once; the clock always."""
    text = token()
    who = verifier.verify_jwt(text)
    assert verifier.verify_jwt(text) is who

    clock.now = NOW + 629
    assert verifier.verify_jwt(text) is who
    clock.now = NOW + 630
    for _ in range(2):
        with pytest.raises(TokenExpired):
            verifier.verify_jwt(text)
    assert verifier.status()["remembered_tokens"] == 0


def test_a_remembered_token_dies_with_its_signing_key(
    verifier: Verifier, fetch: Fetch, clock: SetClock
) -> None:
    """V41: withdrawn is withdrawn, also for tokens seen before."""
    text = token()
    verifier.verify_jwt(text)
    fetch.body = key_set(signer(kid="second").jwk())
    clock.now += JWKS_COOLDOWN
    verifier.verify_jwt(signer(kid="second").token(claims()))

    with pytest.raises(UnknownSigningKey):
        verifier.verify_jwt(text)


def test_another_key_under_the_same_name_verifies_anew(
    verifier: Verifier, fetch: Fetch, clock: SetClock
) -> None:
    """A `kid` is a name, not the key."""
    text = token()
    verifier.verify_jwt(text)
    fetch.body = key_set(signer("EdDSA", "first").jwk(), signer(kid="second").jwk())
    clock.now += JWKS_COOLDOWN
    verifier.verify_jwt(signer(kid="second").token(claims()))

    with pytest.raises(VerifierError) as refused:
        verifier.verify_jwt(text)
    assert refused.value.code == "bad_algorithm"


def test_a_remembered_token_still_needs_scope_and_environment(
    fetch: Fetch, clock: SetClock
) -> None:
    """What differs from request to request is never remembered."""
    headers = {"X-API-Key": token(scope="widgets:read")}
    with Verifier(
        ISSUER, AUDIENCE, environment="live", feed=None, fetch=fetch, clock=clock
    ) as verifier:
        verifier.authenticate(headers)

        assert refusal(verifier, headers, scopes="widgets:write").code == "insufficient_scope"
        assert refusal(verifier, {"X-API-Key": token(env="test")}).code == "wrong_environment"


def test_refusals_are_never_remembered(verifier: Verifier) -> None:
    """Otherwise strangers could fill the memory."""
    for number in range(50):
        with pytest.raises(VerifierError):
            verifier.verify_jwt(token(aud=f"other-{number}"))

    assert verifier.status()["remembered_tokens"] == 0


def test_memory_is_bounded(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest gives way; what was forgotten is verified again."""
    monkeypatch.setattr(verifier._memo, "_size", 3)
    texts = [token(jti=str(number)) for number in range(10)]
    for text in texts:
        verifier.verify_jwt(text)

    assert verifier.status()["remembered_tokens"] == 3
    assert verifier.verify_jwt(texts[0]).token_id == "0"


# The key set


def test_ten_thousand_invented_kids_reach_the_issuer_once(
    verifier: Verifier, fetch: Fetch, clock: SetClock
) -> None:
    """V9, V8: and a 100 kB kid makes no 100 kB answer."""
    verifier.verify_jwt(token())
    clock.now += JWKS_COOLDOWN
    _, payload, signature = token().split(".")
    for number in range(200):
        invented = signer().token(claims(), kid=f"invented-{number}").partition(".")[0]
        with pytest.raises(UnknownSigningKey):
            verifier.verify_jwt(f"{invented}.{payload}.{signature}")
    with pytest.raises(VerifierError) as refused:
        verifier.verify_jwt(signer().token(claims(), kid="x" * 100_000))

    assert len(fetch.urls) == 2
    assert len(str(refused.value)) < 200


def test_no_header_of_a_token_leads_to_a_connection(verifier: Verifier, fetch: Fetch) -> None:
    """V7; CVE-2026-48522: one address is known, the key set's."""
    verifier.verify_jwt(token())
    for member in ("jku", "x5u"):
        with pytest.raises(VerifierError):
            verifier.verify_jwt(signer().token(claims(), **{member: "http://127.0.0.1:9/"}))

    assert fetch.urls == [f"{ISSUER}/.well-known/jwks.json"]


def test_an_issuer_that_is_away_is_our_trouble(verifier: Verifier, fetch: Fetch) -> None:
    """503 with Retry-After, never 401."""
    fetch.body = OSError()

    error = refusal(verifier, {"X-API-Key": token()})

    assert isinstance(error, IssuerUnavailable)
    assert (error.status, error.challenge) == (503, None)
    assert int(error.headers["Retry-After"]) >= 1


def test_loading_the_key_set_does_not_block_the_event_loop(clock: SetClock) -> None:
    """While the issuer is slow the loop serves others, and all waiters share the fetch."""
    is_asked, may_answer = threading.Event(), threading.Event()
    fetched: list[str] = []

    def slow(url: str) -> bytes:
        fetched.append(url)
        is_asked.set()
        assert may_answer.wait(10)
        return key_set()

    async def serve(verifier: Verifier) -> set[str]:
        waiting: list[Awaitable[Principal]] = [
            asyncio.ensure_future(verifier.verify_jwt_async(token())) for _ in range(10)
        ]
        # Only a loop that still turns gets behind this line.
        await asyncio.to_thread(is_asked.wait, 10)
        may_answer.set()
        return {(await one).key_id for one in waiting}

    with Verifier(ISSUER, AUDIENCE, feed=None, fetch=slow, clock=clock) as verifier:
        assert len(asyncio.run(serve(verifier))) == 1
    assert len(fetched) == 1


def test_a_token_that_is_known_takes_no_thread(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast path of the async face runs in place, also for an unknown kid in the cool-down."""
    verifier.verify_jwt(token())
    monkeypatch.setattr(asyncio, "to_thread", None)

    assert asyncio.run(verifier.verify_jwt_async(token(jti="another")))
    with pytest.raises(UnknownSigningKey):
        asyncio.run(verifier.verify_jwt_async(signer(kid="second").token(claims())))


def test_status_says_how_far_it_can_be_relied_on(
    verifier: Verifier, fetch: Fetch, clock: SetClock
) -> None:
    """For health pages: numbers and kinds, no secret."""
    before: Any = verifier.status()
    verifier.verify_jwt(token())
    clock.now += 10
    after: Any = verifier.status()

    assert before["key_set"]["state"] == "none"
    assert before["key_set"]["good_until"] is None
    assert after == {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "safe_until": NOW + JWKS_MAX_AGE + 24 * 3600,
        "after": (
            "Every token is refused with 503, because the key set is too old; no feed is followed,"
            " so a revoked one lives on anyway."
        ),
        "key_set": {
            "state": "fresh",
            "age_s": 10,
            "good_until": NOW + JWKS_MAX_AGE + 24 * 3600,
            "kids": ["first"],
            "last_error": None,
        },
        "feed": None,
        "api_keys": None,
        "roles": [],
        "remembered_tokens": 1,
    }


# Settings


def test_settings_come_from_the_environment(
    fetch: Fetch, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is configured without code."""
    monkeypatch.setenv("COATCHECK_ISSUER", ISSUER)
    monkeypatch.setenv("COATCHECK_AUDIENCE", AUDIENCE)
    monkeypatch.setenv("COATCHECK_ENVIRONMENT", "test")
    monkeypatch.setenv("COATCHECK_JWKS_URL", "http://127.0.0.1:1/keys")
    with Verifier(feed=None, fetch=fetch, clock=clock) as verifier:
        assert verifier.verify_jwt(token(env="test"))
        with pytest.raises(VerifierError, match="environment"):
            verifier.verify_jwt(token(env="live"))
    assert fetch.urls == ["http://127.0.0.1:1/keys"]


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "no issuer": ({"issuer": None}, "COATCHECK_ISSUER"),
    "empty issuer": ({"issuer": ""}, "COATCHECK_ISSUER"),
    "no audience": ({"audience": None}, "COATCHECK_AUDIENCE"),
    "empty audience": ({"audience": ""}, "COATCHECK_AUDIENCE"),
    "empty list": ({"audience": []}, "audience"),
    "empty text in a list": ({"audience": [AUDIENCE, ""]}, "audience"),
    "quote in the audience": ({"audience": 'a"b'}, "audience"),
    "leeway too large": ({"leeway": 61}, "leeway"),
    "leeway negative": ({"leeway": -1}, "leeway"),
    "leeway NaN": ({"leeway": float("nan")}, "leeway"),
    "algorithm none": ({"algorithms": ["none"]}, "algorithms"),
    "no algorithm": ({"algorithms": []}, "algorithms"),
    "algorithm as text": ({"algorithms": "ES256"}, "algorithms"),
    "unknown type": ({"token_types": ["id_token"]}, "token_types"),
    "no type": ({"token_types": ()}, "token_types"),
    "realm with a quote": ({"realm": 'a"'}, "realm"),
    "realm with a line break": ({"realm": "a\r\nb"}, "realm"),
    "plain http": ({"issuer": "http://auth.example.com"}, "https"),
    "plain http key set": ({"jwks_url": "http://auth.example.com/jwks"}, "https"),
    "issuer that is no URL": ({"issuer": "auth.example.com"}, "jwks_url"),
    "a feed": ({"feed": "https://auth.example.com/oauth/revocations"}, "feed"),
}


@pytest.mark.parametrize(("changes", "word"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_setting_is_told_at_the_start(
    changes: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first request; and an empty list of checks refuses."""
    for name in ("ISSUER", "AUDIENCE", "ENVIRONMENT", "JWKS_URL"):
        monkeypatch.delenv(f"COATCHECK_{name}", raising=False)

    with pytest.raises(ValueError, match=word):
        Verifier(**{"issuer": ISSUER, "audience": AUDIENCE, **changes})


def test_plain_http_and_plain_jwts_can_be_asked_for(fetch: Fetch, clock: SetClock) -> None:
    """Both have to be said."""
    Verifier("http://coatcheck:8000", AUDIENCE, unsafe_plain_http=True).close()
    with Verifier(
        ISSUER,
        AUDIENCE,
        token_types=("at+jwt", "JWT"),
        feed=None,
        fetch=fetch,
        clock=clock,
    ) as verifier:
        assert verifier.verify_jwt(signer().token(claims(), typ="JWT"))
        assert verifier.verify_jwt(token())


def test_algorithms_can_be_narrowed(fetch: Fetch, clock: SetClock) -> None:
    """RFC 8725 §3.1."""
    fetch.body = key_set(signer().jwk(), signer("EdDSA", "other").jwk())
    with Verifier(
        ISSUER, AUDIENCE, algorithms=["EdDSA"], feed=None, fetch=fetch, clock=clock
    ) as verifier:
        assert verifier.verify_jwt(signer("EdDSA", "other").token(claims()))
        with pytest.raises(VerifierError) as refused:
            verifier.verify_jwt(token())
    assert refused.value.code == "bad_algorithm"


def test_importing_the_verifier_imports_nothing_of_the_service() -> None:
    """What a resource server installs is two packages, not twenty."""
    program = (
        "import coatcheck.verifier, sys;"
        "heavy = {'starlette', 'sqlmodel', 'sqlalchemy', 'authlib', 'typer', 'uvicorn',"
        " 'pydantic', 'limits', 'coatcheck.server'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or None)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], timeout=60, check=False, capture_output=True, text=True
    )

    assert (ended.returncode, ended.stderr) == (0, "")
