"""What a resource server's API key is good for, and what it never is.

RFC 8693 §2.1 and §2.2.2; contract: "Exchange for a resource server".
"""

from collections.abc import Iterator
from typing import Any, Final

import jwt
import pytest
from httpx2 import Response
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, RESOURCE_SERVER
from coatcheck.server.manage import organizations
from rights.cast import ADDRESS, MANAGEMENT, PRODUCT, Made, Stage, a_product, mentioned
from rights.lines import LINES, Things, question
from rights.test_never_wider import World, by_number, fitting, scopes_of
from support.deployment import ISSUER, NOON, TESTER

EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
STAGING: Final = "https://staging.example.com"
MCP: Final = "https://mcp.example.com/mcp"
#: Claims that each token has of its own.
OF_ITS_OWN: Final = ("jti", "iat", "exp", "as_of")
CAREFULLY: Final = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with a_product(tmp_path_factory.mktemp("resource-servers")) as made:
        yield made


@pytest.fixture(scope="module")
def gateway(stage: Stage) -> Made:
    """The live product's resource server; by its audiences it could be the management API's."""
    return stage.api_key(
        stage.deployment.organization_id, RESOURCE_SERVER, audiences=(PRODUCT, MANAGEMENT)
    )


@pytest.fixture(scope="module")
def customer(stage: Stage) -> str:
    return stage.organization("A customer")


def exchange(stage: Stage, resource_server: str, subject: str, **form: str) -> Response:
    """What a resource server asks when its caller has sent it an API key."""
    answer: Response = stage.http.post(
        "/oauth/token",
        headers={"Authorization": f"Bearer {resource_server}"},
        data={
            "grant_type": EXCHANGE,
            "subject_token": subject,
            "subject_token_type": f"{ISSUER}/token-types/api-key",
            "client_address": ADDRESS,
            "resource": PRODUCT,
        }
        | form,
    )
    return answer


def claims_of(token: str) -> dict[str, Any]:
    """What a token says, but for what each has of its own."""
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return {name: value for name, value in claims.items() if name not in OF_ITS_OWN}


def refusal(answer: Response) -> tuple[int, str]:
    return answer.status_code, str(answer.json().get("error"))


# --- 1. whose token, and for whom


@pytest.mark.parametrize("resource", [MCP, MANAGEMENT, STAGING, "https://elsewhere.example.com"])
def test_it_exchanges_for_its_own_audiences_only(
    stage: Stage, gateway: Made, customer: str, resource: str
) -> None:
    """Never for the management API, even if that is one of its audiences."""
    subject = stage.api_key(
        customer, "read", *ORGANIZATION_PERMISSIONS, audiences=(PRODUCT, MCP, MANAGEMENT)
    )

    answer = exchange(stage, gateway.secret, subject.secret, resource=resource)

    assert refusal(answer) == (400, "invalid_target")
    assert "access_token" not in answer.json()


def test_a_resource_server_for_the_management_api_alone_exchanges_nothing(
    stage: Stage, customer: str
) -> None:
    own = stage.api_key(stage.deployment.organization_id, RESOURCE_SERVER)
    subject = stage.api_key(customer, "read", "keys:read", audiences=(PRODUCT, MANAGEMENT))

    for resource in (PRODUCT, MANAGEMENT):
        answer = exchange(stage, own.secret, subject.secret, resource=resource)
        assert refusal(answer) == (400, "invalid_target")


def test_it_exchanges_within_its_own_environment(
    stage: Stage, gateway: Made, customer: str
) -> None:
    operators = stage.deployment.organization_id
    of_test = stage.api_key(operators, RESOURCE_SERVER, audiences=(STAGING,), environment="test")
    live = stage.api_key(customer, "read", audiences=(PRODUCT,))
    test = stage.api_key(customer, "read", audiences=(STAGING,), environment="test")

    for server, subject in ((gateway, test), (of_test, live)):
        for resource in (PRODUCT, STAGING):
            answer = exchange(stage, server.secret, subject.secret, resource=resource)
            assert answer.status_code == 400
            assert "access_token" not in answer.json()
    assert exchange(stage, gateway.secret, live.secret).status_code == 200
    assert exchange(stage, of_test.secret, test.secret, resource=STAGING).status_code == 200


