"""The sealing key: the one secret outside the database, which seals what must not lie open in it.

It is a file in the keys directory, `sealing-<id>.key`: 32 random bytes in base64url, mode 0600
in a directory of mode 0700.  Several may lie there while one is being replaced; each sealed blob
names the one it needs.  Which of them is in use is for the database to say: a file that appears
changes nothing by itself.

Sealing is AES-256-GCM with a fresh 96-bit nonce; the name of the thing sealed is its associated
data, so that two blobs cannot be swapped.

Source: NIST SP 800-38D §8.2.2 (random nonces).
"""

import hashlib
import os
import secrets
import stat
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_PATTERN: Final = "sealing-*.key"


class BadSealingKey(Exception):
    """A sealing key is missing, wrong or laid open.  The message says how to mend it."""


@dataclass(frozen=True, slots=True)
class SealingKey:
    """One sealing key.  Its id is public; the key itself never appears in a repr."""

    id: str
    _cipher: AESGCM = field(repr=False)

    @classmethod
    def of(cls, key: bytes) -> "SealingKey":
        """The sealing key made of these 32 bytes; its id is a fingerprint of them."""
        fingerprint = hashlib.sha256(b"coatcheck sealing key\0" + key).hexdigest()
        return cls(fingerprint[:16], AESGCM(key))

    def seal(self, secret: bytes, name: str) -> bytes:
        """Seal a secret under the name of what it is."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, name.encode())

    def unseal(self, sealed: bytes, name: str) -> bytes:
        """What was sealed under this name.

        Raises:
            BadSealingKey: another key sealed it, under another name, or it was altered.
        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise BadSealingKey(
                f"sealing key {self.id} does not open {name}: the record was altered"
            ) from None


@dataclass(frozen=True, slots=True)
class SealingKeys:
    """All sealing keys of a deployment, by id."""

    by_id: Mapping[str, SealingKey]
    """The newest file first."""
    files: Sequence["SealingFile"] = ()

    def newest(self) -> SealingKey:
        """The one that a new deployment seals with."""
        return next(iter(self.by_id.values()))

    def successor(self, sealing_key_id: str = "") -> SealingKey:
        """The one to seal with from now on.

        Args:
            sealing_key_id: which one; empty: the newest file.

        Raises:
            BadSealingKey: there is none of this id, or two files are equally new.
        """
        if sealing_key_id and sealing_key_id not in self.by_id:
            have = ", ".join(self.by_id)
            raise BadSealingKey(
                f"COATCHECK_KEYS_DIR has no sealing-{sealing_key_id}.key: it holds {have}"
            )
        if sealing_key_id:
            return self.by_id[sealing_key_id]
        ages: dict[int, set[str]] = {}
        for file in self.files:
            ages.setdefault(file.made_at, set()).add(file.id)
        equally_new = ages[max(ages)] if ages else set()
        if len(equally_new) > 1:
            # Mounted secrets all have the time of the mount.
            raise BadSealingKey(
                f"the files of the sealing keys {' and '.join(sorted(equally_new))} are equally"
                " new: name the one to seal with, --to ID"
            )
        return self.newest()

    def get(self, sealing_key_id: str) -> SealingKey:
        """The sealing key of this id.  Raises BadSealingKey: it is not here."""
        sealing_key = self.by_id.get(sealing_key_id)
        if sealing_key is None:
            have = ", ".join(self.by_id)
            raise BadSealingKey(
                f"the database was sealed with sealing key {sealing_key_id}, and COATCHECK_KEYS_DIR"
                f" holds {have}: put sealing-{sealing_key_id}.key there"
            )
        return sealing_key

    def unseal(self, sealed: bytes, name: str, sealing_key_id: str) -> bytes:
        """Unseal with the key that sealed it.

        Raises:
            BadSealingKey: that key is not here, or does not fit.
        """
        return self.get(sealing_key_id).unseal(sealed, name)


@dataclass(frozen=True, slots=True)
class SealingFile:
    """A file that holds a sealing key.

    Attributes:
        id: of the sealing key.
        made_at: when it was written, in nanoseconds since the epoch.
    """

    id: str
    path: Path
    made_at: int


def create(keys_dir: Path) -> SealingKey:
    """Make a sealing key and write its file, closing the directory to others.

    The file is there as a whole and on the disk, or not at all: one that was cut off would refuse
    every start, and one that a power cut took away would take what it seals with it.

    Raises:
        BadSealingKey: the directory cannot be used.
    """
    try:
        keys_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        keys_dir.chmod(0o700)
        key = secrets.token_bytes(_KEY_BYTES)
        sealing_key = SealingKey.of(key)
        path = keys_dir / f"sealing-{sealing_key.id}.key"
        draft = path.with_suffix(".draft")
        file = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(urlsafe_b64encode(key) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(path)
        directory = os.open(keys_dir, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BadSealingKey(f"{keys_dir} cannot hold the sealing key: {error.strerror}") from None
    return sealing_key


def load_or_create(keys_dir: Path) -> SealingKeys:
    """For a new deployment only: the sealing keys that were provided, or a new one.

    Raises:
        BadSealingKey: as `create` and `load`.
    """
    if not keys_dir.is_dir() or not any(keys_dir.glob(_PATTERN)):
        create(keys_dir)
    return load(keys_dir)


def load(keys_dir: Path) -> SealingKeys:
    """Read the sealing keys, the newest file first.

    Raises:
        BadSealingKey: there is none; one is no key; or others than its owner can get at it.
    """
    if not keys_dir.is_dir():
        raise BadSealingKey(
            f"COATCHECK_KEYS_DIR: there is no directory {keys_dir}: run coatcheck init,"
            " or mount the directory that holds the sealing key"
        )
    try:
        _require_closed(keys_dir, keys_dir.stat(), "0700", "chmod 700")
        found = [(path.stat().st_mtime_ns, path) for path in keys_dir.glob(_PATTERN)]
        read = [(at, path, _read(path, keys_dir)) for at, path in sorted(found, reverse=True)]
    except OSError as error:
        raise BadSealingKey(
            f"a sealing key in {keys_dir} cannot be read ({error.strerror}): mend or remove it"
        ) from None
    if not read:
        raise BadSealingKey(
            f"there is no sealing key in {keys_dir}: put the deployment's sealing-*.key there;"
            " a new deployment gets one from coatcheck init"
        )
    return SealingKeys(
        {sealing_key.id: sealing_key for _, _, sealing_key in read},
        [SealingFile(sealing_key.id, path, at) for at, path, sealing_key in read],
    )


def _read(path: Path, keys_dir: Path) -> SealingKey:
    real = path.resolve()
    if not real.is_relative_to(keys_dir.resolve()):
        raise BadSealingKey(f"{path} points out of {keys_dir}: put the file itself there")
    _require_closed(real, real.stat(), "0600", "chmod 600")
    try:
        key = b64decode(real.read_bytes().strip(), altchars=b"-_", validate=True)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise BadSealingKey(f"{path} is no sealing key: restore it from its backup")
    return SealingKey.of(key)


def _require_closed(path: Path, found: os.stat_result, mode: str, fix: str) -> None:
    if found.st_uid != os.geteuid():
        raise BadSealingKey(f"{path} belongs to another user: chown it to the one that runs this")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise BadSealingKey(
            f"{path} is open to other users, it must have mode {mode}: {fix} {path}"
        )
