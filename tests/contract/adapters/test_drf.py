"""What users of Django REST framework have beside the contract: its classes side by side."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.asgi import get_asgi_application
from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application
from django.test import Client, override_settings
from django.urls import path
from starlette.testclient import TestClient

from coatcheck import apikey, asgi, wsgi
from coatcheck.scope import MalformedScope
from coatcheck.verifier import Principal, Verifier, VerifierError
from support.adapters.django import MIDDLEWARE, asking, configure, overridden
from support.tokens import AUDIENCE, ISSUER, NOW, SetClock, a_principal, claims, key_set, signer

configure()  # REST framework reads the settings when it is imported.

# ruff: noqa: E402
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import (
    api_view,
    authentication_classes,
    permission_classes,
)
from rest_framework.exceptions import ValidationError
from rest_framework.permissions import (
    IsAdminUser,
    IsAuthenticated,
)
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.test import (
    APIRequestFactory,
    force_authenticate,
)
from rest_framework.throttling import UserRateThrottle
from rest_framework.views import APIView

from coatcheck.drf import CoatcheckAuthentication, HasScopes, exception_handler, require_scopes
from coatcheck.verifier.adapters.drf import ApiUser

METADATA = "/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{AUDIENCE}{METADATA}"'
API_KEY = apikey.make("ck_live")

Decorate = Callable[[Callable[..., Any]], Callable[..., Any]]


class Staff:
    is_authenticated = True
    is_staff = True
    pk = 1


class ByHeader(BaseAuthentication):  # type: ignore[misc]
    """Stands for any other class: as SessionAuthentication, it has no challenge."""

    def authenticate(self, request: Request) -> tuple[Staff, None] | None:
        return (Staff(), None) if "X-Staff" in request.headers else None


class Base(APIView):  # type: ignore[misc]
    authentication_classes: Any = (CoatcheckAuthentication,)
    permission_classes: Any = (require_scopes("widgets:read"),)

    def get(self, request: Request) -> Response:
        return Response({"user": str(request.user.pk), "query": request.query_params.urlencode()})

    post = get


class Twice(UserRateThrottle):  # type: ignore[misc]
    rate = "2/day"


def a_function(request: Request) -> Response:
    return Response({"user": request.auth.key_id})


scoped: Decorate = permission_classes([require_scopes("widgets:read")])
authenticated: Decorate = authentication_classes([CoatcheckAuthentication])
function = api_view(["GET"])(authenticated(scoped(a_function)))


class Seen(Base):
    def get(self, request: Request) -> Response:
        inner = request._request
        everything = f"{inner.META} {getattr(inner, 'scope', '')} {inner.GET} {request!r}"
        query = request.query_params.urlencode()
        return Response({"has_key": API_KEY in everything, "query": query})


class Failing(Base):
    permission_classes = (IsAuthenticated,)

    def get(self, request: Request) -> Response:
        if "invalid" in request.query_params:
            raise ValidationError({"name": ["no"]})
        request.auth.require("widgets:write")
        return Response()


def view(**attributes: Any) -> Callable[..., Any]:
    made: Any = type("Made", (Base,), attributes)
    shown: Callable[..., Any] = made.as_view()
    return shown


OURS_LAST = (ByHeader, CoatcheckAuthentication)
EITHER = (IsAdminUser | require_scopes("widgets:read"),)
WRONG_ORDER = (require_scopes("widgets:read") | IsAdminUser,)

urlpatterns = [
    path("widgets", view()),
    path("function", function),
    path("ours-last", view(authentication_classes=OURS_LAST)),
    path("either", view(authentication_classes=OURS_LAST, permission_classes=EITHER)),
    path("wrong-order", view(authentication_classes=OURS_LAST, permission_classes=WRONG_ORDER)),
    path("staff", view(permission_classes=(IsAdminUser,))),
    path("declared", view(permission_classes=(HasScopes,), required_scopes=["widgets:read"])),
    path("as-text", view(permission_classes=(HasScopes,), required_scopes="widgets:read")),
    path("undeclared", view(permission_classes=(HasScopes,))),
    path("stock", view(permission_classes=(IsAuthenticated,))),
    path("any-credential", view(permission_classes=(require_scopes(),))),
    path("throttled", view(throttle_classes=(Twice,))),
    path("seen", Seen.as_view()),
    path("failing", Failing.as_view()),
]


@pytest.fixture
def looked_up() -> list[str]:
    """API keys that the verifier was asked about."""
    return []


@pytest.fixture
def verifier(looked_up: list[str]) -> Iterator[Verifier]:
    def look_up(api_key: str) -> Principal:
        looked_up.append(api_key)
        return a_principal(api_key)

    with Verifier(
        ISSUER,
        AUDIENCE,
        feed=None,
        fetch=lambda _: key_set(),
        clock=SetClock(),
        check_api_key=look_up,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def settings(verifier: Verifier) -> Iterator[None]:
    """No middleware, and REST framework as it comes."""
    bare: dict[str, object] = {}
    with overridden(verifier, MIDDLEWARE=[], ROOT_URLCONF=__name__, REST_FRAMEWORK=bare):
        yield


@pytest.fixture
def client() -> Any:
    return Client()


def bearer(**changes: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {signer().token(claims(**changes))}"}


def is_problem(answer: Any, status: int, code: str) -> bool:
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    return (answer.json()["status"], answer.json()["type"]) == (status, "about:blank")


@pytest.mark.parametrize("path", ["/widgets", "/function", "/ours-last", "/declared", "/as-text"])
def test_a_refusal_is_complete_without_any_other_setting(client: Any, path: str) -> None:
    """REST framework itself would say 403 without a challenge where ours is not the first."""
    assert client.get(path, headers=bearer()).status_code == 200

    nothing = client.get(path)
    assert is_problem(nothing, 401, "missing_credentials")
    assert nothing.headers["www-authenticate"] == BARE
    narrow = client.get(path, headers=bearer(scope="other"))
    assert is_problem(narrow, 403, "insufficient_scope")
    assert narrow.headers["www-authenticate"].endswith('scope="widgets:read"')
    expired = client.get(path, headers=bearer(exp=NOW - 300))
    assert is_problem(expired, 401, "token_expired")
    assert 'error="invalid_token"' in expired.headers["www-authenticate"]


@pytest.mark.parametrize("accept", ["text/html", "application/json", "*/*"])
def test_whatever_a_client_accepts_it_gets_a_problem(client: Any, accept: str) -> None:
    """A browser, too: a login form would not help."""
    assert is_problem(
        client.get("/widgets", headers={"Accept": accept}), 401, "missing_credentials"
    )


def test_our_own_outage_says_when_to_come_back(client: Any) -> None:
    """503, and no challenge."""

    def fail(_: str) -> bytes:
        raise OSError

    with (
        Verifier(ISSUER, AUDIENCE, feed=None, fetch=fail) as away,
        override_settings(COATCHECK={"VERIFIER": away}),
    ):
        answer = client.get("/widgets", headers=bearer())

    assert is_problem(answer, 503, "issuer_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert "www-authenticate" not in answer.headers


def test_another_class_goes_on_where_nothing_of_ours_was_sent(client: Any) -> None:
    """Sessions beside API keys; but it has no scopes."""
    assert client.get("/either", headers={"X-Staff": "1"}).json()["user"] == "1"
    assert client.get("/either", headers=bearer()).json()["user"] == claims()["sub"]
    assert is_problem(client.get("/either"), 401, "missing_credentials")
    narrow = client.get("/either", headers=bearer(scope="other"))
    assert is_problem(narrow, 403, "insufficient_scope")
    for place in ("/ours-last", "/wrong-order"):
        staff = client.get(place, headers={"X-Staff": "1"})
        assert is_problem(staff, 401, "missing_credentials")


def test_bearer_and_basic_are_ours_and_other_schemes_are_not(client: Any) -> None:
    """A user name with a password is no API key, and is not handed on either."""
    basic = client.get("/widgets", headers={"Authorization": "Basic bWU6c2VjcmV0"})
    assert is_problem(basic, 401, "token_malformed")
    token = client.get("/widgets", headers={"Authorization": "Token theirs"})
    assert is_problem(token, 401, "missing_credentials")
    digest = client.get("/widgets", headers={"Authorization": 'Digest a="b", c="d"'})
    assert is_problem(digest, 401, "missing_credentials")


def test_a_bad_credential_is_refused_before_the_next_class_is_asked() -> None:
    """Else a revoked key would go unnoticed beside a cookie."""

    class Later(ByHeader):
        def authenticate(self, request: Request) -> tuple[Staff, None]:
            raise AssertionError

    made = view(authentication_classes=(CoatcheckAuthentication, Later))
    refused = made(APIRequestFactory().get("/", headers=bearer(exp=NOW - 300)))

    assert (refused.status_code, refused.data["code"]) == (401, "token_expired")


def test_a_principal_is_no_user_of_the_database(client: Any) -> None:
    """What asks for staff or permissions of models says no, and does not fail."""
    assert client.get("/staff", headers=bearer()).status_code == 403
    users: list[ApiUser] = []

    class Keeping(Base):
        def get(self, request: Request) -> Response:
            users.append(request.user)
            assert request.user is request.auth
            return Response()

    Keeping.as_view()(APIRequestFactory().get("/", headers=bearer()))
    (user,) = users

    assert isinstance(user, Principal)
    assert (str(user), user.pk, user.org_id) == (user.key_id, user.key_id, claims()["org_id"])
    assert (user.is_authenticated, user.is_anonymous, user.is_active) == (True, False, True)
    assert (user.is_staff, user.is_superuser) == (False, False)
    assert (user.has_perm("x.view_y"), user.has_perms(["x.view_y"])) == (False, False)


def test_without_scopes_any_credential_will_do(client: Any) -> None:
    """But one there must be."""
    assert client.get("/any-credential", headers=bearer(scope="other")).status_code == 200
    assert is_problem(client.get("/any-credential"), 401, "missing_credentials")


def test_throttles_count_by_api_key(client: Any) -> None:
    """Not by address: many callers may share one."""
    first, other = bearer(sub="key_throttled"), bearer(sub="key_other")
    counted = [client.get("/throttled", headers=first).status_code for _ in range(3)]

    assert counted == [200, 200, 429]
    assert client.get("/throttled", headers=other).status_code == 200


def test_a_view_that_declares_no_scopes_admits_nobody(client: Any) -> None:
    """Unknown means no."""
    with pytest.raises(ImproperlyConfigured, match="Made has no required_scopes"):
        client.get("/undeclared", headers=bearer())


def test_what_is_no_scope_is_told_at_import() -> None:
    """Not at the first request."""
    with pytest.raises(MalformedScope):
        require_scopes("widgets read@")


# The exception handler.


@pytest.fixture
def handling() -> Iterator[None]:
    handler = {"EXCEPTION_HANDLER": "coatcheck.drf.exception_handler"}
    with override_settings(REST_FRAMEWORK=handler):
        yield


@pytest.mark.usefixtures("handling")
def test_with_our_exception_handler_a_view_may_refuse_itself(client: Any) -> None:
    """`request.auth.require(…)` is the way for filters that depend on the path."""
    refused = client.get("/failing", headers=bearer(scope="other"))

    assert is_problem(refused, 403, "insufficient_scope")
    assert refused.headers["www-authenticate"].startswith(f"{BARE}, ")
    assert client.get("/failing", headers=bearer()).status_code == 200


@pytest.mark.usefixtures("handling")
def test_with_our_exception_handler_other_permissions_refuse_as_ours_do(client: Any) -> None:
    """Nobody is there, whichever class noticed."""
    assert is_problem(client.get("/stock"), 401, "missing_credentials")


@pytest.mark.usefixtures("handling")
def test_all_other_errors_stay_rest_frameworks_own(client: Any) -> None:
    """Those of the application, and of its methods."""
    invalid = client.get("/failing?invalid", headers=bearer())
    assert (invalid.status_code, invalid.json()) == (400, {"name": ["no"]})
    assert client.delete("/widgets", headers=bearer()).status_code == 405
    assert exception_handler(ZeroDivisionError(), {"request": None}) is None


def test_without_it_rest_framework_challenges_in_its_own_words(client: Any) -> None:
    """Where ours is the first class: our challenge, its body."""
    refused = client.get("/stock")

    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, BARE)
    assert refused.headers["content-type"] == "application/json"


def test_without_it_what_a_view_refuses_itself_is_an_error(client: Any) -> None:
    """REST framework knows no VerifierError.  Nobody gets in."""
    with pytest.raises(VerifierError):
        client.get("/failing", headers=bearer(scope="other"))


def test_negotiation_comes_before_authentication(client: Any) -> None:
    """REST framework's order: it needs a renderer for any answer of its own."""
    assert client.get("/widgets", headers={"Accept": "image/png"}).status_code == 406


