"""Reading a catalog from `coatcheck.toml`; what is wrong is told all at once, line by line.

    name = "Acme IDE"                    # for people

    [key]
    brand = "cr"                         # 1 to 16 letters or digits; default: ck
    environments = ["live", "test"]      # the first is the default
    environment_in_key = true            # false: sk_..., which tells no environment
    header = "X-Acme-Key"                # a header of the product's own, beside the standard ones
    foreign_prefixes = ["sk-old-"]       # what API keys of an older system begin with
    free_environments = ["test"]         # where nothing costs credits

    [[audience]]                         # a resource server; one default in each environment
    id = "https://gateway.example.com"   # the `aud` of its tokens
    shared = true                        # by all environments; or: environment = "live"
    default = true                       # of its environment, or of all
    algorithm = "ES256"                  # default; RS256, EdDSA
    token_type = "at+jwt"                # default; JWT
    verifier = "coatcheck"               # default; any: another JWT library stands there

    [[permission]]                       # none at all: any well-formed scope may be given
    name = "gateway:infer"
    about = "Ask a model"
    audiences = ["https://gateway.example.com"]  # left out: every audience of this file

    [[permission]]
    name = "models:list"

    [[scope]]                            # several permissions under one name
    id = "ide"
    name = "IDE"
    about = ""
    grants = ["gateway:infer"]           # permissions, or "*" for all of them

    [implies]                            # who may do the one may do the others
    "gateway:infer" = ["models:list"]

    [[role]]
    name = "member"
    permission = "write"                 # what people call it
    methods = ["GET", "POST", "PATCH"]   # GET covers HEAD
    about = ""

    [[resource]]                         # a type of thing that filters name: PLACE/Site/42
    type = "PLACE"
    segments = [{ name = "kind", values = ["Site", "Building"] }, { name = "id" }]
    within = []                          # types that it may be nested in

    [policies]                           # of all organizations; each may be stricter
    recoverable = true
    max_lifetime = "365d"                # left out: API keys may live without end
    disable = true
    delete = true

    [models]                             # left out: a restriction may name any model
    names = ["gpt-x", "claude-y"]

    [device_keys]                        # left out: there are none
    scopes = ["ide"]

    [mcp]                                # left out: the product has no MCP server
    name = "acme"
    url = "https://mcp.example.com/mcp"
    audience = "https://gateway.example.com"  # left out: the default environment's default
    scopes = ["gateway:infer"]

All tables but `[[audience]]` may be left out, and a file has at most 1 MiB.  The management API's
audience is always there and is not written down; COATCHECK_AUDIENCE, _ALGORITHM and _TOKEN_TYPE
mean nothing beside a file.

A file is read in three steps: its form (`_FILE`: every key that there is, and what it has to look
like), then how its parts hold together, then the catalog.  Only a file without a problem gets to
the third, which therefore checks nothing.
"""

import json
import re
import tomllib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from coatcheck.durations import span
from coatcheck.restrictions import Role
from coatcheck.scope import (
    EVERYTHING,
    MAX_LENGTH,
    ORGANIZATION_PERMISSIONS,
    Grant,
    MalformedScope,
    Scopes,
    is_platform,
)
from coatcheck.server.catalog import (
    DEFAULT_BRAND,
    DEFAULT_ENVIRONMENTS,
    Audience,
    Catalog,
    Connector,
    NamedScope,
    Permission,
    Policies,
    ResourceType,
    RoleOffer,
    Segment,
    management_audience,
    without_file,
)
from coatcheck.server.settings import Settings
from coatcheck.token_profile import ALGORITHMS, TYPES, is_audience

MAX_BYTES: Final = 1024 * 1024
MAX_LIFETIME_DAYS: Final = 36500
#: Characters of one text.
MAX_TEXT: Final = 512

#: Where something stands: names of tables and keys, and numbers in lists of tables.
_Path = tuple[str | int, ...]


class BadCatalog(ValueError):
    """A catalog cannot be used.  The message has a line for every problem: where, what, and what
    to write instead."""


def of(settings: Settings) -> Catalog:
    """The catalog of a deployment: that of its file, if the settings name one.

    Raises:
        BadCatalog: as `load`.
    """
    return without_file(settings) if settings.catalog is None else load(settings.catalog, settings)


