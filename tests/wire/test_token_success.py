"""POST /oauth/token, when it works.  RFC 6749 §4.4, §5.1; RFC 9068 §2."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlencode

import httpx2
import jwt
import pytest
from starlette.testclient import TestClient

from coatcheck.scope import Scopes
from coatcheck.server.app import Service
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created
from coatcheck.server.store import Store
from support.deployment import (
    AUDIENCE,
    HOUR,
    ISSUER,
    MINUTE,
    NOON,
    Deployment,
    a_client,
    a_deployment,
    form,
)
from support.wire import FORM, LIFETIME, MANAGEMENT, basic


def everything_encoded(text: str) -> str:
    return "".join(f"%{ord(character):02X}" for character in text)


def ask(http: TestClient, key: str, **parameters: str) -> httpx2.Response:
    return http.post("/oauth/token", data=form(key, **parameters))


def issued(answer: httpx2.Response) -> dict[str, Any]:
    """What a successful answer says."""
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def read(http: TestClient, answer: httpx2.Response) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of the token in an answer, its signature checked by the key set."""
    token = issued(answer)["access_token"]
    header = jwt.get_unverified_header(token)
    key_set = jwt.PyJWKSet.from_dict(http.get("/.well-known/jwks.json").json())
    claims = jwt.decode(
        token,
        key_set[header["kid"]],
        algorithms=[header["alg"]],
        # The deployment's clock stands still, PyJWT's does not.
        options={"verify_aud": False, "verify_exp": False, "verify_iat": False},
    )
    return header, claims


# --- the credential

Credential = Callable[[str, str], tuple[dict[str, str], dict[str, str]]]

FORMS: dict[str, Credential] = {
    "basic": lambda i, k: (basic(i, k), {}),
    "basic, key as user name": lambda i, k: (basic(k, ""), {}),
    "basic, fully percent-encoded": lambda i, k: (
        basic(everything_encoded(i), everything_encoded(k)),
        {},
    ),
    "basic, underscores encoded": lambda i, k: (
        basic(i.replace("_", "%5f"), k.replace("_", "%5F")),
        {},
    ),
    "basic, equal client_id in the body": lambda i, k: (basic(i, k), {"client_id": i}),
    "basic, key as user name, client_id in the body": lambda i, k: (
        basic(k, ""),
        {"client_id": i},
    ),
    "basic, client_secret without value": lambda i, k: (basic(i, k), {"client_secret": ""}),
    "basic, odd letter case": lambda i, k: (basic(i, k, "bAsIc"), {}),
    "body": lambda i, k: ({}, {"client_id": i, "client_secret": k}),
    "body, secret alone": lambda i, k: ({}, {"client_secret": k}),
    "body, client_id without value": lambda i, k: ({}, {"client_id": "", "client_secret": k}),
    "bearer": lambda i, k: ({"Authorization": f"Bearer {k}"}, {}),
    "bearer, odd letter case": lambda i, k: ({"Authorization": f"bEARER {k}"}, {}),
    "bearer, equal client_id in the body": lambda i, k: (
        {"Authorization": f"Bearer {k}"},
        {"client_id": i},
    ),
}


@pytest.mark.parametrize("credential", FORMS.values(), ids=FORMS)
def test_every_form_of_credential_gets_a_token(
    http: TestClient, deployment: Deployment, credential: Credential
) -> None:
    """
    T22, T25, T26: OAuth libraries differ in where they put the secret; all of them work unchanged.

    RFC 6749 §2.3.1; RFC 9110 §11.1.
    """
    made = deployment.api_key("widgets:read")
    headers, extra = credential(made.api_key.id, made.key)

    answer = http.post(
        "/oauth/token", data={"grant_type": "client_credentials", **extra}, headers=headers
    )

    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"access_token", "token_type", "expires_in", "scope"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert answer.headers["content-type"] == "application/json"


def test_an_api_key_that_was_enabled_again_works_at_once(
    http: TestClient, deployment: Deployment
) -> None:
    """Disabling is the reversible stop: nothing of it may stay behind in a cache."""
    made = deployment.api_key()
    deployment.disable(made)
    assert ask(http, made.key).status_code == 400

    deployment.enable(made)

    assert ask(http, made.key).status_code == 200


