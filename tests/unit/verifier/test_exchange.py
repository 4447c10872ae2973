"""Raw API keys at a resource server: exchanged once, remembered for a while, never guessed about.

The issuer is a local HTTP server that counts, and answers as told; L1 to L5 of the bad inputs.
"""

import asyncio
import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import pytest

from coatcheck import apikey, feed_profile
from coatcheck.durations import JWKS_MAX_AGE
from coatcheck.scope import Scopes
from coatcheck.verifier import Principal, Verifier, VerifierError, errors
from coatcheck.verifier.exchange import GRANT_TYPE, NEGATIVE, RENEW_BEFORE, Exchange
from coatcheck.verifier.presented import presented
from support.live import free_port
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, as_json, claims, key_set, signer

SERVICE_KEY = apikey.make("ck_live")
API_KEY = apikey.make("ck_live")
LIFETIME = 600
WAIT = 10


@dataclass(frozen=True)
class Told:
    """One answer of the issuer."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Issuer:
    """An issuer on a port of its own: keeps what it was asked, and answers as told.

    Attributes:
        forms: the parameters of each request at the token endpoint.
        answer: makes the answer to one of them.
        gate: answers wait until it is open.
        asked: a request has come in.
        hung_up: somebody did not read an answer to its end.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.forms: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, str]], Told] = self.token
        self.hung_up = threading.Event()
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def token(self, form: dict[str, str], **changes: object) -> Told:
        """A token that differs from every other one."""
        ours = {"iss": self.url, "jti": str(len(self.forms)), **changes}
        return success(signer().token(claims(**ours)))

    def fetch(self, url: str) -> bytes:
        assert url == f"{self.url}/.well-known/jwks.json"
        return key_set()


def success(token: object, expires_in: object = LIFETIME) -> Told:
    return Told(
        200, as_json({"access_token": token, "token_type": "Bearer", "expires_in": expires_in})
    )


def problem(
    code: str,
    error: str = "invalid_request",
    description: object = "A sentence.",
    status: int = 400,
    headers: tuple[tuple[str, str], ...] = (),
) -> Told:
    body = {"error": error, "error_description": description, "code": code}
    return Told(status, as_json(body), headers)


class Server(ThreadingHTTPServer):
    """A server that says nothing when somebody hangs up."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        return


@contextmanager
def serve(issuer_of: Callable[[str], Issuer]) -> Iterator[Issuer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            form = dict(parse_qsl(body.decode(), keep_blank_values=True))
            assert self.path == "/oauth/token"
            serving.forms.append(form)
            serving.asked.set()
            assert serving.gate.wait(WAIT)
            told = serving.answer(form)
            try:
                self.send_response(told.status)
                self.send_header("Content-Length", str(len(told.body)))
                for name, value in told.headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(told.body)
            except OSError:
                serving.hung_up.set()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
            return

    server = Server(("127.0.0.1", 0), Handler)
    serving = issuer_of(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        serving.gate.set()
        server.shutdown()
        server.server_close()
        thread.join(WAIT)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with serve(Issuer) as serving:
        yield serving


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def verifier(issuer: Issuer, clock: SetClock) -> Iterator[Verifier]:
    with a_verifier(issuer, clock) as verifier:
        yield verifier


def a_verifier(issuer: Issuer, clock: SetClock, **changes: Any) -> Verifier:
    ordinary = {
        "audience": AUDIENCE,
        "service_key": SERVICE_KEY,
        "feed": None,
        "fetch": issuer.fetch,
        "clock": clock,
        "monotonic": clock,
    }
    return Verifier(issuer.url, **{**ordinary, **changes})


def sent(key: str = API_KEY) -> dict[str, str]:
    return {"X-API-Key": key}


def basic(user_name: str, password: str = "") -> str:
    return "Basic " + base64.b64encode(f"{user_name}:{password}".encode()).decode()


def refusal(verifier: Verifier, headers: Any = None, **more: Any) -> VerifierError:
    with pytest.raises(VerifierError) as refused:
        verifier.authenticate(sent() if headers is None else headers, **more)
    error = refused.value
    assert error.protection == verifier.protection
    everything = f"{error!r}{error.headers}{error.body!r}"
    assert API_KEY not in everything
    assert SERVICE_KEY not in everything
    assert error.__cause__ is None
    return error


def both_refuse(verifier: Verifier, headers: Any = None, **more: Any) -> VerifierError:
    """The error of both faces, which have to agree."""
    headers = sent() if headers is None else headers
    of_threads = refusal(verifier, headers, **more)
    with pytest.raises(VerifierError) as of_loop:
        asyncio.run(verifier.authenticate_async(headers, **more))
    assert of_loop.value.headers == of_threads.headers
    assert of_loop.value.body == of_threads.body
    return of_threads


# What is asked, and what comes of it


def test_an_exchange_asks_as_the_issuer_wants_it(issuer: Issuer, verifier: Verifier) -> None:
    """RFC 8693 §2.1: the service key authenticates, the caller's key is what is asked about."""
    verifier.authenticate(sent(), client_address="203.0.113.7")

    assert issuer.forms == [
        {
            "grant_type": GRANT_TYPE,
            "client_secret": SERVICE_KEY,
            "subject_token": API_KEY,
            "subject_token_type": f"{issuer.url}/token-types/api-key",
            "resource": AUDIENCE,
            "client_address": "203.0.113.7",
            "presented_in": "header",
        }
    ]


UNKNOWN_ADDRESSES = [None, "", "testclient", "/run/app.sock", "203.0.113.7:4711", "localhost"]


@pytest.mark.parametrize("address", UNKNOWN_ADDRESSES)
def test_an_address_that_is_none_is_sent_as_unknown(
    issuer: Issuer, verifier: Verifier, address: str | None
) -> None:
    """
    RFC 7239 §6.2: refused where a key has ranges, and nowhere else.

    Servers name their peer in odd ways; the issuer refuses what is no address, and every raw key
    would be answered with 503.
    """
    verifier.authenticate(sent(), client_address=address)

    assert [form["client_address"] for form in issuer.forms] == ["unknown"]


def test_the_principal_is_the_callers(issuer: Issuer, verifier: Verifier) -> None:
    """What a token says, but for the way it came."""
    token = signer().token(claims(iss=issuer.url))
    issuer.answer = lambda form: success(token)

    by_key = verifier.authenticate(sent())
    by_loop = asyncio.run(verifier.authenticate_async(sent()))

    assert by_key == by_loop
    assert by_key.method == "api_key"
    assert replace(by_key, method="jwt") == verifier.verify_jwt(token)