def load(path: Path, settings: Settings) -> Catalog:
    """The catalog in a file.

    Raises:
        BadCatalog: as `read`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise BadCatalog(f"{path}: cannot be read: {reason}") from None
    # Editors on Windows begin a file with a mark that TOML does not know.  Bytes that are not UTF-8
    # become what no text has, so that `read` can tell in which line they are.
    return read(data.decode("utf-8-sig", "surrogateescape"), settings, name=str(path))


def read(text: str, settings: Settings, *, name: str = "coatcheck.toml") -> Catalog:
    """The catalog that a text describes.

    Args:
        settings: for the management API's audience.
        name: what problems call the file.

    Raises:
        BadCatalog: the text is no TOML, or describes no catalog.
    """
    report = _Report(name)
    root = _Row((), _parsed(text, report), report)
    report.lines = _lines_of(text)
    _check_form(root, _FILE)
    for check in _TOGETHER:
        check(root, settings)
    report.raise_problems()
    catalog = _catalog(root, settings)
    _check_connector(root, catalog)
    report.raise_problems()
    return catalog


# --- Problems, and where they are


@dataclass(slots=True)
class _Report:
    """What is wrong with a file.

    Attributes:
        lines: where the parts of the file begin.
        problems: a line and what is wrong there.
        troubled: the parts that have a problem, and what they are part of.
    """

    name: str
    lines: Mapping[_Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    troubled: set[_Path] = field(default_factory=set)

    def line_of(self, path: _Path) -> int:
        """Where something stands, or else what it is part of; the file itself: the first line."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def tell(self, path: _Path, cause: str) -> None:
        label = f"{_label(path)}: " if path else ""
        self.problems.append((self.line_of(path), f"{label}{cause}"))
        self.troubled.update(path[:length] for length in range(len(path) + 1))

    def fail(self, line: int, cause: str) -> NoReturn:
        """Tell a problem after which nothing more can be said."""
        raise BadCatalog(f"{self.name}:{line}: {cause}")

    def raise_problems(self) -> None:
        if self.problems:
            problems = sorted(dict.fromkeys(self.problems), key=lambda problem: problem[0])
            lines = (f"{self.name}:{line}: {cause}" for line, cause in problems)
            raise BadCatalog("\n".join(lines))


def _label(path: _Path) -> str:
    """A place as the file writes it: `[[audience]] id`."""
    top, *rest = (part for part in path if isinstance(part, str))
    known = _FILE.get(top)
    form = "{}" if known is None else _FORMS.get(known.kind, "{}")
    return " ".join(map(_bounded, (form.format(top), *rest)))


def _bounded(text: str) -> str:
    """A name or text of the file as one short printable line."""
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...")[1:-1]  # noqa: PLR2004


def _shown(text: str) -> str:
    return f'"{_bounded(text)}"'


def _alternatives(wrong: str, known: Collection[str]) -> str:
    """What to write instead of a name that is not known."""
    near = get_close_matches(wrong[:64], known, 1)
    if near:
        return f"did you mean {_bounded(near[0])}?"
    shown = sorted(map(_bounded, known))
    if not shown:
        return "there is none"
    return f"write {', '.join(shown[:8])}" + (", ..." if len(shown) > 8 else "")  # noqa: PLR2004


