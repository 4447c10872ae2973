"""Django, asked as a WSGI application.

Settings are one per process: they are configured once, for this harness and that of REST
framework; what differs is overridden for the time of a request.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.test import override_settings

from coatcheck.verifier import Verifier
from support.adapters import wsgi
from support.adapters.harness import Answer, Ask, Headers

MIDDLEWARE: Final = ["coatcheck.django.CoatcheckMiddleware"]
URLS: Final = "support.adapters.django_urls"


def configure() -> None:
    """Once per process; without a database."""
    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            # Django's error pages ask for one; nothing here signs anything.
            SECRET_KEY="no secret",
            INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "rest_framework"],
            REST_FRAMEWORK={
                "DEFAULT_AUTHENTICATION_CLASSES": ["coatcheck.drf.CoatcheckAuthentication"],
                "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
                "EXCEPTION_HANDLER": "coatcheck.drf.exception_handler",
            },
        )
        django.setup()


def overridden(verifier: Verifier, **changes: Any) -> Any:
    """Settings for the time of a `with` block."""
    configure()
    coatcheck = {"VERIFIER": verifier, "PUBLIC": ["/health"]}
    return override_settings(
        **{"COATCHECK": coatcheck, "MIDDLEWARE": MIDDLEWARE, "ROOT_URLCONF": URLS, **changes}
    )


def served(verifier: Verifier, **changes: Any) -> Callable[..., Iterable[bytes]]:
    """A WSGI application with these settings."""
    with overridden(verifier, **changes):
        handler = get_wsgi_application()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        with overridden(verifier, **changes):
            answer: Iterable[bytes] = handler(environ, start_response)
            return answer

    return app


def application(verifier: Verifier) -> Callable[..., Iterable[bytes]]:
    return served(verifier)


@contextmanager
def asking(app: Any) -> Iterator[Ask]:
    with wsgi.asking(app) as inner:

        def ask(method: str, path: str, headers: Headers = ()) -> Answer:
            answer = inner(method, path, headers)
            # Django leaves it to the server to send no body then.
            body = b"" if method == "HEAD" else answer.body
            return Answer(answer.status, answer.headers, body)

        yield ask
