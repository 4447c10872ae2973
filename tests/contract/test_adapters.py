"""Every adapter gives the same answers to the same requests, and they are the verifier's own.

An adapter is registered in ADAPTERS and brings a harness, `support/adapters`: the application of
the contract as users of its framework would write it, and how that framework is asked.  Behind
all of them is an issuer that answers every verifier of this process.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from coatcheck.testing import FakeIssuer
from coatcheck.verifier import MissingCredentials, Verifier, VerifierError
from coatcheck.verifier.adapters import ADAPTERS, PER_ROUTE
from support.adapters.harness import PEER, Answer, Ask, Headers, harness_of

METADATA = "/.well-known/oauth-protected-resource"
READ = "widgets:read"
NEAR, FAR = "203.0.113.7", "198.51.100.7"


class Asked(NamedTuple):
    """A request of the contract."""

    headers: Headers = ()
    path: str = "/widgets"
    method: str = "GET"


@pytest.fixture(scope="module")
def installed() -> Iterator[FakeIssuer]:
    roles = {"viewer": ("GET", "HEAD"), "member": ("GET", "HEAD", "POST")}
    with FakeIssuer(roles=roles, api_key_header="X-Acme-Key") as issuer:
        yield issuer


@pytest.fixture
def issuer(installed: FakeIssuer) -> FakeIssuer:
    installed.reset()
    return installed


class Behind(NamedTuple):
    """An application behind an adapter."""

    ask: Ask
    verifier: Verifier

    def __call__(self, asked: Asked) -> Answer:
        return self.ask(asked.method, asked.path, asked.headers)

    def judged(self, asked: Asked, scopes: str) -> VerifierError:
        """What the verifier itself says, asked without any adapter."""
        query = asked.path.partition("?")[2]
        with pytest.raises(VerifierError) as refused:
            self.verifier.authenticate(
                asked.headers, scopes, client_address=PEER, query=query, method=asked.method
            )
        return refused.value


@pytest.fixture(scope="module", params=ADAPTERS)
def behind(request: pytest.FixtureRequest, installed: FakeIssuer) -> Iterator[Behind]:
    harness = harness_of(request.param)
    with (
        Verifier(
            installed.issuer,
            installed.audience,
            environment=installed.environment,
            service_key=installed.service_key,
            trusted_proxies=[PEER],
            on_stale_feed="refuse",
        ) as verifier,
        harness.asking(harness.application(verifier)) as ask,
    ):
        yield Behind(ask, verifier)


def bearer(credential: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {credential}")


def basic(user_name: str) -> tuple[str, str]:
    return ("Authorization", f"Basic {b64encode(f'{user_name}:'.encode()).decode()}")


def from_address(address: str) -> tuple[str, str]:
    return ("X-Forwarded-For", address)


Case = Callable[[FakeIssuer], Asked]

#: Requests that get through, and by what kind of credential.
LET_IN: dict[str, tuple[str, Case]] = {
    "token": ("jwt", lambda issuer: Asked([bearer(issuer.token(READ))])),
    "token in X-API-Key": ("jwt", lambda issuer: Asked([("X-API-Key", issuer.token(READ))])),
    "token as Basic user": ("jwt", lambda issuer: Asked([basic(issuer.token(READ))])),
    "key as Bearer": ("api_key", lambda issuer: Asked([bearer(issuer.api_key(READ))])),
    "key in X-API-Key": ("api_key", lambda issuer: Asked([("x-api-key", issuer.api_key(READ))])),
    "key as Basic user": ("api_key", lambda issuer: Asked([basic(issuer.api_key(READ))])),
    "key in the product's header": (
        "api_key",
        lambda issuer: Asked([("X-Acme-Key", issuer.api_key(READ))]),
    ),
    "connector key in the URL": (
        "api_key",
        lambda issuer: Asked(path=f"/widgets?api_key={issuer.api_key(READ, connector=True)}"),
    ),
    "HEAD": ("jwt", lambda issuer: Asked([bearer(issuer.token(READ))], method="HEAD")),
    "from its network": (
        "jwt",
        lambda issuer: Asked(
            [bearer(issuer.token(READ, cidrs=["203.0.113.0/24"])), from_address(NEAR)]
        ),
    ),
    "key from its network": (
        "api_key",
        lambda issuer: Asked(
            [bearer(issuer.api_key(READ, cidrs=["203.0.113.0/24"])), from_address(NEAR)]
        ),
    ),
    "a role that allows GET": (
        "jwt",
        lambda issuer: Asked([bearer(issuer.token(READ, roles=["viewer"]))]),
    ),
    "its own project": (
        "jwt",
        lambda issuer: Asked(
            [bearer(issuer.token(READ, project_id="prj_1")), ("X-Project-Id", "prj_1")]
        ),
    ),
}


def revoked_token(issuer: FakeIssuer) -> Asked:
    token = issuer.token(READ)
    issuer.revoke(token)
    return Asked([bearer(token)])


def ended_key(code: str) -> Case:
    def case(issuer: FakeIssuer) -> Asked:
        key = issuer.api_key(READ)
        issuer.refuse(key, code)
        return Asked([bearer(key)])

    return case


#: Code → a request that is refused for it.
REFUSED: dict[str, tuple[str, Case]] = {
    "nothing": ("missing_credentials", lambda _: Asked()),
    "nothing from HEAD": ("missing_credentials", lambda _: Asked(method="HEAD")),
    "two credentials": (
        "multiple_credentials",
        lambda issuer: Asked([bearer(issuer.token(READ)), ("X-API-Key", issuer.api_key(READ))]),
    ),
    "two headers": (
        "multiple_credentials",
        lambda issuer: Asked([bearer(issuer.token(READ)), bearer(issuer.token(READ))]),
    ),
    "a token in the URL": (
        "token_malformed",
        lambda issuer: Asked(path=f"/widgets?access_token={issuer.token(READ)}"),
    ),
    "a token in the URL and one not": (
        "multiple_credentials",
        lambda issuer: Asked(
            [bearer(issuer.token(READ))], path=f"/widgets?access_token={issuer.token(READ)}"
        ),
    ),
    "a scheme of others": (
        "missing_credentials",
        lambda _: Asked([("Authorization", 'Digest username="a", realm="b"')]),
    ),
    "nonsense": ("token_malformed", lambda _: Asked([bearer("nonsense")])),
    "expired token": (
        "token_expired",
        lambda issuer: Asked([bearer(issuer.token(READ, expired=True))]),
    ),
    "revoked token": ("token_revoked", revoked_token),
    "another audience": (
        "wrong_audience",
        lambda issuer: Asked([bearer(issuer.token(READ, audience="https://other.example"))]),
    ),
    "another environment": (
        "wrong_environment",
        lambda issuer: Asked([bearer(issuer.token(READ, environment="test"))]),
    ),
    "a scope too few": (
        "insufficient_scope",
        lambda issuer: Asked([bearer(issuer.token("widgets:write"))]),
    ),
    "a key with a scope too few": (
        "insufficient_scope",
        lambda issuer: Asked([bearer(issuer.api_key("widgets:write"))]),
    ),
    "from elsewhere": (
        "ip_not_allowed",
        lambda issuer: Asked(
            [bearer(issuer.token(READ, cidrs=["203.0.113.0/24"])), from_address(FAR)]
        ),
    ),
    "from who knows where": (
        "ip_not_allowed",
        lambda issuer: Asked([bearer(issuer.token(READ, cidrs=["203.0.113.0/24"]))]),
    ),
    "a role without POST": (
        "role_not_allowed",
        lambda issuer: Asked(
            [bearer(issuer.token(READ, roles=["viewer"]))], path="/whoami", method="POST"
        ),
    ),
    "another project": (
        "wrong_project",
        lambda issuer: Asked(
            [bearer(issuer.token(READ, project_id="prj_1")), ("X-Project-Id", "prj_2")]
        ),
    ),
    "two projects": (
        "project_required",
        lambda issuer: Asked(
            [bearer(issuer.token(READ)), ("X-Project-Id", "prj_1"), ("X-Project-Id", "prj_2")]
        ),
    ),
    "revoked key": ("api_key_revoked", ended_key("api_key_revoked")),
    "expired key": ("api_key_expired", ended_key("api_key_expired")),
    "used up key": ("quota_exceeded", ended_key("quota_exceeded")),
    "unknown key": (
        "api_key_unknown",
        lambda issuer: Asked([bearer(FakeIssuer().api_key(READ))]),
    ),
    "connector key in a header": (
        "connector_only_in_query",
        lambda issuer: Asked([bearer(issuer.api_key(READ, connector=True))]),
    ),
    "ordinary key in the URL": (
        "connector_only_in_query",
        lambda issuer: Asked(path=f"/widgets?api_key={issuer.api_key(READ)}"),
    ),
}


def as_the_verifier_says(answer: Answer, error: VerifierError) -> None:
    """Status, challenge, every other header and body."""
    expected = {name.lower(): value for name, value in error.headers.items()}

    assert answer.status == error.status
    assert {name: answer.headers.get(name) for name in expected} == expected
    assert ("www-authenticate" in answer.headers) == ("www-authenticate" in expected)
    assert ("retry-after" in answer.headers) == ("retry-after" in expected)


@pytest.mark.parametrize(("method", "case"), LET_IN.values(), ids=LET_IN)
def test_a_good_credential_gets_through_wherever_it_stands(
    behind: Behind, issuer: FakeIssuer, method: str, case: Case
) -> None:
    """And the application knows whose it is, and of which kind."""
    asked = case(issuer)

    assert behind(asked).status == 200
    whoami = asked._replace(path=asked.path.replace("/widgets", "/whoami"), method="GET")
    told = behind(whoami).document
    assert told["method"] == method
    assert told["key_id"].startswith("key_")


@pytest.mark.parametrize(("code", "case"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_the_verifiers_own_word_for_word(
    behind: Behind, issuer: FakeIssuer, code: str, case: Case
) -> None:
    """RFC 6750 §3, RFC 9457: whichever framework, a client can act on it."""
    asked = case(issuer)
    answer = behind(asked)
    error = behind.judged(asked, READ)

    assert error.code == code
    as_the_verifier_says(answer, error)
    assert answer.body == (b"" if asked.method == "HEAD" else error.body)


def test_a_challenge_reads_as_it_always_did(behind: Behind, issuer: FakeIssuer) -> None:
    """Written out once, so that a change of the verifier's own words is seen, too."""
    bare = f'Bearer realm="{issuer.audience}", resource_metadata="{issuer.audience}{METADATA}"'
    lacking = "The credential lacks a scope that this request needs."
    nothing = behind(Asked())
    narrow = behind(Asked([bearer(issuer.token("widgets:write"))]))

    assert nothing.headers["www-authenticate"] == bare
    assert nothing.headers["content-type"] == "application/problem+json"
    assert nothing.headers["cache-control"] == "no-store"
    assert narrow.headers["www-authenticate"] == (
        f'{bare}, error="insufficient_scope", error_description="{lacking}", scope="{READ}"'
    )


