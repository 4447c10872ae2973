"""An API that takes Coatcheck's tokens and raw API keys: three routes, one line of protection.

Run it beside the service, with an API key of its own that has the scope coatcheck:resource-server:

    COATCHECK_ISSUER=http://127.0.0.1:8000 COATCHECK_AUDIENCE=http://127.0.0.1:8001 \
        COATCHECK_SERVICE_KEY=ck_live_… \
        uvicorn --app-dir examples resource_server:app --port 8001
"""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from coatcheck.starlette import CoatcheckMiddleware, Principal, require_scopes


async def home(request: Request) -> JSONResponse:
    """Open to everybody."""
    return JSONResponse({"routes": ["/widgets", "/whoami"]})


async def whoami(request: Request) -> JSONResponse:
    """Who is calling, whichever credential was sent."""
    caller: Principal = request.user
    told = {"key": caller.key_id, "org": caller.org_id, "sent": caller.method}
    return JSONResponse(told | {"claims": dict(caller.claims)})


@require_scopes("widgets:read")
async def widgets(request: Request) -> JSONResponse:
    """What only callers with this scope see."""
    return JSONResponse({"org": request.user.org_id, "widgets": ["cog", "sprocket"]})


app = Starlette(
    routes=[Route("/", home), Route("/whoami", whoami), Route("/widgets", widgets)],
    # Issuer, audience and service key come from COATCHECK_ISSUER, _AUDIENCE and _SERVICE_KEY.
    middleware=[Middleware(CoatcheckMiddleware, public=["/"])],
)
