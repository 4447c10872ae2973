"""Clients and verifiers that we did not write, unmodified, against running services.

What each of them is told to do is in `support.clients`; here is what comes of it.

Three services: one on plain http at the root, two behind TLS and below a path, each with an
algorithm of its own.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx2
import jwt
import pytest
from httpx_auth import OAuth2
from jose.exceptions import JWKError
from joserfc import jwt as joserfc_jwt
from joserfc.errors import SecurityWarning, UnsupportedAlgorithmError
from joserfc.jwk import KeySet

from coatcheck import apikey
from coatcheck.server import catalog as catalogs
from coatcheck.server import sealing
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.settings import Settings
from coatcheck.server.signing import RingKeeper
from coatcheck.server.store import Store, open_store
from coatcheck.token_profile import Algorithm
from support.clients.jwt_libraries import (
    JWT_LIBRARIES,
    Expected,
    JwtLibrary,
    coatcheck,
    fetched,
    python_jose_with_the_whole_key_set,
)
from support.clients.oauth_libraries import OAUTH_LIBRARIES, Account, OAuthLibrary
from support.clients.protected_api import ProtectedApis, protected_apis
from support.live import Live
from support.tls import Certificates, a_service_behind_tls, certificates

#: joserfc warns of the name EdDSA, which RFC 9864 retires and most libraries know alone.
pytestmark = pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")

TESTER = Actor("cli:tester")
#: An issuer's own path: MSAL wants one.
PATH = "/acme"
#: When keys of these tests began and ended.  Long ago, so that no test meets midnight.
MADE_AT = datetime(2026, 1, 12, 8, tzinfo=UTC)
REVOKED_AT = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
EXPIRED_AT = datetime(2026, 4, 7, 16, 45, tzinfo=UTC)
HOUR = 3600
#: How long somebody who guesses too often should wait.
_SECONDS = re.compile(r"\d+ s\.")


@dataclass(frozen=True, slots=True)
class Place:
    """A running service, the database that it runs on, and the API that its tokens are for."""

    live: Live
    settings: Settings
    store: Store
    catalog: Catalog

    @property
    def issuer(self) -> str:
        return self.settings.issuer

    @property
    def api(self) -> str:
        return self.settings.default_audience

    def api_key(self, *, made_at: float | None = None, expires_at: float | None = None) -> Created:
        """An API key for both audiences."""
        now = int(time.time() if made_at is None else made_at)
        new = NewApiKey(
            organization_id=self.live.initialized["organization"],
            name="caller",
            scopes=("widgets:read", "widgets:write"),
            audiences=(self.api, self.settings.management_audience),
            expires_at=None if expires_at is None else int(expires_at),
        )
        return api_keys.create(self.store, self.catalog, new, TESTER, now=now, issuer=self.issuer)

    def account(self, of: Created | None = None, **more: str) -> Account:
        """What somebody configures who has this API key, or a new one."""
        made = self.api_key() if of is None else of
        return Account(self.issuer, made.api_key.id, made.key, self.api, **more)

    def expected(self) -> Expected:
        """What somebody configures who is this API."""
        return Expected(self.issuer, self.api, f"{self.issuer}/.well-known/jwks.json")

    def answer(self, account: Account, *, in_form: bool) -> httpx2.Response:
        """What the service itself says to a token request."""
        form = {"grant_type": "client_credentials"}
        form |= {"scope": account.scope} if account.scope else {}
        form |= {"resource": account.resource} if account.resource else {}
        basic = None if in_form else (account.key_id, account.key)
        form |= {"client_id": account.key_id, "client_secret": account.key} if in_form else {}
        return httpx2.post(account.token_url, data=form, auth=basic, timeout=10)

    def signed(self, claims: dict[str, Any]) -> str:
        """A token of these claims, by the signing key that signs here now."""
        ring = RingKeeper(self.store, sealing.load(self.settings.keys_dir)).at(self.store.head())
        signer = ring.signer(self.settings.algorithm, int(time.time()))
        return signer.sign("at+jwt", json.dumps(claims).encode()).decode()


def placed(live: Live) -> Iterator[Place]:
    settings = Settings.load(live.environment)
    store = open_store(settings.database_url)
    try:
        yield Place(live, settings, store, catalogs.without_file(settings))
    finally:
        store.close()


@pytest.fixture(scope="session")
def apis() -> Iterator[ProtectedApis]:
    with protected_apis() as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def es256(live: Live) -> Iterator[Place]:
    """Plain http, no path: the service that other tests of this worker use, too."""
    yield from placed(live)


@pytest.fixture(scope="session")
def rs256(
    tmp_path_factory: pytest.TempPathFactory, authority: Certificates, apis: ProtectedApis
) -> Iterator[Place]:
    """Behind TLS, for clients that find everything out by themselves."""
    folder = tmp_path_factory.mktemp("rs256")
    with a_service_behind_tls(
        folder, authority, PATH, audience=apis.url("/rs256"), algorithm="RS256"
    ) as live:
        apis.protect("/rs256", live.issuer)
        # An API that the issuer was never told of.
        apis.protect("/unknown", live.issuer)
        yield from placed(live)


@pytest.fixture(scope="session")
def eddsa(
    tmp_path_factory: pytest.TempPathFactory, authority: Certificates, apis: ProtectedApis
) -> Iterator[Place]:
    """Behind TLS, and it loses patience at the second guess."""
    folder = tmp_path_factory.mktemp("eddsa")
    with a_service_behind_tls(
        folder,
        authority,
        PATH,
        audience=apis.url("/eddsa"),
        algorithm="EdDSA",
        guesses_per_minute="1",
    ) as live:
        apis.protect("/eddsa", live.issuer)
        yield from placed(live)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, authority: Certificates) -> None:
    """What operators set for a company's own authority, and oauthlib's switch for plain http.

    httpx-auth remembers tokens for the whole process, also those of other tests.
    """
    for name, value in authority.trusted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
    OAuth2.token_cache.clear()


@pytest.fixture
def place(request: pytest.FixtureRequest, library: OAuthLibrary) -> Place:
    """Where a library is tried: behind TLS if it looks for the issuer's metadata."""
    found: Place = request.getfixturevalue("rs256" if library.discovers else "es256")
    return found


