"""`coatcheck mcp …`: connect an AI client to the product's MCP server."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json
from coatcheck.cli.target import Org, Target, asked, command, given

app = typer.Typer(
    help="Connect AI clients to the product's MCP server.  Every command takes --json, and"
    " --server URL to ask a service instead of this machine's database.",
    no_args_is_help=True,
)

_COLUMNS: Final = {"CLIENT": "client", "NAME": "name", "SENDS HEADERS": "sendsHeaders"}


@command(app, "clients")
def clients(target: Target, json: Json = False) -> None:
    """List the clients that there are instructions for."""
    found = asked(target, "GET", "/mcp/clients").document["data"]
    output.things(found, _COLUMNS, as_json=json)


@command(app, "install")
def install(
    target: Target,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="As mcp clients lists it.")],
    *,
    name: Annotated[
        str | None, typer.Option(help="What its API key is called. None: the client's name.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs, for that name.")] = None,
    env: Annotated[str | None, typer.Option(help="The environment of its API key.")] = None,
    project: Annotated[str | None, typer.Option(help="The project of its API key, prj_…")] = None,
    org: Org = None,
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Take an API key that is good for it, where copies are kept."),
    ] = False,
    json: Json = False,
) -> None:
    """Make an API key for an AI client, and print what to type, click or paste, on stdout.

    Most of it holds the API key, which is shown this once.
    """
    body = given(
        client=client,
        name=name,
        device=device,
        env=env,
        project=project,
        organization=org,
        reuse=reuse or None,
    )
    made = asked(target, "POST", "/mcp/connections", body=body).document
    if json:
        output.document(made)
        return
    for step in made["steps"]:
        output.say(f"{output.plain(step['label'])}:")
        for line in step["text"].split("\n"):
            output.line(line)
    for note in made["notes"]:
        output.say(output.plain(note))
    api_key = made["key"]
    output.say(f"Its API key is {output.plain(api_key['id'])}: coatcheck keys revoke ends it.")
