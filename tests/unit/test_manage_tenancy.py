"""`coatcheck.server.manage`: organizations, projects, members, groups.  answers.md K2, K10."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest

from coatcheck import apikey
from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, Scopes
from coatcheck.server import sealing
from coatcheck.server.catalog import Policies
from coatcheck.server.manage import api_keys, groups, members, organizations, projects
from coatcheck.server.manage.api_keys import ApiKeyView, Created, NewApiKey
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.manage.groups import GroupTerms, GroupView
from coatcheck.server.manage.members import MemberView
from coatcheck.server.store.tables import ChangeRow
from support.deployment import AUDIENCE, DAY, NOON, TESTER, Deployment, a_deployment

FORGERIES = {
    "nothing": " ",
    "a line feed": "a\nb",
    "NUL": "a\0b",
    "an escape sequence": "\x1b[31mred",
    "a change of direction": "a\u202eb",
    "a megabyte": "a" * 1_000_000,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment that all tests here share: each makes an organization of its own."""
    with a_deployment(tmp_path_factory.mktemp("tenancy")) as made:
        yield made


@pytest.fixture
def organization(shared: Deployment) -> str:
    """The id of an organization that is there for one test."""
    return organizations.create(shared.store, "Acme", TESTER, now=NOON).id


def changes(deployment: Deployment, subject: str) -> list[ChangeRow]:
    with deployment.store.transaction(read_only=True) as tx:
        return list(tx.changes(subject))


def whats(deployment: Deployment, subject: str) -> list[str]:
    return [row.what for row in changes(deployment, subject)]


def an_api_key(deployment: Deployment, new: NewApiKey, *, seal: bool = False) -> Created:
    def newest(_: object) -> sealing.SealingKey:
        return sealing.load(deployment.settings.keys_dir).newest()

    return api_keys.create(
        deployment.store,
        deployment.catalog,
        new,
        TESTER,
        now=NOON,
        issuer=deployment.settings.issuer,
        seal_with=newest if seal else None,
    )


def shown(deployment: Deployment, api_key_id: str) -> ApiKeyView:
    return api_keys.show(deployment.store, api_key_id, now=NOON)


# --- organizations


def bootstrap(
    deployment: Deployment, organization_id: str, policies: Policies | None = None
) -> organizations.Bootstrapped:
    return organizations.bootstrap(
        deployment.store,
        replace(deployment.catalog, policies=policies or Policies()),
        organization_id,
        TESTER,
        now=NOON,
        issuer=deployment.settings.issuer,
    )


def edit(
    deployment: Deployment,
    organization_id: str,
    policies: Policies | None = None,
    **changed: object,
) -> organizations.OrganizationView:
    return organizations.edit(
        deployment.store,
        replace(deployment.catalog, policies=policies or Policies()),
        organization_id,
        lambda before: replace(before, **changed),  # type: ignore[arg-type]
        TESTER,
        now=NOON,
    )


def test_what_init_makes_is_bootstrapped_and_has_a_default_project(shared: Deployment) -> None:
    """The operator's own organization waits for nobody to switch it on."""
    own = next(one for one in organizations.list_organizations(shared.store) if one.is_operator)
    found, _ = projects.page(shared.store, own.id, limit=10)

    assert own.bootstrapped_at == own.created_at
    assert [(one.name, one.is_default) for one in found] == [("Default", True)]
    with shared.store.transaction(read_only=True) as tx:
        log = [(row.what, row.subject) for row in tx.changes_after(0, 2)]
    assert log == [("organization.created", own.id), ("project.created", found[0].id)]


def test_a_new_organization_waits_to_be_bootstrapped(shared: Deployment, organization: str) -> None:
    """Nothing is allowed, limited or kept before somebody said so."""
    with shared.store.transaction(read_only=True) as tx:
        row = tx.organization(organization)
        assert row is not None
        told = organizations.view(row).to_json()

    assert told == {
        "id": organization,
        "name": "Acme",
        "operator": False,
        "status": "active",
        "createdAt": "2027-01-15T08:00:00Z",
        "suspendedAt": None,
        "bootstrappedAt": None,
        "recoverable": False,
        "maxLifetime": None,
        "creditLimit": None,
        "lowCredit": None,
    }


