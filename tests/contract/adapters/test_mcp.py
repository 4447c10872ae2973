"""An MCP server behind our verifier: what the SDK sees of a request, and what a tool knows.

The MCP client against running services is in journey/test_mcp_server.py.
"""

import asyncio
import logging
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver.exceptions import ToolError
from starlette.testclient import TestClient

from coatcheck import apikey
from coatcheck.mcp import (
    CoatcheckTokenVerifier,
    VerifiedToken,
    allow_api_key_query,
    get_principal,
)
from coatcheck.testing import FakeIssuer
from coatcheck.verifier import Verifier
from support.tokens import ISSUER, SetClock, a_principal, claims, key_set, signer

URL = "https://mcp.example.com/mcp"
METADATA = "https://mcp.example.com/.well-known/oauth-protected-resource/mcp"
BARE = f'Bearer realm="{URL}", resource_metadata="{METADATA}"'
API_KEY = apikey.make("ck_live")
VERSION = "2026-07-28"
ADDRESS = "203.0.113.9"
#: The SDK compares expiries with the real clock.
NOW = int(time.time())
OTHER = "key_other"


@pytest.fixture
def answers() -> list[bytes]:
    """What the issuer answers with; empty it, and the issuer is away."""
    return [key_set()]


@pytest.fixture
def settings(answers: list[bytes]) -> dict[str, Any]:
    return {
        "issuer": ISSUER,
        "audience": URL,
        "feed": None,
        "fetch": lambda _: answers[-1],
        "clock": SetClock(NOW),
        "roles": {"viewer": ("GET",), "member": ("GET", "POST")},
        "check_api_key": partial(a_principal, audience=URL, now=NOW),
    }


@pytest.fixture
def verifier(settings: dict[str, Any]) -> Iterator[CoatcheckTokenVerifier]:
    made = CoatcheckTokenVerifier(**settings)
    yield made
    made.verifier.close()


def token(**changes: object) -> str:
    return signer().token(claims(**{"aud": URL, "iat": NOW, "exp": NOW + 600, **changes}))


def bearer(**changes: object) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token(**changes)}")]


def server(verifier: CoatcheckTokenVerifier) -> MCPServer:
    mcp = MCPServer(
        "Widgets",
        token_verifier=verifier,
        auth=AuthSettings.model_validate(
            {
                "issuer_url": ISSUER,
                "resource_server_url": URL,
                "required_scopes": ["widgets:read"],
                "validate_token_resource": True,
            }
        ),
    )

    @mcp.tool()
    def whoami() -> dict[str, str | None]:
        who = get_principal()
        return {"key_id": who.key_id, "method": who.method, "project": who.project_id}

    @mcp.tool()
    async def write() -> str:
        return get_principal("widgets:write", resource="WIDGET/7").key_id

    @mcp.tool()
    async def another() -> str | None:
        """What a tool finds out about some other token than its caller's."""
        seen = await verifier.verify_token(token(sub=OTHER))
        return seen.subject if seen else None

    return mcp


class Asking:
    """An MCP client that sends one request per call, so that its headers are ours."""

    def __init__(self, http: TestClient) -> None:
        self.http = http

    def tool(self, name: str, headers: list[tuple[str, str]], *, query: str = "") -> Any:
        """The answer to a tool call: an HTTP answer, or of a call that was made its result."""
        params = {"name": name, "arguments": {}, "_meta": META}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        told = [*HEADERS, ("Mcp-Name", name), *headers]
        answer = self.http.post(f"/mcp{query}", json=body, headers=told)
        return answer.json()["result"] if answer.status_code == 200 else answer


PREFIX = "io.modelcontextprotocol/"
META = {
    f"{PREFIX}protocolVersion": VERSION,
    f"{PREFIX}clientInfo": {"name": "test", "version": "1"},
    f"{PREFIX}clientCapabilities": {},
}
HEADERS = [
    ("Accept", "application/json, text/event-stream"),
    ("MCP-Protocol-Version", VERSION),
    ("Mcp-Method", "tools/call"),
]


