"""What every restriction promises: what comes out lies within what went in.

The tables here run over RESTRICTIONS; a new one gets these tests by its line there.
"""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import apikey
from coatcheck.client_address import parse_networks
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.restrictions import (
    KNOWN,
    RESTRICTIONS,
    Allowance,
    Ask,
    Reason,
    Refusal,
    Restriction,
    Role,
    Situation,
)
from coatcheck.scope import Grant, Scopes
from coatcheck.server.issue import decide
from coatcheck.server.store import ApiKeyRecord, Found
from coatcheck.verifier import VerifierError, check, keyset
from coatcheck.vocabulary import ANYTHING, Vocabulary
from support import tokens
from support.tokens import ABSENT, ISSUER, key_set, signer

NOW = 1_800_000_000
AUDIENCES = ("https://a.example", "https://b.example", "urn:c")
ENVIRONMENTS = ("live", "test")

ACTIONS = st.sampled_from(["*", "read", "write", "coatcheck:operator"])
FILTERS = st.none() | st.builds(
    lambda head, rest: (head, *rest),
    st.sampled_from(["PLACE", "THING"]),
    st.lists(st.sampled_from(["1", "2", "#", "*"]), max_size=2),
)
GRANTS = st.builds(Grant, ACTIONS, FILTERS)
SCOPES = st.lists(GRANTS, max_size=4, unique=True).map(lambda grants: Scopes(tuple(grants)))
MOMENTS = st.integers(NOW - 1000, NOW + 2 * TOKEN_LIFETIME)
ANY_AUDIENCES = st.lists(st.sampled_from(AUDIENCES), min_size=1, max_size=3, unique=True).map(tuple)

#: Where somebody is, and the networks that an API key may be used from.
PLACES = ("10.0.0.1", "10.1.2.3", "192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1")
RANGES = ("10.0.0.0/8", "10.1.0.0/16", "192.0.2.7/32", "0.0.0.0/0", "2001:db8::/32")
NETWORKS = st.lists(st.sampled_from(RANGES), min_size=1, max_size=3, unique=True).map(
    lambda texts: parse_networks(tuple(texts))
)
PROJECTS = st.sampled_from(["prj_1", "prj_2"])
ROLES = {
    "viewer": frozenset(("GET",)),
    "member": frozenset(("GET", "POST", "PATCH")),
    "nobody": frozenset[str](),
}
ANY_MODELS = st.lists(st.sampled_from(["small", "large", "huge"]), max_size=3, unique=True).map(
    tuple
)
GROUPS = st.sampled_from(["grp_1", "grp_2"])

ALLOWANCES = st.builds(
    Allowance,
    api_key_id=st.just("key_1"),
    organization_id=st.just("org_1"),
    environment=st.sampled_from(ENVIRONMENTS),
    audiences=ANY_AUDIENCES,
    scopes=SCOPES,
    expires_at=st.none() | MOMENTS,
    networks=st.none() | NETWORKS,
    project_id=st.none() | PROJECTS,
    role=st.none() | st.sampled_from([Role(name, methods) for name, methods in ROLES.items()]),
    models=st.none() | ANY_MODELS,
    group_id=st.none() | GROUPS,
)
#: One in which scopes have names, and one action implies another.
PRODUCT = Vocabulary(
    permissions=("read", "write"),
    named={"everything": Scopes.parse("read write")},
    implies={"write": ("read",)},
)
ASKS = st.builds(
    Ask,
    audience=st.sampled_from((*AUDIENCES, "https://nobody.example")),
    audience_environment=st.none() | st.sampled_from(ENVIRONMENTS),
    scopes=st.none() | SCOPES | st.just(Scopes.parse("everything")),
    vocabulary=st.sampled_from([ANYTHING, PRODUCT]),
    client_address=st.none() | st.sampled_from(PLACES),
)
RECORDS = st.builds(
    ApiKeyRecord,
    digest=st.just(bytes(32)),
    secret_expires_at=st.none() | MOMENTS,
    id=st.just("key_1"),
    organization_id=st.just("org_1"),
    environment=st.sampled_from(ENVIRONMENTS),
    scopes=SCOPES,
    audiences=ANY_AUDIENCES,
    expires_at=st.none() | MOMENTS,
    disabled_at=st.just(None),
    revoked_at=st.just(None),
    organization_suspended_at=st.just(None),
    project_id=st.none() | PROJECTS,
    networks=st.none() | NETWORKS,
    role=st.none() | st.sampled_from(sorted(ROLES)),
    models=st.none() | ANY_MODELS,
    group_id=st.none() | GROUPS,
    group_models=st.none() | ANY_MODELS,
)


