"""aiohttp, asked over a socket: its server runs in a thread with a loop of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from queue import Queue
from typing import Any

from aiohttp import web

from coatcheck.aiohttp import coatcheck_middleware, require_scopes
from coatcheck.verifier import Verifier
from support.adapters.harness import PEER, Answer, Ask, Headers


async def whoami(request: web.Request) -> web.Response:
    who = request["coatcheck"]
    return web.json_response({"key_id": who.key_id, "method": who.method})


@require_scopes("widgets:read")
async def widgets(request: web.Request) -> web.Response:
    return web.json_response({"key_id": request["coatcheck"].key_id})


async def place(request: web.Request) -> web.Response:
    request["coatcheck"].require("read", resource=f"PLACE/{request.match_info['id']}")
    return web.json_response({})


async def project(request: web.Request) -> web.Response:
    return web.json_response({"project": request["coatcheck"].require_project()})


async def health(_: web.Request) -> web.Response:
    return web.json_response({})


def application(verifier: Verifier) -> web.Application:
    app = web.Application(middlewares=[coatcheck_middleware(verifier, public=["/health"])])
    app.add_routes(
        [
            web.get("/whoami", whoami),
            web.post("/whoami", whoami),
            web.get("/widgets", widgets),
            web.get("/places/{id}", place),
            web.get("/project", project),
            web.get("/health", health),
        ]
    )
    return app


@contextmanager
def asking(app: Any) -> Iterator[Ask]:
    with serving(app) as port:

        def ask(method: str, path: str, headers: Headers = ()) -> Answer:
            connection = HTTPConnection(PEER, port, timeout=10)
            try:
                connection.putrequest(method, path)
                for name, value in headers:
                    connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                told = {name.lower(): value for name, value in answer.getheaders()}
                return Answer(answer.status, told, answer.read())
            finally:
                connection.close()

        yield ask


@contextmanager
def serving(app: web.Application) -> Iterator[int]:
    """The port of 127.0.0.1 that an application listens on until the block ends."""
    told: Queue[tuple[asyncio.AbstractEventLoop, int] | BaseException] = Queue()
    ended = asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(app)
        try:
            await runner.setup()
            await web.TCPSite(runner, PEER, 0).start()
            told.put((asyncio.get_running_loop(), runner.addresses[0][1]))
            await ended.wait()
        except BaseException as error:
            told.put(error)
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    started = told.get(timeout=10)
    if isinstance(started, BaseException):
        raise started
    loop, port = started
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
