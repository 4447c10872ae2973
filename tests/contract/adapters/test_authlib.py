"""What users of Authlib's ResourceProtector have: Authlib's own one as it is, and ours of it.

The contract tests run over `CoatcheckProtector`.  Here is what a plain ResourceProtector answers
by itself, and what both leave to Authlib.
"""

# Authlib and Django publish no types.
# mypy: disable-error-code="untyped-decorator"

import base64
from collections.abc import Iterator
from inspect import iscoroutinefunction
from typing import Any

import pytest
from authlib.integrations.flask_oauth2 import ResourceProtector, current_token
from authlib.oauth2 import OAuth2Error
from authlib.oauth2.rfc6749 import JsonRequest
from authlib.oauth2.rfc6750 import InsufficientScopeError
from flask import Flask, jsonify
from flask.typing import ResponseReturnValue
from werkzeug.test import TestResponse

from coatcheck import apikey
from coatcheck.authlib import CoatcheckBearerValidator, CoatcheckProtector, Principal
from coatcheck.verifier import MissingCredentials, Verifier, VerifierError
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, claims, key_set, signer

METADATA = f"{AUDIENCE}/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{METADATA}"'


class Protector(CoatcheckProtector, ResourceProtector):  # type: ignore[misc]
    """As on its page."""


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    roles = {"viewer": ("GET",)}
    with Verifier(
        ISSUER, AUDIENCE, feed=None, roles=roles, fetch=lambda _: key_set(), clock=SetClock()
    ) as verifier:
        yield verifier


@pytest.fixture(params=[ResourceProtector, Protector], ids=["Authlib's", "ours"])
def require_oauth(request: pytest.FixtureRequest, verifier: Verifier) -> Any:
    return registered(request.param, verifier)


@pytest.fixture
def plain(verifier: Verifier) -> Any:
    return registered(ResourceProtector, verifier)


@pytest.fixture
def ours(verifier: Verifier) -> Any:
    return registered(Protector, verifier)


def registered(protector: Any, verifier: Verifier) -> Any:
    require_oauth = protector()
    require_oauth.register_token_validator(CoatcheckBearerValidator(verifier))
    return require_oauth


def bearer(**changes: object) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {signer().token(claims(**changes))}")]


def ask(decorator: Any, headers: list[tuple[str, str]], path: str = "/") -> TestResponse:
    """One request to one view behind a decorator."""
    app = Flask("app")

    @app.get("/")
    @decorator
    def view() -> ResponseReturnValue:
        return {"key_id": current_token.key_id if current_token else None}

    return app.test_client().get(path, headers=headers)


GOOD = {
    "nothing needed": None,
    "one": "widgets:read",
    "both": "widgets:read widgets:write",
    "either": ["admin", "widgets:write"],
    "either pair": ["admin x", "widgets:read widgets:write"],
    "a filter": "widgets:read@PLACE/1",
}


@pytest.mark.parametrize("scopes", GOOD.values(), ids=GOOD)
def test_scopes_are_declared_as_authlib_has_it(require_oauth: Any, scopes: Any) -> None:
    """A text needs all its scopes, a list one of its texts; filters are understood."""
    answer = ask(require_oauth(scopes), bearer())

    assert answer.get_json() == {"key_id": claims()["sub"]}


LACKING = {
    "one": ("admin", "admin"),
    "one of two": ("widgets:read admin", "widgets:read admin"),
    "either": (["admin", "owner"], "admin"),
    "no scope at all": ("widgets read@", None),
}


@pytest.mark.parametrize(("scopes", "told"), LACKING.values(), ids=LACKING)
def test_a_missing_scope_is_told_as_everywhere(
    require_oauth: Any, scopes: Any, told: str | None
) -> None:
    """Of several that would do, the first."""
    refused = ask(require_oauth(scopes), bearer())

    assert (refused.status_code, refused.get_json()["code"]) == (403, "insufficient_scope")
    challenge = refused.headers["WWW-Authenticate"]
    assert challenge.startswith(f'{BARE}, error="insufficient_scope"')
    assert challenge.endswith(f', scope="{told}"') == (told is not None)