def test_a_raw_key_that_lacks_a_scope_is_403(verifier: Verifier) -> None:
    """L4; RFC 6750 §3.1."""
    error = both_refuse(verifier, scopes="widgets:delete")

    assert (error.status, error.code, error.scope) == (403, "insufficient_scope", "widgets:delete")


def test_a_raw_key_of_another_environment_is_refused(issuer: Issuer, clock: SetClock) -> None:
    """As its token would be."""
    with a_verifier(issuer, clock, environment="test") as verifier:
        assert both_refuse(verifier).code == "wrong_environment"


# One at a time


def test_threads_with_one_key_make_one_request(issuer: Issuer, verifier: Verifier) -> None:
    """A restart of the resource server is no storm at the issuer."""
    together = threading.Barrier(64)
    issuer.gate.clear()

    def call() -> str:
        together.wait(WAIT)
        return verifier.authenticate(sent()).token_id

    with ThreadPoolExecutor(64) as pool:
        calls = [pool.submit(call) for _ in range(64)]
        time.sleep(0.5)
        issuer.gate.set()
        tokens = {one.result(WAIT) for one in calls}

    assert len(issuer.forms) == len(tokens) == 1


def test_tasks_with_one_key_make_one_request_and_block_no_loop(
    issuer: Issuer, verifier: Verifier
) -> None:
    """The loop goes on turning while the issuer is slow."""
    issuer.gate.clear()

    async def call_together() -> set[str]:
        calls = [asyncio.ensure_future(verifier.authenticate_async(sent())) for _ in range(50)]
        assert await asyncio.to_thread(issuer.asked.wait, WAIT)
        issuer.gate.set()
        return {(await one).token_id for one in calls}

    tokens = asyncio.run(call_together())

    assert len(issuer.forms) == len(tokens) == 1


def test_a_task_that_is_given_up_ends_no_exchange_of_others(
    issuer: Issuer, verifier: Verifier
) -> None:
    """A client that hangs up first must not fail everybody who sent the same key."""
    issuer.gate.clear()

    async def one_gives_up() -> Principal:
        first = asyncio.ensure_future(verifier.authenticate_async(sent()))
        assert await asyncio.to_thread(issuer.asked.wait, WAIT)
        second = asyncio.ensure_future(verifier.authenticate_async(sent()))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        issuer.gate.set()
        return await second

    assert asyncio.run(one_gives_up()).method == "api_key"
    assert len(issuer.forms) == 1


def test_one_slow_exchange_holds_up_no_other_key(issuer: Issuer, verifier: Verifier) -> None:
    """Each API key waits for itself."""
    another = apikey.make("ck_live")
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer(form: dict[str, str]) -> Told:
        if form["subject_token"] == API_KEY:
            is_asked.set()
            assert may_answer.wait(WAIT)
        return issuer.token(form)

    issuer.answer = answer
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(verifier.authenticate, sent())
        assert is_asked.wait(WAIT)
        assert verifier.authenticate(sent(another)).method == "api_key"
        assert not slow.done()
        may_answer.set()
        slow.result(WAIT)


# Memory


def test_an_exchange_is_remembered_until_shortly_before_its_end(
    issuer: Issuer, verifier: Verifier, clock: SetClock
) -> None:
    """Renewed RENEW_BEFORE early, so that no request meets an expired token."""
    first = verifier.authenticate(sent())
    clock.now = NOW + LIFETIME - RENEW_BEFORE - 1
    assert verifier.authenticate(sent()).token_id == first.token_id
    assert len(issuer.forms) == 1

    clock.now = NOW + LIFETIME - RENEW_BEFORE
    issuer.answer = lambda form: issuer.token(form, iat=int(clock.now), exp=int(clock.now) + 600)
    assert verifier.authenticate(sent()).token_id != first.token_id
    assert len(issuer.forms) == 2


@pytest.mark.parametrize("expires_in", [1, RENEW_BEFORE, 2 * RENEW_BEFORE])
def test_a_short_token_is_used_for_as_long_as_it_lives(
    issuer: Issuer, verifier: Verifier, clock: SetClock, expires_in: int
) -> None:
    """A key in its last minute must not be exchanged at every request."""
    issuer.answer = lambda form: success(
        signer().token(claims(iss=issuer.url, exp=NOW + expires_in)), expires_in
    )
    verifier.authenticate(sent())
    clock.now = NOW + expires_in - 0.5
    verifier.authenticate(sent())
    assert len(issuer.forms) == 1

    clock.now = NOW + expires_in
    verifier.authenticate(sent())
    assert len(issuer.forms) == 2


def test_what_came_in_a_header_says_nothing_about_a_url(issuer: Issuer, verifier: Verifier) -> None:
    """Remembered by key and place: only a connector key may stand in a URL."""
    issuer.answer = lambda form: (
        issuer.token(form)
        if form["presented_in"] == "header"
        else problem("connector_only_in_query")
    )

    for _ in range(2):
        assert verifier.authenticate(sent())
        error = both_refuse(verifier, {}, query=f"api_key={API_KEY}")
        assert (error.status, error.code) == (401, "connector_only_in_query")

    assert [form["presented_in"] for form in issuer.forms] == ["header", "query"]


def test_memory_holds_no_api_key(issuer: Issuer, verifier: Verifier) -> None:
    """A dump of the resource server's memory gives away digests and tokens."""
    verifier.authenticate(sent())
    issuer.answer = lambda form: problem("api_key_unknown")
    unknown = apikey.make("ck_live")
    refusal(verifier, sent(unknown))

    exchange = verifier._exchange
    assert exchange is not None
    held = repr((exchange._remembered, exchange._under_way, verifier.status(), exchange, verifier))
    assert len(exchange._remembered) == 2
    assert not [key for key in (API_KEY, unknown, SERVICE_KEY) if key in held]
    assert {digest for digest, _ in exchange._remembered} == {
        apikey.digest(API_KEY),
        apikey.digest(unknown),
    }