def refusal(library: OAuthLibrary, place: Place, account: Account) -> str:
    """What somebody with this account reads in the library's exception."""
    with pytest.raises(library.error) as caught:
        library.get_token(account)
    answer = place.answer(account, in_form=library.sends_form)
    return told_in_full(library, caught.value, answer)


def told_in_full(library: OAuthLibrary, error: Any, answer: httpx2.Response) -> str:
    """The text of a library's exception, which holds what the service answered, to the letter."""
    body = answer.json()
    told = str(error)
    # A second may end between the two answers.
    assert _SECONDS.sub("", told) == _SECONDS.sub("", library.shows(answer.status_code, body))
    if library.tells_apart:
        assert error.error == body["error"]
        assert _SECONDS.sub("", error.description) == _SECONDS.sub("", body["error_description"])
    return told


def claims_of(place: Place, token: str) -> dict[str, Any]:
    return coatcheck(token, place.expected())


every_library = pytest.mark.parametrize("library", OAUTH_LIBRARIES.values(), ids=OAUTH_LIBRARIES)
SAYING, SENDING = (
    {name: library for name, library in OAUTH_LIBRARIES.items() if library.resource in ways}
    for ways in (("said",), ("said", "found"))
)


@every_library
def test_an_oauth_library_works_unchanged(library: OAuthLibrary, place: Place) -> None:
    """Callers move to tokens by configuration alone: URL, id, key.  Nothing said is everything."""
    account = place.account()

    claims = claims_of(place, library.get_token(account))

    assert claims["sub"] == account.key_id
    assert claims["scope"] == "widgets:read widgets:write"


@every_library
def test_the_scope_that_is_asked_is_granted_as_asked(library: OAuthLibrary, place: Place) -> None:
    """Neither more nor less: requests-oauthlib raises when the answer names other scopes."""
    token = library.get_token(place.account(scope="widgets:read"))

    assert claims_of(place, token)["scope"] == "widgets:read"


