"""POST /oauth/revoke.  RFC 7009 §2; the rows R1 to R5 of the bad inputs."""

import base64
from collections.abc import Callable

import httpx2
import jwt
import pytest
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.server.manage.api_keys import Created
from coatcheck.server.store.tables import ChangeRow
from support.deployment import AUDIENCE, HOUR, ISSUER, NOON, Deployment
from support.tokens import base64url, claims, signer
from support.wire import CHALLENGE, FORM, basic, claims_of, database, token_for

#: The order of the group of P-256; SEC 2 §2.4.2.
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def revoke(
    http: TestClient, key: str | None, headers: dict[str, str] | None = None, **parameters: str
) -> httpx2.Response:
    credential = {} if key is None else {"client_secret": key}
    return http.post("/oauth/revoke", data=credential | parameters, headers=headers)


def is_active(http: TestClient, key: str, token: str) -> bool:
    """Whether a token of this API key is good, as introspection tells."""
    answer = http.post("/oauth/introspect", data={"client_secret": key, "token": token})
    active: bool = answer.json()["active"]
    return active


def changes(deployment: Deployment, subject: object) -> list[ChangeRow]:
    with deployment.store.transaction(read_only=True) as tx:
        return list(tx.changes(str(subject)))


def the_other_signature(token: str) -> str:
    """The same token with S replaced by N - S: ECDSA's second valid signature."""
    signing_input, _, text = token.rpartition(".")
    signature = base64.urlsafe_b64decode(text + "==")
    s = P256_ORDER - int.from_bytes(signature[32:], "big")
    return f"{signing_input}.{base64url(signature[:32] + s.to_bytes(32, 'big'))}"


# --- what is revoked

CREDENTIALS: dict[str, Callable[[Created], tuple[str | None, dict[str, str]]]] = {
    "body": lambda made: (made.key, {}),
    "basic": lambda made: (None, basic(made.api_key.id, made.key)),
    "bearer": lambda made: (None, {"Authorization": f"Bearer {made.key}"}),
}


@pytest.mark.parametrize("credential", CREDENTIALS.values(), ids=CREDENTIALS)
def test_a_revoked_token_is_inactive_at_once(
    http: TestClient,
    deployment: Deployment,
    credential: Callable[[Created], tuple[str | None, dict[str, str]]],
) -> None:
    """RFC 7009 §2.2: 200; the body is not looked at, and still must not be stored."""
    made = deployment.api_key()
    token, other = token_for(http, made.key), token_for(http, made.key)
    key, headers = credential(made)

    answer = revoke(http, key, headers, token=token)

    assert (answer.status_code, answer.json()) == (200, {})
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    assert not is_active(http, made.key, token)
    # It is one token that ends, not the API key and not its other tokens.
    assert is_active(http, made.key, other)
    assert is_active(http, made.key, token_for(http, made.key))


def test_a_revocation_is_written_down_with_who_did_it(
    http: TestClient, deployment: Deployment
) -> None:
    """An audit asks who, when and from where; the token itself is never in the log."""
    made = deployment.api_key()
    token = token_for(http, made.key)
    deployment.clock.now += 5

    revoke(http, made.key, token=token)

    (row,) = changes(deployment, claims_of(token)["jti"])
    assert (row.what, row.narrows, row.at) == ("token.revoked", True, NOON + 5)
    assert (row.actor, row.organization_id) == (made.api_key.id, deployment.organization_id)
    assert token not in row.detail


def test_revoking_twice_is_revoking_once(http: TestClient, deployment: Deployment) -> None:
    """
    Clients repeat what timed out; the log must not grow with them.

    RFC 7009 §2.2: a token that is invalid already is no error.
    """
    made = deployment.api_key()
    token = token_for(http, made.key)

    answers = [revoke(http, made.key, token=token) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len(changes(deployment, claims_of(token)["jti"])) == 1


def test_the_second_spelling_of_a_signature_is_the_same_token(
    http: TestClient, deployment: Deployment
) -> None:
    """
    An ECDSA signature has two spellings: revoking by text would leave the other one alive.

    What is recorded is the `jti`.
    """
    key = deployment.api_key().key
    token = token_for(http, key)
    twin = the_other_signature(token)
    assert is_active(http, key, twin)

    revoke(http, key, token=twin)

    assert not is_active(http, key, token)
    assert not is_active(http, key, twin)


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "pancake", ""])
def test_a_hint_changes_nothing(http: TestClient, deployment: Deployment, hint: str) -> None:
    """RFC 7009 §2.1: a hint only speeds a search up; a wrong one must not hide the token."""
    key = deployment.api_key().key
    token = token_for(http, key)

    assert revoke(http, key, token=token, token_type_hint=hint).status_code == 200

    assert not is_active(http, key, token)


