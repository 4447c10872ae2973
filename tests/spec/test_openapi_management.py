"""openapi.yaml against the code of the management API: the same operations, inputs and codes.

What its answers are like, `test_openapi_management_service` finds out by asking.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from coatcheck.scope import ORGANIZATION_PERMISSIONS, PLATFORM_PERMISSIONS
from coatcheck.server import inprocess, manage
from coatcheck.server.manage.api.call import Handler, Route
from coatcheck.server.manage.api.dispatch import IDEMPOTENT_FOR
from coatcheck.server.manage.api.routes import ROUTES
from coatcheck.server.manage.api.wire import MAX_BODY_BYTES, MAX_LIMIT, Body, Query
from coatcheck.server.manage.usage import REMEMBERED
from coatcheck.verifier import errors
from spec.document import DOCUMENT, OPERATIONS, ROOT, SCHEMAS, parameters, resolved

MANAGED: Final = {name: operation for name, operation in OPERATIONS.items() if f" {ROOT}/" in name}
every_route = pytest.mark.parametrize(
    "route", ROUTES, ids=[f"{route.method} {route.path}" for route in ROUTES]
)


def operation_of(route: Route) -> dict[str, Any]:
    return OPERATIONS[f"{route.method} {ROOT}{route.path}"]


def test_every_route_is_in_the_document_and_the_other_way_round() -> None:
    """What exists is documented, and what is documented exists."""
    routes = [f"{route.method} {ROOT}{route.path}" for route in ROUTES]

    assert len(set(routes)) == len(routes)
    assert set(routes) == set(MANAGED)


# --- who may


@every_route
def test_an_operation_names_the_permission_of_its_route(route: Route) -> None:
    """OpenAPI 3.1.1 §4.8.30: the scopes of oauth2; whoever sends an API key needs the same."""
    operation = operation_of(route)
    permission = [] if route.permission is None else [route.permission]

    assert operation["security"] == [
        {"oauth2": permission},
        {"apiKey": []},
        {"apiKeyHeader": []},
        {"apiKeyUser": []},
    ]
    assert {"401", "403"} <= set(operation["responses"])


def test_all_permissions_are_explained() -> None:
    flow = DOCUMENT["components"]["securitySchemes"]["oauth2"]["flows"]["clientCredentials"]

    assert list(flow["scopes"]) == [*ORGANIZATION_PERMISSIONS, *PLATFORM_PERMISSIONS]


# --- what is sent

Input = type[Body] | type[Query]


def read_by(handler: Handler) -> Iterator[Input]:
    """What a handler reads of a request: the classes that it names in `call.body` and `.query`."""
    for node in ast.walk(ast.parse(inspect.getsource(handler))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name("call"), attr="body" | "query"),
                args=[ast.Name(name)],
            ):
                yield vars(sys.modules[handler.__module__])[name]


def body_of(route: Route) -> type[Body] | None:
    found = [one for one in read_by(route.handler) if issubclass(one, Body)]
    assert len(found) <= 1
    return found[0] if found else None


def query_of(route: Route) -> type[Query] | None:
    found = [one for one in read_by(route.handler) if issubclass(one, Query)]
    assert len(found) <= 1
    return found[0] if found else None


def nested(kind: Input) -> Iterator[Input]:
    yield kind
    for field in kind.model_fields.values():
        for part in getattr(field.annotation, "__args__", ()):
            if inspect.isclass(part) and issubclass(part, Body | Query):
                yield from nested(part)


def test_no_input_is_overlooked() -> None:
    """Each class of inputs is found by way of its handler, so that the tests below see it."""
    modules = {sys.modules[route.handler.__module__] for route in ROUTES}
    defined = set(chain.from_iterable(map(_inputs, modules)))
    read = {one for route in ROUTES for one in read_by(route.handler)}

    assert {one for kind in read for one in nested(kind)} == defined


def _inputs(module: ModuleType) -> Iterator[Input]:
    for value in vars(module).values():
        is_own = inspect.isclass(value) and value.__module__ == module.__name__
        if is_own and issubclass(value, Body | Query):
            yield value


@every_route
def test_a_body_has_the_members_that_its_handler_reads(route: Route) -> None:
    """Names, which of them are required, what they may be, bounds and defaults."""
    body = body_of(route)
    operation = operation_of(route)
    if body is None:
        assert "requestBody" not in operation
        return
    (content,) = operation["requestBody"]["content"].items()
    said = content[1]["schema"]
    read = body.model_json_schema(by_alias=True)

    assert content[0] == "application/json"
    # An edit of nothing is no error, and nobody means it.
    is_required = route.method == "PATCH" or bool(read.get("required"))
    assert operation["requestBody"]["required"] == is_required
    require_same(said, read, read.get("$defs", {}))


def require_same(said: Mapping[str, Any], read: Mapping[str, Any], parts: dict[str, Any]) -> None:
    said = resolved(dict(said))
    members = said["properties"]

    assert said["additionalProperties"] is False
    assert set(members) == set(read["properties"])
    assert set(said.get("required", ())) == set(read.get("required", ()))
    for name, member in members.items():
        told, known = resolved(member), read["properties"][name]
        # What may be null by its type, and is refused by a rule, is not documented as such.
        assert kinds(told) - kinds(known) == set(), name
        assert kinds(known) - kinds(told) <= {"null"}, name
        require_same_bounds(told, known, name)
        items = told.get("items")
        if items is not None and "$ref" in items:
            require_same(items, parts[known["items"]["$ref"].rpartition("/")[2]], parts)


@every_route
def test_a_query_has_the_parameters_that_its_handler_reads(route: Route) -> None:
    query = query_of(route)
    told = {one["name"]: one for one in parameters(operation_of(route), "query")}
    read = {} if query is None else query.model_json_schema(by_alias=True)["properties"]

    assert set(told) == set(read)
    for name, parameter in told.items():
        assert not parameter.get("required", False)
        assert kinds(parameter["schema"]) == kinds(read[name]) - {"null"}, name
        require_same_bounds(parameter["schema"], read[name], name)


def kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types of a value; every whole number is a number."""
    if "anyOf" in schema:
        found = set(chain.from_iterable(map(kinds, schema["anyOf"])))
    else:
        told = schema.get("type", "object")
        found = {told} if isinstance(told, str) else set(told)
    return found - {"integer"} if "number" in found else found


