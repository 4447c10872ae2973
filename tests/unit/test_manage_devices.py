"""`coatcheck.server.manage.devices`: one API key for each member and device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
from starlette.testclient import TestClient

from coatcheck.client_address import parse_networks
from coatcheck.restrictions import Rights
from coatcheck.scope import Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys, devices, members
from coatcheck.server.manage.api_key_rules import NewApiKey
from coatcheck.server.manage.authority import Bounds, Caller
from coatcheck.server.manage.devices import SignedIn
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.store import Taken
from coatcheck.server.store.tables import ApiKey
from support.deployment import AUDIENCE, DAY, HOUR, MINUTE, NOON, TESTER, Deployment, form

DEVICE = "3f0c9a52-7e3b-4c11-9d55-0a6f2f6d8f10"
NAME = "MacBook Pro - Ada's IDE"
OFFICE = ("192.0.2.0/24",)


@pytest.fixture
def catalog(deployment: Deployment) -> Catalog:
    return replace(deployment.catalog, device_scopes=Scopes.of(["gateway:infer"]))


@pytest.fixture
def ada(deployment: Deployment) -> str:
    """The id of a member."""
    return member(deployment, "Ada")


SignIn = Callable[..., SignedIn]


@pytest.fixture
def sign_in(deployment: Deployment, catalog: Catalog, ada: str) -> SignIn:
    """Sign Ada in; what differs from the ordinary sign-in is said."""

    def sign_in(device: str = DEVICE, **changes: Any) -> SignedIn:
        arguments = {
            "name": NAME,
            "current_key": None,
            "now": deployment.now,
            "issuer": deployment.settings.issuer,
            "catalog": catalog,
            "member_id": ada,
            "caller": caller(deployment, ada),
        } | changes
        return devices.sign_in(deployment.store, device=device, **arguments)

    return sign_in


def member(deployment: Deployment, name: str) -> str:
    """A new member's id."""
    organization_id, email = deployment.organization_id, f"{name}@example.com"
    return members.add(
        deployment.store, organization_id, name, email, "viewer", TESTER, now=NOON
    ).id


def caller(
    deployment: Deployment, member_id: str, credit_left: int | None = None, **rights: Any
) -> Caller:
    """A viewer with an API key of its own for management, and its restrictions."""
    permissions = Scopes.of(["keys:read", "usage:read"])
    own = Rights("live", (deployment.settings.management_audience,), permissions, **rights)
    return Caller(
        Actor("key_of_ada"),
        deployment.organization_id,
        permissions,
        Bounds(own, any_scope=False, any_environment=False, credit_left=credit_left),
        api_key_id="key_of_ada",
        member_id=member_id,
    )


def rows_of(deployment: Deployment, member_id: str) -> list[ApiKey]:
    with deployment.store.transaction(read_only=True) as tx:
        return list(tx.device_keys(member_id, None, "", 100))


def code_of(http: TestClient, key: str | None) -> str:
    """What the token endpoint says to a secret."""
    body: dict[str, str] = http.post("/oauth/token", data=form(key or "")).json()
    return body.get("code", "issued")


def whats(deployment: Deployment, subject: str) -> list[str]:
    with deployment.store.transaction(read_only=True) as tx:
        return [row.what for row in tx.changes(subject)]


# --- the first sign-in


def test_a_device_key_is_the_members_and_may_what_the_catalog_gives(
    deployment: Deployment, http: TestClient, sign_in: SignIn, ada: str
) -> None:
    """A viewer could give nothing of this away: membership gives it."""
    made = sign_in()

    api_key = made.api_key
    assert made.is_new
    assert (api_key.name, api_key.kind, api_key.device) == (NAME, "device", DEVICE)
    assert (api_key.member_id, api_key.created_by) == (ada, "key_of_ada")
    assert (api_key.scopes, api_key.audiences) == (("gateway:infer",), (AUDIENCE,))
    assert (api_key.environment, api_key.expires_at) == ("live", None)
    assert code_of(http, made.key) == "issued"
    assert str(made.key) not in repr(made)


