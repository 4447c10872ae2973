"""What an API key may be: every input checked against the catalog and the organization's policy.

`checked` turns what somebody wants into what is stored; `warnings` says what is allowed and
seldom meant.  Nothing here reads or writes.

Source: RFC 6749 §3.3 (scope), RFC 8707 §2 (audience).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coatcheck import ids, token_profile
from coatcheck.client_address import Network, parse_network
from coatcheck.durations import told as span_told
from coatcheck.restrictions import Allowance, Rights
from coatcheck.restrictions.claims import claims_of
from coatcheck.scope import (
    EVERYTHING,
    ORGANIZATION_PERMISSIONS,
    RESOURCE_SERVER,
    Grant,
    MalformedScope,
    Scopes,
)
from coatcheck.server.catalog import Catalog, ResourceType
from coatcheck.server.manage import forms
from coatcheck.server.manage.errors import Invalid

STANDARD: Final = "standard"
DEVICE: Final = "device"
CONNECTOR: Final = "connector"
MEMBER: Final = "member"
#: More would not fit into a token anyway.
_MOST_WORDS: Final = 200
_MAX_MODEL_LENGTH: Final = 128
#: Characters of all models of a group together, as tokens write them.
MAX_GROUP_MODELS_LENGTH: Final = 1500
_LONGEST_OF_GROUP: Final = ("m" * (MAX_GROUP_MODELS_LENGTH - len('[""]')),)
_RESOURCE_SERVER: Final = Grant(RESOURCE_SERVER)
_WILDCARDS: Final = frozenset("#*")
#: A network this wide, or wider, is a whole provider or country.
_WIDE: Final[Mapping[int, int]] = {4: 8, 6: 20}


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """What an API key shall be; absent means unrestricted or the default.

    Attributes:
        scopes: scope-tokens; none: every action but the platform's own.
        audiences: none: the default audience of the environment.
        expires_at: seconds since the epoch; None: never.
        networks: addresses and networks it may be used from, or `*`; None: anywhere.
        permissions: a role's name, or how people call the permission that gives it.
        models: those it may name; None: all.
        credit_limit: in millionths; None: unlimited.
        created_by: whoever makes it.
    """

    organization_id: str
    name: str
    scopes: Sequence[str] = ()
    audiences: Sequence[str] = ()
    environment: str | None = None
    expires_at: int | None = None
    project_id: str | None = None
    networks: Sequence[str] | None = None
    permissions: str | None = None
    models: Sequence[str] | None = None
    group_id: str | None = None
    credit_limit: int | None = None
    kind: str = STANDARD
    member_id: str | None = None
    device: str | None = None
    created_by: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What the organization of an API key allows, within what the catalog does.

    Attributes:
        max_lifetime_s: from now; None: without end.
    """

    max_lifetime_s: int | None = None


@dataclass(frozen=True, slots=True)
class CheckedApiKey:
    """What is stored of an API key, but for its secret.  Made by `checked` only."""

    columns: dict[str, Any]
    """Of the table, but id, mask and times of its own."""
    rights: Rights
    warnings: tuple[str, ...]
    detail: dict[str, Any] = field(default_factory=dict)
    """What the change log says of it."""


def checked(
    catalog: Catalog, new: NewApiKey, policy: Policy, *, now: int, issuer: str
) -> CheckedApiKey:
    """Hold what somebody wants against the catalog and the policy.

    Args:
        now: seconds since the epoch.
        issuer: this deployment's URL, for the length of a full token.

    Raises:
        Invalid: which input breaks which rule.
    """
    name = forms.name(new.name)
    environment = _environment(catalog, new.environment)
    audiences = _audiences(catalog, new.audiences, environment)
    scopes = _scopes(catalog, new.scopes, audiences)
    networks = None if new.networks is None else _networks(new.networks)
    models = None if new.models is None else checked_models(catalog, new.models)
    rights = Rights(
        environment=environment,
        audiences=audiences,
        scopes=scopes,
        expires_at=_end(new.expires_at, policy, now),
        networks=networks,
        project_id=new.project_id,
        role=catalog.role(_role(catalog, new.permissions)),
        models=models,
        group_id=new.group_id,
    )
    _require_fit(catalog, rights, policy, new.organization_id, issuer)
    columns = {
        "organization_id": new.organization_id,
        "name": name,
        "environment": environment,
        "scopes": str(scopes),
        "audiences": " ".join(audiences),
        "expires_at": rights.expires_at,
        "project_id": new.project_id,
        "networks": None if networks is None else " ".join(map(str, networks)),
        "role": None if rights.role is None else rights.role.name,
        "models": None if models is None else " ".join(models),
        "group_id": new.group_id,
        "credit_limit": new.credit_limit,
        "kind": new.kind,
        "member_id": new.member_id,
        "device": new.device,
        "created_by": new.created_by,
    }
    told: dict[str, Any] = {"name": name, "scopes": str(scopes)}
    detail = told | {
        one: columns[one]
        for one in ("project_id", "networks", "role", "models", "group_id", "expires_at", "kind")
        if columns[one] not in (None, STANDARD)
    }
    return CheckedApiKey(columns, rights, warnings(new, rights), detail)