def test_memory_is_bounded(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers cannot fill it; what was forgotten is exchanged again."""
    monkeypatch.setattr("coatcheck.verifier.exchange._MOST_REMEMBERED", 3)
    for _ in range(10):
        verifier.authenticate(sent(apikey.make("ck_live")))

    assert verifier._exchange is not None
    assert len(verifier._exchange._remembered) == 3


# Refusals

OF_THE_KEY: dict[str, str] = {
    "api_key_unknown": "api_key_unknown",
    "api_key_malformed": "api_key_malformed",
    "api_key_revoked": "api_key_revoked",
    "api_key_expired": "api_key_expired",
    "api_key_disabled": "api_key_disabled",
    "org_suspended": "org_suspended",
    "connector_only_in_query": "connector_only_in_query",
}


@pytest.mark.parametrize(("told", "code"), OF_THE_KEY.items())
def test_a_dead_key_is_401_with_the_issuers_reason(
    issuer: Issuer, verifier: Verifier, told: str, code: str
) -> None:
    """L3; RFC 6750 §3.1 invalid_token.  The sentence is the issuer's: it knows the date."""
    issuer.answer = lambda form: problem(told, description="On 2026-09-21 at 12:00 UTC.")

    error = both_refuse(verifier)

    assert (error.status, error.code, error.error) == (401, code, "invalid_token")
    assert error.detail == "On 2026-09-21 at 12:00 UTC."
    assert error.challenge is not None
    assert 'error="invalid_token"' in error.challenge


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ("wrong_environment", "wrong_environment"),
        ("invalid_target", "wrong_audience"),
        ("not_enforced_there", "wrong_audience"),
    ],
)
def test_a_key_for_something_else_is_401(
    issuer: Issuer, verifier: Verifier, told: str, code: str
) -> None:
    """As a token for something else."""
    issuer.answer = lambda form: problem(told, error="invalid_target")

    error = both_refuse(verifier)

    assert (error.status, error.code, error.detail) == (401, code, "A sentence.")
    assert len(issuer.forms) == 1


def test_a_key_that_spent_its_credit_is_429_without_a_time(
    issuer: Issuer, verifier: Verifier
) -> None:
    """Nobody knows when its owner raises the limit; another token would not help."""
    issuer.answer = lambda form: problem("quota_exceeded")

    error = both_refuse(verifier)

    assert (error.status, error.code, error.challenge) == (429, "quota_exceeded", None)
    assert "Retry-After" not in error.headers
    assert len(issuer.forms) == 1


# Where a key may be used from


def only_from(issuer: Issuer, *addresses: str) -> Callable[[dict[str, str]], Told]:
    """The issuer's answer for a key that may be used from these addresses only."""
    bound = {"must": ["network"], "cidrs": list(addresses)}

    def answer(form: dict[str, str]) -> Told:
        if form["client_address"] in addresses:
            return issuer.token(form, **bound)
        return problem("ip_not_allowed", description="Not from there.")

    return answer


def test_an_address_that_is_refused_keeps_no_other_one_out(
    issuer: Issuer, verifier: Verifier
) -> None:
    """Whoever found a key and tries it from elsewhere must not lock its owner out."""
    issuer.answer = only_from(issuer, "192.0.2.7")

    error = both_refuse(verifier, client_address="198.51.100.4")
    assert (error.status, error.code, error.detail) == (403, "ip_not_allowed", "Not from there.")
    assert error.error == "insufficient_scope"
    assert verifier.authenticate(sent(), client_address="192.0.2.7")
    assert [form["client_address"] for form in issuer.forms] == ["198.51.100.4", "192.0.2.7"]


def test_a_refused_address_is_remembered_for_seconds_only(
    issuer: Issuer, verifier: Verifier, clock: SetClock
) -> None:
    """As any refusal; in any spelling."""
    issuer.answer = only_from(issuer, "192.0.2.7")
    for address in ("198.51.100.4", "::ffff:198.51.100.4", "198.51.100.4"):
        assert refusal(verifier, client_address=address).code == "ip_not_allowed"
    assert len(issuer.forms) == 1
    assert refusal(verifier, client_address=None).code == "ip_not_allowed"
    assert refusal(verifier, client_address="localhost").code == "ip_not_allowed"
    assert len(issuer.forms) == 2

    issuer.answer = only_from(issuer, "192.0.2.7", "198.51.100.4")
    clock.now += NEGATIVE - 0.5
    assert refusal(verifier, client_address="198.51.100.4").code == "ip_not_allowed"
    clock.now += 0.5
    assert verifier.authenticate(sent(), client_address="198.51.100.4")


def test_the_token_of_a_right_address_opens_nothing_elsewhere(
    issuer: Issuer, verifier: Verifier
) -> None:
    """It is kept for the key, and says itself where it may be used: nobody asks again."""
    issuer.answer = only_from(issuer, "192.0.2.7")
    verifier.authenticate(sent(), client_address="192.0.2.7")

    for _ in range(2):
        assert both_refuse(verifier, client_address="198.51.100.4").code == "ip_not_allowed"
        assert verifier.authenticate(sent(), client_address="192.0.2.7")
    assert len(issuer.forms) == 1


@pytest.mark.parametrize("code", ["api_key_revoked", "quota_exceeded"])
def test_any_other_refusal_holds_wherever_the_key_is_used(
    issuer: Issuer, verifier: Verifier, code: str
) -> None:
    """It is the key's: a guesser with many addresses does not reach the issuer with each."""
    issuer.answer = lambda form: problem(code)

    for number in range(5):
        assert refusal(verifier, client_address=f"192.0.2.{number}").code == code
    assert len(issuer.forms) == 1


def test_no_request_waits_for_what_is_asked_for_another_address(
    issuer: Issuer, verifier: Verifier
) -> None:
    """One exchange for each address; what it brings is for all who came from there."""
    told = only_from(issuer, "192.0.2.7")
    is_stranger_asked, may_answer = threading.Event(), threading.Event()

    def answer(form: dict[str, str]) -> Told:
        if form["client_address"] != "192.0.2.7":
            is_stranger_asked.set()
            assert may_answer.wait(WAIT)
        return told(form)

    issuer.answer = answer
    with ThreadPoolExecutor(4) as pool:
        strangers = [
            pool.submit(refusal, verifier, client_address="198.51.100.4") for _ in range(4)
        ]
        assert is_stranger_asked.wait(WAIT)
        assert verifier.authenticate(sent(), client_address="192.0.2.7")
        may_answer.set()
        codes = {one.result(WAIT).code for one in strangers}

    assert codes == {"ip_not_allowed"}
    assert sorted(form["client_address"] for form in issuer.forms) == ["192.0.2.7", "198.51.100.4"]


