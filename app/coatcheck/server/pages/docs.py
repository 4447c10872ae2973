"""The documentation page at /docs and the refusal at /oauth/authorize, as HTML.

The documentation is `openapi.yaml` read aloud: this module turns the document into a tree of
plain values, and the templates only walk through that tree.  A page runs no script and loads
nothing.  Its one style sheet stands inside it, and STYLE_HASH is what a Content-Security-Policy
needs to allow that style and nothing else.

This module knows nothing of HTTP: it takes texts and returns texts.

Source: OpenAPI 3.1.1 §4.8 (objects), CSP Level 3 §2.3.1 (hash sources).
"""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coatcheck.server.pages import prose

#: A JSON object of the document.  What it holds, `tests/spec` has validated.
Node = Mapping[str, Any]

_METHODS: Final = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
_FORM: Final = "application/x-www-form-urlencoded"
_DOCUMENT: Final = "openapi.yaml"
#: In C, if PyYAML was built with it: a tenth of the time.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: An answer that more operations share is described once, and they only point to it.
_FEW: Final = 3
#: Has the form of an API key with a checksum that does not fit, so nobody can ever hold it.
_EXAMPLE_API_KEY: Final = "ck_live_EXAMPLEEXAMPLEEXAMPLEEXAMPLE0000000000"

