"""`coatcheck orgs …`: organizations, on the database that the settings name."""

from typing import TYPE_CHECKING, Annotated

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json, Yes

if TYPE_CHECKING:
    from coatcheck.server.manage.organizations import OrganizationView

app = typer.Typer(help="Create, list and suspend organizations.", no_args_is_help=True)

OrgId = Annotated[str, typer.Argument(metavar="ID", help="The organization's id, org_…")]


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="What it is called.")], json: Json = False
) -> None:
    """Create an organization."""
    from coatcheck.cli import local
    from coatcheck.server.manage import organizations

    with local.deployment() as here:
        _print(organizations.create(here.store, name, here.actor, now=here.now), json)


@app.command("list")
def list_all(json: Json = False) -> None:
    """List organizations, the oldest first."""
    from coatcheck.cli import local
    from coatcheck.server.manage import organizations

    with local.deployment() as here:
        told = [one.to_json() for one in organizations.list_organizations(here.store)]
    if json:
        output.document(told)
    else:
        rows = [[str(one[name]) for name in ("id", "name", "status", "createdAt")] for one in told]
        output.table(("ID", "NAME", "STATUS", "CREATED"), rows)


@app.command("suspend")
def suspend(org_id: OrgId, yes: Yes = False, json: Json = False) -> None:
    """Stop all of an organization's API keys and tokens until it is resumed."""
    from coatcheck.cli import local
    from coatcheck.server.manage import organizations

    output.confirm(yes, f"Suspend {org_id}? All of its API keys and tokens stop working.")
    with local.deployment() as here:
        _print(organizations.suspend(here.store, org_id, here.actor, now=here.now), json)


@app.command("resume")
def resume(org_id: OrgId, json: Json = False) -> None:
    """Let a suspended organization's API keys work again."""
    from coatcheck.cli import local
    from coatcheck.server.manage import organizations

    with local.deployment() as here:
        _print(organizations.resume(here.store, org_id, here.actor, now=here.now), json)


def _print(view: "OrganizationView", json: bool) -> None:
    if json:
        output.document(view.to_json())
    else:
        output.facts(view.to_json())
