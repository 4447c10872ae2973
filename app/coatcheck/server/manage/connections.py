"""Connections of AI clients to the product's MCP server: a narrow API key, and what to do with it.

Each gets an API key of its own, named after client and device, for ninety days and with the
scopes that the catalog gives to agents: whoever ends one connection ends no other.  A client that
sends headers gets an ordinary API key, one that takes nothing but a URL a connector key.

The API key lies within whoever asks for it, on every axis; restrictions are passed on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from coatcheck.scope import Scopes
from coatcheck.server.catalog import Catalog, Connector
from coatcheck.server.manage import api_keys, forms
from coatcheck.server.manage.api_key_rules import CONNECTOR, STANDARD, NewApiKey
from coatcheck.server.manage.api_keys import Created, SealWith
from coatcheck.server.manage.authority import ORG_ADMIN, Bounds, Caller, rights_of
from coatcheck.server.manage.devices import earliest, inheriting, latest_end
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.manage.mcp_clients import CLIENTS, Step
from coatcheck.server.sealing import SealingKeys
from coatcheck.server.store import Transaction, Transactions
from coatcheck.server.store.pages import Filter
from coatcheck.server.store.tables import ApiKey

#: How long an agent's API key lives, in seconds, unless it has to end before.
LIFETIME: Final = 90 * 24 * 3600
#: API keys that are looked at for one that can be used again, the newest first.
_MOST_LOOKED_AT: Final = 100


@dataclass(frozen=True, slots=True)
class NewConnection:
    """What somebody wants to connect.

    Attributes:
        client: one of `mcp_clients.CLIENTS`.
        name: of the API key; None: the client's and the device's.
        device: where the client runs, for people.
        environment: None: the caller's own, or the MCP server's.
        reuse: whether an API key that is good for it already will do.
    """

    organization_id: str
    client: str
    name: str | None = None
    device: str | None = None
    environment: str | None = None
    project_id: str | None = None
    reuse: bool = False


@dataclass(frozen=True, slots=True)
class Connection:
    """What connects a client.

    Attributes:
        made: its API key, and the secret.
        steps: what to type, click or paste; they hold the secret.
        is_new: whether the API key was made for it.
    """

    client: str
    made: Created
    steps: tuple[Step, ...] = field(repr=False)
    notes: tuple[str, ...]
    is_new: bool

    def to_json(self) -> dict[str, object]:
        """As the API and the command line write it."""
        return {
            "client": self.client,
            "key": self.made.to_json(),
            "expiresAt": forms.rfc3339(self.made.api_key.expires_at),
            "steps": [step.to_json() for step in self.steps],
            "notes": list(self.notes),
        }

    def without_secret(self) -> dict[str, object]:
        """The same for who asks again."""
        return self.to_json() | {"key": self.made.to_json() | {"key": None}, "steps": None}


def connect(
    store: Transactions,
    catalog: Catalog,
    wanted: NewConnection,
    caller: Caller,
    *,
    now: int,
    issuer: str,
    sealing_keys: Callable[[], SealingKeys],
    seal_with: SealWith | None = None,
) -> Connection:
    """An API key for a client, and what to do with it.

    Args:
        now: seconds since the epoch.
        sealing_keys: those at hand, for a secret that is shown again.
        seal_with: the one for an organization that keeps copies of its secrets.

    Raises:
        Conflict: the catalog names no MCP server.
        Invalid: which input breaks which rule.
        Beyond: the API key would be good for more than the caller.
        NotFound: there is no such organization.
    """
    connector = _connector(catalog)
    client = CLIENTS.get(wanted.client)
    if client is None:
        raise Invalid("client", f"is one of {', '.join(CLIENTS)}")
    environment = _environment(catalog, connector, wanted.environment, caller.bounds)
    with store.transaction() as tx:
        organization = tx.organization(wanted.organization_id)
        if organization is None:
            raise NotFound("there is no organization of this id (an id starts with org_)")
        new = inheriting(
            NewApiKey(
                organization_id=organization.id,
                name=_name(client.name, wanted),
                scopes=tuple(map(str, connector.scopes)),
                audiences=(connector.audience,),
                environment=environment,
                expires_at=earliest(now + LIFETIME, latest_end(catalog, organization, now)),
                project_id=wanted.project_id,
                kind=STANDARD if client.sends_headers else CONNECTOR,
                created_by=caller.actor.id,
            ),
            caller.bounds,
        )
        usable = None
        if wanted.reuse and client.sends_headers and organization.recoverable:
            usable = _usable(tx, catalog, connector, new, caller, now)
        if usable is not None:
            made = api_keys.reveal(
                tx,
                usable.id,
                caller.actor,
                sealing_keys(),
                now=now,
                catalog=catalog,
                within=caller.bounds,
            )
        else:
            made = api_keys.create(
                tx,
                catalog,
                new,
                caller.actor,
                now=now,
                issuer=issuer,
                within=caller.bounds,
                seal_with=seal_with,
            )
        return Connection(
            wanted.client,
            made,
            client.steps(connector.name, connector.url, made.key),
            (*client.notes, *_notes(made)),
            is_new=usable is None,
        )


def _connector(catalog: Catalog) -> Connector:
    if catalog.connector is None:
        raise Conflict(
            "there is no MCP server to connect to: the catalog names none.  The operator writes"
            ' [mcp] with name = "...", url = "https://..." and scopes = ["..."] into it',
            "no_mcp_server",
        )
    return catalog.connector


def _environment(
    catalog: Catalog, connector: Connector, asked: str | None, bounds: Bounds | None
) -> str:
    """The asked one; else the caller's own, if it can make API keys for no other; else the MCP
    server's."""
    of_server = catalog.audiences[connector.audience].environment
    environment = asked
    if environment is None and bounds is not None and not bounds.any_environment:
        environment = bounds.rights.environment
    environment = environment or of_server or catalog.default_environment
    if of_server not in (None, environment):
        raise Invalid("env", f"is {of_server}: the MCP server belongs to it")
    return environment