# --- the token


def test_a_token_says_exactly_what_its_profile_lists(
    http: TestClient, deployment: Deployment
) -> None:
    """
    A claim more tells resource servers what is none of their business; one less breaks verifiers.

    RFC 9068 §2.1 (header), §2.2 (claims).
    """
    made = deployment.api_key("widgets:read", "widgets:write")
    with deployment.store.transaction(read_only=True) as tx:
        head = tx.head()

    header, claims = read(http, ask(http, made.key))

    jti = claims.pop("jti")
    assert claims == {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": made.api_key.id,
        "client_id": made.api_key.id,
        "iat": NOON,
        "exp": NOON + LIFETIME,
        "scope": "widgets:read widgets:write",
        "org_id": deployment.organization_id,
        "env": "live",
        "as_of": head,
    }
    assert {name: type(claims[name]) for name in ("iat", "exp", "as_of")} == {
        "iat": int,
        "exp": int,
        "as_of": int,
    }
    assert isinstance(jti, str)
    assert len(jti) >= 22
    assert header == {"typ": "at+jwt", "alg": "ES256", "kid": header["kid"]}


def test_the_answer_tells_type_and_lifetime_as_clients_parse_them(
    http: TestClient, deployment: Deployment
) -> None:
    """
    Clients compare `token_type` and do arithmetic with `expires_in`.

    RFC 6749 §5.1; §4.4.3: no refresh token.
    """
    body = issued(ask(http, deployment.api_key("widgets:read").key))

    token = body.pop("access_token")
    assert body == {"token_type": "Bearer", "expires_in": LIFETIME, "scope": "widgets:read"}
    assert type(body["expires_in"]) is int
    assert len(token) <= 4096


def test_no_two_tokens_share_a_jti(http: TestClient, deployment: Deployment) -> None:
    """Revoking one token must not reach another.  RFC 7519 §4.1.7."""
    key = deployment.api_key().key

    jtis = {read(http, ask(http, key))[1]["jti"] for _ in range(20)}

    assert len(jtis) == 20


def test_a_test_key_gets_a_token_of_the_test_environment(
    http: TestClient, deployment: Deployment
) -> None:
    """A resource server for live data must be able to tell a test token from a live one."""
    made = deployment.api_key("widgets:read", environment="test")

    _, claims = read(http, ask(http, made.key))

    assert claims["env"] == "test"
    assert claims["aud"] == AUDIENCE


# --- its lifetime

ENDS: dict[str, tuple[int | None, int]] = {
    "never": (None, LIFETIME),
    "in an hour": (HOUR, LIFETIME),
    "one second after the token": (LIFETIME + 1, LIFETIME),
    "with the token": (LIFETIME, LIFETIME),
    "in five minutes": (5 * MINUTE, 5 * MINUTE),
    "in one second": (1, 1),
}


@pytest.mark.parametrize(("ends_in_s", "expected"), ENDS.values(), ids=ENDS)
def test_no_token_outlives_its_api_key(
    http: TestClient, deployment: Deployment, ends_in_s: int | None, expected: int
) -> None:
    """Nothing but `exp` stops a token at a resource server that follows no feed."""
    made = deployment.api_key(expires_at=None if ends_in_s is None else NOON + ends_in_s)

    answer = ask(http, made.key)

    assert issued(answer)["expires_in"] == expected
    _, claims = read(http, answer)
    assert (claims["iat"], claims["exp"]) == (NOON, NOON + expected)


OVERLAPS: dict[str, tuple[int, int]] = {
    "a day": (24 * HOUR, LIFETIME),
    "five minutes": (5 * MINUTE, 5 * MINUTE),
    "one second": (1, 1),
}


