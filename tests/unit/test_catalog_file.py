"""`coatcheck.server.catalog_file`: the catalog as a file, and what is told of a wrong one."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from coatcheck.durations import span
from coatcheck.restrictions import Role
from coatcheck.scope import ORGANIZATION_PERMISSIONS, Scopes
from coatcheck.server import catalog_file
from coatcheck.server.catalog import (
    Audience,
    Catalog,
    Connector,
    NamedScope,
    Permission,
    Policies,
    ResourceType,
    RoleOffer,
    Segment,
    management_audience,
)
from coatcheck.server.catalog_file import MAX_BYTES, BadCatalog, load, read
from coatcheck.server.settings import Settings

SETTINGS = Settings(issuer="https://auth.example.com")
CATALOGS = Path(__file__).parents[2] / "examples" / "catalogs"
EXAMPLES = ("s0-ide", "s1-analytics", "s2-devices", "s3-agents", "s4-gateway")

API = "https://api.example.com"
AUDIENCE = f"""
[[audience]]
id = "{API}"
shared = true
default = true
"""
INLINE = f'audience = [{{ id = "{API}", shared = true, default = true }}]'
LIVE = f'[[audience]]\nid = "{API}"\nenvironment = "live"\ndefault = true\n'
TEST = '[[audience]]\nid = "https://t.example"\nenvironment = "test"\ndefault = true\n'
READ = '[[permission]]\nname = "read"\n'
SCOPE = '[[scope]]\nid = "ide"\nname = "IDE"\ngrants = ["read"]\n'
ROLE = '[[role]]\nname = "viewer"\npermission = "read"\nmethods = ["GET"]\n'
LONG = ", ".join(f'"{letter * 400}"' for letter in "abcdefghijk")
PLACE = '[[resource]]\ntype = "PLACE"\nsegments = [{ name = "id" }]\n'
MCP = '[mcp]\nname = "acme"\nurl = "https://mcp.example.com/mcp"\nscopes = ["read"]\n'


def problems_of(text: str) -> list[str]:
    """What is told of a text: a line for each problem."""
    with pytest.raises(BadCatalog) as told:
        read(text, SETTINGS)
    return str(told.value).splitlines()


def of(text: str) -> Catalog:
    """The catalog of this text and one audience."""
    return read(text + AUDIENCE, SETTINGS)


# --- What a file says

EVERYTHING = f"""
name = "Acme IDE"

[key]
brand = "cr"
environments = ["live", "test"]
environment_in_key = false
header = "X-Acme-Key"
foreign_prefixes = ["sk-old-", "acme."]
free_environments = ["test"]

[[audience]]
id = "{API}"
environment = "live"
default = true
algorithm = "RS256"
token_type = "JWT"
verifier = "any"

[[audience]]
id = "https://staging.example.com"
environment = "test"
default = true

[[audience]]
id = "https://mcp.example.com/mcp"
shared = true

[[permission]]
name = "read"
about = "Look"
audiences = ["{API}", "https://mcp.example.com/mcp"]

[[permission]]
name = "write"

[[scope]]
id = "ide"
name = "IDE"
about = "What the IDE needs"
grants = ["read", "*"]

[implies]
write = ["read"]
read = ["write"]

[[role]]
name = "member"
permission = "write"
methods = ["GET", "POST"]
about = "Change"

[[resource]]
type = "PLACE"
segments = [{{ name = "kind", values = ["Site", "Building"] }}, {{ name = "id" }}]

[[resource]]
type = "THING"
segments = [{{ name = "id" }}]
within = ["PLACE", "THING"]

[policies]
recoverable = false
max_lifetime = "365d"
disable = false
delete = false

[models]
names = ["gpt-x", "claude-y"]

[device_keys]
scopes = ["ide", "write"]

