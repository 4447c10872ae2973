"""Members: the people who manage an organization's API keys, and what each of them may.

A role is a set of permissions.  A member uses them by API keys of its own, which never have more
than the role: a smaller role takes from them at once, a larger one gives them nothing.

An organization may lose its last admin, by removal or by another role: its admin API keys go on,
and by one of them a new admin is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from coatcheck import ids
from coatcheck.scope import OPERATOR, ORGANIZATION_PERMISSIONS, Grant, Scopes
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_keys, forms
from coatcheck.server.manage.api_key_rules import MEMBER, NewApiKey
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.tables import ApiKey, Member

ADMIN: Final = "admin"
#: Role → what its members may do.
ROLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        ADMIN: ORGANIZATION_PERMISSIONS,
        "developer": ("keys:read", "keys:write", "usage:read"),
        "viewer": ("keys:read", "usage:read"),
    }
)
#: RFC 5321 §4.5.3.1.3, less the angle brackets.
_MAX_EMAIL_LENGTH: Final = 254


@dataclass(frozen=True, slots=True)
class MemberView:
    """A member as people and programs see it.  Times are seconds since the epoch."""

    id: str
    name: str
    email: str
    role: str
    organization_id: str
    created_at: int

    def to_json(self) -> dict[str, object]:
        """As the command line and the API write it."""
        return {
            "id": self.id,
            "name": self.name,
            "email": self.email,
            "role": self.role,
            "organization": self.organization_id,
            "createdAt": forms.rfc3339(self.created_at),
        }


@dataclass(frozen=True, slots=True)
class Editable:
    """What can be changed of a member."""

    name: str
    role: str


def add(
    store: Transactions,
    organization_id: str,
    name: str,
    email: str,
    role: str,
    actor: Actor,
    *,
    now: int,
    within: Scopes | None = None,
) -> MemberView:
    """A new member of an organization; it has no API key yet.

    Args:
        within: what whoever adds it may do; None: everything.

    Raises:
        Invalid: which input breaks which rule.
        Beyond: the role may more than `within`.
        Conflict: the organization has a member with this address.
        NotFound: there is no such organization.
    """
    row = Member(
        id=ids.new_id("mem", now * 1000),
        organization_id=organization_id,
        name=forms.name(name),
        email=_email(email),
        role=_role(role),
        created_at=now,
    )
    _require_within(row.role, within)
    with store.transaction() as tx:
        # Also the lock under which two that add the same address come one after the other.
        if tx.organization(organization_id) is None:
            raise NotFound("there is no organization of this id (an id starts with org_)")
        if tx.member_by_email(organization_id, row.email) is not None:
            raise Conflict(
                "the organization has a member with this address: change that one's role, or"
                " remove it first",
                "member_exists",
            )
        tx.add(row)
        tx.append([_change(What.MEMBER_ADDED, row, actor, now, name=row.name, role=row.role)])
        return view(row)


def page(
    store: Transactions, organization_id: str, *, after: str = "", limit: int
) -> tuple[list[MemberView], str | None]:
    """Members that were not removed, the oldest first, and where the next page begins."""
    with store.transaction(read_only=True) as tx:
        rows = tx.members(organization_id, after, limit + 1)
        following = rows[limit - 1].id if len(rows) > limit else None
        return [view(row) for row in rows[:limit]], following


def show(store: Transactions, member_id: str) -> MemberView:
    """One member.  Raises NotFound."""
    with store.transaction(read_only=True) as tx:
        return view(_existing(tx, member_id))


def edit(
    store: Transactions,
    member_id: str,
    change: Callable[[Editable], Editable],
    actor: Actor,
    *,
    now: int,
    within: Scopes | None = None,
) -> MemberView:
    """Change a member's name or role.

    Its own API keys lose what the new role does not allow; one that has nothing left is revoked.
    What a larger role adds, they do not get: make another one.

    Args:
        change: from what it is to what it shall be.
        within: what whoever edits may do; None: everything.

    Raises:
        Invalid: which input breaks which rule.
        Beyond: the role, as it is or as it shall be, may more than `within`.
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, member_id)
        before = Editable(row.name, row.role)
        after = change(before)
        for role in (before.role, _role(after.role)):
            _require_within(role, within)
        row.name, row.role = forms.name(after.name), after.role
        detail: dict[str, object] = {}
        if row.name != before.name:
            detail["name"] = [before.name, row.name]
        if row.role != before.role:
            detail["role"] = [before.role, row.role]
        if detail:
            changes = [_change(What.MEMBER_EDITED, row, actor, now, **detail)]
            if "role" in detail:
                changes += _narrow_api_keys(tx, row, actor, now)
            tx.append(changes)
        return view(row)


