"""`coatcheck projects …`: the parts of an organization that API keys may be bound to."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json, Yes
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
    help="Create, list, rename and archive projects.  Every command takes --json, and --server"
    " URL to ask a service instead of this machine's database.",
    no_args_is_help=True,
)

ProjectId = Annotated[str, typer.Argument(metavar="ID", help="The project's id, prj_…")]
Name = Annotated[str, typer.Option(help="What it is called.")]

_COLUMNS: Final = {
    "ID": "id",
    "NAME": "name",
    "STATUS": "status",
    "DEFAULT": "default",
    "ORGANIZATION": "organization",
    "CREATED": "createdAt",
}


@command(app, "create")
def create(target: Target, name: Name, org: Org = None, json: Json = False) -> None:
    """Create a project."""
    body = given(name=name, organization=org)
    output.thing(asked(target, "POST", "/projects", body=body).document, as_json=json)


@command(app, "list")
def list_all(
    target: Target,
    org: Org = None,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List an organization's projects, the oldest first."""
    at_most = None if all_of_them else limit
    found = listed(target, "/projects", {"organization": org}, limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


@command(app, "show")
def show(target: Target, project_id: ProjectId, json: Json = False) -> None:
    """Show one project."""
    path = at("/projects/{}", project_id)
    output.thing(asked(target, "GET", path).document, as_json=json)


@command(app, "rename")
def rename(target: Target, project_id: ProjectId, name: Name, json: Json = False) -> None:
    """Call a project otherwise; its id stays."""
    done = edited(target, at("/projects/{}", project_id), {"name": name})
    output.thing(done.document, as_json=json)


@command(app, "archive")
def archive(target: Target, project_id: ProjectId, yes: Yes = False, json: Json = False) -> None:
    """Stop a project's API keys and tokens until it is restored."""
    path = at("/projects/{}/archive", project_id)
    output.confirm(yes, f"Archive {project_id}? Its API keys and tokens stop working.")
    output.thing(asked(target, "POST", path).document, as_json=json)


@command(app, "restore")
def restore(target: Target, project_id: ProjectId, json: Json = False) -> None:
    """Let an archived project's API keys work again."""
    path = at("/projects/{}/restore", project_id)
    output.thing(asked(target, "POST", path).document, as_json=json)
