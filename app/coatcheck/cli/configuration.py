"""`coatcheck config …`: what the environment comes to, before anything is started."""

import os

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group also while it has one command."""


@app.command("check")
def check(json: Json = False) -> None:
    """Print every setting as it takes effect, with its origin; exit 1 if one is wrong.

    The catalog's file is read, and nothing else is opened: not the database, not the sealing key.
    Secrets are masked.
    """
    from coatcheck.cli import catalogs
    from coatcheck.server.settings import Settings, effective, unknown_settings
    from coatcheck.server.store import open_store

    found, problems = effective(os.environ)
    database_url = found["database_url"].text
    if database_url is not None:
        try:
            open_store(database_url)
        except ValueError as error:
            problems.append(str(error))
    summary = None
    if not problems:
        # Only with settings that hold together: what a catalog may say depends on them.
        settings = Settings.load(os.environ)
        catalog, problems = catalogs.look(settings)
        summary = catalog and catalogs.summary(settings, catalog)
    unknown = unknown_settings(os.environ)
    if json:
        output.document(
            {
                "ok": not problems,
                "settings": [one.to_json() for one in found.values()],
                "catalog": summary,
                "problems": problems,
                "unknown": unknown,
            }
        )
    else:
        rows = [(one.variable, one.shown, one.origin) for one in found.values()]
        output.table(("SETTING", "VALUE", "FROM"), rows)
        if summary is not None:
            output.say(f"coatcheck: the catalog can be used: {summary}")
    for name in unknown:
        output.say(f"coatcheck: {name} is no setting of this version: check its spelling")
    for problem in problems:
        output.say(f"coatcheck: {problem}")
    if problems:
        raise typer.Exit(Exit.ERROR)
