"""Which credential a request carries: the places where one may stand, and its kind by form.

Nothing is verified here.  A kind is decided by form alone, and a credential that fails as one
kind is never tried as another.

Source: RFC 6750 §2.1 (Bearer) and §2.3 (query), RFC 7617 §2 (Basic), RFC 9110 §5.3 (repeats).
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple
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


class Presented(NamedTuple):
    """A credential as it was sent, unverified.

    Attributes:
        is_api_key: by its form; its checksum fits.
        place: where in the request it was.
    """

    text: str
    is_api_key: bool
    place: Literal["header", "query"] = "header"


def presented(headers: Headers, query: str | bytes = "") -> Presented:
    """The one credential that the request carries.

    Args:
        headers: a mapping in any letter case, or pairs, which also show a header that was sent
            twice.
        query: the query string, without its question mark.

    Raises:
        VerifierError: none, several, or one of neither kind.
    """
    credential, place = _credential(headers, query)
    # Two dots are a JWT's, and no API key has one.
    if credential.count(".") == 2:  # noqa: PLR2004
        if place == "query":
            raise errors.TokenInQuery
        return Presented(credential, is_api_key=False)
    if not apikey.looks_like_one(credential):
        raise errors.TokenMalformed
    try:
        apikey.parse(credential)
    except apikey.MalformedApiKey:
        raise errors.ApiKeyMalformed from None
    return Presented(credential, is_api_key=True, place=place)


def _credential(headers: Headers, query: str | bytes) -> tuple[str, Literal["header", "query"]]:
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
    queried, has_token = _of_query(_text(query)) if query else ([], False)
    if has_token:
        raise errors.MultipleCredentials if found else errors.TokenInQuery
    if len({*found, *queried}) > 1:
        raise errors.MultipleCredentials
    if found:
        return found[0], "header"
    if queried:
        return queried[0], "query"
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
