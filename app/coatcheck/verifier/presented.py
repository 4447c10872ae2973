"""Which credential a request carries: the places where one may stand, and its kind by form.

The project that a request names stands beside it, and so does what proxies say of its caller.

Nothing is verified here.  A kind is decided by form alone, and a credential that fails as one
kind is never tried as another.

Source: RFC 6750 §2.1 (Bearer) and §2.3 (query), RFC 7617 §2 (Basic), RFC 9110 §5.3 (repeats).
"""

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

from coatcheck import apikey
from coatcheck.token_profile import MAX_TOKEN_BYTES
from coatcheck.verifier import errors
from coatcheck.verifier.product import (
    API_KEY_HEADER,
    AUTHORIZATION,
    PROJECT_HEADER,
    UNTOLD,
    Product,
)

Headers = Mapping[str, str] | Iterable[tuple[str, str] | tuple[bytes, bytes]]
Place = Literal["header", "query"]

#: Base64 makes four characters of three; the rest is for the colon and padding.
_MAX_BASIC_LENGTH: Final = MAX_TOKEN_BYTES * 4 // 3 + 8

_FORWARDED_FOR: Final = "x-forwarded-for"
_API_KEY: Final = frozenset((b"api_key",))
#: A token in the URL is refused, and logged like any other request.
_CREDENTIALS: Final = _API_KEY | {b"access_token"}

#: API keys of an older system have whatever form it gave them.
_FOREIGN: Final = re.compile(r"[\x21-\x7e]{1,512}")
#: Ids are opaque; these fit into a log, a URL and a header.
_PROJECT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Presented(NamedTuple):
    """A credential as it was sent, unverified.

    Attributes:
        is_api_key: by its form; its checksum fits, if it is no older system's.
        place: where in the request it was.
        project_id: the project that the request names; None: it names none.
    """

    text: str
    is_api_key: bool
    place: Place = "header"
    project_id: str | None = None


def presented(headers: Headers, query: str | bytes = "", product: Product = UNTOLD) -> Presented:
    """The one credential that the request carries.

    Args:
        headers: a mapping in any letter case, or pairs, which also show a header that was sent
            twice.
        query: the query string, without its question mark.

    Raises:
        VerifierError: none, several, or one of neither kind; or several projects.
    """
    credential, place, projects = _credential(headers, query, product)
    project_id = one_project(*projects) if projects else None
    # Two dots are a JWT's, and no API key has one.
    if credential.count(".") == 2:  # noqa: PLR2004
        if place == "query":
            raise errors.TokenInQuery
        return Presented(credential, False, "header", project_id)
    if product.foreign_prefixes and credential.startswith(product.foreign_prefixes):
        if _FOREIGN.fullmatch(credential) is None:
            raise errors.TokenMalformed
        return Presented(credential, True, place, project_id)
    if not apikey.looks_like_one(credential):
        raise errors.TokenMalformed
    try:
        apikey.parse(credential)
    except apikey.MalformedApiKey:
        raise errors.ApiKeyMalformed from None
    return Presented(credential, True, place, project_id)


def one_project(*named: str) -> str:
    """The project that all of these texts name.

    Raises:
        ProjectRequired: they name several, or one of them is no id.
    """
    if len(set(named)) > 1 or _PROJECT_ID.fullmatch(named[0]) is None:
        raise errors.ProjectRequired(
            "X-Project-Id does not name one project: send one id, of 1 to 64 letters, digits,"
            " hyphens and underscores."
        )
    return named[0]


def forwarded_for(headers: Headers) -> str:
    """X-Forwarded-For with all its lines, as they came."""
    return ",".join(
        _text(value)
        for name, value in (headers.items() if isinstance(headers, Mapping) else headers)
        if len(name) == len(_FORWARDED_FOR) and _text(name).lower() == _FORWARDED_FOR
    )


def readable_twice(headers: Headers) -> Headers:
    """The same headers, also if they came as pairs that can be taken only once."""
    return headers if isinstance(headers, (list, tuple, Mapping)) else list(headers)


def without_api_key(query: bytes) -> bytes:
    """A query string without any `api_key` parameter; every other byte stays as it is."""
    return _without(_API_KEY, query)


def without_credentials(query: bytes) -> bytes:
    """A query string as others may see it: without any API key or access token."""
    return _without(_CREDENTIALS, query)


def _without(names: frozenset[bytes], query: bytes) -> bytes:
    return b"&".join(
        parameter
        for parameter in query.split(b"&")
        if unquote_to_bytes(parameter.partition(b"=")[0]) not in names
    )


def _credential(
    headers: Headers, query: str | bytes, product: Product
) -> tuple[str, Place, list[str]]:
    """The credential, where it was, and the projects that are named."""
    authorizations: list[str] = []
    found: list[str] = []
    projects: list[str] = []
    lengths, initials = product.name_lengths, product.initials
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        # Length and initial alone exclude nearly all headers of a request.
        if len(name) in lengths and name[0] in initials:
            lowered = _text(name).lower()
            if lowered == AUTHORIZATION:
                authorizations.append(_text(value))
            elif not value:
                continue
            elif lowered in (API_KEY_HEADER, product.api_key_header):
                found.append(_text(value))
            elif lowered == PROJECT_HEADER:
                projects.append(_text(value))
    if len(authorizations) > 1:
        # RFC 9110 §5.3: not a list, so that it must not be repeated; which one counts differs
        # from one framework to the next.
        raise errors.MultipleCredentials
    if authorizations and (credential := _of_authorization(authorizations[0])):
        found.append(credential)
    queried, has_token = _of_query(_text(query)) if query else ([], False)
    if has_token:
        raise errors.MultipleCredentials if found else errors.TokenInQuery
    if len({*found, *queried}) > 1:
        raise errors.MultipleCredentials
    if found:
        return found[0], "header", projects
    if queried:
        return queried[0], "query", projects
    raise errors.MissingCredentials


def _of_authorization(value: str) -> str:
    """The credential in an Authorization header; empty when there is none of ours."""
    scheme, _, rest = value.partition(" ")
    match scheme.lower():  # RFC 9110 §11.1: schemes ignore case
        case "bearer":
            return rest.lstrip(" ")
        case "basic":
            return _of_basic(rest.lstrip(" "))
    return ""


def _of_basic(encoded: str) -> str:
    """The user name: a client that knows only user names and passwords sends `TOKEN:`."""
    if len(encoded) > _MAX_BASIC_LENGTH:
        raise errors.TokenMalformed
    try:
        decoded = base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        raise errors.TokenMalformed from None
    user_name, colon, password = decoded.partition(":")
    if not colon or password:
        raise errors.TokenMalformed("Send the token as user name, with an empty password.")
    return user_name


def _of_query(query: str) -> tuple[list[str], bool]:
    """The API keys in a query string, and whether there is an access token.

    `api_key` is for clients that can send a URL and nothing else.  `access_token` is looked for
    only to be refused: RFC 9700 §4.3.2.
    """
    if not any(sign in query for sign in ("api_key", "access_token", "%")):
        return [], False
    fields = parse_qsl(query, keep_blank_values=True)
    api_keys = [value for name, value in fields if name == "api_key" and value]
    return api_keys, any(name == "access_token" for name, _ in fields)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
