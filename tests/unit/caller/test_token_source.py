"""`TokenSource`: one exchange per renewal, and nobody waits, hammers or notices without need."""

import asyncio
import gc
import logging
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest

from coatcheck import apikey
from coatcheck.caller import (
    ApiKeyMissing,
    AskRefused,
    CallerError,
    IssuerUnavailable,
    KeyRejected,
    NotAllowedNow,
    TokenSource,
)
from coatcheck.caller import token_source as module
from coatcheck.caller.answer import LONGEST_WAIT, Answer
from coatcheck.caller.token_source import FORCED_EVERY, OUTAGE_PAUSES, REFUSAL_PAUSES
from coatcheck.http import FetchFailed
from unit.caller.fakes import (
    ISSUER,
    LIFETIME,
    WAIT,
    Clock,
    FakeIssuer,
    eventually,
    problem,
    success,
)

API_KEY = apikey.make("ck_live")
RENEWAL = LIFETIME - 60
#: Half of two lifetimes.
AWAY_FROM, BACK_AT = LIFETIME // 2, LIFETIME + LIFETIME // 2
THREADS, TASKS = 64, 200


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer(clock: Clock) -> FakeIssuer:
    return FakeIssuer(clock)


@pytest.fixture(autouse=True)
def chance(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What chance says, which is nothing unless a test sets it."""
    said = [0.0]
    monkeypatch.setattr(module, "_chance", lambda: said[0])
    return said


Make = Callable[..., TokenSource]


@pytest.fixture
def make(issuer: FakeIssuer, clock: Clock) -> Iterator[Make]:
    """Makes a source whose issuer and clocks are the test's."""
    made: list[TokenSource] = []

    def source(api_key: str | None = API_KEY, **settings: object) -> TokenSource:
        given = {"clock": clock, "monotonic": clock, "post": issuer, **settings}
        made.append(TokenSource(ISSUER, api_key, **given))  # type: ignore[arg-type]
        return made[-1]

    yield source
    issuer.gate.set()
    for one in made:
        one.close()


def landed(source: TokenSource) -> None:
    """Wait until nothing is under way."""
    eventually(lambda: source._under_way is None)


def error_of(source: TokenSource) -> CallerError:
    with pytest.raises(CallerError) as caught:
        source.token()
    return caught.value


# --- one exchange per renewal


def test_threads_and_tasks_share_one_exchange_per_renewal(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """64 threads and 200 tasks over two lifetimes: one exchange each time, and never a 401."""
    source = make()
    began_at = clock.now

    def call(_: int) -> int:
        return issuer.status_of(source.token())

    async def call_async() -> int:
        return issuer.status_of(await source.token_async())

    async def calls() -> list[int]:
        return await asyncio.gather(*(call_async() for _ in range(TASKS)))

    with ThreadPoolExecutor(THREADS) as pool:
        for passed in range(0, 2 * LIFETIME + 1, 30):
            clock.now = began_at + passed
            by_threads = pool.map(call, range(THREADS))
            assert set(asyncio.run(calls())) == {200}
            assert set(by_threads) == {200}
            landed(source)
            assert len(issuer.forms) == 1 + passed // RENEWAL


def test_the_service_is_away_for_half_of_it(make: Make, issuer: FakeIssuer, clock: Clock) -> None:
    """Calls go on until the token expires; then they fail at once, until it is back."""
    source = make()
    began_at = clock.now
    with ThreadPoolExecutor(THREADS) as pool:
        for passed in range(0, 2 * LIFETIME + 1, 30):
            clock.now = began_at + passed
            issuer.answer = None
            if AWAY_FROM <= passed < BACK_AT:
                issuer.tells(FetchFailed("ConnectError"))
            told = set(pool.map(lambda _: outcome(source, issuer), range(THREADS)))
            landed(source)
            if passed < LIFETIME or passed > BACK_AT + OUTAGE_PAUSES[1]:
                assert told == {200}
            elif passed < BACK_AT:
                assert told == {503}
    # Two lifetimes need three tokens; the outage is asked about a few times, whoever calls.
    assert len(issuer.forms) < 3 + 20


def outcome(source: TokenSource, issuer: FakeIssuer) -> int:
    try:
        return issuer.status_of(source.token())
    except IssuerUnavailable:
        return 503


def test_nobody_waits_while_the_old_token_is_good(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """A slow issuer slows down no call; the next token is there once it has arrived."""
    source = make()
    first = source.token()
    clock.now += RENEWAL
    issuer.gate.clear()

    assert {source.token() for _ in range(100)} == {first}
    assert asyncio.run(source.token_async()) == first
    eventually(lambda: len(issuer.forms) == 2)
    issuer.gate.set()
    eventually(lambda: source.token() != first)
    assert len(issuer.forms) == 2


def test_an_expired_token_is_never_served(make: Make, issuer: FakeIssuer, clock: Clock) -> None:
    """Everybody waits for the next one."""
    source = make()
    first = source.token()
    clock.now += LIFETIME

    assert source.token() != first


def test_life_is_counted_from_before_the_request(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """The issuer counts from when it answers, or before: a slow network must not add to that."""
    source = make(renew_before=0)

    def slow() -> Answer:
        clock.now += 8
        return success(f"token-{len(issuer.forms)}")

    issuer.answer = slow
    source.token()
    clock.now += LIFETIME - 8 - 1
    source.token()
    assert len(issuer.forms) == 1
    clock.now += 1
    source.token()
    assert len(issuer.forms) == 2


LIVES = {"ten minutes": (600, 540), "a minute": (60, 48), "a second": (1, 0.8)}


@pytest.mark.parametrize(("life", "renewed_at"), LIVES.values(), ids=LIVES)
def test_a_token_is_renewed_when_a_minute_or_a_fifth_is_left(
    make: Make, issuer: FakeIssuer, clock: Clock, life: int, renewed_at: float
) -> None:
    """Whichever is less: one that lives for a minute is not renewed all the time."""
    source = make()
    issuer.answer = lambda: success(f"token-{len(issuer.forms)}", life)
    first = source.token()
    clock.now += renewed_at - 0.01
    source.token()
    landed(source)
    assert len(issuer.forms) == 1
    clock.now += 0.02
    assert source.token() == first
    landed(source)
    assert len(issuer.forms) == 2


def test_chance_spreads_the_renewals_of_a_fleet(
    make: Make, issuer: FakeIssuer, clock: Clock, chance: list[float]
) -> None:
    """By up to `jitter` seconds, and never beyond half of what is left."""
    chance[0] = 1.0
    source = make(jitter=10)
    source.token()
    clock.now += RENEWAL + 9.9
    source.token()
    landed(source)
    assert len(issuer.forms) == 1
    clock.now += 0.1
    source.token()
    landed(source)
    assert len(issuer.forms) == 2
    assert make(jitter=1000)._left_s(60) == 30


def test_a_task_that_is_cancelled_ends_only_its_own_waiting(make: Make, issuer: FakeIssuer) -> None:
    """The exchange goes on for the others, of this loop, of another one, and for threads."""
    source = make()
    issuer.gate.clear()

    async def some() -> list[object]:
        tasks = [asyncio.create_task(source.token_async()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        issuer.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with ThreadPoolExecutor(2) as pool:
        thread = pool.submit(source.token)
        eventually(lambda: issuer.forms)
        told = asyncio.run(some())
        assert thread.result(WAIT) == "token-1"
    assert isinstance(told[0], asyncio.CancelledError)
    assert told[1:] == ["token-1"] * 3
    assert len(issuer.forms) == 1


def test_a_loop_that_ends_while_it_waits_leaves_no_noise(
    make: Make, issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that is stopped must not log of a future that nobody waits for."""
    source = make()
    issuer.gate.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(source.token_async(), 0.01))
    issuer.gate.set()

    assert source.token() == "token-1"
    assert not caplog.records


# --- what an API has refused


def test_invalidate_forgets_that_token_only(make: Make, issuer: FakeIssuer) -> None:
    """Threads that meet the same 401 later do not throw away what has replaced it."""
    source = make()
    first = source.token()
    source.invalidate(first)
    second = source.token()
    source.invalidate(first)

    assert source.token() == second != first
    assert len(issuer.forms) == 2


def test_threads_that_meet_a_401_together_cause_one_renewal(make: Make, issuer: FakeIssuer) -> None:
    """`after_refusal` is what `TokenAuth` calls; the threads meet at a barrier."""
    source = make()
    first = source.token()
    meet = threading.Barrier(THREADS)

    def refused(_: int) -> str:
        meet.wait(WAIT)
        assert source.after_refusal(first)
        return source.token()

    with ThreadPoolExecutor(THREADS) as pool:
        told = set(pool.map(refused, range(THREADS)))

    assert told == {"token-2"}
    assert len(issuer.forms) == 2


def test_an_api_that_refuses_everything_does_not_make_the_issuer_work(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """One renewal in a few seconds; a wrong audience is mended by nobody's renewing."""
    source = make()
    for _ in range(100):
        source.after_refusal(source.token())
    source.token()
    assert len(issuer.forms) == 2
    clock.now += FORCED_EVERY
    assert source.after_refusal(source.token())


# --- when there is no token


def test_a_rejected_key_is_not_tried_again(make: Make, issuer: FakeIssuer, clock: Clock) -> None:
    """Not in a week; the issuer's words and code are in each error, and no key."""
    source = make()
    issuer.tells(problem("invalid_client", "Revoked on Monday.", code="api_key_revoked"))
    for _ in range(20):
        error = error_of(source)
        assert type(error) is KeyRejected
        assert (error.code, error.retry_after_s) == ("api_key_revoked", None)
        assert str(error) == "invalid_client: Revoked on Monday."
        clock.now += 10 * LIFETIME
    with pytest.raises(KeyRejected):
        asyncio.run(source.token_async())
    assert len(issuer.forms) == 1
    issuer.answer = None
    source.invalidate()
    assert source.token() == "token-2"


def test_the_token_of_a_rejected_key_is_not_served(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """The same event has ended it; a caller learns it from the reason rather than from a 401."""
    source = make()
    source.token()
    clock.now += RENEWAL
    issuer.tells(problem("invalid_client"))
    source.token()
    landed(source)

    assert type(error_of(source)) is KeyRejected


def test_a_rejected_key_in_a_file_is_read_anew_when_the_file_changed(
    make: Make, issuer: FakeIssuer, tmp_path: Path
) -> None:
    """Whoever replaces the secret restarts nothing."""
    file = tmp_path / "key"
    file.write_text(API_KEY + "\n", encoding="utf-8")
    source = make(None, api_key_file=file)
    issuer.tells(problem("invalid_client"))
    assert type(error_of(source)) is KeyRejected
    assert type(error_of(source)) is KeyRejected
    assert len(issuer.forms) == 1
    another = apikey.make("ck_live")
    (tmp_path / "new").write_text(another, encoding="utf-8")
    (tmp_path / "new").rename(file)
    issuer.answer = None

    assert source.token() == "token-2"
    assert [form["client_secret"] for form in issuer.forms] == [API_KEY, another]
    file.unlink()


REFUSALS = {
    "address, credit, suspended": ("unauthorized_client", NotAllowedNow),
    "scope": ("invalid_scope", AskRefused),
    "resource": ("invalid_target", AskRefused),
    "form": ("invalid_request", AskRefused),
}


@pytest.mark.parametrize(("error", "kind"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_told_from_memory_until_its_pause_is_over(
    make: Make, issuer: FakeIssuer, clock: Clock, error: str, kind: type[CallerError]
) -> None:
    """The issuer's sentence at once, each pause longer than the one before, and never for ever."""
    source = make()
    issuer.tells(problem(error))
    pause, longest = REFUSAL_PAUSES
    for asked in range(1, 10):
        for _ in range(5):
            told = error_of(source)
            assert type(told) is kind
            assert str(told) == f"{error}: A sentence."
        assert len(issuer.forms) == asked
        assert told.retry_after_s == pytest.approx(min(pause, longest))
        clock.now += min(pause, longest)
        pause *= 2
    issuer.answer = None
    assert source.token() == "token-10"


@pytest.mark.parametrize("error", ["unauthorized_client", "invalid_scope"])
def test_a_refusal_of_the_next_token_is_not_noticed_while_the_old_one_is_good(
    make: Make, issuer: FakeIssuer, clock: Clock, error: str
) -> None:
    """What it is for decides whether that one is still honored."""
    source = make()
    first = source.token()
    clock.now += RENEWAL
    issuer.tells(problem(error))
    source.token()
    landed(source)

    assert source.token() == first
    clock.now += 60
    with pytest.raises(CallerError, match=error):
        source.token()


OUTAGES: dict[str, Answer | Exception] = {
    "network": FetchFailed("ConnectError"),
    "too long": FetchFailed("too_long"),
    "busy": problem("temporarily_unavailable", status=503),
    "too many": problem("temporarily_unavailable", status=429),
    "a page": Answer(502, b"<html>"),
    "a redirect": Answer(302, b""),
    "a portal": Answer(200, b"<html>sign in</html>"),
    "another 4xx": Answer(404, b"Not Found"),
    "half a token": Answer(200, b'{"access_token": "a.b'),
    "a bug": ZeroDivisionError(),
}
each_outage = pytest.mark.parametrize("answer", OUTAGES.values(), ids=OUTAGES)


@each_outage
def test_an_outage_is_not_noticed_until_the_token_expires(
    make: Make, issuer: FakeIssuer, clock: Clock, answer: Answer | Exception
) -> None:
    """And from then on it is told from memory while the pause lasts."""
    source = make()
    first = source.token()
    clock.now += RENEWAL
    issuer.tells(answer)
    for _ in range(59):
        assert source.token() == first
        landed(source)
        clock.now += 1
    asked = len(issuer.forms)
    assert asked < 10
    clock.now += 1
    error = error_of(source)
    assert type(error) is IssuerUnavailable
    assert API_KEY not in str(error)
    for _ in range(20):
        assert type(error_of(source)) is IssuerUnavailable
    assert len(issuer.forms) <= asked + 1


@each_outage
def test_with_a_fallback_the_key_itself_is_sent_meanwhile(
    make: Make,
    issuer: FakeIssuer,
    clock: Clock,
    answer: Answer | Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Logged once per outage, without the key; nobody waits for an issuer known to be away."""
    source = make(fallback="api_key")
    issuer.tells(answer)
    for _ in range(2):
        assert source.token() == API_KEY
        clock.now += OUTAGE_PAUSES[1] * 2
        issuer.gate.clear()
        assert asyncio.run(source.token_async()) == API_KEY
        issuer.gate.set()
        landed(source)
        assert [line for line in caplog.messages if "API key itself" in line] == [
            f"{ISSUER}: until it answers again the API key itself is sent to the API"
        ]
        assert API_KEY not in caplog.text
        caplog.clear()
        issuer.answer = None
        clock.now += OUTAGE_PAUSES[1] * 2
        source.token()
        landed(source)
        assert source.token().startswith("token-")
        clock.now += LIFETIME
        issuer.tells(answer)


def test_without_being_told_to_the_key_is_never_sent(make: Make, issuer: FakeIssuer) -> None:
    """Nor, with the fallback, when the issuer has refused."""
    issuer.tells(FetchFailed("ConnectError"))
    assert type(error_of(make())) is IssuerUnavailable
    for error in ("invalid_client", "unauthorized_client", "invalid_scope"):
        issuer.tells(problem(error))
        with pytest.raises(CallerError, match=error):
            make(fallback="api_key").token()


WAITS = {
    "seconds": ("17", 17),
    "a date": (formatdate(1000 + 33, usegmt=True), 33),
    "for a year": ("31536000", LONGEST_WAIT),
    "nonsense": ("soon", OUTAGE_PAUSES[0]),
    "below zero": ("-5", OUTAGE_PAUSES[0]),
    "over": (formatdate(500, usegmt=True), OUTAGE_PAUSES[0]),
}


@pytest.mark.parametrize(("header", "pause"), WAITS.values(), ids=WAITS)
def test_retry_after_is_honored(
    make: Make, issuer: FakeIssuer, clock: Clock, header: str, pause: float
) -> None:
    """Neither earlier nor, whatever it says, much later."""
    source = make()
    issuer.tells(problem("temporarily_unavailable", status=503, retry_after=header))
    error_of(source)
    clock.now += pause - 0.01
    assert error_of(source).retry_after_s == pytest.approx(0.01)
    assert len(issuer.forms) == 1
    clock.now += 0.01
    error_of(source)
    assert len(issuer.forms) == 2


def test_chance_makes_a_pause_longer_only(
    make: Make, issuer: FakeIssuer, clock: Clock, chance: list[float]
) -> None:
    """Callers that failed together do not come back together, nor before they were asked to."""
    chance[0] = 1.0
    source = make()
    issuer.tells(problem("temporarily_unavailable", status=429, retry_after="100"))

    assert error_of(source).retry_after_s == pytest.approx(125)


def test_an_issuer_that_never_ends_holds_up_each_caller_once(
    make: Make, issuer: FakeIssuer, clock: Clock
) -> None:
    """Looking up a name has no limit of its own; whoever comes later is told at once."""
    source = make(timeout=0.01)
    source._patience_s = 0.2
    issuer.gate.clear()
    assert type(error_of(source)) is IssuerUnavailable
    began_at = time.monotonic()
    for _ in range(20):
        clock.now += 1000
        assert type(error_of(source)) is IssuerUnavailable
    with pytest.raises(IssuerUnavailable):
        asyncio.run(source.token_async())
    assert time.monotonic() - began_at < 2
    assert len(issuer.forms) == 1
    issuer.gate.set()
    landed(source)
    # What came after all was the token of long ago.
    assert source.token() == "token-2"


def test_a_key_that_cannot_be_read_is_an_error_of_this_family(
    make: Make, issuer: FakeIssuer, clock: Clock, tmp_path: Path
) -> None:
    """A file that is mounted later counts from then on; the issuer is not asked meanwhile."""
    file = tmp_path / "key"
    source = make(None, api_key_file=file)
    error = error_of(source)
    assert type(error) is ApiKeyMissing
    assert str(file) in str(error)
    assert not issuer.forms
    file.write_text(API_KEY, encoding="utf-8")
    clock.now += REFUSAL_PAUSES[0]
    assert source.token() == "token-1"
    file.unlink()


# --- what is sent


def test_what_is_asked_is_what_was_said(make: Make, issuer: FakeIssuer) -> None:
    """The key in the form, where no encoding differs from client to client."""
    make(scope=["a:b", "c"], resource="https://api.example.com", client_id="key_1").token()
    make().token()

    assert issuer.forms[0] == {
        "grant_type": "client_credentials",
        "client_id": "key_1",
        "client_secret": API_KEY,
        "scope": "a:b c",
        "resource": "https://api.example.com",
    }
    assert issuer.forms[1] == {"grant_type": "client_credentials", "client_secret": API_KEY}


SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "no issuer": ({"issuer": None}, "COATCHECK_ISSUER"),
    "in the clear": ({"issuer": "http://auth.example.com"}, "https"),
    "a user name": ({"issuer": "https://a:b@auth.example.com"}, "issuer"),
    "a query": ({"issuer": "https://auth.example.com?a=b"}, "query"),
    "a fallback of none": ({"fallback": "yes"}, "fallback"),
    "no time": ({"timeout": 0}, "timeout"),
    "two keys": ({"api_key_file": "x"}, "one of them"),
}


@pytest.mark.parametrize(("settings", "told"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], told: str
) -> None:
    """Where it is made, not where it is first used."""
    monkeypatch.delenv("COATCHECK_ISSUER", raising=False)
    given = {"issuer": ISSUER, "api_key": API_KEY, **settings}

    with pytest.raises(ValueError, match=told):
        TokenSource(**given)  # type: ignore[arg-type]


def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, issuer: FakeIssuer
) -> None:
    """What a container is given; and plain http off loopback is for who says so."""
    monkeypatch.setenv("COATCHECK_ISSUER", ISSUER + "/")
    monkeypatch.setenv("COATCHECK_API_KEY", API_KEY)
    with TokenSource(post=issuer) as source:
        assert source.token() == "token-1"
    TokenSource("http://auth.internal", unsafe_plain_http=True)


# --- the end, and other processes


def test_after_its_end_a_source_gives_nothing(make: Make, issuer: FakeIssuer) -> None:
    """Not even to who has waited for it: that one still gets what is under way."""
    with make() as source:
        source.token()
    with pytest.raises(RuntimeError, match="closed"):
        source.token()


def test_what_was_asked_before_all_is_forgotten_is_not_kept(make: Make, issuer: FakeIssuer) -> None:
    """Who has waited gets it; who comes later asks anew."""
    source = make()
    issuer.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(source.token)
        eventually(lambda: issuer.forms)
        source.invalidate()
        issuer.gate.set()
        waited = waiting.result(WAIT)

    assert waited == "token-1"
    assert source.token() == "token-2"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_process_goes_on_by_itself(
    make: Make, issuer: FakeIssuer, clock: Clock, chance: list[float]
) -> None:
    """Forked in the worst moment: an exchange under way, and the lock held by another thread."""
    source = make()
    first = source.token()
    clock.now += RENEWAL
    issuer.gate.clear()
    source.token()
    eventually(lambda: len(issuer.forms) == 2)
    chance[0] = 1.0
    with source._lock:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # Renewed at another moment than the parent's, and alone.
                is_old = source.token() == first and len(issuer.forms) == 2
                issuer.gate.set()
                clock.now += 60
                status = 0 if is_old and source.token() != first else 2
            finally:
                os._exit(status)
    issuer.gate.set()

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    eventually(lambda: source.token() != first)


# --- secrets and memory


def test_no_repr_and_no_error_shows_a_secret(
    make: Make, issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """Reprs end up in logs; an issuer that repeats the key is not repeated."""
    source = make(scope="a:b")
    token = source.token()
    texts = [repr(source), repr(source._held), str(source)]
    assert apikey.mask(API_KEY) in repr(source)
    for sentence in (f"Wrong: {API_KEY}.", f"Wrong: x{apikey.make('ck_live')}", 'a "b"', 7):
        issuer.tells(problem("invalid_client", sentence))
        source.invalidate()
        error = error_of(source)
        assert str(error) == "invalid_client: the issuer gives no reason"
        texts += [str(error), repr(error)]
    for text in (*texts, caplog.text):
        assert API_KEY not in text
        assert token not in text


def test_errors_from_memory_hold_no_memory(make: Make, issuer: FakeIssuer) -> None:
    """A caller in a loop meets the same refusal a million times."""
    source = make()
    issuer.tells(problem("invalid_client"))
    error_of(source)

    def meet(times: int) -> None:
        for _ in range(times):
            try:
                source.token()
            except KeyRejected:
                continue

    meet(100)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        meet(3000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()


def test_an_outage_is_logged_once(
    make: Make, issuer: FakeIssuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """And its end; what is in between is no news."""
    caplog.set_level(logging.INFO, "coatcheck")
    source = make()
    issuer.tells(FetchFailed("ConnectError"))
    for _ in range(10):
        error_of(source)
        clock.now += OUTAGE_PAUSES[1]
    issuer.answer = None
    source.token()

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
