"""The command line over the management API: here on the database, or there by `--server`.

Commands run in this process, which costs no start-up: against a service that runs beside it, a
deployment of the test's own, or something that only answers.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from coatcheck import apikey
from coatcheck.cli import output
from coatcheck.cli.commands import app
from coatcheck.cli.output import Exit
from coatcheck.cli.target import Answered, Query, asked, edited
from coatcheck.server.manage import authority, devices
from support.deployment import TESTER, Deployment, a_deployment
from support.live import Live, a_service, clean_environment, free_port
from support.secrets import SWEEP

EXAMPLES = Path(__file__).parents[2] / "examples" / "catalogs"
UNKNOWN = {kind: f"{kind}_{'0' * 22}" for kind in ("key", "org", "prj", "mem", "grp")}
#: What an API key looks like, wherever it stands.
AN_API_KEY = re.compile(r"[A-Za-z0-9]+_(?:[a-z0-9]+_)?[0-9A-Za-z]{38}")

#: Runs `coatcheck …` somewhere.
Run = Callable[..., Result]


def command(*arguments: str, stdin: str = "", **environment: str) -> Result:
    """Run `coatcheck …` with just this environment of ours."""
    settings = {name: None for name in os.environ if "COATCHECK" in name} | environment
    done = CliRunner().invoke(app, arguments, input=stdin, env=settings)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert not AN_API_KEY.search(done.stderr), "a secret on stderr"
    return done


def document(done: Result) -> Any:
    assert done.exit_code == Exit.OK, done.stderr
    return json.loads(done.stdout)


def failed(done: Result, code: Exit, *sentence: str) -> None:
    """It failed with this exit code, nothing on stdout, and these words for people."""
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    for words in sentence:
        assert words in done.stderr


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service of this file's own: others need one with a single organization."""
    with a_service(tmp_path_factory.mktemp("managed")) as running:
        yield running


@pytest.fixture(scope="module")
def here(live: Live) -> Run:
    """Commands on the database of the running service."""

    def run_here(*arguments: str, stdin: str = "", **environment: str) -> Result:
        return command(*arguments, stdin=stdin, **{**live.environment, **environment})

    return run_here


@pytest.fixture(scope="module")
def there(live: Live, here: Run) -> Run:
    """Commands by way of the running service, with an operator's API key for all of them."""
    scopes = "keys:read keys:write usage:read audit:read members:write org:admin"
    made = document(
        here(
            *("keys", "create", "--name", "operator", "--json"),
            *("--org", live.initialized["organization"]),
            *("--scope", f"{scopes} coatcheck:operator"),
            *("--audience", f"{live.issuer}/v1"),
        )
    )

    def run_there(*arguments: str, stdin: str = "", **environment: str) -> Result:
        settings = {"COATCHECK_SERVER": live.issuer, "COATCHECK_API_KEY": made["key"]}
        return command(*arguments, stdin=stdin, **{**settings, **environment})

    return run_there


