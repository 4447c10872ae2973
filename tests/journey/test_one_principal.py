"""One caller, two credentials: a raw API key means at a resource server what its token means.

A service of its own, our verifier in front of it, and whatever an API key can be.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import apikey
from coatcheck.scope import MalformedScope, Scopes
from coatcheck.server import catalog as catalogs
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys, organizations
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from coatcheck.verifier import Principal, Verifier, VerifierError
from support.live import Live, a_service

AUDIENCE = "https://api.example.com"
TESTER = Actor("cli:tester")
GUESSES_PER_MINUTE = 3
#: What the moment of issue decides, and nothing else.
OF_THE_MOMENT = ("iat", "exp", "jti", "as_of")
#: Seconds for which a test waits for the revocation feed.
FEED_TIMEOUT = 5


@dataclass(frozen=True, slots=True)
class World:
    """A service, the database that it runs on, and a resource server of each environment."""

    live: Live
    store: Store
    catalog: Catalog
    organization_id: str
    verifiers: dict[str, Verifier]

    def api_key(
        self,
        *scopes: str,
        environment: str = "live",
        organization_id: str | None = None,
        expires_in_s: int | None = None,
    ) -> Created:
        now = int(time.time())
        new = NewApiKey(
            organization_id=organization_id or self.organization_id,
            name="caller",
            scopes=scopes,
            environment=environment,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
        return api_keys.create(
            self.store, self.catalog, new, TESTER, now=now, issuer=self.live.issuer
        )

    def token(self, key: str) -> str:
        data = {"grant_type": "client_credentials", "client_secret": key}
        answer = httpx2.post(f"{self.live.issuer}/oauth/token", data=data, timeout=10)
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access_token"]
        return token

    def verifier(self, environment: str, service_key: str, **more: Any) -> Verifier:
        return Verifier(
            self.live.issuer, AUDIENCE, environment=environment, service_key=service_key, **more
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("one-principal")
    with a_service(folder, audience=AUDIENCE, guesses_per_minute=str(GUESSES_PER_MINUTE)) as live:
        database_url = live.environment["COATCHECK_DATABASE_URL"]
        chosen = Settings(
            issuer=live.issuer,
            audience=AUDIENCE,
            database_url=database_url,
            keys_dir=folder / "keys",
        )
        store = open_store(database_url)
        made = World(
            live, store, catalogs.without_file(chosen), live.initialized["organization"], {}
        )
        for environment in ("live", "test"):
            service = made.api_key("coatcheck:resource-server", environment=environment)
            made.verifiers[environment] = made.verifier(environment, service.key)
        yield made
        for verifier in made.verifiers.values():
            verifier.close()
        store.close()


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def lasting(principal: Principal) -> Principal:
    """A principal without the way it came and the moment its token was issued."""
    claims = {name: value for name, value in principal.claims.items() if name not in OF_THE_MOMENT}
    return replace(principal, method="jwt", token_id="", expires_at=0, claims=claims)


ACTIONS = ("read", "write", "widgets:read", "widgets.delete", "keys:read", "a/b", "~!$&'()")
IDS = ("1", "42", "a%2Fb", "%C3%A9", "-._~")
TYPES = ("PLACE", "THING", "Site")
SEGMENTS = st.sampled_from((*IDS, "#", "*"))
FILTERS = st.builds(
    lambda kind, rest: "@" + "/".join((kind, *rest)),
    st.sampled_from(TYPES),
    st.lists(SEGMENTS, max_size=3),
)
GRANTS = st.builds(
    lambda action, at: action + at,
    st.sampled_from((*ACTIONS, "*")),
    st.just("") | st.just("@*") | FILTERS,
)
KEYS = st.fixed_dictionaries(
    {
        "scopes": st.lists(GRANTS, max_size=4, unique=True).map(tuple),
        "environment": st.sampled_from(["live", "test"]),
        "expires_in_s": st.none() | st.integers(120, 100_000),
    }
)
RESOURCES = st.none() | st.builds(
    lambda kind, rest: "/".join((kind, *rest)),
    st.sampled_from(TYPES),
    st.lists(st.sampled_from((*IDS, "#", "", "%2f")), max_size=3),
)
REQUESTS = st.lists(
    st.tuples(st.sampled_from((*ACTIONS, "coatcheck:operator", "*")), RESOURCES), max_size=12
)
NEEDS = st.lists(
    st.lists(GRANTS | st.just("coatcheck:resource-server"), max_size=2), min_size=1, max_size=3
)


def verdict(verifier: Verifier, credential: str, needed: list[str], is_async: bool) -> object:
    """What a request is answered: the caller, or the whole refusal."""
    headers = bearer(credential)
    try:
        if is_async:
            who = asyncio.run(verifier.authenticate_async(headers, needed))
        else:
            who = verifier.authenticate(headers, needed)
    except VerifierError as error:
        return error.status, error.code, error.headers, error.body
    return lasting(who)


def code_of(verifier: Verifier, credential: str) -> str | None:
    try:
        verifier.authenticate(bearer(credential))
    except VerifierError as error:
        return error.code
    return None


def is_scope(tokens: list[str]) -> bool:
    try:
        Scopes.of(tokens)
    except MalformedScope:
        return False
    return True


@settings(max_examples=40, deadline=None)
@given(key=KEYS, requests=REQUESTS, needs=NEEDS, is_async=st.booleans())
def test_a_raw_key_and_its_token_are_one_caller(
    world: World,
    key: dict[str, Any],
    requests: list[tuple[str, str | None]],
    needs: list[list[str]],
    is_async: bool,
) -> None:
    """
    Callers who never move lose nothing, and gain nothing: one path, one meaning.

    Whatever the key may do and wherever it belongs, and at a resource server of either
    environment; who it is, what it may do, and why not.
    """
    made = world.api_key(*key.pop("scopes"), **key)
    token = world.token(made.key)
    verifier = world.verifiers[key["environment"]]

    by_key = verifier.authenticate(bearer(made.key))
    by_token = verifier.authenticate(bearer(token))

    assert (by_key.method, by_token.method) == ("api_key", "jwt")
    assert lasting(by_key) == lasting(by_token)
    assert by_key.key_id == made.api_key.id
    assert by_key.environment == key["environment"]
    assert [by_key.allows(*asked) for asked in requests] == [
        by_token.allows(*asked) for asked in requests
    ]
    for needed in filter(is_scope, needs):
        told = verdict(verifier, made.key, needed, is_async)
        assert told == verdict(verifier, token, needed, is_async)
    other = world.verifiers["test" if key["environment"] == "live" else "live"]
    refused = [code_of(other, credential) for credential in (made.key, token)]
    assert refused == ["wrong_environment"] * 2


# What ends a caller ends it for both credentials


def soon(verifier: Verifier, credential: str, code: str) -> None:
    """Wait until a credential is refused by this code; the feed needs a moment."""
    deadline = time.monotonic() + FEED_TIMEOUT
    while (told := code_of(verifier, credential)) != code:
        assert told is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("end", [api_keys.revoke, api_keys.disable])
def test_a_key_that_ends_is_refused_in_both_forms(world: World, end: Any) -> None:
    """Within the feed's delay, though the resource server has kept what it exchanged."""
    made = world.api_key("widgets:read")
    token, verifier = world.token(made.key), world.verifiers["live"]
    assert code_of(verifier, made.key) is None
    assert code_of(verifier, token) is None

    end(world.store, made.api_key.id, TESTER, now=int(time.time()))

    soon(verifier, token, "token_revoked")
    assert code_of(verifier, made.key) == f"api_key_{end.__name__}d"


