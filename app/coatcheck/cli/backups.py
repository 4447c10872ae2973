"""`coatcheck db backup`, `db restore` and `db new-log`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Json, Yes

if TYPE_CHECKING:
    from coatcheck.server.restore import NewLog

_SuspendAll = Annotated[
    bool,
    typer.Option(
        "--suspend-all",
        help="Disable every API key and replace every signing key: nothing revived by accident.",
    ),
]


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Take the place of a file that is there.")
    ] = False,
    json: Json = False,
) -> None:
    """Copy the database into a file while the service goes on.

    The sealing key is not in it: keep COATCHECK_KEYS_DIR apart from it.
    """
    from coatcheck.cli import local
    from coatcheck.server import restore as restoring

    with local.deployment() as here:
        saved = restoring.save(here.settings, here.store, file, force=force)
    output.say(
        f"The sealing key is not in it.  Keep a copy of {here.settings.keys_dir} in another place:"
        " without it the backup's signing keys cannot be opened, with it anybody can sign tokens."
    )
    if json:
        output.document(saved.to_json())
    else:
        output.facts(saved.to_json())


def restore(
    file: Annotated[Path, typer.Argument(help="What coatcheck db backup wrote.")],
    accept_loss_since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="If the replaced database is lost: the end of the backup, as it is told; what was"
            " revoked after it works again.",
        ),
    ] = None,
    suspend_all: _SuspendAll = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Put a backup in the place of the database.

    What was revoked since is read from the database that is replaced and stays revoked; if that
    one is lost, say what to do.  Every token that was issued before dies.
    """
    from coatcheck.cli import local
    from coatcheck.server import restore as restoring

    output.confirm(yes, f"Restore {file}?  What was made since is gone, and every token dies.")
    with local.deployment(initialized=False) as here:
        restored = restoring.restore(
            here.settings,
            file,
            here.actor,
            now=here.now,
            accept_loss_since=accept_loss_since,
            suspend_all=suspend_all,
        )
    told = restored.to_json()
    if restored.replaced is not None:
        output.say(f"The database that was replaced is kept: {restored.replaced}")
    if restored.lost_since is None:
        output.say("What was revoked, suspended or withdrawn since the backup stays so.")
    elif not suspend_all:
        output.say(
            f"NOT KNOWN: what was revoked after {told['lostSince']}.  It works again: revoke it"
            " anew.  A signing key that was withdrawn since is back, too:"
            " coatcheck signing-keys list"
        )
    _say_new_log(restored.new_log)
    output.say(
        "Organizations, API keys and signing keys that were made since the backup are gone."
        "  Running services need no restart."
    )
    if json:
        output.document(told)
    else:
        output.facts(told)


def new_log(suspend_all: _SuspendAll = False, yes: Yes = False, json: Json = False) -> None:
    """Start a new change log: after a failover with loss, or a restore by other means.

    Every token that was issued before dies, because nobody can know any more which of them were
    revoked.  API keys are what the database says: what was revoked and got lost works again,
    unless you say --suspend-all.
    """
    from coatcheck.cli import local
    from coatcheck.server import restore as restoring
    from coatcheck.server.manage.forms import rfc3339

    with local.deployment() as here:
        end = rfc3339(restoring.last_change_at(here.store))
        loss = (
            "Every API key is disabled, every signing key is replaced."
            if suspend_all
            else f"What was revoked after {end} and is not in this database works again; to be safe"
            " say --suspend-all."
        )
        output.confirm(yes, f"Start a new change log?  Every token dies.  {loss}")
        started = restoring.new_log(
            here.settings, here.store, here.actor, now=here.now, suspend_all=suspend_all
        )
    if not suspend_all:
        output.say(f"NOT KNOWN: what was revoked after {end} and is not in this database.")
    _say_new_log(started)
    if json:
        output.document(started.to_json())
    else:
        output.facts(started.to_json())


def _say_new_log(started: "NewLog") -> None:
    output.say("A new change log was started: every token that was issued before is dead.")
    if started.suspended:
        output.say(
            f"{started.suspended} API keys are disabled.  Enable what you have looked at:"
            " coatcheck keys enable ID"
        )
    if started.signing_keys:
        output.say(
            "New signing keys were made, because none before may sign:"
            f" {' '.join(started.signing_keys)}"
        )