def decided(record: ApiKeyRecord, ask: Ask) -> Allowance:
    """What the API key gets, with the role that the catalog has for it."""
    role = None if record.role is None else Role(record.role, ROLES[record.role])
    return decide.decide(record, ask, role)


each_restriction = pytest.mark.parametrize(
    "restriction", RESTRICTIONS, ids=[restriction.name for restriction in RESTRICTIONS]
)


@each_restriction
@settings(max_examples=50)
@given(allowance=ALLOWANCES, ask=ASKS)
def test_what_comes_out_lies_within_what_went_in(
    restriction: Restriction, allowance: Allowance, ask: Ask
) -> None:
    """A restriction narrows, leaves alone or refuses; it never gives."""
    try:
        narrowed = restriction.narrow(allowance, ask)
    except Refusal:
        return

    assert narrowed.lies_within(allowance)


@each_restriction
@settings(max_examples=30)
@given(allowance=ALLOWANCES, ask=ASKS)
def test_narrowing_twice_is_narrowing_once(
    restriction: Restriction, allowance: Allowance, ask: Ask
) -> None:
    """The same ask changes nothing more: the result has settled."""
    try:
        narrowed = restriction.narrow(allowance, ask)
    except Refusal:
        return

    assert restriction.narrow(narrowed, ask) == narrowed


@each_restriction
@settings(max_examples=25)
@given(allowance=ALLOWANCES, audience=st.sampled_from(AUDIENCES))
def test_its_claims_survive_json(
    restriction: Restriction, allowance: Allowance, audience: str
) -> None:
    """They travel as JSON: no tuple, no set, no integer that comes back as something else."""
    carried = dict(restriction.to_claim(replace(allowance, audiences=(audience,))))

    assert json.loads(json.dumps(carried)) == carried


#: On which axis each of them restricts: a resource server has to know its name exactly then.
BINDS: dict[str, Callable[[Allowance], bool]] = {
    "network": lambda allowance: allowance.networks is not None,
    "environment": lambda allowance: False,
    "audience": lambda allowance: False,
    "scope": lambda allowance: False,
    "resource": lambda allowance: "@" in str(allowance.scopes),
    "project": lambda allowance: allowance.project_id is not None,
    "role": lambda allowance: allowance.role is not None,
    "models": lambda allowance: allowance.models is not None,
    "group": lambda allowance: allowance.group_id is not None,
}


@each_restriction
@settings(max_examples=25)
@given(allowance=ALLOWANCES)
def test_it_binds_exactly_where_it_restricts(
    restriction: Restriction, allowance: Allowance
) -> None:
    """
    Its name in `must` makes a verifier that does not know it refuse.

    Without the name such a verifier would let the token do too much; a name too many would shut
    out verifiers that could have served it.
    """
    assert restriction.is_binding(allowance) is BINDS[restriction.name](allowance)


def claims_of(allowance: Allowance) -> dict[str, object]:
    """The claims of a token that was issued at NOW, as every verifier reads them."""
    carried: dict[str, object] = {}
    for restriction in RESTRICTIONS:
        carried |= restriction.to_claim(allowance)
    must = [one.name for one in RESTRICTIONS if one.is_binding(allowance)]
    return tokens.claims(iat=NOW, exp=NOW + TOKEN_LIFETIME, must=must or ABSENT, **carried)


FIND = keyset.parse(key_set()).get


