"""Clients and verifiers that we did not write, unmodified, against a running service.

Each line of glue here is what that library's own documentation tells its users to write.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jwt
import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from httpx_auth import OAuth2ClientCredentials
from joserfc import jwt as joserfc_jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error
from requests_oauthlib import OAuth2Session

from coatcheck.verifier import Verifier, VerifierError
from support.live import Live, a_service

AUDIENCE = "https://api.example.com"

#: Issuer, key id, key, scope → the token's text.
Client = Callable[[str, str, str, str], str]


def authlib_basic(issuer: str, key_id: str, key: str, scope: str) -> str:
    session = AuthlibSession(key_id, key, scope=scope)
    return str(session.fetch_token(f"{issuer}/oauth/token")["access_token"])


def authlib_form(issuer: str, key_id: str, key: str, scope: str) -> str:
    session = AuthlibSession(
        key_id, key, scope=scope, token_endpoint_auth_method="client_secret_post"
    )
    return str(session.fetch_token(f"{issuer}/oauth/token")["access_token"])


def requests_oauthlib_basic(issuer: str, key_id: str, key: str, scope: str) -> str:
    session = OAuth2Session(client=BackendApplicationClient(client_id=key_id, scope=scope))
    token = session.fetch_token(f"{issuer}/oauth/token", client_id=key_id, client_secret=key)
    return str(token["access_token"])


def requests_oauthlib_form(issuer: str, key_id: str, key: str, scope: str) -> str:
    session = OAuth2Session(client=BackendApplicationClient(client_id=key_id, scope=scope))
    token = session.fetch_token(
        f"{issuer}/oauth/token", client_id=key_id, client_secret=key, include_client_id=True
    )
    return str(token["access_token"])


def httpx_auth_basic(issuer: str, key_id: str, key: str, scope: str) -> str:
    auth = OAuth2ClientCredentials(
        f"{issuer}/oauth/token", client_id=key_id, client_secret=key, scope=scope.split()
    )
    seen: list[str] = []

    def api(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(api)) as client:
        client.get("https://api.example.com/widgets", auth=auth)
    return seen[0].removeprefix("Bearer ")


CLIENTS: dict[str, Client] = {
    "authlib, basic": authlib_basic,
    "authlib, form": authlib_form,
    "requests-oauthlib, basic": requests_oauthlib_basic,
    "requests-oauthlib, form": requests_oauthlib_form,
    "httpx-auth, basic": httpx_auth_basic,
}


#: Issuer, token, audience → the claims, or an error of that library.
Check = Callable[[str, str, str], dict[str, Any]]


def pyjwt(issuer: str, token: str, audience: str) -> dict[str, Any]:
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")
    signing_key = keys.get_signing_key_from_jwt(token)
    claims: dict[str, Any] = jwt.decode(
        token, signing_key, algorithms=["ES256", "RS256"], issuer=issuer, audience=audience
    )
    return claims


def joserfc(issuer: str, token: str, audience: str) -> dict[str, Any]:
    keys = KeySet.import_key_set(requests.get(f"{issuer}/.well-known/jwks.json", timeout=5).json())
    decoded = joserfc_jwt.decode(token, keys, algorithms=["ES256", "RS256"])
    rules = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": issuer}, aud={"essential": True, "value": audience}
    )
    rules.validate(decoded.claims)
    return dict(decoded.claims)


def ours(issuer: str, token: str, audience: str) -> dict[str, Any]:
    with Verifier(issuer, audience) as verifier:
        return dict(verifier.verify_jwt(token).claims)


VERIFIERS: dict[str, Check] = {"PyJWT": pyjwt, "joserfc": joserfc, "coatcheck": ours}
REFUSALS = (jwt.PyJWTError, JoseError, VerifierError, ValueError)


@pytest.fixture(scope="session")
def key(live: Live) -> dict[str, Any]:
    return live.api_key("widgets:read", "widgets:write")


@pytest.fixture(scope="session")
def token(live: Live, key: dict[str, Any]) -> str:
    return authlib_basic(live.issuer, key["id"], key["key"], "widgets:read")


@pytest.fixture(scope="session")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A token that a service made whose clock is an hour late, and that service's issuer."""
    folder = tmp_path_factory.mktemp("late")
    with a_service(folder, audience=AUDIENCE, unsafe_clock_offset="-3600") as late:
        made = late.api_key("widgets:read")
        yield (
            late.issuer,
            authlib_basic(late.issuer, made["id"], made["key"], "widgets:read"),
        )


