"""FastAPI."""

from typing import Annotated

from fastapi import FastAPI, Security

from coatcheck.fastapi import Coatcheck, Principal, allow_api_key_query
from coatcheck.verifier import Verifier
from support.adapters.asgi import asking

__all__ = ["application", "asking"]


def application(verifier: Verifier) -> FastAPI:
    auth = Coatcheck(verifier=verifier)
    app = FastAPI(lifespan=auth.lifespan)
    app.add_middleware(allow_api_key_query)

    @app.api_route("/whoami", methods=["GET", "HEAD", "POST"])
    async def whoami(who: Annotated[Principal, Security(auth)]) -> dict[str, str]:
        return {"key_id": who.key_id, "method": who.method}

    @app.api_route("/widgets", methods=["GET", "HEAD"])
    async def widgets(
        who: Annotated[Principal, Security(auth, scopes=["widgets:read"])],
    ) -> dict[str, str]:
        return {"key_id": who.key_id}

    @app.get("/places/{id}")
    def place(id: str, who: Annotated[Principal, Security(auth)]) -> dict[str, str]:  # noqa: A002
        who.require("read", resource=f"PLACE/{id}")
        return {}

    @app.get("/project")
    async def project(who: Annotated[Principal, Security(auth)]) -> dict[str, str]:
        return {"project": who.require_project()}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    return app
