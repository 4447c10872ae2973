"""The contract's application in Django REST framework: a ROOT_URLCONF."""

from typing import Any

from django.urls import include, path
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from coatcheck.django import well_known
from coatcheck.drf import HasScopes, require_scopes


class WhoAmI(APIView):  # type: ignore[misc]
    def get(self, request: Request) -> Response:
        return Response({"key_id": request.auth.key_id, "method": request.auth.method})

    post = get


class Widgets(APIView):  # type: ignore[misc]
    permission_classes = (require_scopes("widgets:read"),)

    def get(self, request: Request) -> Response:
        return Response({"key_id": request.auth.key_id})


class DeclaredWidgets(Widgets):
    permission_classes = (HasScopes,)
    required_scopes: Any = ("widgets:read",)


class Place(APIView):  # type: ignore[misc]
    def get(self, request: Request, place_id: str) -> Response:
        request.auth.require("read", resource=f"PLACE/{place_id}")
        return Response({})


class Project(APIView):  # type: ignore[misc]
    def get(self, request: Request) -> Response:
        return Response({"project": request.auth.require_project()})


class Health(APIView):  # type: ignore[misc]
    authentication_classes = ()
    permission_classes = ()

    def get(self, _: Request) -> Response:
        return Response({})


urlpatterns = [
    path("whoami", WhoAmI.as_view()),
    path("widgets", Widgets.as_view()),
    path("widgets/declared", DeclaredWidgets.as_view()),
    path("places/<place_id>", Place.as_view()),
    path("project", Project.as_view()),
    path("health", Health.as_view()),
    path("", include(well_known)),
]
