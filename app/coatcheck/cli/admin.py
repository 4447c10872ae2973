"""`coatcheck admin …`: for whoever owns the machine."""

from typing import Annotated

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json, Yes

app = typer.Typer(help="Get back in, on the machine itself.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group also while it has one command."""


@app.command("recover")
def recover(
    revoke_others: Annotated[
        bool,
        typer.Option("--revoke-others", help="End the operator's other admin keys, for ever."),
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Make a new admin key of the operator's organization, if the last one was lost.

    It needs the database and the sealing key, so it works on the machine only.
    """
    from coatcheck.cli import local
    from coatcheck.server import recovery

    if revoke_others:
        output.confirm(yes, "Revoke the operator's other admin keys?  What uses them stops.")
    with local.deployment() as here:
        made = recovery.recover_admin(
            here.settings,
            here.catalog,
            here.store,
            here.actor,
            now=here.now,
            revoke_others=revoke_others,
        )
    if json:
        output.document(made.to_json())
    else:
        output.facts(made.to_json())
    output.say(
        "This is an admin key of the operator's organization: keep it now, it is not shown again."
        f"  The change log says that {here.actor.id} made it."
    )
    if made.others and not revoke_others:
        output.say(
            f"{len(made.others)} other admin keys go on working: {' '.join(made.others)}.  If one"
            " may be in wrong hands: coatcheck keys revoke ID"
        )
