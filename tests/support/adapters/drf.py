"""Django REST framework, without our middleware: each view asks by itself."""

from collections.abc import Callable, Iterable
from typing import Any

from coatcheck.verifier import Verifier
from coatcheck.wsgi import allow_api_key_query
from support.adapters.django import asking, served

__all__ = ["application", "asking"]

URLS = "support.adapters.drf_urls"


def application(verifier: Verifier) -> Callable[..., Iterable[bytes]]:
    app: Any = served(verifier, MIDDLEWARE=[], ROOT_URLCONF=URLS)
    return allow_api_key_query(app)