@pytest.mark.parametrize(("overlap_s", "expected"), OVERLAPS.values(), ids=OVERLAPS)
def test_no_token_outlives_the_overlap_of_a_replaced_secret(
    http: TestClient, deployment: Deployment, overlap_s: int, expected: int
) -> None:
    """Whoever rotates a leaked secret counts on its end; the new secret is not bound by it."""
    made = deployment.api_key()
    rotated = deployment.rotate(made, overlap_s=overlap_s)

    assert issued(ask(http, made.key))["expires_in"] == expected
    assert issued(ask(http, rotated.key))["expires_in"] == LIFETIME


def test_the_earlier_end_counts_when_key_and_overlap_end(
    http: TestClient, deployment: Deployment
) -> None:
    """An overlap must not lengthen an API key's life, nor its expiry an overlap."""
    made = deployment.api_key(expires_at=NOON + 2 * MINUTE)
    rotated = deployment.rotate(made, overlap_s=5 * MINUTE)

    assert issued(ask(http, made.key))["expires_in"] == 2 * MINUTE
    assert issued(ask(http, rotated.key))["expires_in"] == 2 * MINUTE


# --- scope

Asked = tuple[tuple[str, ...], str | None, str]

SCOPES: dict[str, Asked] = {
    "absent: all the key has": (("widgets:read", "b:c"), None, "widgets:read b:c"),
    "without value: absent": (("widgets:read", "b:c"), "", "widgets:read b:c"),
    "one of two": (("widgets:read", "b:c"), "b:c", "b:c"),
    "all, in another order": (("widgets:read", "b:c"), "b:c widgets:read", "b:c widgets:read"),
    "one twice": (("widgets:read", "b:c"), "b:c b:c", "b:c"),
    "of a key for everything": ((), "widgets:read", "widgets:read"),
    "every action": ((), "*", "*"),
    "one site of all sites": (("a@P/Site/#",), "a@P/Site/42", "a@P/Site/42"),
    "all sites": (("a@P/Site/#",), "a@P/Site/#", "a@P/Site/#"),
    "all sites, the other sign": (("a@P/Site/#",), "a@P/Site/*", "a@P/Site/*"),
    "one site of an unfiltered grant": (("a",), "a@P/Site/42", "a@P/Site/42"),
    "a filter for everything": (("a",), "a@*", "a@*"),
    "an encoded id": (("a@P/Site/#",), "a@P/Site/x%3Ay", "a@P/Site/x%3Ay"),
    "one filter in two grants": (("a@P/1", "a@P/2"), "a@P/2", "a@P/2"),
    "a narrow one beside a wide one": (("a",), "a a@P/1", "a a@P/1"),
}


@pytest.mark.parametrize(("owned", "asked", "expected"), SCOPES.values(), ids=SCOPES)
def test_exactly_the_asked_scopes_are_granted(
    http: TestClient,
    deployment: Deployment,
    owned: Sequence[str],
    asked: str | None,
    expected: str,
) -> None:
    """
    T10: the answer names the asked set as it was asked: requests-oauthlib raises when it differs.

    RFC 6749 §3.3; §3.2: a parameter without value counts as omitted.
    """
    key = deployment.api_key(*owned).key

    answer = ask(http, key) if asked is None else ask(http, key, scope=asked)

    told = issued(answer)["scope"].split(" ")
    assert sorted(told) == sorted(expected.split(" "))
    _, claims = read(http, answer)
    assert Scopes.parse(claims["scope"]) == Scopes.parse(expected)


# --- the target

Pairs = list[tuple[str, str]]

TARGETS: dict[str, tuple[Pairs, str]] = {
    "absent": ([], AUDIENCE),
    "without value": ([("resource", ""), ("audience", "")], AUDIENCE),
    "resource": ([("resource", AUDIENCE)], AUDIENCE),
    "audience": ([("audience", AUDIENCE)], AUDIENCE),
    "both, equal": ([("resource", AUDIENCE), ("audience", AUDIENCE)], AUDIENCE),
    "resource, twice equal": ([("resource", AUDIENCE)] * 2, AUDIENCE),
    "audience, twice equal": ([("audience", AUDIENCE)] * 2, AUDIENCE),
    "the second one of the key": ([("resource", MANAGEMENT)], MANAGEMENT),
    "the second one, as audience": ([("audience", MANAGEMENT)], MANAGEMENT),
}