def test_a_key_that_is_used_from_everywhere_is_exchanged_a_few_times_at_most(
    issuer: Issuer, verifier: Verifier
) -> None:
    """Those who waited in line find what the first ones brought."""
    together = threading.Barrier(40)
    issuer.gate.clear()

    def call(number: int) -> Principal:
        together.wait(WAIT)
        return verifier.authenticate(sent(), client_address=f"192.0.2.{number}")

    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(call, number) for number in range(40)]
        time.sleep(0.2)
        issuer.gate.set()
        assert all(one.result(WAIT).key_id for one in calls)

    assert len(issuer.forms) <= 8


def test_many_refused_addresses_push_out_no_token(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was found and is tried from a whole network costs others nothing."""
    monkeypatch.setattr("coatcheck.verifier.exchange._MOST_REMEMBERED", 3)
    another = apikey.make("ck_live")
    verifier.authenticate(sent(another), client_address="192.0.2.7")
    issuer.answer = only_from(issuer, "192.0.2.7")
    for number in range(10, 20):
        assert refusal(verifier, client_address=f"198.51.100.{number}").status == 403

    assert verifier.authenticate(sent(another), client_address="192.0.2.7")
    assert len(issuer.forms) == 11
    assert verifier._exchange is not None
    assert len(verifier._exchange._refused_there) == 3


# What else a raw key is held against


def test_a_raw_key_is_held_against_the_request_as_its_token_is(issuer: Issuer) -> None:
    """One path for both: method, project and model."""
    bound = {"must": ["project", "models", "role"], "project_id": "prj_1", "models": ["small"]}
    issuer.answer = lambda form: issuer.token(form, **bound, roles=["viewer"])
    in_another = sent() | {"X-Project-Id": "prj_2"}

    with a_verifier(issuer, SetClock(), roles={"viewer": ["GET"]}) as verifier:
        who = verifier.authenticate(sent(), method="GET", model="small")
        assert (who.project_id, who.models, who.roles) == ("prj_1", ("small",), ("viewer",))
        assert both_refuse(verifier, in_another, method="GET").code == "wrong_project"
        assert both_refuse(verifier, method="POST").code == "role_not_allowed"
        assert both_refuse(verifier, method="GET", model="huge").code == "model_not_allowed"
    assert len(issuer.forms) == 1


def test_a_raw_key_that_is_not_bound_names_its_project(verifier: Verifier) -> None:
    """For this request alone."""
    first = verifier.authenticate(sent() | {"X-Project-Id": "prj_1"})
    second = verifier.authenticate(sent())

    assert (first.project_id, second.project_id) == ("prj_1", None)


def test_an_api_key_of_an_older_system_is_exchanged_as_any_other(issuer: Issuer) -> None:
    """By its prefix: the issuer knows what it made of it."""
    with a_verifier(issuer, SetClock(), foreign_prefixes=("sk-old-",)) as verifier:
        assert verifier.authenticate(sent("sk-old-5f3a9c")).method == "api_key"
        assert verifier.authenticate(sent("sk-old-5f3a9c")).method == "api_key"

    assert [form["subject_token"] for form in issuer.forms] == ["sk-old-5f3a9c"]


def test_a_refusal_is_remembered_for_seconds_only(
    issuer: Issuer, verifier: Verifier, clock: SetClock
) -> None:
    """A caller in a loop does not reach the issuer; a key that was enabled works soon."""
    issuer.answer = lambda form: problem("api_key_disabled")
    refusal(verifier)
    issuer.answer = issuer.token
    clock.now += NEGATIVE - 0.5
    assert refusal(verifier).code == "api_key_disabled"
    assert len(issuer.forms) == 1

    clock.now += 0.5
    assert verifier.authenticate(sent())


def test_each_request_has_an_error_of_its_own(issuer: Issuer, verifier: Verifier) -> None:
    """An exception is changed on its way out; one for all would mix up two answers."""
    issuer.answer = lambda form: problem("api_key_revoked")

    assert refusal(verifier) is not refusal(verifier)
    assert len(issuer.forms) == 1


RETRY_AFTER: dict[str, tuple[str | None, int]] = {
    "seconds": ("42", 42),
    "none": (None, 1),
    "date": ("Wed, 21 Oct 2026 07:28:00 GMT", 1),
    "negative": ("-5", 1),
    "fraction": ("1.5", 1),
    "other digits": ("4²", 1),
}


@pytest.mark.parametrize(("retry_after", "seconds"), RETRY_AFTER.values(), ids=RETRY_AFTER)
def test_a_throttled_guesser_is_told_so(
    issuer: Issuer, verifier: Verifier, clock: SetClock, retry_after: str | None, seconds: int
) -> None:
    """RFC 6585 §4; RFC 9110 §10.2.3.  Without a challenge: other credentials do not help."""
    headers = () if retry_after is None else (("Retry-After", retry_after),)
    issuer.answer = lambda form: problem(
        "rate_limited", "temporarily_unavailable", status=429, headers=headers
    )

    error = both_refuse(verifier)

    assert (error.status, error.code, error.challenge) == (429, "rate_limited", None)
    assert error.headers["Retry-After"] == str(seconds)
    issuer.answer = issuer.token
    clock.now += NEGATIVE
    assert verifier.authenticate(sent())


def test_a_throttled_guesser_throttles_nobody_else(issuer: Issuer, verifier: Verifier) -> None:
    """The memory of it belongs to the key that was guessed."""
    issuer.answer = lambda form: problem("rate_limited", status=429)
    assert refusal(verifier).status == 429

    issuer.answer = issuer.token
    assert verifier.authenticate(sent(apikey.make("ck_live")))


# Our own trouble

TROUBLE: dict[str, Told] = {
    "500": Told(500, b"Internal Server Error"),
    "503": problem("issuer_unavailable", "temporarily_unavailable", status=503),
    "502 of a proxy": Told(502, b"<html>Bad Gateway</html>"),
    "404": Told(404, b"{}"),
    "HTML": Told(200, b"<html>Sign in</html>", (("Content-Type", "text/html"),)),
    "HTML 400": Told(400, b"<html>Bad Request</html>"),
    "empty": Told(200, b""),
    "no object": Told(200, b"[]"),
    "null": Told(200, b"null"),
    "no UTF-8": Told(200, b"\xff\xfe\xfd"),
    "no token": Told(200, b'{"expires_in":600}'),
    "no lifetime": Told(200, b'{"access_token":"a.b.c"}'),
    "lifetime as text": success("a.b.c", "600"),
    "lifetime as a truth": success("a.b.c", expires_in=True),
    "lifetime beyond numbers": Told(
        200, b'{"access_token":"a.b.c","expires_in":1%s}' % (b"0" * 400)
    ),
    "token as a number": success(5),
    "token that is none": success("not-a-token"),
    "token beyond ASCII": success("a.b.c\u0441"),
    "token of another issuer": success(signer().token(claims())),
    "token of an unknown signing key": success(signer(kid="second").token(claims())),
    "an error with 200": replace(problem("api_key_revoked"), status=200),
    "a redirect": Told(302, b"", (("Location", "/oauth/token"),)),
    "a redirect that keeps the body": Told(307, b"", (("Location", "/oauth/token"),)),
    "a redirect to nowhere": Told(308, b"", (("Location", "http://[::1"),)),
    "too long": Told(200, b'{"access_token":"%s","expires_in":600}' % (b"a" * 20_000)),
    "deep": Told(200, b"[" * 16_000),
    "compressed nonsense": Told(200, b"nonsense", (("Content-Encoding", "gzip"),)),
    "unknown code": problem("something_new"),
    "the request is wrong": problem("invalid_request"),
    "a code that is no text": Told(400, b'{"error":"invalid_request","code":["api_key_unknown"]}'),
    "no code": Told(400, b'{"error":"invalid_request"}'),
    "service key unknown": problem("api_key_unknown", "invalid_client"),
    "service key revoked": problem("api_key_revoked", "invalid_client"),
    "service key refused with 401": problem("api_key_unknown", "invalid_client", status=401),
    "service key without the scope": problem("unauthorized_client", "unauthorized_client"),
    "organization of the service key": problem("org_suspended", "unauthorized_client"),
    "service key from here": problem("ip_not_allowed", "unauthorized_client"),
    "credit of the service key": problem("quota_exceeded", "unauthorized_client"),
    "401 about the key": problem("api_key_revoked", status=401),
    "retry after ages": problem("rate_limited", status=429, headers=(("Retry-After", "9" * 5000),)),
}
#: Throttled all the same; only the seconds are nonsense.
LIMITED = {"retry after ages"}


@pytest.mark.parametrize(("name", "told"), TROUBLE.items(), ids=TROUBLE)
def test_an_issuer_in_trouble_says_nothing_about_the_caller(
    issuer: Issuer, verifier: Verifier, name: str, told: Told
) -> None:
    """L5: 503 with Retry-After and without a challenge, never 401; and tried again at once."""
    issuer.answer = lambda form: told

    error = both_refuse(verifier)

    expected = (429, "rate_limited") if name in LIMITED else (503, "issuer_unavailable")
    assert (error.status, error.code, error.challenge) == (*expected, None)
    assert int(error.headers["Retry-After"]) >= 1
    if name not in LIMITED:
        assert len(issuer.forms) == 2
        issuer.answer = issuer.token
        assert verifier.authenticate(sent())


TEXTS: dict[str, object] = {
    "quotes": 'a", error="none',
    "backslash": "a\\",
    "line break": "a\r\nSet-Cookie: x=1",
    "beyond ASCII": "gesperrt für immer",
    "NUL": "a\0b",
    "long": "a" * 10_000,
    "the key": f"The key {API_KEY} was revoked.",
    "no text": ["a"],
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_issuers_sentence_is_passed_on_only_if_it_can_stand_in_a_challenge(
    issuer: Issuer, verifier: Verifier, text: object
) -> None:
    """RFC 6750 §3: no quotes, backslashes or line breaks; RFC 9110 §5.5.  Else our own is told."""
    issuer.answer = lambda form: problem("api_key_revoked", description=text)

    error = both_refuse(verifier)

    assert (error.status, error.code) == (401, "api_key_revoked")
    assert error.detail == errors.ApiKeyRevoked.text


def test_an_answer_without_end_is_not_read_to_its_end(issuer: Issuer, verifier: Verifier) -> None:
    """A resource server does not fill up on behalf of somebody else's server."""
    issuer.answer = lambda form: Told(200, b" " * 50_000_000)

    assert refusal(verifier).code == "issuer_unavailable"
    assert issuer.hung_up.wait(2)


def test_an_issuer_that_is_away_is_our_trouble(clock: SetClock) -> None:
    """L5: the documented policy is to fail closed, with 503."""
    issuer = Issuer(f"http://127.0.0.1:{free_port()}")
    with a_verifier(issuer, clock) as verifier:
        error = both_refuse(verifier)

    assert (error.status, error.code) == (503, "issuer_unavailable")


def test_a_remembered_exchange_outlives_the_issuer(clock: SetClock) -> None:
    """L5: while it is remembered, a key needs no issuer."""
    with serve(Issuer) as issuer:
        issuer.answer = lambda form: replace(issuer.token(form), headers=(("Connection", "close"),))
        verifier = a_verifier(issuer, clock)
        first = verifier.authenticate(sent())
    with verifier:
        assert verifier.authenticate(sent()) == first
        assert refusal(verifier, sent(apikey.make("ck_live"))).status == 503


def test_an_issuer_that_answers_too_late_is_our_trouble(issuer: Issuer, verifier: Verifier) -> None:
    """No request of a caller hangs for ever."""
    assert verifier._exchange is not None
    verifier._exchange._posts.timeout_s = 0.2
    issuer.gate.clear()

    error = refusal(verifier)

    assert (error.status, error.code) == (503, "issuer_unavailable")
    issuer.gate.set()
    verifier._exchange._posts.timeout_s = 5
    assert verifier.authenticate(sent())


# The feed


class Feed:
    """The issuer's documents with a feed that can be added to; a long poll waits for news."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.seq = 20
        self.entries: dict[str, int] = {}
        self._news = threading.Condition()
        self._is_over = False

    @property
    def url(self) -> str:
        return f"{self.issuer.url}/oauth/revocations"

    def narrow(self, subject: str, verifier: Verifier) -> None:
        """Let the feed name a subject, and wait until the verifier has heard of it."""
        with self._news:
            self.seq += 1
            self.entries[feed_profile.subject(subject)] = self.seq
            self._news.notify_all()
        deadline = time.monotonic() + WAIT
        while (known := verifier._changes and verifier._changes.known()) and known.seq < self.seq:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> None:
        with self._news:
            self._is_over = True
            self._news.notify_all()

    def fetch(self, url: str) -> bytes:
        if url.endswith("/.well-known/jwks.json"):
            return key_set()
        feed_key = signer("EdDSA", "feed")
        if url.endswith("/.well-known/coatcheck"):
            return as_json(
                {
                    "issuer": self.issuer.url,
                    "revocations_endpoint": self.url,
                    "revocation_keys": {"keys": [feed_key.jwk()]},
                }
            )
        after = int(dict(parse_qsl(url.partition("?")[2]))["after"])
        with self._news:
            self._news.wait_for(lambda: self.seq > after or self._is_over, timeout=WAIT)
            said: dict[str, object] = {
                "iss": self.issuer.url,
                "aud": self.url,
                "iat": NOW,
                "exp": NOW + JWKS_MAX_AGE,
                "log": "log",
                "seq": self.seq,
                "entries": self.entries,
                "kids": [signer().kid, feed_key.kid],
            }
            return feed_key.token(said, typ=feed_profile.TYPE).encode()


@pytest.fixture
def feed(issuer: Issuer) -> Iterator[Feed]:
    feed = Feed(issuer)
    yield feed
    feed.end()


@pytest.fixture
def follower(issuer: Issuer, feed: Feed, clock: SetClock) -> Iterator[Verifier]:
    """A verifier that follows the feed."""
    with a_verifier(issuer, clock, feed="auto", fetch=feed.fetch) as verifier:
        yield verifier


def test_a_remembered_token_that_the_feed_kills_is_exchanged_again(
    issuer: Issuer, feed: Feed, follower: Verifier
) -> None:
    """The key may be good still: disabled and enabled again, a group was narrowed, and so on."""
    issuer.answer = lambda form: issuer.token(form, as_of=feed.seq)
    first = follower.authenticate(sent())
    feed.narrow(str(claims()["sub"]), follower)

    second = follower.authenticate(sent())
    assert second.token_id != first.token_id
    assert follower.authenticate(sent()).token_id == second.token_id
    assert asyncio.run(follower.authenticate_async(sent())).token_id == second.token_id
    assert len(issuer.forms) == 2


def test_a_key_that_was_revoked_is_told_as_revoked(
    issuer: Issuer, feed: Feed, follower: Verifier
) -> None:
    """The caller sent a key, and hears of its key rather than of a token it never saw."""
    issuer.answer = lambda form: issuer.token(form, as_of=feed.seq)
    follower.authenticate(sent())
    issuer.answer = lambda form: problem("api_key_revoked")
    feed.narrow(str(claims()["sub"]), follower)

    assert both_refuse(follower).code == "api_key_revoked"
    assert len(issuer.forms) == 2


@pytest.mark.parametrize("is_async", [False, True])
def test_it_is_exchanged_again_once(
    issuer: Issuer, feed: Feed, follower: Verifier, is_async: bool
) -> None:
    """An issuer whose new token is dead as well is not asked for ever by one request."""
    follower.authenticate(sent())
    feed.narrow(str(claims()["sub"]), follower)

    if is_async:
        with pytest.raises(VerifierError) as refused:
            asyncio.run(follower.authenticate_async(sent()))
        error = refused.value
    else:
        error = refusal(follower)

    assert error.code == "token_revoked"
    assert len(issuer.forms) == 2


def test_many_that_meet_a_killed_token_exchange_it_together(
    issuer: Issuer, feed: Feed, follower: Verifier
) -> None:
    """One revocation in a busy resource server is one request, not one per thread."""
    issuer.answer = lambda form: issuer.token(form, as_of=feed.seq)
    follower.authenticate(sent())
    feed.narrow(str(claims()["sub"]), follower)
    together = threading.Barrier(32)
    issuer.gate.clear()

    def call() -> str:
        together.wait(WAIT)
        return follower.authenticate(sent()).token_id

    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(call) for _ in range(32)]
        time.sleep(0.5)
        issuer.gate.set()
        tokens = {one.result(WAIT) for one in calls}

    assert len(tokens) == 1
    assert len(issuer.forms) == 2


# Processes


def test_a_fork_exchanges_for_itself(issuer: Issuer) -> None:
    """Threads stay behind in the parent, and so does an exchange that was under way there."""
    program = """
import os, sys, threading, time
from coatcheck import apikey
from coatcheck.verifier.exchange import Exchange

exchange = Exchange(sys.argv[1], "type", "audience", "service", monotonic=time.monotonic)

def token(key):
    begun = exchange.begin(apikey.digest(key), "header", key, None)
    return begun.result(10).require_token()

first, second, third = sys.argv[2:]
token(first)
waiting = threading.Thread(target=token, args=(second,), daemon=True)
waiting.start()
while not exchange._under_way:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    is_kept = exchange.remembered(apikey.digest(first), "header") is not None
    token(second)
    token(third)
    os._exit(0 if is_kept else 3)
_, status = os.waitpid(child, 0)
token(third)
exchange.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    keys = [apikey.make("ck_live") for _ in range(3)]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, f"{issuer.url}/oauth/token", *keys],
        env=dict(os.environ),
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    asked = [form["subject_token"] for form in issuer.forms]
    assert [asked.count(key) for key in keys] == [1, 2, 2]


