"""Getting back in: a new admin key for operators who lost the one that `init` showed.

Whoever holds the database and the keys directory of a deployment owns it: they could write and
sign whatever they like.  So this asks for both, and is no page of the service.
"""

from dataclasses import dataclass
from typing import Final

from coatcheck.scope import ORGANIZATION_PERMISSIONS, Grant, Scopes
from coatcheck.server import sealing, signing
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor, Change, What
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.errors import Conflict
from coatcheck.server.settings import Settings
from coatcheck.server.setup import Initialized
from coatcheck.server.store import Store, Transaction
from coatcheck.server.store.pages import Filter, Position, Status
from coatcheck.server.store.tables import ApiKey

#: Who may do this administers an organization.
_ADMINISTERS: Final = Grant("org:admin")
#: A disabled one may be enabled again.
_WORKING: Final[tuple[Status, ...]] = ("active", "disabled")
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class Recovered:
    """A new admin key, and what became of those before.

    Attributes:
        made: as at the beginning: the only time that the key is shown.
        others: ids of the operator's other admin keys that worked until now.
        are_revoked: whether they do no longer.
    """

    made: Initialized
    others: tuple[str, ...]
    are_revoked: bool

    def to_json(self) -> dict[str, object]:
        return self.made.to_json() | {"revoked": list(self.others) if self.are_revoked else []}


def recover_admin(
    settings: Settings,
    catalog: Catalog,
    store: Store,
    actor: Actor,
    *,
    now: int,
    revoke_others: bool = False,
) -> Recovered:
    """Make an admin key of the operator's organization, as `init` did.

    Args:
        now: seconds since the epoch.
        revoke_others: end its other admin keys in the same step.

    Raises:
        BadSealingKey: the keys directory is not this deployment's.
        Conflict: there is no operator's organization.
        StoreUnavailable: the database did not answer.
    """
    keeper = signing.RingKeeper(store, sealing.load(settings.keys_dir))
    keeper.at(store.head()).require_open()
    with store.transaction() as tx:
        operators = [row for row in tx.organizations() if row.is_operator]
        if not operators:
            raise Conflict("this deployment has no operator's organization: run coatcheck db check")
        organization_id = operators[0].id
        others = _admin_keys(tx, organization_id, settings.management_audience, now)
        new = api_keys.NewApiKey(
            organization_id=organization_id,
            name="admin",
            scopes=ORGANIZATION_PERMISSIONS,
            audiences=(settings.management_audience,),
        )
        admin = api_keys.prepare(catalog, new, actor, now=now, issuer=settings.issuer)
        tx.add_api_keys([admin.api_key], [admin.secret])
        ids = [row.id for row in others]
        detail: dict[str, object] = {"apiKey": admin.id, "revoked": ids if revoke_others else []}
        changes = [
            admin.change,
            Change(
                What.ADMIN_RECOVERED, organization_id, actor, now, organization_id, detail=detail
            ),
        ]
        if revoke_others:
            for row in others:
                row.revoked_at = now
            changes += [
                Change(
                    What.API_KEY_REVOKED,
                    api_key_id,
                    actor,
                    now,
                    organization_id,
                    wider=organization_id,
                    detail={"by": "admin recover"},
                )
                for api_key_id in ids
            ]
        tx.append(changes)
    made = Initialized(settings.issuer, organization_id, admin.id, admin.key)
    return Recovered(made, tuple(ids), revoke_others)


def _admin_keys(tx: Transaction, organization_id: str, audience: str, now: int) -> list[ApiKey]:
    """The API keys of an organization that may administer it, revoked and expired ones aside."""
    found: list[ApiKey] = []
    for status in _WORKING:
        after: Position | None = None
        while True:
            rows, after = tx.api_keys_page(organization_id, Filter(status), now, after, _BATCH)
            found += [
                row
                for row in rows
                if audience in row.audiences.split(" ")
                and Scopes.parse(row.scopes).covers(_ADMINISTERS)
            ]
            if after is None:
                break
    return found