@pytest.fixture
def analytics(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment of the test's own, whose catalog offers what most have not."""
    catalog = tmp_path / "catalog.toml"
    example = (EXAMPLES / "s1-analytics.toml").read_text(encoding="utf-8")
    catalog.write_text(f'{example}\n[device_keys]\nscopes = ["content:read"]\n', encoding="utf-8")
    with a_deployment(tmp_path, catalog=catalog) as made:
        yield made


@pytest.fixture
def product(analytics: Deployment) -> Run:
    """Commands on `analytics`."""
    settings = {
        "COATCHECK_ISSUER": analytics.settings.issuer,
        "COATCHECK_DATABASE_URL": analytics.settings.database_url,
        "COATCHECK_KEYS_DIR": str(analytics.settings.keys_dir),
        "COATCHECK_CATALOG": str(analytics.settings.catalog),
    }

    def run_on_it(*arguments: str, stdin: str = "") -> Result:
        return command(*arguments, stdin=stdin, **settings)

    return run_on_it


# --- the same here and there

#: What differs between two things that were made alike.
OF_ONE = {"id", "key", "mask", "createdAt", "createdBy", "secrets", "expiresAt", "suspendedAt"}
OF_ONE |= {"organization", "project", "bootstrappedAt", "archivedAt", "revokedAt", "disabledAt"}


def alike(told: Any) -> Any:
    """What is left of a document without what is each one's own."""
    if isinstance(told, list):
        return [alike(one) for one in told]
    if isinstance(told, dict):
        return {name: alike(value) for name, value in told.items() if name not in OF_ONE}
    return told


def a_life(run: Run, organization: str) -> Iterator[tuple[str, Any]]:
    """What each command of an API key's life comes to."""

    def step(*arguments: str) -> tuple[str, Any]:
        done = run(*arguments, "--json")
        told = json.loads(done.stdout) if done.stdout else done.stderr
        return " ".join(arguments[:2]), (done.exit_code, told)

    created = step(
        *("keys", "create", "--name", "alike", "--org", organization, "--env", "test"),
        *("--scope", "widgets:read widgets:write", "--scope", "a:b", "--expires", "90d"),
        *("--cidr", "192.0.2.0/24", "--cidr", "2001:db8::/32", "--credit-limit", "2.5"),
    )
    yield created
    key_id = created[1][1]["id"]
    yield step("keys", "show", key_id)
    yield step("keys", "edit", key_id, "--scope", "widgets:read", "--dry-run")
    yield step("keys", "edit", key_id, "--name", "not alike", "--no-cidrs", "--credit-limit", "3")
    yield step("keys", "edit", key_id, "--no-expiry", "--no-credit-limit", "--scope", "a:b")
    yield step("keys", "disable", key_id)
    yield step("keys", "enable", key_id)
    yield step("keys", "rotate", key_id, "--overlap", "1h")
    yield step("keys", "end-overlap", key_id)
    yield step("keys", "usage", key_id)
    yield step("keys", "edit", key_id, "--model", "gpt", "--no-models")
    yield step("keys", "edit", key_id)
    yield step("keys", "edit", key_id, "--permissions", "read")
    yield step("keys", "rotate", key_id, "--overlap", "next week")
    yield step("keys", "revoke", key_id, "--yes")
    yield step("keys", "delete", key_id, "--yes")


def test_the_life_of_an_api_key_is_the_same_here_and_there(
    live: Live, here: Run, there: Run
) -> None:
    """Every command is written once; who learned one way knows the other.

    Secrets are on stdout of create and rotate alone, and nowhere on stderr.
    """
    organization = live.initialized["organization"]
    lives = [dict(enumerate(a_life(run, organization))) for run in (here, there)]

    for step, (name, (code, told)) in lives[0].items():
        other_name, (other_code, other) = lives[1][step]
        own_id = lives[0][0][1][1]["id"]
        other_id = lives[1][0][1][1]["id"]
        assert (name, code) == (other_name, other_code), (told, other)
        assert json.dumps(alike(told)).replace(own_id, "ID") == json.dumps(alike(other)).replace(
            other_id, "ID"
        )
        assert bool(AN_API_KEY.search(json.dumps(told))) == (step in (0, 7))
    codes = [code for _, (code, _) in lives[0].values()]
    assert codes == [0] * 10 + [2, 2, 2, 2, 0, 0]


@pytest.fixture(scope="module")
def things(live: Live, here: Run) -> Mapping[str, str]:
    """An organization with a project, a member, a group and API keys."""
    organization = document(here("orgs", "create", "--name", "Things", "--json"))["id"]
    admin = document(here("orgs", "bootstrap", organization, "--json"))["key"]["id"]
    in_it = ("--org", organization, "--json")
    project = document(here("projects", "create", "--name", "Site", *in_it))["id"]
    person = ("--name", "Ada", "--email", "ada@example.com", "--role", "developer")
    member = document(here("members", "add", *person, *in_it))["id"]
    group = document(here("groups", "create", "--name", "Gold", "--json"))["id"]
    document(here("keys", "create", "--name", "Ada's", "--member", member, *in_it))
    done = here("keys", "create", "--name", "many", "--count", "105", *in_it[:2])
    assert done.exit_code == Exit.OK
    names = {"organization": organization, "admin": admin, "project": project}
    return {**names, "member": member, "group": group}


READING = {
    "keys list": ("keys", "list", "--org", "{organization}", "--limit", "105"),
    "keys list by name": ("keys", "list", "--org", "{organization}", "--name", "ADA"),
    "keys list unused": ("keys", "list", "--org", "{organization}", "--unused-days", "90"),
    "keys list the newest": ("keys", "list", "--org", "{organization}", "--order", "desc"),
    "keys show": ("keys", "show", "{admin}"),
    "keys search": ("keys", "search", "Ada", "--org", "{organization}"),
    "keys usage": ("keys", "usage", "{admin}"),
    "orgs show": ("orgs", "show", "{organization}"),
    "projects list": ("projects", "list", "--org", "{organization}"),
    "projects show": ("projects", "show", "{project}"),
    "members list": ("members", "list", "--org", "{organization}"),
    "members show": ("members", "show", "{member}"),
    "groups list": ("groups", "list"),
    "groups show": ("groups", "show", "{group}"),
    "devices list": ("devices", "list", "--member", "{member}"),
    "usage show": ("usage", "show", "--org", "{organization}"),
    "events list": ("events", "list", "--org", "{organization}", "--subject", "{member}"),
    "mcp clients": ("mcp", "clients"),
    "no such project": ("projects", "rename", UNKNOWN["prj"], "--name", "x"),
    "no such member": ("members", "remove", UNKNOWN["mem"], "--yes"),
    "a status that is none": ("keys", "list", "--org", "{organization}", "--status", "odd"),
    "no MCP server": ("mcp", "install", "codex", "--org", "{organization}"),
}


@pytest.mark.parametrize("arguments", READING.values(), ids=READING)
def test_what_is_read_is_the_same_here_and_there(
    here: Run, there: Run, things: Mapping[str, str], arguments: tuple[str, ...]
) -> None:
    """Documents, tables, sentences and exit codes, to the byte."""
    # What people read is made of the documents: some of it is enough.
    form = () if {"show", "search"} & {*arguments} else ("--json",)
    typed = [argument.format(**things) for argument in arguments]

    own, other = here(*typed, *form), there(*typed, *form)

    assert (own.exit_code, own.stdout) == (other.exit_code, other.stdout)
    assert own.stderr == other.stderr
    assert own.stdout or own.stderr


def test_organizations_and_what_is_in_them_are_managed_there_too(there: Run) -> None:
    """The operator's commands, one after the other; a 404 once what they ended is gone."""
    made = document(there("orgs", "create", "--name", "There", "--bootstrap", "--json"))
    organization, admin = made["organization"]["id"], made["key"]
    assert apikey.parse(admin["key"])
    done = there("orgs", "edit", organization, "--max-lifetime", "90d", "--credit-limit", "5")
    assert "90d" in done.stdout
    in_it = ("--org", organization, "--json")
    project = document(there("projects", "create", "--name", "P", *in_it))["id"]
    there("projects", "rename", project, "--name", "Q")
    archived = document(there("projects", "archive", project, "--yes", "--json"))
    restored = document(there("projects", "restore", project, "--json"))
    person = ("--name", "Bo", "--email", "bo@example.com", "--role", "viewer")
    member = document(there("members", "add", *person, *in_it))["id"]
    edited_member = document(there("members", "edit", member, "--role", "developer", "--json"))
    removed = document(there("members", "remove", member, "--yes", "--json"))
    group = document(there("groups", "create", "--name", "G", "--model", "a b", "--json"))
    cheaper = there("groups", "edit", group["id"], "--price-multiplier", "0.5", "--no-models")
    deleted = document(there("groups", "delete", group["id"], "--yes", "--json"))
    suspended = document(there("orgs", "suspend", organization, "--yes", "--json"))
    resumed = document(there("orgs", "resume", organization, "--json"))

    assert (archived["name"], archived["status"]) == ("Q", "archived")
    assert restored["status"] == "active"
    assert edited_member["role"] == "developer"
    assert removed == {"id": member, "removed": True}
    assert group["models"] == ["a", "b"]
    assert "0.5" in cheaper.stdout
    assert "models" not in cheaper.stdout
    assert deleted == {"id": group["id"], "deleted": True}
    assert (suspended["status"], resumed["status"]) == ("suspended", "active")
    failed(there("members", "show", member), Exit.NOT_FOUND, "mem_")
    failed(there("groups", "show", group["id"]), Exit.NOT_FOUND, "grp_")


def test_pages_follow_each_other_up_to_the_limit(there: Run, things: Mapping[str, str]) -> None:
    """A service tells a hundred at a time; a command as many as were asked for."""
    typed = ("keys", "list", "--json", "--org", things["organization"], "--name", "many")

    every = document(there(*typed, "--all"))
    first = there(*typed, "--limit", "102")
    cursor = re.search(r"--cursor (\S+)", first.stderr)
    assert cursor is not None
    rest = there(*typed, "--cursor", cursor[1])

    assert len({one["id"] for one in every}) == 105
    assert (document(first), document(rest)) == (every[:102], every[102:])
    assert rest.stderr == ""


def test_lists_of_every_organization_go_on_after_an_id(product: Run) -> None:
    """On the machine itself, as before there was more than one way."""
    organization = document(product("orgs", "create", "--name", "Second", "--json"))["id"]
    product("keys", "create", "--name", "here", "--org", organization, "--scope", "content:read")

    every = document(product("keys", "list", "--json"))
    first = product("keys", "list", "--json", "--limit", "1")
    rest = product("keys", "list", "--json", "--after", every[0]["id"])

    assert {one["name"] for one in every} == {"admin", "here"}
    assert f"--after {every[0]['id']}" in first.stderr
    assert (document(first), document(rest)) == (every[:1], every[1:])
    failed(product("keys", "list", "--after", every[0]["id"], "--env", "live"), Exit.USAGE)


def test_whoami_says_whose_the_api_key_is(live: Live, here: Run, there: Run) -> None:
    """There it is an API key; here it is whoever owns the machine."""
    known = document(there("whoami", "--json"))
    local = document(here("whoami", "--json"))

    assert known["organization"] == live.initialized["organization"]
    assert known["actor"] == known["key"]["id"]
    assert known["operator"] is True
    assert local["actor"].startswith("cli:")
    assert (local["operator"], local["organization"]) == (True, None)
    assert known["key"]["mask"] in there("whoami").stdout


def test_what_was_made_here_works_before_its_organization_is_switched_on(
    here: Run, there: Run
) -> None:
    """Who owns the machine waits for nobody; a service says what to do first."""
    made = document(here("orgs", "create", "--name", "Early", "--json"))
    typed = ("keys", "create", "--name", "early", "--org", made["id"], "--json")

    assert made["bootstrappedAt"] is None
    assert document(here(*typed))["status"] == "active"
    failed(there(*typed), Exit.CONFLICT, f"coatcheck orgs bootstrap {made['id']}")


# --- where the API key comes from


@pytest.mark.parametrize("source", ["environment", "its file", "a file", "standard input"])
def test_the_api_key_comes_from_where_no_other_user_sees_it(
    live: Live, tmp_path: Path, source: str
) -> None:
    """Never from an argument; a file and standard input come before the environment."""
    key = live.initialized["key"]
    file = tmp_path / "key"
    file.write_text(key + "\n", encoding="utf-8")
    SWEEP.excuse(file)
    options: dict[str, tuple[str, ...]] = {
        "a file": ("--api-key-file", str(file)),
        "standard input": ("--api-key-stdin",),
    }
    environment = {
        "environment": {"COATCHECK_API_KEY": key},
        "its file": {"COATCHECK_API_KEY_FILE": str(file)},
    }.get(source, {"COATCHECK_API_KEY": "ck_live_another"})
    typed = ("whoami", "--json", "--server", f"{live.issuer}/", *options.get(source, ()))

    known = document(command(*typed, stdin=f"{key}\n", **environment))

    assert known["key"]["id"] == live.initialized["keyId"]


SOMEBODY_ELSES = apikey.make("ck_live")
TYPED_SECRETS = {
    "an id": ("keys", "revoke", SOMEBODY_ELSES, "--yes"),
    "a query": ("keys", "search", SOMEBODY_ELSES),
    "a filter": ("keys", "list", "--name", SOMEBODY_ELSES),
    "an organization": ("orgs", "show", SOMEBODY_ELSES),
    "a word too many": ("whoami", SOMEBODY_ELSES),
    "a word too many after an id": ("keys", "show", UNKNOWN["key"], SOMEBODY_ELSES),
}


@pytest.mark.parametrize("arguments", TYPED_SECRETS.values(), ids=TYPED_SECRETS)
def test_an_api_key_as_an_argument_is_refused_and_travels_nowhere(
    here: Run, arguments: tuple[str, ...]
) -> None:
    """K26: every user of the machine can read arguments, and servers log paths and queries.

    Nobody listens there: exit 7 would say that it was sent.
    """
    there = {"COATCHECK_SERVER": f"http://127.0.0.1:{free_port()}", "COATCHECK_API_KEY": "x"}

    failed(command(*arguments, **there), Exit.USAGE, "never an argument")
    failed(here(*arguments), Exit.USAGE, "never an argument")


def test_a_pasted_secret_finds_its_api_key(live: Live, here: Run, there: Run) -> None:
    """From standard input, in a body, which nothing logs."""
    made = document(
        here(
            "keys", "create", "--name", "lost", "--json", "--org", live.initialized["organization"]
        )
    )
    typed = ("keys", "search", "-", "--json", "--org", live.initialized["organization"])

    for run_it in (here, there):
        (found,) = document(run_it(*typed, stdin=f"{made['key']}\n"))
        assert found["id"] == made["id"]


# --- exit codes


class Fixed:
    """A target that answers the same to everything, and keeps what it was asked."""

    def __init__(self, *answers: Answered) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, object, Mapping[str, str]]] = []

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        self.asked.append((method, path, body, headers or {}))
        return self.answers.pop(0)