def an_exchange(issuer: Issuer) -> Exchange:
    return Exchange(
        f"{issuer.url}/oauth/token", "type", AUDIENCE, SERVICE_KEY, monotonic=time.monotonic
    )


def test_closing_finishes_what_is_under_way(issuer: Issuer) -> None:
    """A worker that is shut down answers its last requests."""
    exchange = an_exchange(issuer)
    issuer.gate.clear()
    begun = exchange.begin(apikey.digest(API_KEY), "header", API_KEY, None)
    assert issuer.asked.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(exchange.close)
        time.sleep(0.1)
        issuer.gate.set()
        closed.result(WAIT)

    assert begun.result(WAIT).require_token()


def test_closing_twice_is_closing_once(issuer: Issuer, clock: SetClock) -> None:
    """Of a verifier, too; its threads are gone."""
    verifier = a_verifier(issuer, clock)
    verifier.authenticate(sent())

    verifier.close()
    verifier.close()


def test_a_closed_verifier_refuses_with_an_error_of_the_family(
    issuer: Issuer, clock: SetClock
) -> None:
    """A request that comes in during the shutdown gets 503; the verifier lets out nothing else."""
    verifier = a_verifier(issuer, clock)
    verifier.authenticate(sent())
    verifier.close()

    assert refusal(verifier, sent(apikey.make("ck_live"))).status == 503


