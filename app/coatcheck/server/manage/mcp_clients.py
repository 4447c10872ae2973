"""What somebody types, clicks or pastes to connect an AI client to the product's MCP server.

Pure: a name, a URL and an API key in, texts out.  The form that keeps the API key out of files
comes first where a client has one; every text that holds the API key says so.

A client that can send headers gets an ordinary API key.  One that takes nothing but a URL gets a
connector key in its query, which is good for nothing else.

Source: the clients' own documentation and command lines; RFC 3986 §3.4 (query), §3.5 (fragment),
RFC 6750 §2.1 (Authorization: Bearer).
"""

import json
import re
import shlex
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import quote

Kind = Literal["command", "link", "url", "json"]

#: What a connector key is called in a URL.
QUERY_PARAMETER: Final = "api_key"

_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
#: What a shell of Windows may take for its own within JSON; there JSON has another spelling for it.
_MEANS_SOMETHING: Final = re.compile(r"""[^A-Za-z0-9 "{}:,/._~?=\\-]""")


@dataclass(frozen=True, slots=True)
class Step:
    """One text, and what to do with it.

    Attributes:
        kind: a line for a shell, a link to click, a URL to paste, or a file.
        text: may hold the API key, as its label says then.
    """

    kind: Kind
    label: str
    text: str = field(repr=False)

    def to_json(self) -> dict[str, object]:
        """As the API and the command line write it."""
        return {"kind": self.kind, "label": self.label, "text": self.text}


#: From the server's name, its URL and the API key.
Steps = Callable[[str, str, str], tuple[Step, ...]]


@dataclass(frozen=True, slots=True)
class Client:
    """A program or service that talks to MCP servers.

    Attributes:
        name: for people.
        sends_headers: whether it can send an API key in a header; else it goes into the URL.
        notes: what is worth knowing before or after.
    """

    name: str
    sends_headers: bool
    steps: Steps
    notes: tuple[str, ...] = ()


def variable(server: str) -> str:
    """The environment variable that holds the API key for a server: `ACME_API_KEY`."""
    name = f"{server.upper().replace('-', '_')}_API_KEY"
    # POSIX XBD §3.216: a name does not begin with a digit.
    return f"_{name}" if name[0].isdigit() else name


def connector_url(url: str, api_key: str) -> str:
    """The URL of a server with an API key in its query, behind what is there already."""
    address, hash_sign, fragment = url.partition("#")
    has_query = "?" in address
    separator = "&" if has_query else "?"
    if has_query and address.endswith(("?", "&")):
        separator = ""
    return f"{address}{separator}{QUERY_PARAMETER}={quote(api_key)}{hash_sign}{fragment}"


def _export(server: str, api_key: str) -> Step:
    return Step(
        "command",
        "In the shell that starts it: the API key, as a variable",
        f"export {variable(server)}={shlex.quote(api_key)}",
    )


def _claude_code(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    # --header takes every word that follows: name and URL stand before it.
    add = f"claude mcp add --transport http {shlex.quote(server)} {shlex.quote(url)} --header"
    return (
        _export(server, api_key),
        Step(
            "command",
            "Add the server; only the name of the variable is stored",
            f"{add} {shlex.quote(f'Authorization: Bearer ${{{variable(server)}}}')}",
        ),
        Step(
            "command",
            "Or in one line; it holds the API key, and so will Claude Code's configuration",
            f'{add} "Authorization: Bearer {api_key}"',
        ),
    )


def _codex(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    return (
        _export(server, api_key),
        Step(
            "command",
            "Add the server; only the name of the variable is stored",
            f"codex mcp add {shlex.quote(server)} --url {shlex.quote(url)}"
            f" --bearer-token-env-var {variable(server)}",
        ),
    )


def _vscode(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    asked_for = f"{server}-key"
    file = {
        "inputs": [
            {
                "id": asked_for,
                "type": "promptString",
                "description": f"API key for {server}",
                "password": True,
            }
        ],
        "servers": {server: _http_server(url, f"${{input:{asked_for}}}")},
    }
    added = _compact({"name": server} | _http_server(url, api_key))
    escaped = _MEANS_SOMETHING.sub(_in_json, added).replace('"', '\\"')
    return (
        Step(
            "json",
            "As .vscode/mcp.json; VS Code asks for the API key once and keeps it",
            json.dumps(file, indent=2),
        ),
        Step(
            "link",
            "Or click; the link holds the API key",
            f"vscode:mcp/install?{quote(added, safe='')}",
        ),
        Step(
            "link",
            "The same for VS Code Insiders",
            f"vscode-insiders:mcp/install?{quote(added, safe='')}",
        ),
        Step(
            "command",
            "Or in a shell of Linux or macOS; it holds the API key",
            f"code --add-mcp {shlex.quote(added)}",
        ),
        Step("command", "The same in PowerShell", f"code --add-mcp '{escaped}'"),
        Step("command", "The same in cmd", f'code --add-mcp "{escaped}"'),
    )


def _cursor(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    config = b64encode(_compact({"url": url, "headers": _headers(api_key)}).encode()).decode()
    return (
        Step(
            "link",
            "Click; the link holds the API key",
            "cursor://anysphere.cursor-deeplink/mcp/install"
            f"?name={quote(server, safe='')}&config={quote(config, safe='')}",
        ),
    )


def _claude(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    return (
        Step(
            "url",
            "In Settings > Connectors > Add custom connector; it holds the API key",
            connector_url(url, api_key),
        ),
    )


def _chatgpt(server: str, url: str, api_key: str) -> tuple[Step, ...]:
    return (
        Step(
            "url",
            'As the URL of a new connector, Authentication "No authentication"; it holds the API'
            " key",
            connector_url(url, api_key),
        ),
    )


def _in_json(found: re.Match[str]) -> str:
    """RFC 8259 §7: any character as its number."""
    return f"\\u{ord(found[0]):04x}"


def _http_server(url: str, api_key: str) -> dict[str, object]:
    return {"type": "http", "url": url, "headers": _headers(api_key)}


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"}


_LINK_IS_SECRET: Final = "A link holds the API key: do not share it."  # noqa: S105 - a sentence
_URL_IS_SECRET: Final = (
    "The URL holds the API key: do not share it.  The key works in a URL and nowhere else."  # noqa: S105
)
_FROM_THE_CLOUD: Final = (
    "The vendor's cloud calls the server, not your computer: a list of allowed addresses has to"
    " hold the vendor's ranges."
)

CLIENTS: Final[Mapping[str, Client]] = {
    "claude-code": Client(
        "Claude Code",
        True,
        _claude_code,
        (
            "The variable has to be set whenever Claude Code starts.",
            "The server is for this folder only: -s user before --transport adds it everywhere.",
        ),
    ),
    "codex": Client(
        "Codex",
        True,
        _codex,
        ("Codex takes the API key from the variable only: it has to be set whenever it starts.",),
    ),
    "vscode": Client(
        "VS Code",
        True,
        _vscode,
        (
            _LINK_IS_SECRET,
            "In a workspace use .vscode/mcp.json: headers in .mcp.json were lost before.",
        ),
    ),
    "cursor": Client("Cursor", True, _cursor, (_LINK_IS_SECRET,)),
    "claude": Client(
        "Claude Desktop and claude.ai", False, _claude, (_URL_IS_SECRET, _FROM_THE_CLOUD)
    ),
    "chatgpt": Client(
        "ChatGPT",
        False,
        _chatgpt,
        (
            "Switch developer mode on first; tools that write need a Business or Enterprise plan.",
            _URL_IS_SECRET,
            _FROM_THE_CLOUD,
        ),
    ),
}