def remove(store: Transactions, member_id: str, actor: Actor, *, now: int) -> None:
    """End a membership: every API key of the member's own, for management or a device, is revoked.

    API keys that it made for others stay: what runs with them is not its own.

    Raises:
        NotFound: there is none of this id.
    """
    with store.transaction() as tx:
        row = _existing(tx, member_id)
        row.removed_at = now
        changes = [_change(What.MEMBER_REMOVED, row, actor, now, name=row.name)]
        own = tx.live_api_keys_of_member(row.organization_id, row.id)
        changes += [_revoke(api_key, actor, now) for api_key in own]
        tx.append(changes)


def own_api_key(member: Member, new: NewApiKey, catalog: Catalog) -> NewApiKey:
    """What an API key of a member's own is: for management only, and within its role.

    An admin's may name `coatcheck:operator`, too.  Whoever makes it has to be allowed to give
    that away, which `Bounds.require` says: it is the operator's own people, or the machine.

    Args:
        new: as it was asked for; scopes, if there are any, are fewer than the role's.

    Raises:
        Invalid: it asks for another use than management, or for more than the role may.
    """
    management, environment = catalog.management_audience, catalog.default_environment
    if new.audiences and tuple(new.audiences) != (management,):
        raise Invalid("audiences", f"a member's own API key is for {management}: leave it out")
    if new.environment not in (None, environment):
        raise Invalid("env", f"a member's own API key is of {environment}: leave it out")
    permissions = ROLES[member.role]
    possible = (*permissions, OPERATOR) if member.role == ADMIN else permissions
    if not set(new.scopes) <= set(possible):
        raise Invalid(
            "scopes",
            f"the API key of a member with the role {member.role} has some of"
            f" {', '.join(permissions)}: name no others, or leave it out for all of them",
        )
    return replace(
        new,
        kind=MEMBER,
        member_id=member.id,
        audiences=(management,),
        scopes=tuple(new.scopes) or permissions,
        environment=environment,
    )


def view(row: Member) -> MemberView:
    """What is shown of a row."""
    return MemberView(
        id=row.id,
        name=row.name,
        email=row.email,
        role=row.role,
        organization_id=row.organization_id,
        created_at=row.created_at,
    )


def _narrow_api_keys(tx: Transaction, member: Member, actor: Actor, now: int) -> list[Change]:
    """Take from a member's own API keys what its role does not allow."""
    # An admin of the operator's may have been given the platform's, which stays.
    platform = (OPERATOR,) if member.role == ADMIN else ()
    allowed = Scopes.of((*ROLES[member.role], *platform))
    changes = []
    for row in tx.live_api_keys_of_member(member.organization_id, member.id):
        scopes = Scopes.parse(row.scopes)
        if row.kind != MEMBER or not allowed.missing(scopes):
            continue
        # What both allow: the API key may say `*`, the role never does.
        left = " ".join(str(grant) for grant in allowed if scopes.covers(grant))
        if not left:
            changes.append(_revoke(row, actor, now))
            continue
        before, row.scopes = row.scopes, left
        what = What.API_KEY_NARROWED
        changes.append(api_keys.change_of(what, row, actor, now, scopes=[before, left]))
    return changes


def _revoke(row: ApiKey, actor: Actor, now: int) -> Change:
    row.revoked_at = now
    return api_keys.change_of(What.API_KEY_REVOKED, row, actor, now)


def _require_within(role: str, within: Scopes | None) -> None:
    if within is not None and not all(within.covers(Grant(one)) for one in ROLES[role]):
        raise Beyond(("member_role",))


def _role(role: str) -> str:
    if role not in ROLES:
        raise Invalid("role", f"is one of {', '.join(ROLES)}")
    return role


def _email(text: str) -> str:
    """An address in small letters, so that one person is one member however it is typed."""
    text = text.strip().lower()
    local, at, domain = text.partition("@")
    if not (local and at and domain) or "@" in domain:
        raise Invalid("email", "is an address such as ada@example.com")
    if len(text) > _MAX_EMAIL_LENGTH:
        raise Invalid("email", f"has at most {_MAX_EMAIL_LENGTH} characters")
    if " " in text or not text.isprintable():
        raise Invalid("email", "holds a blank or an invisible character: write it without")
    return text


def _change(what: What, row: Member, actor: Actor, now: int, **detail: object) -> Change:
    return Change(what, row.id, actor, now, row.organization_id, detail=detail)


def _existing(tx: Transaction, member_id: str) -> Member:
    row = tx.member(member_id)
    if row is None or row.removed_at is not None:
        raise NotFound("there is no member of this id (an id starts with mem_)")
    return row
