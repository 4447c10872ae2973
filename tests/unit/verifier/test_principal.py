"""Who is calling, and what it may do."""

import dataclasses

import pytest

from coatcheck.scope import Scopes
from coatcheck.verifier import InsufficientScope, Principal
from coatcheck.verifier.errors import Protection

HERE = Protection("api", "https://api.example.com/.well-known/x")


def principal(scope: str = "widgets:read read@PLACE/Site/42 write@PLACE/Site/#") -> Principal:
    return Principal(
        key_id="key_1",
        org_id="org_1",
        project_id=None,
        environment="live",
        scopes=Scopes.parse(scope),
        method="jwt",
        expires_at=1_790_000_600,
        token_id="jti",
        client_id="key_1",
        audience="https://api.example.com",
        claims={"secret": "in no log"},
        protection=HERE,
    )


ALLOWED = {
    "bare permission": ("widgets:read", None),
    "bare permission covers each resource": ("widgets:read", "PLACE/Site/1"),
    "its own resource": ("read", "PLACE/Site/42"),
    "a wildcard covers each id": ("write", "PLACE/Site/7"),
}
REFUSED = {
    "another permission": ("widgets:write", None),
    "everything by a filter": ("read", None),
    "another resource": ("read", "PLACE/Site/43"),
    "above": ("write", "PLACE/Site"),
    "below": ("write", "PLACE/Site/7/THING"),
    "wildcard as id": ("write", "PLACE/Site/#"),
    "star as id": ("write", "PLACE/Site/*"),
    "empty id": ("write", "PLACE/Site/"),
    "empty": ("widgets:read", ""),
    "at sign": ("write", "PLACE/Site/a@b"),
    "other spelling": ("read", "PLACE/Site/%34%32"),
    "blank": ("write", "PLACE/Site/a b"),
    "permission that is none": ("widgets read", None),
    "empty permission": ("", None),
}


@pytest.mark.parametrize(("permission", "resource"), ALLOWED.values(), ids=ALLOWED)
def test_it_may_do_what_one_grant_covers(permission: str, resource: str | None) -> None:
    """The filter has an exact shape, and `#` stands for one segment."""
    assert principal().allows(permission, resource)
    principal().require(permission, resource=resource)


@pytest.mark.parametrize(("permission", "resource"), REFUSED.values(), ids=REFUSED)
def test_it_may_do_nothing_else_and_nothing_raises(permission: str, resource: str | None) -> None:
    """A path made from a request may hold anything: it is not allowed, and no crash."""
    assert not principal().allows(permission, resource)
    with pytest.raises(InsufficientScope):
        principal().require(permission, resource=resource)


def test_the_star_covers_no_platform_permission() -> None:
    """Only its exact name does."""
    assert principal("*").allows("widgets:delete")
    assert not principal("*").allows("coatcheck:operator")


def test_a_missing_permission_is_a_403_that_names_all_that_are_needed() -> None:
    """RFC 6750 §3: the scope attribute is what the request needs, to ask a token for."""
    with pytest.raises(InsufficientScope) as refused:
        principal().require("widgets:read", "widgets:write", resource="PLACE/Site/42")

    challenge = refused.value.challenge
    assert refused.value.status == 403
    assert challenge is not None
    assert 'scope="widgets:read@PLACE/Site/42 widgets:write@PLACE/Site/42"' in challenge
    assert 'realm="api"' in challenge


def test_a_malformed_resource_stays_out_of_the_challenge() -> None:
    """It is input: a quote in it would end the attribute."""
    with pytest.raises(InsufficientScope) as refused:
        principal().require("widgets:read", resource='"\r\nSet-Cookie: a=b')

    assert refused.value.scope is None
    assert "Cookie" not in f"{refused.value.headers}{refused.value.body!r}"


def test_requiring_nothing_passes() -> None:
    """Whoever was let in may do what needs no permission."""
    principal("").require()


def test_a_principal_cannot_be_changed_and_shows_no_claims() -> None:
    """Requests with the same token share it, and it ends up in logs."""
    who = principal()

    with pytest.raises(dataclasses.FrozenInstanceError):
        who.org_id = "org_2"  # type: ignore[misc]
    assert "in no log" not in repr(who)
    assert len({who, principal()}) == 1


def test_starlette_finds_what_it_expects_of_a_user() -> None:
    """`request.user` is used by middleware that never heard of us."""
    who = principal()

    assert who.is_authenticated
    assert who.display_name == who.identity == "key_1"


def test_an_answer_is_yes_or_no_and_nothing_between() -> None:
    """It ends up in JSON, and in comparisons."""
    who = principal()

    assert who.allows("widgets:read") is True
    assert who.allows("widgets:write") is False
    assert who.allows("widgets:read", "") is False


def test_who_somebody_is_does_not_depend_on_who_asks() -> None:
    """Two resource servers, one caller: equal, and with one text."""
    here, elsewhere = principal(), dataclasses.replace(principal(), protection=Protection("other"))

    assert here == elsewhere
    assert repr(here) == repr(elsewhere)
    assert here != principal("widgets:read")
    assert here != dataclasses.replace(here, claims={"secret": "another"})
