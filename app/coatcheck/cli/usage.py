"""`coatcheck usage`, `events` and `whoami`: what was used, what happened, and who asks."""

from typing import Annotated, Final

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json
from coatcheck.cli.target import (
    All,
    Cursor,
    Limit,
    Org,
    Target,
    asked,
    command,
    given,
    listed,
)

usage = typer.Typer(help="Look at what was used.", no_args_is_help=True)
events = typer.Typer(help="Look at what happened.", no_args_is_help=True)


@usage.callback()
def _usage() -> None:
    """A group also while it has one command."""


@events.callback()
def _events() -> None:
    """A group also while it has one command."""


_COLUMNS: Final = {
    "AT": "at",
    "WHAT": "what",
    "SUBJECT": "subject",
    "ACTOR": "actor",
    "ADDRESS": "address",
    "DETAIL": "detail",
}


@command(usage, "show")
def show(target: Target, org: Org = None, json: Json = False) -> None:
    """Show what all API keys of an organization used together; of one: keys usage ID."""
    query = {"organization": org}
    output.thing(asked(target, "GET", "/usage", query=query).document, as_json=json)


@command(events, "list")
def list_events(
    target: Target,
    *,
    org: Org = None,
    platform: Annotated[
        bool, typer.Option("--platform", help="Those that concern no organization alone.")
    ] = False,
    subject: Annotated[
        str | None, typer.Option(help="Only of this API key, organization, …, by its id.")
    ] = None,
    what: Annotated[
        str | None, typer.Option(help="Only of this kind, such as api_key.revoked.")
    ] = None,
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    json: Json = False,
) -> None:
    """List what happened to what credentials may do, the newest first."""
    query = given(
        organization=org, scope="platform" if platform else None, subject=subject, what=what
    )
    at_most = None if all_of_them else limit
    found = listed(target, "/events", query, limit=at_most, cursor=cursor)
    output.things(found, _COLUMNS, as_json=json)


def whoami(target: Target, json: Json = False) -> None:
    """Say as whom a service knows this API key, and what it may do; without --server: this user."""
    told = asked(target, "GET", "/whoami").document
    api_key = told.get("key")
    if not json and isinstance(api_key, dict):
        told["key"] = f"{api_key.get('id')} {api_key.get('mask')} {api_key.get('name')}"
    output.thing(told, as_json=json)