[mcp]
name = "acme"
url = "https://mcp.example.com/mcp"
audience = "https://mcp.example.com/mcp"
scopes = ["read"]
"""


def test_every_key_of_a_file_stands_in_the_catalog() -> None:
    """All of the format at once, each value another than its default."""
    audiences = (
        management_audience(SETTINGS),
        Audience(API, "live", "RS256", "JWT", enforces=False),
        Audience("https://staging.example.com", "test", "ES256", "at+jwt"),
        Audience("https://mcp.example.com/mcp", None, "ES256", "at+jwt"),
    )

    assert read(EVERYTHING, SETTINGS) == Catalog(
        name="Acme IDE",
        brand="cr",
        environments=("live", "test"),
        environment_in_key=False,
        api_key_header="X-Acme-Key",
        foreign_prefixes=("sk-old-", "acme."),
        free_environments=frozenset({"test"}),
        audiences={one.id: one for one in audiences},
        default_audiences={"live": API, "test": "https://staging.example.com"},
        management_audience="https://auth.example.com/v1",
        permissions={
            "read": Permission("read", "Look", frozenset({API, "https://mcp.example.com/mcp"})),
            "write": Permission("write"),
        },
        named_scopes={
            "ide": NamedScope("ide", "IDE", Scopes.parse("read *"), "What the IDE needs")
        },
        implies={"write": ("read",), "read": ("write",)},
        roles={
            "member": RoleOffer(Role("member", frozenset({"GET", "POST"})), "write", "Change"),
        },
        resource_types={
            "PLACE": ResourceType(
                "PLACE", (Segment("kind", ("Site", "Building")), Segment("id")), ()
            ),
            "THING": ResourceType("THING", (Segment("id"),), ("PLACE", "THING")),
        },
        models=("gpt-x", "claude-y"),
        policies=Policies(
            recoverable=False, max_lifetime_s=span("365d"), may_disable=False, may_delete=False
        ),
        device_scopes=Scopes.parse("ide write"),
        connector=Connector(
            "acme",
            "https://mcp.example.com/mcp",
            "https://mcp.example.com/mcp",
            Scopes.parse("read"),
        ),
    )


def test_the_format_as_the_module_shows_it_is_a_catalog() -> None:
    """What is not run, rots."""
    shown = (catalog_file.__doc__ or "").split("\n\n    name", 1)[1].split("\n\nAll tables", 1)[0]
    catalog = read(dedent(f"    name{shown}"), SETTINGS)

    assert (catalog.name, catalog.brand) == ("Acme IDE", "cr")
    assert catalog.connector is not None


def test_one_audience_is_a_catalog() -> None:
    """Everything else has a default, and they are those of a deployment without a file."""
    assert of("") == Catalog(
        brand="ck",
        environments=("live", "test"),
        audiences={
            "https://auth.example.com/v1": management_audience(SETTINGS),
            API: Audience(API, None, "ES256", "at+jwt"),
        },
        default_audiences={"live": API, "test": API},
        management_audience="https://auth.example.com/v1",
    )


def test_settings_of_the_default_audience_mean_nothing_beside_a_file() -> None:
    """The file alone says which audiences there are and what signs for them."""
    settings = Settings(
        issuer="https://auth.example.com",
        audience="https://other.example.com",
        algorithm="RS256",
        token_type="JWT",
    )

    assert read(AUDIENCE, settings) == read(AUDIENCE, SETTINGS)


def test_without_permissions_any_well_formed_scope_may_be_given() -> None:
    """Named scopes, implications and the scopes of devices then refer to what nobody declared."""
    catalog = of(SCOPE + '[implies]\nwrite = ["create"]\n[device_keys]\nscopes = ["x"]\n' + MCP)

    assert catalog.permissions is None
    assert catalog.named_scopes["ide"].grants == Scopes.parse("read")
    assert catalog.implies == {"write": ("create",)}
    assert catalog.connector is not None
    assert catalog.connector.audience == API


@pytest.mark.parametrize("permissions", ["", READ], ids=["none declared", "declared"])
def test_a_named_scope_means_its_permissions(permissions: str) -> None:
    """Whether permissions are declared or not, `ide` is spelled out where it is compared."""
    vocabulary = of(permissions + SCOPE).vocabulary(API)

    assert vocabulary.expand(Scopes.parse("ide")) == Scopes.parse("read")


def test_a_shared_default_and_an_environment_s_own_audience_go_together() -> None:
    """A default is wanted once for each environment; further audiences are free."""
    catalog = of(LIVE.replace(API, "https://other.example").replace("default = true\n", ""))

    assert catalog.default_audiences == {"live": API, "test": API}
    assert catalog.product_audiences == ("https://other.example", API)


def test_lists_of_tables_may_be_written_inline() -> None:
    """TOML has two ways to write them, and people who generate a file use the other one."""
    assert read(INLINE, SETTINGS) == read(AUDIENCE, SETTINGS)


# --- The examples


def example(name: str) -> Catalog:
    return load(CATALOGS / f"{name}.toml", SETTINGS)


def test_each_of_the_five_products_has_an_example() -> None:
    """No example without a test, and no product without an example."""
    assert sorted(path.stem for path in CATALOGS.iterdir()) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_is_and_names_no_real_host(name: str) -> None:
    """People start from them: the first lines tell whether this is the one to copy."""
    text = (CATALOGS / f"{name}.toml").read_text(encoding="utf-8")
    hosts = [rest.split("/")[0].split('"')[0] for rest in text.split("https://")[1:]]

    assert text.startswith("# ")
    assert "# Worth copying: " in text
    assert hosts
    assert all(host.endswith(".example.com") for host in hosts)
    assert example(name).to_json()["name"]


def test_the_ide_has_scopes_that_combine_and_a_free_environment() -> None:
    """S0: Cloud Agents and Gateway launch agents and infer, and manage no members or billing."""
    catalog = example("s0-ide")
    expand = catalog.vocabulary("https://gateway.example.com").expand

    assert [catalog.prefix(one) for one in catalog.environments] == ["cr_live", "cr_test"]
    assert catalog.default_audiences == {
        "live": "https://gateway.example.com",
        "test": "https://staging.example.com",
    }
    assert (catalog.is_free("test"), catalog.is_free("live")) == (True, False)
    assert [one.name for one in catalog.named_scopes.values()] == [
        "IDE",
        "Cloud Agents",
        "Gateway",
        "Admin",
        "Full Access",
    ]
    assert str(expand(Scopes.parse("ide"))) == "gateway:infer providers:list sessions:manage"
    assert str(expand(Scopes.parse("cloud-agents gateway"))) == (
        "agents:launch agents:manage agents:monitor gateway:infer"
    )
    assert set(expand(Scopes.parse("admin"))) == set(expand(Scopes.parse("full-access")))
    assert {"team:manage", "billing:manage"} <= {
        grant.action for grant in expand(Scopes.parse("admin"))
    }
    assert catalog.device_scopes == Scopes.parse("ide")
    assert not catalog.policies.recoverable


def test_analytics_connects_agents_that_read() -> None:
    """S1: an MCP server; disabling can be undone, deleting is possible."""
    catalog = example("s1-analytics")

    assert catalog.connector == Connector(
        "acme-analytics",
        "https://mcp.example.com/mcp",
        "https://mcp.example.com/mcp",
        Scopes.parse("profile:read content:read analytics:read"),
    )
    assert catalog.policies == Policies(recoverable=True, may_disable=True, may_delete=True)


def test_devices_have_actions_with_filters_and_one_end() -> None:
    """S2: `write` is create, update and delete; `*` is everything; revoking is the only end."""
    catalog = example("s2-devices")
    expand = catalog.vocabulary("https://devices.example.com").expand
    place = catalog.resource_types["PLACE"]
    thing = catalog.resource_types["THING"]

    assert set(expand(Scopes.parse("write@PLACE/Site/42"))) == set(
        Scopes.parse(
            "write@PLACE/Site/42 create@PLACE/Site/42 update@PLACE/Site/42 delete@PLACE/Site/42"
        )
    )
    assert {grant.action for grant in expand(Scopes.parse("*"))} >= {"read", "write", "admin"}
    assert [segment.name for segment in place.segments] == ["kind", "id"]
    assert "Site" in (place.segments[0].values or ())
    assert "Battery" in (thing.segments[0].values or ())
    assert thing.within == ("PLACE",)
    assert catalog.policies == Policies(recoverable=False, may_disable=False, may_delete=False)


def test_agents_have_twenty_two_permissions_and_three_roles() -> None:
    """S3: exactly the permissions that its endpoints declare; keys tell no environment."""
    catalog = example("s3-agents")

    assert catalog.prefix("live") == "sk"
    assert catalog.permissions is not None
    assert " ".join(catalog.permissions) == (
        "agents:create agents:update agents:delete agent:chat session:create session:read"
        " session:update session:delete messages:read kb:read kb:create kb:write kb:delete"
        " kb:upload rag:search tools:create tools:update tools:delete webhooks:create"
        " webhooks:read webhooks:update webhooks:delete"
    )
    assert len(catalog.permissions) == 22
    assert {one.permission: one.role for one in catalog.roles.values()} == {
        "admin": Role("admin", frozenset({"GET", "POST", "PATCH", "PUT", "DELETE"})),
        "write": Role("member", frozenset({"GET", "POST", "PATCH"})),
        "read": Role("viewer", frozenset({"GET"})),
    }


def test_the_gateway_has_models_and_keys_that_can_be_copied_again() -> None:
    """S4: model restrictions, sealed copies, disabling and deleting."""
    catalog = example("s4-gateway")

    assert catalog.models
    assert catalog.policies == Policies(recoverable=True, may_disable=True, may_delete=True)


# --- What is told of a wrong file: the line that ends in `# <-`, and why

WRONG = {
    # the file
    "a misspelled key": ('[key]\nbrant = "a" # <-\n', "no such key; did you mean brand?"),
    "a misspelled table": ("[polices] # <-\n", "no such table or key; did you mean [policies]?"),
    "an unknown table": ("[zebra] # <-\n", "no such table or key; there are name, [key], [[aud"),
    "an unknown key": ("[policies]\nzebra = 1 # <-\n", "there are recoverable, max_lifetime"),
    "a key without its table": ('brand = "cr" # <-\n', "write it below [key]"),
    "one table for a list of them": ('[scope] # <-\nid = "ide"\n', "write [[scope]], with two"),
    "a list of tables for one": ("[[key]] # <-\n", "no table; write [key]"),
    "a blank name": ('name = " " # <-\n', "write a name for people"),
    "a name that is no text": ("name = 3 # <-\n", "no text; write a text in quotes"),
    "a name that turns the writing around": ('name = "a\\u202eb" # <-\n', "none of them for contr"),
    "a long name": ('name = "' + "a" * 513 + '" # <-\n', "at most 512 characters"),
    # [key]
    "a brand with a blank": ('[key]\nbrand = "c r" # <-\n', "write 1 to 16 letters or digits"),
    "a long brand": ('[key]\nbrand = "' + "a" * 17 + '" # <-\n', "write 1 to 16 letters or digits"),
    "an environment in capitals": ('[key]\nenvironments = ["Live"] # <-\n', "lower-case letters"),
    "no environment": ("[key]\nenvironments = [] # <-\n", "the list is empty"),
    "an environment twice": ('[key]\nenvironments = ["a", "a"] # <-\n', "written twice"),
    "environments that are no list": ('[key]\nenvironments = "a" # <-\n', "write a list of texts"),
    "an environment that is no text": ("[key]\nenvironments = [1] # <-\n", "write a text in quo"),
    "a flag in quotes": ('[key]\nenvironment_in_key = "true" # <-\n', "without quotes"),
    "a flag that is a number": ("[key]\nenvironment_in_key = 1 # <-\n", "without quotes"),
    "a header with a blank": ('[key]\nheader = "X Key" # <-\n', "is no name of a header"),
    "Authorization": ('[key]\nheader = "authorization" # <-\n', "has a meaning already"),
    "the standard header": ('[key]\nheader = "X-API-Key" # <-\n', "has a meaning already"),
    "the project's header": ('[key]\nheader = "x-project-id" # <-\n', "has a meaning already"),
    "Cookie": ('[key]\nheader = "Cookie" # <-\n', "has a meaning already"),
    "a header of ours": ('[key]\nheader = "X-Coatcheck-Org" # <-\n', "has a meaning already"),
    "a prefix with a blank": ('[key]\nforeign_prefixes = ["a b"] # <-\n', "without blanks"),
    "an empty prefix": ('[key]\nforeign_prefixes = [""] # <-\n', "1 to 64 printable ASCII"),
    "a prefix beyond ASCII": ('[key]\nforeign_prefixes = ["é"] # <-\n', "printable ASCII"),
    "a prefix of a JWT": ('[key]\nforeign_prefixes = ["eyJ"] # <-\n', "be told from a JWT"),
    "the first letter of a JWT": ('[key]\nforeign_prefixes = ["e"] # <-\n', "be told from a JWT"),
    "a prefix with two dots": ('[key]\nforeign_prefixes = ["a.b."] # <-\n', "has two dots"),
    "a prefix of ours": ('[key]\nforeign_prefixes = ["ck"] # <-\n', 'begin with "ck_live_"'),
    "a prefix below ours": ('[key]\nforeign_prefixes = ["ck_test_a"] # <-\n', '"ck_test_"'),
    "a prefix of ours without environment": (
        '[key]\nbrand = "sk"\nenvironment_in_key = false\nforeign_prefixes = ["sk_a"] # <-\n',
        'begin with "sk_"',
    ),
    "free in an unknown environment": (
        '[key]\nfree_environments = ["tset"] # <-\n',
        '"tset" is no environment of this file; did you mean test?',
    ),
    # [[permission]]
    "a permission without a name": ('[[permission]] # <-\nabout = "x"\n', "name is missing; write"),
    "a permission twice": (READ + '[[permission]]\nname = "read" # <-\n', "in line 2 already"),
    "the permission *": ('[[permission]]\nname = "*" # <-\n', "stands for all permissions"),
    "a permission with a filter": ('[[permission]]\nname = "read@*" # <-\n', "has a filter"),
    "a permission with a blank": ('[[permission]]\nname = "re ad" # <-\n', "is no permission: an"),
    "a permission of the platform": (
        '[[permission]]\nname = "coatcheck:x" # <-\n',
        "begins like Coatcheck's own permissions",
    ),
    **{
        f"the organization permission {one}": (
            f'[[permission]]\nname = "{one}" # <-\n',
            "is a permission of the management API",
        )
        for one in ORGANIZATION_PERMISSIONS
    },
    "a permission at an unknown audience": (
        READ + 'audiences = ["https://apo.example.com"] # <-\n',
        f"is no audience of this file; did you mean {API}?",
    ),
    "a permission at the management API": (
        READ + 'audiences = ["https://auth.example.com/v1"] # <-\n',
        "is no audience of this file",
    ),
    "a permission at no audience": (READ + "audiences = [] # <-\n", "the list is empty"),
    # [[scope]]
    "a scope without anything": (
        '[[scope]] # <-\nid = "a"\nname = "A"\n',
        "grants is missing; write the permissions",
    ),
    "a scope that is no slug": (
        '[[scope]]\nid = "Full Access" # <-\nname = "A"\ngrants = ["*"]\n',
        "write a lower-case letter, then",
    ),
    "a scope twice": (SCOPE + SCOPE.replace('"ide"', '"ide" # <-'), "in line 2 already"),
    "a scope like a permission": (
        READ + SCOPE.replace('"ide"', '"read" # <-'),
        '"read" is a permission too',
    ),
    "a scope of an unknown permission": (
        READ + SCOPE.replace('["read"]', '["raed"] # <-'),
        "did you mean read?",
    ),
    "a scope of a scope": (
        READ + SCOPE + '[[scope]]\nid = "b"\nname = "B"\ngrants = ["ide"] # <-\n',
        '"ide" is a named scope; write its permissions instead',
    ),
    "a scope of a scope without permissions": (
        SCOPE.replace('["read"]', '["ide"] # <-'),
        '"ide" is a named scope',
    ),
    "a scope of nothing": (SCOPE.replace('["read"]', "[] # <-"), "the list is empty"),
    "a scope with a filter": (SCOPE.replace('["read"]', '["read@A/b"] # <-'), "has a filter"),
    "a scope of the platform": (
        SCOPE.replace('["read"]', '["coatcheck:operator"] # <-'),
        "Coatcheck's own",
    ),
    "a scope of the management API": (
        SCOPE.replace('["read"]', '["keys:read"] # <-'),
        "is a permission of the management API",
    ),
    "a scope longer than a scope may be": (
        SCOPE.replace('["read"]', f"[{LONG}] # <-"),
        "longer than 4096 characters in all",
    ),
    # [implies]
    "an unknown permission implies": (
        READ + '[implies]\nraed = ["read"] # <-\n',
        '"raed" is no permission of this file; did you mean read?',
    ),
    "an unknown permission is implied": (
        READ + '[implies]\nread = ["raed"] # <-\n',
        "did you mean read?",
    ),
    "a scope is implied": (READ + SCOPE + '[implies]\nread = ["ide"] # <-\n', "is a named scope"),
    "everything is implied": ('[implies]\nread = ["*"] # <-\n', "stands for all permissions"),
    "everything implies": ('[implies]\n"*" = ["read"] # <-\n', "stands for all permissions"),
    "nothing is implied": ("[implies]\nread = [] # <-\n", "the list is empty"),
    "one text is implied": ('[implies]\nread = "write" # <-\n', "no list; write a list of texts"),
    "a dotted name implies": ('[implies]\na.b = ["c"] # <-\n', "stands in quotes"),
    "implies is no table": ("implies = 3 # <-\n", "no table; write [implies]"),
    # [[role]]
    "a role without methods": (ROLE.replace('["GET"]', "[] # <-"), "the list is empty"),
    "a role in lower case": (ROLE.replace('["GET"]', '["get"] # <-'), "an HTTP method in capitals"),
    "HEAD": (ROLE.replace('["GET"]', '["HEAD"] # <-'), "GET, which covers HEAD"),
    "a method twice": (ROLE.replace('["GET"]', '["GET", "GET"] # <-'), "written twice"),
    "a role twice": (
        ROLE + ROLE.replace('"viewer"', '"viewer" # <-').replace('"read"', '"write"'),
        '"viewer" stands in line 2 already',
    ),
    "a role's permission twice": (
        ROLE + ROLE.replace('"read"', '"read" # <-').replace('"viewer"', '"member"'),
        '"read" stands in line 3 already',
    ),
    # [[resource]]
    "a type with a slash": (PLACE.replace('"PLACE"', '"A/B" # <-'), "write one segment"),
    "a wildcard as type": (PLACE.replace('"PLACE"', '"*" # <-'), "cannot stand in a filter"),
    "a type twice": (PLACE + PLACE.replace('"PLACE"', '"PLACE" # <-'), "in line 2 already"),
    "a type without segments": (PLACE.replace('[{ name = "id" }]', "[] # <-"), "the list is empty"),
    "a segment without a name": (PLACE.replace('name = "id" }]', "}] # <-"), "name is missing"),
    "a segment with an unknown key": (
        PLACE.replace('name = "id" }]', 'name = "id", value = ["a"] }] # <-'),
        "did you mean values?",
    ),
    "a segment that is a text": (
        PLACE.replace('[{ name = "id" }]', '["id"] # <-'),
        'write what follows the type, such as [{ name = "id" }]',
    ),
    "two segments with one name": (
        PLACE.replace('name = "id" }]', 'name = "id" }, { name = "id" }] # <-'),
        '"id" stands in line 3 already',
    ),
    "a wildcard among values": (
        PLACE.replace('"id" }]', '"id", values = ["#"] }] # <-'),
        "cannot stand in a filter",
    ),
    "no values": (PLACE.replace('"id" }]', '"id", values = [] }] # <-'), "the list is empty"),
    "within an unknown type": (
        PLACE + 'within = ["PLACES"] # <-\n',
        '"PLACES" is no type of this file; did you mean PLACE?',
    ),
    # [policies], [models], [device_keys], [mcp]
    "a lifetime without a unit": ('[policies]\nmax_lifetime = "365" # <-\n', "such as 365d or 12h"),
    "a lifetime that is a number": ("[policies]\nmax_lifetime = 365 # <-\n", "a text in quotes"),
    "no lifetime": ('[policies]\nmax_lifetime = "0s" # <-\n', "is out of bounds"),
    "a lifetime beyond all dates": ('[policies]\nmax_lifetime = "999999999d" # <-\n', "36500d"),
    "a model with a blank": ('[models]\nnames = ["gpt x"] # <-\n', "without blanks"),
    "no models": ("[models]\nnames = [] # <-\n", "the list is empty"),
    "models without names": ("[models] # <-\n", "names is missing"),
    "devices without scopes": ("[device_keys] # <-\n", "scopes is missing"),
    "devices with an unknown scope": (
        READ + '[device_keys]\nscopes = ["raed"] # <-\n',
        "did you mean read?",
    ),
    "devices that manage": ('[device_keys]\nscopes = ["keys:write"] # <-\n', "the management API"),
    "an MCP server without a name": (
        MCP.replace('[mcp]\nname = "acme"\n', "[mcp] # <-\n"),
        "[mcp]: name is missing",
    ),
    "an MCP server with a loud name": (MCP.replace('"acme"', '"Acme" # <-'), "lower-case letters"),
    "an MCP server in the clear": (
        MCP.replace('"https://mcp.example.com/mcp"', '"http://mcp.example.com/mcp" # <-'),
        "write an https URL",
    ),
    "an MCP server with a query": (MCP.replace('/mcp"', '/mcp?a=b" # <-'), "write an https URL"),
    "an MCP server that a shell would run": (
        MCP.replace('/mcp"', '/$(id)" # <-'),
        "write an https URL",
    ),
    "an MCP server at an unknown audience": (
        MCP + 'audience = "https://x.example" # <-\n',
        "is no audience of this file",
    ),
    "an MCP server with an unknown scope": (
        READ + MCP.replace('["read"]', '["raed"] # <-'),
        "did you mean read?",
    ),
    "an MCP server whose scopes mean nothing there": (
        READ
        + 'audiences = ["https://x.example"]\n'
        + MCP.replace('["read"]', '["read"] # <-')
        + '[[audience]]\nid = "https://x.example"\nshared = true\n',
        f'"read" means nothing at {API}',
    ),
}

# Those that are about audiences, or about what keeps a text from being TOML: with nothing added.
WRONG_WHOLE = {
    "an empty file": ("# <-", "[[audience]] is missing; write a resource server"),
    "no audience in the list": ("audience = [] # <-\n", "the list is empty"),
    "an audience without an id": (AUDIENCE + "[[audience]] # <-\nshared = true\n", "id is missing"),
    "an audience twice": (
        AUDIENCE + f'[[audience]]\nid = "{API}" # <-\nshared = true\n',
        "stands in line 3 already",
    ),
    "an audience with a fragment": (AUDIENCE.replace('.com"', '.com#a" # <-'), "write a URL"),
    "the management API's audience": (
        AUDIENCE + '[[audience]]\nid = "https://auth.example.com/v1" # <-\nshared = true\n',
        "the management API's audience is always there",
    ),
    "an audience of no environment": (
        AUDIENCE + '[[audience]] # <-\nid = "https://x.example"\n',
        'write environment = "live" or "test", or shared = true',
    ),
    "an audience that is not shared either": (
        AUDIENCE + '[[audience]] # <-\nid = "https://x.example"\nshared = false\n',
        "belongs nowhere",
    ),
    "an audience of one environment and of all": (
        LIVE + "shared = true # <-\n" + TEST.replace("default = true\n", ""),
        "leave shared or environment out",
    ),
    "an audience of an unknown environment": (
        AUDIENCE + '[[audience]]\nid = "https://x.example"\nenvironment = "prod" # <-\n',
        '"prod" is no environment of this file; write live, test',
    ),
    "an environment without an audience": (
        '[key]\nenvironments = ["live", "test"] # <-\n' + LIVE,
        '"test" has no audience; add an [[audience]] with environment = "test" and default = true',
    ),
    "an environment without a default": (
        '[key]\nenvironments = ["live", "test"] # <-\n'
        + LIVE
        + TEST.replace("default = true", "default = false"),
        "has no default audience; write default = true below one of its [[audience]] (line 7)",
    ),
    "two defaults in one environment": (
        LIVE + TEST + LIVE.replace(API, "https://b.example").replace("true", "true # <-"),
        '"live" has its default in line 4 already',
    ),
    "a shared default beside one environment's": (
        AUDIENCE + TEST.replace("true", "true # <-"),
        '"test" has its default in line 5 already',
    ),
    "two defaults in one line": (
        INLINE.replace("]", ', { id = "b", environment = "live", default = true }] # <-\n'),
        '"live" has its default in line 1 already',
    ),
    "an algorithm by its other name": (
        AUDIENCE + 'algorithm = "Ed25519" # <-\n',
        "is not known; write ES256 or RS256 or EdDSA",
    ),
    "a shared secret": (AUDIENCE + 'algorithm = "HS256" # <-\n', "write ES256 or RS256 or EdDSA"),
    "an unknown token type": (AUDIENCE + 'token_type = "jwt" # <-\n', "write at+jwt or JWT"),
    "an unknown verifier": (AUDIENCE + 'verifier = "pyjwt" # <-\n', "write coatcheck or any"),
    "too many audiences": (
        AUDIENCE
        + "".join(f'[[audience]]\nid = "https://{n}.example"\nshared = true\n' for n in range(99))
        + '[[audience]] # <-\nid = "https://last.example"\nshared = true\n',
        "more than 100",
    ),
    "too many permissions": (
        AUDIENCE
        + "".join(f'[[permission]]\nname = "p{number}"\n' for number in range(1000))
        + '[[permission]] # <-\nname = "last"\n',
        "more than 1000",
    ),
    # no TOML
    "a text without quotes": (AUDIENCE + "verifier = any # <-\n", "texts stand in quotes"),
    "True": (AUDIENCE.replace("shared = true", "shared = True # <-"), "true and false are lower"),
    "a text that is not closed": ('name = "Acme # <-\n', "a text is not closed"),
    "a list that is not closed": (AUDIENCE + '[key]\nenvironments = ["live" # <-', "is not closed"),
    "a key twice": (AUDIENCE + "shared = true # <-\n", "the same key is written twice"),
    "a table twice": ("[key]\n[key] # <-\n", "the same table is written twice"),
    "a header that is not closed": ("[[audience] # <-\n", "a bracket for each"),
    "a name with a colon": ("[implies]\nkb:write = [] # <-\n", "stands in quotes"),
    "no name at all": ("= 3 # <-\n", "neither [table] nor name = value"),
    "something behind a value": ("a = 1 b # <-\n", "something follows a value"),
    "a byte that is no text": ('\n\nname = "\udcff" # <-\n', "not UTF-8"),
    "NUL": ('name = "a\0b" # <-\n', "a control character"),
    "a number without end": (f"a = {'1' * 5000} # <-\n", "4300 digits"),
    "lists in lists in lists": (f"a = {'[' * 100_000} # <-\n", "nested too deeply"),
    "a novel": (f"# <-\n{'#' * MAX_BYTES}", f"longer than {MAX_BYTES} bytes"),
}


@pytest.mark.parametrize(
    ("text", "cause"),
    [(text + AUDIENCE, cause) for text, cause in WRONG.values()] + list(WRONG_WHOLE.values()),
    ids=[*WRONG, *WRONG_WHOLE],
)
def test_a_problem_is_told_once_with_its_line_and_what_to_write(text: str, cause: str) -> None:
    """Whoever wrote the file goes to the line and mends it, without reading our source."""
    lines = [number for number, line in enumerate(text.split("\n"), 1) if "# <-" in line]

    problems = problems_of(text)

    assert len(problems) == 1
    assert problems[0].startswith(f"coatcheck.toml:{lines[0]}: ")
    assert cause in problems[0]
    assert problems[0].isascii()


def test_a_place_is_written_as_in_the_file() -> None:
    """`[[audience]] id` is found faster than a path of names and numbers."""
    text = AUDIENCE.replace("shared", "shard") + '[key]\nbrand = "a-b"\n' + "[mcp]\n"

    assert [problem.partition(": ")[2] for problem in problems_of(text)] == [
        '[[audience]]: belongs nowhere; write environment = "live" or "test", or shared = true',
        "[[audience]] shard: no such key; did you mean shared?",
        '[key] brand: "a-b" does not fit; write 1 to 16 letters or digits',
        "[mcp]: name is missing; write what clients call the server, such as acme",
        "[mcp]: url is missing; write where the MCP server is",
        "[mcp]: scopes is missing; write what an agent's API key may do",
    ]


def test_all_problems_are_told_at_once_and_in_order() -> None:
    """Nobody starts the service ten times to learn of ten mistakes."""
    lists_of_tables = [
        text
        for text, _ in WRONG.values()
        if text[:2] == "[[" and not re.search(r"^\[[a-z]", text, re.M)
    ]
    text = f'nme = "x" # <-\n{"".join(lists_of_tables)}'
    told = [int(problem.split(":")[1]) for problem in problems_of(text)]

    assert len(lists_of_tables) > 25
    assert told == sorted(told)
    assert set(told) >= {n for n, line in enumerate(text.split("\n"), 1) if "# <-" in line}


def test_a_mistake_brings_no_others_with_it() -> None:
    """What refers to a wrong thing is not wrong itself, and no default is missed for it."""
    text = (
        AUDIENCE.replace(API, "not a url")
        + '[[permission]]\nname = "re ad"\naudiences = ["not a url"]\n'
        + '[[scope]]\nid = "a"\nname = "A"\ngrants = ["re ad"]\n'
    )

    assert [problem.split(": ")[1] for problem in problems_of(text)] == [
        "[[audience]] id",
        "[[permission]] name",
        "[[scope]] grants",
    ]


LINES = {
    "below a text of many lines": ('name = """\n[key]\nbrand = 1\n"""\n[key]\nbrand = 1 # <-\n'),
    "below a literal text of many lines": (
        "name = " + "'" * 3 + "\n[key]" + "'" * 4 + "\n[key]\nbrand = 1 # <-\n"
    ),
    "below a list of many lines": ('[key]\nenvironments = [\n  "live", # ]\n]\nbrand = 1 # <-\n'),
    "behind quotes with brackets": ('[key]\nheader = "a\\"[["\nbrand = 1 # <-\n'),
    "in a table with blanks": ("  [ key ] # [x]\n\tbrand=1 # <-\n"),
    "in a dotted key": ("key.brand = 1 # <-\n"),
    "in a quoted key": ("['key']\n\"br\\u0061nd\" = 1 # <-\n"),
    "in lines as Windows ends them": ("# a\r\n[key]\r\nbrand = 1 # <-\r\n"),
    "in a table in braces": ('key = { environments = ["live"], brand = 1 } # <-\n'),
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_a_line_is_found_however_the_file_is_written(text: str) -> None:
    """TOML has many ways to write a table; the problem is where the key is."""
    line = next(number for number, line in enumerate(text.split("\n"), 1) if "# <-" in line)

    assert f"coatcheck.toml:{line}: [key] brand: no text" in "\n".join(problems_of(text + AUDIENCE))


def test_each_table_of_a_list_has_its_own_lines() -> None:
    """The third permission is told in the third permission's line, segments included."""
    text = READ.replace("read", "a") + READ.replace("read", "b") + "[[permission]]\nabout = 3\n"
    nested = '[[resource]]\ntype = "A"\n[[resource.segments]]\nname = "id"\n'
    nested += "[[resource.segments]]\nname = 3\n"

    assert [problem.split(": ")[:2] for problem in problems_of(text + nested + AUDIENCE)] == [
        ["coatcheck.toml:5", "[[permission]]"],
        ["coatcheck.toml:6", "[[permission]] about"],
        ["coatcheck.toml:12", "[[resource]] segments name"],
    ]


