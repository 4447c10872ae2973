"""The command line as people and programs run it: real processes, exit codes, stdout and stderr.

What each command decides is tested where it is decided; here is what only a process shows.
"""

import json
import re
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coatcheck import apikey
from support.live import Live, free_port, run_command

OK, ERROR, USAGE, REFUSED, NOT_FOUND, CONFLICT, UNREACHABLE = 0, 1, 2, 3, 4, 5, 7
UNKNOWN_ID = "key_" + "0" * 22
ISSUER = "http://127.0.0.1:8000"
#: Where nobody listens: the port is reserved.
NOBODY = "http://127.0.0.1:1"
#: A thumbprint in base64url: one in 64 begins so.
A_DASHED_KID = "-BLsf" + "0" * 38

#: What an API key looks like, wherever it stands.
AN_API_KEY = re.compile(r"[A-Za-z0-9]+_(?:[a-z0-9]+_)?[0-9A-Za-z]{38}")

Done = subprocess.CompletedProcess[str]


def checked(done: Done) -> Done:
    """What holds for every run: talk on stderr, in sentences, without a secret."""
    assert "Traceback" not in done.stderr, done.stderr
    assert not AN_API_KEY.search(done.stderr), "a secret on stderr"
    return done


def document(done: Done, *, code: int = OK) -> Any:
    """The one JSON document that a command with --json leaves on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("\n")
    return json.loads(done.stdout)


def failed(done: Done, code: int, *sentence: str) -> None:
    """It failed with this exit code, nothing on stdout, and these words for people."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.strip()
    for words in sentence:
        assert words in done.stderr


@dataclass(frozen=True)
class Home:
    """A deployment that was initialized in a folder, and the command line on it."""

    folder: Path
    initialized: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COATCHECK_ISSUER": ISSUER,
            "COATCHECK_DATABASE_URL": f"sqlite:///{self.folder}/coatcheck.db",
            "COATCHECK_KEYS_DIR": str(self.folder / "keys"),
        }

    def run(self, *arguments: str, stdin: str | None = None, **environment: str) -> Done:
        return checked(
            run_command(*arguments, environment=self.environment | environment, stdin=stdin)
        )

    def start(self, *arguments: str, stdin: str | None = None, **environment: str) -> Done:
        """As an operator does: by a new process, that has imported nothing yet."""
        whole = self.environment | environment
        return checked(run_command(*arguments, environment=whole, stdin=stdin, is_started=True))

    def content(self) -> tuple[list[str], list[tuple[str, bytes]]]:
        """Everything in the database, and every file of the keys directory."""
        with closing(sqlite3.connect(self.folder / "coatcheck.db")) as connection:
            rows = list(connection.iterdump())
        files = sorted((self.folder / "keys").iterdir())
        return rows, [(file.name, file.read_bytes()) for file in files]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Initialized once; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("template")
    done = Home(folder, {}).start("init", "--json", "--org-name", "Acme")
    return Home(folder, document(done))


@pytest.fixture
def home(template: Home, tmp_path: Path) -> Home:
    """A deployment of the test's own."""
    shutil.copytree(template.folder, tmp_path / "home")
    return Home(tmp_path / "home", template.initialized)


# --- init


def test_init_prints_the_admin_key_and_a_second_time_changes_nothing(home: Home) -> None:
    """Exit 5: a deployment script that runs again must not end one that lives."""
    assert set(home.initialized) == {"issuer", "organization", "keyId", "key"}
    assert home.initialized["issuer"] == ISSUER
    assert apikey.parse(home.initialized["key"]).environment == "live"
    assert home.initialized["keyId"].startswith("key_")
    before = home.content()

    failed(home.run("init", "--json"), CONFLICT, "nothing was changed")

    assert home.content() == before


# --- each for itself

#: One of each that imports something else; `init` is started too, and `serve` elsewhere.
STARTED = {
    ("keys", "create", "--name", "x"): OK,
    ("signing-keys", "rotate"): OK,
    ("db", "upgrade", "--dry-run"): OK,
    ("config", "check"): OK,
    ("catalog", "show"): OK,
    ("doctor", "--issuer", NOBODY): UNREACHABLE,
    ("token", "--issuer", NOBODY): UNREACHABLE,
    ("verify", "-"): REFUSED,
}


