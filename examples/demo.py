"""`make demo`: the whole story as a transcript, told by real clients against real processes.

Everything lives in a temporary directory and on free ports, and is gone afterwards.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import requests
from authlib.integrations.requests_client import OAuth2Session
from processes import Deployment

WIDTH = 88


def main() -> None:
    """Tell it; a step that does not go as told ends the program with an error."""
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    with tempfile.TemporaryDirectory(prefix="coatcheck-demo-") as name:
        folder = Path(name)
        deployment = Deployment(
            {
                "COATCHECK_ISSUER": f"http://127.0.0.1:{_free_port()}",
                "COATCHECK_AUDIENCE": f"http://127.0.0.1:{_free_port()}",
                "COATCHECK_DATABASE_URL": f"sqlite:///{folder}/coatcheck.db",
                "COATCHECK_KEYS_DIR": str(folder / "keys"),
            }
        )
        _chapter("A new deployment, and the API keys of a caller and of an API")
        deployment.initialize()
        caller = _api_key(deployment, "ci-job", "widgets:read widgets:write")
        server = _api_key(deployment, "widgets-api", "coatcheck:resource-server")
        with deployment.running(folder):
            _story(deployment, caller, server)
    print()


def _story(deployment: Deployment, caller: dict[str, Any], server: dict[str, Any]) -> None:
    issuer, audience = deployment.issuer, deployment.audience

    _chapter("Authlib, unmodified, exchanges the key for a token")
    session = OAuth2Session(caller["id"], caller["key"], scope="widgets:read")
    told = session.fetch_token(f"{issuer}/oauth/token")
    _line(f"scope {told['scope']}, expires in {told['expires_in']} s")
    token = str(told["access_token"])

    _chapter("The API lets it in; PyJWT, which knows nothing of us, agrees")
    _expect(200, session.get(f"{audience}/widgets"))
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")
    claims = jwt.decode(
        token, keys.get_signing_key_from_jwt(token), ["ES256"], issuer=issuer, audience=audience
    )
    _line(f"sub {claims['sub']}, aud {claims['aud']}")

    _chapter("A token is never wider than its key")
    ask = {"grant_type": "client_credentials", "client_secret": caller["key"]}
    _expect(400, _post(issuer, "token", {**ask, "scope": "widgets:read widgets:delete"}))
    _expect(400, _post(issuer, "token", {**ask, "resource": "https://other.example.com"}))

    _chapter("The caller ends one token; the API's own key sees it at once")
    look = {"client_secret": server["key"], "token": token}
    _expect(200, _post(issuer, "introspect", look), lambda body: body["active"] is True)
    _expect(200, _post(issuer, "revoke", {"client_secret": caller["key"], "token": token}))
    _expect(200, _post(issuer, "introspect", look), lambda body: body == {"active": False})

    _chapter("The key is revoked: no new token, and those it got before are dead")
    another = _post(issuer, "token", ask).json()["access_token"]
    deployment.json("keys", "revoke", caller["id"], "--yes")
    _expect(400, _post(issuer, "token", ask))
    look = {"client_secret": server["key"], "token": another}
    _expect(200, _post(issuer, "introspect", look), lambda body: body == {"active": False})


def _api_key(deployment: Deployment, name: str, scope: str) -> dict[str, Any]:
    made = deployment.json("keys", "create", "--name", name, "--scope", scope)
    _line(f"{made['name']}: {made['mask']} ({scope})")
    return made


def _post(issuer: str, endpoint: str, form: dict[str, str]) -> requests.Response:
    return requests.post(f"{issuer}/oauth/{endpoint}", data=form, timeout=10)


def _expect(
    status: int,
    answer: requests.Response,
    holds: Callable[[dict[str, Any]], bool] = lambda body: True,
) -> None:
    body = answer.json()
    told = body.get("error_description", str(body))
    _line(f"{answer.request.method} {answer.request.path_url} -> {answer.status_code} {told}")
    if answer.status_code != status or not holds(body):
        sys.exit(f"demo: expected {status}, and another answer")


def _chapter(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _line(text: str) -> None:
    print(f"   {text[:WIDTH]}{'…' if len(text) > WIDTH else ''}", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