def warnings(new: NewApiKey, rights: Rights) -> tuple[str, ...]:
    """What is allowed and seldom meant, in sentences that say what to do instead."""
    found = []
    given = new.networks or ()
    if EVERYTHING in given:
        found.append("cidrs: * lets everybody in, as if there were no list: name your networks.")
    for one in rights.networks or ():
        if one.prefixlen == 0:
            found.append(f"cidrs: {one} lets everybody in who comes by IPv{one.version}.")
        elif one.prefixlen <= _WIDE[one.version] and not one.is_private:
            found.append(f"cidrs: {one} is very wide: name the networks you own.")
    versions = {one.version for one in rights.networks or ()}
    if len(versions) == 1:
        missing = 6 if 4 in versions else 4  # noqa: PLR2004 - of the Internet Protocol
        found.append(f"cidrs: nobody gets in who comes by IPv{missing}: add such a network, too.")
    if any(grant.action == EVERYTHING for grant in rights.scopes):
        found.append("scopes: * is everything: give what is needed and no more.")
    if any(grant.action in ("org:admin", "keys:write") for grant in rights.scopes):
        found.append("scopes: whoever has this API key can make others: keep it in a secret store.")
    if rights.expires_at is None and new.kind == STANDARD:
        found.append("expiresAt: it never ends: give it an end, and rotate before that.")
    return tuple(found)


# --- one rule each


def _environment(catalog: Catalog, environment: str | None) -> str:
    environment = environment or catalog.default_environment
    if environment not in catalog.environments:
        raise Invalid("env", f"is one of {', '.join(catalog.environments)}")
    return environment


def _end(expires_at: int | None, policy: Policy, now: int) -> int | None:
    if expires_at is not None and expires_at <= now:
        raise Invalid("expiresAt", "lies in the past")
    if policy.max_lifetime_s is not None:
        latest = now + policy.max_lifetime_s
        if expires_at is None or expires_at > latest:
            raise Invalid(
                "expiresAt",
                f"API keys live for {span_told(policy.max_lifetime_s)} at most here: name an end"
                f" until {forms.rfc3339(latest)}",
            )
    return expires_at


def _audiences(catalog: Catalog, given: Sequence[str], environment: str) -> tuple[str, ...]:
    audiences = tuple(dict.fromkeys(given)) or (catalog.default_audiences[environment],)
    for audience in audiences:
        known = catalog.audiences.get(audience)
        if known is None or known.environment not in (None, environment):
            fitting = ", ".join(
                one.id
                for one in catalog.audiences.values()
                if one.environment in (None, environment)
            )
            raise Invalid("audiences", f"each is one of: {fitting}")
    return audiences


def _scopes(catalog: Catalog, given: Sequence[str], audiences: tuple[str, ...]) -> Scopes:
    try:
        scopes = Scopes.of(given or (EVERYTHING,))
    except MalformedScope as error:
        raise Invalid("scopes", str(error)) from None
    if not scopes:
        raise Invalid("scopes", "must not be empty")
    for grant in scopes:
        _require_known(catalog, grant, audiences)
        if grant.filter is not None and catalog.permissions is not None:
            _require_shape(catalog, grant.filter)
    for audience in audiences:
        if not (catalog.vocabulary(audience).expand(scopes) or scopes.covers(_RESOURCE_SERVER)):
            raise Invalid("scopes", f"none of them means anything at the audience {audience}")
    return scopes


def _require_known(catalog: Catalog, grant: Grant, audiences: tuple[str, ...]) -> None:
    if grant == _RESOURCE_SERVER:
        # It means the same wherever the resource server is.
        return
    one = Scopes((grant,))
    if any(catalog.vocabulary(audience).expand(one) for audience in audiences):
        return
    if not catalog.knows(grant):
        named = [*catalog.named_scopes, *(catalog.permissions or ORGANIZATION_PERMISSIONS)]
        raise Invalid("scopes", f"one of them is unknown: each is one of {_list(named)}")
    raise Invalid(
        "scopes",
        f"{grant} means nothing at {', '.join(audiences)}: add the audience it is for, or leave it"
        " out",
    )


