"""`coatcheck groups …`: pricing tiers, which set the price, models and rates of API keys."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes
from coatcheck.cli.target import (
    All,
    Cursor,
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
    words,
)

app = typer.Typer(
    help="Create, list, change and delete groups.  Every command takes --json, and --server URL"
    " to ask a service instead of this machine's database.",
    no_args_is_help=True,
)

GroupId = Annotated[str, typer.Argument(metavar="ID", help="The group's id, grp_…")]
Price = Annotated[
    str | None, typer.Option(help="What the plain price is multiplied by, such as 0.8.")
]
Models = Annotated[
    list[str] | None, typer.Option(help="A model it offers; may be repeated. None: all.")
]
Requests = Annotated[
    int | None, typer.Option(min=1, help="Requests per minute of each API key. None: no limit.")
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Model tokens per minute of each API key. None: no limit."),
]

_COLUMNS: Final = {
    "ID": "id",
    "NAME": "name",
    "PRICE": "priceMultiplier",
    "MODELS": "models",
    "REQUESTS/MIN": "requestsPerMinute",
    "TOKENS/MIN": "tokensPerMinute",
}


@command(app, "create")
def create(
    target: Target,
    name: Annotated[str, typer.Option(help="What it is called.")],
    price_multiplier: Price = None,
    model: Models = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    json: Json = False,
) -> None:
    """Create a group."""
    body = given(
        name=name,
        priceMultiplier=amount("price-multiplier", price_multiplier),
        models=words("model", model),
        requestsPerMinute=requests_per_minute,
        tokensPerMinute=tokens_per_minute,
    )
    output.thing(asked(target, "POST", "/groups", body=body).document, as_json=json)


@command(app, "list")
def list_all(
    target: Target,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List groups, the oldest first."""
    at_most = None if all_of_them else limit
    found = listed(target, "/groups", limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


@command(app, "show")
def show(target: Target, group_id: GroupId, json: Json = False) -> None:
    """Show one group."""
    output.thing(asked(target, "GET", at("/groups/{}", group_id)).document, as_json=json)


@command(app, "edit")
def edit(
    target: Target,
    group_id: GroupId,
    *,
    name: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    price_multiplier: Price = None,
    model: Models = None,
    no_models: Annotated[bool, typer.Option("--no-models", help="Every model.")] = False,
    requests_per_minute: Requests = None,
    no_requests_per_minute: Annotated[
        bool, typer.Option("--no-requests-per-minute", help="No such limit.")
    ] = False,
    tokens_per_minute: Tokens = None,
    no_tokens_per_minute: Annotated[
        bool, typer.Option("--no-tokens-per-minute", help="No such limit.")
    ] = False,
    json: Json = False,
) -> None:
    """Change a group; what is not named stays.  Fewer models hold for tokens at once."""
    body = given(
        name=name,
        priceMultiplier=amount("price-multiplier", price_multiplier),
        models=or_none("model", words("model", model), no_models),
        requestsPerMinute=or_none(
            "requests-per-minute", requests_per_minute, no_requests_per_minute
        ),
        tokensPerMinute=or_none("tokens-per-minute", tokens_per_minute, no_tokens_per_minute),
    )
    if not body:
        output.fail(Exit.USAGE, "nothing to change: say what, such as --name")
    output.thing(edited(target, at("/groups/{}", group_id), body).document, as_json=json)


@command(app, "delete")
def delete(target: Target, group_id: GroupId, yes: Yes = False, json: Json = False) -> None:
    """Delete a group that no API key is in."""
    path = at("/groups/{}", group_id)
    output.confirm(yes, f"Delete {group_id}?")
    asked(target, "DELETE", path)
    output.thing({"id": group_id, "deleted": True}, as_json=json)