# --- what is not

NOTHING_TO_REVOKE: dict[str, Callable[[str], str]] = {
    "garbage": lambda token: "garbage",
    "a blank": lambda token: " ",
    "dots": lambda token: "..",
    "NUL": lambda token: "\0",
    "non-ASCII": lambda token: "tökén",
    "too long": lambda token: "a" * 10_000,
    "stripped": lambda token: token.rpartition(".")[0] + ".",
    "a part less": lambda token: token.rpartition(".")[0],
    "a blank behind": lambda token: f"{token} ",
    "of another issuer": lambda token: signer().token(claims()),
    "forged, with the real jti": lambda token: signer().token(
        claims_of(token), kid=jwt.get_unverified_header(token)["kid"]
    ),
    "forged, unsigned": lambda token: ".".join(
        [base64url(b'{"alg":"none","typ":"at+jwt"}'), token.split(".")[1], ""]
    ),
    "the real jti": lambda token: str(claims_of(token)["jti"]),
    "the key id": lambda token: str(claims_of(token)["sub"]),
}


@pytest.mark.parametrize("forge", NOTHING_TO_REVOKE.values(), ids=NOTHING_TO_REVOKE)
def test_what_is_no_token_of_ours_revokes_nothing_and_is_no_error(
    http: TestClient, deployment: Deployment, forge: Callable[[str], str]
) -> None:
    """R1, R4: the client can do nothing about it anyway.  RFC 7009 §2.2."""
    key = deployment.api_key().key
    token = token_for(http, key)

    answer = revoke(http, key, token=forge(token))

    assert (answer.status_code, answer.json()) == (200, {})
    assert is_active(http, key, token)
    assert changes(deployment, claims_of(token)["jti"]) == []


def test_an_expired_token_needs_no_revocation(http: TestClient, deployment: Deployment) -> None:
    """R1: it is dead already, and the log has no use for it.  RFC 7009 §2.2."""
    key = deployment.api_key().key
    token = token_for(http, key)
    deployment.clock.now += HOUR

    assert revoke(http, key, token=token).status_code == 200

    assert changes(deployment, claims_of(token)["jti"]) == []