def test_bootstrapping_makes_a_project_and_an_admin_key(
    shared: Deployment, organization: str
) -> None:
    """The set-up of an organization, in one transaction."""
    done = bootstrap(shared, organization)

    assert done.organization.bootstrapped_at == NOON
    assert (done.project.name, done.project.is_default) == ("Default", True)
    assert done.admin.api_key.scopes == ORGANIZATION_PERMISSIONS
    assert done.admin.api_key.audiences == (shared.catalog.management_audience,)
    assert (done.admin.api_key.environment, done.admin.api_key.expires_at) == ("live", None)
    assert api_keys.find(shared.store, done.admin.key, now=NOON) == done.admin.api_key
    assert any("keep it in a secret store" in one for one in done.admin.warnings)
    assert whats(shared, organization) == ["organization.created", "organization.bootstrapped"]
    assert whats(shared, done.project.id) == ["project.created"]
    assert whats(shared, done.admin.api_key.id) == ["api_key.created"]
    assert done.admin.key not in repr(done)


def test_an_organization_is_bootstrapped_once(shared: Deployment, organization: str) -> None:
    """A second admin key would be a way around the first one's owner."""
    bootstrap(shared, organization)
    before = shared.store.head()

    with pytest.raises(Conflict, match="coatcheck keys create --org org_") as refused:
        bootstrap(shared, organization)

    assert refused.value.code == "already_bootstrapped"
    assert shared.store.head() == before


def test_the_admin_key_lives_as_long_as_policy_lets(shared: Deployment, organization: str) -> None:
    """The shorter of two limits, as for every other API key."""
    edit(shared, organization, max_lifetime_s=30 * DAY)

    done = bootstrap(shared, organization, Policies(max_lifetime_s=90 * DAY))

    assert done.admin.api_key.expires_at == NOON + 30 * DAY


def test_an_edit_is_told_as_before_and_after(shared: Deployment, organization: str) -> None:
    """Who changed which policy from what is what an audit asks."""
    edited = edit(
        shared,
        organization,
        name=" Acme Ltd ",
        recoverable=True,
        max_lifetime_s=DAY,
        credit_limit=2_500_000,
        low_credit=1_000_000,
    )

    told = edited.to_json()
    assert (told["name"], told["recoverable"], told["maxLifetime"]) == (
        "Acme Ltd",
        True,
        "1d",
    )
    assert (told["creditLimit"], told["lowCredit"]) == (2.5, 1)
    row = changes(shared, organization)[-1]
    assert (row.what, row.narrows) == ("organization.edited", False)
    assert '"name":["Acme","Acme Ltd"]' in row.detail
    assert edit(shared, organization) == edited
    assert len(changes(shared, organization)) == 2, "an edit of nothing is none"


BAD_ORGANIZATIONS = {
    "copies, where the catalog keeps none": (
        Policies(recoverable=False),
        {"recoverable": True},
        "recoverable",
        "policies.recoverable",
    ),
    "no lifetime at all": (None, {"max_lifetime_s": 0}, "maxLifetime", "such as 90d"),
    "a lifetime beyond every calendar": (
        None,
        {"max_lifetime_s": 10**12},
        "maxLifetime",
        "null for none",
    ),
    "longer than the catalog lets": (
        Policies(max_lifetime_s=DAY),
        {"max_lifetime_s": DAY + 1},
        "maxLifetime",
        "86400 seconds at most",
    ),
    **{
        f"a name of {what}": (None, {"name": name}, "name", "name: ")
        for what, name in FORGERIES.items()
    },
}


@pytest.mark.parametrize(
    ("policies", "changed", "field", "told"),
    BAD_ORGANIZATIONS.values(),
    ids=BAD_ORGANIZATIONS,
)
def test_a_policy_is_never_looser_than_the_catalog(
    shared: Deployment,
    organization: str,
    policies: Policies | None,
    changed: dict[str, object],
    field: str,
    told: str,
) -> None:
    """Refused by the name of the input, with what to write instead; nothing is stored.  K2."""
    with pytest.raises(Invalid, match=told) as refused:
        edit(shared, organization, policies, **changed)

    assert refused.value.field == field
    assert whats(shared, organization) == ["organization.created"]


