"""`coatcheck members …`: the people of an organization, and their roles."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes
from coatcheck.cli.target import (
    All,
    Cursor,
    Limit,
    Org,
    Target,
    asked,
    at,
    command,
    edited,
    given,
    listed,
)

app = typer.Typer(
    help="Add, list, change and remove members.  Every command takes --json, and --server URL to"
    " ask a service instead of this machine's database.",
    no_args_is_help=True,
)

MemberId = Annotated[str, typer.Argument(metavar="ID", help="The member's id, mem_…")]

_COLUMNS: Final = {
    "ID": "id",
    "NAME": "name",
    "EMAIL": "email",
    "ROLE": "role",
    "ORGANIZATION": "organization",
    "CREATED": "createdAt",
}


@command(app, "add")
def add(
    target: Target,
    name: Annotated[str, typer.Option(help="What people call them.")],
    email: Annotated[str, typer.Option(help="Their address: one member each.")],
    role: Annotated[str, typer.Option(help="admin, developer or viewer.")],
    org: Org = None,
    json: Json = False,
) -> None:
    """Add a member.  An API key of their own: coatcheck keys create --member ID."""
    body = given(name=name, email=email, role=role, organization=org)
    output.thing(asked(target, "POST", "/members", body=body).document, as_json=json)


@command(app, "list")
def list_all(
    target: Target,
    org: Org = None,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List an organization's members, the oldest first."""
    at_most = None if all_of_them else limit
    found = listed(target, "/members", {"organization": org}, limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


@command(app, "show")
def show(target: Target, member_id: MemberId, json: Json = False) -> None:
    """Show one member."""
    output.thing(asked(target, "GET", at("/members/{}", member_id)).document, as_json=json)


@command(app, "edit")
def edit(
    target: Target,
    member_id: MemberId,
    name: Annotated[str | None, typer.Option(help="What people call them.")] = None,
    role: Annotated[str | None, typer.Option(help="admin, developer or viewer.")] = None,
    json: Json = False,
) -> None:
    """Change a member's name or role; a smaller role takes from their API keys at once."""
    body = given(name=name, role=role)
    if not body:
        output.fail(Exit.USAGE, "nothing to change: say --name or --role")
    done = edited(target, at("/members/{}", member_id), body)
    output.thing(done.document, as_json=json)


@command(app, "remove")
def remove(target: Target, member_id: MemberId, yes: Yes = False, json: Json = False) -> None:
    """End a membership, and with it every API key of the member's own."""
    path = at("/members/{}", member_id)
    output.confirm(yes, f"Remove {member_id}? Their own API keys and devices stop working.")
    asked(target, "DELETE", path)
    output.thing({"id": member_id, "removed": True}, as_json=json)
