"""`coatcheck.server.manage.mcp_clients`: each text is read back as its client reads it."""

import json
import re
import shlex
import string
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck import apikey
from coatcheck.server.manage.mcp_clients import CLIENTS, Client, Step, connector_url, variable

NAME, URL, API_KEY = "acme", "https://mcp.example.com/mcp", apikey.make("ck_live")
#: RFC 3986 §2: what a URL may be made of.
LEGAL = string.ascii_letters + string.digits + "-._~:/?[]@!$&'()*+,;=%"

NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,30}", fullmatch=True)
URLS = st.builds("https://mcp.example.com{}".format, st.text(LEGAL, max_size=40))


def steps_of(client: str, name: str = NAME, url: str = URL) -> tuple[Step, ...]:
    return CLIENTS[client].steps(name, url, API_KEY)


def commands(client: str, name: str = NAME, url: str = URL) -> Iterator[list[str]]:
    """The words of each line for a POSIX shell."""
    for step in steps_of(client, name, url):
        if step.kind == "command" and not step.label.startswith("The same in"):
            yield shlex.split(step.text)


def text_of(client: str, begins: str, name: str = NAME, url: str = URL) -> str:
    """The one text that begins like this."""
    (found,) = [step.text for step in steps_of(client, name, url) if step.text.startswith(begins)]
    return found


def http_server(url: str, api_key: str = API_KEY) -> dict[str, Any]:
    return {"type": "http", "url": url, "headers": {"Authorization": f"Bearer {api_key}"}}


# --- as they are documented


def test_the_texts_are_the_documented_ones() -> None:
    """What users compare with the client's own documentation, letter by letter."""
    claude_code = [step.text for step in steps_of("claude-code")]
    codex = [step.text for step in steps_of("codex")]

    add = "claude mcp add --transport http acme https://mcp.example.com/mcp --header"
    assert claude_code == [
        f"export ACME_API_KEY={API_KEY}",
        f"{add} 'Authorization: Bearer ${{ACME_API_KEY}}'",
        f'{add} "Authorization: Bearer {API_KEY}"',
    ]
    assert codex == [
        f"export ACME_API_KEY={API_KEY}",
        "codex mcp add acme --url https://mcp.example.com/mcp --bearer-token-env-var ACME_API_KEY",
    ]
    assert text_of("vscode", "code --add-mcp '{\"") == (
        'code --add-mcp \'{"name":"acme","type":"http","url":"https://mcp.example.com/mcp",'
        f'"headers":{{"Authorization":"Bearer {API_KEY}"}}}}\''
    )
    for client in ("claude", "chatgpt"):
        (step,) = steps_of(client)
        assert (step.kind, step.text) == ("url", f"{URL}?api_key={API_KEY}")


def test_there_are_instructions_for_all_six() -> None:
    sends_headers = {slug: client.sends_headers for slug, client in CLIENTS.items()}

    assert sends_headers == {
        "claude-code": True,
        "codex": True,
        "vscode": True,
        "cursor": True,
        "claude": False,
        "chatgpt": False,
    }


# --- read back


@settings(max_examples=50)
@given(NAMES, URLS)
def test_claude_code_reads_what_was_meant(name: str, url: str) -> None:
    """--header takes every word that follows, so that it stands last."""
    export, by_variable, literal = commands("claude-code", name, url)
    words = ["claude", "mcp", "add", "--transport", "http", name, url, "--header"]

    assert export == ["export", f"{variable(name)}={API_KEY}"]
    assert by_variable == [*words, f"Authorization: Bearer ${{{variable(name)}}}"]
    assert literal == [*words, f"Authorization: Bearer {API_KEY}"]


@settings(max_examples=50)
@given(NAMES, URLS)
def test_codex_reads_what_was_meant(name: str, url: str) -> None:
    export, add = commands("codex", name, url)

    assert export == ["export", f"{variable(name)}={API_KEY}"]
    options = ["--url", url, "--bearer-token-env-var", variable(name)]
    assert add == ["codex", "mcp", "add", name, *options]


@settings(max_examples=50)
@given(NAMES, URLS)
def test_vs_code_reads_what_was_meant(name: str, url: str) -> None:
    """By command and by link; a link is taken apart at its first question mark."""
    added = {"name": name} | http_server(url)

    (words,) = commands("vscode", name, url)
    assert words[:2] == ["code", "--add-mcp"]
    assert json.loads(words[2]) == added
    for scheme in ("vscode", "vscode-insiders"):
        link = text_of("vscode", f"{scheme}:", name, url)
        begin, _, value = link.partition("?")
        assert begin == f"{scheme}:mcp/install"
        assert json.loads(unquote(value)) == added
        assert re.fullmatch(r"[A-Za-z0-9%._~-]+", value)


