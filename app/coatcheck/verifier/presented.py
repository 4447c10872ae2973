"""Which credential a request carries: the places where one may stand, and its kind by form.

Nothing is verified here.  A kind is decided by form alone, and a credential that fails as one
kind is never tried as another.

Source: RFC 6750 §2.1 (Bearer) and §2.3 (query), RFC 7617 §2 (Basic), RFC 9110 §5.3 (repeats).
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import parse_qsl

from coatcheck import apikey
from coatcheck.token_profile import MAX_TOKEN_BYTES
from coatcheck.verifier import errors

Headers = Mapping[str, str] | Iterable[tuple[str, str] | tuple[bytes, bytes]]

#: Base64 makes four characters of three; the rest is for the colon and padding.
_MAX_BASIC_LENGTH: Final = MAX_TOKEN_BYTES * 4 // 3 + 8

_AUTHORIZATION: Final = "authorization"
_API_KEY_HEADER: Final = "x-api-key"
_NAME_LENGTHS: Final = frozenset((len(_AUTHORIZATION), len(_API_KEY_HEADER)))


def access_token(headers: Headers, query: str | bytes = "") -> str:
    """The one access token that the request carries, unverified.

    Args:
        headers: a mapping in any letter case, or pairs, which also show a header that was sent
            twice.
        query: the query string, without its question mark.

    Raises:
        VerifierError: none, several, or one of another kind.
    """
    credential = _credential(headers, query)
    # Two dots are a JWT's, and no API key has one.
    if credential.count(".") == 2:  # noqa: PLR2004
        return credential
    if not apikey.looks_like_one(credential):
        raise errors.TokenMalformed
    try:
        apikey.parse(credential)
    except apikey.MalformedApiKey:
        raise errors.ApiKeyMalformed from None
    raise errors.TokensOnly


def _credential(headers: Headers, query: str | bytes) -> str:
    authorizations: list[str] = []
    found: list[str] = []
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        # The length alone excludes nearly all headers of a request.
        if len(name) in _NAME_LENGTHS:
            lowered = _text(name).lower()
            if lowered == _AUTHORIZATION:
                authorizations.append(_text(value))
            elif lowered == _API_KEY_HEADER and value:
                found.append(_text(value))
    if len(authorizations) > 1:
        # RFC 9110 §5.3: not a list, so that it must not be repeated; which one counts differs
        # from one framework to the next.
        raise errors.MultipleCredentials
    if authorizations and (credential := _of_authorization(authorizations[0])):
        found.append(credential)
    if len(found) > 1 and len(set(found)) > 1:
        raise errors.MultipleCredentials
    if query and _has_access_token(_text(query)):
        raise errors.MultipleCredentials if found else errors.TokenInQuery
    if not found:
        raise errors.MissingCredentials
    return found[0]


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


def _has_access_token(query: str) -> bool:
    return "access_token" in query and any(
        name == "access_token" for name, _ in parse_qsl(query, keep_blank_values=True)
    )


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
