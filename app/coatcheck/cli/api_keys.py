"""`coatcheck keys …`: API keys, on the database that the settings name or by a service's `/v1`."""

import gc
import sys
from collections.abc import Iterator
from json import dumps
from typing import TYPE_CHECKING, Annotated, Final

import typer

from coatcheck import apikey
from coatcheck.cli import output
from coatcheck.cli.output import Exit, Json, Yes
from coatcheck.cli.target import (
    All,
    Cursor,
    Document,
    Limit,
    LocalTarget,
    Org,
    Target,
    amount,
    asked,
    at,
    command,
    edited,
    given,
    listed,
    or_none,
    require_local,
    words,
)
from coatcheck.durations import ROTATION_OVERLAP

if TYPE_CHECKING:
    from coatcheck.cli.local import Local
    from coatcheck.server.manage.api_keys import NewApiKey

app = typer.Typer(
    help="Create, find, change and end API keys.  Every command takes --json, and --server URL to"
    " ask a service instead of this machine's database.",
    no_args_is_help=True,
)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The API key's id, key_…")]
Scopes = Annotated[
    list[str] | None,
    typer.Option(help="A scope it has, such as widgets:read; may be repeated. None: all."),
]
Audiences = Annotated[
    list[str] | None,
    typer.Option(help="A resource server it is for; may be repeated. None: the default one."),
]
Cidrs = Annotated[
    list[str] | None,
    typer.Option(help="An address or network it may be used from; may be repeated. None: any."),
]
Models = Annotated[
    list[str] | None, typer.Option(help="A model it may name; may be repeated. None: all.")
]
Project = Annotated[str | None, typer.Option(help="The one project it is for, prj_…")]
Group = Annotated[str | None, typer.Option(help="Its group, grp_…, which sets prices and rates.")]
Permissions = Annotated[
    str | None, typer.Option(help="Its role, as the catalog calls it, such as read or write.")
]
CreditLimit = Annotated[
    str | None, typer.Option(help="How many credits it may use, such as 100 or 2.5.")
]

#: What differs among API keys that were made together.
_OF_ONE_KEY: Final = frozenset({"id", "mask", "secrets"})
_COLUMNS: Final = ("ID", "NAME", "STATUS", "ENV", "SCOPES", "KEY", "EXPIRES", "LAST USED")


@command(app, "create")
def create(
    target: Target,
    *,
    name: Annotated[str, typer.Option(help="What it is for, such as ci-prod.")],
    scope: Scopes = None,
    audience: Audiences = None,
    org: Org = None,
    project: Project = None,
    env: Annotated[str | None, typer.Option(help="Its environment, such as live or test.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="A span (90d) or a date (2027-03-31). None: never.")
    ] = None,
    cidr: Cidrs = None,
    permissions: Permissions = None,
    credit_limit: CreditLimit = None,
    model: Models = None,
    group: Group = None,
    member: Annotated[
        str | None, typer.Option(help="Make it a member's own, for managing, mem_…")
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Make so many, all of the same name, as JSON lines; not by --server."
        ),
    ] = 1,
    json: Json = False,
) -> None:
    """Create an API key.  Its secret is shown once, here."""
    body = given(
        name=name,
        organization=org,
        project=project,
        env=env,
        scopes=words("scope", scope),
        audiences=words("audience", audience),
        permissions=permissions,
        cidrs=words("cidr", cidr),
        models=words("model", model),
        group=group,
        creditLimit=amount("credit-limit", credit_limit),
        expiresAt=expires,
        member=member,
    )
    if count > 1:
        _create_many(require_local(target, "--count"), body, count)
        return
    _show_secret(asked(target, "POST", "/keys", body=body).document, json)


