"""What Flask's users have beside the contract: views of all kinds, hooks, blueprints, config."""

from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from threading import Thread
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, current_app, request, stream_with_context
from flask.typing import ResponseReturnValue
from flask.views import MethodView
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server

from coatcheck import apikey
from coatcheck.flask import Coatcheck, current_principal
from coatcheck.scope import MalformedScope
from coatcheck.verifier import InsufficientScope, Verifier, VerifierError
from support.tokens import AUDIENCE, ISSUER, SetClock, a_principal, claims, key_set, signer

API_KEY = apikey.make("ck_live")
KEY_ID = claims()["sub"]
SETTINGS: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "feed": None}


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    with Verifier(
        **SETTINGS, fetch=lambda _: key_set(), clock=SetClock(), check_api_key=a_principal
    ) as verifier:
        yield verifier


@pytest.fixture
def app() -> Flask:
    return Flask("app")


@pytest.fixture
def auth(app: Flask, verifier: Verifier) -> Coatcheck:
    return Coatcheck(app, verifier, public=["/open/*"])


def sent(**changes: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {signer().token(claims(**changes))}"}


def code(app: Flask, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """The code of a refusal; or the status of any other answer."""
    answer = app.test_client().open(path, method=method, headers=headers)
    is_problem = answer.content_type == "application/problem+json"
    return answer.get_json()["code"] if is_problem else answer.status_code


def told() -> dict[str, str]:
    return {"key_id": current_principal.key_id}


def whose() -> Callable[[], dict[str, str]]:
    """A new view each time: what one test does with it matters to no other."""

    def view() -> dict[str, str]:
        return told()

    return view


class Whose(MethodView):
    def get(self) -> ResponseReturnValue:
        return told()


def of_function(app: Flask, auth: Coatcheck) -> None:
    app.get("/")(auth.require("widgets:read")(whose()))


def of_coroutine(app: Flask, auth: Coatcheck) -> None:
    async def view() -> ResponseReturnValue:
        return told()

    app.get("/")(auth.require("widgets:read")(view))


def of_method(app: Flask, auth: Coatcheck) -> None:
    class Widgets(MethodView):
        @auth.require("widgets:read")
        def get(self) -> ResponseReturnValue:
            return told()

    app.add_url_rule("/", view_func=Widgets.as_view("widgets"))


def of_async_method(app: Flask, auth: Coatcheck) -> None:
    class Widgets(MethodView):
        @auth.require("widgets:read")
        async def get(self) -> ResponseReturnValue:
            return told()

    app.add_url_rule("/", view_func=Widgets.as_view("widgets"))


def of_class(app: Flask, auth: Coatcheck) -> None:
    class Widgets(Whose):
        decorators = [auth.require("widgets:read")]  # noqa: RUF012 (as Flask's users write it)

    app.add_url_rule("/", view_func=Widgets.as_view("widgets"))


def of_bound_method(app: Flask, auth: Coatcheck) -> None:
    class Widgets(Whose):
        def get(self) -> ResponseReturnValue:
            return told()

    widgets = Widgets()
    app.add_url_rule("/", "widgets", auth.require("widgets:read")(widgets.get))


def of_blueprint(app: Flask, auth: Coatcheck) -> None:
    part = Blueprint("part", "part")
    part.get("/")(auth.require("widgets:read")(whose()))
    app.register_blueprint(part)


def of_whole_blueprint(app: Flask, auth: Coatcheck) -> None:
    part = Blueprint("part", "part")

    @part.before_request
    @auth.require("widgets:read")
    def gate() -> None:
        """Nothing else to ask."""

    part.get("/")(whose())
    app.register_blueprint(part)


def above_the_route(app: Flask, auth: Coatcheck) -> None:
    """The wrong way round, which Flask does not notice."""

    @auth.require("widgets:read")
    @app.get("/")
    def widgets() -> ResponseReturnValue:
        return told()


def above_another_one(app: Flask, auth: Coatcheck) -> None:
    @auth.require("widgets:read")
    @app.get("/")
    @auth.require("widgets:write")
    def widgets() -> ResponseReturnValue:
        return told()


VIEWS = {
    register.__name__: register
    for register in (
        of_function,
        of_coroutine,
        of_method,
        of_async_method,
        of_class,
        of_bound_method,
        of_blueprint,
        of_whole_blueprint,
        above_the_route,
        above_another_one,
    )
}


@pytest.mark.parametrize("register", VIEWS.values(), ids=VIEWS)
def test_scopes_are_asked_of_every_kind_of_view(
    app: Flask, auth: Coatcheck, register: Callable[[Flask, Coatcheck], None]
) -> None:
    """Functions, coroutines, methods, blueprints; below the route and above it."""
    register(app, auth)

    assert app.test_client().get("/", headers=sent()).get_json() == {"key_id": KEY_ID}
    assert code(app, "/", sent(scope="widgets:write")) == "insufficient_scope"
    assert code(app, "/") == "missing_credentials"


def test_the_same_view_may_need_different_scopes_on_different_routes(
    app: Flask, auth: Coatcheck
) -> None:
    """What a decorated view needs is its own."""
    view = whose()
    app.add_url_rule("/read", "read", auth.require("widgets:read")(view))
    app.add_url_rule("/write", "write", auth.require("widgets:write")(view))

    assert code(app, "/read", sent(scope="widgets:read")) == 200
    assert code(app, "/write", sent(scope="widgets:write")) == 200
    assert code(app, "/write", sent(scope="widgets:read")) == "insufficient_scope"


def test_several_scopes_are_all_needed_and_all_told(app: Flask, auth: Coatcheck) -> None:
    """RFC 6750 §3: the challenge names what to ask a token for."""
    app.get("/")(auth.require("widgets:read", "widgets:write")(whose()))
    refused = app.test_client().get("/", headers=sent(scope="widgets:read"))

    assert refused.status_code == 403
    assert 'scope="widgets:read widgets:write"' in refused.headers["WWW-Authenticate"]


def test_a_view_can_be_marked_public(app: Flask, auth: Coatcheck) -> None:
    """As a whole; and nobody is signed in there."""

    @app.get("/health")
    @auth.public
    def health() -> ResponseReturnValue:
        return {"is_somebody": bool(current_principal)}

    class Open(Whose):
        decorators = [auth.public]  # noqa: RUF012

        def get(self) -> ResponseReturnValue:
            return {}

    class Ajar(MethodView):
        @auth.public
        def get(self) -> ResponseReturnValue:
            return {}

    app.add_url_rule("/open", view_func=Open.as_view("open"))
    app.add_url_rule("/ajar", view_func=Ajar.as_view("ajar"))

    for headers in ({}, sent(), {"Authorization": "Bearer nonsense"}):
        answer = app.test_client().get("/health", headers=headers)
        assert answer.get_json() == {"is_somebody": False}
    assert code(app, "/open") == 200
    assert code(app, "/ajar") == "missing_credentials"


def test_a_function_that_is_public_somewhere_stays_closed_elsewhere(
    app: Flask, auth: Coatcheck
) -> None:
    """Fails closed: so it does above the route, which is too late for Flask."""
    app.testing = True
    view = whose()
    app.add_url_rule("/closed", "closed", view)
    auth.public(view)
    app.add_url_rule("/open", "open", auth.public(view))

    assert code(app, "/closed") == "missing_credentials"
    with pytest.raises(AttributeError, match="NoneType"):
        code(app, "/open")


def test_a_public_view_that_needs_a_scope_asks_for_a_credential(
    app: Flask, auth: Coatcheck
) -> None:
    """Two settings that contradict each other: the stricter one counts."""
    app.get("/")(auth.public(auth.require("widgets:read")(whose())))
    app.get("/open/widgets", endpoint="below")(auth.require("widgets:read")(whose()))

    assert code(app, "/") == "missing_credentials"
    assert code(app, "/open/widgets", sent()) == "missing_credentials"


def test_files_redirects_and_wrong_methods_are_behind_the_door(app: Flask, auth: Coatcheck) -> None:
    """What Flask answers without a view tells nothing to strangers."""
    app.get("/widgets/")(auth.public(whose()))

    assert code(app, "/static/app.js") == "missing_credentials"
    assert code(app, "/widgets") == "missing_credentials"
    assert code(app, "/widgets/", method="DELETE") == "missing_credentials"
    assert code(app, "/widgets", sent()) == 308


def test_a_preflight_can_be_answered_before(app: Flask, verifier: Verifier) -> None:
    """It carries no credential.  Flask calls hooks in the order of registration."""

    @app.before_request
    def preflight() -> Response | None:
        return current_app.make_default_options_response() if request.method == "OPTIONS" else None

    auth = Coatcheck(app, verifier)
    app.get("/")(auth.require("widgets:read")(whose()))

    assert code(app, "/", method="OPTIONS") == 200
    assert code(app, "/") == "missing_credentials"


def test_error_handlers_of_the_application_see_no_refusal(app: Flask, auth: Coatcheck) -> None:
    """One for everything would answer 500, or worse."""
    part = Blueprint("part", "part")

    @part.errorhandler(Exception)
    @app.errorhandler(Exception)
    def everything(_: Exception) -> ResponseReturnValue:
        return "sorry", 500

    part.get("/")(auth.require("widgets:read")(whose()))
    app.register_blueprint(part)

    assert code(app, "/") == "missing_credentials"
    assert code(app, "/", sent(scope="other")) == "insufficient_scope"


def test_errors_of_the_applications_own_making_are_answered_alike(
    app: Flask, auth: Coatcheck
) -> None:
    """With the challenge of this API."""

    class Paused(VerifierError):
        code = "paused"
        text = "Come back later."

    @app.get("/")
    def paused() -> ResponseReturnValue:
        raise Paused

    answer = app.test_client().get("/", headers=sent())

    assert (answer.status_code, answer.get_json()["code"]) == (401, "paused")
    assert f'realm="{AUDIENCE}"' in answer.headers["WWW-Authenticate"]


def test_an_answer_that_has_begun_cannot_be_taken_back(app: Flask, auth: Coatcheck) -> None:
    """Told on the page: it breaks off, and the server sees why."""

    @app.get("/")
    def stream() -> ResponseReturnValue:
        def parts() -> Iterator[str]:
            yield "so far"
            current_principal.require("admin")

        return Response(stream_with_context(parts()))

    with pytest.raises(InsufficientScope):
        app.test_client().get("/", headers=sent(), buffered=True)


def test_nobody_is_carried_over_to_the_next_request(app: Flask, auth: Coatcheck) -> None:
    """Requests within one application context share `flask.g`."""

    @app.get("/open/who")
    def who() -> ResponseReturnValue:
        return {"is_somebody": bool(current_principal)}

    app.get("/")(whose())
    with app.app_context():
        assert code(app, "/", sent()) == 200
        assert app.test_client().get("/open/who").get_json() == {"is_somebody": False}
        assert not current_principal
    assert not current_principal


QUERIES = {
    "alone": (f"api_key={API_KEY}", ""),
    "between others": (f"a=1&api_key={API_KEY}&b=%20+", "a=1&b=%20+"),
    "in another spelling": (f"%61pi_key={API_KEY}&a", "a"),
}


@pytest.mark.parametrize(("query", "left"), QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("path", ["/", "/open/", "/nowhere"])
def test_an_api_key_in_the_url_is_seen_by_nobody_behind(
    app: Flask, verifier: Verifier, path: str, query: str, left: str
) -> None:
    """It would end up in logs, traces and error reports: not even the earliest hook sees it."""
    seen: list[str] = []
    queries: list[str] = []

    def look(*_: object) -> None:
        queries.append(request.query_string.decode())
        told = (request.args, request.values, request.url, request.full_path, request.environ)
        seen.append(f"{told} {request}")

    app.url_value_preprocessor(look)
    app.before_request(look)
    Coatcheck(app, verifier, public=["/open/"])
    app.teardown_request(look)
    app.add_url_rule("/", "inside", dict)
    app.add_url_rule("/open/", "open", dict)

    answer = app.test_client().get(f"{path}?{query}")

    assert answer.status_code == (404 if path == "/nowhere" else 200)
    assert queries == [left] * 3
    assert API_KEY not in f"{seen}{answer.headers}"
    assert answer.headers["Cache-Control"] == "private"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_development_server_logs_the_url_as_it_came(
    app: Flask, auth: Coatcheck, caplog: pytest.LogCaptureFixture
) -> None:
    """Told on the page: it logs what it read, and not what it made of it."""
    app.add_url_rule("/open/", "open", dict)
    caplog.set_level("INFO", "werkzeug")
    server = make_server("127.0.0.1", 0, app)
    thread = Thread(target=server.handle_request)
    thread.start()
    try:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("GET", "/open/?api_key=anything")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        thread.join(5)
        server.server_close()

    assert "/open/?api_key=anything" in caplog.text


def test_an_address_that_a_middleware_found_counts(app: Flask, auth: Coatcheck) -> None:
    """werkzeug's ProxyFix, which many have already."""
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    app.get("/")(whose())
    bound = sent(must=["network"], cidrs=["203.0.113.0/24"])

    assert code(app, "/", bound | {"X-Forwarded-For": "203.0.113.7"}) == 200
    assert code(app, "/", bound | {"X-Forwarded-For": "198.51.100.7"}) == "ip_not_allowed"


def test_settings_are_read_from_the_configuration(app: Flask) -> None:
    """What is passed counts more."""
    app.config.update(
        COATCHECK_ISSUER="https://other.example",
        COATCHECK_AUDIENCE=AUDIENCE,
        COATCHECK_FEED=None,
        COATCHECK_PUBLIC=["/health"],
        COATCHECK_API_KEY="that of a caller is none of ours",
    )
    auth = Coatcheck(issuer=ISSUER)
    app.add_url_rule("/health", "health", dict)
    auth.init_app(app)

    status = app.extensions["coatcheck"].verifier.status()
    assert (status["issuer"], status["audiences"]) == (ISSUER, [AUDIENCE])
    assert status["feed"] is None
    assert code(app, "/health") == 200
    assert code(app, "/") == "missing_credentials"


def test_one_extension_serves_several_applications(verifier: Verifier) -> None:
    """Application factories make one for each test."""
    auth = Coatcheck(verifier=verifier)
    for app in (Flask("one"), Flask("two")):
        app.get("/")(auth.require("widgets:read")(whose()))
        auth.init_app(app)
        assert code(app, "/", sent()) == 200
        assert code(app, "/") == "missing_credentials"


def test_mistakes_are_told_when_the_application_is_built(app: Flask, verifier: Verifier) -> None:
    """Not at the first request."""
    with pytest.raises(ValueError, match="issuer"):
        Coatcheck(app, audience=AUDIENCE)
    with pytest.raises(ValueError, match="public"):
        Coatcheck(app, verifier, public="/health")
    with pytest.raises(ValueError, match="not both"):
        Coatcheck(app, verifier, leeway=5)
    auth = Coatcheck(app, verifier)
    with pytest.raises(ValueError, match="once"):
        auth.init_app(app)


def test_mistakes_in_a_decorator_are_told_at_import(auth: Coatcheck) -> None:
    """A mark on a class would count for its subclasses, or not at all."""
    with pytest.raises(MalformedScope):
        auth.require("widgets read@")
    with pytest.raises(TypeError, match="decorators"):
        auth.public(Whose)
    with pytest.raises(TypeError, match="decorators"):
        auth.require("widgets:read")(Whose)
