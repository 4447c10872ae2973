"""Documents about the service: its metadata and its key set.

The metadata is the same at both well-known names.  It lists an authorization endpoint although
there is no such flow, because clients refuse the document otherwise, and no `scopes_supported`,
because clients would ask for all of them.

Source: RFC 8414 §2, §3 (metadata), RFC 7517 §5 and §8.5.2 (JWK set), RFC 9110 §13.1.2 (ETag).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coatcheck.durations import FEED_STALE, FEED_WINDOW, JWKS_MAX_AGE, TOKEN_LIFETIME
from coatcheck.server.catalog import Catalog
from coatcheck.server.signing import Ring, RingKeeper
from coatcheck.server.store import Store, StoreUnavailable

KEY_SET = "jwks.json"
COATCHECK = "coatcheck"
DOCUMENTS = ("oauth-authorization-server", "openid-configuration")

_AUTH_METHODS = ("client_secret_basic", "client_secret_post")
#: Both documents are public; web pages may read them, too.
_HEADERS = {
    "Cache-Control": f"public, max-age={JWKS_MAX_AGE}",
    "Access-Control-Allow-Origin": "*",
}


def paths_of(issuer: str, document: str) -> list[str]:
    """Where a well-known document is served.

    RFC 8414 §3 inserts the well-known part before the issuer's own path; OpenID Connect
    Discovery appends it.  An issuer without a path has one place.
    """
    path = urlsplit(issuer).path
    return list(dict.fromkeys((f"/.well-known/{document}{path}", f"{path}/.well-known/{document}")))


def metadata(
    issuer: str, grant_types: Sequence[str], signing_algorithms: Sequence[str]
) -> dict[str, object]:
    """The RFC 8414 document.  Every URL is built from the configured issuer alone."""
    return {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/oauth/token",
        "authorization_endpoint": f"{issuer}/oauth/authorize",
        "jwks_uri": f"{issuer}/.well-known/{KEY_SET}",
        "introspection_endpoint": f"{issuer}/oauth/introspect",
        "revocation_endpoint": f"{issuer}/oauth/revoke",
        "service_documentation": f"{issuer}/docs",
        "grant_types_supported": list(grant_types),
        "response_types_supported": [],
        "token_endpoint_auth_methods_supported": list(_AUTH_METHODS),
        "introspection_endpoint_auth_methods_supported": list(_AUTH_METHODS),
        "revocation_endpoint_auth_methods_supported": list(_AUTH_METHODS),
        # Only for parsers of OpenID Connect Discovery, which want them: there are no id tokens.
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": list(signing_algorithms),
    }


class MetadataEndpoint:
    """GET of the metadata, at any of its places."""

    def __init__(self, document: dict[str, object]) -> None:
        self._document = document

    async def __call__(self, request: Request) -> Response:
        return JSONResponse(self._document, headers=_HEADERS)


def current(ring: RingKeeper, store: Store) -> Ring:
    """The ring as it is now, or as last known while the database is away."""
    try:
        return ring.at(store.head())
    except StoreUnavailable:
        return ring.last_known


class CoatcheckEndpoint:
    """GET of what our own verifier needs beside the metadata."""

    def __init__(
        self,
        issuer: str,
        catalog: Catalog,
        feed_url: str,
        ring: RingKeeper,
        store: Store,
        clock: Callable[[], float],
    ) -> None:
        self._fixed: dict[str, object] = {
            "issuer": issuer,
            "revocations_endpoint": feed_url,
            "durations": {
                "token_lifetime": TOKEN_LIFETIME,
                "feed_window": FEED_WINDOW,
                "feed_stale": FEED_STALE,
            },
            "roles": {name: sorted(one.role.methods) for name, one in catalog.roles.items()},
            "resource_types": catalog.resource_shapes(),
            "api_key_header": catalog.api_key_header,
            "foreign_prefixes": list(catalog.foreign_prefixes),
        }
        self._ring = ring
        self._store = store
        self._clock = clock

    async def __call__(self, request: Request) -> Response:
        ring = current(self._ring, self._store)
        document = self._fixed | {"revocation_keys": ring.key_set(int(self._clock()), "feed")}
        # Not cached for long: a withdrawn feed key has to be missed soon.
        return JSONResponse(document, headers=_HEADERS | {"Cache-Control": "no-cache"})


class KeySetEndpoint:
    """GET of the key set: computed from the clock, and from memory while the database is away."""

    def __init__(
        self,
        ring: RingKeeper,
        store: Store,
        clock: Callable[[], float],
        max_age_s: int = JWKS_MAX_AGE,
    ) -> None:
        self._ring = ring
        self._store = store
        self._clock = clock
        self._headers = _HEADERS | {"Cache-Control": f"public, max-age={max_age_s}"}

    async def __call__(self, request: Request) -> Response:
        ring = current(self._ring, self._store)
        body = json.dumps(ring.key_set(int(self._clock()))).encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = self._headers | {"ETag": etag}
        known = ", ".join(request.headers.getlist("if-none-match"))
        if known.strip() == "*" or etag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/jwk-set+json")