def test_another_handler_can_read_a_refusal(client: Any) -> None:
    """Packages that shape errors alike ask every exception for its codes."""
    told: list[Any] = []

    def reading(exc: Any, _: Any) -> Response:
        told.append((exc.get_codes(), exc.get_full_details(), str(exc.status_code)))
        return Response({"mine": True}, status=exc.status_code)

    with override_settings(REST_FRAMEWORK={"EXCEPTION_HANDLER": reading}):
        answer = client.get("/widgets")

    message = "Send an access token: Authorization: Bearer TOKEN."
    details = {"message": message, "code": "missing_credentials"}
    assert told == [("missing_credentials", details, "401")]
    assert (answer.status_code, answer.json()) == (401, {"mine": True})


# Beside the middleware and the wrappers.


def test_behind_the_middleware_nothing_is_verified_twice(
    verifier: Verifier, looked_up: list[str]
) -> None:
    """And it answers what a view refuses, without our exception handler."""
    with override_settings(MIDDLEWARE=MIDDLEWARE):
        client = Client()
        assert client.get("/widgets", headers={"X-API-Key": API_KEY}).json()["user"] == "key_1"
        refused = client.get("/failing", headers={"X-API-Key": API_KEY})

    assert looked_up == [API_KEY, API_KEY]
    assert is_problem(refused, 403, "insufficient_scope")


