"""An issuer in the process of a test: its tokens, its API keys, and how they end."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet

from coatcheck import apikey, http
from coatcheck.client_address import parse_network
from coatcheck.durations import FEED_STALE, LEEWAY_MAX
from coatcheck.restrictions import Allowance, Role
from coatcheck.restrictions.claims import claims_of
from coatcheck.scope import MalformedScope, Scopes
from coatcheck.testing import FakeIssuer
from coatcheck.testing.issuer import REFUSED_AS
from coatcheck.verifier import Principal, Verifier, VerifierError, errors
from support.tokens import SetClock

# Of its own: other tests of this process have verifiers for the usual one.
ISSUER = "https://fake.example.com"
AUDIENCE = "https://widgets.example.com"
NEEDED = "widgets:read"


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(ISSUER, audience=AUDIENCE, roles={"viewer": ["GET"]}) as issuer:
        yield issuer


@pytest.fixture
def verifier(issuer: FakeIssuer) -> Iterator[Verifier]:
    with Verifier(ISSUER, AUDIENCE, service_key=issuer.service_key) as verifier:
        yield verifier


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def code_of(verifier: Verifier, credential: str, **request: Any) -> str:
    with pytest.raises(VerifierError) as refused:
        verifier.authenticate(bearer(credential), **request)
    return refused.value.code


def threads_of_verifiers() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("coatcheck-")}


# Who asks whom


def test_a_verifier_that_somebody_else_made_needs_no_wiring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an app makes it: at import, from the environment, long before the test begins."""
    monkeypatch.setenv("COATCHECK_ISSUER", ISSUER)
    monkeypatch.setenv("COATCHECK_AUDIENCE", AUDIENCE)
    monkeypatch.setenv("COATCHECK_SERVICE_KEY", "whatever-the-app-has")
    with Verifier() as of_the_app, FakeIssuer(ISSUER, audience=AUDIENCE) as issuer:
        by_token = of_the_app.authenticate(bearer(issuer.token([NEEDED])), NEEDED)
        by_api_key = of_the_app.authenticate(bearer(issuer.api_key([NEEDED])), NEEDED)

    assert (by_token.method, by_token.key_id) == ("jwt", issuer.key_id)
    assert by_api_key.method == "api_key"


def test_an_issuer_below_a_path_and_a_key_set_elsewhere_are_found() -> None:
    """As operators place them."""
    at, jwks_url = "https://example.com/auth/", "https://cdn.example.com/keys.json"
    with (
        FakeIssuer(at, audience=AUDIENCE, jwks_url=jwks_url) as issuer,
        Verifier(at, AUDIENCE, jwks_url=jwks_url) as verifier,
    ):
        assert verifier.verify_jwt(issuer.token())


def test_afterwards_a_verifier_knows_nothing_and_no_thread_is_left() -> None:
    """What is over must neither answer a later test nor reach for the network."""
    of_other_tests = threads_of_verifiers()
    with Verifier(ISSUER, AUDIENCE, service_key="any") as verifier:
        for _ in range(2):
            with FakeIssuer(ISSUER, audience=AUDIENCE) as issuer:
                verifier.authenticate(bearer(issuer.token()))
                verifier.authenticate(bearer(issuer.api_key()))
                assert len(threads_of_verifiers() - of_other_tests) == 3
            status: Any = verifier.status()

            assert threads_of_verifiers() <= of_other_tests
            assert (status["key_set"]["state"], status["feed"]["state"]) == ("none", "none")
    assert http.put_in(ISSUER, None) is None


def test_the_one_that_was_installed_last_answers(issuer: FakeIssuer, verifier: Verifier) -> None:
    """A test may need one of another make for a moment."""
    outer = issuer.token()
    verifier.verify_jwt(outer)
    with FakeIssuer(ISSUER, audience=AUDIENCE, api_key_header="X-Acme-Key") as inner:
        assert verifier.authenticate({"x-acme-key": inner.token()})
        assert verifier.verify_jwt(outer), "the signing keys are those of the process"

    assert verifier.verify_jwt(outer)
    issuer.revoke(outer)
    assert code_of(verifier, outer) == "token_revoked"