@command(app, "list")
def list_keys(
    target: Target,
    *,
    org: Org = None,
    status: Annotated[str, typer.Option(help="active, disabled, expired, revoked or all.")] = "all",
    project: Annotated[str | None, typer.Option(help="Only this project's.")] = None,
    env: Annotated[str | None, typer.Option(help="Only of this environment.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only standard, device, connector or member ones.")
    ] = None,
    member: Annotated[str | None, typer.Option(help="Only this member's.")] = None,
    group: Annotated[str | None, typer.Option(help="Only of this group.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Part of the name, or the last four characters.")
    ] = None,
    unused_days: Annotated[
        int | None, typer.Option(min=1, help="Only what was not used for so many days.")
    ] = None,
    expiring_days: Annotated[
        int | None, typer.Option(min=1, help="Only what ends within so many days.")
    ] = None,
    order: Annotated[str, typer.Option(help="asc: the oldest first; desc.")] = "asc",
    limit: Limit = 100,
    all_of_them: All = False,
    cursor: Cursor = None,
    after: Annotated[
        str | None, typer.Option(help="Start behind this id; without --server and filters only.")
    ] = None,
    json: Json = False,
) -> None:
    """List API keys in every state, the oldest first, unless told otherwise.

    Without --server, --org and filters: of every organization.
    """
    filters = given(
        project=project,
        env=env,
        kind=kind,
        member=member,
        group=group,
        name=name,
        unusedDays=unused_days,
        expiringDays=expiring_days,
        cursor=cursor,
    )
    at_most = None if all_of_them else limit
    is_plain = not filters and (status, order) == ("all", "asc")
    if isinstance(target, LocalTarget) and is_plain and (org is None or after is not None):
        found = _by_id(target.here, org, after or "", at_most)
    elif after is not None:
        output.fail(Exit.USAGE, "--after is for lists without filters and --server: use --cursor")
    else:
        query = filters | given(organization=org, status=status, order=order)
        query.pop("cursor", None)
        found = listed(target, "/keys", query, limit=at_most, cursor=cursor)
    _print_list(found, json)


@command(app, "search")
def search(
    target: Target,
    text: Annotated[
        str,
        typer.Argument(
            metavar="QUERY",
            help="An id, part of a name, or the last four characters; - reads it from standard"
            " input, which is the way for an API key.",
        ),
    ],
    org: Org = None,
    status: Annotated[str, typer.Option(help="active, disabled, expired, revoked or all.")] = "all",
    json: Json = False,
) -> None:
    """Find API keys, also by a secret that was found somewhere."""
    if apikey.looks_like_one(text):
        output.fail(
            Exit.USAGE,
            "an API key is never an argument, others on this machine can read those: use - and"
            " standard input",
        )
    if text == "-":
        text = sys.stdin.read().strip()
    body = given(query=text, organization=org, status=status)
    _print_list(asked(target, "POST", "/keys/search", body=body).document["data"], json)


@command(app, "show")
def show(target: Target, key_id: KeyId, json: Json = False) -> None:
    """Show one API key, but for its secret."""
    output.thing(asked(target, "GET", at("/keys/{}", key_id)).document, as_json=json)


@command(app, "edit")
def edit(
    target: Target,
    key_id: KeyId,
    *,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="What it has from now on; may be repeated.")
    ] = None,
    audience: Annotated[
        list[str] | None, typer.Option(help="What it is for from now on; may be repeated.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="A span from now (90d) or a date (2027-03-31).")
    ] = None,
    no_expiry: Annotated[bool, typer.Option("--no-expiry", help="It never ends.")] = False,
    cidr: Annotated[
        list[str] | None,
        typer.Option(help="Where it may be used from, instead of before; may be repeated."),
    ] = None,
    no_cidrs: Annotated[bool, typer.Option("--no-cidrs", help="From anywhere.")] = False,
    permissions: Permissions = None,
    no_permissions: Annotated[bool, typer.Option("--no-permissions", help="No role.")] = False,
    credit_limit: CreditLimit = None,
    no_credit_limit: Annotated[
        bool, typer.Option("--no-credit-limit", help="As many credits as its organization has.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model it may name, instead of before; may be repeated."),
    ] = None,
    no_models: Annotated[bool, typer.Option("--no-models", help="Every model.")] = False,
    project: Project = None,
    no_project: Annotated[bool, typer.Option("--no-project", help="Of no one project.")] = False,
    group: Group = None,
    no_group: Annotated[bool, typer.Option("--no-group", help="Of no group.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing: say what it would do.")
    ] = False,
    json: Json = False,
) -> None:
    """Change what an API key is good for; what is not named stays, its secret as well.

    What is taken away is gone at once, from tokens as well; --dry-run says so beforehand.
    """
    body = given(
        name=name,
        scopes=words("scope", scope),
        audiences=words("audience", audience),
        expiresAt=or_none("expires", expires, no_expiry),
        cidrs=or_none("cidr", words("cidr", cidr), no_cidrs),
        permissions=or_none("permissions", permissions, no_permissions),
        creditLimit=or_none("credit-limit", amount("credit-limit", credit_limit), no_credit_limit),
        models=or_none("model", words("model", model), no_models),
        project=or_none("project", project, no_project),
        group=or_none("group", group, no_group),
    )
    if not body:
        output.fail(Exit.USAGE, "nothing to change: say what, such as --name or --scope")
    path = at("/keys/{}", key_id)
    if dry_run:
        done = asked(target, "PATCH", path, query={"dryRun": "true"}, body=body)
    else:
        done = edited(target, path, body)
    _warn(done.document)
    # People have read them a moment ago.
    hidden = () if json else ("warnings",)
    told = {name: value for name, value in done.document.items() if name not in hidden}
    output.thing(told, as_json=json)