def test_our_own_outage_is_503(behind: Behind, issuer: FakeIssuer) -> None:
    """Never 401: a client would throw its good credential away."""
    asked = Asked([bearer(issuer.api_key(READ))])
    with issuer.away():
        answer = behind(asked)

    assert (answer.status, answer.document["code"]) == (503, "issuer_unavailable")
    assert "www-authenticate" not in answer.headers
    assert int(answer.headers["retry-after"]) >= 1


def test_a_stale_feed_is_503_where_that_is_the_policy(behind: Behind, issuer: FakeIssuer) -> None:
    """Who knows nothing of the last 40 seconds vouches for nobody."""
    issuer.stale_feed()
    answer = behind(Asked([bearer(issuer.token(READ))]))

    assert (answer.status, answer.document["code"]) == (503, "stale_feed")


def test_an_outage_is_not_felt_by_who_has_a_token(behind: Behind, issuer: FakeIssuer) -> None:
    """The key set and the feed are at hand."""
    asked = Asked([bearer(issuer.token(READ))])
    assert behind(asked).status == 200
    with issuer.away():
        assert behind(asked).status == 200


def test_what_the_application_refuses_is_answered_alike(behind: Behind, issuer: FakeIssuer) -> None:
    """`principal.require(…)` is the way for filters that depend on the path."""
    asked = Asked([bearer(issuer.token("read@PLACE/1"))], path="/places/1")
    assert behind(asked).status == 200
    refused = behind(asked._replace(path="/places/2"))

    assert (refused.status, refused.document["code"]) == (403, "insufficient_scope")
    assert 'scope="read@PLACE/2"' in refused.headers["www-authenticate"]
    assert f'realm="{issuer.audience}"' in refused.headers["www-authenticate"]