@pytest.mark.parametrize(("arguments", "code"), STARTED.items(), ids=map(" ".join, STARTED))
def test_a_command_imports_what_it_needs(home: Home, arguments: tuple[str, ...], code: int) -> None:
    """Everywhere else a run is forked from a process that has imported all there is."""
    unknown = apikey.make("ck_live")

    done = home.start(*arguments, stdin=unknown, COATCHECK_API_KEY=unknown)

    assert done.returncode == code, done.stderr


# --- keys


def test_the_life_of_an_api_key(home: Home) -> None:
    """Each command with --json leaves one document; the secret is in two of them, never on stderr.

    create, show, disable, enable, rotate, revoke, enable once more in vain, and list.
    """
    made = document(
        home.run(
            *("keys", "create", "--json", "--name", "ci-prod", "--env", "test"),
            *("--scope", "widgets:read", "--scope", "widgets:write", "--expires", "90d"),
        )
    )
    key_id = made["id"]
    shown = document(home.run("keys", "show", key_id, "--json"))
    disabled = document(home.run("keys", "disable", key_id, "--json"))
    enabled = document(home.run("keys", "enable", key_id, "--json"))
    rotated = document(home.run("keys", "rotate", key_id, "--overlap", "1h", "--json"))
    revoked = document(home.run("keys", "revoke", key_id, "--yes", "--json"))
    failed(home.run("keys", "enable", key_id, "--json"), CONFLICT, "was revoked")
    listed = document(home.run("keys", "list", "--json"))

    assert {"id", "name", "organization", "project", "env", "status", "scopes"} <= set(made)
    assert {"audiences", "createdAt", "expiresAt", "lastUsedAt"} <= set(made)
    assert made["key"].startswith("ck_test_")
    assert made["scopes"] == ["widgets:read", "widgets:write"]
    assert shown == {name: value for name, value in made.items() if name not in ("key", "warnings")}
    states = [one["status"] for one in (shown, disabled, enabled, rotated, revoked)]
    assert states == ["active", "disabled", "active", "active", "revoked"]
    assert rotated["id"] == key_id
    assert rotated["key"] != made["key"]
    assert len(rotated["secrets"]) == 2
    assert [one["name"] for one in listed] == ["admin", "ci-prod"]
    told = json.dumps([shown, disabled, enabled, revoked, listed])
    assert not AN_API_KEY.search(told)


def test_for_people_the_secret_is_on_stdout_and_the_advice_on_stderr(home: Home) -> None:
    """`coatcheck keys create … > file` keeps the secret and shows what to know."""
    done = home.run("keys", "create", "--name", "for people")

    assert done.returncode == OK
    assert len(AN_API_KEY.findall(done.stdout)) == 1
    assert "not shown again" in done.stderr
    assert "* is everything" in done.stderr
    assert "never ends" in done.stderr


def test_many_keys_are_json_lines(home: Home) -> None:
    """`--count`: each line a document, all of the same name, each key its own."""
    done = home.run("keys", "create", "--name", "many", "--count", "2000", "--json")

    assert done.returncode == OK, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == len({one["key"] for one in made}) == len({one["id"] for one in made})
    assert len(made) == 2000
    assert {one["name"] for one in made} == {"many"}
    assert all(apikey.parse(one["key"]) for one in made)


FAILURES = {
    "revoke an unknown id": (NOT_FOUND, ("keys", "revoke", UNKNOWN_ID, "--yes", "--json")),
    "withdraw an unknown kid": (NOT_FOUND, ("signing-keys", "withdraw", "nobody", "--yes")),
    "withdraw an unknown kid that begins as an option does": (
        NOT_FOUND,
        ("signing-keys", "withdraw", A_DASHED_KID, "--yes"),
    ),
    "export an unknown kid that begins as a long option does": (
        NOT_FOUND,
        ("signing-keys", "export", f"-{A_DASHED_KID[:-1]}"),
    ),
    "an option that does not exist where a kid may begin with a dash": (
        USAGE,
        ("signing-keys", "withdraw", "any", "--forec", "--yes"),
    ),
    "the same option and no kid": (USAGE, ("signing-keys", "withdraw", "--forec", "--yes")),
    "an expiry that is none": (
        USAGE,
        ("keys", "create", "--name", "x", "--expires", "2027-02-29", "--json"),
    ),
    "an empty scope, which must not mean every scope": (
        USAGE,
        ("keys", "create", "--name", "x", "--scope", "", "--json"),
    ),
}