def refused_with(claims: dict[str, object], situation: Situation) -> str | None:
    """The code with which the whole check refuses a token of these claims; None: it does not."""
    expected = check.Expected(
        issuer=ISSUER,
        audiences=AUDIENCES,
        types=frozenset(("at+jwt",)),
        algorithms=frozenset(("ES256",)),
        leeway_s=0,
    )
    try:
        signed = check.check_signed(signer().token(claims), expected, FIND)
        check.check_use(signed, expected, NOW, situation)
    except VerifierError as error:
        return error.code
    return None


def fitting(allowance: Allowance, client_address: str | None) -> Situation:
    """A request as it was meant, from where the API key was exchanged."""
    return Situation(
        environment=allowance.environment,
        client_address=client_address,
        method="GET",
        project_id=allowance.project_id,
        model=None if allowance.models is None else next(iter(allowance.models), None),
        roles=ROLES,
    )


@settings(max_examples=150)
@given(RECORDS, ASKS, st.booleans())
def test_a_token_passes_the_checks_of_the_restrictions_that_made_it(
    record: ApiKeyRecord, ask: Ask, names_project: bool
) -> None:
    """Issuer and verifier agree: to_claim and check are two sides of one rule."""
    try:
        allowance = decided(record, ask)
    except Refusal:
        return
    situation = fitting(allowance, ask.client_address)
    if not names_project:
        situation = situation._replace(project_id=None)

    allows_nothing = allowance.role is not None and not allowance.role.methods
    expected = "role_not_allowed" if allows_nothing else None
    assert refused_with(claims_of(allowance), situation) == expected


#: Which of the networks each of the places lies in, worked out by hand.
INSIDE: dict[str | None, set[str]] = {
    None: set(),
    "10.0.0.1": {"10.0.0.0/8", "0.0.0.0/0"},
    "10.1.2.3": {"10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0"},
    "192.0.2.7": {"192.0.2.7/32", "0.0.0.0/0"},
    "::ffff:192.0.2.7": {"192.0.2.7/32", "0.0.0.0/0"},
    "2001:db8::1": {"2001:db8::/32"},
}


def _ranges(record: ApiKeyRecord) -> set[str]:
    return {str(network) for network in record.networks or ()}


@settings(max_examples=250)
@given(
    RECORDS,
    ASKS,
    st.builds(
        Situation,
        environment=st.none() | st.sampled_from(ENVIRONMENTS),
        client_address=st.none() | st.sampled_from(PLACES),
        method=st.none() | st.sampled_from(["GET", "HEAD", "POST", "DELETE"]),
        project_id=st.none() | PROJECTS,
        model=st.none() | st.sampled_from(["small", "large", "gigantic"]),
        roles=st.sampled_from([ROLES, {}]),
    ),
)
def test_a_token_allows_no_request_that_its_api_key_does_not(
    record: ApiKeyRecord, ask: Ask, situation: Situation
) -> None:
    """
    The rules once more, from the record: whatever was asked for, no request gets past them.

    And one that breaks none of them passes.
    """
    try:
        allowance = decided(record, ask)
    except Refusal:
        return
    address, method = situation.client_address, situation.method
    broken = set()
    if situation.environment not in (None, record.environment):
        broken.add("wrong_environment")
    if record.networks is not None and not INSIDE[address] & _ranges(record):
        broken.add("ip_not_allowed")
    if record.project_id is not None and situation.project_id not in (None, record.project_id):
        broken.add("wrong_project")
    allowed = situation.roles.get(record.role or "", frozenset())
    if record.role is not None and ("GET" if method == "HEAD" else method) not in allowed:
        broken.add("role_not_allowed")
    for models in (record.models, record.group_models):
        if models is not None and situation.model is not None and situation.model not in models:
            broken.add("model_not_allowed")

    code = refused_with(claims_of(allowance), situation)
    assert (code in broken) if broken else (code is None)


