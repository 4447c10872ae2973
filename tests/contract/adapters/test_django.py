"""What Django's users have beside the contract: views of all kinds, settings, and ASGI."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.core.asgi import get_asgi_application
from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.django import require_scopes, well_known
from coatcheck.scope import MalformedScope
from coatcheck.verifier import Verifier
from coatcheck.verifier.adapters.django import gate
from support.adapters.django import overridden
from support.adapters.wsgi import asking
from support.tokens import AUDIENCE, ISSUER, SetClock, a_principal, claims, key_set, signer

METADATA = "/.well-known/oauth-protected-resource"
BARE = f'Bearer realm="{AUDIENCE}", resource_metadata="{AUDIENCE}{METADATA}"'
API_KEY = apikey.make("ck_live")
PUBLIC = ["/health", "/assets/*", "/open/widgets"]

scoped: Callable[[Any], Any] = method_decorator(require_scopes("widgets:read"))


@require_scopes("widgets:read")
def widgets(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"key_id": request.coatcheck.key_id})


@require_scopes("widgets:read")
async def async_widgets(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"key_id": request.coatcheck.key_id})


class ClassWidgets(View):  # type: ignore[misc]
    @scoped
    def get(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"key_id": request.coatcheck.key_id})


class AsyncClassWidgets(View):  # type: ignore[misc]
    @scoped
    async def get(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"key_id": request.coatcheck.key_id})


@method_decorator(require_scopes("widgets:read"), name="dispatch")
class AsyncDispatchedWidgets(View):  # type: ignore[misc]
    async def get(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"key_id": request.coatcheck.key_id})


async def async_place(request: HttpRequest, place_id: str) -> HttpResponse:
    request.coatcheck.require("read", resource=f"PLACE/{place_id}")
    return JsonResponse({})


async def seen(request: HttpRequest) -> HttpResponse:
    """What a view can see of its URL."""
    everything = f"{request.META} {getattr(request, 'scope', '')} {request.GET}"
    return JsonResponse(
        {
            "GET": request.GET.urlencode(),
            "url": request.get_full_path(),
            "has_key": API_KEY in everything,
        }
    )


def ordinary(request: HttpRequest) -> HttpResponse:
    """One that knows nothing of Coatcheck."""
    principal = request.coatcheck
    who = None if principal is None else principal.key_id
    return JsonResponse({"who": who, "has_user": hasattr(request, "user")})


def failing(_: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


urlpatterns = [
    path("widgets", widgets),
    path("widgets/async", async_widgets),
    path("widgets/class", ClassWidgets.as_view()),
    path("widgets/async-class", AsyncClassWidgets.as_view()),
    path("widgets/dispatched", AsyncDispatchedWidgets.as_view()),
    path("open/widgets", widgets),
    path("places/<place_id>", async_place),
    path("seen", seen),
    path("ordinary", ordinary),
    path("exempt", csrf_exempt(ordinary)),
    path("health", ordinary),
    path("assets/<path:name>", lambda request, name: ordinary(request)),
    path("failing", failing),
    path("", include(well_known)),
]


def looking_early(get_response: Any) -> Any:
    """A middleware that reads the query before anybody else."""

    def middleware(request: HttpRequest) -> Any:
        assert request.GET is not None
        return get_response(request)

    return middleware


def refusing(_: Any) -> Any:
    """A middleware that asks a Principal."""

    def middleware(request: HttpRequest) -> Any:
        request.coatcheck.require("widgets:delete")

    return middleware


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    with Verifier(
        ISSUER,
        AUDIENCE,
        feed=None,
        fetch=lambda _: key_set(),
        clock=SetClock(),
        check_api_key=a_principal,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def settings(verifier: Verifier) -> Iterator[None]:
    told = {"VERIFIER": verifier, "PUBLIC": PUBLIC}
    with overridden(verifier, ROOT_URLCONF=__name__, COATCHECK=told):
        yield


def over_asgi() -> TestClient:
    return TestClient(get_asgi_application())


@pytest.fixture(params=["wsgi", "asgi"])
def client(request: pytest.FixtureRequest) -> Any:
    return Client() if request.param == "wsgi" else over_asgi()


def bearer(**changes: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {signer().token(claims(**changes))}"}


VIEWS = [route.pattern._route for route in urlpatterns if "widgets" in str(route.pattern)]


@pytest.mark.parametrize("view", [view for view in VIEWS if not view.startswith("open")])
def test_scopes_are_asked_of_every_kind_of_view(client: Any, view: str) -> None:
    """Functions and methods, sync and async, under WSGI and ASGI."""
    admitted = client.get(f"/{view}", headers=bearer())
    refused = client.get(f"/{view}", headers=bearer(scope="other"))

    assert admitted.json() == {"key_id": claims()["sub"]}
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
    assert 'scope="widgets:read"' in refused.headers["www-authenticate"]
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["content-length"] == str(len(refused.content))


def test_what_an_async_view_refuses_itself_is_answered_alike(client: Any) -> None:
    """`request.coatcheck.require(…)` is the way for filters that depend on the path."""
    assert client.get("/places/1", headers=bearer(scope="read@PLACE/1")).status_code == 200
    refused = client.get("/places/2", headers=bearer(scope="read@PLACE/1"))

    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
    assert refused.headers["www-authenticate"].startswith(BARE)


def test_what_other_middleware_refuses_is_an_error(client: Any) -> None:
    """Django hands only exceptions of views to a middleware.  Nobody gets in."""
    inner = ["coatcheck.django.CoatcheckMiddleware", f"{__name__}.refusing"]
    with override_settings(MIDDLEWARE=inner):
        bare: Any = Client(raise_request_exception=False)
        if not isinstance(client, Client):
            bare = TestClient(over_asgi().app, raise_server_exceptions=False)
        assert bare.get("/ordinary", headers=bearer()).status_code == 500


def test_without_a_credential_only_public_paths_are_open(client: Any) -> None:
    """Also a path that leads nowhere is closed."""
    for public in ("/health", "/assets/app.css"):
        assert client.get(public).json()["who"] is None
    for closed in ("/ordinary", "/health/", "/assets/../ordinary", "/nowhere", "/"):
        refused = client.get(closed)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, BARE)


def test_a_scope_on_a_public_path_asks_for_a_credential(client: Any) -> None:
    """Two settings that contradict each other: the stricter one counts."""
    refused = client.get("/open/widgets")

    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, BARE)


def test_the_metadata_document_is_served_for_get_only(client: Any, verifier: Verifier) -> None:
    """RFC 9728 §3.  Everything else there belongs to the application, behind the door."""
    assert client.get(METADATA).json() == verifier.protected_resource_metadata()
    assert client.head(METADATA).status_code == 200
    assert client.post(METADATA).status_code == 401


def test_without_the_middleware_its_urls_can_be_included(client: Any, verifier: Verifier) -> None:
    """At the path that the audience has, and at no other."""
    with override_settings(MIDDLEWARE=[]):
        bare: Any = Client() if isinstance(client, Client) else over_asgi()
        assert bare.get(METADATA).json() == verifier.protected_resource_metadata()
        assert bare.get(f"{METADATA}/elsewhere").status_code == 404
        assert bare.post(METADATA).status_code == 404


def test_djangos_own_user_is_left_alone(client: Any) -> None:
    """The admin site and its sessions go on as they are."""
    assert client.get("/ordinary", headers=bearer()).json()["has_user"] is False


def test_two_authorization_headers_are_refused() -> None:
    """Django joins them by a comma; under ASGI they are read before it does."""
    token = bearer()["Authorization"]
    twice = [("Authorization", token), ("Authorization", token)]

    for refused in (
        over_asgi().get("/ordinary", headers=twice),
        Client().get("/ordinary", headers={"Authorization": f"{token},{token}"}),
    ):
        assert (refused.status_code, refused.json()["code"]) == (400, "multiple_credentials")


def test_under_asgi_a_comma_in_a_header_is_no_second_one() -> None:
    """Of another scheme, it is no credential of ours."""
    refused = over_asgi().get("/ordinary", headers={"Authorization": 'Digest a="b", c="d"'})

    assert (refused.status_code, refused.json()["code"]) == (401, "missing_credentials")


def test_an_answer_to_head_has_no_body_on_any_server() -> None:
    """Django leaves that to the server, and test clients hide it."""
    app = get_wsgi_application()
    with asking(app) as ask:
        for place in ("/ordinary", METADATA):
            whole, head = ask("GET", place), ask("HEAD", place)
            assert head.body == b""
            assert head.headers == whole.headers
            assert head.headers["content-length"] == str(len(whole.body))


QUERIES = {
    "alone": (f"api_key={API_KEY}", ""),
    "between others": (f"a=1&api_key={API_KEY}&b=%20", "a=1&b=%20"),
    "in another spelling": (f"%61pi_key={API_KEY}&a=1", "a=1"),
    "twice": (f"api_key={API_KEY}&api_key={API_KEY}", ""),
}


@pytest.mark.parametrize(("query", "left"), QUERIES.values(), ids=QUERIES)
def test_an_api_key_in_the_url_is_seen_by_nobody_behind(client: Any, query: str, left: str) -> None:
    """It would end up in logs, traces and error reports; and no shared cache keeps the answer."""
    answer = client.get(f"/seen?{query}")

    assert answer.json()["url"] == f"/seen?{left}".rstrip("?")
    assert answer.json()["GET"] == left.replace("%20", "+")
    assert answer.json()["has_key"] is False
    assert API_KEY not in f"{answer.text}{answer.headers}"
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_also_if_somebody_looked_before(client: Any, verifier: Verifier) -> None:
    """Django keeps what it once read of a query."""
    early = [f"{__name__}.looking_early", "coatcheck.django.CoatcheckMiddleware"]
    with override_settings(MIDDLEWARE=early):
        bare: Any = Client() if isinstance(client, Client) else over_asgi()
        answer = bare.get(f"/seen?a=1&api_key={API_KEY}")

    assert (answer.json()["GET"], answer.json()["has_key"]) == ("a=1", False)


def test_the_query_of_a_public_path_is_the_applications_own(client: Any) -> None:
    """Nothing there is a credential of ours: a parameter of the same name may be one of theirs."""
    with override_settings(COATCHECK={"VERIFIER": gate().verifier, "PUBLIC": ["/seen"]}):
        answer = client.get("/seen?api_key=theirs")

    assert answer.json()["GET"] == "api_key=theirs"
    assert "referrer-policy" not in answer.headers


def test_a_debug_page_shows_no_secret(client: Any, verifier: Verifier) -> None:
    """It prints the request, the settings, and local variables of all that were called."""
    service_key, old_key = apikey.make("ck_live"), apikey.make("ck_live")
    told = {"VERIFIER": verifier, "NOTE": {"SERVICE_KEY": service_key}}
    with override_settings(DEBUG=True, NOTE=told):
        if isinstance(client, Client):
            client.raise_request_exception = False
        else:
            client = TestClient(client.app, raise_server_exceptions=False)
        page = client.get(f"/failing?api_key={API_KEY}", headers={"X-API-Key": API_KEY})
        other = client.get("/failing", headers={"X-API-Key": old_key})

    assert (page.status_code, other.status_code) == (500, 500)
    assert "ZeroDivisionError" in page.text
    for secret in (API_KEY, old_key, service_key):
        assert secret not in page.text + other.text


def test_nothing_is_adapted_between_threads_and_the_event_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Django says so itself where it has to: each hop costs more than the whole check."""
    caplog.set_level(logging.DEBUG, "django.request")
    # Else the start of an application sets the level anew.
    with override_settings(DEBUG=True, LOGGING_CONFIG=None):
        assert over_asgi().get("/widgets/async", headers=bearer()).status_code == 200
        assert Client().get("/widgets", headers=bearer()).status_code == 200
        early = [f"{__name__}.looking_early", "coatcheck.django.CoatcheckMiddleware"]
        assert "adapted" not in caplog.text
        with override_settings(MIDDLEWARE=early):
            over_asgi()

    assert "adapted" in caplog.text


