"""OAuth libraries as their own documentation tells people to use them: URL, key id, API key.

Each function is one library's way to a token.  None of them knows anything of Coatcheck, and none
of them helps: what a library raises comes out as it is.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import httpx2
import msal
from authlib.integrations.base_client import OAuthError as AuthlibError
from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuth2Client
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from httpx_auth import InvalidGrantRequest, OAuth2ClientCredentials
from mcp.client.auth import OAuthTokenError
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error
from requests_oauthlib import OAuth2Session

TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class Account:
    """What somebody configures who wants a token.

    Attributes:
        api: the URL of the API that the token is for; only an MCP client looks at it.
        scope, resource: None: do not say.
    """

    issuer: str
    key_id: str
    key: str
    api: str
    scope: str | None = None
    resource: str | None = None

    @property
    def token_url(self) -> str:
        return f"{self.issuer}/oauth/token"


def authlib_basic(account: Account) -> str:
    session = AuthlibSession(account.key_id, account.key, scope=account.scope)
    return str(session.fetch_token(account.token_url, resource=account.resource)["access_token"])


def authlib_form(account: Account) -> str:
    session = AuthlibSession(
        account.key_id,
        account.key,
        scope=account.scope,
        token_endpoint_auth_method="client_secret_post",
    )
    return str(session.fetch_token(account.token_url, resource=account.resource)["access_token"])


def authlib_httpx2(account: Account) -> str:
    with OAuth2Client(account.key_id, account.key, scope=account.scope) as client:
        return str(client.fetch_token(account.token_url, resource=account.resource)["access_token"])


def authlib_httpx2_async(account: Account) -> str:
    async def fetch() -> str:
        async with AsyncOAuth2Client(account.key_id, account.key, scope=account.scope) as client:
            token = await client.fetch_token(account.token_url, resource=account.resource)
            return str(token["access_token"])

    return asyncio.run(fetch())


def requests_oauthlib_basic(account: Account) -> str:
    client = BackendApplicationClient(client_id=account.key_id, scope=account.scope)
    token = OAuth2Session(client=client).fetch_token(
        account.token_url,
        client_id=account.key_id,
        client_secret=account.key,
        resource=account.resource,
    )
    return str(token["access_token"])


def requests_oauthlib_form(account: Account) -> str:
    client = BackendApplicationClient(client_id=account.key_id, scope=account.scope)
    token = OAuth2Session(client=client).fetch_token(
        account.token_url,
        client_id=account.key_id,
        client_secret=account.key,
        include_client_id=True,
        resource=account.resource,
    )
    return str(token["access_token"])


def httpx_auth(account: Account) -> str:
    """The token never leaves the library but in the header of a call."""
    more = {"scope": account.scope, "resource": account.resource}
    auth = OAuth2ClientCredentials(
        account.token_url,
        client_id=account.key_id,
        client_secret=account.key,
        **{name: value for name, value in more.items() if value is not None},
    )
    seen: list[str] = []

    def api(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(api)) as client:
        client.get(account.api, auth=auth)
    return seen[0].removeprefix("Bearer ")


class InMemoryTokenStorage:
    """What the MCP SDK wants from its user: a place for the token."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return None

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """The key id and the API key are given; there is nothing to register."""


def mcp_sdk(account: Account) -> str:
    """Call the API and let the SDK find the rest: 401, resource metadata, issuer, token.

    Its user says neither scope nor resource.  The scope is the one that the API asks for, the
    resource the one that its metadata names.
    """
    storage = InMemoryTokenStorage()
    url = account.resource or account.api
    provider = ClientCredentialsOAuthProvider(
        server_url=url,
        storage=storage,
        client_id=account.key_id,
        client_secret=account.key,
        issuer=account.issuer,
    )

    async def call() -> httpx2.Response:
        async with httpx2.AsyncClient(auth=provider, timeout=TIMEOUT) as client:
            needs = {} if account.scope is None else {"needs": account.scope}
            return await client.get(url, params=needs)

    asyncio.run(call()).raise_for_status()
    assert storage.tokens is not None
    return storage.tokens.access_token


class MsalError(Exception):
    """MSAL raises nothing: its documentation has users print these two from what it returns."""


def msal_python(account: Account) -> str:
    app = msal.ConfidentialClientApplication(
        account.key_id, client_credential=account.key, oidc_authority=account.issuer
    )
    scopes = [] if account.scope is None else account.scope.split()
    result: dict[str, str] = app.acquire_token_for_client(scopes=scopes)
    if "access_token" not in result:
        raise MsalError(f"{result.get('error')}: {result.get('error_description')}")
    return result["access_token"]


#: Status and body of our refusal → the text of the library's exception.
Shows = Callable[[int, Mapping[str, Any]], str]


def in_two_words(status: int, body: Mapping[str, Any]) -> str:
    return f"{body['error']}: {body['error_description']}"


def in_parentheses(status: int, body: Mapping[str, Any]) -> str:
    return f"({body['error']}) {body['error_description']}"


def with_the_code(status: int, body: Mapping[str, Any]) -> str:
    rest = {"code": body["code"]}
    return f"{in_two_words(status, body)}\nAdditional information: {rest}"


def as_it_came(status: int, body: Mapping[str, Any]) -> str:
    return f"Token exchange failed ({status}): {json.dumps(body, separators=(',', ':'))}"


@dataclass(frozen=True, slots=True)
class OAuthLibrary:
    """A library, and what its users see of us.

    Attributes:
        error: what it raises when we refuse.
        shows: `str()` of that exception.  None of them shows `Retry-After`.
        tells_apart: the exception also holds the code as `error`, the sentence as `description`.
        sends_form: the API key goes in the body, so that a refusal is 400 and no 401.
        discovers: it takes the token endpoint from our metadata.
        resource: whether its user says it, the API's metadata does, or nobody can.
    """

    get_token: Callable[[Account], str]
    error: type[Exception]
    shows: Shows
    tells_apart: bool = False
    sends_form: bool = False
    discovers: bool = False
    resource: Literal["said", "found", "never"] = "said"


_AUTHLIB = OAuthLibrary(authlib_basic, AuthlibError, in_two_words, tells_apart=True)
_OAUTHLIB = OAuthLibrary(requests_oauthlib_basic, OAuth2Error, in_parentheses, tells_apart=True)

OAUTH_LIBRARIES = {
    "authlib, basic": _AUTHLIB,
    "authlib, form": replace(_AUTHLIB, get_token=authlib_form, sends_form=True),
    "authlib, httpx2": replace(_AUTHLIB, get_token=authlib_httpx2),
    "authlib, httpx2, async": replace(_AUTHLIB, get_token=authlib_httpx2_async),
    "requests-oauthlib, basic": _OAUTHLIB,
    "requests-oauthlib, form": replace(
        _OAUTHLIB, get_token=requests_oauthlib_form, sends_form=True
    ),
    # The text is all there is.
    "httpx-auth": OAuthLibrary(httpx_auth, InvalidGrantRequest, with_the_code),
    # The text again, and in it all of our answer; the only one that shows the status.
    "mcp": OAuthLibrary(mcp_sdk, OAuthTokenError, as_it_came, discovers=True, resource="found"),
    # An app that was refused repeats a 400 for a minute, and a 429 for as long as Retry-After
    # says, without asking us: the mended key counts at once in a new app only.
    "msal": OAuthLibrary(
        msal_python, MsalError, in_two_words, sends_form=True, discovers=True, resource="never"
    ),
}
