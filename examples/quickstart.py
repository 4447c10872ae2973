"""`make run`: a deployment in this directory, with an API beside it and commands to paste.

Started again it goes on with what it had: database, keys, and the demo API key.
"""

import os
import signal
import sys
import time
from pathlib import Path

from processes import Deployment

#: Where the demo's secrets lie, each in a file that only its owner can read.
FOLDER = Path(".coatcheck")

ENVIRONMENT = {
    "COATCHECK_ISSUER": "http://127.0.0.1:8000",
    "COATCHECK_AUDIENCE": "http://127.0.0.1:8001",
}

COMMANDS = """
Coatcheck is at {issuer} (documentation: {issuer}/docs);
an API that takes its tokens is at {audience}.

In another terminal, in this directory:

  1. Exchange the demo API key for a token that lives ten minutes

     curl -w '\\n' {issuer}/oauth/token -d grant_type=client_credentials \\
       --data-urlencode client_secret@{demo}

  2. Keep one, and call the API with it

     TOKEN=$({token})
     curl -w '\\n' {audience}/widgets -H "Authorization: Bearer $TOKEN"

  3. Look at its claims, as the API sees them

     curl -w '\\n' {audience}/whoami -H "Authorization: Bearer $TOKEN"

  4. Ask the service about it, as the API's own key may

     curl -w '\\n' {issuer}/oauth/introspect -d token=$TOKEN \\
       --data-urlencode client_secret@{server}

  5. Callers who never move: the API takes the raw key, too

     curl -w '\\n' {audience}/widgets -H "X-API-Key: $(cat {demo})"

  6. Revoke the demo API key

     {coatcheck} keys revoke {demo_id} --yes

  7. Watch it all fail, within a second: no new token (1), inactive at introspection (4),
     and the API refuses both the token you hold (3) and the raw key (5).

For API keys of your own, which this API takes:

     export COATCHECK_ISSUER={issuer} COATCHECK_AUDIENCE={audience}
     {coatcheck} keys create --name mine --scope widgets:read

The admin key is in {admin}.  Stop with Ctrl-C.  `make run` again keeps everything,
and makes a new demo key if this one was revoked or has expired.
"""


def main() -> None:
    """Set up what is missing, start both servers, say what to do, wait."""
    deployment = Deployment({**ENVIRONMENT, **_ours(os.environ)})
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    initialized = deployment.initialize()
    if initialized is not None:
        _keep("admin", initialized["keyId"], initialized["key"])
    demo_id = _api_key(deployment, "demo", "widgets:read widgets:write")
    _api_key(deployment, "resource-server", "coatcheck:resource-server")
    service_key = (FOLDER / "resource-server.key").read_text()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with deployment.running(FOLDER, service_key) as processes:
        demo = FOLDER / "demo.key"
        coatcheck = os.path.relpath(Path(sys.executable).parent / "coatcheck")
        text = COMMANDS.format(
            issuer=deployment.issuer,
            audience=deployment.audience,
            demo=demo,
            demo_id=demo_id,
            server=FOLDER / "resource-server.key",
            admin=FOLDER / "admin.key",
            coatcheck=coatcheck,
            token=f"{coatcheck} token --api-key-file {demo}",
        )
        print(text, flush=True)
        try:
            while all(process.poll() is None for process in processes.values()):
                time.sleep(0.5)
        except KeyboardInterrupt:
            return
        sys.exit(f"a server ended by itself: see the logs in {FOLDER}")


def _ours(environment: "os._Environ[str]") -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("COATCHECK_")}


def _api_key(deployment: Deployment, name: str, scopes: str) -> str:
    """The id of an API key that works: the one kept here, or a new one."""
    id_path = FOLDER / f"{name}.id"
    if id_path.exists() and (FOLDER / f"{name}.key").exists():
        done = deployment.command("keys", "show", id_path.read_text(), "--json")
        if done.returncode == 0 and '"status": "active"' in done.stdout:
            return id_path.read_text()
    made = deployment.json("keys", "create", "--name", name, "--scope", scopes, "--expires", "365d")
    _keep(name, made["id"], made["key"])
    return str(made["id"])


def _keep(name: str, key_id: str, key: str) -> None:
    (FOLDER / f"{name}.id").write_text(key_id)
    path = FOLDER / f"{name}.key"
    path.touch(mode=0o600)
    # No line end: curl sends the file as it is.
    path.write_text(key)


if __name__ == "__main__":
    main()
