"""POST /oauth/introspect.  RFC 7662 §2, §4; the rows I1 to I6 of the bad inputs."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.server import sealing, signing
from coatcheck.server.manage.api_keys import Created
from support.deployment import (
    AUDIENCE,
    HOUR,
    ISSUER,
    MINUTE,
    NOON,
    TESTER,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.tokens import as_json, base64url, claims, signer
from support.wire import (
    CHALLENGE,
    LIFETIME,
    MANAGEMENT,
    basic,
    claims_of,
    database,
    token_for,
)

INACTIVE = {"active": False}


def introspect(
    http: TestClient, key: str | None, headers: dict[str, str] | None = None, **parameters: str
) -> httpx2.Response:
    credential = {} if key is None else {"client_secret": key}
    return http.post("/oauth/introspect", data=credential | parameters, headers=headers)


def told(http: TestClient, key: str, token: str) -> dict[str, Any]:
    """What somebody with this API key is told about a token."""
    answer = introspect(http, key, token=token)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    return body


def a_resource_server(deployment: Deployment, *audiences: str) -> str:
    """The API key of a resource server with these audiences."""
    made = deployment.api_key("coatcheck:resource-server", audiences=audiences)
    return made.key


# --- whom is told what


def test_an_api_key_learns_everything_about_its_own_token(
    http: TestClient, deployment: Deployment
) -> None:
    """RFC 7662 §2.2: the claims as the token says them, and nothing of the record."""
    key = deployment.api_key("widgets:read").key
    token = token_for(http, key)

    assert told(http, key, token) == {"active": True, "token_type": "Bearer", **claims_of(token)}


def test_a_resource_server_learns_everything_about_tokens_for_its_audience(
    http: TestClient, deployment: Deployment
) -> None:
    """RFC 7662 §1: a resource server asks about what its callers present."""
    token = token_for(http, deployment.api_key("widgets:read").key)

    answer = told(http, a_resource_server(deployment, AUDIENCE), token)

    assert answer == {"active": True, "token_type": "Bearer", **claims_of(token)}


OF_WHOM: dict[str, tuple[str, ...]] = {
    "of another resource server": (MANAGEMENT,),
    "of its own": (AUDIENCE,),
    "of both": (AUDIENCE, MANAGEMENT),
}


@pytest.mark.parametrize("audiences", OF_WHOM.values(), ids=OF_WHOM)
def test_a_resource_server_is_bound_to_its_audiences(
    http: TestClient, deployment: Deployment, audiences: tuple[str, ...]
) -> None:
    """I4: a token is told to nobody whom it is not for.  RFC 7662 §4; CVE-2026-37979."""
    resource_server = a_resource_server(deployment, *audiences)
    tokens = {
        AUDIENCE: token_for(http, deployment.api_key().key),
        MANAGEMENT: token_for(http, deployment.initialized.key, resource=MANAGEMENT),
    }

    for audience, token in tokens.items():
        answer = told(http, resource_server, token)
        assert answer["active"] == (audience in audiences)
        assert answer["active"] or answer == INACTIVE


STRANGERS: dict[str, Callable[[Deployment], str]] = {
    "another key": lambda deployment: deployment.api_key("widgets:read").key,
    "a key for everything": lambda deployment: deployment.api_key().key,
    "the admin": lambda deployment: deployment.initialized.key,
    "an operator": lambda deployment: deployment.api_key("coatcheck:operator").key,
    "a resource server for one resource": lambda deployment: (
        deployment.api_key("coatcheck:resource-server@P/1").key
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_learns_nothing_about_a_good_token(
    http: TestClient, deployment: Deployment, stranger: Callable[[Deployment], str]
) -> None:
    """RFC 7662 §2.2, §4: `active: false` alone, as for a token that does not exist."""
    token = token_for(http, deployment.api_key().key)

    assert told(http, stranger(deployment), token) == INACTIVE


# --- what ends a token at once

End = Callable[[Deployment, Created, str], object]


def withdraw_its_signing_key(deployment: Deployment, made: Created, token: str) -> None:
    kid = jwt.get_unverified_header(token)["kid"]
    signing.withdraw(deployment.store, kid, TESTER, now=deployment.now, force=True)


def disable_and_enable(deployment: Deployment, made: Created, token: str) -> None:
    deployment.disable(made)
    deployment.enable(made)


def end_an_overlap(deployment: Deployment, made: Created, token: str) -> None:
    deployment.rotate(made, overlap_s=24 * HOUR)
    deployment.rotate(made, overlap_s=24 * HOUR)


ENDS: dict[str, End] = {
    "its key is revoked": lambda deployment, made, token: deployment.revoke(made),
    "its key is disabled": lambda deployment, made, token: deployment.disable(made),
    "its key is disabled, then enabled": disable_and_enable,
    "its key is rotated without overlap": lambda deployment, made, token: deployment.rotate(
        made, overlap_s=0
    ),
    "its key is rotated, the overlap too short": lambda deployment, made, token: deployment.rotate(
        made, overlap_s=MINUTE
    ),
    "the overlap of its secret is ended": end_an_overlap,
    "its signing key is withdrawn": withdraw_its_signing_key,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_narrows_an_api_key_ends_its_tokens_at_once(
    http: TestClient, deployment: Deployment, end: End
) -> None:
    """I1: whoever asks must not wait for `exp`.  RFC 7662 §4; RFC 7009 §1."""
    resource_server = a_resource_server(deployment, AUDIENCE)
    made = deployment.api_key()
    token = token_for(http, made.key)
    assert told(http, resource_server, token)["active"]

    end(deployment, made, token)

    assert told(http, resource_server, token) == INACTIVE


def test_a_key_that_was_enabled_again_gets_tokens_that_are_active(
    http: TestClient, deployment: Deployment
) -> None:
    """Disabling kills the tokens from before it for good, and no later one."""
    made = deployment.api_key()
    before = token_for(http, made.key)
    deployment.disable(made)
    deployment.enable(made)

    after = token_for(http, made.key)

    assert told(http, made.key, before) == INACTIVE
    assert told(http, made.key, after)["active"]


GO_ON: dict[str, End] = {
    "nothing happens": lambda deployment, made, token: None,
    "its key is enabled": lambda deployment, made, token: deployment.enable(made),
    "its key is rotated with a day of overlap": lambda deployment, made, token: deployment.rotate(
        made, overlap_s=24 * HOUR
    ),
    "another key is revoked": lambda deployment, made, token: deployment.revoke(
        deployment.api_key()
    ),
    "a signing key follows": lambda deployment, made, token: signing.rotate(
        deployment.store,
        sealing.load(deployment.settings.keys_dir).newest(),
        "ES256",
        TESTER,
        now=deployment.now,
        at_once=True,
    ),
}


@pytest.mark.parametrize("event", GO_ON.values(), ids=GO_ON)
def test_what_narrows_nothing_ends_no_token(
    http: TestClient, deployment: Deployment, event: End
) -> None:
    """A token that dies without a reason costs somebody an outage."""
    resource_server = a_resource_server(deployment, AUDIENCE)
    made = deployment.api_key()
    token = token_for(http, made.key)

    event(deployment, made, token)

    assert told(http, resource_server, token)["active"]


def test_a_token_ends_at_its_exp_to_the_second(http: TestClient, deployment: Deployment) -> None:
    """I1: the issuer has no clock but its own: there is no leeway here.  RFC 7519 §4.1.4."""
    key = deployment.api_key().key
    token = token_for(http, key)

    deployment.clock.now = NOON + LIFETIME - 1
    assert told(http, key, token)["active"]
    deployment.clock.now = NOON + LIFETIME
    assert told(http, key, token) == INACTIVE


def test_a_token_of_another_deployment_is_none_of_ours(
    http: TestClient, deployment: Deployment, tmp_path: Path
) -> None:
    """I1: the same product, the same audience, another issuer.  RFC 7662 §4."""
    folder = tmp_path / "other"
    folder.mkdir()
    with (
        a_deployment(folder, issuer="http://127.0.0.1:9000") as other,
        a_client(other) as elsewhere,
    ):
        token = token_for(elsewhere, other.api_key().key)

    assert told(http, a_resource_server(deployment, AUDIENCE), token) == INACTIVE


# --- what is no token of ours


def parts(token: str) -> list[str]:
    return token.split(".")


def resigned(token: str, algorithm: str = "ES256", **header: object) -> str:
    """The same claims under the same `kid`, signed by somebody else."""
    kid = jwt.get_unverified_header(token)["kid"]
    return signer(algorithm).token(claims_of(token), kid=kid, **header)


def with_claims(token: str, **changes: object) -> str:
    header, _, signature = parts(token)
    payload = base64url(as_json(claims_of(token) | changes))
    return f"{header}.{payload}.{signature}"


def unsigned(token: str, algorithm: str) -> str:
    header = base64url(as_json(jwt.get_unverified_header(token) | {"alg": algorithm}))
    return f"{header}.{parts(token)[1]}."


def nested(depth: int) -> str:
    return base64url(b'{"a":' * depth + b"1" + b"}" * depth)


NONE_OF_OURS: dict[str, Callable[[str], str]] = {
    "garbage": lambda token: "garbage",
    "a blank": lambda token: " ",
    "dots": lambda token: "..",
    "four dots": lambda token: "....",
    "many dots": lambda token: "." * 4000,
    "NUL": lambda token: "\0",
    "non-ASCII": lambda token: "tökén",
    "blank behind": lambda token: f"{token} ",
    "blank before": lambda token: f" {token}",
    "newline behind": lambda token: f"{token}\n",
    "padding": lambda token: f"{token}=",
    "Bearer before": lambda token: f"Bearer {token}",
    "one part less": lambda token: ".".join(parts(token)[:2]),
    "one part more": lambda token: f"{token}.x",
    "stripped": lambda token: ".".join([*parts(token)[:2], ""]),
    "signature cut": lambda token: token[:-2],
    "signature of zeros": lambda token: ".".join([*parts(token)[:2], base64url(bytes(64))]),
    "alg none": lambda token: unsigned(token, "none"),
    "alg None": lambda token: unsigned(token, "nOnE"),
    "alg HS256": lambda token: unsigned(token, "HS256"),
    "longer life": lambda token: with_claims(token, exp=NOON + HOUR),
    "more scope": lambda token: with_claims(token, scope="* org:admin"),
    "another key": lambda token: with_claims(token, sub="key_0000000000000000000000"),
    "signed by another": resigned,
    "signed by another algorithm": lambda token: resigned(token, "RS256"),
    "signed by another, without kid": lambda token: signer().token(claims_of(token)),
    "with its own jwk": lambda token: resigned(token, jwk=signer().jwk()),
    "a foreign issuer": lambda token: signer().token(claims(iat=NOON, exp=NOON + 600)),
    "JWE": lambda token: ".".join([base64url(as_json({"alg": "dir", "enc": "A256GCM"})), *"abcd"]),
    "deep JSON in the header": lambda token: ".".join([nested(500), *parts(token)[1:]]),
    "deep JSON in the payload": lambda token: f"{parts(token)[0]}.{nested(400)}.eA",
    "JSON serialization": lambda token: json.dumps({"payload": parts(token)[1], "signatures": []}),
    "too long": lambda token: "a" * 10_000,
    "two tokens": lambda token: f"{token} {token}",
    "an API key that is nobody's": lambda token: apikey.make("ck_live"),
    "the key id": lambda token: str(claims_of(token)["sub"]),
    "the jti": lambda token: str(claims_of(token)["jti"]),
}


@pytest.mark.parametrize("forge", NONE_OF_OURS.values(), ids=NONE_OF_OURS)
def test_what_is_no_token_of_ours_is_inactive_and_nothing_more(
    http: TestClient, deployment: Deployment, forge: Callable[[str], str]
) -> None:
    """I1: the reason would help a forger only.  RFC 7662 §2.2: no error, for whatever text."""
    made = deployment.api_key()
    resource_server = a_resource_server(deployment, AUDIENCE)

    forged = forge(token_for(http, made.key))

    assert told(http, made.key, forged) == INACTIVE
    assert told(http, resource_server, forged) == INACTIVE


def test_a_raw_api_key_is_inactive_and_never_repeated(
    http: TestClient, deployment: Deployment
) -> None:
    """I6: by documented policy; a key's own owner learns nothing else either."""
    made, asking = deployment.api_key(), deployment.api_key()

    for key in (made.key, asking.key, a_resource_server(deployment, AUDIENCE)):
        answer = introspect(http, key, token=made.key)
        assert answer.json() == INACTIVE
        assert made.key not in answer.text + str(answer.headers)