def test_a_key_that_was_enabled_again_works_at_once_where_its_tokens_are_dead(
    world: World,
) -> None:
    """A remembered exchange that the feed kills is exchanged again, once."""
    made = world.api_key("widgets:read")
    token, verifier = world.token(made.key), world.verifiers["live"]
    before = verifier.authenticate(bearer(made.key))
    now = int(time.time())
    api_keys.disable(world.store, made.api_key.id, TESTER, now=now)
    api_keys.enable(world.store, made.api_key.id, TESTER, now=now)

    soon(verifier, token, "token_revoked")

    after = verifier.authenticate(bearer(made.key))
    assert after.token_id != before.token_id
    assert lasting(after) == lasting(before)


def test_a_suspended_organization_is_refused_in_both_forms(world: World) -> None:
    """All its keys, all its tokens, and nobody else's."""
    customer = organizations.create(world.store, "Customer", TESTER, now=int(time.time()))
    made = world.api_key("widgets:read", organization_id=customer.id)
    neighbor = world.api_key("widgets:read")
    token, verifier = world.token(made.key), world.verifiers["live"]
    assert verifier.authenticate(bearer(made.key)).org_id == customer.id

    organizations.suspend(world.store, customer.id, TESTER, now=int(time.time()))

    soon(verifier, token, "token_revoked")
    assert code_of(verifier, made.key) == "org_suspended"
    assert code_of(verifier, neighbor.key) is None


# A service key that is refused, and guessing


def test_a_raw_key_in_a_url_is_refused(world: World) -> None:
    """RFC 9700 §4.3.2; the same key goes on working in a header."""
    made, verifier = world.api_key("widgets:read"), world.verifiers["live"]

    with pytest.raises(VerifierError) as refused:
        verifier.authenticate({}, query=f"api_key={made.key}")

    assert (refused.value.status, refused.value.code) == (401, "connector_only_in_query")
    assert made.key not in f"{refused.value.headers}{refused.value.body!r}"
    assert code_of(verifier, made.key) is None


def test_guesses_are_throttled_by_the_callers_address(world: World) -> None:
    """Each caller has its own account at the issuer; a right key always passes."""
    made = world.api_key("widgets:read")
    service = world.api_key("coatcheck:resource-server")

    def guess(address: str, key: str | None = None) -> str | None:
        headers = bearer(key or apikey.make("ck_live"))
        try:
            verifier.authenticate(headers, client_address=address)
        except VerifierError as error:
            return error.code
        return None

    with world.verifier("live", service.key) as verifier:
        guesses = [guess("203.0.113.7") for _ in range(GUESSES_PER_MINUTE + 1)]

        assert guesses == ["api_key_unknown"] * GUESSES_PER_MINUTE + ["rate_limited"]
        assert guess("203.0.113.8") == "api_key_unknown"
        assert guess("203.0.113.7", made.key) is None


def test_a_refused_service_key_is_our_own_trouble_however_often(world: World) -> None:
    """
    503 for every caller, good or bad: it says nothing about them.

    Also when the issuer has begun to throttle the resource server itself for its wrong key.
    """
    good, guessed = world.api_key("widgets:read").key, apikey.make("ck_live")

    with world.verifier("live", apikey.make("ck_live")) as verifier:
        codes = [
            code_of(verifier, key) for _ in range(GUESSES_PER_MINUTE + 1) for key in (good, guessed)
        ]

    assert codes == ["issuer_unavailable"] * len(codes)
