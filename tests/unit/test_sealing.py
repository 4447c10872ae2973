"""`coatcheck.server.sealing`: the sealing key, its file, what it opens.  answers.md K17, K18."""

import os
import stat
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from coatcheck.server import sealing, setup, signing
from coatcheck.server.app import Service
from coatcheck.server.manage.errors import Conflict
from coatcheck.server.sealing import BadSealingKey, SealingKey, SealingKeys
from coatcheck.server.store import open_store
from coatcheck.server.store.tables import SigningKey as Row
from support.deployment import NOON, TESTER, Deployment, form

RAW = bytes(range(32))
SEALING_KEY = SealingKey.of(RAW)
OTHER = SealingKey.of(RAW[::-1])
NAMES = st.text(max_size=20)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    """A keys directory with one sealing key."""
    folder = tmp_path / "keys"
    sealing.create(folder)
    return folder


@pytest.fixture
def key_file(keys_dir: Path) -> Path:
    (file,) = keys_dir.iterdir()
    return file


# --- the file


def test_a_new_sealing_key_is_for_its_owner_only(keys_dir: Path, key_file: Path) -> None:
    """0600 in a 0700 directory, whatever the umask says."""
    assert (mode(keys_dir), mode(key_file)) == (0o700, 0o600)


def test_making_one_closes_a_directory_that_was_open(tmp_path: Path) -> None:
    """`keys/` comes from a checkout with the usual 0755."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)

    sealing.create(folder)

    assert mode(folder) == 0o700


def test_a_sealing_key_is_loaded_as_it_was_made(tmp_path: Path) -> None:
    """Its file carries the id by which sealed blobs name it."""
    made = sealing.create(tmp_path / "keys")

    loaded = sealing.load(tmp_path / "keys")

    assert list(loaded.by_id) == [made.id]
    assert (tmp_path / "keys" / f"sealing-{made.id}.key").exists()
    assert loaded.unseal(made.seal(b"secret", "name"), "name", made.id) == b"secret"


def test_of_several_sealing_keys_the_newest_seals_and_all_of_them_open(tmp_path: Path) -> None:
    """While one is being replaced, both lie there."""
    folder = tmp_path / "keys"
    old, new = sealing.create(folder), sealing.create(folder)
    os.utime(folder / f"sealing-{old.id}.key", (1, 1))

    loaded = sealing.load(folder)

    assert loaded.newest().id == new.id
    assert loaded.unseal(old.seal(b"secret", "name"), "name", old.id) == b"secret"


def test_other_files_are_left_alone(keys_dir: Path) -> None:
    """`keys/` has a README."""
    (keys_dir / "README.md").write_text("x", encoding="utf-8")

    assert len(sealing.load(keys_dir).by_id) == 1


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666])
def test_a_file_that_others_can_get_at_refuses(keys_dir: Path, key_file: Path, loose: int) -> None:
    """K17: refuses to start, and says how to mend it."""
    key_file.chmod(loose)

    with pytest.raises(BadSealingKey, match=f"chmod 600 {key_file}"):
        sealing.load(keys_dir)


@pytest.mark.parametrize("loose", [0o750, 0o705, 0o720, 0o701, 0o777])
def test_a_directory_that_others_can_get_at_refuses(keys_dir: Path, loose: int) -> None:
    """K17: whoever may write there may put another key in its place."""
    keys_dir.chmod(loose)

    with pytest.raises(BadSealingKey, match=f"chmod 700 {keys_dir}"):
        sealing.load(keys_dir)


@pytest.mark.parametrize("strict", [0o400, 0o600])
def test_stricter_modes_are_fine(keys_dir: Path, key_file: Path, strict: int) -> None:
    """Secret mounts are often read-only."""
    key_file.chmod(strict)
    keys_dir.chmod(0o500)

    assert sealing.load(keys_dir).by_id


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_belongs_to_another_user_refuses(keys_dir: Path, key_file: Path, what: str) -> None:
    """K17: its owner may read it, and change it, at any time."""
    os.chown(key_file if what == "file" else keys_dir, 12_345, -1)

    with pytest.raises(BadSealingKey, match="belongs to another user"):
        sealing.load(keys_dir)


def test_a_symlink_that_stays_inside_is_fine(keys_dir: Path, key_file: Path) -> None:
    """Kubernetes mounts each file of a secret as one: name → ..data/name → ..2026_01/name."""
    real = keys_dir / "..2026_01"
    real.mkdir(mode=0o700)
    (keys_dir / "..data").symlink_to("..2026_01")
    key_file.rename(real / key_file.name)
    key_file.symlink_to(Path("..data") / key_file.name)

    assert len(sealing.load(keys_dir).by_id) == 1


def test_a_directory_that_is_a_symlink_itself_is_fine(tmp_path: Path, keys_dir: Path) -> None:
    """The operator chose where it is; what counts is that nothing leaves it."""
    (tmp_path / "link").symlink_to(keys_dir)

    assert len(sealing.load(tmp_path / "link").by_id) == 1


def test_a_symlink_out_of_the_directory_refuses(
    tmp_path: Path, keys_dir: Path, key_file: Path
) -> None:
    """K17: the directory's mode protects nothing that lies elsewhere."""
    key_file.rename(tmp_path / "elsewhere.key")
    key_file.symlink_to(tmp_path / "elsewhere.key")

    with pytest.raises(BadSealingKey, match="points out of"):
        sealing.load(keys_dir)