#: Narrowed on every axis.
RESTRICTED = Allowance(
    api_key_id="key_1",
    organization_id="org_1",
    environment="live",
    audiences=("urn:c",),
    scopes=Scopes.parse("read@X/#"),
    expires_at=NOW,
    networks=parse_networks(("10.0.0.0/8", "2001:db8::/32")),
    project_id="prj_1",
    role=Role("viewer", ROLES["viewer"]),
    models=("small", "large"),
    group_id="grp_1",
)
HERE = fitting(RESTRICTED, "10.1.2.3")
ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "another environment": ({"environment": "test"}, "wrong_environment"),
    "another network": ({"client_address": "192.0.2.7"}, "ip_not_allowed"),
    "no address": ({"client_address": None}, "ip_not_allowed"),
    "no address but a name": ({"client_address": "localhost"}, "ip_not_allowed"),
    "another project": ({"project_id": "prj_2"}, "wrong_project"),
    "another method": ({"method": "POST"}, "role_not_allowed"),
    "a method in lower case": ({"method": "get"}, "role_not_allowed"),
    "no method": ({"method": None}, "role_not_allowed"),
    "a role that nobody knows": ({"roles": {"member": {"GET"}}}, "role_not_allowed"),
    "another model": ({"model": "huge"}, "model_not_allowed"),
    "part of a model": ({"model": "smal"}, "model_not_allowed"),
}


