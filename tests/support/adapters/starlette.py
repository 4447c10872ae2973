"""Starlette."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coatcheck.starlette import CoatcheckMiddleware, require_scopes
from coatcheck.verifier import Verifier
from support.adapters.asgi import asking

__all__ = ["application", "asking"]


async def whoami(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.key_id, "method": request.user.method})


@require_scopes("widgets:read")
async def widgets(request: Request) -> Response:
    return JSONResponse({"key_id": request.user.key_id})


async def place(request: Request) -> Response:
    request.user.require("read", resource=f"PLACE/{request.path_params['id']}")
    return JSONResponse({})


async def project(request: Request) -> Response:
    return JSONResponse({"project": request.user.require_project()})


async def health(_: Request) -> Response:
    return JSONResponse({})


def application(verifier: Verifier) -> Starlette:
    return Starlette(
        routes=[
            Route("/whoami", whoami, methods=["GET", "POST"]),
            Route("/widgets", widgets),
            Route("/places/{id}", place),
            Route("/project", project),
            Route("/health", health),
        ],
        middleware=[Middleware(CoatcheckMiddleware, verifier, public=["/health"])],
    )