@pytest.mark.parametrize(("code", "arguments"), FAILURES.values(), ids=FAILURES)
def test_a_failure_has_its_exit_code_a_sentence_and_no_document(
    home: Home, code: int, arguments: tuple[str, ...]
) -> None:
    """Scripts look at the code, people at stderr; nothing half-done is on stdout or stored."""
    before = home.content()

    failed(home.run(*arguments), code)

    assert home.content() == before


def test_without_a_terminal_only_yes_is_an_answer(home: Home) -> None:
    """Exit 2, and nothing was done: a script must not hang, nor do what nobody confirmed."""
    before = home.content()

    failed(home.run("signing-keys", "withdraw", "any"), USAGE, "--yes")
    # What is piped in and looks like an answer is none.
    failed(home.run("keys", "revoke", home.initialized["keyId"], stdin="y\n"), USAGE, "--yes")

    assert home.content() == before


# --- signing keys, db


def test_the_life_of_a_signing_key(home: Home) -> None:
    """list, rotate, rotate again too soon (5), withdraw, withdraw the only one (5)."""
    listed = document(home.run("signing-keys", "list", "--json"))
    rotated = document(home.run("signing-keys", "rotate", "--json"))
    failed(home.run("signing-keys", "rotate", "--json"), CONFLICT, rotated["kid"])
    withdrawn = document(home.run("signing-keys", "withdraw", rotated["kid"], "--yes", "--json"))
    only = next(one["kid"] for one in listed if one["algorithm"] == "ES256")
    failed(home.run("signing-keys", "withdraw", only, "--yes"), CONFLICT, "--force")

    assert {(one["algorithm"], one["state"]) for one in listed} == {
        ("ES256", "signing"),
        ("RS256", "signing"),
    }
    assert (rotated["state"], withdrawn["state"]) == ("pending", "withdrawn")
    assert "private" not in json.dumps([listed, rotated, withdrawn]).lower()


def test_the_database_is_checked_and_upgraded(home: Home) -> None:
    """Settings may come from files, as secret mounts do; a name that is none is pointed out."""
    files = {}
    for name, value in home.environment.items():
        path = home.folder / name
        path.write_text(f"{value}\n", encoding="utf-8")
        files[f"{name}_FILE"] = str(path)
    environment = {**files, "COATCHECK_AUDIENCES": "x"}

    check = checked(run_command("db", "check", "--json", environment=environment))
    upgrade = document(home.run("db", "upgrade", "--json"))

    assert document(check) == {"schema": "ok"}
    assert "COATCHECK_AUDIENCES is no setting" in check.stderr
    assert upgrade["before"] == upgrade["after"]


# --- serve

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@WORKERS
def test_serving_what_was_never_initialized_says_so(tmp_path: Path, workers: str) -> None:
    """Exit 1 with the fix, also when several workers would only fail one after the other."""
    done = Home(tmp_path, {}).run("serve", "--port", str(free_port()), "--workers", workers)

    failed(done, ERROR, "coatcheck init")
    assert not list(tmp_path.iterdir())


@WORKERS
def test_serving_at_a_taken_port_says_so(home: Home, workers: str) -> None:
    """Exit 1 with the fix."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        failed(home.run("serve", "--port", port, "--workers", workers), ERROR, port, "--port")


@WORKERS
def test_serving_with_bad_settings_says_which(home: Home, workers: str) -> None:
    """Exit 1 with the names of all of them, and without the value, which may be a secret."""
    done = home.run(
        *("serve", "--port", str(free_port()), "--workers", workers),
        COATCHECK_ALGORITHM="hunter2",
        COATCHECK_ISSUER="http://auth.example.com",
    )

    failed(done, ERROR, "COATCHECK_ALGORITHM")
    assert "hunter2" not in done.stderr


# --- token and verify, against a running service


@pytest.fixture(scope="module")
def caller(live: Live) -> dict[str, Any]:
    """An API key of the running service."""
    return live.api_key("widgets:read", "widgets:write")


@pytest.fixture(scope="module")
def access_token(live: Live, caller: dict[str, Any]) -> str:
    done = checked(live.command("token", "--api-key-stdin", stdin=caller["key"] + "\n"))
    assert done.returncode == OK, done.stderr
    return done.stdout.strip()


def test_a_token_alone_is_on_stdout(access_token: str) -> None:
    """`curl -H "Authorization: Bearer $(coatcheck token)"`."""
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", access_token)


@pytest.mark.parametrize("source", ["COATCHECK_API_KEY_FILE", "--api-key-file"])
def test_the_api_key_may_come_from_a_file(
    live: Live, caller: dict[str, Any], tmp_path: Path, source: str
) -> None:
    """Where no other user sees it; the document is the endpoint's own answer."""
    file = tmp_path / "key"
    file.write_text(caller["key"] + "\n", encoding="utf-8")
    option = [source, str(file)] if source.startswith("--") else []
    environment = {} if option else {source: str(file)}

    done = live.command("token", "--json", "--scope", "widgets:read", *option, **environment)
    told = document(checked(done))

    assert set(told) == {"access_token", "token_type", "expires_in", "scope"}
    assert told["scope"] == "widgets:read"


