"""`/mcp`: connecting AI clients to the product's MCP server."""

from typing import Final

from pydantic import Field

from coatcheck.server.manage import connections
from coatcheck.server.manage.api.call import Call, Route
from coatcheck.server.manage.api.wire import Answer, Body, page
from coatcheck.server.manage.connections import NewConnection
from coatcheck.server.manage.mcp_clients import CLIENTS

_LONGEST_DEVICE: Final = 64


class NewConnectionBody(Body):
    """What `POST /mcp/connections` takes.

    Attributes:
        name: of the API key; left out: "Cursor on build-7".
        device: where the client runs, for that name.
        reuse: take an API key that is good for it already, where copies of secrets are kept.
    """

    client: str
    name: str | None = None
    device: str | None = Field(default=None, min_length=1, max_length=_LONGEST_DEVICE)
    env: str | None = None
    project: str | None = None
    organization: str | None = None
    reuse: bool = False


def connect(call: Call) -> Answer:
    body = call.body(NewConnectionBody)
    organization = call.organization(body.organization)
    call.require_bootstrapped(organization)
    wanted = NewConnection(
        organization_id=organization.id,
        client=body.client,
        name=body.name,
        device=body.device,
        environment=body.env,
        project_id=body.project or call.caller.project_id,
        reuse=body.reuse,
    )
    connection = connections.connect(
        call.store,
        call.catalog,
        wanted,
        call.caller,
        now=call.now,
        issuer=call.office.issuer,
        sealing_keys=call.office.sealing_keys,
        seal_with=call.office.seal_with,
    )
    headers = {}
    if connection.is_new:
        headers["Location"] = f"{call.office.issuer}/v1/keys/{connection.made.api_key.id}"
    return Answer(
        201 if connection.is_new else 200,
        connection.to_json(),
        headers,
        replayed=connection.without_secret(),
    )


def clients(call: Call) -> Answer:
    """The clients that there are instructions for."""
    told: list[dict[str, object]] = [
        {"client": slug, "name": client.name, "sendsHeaders": client.sends_headers}
        for slug, client in CLIENTS.items()
    ]
    return page(told, None, "")


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/mcp/clients", None, clients, writes=False, needs_bootstrap=False),
    Route("POST", "/mcp/connections", "keys:write", connect),
)
