"""`coatcheck init`, `serve`, `doctor` and `db …`: running a deployment."""

import gc
from typing import Annotated

import typer

from coatcheck.cli import GC_THRESHOLD, output
from coatcheck.cli.output import Exit, Json

db = typer.Typer(help="Look after the database's schema.", no_args_is_help=True)


def init(
    org_name: Annotated[
        str, typer.Option("--org-name", help="The first organization: yours, the operator's.")
    ] = "Operator",
    json: Json = False,
) -> None:
    """Set up database, sealing key, signing keys, and the first organization with its admin key.

    A second time it changes nothing and exits 5.
    """
    from coatcheck.cli import local
    from coatcheck.server import setup

    with local.deployment(initialized=False) as here:
        made = setup.initialize(
            here.settings,
            here.catalog,
            here.store,
            here.actor,
            now=here.now,
            organization_name=org_name,
        )
    if json:
        output.document(made.to_json())
        return
    output.facts(made.to_json())
    output.say("This is the admin key: keep it now, it is not shown again.  Next: coatcheck serve")


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port.")] = 1,
) -> None:
    """Serve tokens until it is told to stop."""
    from coatcheck.cli import local
    from coatcheck.server import listen
    from coatcheck.server.app import Service, clock_of

    with local.deployment() as here:
        # Each worker does the same again; here a failure still has a sentence and an exit code.
        Service(here.settings, here.store, clock_of(here.settings))
        try:
            bound = listen.bind(host, port)
        except OSError as error:
            output.fail(
                Exit.ERROR,
                f"cannot listen on {host}:{port} ({error.strerror}): stop what listens there, or"
                " choose another --port",
            )
    # From here on there is more than what was imported.
    gc.set_threshold(*GC_THRESHOLD)
    code = listen.run(bound, workers=workers, log_format=here.settings.log_format)
    if code:
        output.fail(Exit.ERROR, "the service did not start, or a worker died: see the lines above")


def doctor(
    issuer: Annotated[
        str | None, typer.Option(help="The service to ask; default: COATCHECK_ISSUER.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for what is wrong: settings, database, keys, the running service, the clocks."""
    from coatcheck.cli import diagnosis

    findings = diagnosis.run(issuer)
    if json:
        output.document([finding.to_json() for finding in findings])
    else:
        rows = [
            ("ok" if finding.ok else "WRONG", finding.name, finding.text) for finding in findings
        ]
        output.table(("", "CHECK", "FINDING"), rows)
    wrong = [finding for finding in findings if not finding.ok]
    if wrong:
        unreachable = all(finding.unreachable for finding in wrong)
        raise typer.Exit(Exit.UNREACHABLE if unreachable else Exit.ERROR)


@db.command("upgrade")
def upgrade(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring the schema to this version's."""
    from coatcheck.cli import local

    if dry_run:
        _tell_steps(json)
        return
    with local.deployment(initialized=False) as here:
        before, after = here.store.upgrade()
    if json:
        output.document({"before": before, "after": after})
    elif before == after:
        output.say(f"the schema is at {after} already")
    else:
        output.say(f"upgraded the schema from {before or 'nothing'} to {after}")


def _tell_steps(json: bool) -> None:
    from coatcheck.cli import local
    from coatcheck.server.store import StoreMissing, migrations

    with local.deployment(initialized=False) as here:
        if not here.store.exists():
            raise StoreMissing("there is no database of ours yet: run coatcheck init")
        with here.store.transaction(read_only=True) as tx:
            before = tx.revision()
        steps = migrations.steps_after(before)
    if json:
        told = [{"revision": revision, "does": does} for revision, does in steps]
        output.document({"before": before, "after": migrations.REVISION, "steps": told})
    elif not steps:
        output.say(f"nothing to do: the schema is at {before} already")
    else:
        output.table(("STEP", "WHAT IT DOES"), steps)
        output.say("nothing was changed: coatcheck db upgrade does it, in one transaction")


@db.command("check")
def check(json: Json = False) -> None:
    """Exit 0 if the schema is this version's, else say what to do and exit 1."""
    from coatcheck.cli import local

    with local.deployment() as here:
        here.store.check_schema()
    if json:
        output.document({"schema": "ok"})
    else:
        output.say("the schema is this version's")