def test_an_api_key_in_the_url_counts_only_behind_its_wrapper(looked_up: list[str]) -> None:
    """Alone it would be too late: middleware and access log have seen it."""
    url = f"/seen?a=1&api_key={API_KEY}"
    over_wsgi, over_asgi = get_wsgi_application(), get_asgi_application()
    with asking(over_wsgi) as ask, asking(wsgi.allow_api_key_query(over_wsgi)) as ask_behind:
        refused, admitted = ask("GET", url), ask_behind("GET", url)
    assert (refused.status, refused.document["code"]) == (401, "missing_credentials")
    assert (admitted.status, admitted.document) == (200, {"has_key": False, "query": "a=1"})
    assert TestClient(over_asgi).get(url).json()["code"] == "missing_credentials"
    behind = TestClient(asgi.allow_api_key_query(over_asgi)).get(url)
    assert (behind.status_code, behind.json()) == (200, {"has_key": False, "query": "a=1"})
    assert behind.headers["cache-control"] == "private"
    assert looked_up == [API_KEY, API_KEY]


def test_an_ignored_api_key_in_the_url_is_hidden_all_the_same(client: Any) -> None:
    """It was sent by mistake, and error reports print the URL."""
    for answer in (
        client.get(f"/seen?a=1&api_key={API_KEY}", headers=bearer()),
        TestClient(get_asgi_application()).get(f"/seen?a=1&api_key={API_KEY}", headers=bearer()),
    ):
        assert answer.json() == {"has_key": False, "query": "a=1"}