@pytest.mark.parametrize("library", SAYING.values(), ids=SAYING)
def test_the_resource_that_is_asked_is_the_audience(library: OAuthLibrary, place: Place) -> None:
    """RFC 8707 by each library's way to say more than it knows of.

    MSAL knows scopes only.  The MCP SDK always sends the resource that the API's metadata names,
    which is the audience in the tests above and the reason of the error below.
    """
    wanted = place.settings.management_audience
    token = library.get_token(place.account(resource=wanted))

    assert jwt.decode(token, options={"verify_signature": False})["aud"] == wanted


@pytest.mark.parametrize("library", SENDING.values(), ids=SENDING)
def test_a_resource_that_nobody_knows_is_answered_with_those_that_are(
    library: OAuthLibrary, place: Place, apis: ProtectedApis
) -> None:
    """A wrong URL in a setting is seen at once, and the right one stands beside it."""
    account = place.account(resource=apis.url("/unknown"))

    told = refusal(library, place, account)

    assert "invalid_target" in told
    assert place.api in told


@every_library
def test_a_missing_scope_is_an_error_of_that_library(library: OAuthLibrary, place: Place) -> None:
    """Never silently narrower: the caller learns it at the exchange, by name."""
    told = refusal(library, place, place.account(scope="widgets:read widgets:delete"))

    assert "invalid_scope" in told
    assert "does not have: widgets:delete." in told


@every_library
def test_a_wrong_secret_is_an_error_of_that_library(library: OAuthLibrary, place: Place) -> None:
    """Each library turns our answer into its own exception, and none crashes on it.

    The same for a key that was never made and for one that belongs to another id.
    """
    account = place.account()

    for wrong in (apikey.make("ck_live"), place.api_key().key):
        told = refusal(library, place, replace(account, key=wrong))

        assert "invalid_client" in told
        assert "Send the whole key as client_secret" in told


@every_library
def test_the_exception_of_a_revoked_key_says_when_and_what_next(
    library: OAuthLibrary, place: Place
) -> None:
    """What a developer reads in the log of a job that stopped working."""
    made = place.api_key(made_at=MADE_AT.timestamp())
    api_keys.revoke(place.store, made.api_key.id, TESTER, now=int(REVOKED_AT.timestamp()))

    told = refusal(library, place, place.account(made))

    assert "invalid_client" in told
    assert f"was revoked on {REVOKED_AT:%Y-%m-%d at %H:%M} UTC" in told
    assert "Ask its owner for a new one." in told


@every_library
def test_the_exception_of_an_expired_key_says_when_and_what_next(
    library: OAuthLibrary, place: Place
) -> None:
    """The same, of a key whose last day nobody noted."""
    made = place.api_key(made_at=MADE_AT.timestamp(), expires_at=EXPIRED_AT.timestamp())

    told = refusal(library, place, place.account(made))

    assert "invalid_client" in told
    assert f"expired on {EXPIRED_AT:%Y-%m-%d at %H:%M} UTC" in told
    assert "Ask its owner for a new one." in told


@every_library
def test_guessing_too_often_is_an_error_of_that_library(
    library: OAuthLibrary, eddsa: Place
) -> None:
    """429 has the same form as the other refusals, so that each library can show its sentence.

    Here every library goes through TLS, also those that above speak plain http on loopback.
    """
    account = eddsa.account()
    wrong = replace(account, key=apikey.make("ck_live"))

    # One guess a minute is free, and the minute may end between any two.
    for _ in range(3):
        with pytest.raises(library.error) as caught:
            library.get_token(wrong)
        answer = eddsa.answer(wrong, in_form=library.sends_form)
        if answer.status_code == 429 and "temporarily_unavailable" in str(caught.value):
            break

    told = told_in_full(library, caught.value, answer)
    assert answer.status_code == 429
    assert "temporarily_unavailable" in told
    assert "Too many wrong API keys from this address." in told
    assert "check which key is configured, and try again in " in told
    # Whoever shares the address with the guesser goes on working.
    assert claims_of(eddsa, library.get_token(account))["sub"] == account.key_id


ALGORITHMS: tuple[Algorithm, ...] = ("ES256", "RS256", "EdDSA")
#: Each algorithm with each library that has it, and with each that does not.
PAIRS, ODD_PAIRS = (
    {
        f"{algorithm}, {name}": (algorithm, library)
        for algorithm in ALGORITHMS
        for name, library in JWT_LIBRARIES.items()
        if is_odd == (algorithm in library.cannot)
    }
    for is_odd in (False, True)
)