def test_members_and_devices_have_keys_of_their_own(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    grace = member(deployment, "Grace")
    ids = {
        sign_in().api_key.id,
        sign_in("phone").api_key.id,
        sign_in(member_id=grace, caller=caller(deployment, grace)).api_key.id,
    }

    assert len(ids) == 3
    assert [row.device for row in rows_of(deployment, ada)] == [DEVICE, "phone"]


@pytest.mark.parametrize("device", ["", "a" * 65, "a b", "ä", "a/b", "a%20", "a\n"])
def test_a_device_has_a_plain_name(sign_in: SignIn, device: str) -> None:
    with pytest.raises(Invalid, match="device"):
        sign_in(device)


def test_its_key_needs_a_name_at_first(sign_in: SignIn) -> None:
    with pytest.raises(Invalid, match="name"):
        sign_in(name=None)

    made = sign_in()
    assert sign_in(name=None, current_key=made.key).api_key.name == NAME


def test_without_scopes_for_devices_there_are_none(deployment: Deployment, sign_in: SignIn) -> None:
    """The operator is told what to write."""
    with pytest.raises(Conflict, match="device_keys") as refused:
        sign_in(catalog=deployment.catalog)

    assert refused.value.code == "no_device_keys"


def test_only_members_sign_in(deployment: Deployment, sign_in: SignIn, ada: str) -> None:
    members.remove(deployment.store, ada, TESTER, now=NOON)

    for member_id in (ada, "mem_" + "0" * 22):
        with pytest.raises(NotFound):
            sign_in(member_id=member_id)


# --- again


def test_who_proves_it_keeps_its_key(
    deployment: Deployment, http: TestClient, sign_in: SignIn
) -> None:
    made = sign_in()

    again = sign_in(name="Ada's", current_key=made.key)

    assert (again.key, again.is_new) == (None, False)
    assert (again.api_key.id, again.api_key.name) == (made.api_key.id, "Ada's")
    assert code_of(http, made.key) == "issued"
    assert whats(deployment, made.api_key.id) == ["api_key.created", "api_key.edited"]


@pytest.mark.parametrize("proof", [None, "", "ck_live_wrong", "ä"])
def test_who_does_not_gets_a_new_secret_for_the_old_one(
    deployment: Deployment, http: TestClient, sign_in: SignIn, proof: str | None
) -> None:
    """One device, one key: the old secret dies at once, and its tokens with it."""
    made = sign_in()

    again = sign_in(current_key=proof)

    assert (again.is_new, again.api_key.id) == (False, made.api_key.id)
    assert again.key not in (None, made.key)
    assert code_of(http, again.key) == "issued"
    assert code_of(http, made.key) == "api_key_expired"
    assert "api_key.overlap_ended" in whats(deployment, made.api_key.id)


def test_another_devices_secret_proves_nothing(sign_in: SignIn) -> None:
    phone = sign_in("phone")
    sign_in()

    assert sign_in(current_key=phone.key).key is not None


def test_a_secret_that_was_replaced_proves_while_it_works(
    deployment: Deployment, sign_in: SignIn
) -> None:
    """An administrator's rotation has an overlap, in which the device still holds the old one."""
    made = sign_in()
    api_keys.rotate(deployment.store, made.api_key.id, TESTER, overlap_s=HOUR, now=NOON)

    assert sign_in(current_key=made.key, now=NOON + HOUR - 1).key is None
    assert sign_in(current_key=made.key, now=NOON + HOUR).key is not None


ENDED: dict[str, Callable[[Deployment, str, Catalog], object]] = {
    "revoked": lambda d, it, _: api_keys.revoke(d.store, it, TESTER, now=NOON),
    "deleted": lambda d, it, c: api_keys.delete(d.store, c, it, TESTER, now=NOON),
}


@pytest.mark.parametrize("end", ENDED.values(), ids=ENDED)
@pytest.mark.parametrize("is_proven", [False, True])
def test_revoking_signs_a_device_out_until_the_next_sign_in(
    deployment: Deployment,
    http: TestClient,
    sign_in: SignIn,
    catalog: Catalog,
    end: Callable[[Deployment, str, Catalog], object],
    is_proven: bool,
) -> None:
    made = sign_in()
    end(deployment, made.api_key.id, catalog)
    assert code_of(http, made.key) != "issued"

    again = sign_in(current_key=made.key if is_proven else None)

    assert again.is_new
    assert again.api_key.id != made.api_key.id
    assert code_of(http, again.key) == "issued"


def test_one_that_has_expired_makes_place_for_a_new_one(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    made = sign_in(caller=caller(deployment, ada, expires_at=NOON + HOUR))
    assert made.api_key.expires_at == NOON + HOUR

    early = sign_in(current_key=made.key, now=NOON + HOUR - 1)
    again = sign_in(current_key=made.key, now=NOON + HOUR)

    assert early.api_key.id == made.api_key.id
    assert again.is_new
    assert [row.id for row in rows_of(deployment, ada)] == [again.api_key.id]


@pytest.mark.parametrize("is_proven", [False, True])
def test_signing_in_does_not_undo_that_one_was_disabled(
    deployment: Deployment, http: TestClient, sign_in: SignIn, ada: str, is_proven: bool
) -> None:
    """Neither does signing out first."""
    made = sign_in()
    api_keys.disable(deployment.store, made.api_key.id, TESTER, now=NOON)

    with pytest.raises(Conflict, match="administers") as refused:
        sign_in(current_key=made.key if is_proven else None)
    assert refused.value.code == "api_key_disabled"
    with pytest.raises(Conflict):
        devices.sign_out(deployment.store, ada, DEVICE, caller(deployment, ada), now=NOON)

    api_keys.enable(deployment.store, made.api_key.id, TESTER, now=NOON)
    assert code_of(http, made.key) == "issued"


def test_signing_out_twice_is_signing_out_once(
    deployment: Deployment, http: TestClient, sign_in: SignIn, ada: str
) -> None:
    made = sign_in()
    for _ in range(2):
        devices.sign_out(deployment.store, ada, DEVICE, caller(deployment, ada), now=NOON)

    assert code_of(http, made.key) == "api_key_revoked"
    assert whats(deployment, made.api_key.id) == ["api_key.created", "api_key.revoked"]


def test_two_first_sign_ins_at_once_make_one_key(
    deployment: Deployment, http: TestClient, sign_in: SignIn, ada: str
) -> None:
    """They come one after the other: the later one's secret is the one that works."""
    together = Barrier(2)

    def first() -> SignedIn:
        together.wait(5)
        return sign_in()

    with ThreadPoolExecutor(2) as pool:
        made = [run.result(10) for run in [pool.submit(first), pool.submit(first)]]

    assert sorted(one.is_new for one in made) == [False, True]
    (row,) = rows_of(deployment, ada)
    assert {one.api_key.id for one in made} == {row.id}
    codes = {one.is_new: code_of(http, one.key) for one in made}
    assert codes == {True: "api_key_expired", False: "issued"}


def test_the_database_has_one_key_for_a_device(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    """Whatever else goes wrong: the second is told that somebody did the same."""
    sign_in()
    new = NewApiKey(deployment.organization_id, "twin", kind="device", member_id=ada, device=DEVICE)

    with pytest.raises(Taken):
        api_keys.create(
            deployment.store, deployment.catalog, new, TESTER, now=NOON, issuer="https://a.example"
        )


# --- within the caller


def test_a_device_key_is_as_narrow_as_the_caller_on_every_other_axis(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    """A stolen session of an hour makes no key for ever, from anywhere."""
    rights: dict[str, Any] = {
        "expires_at": NOON + HOUR,
        "networks": parse_networks(OFFICE),
        "models": ("gpt-x",),
    }

    api_key = sign_in(caller=caller(deployment, ada, **rights)).api_key

    assert api_key.expires_at == NOON + HOUR
    assert api_key.networks == OFFICE
    assert api_key.models == ("gpt-x",)


def test_a_device_key_ends_when_the_policy_says_so(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    """Nobody has to name an end to sign in, also on a device whose key is older than it."""
    sign_in("old")
    with deployment.store.transaction() as tx:
        organization = tx.organization(deployment.organization_id)
        assert organization is not None
        organization.max_lifetime_s = 30 * DAY
    narrow = caller(deployment, ada, expires_at=NOON + DAY)

    assert sign_in().api_key.expires_at == NOON + 30 * DAY
    assert sign_in("old", caller=caller(deployment, ada, expires_at=NOON + 90 * DAY)).key
    assert sign_in("phone", caller=narrow).api_key.expires_at == NOON + DAY


def test_a_new_secret_is_no_way_past_the_callers_own_restrictions(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    """Made by an API key without restrictions; now one for the office asks for its secret."""
    made = sign_in()
    narrow = caller(
        deployment, ada, expires_at=NOON + DAY, networks=parse_networks(OFFICE), models=("gpt-x",)
    )

    again = sign_in(caller=narrow).api_key

    assert again.id == made.api_key.id
    assert (again.networks, again.models) == (OFFICE, ("gpt-x",))
    assert again.expires_at == NOON + DAY
    assert "api_key.narrowed" in whats(deployment, again.id)


def test_a_sign_in_gives_nothing_back_that_was_taken(
    deployment: Deployment, catalog: Catalog, sign_in: SignIn, ada: str
) -> None:
    """An administrator's edit outlives the next sign-in, with a wide caller or one elsewhere."""
    made = sign_in()
    api_keys.edit(
        deployment.store,
        catalog,
        made.api_key.id,
        lambda new: replace(new, networks=OFFICE, expires_at=NOON + MINUTE),
        TESTER,
        now=NOON,
        issuer=deployment.settings.issuer,
    )

    again = sign_in()
    assert (again.api_key.networks, again.api_key.expires_at) == (OFFICE, NOON + MINUTE)
    elsewhere = caller(deployment, ada, networks=parse_networks(("203.0.113.0/24",)))
    with pytest.raises(Beyond) as refused:
        sign_in(caller=elsewhere)
    assert refused.value.fields == ("cidrs",)
    assert sign_in(caller=elsewhere, current_key=again.key).key is None


@pytest.mark.parametrize(
    ("changes", "field"), [({"project_id": "prj_other"}, "project"), ({"env": "test"}, "env")]
)
def test_a_device_key_is_moved_by_no_sign_in(
    deployment: Deployment, sign_in: SignIn, ada: str, changes: dict[str, str], field: str
) -> None:
    """A test key never gets a live one's secret, nor one project's key another's."""
    sign_in()
    other = caller(deployment, ada, project_id=changes.get("project_id"))
    assert other.bounds is not None
    rights = replace(other.bounds.rights, environment=changes.get("env", "live"))

    with pytest.raises(Beyond) as refused:
        sign_in(caller=replace(other, bounds=replace(other.bounds, rights=rights)))

    assert refused.value.fields == (field,)


def test_a_limit_of_credit_is_passed_on_and_counted_once(
    deployment: Deployment, sign_in: SignIn, ada: str
) -> None:
    """What the caller has given to this device is not taken for somebody else's."""
    made = sign_in(caller=caller(deployment, ada, credit_left=5_000_000)).api_key
    assert made.credit_limit == 5_000_000

    all_given = caller(deployment, ada, credit_left=0)
    assert sign_in(caller=all_given).api_key.id == made.id
    with pytest.raises(Beyond):
        sign_in(caller=replace(all_given, actor=Actor("key_other")))


def test_a_device_key_gives_nothing_of_the_platform(
    deployment: Deployment, sign_in: SignIn
) -> None:
    """No catalog's file can say so; should one be built otherwise, the bounds hold."""
    platform = replace(deployment.catalog, device_scopes=Scopes.of(["coatcheck:resource-server"]))

    with pytest.raises(Beyond):
        sign_in(catalog=platform)