WITH_BEARER = {
    "expired": (bearer(exp=NOW - 300, iat=NOW - 900), "token_expired"),
    "another audience": (bearer(aud="https://other.example"), "wrong_audience"),
    "another role": (bearer(must=["role"], roles=["guest"]), "role_not_allowed"),
    "elsewhere": (bearer(must=["network"], cidrs=["198.51.100.0/24"]), "ip_not_allowed"),
    "two credentials": ([*bearer(), ("X-API-Key", "another")], "multiple_credentials"),
    "nonsense": ([("Authorization", "Bearer nonsense")], "token_malformed"),
}


@pytest.mark.parametrize(("headers", "code"), WITH_BEARER.values(), ids=WITH_BEARER)
def test_authlibs_own_protector_refuses_a_bearer_credential_as_we_do(
    plain: Any, verifier: Verifier, headers: list[tuple[str, str]], code: str
) -> None:
    """Status, headers and document; Flask sorts its members."""
    refused = ask(plain("widgets:read"), headers)
    with pytest.raises(VerifierError) as judged:
        verifier.authenticate(headers, "widgets:read", client_address="127.0.0.1", method="GET")

    assert judged.value.code == code
    assert refused.status_code == judged.value.status
    assert judged.value.headers.items() <= dict(refused.headers).items()
    assert refused.get_json() == judged.value.problem()


BASIC = base64.b64encode(f"{signer().token(claims())}:".encode()).decode()
WITHOUT_BEARER = {
    "nothing": ([], "missing_authorization"),
    "X-API-Key": ([("X-API-Key", signer().token(claims()))], "missing_authorization"),
    "Basic": ([("Authorization", f"Basic {BASIC}")], "unsupported_token_type"),
}


@pytest.mark.parametrize(("headers", "error"), WITHOUT_BEARER.values(), ids=WITHOUT_BEARER)
def test_without_bearer_authlibs_own_protector_asks_nobody(
    plain: Any, ours: Any, headers: list[tuple[str, str]], error: str
) -> None:
    """The reason for ours, which finds the credential, or answers as everywhere."""
    refused = ask(plain(), headers)
    assert (refused.status_code, refused.get_json()["error"]) == (401, error)
    challenge = refused.headers["WWW-Authenticate"]
    assert challenge.startswith(f'bearer realm="{AUDIENCE}", error="{error}"')

    answer = ask(ours(), headers)
    if headers:
        assert answer.get_json() == {"key_id": claims()["sub"]}
    else:
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, BARE)
        assert answer.data == MissingCredentials().body


def test_a_key_in_the_url_counts_only_where_it_is_taken_out_of_sight(plain: Any, ours: Any) -> None:
    """`allow_api_key_query` around the application; the contract tests have it."""
    path = f"/?api_key={apikey.make('ck_live')}"

    assert ask(plain(), [], path).get_json()["error"] == "missing_authorization"
    assert ask(ours(), [], path).get_json()["code"] == "missing_credentials"


def test_authlib_makes_a_coroutine_a_plain_function(require_oauth: Any) -> None:
    """Told on the page: Flask would not await such a view."""

    async def view() -> None:
        """Whatever."""

    assert not iscoroutinefunction(require_oauth()(view))


@pytest.mark.parametrize("headers", [[], bearer()], ids=["nobody", "somebody"])
def test_a_credential_can_be_optional(require_oauth: Any, headers: list[tuple[str, str]]) -> None:
    """Authlib's `optional=True`."""
    answer = ask(require_oauth(optional=True), headers)

    assert answer.get_json() == {"key_id": claims()["sub"] if headers else None}


def test_an_optional_credential_is_no_broken_one(require_oauth: Any) -> None:
    """Who tries to sign in and fails is told."""
    broken = bearer(aud="https://other.example")

    assert ask(require_oauth(optional=True), broken).status_code == 401


def test_with_a_statement(require_oauth: Any) -> None:
    """`acquire` gives the Principal, and so does `current_token`."""
    app = Flask("app")

    @app.get("/")
    def view() -> ResponseReturnValue:
        with require_oauth.acquire("widgets:read") as token:
            assert isinstance(token, Principal)
            return jsonify(token.org_id == current_token.org_id)

    client = app.test_client()
    assert client.get("/", headers=bearer()).get_json() is True
    assert client.get("/", headers=bearer(scope="other")).status_code == 403