@contextmanager
def asking(verifier: CoatcheckTokenVerifier, *, wrapped: bool = True) -> Iterator[Asking]:
    app: Any = server(verifier).streamable_http_app(host="mcp.example.com")
    if wrapped:
        app = allow_api_key_query(app)
    with TestClient(app, "https://mcp.example.com", client=(ADDRESS, 50_000)) as http:
        yield Asking(http)


# Behind the wrapper


BASIC = b64encode(f"{API_KEY}:".encode()).decode()
CREDENTIALS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "bearer": ([("Authorization", f"Bearer {API_KEY}")], ""),
    "x-api-key": ([("X-API-Key", API_KEY)], ""),
    "basic": ([("Authorization", f"Basic {BASIC}")], ""),
    "in the url": ([], f"?api_key={API_KEY}"),
}


@pytest.mark.parametrize(("headers", "query"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_an_api_key_counts_in_every_place(
    verifier: CoatcheckTokenVerifier, headers: list[tuple[str, str]], query: str
) -> None:
    """The SDK looks at one of them; and a tool knows who calls it."""
    with asking(verifier) as ask:
        result = ask.tool("whoami", headers, query=query)

    known = {"key_id": "key_1", "method": "api_key", "project": None}
    assert result["structuredContent"] == known


def test_an_access_token_brings_its_project(verifier: CoatcheckTokenVerifier) -> None:
    """Read from its header, as everywhere."""
    with asking(verifier) as ask:
        result = ask.tool("whoami", [*bearer(), ("X-Project-Id", "prj_1")])

    known = {"key_id": claims()["sub"], "method": "jwt", "project": "prj_1"}
    assert result["structuredContent"] == known


REFUSED: dict[str, tuple[list[tuple[str, str]], int, str]] = {
    "none": ([], 401, "missing_credentials"),
    "another scheme": ([("Authorization", "Digest a")], 401, "missing_credentials"),
    "expired": (bearer(exp=NOW - 300), 401, "token_expired"),
    "another audience": (bearer(aud="https://api.example.com"), 401, "wrong_audience"),
    "two credentials": ([*bearer(), ("X-API-Key", API_KEY)], 400, "multiple_credentials"),
    "two headers": ([*bearer(), *bearer()], 400, "multiple_credentials"),
    "the word that is handed on": ([("Authorization", "Bearer elsewhere")], 401, "token_malformed"),
    "scope missing": (bearer(scope="widgets:write"), 403, "insufficient_scope"),
    "a role of readers": (bearer(must=["role"], roles=["viewer"]), 403, "role_not_allowed"),
    "another address": (bearer(must=["network"], cidrs=["192.0.2.0/24"]), 403, "ip_not_allowed"),
}


@pytest.mark.parametrize(("headers", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_why(
    verifier: CoatcheckTokenVerifier,
    caplog: pytest.LogCaptureFixture,
    headers: list[tuple[str, str]],
    status: int,
    code: str,
) -> None:
    """As every other adapter does; the SDK's own answer would be one and the same 401."""
    with asking(verifier) as ask:
        answer = ask.tool("whoami", headers)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith(BARE)
    assert ('scope="widgets:read"' in answer.headers["www-authenticate"]) == (
        code == "insufficient_scope"
    )
    logged = [line.getMessage() for line in caplog.records if line.name == "coatcheck.mcp"]
    assert logged == ([] if code == "missing_credentials" else [f"refused: {code}"])


def test_restrictions_are_held_against_the_request(verifier: CoatcheckTokenVerifier) -> None:
    """The address and the method are the request's."""
    here = bearer(must=["network", "role"], cidrs=[f"{ADDRESS}/32"], roles=["member"])
    with asking(verifier) as ask:
        assert not ask.tool("whoami", here)["isError"]


def test_without_a_key_set_the_answer_is_503(
    verifier: CoatcheckTokenVerifier, answers: list[bytes]
) -> None:
    """The SDK would say 401, and a client would throw its good token away."""
    answers[:] = [b"<html>"]
    with asking(verifier) as ask:
        answer = ask.tool("whoami", bearer())

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_the_metadata_document_is_the_sdks(verifier: CoatcheckTokenVerifier) -> None:
    """RFC 9728 §3; for everybody, whatever they send."""
    with asking(verifier) as ask:
        for query in ("", f"?api_key={API_KEY}"):
            answer = ask.http.get(f"{METADATA}{query}", headers={"Authorization": "Bearer x"})
            assert answer.json()["resource"] == URL
            assert answer.json()["scopes_supported"] == ["widgets:read"]


def test_an_answer_to_a_url_with_a_key_is_kept_private(verifier: CoatcheckTokenVerifier) -> None:
    """Refused or not."""
    with asking(verifier) as ask:
        for key in (API_KEY, "nonsense"):
            answer = ask.http.post(f"/mcp?api_key={key}", json={}, headers=HEADERS)
            assert answer.headers["referrer-policy"] == "no-referrer"


def test_nobody_behind_the_wrapper_sees_the_key_of_the_url(
    verifier: CoatcheckTokenVerifier,
) -> None:
    """Nor in the header that the SDK is made to look at."""
    seen: list[str] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        seen.append(repr(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    http = TestClient(allow_api_key_query(behind))
    assert http.get(f"/?api_key={API_KEY}").status_code == 200

    assert API_KEY not in "".join(seen)


def test_a_tool_says_what_its_caller_lacks(verifier: CoatcheckTokenVerifier) -> None:
    """An error of any other class would reach the caller without its text."""
    with asking(verifier) as ask:
        refused = ask.tool("write", bearer(scope="widgets:read"))
        allowed = ask.tool("write", bearer(scope="widgets:read widgets:write@WIDGET/7"))

    assert refused["isError"]
    assert "lacks a scope" in refused["content"][0]["text"]
    assert "Needed: widgets:write@WIDGET/7." in refused["content"][0]["text"]
    assert not allowed["isError"]
    with pytest.raises(ToolError, match="Send an access token"):
        get_principal()


def test_another_token_is_never_taken_for_the_callers(verifier: CoatcheckTokenVerifier) -> None:
    """A tool may verify what it got in its arguments, while its own request is at hand."""
    with asking(verifier) as ask:
        assert ask.tool("another", bearer())["structuredContent"] == {"result": OTHER}


# Without the wrapper


def test_without_the_wrapper_a_token_is_enough(verifier: CoatcheckTokenVerifier) -> None:
    """And what cannot be judged is refused, with a line in the log."""
    with asking(verifier, wrapped=False) as ask:
        assert not ask.tool("whoami", bearer())["isError"]
        refused = ask.tool("whoami", [("X-API-Key", API_KEY)])

    assert refused.json()["error"] == "invalid_token"


BLIND: dict[str, tuple[dict[str, object], str]] = {
    "address": ({"must": ["network"], "cidrs": [f"{ADDRESS}/32"]}, "ip_not_allowed"),
    "method": ({"must": ["role"], "roles": ["member"]}, "role_not_allowed"),
}


@pytest.mark.parametrize(("restricted", "code"), BLIND.values(), ids=BLIND)
def test_without_the_wrapper_a_restricted_token_is_refused(
    verifier: CoatcheckTokenVerifier,
    caplog: pytest.LogCaptureFixture,
    restricted: dict[str, object],
    code: str,
) -> None:
    """Fails closed: nobody tells the verifier where the caller is, and what they do."""
    with asking(verifier, wrapped=False) as ask:
        assert ask.tool("whoami", bearer(**restricted)).status_code == 401

    assert f"refused: {code}" in caplog.text


# With an issuer


SNIPPET = f"""
from mcp.server import MCPServer
from mcp.server.auth.settings import AuthSettings
from coatcheck.mcp import CoatcheckTokenVerifier, allow_api_key_query
URL = "{URL}"
mcp = MCPServer("Widgets", token_verifier=CoatcheckTokenVerifier("{ISSUER}", audience=URL),
    auth=AuthSettings(issuer_url="{ISSUER}", resource_server_url=URL,
    required_scopes=["widgets:read"], validate_token_resource=True))
app = allow_api_key_query(mcp.streamable_http_app())
"""


def test_five_lines_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that the page begins with; who is let in sends it no JSON-RPC, hence 400."""
    with FakeIssuer(ISSUER, audience=URL) as issuer:
        monkeypatch.setenv("COATCHECK_SERVICE_KEY", issuer.service_key)
        made: dict[str, Any] = {}
        exec(SNIPPET, made)  # noqa: S102 - it is ours
        connector = issuer.api_key("widgets:read", connector=True)
        with TestClient(made["app"], "http://127.0.0.1:8000", client=("127.0.0.1", 50_000)) as http:
            for path, headers, status in (
                ("/mcp", {"Authorization": f"Bearer {issuer.token('widgets:read')}"}, 400),
                ("/mcp", {"X-API-Key": issuer.api_key("widgets:read")}, 400),
                (f"/mcp?api_key={connector}", {}, 400),
                ("/mcp", {"X-API-Key": connector}, 401),
                ("/mcp", {"X-API-Key": issuer.api_key("widgets:write")}, 403),
                ("/mcp", {}, 401),
            ):
                assert http.post(path, json={}, headers=headers).status_code == status


def test_without_the_wrapper_an_api_key_is_a_token_of_no_known_address() -> None:
    """One that is bound to networks, or belongs into a URL, is refused."""
    with FakeIssuer(ISSUER, audience=URL) as issuer:
        verifier = CoatcheckTokenVerifier(ISSUER, audience=URL, service_key=issuer.service_key)
        keys = [
            issuer.api_key("widgets:read"),
            issuer.api_key("widgets:read", cidrs=[f"{ADDRESS}/32"]),
            issuer.api_key("widgets:read", connector=True),
        ]
        kept = [asyncio.run(verifier.verify_token(key)) for key in keys]
        verifier.verifier.close()

    assert [one is not None for one in kept] == [True, False, False]


# What the SDK keeps


def test_the_sdk_is_told_all_it_asks_for(verifier: CoatcheckTokenVerifier) -> None:
    """Above all `resource`, without which it refuses every token."""
    presented = token(scope="widgets:read widgets:write@WIDGET/7")
    kept = asyncio.run(verifier.verify_token(presented))

    assert isinstance(kept, VerifiedToken)
    assert kept.model_dump() == {
        "token": presented,
        "client_id": claims()["client_id"],
        "scopes": ["widgets:read", "widgets:write@WIDGET/7"],
        "expires_at": NOW + 600,
        "resource": URL,
        "subject": claims()["sub"],
        "claims": kept.claims,
    }
    assert kept.claims is not None
    assert kept.claims["iss"] == ISSUER
    assert kept.principal.org_id == claims()["org_id"]
    assert get_access_token() is None


def test_an_api_key_is_not_kept(verifier: CoatcheckTokenVerifier) -> None:
    """It would stand in every dump of what tools know of their caller."""
    kept = asyncio.run(verifier.verify_token(API_KEY))

    assert isinstance(kept, VerifiedToken)
    assert kept.token == ""
    assert API_KEY not in f"{kept!r}{kept.model_dump()}"


def test_a_verifier_can_be_handed_in(settings: dict[str, Any]) -> None:
    """To share it, or to close it."""
    with Verifier(**settings) as shared:
        assert CoatcheckTokenVerifier(verifier=shared).verifier is shared
        with pytest.raises(ValueError, match="not both"):
            CoatcheckTokenVerifier(ISSUER, verifier=shared)


def test_the_log_holds_no_credential(
    verifier: CoatcheckTokenVerifier, caplog: pytest.LogCaptureFixture
) -> None:
    """The code alone."""
    mistyped = API_KEY[:-1] + ("a" if API_KEY[-1] != "a" else "b")
    with caplog.at_level(logging.DEBUG, "coatcheck"):
        assert asyncio.run(verifier.verify_token(mistyped)) is None

    assert [line.getMessage() for line in caplog.records if line.name == "coatcheck.mcp"] == [
        "refused: api_key_malformed"
    ]
