"""The verifier's settings, places, memory and waits, each limit from both sides.

`test_verifier` and `test_exchange` tell the story; here a check that moves by one is noticed.
"""

import asyncio
import base64
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest

from coatcheck import apikey
from coatcheck.verifier import (
    IssuerUnavailable,
    Principal,
    TokenMalformed,
    UnknownSigningKey,
    Verifier,
    VerifierError,
)
from coatcheck.verifier import verifier as module
from coatcheck.verifier.memo import Memo, Remembered
from coatcheck.verifier.presented import presented
from support.tokens import (
    ABSENT,
    AUDIENCE,
    ISSUER,
    NOW,
    SetClock,
    as_json,
    claims,
    key_set,
    signer,
)

API_KEY = apikey.make("ck_live")
SERVICE_KEY = apikey.make("ck_live")
#: Seconds; longer than any test takes.
FOREVER_S = 10.0


class Fetch:
    """Stands in for HTTP: counts, and answers as told, when told."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.body = key_set()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, url: str) -> bytes:
        self.urls.append(url)
        self.may_answer.wait(FOREVER_S)
        return self.body


@pytest.fixture
def fetch() -> Iterator[Fetch]:
    fetch = Fetch()
    yield fetch
    fetch.may_answer.set()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


def a_verifier(fetch: Fetch, clock: SetClock, **settings: Any) -> Verifier:
    ordinary = {"issuer": ISSUER, "audience": AUDIENCE, "feed": None}
    return Verifier(**{**ordinary, **settings}, fetch=fetch, clock=clock, monotonic=clock)


@pytest.fixture
def verifier(fetch: Fetch, clock: SetClock) -> Iterator[Verifier]:
    with a_verifier(fetch, clock) as verifier:
        yield verifier


def token(**changes: object) -> str:
    return signer().token(claims(**changes))


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


#: Tokens by length; base64 has gaps, and another length of the header fills them.
LONGEST = {
    len(text): text
    for pad in range(2640, 2700)
    for x in ("", "x", "xx")
    if len(text := signer().token(claims(pad="p" * pad), x=x)) in (4096, 4097)
}

FACES: dict[str, Callable[[Verifier, str], Principal]] = {
    "verify_jwt": lambda verifier, text: verifier.verify_jwt(text),
    "verify_jwt_async": lambda verifier, text: asyncio.run(verifier.verify_jwt_async(text)),
    "authenticate": lambda verifier, text: verifier.authenticate({"X-API-Key": text}),
    "authenticate_async": lambda verifier, text: asyncio.run(
        verifier.authenticate_async({"X-API-Key": text})
    ),
}
each_face = pytest.mark.parametrize("face", FACES.values(), ids=FACES)
Face = Callable[[Verifier, str], Principal]


# Settings


@pytest.mark.parametrize("leeway", [0, 0.0, 60])
def test_a_leeway_is_from_none_at_all_to_a_minute(
    fetch: Fetch, clock: SetClock, leeway: float
) -> None:
    """Both ends are within."""
    with a_verifier(fetch, clock, leeway=leeway) as verifier:
        clock.now = NOW + 600 + leeway - 0.5
        assert verifier.verify_jwt(token())
        clock.now += 0.5
        with pytest.raises(VerifierError):
            verifier.verify_jwt(token())


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "issuer": ({"issuer": ""}, r"^issuer is missing: .* COATCHECK_ISSUER$"),
    "issuer with a blank": ({"issuer": "a b"}, r"^issuer: printable"),
    "issuer with a fragment": ({"issuer": "https://auth.example.com#x"}, r"^issuer: printable"),
    "audience": ({"audience": ""}, r"^audience is missing: .* COATCHECK_AUDIENCE$"),
    "audience with a blank": ({"audience": "a b"}, r"^audience: printable"),
    "audience in a list": ({"audience": [AUDIENCE, "a b"]}, r"^audience: one text or several"),
    "audience number": ({"audience": [AUDIENCE, 1]}, r"^audience: one text or several"),
    "types": ({"token_types": ["at+jwt", "x"]}, r"^token_types: one or more of at\+jwt, JWT,"),
    "algorithms": ({"algorithms": ["ES256", "x"]}, r"^algorithms: one or more of ES256, RS256,"),
    "realm": ({"realm": "a\\b"}, r"^realm: "),
    "realm beyond ASCII": ({"realm": "\u00e9"}, r"^realm: "),
    "leeway": ({"leeway": 60.001}, r"^leeway: from 0 to 60 "),
    "feed": ({"feed": "none"}, r"^feed: auto or None"),
    "policy": ({"on_stale_feed": "refuse "}, r"on_stale_feed: accept or refuse$"),
    "key set over http": ({"jwks_url": "http://a.example/jwks"}, r"^jwks_url \(or issuer\): "),
    "both": ({"service_key": SERVICE_KEY, "check_api_key": print}, r"^service_key, check_api_key"),
}


@pytest.mark.parametrize(("settings", "sentence"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_setting_is_named(
    settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has to find it among a dozen of them."""
    for name in ("ISSUER", "AUDIENCE", "ENVIRONMENT", "JWKS_URL", "SERVICE_KEY"):
        monkeypatch.delenv(f"COATCHECK_{name}", raising=False)

    with pytest.raises(ValueError, match=sentence):
        Verifier(**{"issuer": ISSUER, "audience": AUDIENCE, **settings})


