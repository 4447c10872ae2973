"""The tree of commands: names, options and help; what each does is in its own file."""

import typer

from coatcheck.cli import (
    admin,
    api_keys,
    backups,
    caller,
    configuration,
    deployment,
    organizations,
    signing_keys,
)

app = typer.Typer(
    name="coatcheck",
    help="Exchange long-lived API keys for ten-minute signed tokens.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("init")(deployment.init)
app.command("serve")(deployment.serve)
app.command("token")(caller.token)
app.command("verify")(caller.verify)
app.command("doctor")(deployment.doctor)
app.add_typer(organizations.app, name="orgs")
app.add_typer(api_keys.app, name="keys")
app.add_typer(signing_keys.app, name="signing-keys")
app.add_typer(deployment.db, name="db")
app.add_typer(configuration.app, name="config")
app.add_typer(admin.app, name="admin")
deployment.db.command("backup")(backups.backup)
deployment.db.command("restore")(backups.restore)
deployment.db.command("new-log")(backups.new_log)
