"""What the issuer's catalog says that a resource server needs to read a request.

The HTTP methods of each role, the product's own header for credentials, and what API keys of an
older system begin with.  The issuer's document tells it; a resource server may say it itself.

Source: RFC 9110 §5.6.2 (token: names of headers and methods).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

#: Far more than any catalog has: an issuer that allows more one day must not stop this verifier.
_MOST: Final = 1000
_MAX_NAME_LENGTH: Final = 256

# token = 1*tchar
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]+")

AUTHORIZATION: Final = "authorization"
API_KEY_HEADER: Final = "x-api-key"
PROJECT_HEADER: Final = "x-project-id"
#: Headers that hold something else than a bare credential.
_TAKEN: Final = frozenset((AUTHORIZATION, PROJECT_HEADER, "cookie", "proxy-authorization"))


@dataclass(frozen=True, slots=True)
class Product:
    """What is known of the product.  Made by `of`.

    Attributes:
        roles: the HTTP methods that each role allows.
        api_key_header: a header for credentials beside X-API-Key, in lower case; None: there is
            none.
        foreign_prefixes: what API keys of an older system begin with, which have no checksum.
        name_lengths: of all headers that mean something here.
        initials: of the same, in both cases, as characters of a text and as bytes.
    """

    roles: Mapping[str, frozenset[str]]
    api_key_header: str | None
    foreign_prefixes: tuple[str, ...]
    name_lengths: frozenset[int]
    initials: frozenset[str | int]


def of(
    roles: Mapping[str, frozenset[str]] = MappingProxyType({}),
    api_key_header: str | None = None,
    foreign_prefixes: tuple[str, ...] = (),
) -> Product:
    """The product of these parts, which `read` has looked at."""
    standard = [AUTHORIZATION, API_KEY_HEADER, PROJECT_HEADER]
    names = standard if api_key_header is None else [*standard, api_key_header]
    initials = {letter for name in names for letter in (name[0], name[0].upper())}
    return Product(
        roles,
        api_key_header,
        foreign_prefixes,
        frozenset(map(len, names)),
        frozenset((*initials, *map(ord, initials))),
    )


#: Where nobody said anything: the standard headers, and no role.
UNTOLD: Final = of()


def read(told: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a product that somebody tells, as keyword arguments of `of`.

    Raises:
        ValueError: one of them is malformed; the message says what fits.
    """
    parts: dict[str, Any] = {}
    if "roles" in told:
        parts["roles"] = _roles(told["roles"])
    if "api_key_header" in told:
        parts["api_key_header"] = _header(told["api_key_header"])
    if "foreign_prefixes" in told:
        parts["foreign_prefixes"] = _prefixes(told["foreign_prefixes"])
    return parts


def _roles(told: object) -> Mapping[str, frozenset[str]]:
    unfit = ValueError("roles: for each name the HTTP methods that it allows, as a list")
    if not isinstance(told, Mapping) or len(told) > _MOST:
        raise unfit
    roles = {}
    for name, methods in told.items():
        if not _is_text(name, _PRINTABLE) or not _is_list(methods, _TOKEN):
            raise unfit
        roles[name] = frozenset(methods)
    return MappingProxyType(roles)


def _header(told: object) -> str | None:
    if told is None:
        return None
    if not isinstance(told, str) or not _is_text(told, _TOKEN) or told.lower() in _TAKEN:
        raise ValueError("api_key_header: the name of a header of your own, such as X-Acme-Key")
    return told.lower()


def _prefixes(told: object) -> tuple[str, ...]:
    if not isinstance(told, Sequence) or not _is_list(told, _PRINTABLE):
        # An empty prefix would make an API key of everything.
        raise ValueError("foreign_prefixes: printable ASCII without blanks, as a list of texts")
    return tuple(told)


def _is_list(told: object, form: re.Pattern[str]) -> bool:
    is_several = isinstance(told, (list, tuple, set, frozenset)) and len(told) <= _MOST
    return is_several and all(_is_text(text, form) for text in told)  # type: ignore[attr-defined]


def _is_text(told: object, form: re.Pattern[str]) -> bool:
    return (
        isinstance(told, str) and len(told) <= _MAX_NAME_LENGTH and form.fullmatch(told) is not None
    )


@dataclass(frozen=True, slots=True)
class Fixed:
    """A product that is known from the start and stays as it is: nobody is asked.

    `changes.Changes` is the other one who knows a product.
    """

    product: Product
    is_told: bool = True

    def wait_for_product(self) -> None:
        """It is there."""
