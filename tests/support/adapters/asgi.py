"""Plain ASGI, asked by Starlette's test client, which asks every ASGI application alike."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from coatcheck.asgi import CoatcheckASGI, Principal
from coatcheck.verifier import Verifier
from support.adapters.harness import PEER, Answer, Ask, Headers


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for stage in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{stage}.complete"})
        return
    told = answer_of(scope["path"], scope["coatcheck"])
    status = 404 if told is None else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(told).encode()})


def answer_of(path: str, principal: Principal | None) -> dict[str, object] | None:
    """What the contract's application says; None: nothing is there."""
    if path == "/health":
        return {}
    assert principal is not None
    if path == "/whoami":
        return {"key_id": principal.key_id, "method": principal.method}
    if path == "/widgets":
        principal.require("widgets:read")
        return {"key_id": principal.key_id}
    if path == "/project":
        return {"project": principal.require_project()}
    if path.startswith("/places/"):
        principal.require("read", resource=f"PLACE/{path.removeprefix('/places/')}")
        return {}
    return None


def application(verifier: Verifier) -> CoatcheckASGI:
    return CoatcheckASGI(app, verifier, public=["/health"])


@contextmanager
def asking(app: Any) -> Iterator[Ask]:
    with TestClient(app, client=(PEER, 50_000)) as client:

        def ask(method: str, path: str, headers: Headers = ()) -> Answer:
            answer = client.request(method, path, headers=list(headers), follow_redirects=False)
            return Answer(answer.status_code, dict(answer.headers), answer.content)

        yield ask
