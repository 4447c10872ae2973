"""POST /oauth/token, when it works.  RFC 6749 §4.4, §5.1; RFC 9068 §2."""

import base64
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient
from support.deployment import Deployment


def basic(user: str, password: str) -> dict[str, str]:
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {text}"}


def everything_encoded(text: str) -> str:
    return "".join(f"%{ord(character):02X}" for character in text)


Credential = Callable[[str, str], tuple[dict[str, str], dict[str, str]]]

FORMS: dict[str, Credential] = {
    "basic": lambda i, k: (basic(i, k), {}),
    "basic, key as user name": lambda i, k: (basic(k, ""), {}),
    "basic, fully percent-encoded": lambda i, k: (
        basic(everything_encoded(i), everything_encoded(k)),
        {},
    ),
    "basic, equal client_id in the body": lambda i, k: (basic(i, k), {"client_id": i}),
    "body": lambda i, k: ({}, {"client_id": i, "client_secret": k}),
    "body, secret alone": lambda i, k: ({}, {"client_secret": k}),
    "bearer": lambda i, k: ({"Authorization": f"Bearer {k}"}, {}),
}


@pytest.mark.parametrize("credential", FORMS.values(), ids=FORMS)
def test_every_form_of_credential_gets_a_token(
    http: TestClient, deployment: Deployment, credential: Credential
) -> None:
    """OAuth libraries differ in where they put the secret; all of them work unchanged."""
    made = deployment.api_key("widgets:read")
    headers, extra = credential(made.api_key.id, made.key)

    answer = http.post(
        "/oauth/token", data={"grant_type": "client_credentials", **extra}, headers=headers
    )

    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"access_token", "token_type", "expires_in", "scope"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert answer.headers["content-type"] == "application/json"