def test_a_symlink_to_an_open_file_refuses(keys_dir: Path, key_file: Path) -> None:
    """The target's mode counts, not the link's."""
    real = keys_dir / "real"
    key_file.rename(real)
    real.chmod(0o644)
    key_file.symlink_to("real")

    with pytest.raises(BadSealingKey, match="chmod 600"):
        sealing.load(keys_dir)


def test_a_symlink_to_nothing_refuses_with_a_sentence(keys_dir: Path, key_file: Path) -> None:
    """K17, K18: a mount that failed is told, not thrown."""
    key_file.unlink()
    key_file.symlink_to("gone")

    with pytest.raises(BadSealingKey):
        sealing.load(keys_dir)


def test_a_directory_in_the_place_of_the_file_refuses_with_a_sentence(
    keys_dir: Path, key_file: Path
) -> None:
    """Docker makes one where a mounted file is missing."""
    key_file.unlink()
    key_file.mkdir(mode=0o700)

    with pytest.raises(BadSealingKey):
        sealing.load(keys_dir)


NOT_KEYS = {
    "empty": b"",
    "too short": urlsafe_b64encode(RAW[:31]),
    "too long": urlsafe_b64encode(RAW + b"x"),
    "cut off": urlsafe_b64encode(RAW)[:-3],
    "the bytes themselves": RAW,
    "another text": b"-----BEGIN PRIVATE KEY-----",
    "two keys": urlsafe_b64encode(RAW) + b"\n" + urlsafe_b64encode(RAW[::-1]),
}


@pytest.mark.parametrize("content", NOT_KEYS.values(), ids=NOT_KEYS)
def test_a_file_that_is_no_key_refuses(keys_dir: Path, key_file: Path, content: bytes) -> None:
    """A restore that went wrong is told by the name of the file."""
    key_file.write_bytes(content)

    with pytest.raises(BadSealingKey, match="is no sealing key") as refused:
        sealing.load(keys_dir)

    assert str(key_file) in str(refused.value)


def test_no_directory_and_no_file_are_told_apart(tmp_path: Path) -> None:
    """K18: one is mended by a mount, the other by a backup; neither is made in silence."""
    with pytest.raises(BadSealingKey, match="there is no directory"):
        sealing.load(tmp_path / "keys")
    (tmp_path / "keys").mkdir(mode=0o700)
    with pytest.raises(BadSealingKey, match="there is no sealing key"):
        sealing.load(tmp_path / "keys")

    assert not list((tmp_path / "keys").iterdir())