def test_forms_of_browsers_stay_protected_from_other_sites() -> None:
    """A credential in a request says nothing about the cookies beside it."""
    both = ["django.middleware.csrf.CsrfViewMiddleware", "coatcheck.django.CoatcheckMiddleware"]
    with override_settings(MIDDLEWARE=both):
        client = Client(enforce_csrf_checks=True)
        assert client.post("/ordinary", headers=bearer()).status_code == 403
        assert client.post("/exempt", headers=bearer()).status_code == 200


# Settings.


def test_settings_are_the_verifiers_own_in_upper_case() -> None:
    """Whatever a Verifier takes."""
    told = {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "REALM": "widgets", "FEED": None}
    with override_settings(COATCHECK=told):
        refused = Client().get("/ordinary")

    assert refused.headers["www-authenticate"].startswith('Bearer realm="widgets"')


WRONG = {
    "nothing": ({}, "issuer is missing"),
    "a typo": ({"ISUER": ISSUER, "AUDIENCE": AUDIENCE}, "isuer"),
    "one path as text": ({"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "PUBLIC": "/"}, "as a list"),
    "no such look-up": (
        {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "CHECK_API_KEY": "nowhere.at_all"},
        "nowhere",
    ),
}


@pytest.mark.parametrize(("told", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_the_settings_is_told_when_the_application_is_built(
    told: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first request."""
    monkeypatch.delenv("COATCHECK_ISSUER", raising=False)
    with (
        override_settings(COATCHECK=told),
        pytest.raises(ImproperlyConfigured, match=f"COATCHECK.*{said}"),
    ):
        over_asgi()


def test_a_look_up_of_old_keys_is_named_by_its_path() -> None:
    """Settings are read before models can be imported."""
    told = {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "FEED": None}
    with override_settings(COATCHECK={**told, "CHECK_API_KEY": "support.tokens.a_principal"}):
        answer = Client().get("/ordinary", headers={"X-API-Key": API_KEY})

    assert answer.json()["who"] == "key_1"


def test_there_is_one_verifier_until_the_settings_change(verifier: Verifier) -> None:
    """It remembers tokens, and follows a feed."""
    assert gate().verifier is verifier
    with override_settings(COATCHECK={"ISSUER": ISSUER, "AUDIENCE": AUDIENCE}):
        other = gate()
        assert other.verifier is not verifier
        with override_settings(LANGUAGE_CODE="fr"):
            assert gate() is other
    assert gate().verifier is verifier


def test_threads_that_come_first_make_one_together() -> None:
    """REST framework asks for it at the first request."""
    start = threading.Barrier(4)

    class Slow(dict[str, str]):
        def items(self) -> Any:
            time.sleep(0.02)
            return super().items()

    def first(_: int) -> object:
        start.wait(timeout=10)
        return gate()

    with (
        override_settings(COATCHECK=Slow(ISSUER=ISSUER, AUDIENCE=AUDIENCE)),
        ThreadPoolExecutor(4) as threads,
    ):
        assert len(set(threads.map(first, range(4)))) == 1


def test_mistakes_with_the_decorator_are_told() -> None:
    """At import, or with what to do."""
    with pytest.raises(MalformedScope):
        require_scopes("widgets read@")
    with pytest.raises(ImproperlyConfigured, match="CoatcheckMiddleware"):
        widgets(RequestFactory().get("/"))