@pytest.fixture(autouse=True)
def plain_http_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """oauthlib's own switch: without it the library refuses http even on loopback."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")


@pytest.mark.parametrize("get_token", CLIENTS.values(), ids=CLIENTS)
def test_an_oauth_library_works_unchanged(
    live: Live, key: dict[str, Any], get_token: Client
) -> None:
    """Callers move to tokens by configuration alone: URL, id, key."""
    text = get_token(live.issuer, key["id"], key["key"], "widgets:read")

    claims = ours(live.issuer, text, AUDIENCE)
    assert (claims["sub"], claims["scope"]) == (key["id"], "widgets:read")


@pytest.mark.parametrize("get_token", CLIENTS.values(), ids=CLIENTS)
def test_a_wrong_secret_is_an_error_of_that_library(
    live: Live, key: dict[str, Any], get_token: Client
) -> None:
    """Each library turns our answer into its own exception, and none crashes on it."""
    wrong = live.api_key("widgets:read")["key"]

    with pytest.raises(Exception, match="invalid_client"):
        get_token(live.issuer, key["id"], wrong, "widgets:read")


@pytest.mark.parametrize("get_token", CLIENTS.values(), ids=CLIENTS)
def test_a_missing_scope_is_an_error_of_that_library(
    live: Live, key: dict[str, Any], get_token: Client
) -> None:
    """Never silently narrower: the caller learns it at the exchange, by name."""
    with pytest.raises(Exception, match=r"invalid_scope.*widgets:delete"):
        get_token(live.issuer, key["id"], key["key"], "widgets:read widgets:delete")


def test_the_exception_of_a_revoked_key_says_when_and_what_next(live: Live) -> None:
    """What a developer reads in the log of a job that stopped working."""
    made = live.api_key("widgets:read")
    assert live.command("keys", "revoke", made["id"], "--yes").returncode == 0

    with pytest.raises(OAuth2Error, match=r"was revoked on 20\d\d-\d\d-\d\d") as caught:
        requests_oauthlib_basic(live.issuer, made["id"], made["key"], "widgets:read")
    assert "Ask its owner for a new one" in str(caught.value)


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_verifier_accepts_the_token(live: Live, token: str, verify: Check) -> None:
    """Issuer, audience and key set are all that a JWT library needs."""
    claims = verify(live.issuer, token, AUDIENCE)

    assert claims["client_id"] == claims["sub"]


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_verifier_refuses_a_wrong_audience(live: Live, token: str, verify: Check) -> None:
    """A token for one API is worth nothing at another (RFC 9068 §4)."""
    with pytest.raises(REFUSALS):
        verify(live.issuer, token, "https://other.example.com")


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_verifier_refuses_a_tampered_token(live: Live, token: str, verify: Check) -> None:
    """More scopes, same signature."""
    header, payload, signature = token.split(".")
    claims = json.loads(jwt.utils.base64url_decode(payload)) | {"scope": "admin"}
    forged = jwt.utils.base64url_encode(json.dumps(claims).encode()).decode()

    with pytest.raises(REFUSALS):
        verify(live.issuer, f"{header}.{forged}.{signature}", AUDIENCE)


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_verifier_refuses_an_expired_token(expired: tuple[str, str], verify: Check) -> None:
    """Ten minutes, whoever checks."""
    issuer, text = expired

    with pytest.raises(REFUSALS):
        verify(issuer, text, AUDIENCE)