# The host's own look-up

HOSTED = Principal(
    key_id="legacy-17",
    org_id="acme",
    project_id=None,
    environment="live",
    scopes=Scopes.parse("widgets:read"),
    method="jwt",
    expires_at=NOW + LIFETIME,
    token_id="",
    client_id="legacy-17",
    audience=AUDIENCE,
    claims={},
)


@contextmanager
def a_host(
    check_api_key: Callable[[str], Any], clock: SetClock, **changes: Any
) -> Iterator[Verifier]:
    """A verifier that asks the host, and no issuer at all."""
    with Verifier(
        ISSUER,
        AUDIENCE,
        feed=None,
        fetch=lambda url: key_set(),
        clock=clock,
        monotonic=clock,
        check_api_key=check_api_key,
        **changes,
    ) as verifier:
        yield verifier


def failing_with(error: Exception) -> Callable[[str], Principal | None]:
    def check_api_key(key: str) -> Principal | None:
        raise error

    return check_api_key


def test_a_hosts_own_look_up_says_who_a_raw_key_is(clock: SetClock) -> None:
    """For the first days of a migration; it sees the whole key, and every time."""
    asked: list[str] = []

    def check_api_key(key: str) -> Principal | None:
        asked.append(key)
        return HOSTED

    with a_host(check_api_key, clock) as verifier:
        who = verifier.authenticate(sent(), scopes="widgets:read")
        by_loop = asyncio.run(verifier.authenticate_async(sent()))
        error = both_refuse(verifier, scopes="widgets:write")

    assert who == by_loop == replace(HOSTED, method="api_key")
    assert (error.status, error.code) == (403, "insufficient_scope")
    assert asked == [API_KEY] * 4


