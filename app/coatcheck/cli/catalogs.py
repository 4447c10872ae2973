"""`coatcheck catalog …`: what the catalog says, and whether it can be used at all.

Neither command needs a database: a catalog is looked at before it is rolled out.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json

if TYPE_CHECKING:
    from coatcheck.server.catalog import Catalog
    from coatcheck.server.settings import Settings

app = typer.Typer(help="Look at the catalog: what API keys are for.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Argument(help="The catalog's file; default: that of COATCHECK_CATALOG.")
]


@app.command("check")
def check(file: File = None, json: Json = False) -> None:
    """Exit 0 if the catalog can be used; else say what is wrong in which line, and exit 1."""
    from coatcheck.cli import local

    with local.translated():
        settings = _settings(file)
    catalog, problems = look(settings)
    if json:
        output.document(
            {"ok": not problems, "file": _name(settings), "problems": problems}
            | ({} if catalog is None else {"catalog": _counts(catalog)})
        )
    elif catalog is not None:
        output.say(f"coatcheck: the catalog can be used: {summary(settings, catalog)}")
    for problem in problems:
        output.say(f"coatcheck: {problem}")
    if problems:
        raise typer.Exit(Exit.ERROR)


@app.command("show")
def show(file: File = None, json: Json = False) -> None:
    """Print the catalog as it takes effect, as the management API tells it."""
    from coatcheck.cli import local
    from coatcheck.server import catalog_file

    with local.translated():
        catalog = catalog_file.of(_settings(file))
    if json:
        output.document(catalog.to_json())
        return
    output.facts(
        {
            "name": catalog.name,
            "API keys": " ".join(f"{catalog.prefix(one)}…" for one in catalog.environments),
            "environments": list(catalog.environments),
            "audiences": list(catalog.audiences),
            "default": list(dict.fromkeys(catalog.default_audiences.values())),
            "permissions": list(catalog.permissions or ("any",)),
            "scopes": list(catalog.named_scopes),
            "roles": list(catalog.roles),
            "resource types": list(catalog.resource_types),
            "models": list(catalog.models or ("any",)),
        }
    )


def look(settings: "Settings") -> "tuple[Catalog | None, list[str]]":
    """The catalog that the settings name, or what is wrong with it, line by line."""
    from coatcheck.server import catalog_file

    try:
        return catalog_file.of(settings), []
    except catalog_file.BadCatalog as error:
        return None, str(error).splitlines()


def summary(settings: "Settings", catalog: "Catalog") -> str:
    """A catalog in one line."""
    counts = ", ".join(
        f"{count} {name if count > 1 else name.removesuffix('s')}"
        for name, count in _counts(catalog).items()
        if count
    )
    return f"{_name(settings) or 'none is set'}: {catalog.name}, {counts}"


def _settings(file: Path | None) -> "Settings":
    """The settings, with the catalog that the command line names."""
    from coatcheck.server.settings import Settings

    settings = Settings.load(os.environ)
    return settings if file is None else settings.model_copy(update={"catalog": file})


def _name(settings: "Settings") -> str | None:
    return None if settings.catalog is None else str(settings.catalog)


def _counts(catalog: "Catalog") -> dict[str, int]:
    return {
        "environments": len(catalog.environments),
        "audiences": len(catalog.product_audiences),
        "permissions": len(catalog.permissions or ()),
        "scopes": len(catalog.named_scopes),
        "roles": len(catalog.roles),
        "resource types": len(catalog.resource_types),
    }
