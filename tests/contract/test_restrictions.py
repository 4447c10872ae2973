"""What every restriction promises: what comes out lies within what went in.

The tables here run over RESTRICTIONS; a new one gets these tests by its line there.
"""

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import apikey
from coatcheck.durations import TOKEN_LIFETIME
from coatcheck.restrictions import (
    KNOWN,
    RESTRICTIONS,
    Allowance,
    Ask,
    Reason,
    Refusal,
    Restriction,
    Situation,
)
from coatcheck.scope import Grant, Scopes
from coatcheck.server.issue import decide
from coatcheck.server.store import ApiKeyRecord, Found

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

ALLOWANCES = st.builds(
    Allowance,
    api_key_id=st.just("key_1"),
    organization_id=st.just("org_1"),
    environment=st.sampled_from(ENVIRONMENTS),
    audiences=ANY_AUDIENCES,
    scopes=SCOPES,
    expires_at=st.none() | MOMENTS,
)
ASKS = st.builds(
    Ask,
    audience=st.sampled_from((*AUDIENCES, "https://nobody.example")),
    audience_environment=st.none() | st.sampled_from(ENVIRONMENTS),
    scopes=st.none() | SCOPES,
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
)

each_restriction = pytest.mark.parametrize(
    "restriction", RESTRICTIONS, ids=[restriction.name for restriction in RESTRICTIONS]
)


@each_restriction
@settings(max_examples=200)
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
@settings(max_examples=100)
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
@settings(max_examples=100)
@given(allowance=ALLOWANCES, audience=st.sampled_from(AUDIENCES))
def test_its_claims_survive_json(
    restriction: Restriction, allowance: Allowance, audience: str
) -> None:
    """They travel as JSON: no tuple, no set, no integer that comes back as something else."""
    carried = dict(restriction.to_claim(replace(allowance, audiences=(audience,))))

    assert json.loads(json.dumps(carried)) == carried


def refuse(code: str) -> NoReturn:
    raise AssertionError(code)


@settings(max_examples=100)
@given(RECORDS, ASKS)
def test_a_token_passes_the_checks_of_the_restrictions_that_made_it(
    record: ApiKeyRecord, ask: Ask
) -> None:
    """Issuer and verifier agree: to_claim and check are two sides of one rule."""
    try:
        allowance = decide.decide(record, ask)
    except Refusal:
        return
    claims: dict[str, object] = {}
    for restriction in RESTRICTIONS:
        claims |= restriction.to_claim(allowance)
    through_json = json.loads(json.dumps(claims))

    for restriction in RESTRICTIONS:
        restriction.check(through_json, Situation(environment=record.environment), refuse)


def test_no_two_restrictions_share_a_name_or_a_claim() -> None:
    """A `must` names one rule; a claim that two wrote would carry only the later one."""
    allowance = Allowance("key_1", "org_1", "live", ("urn:c",), Scopes.parse("read"), NOW)
    claims = [name for restriction in RESTRICTIONS for name in restriction.to_claim(allowance)]

    assert len(KNOWN) == len(RESTRICTIONS)
    assert len(claims) == len(set(claims))


# --- all of them in a row


@settings(max_examples=400)
@given(RECORDS, ASKS)
def test_a_token_is_never_wider_than_its_api_key(record: ApiKeyRecord, ask: Ask) -> None:
    """Every axis at once: scopes, audience, environment, life."""
    try:
        allowance = decide.decide(record, ask)
    except Refusal:
        return

    ends = [end for end in (record.expires_at, record.secret_expires_at) if end is not None]
    assert allowance.api_key_id == record.id
    assert allowance.organization_id == record.organization_id
    assert allowance.environment == record.environment
    assert ask.audience_environment in (None, record.environment)
    assert allowance.audiences == (ask.audience,)
    assert ask.audience in record.audiences
    assert not record.scopes.missing(allowance.scopes)
    assert allowance.scopes == (record.scopes if ask.scopes is None else ask.scopes)
    assert allowance.expires_at == min(ends, default=None)


@settings(max_examples=200)
@given(RECORDS, ASKS)
def test_what_lies_within_the_api_key_is_given(record: ApiKeyRecord, ask: Ask) -> None:
    """Nothing is refused without a reason: exactly what was asked, or a rule that forbids it."""
    allowed = (
        ask.audience in record.audiences
        and ask.audience_environment in (None, record.environment)
        and (ask.scopes is None or not record.scopes.missing(ask.scopes))
    )
    try:
        decide.decide(record, ask)
    except Refusal:
        assert not allowed
    else:
        assert allowed


@settings(max_examples=200)
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
        after = decide.decide(narrower, ask)
    except Refusal:
        return
    try:
        before = decide.decide(record, ask)
    except Refusal:
        before = None

    assert before is not None
    assert after.lies_within(before)


# --- the comparison itself

NARROW = Allowance("key_1", "org_1", "live", ("urn:a", "urn:b"), Scopes.parse("read@X/#"), NOW)
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
}


@pytest.mark.parametrize("changes", WIDER.values(), ids=WIDER)
def test_a_broken_restriction_that_widens_is_noticed(changes: dict[str, Any]) -> None:
    """`decide` compares after every step by this; whatever is not within is never issued."""
    assert not replace(NARROW, **changes).lies_within(NARROW)


@settings(max_examples=200)
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
    "organization_suspended_at": (5, "org_suspended"),
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

FIRST = {"environment": False, "audience": False, "scope": False}


def test_each_restriction_has_its_name_and_its_claim_for_ever() -> None:
    """Tokens that are out there carry both; verifiers of other languages read the claims.

    Those of the first release need not be enforced by more than the registered claims.
    """
    allowance = Allowance("key_1", "org_1", "live", ("urn:c",), Scopes.parse("read@X/#"), NOW)
    claims: dict[str, object] = {}
    for restriction in RESTRICTIONS:
        claims |= restriction.to_claim(allowance)

    assert {one.name: one.must for one in RESTRICTIONS}.items() >= FIRST.items()
    assert claims.items() >= {"env": "live", "aud": "urn:c", "scope": "read@X/#"}.items()


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
        "not_in_query",
    }
    assert all(reason.value == reason.name.lower() for reason in Reason)


def test_a_refusal_keeps_its_date() -> None:
    """An API key that ended is told when."""
    assert Refusal(Reason.API_KEY_REVOKED, at=NOW).at == NOW
    assert Refusal(Reason.API_KEY_REVOKED).at is None
    assert Refusal(Reason.API_KEY_REVOKED).allowed == ()


@pytest.mark.parametrize("value", [NARROW, Ask("urn:a", None, None), Situation()], ids=type)
def test_what_was_decided_cannot_be_changed_afterwards(value: Any) -> None:
    """Each step relies on the one before."""
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, "changed")
