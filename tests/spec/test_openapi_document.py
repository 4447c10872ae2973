"""`openapi.yaml` is a document that tools can read and people can trust.

Source: OpenAPI 3.1.1; RFC 6749 §5.1 and §5.2 (headers, characters of a description).
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from coatcheck import apikey, feed_profile, ids, scope
from coatcheck.durations import (
    FEED_FRESH,
    FEED_STALE,
    FEED_WAIT_MAX,
    FEED_WINDOW,
    JWKS_MAX_AGE,
    TOKEN_LIFETIME,
)
from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.oauth.grants import GRANTS, token_exchange
from coatcheck.server.signing import FEED_ALGORITHM
from spec.document import DOCUMENT, OPERATIONS, SCHEMAS, TEXT, faults, resolved

FORM = "application/x-www-form-urlencoded"
WITH_API_KEY = ("/oauth/token", "/oauth/introspect", "/oauth/revoke")

every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@dataclass(frozen=True, slots=True)
class Sample:
    """An example and the schema that it belongs to."""

    where: str
    value: Any
    schema: dict[str, Any]


def answers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every answer, a shared one once: where it stands first, its status, itself."""
    places = {name: operation["responses"] for name, operation in OPERATIONS.items()} | {
        where.removeprefix("x-"): DOCUMENT[where] for where in ("x-any-other-path", "x-any-path")
    }
    seen = set()
    for where, nodes in places.items():
        for status, answer in nodes.items():
            shared = answer.get("$ref")
            if shared is None or (shared, status) not in seen:
                seen.add((shared, status))
                yield f"{where} {status}", status, resolved(answer)


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every body that is sent or answered, in each of its media types."""
    for name, operation in OPERATIONS.items():
        for content in operation.get("requestBody", {}).get("content", {}).values():
            yield f"{name} request", content
    for where, _, answer in answers():
        for content in answer.get("content", {}).values():
            yield where, content


def samples() -> Iterator[Sample]:
    """Every example of the document, wherever it stands."""
    for where, body in bodies():
        for name, example in body["examples"].items():
            yield Sample(f"{where} {name}", resolved(example)["value"], body["schema"])
    for name, header in DOCUMENT["components"]["headers"].items():
        yield Sample(f"header {name}", header["example"], header["schema"])
    for operation in OPERATIONS.values():
        for parameter in map(resolved, operation.get("parameters", ())):
            where = f"{operation['operationId']} {parameter['name']}"
            for name, example in parameter.get("examples", {}).items():
                yield Sample(f"{where} {name}", example["value"], parameter["schema"])
            for value in parameter["schema"].get("examples", ()):
                yield Sample(where, value, parameter["schema"])
    for name, schema in SCHEMAS.items():
        for member, its_schema in ({"": schema} | schema.get("properties", {})).items():
            for value in its_schema.get("examples", ()):
                yield Sample(f"schema {name} {member}".strip(), value, its_schema)


SAMPLES = {sample.where: sample for sample in samples()}
ERRORS = {
    where: sample.value
    for where, sample in SAMPLES.items()
    if isinstance(sample.value, dict) and "error" in sample.value
}
PROBLEMS = {
    where: sample.value
    for where, sample in SAMPLES.items()
    if isinstance(sample.value, dict) and sample.value.get("type") == "about:blank"
}


def test_it_is_an_openapi_3_1_document() -> None:
    """OpenAPI 3.1.1: generators and testers have to be able to read it."""
    assert DOCUMENT["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_it_names_the_version_of_the_package() -> None:
    """A document of another release would promise what is not there."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{DOCUMENT["info"]["version"]}"\n' in project