# --- who may not ask

Unauthenticated = Callable[[Deployment, Created], tuple[str | None, dict[str, str]]]


def of_a_dead_key(end: Callable[[Deployment, Created], object]) -> Unauthenticated:
    def credential(deployment: Deployment, made: Created) -> tuple[str | None, dict[str, str]]:
        end(deployment, made)
        return made.key, {}

    return credential


def suspend(deployment: Deployment, made: Created) -> None:
    with deployment.store.transaction() as tx:
        organization = tx.organization(deployment.organization_id)
        assert organization is not None
        organization.suspended_at = NOON


UNAUTHENTICATED: dict[str, Unauthenticated] = {
    "nothing": lambda deployment, made: (None, {}),
    "wrong": lambda deployment, made: (apikey.make("ck_live"), {}),
    "empty": lambda deployment, made: ("", {}),
    "wrong, as basic": lambda deployment, made: (None, basic(made.api_key.id, "wrong")),
    "wrong, as bearer": lambda deployment, made: (None, {"Authorization": "Bearer wrong"}),
    "a JWT": lambda deployment, made: (
        None,
        {"Authorization": f"Bearer {signer().token(claims(sub=made.api_key.id))}"},
    ),
    "unknown scheme": lambda deployment, made: (None, {"Authorization": "Digest x"}),
    "revoked": of_a_dead_key(lambda deployment, made: deployment.revoke(made)),
    "disabled": of_a_dead_key(lambda deployment, made: deployment.disable(made)),
    "replaced": of_a_dead_key(lambda deployment, made: deployment.rotate(made, overlap_s=0)),
}