def test_what_cannot_be_checked_is_not_passed_over(require_oauth: Any) -> None:
    """Authlib's JWT validator knows these; ours has scopes, and roles by HTTP method."""
    with pytest.raises(TypeError, match="groups"):
        ask_raising(require_oauth(groups="admins"), bearer())


def ask_raising(decorator: Any, headers: list[tuple[str, str]]) -> None:
    with Flask("app").test_request_context(headers=headers):
        decorator(dict)()


def test_errors_of_a_validator_that_was_extended_stay_authlibs(verifier: Verifier) -> None:
    """Authlib's users override `validate_token` for rules of their own."""

    class Strict(CoatcheckBearerValidator):
        def validate_token(self, token: Principal, scopes: Any, request: object) -> None:
            super().validate_token(token, scopes, request)
            raise InsufficientScopeError(description="not on Sundays")

    require_oauth = Protector()
    require_oauth.register_token_validator(Strict(verifier))
    refused = ask(require_oauth(), bearer())

    assert (refused.status_code, refused.get_json()["error_description"]) == (403, "not on Sundays")


def test_nobody_is_named_without_a_request(verifier: Verifier) -> None:
    """The text of a token alone shows neither its method nor its address."""
    validator = CoatcheckBearerValidator(verifier)
    with pytest.raises(OAuth2Error):
        validator.authenticate_token(signer().token(claims()))
    request = JsonRequest("GET", f"{AUDIENCE}/", dict(bearer()))
    validator.validate_request(request)
    assert validator.authenticate_token("").key_id == claims()["sub"]
    with pytest.raises(OAuth2Error):
        validator.authenticate_token("")


def test_an_unknown_kind_of_request_has_no_address(verifier: Verifier) -> None:
    """Then a network that the credential is bound to refuses."""
    bound = bearer(must=["network"], cidrs=["127.0.0.0/8"])
    validator = CoatcheckBearerValidator(verifier)
    with pytest.raises(OAuth2Error) as refused:
        validator.validate_request(JsonRequest("GET", f"{AUDIENCE}/", dict(bound)))

    assert refused.value.reason.code == "ip_not_allowed"


def test_settings_can_be_passed_by_name() -> None:
    """As to every adapter."""
    validator = CoatcheckBearerValidator(issuer=ISSUER, audience=AUDIENCE, feed=None)
    assert validator.verifier.status()["issuer"] == ISSUER
    with pytest.raises(ValueError, match="issuer"):
        CoatcheckBearerValidator(audience=AUDIENCE)


@pytest.mark.parametrize("is_ours", [False, True], ids=["Authlib's", "ours"])
def test_djangos_protector_is_served_alike(verifier: Verifier, *, is_ours: bool) -> None:
    """Authlib's other integration; the token is at `request.oauth_token`."""
    from support.adapters.django import configure  # noqa: PLC0415

    configure()
    from authlib.integrations.django_oauth2 import (  # noqa: PLC0415
        ResourceProtector as OfDjango,
    )
    from django.http import HttpResponse  # noqa: PLC0415
    from django.test import RequestFactory  # noqa: PLC0415

    class Ours(CoatcheckProtector, OfDjango):  # type: ignore[misc]
        """As on its page."""

    @registered(Ours if is_ours else OfDjango, verifier)("widgets:read")
    def view(request: Any) -> Any:
        return HttpResponse(request.oauth_token.key_id)

    def asked(**headers: str) -> Any:
        return view(RequestFactory().get("/", headers=headers))

    token = signer().token(
        claims(must=["network", "role"], cidrs=["127.0.0.0/8"], roles=["viewer"])
    )
    assert asked(Authorization=f"Bearer {token}").content.decode() == claims()["sub"]
    narrow = signer().token(claims(scope="other"))
    refused = asked(Authorization=f"Bearer {narrow}")
    with pytest.raises(VerifierError) as judged:
        verifier.authenticate({"Authorization": f"Bearer {narrow}"}, "widgets:read")
    assert refused.status_code == 403
    assert judged.value.headers.items() <= dict(refused.headers).items()
    assert refused.content == judged.value.body
    if is_ours:
        assert asked(**{"X-API-Key": token}).content.decode() == claims()["sub"]
        assert asked()["WWW-Authenticate"] == BARE
