"""GET /oauth/revocations, and the document that leads there.

RFC 7519 §4.1, RFC 8725 §3.11 and §3.12 (one kind of JWT is never taken for another), RFC 8414 §3.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from joserfc import jwt as joserfc_jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from starlette.testclient import TestClient

from coatcheck.durations import FEED_STALE, FEED_WINDOW, TOKEN_LIFETIME
from coatcheck.feed_profile import subject
from coatcheck.server import sealing, signing
from coatcheck.server.signing import Purpose
from coatcheck.verifier import Verifier, VerifierError
from coatcheck.verifier.changes import Signed, UnfitFeed, read, read_source
from support.deployment import (
    AUDIENCE,
    DAY,
    ISSUER,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.live import Live
from support.wire import claims_of, database, token_for

REVOCATIONS = "/oauth/revocations"
COATCHECK = "/.well-known/coatcheck"
KEY_SET = "/.well-known/jwks.json"
#: Claims that only a token has, or that only a feed has.
OF_TOKENS = {"sub", "scope", "client_id", "jti", "org_id", "env", "as_of"}
FOREVER_S = 10  # Longer than any test takes: what waits for it has failed.


def get(http: TestClient, **query: object) -> httpx2.Response:
    return http.get(REVOCATIONS, params={name: str(value) for name, value in query.items()})


def feed_of(http: TestClient) -> str:
    answer = get(http)
    assert answer.status_code == 200, answer.text
    return answer.text


def followed(http: TestClient, deployment: Deployment, text: str | None = None) -> Signed:
    """The feed as a follower reads it: signature, issuer, address and times checked."""
    document = http.get(COATCHECK)
    assert document.status_code == 200, document.text
    source = read_source(document.content, deployment.settings.issuer)
    text = feed_of(http) if text is None else text
    return read(text.encode(), source, deployment.settings.issuer, deployment.clock.now)


def kid_of(text: str) -> str:
    kid: str = jwt.get_unverified_header(text)["kid"]
    return kid


def kids(jwks: dict[str, Any]) -> set[str]:
    return {jwk["kid"] for jwk in jwks["keys"]}


def rotate(deployment: Deployment, purpose: Purpose = "token") -> str:
    sealing_key = sealing.load(deployment.settings.keys_dir).newest()
    return signing.rotate(
        deployment.store,
        sealing_key,
        "ES256",
        TESTER,
        now=deployment.now,
        at_once=True,
        purpose=purpose,
    )


def withdraw(deployment: Deployment, kid: str, *, force: bool = False) -> None:
    signing.withdraw(deployment.store, kid, TESTER, now=deployment.now, force=force)


# --- the answer


def test_the_feed_is_a_jwt_that_nobody_keeps(http: TestClient) -> None:
    """RFC 7519 §10.3.1.  A copy in some cache would hide what was revoked since."""
    answer = get(http)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/jwt"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.content.count(b".") == 2
    assert answer.content.isascii()


def test_the_feed_says_whose_and_for_whom_it_is(http: TestClient, deployment: Deployment) -> None:
    """No `sub`, `scope` or `client_id`: whatever mistakes it for a token finds nobody in it."""
    text = feed_of(http)
    header, claims = jwt.get_unverified_header(text), claims_of(text)

    assert header == {"alg": "ES256", "kid": header["kid"], "typ": "revocations+jwt"}
    assert set(claims) == {"iss", "aud", "iat", "exp", "log", "seq", "entries", "kids"}
    assert OF_TOKENS.isdisjoint(claims)
    assert (claims["iss"], claims["aud"]) == (ISSUER, f"{ISSUER}{REVOCATIONS}")
    assert (claims["iat"], claims["exp"]) == (NOON, NOON + FEED_STALE)
    assert claims["seq"] == deployment.store.head()


def test_a_follower_can_read_it(http: TestClient, deployment: Deployment) -> None:
    """Issuer and verifier agree, down to the last claim."""
    said = followed(http, deployment)

    assert (said.seq, said.entries) == (deployment.store.head(), {})
    assert said.issued_at == NOON


def test_its_signing_key_is_published_for_feeds_and_not_for_tokens(http: TestClient) -> None:
    """A verifier that looks in the key set can never be shown a feed as a token."""
    kid = kid_of(feed_of(http))

    assert kid in kids(http.get(COATCHECK).json()["revocation_keys"])
    assert kid not in kids(http.get(KEY_SET).json())
    assert kids(http.get(COATCHECK).json()["revocation_keys"]).isdisjoint(
        kids(http.get(KEY_SET).json())
    )
    # Both kinds count as listed, or a verifier would drop them.
    both = kids(http.get(KEY_SET).json()) | kids(http.get(COATCHECK).json()["revocation_keys"])
    assert set(claims_of(feed_of(http))["kids"]) == both


def test_the_document_says_where_the_feed_is_and_who_signs_it(http: TestClient) -> None:
    """What our verifier needs beside the metadata; nothing of it is secret."""
    answer = http.get(COATCHECK)
    document = answer.json()

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    # A withdrawn feed key has to be missed soon.
    assert answer.headers["cache-control"] == "no-cache"
    assert document["issuer"] == ISSUER
    assert document["revocations_endpoint"] == f"{ISSUER}{REVOCATIONS}"
    assert document["durations"] == {
        "token_lifetime": TOKEN_LIFETIME,
        "feed_window": FEED_WINDOW,
        "feed_stale": FEED_STALE,
    }
    for jwk in document["revocation_keys"]["keys"]:
        assert set(jwk) == {"kty", "crv", "x", "y", "kid", "alg", "use"}


# --- what a request may say

WRONG = [
    "after=x",
    "after=1.5",
    "after=1e3",
    "after=%2B1",
    "after=%201",
    "after=1_0",
    "after=--1",
    "after=-",
    "after=0x10",
    "after=%D9%A1",
    "after=%00",
    "after=99999999999999999999",
    "wait=x",
    "wait=1.5",
    "wait=inf",
    "after=1&wait=%F0%9F%99%82",
]


@pytest.mark.parametrize("query", WRONG)
def test_a_parameter_that_is_no_number_is_told(http: TestClient, query: str) -> None:
    """Guessing would make a follower miss something; the text is never repeated."""
    answer = http.get(f"{REVOCATIONS}?{query}")

    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert answer.headers["cache-control"] == "no-store"
    assert "whole number" in answer.json()["error_description"]


@pytest.mark.parametrize(
    "query",
    ["", "after=-1", "after=0&wait=0", "wait=-5", "after=&wait=", "other=x", "after=-1&wait=1"],
)
def test_anything_else_is_answered_at_once(http: TestClient, query: str) -> None:
    """Without `after` or `wait` it is an ordinary document; unknown parameters do not matter."""
    began = time.monotonic()
    answer = http.get(f"{REVOCATIONS}?{query}")

    assert answer.status_code == 200
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_told_which_one_to_use(http: TestClient, method: str) -> None:
    """RFC 9110 §15.5.6."""
    answer = http.request(method, REVOCATIONS)

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["error"] == "invalid_request"


def test_no_other_spelling_of_the_path_leads_there(http: TestClient) -> None:
    """No redirect: a follower's setting is wrong, and should be found out."""
    for path in (f"{REVOCATIONS}/", "/oauth/Revocations", "/oauth//revocations"):
        assert http.get(path).status_code == 404