def challenged(answer: httpx2.Response, error: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["error"]) == (401, error), answer.text
    assert answer.headers["cache-control"] == "no-store"
    said = CHALLENGE.fullmatch(answer.headers["www-authenticate"])
    assert said is not None
    assert said["realm"] == ISSUER
    assert (said["error"], said["error_description"]) == (error, body["error_description"])


@pytest.mark.parametrize("credential", UNAUTHENTICATED.values(), ids=UNAUTHENTICATED)
def test_whoever_is_not_authenticated_is_always_challenged(
    http: TestClient, deployment: Deployment, credential: Unauthenticated
) -> None:
    """I2: wherever the credential stood, unlike at the token endpoint.  RFC 7662 §2.3."""
    token = token_for(http, deployment.api_key().key)
    key, headers = credential(deployment, deployment.api_key())

    challenged(introspect(http, key, headers, token=token), "invalid_client")


def test_a_suspended_organization_is_challenged(http: TestClient, deployment: Deployment) -> None:
    """RFC 7662 §2.3: a caller that may not ask gets 401 here, whatever the reason."""
    made = deployment.api_key()
    suspend(deployment, made)

    challenged(introspect(http, made.key, token="x"), "unauthorized_client")


def test_guessing_is_throttled_here_as_everywhere(tmp_path: Path) -> None:
    """OWASP ASVS 5 §6.3.1: one door without a counter is the one that is used."""
    with a_deployment(tmp_path, guesses_per_minute=3) as deployment, a_client(deployment) as http:
        key = deployment.api_key().key
        statuses = [
            introspect(http, apikey.make("ck_live"), token="x").status_code for _ in range(4)
        ]
        assert introspect(http, key, token="x").status_code == 200
        after = http.post("/oauth/token", data=form(apikey.make("ck_live"))).status_code

    assert statuses == [401, 401, 401, 429]
    assert after == 429


