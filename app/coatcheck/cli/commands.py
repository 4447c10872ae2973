"""The tree of commands: names, options and help; what each does is in its own file."""

import typer

from coatcheck.cli import (
    admin,
    api_keys,
    backups,
    caller,
    calling,
    catalogs,
    configuration,
    deployment,
    devices,
    groups,
    mcp,
    members,
    organizations,
    projects,
    signing_keys,
    target,
    usage,
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
app.command("curl")(calling.curl)
app.command("exec", context_settings={"allow_interspersed_args": False})(calling.run)
app.command("credential-helper")(calling.credential_helper)
app.command("doctor")(deployment.doctor)
target.command(app, "whoami")(usage.whoami)
app.add_typer(organizations.app, name="orgs")
app.add_typer(projects.app, name="projects")
app.add_typer(members.app, name="members")
app.add_typer(groups.app, name="groups")
app.add_typer(api_keys.app, name="keys")
app.add_typer(devices.app, name="devices")
app.add_typer(usage.usage, name="usage")
app.add_typer(usage.events, name="events")
app.add_typer(mcp.app, name="mcp")
app.add_typer(signing_keys.app, name="signing-keys")
app.add_typer(deployment.db, name="db")
app.add_typer(configuration.app, name="config")
app.add_typer(catalogs.app, name="catalog")
app.add_typer(admin.app, name="admin")
deployment.db.command("backup")(backups.backup)
deployment.db.command("restore")(backups.restore)
deployment.db.command("new-log")(backups.new_log)
