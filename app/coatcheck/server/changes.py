"""The change log: what happened to what a credential may do, in one order.

Every change is one row, written in the transaction that makes the change.  The sequence number
of a row is the only version number of the product: tokens carry the number up to which their
issuer had read (`as_of`), and a token is dead once one of its subjects was narrowed later.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from coatcheck import base62

#: The subject of a change that concerns every token.
EVERYTHING: Final = "*"


class What(Enum):
    """What happened.  The second member says whether tokens issued before are now too wide."""

    ORGANIZATION_CREATED = ("organization.created", False)
    ORGANIZATION_SUSPENDED = ("organization.suspended", True)
    ORGANIZATION_RESUMED = ("organization.resumed", False)
    ORGANIZATION_BOOTSTRAPPED = ("organization.bootstrapped", False)
    ORGANIZATION_EDITED = ("organization.edited", False)
    ORGANIZATION_SPENT = ("organization.spent", True)
    PROJECT_CREATED = ("project.created", False)
    PROJECT_EDITED = ("project.edited", False)
    PROJECT_ARCHIVED = ("project.archived", True)
    PROJECT_RESTORED = ("project.restored", False)
    MEMBER_ADDED = ("member.added", False)
    MEMBER_EDITED = ("member.edited", False)
    MEMBER_REMOVED = ("member.removed", False)
    GROUP_CREATED = ("group.created", False)
    GROUP_EDITED = ("group.edited", False)
    GROUP_NARROWED = ("group.narrowed", True)
    API_KEY_CREATED = ("api_key.created", False)
    API_KEY_DISABLED = ("api_key.disabled", True)
    API_KEY_ENABLED = ("api_key.enabled", False)
    API_KEY_REVOKED = ("api_key.revoked", True)
    API_KEY_ROTATED = ("api_key.rotated", False)
    API_KEY_OVERLAP_ENDED = ("api_key.overlap_ended", True)
    API_KEY_EDITED = ("api_key.edited", False)
    API_KEY_NARROWED = ("api_key.narrowed", True)
    API_KEY_DELETED = ("api_key.deleted", True)
    API_KEY_REVEALED = ("api_key.revealed", False)
    USE_FROM_WRONG_ADDRESS = ("use.from_wrong_address", False)
    CREDIT_LOW = ("credit.low", False)
    TOKEN_REVOKED = ("token.revoked", True)
    SIGNING_KEY_CREATED = ("signing_key.created", False)
    SIGNING_KEY_WITHDRAWN = ("signing_key.withdrawn", True)
    SIGNING_KEY_EXPORTED = ("signing_key.exported", False)
    SIGNING_KEYS_RESEALED = ("signing_key.resealed", False)
    CATALOG_CHANGED = ("catalog.changed", True)
    LOG_RESTARTED = ("log.restarted", True)
    ADMIN_RECOVERED = ("admin.recovered", False)

    def __init__(self, text: str, narrows: bool) -> None:
        self.text = text
        self.narrows = narrows


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change, and from where.

    Attributes:
        id: `cli:<user>`, `service:<part>`, or the id of an API key.
        address: the caller's address; None where there is none.
        request_id: ties the row to a log line.
    """

    id: str
    address: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change, before it has a sequence number.

    Attributes:
        subject: the id of the API key, organization, signing key or token it concerns.
        wider: the subject next above it, which stands for it once there are too many of them: a
            token's API key, an API key's organization.
        at: seconds since the epoch.
        change_id: unique; a write that is repeated after an unknown outcome says the same one,
            so that there is never a second row.
    """

    what: What
    subject: str
    actor: Actor
    at: int
    organization_id: str | None = None
    detail: dict[str, object] = field(default_factory=dict)
    change_id: str = field(default_factory=lambda: base62.random_text(22))
    wider: str = EVERYTHING