@pytest.mark.parametrize(("pairs", "expected"), TARGETS.values(), ids=TARGETS)
def test_resource_and_audience_are_two_names_for_one_thing(
    http: TestClient, deployment: Deployment, pairs: Pairs, expected: str
) -> None:
    """
    MCP clients send `resource`, Auth0-style ones `audience`, Go repeats them.

    RFC 8707 §2; the token has one audience (RFC 9068 §3).
    """
    made = deployment.api_key("widgets:read", audiences=(AUDIENCE, MANAGEMENT))
    body = urlencode([*form(made.key).items(), *pairs])

    answer = http.post("/oauth/token", content=body, headers={"Content-Type": FORM})

    _, claims = read(http, answer)
    assert claims["aud"] == expected


def test_the_admin_key_gets_a_token_for_the_management_api(
    http: TestClient, deployment: Deployment
) -> None:
    """The first thing an operator does with the key that `init` printed."""
    admin = deployment.initialized

    answer = ask(http, admin.key, resource=MANAGEMENT)

    header, claims = read(http, answer)
    assert (claims["aud"], claims["sub"]) == (MANAGEMENT, admin.key_id)
    assert "org:admin" in claims["scope"].split(" ")
    assert "coatcheck:" not in claims["scope"]
    assert header["typ"] == "at+jwt"


@pytest.mark.parametrize("token_type", ["at+jwt", "JWT"])
@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
def test_algorithm_and_type_are_settings_of_the_default_audience(
    tmp_path: Path, algorithm: Literal["ES256", "RS256"], token_type: Literal["at+jwt", "JWT"]
) -> None:
    """
    Some gateways know RSA only, and some frameworks no `at+jwt`.

    RFC 9068 §2.1 wants RS256 supported.  The management API is our own and stays as it is.
    """
    with (
        a_deployment(tmp_path, algorithm=algorithm, token_type=token_type) as deployment,
        a_client(deployment) as http,
    ):
        key = deployment.api_key(audiences=(AUDIENCE, MANAGEMENT)).key

        header, _ = read(http, ask(http, key))
        management, _ = read(http, ask(http, key, resource=MANAGEMENT))

    assert (header["alg"], header["typ"]) == (algorithm, token_type)
    assert (management["alg"], management["typ"]) == ("ES256", "at+jwt")


# --- what makes no difference

IGNORED = {
    "of other grants": {"redirect_uri": "https://a.example/", "code": "x", "username": "u"},
    "of MSAL and other clients": {"client_info": "1", "nonce": "n", "state": "s"},
    "never heard of": {"x": "1", "": "2", "grant": "3", "Scope": "nothing", "☃": "4"},
    "named like claims": {
        "sub": "key_0000000000000000000000",
        "iss": "https://evil.example",
        "aud": "https://evil.example",
        "exp": "9999999999",
        "iat": "0",
        "org_id": "org_0000000000000000000000",
        "env": "test",
        "as_of": "0",
        "must": "nothing",
    },
}


@pytest.mark.parametrize("extra", IGNORED.values(), ids=IGNORED)
def test_an_unknown_parameter_changes_nothing(
    http: TestClient, deployment: Deployment, extra: dict[str, str]
) -> None:
    """
    T7, T8: unrecognized parameters are ignored; claims come from the record alone.

    RFC 6749 §3.2; RFC 9068 §5.
    """
    key = deployment.api_key("widgets:read").key
    _, plain = read(http, ask(http, key))

    _, claims = read(http, ask(http, key, **extra))

    assert claims | {"jti": ""} == plain | {"jti": ""}


def of_length(made: Created, length: int) -> str:
    body = urlencode(form(made.key)) + "&padding="
    return body + "a" * (length - len(body))


LARGEST: dict[str, Callable[[Created], str]] = {
    "32 parameters": lambda made: urlencode(form(made.key) | {f"p{n}": "1" for n in range(30)}),
    "16 KiB": lambda made: of_length(made, 16 * 1024),
}


