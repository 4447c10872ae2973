"""`coatcheck devices …`: the API keys that members have on their devices, made at sign-in."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes
from coatcheck.cli.target import (
    All,
    Cursor,
    Limit,
    Target,
    asked,
    at,
    command,
    listed,
)

app = typer.Typer(
    help="List devices and sign them out.  Every command takes --json, and --server URL to ask a"
    " service instead of this machine's database.",
    no_args_is_help=True,
)

_COLUMNS: Final = {
    "ID": "id",
    "NAME": "name",
    "DEVICE": "device",
    "STATUS": "status",
    "KEY": "mask",
    "CREATED": "createdAt",
    "LAST USED": "lastUsedAt",
}


@command(app, "list")
def list_all(
    target: Target,
    member: Annotated[
        str | None, typer.Option(help="Whose, mem_…; may be left out with a member's own API key.")
    ] = None,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List a member's devices."""
    at_most = None if all_of_them else limit
    found = listed(target, "/devices", {"member": member}, limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


@command(app, "revoke")
def revoke(
    target: Target,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The device key's id, key_…")],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Sign a device out: its API key never works again; the next sign-in makes another."""
    before = asked(target, "GET", at("/keys/{}", key_id)).document
    if before["kind"] != "device":
        output.fail(Exit.NOT_FOUND, f"{key_id} is no device's: coatcheck keys revoke ends it")
    output.confirm(yes, f"Sign out {output.plain(before['name'])}?")
    path = at("/keys/{}/revoke", key_id)
    output.thing(asked(target, "POST", path).document, as_json=json)
