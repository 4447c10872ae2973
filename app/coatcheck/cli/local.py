"""What operators' commands work on: the database that the settings name.

Everything of the service is imported here, and this module only when such a command runs.
"""

import getpass
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coatcheck.cli.output import Exit, fail, say
from coatcheck.server import catalog_file, sealing, setup, signing
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.manage.errors import Conflict, Invalid, NotFound
from coatcheck.server.settings import BadSettings, Settings, unknown_settings
from coatcheck.server.store import SchemaMismatch, Store, StoreUnavailable, open_store
from coatcheck.server.store.backups import BackupFailed


@dataclass(frozen=True, slots=True)
class Local:
    """One deployment, as a command sees it."""

    settings: Settings
    catalog: Catalog
    store: Store
    actor: Actor

    @property
    def now(self) -> int:
        return int(time.time()) + self.settings.unsafe_clock_offset


@contextmanager
def deployment(*, initialized: bool = True) -> Iterator[Local]:
    """The deployment that the environment describes; failures become sentences and exit codes.

    Args:
        initialized: whether the command needs a deployment that was set up.
    """
    with translated():
        settings = Settings.load(os.environ)
        for name in unknown_settings(os.environ):
            say(f"coatcheck: {name} is no setting of this version: check its spelling")
        store = open_store(settings.database_url)
        try:
            if initialized:
                setup.require_deployment(settings, store)
            actor = Actor(f"cli:{_user()}")
            yield Local(settings, catalog_file.of(settings), store, actor)
        finally:
            store.close()


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the service raises into what a command says."""
    try:
        yield
    except Invalid as error:
        fail(Exit.USAGE, str(error))
    except NotFound as error:
        fail(Exit.NOT_FOUND, str(error))
    except signing.UnknownSigningKey:
        fail(Exit.NOT_FOUND, "there is no signing key of this kid: see coatcheck signing-keys list")
    except (Conflict, signing.SigningKeyConflict) as error:
        fail(Exit.CONFLICT, str(error))
    except (BadSettings, setup.NotInitialized, setup.OtherDeployment, SchemaMismatch) as error:
        fail(Exit.ERROR, str(error))
    except (StoreUnavailable, BackupFailed, sealing.BadSealingKey, ValueError) as error:
        fail(Exit.ERROR, str(error))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        return str(os.getuid())