def test_an_error_of_a_hosts_principal_carries_the_same_challenge(clock: SetClock) -> None:
    """`require` is called deep inside, and the host knows nothing of challenges."""
    with a_host(lambda key: HOSTED, clock) as verifier:
        who = verifier.authenticate(sent())

    with pytest.raises(errors.InsufficientScope) as refused:
        who.require("admin")
    assert refused.value.protection == verifier.protection


HOSTS: dict[str, tuple[Callable[[str], Any], int, str]] = {
    "None": (lambda key: None, 401, "api_key_unknown"),
    "an exception": (failing_with(RuntimeError(API_KEY)), 503, "issuer_unavailable"),
    "KeyError": (failing_with(KeyError(API_KEY)), 503, "issuer_unavailable"),
    "TimeoutError": (failing_with(TimeoutError()), 503, "issuer_unavailable"),
    "its own refusal": (failing_with(errors.ApiKeyRevoked()), 401, "api_key_revoked"),
    "its own throttle": (failing_with(errors.RateLimited(7)), 429, "rate_limited"),
}


@pytest.mark.parametrize(("check_api_key", "status", "code"), HOSTS.values(), ids=HOSTS)
def test_what_a_host_says_is_told_and_its_failure_is_our_trouble(
    clock: SetClock, check_api_key: Callable[[str], Any], status: int, code: str
) -> None:
    """A database that is away is no answer about the key; the exception may hold it."""
    with a_host(check_api_key, clock) as verifier:
        error = both_refuse(verifier)

    assert (error.status, error.code) == (status, code)


def test_a_host_is_asked_about_keys_only(clock: SetClock) -> None:
    """L1, L2: by form alone."""
    with a_host(failing_with(AssertionError()), clock) as verifier:
        assert verifier.authenticate(sent(signer().token(claims()))).method == "jwt"
        assert both_refuse(verifier, sent("a.b.c")).code == "token_malformed"
        assert both_refuse(verifier, sent(MISTYPED)).code == "api_key_malformed"


def test_without_a_service_key_raw_keys_are_refused(clock: SetClock) -> None:
    """By documented policy, and nothing is asked."""
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return key_set()

    with Verifier(ISSUER, AUDIENCE, feed=None, fetch=fetch, clock=clock) as verifier:
        for headers, query in ((sent(), ""), ({}, f"api_key={API_KEY}")):
            error = both_refuse(verifier, headers, query=query)
            assert (error.status, error.code) == (401, "tokens_only")

    assert asked == []


# Settings