#: What pydantic says of a value beside its type.
BOUNDS: Final = (
    *("enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
)


def require_same_bounds(told: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    """What the code bounds, the document bounds likewise; what it defaults to, it says."""
    variants = [*known.get("anyOf", ()), known]
    for bound in BOUNDS:
        for variant in variants:
            if bound in variant:
                assert told.get(bound) == variant[bound], (name, bound)
    if "default" in told:
        assert told["default"] == known["default"], name


@every_route
def test_a_path_has_the_parameters_that_its_route_has(route: Route) -> None:
    named = {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
    told = parameters(operation_of(route), "path")

    assert {one["name"] for one in told} == named
    assert all(one["required"] for one in told)


@every_route
def test_every_post_may_be_repeated(route: Route) -> None:
    """An Idempotency-Key is looked at on POST, and on nothing else; 422 is its misuse."""
    operation = operation_of(route)
    names = {one["name"] for one in parameters(operation, "header")}

    assert ("Idempotency-Key" in names) == (route.method == "POST")
    assert ("422" in operation["responses"]) == (route.method == "POST")


@every_route
def test_every_edit_wants_the_version_that_was_read(route: Route) -> None:
    """RFC 9110 §13.1.1 (If-Match), RFC 6585 §3 (428)."""
    operation = operation_of(route)
    is_edit = route.method == "PATCH"

    assert ("If-Match" in {one["name"] for one in parameters(operation, "header")}) == is_edit
    assert ({"412", "428"} <= set(operation["responses"])) == is_edit
    assert ("415" in operation["responses"]) == (body_of(route) is not None)


def test_its_numbers_are_those_of_the_code() -> None:
    shared = DOCUMENT["components"]["parameters"]
    limit = shared["Limit"]["schema"]
    large = DOCUMENT["components"]["responses"]["LargeBody"]
    reports = OPERATIONS[f"POST {ROOT}/usage"]

    assert f"in {IDEMPOTENT_FOR // 3600} hours" in shared["IdempotencyKey"]["description"]
    assert f"in {REMEMBERED // 3600} hours" in reports["description"]
    assert limit["maximum"] == limit["default"] == MAX_LIMIT
    assert f"{MAX_BODY_BYTES // 1024} KiB" in large["description"]


# --- what can be refused

SOURCES: Final = (*Path(manage.__path__[0]).rglob("*.py"), Path(inprocess.__file__))


def raised() -> Iterator[tuple[int, str]]:
    """Every status and code that the source makes a problem of."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name("Problem"),
                    args=[ast.Constant(int(status)), ast.Constant(str(code)), *_],
                ):
                    yield status, code
                case ast.Call(func=ast.Name("Conflict"), args=[_, ast.Constant(str(code)), *_]):
                    yield 409, code
                case ast.Call(func=ast.Name("Conflict"), args=[_]):
                    yield 409, "conflict"


def told_by(name: str) -> tuple[int, set[str]]:
    """The status and the codes of a schema that narrows Problem."""
    own = SCHEMAS[name]["allOf"][1]["properties"]
    code = own["code"]
    return own["status"]["const"], {code["const"]} if "const" in code else set(code["enum"])


PROBLEMS: Final = dict(
    told_by(name)
    for name, schema in SCHEMAS.items()
    if schema.get("allOf", [{}])[0] == {"$ref": "#/components/schemas/Problem"}
)


@pytest.mark.parametrize(("status", "code"), sorted(set(raised())))
def test_every_problem_of_the_source_is_documented(status: int, code: str) -> None:
    """A code that nobody documented is one that no client looks for."""
    assert code in PROBLEMS[status]


def test_no_problem_gets_its_code_from_elsewhere() -> None:
    """The search above sees codes that are written where the problem is made: all but these."""
    unseen = [
        ast.unparse(node)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"Problem", "Conflict"}
        and not any(isinstance(one, ast.Constant | ast.JoinedStr | ast.BinOp) for one in node.args)
    ]
    assert all(one.startswith("Problem(409, error.code") for one in unseen)


#: Of our own verifier's refusals: what no request to the management API can meet.
NEVER_HERE: Final = {
    "tokens_only": "this API takes API keys as they are",
    "model_not_allowed": "it has no models",
    "stale_feed": "it reads the change log itself",
}


@pytest.mark.parametrize("error", errors.ERRORS.values(), ids=errors.ERRORS)
def test_every_refusal_of_the_verifier_is_documented(error: type[errors.VerifierError]) -> None:
    if error.code in NEVER_HERE:
        assert error.code not in SCHEMAS["ProblemCode"]["enum"]
    else:
        assert error.code in PROBLEMS[int(error.status)]
