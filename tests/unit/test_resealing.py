"""Replacing the sealing key: no copy of a secret is left behind, and none is given up too early."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from coatcheck.server import resealing, sealing, signing
from coatcheck.server.app import Service
from coatcheck.server.manage import api_keys
from coatcheck.server.resealing import Resealed
from coatcheck.server.sealing import SealingKey
from coatcheck.server.store import Store, StoreUnavailable, Transaction
from coatcheck.server.store.tables import ApiKeySecret
from support.deployment import ISSUER, NOON, TESTER, Deployment

COPIES = 7


@pytest.fixture
def keeping(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment whose organization keeps copies: seven of them, in batches of three."""
    monkeypatch.setattr(resealing, "_BATCH", 3)
    with deployment.store.transaction() as tx:
        organization = tx.organization(deployment.organization_id)
        assert organization is not None
        organization.recoverable = True
    sealing_key = sealing.load(deployment.settings.keys_dir).newest()
    new = api_keys.NewApiKey(deployment.organization_id, "key", ("read",))
    made = api_keys.create_many(
        deployment.store,
        deployment.catalog,
        new,
        TESTER,
        now=NOON,
        issuer=ISSUER,
        count=COPIES,
        seal_with=lambda _: sealing_key,
    )
    assert len(list(made)) == COPIES
    return deployment


def reseal(deployment: Deployment, new: SealingKey, store: Store | None = None) -> Resealed:
    loaded = sealing.load(deployment.settings.keys_dir)
    return resealing.reseal(store or deployment.store, loaded, new, TESTER, now=NOON)


def copies(deployment: Deployment) -> list[ApiKeySecret]:
    with deployment.store.transaction(read_only=True) as tx:
        keys = tx.api_keys(deployment.organization_id, "", 100)
        found = tx.secrets_of([one.id for one in keys])
    return [one for secrets in found.values() for one in secrets if one.sealed is not None]


def file_of(deployment: Deployment, sealing_key_id: str) -> Path:
    return deployment.settings.keys_dir / f"sealing-{sealing_key_id}.key"


def old_id(deployment: Deployment) -> str:
    (file,) = sealing.load(deployment.settings.keys_dir).files
    return file.id


def reveal(http: TestClient, deployment: Deployment, api_key_id: str) -> Any:
    headers = {"Authorization": f"Bearer {deployment.initialized.key}"}
    return http.post(f"/v1/keys/{api_key_id}/reveal", headers=headers)


def test_every_copy_is_sealed_anew_batch_by_batch(keeping: Deployment, http: TestClient) -> None:
    """The old file can go then, and owners still see their secrets; the log counts them."""
    old = old_id(keeping)
    new = sealing.create(keeping.settings.keys_dir)

    done = reseal(keeping, new)

    assert (done.secrets, done.copies_left_under, done.in_use) == (COPIES, [], {new.id})
    assert {one.sealing_key_id for one in copies(keeping)} == {new.id}
    with keeping.store.transaction(read_only=True) as tx:
        details = [row.detail for row in tx.changes(new.id)]
    assert details[1:] == ['{"secrets":3}', '{"secrets":3}', '{"secrets":1}']
    file_of(keeping, old).unlink()
    one = copies(keeping)[0]
    shown = reveal(http, keeping, one.api_key_id).json()
    assert api_keys.find(keeping.store, shown["key"], now=NOON).id == one.api_key_id
    again = reseal(keeping, new)
    assert (again.kids, again.secrets) == ([], 0)


class Ends:
    """A store whose process ends at one of its writes."""

    def __init__(self, store: Store, at_write: int) -> None:
        self._store = store
        self._left = at_write

    @contextmanager
    def transaction(self, *, read_only: bool = False) -> Iterator[Transaction]:
        with self._store.transaction(read_only=read_only) as tx:
            yield tx
            self._left -= not read_only
            if self._left == 0:
                raise StoreUnavailable


@pytest.mark.parametrize("at_write", [1, 2, 3, 4])
def test_whatever_was_left_is_done_by_the_next_run(keeping: Deployment, at_write: int) -> None:
    """Killed at any step: nothing is lost, and until all is done no file is given up."""
    old = old_id(keeping)
    new = sealing.create(keeping.settings.keys_dir)
    with pytest.raises(StoreUnavailable):
        reseal(keeping, new, cast(Store, Ends(keeping.store, at_write)))

    under = [one.sealing_key_id for one in copies(keeping)]
    assert under.count(new.id) == max(0, at_write - 2) * 3
    assert old in signing.sealing_keys_in_use(keeping.store)
    done = reseal(keeping, new)
    assert done.secrets == under.count(old)
    assert done.in_use == {new.id}
    assert signing.sealing_keys_in_use(keeping.store) == {new.id}


def test_a_copy_that_does_not_open_is_left_and_told(keeping: Deployment) -> None:
    """One was altered, one needs a file that is not here: the others do not wait for them."""
    old = old_id(keeping)
    rows = copies(keeping)
    with keeping.store.transaction() as tx:
        changed: list[dict[str, Any]] = [{"sealed": b"altered"}, {"sealing_key_id": "0123"}]
        for one, changes in zip(rows, changed, strict=False):
            row = next(of for of in tx.secrets(one.api_key_id) if of.digest == one.digest)
            for name, value in changes.items():
                setattr(row, name, value)
    new = sealing.create(keeping.settings.keys_dir)

    done = reseal(keeping, new)

    assert done.secrets == COPIES - 2
    assert sorted(done.copies_left_under) == sorted(["0123", old])
    assert done.in_use == {new.id, old, "0123"}


def test_a_service_starts_without_the_sealing_keys_of_copies(
    keeping: Deployment, http: TestClient
) -> None:
    """Only whoever wants to see one of them is told that the operator has to mend it."""
    old = old_id(keeping)
    new = sealing.create(keeping.settings.keys_dir)
    loaded = sealing.load(keeping.settings.keys_dir)
    signing.reseal(keeping.store, loaded, new, TESTER, now=NOON)
    file_of(keeping, old).unlink()

    Service(keeping.settings, keeping.store, keeping.clock)
    answer = reveal(http, keeping, copies(keeping)[0].api_key_id)

    assert (answer.status_code, answer.json()["code"]) == (503, "sealing_key_missing")


def test_a_new_copy_is_sealed_with_the_sealing_key_in_use(
    keeping: Deployment, http: TestClient
) -> None:
    """Not with one that waits: the other nodes may not have it yet."""
    old = old_id(keeping)
    new = sealing.create(keeping.settings.keys_dir)
    headers = {"Authorization": f"Bearer {keeping.initialized.key}"}

    def under(path: str, body: dict[str, object]) -> str | None:
        made = http.post(path, headers=headers, json=body).json()
        (one,) = (one for one in copies(keeping) if one.mask == made["mask"])
        return one.sealing_key_id

    assert under("/v1/keys", {"name": "early", "scopes": ["read"]}) == old
    api_key_id = copies(keeping)[0].api_key_id
    assert under(f"/v1/keys/{api_key_id}/rotate", {}) == old
    reseal(keeping, new)
    assert under("/v1/keys", {"name": "late", "scopes": ["read"]}) == new.id
