"""Authlib's ResourceProtector for Flask, with our validator."""

# Authlib publishes no types.
# mypy: disable-error-code="untyped-decorator"

from typing import Any

from authlib.integrations.flask_oauth2 import ResourceProtector, current_token
from flask import Flask

from coatcheck.authlib import CoatcheckBearerValidator, CoatcheckProtector
from coatcheck.flask import problem
from coatcheck.verifier import Verifier, VerifierError
from coatcheck.wsgi import allow_api_key_query
from support.adapters.wsgi import asking

__all__ = ["application", "asking"]


class Protector(CoatcheckProtector, ResourceProtector):  # type: ignore[misc]
    """As on its page."""


def application(verifier: Verifier) -> Flask:
    app = Flask(__name__)
    require_oauth = Protector()
    require_oauth.register_token_validator(CoatcheckBearerValidator(verifier))
    # For what `principal.require(…)` refuses; it is raised after Authlib's decorator.
    app.register_error_handler(VerifierError, problem)
    app.wsgi_app = allow_api_key_query(app.wsgi_app)  # type: ignore[method-assign, assignment]

    @app.route("/whoami", methods=["GET", "POST"])
    @require_oauth()
    def whoami() -> dict[str, Any]:
        return {"key_id": current_token.key_id, "method": current_token.method}

    @app.get("/widgets")
    @require_oauth("widgets:read")
    def widgets() -> dict[str, Any]:
        return {"key_id": current_token.key_id}

    @app.get("/places/<place>")
    @require_oauth()
    def one_place(place: str) -> dict[str, Any]:
        current_token.require("read", resource=f"PLACE/{place}")
        return {}

    @app.get("/project")
    @require_oauth()
    def project() -> dict[str, Any]:
        return {"project": current_token.require_project()}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {}

    @app.get("/.well-known/oauth-protected-resource")
    def metadata() -> dict[str, Any]:
        return verifier.protected_resource_metadata()

    return app
