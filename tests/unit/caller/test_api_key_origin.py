"""Where the API key comes from, in which order, and what is told when it is nowhere."""

import sys
from collections.abc import Iterator
from pathlib import Path

import keyring
import keyring.backend
import keyring.errors
import pytest

from coatcheck import apikey
from coatcheck.caller import ApiKeyMissing
from coatcheck.caller.api_key_origin import ApiKeyOrigin, find

ISSUER = "https://auth.example.com"
ARGUMENT, VARIABLE, FILED, CHAINED = (apikey.make("ck_live") for _ in range(4))


class Keychain(keyring.backend.KeyringBackend):
    """One that works, in memory."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.passwords: dict[tuple[str, str], str] = {}
        self.is_locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.is_locked:
            raise keyring.errors.KeyringLocked("locked")
        return self.passwords.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.passwords[service, username] = password


@pytest.fixture
def keychain() -> Iterator[Keychain]:
    before, made = keyring.get_keyring(), Keychain()
    keyring.set_keyring(made)
    yield made
    keyring.set_keyring(before)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "key"
    made.write_text(f"{FILED}\n", encoding="utf-8")
    yield made
    made.unlink(missing_ok=True)


def test_what_was_said_counts_before_what_is_set(keychain: Keychain, file: Path) -> None:
    """Argument, file; then the variable, the file it names, the keychain."""
    keychain.set_password("coatcheck", ISSUER, CHAINED)
    both = {"COATCHECK_API_KEY": VARIABLE, "COATCHECK_API_KEY_FILE": str(file)}
    named = {**both, "COATCHECK_API_KEY": ""}

    assert find(ARGUMENT, issuer=ISSUER, environ=both).read() == ARGUMENT
    assert find(None, file, issuer=ISSUER, environ=both).read() == FILED
    assert find(keychain=True, issuer=ISSUER, environ=both).read() == CHAINED
    assert find(issuer=ISSUER, environ=both).read() == VARIABLE
    assert find(issuer=ISSUER, environ=named).read() == FILED
    assert find(issuer=ISSUER, environ={}).read() == CHAINED


def test_nowhere_says_where_it_could_be(keychain: Keychain) -> None:
    """Each of the places, and the command that puts it into the keychain for this issuer."""
    for chain in (None, False):
        with pytest.raises(ApiKeyMissing) as caught:
            find(keychain=chain, issuer=ISSUER, environ={})
        for place in ("COATCHECK_API_KEY ", "COATCHECK_API_KEY_FILE", f"set coatcheck {ISSUER}"):
            assert place in str(caught.value)


def test_a_keychain_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only if it was asked for; else it is one place less to look at."""
    monkeypatch.setitem(sys.modules, "keyring", None)

    with pytest.raises(ApiKeyMissing, match=r"pip install 'coatcheck\[keychain\]'"):
        find(keychain=True, issuer=ISSUER, environ={})
    with pytest.raises(ApiKeyMissing, match="no API key: set"):
        find(issuer=ISSUER, environ={})


def test_a_keychain_without_it_or_locked_says_so(keychain: Keychain) -> None:
    """With service name and account, as its own program shows them."""
    with pytest.raises(ApiKeyMissing, match=f"keyring set coatcheck {ISSUER}"):
        find(keychain=True, issuer=ISSUER, environ={})
    keychain.is_locked = True
    with pytest.raises(ApiKeyMissing, match="KeyringLocked"):
        find(keychain=True, issuer=ISSUER, environ={})


NONE = {"empty": " \n", "two": f"{ARGUMENT}\n{VARIABLE}", "long": "a" * 2000, "é": "ké"}


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_what_can_be_no_key_is_told_and_not_repeated(
    keychain: Keychain, file: Path, text: str
) -> None:
    """A whole configuration pasted into the variable may hold other secrets."""
    file.write_text(text, encoding="utf-8")
    keychain.set_password("coatcheck", ISSUER, text)
    for place in (
        lambda: find(text, issuer=ISSUER),
        lambda: find(None, file, issuer=ISSUER).read(),
        lambda: find(keychain=True, issuer=ISSUER),
    ):
        with pytest.raises(ApiKeyMissing) as caught:
            place()
        assert text.strip()[:9] not in str(caught.value) or not text.strip()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """And what another one is, is another stamp."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("missing", "bytes", "."):
        with pytest.raises(ApiKeyMissing, match="cannot read"):
            find(None, tmp_path / name, issuer=ISSUER).read()


def test_a_repr_says_where_and_shows_a_mask(keychain: Keychain, file: Path) -> None:
    """It ends up in logs."""
    keychain.set_password("coatcheck", ISSUER, CHAINED)
    told: dict[str, ApiKeyOrigin] = {
        f"{apikey.mask(ARGUMENT)} from an argument": find(ARGUMENT, issuer=ISSUER),
        f"file {file}": find(None, file, issuer=ISSUER),
        f"keychain coatcheck, {ISSUER}": find(keychain=True, issuer=ISSUER),
    }

    assert list(told) == [repr(one) for one in told.values()]