def _require_shape(catalog: Catalog, segments: tuple[str, ...]) -> None:
    """A filter is a row of resource types, each nested in the one before it."""
    if not catalog.resource_types:
        raise Invalid("scopes", "this catalog has no resource types: leave the part from @ out")
    outer: ResourceType | None = None
    left = list(segments)
    while left:
        kind = catalog.resource_types.get(left.pop(0))
        if kind is None:
            raise Invalid(
                "scopes", f"a filter names one of the types {_list(list(catalog.resource_types))}"
            )
        if outer is not None and outer.name not in kind.within:
            raise Invalid("scopes", f"{kind.name} is not nested in {outer.name}")
        shape = "/".join((kind.name, *(f"<{segment.name}>" for segment in kind.segments)))
        if len(left) < len(kind.segments):
            raise Invalid("scopes", f"the shape of {kind.name} is {shape}; # stands for any")
        for segment in kind.segments:
            value = left.pop(0)
            if segment.values and value not in _WILDCARDS and value not in segment.values:
                raise Invalid(
                    "scopes",
                    f"<{segment.name}> of {shape} is one of {_list(list(segment.values))}, or #",
                )
        outer = kind


def _networks(given: Sequence[str]) -> tuple[Network, ...] | None:
    if not given:
        raise Invalid("cidrs", "must not be empty: leave it out to let everybody in")
    if EVERYTHING in given:
        return None
    if len(given) > _MOST_WORDS:
        raise Invalid("cidrs", f"has at most {_MOST_WORDS} networks")
    networks = []
    for text in given:
        try:
            networks.append(parse_network(text.strip()))
        except ValueError:
            raise Invalid(
                "cidrs",
                "each is an address or a network in CIDR notation without host bits, such as"
                " 203.0.113.7, 198.51.100.0/24 or 2001:db8::/32",
            ) from None
    return tuple(dict.fromkeys(networks))


def checked_models(catalog: Catalog, given: Sequence[str]) -> tuple[str, ...]:
    """The models that somebody names, of an API key or a group.  Raises Invalid."""
    models = tuple(dict.fromkeys(given))
    if not models:
        raise Invalid("models", "must not be empty: leave it out to allow all")
    if len(models) > _MOST_WORDS:
        raise Invalid("models", f"has at most {_MOST_WORDS} models")
    for model in models:
        if not model.isascii() or not model.isprintable() or not model or " " in model:
            raise Invalid("models", "each is a name of printable ASCII without blanks")
        if len(model) > _MAX_MODEL_LENGTH:
            raise Invalid("models", f"a name has at most {_MAX_MODEL_LENGTH} characters")
        if catalog.models is not None and model not in catalog.models:
            raise Invalid("models", f"each is one of {_list(list(catalog.models))}")
    return models


def _role(catalog: Catalog, permissions: str | None) -> str | None:
    """The role that a permission gives, as people call either."""
    if permissions is None:
        return None
    for offer in catalog.roles.values():
        if permissions in (offer.permission, offer.role.name):
            return offer.role.name
    if not catalog.roles:
        raise Invalid("permissions", "this catalog has no roles: leave it out")
    known = [offer.permission for offer in catalog.roles.values()]
    raise Invalid("permissions", f"is one of {_list(known)}")


def _require_fit(
    catalog: Catalog, rights: Rights, policy: Policy, organization_id: str, issuer: str
) -> None:
    """The longest token that this API key can ask for has to fit into the profile.

    A group may name models at any time: there is room for the most that it can name.
    """
    models = rights.models
    if models is None and rights.group_id is not None:
        models = _LONGEST_OF_GROUP
    for audience in rights.audiences:
        allowance = Allowance(
            api_key_id=f"key_{'0' * ids.WIDTH}",
            organization_id=organization_id,
            environment=rights.environment,
            audiences=(audience,),
            scopes=catalog.vocabulary(audience).expand(rights.scopes),
            networks=rights.networks,
            project_id=rights.project_id,
            role=rights.role,
            models=models,
            group_id=rights.group_id,
        )
        try:
            token_profile.check(claims_of(issuer, allowance))
        except token_profile.UnfitClaims:
            longest = token_profile.MAX_TOKEN_BYTES
            raise Invalid(
                "scopes",
                f"a token with all of them, and all networks and models, would be longer than"
                f" {longest} bytes: give fewer, or split them over several API keys",
            ) from None


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"  # noqa: PLR2004