_TEMPLATES: Final = Environment(
    loader=PackageLoader("coatcheck.server.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _hash_source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


#: For `style-src`, without the quotes around it.  The base template includes the same file.
STYLE_HASH: Final = _hash_source(_TEMPLATES.get_template("style.css").render())


@dataclass(frozen=True, slots=True)
class Field:
    """A form field, a member of an object, or a header that is sent along."""

    name: str
    is_required: bool
    kind: str
    """Type and bounds, in words."""
    shape: str | None
    """The shape that its value has, if that is described on its own."""
    pattern: str | None
    description: Markup


@dataclass(frozen=True, slots=True)
class Example:
    """A text that was sent or answered, and what it shows."""

    name: str
    summary: Markup
    text: str


@dataclass(frozen=True, slots=True)
class Header:
    """A header of an answer."""

    name: str
    is_required: bool
    description: Markup
    example: str


@dataclass(frozen=True, slots=True)
class Body:
    """What a request or an answer carries, in one media type."""

    media_type: str
    shape: str | None
    fields: tuple[Field, ...]
    examples: tuple[Example, ...]

    @property
    def is_form(self) -> bool:
        return self.media_type == _FORM


@dataclass(frozen=True, slots=True)
class Answer:
    """One status that an operation can answer with.

    Attributes:
        shared: its name, if it is described once for many operations.
    """

    status: int
    phrase: str
    description: Markup
    headers: tuple[Header, ...]
    bodies: tuple[Body, ...]
    shared: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether the caller got what was asked for."""
        return self.status < HTTPStatus.BAD_REQUEST


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Attributes:
        permission: what the caller needs beside a credential.
    """

    id: str
    method: str
    path: str
    summary: str
    description: Markup
    needs_api_key: bool
    permission: str | None
    path_parameters: tuple[Field, ...]
    headers: tuple[Field, ...]
    query: tuple[Field, ...]
    parameter_examples: tuple[Example, ...]
    request: Body | None
    answers: tuple[Answer, ...]

    @property
    def own_answers(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.shared is None)

    @property
    def shared_answers(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.shared is not None)


@dataclass(frozen=True, slots=True)
class Group:
    """Operations that belong together: a tag of the document."""

    id: str
    name: str
    description: Markup
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """An object that is sent or answered: its members, what it can be, or what it builds on.

    Attributes:
        base: the shape whose members it has, too; `fields` are those that are otherwise here.
    """

    name: str
    description: Markup
    fields: tuple[Field, ...]
    one_of: tuple[str, ...]
    base: str | None


@dataclass(frozen=True, slots=True)
class Term:
    """A word with its meaning: an error code, or a way to send credentials."""

    id: str
    name: str
    description: Markup


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows."""

    title: str
    version: str
    summary: str
    description: Markup
    quick_start: tuple[str, ...]
    credentials: tuple[Term, ...]
    groups: tuple[Group, ...]
    shared: tuple[Answer, ...]
    elsewhere: tuple[Answer, ...]
    anywhere: tuple[Answer, ...]
    error_codes: tuple[Term, ...]
    problem_codes: tuple[Term, ...]
    shapes: tuple[Shape, ...]


def openapi_text() -> str:
    """The text of `openapi.yaml`: the packaged one, or in a checkout the one at the top.

    Raises:
        FileNotFoundError: there is neither, so the installation is damaged.
    """
    packaged = resources.files("coatcheck.server.pages").joinpath(_DOCUMENT)
    if packaged.is_file():
        return packaged.read_text("utf-8")
    # pages, server, coatcheck, app, top.  Anywhere but in a checkout, the directory above this
    # package is not called `app`, and what lies above that one is none of ours.
    *_, app, top = Path(__file__).resolve().parents[:5]
    if app.name == "app" and (top / _DOCUMENT).is_file():
        return (top / _DOCUMENT).read_text("utf-8")
    raise FileNotFoundError(
        f"{_DOCUMENT} is neither packaged in coatcheck.server.pages nor at the top of a checkout;"
        " install coatcheck again"
    )


@lru_cache(maxsize=2)
def render_docs(openapi_text: str, issuer: str) -> str:
    """The documentation page.

    Args:
        openapi_text: the OpenAPI document, as YAML.
        issuer: the configured issuer, which the examples then show instead of the default one.

    Raises:
        KeyError: the document refers to something that it does not have.
    """
    document = yaml.load(openapi_text, Loader=_LOADER)  # noqa: S506 - a safe one
    default_issuer = document["servers"][0]["url"]
    page = _Reader(_replaced(document, default_issuer, issuer.rstrip("/"))).page(issuer)
    return _TEMPLATES.get_template("docs.html").render(page=page, links=_Links.of(issuer))


def authorize_page(issuer: str) -> str:
    """The page that /oauth/authorize answers: nobody signs in here, and where to go instead."""
    return _TEMPLATES.get_template("authorize.html").render(links=_Links.of(issuer))


@dataclass(frozen=True, slots=True)
class _Links:
    """Where a page points to.  All of it is a link to follow, none of it is loaded."""

    issuer: str
    token: str
    docs: str
    openapi: str

    @classmethod
    def of(cls, issuer: str) -> "_Links":
        base = issuer.rstrip("/")
        return cls(issuer, f"{base}/oauth/token", f"{base}/docs", f"{base}/openapi.yaml")


def _quick_start(issuer: str) -> tuple[str, ...]:
    """Five lines for a shell.  No comments in them: an interactive zsh would run those."""
    base = issuer.rstrip("/")
    token = shlex.quote(f"{base}/oauth/token")
    ask = f'-u "$API_KEY:" -d grant_type=client_credentials {token}'
    pick = """sed -E 's/.*"access_token": *"([^"]+)".*/\\1/'"""
    return (
        f"API_KEY={_EXAMPLE_API_KEY}",
        f"curl {ask}",
        f"TOKEN=$(curl -s {ask} | {pick})",
        f'curl -u "$API_KEY:" -d "token=$TOKEN" {shlex.quote(f"{base}/oauth/introspect")}',
        f"curl {shlex.quote(f'{base}/.well-known/jwks.json')}",
    )


class _Reader:
    """Reads one OpenAPI document.  Every `$ref` in it points into the document itself."""

    def __init__(self, document: Node) -> None:
        self._document = document
        self._schemas: Node = document["components"]["schemas"]
        uses = Counter(
            _name_of(answer)
            for item in document["paths"].values()
            for node in item.values()
            for answer in node["responses"].values()
            if "$ref" in answer
        )
        self._shared = frozenset(name for name, count in uses.items() if count > _FEW)

    def page(self, issuer: str) -> Page:
        info = self._document["info"]
        schemes = self._document["components"]["securitySchemes"]
        return Page(
            title=info["title"],
            version=info["version"],
            summary=info["summary"],
            description=prose.blocks(info["description"]),
            quick_start=_quick_start(issuer),
            credentials=tuple(
                Term(name, scheme["x-displayName"], prose.blocks(scheme["description"]))
                for name, scheme in schemes.items()
            ),
            groups=tuple(self._groups()),
            shared=tuple(self._shared_answers()),
            elsewhere=self._answers(self._document.get("x-any-other-path", {})),
            anywhere=self._answers(self._document.get("x-any-path", {})),
            error_codes=self._codes("ErrorCode"),
            problem_codes=self._codes("ProblemCode"),
            shapes=tuple(self._shapes()),
        )

    def _codes(self, schema: str) -> tuple[Term, ...]:
        meanings: Mapping[str, str] = self._schemas[schema]["x-enumDescriptions"]
        return tuple(Term(code, code, prose.inline(text)) for code, text in meanings.items())

    def _groups(self) -> Iterator[Group]:
        operations = [
            (node["tags"][0], self._operation(method, path, node))
            for path, item in self._document["paths"].items()
            for method, node in item.items()
            if method in _METHODS
        ]
        for tag in self._document["tags"]:
            name = tag["name"]
            yield Group(
                id=name.lower().replace(" ", "-"),
                name=name,
                description=prose.blocks(tag["description"]),
                operations=tuple(operation for its_tag, operation in operations if its_tag == name),
            )

    def _operation(self, method: str, path: str, node: Node) -> Operation:
        parameters = [self._resolved(parameter) for parameter in node.get("parameters", ())]
        line = f"{method.upper()} {path}"
        permissions = [one for way in node["security"] for one in way.get("oauth2", ())]
        return Operation(
            id=node["operationId"],
            method=method.upper(),
            path=path,
            summary=node["summary"],
            description=prose.blocks(node["description"]),
            needs_api_key=bool(node["security"]),
            permission=" ".join(permissions) or None,
            path_parameters=self._parameters(parameters, "path"),
            headers=self._parameters(parameters, "header"),
            query=self._parameters(parameters, "query"),
            parameter_examples=tuple(
                Example(name, prose.inline(example["summary"]), f"{line}\n{sent}")
                for parameter in parameters
                for name, example in parameter.get("examples", {}).items()
                for sent in (f"{parameter['name']}: {example['value']}",)
            ),
            request=self._request(line, node.get("requestBody")),
            answers=self._answers(node["responses"]),
        )

    def _parameters(self, parameters: Sequence[Node], place: str) -> tuple[Field, ...]:
        return tuple(
            self._field(
                parameter["name"],
                {**parameter["schema"], "description": parameter["description"]},
                is_required=parameter.get("required", False),
            )
            for parameter in parameters
            if parameter["in"] == place
        )

    def _request(self, line: str, node: Node | None) -> Body | None:
        if node is None:
            return None
        ((media_type, content),) = self._resolved(node)["content"].items()
        return Body(
            media_type=media_type,
            shape=None,
            fields=self._fields(self._resolved(content["schema"])),
            examples=tuple(
                Example(
                    name, prose.inline(example["summary"]), _as_request(line, media_type, example)
                )
                for name, example in self._examples(content)
            ),
        )

    def _answers(self, nodes: Node) -> tuple[Answer, ...]:
        return tuple(
            self._answer(
                int(status),
                self._resolved(answer),
                _name_of(answer) if "$ref" in answer else None,
            )
            for status, answer in nodes.items()
        )

    def _answer(self, status: int, answer: Node, name: str | None) -> Answer:
        return Answer(
            status=status,
            phrase=HTTPStatus(status).phrase,
            description=prose.blocks(answer["description"]),
            headers=tuple(
                Header(
                    name,
                    header.get("required", False),
                    prose.inline(header["description"]),
                    str(header["example"]),
                )
                for name, header in (
                    (name, self._resolved(header))
                    for name, header in answer.get("headers", {}).items()
                )
            ),
            bodies=tuple(
                Body(
                    media_type=media_type,
                    shape=self._shape_of(content["schema"]),
                    fields=(),
                    examples=tuple(
                        Example(
                            name,
                            prose.inline(example["summary"]),
                            _as_text(media_type, example["value"]),
                        )
                        for name, example in self._examples(content)
                    ),
                )
                for media_type, content in answer.get("content", {}).items()
            ),
            shared=name if name in self._shared else None,
        )

    def _shared_answers(self) -> Iterator[Answer]:
        """Each shared answer once, by status."""
        found: dict[str, Answer] = {}
        for item in self._document["paths"].values():
            for node in item.values():
                for answer in self._answers(node["responses"]):
                    if answer.shared is not None:
                        found.setdefault(answer.shared, answer)
        yield from sorted(found.values(), key=attrgetter("status"))

    def _examples(self, content: Node) -> Iterator[tuple[str, Node]]:
        for name, example in content["examples"].items():
            yield name, self._resolved(example)

    def _shapes(self) -> Iterator[Shape]:
        asked = set(self._request_schemas())
        for name, schema in self._schemas.items():
            if name in asked or not _is_shape(schema):
                continue
            base, own = self._building(schema)
            yield Shape(
                name=name,
                description=prose.blocks(schema["description"]),
                fields=self._fields(own),
                one_of=tuple(_name_of(variant) for variant in schema.get("oneOf", ())),
                base=base,
            )

    def _building(self, schema: Node) -> tuple[str | None, Node]:
        """What an `allOf` of a base and its own members says; else the schema as it is.

        A member that the base has as well is narrowed, any other is added.
        """
        if "allOf" not in schema:
            return None, schema
        base, own = schema["allOf"]
        known = self._resolved(base)
        merged = {
            name: {**self._resolved(known["properties"].get(name, {})), **member}
            for name, member in own["properties"].items()
        }
        required = [*known.get("required", ()), *own.get("required", ())]
        return _name_of(base), {"properties": merged, "required": required}

    def _request_schemas(self) -> Iterator[str]:
        for item in self._document["paths"].values():
            for node in item.values():
                for content in node.get("requestBody", {}).get("content", {}).values():
                    yield _name_of(content["schema"])

    def _fields(self, schema: Node) -> tuple[Field, ...]:
        return tuple(
            self._field(name, member, is_required=name in schema.get("required", ()))
            for name, member in schema.get("properties", {}).items()
        )

    def _field(self, name: str, schema: Node, *, is_required: bool) -> Field:
        resolved = self._resolved(schema)
        return Field(
            name=name,
            is_required=is_required,
            kind=_kind(resolved),
            shape=self._shape_of(schema) or self._shape_of(resolved.get("items", {})),
            pattern=resolved.get("pattern"),
            description=prose.inline(resolved["description"].strip()),
        )

    def _shape_of(self, schema: Node) -> str | None:
        if "$ref" not in schema or not _is_shape(self._resolved(schema)):
            return None
        return _name_of(schema)

    def _resolved(self, node: Node) -> Node:
        """The node itself, or what its `$ref` names with the members beside the `$ref` on top."""
        while "$ref" in node:
            root, *path = node["$ref"].split("/")
            if root != "#":
                raise KeyError(node["$ref"])
            target: Any = self._document
            for part in path:
                target = target[part]
            node = {**target, **{name: node[name] for name in node if name != "$ref"}}
        return node


def _name_of(reference: Node) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _is_shape(schema: Node) -> bool:
    """Whether a schema is described on its own: objects are, texts and numbers are not."""
    return schema.get("type") == "object" or "oneOf" in schema or "allOf" in schema


def _kind(schema: Node) -> str:
    """Type and bounds of a value, in words: `integer, 1 to 600`."""
    if "const" in schema:
        return f"always {_literal(schema['const'])}"
    if "enum" in schema:
        *most, last = map(_literal, schema["enum"])
        return f"{', '.join(most)} or {last}" if most else f"always {last}"
    told = schema.get("type", "object")
    kinds = [told] if isinstance(told, str) else told
    kind = " or ".join(_list_of(schema["items"]) if one == "array" else one for one in kinds)
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is not None and highest is not None:
        return f"{kind}, {lowest} to {highest}"
    if lowest is not None:
        return f"{kind}, {lowest} or more"
    if "maxLength" in schema:
        return f"{kind}, at most {schema['maxLength']} characters"
    return kind


def _list_of(item: Node) -> str:
    return "list" if "$ref" in item else f"list of {_kind(item)}"


def _literal(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _as_request(line: str, media_type: str, example: Node) -> str:
    """An example of a request, as it goes over the wire but for the headers of every client."""
    head = [line]
    if "x-authorization" in example:
        head.append(f"Authorization: {example['x-authorization']}")
    head.append(f"Content-Type: {media_type}")
    return "\n".join([*head, "", _as_text(media_type, example["value"])])


def _as_text(media_type: str, value: Any) -> str:
    if isinstance(value, str):
        return value.rstrip("\n")
    if media_type == _FORM:
        return urlencode(value)
    if media_type.endswith("yaml"):
        return yaml.safe_dump(value, sort_keys=False).rstrip("\n")
    return json.dumps(value, indent=2, ensure_ascii=False)


def _replaced(node: Any, old: str, new: str) -> Any:
    """The same tree with one text replaced in all its texts, but not in its names."""
    if isinstance(node, str):
        return node.replace(old, new)
    if isinstance(node, dict):
        return {name: _replaced(value, old, new) for name, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, old, new) for value in node]
    return node