# --- the request

MALFORMED: dict[str, str] = {
    "no token": "",
    "token without value": "&token=",
    "token twice": "&token=TOKEN&token=TOKEN",
    "token_type_hint twice": "&token=TOKEN&token_type_hint=a&token_type_hint=a",
}


@pytest.mark.parametrize("parameters", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_question_is_an_invalid_request(
    http: TestClient, deployment: Deployment, parameters: str
) -> None:
    """I3: RFC 7662 §2.1; RFC 6749 §3.2."""
    key = deployment.api_key().key
    body = f"client_secret={key}{parameters}".replace("TOKEN", token_for(http, key))

    answer = http.post(
        "/oauth/introspect",
        content=body,
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )

    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "pancake", "", "\0", "ü"])
def test_a_hint_changes_nothing(http: TestClient, deployment: Deployment, hint: str) -> None:
    """I5: there is one kind of token here.  RFC 7662 §2.1."""
    key = deployment.api_key().key
    token = token_for(http, key)

    answer = introspect(http, key, token=token, token_type_hint=hint)

    assert answer.json()["active"] is True


def test_a_token_in_the_query_is_refused(http: TestClient, deployment: Deployment) -> None:
    """RFC 7662 §2.1: POST, so that no log on the way holds the token."""
    key = deployment.api_key().key
    token = token_for(http, key)

    in_the_query = http.post(f"/oauth/introspect?token={token}", data={"client_secret": key})
    as_get = http.get("/oauth/introspect", headers=basic("", key))

    assert (in_the_query.status_code, in_the_query.json()["error"]) == (400, "invalid_request")
    assert (as_get.status_code, as_get.headers["allow"]) == (405, "POST")


def test_without_the_database_nobody_is_told_that_a_token_is_inactive(
    http: TestClient, deployment: Deployment
) -> None:
    """`active: false` would make resource servers refuse good tokens.  RFC 9110 §15.6.4."""
    key = deployment.api_key().key
    token = token_for(http, key)
    database(deployment).unlink()

    deadline = time.monotonic() + 5
    while (answer := introspect(http, key, token=token)).status_code == 200:
        assert answer.json()["active"] is True
        assert time.monotonic() < deadline
        time.sleep(0.05)

    assert (answer.status_code, answer.json()["code"]) == (503, "issuer_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
