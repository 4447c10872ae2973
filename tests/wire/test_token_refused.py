"""POST /oauth/token, when it says no.  RFC 6749 §5.2."""

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from coatcheck.server import signing
from coatcheck.server.app import Service
from coatcheck.server.manage.api_keys import Created
from support.deployment import (
    AUDIENCE,
    HOUR,
    ISSUER,
    MINUTE,
    NOON,
    TESTER,
    Deployment,
    a_deployment,
    form,
)
from support.tokens import claims, signer
from support.wire import (
    DESCRIPTION,
    FORM,
    MANAGEMENT,
    a_wrong_key,
    an_unknown_id,
    basic,
    bearer,
    database,
    refused,
)

GRANT = "grant_type=client_credentials"
#: NOON, as our sentences write it.
NOON_DATE = "2027-01-15 at 08:00 UTC"


def post(
    http: TestClient, body: str | bytes, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    sent = {"Content-Type": FORM} | dict(headers or {})
    return http.post("/oauth/token", content=body, headers=sent)


def ask(http: TestClient, key: str, **parameters: str) -> httpx2.Response:
    return http.post("/oauth/token", data=form(key, **parameters))


def said(answer: httpx2.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Everything that an answer tells, but for its own name."""
    told = answer.headers.multi_items()
    headers = [(name, text) for name, text in told if name != "x-request-id"]
    return answer.status_code, answer.content, headers


# --- T1 to T5: the grant type

GRANT_TYPES: dict[str, tuple[str | None, str]] = {
    "missing": (None, "invalid_request"),
    "without value": ("", "invalid_request"),
    "password": ("password", "unsupported_grant_type"),
    "authorization_code": ("authorization_code", "unsupported_grant_type"),
    "refresh_token": ("refresh_token", "unsupported_grant_type"),
    "unknown": ("urn:example:grant", "unsupported_grant_type"),
    "capitals": ("CLIENT_CREDENTIALS", "unsupported_grant_type"),
    "trailing blank": ("client_credentials ", "unsupported_grant_type"),
    "Cyrillic letter": ("client_сredentials", "unsupported_grant_type"),  # noqa: RUF001
    "semicolon is data": ("client_credentials;scope=x", "unsupported_grant_type"),
    "quotes and lines": ('"\\\r\n', "unsupported_grant_type"),
}


@pytest.mark.parametrize(("grant_type", "error"), GRANT_TYPES.values(), ids=GRANT_TYPES)
def test_only_the_grant_type_itself_is_taken_for_it(
    http: TestClient, deployment: Deployment, grant_type: str | None, error: str
) -> None:
    """
    T1, T2, T3, T4, T5: compared byte for byte; a semicolon separates nothing.

    RFC 6749 §3.2, §5.2; python-multipart GHSA-6jv3-5f52-599m.
    """
    parameters = {"client_secret": deployment.api_key().key}
    if grant_type is not None:
        parameters["grant_type"] = grant_type

    body = refused(http.post("/oauth/token", data=parameters), 400, error)

    assert "client_credentials" in body["error_description"]


def test_an_api_key_without_that_right_may_not_exchange_others(
    http: TestClient, deployment: Deployment
) -> None:
    """
    T3: the grant is known, and this caller may not use it.

    RFC 6749 §5.2: unauthorized_client; RFC 8693 §2.1.
    """
    answer = ask(
        http,
        deployment.api_key().key,
        grant_type="urn:ietf:params:oauth:grant-type:token-exchange",
        subject_token=deployment.api_key().key,
        subject_token_type=f"{ISSUER}/token-types/api-key",
        resource=AUDIENCE,
        client_address="203.0.113.7",
    )

    refused(answer, 400, "unauthorized_client")


# --- T6: a parameter twice

TWICE: dict[str, Callable[[Created], str]] = {
    "grant_type": lambda made: f"{GRANT}&{GRANT}&client_secret={made.key}",
    "scope": lambda made: f"{GRANT}&client_secret={made.key}&scope=a&scope=a",
    "scope, once without value": lambda made: f"{GRANT}&scope=&client_secret={made.key}&scope=a",
    "client_id": lambda made: (
        f"{GRANT}&client_secret={made.key}&client_id={made.api_key.id}&client_id={made.api_key.id}"
    ),
    "client_secret": lambda made: f"{GRANT}&client_secret={made.key}&client_secret={made.key}",
    "another client_secret": lambda made: f"{GRANT}&client_secret={made.key}&client_secret=x",
    "by another spelling": lambda made: f"{GRANT}&client_secret={made.key}&%67rant_type=x",
}


@pytest.mark.parametrize("body", TWICE.values(), ids=TWICE)
def test_a_parameter_twice_is_no_request(
    http: TestClient, deployment: Deployment, body: Callable[[Created], str]
) -> None:
    """T6: two parsers that pick different ones would be a hole.  RFC 6749 §3.2."""
    answer = post(http, body(deployment.api_key("a")))

    refused(answer, 400, "invalid_request")


# --- T9 to T13: scope

SCOPES: dict[str, tuple[Sequence[str], str, str]] = {
    "unknown": (["widgets:read"], "widgets:write", "widgets:write"),
    "known and unknown": (["widgets:read"], "widgets:read x:y", "x:y"),
    "another letter case": (["widgets:read"], "Widgets:Read", "Widgets:Read"),
    "every action": (["widgets:read"], "*", "*"),
    "wider than the filter": (["a@P/Site/42"], "a", "a"),
    "everything, of a filter": (["a@P/Site/42"], "a@*", "a"),
    "another site": (["a@P/Site/42"], "a@P/Site/43", "a@P/Site/43"),
    "all sites": (["a@P/Site/42"], "a@P/Site/#", "a@P/Site/#"),
    "below the shape": (["a@P/Site/#"], "a@P/Site/42/T/1", "a@P/Site/42/T/1"),
    "above the shape": (["a@P/Site/#"], "a@P", "a@P"),
    "a union of two grants": (["a@P/1/#", "a@P/#/1"], "a@P/#/#", "a@P/#/#"),
    "an action that sounds implied": (["widgets:write"], "widgets:read", "widgets:read"),
    "a platform permission": ([], "coatcheck:operator", "coatcheck:operator"),
    "a platform permission, filtered": ([], "coatcheck:operator@P/1", "coatcheck:operator@P/1"),
}


@pytest.mark.parametrize(("owned", "asked", "missing"), SCOPES.values(), ids=SCOPES)
def test_a_scope_beyond_the_api_key_is_refused_by_name(
    http: TestClient, deployment: Deployment, owned: Sequence[str], asked: str, missing: str
) -> None:
    """T9: never silently narrower, or callers find out at the resource server.  RFC 6749 §5.2."""
    body = refused(ask(http, deployment.api_key(*owned).key, scope=asked), 400, "invalid_scope")

    assert f" {missing}" in body["error_description"]


MALFORMED = {
    "quote": 'a"b',
    "backslash": "a\\b",
    "control": "a\x01b",
    "NUL": "a\0b",
    "delete": "a\x7fb",
    "tabulator": "a\tb",
    "non-ASCII": "widgets:réad",
    "full-width": "ａ",  # noqa: RUF001
    "leading blank": " a",
    "trailing blank": "a ",
    "two blanks": "a  b",
    "blank alone": " ",
    "empty action": "@P/1",
    "two at signs": "a@P/1@P/2",
    "wildcard type": "a@#/1",
    "empty segment": "a@P//1",
    "open end": "a@P/1/",
    "star in an action": "widgets:*",
    "hash in an action": "widgets:#",
    "half a wildcard": "a@P/4*",
    "an encoded letter": "a@P/%41",
    "small encoding": "a@P/%3a",
    "broken encoding": "a@P/%zz",
    "a header behind it": "a\r\nSet-Cookie: session=evil",
    "a header alone": "\r\nX-Evil: 1",
}


@pytest.mark.parametrize("asked", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_scope_is_refused_and_never_repeated(
    http: TestClient, deployment: Deployment, asked: str
) -> None:
    """T11, T12: nothing of it reaches a header or a sentence.  RFC 6749 §3.3, §5.2."""
    answer = ask(http, deployment.api_key().key, scope=asked)

    body = refused(answer, 400, "invalid_scope")
    assert "malformed" in body["error_description"]
    assert not {"set-cookie", "x-evil"} & set(answer.headers)


# --- T14, T15: the target

TARGETS: dict[str, list[tuple[str, str]]] = {
    "unknown": [("resource", "https://other.example.com")],
    "unknown, as audience": [("audience", "https://other.example.com")],
    "not of this key": [("resource", MANAGEMENT)],
    "two different ones": [("resource", AUDIENCE), ("resource", MANAGEMENT)],
    "two names, two values": [("resource", AUDIENCE), ("audience", MANAGEMENT)],
    "known and unknown": [("resource", AUDIENCE), ("audience", "x")],
    "fragment": [("resource", f"{AUDIENCE}#part")],
    "relative": [("resource", "/widgets")],
    "trailing slash": [("resource", f"{AUDIENCE}/")],
    "capital letters": [("resource", AUDIENCE.upper())],
    "blank": [("resource", " ")],
    "very long": [("resource", AUDIENCE + "/a" * 4000)],
}


@pytest.mark.parametrize("pairs", TARGETS.values(), ids=TARGETS)
def test_another_target_is_refused(
    http: TestClient, deployment: Deployment, pairs: list[tuple[str, str]]
) -> None:
    """T14, T15: one audience per token, and one that the API key is for.  RFC 8707 §2."""
    made = deployment.api_key(audiences=(AUDIENCE,))
    many = deployment.api_key(audiences=(AUDIENCE, MANAGEMENT))
    made = many if len({value for _, value in pairs}) > 1 else made

    answer = post(http, urlencode([*form(made.key).items(), *pairs]))

    refused(answer, 400, "invalid_target")


def test_a_key_that_is_not_for_the_default_audience_has_to_name_its_own(
    http: TestClient, deployment: Deployment
) -> None:
    """The admin key is for the management API only; the sentence says what to send."""
    body = refused(ask(http, deployment.initialized.key), 400, "invalid_target")

    assert MANAGEMENT in body["error_description"]


# --- T16 to T29: the credential


def decoded(text: bytes) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text).decode()}"}


Credential = Callable[[Created], tuple[dict[str, str], dict[str, str]]]

#: In the Authorization header, or nothing at all: 401.
IN_THE_HEADER: dict[str, Credential] = {
    "nothing": lambda made: ({}, {}),
    "nothing but empty parameters": lambda made: ({}, {"client_id": "", "client_secret": ""}),
    "wrong": lambda made: (basic(made.api_key.id, a_wrong_key()), {}),
    "wrong, as user name": lambda made: (basic(a_wrong_key(), ""), {}),
    "wrong, as bearer": lambda made: (bearer(a_wrong_key()), {}),
    "empty": lambda made: (basic(made.api_key.id, ""), {}),
    "all empty": lambda made: (basic("", ""), {}),
    "truncated": lambda made: (basic(made.api_key.id, made.key[:-1]), {}),
    "truncated, as bearer": lambda made: (bearer(made.key[:-1]), {}),
    "longer": lambda made: (basic(made.api_key.id, made.key + "0"), {}),
    "case-swapped": lambda made: (basic(made.api_key.id, made.key.swapcase()), {}),
    "twice": lambda made: (bearer(f"{made.key} {made.key}"), {}),
    "in quotes": lambda made: (bearer(f'"{made.key}"'), {}),
    "trailing blank": lambda made: (basic(made.api_key.id, f"{made.key} "), {}),
    "trailing newline": lambda made: (basic(made.api_key.id, f"{made.key}\n"), {}),
    "trailing NUL": lambda made: (basic(made.api_key.id, f"{made.key}\0"), {}),
    "an encoded NUL": lambda made: (basic(made.api_key.id, f"{made.key}%00"), {}),
    "of another id": lambda made: (basic(an_unknown_id(), made.key), {}),
    "of another id in the body": lambda made: (bearer(made.key), {"client_id": an_unknown_id()}),
    "id and key in the wrong order": lambda made: (basic(made.key, made.api_key.id), {}),
    "id alone": lambda made: (basic(made.api_key.id, ""), {}),
    "basic without colon": lambda made: (decoded(made.key.encode()), {}),
    "basic that is not base64": lambda made: ({"Authorization": f"Basic {made.key}"}, {}),
    "basic with a bad length": lambda made: ({"Authorization": "Basic YTpi="}, {}),
    "basic with nothing": lambda made: ({"Authorization": "Basic"}, {}),
    "basic in invalid UTF-8": lambda made: (decoded(b"\xff:\xfe"), {}),
    "basic in encoded invalid UTF-8": lambda made: (decoded(b"%ff:%fe"), {}),
    "basic with broken encoding": lambda made: (basic("%zz", "%zz"), {}),
    "two in one header": lambda made: (
        {"Authorization": ", ".join([basic(made.api_key.id, made.key)["Authorization"]] * 2)},
        {},
    ),
    "a JWT": lambda made: (bearer(signer().token(claims(sub=made.api_key.id))), {}),
    "a JWT, as basic": lambda made: (basic(made.api_key.id, signer().token(claims())), {}),
    "bearer with nothing": lambda made: ({"Authorization": "Bearer"}, {}),
    "bearer that is no key": lambda made: (bearer("hello"), {}),
    "digest": lambda made: ({"Authorization": 'Digest username="x"'}, {}),
    "unknown scheme": lambda made: ({"Authorization": f"ApiKey {made.key}"}, {}),
    "no scheme": lambda made: ({"Authorization": made.key}, {}),
    "empty header": lambda made: ({"Authorization": ""}, {}),
}

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

#: In the body: 400 without a challenge.
IN_THE_BODY: dict[str, Credential] = {
    "client_id only": lambda made: ({}, {"client_id": made.api_key.id}),
    "empty": lambda made: ({}, {"client_id": made.api_key.id, "client_secret": ""}),
    "wrong": lambda made: ({}, {"client_secret": a_wrong_key()}),
    "wrong, with the id": lambda made: (
        {},
        {"client_id": made.api_key.id, "client_secret": a_wrong_key()},
    ),
    "one letter wrong": lambda made: (
        {},
        {"client_secret": made.key[:-1] + ("1" if made.key.endswith("0") else "0")},
    ),
    "truncated": lambda made: ({}, {"client_secret": made.key[:-1]}),
    "case-swapped": lambda made: ({}, {"client_secret": made.key.swapcase()}),
    "trailing blank": lambda made: ({}, {"client_secret": f"{made.key} "}),
    "leading blank": lambda made: ({}, {"client_secret": f" {made.key}"}),
    "trailing newline": lambda made: ({}, {"client_secret": f"{made.key}\n"}),
    "the mask": lambda made: ({}, {"client_secret": made.api_key.mask}),
    "the id": lambda made: ({}, {"client_secret": made.api_key.id}),
    "the key as client_id": lambda made: ({}, {"client_id": made.key}),
    "unknown id": lambda made: ({}, {"client_id": an_unknown_id(), "client_secret": a_wrong_key()}),
    "of another id": lambda made: ({}, {"client_id": an_unknown_id(), "client_secret": made.key}),
    "non-ASCII": lambda made: ({}, {"client_secret": "schlüssel"}),
    "a JWT": lambda made: ({}, {"client_secret": signer().token(claims(sub=made.api_key.id))}),
    "client_assertion": lambda made: (
        {},
        {"client_assertion": signer().token(claims()), "client_assertion_type": ASSERTION},
    ),
    "client_assertion_type alone": lambda made: ({}, {"client_assertion_type": ASSERTION}),
}


def present(http: TestClient, made: Created, credential: Credential) -> httpx2.Response:
    headers, extra = credential(made)
    return http.post(
        "/oauth/token", data={"grant_type": "client_credentials", **extra}, headers=headers
    )


@pytest.mark.parametrize("credential", IN_THE_HEADER.values(), ids=IN_THE_HEADER)
def test_a_bad_credential_in_the_header_is_challenged(
    http: TestClient, deployment: Deployment, credential: Credential
) -> None:
    """
    T16, T18, T19, T20, T24, T27, T28: the challenge repeats the sentence, because clients show it.

    RFC 6749 §5.2.
    """
    answer = present(http, deployment.api_key(), credential)

    refused(answer, 401, "invalid_client")


@pytest.mark.parametrize("credential", IN_THE_BODY.values(), ids=IN_THE_BODY)
def test_a_bad_credential_in_the_body_is_never_challenged(
    http: TestClient, deployment: Deployment, credential: Credential
) -> None:
    """
    T17, T18, T19, T20, T29: openid-client hides our sentence behind any challenge.

    RFC 6749 §5.2.
    """
    answer = present(http, deployment.api_key(), credential)

    refused(answer, 400, "invalid_client")


CHALLENGES: dict[str, tuple[Credential, str]] = {
    "nothing": (lambda made: ({}, {}), "Basic"),
    "basic": (lambda made: (basic("a", "b"), {}), "Basic"),
    "bearer": (lambda made: (bearer(a_wrong_key()), {}), "Bearer"),
    "digest": (lambda made: ({"Authorization": "Digest x"}, {}), "Basic"),
}


@pytest.mark.parametrize(("credential", "scheme"), CHALLENGES.values(), ids=CHALLENGES)
def test_the_challenge_is_of_the_scheme_that_was_used(
    http: TestClient, deployment: Deployment, credential: Credential, scheme: str
) -> None:
    """RFC 6749 §5.2: the challenge matches the scheme of the client."""
    answer = present(http, deployment.api_key(), credential)

    assert answer.headers["www-authenticate"].startswith(f"{scheme} ")


TWO: dict[str, Credential] = {
    "basic and body": lambda made: (
        basic(made.api_key.id, made.key),
        {"client_secret": made.key},
    ),
    "basic and body, id too": lambda made: (
        basic(made.api_key.id, made.key),
        {"client_id": made.api_key.id, "client_secret": made.key},
    ),
    "bearer and body": lambda made: (bearer(made.key), {"client_secret": made.key}),
    "unknown scheme and body": lambda made: (
        {"Authorization": "Digest x"},
        {"client_secret": made.key},
    ),
    "basic and client_assertion": lambda made: (
        basic(made.api_key.id, made.key),
        {"client_assertion": "a.b.c"},
    ),
    "body and client_assertion": lambda made: (
        {},
        {"client_secret": made.key, "client_assertion": "a.b.c"},
    ),
    "another client_id in the body": lambda made: (
        basic(made.api_key.id, made.key),
        {"client_id": an_unknown_id()},
    ),
}


@pytest.mark.parametrize("credential", TWO.values(), ids=TWO)
def test_two_credentials_are_one_too_many(
    http: TestClient, deployment: Deployment, credential: Credential
) -> None:
    """T21, T23: even if both are right.  RFC 6749 §2.3: one method in a request."""
    answer = present(http, deployment.api_key(), credential)

    refused(answer, 400, "invalid_request")


def test_two_authorization_headers_are_one_too_many(
    http: TestClient, deployment: Deployment
) -> None:
    """T27: a proxy may have read the other one.  RFC 9110 §5.3."""
    made = deployment.api_key()
    headers = [("Content-Type", FORM), *bearer(made.key).items(), *bearer(made.key).items()]

    answer = http.post("/oauth/token", content=GRANT, headers=headers)

    refused(answer, 400, "invalid_request")


# --- T20: dead API keys


def disable(deployment: Deployment, made: Created) -> None:
    deployment.disable(made)


def revoke(deployment: Deployment, made: Created) -> None:
    deployment.revoke(made)


def revoke_disabled(deployment: Deployment, made: Created) -> None:
    deployment.disable(made)
    deployment.revoke(made)


def expire(deployment: Deployment, made: Created) -> None:
    assert made.api_key.expires_at is not None
    deployment.clock.now = made.api_key.expires_at


def replace_at_once(deployment: Deployment, made: Created) -> None:
    deployment.rotate(made, overlap_s=0)


def replace(deployment: Deployment, made: Created) -> None:
    deployment.rotate(made, overlap_s=HOUR)
    deployment.clock.now += HOUR


Kill = Callable[[Deployment, Created], None]
#: How an API key ends → code, and the date in the sentence.
DEAD: dict[str, tuple[Kill, str, str]] = {
    "revoked": (revoke, "api_key_revoked", f"revoked on {NOON_DATE}"),
    "disabled": (disable, "api_key_disabled", f"disabled on {NOON_DATE}"),
    "revoked after it was disabled": (
        revoke_disabled,
        "api_key_revoked",
        f"revoked on {NOON_DATE}",
    ),
    "expired": (expire, "api_key_expired", "expired on 2027-01-15 at 10:00 UTC"),
    "replaced at once": (replace_at_once, "api_key_expired", f"ended on {NOON_DATE}"),
    "replaced": (replace, "api_key_expired", "ended on 2027-01-15 at 09:00 UTC"),
}
dead_keys = pytest.mark.parametrize(("kill", "code", "told"), DEAD.values(), ids=DEAD)


@dead_keys
def test_whoever_holds_the_secret_is_told_the_truth(
    http: TestClient, deployment: Deployment, kill: Kill, code: str, told: str
) -> None:
    """T20: hiding it from the owner helps nobody and costs a support call."""
    made = deployment.api_key(expires_at=NOON + 2 * HOUR)
    assert ask(http, made.key).status_code == 200

    kill(deployment, made)

    bodies = [
        refused(ask(http, made.key), 400, "invalid_client"),
        refused(ask(http, made.key, client_id=made.api_key.id), 400, "invalid_client"),
        refused(post(http, GRANT, basic(made.api_key.id, made.key)), 401, "invalid_client"),
        refused(post(http, GRANT, bearer(made.key)), 401, "invalid_client"),
    ]
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["code"] == code
    assert told in bodies[0]["error_description"]


@dead_keys
def test_guessing_at_a_dead_key_looks_like_guessing_at_none(
    http: TestClient, deployment: Deployment, kill: Kill, code: str, told: str
) -> None:
    """
    T18, T20: who lacks the secret learns nothing, neither that a key exists nor how it ended.

    OWASP ASVS 5 §6.3.8; RFC 6749 §5.2: invalid_client.
    """
    alive = deployment.api_key()
    dead = deployment.api_key(expires_at=NOON + 2 * HOUR)
    kill(deployment, dead)

    in_the_body = [
        said(ask(http, a_wrong_key())),
        said(ask(http, a_wrong_key(), client_id=an_unknown_id())),
        said(ask(http, a_wrong_key(), client_id=alive.api_key.id)),
        said(ask(http, a_wrong_key(), client_id=dead.api_key.id)),
        said(ask(http, alive.key, client_id=an_unknown_id())),
        said(ask(http, dead.key, client_id=an_unknown_id())),
        said(ask(http, "x", client_id=dead.api_key.id)),
    ]
    in_the_header = [
        said(post(http, GRANT, basic(a_wrong_key(), ""))),
        said(post(http, GRANT, basic(an_unknown_id(), a_wrong_key()))),
        said(post(http, GRANT, basic(alive.api_key.id, a_wrong_key()))),
        said(post(http, GRANT, basic(dead.api_key.id, a_wrong_key()))),
        said(post(http, GRANT, basic(an_unknown_id(), dead.key))),
    ]

    assert all(answer == in_the_body[0] for answer in in_the_body)
    assert all(answer == in_the_header[0] for answer in in_the_header)
    assert json.loads(in_the_body[0][1]) == json.loads(in_the_header[0][1])
    assert b"api_key_unknown" in in_the_body[0][1]


def test_a_suspended_organization_gets_no_token(http: TestClient, deployment: Deployment) -> None:
    """
    Authentication did succeed, so this is no invalid_client, wherever the secret stood.

    RFC 6749 §5.2: unauthorized_client.
    """
    made = deployment.api_key()
    with deployment.store.transaction() as tx:
        organization = tx.organization(deployment.organization_id)
        assert organization is not None
        organization.suspended_at = NOON

    for answer in (ask(http, made.key), post(http, GRANT, basic(made.api_key.id, made.key))):
        body = refused(answer, 400, "unauthorized_client")
        assert body["code"] == "org_suspended"
        assert f"suspended on {NOON_DATE}" in body["error_description"]

    guess = refused(ask(http, a_wrong_key(), client_id=made.api_key.id), 400, "invalid_client")
    assert guess["code"] == "api_key_unknown"


# --- T30: credentials in the query

QUERIES: dict[str, Callable[[Created], str]] = {
    "secret": lambda made: f"client_secret={made.key}",
    "id and secret": lambda made: f"client_id={made.api_key.id}&client_secret={made.key}",
    "everything": lambda made: urlencode(form(made.key)),
    "an encoded name": lambda made: f"client%5Fsecret={made.key}",
    "after others": lambda made: f"a=b&c&client_secret={made.key}",
    "api_key": lambda made: f"api_key={made.key}",
    "access_token": lambda made: f"access_token={made.key}",
    "without value": lambda made: "client_secret",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_credential_in_the_query_is_never_accepted(
    http: TestClient, deployment: Deployment, query: Callable[[Created], str]
) -> None:
    """T30: every proxy on the way has logged it, so it is refused even beside a right one."""
    made = deployment.api_key()

    for data in ({"grant_type": "client_credentials"}, form(made.key)):
        answer = http.post(f"/oauth/token?{query(made)}", data=data)
        body = refused(answer, 400, "invalid_request")
        assert "URL" in body["error_description"]


def test_parameters_of_the_query_are_no_parameters(
    http: TestClient, deployment: Deployment
) -> None:
    """RFC 6749 §3.2: parameters are sent in the body; the query could override them."""
    made = deployment.api_key("a", "b")

    answer = http.post("/oauth/token?scope=a&grant_type=password", data=form(made.key))

    assert answer.status_code == 200, answer.text
    assert answer.json()["scope"] == "a b"


def test_no_log_line_holds_what_was_presented(
    http: TestClient, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """
    T30: a log is read by more people than a secret is meant for.

    Not even at DEBUG, not even the key typed into the wrong field.
    """
    caplog.set_level(logging.DEBUG)
    made, wrong = deployment.api_key(), a_wrong_key()
    for key in (made.key, wrong):
        http.post(f"/oauth/token?client_secret={key}", data={"grant_type": "client_credentials"})
        ask(http, key)
        ask(http, key, scope="none")
        ask(http, wrong, client_id=key)
        ask(http, key, grant_type=key, resource=key)
        post(http, GRANT, basic(key, key))
        post(http, GRANT, bearer(key))
        http.get(f"/{key}")
    deployment.disable(made)
    ask(http, made.key)
    answer = post(http, GRANT, bearer(made.key))

    assert answer.status_code == 401
    # The line about a refused key names its id: the log is really looked at.
    assert made.api_key.id in caplog.text
    # The client's own log is not ours; it writes URLs.
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
    assert not [line for line in ours if made.key in line or wrong in line]


FIELDS = ("client_id", "grant_type", "scope", "resource", "audience", "token", "unknown")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "part", [slice(None), slice(-1), slice(-8), slice(3, None), slice(12, None)]
)
def test_a_key_in_the_wrong_field_is_never_repeated(
    http: TestClient, deployment: Deployment, field: str, part: slice
) -> None:
    """
    Answers end up in logs of the caller, and in front of the caller's own users.

    Nor is one that was cut short: what is missing would be found in no time.
    """
    made = deployment.api_key("widgets:read")
    sent = made.key[part]
    secret = sent[-26:-6]

    answer = http.post("/oauth/token", data=form(made.key) | {field: sent})

    assert secret not in answer.text
    assert secret not in str(answer.headers)


# --- T31, T48: methods

METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND")
ODD_METHODS = ("__INIT__", "DISPATCH", "POSTS", "G")


@pytest.mark.parametrize("method", METHODS + ODD_METHODS)
def test_only_post_is_answered(http: TestClient, deployment: Deployment, method: str) -> None:
    """
    T31, T48: a GET would carry its secret in the URL.  OPTIONS: no CORS for keys.

    RFC 6749 §3.2; RFC 9110 §15.5.6.
    """
    headers = basic("a", deployment.api_key().key) | {"Origin": "https://a.example"}

    answer = http.request(method, "/oauth/token", headers=headers)

    if method == "HEAD":
        assert answer.status_code == 405
    else:
        refused(answer, 405, "invalid_request")
    assert answer.headers["allow"] == "POST"
    assert "access-control-allow-origin" not in answer.headers


# --- T32 to T36: media types

JSON = json.dumps({"grant_type": "client_credentials", "client_secret": "SECRET"})
MULTIPART = (
    '--b\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\nclient_credentials\r\n'
    '--b\r\nContent-Disposition: form-data; name="client_secret"\r\n\r\nSECRET\r\n--b--\r\n'
)
URLENCODED = f"{GRANT}&client_secret=SECRET"

MEDIA: dict[str, tuple[str, str | None]] = {
    "JSON": (JSON, "application/json"),
    "JSON as form": (JSON, None),
    "multipart": (MULTIPART, "multipart/form-data; boundary=b"),
    "multipart without boundary": (MULTIPART, "multipart/form-data"),
    "text": (URLENCODED, "text/plain"),
    "none": (URLENCODED, None),
    "empty": (URLENCODED, ""),
    "almost": (URLENCODED, "application/x-www-form-urlencode"),
    "and one more": (URLENCODED, f"{FORM}, text/plain"),
    "wildcard": (URLENCODED, "application/*"),
    "XML": ("<a/>", "application/xml"),
}


@pytest.mark.parametrize(("content", "media_type"), MEDIA.values(), ids=MEDIA)
def test_another_media_type_is_refused_with_what_to_send(
    http: TestClient, deployment: Deployment, content: str, media_type: str | None
) -> None:
    """
    T32, T33: no other parser is ever run.  RFC 6749 §3.2, appendix B.

    python-multipart CVE-2026-40347, CVE-2026-42561, GHSA-59g5-xgcq-4qw3.
    """
    content = content.replace("SECRET", deployment.api_key().key)
    headers = {} if media_type is None else {"Content-Type": media_type}

    answer = http.post("/oauth/token", content=content, headers=headers)

    body = refused(answer, 400, "invalid_request")
    assert FORM in body["error_description"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "identity2"])
def test_a_compressed_body_is_refused(
    http: TestClient, deployment: Deployment, encoding: str
) -> None:
    """T36: a small body may unpack to gigabytes.  RFC 9110 §8.4, §15.5.16."""
    body = urlencode(form(deployment.api_key().key))

    answer = post(http, body, {"Content-Encoding": encoding})

    refused(answer, 415, "invalid_request")


# --- T37, T38: bytes

GARBAGE: dict[str, bytes] = {
    "invalid UTF-8": b"&scope=\xff",
    "invalid UTF-8 in a name": b"&\xff=1",
    "invalid UTF-8, encoded": b"&scope=%FF",
    "overlong slash": b"&scope=%C0%AF",
    "lone surrogate": b"&scope=%ED%A0%80",
    "beyond Unicode": b"&scope=%F4%90%80%80",
    "cut short": b"&scope=%C3",
    "lone percent": b"&scope=%",
    "half an encoding": b"&scope=%4",
    "no encoding": b"&scope=%zz",
    "33 parameters": b"&a=b" * 31,
    "no equals signs": b"&a" * 40,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_bytes_that_are_no_text_are_the_callers_fault(
    http: TestClient, deployment: Deployment, garbage: bytes
) -> None:
    """T37: never a 500, whatever a database or a JSON writer thinks of them."""
    good = urlencode(form(deployment.api_key().key)).encode()

    answer = post(http, good + garbage)

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error in ("invalid_request", "invalid_scope", "invalid_target")
    refused(answer, 400, error)


@pytest.mark.parametrize("parameter", ["client_id", "client_secret"])
@pytest.mark.parametrize("value", ["%C3%A9", "%F0%9F%94%91", "%0D%0A", "%25", "a%20b"])
def test_bytes_in_a_credential_are_a_wrong_credential(
    http: TestClient, deployment: Deployment, parameter: str, value: str
) -> None:
    """T19, T37: whatever it is, it matches no record."""
    wanted = {"client_id": deployment.api_key().api_key.id, "client_secret": a_wrong_key()}
    others = urlencode({name: text for name, text in wanted.items() if name != parameter})

    answer = post(http, f"{GRANT}&{others}&{parameter}={value}")

    refused(answer, 400, "invalid_client")


NUL_NAMES: dict[str, bytes] = {
    "encoded": b"&sc%00pe=a",
    "raw": b"&sc\0pe=a",
    "encoded, without value": b"&x%00",
    "nothing but it": b"&\0=1",
    "twice": b"&sc%00pe=a&sc%00pe=a",
}


@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/introspect", "/oauth/revoke"])
@pytest.mark.parametrize("garbage", NUL_NAMES.values(), ids=NUL_NAMES)
def test_a_nul_is_in_no_name(
    http: TestClient, deployment: Deployment, garbage: bytes, path: str
) -> None:
    """T38: also where nobody knows the name, and others would end it there."""
    good = urlencode(form(deployment.api_key().key)).encode()

    answer = http.post(path, content=good + garbage, headers={"Content-Type": FORM})

    refused(answer, 400, "invalid_request")


#: What is appended to a good request → the error.
NUL_VALUES: dict[str, tuple[bytes, str]] = {
    "in a scope": (b"&scope=a%00", "invalid_scope"),
    "raw, in a scope": (b"&scope=\0", "invalid_scope"),
    "in the target": (b"&resource=%00", "invalid_target"),
    "raw, in the target": (b"&audience=a\0", "invalid_target"),
    "in a client_id": (b"&client_id=key_%00", "invalid_client"),
    "behind the secret": (b"%00", "invalid_client"),
    "raw, behind the secret": (b"\0", "invalid_client"),
    "in a parameter that nobody knows": (b"&x=%00", "invalid_request"),
    "raw, in a parameter that nobody knows": (b"&x=a\0", "invalid_request"),
}


@pytest.mark.parametrize(("garbage", "error"), NUL_VALUES.values(), ids=NUL_VALUES)
def test_a_nul_is_in_no_value(
    http: TestClient, deployment: Deployment, garbage: bytes, error: str
) -> None:
    """T19, T38: PostgreSQL refuses it in a text, which must not become a 500."""
    good = urlencode(form(deployment.api_key().key)).encode()

    refused(post(http, good + garbage), 400, error)


# --- T13, T39, T40: size

SIZES = {
    "one byte too many": (f"{GRANT}&a=" + "a" * (16 * 1024 - len(GRANT) - 2), (413,)),
    "a scope of 100 kB": (f"{GRANT}&scope={'a' * 100_000}", (413,)),
    "a scope of 16 kB": (f"{GRANT}&client_secret=KEY&scope={'a' * 16_000}", (400,)),
    "10,000 parameters": ("&".join(f"p{n}=1" for n in range(10_000)), (413,)),
    "10,000 ampersands": ("&" * 10_000, (400,)),
    "100 kB of semicolons": ("a;" * 50_000, (413,)),
    "16 kB of semicolons": ("a;" * 8_000, (400,)),
    "16 kB of percent signs": (f"{GRANT}&a={'%' * 16_000}", (400, 401)),
    "16 kB of plus signs": (f"{GRANT}&scope={'+' * 16_000}", (400, 401)),
}


@pytest.mark.parametrize(("body", "statuses"), SIZES.values(), ids=SIZES)
def test_a_huge_body_costs_no_time(
    http: TestClient, deployment: Deployment, body: str, statuses: tuple[int, ...]
) -> None:
    """T13, T39, T40: answered within 50 ms.  CVE-2026-54283, CVE-2026-53539."""
    content = body.replace("KEY", deployment.api_key().key)

    answer, took_s = quickest(lambda: post(http, content))

    assert answer.status_code in statuses, answer.text
    assert took_s < 0.05


CONTENT_TYPES = {
    "escaped quotes": f"{FORM}; x=" + '\\"' * 4096,
    "parameters": FORM + ";a=b" * 2048,
    "blanks": FORM + " " * 8192 + ";",
    "semicolons": FORM + ";" * 8192,
}


@pytest.mark.parametrize("content_type", CONTENT_TYPES.values(), ids=CONTENT_TYPES)
def test_a_huge_content_type_costs_no_time(
    http: TestClient, deployment: Deployment, content_type: str
) -> None:
    """T35: answered within 50 ms.  CVE-2024-24762."""
    body = urlencode(form(deployment.api_key().key))

    answer, took_s = quickest(lambda: post(http, body, {"Content-Type": content_type}))

    assert answer.status_code in (200, 400)
    assert took_s < 0.05


def quickest(call: Callable[[], httpx2.Response]) -> tuple[httpx2.Response, float]:
    """An answer, and the least seconds of three tries: the machine may be busy with others."""
    took_s = []
    for _ in range(3):
        started_at = time.perf_counter()
        answer = call()
        took_s.append(time.perf_counter() - started_at)
    return answer, min(took_s)


def test_a_credential_of_a_megabyte_is_just_wrong(deployment: Deployment) -> None:
    """T44: no server in front limits a header for us; nothing here grows with it."""
    started_at = time.perf_counter()

    for scheme in (b"Bearer ", b"Basic "):
        status, _, _ = raw(
            deployment.service,
            headers=[
                (b"content-type", FORM.encode()),
                (b"authorization", scheme + b"a" * 1_000_000),
            ],
            body=GRANT.encode(),
        )
        assert status in (400, 401, 431)
    assert time.perf_counter() - started_at < 1


# --- T45, T46: paths

PATHS = (
    "/oauth/token/",
    "//oauth/token",
    "/oauth//token",
    "/oauth/token//",
    "/oauth/token%00",
    "/oauth/token%20",
    "/oauth/token%0A",
    "/oauth/token%2F",
    "/oauth/token;x=y",
    "/oauth/token.json",
    "/OAuth/Token",
    "/%2Foauth/token",
    "/oauth/%2e%2e/oauth/token",
    "/v1/oauth/token",
    "/oauth",
    "/oauth/tokens",
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_beside_the_token_endpoint_redirects_nobody(
    http: TestClient, deployment: Deployment, path: str
) -> None:
    """T45: a redirect makes the client send its secret once more.  RFC 9700 §4.12."""
    answer = http.post(ISSUER + path, data=form(deployment.api_key().key))

    assert answer.status_code == 404
    assert "location" not in answer.headers
    assert answer.headers["content-type"] in ("application/json", "application/problem+json")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["@evil.example/oauth/token", "", "oauth/token", "*", "\0", "ü"])
def test_a_path_that_is_none_finds_nothing(deployment: Deployment, path: str) -> None:
    """T46: a URL built from it would lead to another host.  CVE-2026-54282."""
    status, headers, _ = raw(deployment.service, path=path, body=GRANT.encode())

    assert status == 404
    assert b"location" not in headers


# --- T50: guessing

GUESSER, ELSEWHERE = "203.0.113.7", "198.51.100.9"
PER_MINUTE = 5


@pytest.fixture
def throttled(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment that bears few guesses, behind a proxy of 10.0.0.0/8."""
    with a_deployment(
        tmp_path, guesses_per_minute=PER_MINUTE, trusted_proxies=(ip_network("10.0.0.0/8"),)
    ) as made:
        yield made


def client_from(deployment: Deployment, address: str) -> TestClient:
    return TestClient(
        deployment.service,
        base_url=ISSUER,
        raise_server_exceptions=False,
        follow_redirects=False,
        client=(address, 1234),
    )


def guess_until_throttled(http: TestClient, made: Created, **headers: str) -> httpx2.Response:
    """One guess more than is borne; all but the last are answered as ever."""
    for _ in range(PER_MINUTE):
        answer = present_guess(http, made, headers)
        refused(answer, 400, "invalid_client")
    return present_guess(http, made, headers)


def present_guess(http: TestClient, made: Created, headers: Mapping[str, str]) -> httpx2.Response:
    body = urlencode(form(a_wrong_key(), client_id=made.api_key.id))
    return post(http, body, headers)


def test_a_guesser_has_to_wait_and_the_holder_has_not(throttled: Deployment) -> None:
    """
    T50: nobody can lock an API key out by guessing at it, not even from the same address.

    OWASP ASVS 5 §6.3.1; RFC 6585 §4.
    """
    made = throttled.api_key()
    guesser, elsewhere = client_from(throttled, GUESSER), client_from(throttled, ELSEWHERE)

    answer = guess_until_throttled(guesser, made)

    body = refused(answer, 429, "temporarily_unavailable")
    assert body["code"] == "rate_limited"
    assert 1 <= int(answer.headers["retry-after"]) <= MINUTE
    for http in (guesser, elsewhere):
        assert ask(http, made.key).status_code == 200
        assert ask(http, made.key, client_id=made.api_key.id).status_code == 200
        assert post(http, GRANT, basic(made.api_key.id, made.key)).status_code == 200
    # Who has not guessed yet is told what is wrong, about the same API key too.
    refused(present_guess(elsewhere, made, {}), 400, "invalid_client")


def test_a_hundred_guesses_in_a_second_are_not_a_hundred_answers(deployment: Deployment) -> None:
    """T50: with the settings as they come.  OWASP ASVS 5 §6.3.1."""
    made = deployment.api_key()
    guesser, elsewhere = client_from(deployment, GUESSER), client_from(deployment, ELSEWHERE)

    answers = [present_guess(guesser, made, {}) for _ in range(100)]

    assert [answer.status_code for answer in answers] == [400] * 60 + [429] * 40
    for answer in answers[60:]:
        refused(answer, 429, "temporarily_unavailable")
        assert 1 <= int(answer.headers["retry-after"]) <= MINUTE
    assert ask(elsewhere, made.key).status_code == 200


def test_the_wait_is_a_minute_at_most_on_any_clock(throttled: Deployment) -> None:
    """A client that obeys Retry-After must not sleep for years because a clock was moved."""
    throttled.clock.now = 1_000_000_000
    http = client_from(throttled, GUESSER)

    answer = guess_until_throttled(http, throttled.api_key())

    refused(answer, 429, "temporarily_unavailable")
    assert 1 <= int(answer.headers["retry-after"]) <= MINUTE


def test_a_throttled_guess_tells_nothing_about_an_api_key(throttled: Deployment) -> None:
    """What a 429 says must not depend on whether the id exists."""
    alive, dead = throttled.api_key(), throttled.api_key()
    throttled.revoke(dead)
    http = client_from(throttled, GUESSER)
    guess_until_throttled(http, alive)

    answers = [
        said(ask(http, a_wrong_key(), client_id=client_id))
        for client_id in (alive.api_key.id, dead.api_key.id, an_unknown_id())
    ]

    assert [answer[:2] for answer in answers] == [answers[0][:2]] * 3
    assert answers[0][0] == 429


def test_a_mistake_that_is_no_guess_is_never_counted(throttled: Deployment) -> None:
    """A misconfigured caller retries for ever; it must go on seeing what is wrong."""
    disabled = throttled.api_key()
    throttled.disable(disabled)
    http = client_from(throttled, GUESSER)

    for _ in range(PER_MINUTE + 1):
        refused(ask(http, disabled.key), 400, "invalid_client")
        refused(ask(http, throttled.initialized.key, scope="none"), 400, "invalid_target")
        refused(post(http, GRANT), 401, "invalid_client")

    assert present_guess(http, disabled, {}).status_code == 400


def test_addresses_of_one_ipv6_subscriber_are_one_guesser(throttled: Deployment) -> None:
    """A subscriber has 2^64 addresses to guess from.  RFC 6177 §2."""
    made = throttled.api_key()
    guess_until_throttled(client_from(throttled, "2001:db8:0:1::1"), made)

    same = client_from(throttled, "2001:db8:0:1:ffff::2")
    other = client_from(throttled, "2001:db8:0:2::1")

    assert present_guess(same, made, {}).status_code == 429
    assert present_guess(other, made, {}).status_code == 400


def test_behind_a_trusted_proxy_the_caller_is_the_guesser(throttled: Deployment) -> None:
    """Everybody comes from the proxy's address: one guesser must not stop all of them."""
    made = throttled.api_key()
    proxy = client_from(throttled, "10.0.0.1")

    answer = guess_until_throttled(proxy, made, **{"X-Forwarded-For": f"1.2.3.4, {GUESSER}"})

    refused(answer, 429, "temporarily_unavailable")
    other = present_guess(proxy, made, {"X-Forwarded-For": f"{GUESSER}, {ELSEWHERE}"})
    refused(other, 400, "invalid_client")
    assert post(proxy, urlencode(form(made.key)), {"X-Forwarded-For": GUESSER}).status_code == 200


def test_a_guesser_cannot_write_another_address_for_itself(throttled: Deployment) -> None:
    """X-Forwarded-For of somebody who is no trusted proxy decides nothing."""
    made = throttled.api_key()
    http = client_from(throttled, GUESSER)
    for number in range(PER_MINUTE):
        present_guess(http, made, {"X-Forwarded-For": f"192.0.2.{number}"})

    answer = present_guess(http, made, {"X-Forwarded-For": "192.0.2.200"})

    refused(answer, 429, "temporarily_unavailable")


def test_zero_guesses_a_minute_turns_the_limit_off(tmp_path: Path) -> None:
    """COATCHECK_GUESSES_PER_MINUTE=0 is for who throttles in front."""
    with a_deployment(tmp_path, guesses_per_minute=0) as deployment:
        http = client_from(deployment, GUESSER)
        statuses = {ask(http, a_wrong_key()).status_code for _ in range(100)}

    assert statuses == {400}


# --- our own trouble


def eventually(call: Callable[[], httpx2.Response], status: int) -> httpx2.Response:
    """The answer once it has this status: whether the file is there is looked at every second."""
    deadline = time.monotonic() + 5
    while (answer := call()).status_code != status and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def test_a_database_that_is_gone_is_our_trouble_and_never_the_callers(
    http: TestClient, deployment: Deployment
) -> None:
    """
    A 401 would make callers throw a good API key away.

    RFC 9110 §15.6.4; the key set goes on being served, so that tokens go on being verified.
    """
    made = deployment.api_key()
    key_set = http.get("/.well-known/jwks.json").content
    away = database(deployment).rename(database(deployment).with_suffix(".away"))

    right = eventually(lambda: ask(http, made.key), 503)
    wrong = post(http, GRANT, basic(made.api_key.id, a_wrong_key()))
    for answer in (right, wrong):
        body = refused(answer, 503, "temporarily_unavailable")
        assert body["code"] == "issuer_unavailable"
        assert int(answer.headers["retry-after"]) >= 1
        assert not re.search(r"sqlite|\.db|Traceback|/", body["error_description"])
    assert http.get("/.well-known/jwks.json").content == key_set

    away.rename(database(deployment))
    assert ask(http, made.key).status_code == 200


def test_without_a_signing_key_no_token_is_made(http: TestClient, deployment: Deployment) -> None:
    """A withdrawn signing key signs nothing, and there is no second choice: 503."""
    made = deployment.api_key()
    for record in deployment.store.signing_keys():
        signing.withdraw(deployment.store, record.kid, TESTER, now=deployment.now, force=True)

    answer = ask(http, made.key)

    refused(answer, 503, "temporarily_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    # Who may not have a token is still told so.
    refused(ask(http, a_wrong_key()), 400, "invalid_client")


# --- whatever comes in


def a_scope(
    path: str = "/oauth/token",
    headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", FORM.encode()),),
    query: bytes = b"",
) -> dict[str, Any]:
    """A POST that no HTTP client would send, as ASGI has it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": (GUESSER, 1234),
        "server": ("127.0.0.1", 8000),
    }


def raw(
    service: Service,
    *,
    path: str = "/oauth/token",
    headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", FORM.encode()),),
    body: bytes = b"",
    query: bytes = b"",
) -> tuple[int, dict[bytes, bytes], bytes]:
    """A POST of these very bytes: status, headers, body."""
    sent: list[Mapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(service(a_scope(path, headers, query), receive, send))
    start, *rest = sent
    return start["status"], dict(start["headers"]), b"".join(part["body"] for part in rest)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment that bears any number of guesses."""
    with a_deployment(tmp_path_factory.mktemp("patient"), guesses_per_minute=0) as made:
        yield made


@pytest.fixture(scope="module")
def owned(patient: Deployment) -> Created:
    """An API key of that deployment."""
    return patient.api_key("widgets:read")


NAMES = ("grant_type", "scope", "resource", "audience", "client_id", "client_assertion", "token")
VALUES = ("client_credentials", "widgets:read", "widgets:write", AUDIENCE, "a@P/#", "key_0", "*")
pairs = st.tuples(st.sampled_from(NAMES) | st.text(), st.sampled_from(VALUES) | st.text())
forms = st.lists(pairs, max_size=8).map(lambda some: urlencode(some).encode())
#: KEY stands for the API key, which a strategy cannot know.
good = st.just(b"grant_type=client_credentials&client_secret=KEY")
bodies = st.one_of(
    forms,
    st.binary(max_size=200),
    st.builds(lambda *parts: b"&".join(parts), good, forms),
    st.builds(lambda *parts: b"&".join(parts), good, st.binary(max_size=50)),
)
credentials = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"Bearer KEY", b"Basic KEY:", b"bearer KEY KEY"]),
    st.binary(max_size=60).map(lambda text: b"Basic " + base64.b64encode(text)),
    st.binary(max_size=60).map(lambda text: b"Bearer " + text),
)
other_headers = st.lists(
    st.tuples(
        st.sampled_from(
            (b"content-length", b"content-encoding", b"x-forwarded-for", b"host", b"accept")
        ),
        st.binary(max_size=40),
    ),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(
    body=bodies,
    authorization=st.lists(credentials, max_size=2),
    media_type=st.just(FORM.encode()) | st.binary(max_size=40),
    others=other_headers,
    query=st.just(b"") | st.binary(max_size=40),
)
def test_whatever_comes_in_the_answer_keeps_its_form(
    patient: Deployment,
    owned: Created,
    body: bytes,
    authorization: list[bytes],
    media_type: bytes,
    others: list[tuple[bytes, bytes]],
    query: bytes,
) -> None:
    """
    Never a 5xx, always JSON that nobody may store, and no word of what was presented.

    RFC 6749 §5.2: the characters of `error_description`.
    """
    key = owned.key.encode()
    basic_key = base64.b64encode(key + b":")
    headers = [(b"content-type", media_type), *others]
    for text in authorization:
        value = text.replace(b"Basic KEY:", b"Basic " + basic_key).replace(b"KEY", key)
        headers.append((b"authorization", value))

    body = body.replace(b"KEY", key)
    status, sent, answer = raw(patient.service, headers=headers, body=body, query=query)
    short = patient.service.reply_now(a_scope(headers=headers, query=query), body)

    # The listener's short way is the same way; it names the request itself.
    del sent[b"x-request-id"]
    assert short is not None
    assert (short.status, {**dict(short.headers), b"content-length": b"%d" % len(answer)}) == (
        status,
        sent,
    )
    assert short.body == answer or status == 200
    assert status < 500
    assert sent[b"content-type"] == b"application/json"
    assert sent[b"cache-control"] == b"no-store"
    assert sent[b"pragma"] == b"no-cache"
    assert int(sent[b"content-length"]) == len(answer)
    told = json.loads(answer)
    if status != 200:
        assert set(told) == {"error", "error_description", "code"}
        assert DESCRIPTION.fullmatch(told["error_description"])
    assert (b"www-authenticate" in sent) == (status == 401)
    assert key not in answer + b"".join(sent.values())


@settings(max_examples=100, deadline=None)
@given(secret=st.text(min_size=1, max_size=80))
def test_no_made_up_secret_is_ever_repeated(patient: Deployment, secret: str) -> None:
    """A secret with one letter wrong is nearly as good as the right one."""
    marked = f"~{secret}~"

    _, sent, answer = raw(
        patient.service, body=f"{GRANT}&client_secret={quote(marked, safe='')}".encode()
    )

    assert marked.encode() not in answer + b"".join(sent.values())
