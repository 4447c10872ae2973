"""Who may import whom, and who may make what: read from the source, a wrong arrow shows at once.

An arrow that is missing here is a decision: add it where it belongs, with a reason in
docs/architecture.md, or find the seam that makes it unnecessary.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "app"

WORDS = (
    "apikey base62 base64url ids scope vocabulary token_profile feed_profile durations"
    " client_address"
)

#: Rooms from the ground up: a room imports itself and what stands behind it, nothing else.
ROOMS: dict[str, str] = {
    # The words of both sides: the standard library and each other.
    **dict.fromkeys(WORDS.split(), WORDS),
    "restrictions": WORDS,
    # How the issuer is asked, by whoever installs the base.
    "http": WORDS,
    "verifier": f"{WORDS} http restrictions",
    "testing": f"{WORDS} http restrictions verifier",
    # Short imports of adapters.
    "aiohttp": "verifier",
    "fastapi": "verifier",
    "mcp": "verifier",
    "asgi": "verifier",
    "authlib": "verifier",
    "flask": "verifier",
    "django": "verifier",
    "drf": "verifier",
    "starlette": "verifier",
    "wsgi": "verifier",
    # Callers of somebody's API: they know the issuer, and nothing of who verifies.
    "caller": f"{WORDS} http",
    "httpx": "caller",
    "httpx2": "caller",
    "requests": "caller",
    # The service, each over what stands above it.
    "server.settings": WORDS,
    "server.catalog": f"{WORDS} restrictions server.settings",
    "server.catalog_file": f"{WORDS} restrictions server.catalog server.settings",
    "server.changes": WORDS,
    "server.sealing": "",
    "server.store": f"{WORDS} server.changes",
    "server.keyfile": WORDS,
    # What it publishes is read as our own verifier reads it, before it is published.
    "server.signing": (
        f"{WORDS} server.changes server.keyfile server.sealing server.store verifier.keyset"
    ),
    "server.logs": WORDS,
    "server.metrics": "",
    "server.inflight": "",
    "server.throttle": WORDS,
    "server.usage": "server.store",
    "server.alarms": f"{WORDS} server.changes server.store",
    "server.feed": f"{WORDS} server.changes server.signing server.store",
    "server.issue": (
        f"{WORDS} restrictions server.catalog server.changes server.signing server.store"
        " verifier.check verifier.errors verifier.keyset"
    ),
    "server.oauth": (
        f"{WORDS} restrictions server.catalog server.issue server.changes server.feed"
        " server.inflight"
        " server.logs server.metrics server.signing server.store server.throttle server.usage"
        " server.alarms"
    ),
    # The sealing key, for copies of secrets that may be shown again; never a signing key.
    "server.manage": (
        f"{WORDS} restrictions server.catalog server.changes server.sealing server.store"
    ),
    "server.own_verifier": (
        f"{WORDS} restrictions server.alarms server.catalog server.issue server.store"
        " server.throttle server.usage verifier.errors verifier.presented verifier.product"
    ),
    "server.authz": (
        f"{WORDS} restrictions server.alarms server.catalog server.inflight server.issue"
        " server.metrics server.oauth.wire server.own_verifier server.signing server.store"
        " server.throttle verifier.errors verifier.presented"
    ),
    "server.inprocess": (
        f"{WORDS} restrictions server.changes server.logs server.manage server.own_verifier"
        " server.signing server.store verifier.errors verifier.presented"
    ),
    "server.pages": "",
    "server.metrics_page": (
        f"{WORDS} server.feed server.inflight server.metrics server.signing server.store"
    ),
    "server.listen": "server.inflight server.logs server.metrics",
    # Composition: these know many rooms, and no room knows them.
    "server.catalog_start": "server.catalog server.changes server.store",
    "server.resealing": "server.changes server.manage server.sealing server.signing server.store",
    "server.setup": (
        f"{WORDS} server.catalog server.changes server.manage server.sealing server.settings"
        " server.signing server.store"
    ),
    "server.restore": (
        f"{WORDS} server.changes server.manage server.sealing server.settings server.setup"
        " server.signing server.store"
    ),
    "server.recovery": (
        f"{WORDS} server.catalog server.changes server.manage server.sealing server.settings"
        " server.setup server.signing server.store"
    ),
    "server.app": f"{WORDS} server",
    "cli": f"{WORDS} http caller server verifier",
    # Packages that hold nothing but a docstring.
    "server": "",
    "": "",
}

#: Packages of others, and the only rooms or modules that import them.
FOREIGN: dict[str, str] = {
    "authlib": "server.oauth verifier.adapters.authlib",
    "aiohttp": "verifier.adapters.aiohttp",
    "fastapi": "verifier.adapters.fastapi",
    "mcp": "verifier.adapters.mcp",
    "yarl": "verifier.adapters.aiohttp",
    "flask": "verifier.adapters.flask",
    "django": "verifier.adapters.django verifier.adapters.drf",
    "asgiref": "verifier.adapters.django",
    "rest_framework": "verifier.adapters.drf",
    "werkzeug": "verifier.adapters.flask",
    "sqlmodel": "server.store",
    "sqlalchemy": "server.store",
    "sqlite3": "server.store",
    "alembic": "server.store",
    "psycopg": "server.store",
    "jwt": "verifier.keyset server.keyfile testing.issuer",
    "cryptography": (
        "verifier.check verifier.keyset server.keyfile server.sealing server.signing testing.issuer"
    ),
    "starlette": (
        "server.app server.inprocess server.metrics_page server.oauth.metadata"
        " verifier.adapters.starlette verifier.adapters.fastapi starlette"
    ),
    "uvicorn": "server.listen",
    "httptools": "server.listen",
    "pydantic": "server.settings server.manage.api verifier.adapters.mcp",
    "limits": "server.throttle",
    "jinja2": "server.pages",
    "markupsafe": "server.pages",
    "yaml": "server.pages",
    "httpx2": "http caller.for_httpx2 cli.diagnosis cli.target",
    "httpx": "caller.for_httpx",
    "requests": "caller.for_requests",
    "keyring": "caller.api_key_origin",
    "typer": "cli",
    "pytest": "testing.plugin",
}

#: Types that prove that a step was taken, and the one module that takes it.
MADE_IN: dict[str, str] = {
    "ApiKeyRecord": "server.store.hot",
    # The rules make the widest one that an API key can ask for, to see whether it fits a token.
    "Allowance": "server.issue.decide server.manage.api_key_rules",
    "CheckedApiKey": "server.manage.api_key_rules",
    "CheckedTerms": "token_profile",
    "CheckedClaims": "token_profile",
    "Issued": "server.issue.mint",
    "OwnToken": "server.issue.inspect",
    "from_claims": "verifier.verifier",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its name without `coatcheck.`, parsed."""
    found = {}
    for path in sorted((APP / "coatcheck").rglob("*.py")):
        parts = path.relative_to(APP / "coatcheck").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(module: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in it, in functions and for types, too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: they read the same everywhere"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if is_module(submodule) else node.module


def is_module(name: str) -> bool:
    return name.partition(".")[0] == "coatcheck" and ours(name) in modules()


def ours(name: str) -> str:
    return name.removeprefix("coatcheck").removeprefix(".")


def lies_in(module: str, rooms: str) -> bool:
    """Whether a module is, or is in, one of these rooms."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms.split())


def room_of(module: str) -> str:
    return max((room for room in ROOMS if lies_in(module, room) or room == module), key=len)


each_module = pytest.mark.parametrize("module", modules(), ids=lambda name: name or "coatcheck")


def test_there_is_something_to_look_at() -> None:
    """A map of an empty country would always be right."""
    assert len(modules()) > 40


@pytest.mark.parametrize("room", [room for room in ROOMS if room])
def test_every_room_on_the_map_exists(room: str) -> None:
    """A name that was changed in the code is changed here."""
    assert room in modules()


def test_every_module_is_in_a_room() -> None:
    """A new room says here what it may know."""
    bare = {module for module in modules() if room_of(module) in ("", "server")}

    assert bare == {"", "server"}


def test_the_map_has_a_ground() -> None:
    """Rooms import what stands above them in the map, so no two can import each other."""
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        if lies_in(room, WORDS) or room in ("server.app", "cli"):
            continue
        for other in allowed.split():
            assert order.index(room_of(other)) < order.index(room), (room, other)


@each_module
def test_a_module_imports_only_the_rooms_it_may_know(module: str) -> None:
    """docs/architecture.md, who may import whom."""
    room = room_of(module)
    allowed = f"{ROOMS[room]} {room}"
    wrong = {
        name
        for name in imports(modules()[module])
        if name.partition(".")[0] == "coatcheck" and not lies_in(ours(name), allowed)
    }

    assert not wrong


@each_module
def test_a_module_imports_only_the_packages_it_may_know(module: str) -> None:
    """Each package of others has one place; a swap touches that one only."""
    wrong = {
        name
        for name in imports(modules()[module])
        if (package := name.partition(".")[0]) != "coatcheck"
        and (package not in sys.stdlib_module_names or package in FOREIGN)
        and not lies_in(module, FOREIGN.get(package, ""))
    }

    assert not wrong


def importers_of(room: str) -> set[str]:
    return {
        module
        for module, parsed in modules().items()
        if any(
            name.partition(".")[0] == "coatcheck" and lies_in(ours(name), room)
            for name in imports(parsed)
        )
    }


def test_nobody_imports_what_puts_it_together() -> None:
    """The application and the command line know everybody; nobody knows them."""
    assert all(lies_in(module, "cli") for module in importers_of("server.app"))
    assert all(lies_in(module, "cli") for module in importers_of("cli"))


def test_use_cases_that_write_never_sign() -> None:
    """`manage` works on the database alone: it can neither make nor read a token."""
    for room in ("server.signing", "server.oauth", "server.issue"):
        assert not any(lies_in(module, "server.manage") for module in importers_of(room))


def test_of_the_service_only_inspection_reads_tokens_as_a_verifier_does() -> None:
    """Issuing needs no verifier; introspection checks by the very code that others install.

    A signing key is tried by that code before it is published, too.
    """
    readers = {module for module in importers_of("verifier") if lies_in(module, "server")}

    assert readers == {
        *("server.issue.inspect", "server.signing", "server.own_verifier", "server.inprocess"),
        *("server.authz.asked", "server.authz.endpoint", "server.authz.gateways"),
    }


@pytest.mark.parametrize(("made", "module"), MADE_IN.items(), ids=MADE_IN)
def test_a_proof_is_made_in_one_module_only(made: str, module: str) -> None:
    """Else a step could be skipped, and the type would say it was taken."""
    makers = {
        name
        for name, parsed in modules().items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call) and called(node) == made
    }

    assert makers == set(module.split())


def called(call: ast.Call) -> str | None:
    """The last name of what is called: `Issued` of `mint.Issued(…)`."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else None


def test_a_proof_is_changed_by_restrictions_only() -> None:
    """`replace` makes a new one past its maker.

    Restrictions may, because `decide` compares; the verifier may, because the caller by raw key
    is the caller by token in all but `method`.  Use cases change what is wanted, and inspection
    what is expected, neither of which proves anything.
    """
    changers = {
        module
        for module, parsed in modules().items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.ImportFrom)
        and node.module in ("dataclasses", "copy")
        and any(alias.name == "replace" for alias in node.names)
    }

    may = "restrictions verifier server.manage server.issue.inspect"
    assert all(lies_in(module, may) for module in changers)