def a_problem(status: int, **more: object) -> Answered:
    told = {"type": "about:blank", "title": "T", "status": status, "detail": "That went wrong."}
    return Answered(status, told | {"code": "a_code", "requestId": "r"} | more, {})


EXITS = {
    **dict.fromkeys((400, 413, 415, 422, 428), Exit.USAGE),
    **dict.fromkeys((401, 403), Exit.REFUSED),
    404: Exit.NOT_FOUND,
    **dict.fromkeys((409, 412), Exit.CONFLICT),
    **dict.fromkeys((429, 500, 502, 503), Exit.UNREACHABLE),
    **dict.fromkeys((405, 418), Exit.ERROR),
}


@pytest.mark.parametrize(("status", "code"), EXITS.items())
def test_each_class_of_problem_has_its_exit_code(
    status: int, code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts look at it; people read the detail, each wrong input and what is known beside."""
    errors = [{"pointer": "/expiresAt", "detail": "is late"}, {"pointer": "", "detail": "is odd"}]
    problem = a_problem(status, errors=errors, lastUsedAt="2026-11-21T05:15:00Z")

    with pytest.raises(typer.Exit) as ended:
        asked(Fixed(problem), "GET", "/keys")

    assert ended.value.exit_code == code
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "coatcheck: That went wrong.",
        "  --expires: is late",
        "  is odd",
        "  lastUsedAt: 2026-11-21T05:15:00Z",
    ]


def test_an_edit_says_what_it_was_an_edit_of() -> None:
    """`If-Match`: what somebody else changed in between is not written over."""
    target = Fixed(Answered(200, {}, {"etag": '"now"'}), Answered(200, {"name": "y"}, {}))

    done = edited(target, "/keys/one", {"name": "y"})

    assert done.document == {"name": "y"}
    assert target.asked == [
        ("GET", "/keys/one", None, {}),
        ("PATCH", "/keys/one", {"name": "y"}, {"if-match": '"now"'}),
    ]


def test_an_api_key_that_may_not_is_told_so(live: Live) -> None:
    """Exit 3: unknown, and known without the platform's permission."""
    unknown = {"COATCHECK_SERVER": live.issuer, "COATCHECK_API_KEY": SOMEBODY_ELSES}
    admin = unknown | {"COATCHECK_API_KEY": live.initialized["key"]}

    failed(command("keys", "list", **unknown), Exit.REFUSED)
    failed(command("orgs", "create", "--name", "x", **admin), Exit.REFUSED, "coatcheck:operator")


def test_what_works_on_the_machine_only_says_so(there: Run) -> None:
    """Exit 2, before anything is sent or made."""
    failed(there("keys", "create", "--name", "x", "--count", "2"), Exit.USAGE, "--server")
    failed(there("keys", "list", "--after", UNKNOWN["key"]), Exit.USAGE, "--cursor")


MISUSES = {
    "no API key": ("--server", "http://127.0.0.1:9"),
    "an API key and no service": ("--api-key-stdin",),
    "no URL": ("--server", "coatcheck", "--api-key-stdin"),
    "in the clear": ("--server", "http://0.0.0.0:9", "--api-key-stdin"),
    "with a user name": ("--server", "http://a:b@127.0.0.1:9", "--api-key-stdin"),
}


@pytest.mark.parametrize("arguments", MISUSES.values(), ids=MISUSES)
def test_a_service_that_must_not_be_asked_so_is_not(arguments: tuple[str, ...]) -> None:
    """Exit 2: in the clear an API key does not leave the machine."""
    failed(command("whoami", *arguments, stdin="ck_live_x"), Exit.USAGE, "coatcheck: ")


def test_in_the_clear_is_for_who_says_so() -> None:
    """COATCHECK_ALLOW_INSECURE_ISSUER, as for the service itself; then nobody is there."""
    typed = ("whoami", "--server", f"http://0.0.0.0:{free_port()}", "--api-key-stdin")
    allowed = {"COATCHECK_ALLOW_INSECURE_ISSUER": "true"}

    failed(command(*typed, stdin="ck_live_x", **allowed), Exit.UNREACHABLE, "no answer")


@contextmanager
def somebody(status: int, body: bytes, **headers: str) -> Iterator[Mapping[str, str]]:
    """A server that gives one answer to everything; the settings that lead there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            yield {"COATCHECK_SERVER": url, "COATCHECK_API_KEY": "ck_live_x"}
        finally:
            server.shutdown()
            thread.join()


STRANGERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "a page that is not found": (404, b"<html>", {}),
    "a problem of another kind": (404, b'{"message": "no route"}', {}),
    "a list": (200, b"[]", {}),
    "a redirect": (302, b"{}", {"Location": "http://127.0.0.1:9/"}),
    "an empty answer of a proxy": (502, b"{}", {}),
}


@pytest.mark.parametrize(("status", "body", "headers"), STRANGERS.values(), ids=STRANGERS)
def test_what_does_not_answer_as_coatcheck_counts_as_away(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    """Exit 7: a stranger's 404 does not say that there is no such API key."""
    with somebody(status, body, **headers) as there:
        failed(command("whoami", **there), Exit.UNREACHABLE, str(status))


def test_what_a_service_says_does_not_reach_the_terminal_as_commands() -> None:
    """Colours, bells, titles and turned writing are taken out of results and sentences."""
    evil = "a\x1b]0;owned\x07b\u202ec\r\nd"
    page = {"data": [{"id": evil, "name": evil}], "nextCursor": None}
    problem = {"detail": evil, "code": evil, evil: evil}

    with somebody(200, json.dumps(page).encode()) as there:
        listed = command("orgs", "list", **there)
    with somebody(200, json.dumps({evil: evil}).encode()) as there:
        shown = command("orgs", "show", UNKNOWN["org"], **there)
    with somebody(409, json.dumps(problem).encode()) as there:
        refused = command("orgs", "list", **there)

    assert refused.exit_code == Exit.CONFLICT
    for said in (listed.stdout, shown.stdout, refused.stderr):
        assert "a]0;ownedbcd" in said
        assert all(one.isprintable() or one == "\n" for one in said)


def test_plain_text_stays_as_it_is() -> None:
    """People's names have letters of every language."""
    assert output.plain("Zoë 李 ع-1") == "Zoë 李 ع-1"


# --- what only some catalogs and states show


def test_deleting_what_is_in_use_shows_the_evidence(analytics: Deployment, product: Run) -> None:
    """Exit 5 with when and how often, and what to say if it is meant."""
    made = document(product("keys", "create", "--name", "busy", "--json"))
    with analytics.store.transaction() as tx:
        tx.add_usage({made["id"]: (3, 1, int(time.time()))})

    refused = product("keys", "delete", made["id"], "--yes")
    failed(refused, Exit.CONFLICT, "lastUsedAt: ", "tokensIssued: 3", "--confirm")
    deleted = document(product("keys", "delete", made["id"], "--yes", "--confirm", "--json"))

    assert deleted == {"id": made["id"], "deleted": True}
    failed(product("keys", "show", made["id"]), Exit.NOT_FOUND)


def test_a_kept_secret_is_shown_again_and_many_are_kept_as_one(
    analytics: Deployment, product: Run
) -> None:
    """`keys reveal`, where the organization keeps copies; elsewhere exit 5 with what to do."""
    organization = analytics.organization_id
    before = document(product("keys", "create", "--name", "before", "--json"))
    failed(product("keys", "reveal", before["id"]), Exit.CONFLICT, "rotate")
    product("orgs", "edit", organization, "--recoverable")

    (one,) = [document(product("keys", "create", "--name", "kept", "--json"))]
    several = product("keys", "create", "--name", "kept", "--count", "2").stdout.splitlines()
    made = [one, *map(json.loads, several)]
    revealed = product("keys", "reveal", one["id"])

    assert revealed.stdout.splitlines()[1].split() == ["key", one["key"]]
    for each in made:
        assert document(product("keys", "reveal", each["id"], "--json"))["key"] == each["key"]


def test_what_connects_an_ai_client_is_on_stdout_and_the_advice_on_stderr(product: Run) -> None:
    """Lines as they are typed; the API key in them is a new one, of that name."""
    done = product("mcp", "install", "claude-code", "--device", "build-7")
    told = document(product("mcp", "install", "cursor", "--name", "mine", "--json"))

    assert done.exit_code == Exit.OK
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("export ")
    assert second.startswith("claude mcp add --transport http ")
    assert AN_API_KEY.search(first)
    assert "keys revoke" in done.stderr
    assert told["key"]["name"] == "mine"
    assert told["steps"][0]["text"].startswith("cursor://")
    failed(product("mcp", "install", "nothing"), Exit.USAGE, "claude-code")


def test_a_device_is_signed_out_by_its_api_key(analytics: Deployment, product: Run) -> None:
    """It is listed as its member's; what is no device's is left alone."""
    person = ("--name", "Ada", "--email", "ada@example.com", "--role", "developer")
    member = document(product("members", "add", *person, "--json"))["id"]
    signed_in = devices.sign_in(
        analytics.store,
        analytics.catalog,
        member,
        "laptop",
        authority.local(TESTER),
        name="MacBook",
        current_key=None,
        now=int(time.time()),
        issuer=analytics.settings.issuer,
    )
    other = document(product("keys", "create", "--name", "other", "--json"))

    listed = document(product("devices", "list", "--member", member, "--json"))
    revoked = document(product("devices", "revoke", signed_in.api_key.id, "--yes", "--json"))
    failed(product("devices", "revoke", other["id"], "--yes"), Exit.NOT_FOUND, "keys revoke")

    assert [(one["device"], one["name"], one["status"]) for one in listed] == [
        ("laptop", "MacBook", "active")
    ]
    assert (revoked["id"], revoked["status"]) == (listed[0]["id"], "revoked")
    assert document(product("devices", "list", "--member", member, "--json")) == []


# --- packages


def test_asking_a_service_loads_nothing_of_the_service(live: Live) -> None:
    """The `cli` extra is enough: whoever manages API keys from afar has nothing else installed."""
    program = (
        "import json, sys\n"
        "from coatcheck.cli.commands import app\n"
        "try:\n"
        "    app(['keys', 'list', '--json', '--limit', '1'])\n"
        "finally:\n"
        "    print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    settings = {"COATCHECK_SERVER": live.issuer, "COATCHECK_API_KEY": live.initialized["key"]}
    done = run(
        [sys.executable, "-c", program],
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 1
    loaded = json.loads(done.stderr.splitlines()[-1])
    # Not pydantic: Typer looks for it by itself.
    heavy = "starlette sqlmodel sqlalchemy authlib uvicorn jinja2 limits yaml alembic"
    assert not {name.partition(".")[0] for name in loaded} & set(heavy.split())
    assert not [name for name in loaded if name.startswith("coatcheck.server")]
