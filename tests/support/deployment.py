"""A deployment in a temporary directory: real SQLite file, real signing keys, a clock to set."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from coatcheck.server import catalog as catalogs
from coatcheck.server import catalog_file, setup
from coatcheck.server.app import Service
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_keys import Created
from coatcheck.server.settings import Settings
from coatcheck.server.store import Store, open_store
from support.secrets import SWEEP

ISSUER = "http://127.0.0.1:8000"
AUDIENCE = "https://api.example.com"
NOON = 1_800_000_000
MINUTE, HOUR, DAY = 60, 3600, 86_400
TESTER = Actor("cli:tester")


@dataclass(slots=True)
class Clock:
    """A clock that stands still until it is set."""

    now: float = NOON

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a test works on."""

    settings: Settings
    catalog: Catalog
    store: Store
    clock: Clock
    initialized: setup.Initialized
    service: Service = field(repr=False)

    @property
    def now(self) -> int:
        return int(self.clock.now)

    @property
    def organization_id(self) -> str:
        return self.initialized.organization_id

    def api_key(
        self,
        *scopes: str,
        name: str = "test key",
        audiences: tuple[str, ...] = (),
        environment: str | None = None,
        expires_at: int | None = None,
    ) -> Created:
        """A new API key with these scopes (none: all)."""
        new = api_keys.NewApiKey(
            organization_id=self.organization_id,
            name=name,
            scopes=scopes,
            audiences=audiences,
            environment=environment,
            expires_at=expires_at,
        )
        return api_keys.create(
            self.store, self.catalog, new, TESTER, now=self.now, issuer=self.settings.issuer
        )

    def disable(self, created: Created) -> None:
        api_keys.disable(self.store, created.api_key.id, TESTER, now=self.now)

    def enable(self, created: Created) -> None:
        api_keys.enable(self.store, created.api_key.id, TESTER, now=self.now)

    def revoke(self, created: Created) -> None:
        api_keys.revoke(self.store, created.api_key.id, TESTER, now=self.now)

    def rotate(self, created: Created, *, overlap_s: int) -> Created:
        return api_keys.rotate(
            self.store, created.api_key.id, TESTER, overlap_s=overlap_s, now=self.now
        )


@contextmanager
def a_deployment(folder: Path, **settings: Any) -> Iterator[Deployment]:
    """A deployment that was set up in this folder, at noon by its clock."""
    chosen = Settings(
        issuer=settings.pop("issuer", ISSUER),
        audience=settings.pop("audience", AUDIENCE),
        database_url=f"sqlite:///{folder}/coatcheck.db",
        keys_dir=folder / "keys",
        **settings,
    )
    clock = Clock()
    catalog = catalog_file.of(chosen)
    algorithms = {one.algorithm for one in catalog.audiences.values()} if chosen.catalog else set()
    template, initialized = _template(chosen.issuer, "EdDSA" in algorithms)
    shutil.copytree(template, folder, dirs_exist_ok=True)
    store = open_store(chosen.database_url)
    try:
        service = Service(chosen, store, clock)
        SWEEP.learn_deployment(folder)
        yield Deployment(chosen, catalog, store, clock, initialized, service)
        # Closing takes the log of the database away.
        SWEEP.file(folder / "coatcheck.db-wal")
    finally:
        store.close()


@cache
def _template(issuer: str, has_eddsa: bool) -> tuple[Path, setup.Initialized]:
    """A folder with a deployment of this issuer: set up once, because RSA keys take their time.

    A catalog matters to the set-up by the algorithms of its audiences alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="coatcheck-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = Settings(
        issuer=issuer,
        algorithm="EdDSA" if has_eddsa else "ES256",
        database_url=f"sqlite:///{folder}/coatcheck.db",
        keys_dir=folder / "keys",
    )
    store = open_store(settings.database_url)
    initialized = setup.initialize(
        settings,
        catalogs.without_file(settings),
        store,
        TESTER,
        now=NOON,
        organization_name="Acme",
    )
    store.close()
    return folder, initialized


@contextmanager
def a_client(deployment: Deployment) -> Iterator[TestClient]:
    """An HTTP client of the service, in process; errors of the service come back as answers."""
    with TestClient(
        deployment.service,
        base_url=ISSUER,
        raise_server_exceptions=False,
        follow_redirects=False,
    ) as client:
        yield client


def form(key: str, **parameters: str) -> dict[str, str]:
    """A token request that presents this secret in the body."""
    return {"grant_type": "client_credentials", "client_secret": key, **parameters}
