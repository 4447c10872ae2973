"""What operators type: config check, admin recover, db backup, restore, new-log, upgrade, doctor.

The commands run in this process, because a process for each would cost more than what it does.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command as alembic
from sqlalchemy import create_engine
from typer.testing import CliRunner, Result

from coatcheck import apikey
from coatcheck.cli.commands import app
from coatcheck.scope import ORGANIZATION_PERMISSIONS
from coatcheck.server import recovery, sealing
from coatcheck.server.manage.api_keys import sealed_name
from coatcheck.server.settings import Settings, masked
from coatcheck.server.store import migrations, open_store
from support.deployment import HOUR, ISSUER, NOON, TESTER, a_deployment
from support.secrets import SWEEP

OK, ERROR, USAGE, REFUSED, NOT_FOUND, CONFLICT = 0, 1, 2, 3, 4, 5
DAY = 86_400


def run(*arguments: str, **environment: str) -> Result:
    """A command with just this environment of ours."""
    ours = {name: None for name in os.environ if name.startswith("COATCHECK_")}
    done = CliRunner().invoke(app, arguments, env={**ours, **environment})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    SWEEP.command(arguments, done.stdout, done.stderr)
    return done


def document(done: Result, *, code: int = OK) -> Any:
    """The one JSON document that a command with --json leaves on stdout."""
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout)


def failed(done: Result, code: int, *sentence: str) -> None:
    """It failed with this exit code, nothing on stdout, and these words for people."""
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    for words in sentence:
        assert words in done.stderr


@dataclass(frozen=True)
class Home:
    """A deployment in a folder, and the command line on it."""

    folder: Path
    admin_id: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COATCHECK_ISSUER": ISSUER,
            "COATCHECK_DATABASE_URL": f"sqlite:///{self.folder}/coatcheck.db",
            "COATCHECK_KEYS_DIR": str(self.folder / "keys"),
        }

    @property
    def database(self) -> Path:
        return self.folder / "coatcheck.db"

    def run(self, *arguments: str, **environment: str) -> Result:
        return run(*arguments, **self.environment | environment)

    def statuses(self) -> dict[str, str]:
        return {one["id"]: one["status"] for one in document(self.run("keys", "list", "--json"))}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with a_deployment(tmp_path) as deployment:
        yield Home(tmp_path, deployment.initialized.key_id)


# --- db backup, restore, new-log


def test_a_drill_from_backup_to_restore(home: Home, tmp_path: Path) -> None:
    """docs/operating.md: what it says on the way is what operators have to know.

    A key that was revoked since stays revoked, and the replaced database is kept.
    """
    made = document(home.run("keys", "create", "--name", "ci", "--json"))
    file = tmp_path / "backup"
    saved = home.run("db", "backup", str(file), "--json")
    told = document(saved)
    assert "sealing key is not in it" in saved.stderr
    assert told["file"] == str(file)
    assert told["bytes"] == file.stat().st_size
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    failed(home.run("db", "backup", str(file)), ERROR, f"{file} exists", "--force")
    assert home.run("db", "backup", str(file), "--force").exit_code == OK
    home.run("keys", "revoke", made["id"], "--yes")
    failed(home.run("db", "restore", str(file)), USAGE, "say --yes")

    restored = home.run("db", "restore", str(file), "--yes", "--json")

    told = document(restored)
    assert told["carriedOver"] == {"api_key.revoked": 1}
    assert told["lostSince"] is None
    assert told["replaced"] in restored.stderr
    assert Path(told["replaced"]).exists()
    assert "every token that was issued before is dead" in restored.stderr
    assert home.statuses()[made["id"]] == "revoked"
    # Nothing else is left beside it.
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("backup", "keys", "coatcheck.db", "coatcheck.db-wal", "coatcheck.db-shm"),
        Path(told["replaced"]).name,
    }


def test_a_lost_database_is_restored_only_by_a_choice(home: Home, tmp_path: Path) -> None:
    """Exit 2 without one, and the sentence holds what to paste."""
    file = tmp_path / "backup"
    home.run("db", "backup", str(file))
    home.database.unlink()
    restore = ("db", "restore", str(file), "--yes")

    refused = home.run(*restore)
    failed(refused, USAGE, "there is no deployment", "--suspend-all", "--accept-loss-since 20")
    end = refused.stderr.rpartition("--accept-loss-since ")[2].split()[0]
    failed(home.run(*restore, "--accept-loss-since", "2099-01-01"), USAGE, f"say {end}")
    accepted = home.run(*restore, "--accept-loss-since", end)
    assert accepted.exit_code == OK, accepted.stderr
    assert f"NOT KNOWN: what was revoked after {end}" in accepted.stderr
    assert home.statuses() == {home.admin_id: "active"}

    suspended = home.run(*restore, "--suspend-all", "--json")

    assert document(suspended)["apiKeysDisabled"] == 1
    assert "1 API keys are disabled" in suspended.stderr
    assert home.statuses() == {home.admin_id: "disabled"}


def test_what_is_no_backup_is_not_restored(home: Home, tmp_path: Path) -> None:
    """Exit 1 with the reason, and the database is as it was."""
    text, empty, cut = tmp_path / "text", tmp_path / "empty", tmp_path / "cut"
    text.write_text("no database at all, but long enough to be one" * 100)
    empty.touch()
    home.run("db", "backup", str(cut))
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    before = home.run("db", "new-log", "--yes", "--json")

    for file, words in (
        (text, "no backup of a SQLite database"),
        (empty, "holds no deployment"),
        (cut, "damaged"),
        (tmp_path / "absent", "there is no file"),
    ):
        failed(home.run("db", "restore", str(file), "--yes"), ERROR, words)

    log = document(home.run("db", "new-log", "--yes", "--json"))["replacedLog"]
    assert log == document(before)["log"]


def test_a_backup_never_takes_the_place_of_the_database(home: Home) -> None:
    """Not with --force either: whoever has the file open would go on with one that is gone."""
    for file in (home.database, home.folder / "." / "coatcheck.db-wal"):
        failed(home.run("db", "backup", str(file), "--force"), ERROR, "the database itself")


def test_a_backup_that_cannot_be_written_leaves_nothing(home: Home, tmp_path: Path) -> None:
    """A directory that is not there is named."""
    failed(home.run("db", "backup", str(tmp_path / "away" / "b")), ERROR, "cannot be written")
    assert not (tmp_path / "away").exists()


def test_a_new_log_says_what_it_cannot_know(home: Home) -> None:
    """After a failover with loss; nobody is asked nothing."""
    failed(home.run("db", "new-log"), USAGE, "say --yes")
    done = home.run("db", "new-log", "--yes", "--json")

    told = document(done)
    assert told["seq"] >= 2**32
    assert "NOT KNOWN: what was revoked after" in done.stderr
    safe = home.run("db", "new-log", "--yes", "--suspend-all", "--json")
    assert document(safe)["apiKeysDisabled"] == 1
    assert "NOT KNOWN" not in safe.stderr


# --- db upgrade


def test_a_dry_run_of_an_upgrade_names_the_steps_and_changes_nothing(tmp_path: Path) -> None:
    """Only then the real one."""
    home = Home(tmp_path, "")
    config = migrations.config()
    engine = create_engine(f"sqlite:///{home.database}")
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        alembic.upgrade(config, "0001")
    engine.dispose()

    told = document(home.run("db", "upgrade", "--dry-run", "--json"))
    again = home.run("db", "upgrade", "--dry-run")

    assert told["before"] == "0001"
    assert told["after"] == migrations.REVISION == told["steps"][-1]["revision"]
    assert told["steps"][0]["revision"] == "0002"
    assert all(step["does"] for step in told["steps"])
    # This one takes the older nodes' right to go on.
    assert "Stop older nodes" in next(
        step["does"] for step in told["steps"] if step["revision"] == "0004"
    )
    assert "nothing was changed" in again.stderr
    assert document(home.run("db", "upgrade", "--json"))["before"] == "0001"
    assert document(home.run("db", "upgrade", "--dry-run", "--json"))["steps"] == []


def test_a_dry_run_without_a_database_says_so(tmp_path: Path) -> None:
    """And makes none."""
    failed(Home(tmp_path, "").run("db", "upgrade", "--dry-run"), ERROR, "run coatcheck init")
    assert not any(tmp_path.iterdir())


# --- admin recover


def test_a_lost_admin_key_is_replaced(home: Home) -> None:
    """The same permissions as at init, in the operator's organization; the log says who did it."""
    done = home.run("admin", "recover", "--json")

    made = document(done)
    assert apikey.parse(made["key"])
    assert made["revoked"] == []
    assert home.admin_id in done.stderr  # it goes on working, and is named
    shown = document(home.run("keys", "show", made["keyId"], "--json"))
    assert shown["organization"] == made["organization"]
    assert shown["scopes"] == list(ORGANIZATION_PERMISSIONS)
    assert shown["audiences"] == [f"{ISSUER}/v1"]
    store = open_store(home.environment["COATCHECK_DATABASE_URL"])
    with closing(store), store.transaction(read_only=True) as tx:
        rows = tx.changes(made["organization"])
    (row,) = [row for row in rows if row.what == "admin.recovered"]
    assert row.actor.startswith("cli:")
    assert json.loads(row.detail)["apiKey"] == made["keyId"]