@command(app, "disable")
def disable(target: Target, key_id: KeyId, json: Json = False) -> None:
    """Stop an API key until it is enabled again."""
    _change(target, "disable", key_id, json)


@command(app, "enable")
def enable(target: Target, key_id: KeyId, json: Json = False) -> None:
    """Let a disabled API key work again."""
    _change(target, "enable", key_id, json)


@command(app, "revoke")
def revoke(target: Target, key_id: KeyId, yes: Yes = False, json: Json = False) -> None:
    """End an API key for ever; its record stays."""
    path = at("/keys/{}/revoke", key_id)
    output.confirm(yes, f"Revoke {key_id}? It will never work again.")
    output.thing(asked(target, "POST", path).document, as_json=json)


@command(app, "rotate")
def rotate(
    target: Target,
    key_id: KeyId,
    overlap: Annotated[
        str,
        typer.Option(
            help="How long the old secret goes on working: 24h, 7d, a date, or 0.",
            show_default="a day",
        ),
    ] = f"{ROTATION_OVERLAP}s",
    json: Json = False,
) -> None:
    """Give an API key a new secret, shown once; the id stays."""
    path = at("/keys/{}/rotate", key_id)
    _show_secret(asked(target, "POST", path, body={"overlap": overlap}).document, json)


@command(app, "end-overlap")
def end_overlap(target: Target, key_id: KeyId, json: Json = False) -> None:
    """End the overlap of a rotation now: only the newest secret works on."""
    _change(target, "end-overlap", key_id, json)


@command(app, "reveal")
def reveal(target: Target, key_id: KeyId, json: Json = False) -> None:
    """Show the secret again, where the organization keeps copies; it is written down."""
    made = asked(target, "POST", at("/keys/{}/reveal", key_id)).document
    output.thing(made if json else {"id": made["id"], "key": made["key"]}, as_json=json)