@pytest.mark.parametrize("body", LARGEST.values(), ids=LARGEST)
def test_a_request_at_the_limit_is_answered(
    http: TestClient, deployment: Deployment, body: Callable[[Created], str]
) -> None:
    """The limits are promises: up to them everything works."""
    content = body(deployment.api_key())

    answer = http.post("/oauth/token", content=content, headers={"Content-Type": FORM})

    assert answer.status_code == 200, answer.text


HEADERS = {
    "charset": {"Content-Type": f"{FORM};charset=UTF-8"},
    "charset after a blank": {"Content-Type": f"{FORM}; charset=utf-8"},
    "quoted charset": {"Content-Type": f'{FORM}; charset="UTF-8"'},
    "another charset": {"Content-Type": f"{FORM};charset=iso-8859-1"},
    "odd letter case": {"Content-Type": "Application/X-WWW-Form-URLEncoded; Charset=UTF-8"},
    "Accept of a browser": {"Content-Type": FORM, "Accept": "text/html"},
    "Accept of nothing": {"Content-Type": FORM, "Accept": "image/png;q=0.1"},
    "Accept-Encoding": {"Content-Type": FORM, "Accept-Encoding": "gzip, br"},
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_spellings_of_headers_make_no_difference(
    http: TestClient, deployment: Deployment, headers: dict[str, str]
) -> None:
    """
    T34, T52: Java and Authlib add a charset; media types ignore letter case; the answer is JSON.

    RFC 9110 §8.3.1, §12.5.1; RFC 6749 appendix B.
    """
    body = urlencode(form(deployment.api_key().key))

    answer = http.post("/oauth/token", content=body, headers=headers)

    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "content-encoding" not in answer.headers


FOREIGN = {
    "Host": {"Host": "evil.example"},
    "X-Forwarded-Host": {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"},
    "Forwarded": {"Forwarded": "host=evil.example;proto=https"},
    "X-Original-URL": {"X-Original-URL": "/evil", "X-Forwarded-Prefix": "/evil"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_the_issuer_never_comes_from_the_request(
    http: TestClient, deployment: Deployment, headers: dict[str, str]
) -> None:
    """
    T47: whoever can choose the `iss` of a token can have it trusted elsewhere.

    RFC 8414 §6.2; GHSA-86qp-5c8j-p5mr.
    """
    key = deployment.api_key().key

    answer = http.post("/oauth/token", data=form(key), headers=headers)

    _, claims = read(http, answer)
    assert (claims["iss"], claims["aud"]) == (ISSUER, AUDIENCE)


# --- loading


class CountingStore:
    """A store that counts how often the signing keys are read from it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.loads = 0

    def signing_keys(self) -> object:
        self.loads += 1
        return self._store.signing_keys()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_the_signing_keys_are_loaded_once_for_everybody(deployment: Deployment) -> None:
    """T51: unsealing takes its time; thirty-two first callers wait for it together, at most."""
    key = deployment.api_key().key
    store = CountingStore(deployment.store)
    service = Service(deployment.settings, cast("Store", store), deployment.clock)

    with (
        TestClient(service, base_url=ISSUER) as http,
        ThreadPoolExecutor(32) as threads,
    ):
        answers = list(threads.map(lambda _: ask(http, key).status_code, range(32)))

    assert set(answers) == {200}
    assert store.loads == 1


# --- counting


def test_every_token_is_counted_for_its_api_key(deployment: Deployment) -> None:
    """Owners find keys that nobody uses any more by this; a refused request is no use."""
    used, unused = deployment.api_key("widgets:read"), deployment.api_key()

    with a_client(deployment) as http:
        for _ in range(3):
            issued(ask(http, used.key))
        deployment.clock.now += MINUTE
        issued(ask(http, used.key))
        deployment.clock.now += MINUTE
        assert ask(http, used.key, scope="widgets:write").status_code == 400

    shown = api_keys.show(deployment.store, used.api_key.id, now=deployment.now)
    assert (shown.tokens_issued, shown.last_used_at) == (4, NOON + MINUTE)
    never = api_keys.show(deployment.store, unused.api_key.id, now=deployment.now)
    assert (never.tokens_issued, never.last_used_at) == (0, None)