def test_a_place_that_cannot_hold_a_key_is_told(tmp_path: Path) -> None:
    """`init` says so instead of throwing."""
    (tmp_path / "file").write_text("", encoding="utf-8")

    for impossible in (tmp_path / "file", tmp_path / "file" / "keys"):
        with pytest.raises(BadSealingKey, match="cannot hold the sealing key"):
            sealing.create(impossible)


def test_a_new_deployment_uses_the_key_that_was_provided(keys_dir: Path) -> None:
    """Whoever hands the same secret to each node provides it before `init`."""
    before = set(keys_dir.iterdir())

    loaded = sealing.load_or_create(keys_dir)

    assert set(keys_dir.iterdir()) == before
    assert len(loaded.by_id) == 1


# --- beside an existing database


def start(deployment: Deployment) -> Service:
    """Start the service once more on the same database."""
    return Service(
        deployment.settings, open_store(deployment.settings.database_url), deployment.clock
    )


def test_beside_a_database_a_missing_sealing_key_refuses_to_start(deployment: Deployment) -> None:
    """K18: refuses, and none is made: it could open nothing."""
    keys_dir = deployment.settings.keys_dir
    for file in keys_dir.iterdir():
        file.unlink()

    with pytest.raises(BadSealingKey, match=r"put the deployment's sealing-\*\.key there"):
        start(deployment)
    with pytest.raises(Conflict):
        setup.initialize(
            deployment.settings,
            deployment.catalog,
            deployment.store,
            TESTER,
            now=deployment.now,
            organization_name="Again",
        )

    assert not list(keys_dir.iterdir())


def test_beside_a_database_another_sealing_key_refuses_to_start(deployment: Deployment) -> None:
    """K18, F10: says that it is another deployment's."""
    keys_dir = deployment.settings.keys_dir
    for file in keys_dir.iterdir():
        file.unlink()
    sealing.create(keys_dir)

    with pytest.raises(BadSealingKey, match="the deployment's own"):
        start(deployment)


def test_a_second_sealing_key_beside_the_right_one_is_no_obstacle(deployment: Deployment) -> None:
    """A replacement begins by putting the new one there."""
    sealing.create(deployment.settings.keys_dir)

    assert start(deployment)


# --- re-sealing


def rows(deployment: Deployment) -> list[Row]:
    with deployment.store.transaction(read_only=True) as tx:
        return list(tx.signing_keys())


def reseal(
    deployment: Deployment, sealing_keys: SealingKeys, successor: SealingKey
) -> signing.Resealed:
    return signing.reseal(deployment.store, sealing_keys, successor, TESTER, now=NOON)


def test_after_re_sealing_the_old_sealing_key_can_go(
    deployment: Deployment, http: TestClient
) -> None:
    """Every private half, of withdrawn ones too; a node that runs meanwhile goes on."""
    keys_dir = deployment.settings.keys_dir
    made = deployment.api_key()
    signing.withdraw(deployment.store, rows(deployment)[1].kid, TESTER, now=NOON, force=True)
    (old,) = sealing.load(keys_dir).files
    new = sealing.create(keys_dir)

    done = reseal(deployment, sealing.load(keys_dir), new)

    assert list(done.kids) == [row.kid for row in rows(deployment)]
    assert {row.sealing_key_id for row in rows(deployment)} == set(done.in_use) == {new.id}
    assert not done.left
    old.path.unlink()
    assert start(deployment)
    answer = http.post("/oauth/token", data=form(made.key))
    assert answer.status_code == 200
    with deployment.store.transaction(read_only=True) as tx:
        (change,) = tx.changes(new.id)
    assert (change.what, change.narrows) == ("signing_key.resealed", False)