@command(app, "delete")
def delete(
    target: Target,
    key_id: KeyId,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Also if it was used in the last 24 hours.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """End an API key for ever and take it out of every list.

    If it was used in the last 24 hours it is not deleted (exit 5), unless --confirm is said.
    """
    path = at("/keys/{}", key_id)
    output.confirm(yes, f"Delete {key_id}? It will never work again, and no list shows it.")
    asked(target, "DELETE", path, query={"confirm": "true"} if confirm else None)
    output.thing({"id": key_id, "deleted": True}, as_json=json)


@command(app, "usage")
def usage(target: Target, key_id: KeyId, json: Json = False) -> None:
    """Show what an API key was used for."""
    output.thing(asked(target, "GET", at("/keys/{}/usage", key_id)).document, as_json=json)


def _change(target: Target, verb: str, key_id: str, json: bool) -> None:
    output.thing(asked(target, "POST", at(f"/keys/{{}}/{verb}", key_id)).document, as_json=json)


def _by_id(here: "Local", org: str | None, after: str, limit: int | None) -> list[Document]:
    """API keys in the order of their ids, of every organization, too."""
    from coatcheck.server.manage import api_keys

    found: list[Document] = []
    size = 1000 if limit is None else limit
    while True:
        # One more than are told says whether there are more.
        page = api_keys.list_api_keys(
            here.store, organization_id=org, now=here.now, after=after, limit=size + 1
        )
        found += [one.to_json() for one in page[:size]]
        if len(page) <= size:
            return found
        after = page[size - 1].id
        if limit is not None:
            output.say(f"coatcheck: there are more: --all, a higher --limit, or --after {after}")
            return found


def _create_many(here: "Local", body: Document, count: int) -> None:
    """As many alike, as JSON lines: id and key of each, and what they have in common."""
    from coatcheck.server.manage import api_keys

    new = _new_api_key(here, body)
    # A million small objects that all live on: looking for cycles among them is waste.
    gc.disable()
    tail = ""
    for key_id, key in _made(here, new, count):
        if not tail:
            first = api_keys.show(here.store, key_id, now=here.now).to_json()
            shared = {name: first[name] for name in first if name not in _OF_ONE_KEY}
            tail = dumps(shared).removeprefix("{")
        sys.stdout.write(f'{{"id": "{key_id}", "key": "{key}", {tail}\n')


def _made(here: "Local", new: "NewApiKey", count: int) -> Iterator[tuple[str, str]]:
    """Ids and secrets, each batch once it is committed."""
    from coatcheck.server import sealing, signing
    from coatcheck.server.manage import api_keys

    return api_keys.create_many(
        here.store,
        here.catalog,
        new,
        here.actor,
        now=here.now,
        issuer=here.settings.issuer,
        count=count,
        seal_with=lambda tx: signing.sealing_key_for_copies(
            tx, sealing.load(here.settings.keys_dir)
        ),
    )


def _new_api_key(here: "Local", body: Document) -> "NewApiKey":
    """What `POST /keys` would make of it."""
    from coatcheck.server.manage import forms
    from coatcheck.server.manage.api_keys import NewApiKey

    if "member" in body:
        output.fail(Exit.USAGE, "--member is for one at a time: leave --count out")
    expires, credit = body.get("expiresAt"), body.get("creditLimit")
    return NewApiKey(
        organization_id=_organization(here, body.get("organization")),
        name=body["name"],
        scopes=body.get("scopes", ()),
        audiences=body.get("audiences", ()),
        environment=body.get("env"),
        expires_at=None if expires is None else forms.moment("expires", expires, here.now),
        project_id=body.get("project"),
        networks=body.get("cidrs"),
        permissions=body.get("permissions"),
        models=body.get("models"),
        group_id=body.get("group"),
        credit_limit=None if credit is None else forms.credit("credit-limit", credit),
        created_by=here.actor.id,
    )


def _organization(here: "Local", org: str | None) -> str:
    if org is not None:
        return org
    with here.store.transaction(read_only=True) as tx:
        organizations = tx.organizations()
    if len(organizations) != 1:
        output.fail(Exit.USAGE, "there are several organizations: say which one by --org")
    return organizations[0].id


def _show_secret(made: Document, json: bool) -> None:
    _warn(made)
    if json:
        output.document(made)
        return
    output.facts({"id": made["id"], "key": made["key"]})
    output.say("Keep the key now: it is not shown again.")


def _warn(document: Document) -> None:
    for warning in document.get("warnings") or ():
        output.say(f"coatcheck: {output.plain(str(warning))}")


def _print_list(found: list[Document], json: bool) -> None:
    if json:
        output.document(found)
    else:
        output.table(_COLUMNS, map(_row, found))


def _row(told: Document) -> tuple[str, ...]:
    return (
        str(told["id"]),
        str(told["name"]),
        str(told["status"]),
        str(told["env"]),
        " ".join(map(str, told["scopes"])),
        str(told["mask"]),
        str(told["expiresAt"] or "never"),
        str(told["lastUsedAt"] or "never"),
    )
