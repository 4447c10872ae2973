"""An MCP server on our verifier, driven by the MCP SDK's own client, against a running service.

What the SDK is told without a socket is in contract/adapters/test_mcp.py.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
import uvicorn
from mcp.client import Client
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer
from mcp.server.auth.settings import AuthSettings
from mcp.shared.exceptions import MCPError

from coatcheck import apikey
from coatcheck.mcp import CoatcheckTokenVerifier, allow_api_key_query, get_principal
from coatcheck.scope import RESOURCE_SERVER
from coatcheck.server.manage import api_keys
from coatcheck.server.manage.api_key_rules import CONNECTOR
from coatcheck.server.manage.api_keys import Created, NewApiKey
from support.clients.oauth_libraries import InMemoryTokenStorage
from support.deployment import NOON, TESTER, Deployment, a_deployment
from support.live import free_port

TIMEOUT = 10
#: The names of the tools, and what one of them says.
Told = tuple[list[str], dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _quiet_clients() -> Iterator[None]:
    """An MCP client logs the URL that it was given; that log is its user's."""
    clients = logging.getLogger("mcp.client")
    before = clients.level
    clients.setLevel(logging.WARNING)
    yield
    clients.setLevel(before)


@pytest.fixture(scope="module")
def url() -> str:
    """Where the MCP server is: the audience of its tokens."""
    return f"http://127.0.0.1:{free_port()}/mcp"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[Deployment]:
    """The issuer, behind a socket of its own."""
    issuer = f"http://127.0.0.1:{free_port()}"
    with a_deployment(tmp_path_factory.mktemp("issuer"), issuer=issuer, audience=url) as made:
        # The SDK compares expiries with the real clock.
        made.clock.now = max(NOON, time.time())
        with served(made.service, issuer):
            yield made


@pytest.fixture(scope="module", autouse=True)
def _server(deployment: Deployment, url: str) -> Iterator[None]:
    issuer = deployment.settings.issuer
    verifier = CoatcheckTokenVerifier(
        issuer,
        audience=url,
        service_key=deployment.api_key(RESOURCE_SERVER).key,
        clock=deployment.clock,
    )
    auth = {
        "issuer_url": issuer,
        "resource_server_url": url,
        "required_scopes": ["widgets:read"],
        "validate_token_resource": True,
    }
    mcp = MCPServer("Widgets", token_verifier=verifier, auth=AuthSettings.model_validate(auth))

    @mcp.tool()
    async def whoami() -> dict[str, str]:
        who = get_principal()
        return {"key_id": who.key_id, "method": who.method}

    with served(allow_api_key_query(mcp.streamable_http_app()), url):
        yield
    verifier.verifier.close()


def connector(deployment: Deployment) -> Created:
    new = NewApiKey(deployment.organization_id, "connector", ["widgets:read"], kind=CONNECTOR)
    return api_keys.create(
        deployment.store,
        deployment.catalog,
        new,
        TESTER,
        now=deployment.now,
        issuer=deployment.settings.issuer,
    )


@contextmanager
def served(app: Any, url: str) -> Iterator[None]:
    """The application behind uvicorn, in a thread of its own."""
    # Whoever follows the feed would be waited for.
    config = uvicorn.Config(
        app, port=httpx2.URL(url).port or 0, log_config=None, timeout_graceful_shutdown=0
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + TIMEOUT
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert running.started
        yield
    finally:
        running.should_exit = True
        thread.join(TIMEOUT)


def call(url: str, *, mode: str = "auto", **options: Any) -> Told:
    """What an MCP client finds: the names of the tools, and what `whoami` says."""

    async def calling() -> Told:
        async with (
            httpx2.AsyncClient(timeout=TIMEOUT, **options) as http,
            Client(streamable_http_client(url, http_client=http), mode=mode) as client,
        ):
            tools = await client.list_tools()
            result = await client.call_tool("whoami")
            assert result.structured_content is not None
            return [tool.name for tool in tools.tools], result.structured_content

    return asyncio.run(calling())


MODES = ["auto", "legacy"]


@pytest.mark.parametrize("mode", MODES)
def test_client_credentials(deployment: Deployment, url: str, mode: str) -> None:
    """From 401 to the tool by what the SDK finds out itself: the MCP extension of this name."""
    made = deployment.api_key("widgets:read", "widgets:write")
    provider = ClientCredentialsOAuthProvider(
        server_url=url,
        storage=InMemoryTokenStorage(),
        client_id=made.api_key.id,
        client_secret=made.key,
        issuer=deployment.settings.issuer,
    )

    known = {"key_id": made.api_key.id, "method": "jwt"}
    assert call(url, mode=mode, auth=provider) == (["whoami"], known)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_an_api_key_in_a_header(deployment: Deployment, url: str, header: str, mode: str) -> None:
    """What most MCP clients can be told to send."""
    made = deployment.api_key("widgets:read")
    value = f"Bearer {made.key}" if header == "Authorization" else made.key

    known = {"key_id": made.api_key.id, "method": "api_key"}
    assert call(url, mode=mode, headers={header: value}) == (["whoami"], known)


@pytest.mark.parametrize("mode", MODES)
def test_a_connector_url(
    deployment: Deployment, url: str, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """For clients that take nothing but a URL.  No log of the server shows the key."""
    made = connector(deployment)
    with caplog.at_level(logging.DEBUG):
        told = call(f"{url}?api_key={made.key}", mode=mode)

    assert told == (["whoami"], {"key_id": made.api_key.id, "method": "api_key"})
    lines = [
        line.getMessage()
        for line in caplog.records
        if not line.name.startswith(("httpx", "httpcore", "mcp.client"))
    ]
    assert any('"POST /mcp HTTP/1.1" 200' in line for line in lines)
    assert made.key not in "".join(lines)


#: Code and status of the answer, by what is sent: headers and query.
REFUSED: dict[str, tuple[int, Callable[[Deployment], tuple[dict[str, str], str]]]] = {
    "missing_credentials": (401, lambda _: ({}, "")),
    "api_key_unknown": (401, lambda _: ({"X-API-Key": apikey.make("ck_live")}, "")),
    "api_key_malformed": (401, lambda _: ({"Authorization": "Bearer ck_live_" + "0" * 38}, "")),
    "connector_only_in_query": (
        401,
        lambda deployment: ({}, f"?api_key={deployment.api_key('widgets:read').key}"),
    ),
    "insufficient_scope": (
        403,
        lambda deployment: ({"X-API-Key": deployment.api_key("widgets:write").key}, ""),
    ),
}


@pytest.mark.parametrize("code", REFUSED)
def test_everybody_else_is_refused(deployment: Deployment, url: str, code: str) -> None:
    """With the verifier's own answer, of which the SDK tells its user nothing."""
    status, sent = REFUSED[code]
    headers, query = sent(deployment)
    answer = httpx2.post(f"{url}{query}", headers=headers, json={}, timeout=TIMEOUT)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert f'realm="{url}"' in answer.headers["www-authenticate"]


def test_a_client_that_is_refused_gets_to_no_tool(url: str) -> None:
    """Whatever it makes of the answer."""
    with pytest.raises(BaseExceptionGroup) as failed:
        call(url, headers={"X-API-Key": apikey.make("ck_live")})

    assert failed.group_contains(MCPError, match="error response")