def test_installed_twice_it_stays_until_it_is_uninstalled_twice() -> None:
    """Fixtures that know nothing of each other."""
    issuer = FakeIssuer(ISSUER, audience=AUDIENCE)
    with Verifier(ISSUER, AUDIENCE) as verifier:
        with issuer:
            with issuer:
                assert verifier.verify_jwt(issuer.token())
            assert verifier.verify_jwt(issuer.token())
        status: Any = verifier.status()
        assert status["key_set"]["state"] == "none"


def test_another_issuer_is_not_answered(issuer: FakeIssuer) -> None:
    """Only what lies below its very URL."""
    for url in (f"{ISSUER}.evil/jwks", f"{ISSUER}8/.well-known/jwks.json", "https://fake.example"):
        assert http._stand_in_for(url) is None
    for below in (ISSUER, f"{ISSUER}/x", f"{ISSUER}?x"):
        assert http._stand_in_for(below) is issuer


def test_what_it_does_not_serve_is_404(issuer: FakeIssuer) -> None:
    """As a service without that page."""
    for url in (ISSUER, f"{ISSUER}/nothing"):
        with pytest.raises(http.FetchFailed, match="http_404"):
            http.fetch(url, max_bytes=100)
    with pytest.raises(http.FetchFailed, match="http_404"):
        http.Posts().post(f"{ISSUER}/oauth/introspect", {}, max_bytes=100)


def test_nothing_but_this_package_takes_the_place_of_the_network() -> None:
    """No setting leads there, and nothing of the product imports it."""
    app = Path(http.__file__).parent
    users = {path.name for path in app.rglob("*.py") if "put_in(" in path.read_text("utf-8")}
    importers = {
        path.relative_to(app).parts[0]
        for path in app.rglob("*.py")
        if "coatcheck.testing" in path.read_text("utf-8") and path.name != "http.py"
    }

    assert users == {"http.py", "issuer.py"}
    assert importers == {"testing"}


# Tokens


def test_a_token_says_what_the_service_would_say(issuer: FakeIssuer) -> None:
    """The claims of an API key that is narrowed on every axis, `must` and all."""
    token = issuer.token(
        ["read@PLACE/Site/42", "write"],
        org_id="org_1",
        project_id="prj_1",
        environment="test",
        roles=["viewer"],
        cidrs=["10.0.0.0/8"],
        models=["small"],
        group="grp_1",
    )
    allowance = Allowance(
        environment="test",
        audiences=(AUDIENCE,),
        scopes=Scopes.parse("read@PLACE/Site/42 write"),
        networks=(parse_network("10.0.0.0/8"),),
        project_id="prj_1",
        role=Role("viewer", frozenset(("GET",))),
        models=("small",),
        group_id="grp_1",
        api_key_id=issuer.key_id,
        organization_id="org_1",
    )
    said = claims_of_token(token)

    own = {name: said.pop(name) for name in ("iat", "exp", "jti", "as_of")}
    assert said == claims_of(ISSUER, allowance)
    assert own["exp"] - own["iat"] == 600
    assert jwt.get_unverified_header(token)["typ"] == "at+jwt"


def test_a_token_without_narrowing_names_no_restriction(issuer: FakeIssuer) -> None:
    """The plainest one."""
    allowance = Allowance(
        environment="live",
        audiences=(AUDIENCE,),
        scopes=Scopes(),
        api_key_id=issuer.key_id,
        organization_id=issuer.org_id,
    )
    said = claims_of_token(issuer.token())

    assert {**claims_of(ISSUER, allowance), **said} == said
    assert "must" not in said


def test_any_claim_and_header_can_be_set_or_left_out(issuer: FakeIssuer) -> None:
    """For the case that nobody thought of."""
    token = issuer.token(header={"typ": "JWT", "kid": None}, plan="gold", jti=None, sub="me")
    said = claims_of_token(token)

    assert "kid" not in jwt.get_unverified_header(token)
    assert jwt.get_unverified_header(token)["typ"] == "JWT"
    assert (said["plan"], said["sub"], "jti" in said) == ("gold", "me", False)


def test_a_scope_that_is_none_is_told_to_the_author_of_the_test(issuer: FakeIssuer) -> None:
    """A test that asks for nonsense by mistake would be refused for it, and look right."""
    for make in (issuer.token, issuer.api_key):
        with pytest.raises(MalformedScope):
            make(['widgets"read'])