def test_re_sealing_again_changes_nothing(deployment: Deployment) -> None:
    """F3: whoever was interrupted runs it once more."""
    new = sealing.create(deployment.settings.keys_dir)
    loaded = sealing.load(deployment.settings.keys_dir)
    reseal(deployment, loaded, new)
    head, sealed = deployment.store.head(), [row.sealed_private for row in rows(deployment)]

    assert not reseal(deployment, loaded, new).kids

    assert deployment.store.head() == head
    assert [row.sealed_private for row in rows(deployment)] == sealed


def test_a_withdrawn_one_that_opens_no_more_is_left(deployment: Deployment) -> None:
    """Its sealing key may be lost long since; it is never used again."""
    lost = rows(deployment)[0]
    signing.withdraw(deployment.store, lost.kid, TESTER, now=NOON, force=True)
    with deployment.store.transaction() as tx:
        row = tx.signing_key(lost.kid)
        assert row is not None
        row.sealing_key_id = OTHER.id
    new = sealing.create(deployment.settings.keys_dir)

    done = reseal(deployment, sealing.load(deployment.settings.keys_dir), new)

    assert list(done.left) == [lost.kid]
    assert set(done.in_use) == {new.id}


def test_one_that_does_not_open_stops_it_before_anything_is_changed(
    deployment: Deployment,
) -> None:
    """All of them, or none: half of them would make two files needed."""
    with deployment.store.transaction() as tx:
        tx.signing_keys()[-1].sealed_private = b"altered" * 10
    new = sealing.create(deployment.settings.keys_dir)
    before = [row.sealed_private for row in rows(deployment)]

    with pytest.raises(BadSealingKey, match="was altered"):
        reseal(deployment, sealing.load(deployment.settings.keys_dir), new)

    assert [row.sealed_private for row in rows(deployment)] == before


def test_one_that_waits_seals_nothing_until_it_is_told(deployment: Deployment) -> None:
    """Other nodes may not have it yet: which one is in use is for the database to say."""
    (old,) = sealing.load(deployment.settings.keys_dir).by_id
    new = sealing.create(deployment.settings.keys_dir)
    loaded = sealing.load(deployment.settings.keys_dir)

    assert signing.sealing_key_in_use(deployment.store, loaded).id == old
    reseal(deployment, loaded, new)
    assert signing.sealing_key_in_use(deployment.store, loaded).id == new.id
    with pytest.raises(signing.SigningKeyConflict, match="re-sealed meanwhile"):
        signing.rotate(deployment.store, loaded.by_id[old], "ES256", TESTER, now=NOON)


def test_where_the_sealing_key_was_lost_new_signing_keys_can_be_made(
    deployment: Deployment,
) -> None:
    """The way out of K18: what does not open is withdrawn, and then nothing hangs on it."""
    (old,) = deployment.settings.keys_dir.iterdir()
    old.unlink()
    new = sealing.create(deployment.settings.keys_dir)
    for row in rows(deployment):
        signing.withdraw(deployment.store, row.kid, TESTER, now=NOON, force=True)

    in_use = signing.sealing_key_in_use(
        deployment.store, sealing.load(deployment.settings.keys_dir)
    )

    assert in_use.id == new.id
    for purpose, algorithm in signing.first_lines(()):
        signing.create(
            *(deployment.store, in_use, algorithm, TESTER),
            now=NOON,
            starts_at=NOON,
            purpose=purpose,
        )
    assert start(deployment)


def test_of_two_that_are_equally_new_none_is_taken_by_chance(tmp_path: Path) -> None:
    """A mounted secret gives all of its files one time."""
    folder = tmp_path / "keys"
    one, other = sealing.create(folder), sealing.create(folder)
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    loaded = sealing.load(folder)

    with pytest.raises(BadSealingKey, match="equally new") as refused:
        loaded.successor()

    assert one.id in str(refused.value)
    assert other.id in str(refused.value)
    assert loaded.successor(one.id).id == one.id
    with pytest.raises(BadSealingKey, match=r"has no sealing-0123\.key"):
        loaded.successor("0123")
    os.utime(folder / f"sealing-{other.id}.key", (2, 2))
    assert sealing.load(folder).successor().id == other.id


