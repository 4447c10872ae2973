"""openapi.yaml against a running service: what is documented comes back, whatever is sent.

First what Schemathesis works out from the document (its examples, and each rule kept and broken
once), then whatever it makes up, with secrets where they do not belong.

The management API is asked in process, where each walk along its links has a deployment of its
own; what is worked out of its part of the document is sent in tests/spec.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from coatcheck.server.oauth.grants import token_exchange
from fuzz.target import PARTS, SECONDS, SEED, Tally, Target, fuzz
from spec.document import DOCUMENT, ROOT
from spec.managed import Managed, a_managed_deployment, strict, walk

Case = schemathesis.Case[Any]
schema = schemathesis.openapi.from_dict(
    DOCUMENT
    | {"paths": {path: item for path, item in DOCUMENT["paths"].items() if ROOT not in path}}
)
managed_schema = schemathesis.openapi.from_dict(strict())
#: Of the time for all parts: this file's is for the part below /v1, the walks, and the rest.
THIRD: Final = 1 / (3 * PARTS)
CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: One made-up example: making up more of them is what the rounds are for.
worked_out = settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))


@schemathesis.deserializer("application/json")
def as_described(context: object, response: schemathesis.Response) -> object:
    """A JWT's schema describes its text; Schemathesis counts `application/jwt` among JSON."""
    is_jwt = response.headers["content-type"] == ["application/jwt"]
    return response.text if is_jwt else response.json()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as one:
        yield one


def send(
    case: Case, target: Target, session: requests.Session, caller: dict[str, str] | None
) -> schemathesis.Response:
    """Send it as this caller; without the patience of a long poll, as no news will come."""
    if case.path == "/oauth/revocations" and case.query:
        case.query = {**case.query, "wait": 0}
    credential = None if caller is None else (caller["id"], caller["key"])
    return case.call(
        base_url=target.live.issuer,
        session=session,
        auth=credential,
        allow_redirects=False,
        timeout=10,
    )


# --- what is worked out


@schema.parametrize()
@worked_out
def test_answers_to_strangers_are_as_documented(
    case: Case, target: Target, session: requests.Session
) -> None:
    """Whatever is sent, the answer is one that openapi.yaml lists, and never a 5xx."""
    case.validate_response(send(case, target, session, None), checks=CHECKS)


@schema.parametrize()
@worked_out
def test_answers_to_a_known_key_are_as_documented(
    case: Case, target: Target, session: requests.Session
) -> None:
    """Likewise behind the authentication, where other code answers."""
    case.validate_response(send(case, target, session, target.api_key), checks=CHECKS)


@schema.include(path="/oauth/token").parametrize()
@worked_out
def test_answers_to_a_resource_server_are_as_documented(
    case: Case, target: Target, session: requests.Session
) -> None:
    """Likewise behind the rights that a token exchange wants."""
    exchange(case, target)
    case.validate_response(send(case, target, session, target.resource_server), checks=CHECKS)


def exchange(case: Case, target: Target) -> None:
    """Make a token exchange of a token request."""
    if isinstance(case.body, dict):
        case.body = {
            **case.body,
            "grant_type": token_exchange.GRANT_TYPE,
            "subject_token_type": token_exchange.api_key_token_type(target.live.issuer),
        }


# --- what is made up


@dataclass(frozen=True)
class Plant:
    """A secret where it does not belong, or a token where one belongs."""

    place: str
    name: str
    secret: str


NAMES: Final = (
    *("client_id", "client_secret", "scope", "resource", "token", "subject_token", "grant_type"),
    *("token_type_hint", "client_address", "presented_in", "unknown", "after", "wait"),
)
plants = st.builds(
    Plant,
    st.sampled_from(["body", "body", "query", "header"]),
    st.sampled_from(NAMES),
    st.sampled_from(["<KEY>", "<TOKEN>", "<SERVICE>", "<KEY>x", "<ID>"]),
)
METHODS: Final = frozenset(("get", "put", "post", "delete", "patch"))
CALLERS: Final = ("stranger", "stranger", "api key", "resource server")


def cases(document: Mapping[str, Any]) -> st.SearchStrategy[Case]:
    """Requests that keep to the document and requests that do not, to every operation."""
    kinds = []
    for path in document:
        for method in sorted(METHODS & set(DOCUMENT["paths"][path])):
            operation = document[path][method]
            kinds.append(operation.as_strategy(GenerationMode.POSITIVE))
            if operation.body or operation.query:
                kinds.append(operation.as_strategy(GenerationMode.NEGATIVE))
    return st.one_of(kinds)


def plant(case: Case, planted: Plant, target: Target) -> None:
    secret = target.filled(planted.secret.encode()).decode()
    match planted.place:
        case "body" if isinstance(case.body, dict):
            case.body = {**case.body, planted.name: secret}
        case "query":
            case.query = {**(case.query or {}), planted.name: secret}
        case "header":
            name = f"X-{planted.name.replace('_', '-')}"
            case.headers[name] = secret


def test_fuzz_openapi(target: Target, session: requests.Session, tally: Tally) -> None:
    """Whatever a client sends that is a request at all, the answer is a documented one."""
    target.require_health()
    callers = {"api key": target.api_key, "resource server": target.resource_server}

    def look(example: tuple[Case, str, list[Plant], bool]) -> None:
        case, caller, planted, is_exchange = example
        if is_exchange:
            exchange(case, target)
        for one in planted:
            plant(case, one, target)
        answer = send(case, target, session, callers.get(caller))
        tally.outcomes[str(answer.status_code)] += 1
        target.require_no_secret("an answer", f"{answer.headers}{answer.text}".encode())
        case.validate_response(answer, checks=CHECKS)

    fuzz(
        tally,
        st.tuples(
            cases(schema), st.sampled_from(CALLERS), st.lists(plants, max_size=2), st.booleans()
        ),
        look,
        examples=200,
        after_each_round=target.require_health,
        share=THIRD,
    )


# --- the management API


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with a_managed_deployment(tmp_path_factory.mktemp("managed")) as running:
        yield running


def test_fuzz_management(managed: Managed, tally: Tally) -> None:
    """Likewise for whoever may do everything: no answer but the documented ones, no 5xx."""

    def look(case: Case) -> None:
        answer = managed.send_likely(case)
        tally.outcomes[str(answer.status_code)] += 1
        case.validate_response(answer, checks=CHECKS)

    fuzz(
        tally,
        cases(managed_schema),
        look,
        examples=200,
        after_each_round=managed.require_callers,
        share=THIRD,
    )


def test_fuzz_walks_through_management(tmp_path: Path, tally: Tally) -> None:
    """Likewise along the links: what one operation answers, another one takes."""
    ends_at = time.monotonic() + SECONDS * THIRD
    while tally.rounds == 0 or time.monotonic() < ends_at:
        walk_seed = SEED + tally.rounds
        try:
            tally.outcomes += walk(managed_schema, tmp_path, walks=2, steps=40, seed=walk_seed)
        except BaseException as failure:
            failure.add_note(f"Again: FUZZ_SECONDS=0 FUZZ_SEED={walk_seed}")
            raise
        tally.rounds += 1