OTHERS: dict[str, Callable[[Deployment], str]] = {
    "another key": lambda deployment: deployment.api_key().key,
    "the admin": lambda deployment: deployment.initialized.key,
    "the resource server": lambda deployment: (
        deployment.api_key("coatcheck:resource-server", audiences=(AUDIENCE,)).key
    ),
    "an operator": lambda deployment: deployment.api_key("coatcheck:operator").key,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_nobody_revokes_the_token_of_another(
    http: TestClient, deployment: Deployment, other: Callable[[Deployment], str]
) -> None:
    """R3: whoever sees a token could stop its caller.  RFC 7009 §2.1."""
    key = deployment.api_key().key
    token = token_for(http, key)

    answer = revoke(http, other(deployment), token=token)

    assert answer.status_code in (200, 400)
    assert is_active(http, key, token)


def test_a_raw_api_key_is_a_token_type_that_is_not_revoked_here(
    http: TestClient, deployment: Deployment
) -> None:
    """
    200 would let somebody believe that a leaked API key is dead now.

    RFC 7009 §2.2.1: unsupported_token_type.
    """
    made, other = deployment.api_key(), deployment.api_key()

    for presented in (made.key, other.key, apikey.make("ck_live")):
        answer = revoke(http, made.key, token=presented)
        body = answer.json()
        assert (answer.status_code, body["error"]) == (400, "unsupported_token_type")
        assert "keys revoke" in body["error_description"]
        assert presented not in answer.text
    assert token_for(http, made.key)
    assert token_for(http, other.key)


# --- who may not

UNAUTHENTICATED: dict[str, Callable[[Created], tuple[str | None, dict[str, str]]]] = {
    "nothing": lambda made: (None, {}),
    "wrong": lambda made: (apikey.make("ck_live"), {}),
    "wrong, as basic": lambda made: (None, basic(made.api_key.id, "wrong")),
    "the key id alone": lambda made: (None, basic(made.api_key.id, "")),
    "a JWT": lambda made: (None, {"Authorization": f"Bearer {signer().token(claims())}"}),
}


@pytest.mark.parametrize("credential", UNAUTHENTICATED.values(), ids=UNAUTHENTICATED)
def test_whoever_is_not_authenticated_revokes_nothing(
    http: TestClient,
    deployment: Deployment,
    credential: Callable[[Created], tuple[str | None, dict[str, str]]],
) -> None:
    """R2: always 401 with a challenge, wherever the credential stood.  RFC 7009 §2.1."""
    made = deployment.api_key()
    token = token_for(http, made.key)
    key, headers = credential(made)

    answer = revoke(http, key, headers, token=token)

    body = answer.json()
    assert (answer.status_code, body["error"]) == (401, "invalid_client")
    said = CHALLENGE.fullmatch(answer.headers["www-authenticate"])
    assert said is not None
    assert said["realm"] == ISSUER
    assert said["error_description"] == body["error_description"]
    assert is_active(http, made.key, token)


def test_the_token_itself_is_no_credential(http: TestClient, deployment: Deployment) -> None:
    """JWTs never authenticate here: a stolen token could not even be used to end itself."""
    key = deployment.api_key().key
    token = token_for(http, key)

    answer = revoke(http, None, {"Authorization": f"Bearer {token}"}, token=token)

    assert answer.status_code == 401
    assert is_active(http, key, token)


def test_a_dead_api_key_revokes_nothing(http: TestClient, deployment: Deployment) -> None:
    """Its tokens are dead with it, and it has no say any more.  RFC 7009 §2.1."""
    made = deployment.api_key()
    token = token_for(http, made.key)
    deployment.disable(made)

    answer = revoke(http, made.key, token=token)

    assert (answer.status_code, answer.json()["code"]) == (401, "api_key_disabled")
    assert changes(deployment, claims_of(token)["jti"]) == []


# --- the request

MALFORMED = {
    "no token": "",
    "token without value": "&token=",
    "token twice": "&token=TOKEN&token=TOKEN",
}


@pytest.mark.parametrize("parameters", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_revokes_nothing(
    http: TestClient, deployment: Deployment, parameters: str
) -> None:
    """RFC 7009 §2.1: token is required; RFC 6749 §3.2: once."""
    key = deployment.api_key().key
    token = token_for(http, key)
    body = f"client_secret={key}{parameters}".replace("TOKEN", token)

    answer = http.post("/oauth/revoke", content=body, headers={"Content-Type": FORM})

    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert is_active(http, key, token)


def test_only_post_revokes(http: TestClient, deployment: Deployment) -> None:
    """A GET is prefetched, logged and repeated.  RFC 7009 §2: no JSONP here either."""
    key = deployment.api_key().key
    token = token_for(http, key)

    as_get = http.get("/oauth/revoke", headers=basic("", key))
    in_the_query = http.post(f"/oauth/revoke?token={token}", data={"client_secret": key})

    assert (as_get.status_code, as_get.headers["allow"]) == (405, "POST")
    assert (in_the_query.status_code, in_the_query.json()["error"]) == (400, "invalid_request")
    assert is_active(http, key, token)


def test_without_the_database_nobody_is_told_that_a_token_was_revoked(
    http: TestClient, deployment: Deployment
) -> None:
    """
    R5: a 200 would be believed; the client comes back after a 503.

    RFC 7009 §2.2.1.
    """
    key = deployment.api_key().key
    token = token_for(http, key)
    away = database(deployment).rename(database(deployment).with_suffix(".away"))

    answer = revoke(http, key, token=token)

    assert (answer.status_code, answer.json()["code"]) == (503, "issuer_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    away.rename(database(deployment))
    assert is_active(http, key, token)
    assert revoke(http, key, token=token).status_code == 200
    assert not is_active(http, key, token)