def test_a_policy_that_the_catalog_forbids_by_now_can_be_taken_back(
    shared: Deployment, organization: str
) -> None:
    """An edit of something else is not refused for it, either."""
    edit(shared, organization, recoverable=True, max_lifetime_s=9 * DAY)
    stricter = Policies(recoverable=False, max_lifetime_s=DAY)

    assert edit(shared, organization, stricter, name="Other").name == "Other"
    assert not edit(shared, organization, stricter, recoverable=False).is_recoverable
    assert edit(shared, organization, stricter, max_lifetime_s=None).max_lifetime_s is None


def test_keeping_no_copies_any_more_deletes_those_there_are(
    shared: Deployment, organization: str
) -> None:
    """Only of this organization; the secrets themselves go on working."""
    other = organizations.create(shared.store, "Other", TESTER, now=NOON).id
    made = []
    for one in (organization, other):
        edit(shared, one, recoverable=True)
        made.append(an_api_key(shared, NewApiKey(one, "n"), seal=True))

    edit(shared, organization, recoverable=False)

    with shared.store.transaction(read_only=True) as tx:
        gone, kept = (tx.secrets(one.api_key.id)[0] for one in made)
        assert (gone.sealed, gone.sealing_key_id) == (None, None)
        assert gone.digest == apikey.digest(made[0].key)
        assert kept.sealed is not None


def test_the_organizations_lifetime_binds_new_api_keys(
    shared: Deployment, organization: str
) -> None:
    """Those that are there keep their end: nothing stops by itself."""
    old = an_api_key(shared, NewApiKey(organization, "old"))
    edit(shared, organization, max_lifetime_s=DAY)

    with pytest.raises(Invalid, match="expiresAt"):
        an_api_key(shared, NewApiKey(organization, "new"))
    an_api_key(shared, NewApiKey(organization, "new", expires_at=NOON + DAY))
    assert shown(shared, old.api_key.id).expires_at is None


def test_an_unknown_organization_is_told_as_such(shared: Deployment) -> None:
    """By every use case, with what an id looks like."""
    attempts: tuple[Callable[[], object], ...] = (
        lambda: bootstrap(shared, "org_x"),
        lambda: edit(shared, "org_x", name="n"),
        lambda: organizations.suspend(shared.store, "org_x", TESTER, now=NOON),
        lambda: organizations.resume(shared.store, "org_x", TESTER, now=NOON),
        lambda: projects.create(shared.store, "org_x", "n", TESTER, now=NOON),
        lambda: members.add(
            shared.store, "org_x", "n", "a@example.com", "viewer", TESTER, now=NOON
        ),
    )
    for attempt in attempts:
        with pytest.raises(NotFound, match="starts with org_"):
            attempt()


# --- projects


def a_project(deployment: Deployment, organization_id: str) -> projects.ProjectView:
    return projects.create(deployment.store, organization_id, "Shop", TESTER, now=NOON)


def test_a_project_is_created_renamed_archived_and_restored(
    shared: Deployment, organization: str
) -> None:
    """Each is one row of the log, and done twice it is done once."""
    made = a_project(shared, organization)
    for _ in range(2):
        projects.rename(shared.store, made.id, "Store", TESTER, now=NOON)
    for _ in range(2):
        archived = projects.archive(shared.store, made.id, TESTER, now=NOON + 1)
    for _ in range(2):
        restored = projects.restore(shared.store, made.id, TESTER, now=NOON + 2)

    assert archived.to_json() == {
        "id": made.id,
        "name": "Store",
        "organization": organization,
        "default": False,
        "status": "archived",
        "createdAt": "2027-01-15T08:00:00Z",
        "archivedAt": "2027-01-15T08:00:01Z",
    }
    assert restored.to_json()["status"] == "active"
    assert projects.show(shared.store, made.id) == restored
    log = changes(shared, made.id)
    assert [(row.what, row.narrows) for row in log] == [
        ("project.created", False),
        ("project.edited", False),
        ("project.archived", True),
        ("project.restored", False),
    ]
    assert {row.organization_id for row in log} == {organization}