def test_a_page_for_people_shows_who_is_calling() -> None:
    """REST framework's browsable API takes a Principal for a user."""
    templates = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
    with override_settings(TEMPLATES=templates, STATIC_URL="/static/"):
        page = Client().get("/widgets", headers={**bearer(), "Accept": "text/html"})

    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert str(claims()["sub"]) in page.text


def test_in_tests_a_principal_can_be_put_in_by_force() -> None:
    """REST framework's own way; no issuer is needed."""
    request = APIRequestFactory().get("/")
    force_authenticate(request, user=a_principal(""))

    assert Base.permission_classes[0]().has_permission(Base().initialize_request(request), None)


SNIPPET = """
from django.conf import settings
settings.configure(
    COATCHECK={
        "ISSUER": "https://auth.example.com", "AUDIENCE": "https://api.example.com", "FEED": None
    },
    REST_FRAMEWORK={"DEFAULT_AUTHENTICATION_CLASSES": ["coatcheck.drf.CoatcheckAuthentication"]},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
)
import django
django.setup()
from coatcheck.drf import require_scopes
from rest_framework.views import APIView
from rest_framework.response import Response
class Widgets(APIView):
    permission_classes = [require_scopes("widgets:read")]
    def get(self, request): return Response({"org": request.auth.org_id})
from django.test import RequestFactory
answer = Widgets.as_view()(RequestFactory().get("/")).render()
print(answer.status_code, answer["Content-Type"], answer["WWW-Authenticate"])
"""


def test_our_module_may_be_imported_before_rest_frameworks_views() -> None:
    """As sorted imports have it, while REST framework's settings name a class in it."""
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.split(" ", 2) == ["401", "application/problem+json", f"{BARE}\n"]