def test_a_project_is_read_from_its_header(behind: Behind, issuer: FakeIssuer) -> None:
    """And missed where the application needs one."""
    asked = Asked([bearer(issuer.token(READ)), ("X-Project-Id", "prj_1")], path="/project")
    assert behind(asked).document == {"project": "prj_1"}
    missing = behind(asked._replace(headers=asked.headers[:1]))

    assert (missing.status, missing.document["code"]) == (400, "project_required")


def test_a_forwarded_address_counts_from_a_trusted_proxy_only(issuer: FakeIssuer) -> None:
    """Else everybody could choose theirs."""
    for adapter in ADAPTERS:
        harness = harness_of(adapter)
        with (
            Verifier(issuer.issuer, issuer.audience, trusted_proxies=["192.0.2.1"]) as verifier,
            harness.asking(harness.application(verifier)) as ask,
        ):
            token = issuer.token(READ, cidrs=["203.0.113.0/24"])
            refused = ask("GET", "/widgets", [bearer(token), from_address(NEAR)])
            assert refused.document["code"] == "ip_not_allowed"
            of_peer = issuer.token(READ, cidrs=[PEER])
            assert ask("GET", "/widgets", [bearer(of_peer), from_address(NEAR)]).status == 200


def test_an_answer_to_a_url_with_a_key_is_kept_by_no_shared_cache(
    behind: Behind, issuer: FakeIssuer
) -> None:
    """RFC 9111 §5.2.2.7; and no page hands the URL on."""
    key = issuer.api_key(READ, connector=True)
    answer = behind(Asked(path=f"/widgets?a=1&api_key={key}"))
    ordinary = behind(Asked([bearer(issuer.token(READ))], path="/widgets?a=1"))

    assert answer.headers["cache-control"] == "private"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "private" not in ordinary.headers.get("cache-control", "")
    assert ordinary.headers.get("referrer-policy") != "no-referrer"