def test_the_default_project_stays(shared: Deployment, organization: str) -> None:
    """Everybody can count on it; the sentence says what can be done instead."""
    project = bootstrap(shared, organization).project

    with pytest.raises(Conflict, match="rename it") as refused:
        projects.archive(shared.store, project.id, TESTER, now=NOON)

    assert refused.value.code == "default_project"


def test_an_archived_project_takes_no_api_keys(shared: Deployment, organization: str) -> None:
    """It would be born dead."""
    made = a_project(shared, organization)
    projects.archive(shared.store, made.id, TESTER, now=NOON)

    with pytest.raises(Invalid, match="archived"):
        an_api_key(shared, NewApiKey(organization, "n", project_id=made.id))


@pytest.mark.parametrize("name", FORGERIES.values(), ids=FORGERIES)
def test_no_name_forges_a_line(shared: Deployment, organization: str, name: str) -> None:
    """K2, for whatever is given a name here."""
    made = a_project(shared, organization)
    head = shared.store.head()
    attempts: tuple[Callable[[], object], ...] = (
        lambda: organizations.create(shared.store, name, TESTER, now=NOON),
        lambda: projects.create(shared.store, organization, name, TESTER, now=NOON),
        lambda: projects.rename(shared.store, made.id, name, TESTER, now=NOON),
        lambda: a_member(shared, organization, name=name),
        lambda: a_group(shared, name=name),
    )
    for attempt in attempts:
        with pytest.raises(Invalid) as refused:
            attempt()
        assert refused.value.field == "name"
    assert shared.store.head() == head


def test_pages_go_on_where_the_one_before_ended(shared: Deployment, organization: str) -> None:
    """Each once, in the order they were made; the last page says that it is the last."""
    made = sorted(a_project(shared, organization).id for _ in range(5))

    first, following = projects.page(shared.store, organization, limit=3)
    assert following is not None
    rest, end = projects.page(shared.store, organization, after=following, limit=2)

    assert [one.id for one in (*first, *rest)] == made
    assert end is None


# --- members


def a_member(
    deployment: Deployment,
    organization_id: str,
    role: str = "admin",
    *,
    name: str = "Ada",
    email: str = "ada@example.com",
    within: Scopes | None = None,
) -> MemberView:
    return members.add(
        deployment.store, organization_id, name, email, role, TESTER, now=NOON, within=within
    )


def change_role(
    deployment: Deployment, member: MemberView, role: str, within: Scopes | None = None
) -> MemberView:
    return members.edit(
        deployment.store,
        member.id,
        lambda before: replace(before, role=role),
        TESTER,
        now=NOON,
        within=within,
    )


def own_key(deployment: Deployment, member: MemberView, *scopes: str) -> ApiKeyView:
    """An API key of a member's own."""
    with deployment.store.transaction(read_only=True) as tx:
        row = tx.member(member.id)
    assert row is not None
    wanted = NewApiKey(member.organization_id, "mine", scopes=scopes)
    return an_api_key(deployment, members.own_api_key(row, wanted, deployment.catalog)).api_key


def device_key(deployment: Deployment, member: MemberView) -> ApiKeyView:
    new = NewApiKey(
        member.organization_id,
        "laptop",
        scopes=("widgets:read",),
        kind="device",
        member_id=member.id,
        device="laptop",
    )
    return an_api_key(deployment, new).api_key


def test_a_member_is_shown_as_it_was_added(shared: Deployment, organization: str) -> None:
    """The address in small letters: one person is one member, however it is typed."""
    made = a_member(shared, organization, "viewer", email=" Ada@Example.COM ")

    assert made.to_json() == {
        "id": made.id,
        "name": "Ada",
        "email": "ada@example.com",
        "role": "viewer",
        "organization": organization,
        "createdAt": "2027-01-15T08:00:00Z",
    }
    assert members.show(shared.store, made.id) == made
    assert members.page(shared.store, organization, limit=1) == ([made], None)
    row = changes(shared, made.id)[0]
    assert (row.what, row.organization_id) == ("member.added", organization)
    assert "example.com" not in row.detail, "the log outlives the membership"


