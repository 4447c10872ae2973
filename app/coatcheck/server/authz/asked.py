"""What a gateway asks: its own parameters, and its caller's request as it tells of it.  Pure.

The parameters are the gateway's configuration, and its caller must not be able to add to them.
They stand in the query, and the caller's method and URI in headers, which are those of one
dialect only.  Envoy tells the URI in no header: it writes a fixed text before it.  So for Envoy

    /authz/verify?audience=…&for=envoy&path=/widgets?the=callers

everything behind the first `&path=` is the caller's, to the last byte.  That text cannot be in
what the gateway writes before it, where a parameter's value is percent-encoded.  And in

    /authz/verify/widgets?the=callers

the whole query is the caller's: the parameters stand in a header, X-Coatcheck-Authz.

Source: RFC 3986 §3.3 and §3.4 (path, query), RFC 9110 §5.6.2 (a method is a token), §9.1.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from coatcheck.scope import MalformedScope, Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.verifier.presented import without_credentials

PARAMETERS_HEADER: Final = b"x-coatcheck-authz"
SERVICE_KEY: Final = b"x-coatcheck-service-key"
FORWARDED_FOR: Final = b"x-forwarded-for"
#: Where our parameters end and the caller's path begins.
_PATH: Final = b"&path="
_MAX_PARAMETERS_BYTES: Final = 4096

# method = token; no registered one is longer.
_METHOD: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,40}")
#: origin-form, also with raw bytes beyond ASCII, and the `*` of OPTIONS.  A blank would be two
#: values that were joined.
_URI: Final = re.compile(rb"/[\x21-\x7e\x80-\xff]*|\*")
_NOT_ASCII: Final = re.compile(rb"[^\x21-\x7e]")


class Dialect(NamedTuple):
    """How a kind of gateway tells of its caller's request, and what it can be answered.

    Attributes:
        method, uri: the headers that tell them; None: they are the request's own.
        statuses: what is answered in place of a status that the gateway takes for a failure.  Such
            a gateway drops the body as well, and gets it in a header.
        misconfigured: the status that denies, whatever the gateway does about failures.
        allowed: the status that lets a request pass.
    """

    name: str
    method: bytes | None
    uri: bytes | None
    statuses: Mapping[int, int]
    misconfigured: int
    allowed: int = 204


_ORIGINAL: Final = (b"x-original-method", b"x-original-uri")
_FORWARDED: Final = (b"x-forwarded-method", b"x-forwarded-uri")

DIALECTS: Final[Mapping[str, Dialect]] = {
    dialect.name: dialect
    for dialect in (
        # auth_request knows 2xx, 401 and 403, and answers anything else with 500.
        Dialect("nginx", *_ORIGINAL, {400: 403, 429: 403, 503: 500}, 500),
        Dialect("haproxy", *_ORIGINAL, {}, 500),
        Dialect("apache", *_ORIGINAL, {}, 500),
        Dialect("traefik", *_FORWARDED, {}, 500),
        Dialect("caddy", *_FORWARDED, {}, 500),
        # It lets a request pass on 200 and on nothing else, and where failure_mode_allow is set on
        # 500, too.
        Dialect("envoy", None, None, {}, 403, 200),
    )
}
#: Of a gateway that does not say what it is: no kind of gateway lets a request pass on it.
_SAFE: Final = 403

#: Headers that mean something here, whichever gateway sent them.
HEADERS: Final = frozenset({FORWARDED_FOR, SERVICE_KEY, PARAMETERS_HEADER, *_ORIGINAL, *_FORWARDED})
Lines = Mapping[bytes, list[bytes]]


class Misconfigured(Exception):
    """The gateway asks for what nobody can answer; its caller cannot change that.

    Attributes:
        sentence: what to change, for the operator.
        status: what denies at this kind of gateway.
    """

    def __init__(self, sentence: str, dialect: Dialect | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.dialect = dialect
        self.status = _SAFE if dialect is None else dialect.misconfigured


class Parameters(NamedTuple):
    """A gateway's configuration.

    Attributes:
        environment: whose credentials are taken; None: those of any that the audience takes.
        needed: what a request needs, all of it.
        wants_token: the answer shall carry an access token.
    """

    dialect: Dialect
    audience: str
    environment: str | None
    needed: Scopes
    wants_token: bool


class Original(NamedTuple):
    """The caller's request, as it arrived at the gateway."""

    method: str
    path: bytes
    query: bytes

    def __repr__(self) -> str:
        return f"Original({self.method})"

    @property
    def has_credential(self) -> bool:
        """Whether an API key or a token may be in the URL, in any spelling."""
        return without_credentials(self.query) != self.query

    @property
    def clean_uri(self) -> str:
        """Path and query without any credential, in printable ASCII."""
        query = without_credentials(self.query)
        uri = self.path + b"?" + query if query else self.path
        if _NOT_ASCII.search(uri):
            uri = _NOT_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], uri)
        return uri.decode("ascii")


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    """The headers that mean something here, each with all its lines.

    Empty ones are not there, but for addresses: one that is left empty is an unknown one.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in HEADERS and (value or name == FORWARDED_FOR):
            found.setdefault(name, []).append(value)
    return found


def where_parameters_are(
    rest: bytes, query: bytes, lines: Lines
) -> tuple[bytes, tuple[bytes, bytes] | None]:
    """The text of the gateway's parameters, and path and query of its caller if they are here.

    Args:
        rest: what stands in the path behind our own, as it was sent.

    Raises:
        Misconfigured: the path goes on and no header says for what.
    """
    if rest:
        told = lines.get(PARAMETERS_HEADER, ())
        if len(told) != 1:
            raise Misconfigured(
                "The gateway puts its caller's path behind ours, and with it its caller's query:"
                " set the parameters in the header X-Coatcheck-Authz, such as"
                " audience=https://api.example.com&for=envoy, or end the address in &path= to have"
                " them in front."
            )
        return told[0], (rest, query)
    text, mark, uri = query.partition(_PATH)
    if not mark:
        return text, None
    path, _, callers_query = uri.partition(b"?")
    return text, (path, callers_query)


def parameters(text: bytes, catalog: Catalog) -> Parameters:
    """Read a gateway's parameters.

    Raises:
        Misconfigured: one of them is missing, repeated, unknown or unfit.
    """
    if len(text) > _MAX_PARAMETERS_BYTES:
        raise Misconfigured("The parameters are longer than 4 KiB.")
    try:
        pairs = parse_qsl(text.decode(), keep_blank_values=True, errors="strict")
    except ValueError:
        raise Misconfigured("The parameters are not UTF-8.") from None
    given = dict(pairs)
    dialect = DIALECTS.get(given.get("for", ""))
    if dialect is None:
        raise Misconfigured(f"for is missing or unknown: it is one of {', '.join(DIALECTS)}.")
    if len(given) != len(pairs):
        raise Misconfigured("A parameter stands twice.", dialect)
    unknown = given.keys() - {"for", "audience", "environment", "scope", "token"}
    if unknown:
        raise Misconfigured(
            "A parameter is unknown: there are audience, for, scope, environment, token and, last,"
            " path.",
            dialect,
        )
    audience = given.get("audience")
    if audience not in catalog.product_audiences:
        raise Misconfigured(
            "audience is missing or unknown: it is an audience of the catalog, and not the"
            " management API's.",
            dialect,
        )
    return Parameters(
        dialect,
        audience,
        _environment(given.get("environment"), audience, catalog, dialect),
        _needed(given.get("scope"), dialect),
        _wants_token(given.get("token"), dialect),
    )


def original(
    own_method: str, dialect: Dialect, inside: tuple[bytes, bytes] | None, lines: Lines
) -> Original:
    """The caller's request, as the gateway tells of it.

    Args:
        own_method: the method of the gateway's own request.
        inside: path and query, if they were in the gateway's URL.

    Raises:
        Misconfigured: something is missing, or told where this dialect does not tell it.
    """
    if dialect.method is None or dialect.uri is None:
        if inside is None:
            raise Misconfigured(
                "The caller's path is missing: end the address in &path= so that Envoy writes it"
                " behind.",
                dialect,
            )
        path, query = inside
        method = own_method.encode("latin-1")
    else:
        if inside is not None:
            raise Misconfigured(
                "The caller's path is in the address, where only Envoy writes it.", dialect
            )
        method = _line(dialect.method, lines, dialect)
        path, _, query = _line(dialect.uri, lines, dialect).partition(b"?")
    if _METHOD.fullmatch(method) is None:
        raise Misconfigured("What is told as the caller's method is none.", dialect)
    if _URI.fullmatch(path) is None or (query and _URI.fullmatch(b"/" + query) is None):
        raise Misconfigured(
            "What is told as the caller's URI is none: it begins with a slash and has no blanks.",
            dialect,
        )
    return Original(method.decode("ascii"), path, query)


def _line(name: bytes, lines: Lines, dialect: Dialect) -> bytes:
    found = lines.get(name, ())
    if len(found) == 1:
        return found[0]
    written = name.decode("ascii").title().replace("Original-Uri", "Original-URI")
    if not found:
        raise Misconfigured(f"The gateway does not send {written}: set that header.", dialect)
    # One of them may be the caller's own.
    raise Misconfigured(
        f"{written} is there twice: the gateway has to replace what its caller sends.", dialect
    )


def _environment(
    given: str | None, audience: str, catalog: Catalog, dialect: Dialect
) -> str | None:
    of_audience = catalog.audiences[audience].environment
    if given is None:
        return of_audience
    if given not in catalog.environments or of_audience not in (None, given):
        raise Misconfigured("environment is none of that audience.", dialect)
    return given


def _needed(given: str | None, dialect: Dialect) -> Scopes:
    if given is None:
        return Scopes()
    try:
        needed = Scopes.parse(given)
    except MalformedScope:
        needed = Scopes()
    if not needed:
        # Empty as well: a text that came out empty by mistake must not open everything.
        raise Misconfigured("scope is scopes with one blank between them, or left out.", dialect)
    return needed


def _wants_token(given: str | None, dialect: Dialect) -> bool:
    if given not in (None, "true"):
        raise Misconfigured("token is true, or left out.", dialect)
    return given is not None