@pytest.mark.parametrize("leeway", [0, LEEWAY_MAX])
def test_an_expired_token_is_expired_by_any_leeway(issuer: FakeIssuer, leeway: int) -> None:
    """No clock has to move for it."""
    with Verifier(ISSUER, AUDIENCE, leeway=leeway) as verifier:
        assert code_of(verifier, issuer.token(expired=True)) == "token_expired"
        assert code_of(verifier, issuer.token(expired=True, lifetime=10)) == "token_expired"
        assert verifier.verify_jwt(issuer.token(lifetime=10))


def test_a_set_clock_is_followed_by_both(issuer: FakeIssuer) -> None:
    """Whoever has a clock of his own gives it to the verifier as well."""
    clock = SetClock()
    with (
        FakeIssuer(ISSUER, audience=AUDIENCE, clock=clock) as of_then,
        Verifier(ISSUER, AUDIENCE, clock=clock) as verifier,
    ):
        token = of_then.token()
        assert verifier.verify_jwt(token)
        clock.now += 700
        of_then.up()
        assert code_of(verifier, token) == "token_expired"
        assert verifier.verify_jwt(of_then.token())


def test_other_libraries_verify_with_its_key_set(issuer: FakeIssuer) -> None:
    """An API that does not use our verifier can be tested, too."""
    token = issuer.token([NEEDED])
    members = issuer.jwks
    by_pyjwt = jwt.decode(
        token,
        jwt.PyJWKSet.from_dict(members)[jwt.get_unverified_header(token)["kid"]],
        algorithms=["ES256"],
        audience=AUDIENCE,
        issuer=ISSUER,
    )
    key_set: Any = members
    by_joserfc = joserfc_jwt.decode(token, KeySet.import_key_set(key_set), algorithms=["ES256"])

    assert by_pyjwt == by_joserfc.claims
    assert json.dumps(members).find('"d"') == -1


def test_its_tokens_mean_nothing_to_a_real_resource_server(issuer: FakeIssuer) -> None:
    """Its signing keys are made with the process, and no two processes have the same."""
    program = "from coatcheck.testing import FakeIssuer; print(FakeIssuer().jwks['keys'][0]['kid'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    kids = [member["kid"] for member in FakeIssuer().jwks["keys"]]  # type: ignore[attr-defined]

    assert done.stdout.strip() not in kids