BAD_MEMBERS = {
    "no @": ({"email": "ada"}, "email", "such as ada@example.com"),
    "two @": ({"email": "a@b@c"}, "email", "such as"),
    "nobody": ({"email": "@example.com"}, "email", "such as"),
    "nowhere": ({"email": "ada@"}, "email", "such as"),
    "a blank": ({"email": "a da@example.com"}, "email", "write it without"),
    "a line feed": ({"email": "ada@example.com\r\nBcc: x"}, "email", "write it without"),
    "a zero width": ({"email": "ad\u200ba@example.com"}, "email", "write it without"),
    "too long": ({"email": f"{'a' * 251}@b.c"}, "email", "at most 254"),
    "a role nobody knows": ({"role": "owner"}, "role", "admin, developer, viewer"),
}


@pytest.mark.parametrize(("changed", "field", "told"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_a_member_has_an_address_and_a_role(
    shared: Deployment, organization: str, changed: dict[str, str], field: str, told: str
) -> None:
    """Refused by the name of the input, with what to write instead."""
    with pytest.raises(Invalid, match=told) as refused:
        a_member(shared, organization, **changed)  # type: ignore[arg-type]

    assert refused.value.field == field
    assert members.page(shared.store, organization, limit=1) == ([], None)


def test_one_address_is_one_member_of_an_organization(
    shared: Deployment, organization: str
) -> None:
    """Until it is removed; another organization's members are nobody's business."""
    other = organizations.create(shared.store, "Other", TESTER, now=NOON).id
    made = a_member(shared, organization)
    a_member(shared, other)

    with pytest.raises(Conflict, match="remove it first") as refused:
        a_member(shared, organization, email="ADA@example.com")
    assert refused.value.code == "member_exists"

    members.remove(shared.store, made.id, TESTER, now=NOON)
    assert a_member(shared, organization).id != made.id


WITHIN = {
    "everything": (None, {"admin", "developer", "viewer"}),
    "all of an organization": (
        Scopes.of(ORGANIZATION_PERMISSIONS),
        {"admin", "developer", "viewer"},
    ),
    "members alone": (Scopes.of(("members:write",)), set()),
    "a viewer's": (Scopes.of(("members:write", "keys:read", "usage:read")), {"viewer"}),
    "all but administration": (
        Scopes.of(one for one in ORGANIZATION_PERMISSIONS if one != "org:admin"),
        {"developer", "viewer"},
    ),
    "the platform's": (Scopes.of((OPERATOR, "members:write")), set()),
}


@pytest.mark.parametrize(("within", "given"), WITHIN.values(), ids=WITHIN)
def test_nobody_gives_a_role_that_may_more_than_they_may(
    shared: Deployment, organization: str, within: Scopes | None, given: set[str]
) -> None:
    """Rights over rights: not to a new member, not to one that is there, in neither direction."""
    for role, other in product(members.ROLES, members.ROLES):
        there = a_member(shared, organization, role)
        if {role, other} <= given:
            change_role(shared, there, other, within)
        else:
            with pytest.raises(Beyond) as refused:
                change_role(shared, there, other, within)
            assert refused.value.fields == ("role",)
            assert members.show(shared.store, there.id) == there
        members.remove(shared.store, there.id, TESTER, now=NOON)
    for role in members.ROLES:
        if role in given:
            made = a_member(shared, organization, role, within=within)
            members.remove(shared.store, made.id, TESTER, now=NOON)
        else:
            with pytest.raises(Beyond):
                a_member(shared, organization, role, within=within)
    assert members.page(shared.store, organization, limit=1) == ([], None)


def test_a_members_own_api_key_is_for_management_and_within_the_role(
    shared: Deployment, organization: str
) -> None:
    """Nothing said: all that the role may; and fewer for the asking."""
    for role, permissions in members.ROLES.items():
        member = a_member(shared, organization, role, email=f"{role}@example.com")
        whole, part = own_key(shared, member), own_key(shared, member, "keys:read")

        assert (whole.kind, whole.member_id, whole.environment) == ("member", member.id, "live")
        assert whole.audiences == (shared.catalog.management_audience,)
        assert (whole.scopes, part.scopes) == (permissions, ("keys:read",))


def test_an_admin_of_the_operators_may_have_the_platforms_permission(
    shared: Deployment, organization: str
) -> None:
    """Whether it may be given is asked of the giver; to a lesser role it never is."""
    admin = a_member(shared, organization)
    developer = a_member(shared, organization, "developer", email="grace@example.com")

    assert own_key(shared, admin, OPERATOR, "keys:read").scopes == (OPERATOR, "keys:read")
    with pytest.raises(Invalid):
        own_key(shared, developer, OPERATOR)


BAD_OWN_KEYS = {
    "a scope beyond the role": ({"scopes": ("org:admin",)}, "scopes", "keys:read, usage:read"),
    "everything": ({"scopes": ("*",)}, "scopes", "leave it out for all"),
    "a scope of the product": ({"scopes": ("widgets:read",)}, "scopes", "name no others"),
    "the platform": ({"scopes": ("coatcheck:resource-server",)}, "scopes", "name no others"),
    "another audience": ({"audiences": (AUDIENCE,)}, "audiences", "leave it out"),
    "another environment": ({"environment": "test"}, "env", "leave it out"),
}


@pytest.mark.parametrize(("changed", "field", "told"), BAD_OWN_KEYS.values(), ids=BAD_OWN_KEYS)
def test_a_members_own_api_key_is_nothing_else(
    shared: Deployment, organization: str, changed: dict[str, object], field: str, told: str
) -> None:
    """Refused rather than turned silently into what it can only be."""
    member = a_member(shared, organization, "viewer")
    wanted = NewApiKey(organization, "mine", **changed)  # type: ignore[arg-type]
    with shared.store.transaction(read_only=True) as tx:
        row = tx.member(member.id)
    assert row is not None

    with pytest.raises(Invalid, match=told) as refused:
        members.own_api_key(row, wanted, shared.catalog)

    assert refused.value.field == field


def test_who_is_removed_takes_all_its_own_api_keys_along(
    shared: Deployment, organization: str
) -> None:
    """For management and for devices, disabled ones too; not what it made for others."""
    member = a_member(shared, organization)
    other = a_member(shared, organization, email="grace@example.com")
    own = [own_key(shared, member), own_key(shared, member, "keys:read")]
    own.append(device_key(shared, member))
    api_keys.disable(shared.store, own[0].id, TESTER, now=NOON)
    gone = own_key(shared, member)
    api_keys.revoke(shared.store, gone.id, TESTER, now=NOON)
    not_own = [own_key(shared, other), an_api_key(shared, NewApiKey(organization, "n")).api_key]

    members.remove(shared.store, member.id, TESTER, now=NOON + 5)

    assert {shown(shared, one.id).revoked_at for one in own} == {NOON + 5}
    assert all(whats(shared, one.id)[-1] == "api_key.revoked" for one in own)
    assert shown(shared, gone.id).revoked_at == NOON, "it had ended before"
    assert {shown(shared, one.id).status for one in not_own} == {"active"}
    assert whats(shared, member.id) == ["member.added", "member.removed"]
    attempts: tuple[Callable[[], object], ...] = (
        lambda: members.show(shared.store, member.id),
        lambda: change_role(shared, member, "viewer"),
        lambda: members.remove(shared.store, member.id, TESTER, now=NOON),
    )
    for attempt in attempts:
        with pytest.raises(NotFound, match="starts with mem_"):
            attempt()


def test_a_role_takes_at_once_and_never_gives(shared: Deployment, organization: str) -> None:
    """From every role to every other: what is left is what both the role and the key allowed."""
    for number, (old, new) in enumerate(product(members.ROLES, members.ROLES)):
        member = a_member(shared, organization, old, email=f"{number}@example.com")
        whole, least = own_key(shared, member), own_key(shared, member, "usage:read")
        device = device_key(shared, member)

        change_role(shared, member, new)

        left = set(shown(shared, whole.id).scopes)
        assert left == set(members.ROLES[old]) & set(members.ROLES[new])
        is_smaller = left != set(members.ROLES[old])
        assert (whats(shared, whole.id)[-1] == "api_key.narrowed") == is_smaller
        assert shown(shared, least.id) == least
        assert shown(shared, device.id) == device, "a device does what its product allows"


def test_an_api_key_that_the_new_role_leaves_nothing_is_revoked(
    shared: Deployment, organization: str
) -> None:
    """One with `*` keeps what the role names."""
    member = a_member(shared, organization)
    writer, operator = own_key(shared, member, "usage:write"), own_key(shared, member, OPERATOR)
    everything = own_key(shared, member)
    with shared.store.transaction() as tx:
        row = tx.api_key(everything.id)
        assert row is not None
        row.scopes = "*"
    api_keys.disable(shared.store, writer.id, TESTER, now=NOON)

    change_role(shared, member, "viewer")

    for one in (writer, operator):
        assert shown(shared, one.id).status == "revoked"
        assert whats(shared, one.id)[-1] == "api_key.revoked"
    assert shown(shared, everything.id).scopes == ("keys:read", "usage:read")


def test_a_rename_changes_no_api_key(shared: Deployment, organization: str) -> None:
    """And an edit of nothing is none."""
    member = a_member(shared, organization)
    own = own_key(shared, member)
    for _ in range(2):
        renamed = members.edit(
            shared.store, member.id, lambda one: replace(one, name="Ada L."), TESTER, now=NOON
        )

    assert (renamed.name, renamed.role) == ("Ada L.", "admin")
    assert whats(shared, member.id) == ["member.added", "member.edited"]
    assert shown(shared, own.id) == own


def test_the_last_admin_can_go(shared: Deployment, organization: str) -> None:
    """The admin API keys of the organization stay, and make the next one."""
    admin = bootstrap(shared, organization).admin
    last = a_member(shared, organization)

    change_role(shared, last, "viewer")
    members.remove(shared.store, last.id, TESTER, now=NOON)

    assert shown(shared, admin.api_key.id).status == "active"


# --- groups


def a_group(deployment: Deployment, **terms: object) -> GroupView:
    wanted = GroupTerms(**({"name": "Gold"} | terms))  # type: ignore[arg-type]
    return groups.create(deployment.store, deployment.catalog, wanted, TESTER, now=NOON)


def edit_group(deployment: Deployment, group: GroupView, **terms: object) -> GroupView:
    return groups.edit(
        deployment.store,
        deployment.catalog,
        group.id,
        lambda before: replace(before, **terms),  # type: ignore[arg-type]
        TESTER,
        now=NOON,
    )


def test_a_group_is_shown_as_it_was_made(shared: Deployment) -> None:
    """Prices in the units that people write."""
    made = a_group(
        shared,
        price_multiplier=1_250_000,
        models=("opus", "haiku"),
        requests_per_minute=60,
        tokens_per_minute=100_000,
    )

    assert made.to_json() == {
        "id": made.id,
        "name": "Gold",
        "priceMultiplier": 1.25,
        "models": ["opus", "haiku"],
        "requestsPerMinute": 60,
        "tokensPerMinute": 100_000,
        "createdAt": "2027-01-15T08:00:00Z",
    }
    assert groups.show(shared.store, made.id) == made
    assert made in groups.page(shared.store, limit=1000)[0]
    row = changes(shared, made.id)[0]
    assert (row.what, row.organization_id) == ("group.created", None)


BAD_GROUPS = {
    "no models": ({"models": ()}, "models", "leave it out"),
    "a model with a blank": ({"models": ("a b",)}, "models", "without blanks"),
    "models that no token holds": (
        {"models": tuple(f"{n:0100}" for n in range(15))},
        "models",
        "at most 1500",
    ),
    "no requests": ({"requests_per_minute": 0}, "requestsPerMinute", "null for any"),
    "requests beyond counting": (
        {"requests_per_minute": 10**30},
        "requestsPerMinute",
        "null for any",
    ),
    "fewer than no tokens": ({"tokens_per_minute": -1}, "tokensPerMinute", "from 1"),
}


@pytest.mark.parametrize(("terms", "field", "told"), BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_a_groups_terms_are_checked(
    shared: Deployment, terms: dict[str, object], field: str, told: str
) -> None:
    """When it is made and when it is edited alike."""
    made = a_group(shared)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: a_group(shared, **terms),
        lambda: edit_group(shared, made, **terms),
    )

    for attempt in attempts:
        with pytest.raises(Invalid, match=told) as refused:
            attempt()
        assert refused.value.field == field
    assert groups.show(shared.store, made.id) == made


def test_a_groups_models_are_the_catalogs(shared: Deployment) -> None:
    """As those of an API key are."""
    catalog = replace(shared.catalog, models=("opus", "haiku"))

    with pytest.raises(Invalid, match="opus, haiku"):
        groups.create(shared.store, catalog, GroupTerms("G", models=("o",)), TESTER, now=NOON)


TWO = {"models": ("a", "b")}
NARROWER = {
    "a list where all were": ({}, {"models": ("a",)}, True),
    "a model less": (TWO, {"models": ("b",)}, True),
    "another model instead": (TWO, {"models": ("a", "c")}, True),
    "a rate where none was": ({}, {"requests_per_minute": 5}, True),
    "a lower rate": ({"tokens_per_minute": 5}, {"tokens_per_minute": 4}, True),
    "one rate up, one down": (
        {"requests_per_minute": 5, "tokens_per_minute": 5},
        {"requests_per_minute": 4, "tokens_per_minute": 9},
        True,
    ),
    "all models again": (TWO, {"models": None}, False),
    "a model more": (TWO, {"models": ("c", "b", "a")}, False),
    "a higher rate": ({"requests_per_minute": 5}, {"requests_per_minute": 6}, False),
    "no rate any more": ({"requests_per_minute": 5}, {"requests_per_minute": None}, False),
    "a name": ({}, {"name": "Silver"}, False),
    "a price": ({}, {"price_multiplier": 9_000_000}, False),
}


@pytest.mark.parametrize(("before", "after", "narrows"), NARROWER.values(), ids=NARROWER)
def test_only_what_takes_away_kills_tokens(
    shared: Deployment, before: dict[str, object], after: dict[str, object], narrows: bool
) -> None:
    """A group is behind many tokens: a rename must not cost all of them an exchange."""
    made = a_group(shared, **before)

    for _ in range(2):
        edit_group(shared, made, **after)

    (row,) = changes(shared, made.id)[1:]
    assert (row.what, row.narrows) == ("group.narrowed" if narrows else "group.edited", narrows)


def test_a_group_with_api_keys_is_not_deleted(shared: Deployment, organization: str) -> None:
    """They would go on without price and models.  Disabled ones count: they can come back."""
    made = a_group(shared)
    own = [
        an_api_key(shared, NewApiKey(organization, "n", group_id=made.id)).api_key for _ in range(2)
    ]
    api_keys.disable(shared.store, own[0].id, TESTER, now=NOON)
    api_keys.revoke(shared.store, own[1].id, TESTER, now=NOON)

    with pytest.raises(Conflict, match="another group or revoke") as refused:
        groups.delete(shared.store, made.id, TESTER, now=NOON)
    assert refused.value.code == "group_in_use"

    api_keys.revoke(shared.store, own[0].id, TESTER, now=NOON)
    groups.delete(shared.store, made.id, TESTER, now=NOON)
    row = changes(shared, made.id)[-1]
    assert (row.what, row.narrows) == ("group.narrowed", True)
    assert made not in groups.page(shared.store, limit=1000)[0]
    attempts: tuple[Callable[[], object], ...] = (
        lambda: groups.show(shared.store, made.id),
        lambda: edit_group(shared, made, name="n"),
        lambda: groups.delete(shared.store, made.id, TESTER, now=NOON),
    )
    for attempt in attempts:
        with pytest.raises(NotFound, match="starts with grp_"):
            attempt()
    with pytest.raises(Invalid, match="group"):
        an_api_key(shared, NewApiKey(organization, "n", group_id=made.id))