def test_a_variable_without_value_is_none(
    fetch: Fetch, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compose files set them so; an environment of no name would refuse every token."""
    for name in ("ENVIRONMENT", "JWKS_URL", "SERVICE_KEY"):
        monkeypatch.setenv(f"COATCHECK_{name}", "")

    with a_verifier(fetch, clock) as verifier:
        assert verifier.verify_jwt(token())
        assert fetch.urls == [f"{ISSUER}/.well-known/jwks.json"]


@pytest.mark.parametrize("issuer", [ISSUER, f"{ISSUER}/", f"{ISSUER}/X", f"{ISSUER}/tenant/X/"])
def test_the_key_set_is_below_the_issuer(fetch: Fetch, clock: SetClock, issuer: str) -> None:
    """With one slash between them; the issuer's own name stays as it is."""
    with a_verifier(fetch, clock, issuer=issuer) as verifier:
        assert verifier.verify_jwt(token(iss=issuer))
        assert verifier.status()["issuer"] == issuer
    assert fetch.urls == [f"{issuer.removesuffix('/')}/.well-known/jwks.json"]


@pytest.mark.parametrize("issuer", ["accounts.example.com", "http://auth.example.com"])
def test_an_issuer_that_nobody_asks_may_have_any_name(issuer: str) -> None:
    """Contract: with `jwks_url` and without a feed nothing else is fetched."""
    jwks_url = "https://auth.example.com/keys"

    Verifier(issuer, AUDIENCE, jwks_url=jwks_url, feed=None).close()
    asking: tuple[dict[str, Any], ...] = ({"feed": "auto"}, {"service_key": SERVICE_KEY})
    for settings in asking:
        with pytest.raises(ValueError, match=r"^jwks_url \(or issuer\): "):
            Verifier(issuer, AUDIENCE, jwks_url=jwks_url, **{"feed": None, **settings})


def test_the_first_of_several_audiences_is_the_one_that_is_told(
    fetch: Fetch, clock: SetClock
) -> None:
    """In challenges and as a resource; any of them is accepted."""
    with a_verifier(fetch, clock, audience=[AUDIENCE, "urn:second"]) as verifier:
        assert verifier.verify_jwt(token(aud="urn:second")).audience == "urn:second"
        assert verifier.protection.realm == AUDIENCE
        assert verifier.protected_resource_metadata()["resource"] == AUDIENCE
        assert verifier.status()["audiences"] == [AUDIENCE, "urn:second"]


# Faces


@each_face
def test_every_refusal_speaks_for_this_resource_server(
    fetch: Fetch, clock: SetClock, face: Face
) -> None:
    """RFC 6750 §3: the realm is ours, whichever face refuses."""
    with a_verifier(fetch, clock, realm="here") as verifier:
        with pytest.raises(VerifierError) as refused:
            face(verifier, token(aud="urn:elsewhere"))
        assert refused.value.protection == verifier.protection
    assert 'realm="here"' in str(refused.value.challenge)


@each_face
def test_a_remembered_token_gives_the_same_principal(verifier: Verifier, face: Face) -> None:
    """Not an equal one: nothing was verified a second time."""
    text = token()

    assert face(verifier, text) is face(verifier, text)


@each_face
def test_the_longest_token_is_remembered_too(verifier: Verifier, face: Face) -> None:
    """4096 characters; what is longer is refused before anybody looks for it."""
    longest, longer = LONGEST[4096], LONGEST[4097]

    assert face(verifier, longest) is face(verifier, longest)
    with pytest.raises(TokenMalformed):
        face(verifier, longer)


@each_face
def test_a_token_of_a_known_signing_key_never_waits_for_the_issuer(
    verifier: Verifier, fetch: Fetch, clock: SetClock, face: Face
) -> None:
    """The set is due for renewal and the issuer hangs: no request notices."""
    verifier.verify_jwt(token())
    fetch.may_answer.clear()
    clock.now += 240
    began = time.monotonic()

    for number in range(3):
        assert face(verifier, token(jti=str(number)))
        while len(fetch.urls) < 2:  # Until the renewal is under way.
            assert time.monotonic() - began < 4
            time.sleep(0.002)

    assert time.monotonic() - began < 4
    assert len(fetch.urls) == 2


@each_face
def test_a_principal_from_a_token_is_closed_like_any_other(verifier: Verifier, face: Face) -> None:
    """It is open while it is made, and each later request with that token gets this very object."""
    who = face(verifier, token())

    assert type(who) is Principal
    with pytest.raises(dataclasses.FrozenInstanceError):
        who.key_id = "key_of_another"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del who.scopes
    assert who == dataclasses.replace(who)


@each_face
def test_what_a_token_of_another_issuer_leaves_out_is_none(verifier: Verifier, face: Face) -> None:
    """RFC 9068 §2.2 asks for no scope, organization, project or environment."""
    said = dict.fromkeys(("org_id", "project_id", "env", "scope", "as_of"), ABSENT)
    who = face(verifier, token(**said))

    assert (who.org_id, who.project_id, who.environment) == (None, None, None)
    assert not who.scopes
    assert (who.key_id, who.protection) == (claims()["sub"], verifier.protection)


# Places


@pytest.mark.parametrize("name", ["X-Real-IP", "X-API-Kez", "Authorizatiox", "If-None-Match"])
def test_another_header_with_a_name_of_the_same_length_is_no_credential(
    verifier: Verifier, name: str
) -> None:
    """Proxies add some of them to every request."""
    assert verifier.authenticate({name: "198.51.100.7", "X-API-Key": token()})
    with pytest.raises(VerifierError) as refused:
        verifier.authenticate({name: token()})
    assert refused.value.code == "missing_credentials"


def test_basic_credentials_have_at_most_5469_characters() -> None:
    """A token of 4 KiB and its colon in base64; longer ones are not decoded."""
    fitting = base64.b64encode(b"a.b." + b"c" * 4096 + b":").decode()
    longer = base64.b64encode(b"a.b." + b"c" * 4098 + b":").decode()
    assert (len(fitting), len(longer)) == (5468, 5472)

    assert presented({"Authorization": f"Basic {fitting}"})
    with pytest.raises(TokenMalformed, match="well-formed"):
        presented({"Authorization": f"Basic {longer}"})


@pytest.mark.parametrize("password", ["x", ":", " "])
def test_a_user_name_has_no_password_beside_it(password: str) -> None:
    """Which of the two would be the credential?  The sentence says what to send."""
    with pytest.raises(TokenMalformed, match="with an empty password"):
        presented({"Authorization": basic(f"{token()}:{password}")})


def test_basic_without_a_colon_is_no_credential() -> None:
    """RFC 7617 §2."""
    with pytest.raises(TokenMalformed, match="with an empty password"):
        presented({"Authorization": basic(token())})


WRITTEN: dict[str, tuple[str, str]] = {
    "a token that begins with X": ("Bearer Xa.b.c", "Xa.b.c"),
    "three blanks": ("Bearer   a.b.c", "a.b.c"),
    "Basic that begins with X": (basic("_a.b.c:"), "_a.b.c"),
    "Basic and three blanks": (basic("a.b.c:").replace(" ", "   "), "a.b.c"),
    "Basic in another case": (basic("a.b.c:").replace("Basic", "bASIC"), "a.b.c"),
}


@pytest.mark.parametrize(("header", "text"), WRITTEN.values(), ids=WRITTEN)
def test_nothing_is_taken_off_a_credential_but_the_blanks_before_it(header: str, text: str) -> None:
    """RFC 9110 §11.4: one blank or more.  What follows is the caller's, letter by letter."""
    assert presented({"Authorization": header}) == (text, False, "header", None)


@pytest.mark.parametrize("foreign", ["!!!!", "\n\n\n\n", "    ", "-_-_"])
def test_no_foreign_character_is_passed_over_in_basic_credentials(foreign: str) -> None:
    """RFC 4648 §3.3: a lenient decoder would take what a strict one in front of it does not."""
    header = basic("a.b.c:")

    with pytest.raises(TokenMalformed):
        presented({"Authorization": f"{header[:10]}{foreign}{header[10:]}"})


QUERIES: dict[str, tuple[str, str]] = {
    "of somebody else": ("x=1", "missing_credentials"),
    "that only looks like it": ("api_keys=1&my_access_token=2&x=%20", "missing_credentials"),
    "with an empty key": ("api_key=", "missing_credentials"),
    "with a token and everything": ("api_key=x&y=%20&access_token=", "token_malformed"),
    "with a token, spelled otherwise": ("%61ccess_token=x", "token_malformed"),
    "with a token as key": ("api_key=a.b.c", "token_malformed"),
    "with two keys": ("api_key=x&api_key=y", "multiple_credentials"),
}


@pytest.mark.parametrize(("query", "code"), QUERIES.values(), ids=QUERIES)
def test_a_query_holds_an_api_key_or_nothing(query: str, code: str) -> None:
    """RFC 9700 §4.3.2: a token in an address is refused, however its name is spelled."""
    with pytest.raises(VerifierError) as refused:
        presented({}, query)
    assert refused.value.code == code


def test_the_name_of_an_api_key_in_a_query_may_be_encoded() -> None:
    """RFC 3986 §2.1: every other reader of the address decodes it."""
    assert presented({}, f"%61pi_key={API_KEY}") == (API_KEY, True, "query", None)
    assert presented({}, f"x=1&api_key={API_KEY}".encode()) == (API_KEY, True, "query", None)
    assert presented({"X-API-Key": API_KEY}, f"api_key={API_KEY}") == (
        API_KEY,
        True,
        "header",
        None,
    )
    assert presented({"X-API-Key": API_KEY}, "x=1") == (API_KEY, True, "header", None)


NO_PLACE = [
    "ftp://api.example.com/x",
    "//api.example.com/x",
    "https:///x",
    "https:x",
    "api",
    "https://[::1",
]


@pytest.mark.parametrize("audience", NO_PLACE)
def test_a_resource_that_is_no_web_address_has_no_metadata(audience: str) -> None:
    """RFC 9728 §3: it is fetched over https, from the host in the name."""
    with Verifier(ISSUER, audience, feed=None) as verifier:
        assert verifier.resource_metadata_url is None


# Memory


def test_a_verifier_remembers_ten_thousand_tokens(verifier: Verifier) -> None:
    """30 MB.  With more a small machine feels it, with fewer busy callers push each other out."""
    assert verifier._memo._size == 10_000


def remembered(number: int) -> Remembered:
    made: Any = number
    return made, made


@pytest.mark.parametrize(("size", "kept"), [(-1, 1), (0, 1), (1, 1), (2, 2), (3, 3)])
def test_the_oldest_token_gives_way(size: int, kept: int) -> None:
    """One is always remembered, or every request would be verified anew."""
    memo = Memo(size)
    for number in range(5):
        memo.put(str(number), remembered(number))

    assert len(memo) == kept
    assert [number for number in range(5) if memo.get(str(number))] == [*range(5)][-kept:]


def test_what_is_dropped_is_gone_and_dropping_it_twice_is_no_error() -> None:
    """Two requests may find out at once that a token has ended."""
    memo = Memo(3)
    memo.put("a", remembered(1))
    memo.put("b", remembered(2))
    memo.drop("a")
    memo.drop("a")

    assert (memo.get("a"), len(memo)) == (None, 1)


def test_a_token_whose_signing_key_is_gone_is_not_remembered_any_longer(
    verifier: Verifier, fetch: Fetch, clock: SetClock
) -> None:
    """Nobody will ask for it with success again."""
    text = token()
    verifier.verify_jwt(text)
    fetch.body = key_set(signer(kid="second").jwk())
    clock.now += 30
    verifier.verify_jwt(signer(kid="second").token(claims()))
    assert verifier.status()["remembered_tokens"] == 2

    with pytest.raises(UnknownSigningKey):
        verifier.verify_jwt(text)
    assert verifier.status()["remembered_tokens"] == 1


# Over real HTTP


class Answering(ThreadingHTTPServer):
    """A server on loopback that keeps what it was asked, and gives key sets and tokens."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.signed_by = signer()
        self.said: dict[str, object] = {}
        self.header: dict[str, object] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self._answer({"keys": [self.server.signed_by.jwk()]})

    def do_POST(self) -> None:
        said = {"jti": str(len(self.server.asked)), **self.server.said}
        token = self.server.signed_by.token(claims(**said), **self.server.header)
        self._answer({"access_token": token, "token_type": "Bearer", "expires_in": 600})

    def _answer(self, body: dict[str, object]) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, parse_qs(sent.decode())))
        self.send_response(200)
        text = as_json(body)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
        return


@contextmanager
def answering() -> Iterator[Answering]:
    with Answering() as server:
        server.said = {"iss": server.url}
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(FOREVER_S)


def test_a_key_set_is_fetched_over_http(clock: SetClock) -> None:
    """Without anything handed in: what a resource server does."""
    with answering() as server, Verifier(server.url, AUDIENCE, feed=None, clock=clock) as verifier:
        assert verifier.verify_jwt(token(iss=server.url))
    assert [path for path, _ in server.asked] == ["/.well-known/jwks.json"]


def test_keys_are_exchanged_for_the_first_audience(clock: SetClock) -> None:
    """RFC 8707 §2: a token has one; the others are names that callers know."""
    with (
        answering() as server,
        Verifier(
            server.url, [AUDIENCE, "urn:second"], service_key=SERVICE_KEY, feed=None, clock=clock
        ) as verifier,
    ):
        verifier.authenticate({"X-API-Key": API_KEY})
    (form,) = (form for path, form in server.asked if path == "/oauth/token")

    assert form["resource"] == [AUDIENCE]
    assert form["client_secret"] == [SERVICE_KEY]
    assert form["subject_token_type"] == [f"{server.url}/token-types/api-key"]


AUTHENTICATE: dict[str, Callable[[Verifier], Principal]] = {
    "threads": lambda verifier: verifier.authenticate({"X-API-Key": API_KEY}),
    "loop": lambda verifier: asyncio.run(verifier.authenticate_async({"X-API-Key": API_KEY})),
}
in_both_ways = pytest.mark.parametrize("authenticate", AUTHENTICATE.values(), ids=AUTHENTICATE)
Authenticate = Callable[[Verifier], Principal]


@in_both_ways
def test_a_kept_token_that_no_longer_verifies_is_exchanged_anew(
    clock: SetClock, authenticate: Authenticate
) -> None:
    """The issuer has another signing key under the old name: no fault of the caller's."""
    with (
        answering() as server,
        Verifier(
            server.url,
            AUDIENCE,
            service_key=SERVICE_KEY,
            feed=None,
            clock=clock,
            monotonic=clock,
        ) as verifier,
    ):
        who = authenticate(verifier)
        server.signed_by = signer("EdDSA")
        clock.now += 240
        before = verifier._key_set.known("first")
        until = time.monotonic() + FOREVER_S
        while verifier._key_set.known("first") == before:
            assert time.monotonic() < until
            time.sleep(0.002)

        anew = authenticate(verifier)
        assert (anew.key_id, anew.method) == (who.key_id, "api_key")
        assert anew.token_id != who.token_id


def failing(server: Answering, **fault: Any) -> None:
    """Let each token that the server gives from now on have this fault, and no other."""
    server.signed_by = fault.pop("signed_by", signer())
    server.header = fault.pop("header", {})
    server.said = {"iss": server.url, **fault}


FAULTS: dict[str, dict[str, Any]] = {
    "another key under the same name": {
        "signed_by": dataclasses.replace(signer(), private=signer(kid="second").private)
    },
    "another algorithm": {"signed_by": signer("EdDSA")},
    "a key that is not published": {"signed_by": signer(kid="second")},
    "another type": {"header": {"typ": "JWT"}},
    "a claim missing": {"sub": ABSENT},
    "another audience": {"aud": "urn:elsewhere"},
    "another issuer": {"iss": "https://other.example"},
}


@in_both_ways
def test_a_token_that_its_issuer_got_wrong_is_worth_another_try_in_a_second(
    clock: SetClock, authenticate: Authenticate
) -> None:
    """
    No caller can help it: 503, whichever it is.  RFC 9110 §10.2.3.

    Nothing of it is kept, so that the next request may have better luck.
    """
    settings: dict[str, Any] = {"feed": None, "clock": clock, "monotonic": clock}
    with answering() as server:
        for fault in FAULTS.values():
            with Verifier(server.url, AUDIENCE, service_key=SERVICE_KEY, **settings) as verifier:
                failing(server)
                verifier.verify_jwt(token(iss=server.url))
                failing(server, **fault)
                with pytest.raises(IssuerUnavailable) as refused:
                    authenticate(verifier)
                assert refused.value.headers["Retry-After"] == "1"
                assert verifier._exchange is not None
                assert verifier._exchange.remembered(apikey.digest(API_KEY), "header") is None

                failing(server)
                assert authenticate(verifier).method == "api_key"


@in_both_ways
def test_a_kept_token_that_has_ended_is_exchanged_anew(
    clock: SetClock, authenticate: Authenticate
) -> None:
    """The clock was set ahead, or the machine slept: the key is as good as before."""
    with (
        answering() as server,
        Verifier(server.url, AUDIENCE, service_key=SERVICE_KEY, feed=None, clock=clock) as verifier,
    ):
        before = authenticate(verifier)
        clock.now += 3600
        failing(server, iat=NOW + 3600, exp=NOW + 4200)
        anew = authenticate(verifier)

        assert (anew.key_id, anew.method) == (before.key_id, "api_key")
        assert anew.expires_at == NOW + 4200


@in_both_ways
def test_an_exchange_that_takes_too_long_is_our_trouble(
    clock: SetClock, authenticate: Authenticate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 in a second, and the exchange goes on for those who come later."""
    monkeypatch.setattr(module, "_LONGEST_EXCHANGE", 0.05)
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        verifier = Verifier(url, AUDIENCE, service_key=SERVICE_KEY, feed=None, clock=clock)
        began = time.monotonic()
        with pytest.raises(IssuerUnavailable) as refused:
            authenticate(verifier)
        assert time.monotonic() - began < 4
    verifier.close()

    assert refused.value.headers["Retry-After"] == "1"
    assert refused.value.protection == verifier.protection


class Silent(Future[Any]):
    """An exchange that does not end; notes how long somebody would wait for it."""

    waited_s: float | None = None

    def result(self, timeout: float | None = None) -> Any:
        self.waited_s = timeout
        raise TimeoutError


def test_a_request_waits_ten_seconds_for_its_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what the first key set is waited for: the issuer may have to be found first."""
    silent = Silent()
    with Verifier(ISSUER, AUDIENCE, service_key=SERVICE_KEY, feed=None) as verifier:
        monkeypatch.setattr(verifier._exchange, "begin", lambda *sent: silent)
        with pytest.raises(IssuerUnavailable):
            verifier.authenticate({"X-API-Key": API_KEY})

    assert silent.waited_s == 10


@in_both_ways
def test_a_hosts_failure_is_worth_another_try_in_a_second(
    fetch: Fetch, clock: SetClock, authenticate: Authenticate
) -> None:
    """RFC 9110 §10.2.3."""

    def broken(key: str) -> Principal | None:
        raise LookupError(key)

    with a_verifier(fetch, clock, check_api_key=broken) as verifier:
        with pytest.raises(IssuerUnavailable) as refused:
            authenticate(verifier)
        assert refused.value.headers["Retry-After"] == "1"


@pytest.mark.parametrize("asked_for", [{"trust_env": True}, {"trust_env": False}, {}], ids=str)
def test_a_proxy_of_the_environment_counts_only_if_that_was_asked_for(
    clock: SetClock, asked_for: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For key set and exchange alike; whoever sets a variable would see every raw key."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    issuer = "http://127.0.0.1:1"  # Nobody is there.
    settings: dict[str, Any] = {"service_key": SERVICE_KEY, "feed": None, "clock": clock}
    is_trusted = asked_for.get("trust_env", False)
    with answering() as proxy:
        proxy.said = {"iss": issuer}
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with Verifier(issuer, AUDIENCE, **settings, **asked_for) as verifier:
            if is_trusted:
                assert verifier.authenticate({"X-API-Key": API_KEY})
            else:
                with pytest.raises(IssuerUnavailable):
                    verifier.authenticate({"X-API-Key": API_KEY})
                with pytest.raises(IssuerUnavailable):
                    verifier.verify_jwt(token(iss=issuer))
    asked = {path for path, _ in proxy.asked}

    everything = {f"{issuer}/oauth/token", f"{issuer}/.well-known/jwks.json"}
    assert asked == (everything if is_trusted else set())