@every_operation
def test_an_operation_says_what_it_is_for(operation: dict[str, Any]) -> None:
    """A generated client is named by `operationId`; a reader wants whole sentences."""
    assert re.fullmatch(r"[a-z][A-Za-z]+", operation["operationId"])
    assert operation["summary"]
    assert operation["description"].strip().endswith(".")
    assert "security" in operation
    assert operation["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}


def test_no_two_operations_have_one_id() -> None:
    """OpenAPI 3.1.1 §4.8.10: the id is unique among all operations."""
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("body", [pytest.param(body, id=where) for where, body in bodies()])
def test_every_body_has_named_examples(body: dict[str, Any]) -> None:
    """What is not shown has to be guessed."""
    assert body["examples"]
    for example in body["examples"].values():
        assert resolved(example)["summary"]


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_an_example_is_what_its_schema_says(sample: Sample) -> None:
    """An example that is wrong is copied all the same."""
    assert faults(sample.schema, sample.value) == []


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_description_of_an_error_keeps_to_its_alphabet(error: dict[str, str]) -> None:
    """RFC 6749 §5.2: %x20-21 / %x23-5B / %x5D-7E, so no quotes, backslashes or other letters."""
    assert re.fullmatch(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+", error["error_description"])


def test_every_error_code_is_explained_and_shown() -> None:
    """Whoever meets a code finds out here what to do about it."""
    codes = SCHEMAS["ErrorCode"]["enum"]
    assert list(SCHEMAS["ErrorCode"]["x-enumDescriptions"]) == codes
    assert {error["code"] for error in ERRORS.values()} == set(codes)
    assert {error["error"] for error in ERRORS.values()} == set(SCHEMAS["OAuthErrorName"]["enum"])


def test_every_problem_code_is_explained() -> None:
    """Likewise below /v1, where many of them are what our own verifier says."""
    codes = SCHEMAS["ProblemCode"]["enum"]
    assert list(SCHEMAS["ProblemCode"]["x-enumDescriptions"]) == codes


@pytest.mark.parametrize("where", PROBLEMS)
def test_an_example_of_a_problem_says_its_status_twice_alike(where: str) -> None:
    """RFC 9457 §3.1.3: `status` is a copy of the status, and `title` is its phrase (§4.2.1)."""
    problem = PROBLEMS[where]
    assert where.split(" ")[-2] == str(problem["status"])
    assert problem["title"] == HTTPStatus(problem["status"]).phrase


def test_every_code_of_a_problem_belongs_to_a_status() -> None:
    """A code that no answer may have is no code."""
    said = {
        code
        for schema in SCHEMAS.values()
        for part in schema.get("allOf", ())
        for code in _codes(part.get("properties", {}).get("code", {}))
    }
    assert set(SCHEMAS["ProblemCode"]["enum"]) <= said


def _codes(schema: dict[str, Any]) -> list[str]:
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


@pytest.mark.parametrize(
    "change",
    [{"hint": "x"}, {"error_description": 'say "x"'}, {"code": "other"}, {"error": "other"}],
    ids=["another member", "a quote", "another code", "another error"],
)
def test_the_schema_of_an_error_is_closed(change: dict[str, str]) -> None:
    """A schema that takes anything would let a tester find nothing."""
    good = ERRORS["POST /oauth/token 401 unknownApiKey"]
    schema = {"$ref": "#/components/schemas/OAuthError"}

    assert faults(schema, good) == []
    assert faults(schema, good | change)


@pytest.mark.parametrize("missing", ["error", "error_description", "code"])
def test_an_error_is_complete(missing: str) -> None:
    good = ERRORS["POST /oauth/token 401 unknownApiKey"]
    less = {name: value for name, value in good.items() if name != missing}

    assert faults({"$ref": "#/components/schemas/OAuthError"}, less)


def test_the_schemas_of_the_key_set_take_no_private_member() -> None:
    """RFC 7518 §6.2.2 and §6.3.2: `d` and its like are the private half."""
    (jwk,) = SAMPLES["GET /.well-known/jwks.json 200 oneKey"].value["keys"]
    schema = {"$ref": "#/components/schemas/Jwk"}

    assert faults(schema, jwk) == []
    assert faults(schema, jwk | {"d": jwk["x"]})


def test_an_inactive_token_tells_nothing_more() -> None:
    """RFC 7662 §2.2: no other member beside `active`."""
    schema = {"$ref": "#/components/schemas/Introspection"}

    assert faults(schema, {"active": False}) == []
    assert faults(schema, {"active": False, "sub": "x"})


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_answer_has_the_headers_that_its_status_needs(name: str) -> None:
    """
    RFC 6749 §5.1 (no-store), RFC 9110 §11.6.1 (WWW-Authenticate), §15.5.6 (Allow), §10.2.3.
    """
    for status, answer in OPERATIONS[name]["responses"].items():
        told = resolved(answer).get("headers", {})
        headers = {header for header, node in told.items() if resolved(node)["required"]}
        if name in {f"POST {path}" for path in WITH_API_KEY}:
            assert {"Cache-Control", "Pragma"} <= headers
            if status in {"429", "503"}:
                assert "Retry-After" in headers
        if status == "401":
            assert "WWW-Authenticate" in headers
        if status == "405":
            assert "Allow" in headers


@pytest.mark.parametrize("path", WITH_API_KEY)
def test_an_api_key_can_be_sent_in_every_accepted_form(path: str) -> None:
    """RFC 6749 §2.3.1: Basic or form; ours: Bearer as well.  `{}` stands for the form."""
    operation = DOCUMENT["paths"][path]["post"]
    form = resolved(operation["requestBody"]["content"][FORM]["schema"])

    assert operation["security"] == [{"basic": []}, {"bearer": []}, {}]
    assert {"client_id", "client_secret"} <= set(form["properties"])
    assert form["type"] == "object"
    assert {resolved(member)["type"] for member in form["properties"].values()} == {"string"}


@pytest.mark.parametrize(
    "member",
    [
        "client_id",
        "scope",
        "resource",
        "audience",
        "subject_token",
        "subject_token_type",
        "requested_token_type",
        "client_address",
        "presented_in",
    ],
)
def test_a_parameter_without_a_value_passes_its_schema(member: str) -> None:
    """RFC 6749 §3.2: it counts as omitted, so no client may be told that it is wrong."""
    asked = {"grant_type": "client_credentials", member: ""}
    assert faults({"$ref": "#/components/schemas/TokenRequest"}, asked) == []


def test_a_token_exchange_is_told_as_the_code_knows_it() -> None:
    """RFC 8693 §2.1, §2.2.1 and §3: its names are URIs, and one wrong letter is another thing."""
    form, answer = SCHEMAS["TokenRequest"]["properties"], SCHEMAS["TokenResponse"]["properties"]
    kinds = SCHEMAS["Metadata"]["properties"]["grant_types_supported"]["items"]["enum"]
    sent = SAMPLES["POST /oauth/token request tokenExchange"].value
    issuer = DOCUMENT["servers"][0]["url"]

    assert form["grant_type"]["enum"] == kinds == [grant.GRANT_TYPE for grant in GRANTS]
    assert sent["grant_type"] == token_exchange.GRANT_TYPE
    assert sent["subject_token_type"] == token_exchange.api_key_token_type(issuer)
    assert sent["requested_token_type"] == token_exchange.ACCESS_TOKEN
    assert answer["issued_token_type"]["const"] == token_exchange.ACCESS_TOKEN
    for place in token_exchange.PLACES:
        assert faults(form["presented_in"], place) == []
    assert faults(form["client_address"], token_exchange.UNKNOWN) == []
    assert RESOURCE_SERVER in DOCUMENT["paths"]["/oauth/token"]["post"]["description"]


def test_its_examples_hold_no_usable_secret() -> None:
    """A scanner, and whoever copies an example, must never come upon a real API key."""
    sent = [
        resolved(example)["x-authorization"]
        for _, body in bodies()
        for example in body["examples"].values()
        if "x-authorization" in resolved(example)
    ]
    basic = [value.removeprefix("Basic ") for value in sent if value.startswith("Basic ")]
    decoded = [base64.b64decode(value, validate=True).decode("ascii") for value in basic]
    pairs = [text.split(":") for text in decoded]
    # A mask goes on with three dots.
    found = re.findall(r"ck_[a-z]+_[0-9A-Za-z]++(?!\.\.\.)", "\n".join([TEXT, *decoded]))

    assert found
    assert all(apikey.looks_like_one(text) for text in found)
    for text in found:
        with pytest.raises(apikey.MalformedApiKey):
            apikey.parse(text)
    assert {ids.is_api_key_id(user) for user, password in pairs if password} == {True}
    assert {apikey.looks_like_one(user) for user, password in pairs if not password} == {True}


def test_its_numbers_are_those_of_the_code() -> None:
    """One budget, one place: a number that is written twice drifts."""
    token = SCHEMAS["TokenResponse"]["properties"]
    kept = DOCUMENT["components"]["headers"]["FiveMinutes"]

    assert token["expires_in"]["maximum"] == TOKEN_LIFETIME
    assert SCHEMAS["TokenRequest"]["properties"]["scope"]["maxLength"] == scope.MAX_LENGTH
    assert kept["example"] == f"public, max-age={JWKS_MAX_AGE}"


def test_the_feed_is_told_with_the_numbers_of_the_code() -> None:
    """A follower who keeps an entry too short, or takes an old feed for fresh, accepts the dead."""
    operation = DOCUMENT["paths"]["/oauth/revocations"]["get"]
    wait = next(one["schema"] for one in operation["parameters"] if one["name"] == "wait")
    header = SCHEMAS["RevocationsHeader"]["properties"]
    (claims,) = SCHEMAS["RevocationsClaims"]["examples"]
    document = SAMPLES["GET /.well-known/coatcheck 200 document"].value
    signed = operation["responses"]["200"]["description"]

    assert wait["maximum"] == FEED_WAIT_MAX
    assert header["typ"]["const"] == feed_profile.TYPE
    assert header["alg"]["const"] == FEED_ALGORITHM
    assert claims["exp"] - claims["iat"] == FEED_STALE
    assert {len(feed_profile.subject("*")), *map(len, claims["entries"])} == {16}
    assert document["durations"] == {
        "token_lifetime": TOKEN_LIFETIME,
        "feed_window": FEED_WINDOW,
        "feed_stale": FEED_STALE,
    }
    assert f"after {FEED_STALE} it" in signed
    assert f"the last {FEED_FRESH} seconds" in signed
    assert f"{FEED_WINDOW} seconds after" in operation["description"]