def test_a_token_takes_hardly_longer_than_its_signature(issuer: FakeIssuer) -> None:
    """So that a suite may make thousands."""
    private = generate_private_key(SECP256R1())

    def seconds(do: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(10):
                do()
            best = min(best, time.perf_counter() - began)
        return best

    raw = seconds(lambda: private.sign(b"x" * 400, ECDSA(SHA256())))
    assert seconds(lambda: issuer.token([NEEDED])) <= 10 * raw


# API keys


def test_a_raw_key_is_the_caller_that_it_was_made_as(
    issuer: FakeIssuer, verifier: Verifier
) -> None:
    """It is exchanged as by the service, so the narrowing is the token's."""
    api_key = issuer.api_key([NEEDED], project_id="prj_1", org_id="org_1", models=["small"])
    principal = verifier.authenticate(bearer(api_key), NEEDED)

    assert (principal.method, principal.key_id) == ("api_key", issuer.key_id_of(api_key))
    assert (principal.org_id, principal.project_id) == ("org_1", "prj_1")
    assert principal.models == ("small",)
    assert verifier.verify_jwt(issuer.token_for(api_key)).key_id == principal.key_id
    assert code_of(verifier, api_key, model="large") == "model_not_allowed"


def test_a_connector_key_is_good_in_the_query_only(issuer: FakeIssuer, verifier: Verifier) -> None:
    """The rule has two sides."""
    api_key = issuer.api_key([NEEDED], connector=True)

    assert verifier.authenticate({}, NEEDED, query=f"api_key={api_key}").method == "api_key"
    assert code_of(verifier, api_key) == "connector_only_in_query"


def test_a_key_of_an_older_system_has_whatever_form_it_had() -> None:
    """Those of a migration."""
    with (
        FakeIssuer(ISSUER, audience=AUDIENCE, foreign_prefixes=["old-"]) as issuer,
        Verifier(ISSUER, AUDIENCE, service_key="any") as verifier,
    ):
        issuer.api_key([NEEDED], text="old-1")

        assert verifier.authenticate(bearer("old-1"), NEEDED)
        assert code_of(verifier, "old-2") == "api_key_unknown"


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        ({"cidrs": ["192.0.2.0/24"]}, "ip_not_allowed"),
        ({"audience": "https://another.example.com"}, "wrong_audience"),
        ({"roles": ["unheard-of"]}, "role_not_allowed"),
        ({"must": ["unheard-of"]}, "unknown_restriction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_raw_key_is_refused_as_its_token_would_be(
    issuer: FakeIssuer, verifier: Verifier, terms: dict[str, Any], code: str
) -> None:
    """By the issuer or by the verifier: as in production."""
    api_key = issuer.api_key([NEEDED], **terms)

    assert code_of(verifier, api_key, client_address="203.0.113.7") == code


def test_an_address_within_the_networks_is_let_in(issuer: FakeIssuer, verifier: Verifier) -> None:
    """The other side of the rule."""
    api_key = issuer.api_key([NEEDED], cidrs=["192.0.2.0/24"])

    assert verifier.authenticate(bearer(api_key), NEEDED, "192.0.2.7")


@pytest.mark.parametrize("code", REFUSED_AS)
def test_what_happens_to_an_api_key_ends_its_tokens_at_once(
    issuer: FakeIssuer, verifier: Verifier, code: str
) -> None:
    """Remembered ones, too: it has reached the verifier when the call returns."""
    api_key = issuer.api_key([NEEDED])
    token = issuer.token_for(api_key)
    verifier.authenticate(bearer(api_key))
    verifier.authenticate(bearer(token))

    issuer.refuse(api_key, code)

    assert code_of(verifier, api_key) == code
    assert code_of(verifier, token) == "token_revoked"
    issuer.enable(api_key)
    assert verifier.authenticate(bearer(api_key))
    assert verifier.authenticate(bearer(issuer.token_for(api_key)))


def test_a_token_and_whatever_it_hangs_on_can_be_revoked(
    issuer: FakeIssuer, verifier: Verifier
) -> None:
    """Its own name, its organization, project and group, its API key, and everything."""
    for id_ in ("org_1", "prj_1", "grp_1", issuer.key_id, "*", None):
        token = issuer.token(org_id="org_1", project_id="prj_1", group="grp_1")
        another = issuer.token()
        verifier.verify_jwt(token)
        issuer.revoke(token if id_ is None else id_)

        assert code_of(verifier, token) == "token_revoked"
        if id_ not in (issuer.key_id, "*"):
            assert verifier.verify_jwt(another)
        assert verifier.verify_jwt(issuer.token(org_id="org_1"))


def test_a_key_of_somebody_else_is_a_mistake_in_the_test(issuer: FakeIssuer) -> None:
    """The message does not repeat it: it may be a real one."""
    api_key = apikey.make("ck_live")
    for do in (issuer.revoke, issuer.disable, issuer.expire, issuer.enable, issuer.token_for):
        with pytest.raises(ValueError, match="no API key of this issuer") as told:
            do(api_key)
        assert api_key not in str(told.value)
    with pytest.raises(ValueError, match="api_key_revoked"):
        issuer.refuse(issuer.api_key(), "anything")
    assert api_key not in repr(vars(issuer))


def test_a_token_without_a_name_cannot_be_revoked(issuer: FakeIssuer) -> None:
    """By itself: its API key, or its organization, can."""
    with pytest.raises(ValueError, match="jti"):
        issuer.revoke(issuer.token(jti=None))


def test_more_than_a_feed_can_hold_ends_everything(issuer: FakeIssuer, verifier: Verifier) -> None:
    """As with the service: no feed is longer than followers read."""
    token = issuer.token()
    verifier.verify_jwt(token)
    issuer._entries = {f"{number:016}": 1 for number in range(5000)}
    issuer.revoke("org_another")

    assert code_of(verifier, token) == "token_revoked"
    assert verifier.verify_jwt(issuer.token())


def test_a_closed_verifier_stays_closed(issuer: FakeIssuer) -> None:
    """Whatever happens to its issuer afterwards."""
    verifier = Verifier(ISSUER, AUDIENCE, service_key="any", feed=None, foreign_prefixes=["old-"])
    verifier.authenticate(bearer(issuer.api_key()))
    verifier.close()
    issuer.reset()

    assert code_of(verifier, issuer.api_key()) == "issuer_unavailable"


def test_all_verifiers_of_the_process_hear_of_it(issuer: FakeIssuer) -> None:
    """Threads, event loops, several audiences: none is left behind."""
    verifiers = [Verifier(ISSUER, AUDIENCE) for _ in range(8)]
    token = issuer.token()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda one: one.verify_jwt(token), verifiers))

    async def all_of_them() -> list[Principal]:
        waits = (one.verify_jwt_async(token) for one in verifiers)
        return list(await asyncio.gather(*waits))

    assert len(asyncio.run(all_of_them())) == 8
    began = time.monotonic()
    issuer.revoke(token)
    assert time.monotonic() - began < 2
    assert {code_of(one, token) for one in verifiers} == {"token_revoked"}
    for verifier in verifiers:
        verifier.close()