def test_the_others_are_revoked_if_it_is_said(home: Home) -> None:
    """Every admin key of the operator's, and no other API key; nobody asked, nothing done."""
    other = document(home.run("keys", "create", "--name", "ci", "--json"))["id"]
    failed(home.run("admin", "recover", "--revoke-others"), USAGE, "say --yes")

    made = document(home.run("admin", "recover", "--revoke-others", "--yes", "--json"))

    assert made["revoked"] == [home.admin_id]
    assert home.statuses() == {
        home.admin_id: "revoked",
        other: "active",
        made["keyId"]: "active",
    }
    store = open_store(home.environment["COATCHECK_DATABASE_URL"])
    with closing(store), store.transaction(read_only=True) as tx:
        states = [row and row.state for row in map(tx.api_key, (home.admin_id, made["keyId"]))]
    assert states == ["revoked", "active"]


def test_every_admin_key_that_might_work_is_among_the_others(tmp_path: Path) -> None:
    """Disabled ones, too, however many API keys there are; those that ended are left out."""
    with a_deployment(tmp_path) as deployment:
        ended, disabled, works = (
            deployment.api_key(
                "org:admin", audiences=(f"{ISSUER}/v1",), expires_at=NOON + HOUR if n == 0 else None
            )
            for n in range(3)
        )
        for _ in range(3):
            deployment.api_key("read")
        deployment.disable(disabled)

        recovered = recovery.recover_admin(
            deployment.settings,
            deployment.catalog,
            deployment.store,
            TESTER,
            now=NOON + 2 * HOUR,
        )

    others = (deployment.initialized.key_id, disabled.api_key.id, works.api_key.id)
    assert sorted(recovered.others) == sorted(others)
    assert ended.api_key.id not in recovered.others


