"""openapi.yaml for whoever compares with it, read once."""

from typing import Any, Final

import yaml
from openapi_schema_validator import OAS31Validator, oas31_format_checker

from coatcheck.server import pages

TEXT: Final = pages.openapi_text()
# The loader in C takes a tenth of the time.
DOCUMENT: Final[dict[str, Any]] = yaml.load(TEXT, Loader=yaml.CSafeLoader)
SCHEMAS: Final[dict[str, Any]] = DOCUMENT["components"]["schemas"]
METHODS: Final = frozenset(
    ("get", "put", "post", "delete", "options", "head", "patch", "trace"),
)
#: Below this path the management API begins.
ROOT: Final = "/v1"

OPERATIONS: Final[dict[str, dict[str, Any]]] = {
    f"{method.upper()} {path}": node
    for path, item in DOCUMENT["paths"].items()
    for method, node in item.items()
    if method in METHODS
}


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """The node itself, or what its `$ref` names with the members beside the `$ref` on top."""
    while "$ref" in node:
        target: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target | {name: value for name, value in node.items() if name != "$ref"}
    return node


def parameters(operation: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """What an operation takes in its path, query or headers."""
    every = map(resolved, operation.get("parameters", ()))
    return [parameter for parameter in every if parameter["in"] == place]


def faults(schema: dict[str, Any], value: Any) -> list[str]:
    """What a value breaks in a schema of the document."""
    rooted = {**schema, "components": DOCUMENT["components"]}
    validator = OAS31Validator(rooted, format_checker=oas31_format_checker)
    return [error.message for error in validator.iter_errors(value)]