@settings(max_examples=50)
@given(NAMES, URLS)
def test_shells_of_windows_take_nothing_in_it_for_their_own(name: str, url: str) -> None:
    """cmd sees an even number of quotes wherever one is escaped: & or % would end the line."""
    added = {"name": name} | http_server(url)

    for label, quoted in (("PowerShell", "'"), ("cmd", '"')):
        (step,) = [one for one in steps_of("vscode", name, url) if one.label.endswith(label)]
        command, value = step.text[:16], step.text[16:-1]
        assert (command, step.text[-1]) == (f"code --add-mcp {quoted}", quoted)
        assert not set("&|<>^%!'$`();@") & set(value)
        assert json.loads(value.replace('\\"', '"')) == added


@settings(max_examples=50)
@given(NAMES, URLS)
def test_vs_code_can_ask_for_the_api_key(name: str, url: str) -> None:
    """The safer form: no file holds the API key."""
    (step,) = [one for one in steps_of("vscode", name, url) if one.kind == "json"]
    read = json.loads(step.text)

    (asked,) = read["inputs"]
    assert read["servers"] == {name: http_server(url, f"${{input:{asked['id']}}}")}
    assert (asked["type"], asked["password"]) == ("promptString", True)
    assert asked["description"]


@settings(max_examples=50)
@given(NAMES, URLS)
def test_cursor_reads_what_was_meant(name: str, url: str) -> None:
    """base64 has letters that mean something in a URL, so that it is encoded once more."""
    (step,) = steps_of("cursor", name, url)
    link = urlsplit(step.text)
    config = {"url": url, "headers": {"Authorization": f"Bearer {API_KEY}"}}

    assert (link.scheme, link.netloc) == ("cursor", "anysphere.cursor-deeplink")
    assert link.path == "/mcp/install"
    pairs = dict(parse_qsl(link.query, strict_parsing=True))
    assert pairs.keys() == {"name", "config"}
    assert pairs["name"] == name
    assert json.loads(b64decode(pairs["config"], validate=True)) == config
    assert "+" not in link.query


@settings(max_examples=50)
@given(URLS, st.text(LEGAL, max_size=8))
def test_a_connector_key_stands_behind_what_is_in_the_url_already(url: str, fragment: str) -> None:
    """RFC 3986 §3.4, §3.5: a query ends where the fragment begins."""
    made = connector_url(f"{url}#{fragment}", API_KEY)

    address, _, after = made.partition("#")
    assert after == fragment
    before, _, query = address.partition("?")
    assert before == url.partition("?")[0]
    names = [pair.partition("=") for pair in query.split("&")]
    assert names[-1] == ("api_key", "=", API_KEY)
    kept = [pair for pair in url.partition("?")[2].split("&") if pair]
    assert [pair for pair in query.split("&") if pair][:-1] == kept


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("https://a.example/mcp", "https://a.example/mcp?api_key="),
        ("https://a.example/mcp?", "https://a.example/mcp?api_key="),
        ("https://a.example/mcp?v=2", "https://a.example/mcp?v=2&api_key="),
        ("https://a.example/mcp?v=2&", "https://a.example/mcp?v=2&api_key="),
        ("https://a.example", "https://a.example?api_key="),
    ],
)
def test_a_query_that_is_there_stays(url: str, made: str) -> None:
    assert connector_url(url, API_KEY) == made + API_KEY


# --- the secret


@settings(max_examples=20)
@given(NAMES, URLS)
def test_only_what_has_to_holds_the_secret_and_it_says_so(name: str, url: str) -> None:
    """Whoever pastes a text into a file or a chat is told before."""
    for client in CLIENTS:
        for step in steps_of(client, name, url):
            # Of the base64 in Cursor's link the letters of the API key are not seen.
            holds_it = API_KEY in step.text or client == "cursor"
            says_so = "API key" in step.label or step.label.startswith("The same")
            is_safe = "only the name" in step.label or step.kind == "json"
            assert holds_it == (not is_safe)
            assert says_so or is_safe
            assert API_KEY not in step.label + repr(step)


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_notes_are_the_same_for_every_secret(client: Client) -> None:
    """They are told again to who asks again; nothing of a key can be in them."""
    assert all(note.endswith(".") for note in client.notes)
    assert client.name
    assert client.notes


def test_the_notes_say_what_goes_wrong_without_them() -> None:
    assert any("do not share" in note for note in CLIENTS["cursor"].notes)
    for cloud in ("claude", "chatgpt"):
        assert any("vendor's ranges" in note for note in CLIENTS[cloud].notes)
    (step,) = steps_of("chatgpt")
    assert '"No authentication"' in step.label
    assert any("developer mode" in note for note in CLIENTS["chatgpt"].notes)


@settings(max_examples=50)
@given(NAMES)
def test_a_variable_has_a_name_that_every_shell_takes(name: str) -> None:
    """POSIX XBD §3.216."""
    assert re.fullmatch(r"[A-Z_][A-Z0-9_]*_API_KEY", variable(name))


def test_a_variable_is_named_after_the_server() -> None:
    assert variable("acme") == "ACME_API_KEY"
    assert variable("acme-eu-2") == "ACME_EU_2_API_KEY"
    assert variable("3d") == "_3D_API_KEY"
