"""The contract's application in Django: a ROOT_URLCONF."""

from django.http import HttpRequest, JsonResponse
from django.urls import path

from coatcheck.django import require_scopes


def whoami(request: HttpRequest) -> JsonResponse:
    principal = request.coatcheck
    return JsonResponse({"key_id": principal.key_id, "method": principal.method})


@require_scopes("widgets:read")
def widgets(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"key_id": request.coatcheck.key_id})


def place(request: HttpRequest, place_id: str) -> JsonResponse:
    request.coatcheck.require("read", resource=f"PLACE/{place_id}")
    return JsonResponse({})


def project(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"project": request.coatcheck.require_project()})


def health(_: HttpRequest) -> JsonResponse:
    return JsonResponse({})


urlpatterns = [
    path("whoami", whoami),
    path("widgets", widgets),
    path("places/<place_id>", place),
    path("project", project),
    path("health", health),
]