def test_what_is_no_callers_is_no_subject(stage: Stage, gateway: Made, customer: str) -> None:
    """Its own key, another of the platform's, one for management only, one that is no key."""
    operators = stage.deployment.organization_id
    live = stage.api_key(customer, "read", audiences=(PRODUCT,))
    subjects = {
        "its own": gateway.secret,
        "another resource server's": stage.api_key(
            operators, RESOURCE_SERVER, "read", audiences=(PRODUCT,)
        ).secret,
        "an operator's": stage.api_key(
            operators, OPERATOR, "read", audiences=(PRODUCT, MANAGEMENT)
        ).secret,
        "an operator's on one thing": stage.api_key(
            operators, f"{OPERATOR}@PLACE/Site/1", "read", audiences=(PRODUCT, MANAGEMENT)
        ).secret,
        "for management only": stage.api_key(customer, *ORGANIZATION_PERMISSIONS).secret,
        "a member's own": stage.members_key(stage.member(customer, "admin")).secret,
        "a connector's in a header": stage.api_key(
            customer, "read", audiences=(PRODUCT,), kind="connector"
        ).secret,
        "a token": stage.token(live.secret, PRODUCT),
        "an id": live.id,
    }

    for resource in (PRODUCT, MANAGEMENT):
        for whose, subject in subjects.items():
            answer = exchange(stage, gateway.secret, subject, resource=resource)
            assert answer.status_code == 400, whose
            assert "access_token" not in answer.json(), whose


@pytest.mark.parametrize(
    "scopes",
    [
        ("*",),
        ORGANIZATION_PERMISSIONS,
        (OPERATOR,),
        (f"{RESOURCE_SERVER}@PLACE/Site/1",),
    ],
    ids=repr,
)
def test_nobody_else_exchanges(stage: Stage, customer: str, scopes: tuple[str, ...]) -> None:
    """Not a star, not the operator, and not a part of the permission."""
    organization = stage.deployment.organization_id
    caller = stage.api_key(organization, *scopes, "read", audiences=(PRODUCT, MANAGEMENT))
    subject = stage.api_key(customer, "read", audiences=(PRODUCT,))

    answer = exchange(stage, caller.secret, subject.secret)

    assert answer.status_code in (400, 401)
    assert answer.json()["error"] == "unauthorized_client"
    assert "access_token" not in answer.json()


def test_a_token_of_a_resource_server_exchanges_nothing(
    stage: Stage, gateway: Made, customer: str
) -> None:
    """JWTs never authenticate at the token endpoint."""
    subject = stage.api_key(customer, "read", audiences=(PRODUCT,))

    answer = exchange(stage, stage.token(gateway.secret), subject.secret)

    assert answer.status_code == 401
    assert "access_token" not in answer.json()


# --- 2. the same token


@CAREFULLY
@given(number=st.integers(0, 2**32))
def test_it_gets_what_its_caller_would_have_got(
    stage: Stage, gateway: Made, customer: str, number: int
) -> None:
    """Claim for claim, or no token for either; whatever restricts the API key."""
    world = World(
        stage,
        by_number(number),
        customer,
        [stage.project(customer)],
        [],
        [stage.group(models=("small",)), stage.group()],
        [],
    )
    audiences = world.some([PRODUCT, MCP, MANAGEMENT], 1)
    wanted = [*world.some(scopes_of(world.catalog), 1), "keys:read"]
    scopes, there = fitting(wanted, audiences, world.catalog)
    subject = stage.api_key(customer, *scopes, audiences=there, **world.columns("live"))
    form = {"resource": PRODUCT}
    if world.one([True, False]):
        form["scope"] = world.one([*scopes, "read", "create", "billing:manage", RESOURCE_SERVER])

    own = stage.http.post(
        "/oauth/token",
        data={"grant_type": "client_credentials", "client_secret": subject.secret, **form},
    )
    exchanged = exchange(stage, gateway.secret, subject.secret, **form)

    assert (own.status_code == 200) == (exchanged.status_code == 200), exchanged.text
    if own.status_code == 200:
        mine, theirs = own.json(), exchanged.json()
        assert claims_of(mine["access_token"]) == claims_of(theirs["access_token"])
        assert (mine["scope"], mine["expires_in"]) == (theirs["scope"], theirs["expires_in"])


@pytest.mark.parametrize(
    "address", ["198.51.100.7", "unknown", "::ffff:198.51.100.7", "2001:db8::1"]
)
def test_the_callers_address_counts_and_not_the_resource_servers(
    stage: Stage, gateway: Made, customer: str, address: str
) -> None:
    subject = stage.api_key(customer, "read", audiences=(PRODUCT,), networks=(f"{ADDRESS}/32",))

    answer = exchange(stage, gateway.secret, subject.secret, client_address=address)
    own = exchange(stage, gateway.secret, subject.secret, client_address=f"::ffff:{ADDRESS}")

    assert (answer.status_code, answer.json()["code"]) == (400, "ip_not_allowed")
    assert own.status_code == 200