def test_a_poll_waits_and_is_answered_in_the_end(http: TestClient, deployment: Deployment) -> None:
    """Also one that names a number from the future."""
    head = deployment.store.head()
    began = time.monotonic()
    answers = [get(http, after=after, wait=1) for after in (head, head + 1000)]

    assert time.monotonic() - began >= 2
    assert {claims_of(answer.text)["seq"] for answer in answers} == {head}


def test_who_is_behind_waits_for_nothing(http: TestClient, deployment: Deployment) -> None:
    """It has not heard of something yet."""
    before = deployment.store.head()
    deployment.revoke(deployment.api_key())
    began = time.monotonic()

    assert len(claims_of(get(http, after=before, wait=25).text)["entries"]) == 1
    assert time.monotonic() - began < 1


# --- what is told


def test_a_revoked_token_is_dead_here_at_once_and_elsewhere_soon(live: Live) -> None:
    """
    V42: introspection knows as soon as it was answered; a follower within a second or so.

    Who follows no feed accepts the token until it expires: that is the choice they made.
    """
    key = live.api_key("widgets:read")["key"]
    with (
        httpx2.Client(base_url=live.issuer) as http,
        Verifier(live.issuer, AUDIENCE) as follower,
        Verifier(live.issuer, AUDIENCE, feed=None) as offline,
    ):
        token = http.post("/oauth/token", data=form(key)).json()["access_token"]
        about_it = {"client_secret": key, "token": token}
        assert http.post("/oauth/introspect", data=about_it).json()["active"] is True
        assert follower.verify_jwt(token).token_id == offline.verify_jwt(token).token_id

        assert http.post("/oauth/revoke", data=about_it).status_code == 200

        assert http.post("/oauth/introspect", data=about_it).json() == {"active": False}
        assert eventually_refused(follower, token) == "token_revoked"
        assert offline.verify_jwt(token).token_id == claims_of(token)["jti"]


