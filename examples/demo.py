"""`make demo`: the whole story as a transcript, told by real clients against real processes.

Everything lives in a temporary directory and on free ports, and is gone afterwards.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import requests
from authlib.integrations.requests_client import OAuth2Session
from processes import Deployment

WIDTH = 88
#: Seconds after which something that should happen soon has not happened.
PATIENCE = 10


@dataclass(frozen=True, slots=True)
class Stage:
    """Everything that the story is played with."""

    deployment: Deployment
    customer: str
    server: dict[str, Any]
    processes: dict[str, "subprocess.Popen[bytes]"]
    folder: Path

    def caller(self, name: str, scope: str) -> dict[str, Any]:
        """A new API key of the customer."""
        return _api_key(self.deployment, self.customer, name, scope)

    def token(self, caller: dict[str, Any]) -> str:
        form = {"grant_type": "client_credentials", "client_secret": caller["key"]}
        return str(_post(self.deployment.issuer, "token", form).json()["access_token"])

    def call(self, credential: str) -> requests.Response:
        """Call the API with a token or a raw key."""
        headers = {"Authorization": f"Bearer {credential}"}
        return requests.get(f"{self.deployment.audience}/widgets", headers=headers, timeout=10)

    def expect(self, status: int, credential: str) -> None:
        _told(status, self.call(credential))

    def expect_soon(self, status: int, credential: str) -> None:
        """Call until the answer is the expected one, and tell how long that took."""
        began = time.monotonic()
        while self.call(credential).status_code != status and time.monotonic() < began + PATIENCE:
            time.sleep(0.01)
        _line(f"after {(time.monotonic() - began) * 1000:.0f} ms:")
        self.expect(status, credential)

    def stop_service(self) -> None:
        self.processes["service"].terminate()
        self.processes["service"].wait()
        _line("the service is stopped")

    def start_service(self) -> None:
        self.processes["service"] = self.deployment.start("service", self.folder)
        _line("the service is back")


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
        operator = (deployment.initialize() or {})["organization"]
        customer = deployment.json("orgs", "create", "--name", "A customer")["id"]
        server = _api_key(deployment, operator, "widgets-api", "coatcheck:resource-server")
        with deployment.running(folder, server["key"]) as processes:
            _story(Stage(deployment, customer, server, processes, folder))
    print()


def _story(stage: Stage) -> None:
    deployment = stage.deployment
    issuer, audience = deployment.issuer, deployment.audience
    caller = stage.caller("ci-job", "widgets:read widgets:write")

    _chapter("Authlib, unmodified, exchanges the key for a token")
    session = OAuth2Session(caller["id"], caller["key"], scope="widgets:read")
    told = session.fetch_token(f"{issuer}/oauth/token")
    _line(f"scope {told['scope']}, expires in {told['expires_in']} s")
    token = str(told["access_token"])

    _chapter("The API lets it in; PyJWT, which knows nothing of us, agrees")
    stage.expect(200, token)
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")
    claims = jwt.decode(
        token, keys.get_signing_key_from_jwt(token), ["ES256"], issuer=issuer, audience=audience
    )
    _line(f"sub {claims['sub']}, aud {claims['aud']}")

    _chapter("Callers who never move: the same API takes the raw key")
    stage.expect(200, caller["key"])

    _narrowing(stage, caller)
    _revoking(stage, caller, token)
    _larger_ends(stage)


def _narrowing(stage: Stage, caller: dict[str, Any]) -> None:
    issuer = stage.deployment.issuer

    _chapter("A token is never wider than its key")
    ask = {"grant_type": "client_credentials", "client_secret": caller["key"]}
    _told(400, _post(issuer, "token", {**ask, "scope": "widgets:read widgets:delete"}))
    _told(400, _post(issuer, "token", {**ask, "resource": "https://other.example.com"}))


def _revoking(stage: Stage, caller: dict[str, Any], token: str) -> None:
    issuer = stage.deployment.issuer

    _chapter("The caller ends one token: refused at once by the issuer, then by the API")
    _told(200, _post(issuer, "revoke", {"client_secret": caller["key"], "token": token}))
    _told(200, _post(issuer, "introspect", {"client_secret": stage.server["key"], "token": token}))
    stage.expect_soon(401, token)
    stage.expect(200, caller["key"])

    _chapter("The key is revoked: its tokens and the key itself are dead within a second")
    token = stage.token(caller)
    stage.expect(200, token)
    stage.deployment.json("keys", "revoke", caller["id"], "--yes")
    stage.expect_soon(401, token)
    stage.expect_soon(401, caller["key"])
    form = {"grant_type": "client_credentials", "client_secret": caller["key"]}
    _told(400, _post(issuer, "token", form))


def _larger_ends(stage: Stage) -> None:
    deployment = stage.deployment

    _chapter("An organization is suspended, and resumed: old tokens stay dead, the key works")
    caller = stage.caller("nightly", "widgets:read")
    token = stage.token(caller)
    stage.expect(200, token)
    deployment.json("orgs", "suspend", stage.customer, "--yes")
    stage.expect_soon(401, token)
    deployment.json("orgs", "resume", stage.customer)
    stage.expect_soon(200, stage.token(caller))
    stage.expect(401, token)

    _chapter("A signing key is withdrawn: what it signed is dead, what its successor signs is not")
    token = stage.token(caller)
    kid = str(jwt.get_unverified_header(token)["kid"])
    deployment.json("signing-keys", "rotate", "--now")
    deployment.json("signing-keys", "withdraw", kid, "--yes")
    stage.expect_soon(401, token)
    stage.expect_soon(200, stage.token(caller))

    _chapter("The service goes away: the API goes on with what it knows, and catches up")
    token = stage.token(caller)
    stage.expect(200, token)
    stage.stop_service()
    stage.expect(200, token)
    deployment.json("keys", "disable", caller["id"])
    _line("the key is disabled meanwhile, on the database")
    stage.start_service()
    stage.expect_soon(401, token)


def _api_key(deployment: Deployment, org: str, name: str, scope: str) -> dict[str, Any]:
    made = deployment.json("keys", "create", "--org", org, "--name", name, "--scope", scope)
    _line(f"{made['name']}: {made['mask']} ({scope})")
    return made


def _post(issuer: str, endpoint: str, form: dict[str, str]) -> requests.Response:
    return requests.post(f"{issuer}/oauth/{endpoint}", data=form, timeout=10)


def _told(status: int, answer: requests.Response) -> None:
    """Tell what was answered; another status than this one ends the program."""
    body = answer.json()
    told = body.get("error_description") or body.get("detail") or str(body)
    _line(f"{answer.request.method} {answer.request.path_url} -> {answer.status_code} {told}")
    if answer.status_code != status:
        sys.exit(f"demo: expected {status}")


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
