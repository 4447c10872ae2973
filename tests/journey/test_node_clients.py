"""OAuth clients and JWT verifiers of the node world, unmodified, against a running service.

Each driver in `tests/node` is what that library's own documentation tells its users to write, and
says where they read our sentence when an exchange is refused.  A driver does all its jobs in one
process, so the tests of a library share its answers.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from coatcheck import apikey
from coatcheck.server import catalog as catalogs
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created, NewApiKey
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from support import node
from support.deployment import DAY, TESTER
from support.live import Live, a_service
from support.node import Answer, Job

AUDIENCE = "https://api.example.com"
OWNED = ("widgets:read", "widgets:write")
#: Seconds.  Long enough to ask for a token, short enough to wait for its end.
SHORT_LIFE = 4

#: Client → its driver, and how it sends the API key.
CLIENTS = {
    "openid-client, form": ("openid-client", "form"),
    "openid-client, basic": ("openid-client", "basic"),
    "oauth4webapi, form": ("oauth4webapi", "form"),
    "oauth4webapi, basic": ("oauth4webapi", "basic"),
    "simple-oauth2, form": ("simple-oauth2", "form"),
    "simple-oauth2, basic": ("simple-oauth2", "basic"),
    "badgateway, form": ("badgateway", "form"),
    "badgateway, basic": ("badgateway", "basic"),
    "badgateway, basic after discovery": ("badgateway", "discovered"),
    "MCP SDK 1": ("mcp-v1", "basic"),
    "MCP SDK 2": ("mcp-v2", "basic"),
}
#: Drivers whose users see the code and the sentence, but neither status nor headers.
WITHOUT_STATUS = {"mcp-v1", "mcp-v2"}

#: Verifier → what signs the tokens that it can check.
VERIFIERS = {
    "jose": ("ES256", "RS256", "EdDSA"),
    "jsonwebtoken": ("ES256", "RS256"),
}
ALGORITHMS = VERIFIERS["jose"]
VERIFIED = [(name, algorithm) for name, known in VERIFIERS.items() for algorithm in known]
#: What is wrong with a token, or with what its verifier was told → how each verifier says so.
FLAWS = {
    "wrong audience": {
        "jose": ("ERR_JWT_CLAIM_VALIDATION_FAILED", 'unexpected "aud" claim value'),
        "jsonwebtoken": ("JsonWebTokenError", "jwt audience invalid"),
    },
    "wrong issuer": {
        "jose": ("ERR_JWT_CLAIM_VALIDATION_FAILED", 'unexpected "iss" claim value'),
        "jsonwebtoken": ("JsonWebTokenError", "jwt issuer invalid"),
    },
    "tampered": {
        "jose": ("ERR_JWS_SIGNATURE_VERIFICATION_FAILED", "signature verification failed"),
        "jsonwebtoken": ("JsonWebTokenError", "invalid signature"),
    },
    "expired": {
        "jose": ("ERR_JWT_EXPIRED", '"exp" claim timestamp check failed'),
        "jsonwebtoken": ("TokenExpiredError", "jwt expired"),
    },
    "wrong algorithms": {
        "jose": (
            "ERR_JOSE_ALG_NOT_ALLOWED",
            '"alg" (Algorithm) Header Parameter value not allowed',
        ),
        "jsonwebtoken": ("JsonWebTokenError", "invalid algorithm"),
    },
}

#: The answers of one driver, by mode and case, or by algorithm and flaw.
Answers = Callable[[str], dict[tuple[str, str], Answer]]


class Desk:
    """A running service, its API keys made in its own database: a command each takes a second.

    Attributes:
        issuer: of the service.
        key: the id and the text of an API key that has OWNED, for AUDIENCE and the management API.
        token: a token of that API key.
        short_lived: a token whose API key ends after SHORT_LIFE, and so does the token.
    """

    def __init__(self, live: Live, store: Store) -> None:
        self.issuer = live.issuer
        self._settings = Settings.load(live.environment)
        self._store = store
        self._organization_id = live.initialized["organization"]
        self.key = self.api_key()
        self.token = self.token_of(self.key)
        self.short_lived = self.token_of(self.api_key(expires_at=int(time.time()) + SHORT_LIFE))

    def api_key(self, *, made_at: int | None = None, expires_at: int | None = None) -> Created:
        new = NewApiKey(
            organization_id=self._organization_id,
            name="node",
            scopes=OWNED,
            audiences=(AUDIENCE, self._settings.management_audience),
            expires_at=expires_at,
        )
        return api_keys.create(
            self._store,
            catalogs.without_file(self._settings),
            new,
            TESTER,
            now=made_at or int(time.time()),
            issuer=self.issuer,
        )

    def revoke(self, created: Created, at: int) -> None:
        api_keys.revoke(self._store, created.api_key.id, TESTER, now=at)

    def token_of(self, created: Created) -> str:
        form = {"grant_type": "client_credentials", "client_secret": created.key}
        reply = httpx2.post(f"{self.issuer}/oauth/token", data=form, timeout=10)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["access_token"])

    def claims(self, token: str, audience: str = AUDIENCE) -> dict[str, Any]:
        """The claims of a token that this service signed for this audience."""
        key_set = jwt.PyJWKClient(f"{self.issuer}/.well-known/jwks.json")
        claims: dict[str, Any] = jwt.decode(
            token,
            key_set.get_signing_key_from_jwt(token),
            algorithms=ALGORITHMS,
            issuer=self.issuer,
            audience=audience,
        )
        return claims


@contextmanager
def a_desk(live: Live) -> Iterator[Desk]:
    store = open_store(live.environment["COATCHECK_DATABASE_URL"])
    try:
        yield Desk(live, store)
    finally:
        store.close()


@pytest.fixture(scope="session")
def with_node() -> None:
    """Asked for before any service: who has no node does not wait for services, either."""
    node.require_node()


@pytest.fixture(scope="session")
def desk(with_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Signs with EdDSA; lets everybody guess, because each client presents wrong API keys here."""
    folder = tmp_path_factory.mktemp("eddsa")
    settings = {"audience": AUDIENCE, "algorithm": "EdDSA", "guesses_per_minute": "0"}
    with a_service(folder, **settings) as live, a_desk(live) as made:
        yield made


