"""Secrets in what should hold none: files, logs, answers, arguments.

What is looked for is known by its form: API keys by their checksum, access tokens, private keys.
Of API keys and sealing keys that were made here the bare characters are looked for too.  All of
it as it is, percent-encoded, escaped, in hexadecimal and in base64, as in a Basic header.

What the revocation feed says is public: it is the one kind of signed text that is no secret.

Source: RFC 6750 §5.3 (bearer tokens in logs), RFC 6749 §10.3 and §10.10, OWASP ASVS 5 §16.2.5.
"""

import json
import os
import re
import sqlite3
import stat
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from binascii import unhexlify
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from coatcheck import apikey, feed_profile
from coatcheck.server import sealing

SEALING_KEY: Final = "sealing key"
#: Commands whose stdout shows a secret: that is what they are for.
SHOW_SECRETS: Final = (
    *(("init",), ("keys", "create"), ("keys", "rotate"), ("keys", "reveal"), ("token",)),
    ("credential-helper",),
    *(("admin", "recover"), ("orgs", "create"), ("orgs", "bootstrap")),
)
#: Commands that are given secrets as arguments by tests of how they refuse or warn of that.
TAKE_WHAT_IS_TYPED: Final = (("token",), ("verify",))

_REST: Final = apikey.SECRET_LENGTH + apikey.CHECKSUM_LENGTH
#: What stands before the secret and checksum of an API key, at most.
_LONGEST_PREFIX: Final = apikey.MAX_LENGTH - _REST

