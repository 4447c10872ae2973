"""Where the time of a token request goes between the listener's call and its answer.

In this process, without the listener: what the server costs around it is in the ratios.  A
profiler makes calls look dearer than they are; the first figure is without.
"""

import asyncio
import cProfile
import io
import json
import os
import pstats
import time
from itertools import cycle, islice
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

from bench.references import PATH
from bench.targets import Deployment

if TYPE_CHECKING:
    from coatcheck.server.app import Service

_REQUESTS: Final = 5000
#: Requests in one turn of the event loop.
_A_TURN: Final = 4
_SHOWN: Final = 15
_OK: Final = 200


def report(deployment: Deployment) -> str:
    """The cost of a request and the functions that take most of it, as text."""
    os.environ.update(deployment.environment)
    # Imported here: a run without a profile does not load the service into this process.
    from coatcheck.server.app import create  # noqa: PLC0415

    with deployment.keys.open(encoding="utf-8") as lines:
        bodies = [_body(json.loads(line)) for line in lines]
    service = create()
    told: list[tuple[float, pstats.Stats]] = []

    async def run() -> None:
        await _requests(service, bodies)  # fills the caches
        began = time.process_time_ns()
        await _requests(service, bodies)
        us = (time.process_time_ns() - began) / 1000 / _REQUESTS
        profile = cProfile.Profile()
        profile.enable()
        await _requests(service, bodies)
        profile.disable()
        told.append((us, pstats.Stats(profile, stream=io.StringIO())))

    asyncio.run(run())
    us, stats = told[0]
    text = io.StringIO()
    stats.stream = text  # type: ignore[attr-defined]
    stats.strip_dirs().sort_stats("tottime").print_stats(_SHOWN)
    return f"{us:.1f} us per request without the profiler\n{text.getvalue()}"


def _body(made: dict[str, str]) -> bytes:
    form = {"grant_type": "client_credentials", "client_id": made["id"]}
    return urlencode(form | {"client_secret": made["key"]}).encode()


async def _requests(service: "Service", bodies: list[bytes]) -> None:
    for number, body in enumerate(islice(cycle(bodies), _REQUESTS)):
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "query_string": b"",
            "client": ("127.0.0.1", 50_000),
            "headers": [
                (b"host", b"127.0.0.1"),
                (b"content-type", b"application/x-www-form-urlencoded"),
                (b"content-length", b"%d" % len(body)),
            ],
        }
        reply = service.reply_now(scope, body)
        if reply is None or reply.status != _OK:
            raise RuntimeError("a request was not answered with a token")
        if number % _A_TURN == 0:
            # The event loop turns, as it does every few requests under load.
            await asyncio.sleep(0)