# --- Files


def test_a_file_is_read_and_named_in_what_is_told(tmp_path: Path) -> None:
    """An editor goes to `path:line`."""
    path = tmp_path / "acme.toml"
    path.write_text(f'{AUDIENCE}[key]\nbrand = "a-b"\n', encoding="utf-8")

    with pytest.raises(BadCatalog) as told:
        load(path, SETTINGS)

    assert str(told.value).startswith(f"{path}:7: [key] brand: ")


def test_a_file_as_windows_writes_it_is_read(tmp_path: Path) -> None:
    """A byte order mark and CRLF change nothing."""
    path = tmp_path / "coatcheck.toml"
    path.write_bytes(b"\xef\xbb\xbf" + AUDIENCE.replace("\n", "\r\n").encode())

    assert load(path, SETTINGS) == read(AUDIENCE, SETTINGS)


UNREADABLE = {
    "not UTF-8": (b"# a\nname = '\xff'\n", ":2: not UTF-8; save the file as UTF-8"),
    "too long": (b"#" * (MAX_BYTES + 1), f":1: longer than {MAX_BYTES} bytes"),
}


@pytest.mark.parametrize(("content", "cause"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_text_says_so(tmp_path: Path, content: bytes, cause: str) -> None:
    """A file of the wrong kind is told as such, and never read without end."""
    path = tmp_path / "coatcheck.toml"
    path.write_bytes(content)

    with pytest.raises(BadCatalog) as told:
        load(path, SETTINGS)

    assert str(told.value).startswith(f"{path}{cause}")


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """COATCHECK_CATALOG is mistyped more often than the file is wrong."""
    missing = tmp_path / "none.toml"

    with pytest.raises(BadCatalog, match=r"none\.toml: cannot be read: No such file"):
        load(missing, SETTINGS)
    with pytest.raises(BadCatalog, match="cannot be read: Is a directory"):
        load(tmp_path, SETTINGS)


# --- Whatever comes

SCALARS = st.sampled_from(
    ["1", "true", "-0.5", "1979-05-27", '"read"', '"*"', '"é\\n"', "''", '"""\na"""', "[", "nan"]
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3).map(lambda all_: f"[{', '.join(all_)}]")
NAMES = st.sampled_from(
    [*EVERYTHING.replace("[", " ").replace("]", " ").replace('"', " ").split(), '"a.b"', "a.b"]
)
STATEMENTS = (
    st.builds("{} = {}".format, NAMES, VALUES)
    | NAMES.map("[{}]".format)
    | NAMES.map("[[{}]]".format)
    | st.builds("{} = [{{ {} = {} }}]".format, NAMES, NAMES, VALUES)
    | st.sampled_from([*EVERYTHING.splitlines(), AUDIENCE])
    | st.text(max_size=8)
)


@examples_of(max_examples=150, deadline=None)
@given(st.lists(STATEMENTS, max_size=25).map("\n".join))
def test_garbage_is_a_catalog_or_a_bad_one(text: str) -> None:
    """Nothing that stands in a file is a fault of ours, and what is told has a line each."""
    try:
        read(text, SETTINGS)
    except BadCatalog as told:
        last = len(text.split("\n"))
        for problem in str(told).split("\n"):
            name, line, cause = problem.split(":", 2)
            assert (name, cause[:1]) == ("coatcheck.toml", " ")
            assert 1 <= int(line) <= last


@examples_of(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_with_a_line_gone_or_twice_is_a_catalog_or_a_bad_one(data: st.DataObject) -> None:
    """What editing leaves behind: still a catalog whose parts fit, or told."""
    lines = EVERYTHING.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at : at + 1] = [lines[at]] * data.draw(st.sampled_from([0, 2]))
    try:
        catalog = read("\n".join(lines), SETTINGS)
    except BadCatalog:
        return
    assert set(catalog.default_audiences) == set(catalog.environments)
    assert set(catalog.default_audiences.values()) <= set(catalog.product_audiences)


def test_the_largest_catalog_is_read_in_no_time() -> None:
    """Bounds are worth something only if what they allow is fine; the service waits for this."""
    names = [f"p{number}" for number in range(1000)]
    text = "".join(f'[[permission]]\nname = "{name}"\n' for name in names)
    text += "".join(
        f'[[scope]]\nid = "s{name}"\nname = "S"\ngrants = ["{name}"]\n' for name in names
    )
    catalog = of(text)

    assert catalog.permissions is not None
    assert list(catalog.permissions) == names
    assert len(catalog.named_scopes) == 1000