every_pair = pytest.mark.parametrize(("algorithm", "library"), PAIRS.values(), ids=PAIRS)


@pytest.fixture
def signs(request: pytest.FixtureRequest, algorithm: Algorithm) -> Place:
    """The service that signs with an algorithm."""
    found: Place = request.getfixturevalue(algorithm.lower())
    return found


@pytest.fixture
def token(signs: Place) -> str:
    answer = signs.answer(signs.account(scope="widgets:read"), in_form=True)
    return str(answer.json()["access_token"])


def claims_in(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


@every_pair
def test_a_verifier_accepts_the_token(
    signs: Place, algorithm: Algorithm, token: str, library: JwtLibrary
) -> None:
    """Issuer, audience and key set are all that a JWT library needs."""
    claims = library.verify(token, signs.expected())

    assert jwt.get_unverified_header(token)["alg"] == algorithm
    assert claims == claims_in(token)


@every_pair
def test_a_verifier_refuses_a_wrong_audience(signs: Place, token: str, library: JwtLibrary) -> None:
    """A token for one API is worth nothing at another (RFC 9068 §4)."""
    with pytest.raises(library.refusals["wrong audience"]):
        library.verify(token, replace(signs.expected(), audience="https://other.example.com"))


@every_pair
def test_a_verifier_refuses_a_wrong_issuer(signs: Place, token: str, library: JwtLibrary) -> None:
    """Whoever is trusted for one name is not trusted for all (RFC 9068 §4)."""
    with pytest.raises(library.refusals["wrong issuer"]):
        library.verify(token, replace(signs.expected(), issuer="https://other.example.com"))


@every_pair
def test_a_verifier_refuses_a_tampered_token(signs: Place, token: str, library: JwtLibrary) -> None:
    """More scopes, same signature."""
    header, _, signature = token.split(".")
    claims = json.dumps(claims_in(token) | {"scope": "admin"}).encode()
    forged = jwt.utils.base64url_encode(claims).decode()

    with pytest.raises(library.refusals["tampered"]):
        library.verify(f"{header}.{forged}.{signature}", signs.expected())


@every_pair
def test_a_verifier_refuses_an_expired_token(signs: Place, token: str, library: JwtLibrary) -> None:
    """Ten minutes, whoever checks; signed as it was when it was good."""
    claims = claims_in(token)
    old = claims | {"iat": claims["iat"] - HOUR, "exp": claims["exp"] - HOUR}

    with pytest.raises(library.refusals["expired"]):
        library.verify(signs.signed(old), signs.expected())


@pytest.mark.parametrize(("algorithm", "library"), ODD_PAIRS.values(), ids=ODD_PAIRS)
def test_a_verifier_refuses_an_algorithm_that_it_does_not_have(
    signs: Place, algorithm: Algorithm, token: str, library: JwtLibrary
) -> None:
    """Whose resource servers use these libraries leaves COATCHECK_ALGORITHM as it is."""
    with pytest.raises(library.cannot[algorithm]):
        library.verify(token, signs.expected())


@pytest.mark.parametrize("algorithm", ["EdDSA"])
def test_joserfc_wants_eddsa_to_be_named(signs: Place, token: str) -> None:
    """Left to itself it accepts what it recommends, and the name EdDSA is no longer among that."""
    keys = KeySet.import_key_set(fetched(signs.expected().jwks_url))

    with pytest.raises(UnsupportedAlgorithmError):
        joserfc_jwt.decode(token, keys)
    with pytest.warns(SecurityWarning, match="RFC 9864"):
        joserfc_jwt.decode(token, keys, algorithms=["EdDSA"])


@pytest.mark.parametrize("algorithm", ["ES256"])
def test_python_jose_takes_a_key_set_whose_first_key_fits(signs: Place, token: str) -> None:
    """It tries one after the other and never looks at `kid`."""
    claims = python_jose_with_the_whole_key_set(token, signs.expected())

    assert claims == claims_in(token)


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
def test_python_jose_stumbles_over_a_key_of_another_type(signs: Place, token: str) -> None:
    """And it does not come to the one that would fit: its users look up the `kid`."""
    with pytest.raises(JWKError):
        python_jose_with_the_whole_key_set(token, signs.expected())
