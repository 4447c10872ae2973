"""Django REST framework: an authentication class and permission classes.

    COATCHECK = {"ISSUER": …, "AUDIENCE": …}
    REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["coatcheck.drf.CoatcheckAuthentication"]}

    class Widgets(APIView):
        permission_classes = [require_scopes("widgets:read")]  # request.auth is the Principal

A refusal is an APIException that brings its challenge, Retry-After and body along, whatever the
other authentication classes say and with REST framework's own exception handler.

An API key in the URL counts only where `allow_api_key_query` of `coatcheck.wsgi` or
`coatcheck.asgi` stands before the application, or CoatcheckMiddleware does.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from django.core.exceptions import ImproperlyConfigured
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import (
    APIException,
    NotAuthenticated,
)
from rest_framework.permissions import BasePermission
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.utils.encoders import JSONEncoder

from coatcheck.verifier import MissingCredentials, Principal, VerifierError
from coatcheck.verifier.adapters.django import gate, query_of, told_by
from coatcheck.verifier.adapters.gate import refusal, well_formed


@dataclass(frozen=True, slots=True)
class ApiUser(Principal):
    """A Principal with what Django and REST framework ask of `request.user`.

    Throttles count by `pk`.  It is no user of the database, so it is no staff, and has none of
    the permissions there.
    """

    is_anonymous: ClassVar = False
    is_active: ClassVar = True
    is_staff: ClassVar = False
    is_superuser: ClassVar = False

    @property
    def pk(self) -> str:
        return self.key_id

    def has_perm(self, _permission: str, _of: object = None) -> bool:
        return False

    def has_perms(self, _permissions: Collection[str], _of: object = None) -> bool:
        return False

    def __str__(self) -> str:
        return self.key_id


_FIELDS: Final = [field.name for field in fields(Principal)]


class CoatcheckAuthentication(BaseAuthentication):
    """`request.user` and `request.auth` are the Principal.

    Without a credential the next authentication class is asked.  A credential that is bad is
    refused at once.
    """

    def authenticate(self, request: Request) -> tuple[ApiUser, ApiUser] | None:
        inner = request._request  # noqa: SLF001  # its documented name
        principal = getattr(inner, "coatcheck", None)  # CoatcheckMiddleware was here.
        if principal is None:
            query, _ = query_of(inner)
            try:
                principal = gate().verifier.authenticate(query=query, **told_by(inner))
            except MissingCredentials:
                return None
            except VerifierError as error:
                raise refused(request, error) from error
        user = ApiUser(**{name: getattr(principal, name) for name in _FIELDS})
        return user, user

    def authenticate_header(self, _: Request) -> str | None:
        """Makes REST framework answer 401, not 403, if this is the first class of all."""
        return gate().own(MissingCredentials()).challenge


class HasScopes(BasePermission):
    """Only who holds all scopes that the view names in `required_scopes`.

    A refusal is raised, so that it is complete: in `IsAdminUser | HasScopes` it stands last.
    """

    scopes: ClassVar[Collection[str] | None] = None

    def has_permission(self, request: Request, view: Any) -> bool:
        scopes = getattr(view, "required_scopes", None) if self.scopes is None else self.scopes
        if scopes is None:
            # Unknown means no.
            raise ImproperlyConfigured(f"{type(view).__name__} has no required_scopes")
        error = refusal(request.user, [scopes] if isinstance(scopes, str) else scopes)
        if error is not None:
            raise refused(request, error)
        return True


def require_scopes(*scopes: str) -> type[HasScopes]:
    """A permission class: only who holds all these scopes; none: any credential will do.

    Raises:
        MalformedScope: a text is no scope.
    """
    return type("HasScopes", (HasScopes,), {"scopes": well_formed(scopes)})


def exception_handler(exc: Exception, context: Mapping[str, Any]) -> Response | None:
    """REST framework's own, which also answers what `request.auth.require(…)` refuses.

    For the setting EXCEPTION_HANDLER.  A permission class such as IsAuthenticated then refuses
    as ours do.
    """
    # It loads the authentication classes, and this module may be what names them.
    from rest_framework import views  # noqa: PLC0415

    request = context["request"]
    if isinstance(exc, VerifierError):
        exc = refused(request, exc)
    elif isinstance(exc, NotAuthenticated):
        first = next(iter(request.authenticators), None)
        if isinstance(first, CoatcheckAuthentication):
            exc = refused(request, MissingCredentials())
    response: Response | None = views.exception_handler(exc, context)
    return response


class Refused(APIException):
    """A VerifierError as REST framework's own exception handler understands it."""

    def __init__(self, error: VerifierError) -> None:
        self.error = error
        self.status_code = int(error.status)
        self.detail = error.problem()
        self.auth_header = error.challenge
        self.wait = error.retry_after_s

    def get_codes(self) -> str:
        return self.error.code

    def get_full_details(self) -> dict[str, str]:
        return {"message": self.error.detail, "code": self.error.code}


class ProblemRenderer(BaseRenderer):
    """RFC 9457, whatever the client accepts: it can read status and challenge in any case."""

    media_type = "application/problem+json"
    format = "json"
    charset = None

    def render(
        self, data: Any, _accepted: str | None = None, context: Mapping[str, Any] | None = None
    ) -> bytes:
        if context is not None:
            context["response"]["Cache-Control"] = "no-store"
        text: str = JSONEncoder().encode(data)
        return text.encode()


def refused(request: Request, error: VerifierError) -> Refused:
    """What to raise, in a request whose answer will be a problem."""
    request.accepted_renderer = ProblemRenderer()
    request.accepted_media_type = ProblemRenderer.media_type
    return Refused(gate().own(error))