def test_a_service_key_may_come_from_the_environment(
    issuer: Issuer, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret belongs into no source file."""
    monkeypatch.setenv("COATCHECK_SERVICE_KEY", SERVICE_KEY)
    with a_verifier(issuer, clock, service_key=None) as verifier:
        verifier.authenticate(sent())

    assert issuer.forms[0]["client_secret"] == SERVICE_KEY


UNFIT: dict[str, dict[str, Any]] = {
    "two ways for one key": {"check_api_key": lambda key: None},
    "plain http for the secrets": {"issuer": "http://auth.example.com"},
    "an issuer that is no address": {"issuer": "urn:example:issuer"},
}


@pytest.mark.parametrize("changes", UNFIT.values(), ids=UNFIT)
def test_an_unfit_setting_is_told_at_the_start(changes: dict[str, Any]) -> None:
    """
    Also beside a key set from elsewhere: the service key and the callers' keys go to the issuer.

    RFC 6749 §3.2: the token endpoint is reached by TLS.  The message repeats no key.
    """
    ordinary = {"issuer": ISSUER, "jwks_url": "https://keys.example.com/jwks.json", "feed": None}
    with pytest.raises(ValueError, match=r"service_key|https|issuer") as refused:
        Verifier(audience=AUDIENCE, service_key=SERVICE_KEY, **{**ordinary, **changes}).close()

    assert SERVICE_KEY not in str(refused.value)


# Where a key may stand, and what it is

PLACES: dict[str, tuple[Any, str | bytes, str]] = {
    "Bearer": ({"Authorization": f"Bearer {API_KEY}"}, "", "header"),
    "bearer": ([(b"authorization", f"bearer  {API_KEY}".encode())], "", "header"),
    "X-API-Key": ({"x-api-key": API_KEY}, "", "header"),
    "Basic KEY:": ({"Authorization": basic(API_KEY)}, "", "header"),
    "query": ({}, f"api_key={API_KEY}", "query"),
    "query of bytes": ({}, f"a=1&api_key={API_KEY}&b=2".encode(), "query"),
    "encoded query": ({}, f"api_key={API_KEY.replace('_', '%5F')}", "query"),
    "same twice in the query": ({}, f"api_key={API_KEY}&api_key={API_KEY}", "query"),
    "same in three places": (
        {"Authorization": f"Bearer {API_KEY}", "X-API-Key": API_KEY},
        f"api_key={API_KEY}",
        "header",
    ),
    "empty query beside it": ({"X-API-Key": API_KEY}, "api_key=", "header"),
    "empty header beside it": ({"X-API-Key": ""}, f"api_key={API_KEY}", "query"),
    "another scheme beside it": ({"Authorization": "Digest x"}, f"api_key={API_KEY}", "query"),
}


@pytest.mark.parametrize(("headers", "query", "place"), PLACES.values(), ids=PLACES)
def test_a_raw_key_is_found_wherever_it_may_stand(
    headers: Any, query: str | bytes, place: str
) -> None:
    """RFC 6750 §2, RFC 7617 §2: nobody has to change a header; one that is sent twice is one."""
    assert presented(headers, query) == (API_KEY, True, place, None)


ANOTHER = apikey.make("ck_live")
MISTYPED = API_KEY[:-1] + ("0" if API_KEY[-1] != "0" else "1")
TOKEN = signer().token(claims())

REFUSED: dict[str, tuple[Any, str, int, str]] = {
    "two headers": (
        {"Authorization": f"Bearer {API_KEY}", "X-API-Key": ANOTHER},
        "",
        400,
        "multiple_credentials",
    ),
    "header and query": (sent(), f"api_key={ANOTHER}", 400, "multiple_credentials"),
    "two in the query": (
        {},
        f"api_key={API_KEY}&api_key={ANOTHER}",
        400,
        "multiple_credentials",
    ),
    "Basic and query": (
        {"Authorization": basic(API_KEY)},
        f"api_key={ANOTHER}",
        400,
        "multiple_credentials",
    ),
    "a key beside a token": (
        {"Authorization": f"Bearer {TOKEN}", "X-API-Key": API_KEY},
        "",
        400,
        "multiple_credentials",
    ),
    "a token beside a key in the query": (
        {"Authorization": f"Bearer {TOKEN}"},
        f"api_key={API_KEY}",
        400,
        "multiple_credentials",
    ),
    "a token as api_key": ({}, f"api_key={TOKEN}", 400, "token_malformed"),
    "a.b.c as api_key": ({}, "api_key=a.b.c", 400, "token_malformed"),
    "a key as access_token": ({}, f"access_token={API_KEY}", 400, "token_malformed"),
    "a key in the user's password": (
        {"Authorization": basic("user", API_KEY)},
        "",
        401,
        "token_malformed",
    ),
    "mistyped": (sent(MISTYPED), "", 401, "api_key_malformed"),
    "mistyped in the query": ({}, f"api_key={MISTYPED}", 401, "api_key_malformed"),
    "another environment": (sent(API_KEY.replace("live", "test")), "", 401, "api_key_malformed"),
    "cut short": (sent(API_KEY[:-1]), "", 401, "token_malformed"),
    "too long": (sent(f"{API_KEY}a"), "", 401, "token_malformed"),
    "line break behind": (sent(f"{API_KEY}\n"), "", 401, "token_malformed"),
    "plus in the query": ({}, f"api_key={API_KEY}+", 401, "token_malformed"),
    "Cyrillic": (sent(API_KEY.replace("c", "\u0441", 1)), "", 401, "token_malformed"),
    "Cyrillic in the query": (
        {},
        "api_key=" + API_KEY.replace("c", "%D1%81", 1),
        401,
        "token_malformed",
    ),
    "Cyrillic in Basic": (
        {"Authorization": basic(API_KEY.replace("c", "\u0441", 1))},
        "",
        401,
        "token_malformed",
    ),
    "full width": (sent(API_KEY.replace("k", "\uff4b", 1)), "", 401, "token_malformed"),
    "Kelvin sign": (sent(API_KEY.replace("k", "\u212a", 1)), "", 401, "token_malformed"),
    "other digits": (sent(API_KEY[:-1] + "\u0663"), "", 401, "token_malformed"),
    "combining mark": (sent(f"{API_KEY}\u0301"), "", 401, "token_malformed"),
    "zero width": (sent(API_KEY[:5] + "\u200b" + API_KEY[5:]), "", 401, "token_malformed"),
    "soft hyphen in bytes": (
        [(b"x-api-key", API_KEY.encode() + b"\xad")],
        "",
        401,
        "token_malformed",
    ),
    "a key in three parts": (
        sent(f"{API_KEY[:5]}.{API_KEY[5:9]}.{API_KEY[9:]}"),
        "",
        401,
        "token_malformed",
    ),
    "keys joined by dots": (sent(f"{API_KEY}.{ANOTHER}.{API_KEY}"), "", 401, "token_malformed"),
}


@pytest.mark.parametrize(("headers", "query", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_single_key_never_reaches_the_issuer(
    issuer: Issuer, verifier: Verifier, headers: Any, query: str, status: int, code: str
) -> None:
    """L2, L3; RFC 6750 §3.1; RFC 9700 §4.3.2 for tokens in the query."""
    error = both_refuse(verifier, headers, query=query)

    assert (error.status, error.code) == (status, code)
    assert issuer.forms == []


FAILED: dict[str, str] = {
    "expired": signer().token(claims(exp=NOW - 3600, iat=NOW - 7200)),
    "forged": TOKEN[:-4] + "AAAA",
    "unsigned": TOKEN.rpartition(".")[0] + ".",
    "no JSON": "a.b.c",
    "dots": "..",
    "unknown signing key": signer(kid="second").token(claims()),
}


@pytest.mark.parametrize("text", FAILED.values(), ids=FAILED)
def test_a_token_that_fails_is_never_tried_as_a_key(
    issuer: Issuer, verifier: Verifier, text: str
) -> None:
    """L1: no fallback from one kind to the other, wherever it stands."""
    for headers in (
        sent(text),
        {"Authorization": f"Bearer {text}"},
        {"Authorization": basic(text)},
    ):
        error = both_refuse(verifier, headers)
        assert error.status == 401
        assert error.code not in ("api_key_unknown", "api_key_malformed", "tokens_only")

    assert issuer.forms == []


def test_a_key_that_fails_is_never_tried_as_a_token(issuer: Issuer, verifier: Verifier) -> None:
    """L1, the reverse."""
    issuer.answer = lambda form: problem("api_key_unknown")

    assert both_refuse(verifier).code == "api_key_unknown"
    assert verifier.status()["key_set"] == {
        "state": "none",
        "age_s": None,
        "good_until": None,
        "kids": [],
        "last_error": None,
    }