def test_a_refusal_of_a_url_with_a_key_is_stored_by_nobody(
    behind: Behind, issuer: FakeIssuer
) -> None:
    """It says nothing of the key, either."""
    key = issuer.api_key(READ)
    refused = behind(Asked(path=f"/widgets?api_key={key}"))

    assert refused.headers["cache-control"] == "no-store"
    assert refused.headers["referrer-policy"] == "no-referrer"
    assert key not in f"{refused.headers}{refused.body!r}"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_metadata_document_is_served_to_everybody(behind: Behind, method: str) -> None:
    """RFC 9728 §3: the challenge points there."""
    answer = behind(Asked(path=METADATA, method=method))

    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    if method == "GET":
        assert answer.document == behind.verifier.protected_resource_metadata()


def test_a_public_path_is_open(behind: Behind) -> None:
    """With or without a credential, and whatever it is worth."""
    assert behind(Asked(path="/health")).status == 200
    assert behind(Asked([bearer("nonsense")], path="/health")).status == 200


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name not in PER_ROUTE])
def test_before_a_whole_application_everything_else_is_closed(
    issuer: FakeIssuer, adapter: str
) -> None:
    """Fails closed: also a path that leads nowhere, or almost to a public one."""
    harness = harness_of(adapter)
    with (
        Verifier(issuer.issuer, issuer.audience) as verifier,
        harness.asking(harness.application(verifier)) as ask,
    ):
        for path in ("/health/", "/healthz", "/nowhere", "/Health", "/health/../whoami", "/"):
            refused = ask("GET", path)
            assert (refused.status, refused.document["code"]) == (401, MissingCredentials.code)
        assert ask("POST", METADATA).status == 401


def test_every_adapter_has_a_harness_and_every_per_route_one_is_an_adapter() -> None:
    """The line of registration is also what buys the tests."""
    for adapter in ADAPTERS:
        assert callable(harness_of(adapter).asking)
    assert set(PER_ROUTE) <= set(ADAPTERS)
