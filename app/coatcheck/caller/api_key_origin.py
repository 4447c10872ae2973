"""Where the API key comes from: an argument, a file, the environment or the keychain.

A file and the keychain are read each time a token is fetched, so that a new API key counts
without a restart.

The keychain is the operating system's, by the package `keyring`: service name `coatcheck`, and
the issuer's URL as account.  `keyring set coatcheck https://auth.example.com` puts one there.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from coatcheck import apikey
from coatcheck.caller.errors import ApiKeyMissing

#: Service name in the keychain; the account is the issuer's URL.
KEYCHAIN_SERVICE: Final = "coatcheck"
VARIABLE: Final = "COATCHECK_API_KEY"
FILE_VARIABLE: Final = "COATCHECK_API_KEY_FILE"
#: Characters; foreign keys may be longer than our own.
_LONGEST: Final = 1024


class ApiKeyOrigin(Protocol):
    """Something that holds an API key.  Its repr says where, and shows a mask at most."""

    def read(self) -> str:
        """The API key as it is now.

        Raises:
            ApiKeyMissing: there is none, or it cannot be read.
        """

    def stamp(self) -> object:
        """What is another one if the API key may be another one."""


@dataclass(frozen=True, slots=True)
class Given:
    """An API key that stays what it is."""

    api_key: str = field(repr=False)
    where: str

    def __repr__(self) -> str:
        return f"{apikey.mask(self.api_key)} from {self.where}"

    def read(self) -> str:
        return self.api_key

    def stamp(self) -> object:
        return None


@dataclass(frozen=True, slots=True)
class InFile:
    """The content of a file, which somebody may replace."""

    path: Path

    def __repr__(self) -> str:
        return f"file {self.path}"

    def read(self) -> str:
        try:
            with self.path.open(encoding="utf-8") as file:
                return checked(file.read(_LONGEST + 2), f"the file {self.path}")
        except (OSError, UnicodeDecodeError) as error:
            raise ApiKeyMissing(
                f"cannot read {self.path}: {type(error).__name__}", "api_key_unreadable"
            ) from None

    def stamp(self) -> object:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


@dataclass(frozen=True, slots=True)
class InKeychain:
    """A password in the keychain of whoever runs this."""

    account: str

    def __repr__(self) -> str:
        return f"keychain {KEYCHAIN_SERVICE}, {self.account}"

    def read(self) -> str:
        try:
            import keyring  # noqa: PLC0415 - an extra, and slow to load
            import keyring.errors  # noqa: PLC0415
        except ModuleNotFoundError:
            raise ApiKeyMissing(
                "the keychain needs an extra: pip install 'coatcheck[keychain]'",
                "keychain_not_installed",
            ) from None
        try:
            found = keyring.get_password(KEYCHAIN_SERVICE, self.account)
        except (keyring.errors.KeyringError, OSError) as error:
            raise ApiKeyMissing(
                f"the keychain cannot be read ({type(error).__name__}): is there one on this"
                " machine, and is it open?",
                "keychain_unavailable",
            ) from None
        if not found:
            raise ApiKeyMissing(
                f"the keychain holds no API key for this issuer: keyring set {KEYCHAIN_SERVICE}"
                f" {self.account}",
                "api_key_missing",
            )
        return checked(found, "the keychain")

    def stamp(self) -> object:
        return None


def find(
    api_key: str | None = None,
    api_key_file: str | Path | None = None,
    *,
    keychain: bool | None = None,
    issuer: str,
    environ: Mapping[str, str] | None = None,
) -> ApiKeyOrigin:
    """Where the API key is: what was said, else the environment, else the keychain.

    Args:
        keychain: True: there and nowhere else; False: never; None: if nothing else is said.
        issuer: its account there.

    Raises:
        ApiKeyMissing: nowhere.
        ValueError: two places were said.
    """
    environ = os.environ if environ is None else environ
    if sum((api_key is not None, api_key_file is not None, keychain is True)) > 1:
        raise ValueError("api_key, api_key_file, keychain: say one of them")
    if api_key is not None:
        return Given(checked(api_key, "api_key"), "an argument")
    if api_key_file is not None:
        return InFile(Path(api_key_file))
    if keychain:
        return _in_keychain(issuer)
    if environ.get(VARIABLE, "").strip():
        return Given(checked(environ[VARIABLE], VARIABLE), VARIABLE)
    if environ.get(FILE_VARIABLE):
        return InFile(Path(environ[FILE_VARIABLE]))
    if keychain is None:
        try:
            return _in_keychain(issuer)
        except ApiKeyMissing:
            pass
    raise ApiKeyMissing(
        f"no API key: set {VARIABLE} or {FILE_VARIABLE}, say where it is, or put it into the"
        f" keychain by: keyring set {KEYCHAIN_SERVICE} {issuer}",
        "api_key_missing",
    )


def checked(text: str, where: str) -> str:
    """The API key in a text, without blanks around it.

    Raises:
        ApiKeyMissing: there is none, or what is there can be none.
    """
    text = text.strip()
    if not text:
        raise ApiKeyMissing(f"no API key: {where} is empty", "api_key_missing")
    if len(text) > _LONGEST or not text.isascii() or not text.isprintable() or " " in text:
        # Not repeated: it may be one with something beside it.
        raise ApiKeyMissing(
            f"what stands in {where} is no API key: it holds other characters", "api_key_missing"
        )
    return text


def _in_keychain(issuer: str) -> InKeychain:
    origin = InKeychain(issuer)
    origin.read()
    return origin
