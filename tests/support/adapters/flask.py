"""Flask."""

from typing import Any

from flask import Flask

from coatcheck.flask import Coatcheck, current_principal
from coatcheck.verifier import Verifier
from support.adapters.wsgi import asking

__all__ = ["application", "asking"]


def application(verifier: Verifier) -> Flask:
    app = Flask(__name__)
    auth = Coatcheck(app, verifier)

    @app.route("/whoami", methods=["GET", "POST"])
    def whoami() -> dict[str, Any]:
        return {"key_id": current_principal.key_id, "method": current_principal.method}

    @app.get("/widgets")
    @auth.require("widgets:read")
    def widgets() -> dict[str, Any]:
        return {"key_id": current_principal.key_id}

    @app.get("/places/<place>")
    def one_place(place: str) -> dict[str, Any]:
        current_principal.require("read", resource=f"PLACE/{place}")
        return {}

    @app.get("/project")
    def project() -> dict[str, Any]:
        return {"project": current_principal.require_project()}

    @app.get("/health")
    @auth.public
    def health() -> dict[str, Any]:
        return {}

    return app