@pytest.fixture(scope="session")
def strict_desk(with_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Signs with RS256; throttles whoever guesses twice a minute."""
    folder = tmp_path_factory.mktemp("rs256")
    settings = {"audience": AUDIENCE, "algorithm": "RS256", "guesses_per_minute": "1"}
    with a_service(folder, **settings) as live, a_desk(live) as made:
        yield made


@pytest.fixture(scope="session")
def default_desk(with_node: None, live: Live) -> Iterator[Desk]:
    """Signs with ES256."""
    with a_desk(live) as made:
        yield made


# --- clients


@pytest.fixture(scope="session")
def now() -> int:
    return int(time.time())


@pytest.fixture(scope="session")
def dead(desk: Desk, now: int) -> dict[str, Created]:
    """API keys of which it is known when they ended."""
    revoked = desk.api_key(made_at=now - 9 * DAY)
    desk.revoke(revoked, at=now - 3 * DAY)
    expired = desk.api_key(made_at=now - 9 * DAY, expires_at=now - 2 * DAY)
    return {"revoked": revoked, "expired": expired}


@pytest.fixture(scope="session")
def exchanged(desk: Desk, strict_desk: Desk, dead: dict[str, Created]) -> Answers:
    """What each client library made of each case."""

    def job(of: Desk, created: Created, **asked: str) -> Job:
        of_api_key = {"issuer": of.issuer, "id": created.api_key.id, "key": created.key}
        return {"audience": AUDIENCE, **of_api_key, **asked}

    # Of the right form, and known to nobody.
    wrong = {"key": apikey.make("ck_live")}
    guess = job(strict_desk, strict_desk.key, **wrong)
    cases = {
        "no parameters": job(desk, desk.key),
        "scope": job(desk, desk.key, scope="widgets:read"),
        "resource": job(desk, desk.key, resource=f"{desk.issuer}/v1"),
        "missing scope": job(desk, desk.key, scope="widgets:read widgets:delete"),
        "wrong secret": job(desk, desk.key, **wrong),
        "revoked": job(desk, dead["revoked"]),
        "expired": job(desk, dead["expired"]),
        # Three: a minute may end between two of them.
        "first guess": guess,
        "second guess": guess,
        "throttled": guess,
        "right while throttled": job(strict_desk, strict_desk.key),
    }

    @cache
    def of_driver(driver: str) -> dict[tuple[str, str], Answer]:
        modes = [mode for name, mode in CLIENTS.values() if name == driver]
        jobs = {
            (mode, case): {**parameters, "mode": mode}
            for mode in modes
            for case, parameters in cases.items()
        }
        return dict(zip(jobs, node.run(f"clients/{driver}", list(jobs.values())), strict=True))

    return of_driver


def token_in(answer: Answer) -> str:
    assert "token" in answer, answer
    return str(answer["token"])


def error_in(answer: Answer) -> dict[str, Any]:
    assert "error" in answer, "a token came back"
    error: dict[str, Any] = answer["error"]
    return error


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_client_library_works_unchanged(
    desk: Desk, exchanged: Answers, driver: str, mode: str
) -> None:
    """Callers move to tokens by configuration alone: URL, id, key.  They get all the key has."""
    answer = exchanged(driver)[mode, "no parameters"]

    claims = desk.claims(token_in(answer))
    assert claims["sub"] == desk.key.api_key.id
    assert sorted(claims["scope"].split()) == sorted(answer["scope"].split()) == sorted(OWNED)


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_client_library_gets_the_scope_it_asked_for(
    desk: Desk, exchanged: Answers, driver: str, mode: str
) -> None:
    """And no other: the answer says what the token holds."""
    answer = exchanged(driver)[mode, "scope"]

    assert desk.claims(token_in(answer))["scope"] == answer["scope"] == "widgets:read"


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_client_library_gets_a_token_for_the_resource_it_named(
    desk: Desk, exchanged: Answers, driver: str, mode: str
) -> None:
    """RFC 8707; MCP clients name the one that the MCP server's own metadata names."""
    answer = exchanged(driver)[mode, "resource"]

    management = f"{desk.issuer}/v1"
    assert desk.claims(token_in(answer), management)["aud"] == management


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_wrong_secret_is_an_error_of_that_library(
    exchanged: Answers, driver: str, mode: str
) -> None:
    """Its user reads what to check, rather than a status alone."""
    error = error_in(exchanged(driver)[mode, "wrong secret"])

    assert error["code"] == "invalid_client"
    assert "Send the whole key as client_secret" in error["text"]
    if driver not in WITHOUT_STATUS:
        assert error["status"] == (400 if mode == "form" else 401)


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_missing_scope_is_an_error_of_that_library(
    exchanged: Answers, driver: str, mode: str
) -> None:
    """Never silently narrower: the caller learns it at the exchange, by name."""
    error = error_in(exchanged(driver)[mode, "missing scope"])

    assert error["code"] == "invalid_scope"
    assert "does not have: widgets:delete." in error["text"]


@pytest.mark.parametrize(("end", "days_ago"), [("revoked", 3), ("expired", 2)])
@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_the_exception_of_a_dead_api_key_says_when_and_what_next(
    exchanged: Answers, now: int, driver: str, mode: str, end: str, days_ago: int
) -> None:
    """What a developer reads in the log of a job that stopped working."""
    error = error_in(exchanged(driver)[mode, end])

    date = datetime.fromtimestamp(now - days_ago * DAY, UTC).date().isoformat()
    assert error["code"] == "invalid_client"
    assert f"{end} on {date}" in error["text"]
    assert "Ask its owner for a new one." in error["text"]


@pytest.mark.parametrize(("driver", "mode"), CLIENTS.values(), ids=CLIENTS)
def test_a_throttled_client_library_says_so_and_a_right_key_still_passes(
    strict_desk: Desk, exchanged: Answers, driver: str, mode: str
) -> None:
    """Too many guesses is another error than a wrong key, and locks nobody out."""
    error = error_in(exchanged(driver)[mode, "throttled"])

    assert error["code"] == "temporarily_unavailable"
    assert "Too many wrong API keys from this address." in error["text"]
    if driver not in WITHOUT_STATUS:
        assert error["status"] == 429
        assert int(error["retry_after"]) > 0
    token = token_in(exchanged(driver)[mode, "right while throttled"])
    assert strict_desk.claims(token)["sub"] == strict_desk.key.api_key.id


# --- verifiers


@pytest.fixture(scope="session")
def verified(default_desk: Desk, strict_desk: Desk, desk: Desk) -> Answers:
    """What each verifier made of each token."""
    desks = dict(zip(ALGORITHMS, (default_desk, strict_desk, desk), strict=True))
    jobs = {
        (algorithm, flaw): parameters
        for algorithm in ALGORITHMS
        for flaw, parameters in _verifications(desks[algorithm], algorithm).items()
    }

    @cache
    def of_driver(driver: str) -> dict[tuple[str, str], Answer]:
        answers = node.run(f"verifiers/{driver}", list(jobs.values()))
        return dict(zip(jobs, answers, strict=True))

    for each in desks.values():
        _wait_for_the_end_of(each.short_lived)
    return of_driver


def _verifications(of: Desk, algorithm: str) -> dict[str, Job]:
    good = {
        "jwks_uri": f"{of.issuer}/.well-known/jwks.json",
        "token": of.token,
        "issuer": of.issuer,
        "audience": AUDIENCE,
        "algorithms": [algorithm],
    }
    return {
        "none": good,
        "wrong audience": {**good, "audience": "https://other.example.com"},
        "wrong issuer": {**good, "issuer": "https://other.example.com"},
        "tampered": {**good, "token": _with_more_scopes(of.token)},
        "expired": {**good, "token": of.short_lived},
        "wrong algorithms": {
            **good,
            "algorithms": [other for other in ("ES256", "RS256") if other != algorithm],
        },
    }


def _with_more_scopes(token: str) -> str:
    """The same token with other claims: its signature no longer fits."""
    header, payload, signature = token.split(".")
    claims = json.loads(jwt.utils.base64url_decode(payload)) | {"scope": "admin"}
    forged = jwt.utils.base64url_encode(json.dumps(claims).encode()).decode()
    return f"{header}.{forged}.{signature}"


def _wait_for_the_end_of(token: str) -> None:
    claims = jwt.decode(token, options={"verify_signature": False})
    left_s = claims["exp"] - time.time()
    assert left_s <= SHORT_LIFE
    time.sleep(max(0.0, left_s) + 0.1)


@pytest.mark.parametrize(("verifier", "algorithm"), VERIFIED)
def test_a_verifier_accepts_the_token(verified: Answers, verifier: str, algorithm: str) -> None:
    """Issuer, audience and key set are all that a JWT library needs."""
    answer = verified(verifier)[algorithm, "none"]

    assert "claims" in answer, answer
    assert answer["claims"]["client_id"] == answer["claims"]["sub"]


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize(("verifier", "algorithm"), VERIFIED)
def test_a_verifier_refuses_a_token_for_its_very_flaw(
    verified: Answers, verifier: str, algorithm: str, flaw: str
) -> None:
    """Refusing everything would pass, too, if only the refusal counted."""
    error = error_in(verified(verifier)[algorithm, flaw])

    code, message = FLAWS[flaw][verifier]
    assert error["code"] == code
    assert error["message"].startswith(message)


def test_jsonwebtoken_refuses_eddsa_which_it_does_not_know(verified: Answers) -> None:
    """Whose resource servers check with it, chooses ES256 or RS256 for them."""
    error = error_in(verified("jsonwebtoken")["EdDSA", "none"])

    assert error["message"] == 'Unknown key type "ed25519".'


# --- the lock files


@pytest.mark.parametrize("lock", node.LOCKS, ids=lambda lock: lock.parent.name)
def test_a_lock_file_pins_every_package_by_hash_and_holds_no_url(lock: Path) -> None:
    """What runs is what was looked at, from whichever registry it comes."""
    text = lock.read_text(encoding="utf-8")
    locked = json.loads(text)["packages"]

    assert "://" not in text, "pin with npm run lock, in tests/node"
    assert locked.pop("")
    assert [name for name, of in locked.items() if not of["integrity"].startswith("sha512-")] == []