#: The end of an API key, also where other letters follow: a database has no blanks.
_AN_END: Final = re.compile(rb"_(?=([0-9A-Za-z]{%d}))" % _REST)
#: RFC 7515 §7.1: header "." payload "." signature; a JSON object begins with eyJ.
_A_JWT: Final = re.compile(rb"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{43,}")
#: RFC 7468 §10 and §13, RFC 5208 §5 (version 0 and the algorithms that sign), RFC 7518 §6.2.2.
_A_PRIVATE_KEY: Final = re.compile(
    rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    rb"|\x02\x01\x000(?:\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"
    rb"|\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01|\x05\x06\x03\x2b\x65\x70)"
    rb'|"d"\s*:\s*"[\w-]{43,}"'
)
#: What an encoding of something may be written in stays; all else becomes a blank.
_LETTERS_ALONE: Final = re.sub(rb"[^0-9A-Za-z_+/-]", b" ", bytes(range(256)))
_LETTERS: Final = re.compile(rb"[0-9A-Za-z]{%d,}" % _REST)
_HEXADECIMAL: Final = re.compile(rb"[0-9a-fA-F]{%d,}" % (2 * _REST))
#: An API key and a token cannot be escaped without one of these: `_` and `.` are in each.
_AN_ESCAPE: Final = re.compile(rb"%5[Ff]|%2[Ee]|\\u00|\\x5[Ff]")
_ESCAPED: Final = re.compile(rb"\\(?:u00|x)([0-9a-fA-F]{2})")
_SEALING_KEY_BYTES: Final = 32
#: SQLite's file format §1.2 and §4.1: a database, and the two byte orders of its log.
_SQLITE: Final = (b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
_PAGE: Final = 4096
_WAL_HEAD: Final = 32
_FRAME: Final = 24 + _PAGE
_POSTGRES_PAGE: Final = 8192
#: Files of PostgreSQL: relations of ours have numbers from here on; names of the log's segments
#: are this long.
_FIRST: Final = 16384
_SEGMENT: Final = 24
_TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")


class Secret(NamedTuple):
    """A secret as one may speak of it."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Secrets:
    """Looks for secrets, and knows those that were made here."""

    def __init__(self) -> None:
        #: The characters after the prefix of an API key → the API key.
        self._api_keys: dict[bytes, bytes] = {}
        #: Other secrets as they are, and written in letters → what they are.
        self._others: dict[bytes, Secret] = {}
        self._written: dict[bytes, Secret] = {}
        #: How many letters those have.
        self._lengths: set[int] = set()

    def remember_api_key(self, key: str) -> None:
        self._api_keys[key.rpartition("_")[2].encode()] = key.encode()

    def remember(self, kind: str, secret: bytes) -> None:
        """A secret without a form of its own, such as random bytes."""
        named = Secret(kind, _fingerprint(secret))
        self._others[secret] = named
        for form in _forms(secret):
            # Anything shorter is in no run of letters.
            if len(form) < _REST:
                self._others[form] = named
                continue
            self._written[form] = named
            self._lengths.add(len(form))

    def learn(self, text: str) -> set[Secret]:
        """Remember the API keys of a text that shows them, and tell those it shows twice."""
        shown = Counter(_api_keys(text.encode()))
        for key in shown:
            self.remember_api_key(key.decode())
        return {_api_key(key) for key, times in shown.items() if times > 1}

    def find(self, data: bytes) -> set[Secret]:
        """All secrets in there."""
        found = set(self._plain(data))
        if _AN_ESCAPE.search(data):
            for read in (unquote_to_bytes(data), _ESCAPED.sub(_unescaped, data)):
                found.update(self._plain(read))
        return found

    def _plain(self, data: bytes) -> Iterator[Secret]:
        yield from _by_form(data)
        for form, named in self._others.items():
            if form in data:
                yield named
        for run in _runs(data):
            yield from self._in_run(run)

    def _in_run(self, run: bytes) -> Iterator[Secret]:
        for length in self._lengths:
            for start in range(len(run) - length + 1):
                named = self._written.get(run[start : start + length])
                if named is not None:
                    yield named
        for letters in _LETTERS.findall(run):
            for start in range(len(letters) - _REST + 1):
                key = self._api_keys.get(letters[start : start + _REST])
                if key is not None:
                    yield _api_key(key)
        for digits in _HEXADECIMAL.findall(run):
            yield from _by_form(unhexlify(digits[: len(digits) // 2 * 2]))
        standard = run.translate(_TO_STANDARD)
        # Where a run is glued to other text, its groups of four may begin at any of its letters.
        for start in range(4):
            groups = standard[start:]
            if len(groups) % 4 == 1:  # one letter is no group
                groups = groups[:-1]
            yield from _by_form(b64decode(groups + b"=" * (-len(groups) % 4)))


class Sweep:
    """Looks through what one process of tests leaves behind, and keeps what it found."""

    def __init__(self) -> None:
        self.secrets = Secrets()
        self.findings: list[str] = []
        self._texts: list[tuple[str, bytes]] = []
        self._pages: set[int] = set()
        self._processes: set[int] = set()
        self._sealing_keys: set[str] = set()
        self._excused: list[Path] = []

    # --- what tests make

    def excuse(self, path: Path) -> None:
        """A file or folder in which a test puts secrets on purpose."""
        self._excused.append(path)

    def learn_deployment(self, folder: Path) -> None:
        """Remember the sealing keys of a deployment, and the private keys they seal."""
        files = [file for file in folder.glob("keys/sealing-*.key") if file.is_file()]
        if all(file.name in self._sealing_keys for file in files):
            return
        for file in files:
            self._sealing_keys.add(file.name)
            with suppress(ValueError):
                sealing_key = urlsafe_b64decode(file.read_bytes().strip())
                # Some tests write what is no key.
                if len(sealing_key) == _SEALING_KEY_BYTES:
                    self.secrets.remember(SEALING_KEY, sealing_key)
        with suppress(sqlite3.Error, sealing.BadSealingKey):
            sealing_keys = sealing.load(folder / "keys")
            for kid, sealing_key_id, sealed in _sealed(folder / "coatcheck.db"):
                der = sealing_keys.unseal(sealed, kid, sealing_key_id)
                private = serialization.load_der_private_key(der, password=None)
                self.secrets.remember("private key", private_number(private))

    # --- where to look

    def text(self, where: str, text: str | bytes) -> None:
        """Something that was said; looked at by `look`."""
        self._texts.append(
            (where, text.encode(errors="replace") if isinstance(text, str) else text)
        )

    def command(self, arguments: Sequence[str], stdout: str, stderr: str) -> None:
        """A command of ours that has ended."""
        name = " ".join(arguments[:2])
        if tuple(arguments[:1]) not in TAKE_WHAT_IS_TYPED:
            self.text(f"an argument of {name}", "\n".join(arguments))
        self.text(f"stderr of {name}", stderr)
        if not any(tuple(arguments[: len(shows)]) == shows for shows in SHOW_SECRETS):
            self.text(f"stdout of {name}", stdout)
            return
        self._found(f"stdout of {name}, more than once", self.secrets.learn(stdout))

    def process(self, process_id: int) -> None:
        """The arguments of a process and of all that descend from it."""
        with suppress(OSError):  # it has ended
            if process_id not in self._processes:
                self._processes.add(process_id)
                arguments = Path(f"/proc/{process_id}/cmdline").read_bytes()
                self.text("an argument of a process", arguments.replace(b"\0", b"\n"))
            for children in Path(f"/proc/{process_id}/task").glob("*/children"):
                for child in map(int, children.read_text().split()):
                    self.process(child)

    def look(self, when: str) -> None:
        """Look at all that was said since the last look."""
        texts, self._texts = self._texts, []
        if texts and self.secrets.find(b"\n".join(text for _, text in texts)):
            for where, text in texts:
                self._found(f"{where}, {when}", self.secrets.find(text))

    def files(self, folder: Path) -> None:
        """Look at each file below a folder."""
        if not folder.is_dir():
            self.findings.append(f"nobody knows what, in {folder}: it was removed")
        # Something may still be removing files of its own.
        walked = [(Path(place), names) for place, _, names in os.walk(folder)]
        for place, _ in walked:
            if place.name == "keys":
                self.learn_deployment(place.parent)
        for place, names in walked:
            for name in names:
                if stat.S_ISREG(_mode(place / name)):
                    self.file(place / name)

    def file(self, file: Path) -> None:
        if any(file.is_relative_to(excused) for excused in self._excused) or _is_kept(file):
            return
        found = self.secrets.find(self._new_in(file))
        if file.match("keys/sealing-*.key"):
            # Its home: the one file that holds it, and nothing but it.
            found = {secret for secret in found if secret.kind != SEALING_KEY}
        self._found(str(file), found)

    def pages(self, folder: Path) -> None:
        """Look at each file of a database server, page by page.

        A new database is a copy of a template: most pages are in all of them, and the relations
        of the template itself are nobody's.
        """
        for place, _, names in os.walk(folder):
            for name in names:
                relation = name.partition(".")[0].partition("_")[0]
                if relation.isdecimal() and len(relation) < _SEGMENT and int(relation) < _FIRST:
                    continue
                with suppress(OSError):
                    content = (Path(place) / name).read_bytes()
                    new = b"\n".join(self._new_pages(content, _POSTGRES_PAGE))
                    self._found(f"a file of PostgreSQL, {name}", self.secrets.find(new))

    def _new_pages(self, content: bytes, size: int) -> Iterator[bytes]:
        for at in range(0, len(content), size):
            page = content[at : at + size]
            if hash(page) not in self._pages:
                self._pages.add(hash(page))
                yield page

    def _new_in(self, file: Path) -> bytes:
        """The content; of a database, and of its log, the pages that no other one had before."""
        try:
            content = file.read_bytes()
        except OSError:
            return b""
        if not content.startswith(_SQLITE):
            return content
        start, step = (0, _PAGE) if content.startswith(_SQLITE[0]) else (_WAL_HEAD, _FRAME)
        new = []
        for at in range(start, len(content), step):
            page = content[at : at + step][-_PAGE:]
            if hash(page) not in self._pages:
                self._pages.add(hash(page))
                new.append(page)
        return b"\n".join(new)

    def _found(self, where: str, found: set[Secret]) -> None:
        told = [f"{secret} in {where}" for secret in sorted(found)]
        self.findings += [one for one in told if one not in self.findings]


#: The one of this process.
SWEEP: Final = Sweep()


def _sealed(database: Path) -> list[tuple[str, str, bytes]]:
    """Its signing keys.  Read only: a writer would take the database's log away at the end."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        query = "SELECT kid, sealing_key_id, sealed_private FROM signing_keys"
        return connection.execute(query).fetchall()


def _is_kept(file: Path) -> bool:
    """Whether that is where `make run` keeps the API keys of its demonstration."""
    return file.match(".coatcheck/*.key") and stat.S_IMODE(_mode(file)) == 0o600


def _mode(file: Path) -> int:
    try:
        return file.lstat().st_mode
    except OSError:
        return 0


def private_number(key: object) -> bytes:
    """What a private key is about: the number that nobody else may know."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.private_numbers().private_value.to_bytes(32)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.private_numbers().p.to_bytes(key.key_size // 16)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    return key.private_bytes(
        serialization.Encoding.Raw,
        serialization.PrivateFormat.Raw,
        serialization.NoEncryption(),
    )


def _by_form(data: bytes) -> Iterator[Secret]:
    for key in _api_keys(data):
        yield _api_key(key)
    for token in _A_JWT.findall(data):
        if not _is_feed(token):
            yield Secret("token", f"{token[:8].decode()}... ({_fingerprint(token)})")
    for found in _A_PRIVATE_KEY.finditer(data):
        yield Secret("private key", _fingerprint(data[found.start() : found.start() + 200]))


def _api_keys(data: bytes) -> Iterator[bytes]:
    """The API keys, told by their checksums; their beginning is where the checksum fits."""
    for found in _AN_END.finditer(data):
        end = found.start() + 1 + _REST
        for start in range(max(0, end - _REST - _LONGEST_PREFIX), found.start()):
            try:
                apikey.parse(data[start:end].decode("latin-1"))
            except apikey.MalformedApiKey:
                continue
            yield data[start:end]


def _api_key(key: bytes) -> Secret:
    return Secret("API key", f"{apikey.mask(key.decode())} ({_fingerprint(key)})")


def _is_feed(token: bytes) -> bool:
    head = token.partition(b".")[0]
    try:
        header = json.loads(urlsafe_b64decode(head + b"=" * (-len(head) % 4)))
    except ValueError:
        return False
    return isinstance(header, dict) and header.get("typ") == feed_profile.TYPE


def _runs(data: bytes) -> Iterator[bytes]:
    """Letters that may be an encoding of something: whole runs, so that each is looked at once.

    To split megabytes takes a tenth of the time that a pattern takes.
    """
    return (run for run in data.translate(_LETTERS_ALONE).split() if len(run) >= _REST)


def _forms(secret: bytes) -> Iterable[bytes]:
    """How random bytes may be written: in letters of `_runs`."""
    return (
        secret.hex().encode(),
        b64encode(secret).rstrip(b"="),
        urlsafe_b64encode(secret).rstrip(b"="),
    )


def _unescaped(found: re.Match[bytes]) -> bytes:
    return unhexlify(found[1])


def _fingerprint(secret: bytes) -> str:
    return f"SHA-256 {sha256(secret).hexdigest()[:12]}"
