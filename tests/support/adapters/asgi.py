"""Plain ASGI, asked by Starlette's test client, which asks every ASGI application alike."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from coatcheck.asgi import CoatcheckASGI
from coatcheck.verifier import Verifier
from support.adapters.harness import PEER, Answer, Ask, Headers
from support.adapters.wsgi import answer_of


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


def application(verifier: Verifier) -> CoatcheckASGI:
    return CoatcheckASGI(app, verifier, public=["/health"])


@contextmanager
def asking(app: Any) -> Iterator[Ask]:
    with TestClient(app, client=(PEER, 50_000)) as client:

        def ask(method: str, path: str, headers: Headers = ()) -> Answer:
            answer = client.request(method, path, headers=list(headers), follow_redirects=False)
            return Answer(answer.status_code, dict(answer.headers), answer.content)

        yield ask
