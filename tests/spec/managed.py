"""A deployment to ask about everything that openapi.yaml says of `/v1`, and who may ask.

Schemathesis makes requests of the document; they are sent here, in process, each by a caller that
may do what it is about.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from coatcheck.scope import OPERATOR, RESOURCE_SERVER
from spec.document import DOCUMENT, METHODS, ROOT
from support.deployment import AUDIENCE, ISSUER, Deployment, a_client, a_deployment

CATALOG: Final = f"""
name = "Widgets"

[key]
brand = "wd"
environments = ["live", "test"]
free_environments = ["test"]

[[audience]]
id = "{AUDIENCE}"
shared = true
default = true

[[permission]]
name = "widgets:read"

[[permission]]
name = "widgets:write"

[[scope]]
id = "all-widgets"
name = "All of widgets"
grants = ["widgets:read", "widgets:write"]

[[role]]
name = "viewer"
permission = "view"
methods = ["GET"]

[[resource]]
type = "PLACE"
segments = [{{ name = "kind", values = ["Site", "Room"] }}, {{ name = "id" }}]

[device_keys]
scopes = ["all-widgets"]

[mcp]
name = "widgets"
url = "https://mcp.example.com"
scopes = ["widgets:read"]
"""

Case = schemathesis.Case[Any]
#: Of each answer: is it documented at all, and as it is?
CHECKS: Final = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def strict() -> dict[str, Any]:
    """The part of the document below `/v1`, whose answers have no member that is not documented.

    What the document leaves open, so that a later release may add to it, this release does not
    have.
    """
    found = deepcopy(DOCUMENT)
    found["paths"] = {
        path: item for path, item in found["paths"].items() if path.startswith(f"{ROOT}/")
    }
    for item in found["paths"].values():
        for method in METHODS & set(item):
            item[method]["responses"] = _closed(item[method]["responses"])
    components = found["components"]
    components["responses"] = _closed(components["responses"])
    components["schemas"] = {
        name: schema if schema.get("additionalProperties") is False else _open(schema)
        for name, schema in components["schemas"].items()
    }
    return found


def _closed(node: Any) -> Any:
    """The same schema, closed where it is used, because others are built on what it refers to."""
    if isinstance(node, list):
        return [_closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {
        name: [_open(one) for one in value] if name == "allOf" else _closed(value)
        for name, value in node.items()
    }
    is_object = isinstance(node.get("properties"), dict)
    if is_object or "allOf" in node or "/schemas/" in str(node.get("$ref", "")):
        # Looks through `$ref` and `allOf`, as `additionalProperties` does not.
        found["unevaluatedProperties"] = False
    return found


def _open(node: Any) -> Any:
    found = _closed(node)
    found.pop("unevaluatedProperties", None)
    return found


@dataclass(frozen=True, slots=True)
class Managed:
    """A deployment with a caller for everything.

    Attributes:
        admin: the token of whoever administers the organization.
        operator: of one with the platform's permissions.
        member: of a member, who signs in on devices.
        callers: ids of these three, and of what they depend on.
        known: ids of things that stand for those which nobody has.
    """

    deployment: Deployment
    http: TestClient
    admin: str = field(repr=False)
    operator: str = field(repr=False)
    member: str = field(repr=False)
    callers: frozenset[str]
    known: Mapping[str, str]
    _sent: Counter[str] = field(default_factory=Counter, repr=False)

    def caller_of(self, method: str, path: str) -> str:
        """The API key of a caller that may do this."""
        operation = DOCUMENT["paths"][path].get(method.lower())
        permissions = operation["security"][0]["oauth2"] if operation else []
        if path.startswith(f"{ROOT}/devices"):
            return self.member
        if path.startswith(f"{ROOT}/organizations") or set(permissions) & {
            OPERATOR,
            RESOURCE_SERVER,
        }:
            return self.operator
        return self.admin

    def send_likely(self, case: Case) -> schemathesis.Response:
        """Send a made-up request so that it gets far: about things that exist, as if it were new.

        One of eight stays as it is.
        """
        line = f"{case.method} {case.path}"
        self._sent[line] += 1
        number = self._sent[line]
        if number % 8:
            for name, value in case.path_parameters.items():
                if re.fullmatch(r"[a-z]{3}_[0-9A-Za-z]{22}", str(value)):
                    case.path_parameters[name] = self.known[name]
            repeated = case.headers.get("Idempotency-Key")
            if repeated and re.fullmatch("[!-~]{1,200}", str(repeated)):
                case.headers["Idempotency-Key"] = f"{repeated}-{number}"
        return self.send_harmless(case)

    def send_harmless(self, case: Case) -> schemathesis.Response:
        """Send a request that changes none of the callers, which are needed to the end."""
        if case.method.upper() != "GET":
            for name, value in case.path_parameters.items():
                if value in self.callers:
                    case.path_parameters[name] = f"{str(value)[:4]}{'0' * 22}"
        return self.send(case)

    def send(self, case: Case, caller: str | None = None) -> schemathesis.Response:
        """Send a request, as somebody who may do this unless a caller is named; empty: nobody."""
        prepared = requests.Request(**case.as_transport_kwargs(base_url=ISSUER)).prepare()
        assert prepared.method is not None
        assert prepared.url is not None
        headers = {
            name.encode(): value if isinstance(value, bytes) else value.encode("latin-1")
            for name, value in prepared.headers.items()
        }
        if caller is None:
            caller = self.caller_of(case.method, case.path)
        if caller:
            headers[b"Authorization"] = f"Bearer {caller}".encode()
        answer = self.http.request(
            prepared.method, prepared.url, headers=headers, content=prepared.body
        )
        return schemathesis.Response.from_any(answer)

    def require_callers(self) -> None:
        """Raise unless each caller is still known, or what was asked since then says little."""
        for token in (self.admin, self.operator, self.member):
            told = self.http.get(f"{ROOT}/whoami", headers={"Authorization": f"Bearer {token}"})
            assert told.status_code == 200, told.text


@contextmanager
def a_managed_deployment(folder: Path) -> Iterator[Managed]:
    """A deployment with a catalog in which nothing is missing, and its callers."""
    catalog = folder / "coatcheck.toml"
    catalog.write_text(CATALOG, "utf-8")
    with a_deployment(folder, catalog=catalog) as made, a_client(made) as http:
        management = made.catalog.management_audience

        def token_of(key: str) -> str:
            asked = {"grant_type": "client_credentials", "client_secret": key}
            answer = http.post("/oauth/token", data=asked | {"resource": management})
            return str(answer.json()["access_token"])

        def ask(token: str, path: str, body: object) -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {token}"}
            answer = http.post(f"{ROOT}{path}", headers=headers, json=body)
            assert answer.is_success, answer.text
            return dict(answer.json())

        operator = made.api_key(OPERATOR, RESOURCE_SERVER, name="o", audiences=(management,))
        admin, platform = token_of(made.initialized.key), token_of(operator.key)
        ada = {"name": "Ada", "email": "ada@example.com", "role": "admin"}
        person = ask(admin, "/members", ada)
        member = ask(admin, "/keys", {"name": "of Ada", "member": person["id"]})
        bo = {"name": "Bo", "email": "bo@example.com", "role": "viewer"}
        yield Managed(
            made,
            http,
            admin,
            platform,
            token_of(member["key"]),
            callers=frozenset(
                (
                    *(made.initialized.key_id, operator.api_key.id, member["id"]),
                    *(person["id"], made.organization_id),
                )
            ),
            known={
                "key": ask(admin, "/keys", {"name": "a"})["id"],
                "organization": ask(platform, "/organizations", {"name": "Beta"})["id"],
                "project": ask(admin, "/projects", {"name": "a"})["id"],
                "group": ask(platform, "/groups", {"name": "a"})["id"],
                "member": ask(admin, "/members", bo)["id"],
            },
        )


def _take_an_example(case: Case, number: int) -> None:
    """Send one of the documented bodies, as if nobody had ever sent it before."""
    operation = DOCUMENT["paths"][case.path].get(case.method.lower(), {})
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    examples = list(content["examples"].values())
    body = deepcopy(examples[number % len(examples)]["value"])
    if "email" in body:
        body["email"] = f"{number}@example.com"
    if isinstance(case.body, dict) and "member" in case.body:
        # It came along a link.
        body = case.body
    case.body = body
    case.media_type = "application/json"
    case.headers.pop("Idempotency-Key", None)


def walk(
    schema: Any, folder: Path, *, walks: int, steps: int, seed: int | None = None
) -> Counter[str]:
    """Go along the links of the document, at random but for the seed.

    Each walk has a deployment of its own: what one of them leaves behind must not change what
    another one meets, or nobody could repeat it.

    Args:
        folder: for their files.
        walks: how many, each of at most so many `steps`.
        seed: None: the same walks each time.

    Returns:
        How often each operation succeeded with what another one had answered.

    Raises:
        FailureGroup: an answer is not as documented.
    """
    linked: Counter[str] = Counter()

    class Walk(schema.as_state_machine()):  # type: ignore[misc]  # made at run time
        def setup(self) -> None:
            self.stack = ExitStack()
            own = Path(tempfile.mkdtemp(dir=folder))
            self.managed = self.stack.enter_context(a_managed_deployment(own))
            self.numbers = count(1)

        def teardown(self) -> None:
            with self.stack:
                self.managed.require_callers()

        def call(self, case: Case, **_: Any) -> schemathesis.Response:
            return self.managed.send_harmless(case)

        def validate_response(
            self, response: schemathesis.Response, case: Case, *_: Any, **__: Any
        ) -> None:
            case.validate_response(response, checks=CHECKS)

        def step(self, input: Any) -> Any:  # noqa: A002 - Schemathesis calls it so
            # What is made up is seldom good for anything: three of four bodies are examples.
            number = next(self.numbers)
            if number % 4:
                _take_an_example(input.case, number)
            output = super().step(input)
            if input.transition is not None and output.response.status_code < 300:
                linked[f"{input.case.method.upper()} {input.case.path}"] += 1
            return output

    chosen = settings(
        max_examples=walks,
        stateful_step_count=steps,
        deadline=None,
        derandomize=seed is None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    machine = Walk if seed is None else hypothesis.seed(seed)(Walk)
    machine.run(settings=chosen)
    return linked