def test_half_a_file_is_none(keys_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F3: one that was cut off would refuse every start; until it is whole it has another name."""

    def break_off(_: int) -> None:
        raise KeyboardInterrupt

    before = list(sealing.load(keys_dir).by_id)
    monkeypatch.setattr(os, "fsync", break_off)
    with pytest.raises(KeyboardInterrupt):
        sealing.create(keys_dir)

    assert list(sealing.load(keys_dir).by_id) == before


# --- sealing


@settings(max_examples=50)
@given(st.binary(max_size=200), NAMES)
def test_what_was_sealed_is_opened_under_its_name(secret: bytes, name: str) -> None:
    """AES-256-GCM there and back."""
    assert SEALING_KEY.unseal(SEALING_KEY.seal(secret, name), name) == secret


@settings(max_examples=100)
@given(st.binary(max_size=40), st.data())
def test_an_altered_blob_does_not_open(secret: bytes, data: st.DataObject) -> None:
    """Every bit of nonce, text and tag counts."""
    sealed = bytearray(SEALING_KEY.seal(secret, "name"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(BadSealingKey, match="was altered"):
        SEALING_KEY.unseal(bytes(sealed), "name")


@settings(max_examples=50)
@given(st.integers(0, 12 + 16 + 5))
def test_a_blob_that_was_cut_off_does_not_open(length: int) -> None:
    """A torn row is told like any other that was altered."""
    sealed = SEALING_KEY.seal(b"secret", "name")

    with pytest.raises(BadSealingKey):
        SEALING_KEY.unseal(sealed[:length], "name")


@settings(max_examples=50)
@given(NAMES, NAMES)
def test_two_blobs_cannot_be_swapped(one: str, other: str) -> None:
    """The name is associated data: a signing key cannot be passed off as another."""
    if one == other:
        return
    with pytest.raises(BadSealingKey):
        SEALING_KEY.unseal(SEALING_KEY.seal(b"secret", one), other)


def test_another_sealing_key_does_not_open() -> None:
    """K18: the wrong key is told apart from the right one, always."""
    with pytest.raises(BadSealingKey):
        OTHER.unseal(SEALING_KEY.seal(b"secret", "name"), "name")


def test_a_missing_sealing_key_is_named(keys_dir: Path) -> None:
    """Whoever restores it has to know which file to look for."""
    sealed = OTHER.seal(b"secret", "name")

    with pytest.raises(BadSealingKey, match=f"put sealing-{OTHER.id}.key there"):
        sealing.load(keys_dir).unseal(sealed, "name", OTHER.id)


def test_equal_secrets_are_sealed_differently() -> None:
    """A nonce that came twice would lay open both.  SP 800-38D §8.2.2."""
    sealed = {SEALING_KEY.seal(b"secret", "name") for _ in range(100)}

    assert len({blob[:12] for blob in sealed}) == 100


def test_no_repr_and_no_message_shows_the_key(keys_dir: Path, key_file: Path) -> None:
    """K27: values end in tracebacks and crash reports."""
    text = key_file.read_text(encoding="ascii").strip()
    loaded = sealing.load(keys_dir)
    with pytest.raises(BadSealingKey) as refused:
        loaded.newest().unseal(OTHER.seal(b"secret", "name"), "name")
    told = f"{loaded!r} {loaded.newest()!r} {refused.value}"

    assert text not in told
    assert text[:8] not in told


def test_the_id_of_a_sealing_key_tells_nothing_about_it() -> None:
    """It stands in file names, in the database and in messages."""
    assert SEALING_KEY.id != OTHER.id
    assert SEALING_KEY.id not in urlsafe_b64encode(RAW).decode()
    assert SEALING_KEY.id not in RAW.hex()