# --- 3. usage, groups, and nothing of organizations


@pytest.fixture(scope="module")
def metering(stage: Stage) -> Made:
    """One that reports usage: the management API is among its audiences."""
    return stage.api_key(
        stage.deployment.organization_id, RESOURCE_SERVER, audiences=(PRODUCT, MANAGEMENT)
    )


def report_of(key: str) -> dict[str, object]:
    return {"reports": [{"id": f"of-{key}", "key": key, "requests": 1, "credits": 1}]}


def test_usage_is_a_resource_servers_to_report(stage: Stage, metering: Made, customer: str) -> None:
    """Else somebody would spend another one's credit.

    `usage:write` reports of its own organization; the API keys of others do not exist for it.
    """
    victim = stage.api_key(customer, "read", audiences=(PRODUCT,), credit_limit=5_000_000)
    operators = stage.deployment.organization_id
    strangers = [
        stage.api_key(operators, *ORGANIZATION_PERMISSIONS),
        stage.api_key(operators, "*"),
        stage.api_key(operators, "usage:write"),
    ]
    others = [
        stage.api_key(operators, OPERATOR),
        stage.api_key(customer, "usage:read", "org:admin"),
        stage.api_key(operators, f"{RESOURCE_SERVER}@PLACE/Site/1"),
    ]

    for stranger in strangers:
        answer = stage.ask(stranger.secret, "POST", "/usage", report_of(victim.id))
        assert answer.json() == {"counted": 0, "known": 0, "unknown": [victim.id]}
    for other in others:
        answer = stage.ask(other.secret, "POST", "/usage", report_of(victim.id))
        assert answer.status_code == 403
    query = "SELECT * FROM api_key_usage WHERE api_key_id = ?"
    assert stage.rows(query, victim.id) == []

    told = stage.ask(metering.secret, "POST", "/usage", report_of(victim.id))
    assert told.json() == {"counted": 1, "known": 0, "unknown": []}
    assert stage.rows(query, victim.id)[0]["credits"] == 1_000_000


def test_a_report_tells_nothing_of_whose_key_it_is(
    stage: Stage, metering: Made, customer: str
) -> None:
    victim = stage.api_key(customer, "read", name="Zebra", audiences=(PRODUCT,))

    answer = stage.ask(metering.secret, "POST", "/usage", report_of(victim.id))

    assert not mentioned(answer, (customer, "Zebra", victim.id, "A customer"))


@pytest.mark.parametrize(
    "name",
    [name for name, line in LINES.items() if line.needs and RESOURCE_SERVER not in line.needs],
)
def test_it_sees_and_does_nothing_else(stage: Stage, metering: Made, name: str) -> None:
    """Of its own organization as little as of another one."""
    customer = stage.organization("Zebra's")
    key = stage.api_key(customer, "keys:write", name="Zebra").id
    project, member = stage.project(customer), stage.member(customer, "viewer")
    group = stage.group()
    before = stage.of_organization(customer)

    for organization in (customer, stage.deployment.organization_id):
        things = Things(organization, key, project, member, group)
        asked = question(name, things)
        answer = stage.ask(metering.secret, asked.method, asked.path, asked.body, asked.query)

        # Another organization does not exist; in its own it has no permission.
        assert answer.status_code in (403, 404)
        assert not mentioned(answer, (customer, "Zebra", "Acme"))
    assert stage.of_organization(customer) == before


def test_it_reads_the_groups_that_it_applies(stage: Stage, metering: Made) -> None:
    group = stage.group("gold")

    listed = stage.ask(metering.secret, "GET", "/groups", query={"limit": "100"})
    shown = stage.ask(metering.secret, "GET", f"/groups/{group}")

    assert listed.status_code == 200
    assert shown.json()["name"] == "gold"


def test_a_suspended_organizations_keys_are_no_subjects(stage: Stage, gateway: Made) -> None:
    """And the resource server is not what failed."""
    organization = stage.organization("Suspended")
    subject = stage.api_key(organization, "read", audiences=(PRODUCT,))
    organizations.suspend(stage.deployment.store, organization, TESTER, now=NOON)

    answer = exchange(stage, gateway.secret, subject.secret)

    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert answer.json()["code"] == "org_suspended"
