"""What tests of the wire share: credentials, tokens, the form of a refusal, plain sockets."""

import base64
import json
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2
import jwt
from starlette.testclient import TestClient

from coatcheck import apikey, ids
from support.deployment import ISSUER, NOON, Deployment, form
from support.live import Live

FORM: Final = "application/x-www-form-urlencoded"
#: The audience of the management API.
MANAGEMENT: Final = f"{ISSUER}/v1"
#: Seconds that a token lives.
LIFETIME: Final = 600

# RFC 6749 §5.2: %x20-21 / %x23-5B / %x5D-7E
DESCRIPTION: Final = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+")
CHALLENGE: Final = re.compile(
    r'(?P<scheme>Basic|Bearer) realm="(?P<realm>[^"]+)", error="(?P<error>[^"]+)",'
    r' error_description="(?P<error_description>[^"]+)"'
)


# --- credentials and tokens


def basic(user: str, password: str, scheme: str = "Basic") -> dict[str, str]:
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"{scheme} {text}"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def a_wrong_key() -> str:
    """A key of the right form, checksum and all, that nobody was given."""
    return apikey.make("ck_live")


def an_unknown_id() -> str:
    return ids.new_id("key", NOON * 1000)


def token_for(http: TestClient, key: str, **parameters: str) -> str:
    """A token of this API key."""
    answer = http.post("/oauth/token", data=form(key, **parameters))
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


def claims_of(token: str) -> dict[str, Any]:
    """What a JWT says, unverified."""
    return jwt.decode(token, options={"verify_signature": False})


def database(deployment: Deployment) -> Path:
    """The file that a deployment keeps everything in."""
    return Path(deployment.settings.database_url.removeprefix("sqlite:///"))


# --- answers


def refused(answer: httpx2.Response, status: int, error: str) -> dict[str, str]:
    """The body of a refusal, once everything that holds for all of them was looked at."""
    body: dict[str, str] = answer.json()
    assert (answer.status_code, body.get("error")) == (status, error), answer.text
    assert set(body) == {"error", "error_description", "code"}
    assert DESCRIPTION.fullmatch(body["error_description"])
    assert re.fullmatch(r"[a-z_]+", body["code"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    challenge = answer.headers.get("www-authenticate")
    assert (challenge is not None) == (status == 401)
    if challenge is not None:
        said = CHALLENGE.fullmatch(challenge)
        assert said is not None, challenge
        assert said["realm"] == ISSUER
        assert (said["error"], said["error_description"]) == (error, body["error_description"])
    return body


# --- plain sockets

CRLF: Final = b"\r\n"
#: Seconds until a connection that is not closed counts as left open.
PATIENCE: Final = 5
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back until the connection was closed.

    Attributes:
        status: of the first answer, as headers and body.
        statuses: of all of them.
        body: everything behind the first head.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    statuses: tuple[int, ...]

    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        return body


def connect(live: Live, timeout_s: float = PATIENCE) -> socket.socket:
    """A connection to a running service."""
    url = urlsplit(live.issuer)
    assert url.hostname is not None
    return socket.create_connection((url.hostname, url.port or 80), timeout=timeout_s)


def send(connection: socket.socket, pieces: bytes | Iterable[bytes]) -> None:
    """Send all of it, as far as the service listens."""
    # Who is refused early goes on sending: the answer is there all the same.
    with suppress(BrokenPipeError, ConnectionResetError):
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            connection.sendall(piece)


def read_to_the_end(connection: socket.socket) -> bytes:
    """Everything until the service closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            received += part
    return received


def exchange(live: Live, pieces: bytes | Iterable[bytes]) -> Answer:
    """Send all of it, as far as the service listens, and read until it closes."""
    with closing(connect(live)) as connection:
        send(connection, pieces)
        return answer_of(read_to_the_end(connection))


def answer_of(received: bytes) -> Answer:
    """The first of the answers that were received, and how many there are."""
    assert received, "closed without an answer"
    first, _, body = received.partition(CRLF * 2)
    status_line, *lines = first.decode("latin-1").split("\r\n")
    named = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in named}
    statuses = tuple(int(found[1]) for found in _STATUS_LINE.finditer(received))
    return Answer(int(status_line.split(" ")[1]), headers, body, statuses)


def head(*lines: str, method: str = "POST", target: str = "/oauth/token") -> bytes:
    """The head of a token request, with these header lines at its end."""
    all_lines = (
        f"{method} {target} HTTP/1.1",
        "Host: auth.example.com",
        f"Content-Type: {FORM}",
        *lines,
    )
    return "\r\n".join(all_lines).encode() + CRLF * 2


def of_length(body: bytes, *lines: str, target: str = "/oauth/token") -> bytes:
    """A whole request on a connection that ends with it."""
    return head(f"Content-Length: {len(body)}", "Connection: close", *lines, target=target) + body


def in_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A body in chunks, to its end.  RFC 9112 §7.1."""
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def refused_by_framing(answer: Answer, *statuses: int) -> None:
    """One answer, in JSON that nobody may keep, and the connection is closed behind it."""
    assert len(answer.statuses) == 1, answer.statuses
    assert answer.status in statuses
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert int(answer.headers["content-length"]) == len(answer.body)
    said = answer.json()
    assert (said["error"], said["code"]) == ("invalid_request", "invalid_request")
    assert DESCRIPTION.fullmatch(said["error_description"])