@pytest.mark.parametrize(("changes", "code"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_token_is_refused_in_any_other_situation(changes: dict[str, Any], code: str) -> None:
    """Each restriction by its own code; what is not known does not fit."""
    claims = claims_of(RESTRICTED)

    assert refused_with(claims, HERE) is None
    assert refused_with(claims, HERE._replace(method="HEAD", model=None)) is None
    assert refused_with(claims, HERE._replace(**changes)) == code


#: The claim of each restriction that has one beside the registered claims, and what it is not.
MALFORMED: dict[str, tuple[str, list[object]]] = {
    "network": (
        "cidrs",
        [
            ABSENT,
            None,
            7,
            True,
            {},
            [],
            "",
            "10.0.0.0/8",
            ["10.0.0.1/8"],
            ["x"],
            [None],
            [[]],
            [{}],
            [167772160],
            [["10.0.0.0", 8]],
            ["10.0.0.0/8", {}],
        ],
    ),
    "project": ("project_id", [ABSENT, None, 7, "", ["prj_1"], {}]),
    "role": (
        "roles",
        [
            ABSENT,
            None,
            7,
            True,
            {},
            [],
            "",
            "viewer",
            {"viewer": 1},
            [None],
            [7],
            [["viewer"]],
            [{}],
            ["viewer", "unknown"],
            ["viewer", {}],
        ],
    ),
    "models": ("models", [ABSENT, None, 7, {}, {"small": 1}, "", "small"]),
    "group": ("group", [ABSENT, None, 7, True, {}, [], ["grp_1"]]),
}
UNFIT = [(name, claim, value) for name, (claim, values) in MALFORMED.items() for value in values]


@pytest.mark.parametrize(("name", "claim", "value"), UNFIT)
def test_a_claim_that_is_missing_or_malformed_behind_its_name_is_refused(
    name: str, claim: str, value: object
) -> None:
    """Unknown means no, and nothing but a refusal comes out: not even what fits by half."""
    claims = tokens.changed(claims_of(RESTRICTED), {"must": [name], claim: value})

    assert refused_with(claims, HERE) is not None


@each_restriction
def test_a_verifier_that_does_not_know_its_name_refuses(restriction: Restriction) -> None:
    """A token says in `must` what has to be enforced; a later release has other names."""
    known = tokens.claims(aud="urn:c", iat=NOW, exp=NOW + 1, must=["environment"])
    later = known | {"must": ["environment", f"{restriction.name}_2"]}

    assert refused_with(known, Situation()) is None
    assert refused_with(later, Situation()) == "unknown_restriction"


def test_what_no_must_names_is_not_enforced_and_costs_nothing() -> None:
    """
    A claim of the same name may mean something else to another issuer.

    Ours names it in `must` whenever it restricts.  The environment is every token's.
    """
    claims = claims_of(RESTRICTED) | {"must": []}

    assert refused_with(claims, Situation(environment="live")) is None
    assert refused_with(claims, Situation(environment="test")) == "wrong_environment"


def test_no_two_restrictions_share_a_name_or_a_claim() -> None:
    """A `must` names one rule; a claim that two wrote would carry only the later one."""
    claims = [name for restriction in RESTRICTIONS for name in restriction.to_claim(RESTRICTED)]

    assert len(KNOWN) == len(RESTRICTIONS)
    assert len(claims) == len(set(claims))


# --- all of them in a row


@settings(max_examples=200)
@given(RECORDS, ASKS)
def test_a_token_is_never_wider_than_its_api_key(record: ApiKeyRecord, ask: Ask) -> None:
    """Every axis at once: scopes, audience, environment, life, networks, project and so on."""
    try:
        allowance = decided(record, ask)
    except Refusal:
        return

    ends = [end for end in (record.expires_at, record.secret_expires_at) if end is not None]
    assert allowance.api_key_id == record.id
    assert allowance.organization_id == record.organization_id
    assert allowance.environment == record.environment
    assert ask.audience_environment in (None, record.environment)
    assert allowance.audiences == (ask.audience,)
    assert ask.audience in record.audiences
    held = ask.vocabulary.expand(record.scopes)
    assert not held.missing(allowance.scopes)
    assert allowance.scopes == (held if ask.scopes is None else ask.vocabulary.expand(ask.scopes))
    assert allowance.expires_at == min(ends, default=None)
    assert allowance.networks == record.networks
    assert record.networks is None or INSIDE[ask.client_address] & _ranges(record)
    assert allowance.project_id == record.project_id
    assert (allowance.role and allowance.role.name) == record.role
    for models in (record.models, record.group_models):
        assert models is None or set(allowance.models or ()) <= set(models)
    assert (allowance.models is None) is (record.models is None and record.group_models is None)
    assert allowance.group_id == record.group_id


def _all_held(ask: Ask, held: Scopes) -> bool:
    """Whether each asked scope-token means something there, and all of it is held."""
    meant = [ask.vocabulary.expand(Scopes((grant,))) for grant in ask.scopes or ()]
    return all(bool(one) and not held.missing(one) for one in meant)


@settings(max_examples=150)
@given(RECORDS, ASKS)
def test_what_lies_within_the_api_key_is_given(record: ApiKeyRecord, ask: Ask) -> None:
    """Nothing is refused without a reason: exactly what was asked, or a rule that forbids it."""
    held = ask.vocabulary.expand(record.scopes)
    allowed = (
        ask.audience in record.audiences
        and ask.audience_environment in (None, record.environment)
        and (record.networks is None or bool(INSIDE[ask.client_address] & _ranges(record)))
        and (bool(held) if ask.scopes is None else _all_held(ask, held))
    )
    try:
        decided(record, ask)
    except Refusal:
        assert not allowed
    else:
        assert allowed


@settings(max_examples=120)
@given(RECORDS, ASKS, SCOPES, st.none() | MOMENTS)
def test_a_narrower_api_key_never_gets_more(
    record: ApiKeyRecord, ask: Ask, scopes: Scopes, expires_at: int | None
) -> None:
    """An edit that narrows narrows every token made from then on.  answers.md K11."""
    if record.scopes.missing(scopes):
        return
    ends = [end for end in (record.expires_at, expires_at) if end is not None]
    narrower = replace(record, scopes=scopes, expires_at=min(ends, default=None))
    try:
        after = decided(narrower, ask)
    except Refusal:
        return
    try:
        before = decided(record, ask)
    except Refusal:
        before = None

    assert before is not None
    assert after.lies_within(before)


# --- the comparison itself

NARROW = replace(RESTRICTED, audiences=("urn:a", "urn:b"))
WIDER: dict[str, dict[str, Any]] = {
    "another API key": {"api_key_id": "key_2"},
    "another organization": {"organization_id": "org_2"},
    "another environment": {"environment": "test"},
    "one more audience": {"audiences": ("urn:a", "urn:b", "urn:c")},
    "another audience": {"audiences": ("urn:c",)},
    "one more scope": {"scopes": Scopes.parse("read@X/# write")},
    "a wider scope": {"scopes": Scopes.parse("read")},
    "every action": {"scopes": Scopes.parse("*")},
    "a platform permission": {"scopes": Scopes.parse("coatcheck:operator")},
    "a second longer": {"expires_at": NOW + 1},
    "no end": {"expires_at": None},
    "one more network": {"networks": parse_networks(("10.0.0.0/8", "2001:db8::/32", "192.0.2.7"))},
    "a wider network": {"networks": parse_networks(("10.0.0.0/7",))},
    "the same bits of the other version": {"networks": parse_networks(("0a00::/8",))},
    "anywhere": {"networks": None},
    "another project": {"project_id": "prj_2"},
    "any project": {"project_id": None},
    "one more method": {"role": Role("viewer", frozenset(("GET", "POST")))},
    "every method": {"role": None},
    "one more model": {"models": ("small", "large", "huge")},
    "every model": {"models": None},
    "another group": {"group_id": "grp_2"},
    "no group": {"group_id": None},
}


@pytest.mark.parametrize("changes", WIDER.values(), ids=WIDER)
def test_a_broken_restriction_that_widens_is_noticed(changes: dict[str, Any]) -> None:
    """`decide` compares after every step by this; whatever is not within is never issued."""
    assert not replace(NARROW, **changes).lies_within(NARROW)


@settings(max_examples=100)
@given(ALLOWANCES, ALLOWANCES, ALLOWANCES)
def test_lying_within_is_reflexive_and_transitive(
    one: Allowance, two: Allowance, three: Allowance
) -> None:
    """So that a chain of steps that are each within is within as a whole."""
    assert one.lies_within(one)
    if one.lies_within(two) and two.lies_within(three):
        assert one.lies_within(three)


# --- who may ask at all

GOOD = ApiKeyRecord(
    digest=b"",
    secret_expires_at=None,
    id="key_1",
    organization_id="org_1",
    environment="live",
    scopes=Scopes.parse("read"),
    audiences=("urn:c",),
    expires_at=None,
    disabled_at=None,
    revoked_at=None,
    organization_suspended_at=None,
)
STATES = {
    "revoked_at": (1, "api_key_revoked"),
    "expires_at": (2, "api_key_expired"),
    "secret_expires_at": (3, "api_key_replaced"),
    "disabled_at": (4, "api_key_disabled"),
    "project_archived_at": (5, "project_archived"),
    "organization_suspended_at": (6, "org_suspended"),
}


def refusal_of(record: ApiKeyRecord, presented: str, client_id: str | None = None) -> str | None:
    """The reason why a secret is not recognized; None when it is."""
    try:
        decide.recognize(
            Found(0, {record.digest: record}), apikey.digest(presented), client_id, NOW
        )
    except Refusal as refusal:
        return refusal.reason.value
    return None


def with_secret(**changes: Any) -> tuple[ApiKeyRecord, str]:
    secret = "ck_live_whatever"
    return replace(GOOD, digest=apikey.digest(secret), **changes), secret


@settings(max_examples=100)
@given(st.sets(st.sampled_from(sorted(STATES))))
def test_of_several_obstacles_the_most_final_is_told(states: set[str]) -> None:
    """K10: in every combination; a final state before one that can be undone."""
    record, secret = with_secret(**dict.fromkeys(states, NOW))
    ranked = sorted(STATES[state] for state in states)

    assert refusal_of(record, secret) == (ranked[0][1] if ranked else None)


@pytest.mark.parametrize("state", ["expires_at", "secret_expires_at"])
@pytest.mark.parametrize(("moved", "good"), [(-1, False), (0, False), (1, True)])
def test_an_end_is_exact_to_the_second(state: str, moved: int, good: bool) -> None:
    """K6: good before it, not at it."""
    record, secret = with_secret(**{state: NOW + moved})

    assert (refusal_of(record, secret) is None) is good


@settings(max_examples=50)
@given(st.sets(st.sampled_from(sorted(STATES))), st.sampled_from(["key_2", "", "org_1"]))
def test_without_the_right_secret_and_id_every_state_looks_the_same(
    states: set[str], client_id: str
) -> None:
    """Whoever lacks them learns nothing: not that a key exists, nor how it ended."""
    record, secret = with_secret(**dict.fromkeys(states, NOW))

    assert refusal_of(record, secret + "x") == "api_key_unknown"
    assert refusal_of(record, secret, client_id) == "api_key_unknown"


# --- letter by letter


def test_each_restriction_has_its_name_and_its_claim_for_ever() -> None:
    """Tokens that are out there carry both; verifiers of other languages read the claims."""
    assert (
        claims_of(RESTRICTED).items()
        >= {
            "env": "live",
            "aud": "urn:c",
            "scope": "read@X/#",
            "cidrs": ["10.0.0.0/8", "2001:db8::/32"],
            "project_id": "prj_1",
            "roles": ["viewer"],
            "models": ["small", "large"],
            "group": "grp_1",
            "must": ["network", "resource", "project", "role", "models", "group"],
        }.items()
    )


REFUSED: dict[str, tuple[str, Ask, Refusal]] = {
    "another environment": (
        "environment",
        Ask("urn:a", "test", None),
        Refusal(Reason.WRONG_ENVIRONMENT, allowed=("urn:a", "urn:b")),
    ),
    "another audience": (
        "audience",
        Ask("urn:c", None, None),
        Refusal(Reason.INVALID_TARGET, allowed=("urn:a", "urn:b")),
    ),
    "another scope": (
        "scope",
        Ask("urn:a", None, Scopes.parse("write read@X/1 coatcheck:operator")),
        Refusal(Reason.INSUFFICIENT_SCOPE, scopes=Scopes.parse("write coatcheck:operator")),
    ),
    "another network": (
        "network",
        Ask("urn:a", None, None, client_address="192.0.2.7"),
        Refusal(Reason.IP_NOT_ALLOWED),
    ),
    "no address": ("network", Ask("urn:a", None, None), Refusal(Reason.IP_NOT_ALLOWED)),
}


@pytest.mark.parametrize(("name", "ask", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_was_missing_or_could_be_asked_for(
    name: str, ask: Ask, expected: Refusal
) -> None:
    """The caller learns what to change; the audit learns which rule it was."""
    (restriction,) = (one for one in RESTRICTIONS if one.name == name)

    with pytest.raises(Refusal) as refused:
        restriction.narrow(NARROW, ask)

    assert vars(refused.value) == vars(expected)
    assert str(refused.value) == expected.reason.value


def test_the_words_of_the_audit_stay_as_they_are() -> None:
    """Somebody searches for them, years later."""
    assert {reason.value for reason in Reason} >= {
        *("api_key_unknown", "api_key_revoked", "api_key_expired", "api_key_disabled"),
        *("api_key_replaced", "org_suspended", "invalid_scope", "insufficient_scope"),
        *("invalid_target", "several_targets", "wrong_environment", "not_a_caller"),
        *("not_in_query", "only_in_query", "quota_exceeded", "project_archived"),
        *("ip_not_allowed", "no_permission_there", "not_enforced_there"),
    }
    assert all(reason.value == reason.name.lower() for reason in Reason)


def test_a_refusal_keeps_its_date() -> None:
    """An API key that ended is told when."""
    assert Refusal(Reason.API_KEY_REVOKED, at=NOW).at == NOW
    assert Refusal(Reason.API_KEY_REVOKED).at is None
    assert Refusal(Reason.API_KEY_REVOKED).allowed == ()


@pytest.mark.parametrize(
    "value", [NARROW, Ask("urn:a", None, None), Role("viewer", frozenset())], ids=type
)
def test_what_was_decided_cannot_be_changed_afterwards(value: Any) -> None:
    """Each step relies on the one before."""
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, "changed")