def test_a_refused_key_exits_3(live: Live) -> None:
    """The service's own words, and nothing on stdout."""
    done = checked(live.command("token", "--json", COATCHECK_API_KEY=apikey.make("ck_live")))

    failed(done, REFUSED, "invalid_client")


def test_an_api_key_as_an_argument_is_refused_and_not_repeated(live: Live) -> None:
    """K26: every user of the machine can read arguments, and logs keep what stderr says."""
    failed(checked(live.command("token", apikey.make("ck_live"))), USAGE)


def test_a_service_that_does_not_answer_exits_7(home: Home) -> None:
    """Told apart from a refusal: trying again helps."""
    nobody = f"http://127.0.0.1:{free_port()}"

    done = home.run("token", "--issuer", nobody, COATCHECK_API_KEY=home.initialized["key"])

    failed(done, UNREACHABLE, nobody)


def test_a_good_token_is_verified(live: Live, access_token: str, caller: dict[str, Any]) -> None:
    """Its claims are the document."""
    claims = document(checked(live.command("verify", "-", "--json", stdin=access_token)))

    assert (claims["iss"], claims["sub"]) == (live.issuer, caller["id"])
    assert claims["aud"] == live.environment["COATCHECK_AUDIENCE"]


def test_a_token_for_somebody_else_exits_3(live: Live, access_token: str) -> None:
    """With the code that a resource server answers."""
    done = checked(live.command("verify", "-", "--audience", "urn:other", stdin=access_token))

    failed(done, REFUSED, "wrong_audience")


def test_an_api_key_is_looked_up_and_its_place_on_the_command_line_warned_of(
    live: Live, caller: dict[str, Any]
) -> None:
    """K26: others on the machine can read arguments; stdin they cannot."""
    done = checked(live.command("verify", caller["key"], "--json"))

    assert document(done)["id"] == caller["id"]
    assert "can read arguments" in done.stderr


def test_an_unknown_api_key_exits_3(live: Live) -> None:
    """Well-formed, and not in this database."""
    done = checked(live.command("verify", "-", "--json", stdin=apikey.make("ck_live")))

    failed(done, REFUSED, "api_key_unknown")


# --- doctor


def test_the_doctor_finds_a_healthy_service_healthy(live: Live) -> None:
    """One document of findings, exit 0."""
    findings = document(checked(live.command("doctor", "--json")))

    assert len(findings) >= 7
    assert all(finding["ok"] for finding in findings), findings
    assert all(set(finding) == {"check", "ok", "finding"} for finding in findings)


def test_the_doctor_tells_a_service_that_is_away_from_one_that_is_wrong(home: Home) -> None:
    """Exit 7 when nothing else is wrong, 1 when something is; the document comes in both cases."""
    elsewhere = ("--issuer", f"http://127.0.0.1:{free_port()}")
    away = home.run("doctor", "--json", *elsewhere)
    shutil.rmtree(home.folder / "keys")
    wrong = home.run("doctor", "--json", *elsewhere)

    assert (away.returncode, wrong.returncode) == (UNREACHABLE, ERROR)
    bad = [
        [finding["check"] for finding in json.loads(done.stdout) if not finding["ok"]]
        for done in (away, wrong)
    ]
    assert bad == [["service"], ["sealing key", "service"]]
