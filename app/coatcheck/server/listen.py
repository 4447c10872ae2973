"""Listening: uvicorn with the options that this service needs.

Proxy headers are uvicorn's no more than ours: the client's address is worked out in one place,
`coatcheck.client_address`.  There is no access log: a URL may hold what somebody put there by
mistake.
"""

import logging
import socket
from typing import Any, Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

_BACKLOG: Final = 2048
#: Seconds that requests under way get when the service stops.
_GRACE: Final = 5
#: Set up again in each worker, which starts as a new process.
_LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "%(asctime)s %(levelname)s %(name)s [%(process)d] %(message)s"}
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything else so that a taken port is told at once.

    Raises:
        OSError: the address cannot be listened on.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(True)
    return bound


def run(bound: socket.socket, *, workers: int) -> int:
    """Serve until a signal says stop.

    Returns:
        0 if it served, else 1.
    """
    config = uvicorn.Config(
        "coatcheck.server.app:create",
        factory=True,
        workers=workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        log_config=_LOGGING,
    )
    host, port = bound.getsockname()[:2]
    logging.getLogger(__name__).info("listening on http://%s:%d", host, port)
    if workers == 1:
        server = uvicorn.Server(config)
        server.run(sockets=[bound])
        return 0 if server.started else 1
    supervisor = Multiprocess(config, sockets=[bound])
    supervisor.run()
    # The supervisor ends in peace even when its workers could not start.
    failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    return 1 if failed else 0
