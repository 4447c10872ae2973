"""What narrows an API key and its tokens.  One file each; this tuple is the whole list.

Order matters to whoever reads a refusal: the audience comes before the scopes, which belong to
it.  The end of an API key is no restriction of an ask: `token_profile` bounds every token's life
by it, whatever was asked.
"""

from typing import Final

from coatcheck.restrictions.audience import AudienceRestriction
from coatcheck.restrictions.base import (
    Allowance,
    Ask,
    Reason,
    Refusal,
    Refuse,
    Restriction,
    Rights,
    Role,
    Situation,
    in_numbered_steps,
)
from coatcheck.restrictions.environment import EnvironmentRestriction
from coatcheck.restrictions.group import GroupRestriction
from coatcheck.restrictions.models import ModelRestriction
from coatcheck.restrictions.network import NetworkRestriction
from coatcheck.restrictions.project import ProjectRestriction
from coatcheck.restrictions.resource import ResourceRestriction
from coatcheck.restrictions.role import RoleRestriction
from coatcheck.restrictions.scope import ScopeRestriction

RESTRICTIONS: Final[tuple[Restriction, ...]] = (
    NetworkRestriction(),
    EnvironmentRestriction(),
    AudienceRestriction(),
    ScopeRestriction(),
    ResourceRestriction(),
    ProjectRestriction(),
    RoleRestriction(),
    ModelRestriction(),
    GroupRestriction(),
)

#: What a token's `must` claim may name.  A verifier refuses any other name.
KNOWN: Final = frozenset(restriction.name for restriction in RESTRICTIONS)

__all__ = [
    "KNOWN",
    "RESTRICTIONS",
    "Allowance",
    "Ask",
    "Reason",
    "Refusal",
    "Refuse",
    "Restriction",
    "Rights",
    "Role",
    "Situation",
    "in_numbered_steps",
]