def eventually_refused(verifier: Verifier, token: str) -> str:
    """The code with which a follower refuses a token in the end."""
    deadline = time.monotonic() + FOREVER_S
    while time.monotonic() < deadline:
        try:
            verifier.verify_jwt(token)
        except VerifierError as refused:
            return refused.code
        time.sleep(0.02)
    return "accepted"


Narrow = Callable[[TestClient, Deployment], str]


def disabled(http: TestClient, deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.disable(made)
    return made.api_key.id


def revoked(http: TestClient, deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.revoke(made)
    return made.api_key.id


def rotated_at_once(http: TestClient, deployment: Deployment) -> str:
    made = deployment.api_key()
    deployment.rotate(made, overlap_s=0)
    return made.api_key.id


def token_revoked(http: TestClient, deployment: Deployment) -> str:
    made = deployment.api_key()
    token = token_for(http, made.key)
    answer = http.post("/oauth/revoke", data={"client_secret": made.key, "token": token})
    assert answer.status_code == 200
    return str(claims_of(token)["jti"])


def signing_key_withdrawn(http: TestClient, deployment: Deployment) -> str:
    kid = kid_of(token_for(http, deployment.api_key().key))
    rotate(deployment)
    withdraw(deployment, kid)
    return kid


NARROWED: dict[str, Narrow] = {
    "API key disabled": disabled,
    "API key revoked": revoked,
    "API key rotated without overlap": rotated_at_once,
    "token revoked": token_revoked,
    "signing key withdrawn": signing_key_withdrawn,
}


@pytest.mark.parametrize("narrow", NARROWED.values(), ids=NARROWED)
def test_what_was_narrowed_is_in_the_next_answer(
    http: TestClient, deployment: Deployment, narrow: Narrow
) -> None:
    """And is above the position that tokens from before carry."""
    before = int(claims_of(token_for(http, deployment.api_key().key))["as_of"])
    narrowed = narrow(http, deployment)
    said = followed(http, deployment)

    assert set(said.entries) == {subject(narrowed)}
    assert before < said.entries[subject(narrowed)] <= said.seq
    # A token from now on is above it.
    after = int(claims_of(token_for(http, deployment.api_key().key))["as_of"])
    assert after >= said.entries[subject(narrowed)]


def test_a_withdrawn_signing_key_is_no_longer_listed(
    http: TestClient, deployment: Deployment
) -> None:
    """Verifiers that have the key set in a cache drop it by this."""
    kid = signing_key_withdrawn(http, deployment)
    said = followed(http, deployment)

    assert kid not in said.kids
    assert kid_of(token_for(http, deployment.api_key().key)) in said.kids


def test_a_withdrawn_feed_key_is_in_neither_place(http: TestClient, deployment: Deployment) -> None:
    """What it signed before is refused by whoever has heard of it."""
    old_feed = feed_of(http)
    old, new = kid_of(old_feed), rotate(deployment, "feed")
    withdraw(deployment, old)

    assert kids(http.get(COATCHECK).json()["revocation_keys"]) == {new}
    assert old not in followed(http, deployment).kids
    assert kid_of(feed_of(http)) == new
    with pytest.raises(UnfitFeed):
        followed(http, deployment, old_feed)


def test_daily_work_is_not_told(http: TestClient, deployment: Deployment) -> None:
    """Creating, enabling and an ordinary rotation kill nothing."""
    made = deployment.api_key()
    token_for(http, made.key)
    deployment.rotate(made, overlap_s=DAY)
    rotate(deployment)

    assert followed(http, deployment).entries == {}


# --- neither is taken for the other

Check = Callable[[str, Any, str], object]
CHECKS: dict[str, Check] = {
    "PyJWT": lambda text, jwks, audience: jwt.decode(
        text,
        jwt.PyJWKSet.from_dict(jwks)[kid_of(text)],
        algorithms=["ES256", "RS256"],
        issuer=ISSUER,
        audience=audience,
        # The deployment's clock stands still, PyJWT's does not.
        options={"verify_exp": False, "verify_iat": False},
    ),
    "joserfc": lambda text, jwks, audience: joserfc_jwt.JWTClaimsRegistry(
        now=NOON,
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": audience},
    ).validate(
        joserfc_jwt.decode(text, KeySet.import_key_set(jwks), algorithms=["ES256", "RS256"]).claims
    ),
}
REFUSALS = (jwt.PyJWTError, JoseError, KeyError, ValueError)
#: What resource servers are called: the issuer itself is the default without a catalog.
AUDIENCES = [AUDIENCE, ISSUER, f"{ISSUER}/v1"]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("audience", AUDIENCES)
def test_a_library_never_takes_the_feed_for_a_token(
    http: TestClient,
    deployment: Deployment,
    check: Check,
    audience: str,
) -> None:
    """Neither with the key set, nor if the feed's own keys were put into it by mistake."""
    feed, jwks = feed_of(http), http.get(KEY_SET).json()
    with pytest.raises(REFUSALS):
        check(feed, jwks, audience)

    mixed = {"keys": [*jwks["keys"], *http.get(COATCHECK).json()["revocation_keys"]["keys"]]}
    # The check itself works: a token passes it.
    check(token_for(http, deployment.api_key().key), mixed, AUDIENCE)
    with pytest.raises(REFUSALS):
        check(feed, mixed, audience)


@pytest.mark.parametrize("audience", [*AUDIENCES, f"{ISSUER}{REVOCATIONS}"])
def test_our_verifier_never_takes_the_feed_for_a_token(
    http: TestClient, deployment: Deployment, audience: str
) -> None:
    """Even one that is called by the feed's own address and accepts plain JWTs."""

    def fetch(url: str) -> bytes:
        jwks = http.get(KEY_SET).json()["keys"]
        mixed = [*jwks, *http.get(COATCHECK).json()["revocation_keys"]["keys"]]
        return json.dumps({"keys": mixed}).encode()

    with (
        Verifier(
            ISSUER,
            audience,
            token_types=("at+jwt", "JWT"),
            feed=None,
            clock=deployment.clock,
            fetch=fetch,
        ) as verifier,
        pytest.raises(VerifierError) as refused,
    ):
        verifier.verify_jwt(feed_of(http))
    assert refused.value.code == "wrong_type"


def test_a_token_is_never_taken_for_the_feed(http: TestClient, deployment: Deployment) -> None:
    """Anybody with an API key can have tokens made, and must not revoke or keep alive with them."""
    with pytest.raises(UnfitFeed) as refused:
        followed(http, deployment, token_for(http, deployment.api_key().key))

    assert refused.value.kind == "wrong_type"


def test_the_feed_is_no_token_to_the_issuer_either(
    http: TestClient, deployment: Deployment
) -> None:
    """It introspects as nothing, revokes nothing, and authenticates nobody."""
    made, feed = deployment.api_key(), feed_of(http)
    head = deployment.store.head()
    question = {"client_secret": made.key, "token": feed}

    assert http.post("/oauth/introspect", data=question).json() == {"active": False}
    assert http.post("/oauth/revoke", data=question).status_code == 200
    assert deployment.store.head() == head
    bearer = {"Authorization": f"Bearer {feed}"}
    answer = http.post("/oauth/token", data={"grant_type": "client_credentials"}, headers=bearer)
    assert answer.status_code == 401


# --- when nothing can be vouched for


def eventually(ask: Callable[[], httpx2.Response], status: int) -> httpx2.Response:
    """The first answer with this status; the store looks for its file once a second."""
    until = time.monotonic() + FOREVER_S
    while (answer := ask()).status_code != status:
        assert time.monotonic() < until, answer.text
        time.sleep(0.05)
    return answer


def refused_503(answer: httpx2.Response) -> None:
    body = answer.json()
    assert (answer.status_code, body["error"]) == (503, "temporarily_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["cache-control"] == "no-store"


def test_without_the_database_there_is_no_feed(http: TestClient, deployment: Deployment) -> None:
    """
    503, and never the last signature: somebody else's node may have heard of a revocation.

    Where the feed is and who signs it is still told, from memory.
    """
    feed_of(http)
    path = database(deployment)
    away = path.with_suffix(".away")
    path.rename(away)
    refused_503(eventually(lambda: get(http), 503))
    refused_503(get(http, after=10**6, wait=25))
    assert http.get(COATCHECK).status_code == 200
    assert http.get("/healthz").status_code == 200

    away.rename(path)
    assert eventually(lambda: get(http), 200)


def test_without_a_feed_key_there_is_no_feed(http: TestClient, deployment: Deployment) -> None:
    """A withdrawn signing key signs nothing, and no token's key stands in for it."""
    withdraw(deployment, kid_of(feed_of(http)), force=True)
    refused_503(get(http))
    assert token_for(http, deployment.api_key().key)

    new = rotate(deployment, "feed")
    assert kid_of(feed_of(http)) == new


# --- an issuer with a path


def test_an_issuer_with_a_path_has_everything_below_it(tmp_path: Path) -> None:
    """RFC 8414 §3: only the well-known form is inserted; the feed names its full address."""
    issuer = f"{ISSUER}/auth/eu"
    with a_deployment(tmp_path, issuer=issuer) as deployment, a_client(deployment) as http:
        documents = [http.get(path) for path in (f"{COATCHECK}/auth/eu", f"/auth/eu{COATCHECK}")]
        assert {one.status_code for one in documents} == {200}
        assert documents[0].content == documents[1].content
        document = documents[0].json()
        assert document["issuer"] == issuer
        assert document["revocations_endpoint"] == f"{issuer}{REVOCATIONS}"

        answer = http.get(f"/auth/eu{REVOCATIONS}")
        source = read_source(documents[0].content, issuer)
        assert read(answer.content, source, issuer, NOON).seq == deployment.store.head()
        assert claims_of(answer.text)["aud"] == f"{issuer}{REVOCATIONS}"
        assert http.get(REVOCATIONS).status_code == 404
        assert http.get(COATCHECK).status_code == 404
