"""What all adapters do alike: what is open, where the metadata is, and what an answer carries.

An adapter reads a request in its framework's form, asks the verifier, and writes the answer in
its framework's form.  This module knows nothing of frameworks.

Source: RFC 9728 §3 (resource metadata), RFC 9111 §5.2.2.7 (private).
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from coatcheck.scope import Scopes
from coatcheck.verifier import MissingCredentials, Principal, Verifier, VerifierError

#: Where in an ASGI scope or a WSGI environment a SentQuery is.
QUERY: Final = "coatcheck.query"

#: A segment that leads elsewhere in a file system: what is behind may resolve it.
_DOTS: Final = frozenset(("", ".", ".."))


@dataclass(frozen=True, slots=True)
class SentQuery:
    """The query string as it was sent, where an API key in it is welcome.

    Only an adapter looks into it: error reports and debug pages show what is around it.
    """

    text: bytes = field(repr=False)


class Gate:
    """A verifier before an application, and which paths need no credential.

    Args:
        verifier: a Verifier; or None, and its settings.
        public: paths that are open to everybody, compared as a whole; one that ends in `/*` opens
            everything below it.
        settings: as for Verifier.

    Raises:
        ValueError: a setting is missing or unfit; the message says what to set.
    """

    def __init__(
        self, verifier: Verifier | None, public: Collection[str], settings: dict[str, Any]
    ) -> None:
        if isinstance(public, str):
            raise ValueError("public: several paths, as a list")  # noqa: TRY004
        if verifier is not None and settings:
            raise ValueError("pass a verifier or the settings of one, not both")
        self.verifier = Verifier(**settings) if verifier is None else verifier
        self._paths = frozenset(path for path in public if not path.endswith("/*"))
        self._below = tuple(path[:-1] for path in public if path.endswith("/*"))
        url = self.verifier.resource_metadata_url
        #: Where RFC 9728 wants the document; None: the audience is no URL.
        self.metadata_path = None if url is None else urlsplit(url).path

    def is_public(self, path: str) -> bool:
        """Whether a path, decoded and without a query, is open to everybody."""
        if path in self._paths:
            return True
        if not self._below or not path.startswith(self._below):
            return False
        # The last segment may be empty: `/static/` lies below `/static/*`.
        *segments, last = path.split("/")[1:]
        return _DOTS.isdisjoint(segments) and last not in (".", "..") and "\\" not in path

    def asks_for_metadata(self, method: str, path: str) -> bool:
        """Whether a request is one for the RFC 9728 document."""
        return path == self.metadata_path and method in ("GET", "HEAD")

    def metadata(self) -> bytes:
        """The RFC 9728 document, as JSON."""
        return json.dumps(self.verifier.protected_resource_metadata()).encode()

    def own(self, error: VerifierError) -> VerifierError:
        """The same error; one that was made by the application gets this API's challenge."""
        if error.protection == VerifierError.protection:
            error.protection = self.verifier.protection
        return error


def settings_of(
    issuer: str | None, audience: str | Sequence[str] | None, others: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a Verifier, of which the first two may be left to the environment."""
    named = {"issuer": issuer, "audience": audience}
    return {name: value for name, value in named.items() if value is not None} | others


def refusal(principal: object, scopes: Iterable[str]) -> VerifierError | None:
    """Why somebody may not go on where these scopes are needed; None: they may.

    Args:
        principal: whoever signed in; anything but a Principal is nobody.
        scopes: texts of one or more scope-tokens.
    """
    if not isinstance(principal, Principal):
        return MissingCredentials()
    try:
        principal.require(*(token for scope in scopes for token in scope.split()))
    except VerifierError as refused:
        return refused
    return None


def well_formed(scopes: Iterable[str]) -> tuple[str, ...]:
    """The same scopes.  Raises MalformedScope: a mistake in the code that names them."""
    named = tuple(scopes)
    for scope in named:
        Scopes.parse(scope)
    return named


def kept_private(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers of an answer whose URL held an API key.

    No shared cache keeps the answer under that URL, and no page hands the URL on.  Where nothing
    may be stored at all, it stays so.
    """
    kept = [(name, value) for name, value in headers if name.lower() != "referrer-policy"]
    cached = [value.lower() for name, value in kept if name.lower() == "cache-control"]
    if not any("no-store" in value for value in cached):
        kept = [(name, value) for name, value in kept if name.lower() != "cache-control"]
        kept.append(("Cache-Control", "private"))
    return [*kept, ("Referrer-Policy", "no-referrer")]