def _name(client: str, wanted: NewConnection) -> str:
    if wanted.name is not None:
        return wanted.name
    if wanted.device is None:
        return client
    name = f"{client} on {wanted.device.strip()}"
    try:
        return forms.name(name)
    except Invalid as error:
        raise Invalid("device", error.message) from None


def _usable(
    tx: Transaction,
    catalog: Catalog,
    connector: Connector,
    new: NewApiKey,
    caller: Caller,
    now: int,
) -> ApiKey | None:
    """The newest ordinary API key that is good for the MCP server, and may be shown again."""
    filters = Filter(
        kind=STANDARD,
        project_id=new.project_id,
        environment=new.environment,
        newest_first=True,
    )
    rows, _ = tx.api_keys_page(new.organization_id, filters, now, None, _MOST_LOOKED_AT)
    fitting = (
        row
        for row in rows
        if row.project_id == new.project_id
        and _is_good_for(row, connector, catalog)
        and _may_see(row, caller, catalog)
    )
    return next(_with_copy(tx, fitting), None)


def _is_good_for(row: ApiKey, connector: Connector, catalog: Catalog) -> bool:
    audiences, scopes = row.audiences.split(" "), Scopes.parse(row.scopes)
    if catalog.management_audience in audiences or scopes.has_platform_permission:
        # What manages API keys is not for an agent.
        return False
    meaning = catalog.vocabulary(connector.audience)
    return connector.audience in audiences and not meaning.expand(scopes).missing(
        meaning.expand(connector.scopes)
    )


def _may_see(row: ApiKey, caller: Caller, catalog: Catalog) -> bool:
    """Whether the caller may be shown the secret: its maker, or who administers all of them."""
    if not (caller.is_local or caller.may(ORG_ADMIN) or row.created_by == caller.actor.id):
        return False
    try:
        if caller.bounds is not None:
            caller.bounds.require(rights_of(row, catalog), catalog, row.credit_limit)
    except Beyond:
        return False
    return True


def _with_copy(tx: Transaction, rows: Iterator[ApiKey]) -> Iterator[ApiKey]:
    """Those of which a copy of the current secret is kept."""
    for row in rows:
        if any(one.sealed is not None and one.expires_at is None for one in tx.secrets(row.id)):
            yield row


def _notes(made: Created) -> Iterator[str]:
    """What the API key's own restrictions mean for its client."""
    api_key = made.api_key
    if api_key.networks is not None:
        yield f"The API key works from these addresses only: {', '.join(api_key.networks)}."
    if api_key.expires_at is not None:
        yield f"The API key ends at {forms.rfc3339(api_key.expires_at)}: connect again before."