def test_the_database_alone_recovers_nothing(home: Home) -> None:
    """Whoever has a copy of the database and not the sealing key is not the operator."""
    (file,) = (home.folder / "keys").glob("*.key")
    file.unlink()
    sealing.create(home.folder / "keys")

    failed(home.run("admin", "recover", "--json"), ERROR, "COATCHECK_KEYS_DIR")

    assert list(home.statuses()) == [home.admin_id]


# --- config check


def test_every_setting_is_shown_with_its_origin(tmp_path: Path) -> None:
    """Default, environment or file; no database is needed, and none is made."""
    file = tmp_path / "issuer"
    file.write_text("https://auth.example.com\n")

    done = run(
        *("config", "check", "--json"),
        COATCHECK_ISSUER_FILE=str(file),
        COATCHECK_ALGORITHM="EdDSA",
        COATCHECK_ALGORYTHM="ES256",
        COATCHECK_DATABASE_URL=f"sqlite:///{tmp_path}/none.db",
    )

    told = document(done)
    settings = {one["setting"]: (one["value"], one["origin"]) for one in told["settings"]}
    assert told["ok"] is True
    assert len(settings) == len(Settings.model_fields)
    assert settings["COATCHECK_ISSUER"] == ("https://auth.example.com", f"file {file}")
    assert settings["COATCHECK_ALGORITHM"] == ("EdDSA", "environment")
    assert settings["COATCHECK_TOKEN_TYPE"] == ("at+jwt", "default")
    assert settings["COATCHECK_AUDIENCE"] == ("https://auth.example.com", "default")
    assert told["unknown"] == ["COATCHECK_ALGORYTHM"]
    assert "COATCHECK_ALGORYTHM is no setting" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["issuer"]
    assert told["catalog"] == "none is set: Coatcheck, 2 environments, 1 audience"


