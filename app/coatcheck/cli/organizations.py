"""`coatcheck orgs …`: organizations, on this machine's database or by a service's `/v1`."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes
from coatcheck.cli.target import (
    All,
    Cursor,
    Document,
    Limit,
    Target,
    amount,
    asked,
    at,
    command,
    edited,
    given,
    listed,
    or_none,
)

app = typer.Typer(
    help="Create, list, change and suspend organizations.  Every command takes --json, and"
    " --server URL to ask a service instead of this machine's database.",
    no_args_is_help=True,
)

OrgId = Annotated[str, typer.Argument(metavar="ID", help="The organization's id, org_…")]

_COLUMNS: Final = {"ID": "id", "NAME": "name", "STATUS": "status", "CREATED": "createdAt"}


@command(app, "create")
def create(
    target: Target,
    name: Annotated[str, typer.Option(help="What it is called.")],
    bootstrap: Annotated[
        bool, typer.Option("--bootstrap", help="Switch its key management on at once.")
    ] = False,
    json: Json = False,
) -> None:
    """Create an organization."""
    body = {"name": name, "bootstrap": bootstrap}
    made = asked(target, "POST", "/organizations", body=body).document
    if bootstrap:
        _show_admin(made, json)
    else:
        output.thing(made, as_json=json)


@command(app, "list")
def list_all(
    target: Target,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List organizations, the oldest first."""
    at_most = None if all_of_them else limit
    found = listed(target, "/organizations", limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


@command(app, "show")
def show(target: Target, org_id: OrgId, json: Json = False) -> None:
    """Show one organization."""
    path = at("/organizations/{}", org_id)
    output.thing(asked(target, "GET", path).document, as_json=json)


@command(app, "edit")
def edit(
    target: Target,
    org_id: OrgId,
    *,
    name: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    recoverable: Annotated[
        bool | None,
        typer.Option(help="Keep sealed copies of its secrets, so that they can be shown again."),
    ] = None,
    max_lifetime: Annotated[
        str | None, typer.Option(help="How long its new API keys may live at most, such as 90d.")
    ] = None,
    no_max_lifetime: Annotated[
        bool, typer.Option("--no-max-lifetime", help="As long as the catalog lets them.")
    ] = False,
    credit_limit: Annotated[
        str | None, typer.Option(help="How many credits all of its API keys may use together.")
    ] = None,
    no_credit_limit: Annotated[
        bool, typer.Option("--no-credit-limit", help="As many as they like.")
    ] = False,
    low_credit: Annotated[
        str | None, typer.Option(help="What is left of its credits when its owners are told.")
    ] = None,
    no_low_credit: Annotated[
        bool, typer.Option("--no-low-credit", help="They are not told.")
    ] = False,
    json: Json = False,
) -> None:
    """Change an organization; what is not named stays."""
    body = given(
        name=name,
        recoverable=recoverable,
        maxLifetime=or_none("max-lifetime", max_lifetime, no_max_lifetime),
        creditLimit=or_none("credit-limit", amount("credit-limit", credit_limit), no_credit_limit),
        lowCredit=or_none("low-credit", amount("low-credit", low_credit), no_low_credit),
    )
    if not body:
        output.fail(Exit.USAGE, "nothing to change: say what, such as --name")
    done = edited(target, at("/organizations/{}", org_id), body)
    output.thing(done.document, as_json=json)


@command(app, "bootstrap")
def bootstrap_one(target: Target, org_id: OrgId, json: Json = False) -> None:
    """Switch an organization's key management on: its first project and admin key, shown once."""
    _show_admin(asked(target, "POST", at("/organizations/{}/bootstrap", org_id)).document, json)


@command(app, "suspend")
def suspend(target: Target, org_id: OrgId, yes: Yes = False, json: Json = False) -> None:
    """Stop all of an organization's API keys and tokens until it is resumed."""
    path = at("/organizations/{}/suspend", org_id)
    output.confirm(yes, f"Suspend {org_id}? All of its API keys and tokens stop working.")
    output.thing(asked(target, "POST", path).document, as_json=json)


@command(app, "resume")
def resume(target: Target, org_id: OrgId, json: Json = False) -> None:
    """Let a suspended organization's API keys work again."""
    path = at("/organizations/{}/resume", org_id)
    output.thing(asked(target, "POST", path).document, as_json=json)


def _show_admin(made: Document, json: bool) -> None:
    """What bootstrapping made, with the one secret that is shown."""
    if json:
        output.document(made)
        return
    admin = made["key"]
    output.facts(
        {
            "organization": made["organization"]["id"],
            "project": made["project"]["id"],
            "keyId": admin["id"],
            "key": admin["key"],
        }
    )
    output.say("This is its admin key: keep it now, it is not shown again.")