def test_nobody_goes_around_a_constructor() -> None:
    """`object.__new__` and `object.__setattr__` would make or change what is frozen."""
    around = {
        module
        for module, parsed in modules().items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call) and called(node) in ("__new__", "__setattr__")
    }

    assert not around


#: By import: what it must not load, because who imports it has not installed it.
LIGHT: dict[str, str] = {
    "coatcheck.verifier": (
        "starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml alembic"
        " coatcheck.server coatcheck.cli"
    ),
    "coatcheck.starlette": (
        "sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml alembic"
        " coatcheck.server coatcheck.cli"
    ),
    "coatcheck.testing.issuer": (
        "pytest starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml"
        " alembic coatcheck.server coatcheck.cli"
    ),
    "coatcheck.caller": (
        "starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml alembic"
        " jwt cryptography httpx requests keyring coatcheck.verifier coatcheck.server coatcheck.cli"
    ),
    "coatcheck.django": (
        "starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml alembic"
        " rest_framework coatcheck.server coatcheck.cli"
    ),
    "coatcheck.flask": (
        "starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic limits yaml alembic"
        " coatcheck.server coatcheck.cli"
    ),
    "coatcheck.authlib": (
        "flask django starlette sqlmodel sqlalchemy typer uvicorn pydantic jinja2 limits yaml"
        " alembic coatcheck.server coatcheck.cli"
    ),
    "coatcheck.fastapi": (
        "sqlmodel sqlalchemy authlib typer uvicorn limits alembic coatcheck.server coatcheck.cli"
    ),
    "coatcheck.aiohttp": (
        "starlette sqlmodel sqlalchemy authlib typer uvicorn pydantic jinja2 limits yaml alembic"
        " coatcheck.server coatcheck.cli"
    ),
    "coatcheck.mcp": (
        "fastapi sqlmodel sqlalchemy authlib limits alembic coatcheck.server coatcheck.cli"
    ),
    "coatcheck.cli.commands": (
        "starlette sqlmodel sqlalchemy authlib uvicorn pydantic jinja2 limits yaml alembic"
        " coatcheck.server"
    ),
}


@pytest.mark.parametrize(("imported", "without"), LIGHT.items(), ids=LIGHT)
def test_what_others_install_loads_nothing_of_the_service(imported: str, without: str) -> None:
    """A resource server has the base install only; a caller the command line beside it."""
    program = f"import json, sys, {imported}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = json.loads(done.stdout)

    assert imported in loaded
    assert not [module for module in loaded if lies_in(module, without)]
