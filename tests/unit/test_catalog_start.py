"""Starting with another catalog: what tokens say would mean something else, so they end."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from coatcheck.feed_profile import EVERYTHING
from coatcheck.server import catalog_file, catalog_start
from coatcheck.server.app import Service
from coatcheck.server.catalog import Catalog
from coatcheck.server.catalog_file import BadCatalog
from coatcheck.server.store import Store, open_store
from coatcheck.server.store.tables import ChangeRow
from coatcheck.server.store.tables import Deployment as DeploymentRow
from support.deployment import ISSUER, NOON, Deployment, a_client, a_deployment, form
from support.postgres import Server

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "catalogs").glob("*.toml"))
CATALOG = """
name = "Acme"

[[audience]]
id = "https://api.example.com"
shared = true
default = true
algorithm = "EdDSA"

[[permission]]
name = "read"

[[permission]]
name = "write"
"""
#: The same, where `read` implies `write`.
ANOTHER = f'{CATALOG}\n[implies]\nread = ["write"]\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "coatcheck.toml"
    file.write_text(text, encoding="utf-8")
    return file


def changes(store: Store) -> list[ChangeRow]:
    with store.transaction(read_only=True) as tx:
        return [row for row in tx.changes_after(-1, 10_000) if row.what == "catalog.changed"]


def another(catalog: Catalog) -> Catalog:
    return replace(catalog, default_audiences={"live": "urn:another"})


def test_the_first_start_says_nothing_and_neither_does_the_next(deployment: Deployment) -> None:
    """There was none to compare with; then it is the same, in every worker."""
    with deployment.store.transaction(read_only=True) as tx:
        row = tx.deployment()
    assert row is not None
    assert row.catalog == deployment.catalog.fingerprint()

    Service(deployment.settings, deployment.store, deployment.clock)

    assert changes(deployment.store) == []


def test_another_catalog_ends_every_token(tmp_path: Path) -> None:
    """One row for everything; API keys stay, and what they are exchanged for is new."""
    file = write(tmp_path, CATALOG)
    with a_deployment(tmp_path, catalog=file) as made, a_client(made) as http:
        key = made.api_key("read")
        token = http.post("/oauth/token", data=form(key.key)).json()["access_token"]
        assert is_active(http, token, key.key)

        write(tmp_path, ANOTHER)
        Service(made.settings, made.store, made.clock)

        assert not is_active(http, token, key.key)
        fresh = http.post("/oauth/token", data=form(key.key)).json()["access_token"]
        assert is_active(http, fresh, key.key)
        (row,) = changes(made.store)
    assert (row.subject, row.narrows, row.actor, row.at) == (
        *(EVERYTHING, True, "service:start", NOON),
    )
    detail = json.loads(row.detail)
    assert detail["was"] != detail["is"] == catalog_file.of(made.settings).fingerprint()


def is_active(http: TestClient, token: str, key: str) -> bool:
    told = http.post("/oauth/introspect", data={"token": token, "client_secret": key}).json()
    return bool(told["active"])


def test_a_deployment_with_a_catalog_signs_for_its_audiences(tmp_path: Path) -> None:
    """Its algorithms have signing keys from the beginning."""
    with a_deployment(tmp_path, catalog=write(tmp_path, CATALOG)) as made:
        assert "EdDSA" in {row.algorithm for row in made.store.signing_keys()}
        with a_client(made) as http:
            assert http.get("/readyz").json()["checks"]["signing_key"] == "ok"


def test_a_catalog_that_cannot_be_used_stops_the_start(deployment: Deployment) -> None:
    """With all that is wrong with it; the last one stays known."""
    settings = deployment.settings.model_copy(update={"catalog": Path("/nowhere.toml")})

    with pytest.raises(BadCatalog, match=r"/nowhere\.toml: cannot be read"):
        Service(settings, deployment.store, deployment.clock)

    assert changes(deployment.store) == []


def test_nodes_that_start_at_once_write_one_row(postgres: Server, deployment: Deployment) -> None:
    """Each has a connection of its own, and looks again once it is its turn; on both databases."""
    url = postgres.new_database()
    store = open_store(url)
    try:
        store.upgrade(create=True)
        with store.transaction() as tx:
            tx.add(DeploymentRow(issuer=ISSUER, log="first", created_at=NOON))
        first = at_once(url, deployment.catalog)
        for here, there in ((store, url), (deployment.store, deployment.settings.database_url)):
            assert sorted(at_once(there, another(deployment.catalog))) == [*[False] * 3, True]
            assert len(changes(here)) == 1
    finally:
        store.close()
    assert first == [False] * 4


def at_once(url: str, catalog: Catalog) -> list[bool]:
    """What each of four nodes says that starts with this catalog."""
    told: list[bool] = []
    together = threading.Barrier(4)

    def start() -> None:
        store = open_store(url)
        try:
            together.wait()
            told.append(catalog_start.note(store, catalog, now=NOON))
        finally:
            store.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_every_process_has_the_same_fingerprint_of_a_catalog() -> None:
    """Else each start would end every token: sets have another order in each process."""
    program = (
        "import sys, pathlib; from coatcheck.server import catalog_file;"
        "from coatcheck.server.settings import Settings;"
        "print([catalog_file.load(pathlib.Path(one), Settings()).fingerprint()"
        " for one in sys.argv[1:]])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program, *map(str, EXAMPLES)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(EXAMPLES) == 5
    assert len(told) == 1