def _parsed(text: str, report: _Report) -> dict[str, Any]:
    """A text as TOML.  Raises BadCatalog with the one problem that keeps it from being read."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        report.fail(1, f"longer than {MAX_BYTES} bytes; a catalog is far shorter")
    stray = re.search("[\ud800-\udfff]", text)
    if stray is not None:
        report.fail(text.count("\n", 0, stray.start()) + 1, "not UTF-8; save the file as UTF-8")
    try:
        return tomllib.loads(text)
    except RecursionError:
        report.fail(1, "lists are nested too deeply; no key of a catalog needs that")
    except ValueError as error:  # TOMLDecodeError is one, and a number with 5,000 digits another
        report.fail(*_in_our_words(str(error), text))


_TOMLLIB_PLACE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
#: What `tomllib` says → what to do.
_SYNTAX: Final = {
    "Invalid value": "no value; texts stand in quotes, and true and false are lower case",
    "Illegal character '\\n'": "a text is not closed; end it with the quote that it began with",
    "Unterminated string": "a text is not closed; end it with the quote that it began with",
    "Unclosed array": "a list is not closed, or a comma is missing in it",
    "Unclosed inline table": "a table in braces is not closed; it has to stand on one line",
    "Cannot overwrite a value": "the same key is written twice; keep one",
    "Cannot declare": "the same table is written twice; keep one, or write [[...]] for each",
    "Cannot mutate": "a list or table is closed already; write all of it in one place",
    "Cannot redefine": "the same table is written in two ways; keep one",
    "Expected '=' after a key": (
        'no name = value; a name of anything but letters, digits, _ and - stands in quotes: "a:b"'
    ),
    "Expected newline": "something follows a value or header; is a quote or comma missing?",
    'Expected "': "a text is not closed; end it with the quote that it began with",
    "Expected ']": "the name of a table ends with a bracket for each that it began with",
    "Invalid statement": "neither [table] nor name = value; comments begin with #",
    "Invalid initial character": (
        'no name; one of anything but letters, digits, _ and - stands in quotes: "a:b"'
    ),
    "Duplicate inline table key": "the same key is written twice; keep one",
    "Unescaped '\\\\'": "a backslash in a text is written twice, or the text in single quotes",
    "Found invalid character": "a control character; remove it",
    "Illegal character": "a control character; remove it",
}


def _in_our_words(said: str, text: str) -> tuple[int, str]:
    """The line and the cause of a syntax error."""
    place = _TOMLLIB_PLACE.search(said)
    cause = said if place is None else said[: place.start()]
    known = (instead for begins, instead in _SYNTAX.items() if cause.startswith(begins))
    cause = next(known, _bounded(cause))
    if place is None:
        return 1, cause
    if place[1] is None:
        return text.rstrip().count("\n") + 1, cause
    return int(place[1]), f"{cause} (column {place[2]})"


# --- The lines of a file that is TOML

_TOKEN: Final = re.compile(
    r"""
      (?P<newline> \n )
    | (?P<blank>   [ \t\r]+ | \#[^\n]* )
    | (?P<text>    \"{3} (?: \\. | [^\\] )*? \"{3,5} | '{3} .*? '{3,5}
                 | " (?: \\. | [^"\\\n] )* " | ' [^'\n]* ' )
    | (?P<mark>    [][{}=,.] )
    | (?P<bare>    [^\s\#"'\[\]{}=,.]+ )
    """,
    re.VERBOSE | re.DOTALL,
)


def _lines_of(text: str) -> dict[_Path, int]:
    """Where the tables and keys of a text begin; it has passed `tomllib`, so its form is right."""
    lines: dict[_Path, int] = {}
    tables: dict[_Path, int] = {}  # lists of tables → how many there are so far
    current: _Path = ()
    for line, statement in _statements(text):
        if statement[0] != "[":
            path = current
            for name in _names(statement[: statement.index("=")]):
                path = (*path, name)
                lines.setdefault(path, line)
            continue
        opens_list = statement[1] == "["
        current = ()
        names = _names(part for part in statement if part not in ("[", "]"))
        for index, name in enumerate(names, start=1):
            current = (*current, name)
            lines.setdefault(current, line)
            if opens_list and index == len(names):
                tables[current] = tables.get(current, 0) + 1
            if current in tables:
                current = (*current, tables[current] - 1)
                lines.setdefault(current, line)
    return lines


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """Headers and `name = value`, each with its first line and in tokens."""
    ends = [match.start() for match in re.finditer("\n", text)]
    statement: list[str] = []
    begins_at = depth = 0
    for token in _TOKEN.finditer(f"{text}\n"):
        if token["blank"]:
            continue
        if token["newline"] and depth == 0:
            if statement:
                yield bisect(ends, begins_at) + 1, statement
            statement = []
            continue
        if not statement:
            begins_at = token.start()
        # Within quotes brackets are part of a text, which is one token.
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        statement.append(token[0])


def _names(parts: Iterable[str]) -> list[str]:
    """The names in a dotted key."""
    names = [part for part in parts if part != "."]
    return [tomllib.loads(f"_ = {one}")["_"] if one[0] in "\"'" else one for one in names]


# --- What the keys have to look like: rules answer what is wrong, or None

_Rule = Callable[[str], str | None]


def _like(pattern: str, asks: str) -> _Rule:
    fits = re.compile(pattern).fullmatch
    return lambda text: None if fits(text) else f"does not fit; write {asks}"


def _one_of(*known: str) -> _Rule:
    return lambda text: None if text in known else f"is not known; write {' or '.join(known)}"


def _any_text(text: str) -> None:
    """Every text is bounded and printable; `_text` sees to that."""


def _audience_id(text: str) -> str | None:
    if is_audience(text):
        return None
    return "does not fit; write a URL, without blanks, quotes, backslashes and #"


def _scope_token(text: str) -> str | None:
    try:
        grant = Grant.parse(text)
    except MalformedScope as error:
        return f"is no permission: {error}"
    if "@" in text:
        return "has a filter, which belongs to an API key; write what stands before the @"
    if is_platform(grant.action):
        return "begins like Coatcheck's own permissions; write another name"
    if grant.action in ORGANIZATION_PERMISSIONS:
        return "is a permission of the management API; write another name"
    return None


def _action(text: str) -> str | None:
    return "stands for all permissions; name them" if text == EVERYTHING else _scope_token(text)


def _segment(text: str) -> str | None:
    try:
        grant = Grant.parse(f"{EVERYTHING}@{text}")
    except MalformedScope as error:
        return f"cannot stand in a filter: {error}"
    if grant.filter is None or len(grant.filter) > 1:
        return "cannot stand in a filter; write one segment, without wildcards"
    return None


def _lifetime(text: str) -> str | None:
    seconds = span(text)
    if seconds is None:
        return "is no span; write one such as 365d or 12h"
    if not 0 < seconds <= MAX_LIFETIME_DAYS * 86400:
        return f"is out of bounds; write at least 1s and at most {MAX_LIFETIME_DAYS}d"
    return None


_TAKEN_HEADERS: Final = """
    accept accept-encoding accept-language age authorization cache-control connection
    content-encoding content-length content-type cookie date etag expect forwarded from host
    idempotency-key if-match if-modified-since if-none-match if-unmodified-since keep-alive origin
    proxy-authenticate proxy-authorization range referer set-cookie te trailer transfer-encoding
    upgrade user-agent via www-authenticate x-api-key x-forwarded-for x-forwarded-host
    x-forwarded-port x-forwarded-proto x-project-id x-real-ip x-request-id
"""
# RFC 9110 §5.6.2: token = 1*tchar
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")


def _header(text: str) -> str | None:
    if _HEADER.fullmatch(text) is None:
        return "is no name of a header; write one such as X-Acme-Key"
    if text.lower() in _TAKEN_HEADERS.split() or text.lower().startswith("x-coatcheck-"):
        return "has a meaning already; write a name of your own, or leave it out"
    return None


_PREFIX: Final = re.compile(r"[\x21-\x7e]{1,64}")


def _foreign_prefix(text: str) -> str | None:
    if _PREFIX.fullmatch(text) is None:
        return "does not fit; write 1 to 64 printable ASCII characters without blanks"
    # A credential is told from a JWT by its form: three parts, of which the first is JSON.
    if text.startswith("ey") or "ey".startswith(text):
        return "cannot be told from a JWT, which begins with ey; such API keys cannot be taken over"
    if text.count(".") > 1:
        return "has two dots, as a JWT has; write what stands before the second"
    return None


#: It is pasted into shells and gets a query of its own, so it is plain.
_MCP_URL: Final = _like(
    r"(https://[A-Za-z0-9.-]+|http://(localhost|127\.0\.0\.1))(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?",
    "an https URL without user, query and fragment",
)
_METHOD: Final = _like(
    r"(?!HEAD$)[A-Z][A-Z-]{0,31}", "an HTTP method in capitals such as GET, which covers HEAD"
)
_FOR_PEOPLE: Final = _like(r".*\S.*", "a name for people")
_SLUG: Final = _like(
    r"[a-z][a-z0-9-]{0,63}",
    "a lower-case letter, then lower-case letters, digits and hyphens, 64 at most",
)


@dataclass(frozen=True, slots=True)
class _Key:
    """What stands behind a name.

    Attributes:
        kind: `lists` is a table of lists under names of its own.
        rule: for each text.
        least: how many entries a list has.
        most: likewise.
        keys: those of a table.
        needed: what to write when the key is missing; None: it may be.
    """

    kind: Literal["text", "flag", "texts", "table", "tables", "lists"]
    rule: _Rule = _any_text
    least: int = 1
    most: int = 1000
    keys: Mapping[str, "_Key"] = field(default_factory=dict)
    needed: str | None = None


_ABOUT: Final = _Key("text")
_FLAG: Final = _Key("flag")

_FILE: Final[Mapping[str, _Key]] = {
    "name": _Key("text", _FOR_PEOPLE),
    "key": _Key(
        "table",
        keys={
            "brand": _Key("text", _like(r"[A-Za-z0-9]{1,16}", "1 to 16 letters or digits")),
            "environments": _Key(
                "texts", _like(r"[a-z0-9]{1,16}", "1 to 16 lower-case letters or digits"), most=16
            ),
            "environment_in_key": _FLAG,
            "header": _Key("text", _header),
            "foreign_prefixes": _Key("texts", _foreign_prefix, least=0, most=20),
            "free_environments": _Key("texts", least=0, most=16),
        },
    ),
    "audience": _Key(
        "tables",
        most=100,
        keys={
            "id": _Key("text", _audience_id, needed="the URL of a resource server"),
            "environment": _Key("text"),
            "shared": _FLAG,
            "default": _FLAG,
            "algorithm": _Key("text", _one_of(*ALGORITHMS)),
            "token_type": _Key("text", _one_of(*TYPES)),
            "verifier": _Key("text", _one_of("coatcheck", "any")),
        },
        needed="a resource server, with id, shared = true and default = true",
    ),
    "permission": _Key(
        "tables",
        keys={
            "name": _Key("text", _action, needed="what scopes call it"),
            "about": _ABOUT,
            "audiences": _Key("texts", most=100),
        },
    ),
    "scope": _Key(
        "tables",
        keys={
            "id": _Key("text", _SLUG, needed="what scopes call it, such as cloud-agents"),
            "name": _Key("text", _FOR_PEOPLE, needed="what people call it"),
            "about": _ABOUT,
            "grants": _Key("texts", _scope_token, needed="the permissions that it stands for"),
        },
    ),
    "implies": _Key("lists", _action),
    "role": _Key(
        "tables",
        most=100,
        keys={
            "name": _Key("text", _SLUG, needed="what tokens call it, such as member"),
            "permission": _Key("text", _SLUG, needed="what people call it, such as write"),
            "methods": _Key(
                "texts",
                _METHOD,
                most=32,
                needed="the HTTP methods that it allows",
            ),
            "about": _ABOUT,
        },
    ),
    "resource": _Key(
        "tables",
        most=100,
        keys={
            "type": _Key("text", _segment, needed="what filters begin with, such as PLACE"),
            "segments": _Key(
                "tables",
                most=16,
                keys={
                    "name": _Key("text", _SLUG, needed="what people call what stands there"),
                    "values": _Key("texts", _segment),
                },
                needed='what follows the type, such as [{ name = "id" }]',
            ),
            "within": _Key("texts", least=0, most=100),
        },
    ),
    "policies": _Key(
        "table",
        keys={
            "recoverable": _FLAG,
            "max_lifetime": _Key("text", _lifetime),
            "disable": _FLAG,
            "delete": _FLAG,
        },
    ),
    "models": _Key(
        "table",
        keys={
            "names": _Key(
                "texts",
                _like(r"\S{1,128}", "at most 128 characters without blanks"),
                needed="the models that a restriction may name",
            )
        },
    ),
    "device_keys": _Key(
        "table",
        keys={"scopes": _Key("texts", _scope_token, needed="what an API key of a device may do")},
    ),
    "mcp": _Key(
        "table",
        keys={
            "name": _Key(
                "text",
                # Never a hyphen first: command lines would read an option.
                _like(
                    r"[a-z0-9][a-z0-9-]{0,63}",
                    "lower-case letters, digits and hyphens, no hyphen first, 64 at most",
                ),
                needed="what clients call the server, such as acme",
            ),
            "url": _Key("text", _MCP_URL, needed="where the MCP server is"),
            "audience": _Key("text"),
            "scopes": _Key("texts", _scope_token, needed="what an agent's API key may do"),
        },
    ),
}

_FORMS: Final = {"table": "[{}]", "lists": "[{}]", "tables": "[[{}]]"}
#: Keys of tables that stand alone, for those who write them at the top of the file.
_HOMES: Final = {
    key: table for table, one in _FILE.items() if one.kind == "table" for key in one.keys
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A table of the file.

    Attributes:
        values: by key, of the right type once `_check_form` has seen them.
        wrong: keys whose value had the wrong type: they are not missing.
    """

    path: _Path
    values: dict[str, Any]
    report: _Report
    wrong: set[str] = field(default_factory=set)

    def tell(self, key: str, cause: str) -> None:
        self.report.tell((*self.path, key), cause)

    def line_of(self, key: str) -> int:
        return self.report.line_of((*self.path, key))

    def has(self, key: str) -> bool:
        return key in self.values or key in self.wrong

    def text(self, key: str, default: str = "") -> str:
        found: str = self.values.get(key, default)
        return found

    def flag(self, key: str, *, default: bool = False) -> bool:
        found: bool = self.values.get(key, default)
        return found

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The texts in a list; of a text, itself."""
        found = self.values.get(key, default)
        return (found,) if isinstance(found, str) else tuple(found)

    def row(self, key: str) -> "_Row":
        found: _Row = self.values.get(key, _Row((*self.path, key), {}, self.report))
        return found

    def rows(self, key: str) -> tuple["_Row", ...]:
        return tuple(self.values.get(key, ()))


def _check_form(row: _Row, keys: Mapping[str, _Key]) -> None:
    """Hold a table against the keys that it may have; the tables in it become rows.

    What has the wrong type is taken away.  A text that breaks a rule stays, as others may refer
    to it: one mistake is told once.
    """
    for name, value in list(row.values.items()):
        key = keys.get(name)
        if key is None:
            row.tell(name, _unknown(name, row.path, keys))
        read = None if key is None else _READ[key.kind](row, name, value, key)
        if read is None:
            del row.values[name]
            row.wrong.add(name)
        else:
            row.values[name] = read
    for name, key in keys.items():
        if key.needed is not None and not row.has(name):
            shown = name if row.path else _label((name,))
            row.report.tell(row.path, f"{shown} is missing; write {key.needed}")


def _unknown(name: str, path: _Path, keys: Mapping[str, _Key]) -> str:
    what = "key" if path else "table or key"
    near = get_close_matches(name[:64], keys, 1)
    if near:
        return f"no such {what}; did you mean {near[0] if path else _label((near[0],))}?"
    if not path and name in _HOMES:
        return f"belongs to a table; write it below [{_HOMES[name]}]"
    known = keys if path else map(_label, ((one,) for one in keys))
    return f"no such {what}; there are {', '.join(known)}"


def _text(row: _Row, name: str, value: object, key: _Key) -> str | None:
    if not isinstance(value, str):
        row.tell(name, "no text; write a text in quotes")
        return None
    if len(value) > MAX_TEXT or not value.isprintable():
        cause = f"does not fit; write at most {MAX_TEXT} characters, none of them for control"
        row.tell(name, f"{_shown(value)} {cause}")
    elif (broken := key.rule(value)) is not None:
        row.tell(name, f"{_shown(value)} {broken}")
    return value


def _flag(row: _Row, name: str, value: object, key: _Key) -> bool | None:
    if not isinstance(value, bool):
        row.tell(name, "neither true nor false; write one of them, without quotes")
        return None
    return value


def _texts(row: _Row, name: str, value: object, key: _Key) -> list[str] | None:
    if not isinstance(value, list):
        row.tell(name, 'no list; write a list of texts such as ["a", "b"]')
        return None
    _check_length(row, name, value, key)
    texts = [one for one in value[: key.most] if _text(row, name, one, key) is not None]
    for one, count in Counter(texts).items():
        if count > 1:
            row.tell(name, f"{_shown(one)} is written twice; keep one")
    return texts


def _table(row: _Row, name: str, value: object, key: _Key) -> _Row | None:
    if not isinstance(value, dict):
        row.tell(name, f"no table; write [{name}] on a line of its own, once")
        return None
    inner = _Row((*row.path, name), value, row.report)
    _check_form(inner, key.keys)
    return inner


def _lists(row: _Row, name: str, value: object, key: _Key) -> _Row | None:
    """A table whose keys are texts like those in its lists."""
    if not isinstance(value, dict):
        row.tell(name, f"no table; write [{name}] on a line of its own, once")
        return None
    inner = _Row((*row.path, name), value, row.report)
    for one in [one for one, listed in value.items() if isinstance(listed, dict)]:
        inner.tell(one, 'a name with a dot stands in quotes: "a.b"')
        del value[one]
    for one in value:
        _text(inner, one, one, key)
    _check_form(inner, dict.fromkeys(value, _Key("texts", key.rule)))
    return inner


def _tables(row: _Row, name: str, value: object, key: _Key) -> list[_Row] | None:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        instead = key.needed if row.path else f"[[{name}]], with two brackets, above each of them"
        row.tell(name, f"no list of tables; write {instead}")
        return None
    _check_length(row, name, value, key)
    path = (*row.path, name)
    rows = [_Row((*path, index), one, row.report) for index, one in enumerate(value[: key.most])]
    for one in rows:
        _check_form(one, key.keys)
    return rows


def _check_length(row: _Row, name: str, value: list[object], key: _Key) -> None:
    if len(value) < key.least:
        row.tell(name, "the list is empty; write at least one entry, or leave it out")
    if len(value) > key.most:
        too_far = (*row.path, name, key.most)
        row.report.tell(too_far, f"more than {key.most} entries; leave some out")


_READ: Final[Mapping[str, Callable[[_Row, str, object, _Key], object]]] = {
    "text": _text,
    "flag": _flag,
    "texts": _texts,
    "table": _table,
    "lists": _lists,
    "tables": _tables,
}


# --- How the parts of a file hold together


def _environments(root: _Row) -> tuple[str, ...]:
    return root.row("key").texts("environments") or DEFAULT_ENVIRONMENTS


def _prefixes(root: _Row) -> list[str]:
    """What our own API keys begin with."""
    brand = root.row("key").text("brand", DEFAULT_BRAND)
    if not root.row("key").flag("environment_in_key", default=True):
        return [f"{brand}_"]
    return [f"{brand}_{environment}_" for environment in _environments(root)]


def _unique(rows: tuple[_Row, ...], key: str) -> None:
    first: dict[str, _Row] = {}
    for row in rows:
        value = row.text(key)
        if value and value in first:
            line = first[value].line_of(key)
            row.tell(key, f"{_shown(value)} stands in line {line} already; write another")
        first.setdefault(value, row)


def _names_in(rows: tuple[_Row, ...], key: str) -> set[str]:
    return {row.text(key) for row in rows if row.text(key)}


def _refer(row: _Row, key: str, known: Collection[str], what: str) -> None:
    """Every text of a key is one of those that are known."""
    for one in row.texts(key):
        if one not in known:
            row.tell(key, f"{_shown(one)} is no {what}; {_alternatives(one, known)}")


def _check_key(root: _Row, settings: Settings) -> None:
    key = root.row("key")
    _refer(key, "free_environments", _environments(root), "environment of this file")
    for foreign in key.texts("foreign_prefixes"):
        alike = [
            one for one in _prefixes(root) if one.startswith(foreign) or foreign.startswith(one)
        ]
        if alike and _foreign_prefix(foreign) is None:  # else that has been told
            key.tell(
                "foreign_prefixes",
                f"{_shown(foreign)} cannot be told from our own API keys, which begin with"
                f" {_shown(alike[0])}; write more of the prefix, or choose another brand",
            )


def _check_audiences(root: _Row, settings: Settings) -> None:
    environments = _environments(root)
    defaults: dict[str, _Row] = {}
    _unique(root.rows("audience"), "id")
    for row in root.rows("audience"):
        if row.text("id") == settings.management_audience:
            row.tell("id", "the management API's audience is always there; leave this table out")
        _check_place(row, environments)
        if row.flag("default"):
            for environment in environments if row.flag("shared") else (row.text("environment"),):
                first = defaults.setdefault(environment, row)
                if environment in environments and first is not row:
                    row.tell(
                        "default",
                        f"{_shown(environment)} has its default in line {first.line_of('default')}"
                        " already; keep one",
                    )
    # Where something is wrong with them, that may be why a default is missing.
    causes = {("audience",), ("key", "environments")}
    if root.rows("audience") and root.report.troubled.isdisjoint(causes):
        for environment in environments:
            if environment not in defaults:
                root.row("key").tell("environments", _no_default(environment, root))


def _check_place(row: _Row, environments: tuple[str, ...]) -> None:
    """An audience belongs to one environment or to all of them."""
    if row.has("environment") and row.flag("shared"):
        row.tell("shared", "belongs to one environment or to all; leave shared or environment out")
    elif not row.has("environment") and not row.flag("shared") and "shared" not in row.wrong:
        known = " or ".join(map(_shown, environments))
        row.report.tell(row.path, f"belongs nowhere; write environment = {known}, or shared = true")
    _refer(row, "environment", environments, "environment of this file")


def _no_default(environment: str, root: _Row) -> str:
    rows = root.rows("audience")
    there = [row for row in rows if row.flag("shared") or row.text("environment") == environment]
    if there:
        lines = ", ".join(str(row.report.line_of(row.path)) for row in there)
        return (
            f"{_shown(environment)} has no default audience; write default = true below one of its"
            f" [[audience]] (line {lines})"
        )
    return (
        f"{_shown(environment)} has no audience; add an [[audience]] with environment ="
        f" {_shown(environment)} and default = true, or leave the environment out"
    )


def _declared(root: _Row) -> set[str] | None:
    """The names of the permissions; None: any."""
    if not root.has("permission"):
        return None
    return _names_in(root.rows("permission"), "name")


def _check_permissions(root: _Row, settings: Settings) -> None:
    audiences = _names_in(root.rows("audience"), "id")
    _unique(root.rows("permission"), "name")
    for row in root.rows("permission"):
        _refer(row, "audiences", audiences, "audience of this file")


def _check_scopes(root: _Row, settings: Settings) -> None:
    permissions = _declared(root)
    named = _names_in(root.rows("scope"), "id")
    _unique(root.rows("scope"), "id")
    for row in root.rows("scope"):
        if permissions is not None and row.text("id") in permissions:
            row.tell("id", f"{_shown(row.text('id'))} is a permission too; write another")
        _check_size(row, "grants")
        _refer_to_permissions(row, "grants", row.texts("grants"), permissions, named)
    for name in ("device_keys", "mcp"):
        row = root.row(name)
        _check_size(row, "scopes")
        known = None if permissions is None else permissions | named
        _refer_to_permissions(row, "scopes", row.texts("scopes"), known, set())


def _check_implies(root: _Row, settings: Settings) -> None:
    permissions = _declared(root)
    named = _names_in(root.rows("scope"), "id")
    row = root.row("implies")
    for name in row.values:
        _refer_to_permissions(row, name, (name, *row.texts(name)), permissions, named)


def _refer_to_permissions(
    row: _Row,
    key: str,
    texts: tuple[str, ...],
    known: set[str] | None,
    named: set[str],
) -> None:
    """Every text is a permission that is known.  A named scope stands for permissions, never for
    another; of a text that breaks its rule that has been told."""
    for one in texts:
        if one == EVERYTHING or one in (known or ()) or _scope_token(one) is not None:
            continue
        if one in named:
            row.tell(key, f"{_shown(one)} is a named scope; write its permissions instead")
        elif known is not None:
            cause = f"is no permission of this file; {_alternatives(one, known)}"
            row.tell(key, f"{_shown(one)} {cause}")


def _check_size(row: _Row, key: str) -> None:
    if len(" ".join(row.texts(key))) > MAX_LENGTH:
        row.tell(key, f"longer than {MAX_LENGTH} characters in all; write fewer, or *")


def _check_roles(root: _Row, settings: Settings) -> None:
    _unique(root.rows("role"), "name")
    _unique(root.rows("role"), "permission")


def _check_resources(root: _Row, settings: Settings) -> None:
    rows = root.rows("resource")
    types = _names_in(rows, "type")
    _unique(rows, "type")
    for row in rows:
        _unique(row.rows("segments"), "name")
        _refer(row, "within", types, "type of this file")


def _check_mcp(root: _Row, settings: Settings) -> None:
    audiences = _names_in(root.rows("audience"), "id")
    _refer(root.row("mcp"), "audience", audiences, "audience of this file")


def _check_connector(root: _Row, catalog: Catalog) -> None:
    """Every scope of the MCP server means something at its audience."""
    if catalog.connector is None:
        return
    audience = catalog.connector.audience
    for grant in catalog.connector.scopes:
        if not catalog.vocabulary(audience).expand(Scopes((grant,))):
            root.row("mcp").tell(
                "scopes",
                f"{_shown(str(grant))} means nothing at {audience}; write what has a meaning"
                " there, or another audience",
            )


_TOGETHER: Final = (
    _check_key,
    _check_audiences,
    _check_permissions,
    _check_scopes,
    _check_implies,
    _check_roles,
    _check_resources,
    _check_mcp,
)


# --- The catalog of a file without a problem


def _catalog(root: _Row, settings: Settings) -> Catalog:
    key = root.row("key")
    environments = _environments(root)
    management = management_audience(settings)
    audiences = [management, *map(_audience, root.rows("audience"))]
    defaults = {
        environment: row.text("id")
        for environment in environments
        for row in root.rows("audience")
        if row.flag("default") and row.text("environment", environment) == environment
    }
    models = root.row("models").texts("names")
    return Catalog(
        name=root.text("name", "Coatcheck"),
        brand=key.text("brand", DEFAULT_BRAND),
        environments=environments,
        environment_in_key=key.flag("environment_in_key", default=True),
        free_environments=frozenset(key.texts("free_environments")),
        api_key_header=key.text("header") or None,
        foreign_prefixes=key.texts("foreign_prefixes"),
        audiences={audience.id: audience for audience in audiences},
        default_audiences=defaults,
        management_audience=management.id,
        permissions=_permissions(root),
        named_scopes={row.text("id"): _named_scope(row) for row in root.rows("scope")},
        implies={name: tuple(implied) for name, implied in root.row("implies").values.items()},
        roles={row.text("name"): _role(row) for row in root.rows("role")},
        resource_types={row.text("type"): _resource_type(row) for row in root.rows("resource")},
        models=models or None,
        policies=_policies(root.row("policies")),
        device_scopes=(
            Scopes.of(root.row("device_keys").texts("scopes")) if root.has("device_keys") else None
        ),
        connector=_connector(root.row("mcp"), defaults[environments[0]]),
    )


def _audience(row: _Row) -> Audience:
    return Audience(
        id=row.text("id"),
        environment=row.text("environment") or None,
        algorithm=row.values.get("algorithm", "ES256"),
        token_type=row.values.get("token_type", "at+jwt"),
        enforces=row.text("verifier", "coatcheck") == "coatcheck",
    )


def _permissions(root: _Row) -> dict[str, Permission] | None:
    if not root.has("permission"):
        return None
    return {
        row.text("name"): Permission(
            name=row.text("name"),
            about=row.text("about"),
            audiences=frozenset(row.texts("audiences")) or None,
        )
        for row in root.rows("permission")
    }


def _named_scope(row: _Row) -> NamedScope:
    return NamedScope(
        id=row.text("id"),
        name=row.text("name"),
        about=row.text("about"),
        grants=Scopes.of(row.texts("grants")),
    )


def _role(row: _Row) -> RoleOffer:
    role = Role(row.text("name"), frozenset(row.texts("methods")))
    return RoleOffer(role, row.text("permission"), row.text("about"))


def _resource_type(row: _Row) -> ResourceType:
    segments = (
        Segment(segment.text("name"), segment.texts("values") or None)
        for segment in row.rows("segments")
    )
    return ResourceType(row.text("type"), tuple(segments), row.texts("within"))


def _policies(row: _Row) -> Policies:
    default = Policies()
    return Policies(
        recoverable=row.flag("recoverable", default=default.recoverable),
        max_lifetime_s=span(row.text("max_lifetime")),
        may_disable=row.flag("disable", default=default.may_disable),
        may_delete=row.flag("delete", default=default.may_delete),
    )


def _connector(row: _Row, default_audience: str) -> Connector | None:
    if not row.values:
        return None
    return Connector(
        name=row.text("name"),
        url=row.text("url"),
        audience=row.text("audience", default_audience),
        scopes=Scopes.of(row.texts("scopes")),
    )