# --- the catalog

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "catalogs").glob("*.toml"))
BROKEN = """\
name = "Acme"
[[audience]]
id = "https://gateway.example.com"
algorithm = "HS256"
[[permission]]
name = "read it"
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    file = tmp_path / "broken.toml"
    file.write_text(BROKEN, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_of_a_catalog_can_be_used(file: Path) -> None:
    """Named on the command line or by the setting; nothing else is needed for a look at it."""
    told = document(run("catalog", "check", str(file), "--json"))
    shown = document(run("catalog", "show", "--json", COATCHECK_CATALOG=str(file)))
    for_people = run("catalog", "show", str(file))

    assert (told["ok"], told["file"], told["problems"]) == (True, str(file), [])
    assert told["catalog"]["environments"] == len(shown["environments"])
    assert shown["name"] in for_people.stdout
    assert "can be used" in run("catalog", "check", COATCHECK_CATALOG=str(file)).stderr


def test_a_catalog_that_cannot_be_used_is_told_line_by_line(broken: Path) -> None:
    """With where it is and what to write instead; exit 1."""
    done = run("catalog", "check", str(broken), "--json")

    told = document(done, code=ERROR)
    assert (told["ok"], told["file"]) == (False, str(broken))
    assert len(told["problems"]) >= 2
    for problem in told["problems"]:
        assert problem.startswith(str(broken))
        assert problem in done.stderr
    failed(run("catalog", "show", str(broken)), ERROR, "broken.toml")
    failed(run("catalog", "check", str(broken)), ERROR, "broken.toml")
    failed(run("catalog", "check", COATCHECK_ISSUER="x"), ERROR, "COATCHECK_ISSUER")


def test_without_a_file_the_catalog_is_the_one_of_everybody() -> None:
    """Any scope, two environments, and the default audience."""
    assert document(run("catalog", "check", "--json"))["file"] is None
    assert document(run("catalog", "show", "--json"))["environments"] == ["live", "test"]


def test_with_a_catalog_that_cannot_be_used_nothing_runs(home: Home, broken: Path) -> None:
    """Not with a guess instead: each command says what is wrong, several workers say it once."""
    setting = {"COATCHECK_CATALOG": str(broken)}
    serve = ("serve", "--port", "0", "--workers")
    for arguments in (("keys", "list"), (*serve, "1"), (*serve, "2"), ("db", "check")):
        done = home.run(*arguments, **setting)
        failed(done, ERROR, "broken.toml", "HS256")
        assert done.stderr.count("HS256") == 1
    told = document(home.run("config", "check", "--json", **setting), code=ERROR)
    assert "broken.toml" in told["problems"][0]
    assert told["catalog"] is None
    assert [ok for ok, _ in findings(home, **setting)["catalog"]] == [False]


def test_doctor_names_the_catalog(home: Home) -> None:
    """Which file it is, and what came of it."""
    ((ok, text),) = findings(home, COATCHECK_CATALOG=str(EXAMPLES[0]))["catalog"]

    assert ok
    assert text.startswith(str(EXAMPLES[0]))


# --- signing-keys reseal


def test_re_sealing_counts_the_copies_of_secrets(home: Home) -> None:
    """A file that still opens one of them is not given up."""
    store = open_store(home.environment["COATCHECK_DATABASE_URL"])
    keys_dir = home.folder / "keys"
    (old,) = sealing.load(keys_dir).files
    with closing(store), store.transaction() as tx:
        (secret,) = tx.secrets(home.admin_id)
        secret.sealed, secret.sealing_key_id = b"altered", old.id

    lost = document(home.run("signing-keys", "reseal", "--new", "--json"))
    with closing(store), store.transaction() as tx:
        (secret,) = tx.secrets(home.admin_id)
        name = sealed_name(home.admin_id)
        secret.sealed = sealing.load(keys_dir).by_id[old.id].seal(b"ck_live_", name)
    done = document(home.run("signing-keys", "reseal", "--json"))

    assert (lost["secrets"], lost["secretsLeftUnder"], lost["obsolete"]) == (0, [old.id], [])
    assert (done["secrets"], done["secretsLeftUnder"]) == (1, [])
    assert done["obsolete"] == [str(old.path)]


def test_each_wrong_setting_is_named_with_what_to_write(tmp_path: Path) -> None:
    """All of them at once, exit 1; what is right is shown beside."""
    wrong = {
        "COATCHECK_ISSUER": "https://auth.example.com/",
        "COATCHECK_GUESSES_PER_MINUTE": "many",
        "COATCHECK_KEYS_DIR_FILE": str(tmp_path / "absent"),
        "COATCHECK_DATABASE_URL": "mysql://user:hunter2@host/name",
        "COATCHECK_ALGORITHM": "EdDSA",
    }

    done = run("config", "check", "--json", **wrong)

    told = document(done, code=ERROR)
    problems = "\n".join(told["problems"])
    for name in ("ISSUER", "GUESSES_PER_MINUTE", "KEYS_DIR_FILE", "DATABASE_URL"):
        assert f"COATCHECK_{name}" in problems
    settings = {one["setting"]: one["value"] for one in told["settings"]}
    assert settings["COATCHECK_ISSUER"] is None
    assert settings["COATCHECK_ALGORITHM"] == "EdDSA"
    assert "hunter2" not in done.stdout + done.stderr
    assert done.stderr.count("coatcheck: ") >= 4
    table = run("config", "check", **wrong)
    assert table.exit_code == ERROR
    assert "hunter2" not in table.stdout + table.stderr
    assert "wrong" in table.stdout


MASKED = {
    "postgresql://coatcheck@db/coatcheck": "postgresql://coatcheck@db/coatcheck",
    "postgresql://me:hunter2@db:5432/x": "postgresql://me:****@db:5432/x",
    "postgresql://me:hun@ter2@db/x": "postgresql://me:****@db/x",
    "postgresql://me:hun/ter2@db/x": "postgresql://me:****@db/x",
    "postgresql://db/x?user=me&password=hunter2": "postgresql://db/x?user=me&password=****",
    "postgresql://db/x?PASSWORD=hunter2&sslmode=require": (
        "postgresql://db/x?PASSWORD=****&sslmode=require"
    ),
    "postgresql://db/x?sslpassword=hunter2": "postgresql://db/x?sslpassword=****",
    "postgresql://me:hunter2": "****",
    "sqlite:///coatcheck.db": "sqlite:///coatcheck.db",
    "hunter2": "****",
}


@pytest.mark.parametrize(("url", "shown"), MASKED.items(), ids=MASKED)
def test_a_password_is_masked_wherever_it_stands_in_a_url(url: str, shown: str) -> None:
    """User, host and name help whoever looks for a mistake; the password helps nobody."""
    assert masked(url) == shown


# --- doctor


def findings(home: Home, **environment: str) -> dict[str, list[tuple[bool, str]]]:
    done = home.run("doctor", "--json", "--issuer", "http://127.0.0.1:9", **environment)
    found: dict[str, list[tuple[bool, str]]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["check"], []).append((one["ok"], one["finding"]))
    return found


def test_doctor_looks_at_clock_schema_keys_and_rotation(tmp_path: Path) -> None:
    """A deployment that is well, and the same one when its signing keys are overdue."""
    home = Home(tmp_path, "")
    assert home.run("init", "--json").exit_code == OK

    well = findings(home)

    names = ("settings", "database", "schema", "database clock", "keys directory", "rotation")
    assert [well[name][0][0] for name in names] == [True] * len(names)
    assert well["database clock"] == [(True, "is this machine's")]
    ((_, end),) = well["change log"]
    assert re.fullmatch(r"ends at \d+, 20\d\d-\d\d-\d\dT[\d:]+Z", end)
    late = findings(home, COATCHECK_UNSAFE_CLOCK_OFFSET=str(200 * DAY))
    ((ok, text),) = late["rotation"]
    assert not ok
    assert "signs for 200 days" in text
    assert "signing-keys rotate" in text
    never = findings(home, COATCHECK_ROTATE_EVERY="0", COATCHECK_UNSAFE_CLOCK_OFFSET="1")
    assert never["rotation"] == [(True, "only when told: COATCHECK_ROTATE_EVERY is 0")]


def test_doctor_names_sealing_keys_that_seal_nothing(home: Home) -> None:
    """One that waits for the re-sealing, and one that was left behind by it."""
    waiting = sealing.create(home.folder / "keys")
    assert any("signing-keys reseal" in text for _, text in findings(home)["sealing key"])

    assert home.run("signing-keys", "reseal").exit_code == OK

    texts = [text for _, text in findings(home)["sealing key"]]
    (left,) = [text for text in texts if "seals nothing here" in text]
    assert "remove it from every node" in left
    assert waiting.id not in left


def test_doctor_says_that_the_keys_directory_is_open(home: Home) -> None:
    """Other users of the machine could read the sealing key."""
    (home.folder / "keys").chmod(0o755)

    ((ok, text),) = findings(home)["sealing key"]

    assert not ok
    assert "chmod 700" in text