def test_a_verifier_that_cannot_follow_is_told_to_the_author_of_the_test(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that differs from the issuer's: the feed is not of its time."""
    monkeypatch.setattr(Verifier, "catch_up", lambda self, seq: False)
    with (
        Verifier(ISSUER, AUDIENCE) as verifier,
        pytest.raises(RuntimeError, match="does not follow"),
    ):
        issuer.revoke(issuer.token())
    assert verifier


# Signing keys


def test_after_a_rotation_both_signing_keys_count(issuer: FakeIssuer, verifier: Verifier) -> None:
    """As in production: the old one stays published for its tokens."""
    before = issuer.token()
    verifier.verify_jwt(before)
    issuer.rotate_signing_key()
    after = issuer.token()

    assert jwt.get_unverified_header(before)["kid"] != jwt.get_unverified_header(after)["kid"]
    assert verifier.verify_jwt(after)
    assert verifier.verify_jwt(before)


def test_a_withdrawn_signing_key_ends_its_tokens(issuer: FakeIssuer, verifier: Verifier) -> None:
    """At once, wherever they are remembered."""
    before = issuer.token()
    verifier.verify_jwt(before)
    issuer.rotate_signing_key(withdraw=True)

    assert code_of(verifier, before) == "unknown_signing_key"
    assert verifier.verify_jwt(issuer.token())


# The service in trouble


def test_while_it_is_away_what_is_known_goes_on(issuer: FakeIssuer, verifier: Verifier) -> None:
    """docs/outages.md, in milliseconds."""
    api_key = issuer.api_key()
    verifier.authenticate(bearer(api_key))
    with issuer.away():
        assert verifier.authenticate(bearer(api_key))
        assert verifier.authenticate(bearer(issuer.token()))
        assert code_of(verifier, issuer.api_key()) == "issuer_unavailable"
        issuer.revoke(api_key)
        assert verifier.authenticate(bearer(api_key)), "nobody has told"

    assert code_of(verifier, api_key) == "api_key_revoked"


@pytest.mark.parametrize("for_long", [False, True])
def test_an_outage_begins_for_a_verifier_that_knew_the_service(
    issuer: FakeIssuer, verifier: Verifier, for_long: bool
) -> None:
    """Also if a test begins with it: no request waits for what could have been known."""
    began = time.monotonic()
    with issuer.away(for_long=for_long):
        if for_long:
            assert code_of(verifier, issuer.token()) == "issuer_unavailable"
        else:
            assert verifier.authenticate(bearer(issuer.token()))
    with Verifier(ISSUER, AUDIENCE, clock=SetClock(0), feed=None) as other:
        issuer.down()
        assert code_of(other, issuer.token()) == "token_from_future"
    assert time.monotonic() - began < 4


def test_a_verifier_can_be_told_to_ask_ahead(issuer: FakeIssuer) -> None:
    """Then no request waits for the first answer, and the start tells whether there was one."""
    with Verifier(ISSUER, AUDIENCE) as verifier:
        verifier.warm()
        status: Any = verifier.status()
        assert (status["key_set"]["state"], status["feed"]["state"]) == ("fresh", "fresh")
    issuer.down()
    with (
        Verifier(ISSUER, AUDIENCE, feed=None) as verifier,
        pytest.raises(errors.IssuerUnavailable),
    ):
        verifier.warm()


def test_after_a_day_nothing_is_known_any_more(issuer: FakeIssuer, verifier: Verifier) -> None:
    """And it is back at once when the service is."""
    token = issuer.token()
    verifier.verify_jwt(token)
    with issuer.away(for_long=True):
        assert code_of(verifier, token) == "issuer_unavailable"

    assert verifier.verify_jwt(token)


def test_a_verifier_that_meets_nobody_at_its_start_is_back_at_once(issuer: FakeIssuer) -> None:
    """No cool-down of the first failure outlasts `up`."""
    issuer.down()
    with Verifier(ISSUER, AUDIENCE, feed=None) as verifier:
        assert code_of(verifier, issuer.token()) == "issuer_unavailable"
        issuer.up()
        assert verifier.verify_jwt(issuer.token())


def test_a_stale_feed_is_stale_at_once_and_fresh_at_once(issuer: FakeIssuer) -> None:
    """Under both policies."""
    with (
        Verifier(ISSUER, AUDIENCE, on_stale_feed="refuse") as strict,
        Verifier(ISSUER, AUDIENCE) as mild,
    ):
        token = issuer.token()
        assert strict.verify_jwt(token)
        assert mild.verify_jwt(token)
        issuer.stale_feed()
        assert code_of(strict, token) == "stale_feed"
        assert mild.verify_jwt(token)
        status: Any = mild.status()
        assert status["feed"]["state"] == "stale"
        assert status["feed"]["age_s"] > FEED_STALE
        issuer.up()
        assert strict.verify_jwt(token)


def test_reset_makes_it_as_new(issuer: FakeIssuer, verifier: Verifier) -> None:
    """What outlives a test, such as a credential of the session, is good in the next one."""
    api_key = issuer.api_key([NEEDED])
    token = issuer.token()
    verifier.authenticate(bearer(api_key))
    issuer.revoke(api_key)
    issuer.revoke(token)
    issuer.rotate_signing_key(withdraw=True)
    issuer.throttle()
    issuer.stale_feed()
    issuer.down(for_long=True)

    issuer.reset()

    assert verifier.authenticate(bearer(api_key), NEEDED)
    assert verifier.authenticate(bearer(token))
    status: Any = verifier.status()
    assert (status["feed"]["state"], status["feed"]["entries"]) == ("fresh", 0)


def test_while_nothing_happens_nobody_asks_again() -> None:
    """A long poll that blocks: a suite is not slowed down by threads that turn."""

    class Counting(FakeIssuer):
        asked = 0

        def get(self, url: str) -> bytes:
            self.asked += 1
            return super().get(url)

    with Counting(ISSUER, audience=AUDIENCE) as issuer, Verifier(ISSUER, AUDIENCE) as verifier:
        verifier.verify_jwt(issuer.token())
        issuer.revoke("org_another")
        time.sleep(0.05)
        asked = issuer.asked
        time.sleep(0.2)

        assert issuer.asked == asked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_an_issuer_of_its_own(issuer: FakeIssuer, verifier: Verifier) -> None:
    """Test runners fork; a thread of the parent may hold a lock at that moment."""
    program = """
import os, threading, time
from coatcheck.testing import FakeIssuer
from coatcheck.verifier import Verifier
with FakeIssuer() as issuer, Verifier(issuer.issuer, issuer.audience) as verifier:
    verifier.verify_jwt(issuer.token())
    issuer._changed.acquire()
    child = os.fork()
    if child == 0:
        verifier.verify_jwt(issuer.token())
        token = issuer.token()
        issuer.revoke(token)
        try:
            verifier.verify_jwt(token)
        except Exception as error:
            os._exit(0 if error.code == "token_revoked" else 2)
        os._exit(3)
    issuer._changed.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def claims_of_token(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def test_errors_have_texts_that_fit_an_answer() -> None:
    """Its refusals use the sentences of the verifier."""
    assert all(code in errors.ERRORS for code in REFUSED_AS)
