"""Who calls, what there is to call for, and what the database holds, for the tests of rights."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from httpx2 import Response
from starlette.testclient import TestClient

from coatcheck import apikey, ids
from coatcheck.scope import ORGANIZATION_PERMISSIONS
from coatcheck.server import sealing
from coatcheck.server.manage import api_keys, groups, members, organizations, projects
from coatcheck.server.manage.api_keys import NewApiKey
from coatcheck.server.manage.groups import GroupTerms
from support.deployment import ISSUER, TESTER, Deployment, a_deployment, form

MANAGEMENT: Final = f"{ISSUER}/v1"
PRODUCT: Final = "https://api.example.com"
#: Where every caller calls from: a TestClient's own name for it is no address.
ADDRESS: Final = "192.0.2.10"

#: A product that has one of everything.
CATALOG: Final = """
name = "Acme"

[key]
brand = "ac"
environments = ["live", "test"]
free_environments = ["test"]

[[audience]]
id = "https://api.example.com"
environment = "live"
default = true

[[audience]]
id = "https://staging.example.com"
environment = "test"
default = true

[[audience]]
id = "https://mcp.example.com/mcp"
environment = "live"

[[permission]]
name = "read"

[[permission]]
name = "write"

[[permission]]
name = "create"

[[permission]]
name = "agents:launch"
audiences = ["https://api.example.com", "https://staging.example.com"]

[[permission]]
name = "billing:manage"
audiences = ["https://api.example.com"]

[[scope]]
id = "reader"
name = "Reader"
grants = ["read"]

[[scope]]
id = "agents"
name = "Agents"
grants = ["read", "agents:launch"]

[[scope]]
id = "full-access"
name = "Everything"
grants = ["*"]

[implies]
write = ["create"]

[[role]]
name = "member"
permission = "write"
methods = ["GET", "POST", "PATCH"]

[[role]]
name = "viewer"
permission = "read"
methods = ["GET"]

[[resource]]
type = "PLACE"
segments = [{ name = "kind", values = ["Site", "Room"] }, { name = "id" }]

[[resource]]
type = "THING"
segments = [{ name = "id" }]
within = ["PLACE"]

[models]
names = ["large", "small"]

[policies]
recoverable = true
disable = true
delete = true

[device_keys]
scopes = ["reader"]

[mcp]
name = "acme"
url = "https://mcp.example.com/mcp"
audience = "https://mcp.example.com/mcp"
scopes = ["read"]
"""


@contextmanager
def a_product(folder: Path, catalog: str | None = CATALOG) -> Iterator["Stage"]:
    """A deployment of a product, and a client whose address is known.

    Args:
        catalog: as a file has it; None: there is none.
    """
    # Those who are refused here guess a thousand times.
    settings: dict[str, Any] = {"guesses_per_minute": 0}
    if catalog is not None:
        path = folder / "catalog.toml"
        path.write_text(catalog)
        settings["catalog"] = path
    with a_deployment(folder, **settings) as deployment:
        client = TestClient(
            deployment.service,
            base_url=ISSUER,
            raise_server_exceptions=False,
            follow_redirects=False,
            client=(ADDRESS, 40_000),
        )
        with client as http:
            yield Stage(deployment, http, folder / "coatcheck.db")


@dataclass(frozen=True, slots=True)
class Made:
    """An API key that a test made."""

    id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stage:
    """A deployment, a client of it, and its database."""

    deployment: Deployment
    http: TestClient
    database: Path

    # --- what there is

    def organization(self, name: str, *, is_bootstrapped: bool = True, **columns: Any) -> str:
        """A new organization's id; without API keys."""
        deployment = self.deployment
        made = organizations.create(deployment.store, name, TESTER, now=deployment.now)
        with deployment.store.transaction() as tx:
            row = tx.organization(made.id)
            assert row is not None
            row.bootstrapped_at = deployment.now if is_bootstrapped else None
            for column, value in columns.items():
                setattr(row, column, value)
        return made.id

    def project(self, organization_id: str, name: str = "a project") -> str:
        deployment = self.deployment
        return projects.create(
            deployment.store, organization_id, name, TESTER, now=deployment.now
        ).id

    def member(self, organization_id: str, role: str, name: str = "somebody") -> str:
        deployment = self.deployment
        email = f"{ids.new_id('mem', deployment.now * 1000)}@example.com"
        return members.add(
            deployment.store, organization_id, name, email, role, TESTER, now=deployment.now
        ).id

    def group(self, name: str = "a group", models: tuple[str, ...] | None = None) -> str:
        deployment = self.deployment
        terms = GroupTerms(name, models=models)
        return groups.create(
            deployment.store, deployment.catalog, terms, TESTER, now=deployment.now
        ).id

    def api_key(self, organization_id: str, *scopes: str, **columns: Any) -> Made:
        """An API key for management, unless other audiences are named."""
        new = NewApiKey(
            organization_id,
            columns.pop("name", "a key"),
            scopes=scopes,
            audiences=columns.pop("audiences", (MANAGEMENT,)),
            **columns,
        )
        return self.store(new)

    def members_key(self, member_id: str, *scopes: str) -> Made:
        """A member's own API key."""
        deployment = self.deployment
        with deployment.store.transaction(read_only=True) as tx:
            row = tx.member(member_id)
            assert row is not None
            new = NewApiKey(row.organization_id, f"{row.role} key", scopes=scopes)
            new = members.own_api_key(row, new, deployment.catalog)
        return self.store(new)

    def store(self, new: NewApiKey) -> Made:
        deployment = self.deployment
        made = api_keys.create(
            deployment.store,
            deployment.catalog,
            new,
            TESTER,
            now=deployment.now,
            issuer=ISSUER,
            seal_with=lambda _: sealing.load(deployment.settings.keys_dir).newest(),
        )
        return Made(made.api_key.id, made.key)

    def device_key(self, member_id: str, organization_id: str, device: str, **columns: Any) -> Made:
        new = NewApiKey(
            organization_id,
            columns.pop("name", "a device"),
            scopes=columns.pop("scopes", ("reader",)),
            kind="device",
            member_id=member_id,
            device=device,
            **columns,
        )
        return self.store(new)

    # --- what is asked

    def token(self, secret: str, resource: str = MANAGEMENT, **parameters: str) -> str:
        """An access token, for the management API unless said otherwise."""
        answer = self.http.post("/oauth/token", data=form(secret, resource=resource, **parameters))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def ask(
        self,
        credential: str | Mapping[str, str] | None,
        method: str,
        path: str,
        body: object = None,
        query: Mapping[str, str] | None = None,
    ) -> Response:
        """One request to the management API.

        Args:
            credential: what `Authorization: Bearer` carries, or other headers.
        """
        headers = {"If-Match": "*"}
        if isinstance(credential, str):
            headers["Authorization"] = f"Bearer {credential}"
        elif credential is not None:
            headers |= credential
        answer: Response = self.http.request(
            method, f"/v1{path}", headers=headers, json=body, params=query
        )
        return answer

    # --- what the database holds

    def rows(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, parameters)]

    def api_key_rows(self, organization_id: str) -> dict[str, dict[str, Any]]:
        """Every API key that an organization has or had, in the order they were made."""
        made = "(SELECT min(seq) FROM changes WHERE subject = api_keys.id)"
        query = f"SELECT * FROM api_keys WHERE organization_id = ? ORDER BY {made}"  # noqa: S608
        rows = self.rows(query, organization_id)
        return {row["id"]: row for row in rows}

    def contents(self) -> list[dict[str, Any]]:
        """How much is in every table that a request may change.

        But for alarms, which are written now and then.
        """
        tables = (
            *("organizations", "projects", "members", "groups", "api_keys", "api_key_secrets"),
            *("usage_reports", "idempotent_requests", "signing_keys"),
            "changes WHERE actor != 'service:alarms'",
        )
        counts = ", ".join(
            f"(SELECT count(*) FROM {table})"  # noqa: S608 - a fixed name
            for table in tables
        )
        return self.rows(f"SELECT {counts}")

    def of_organization(self, organization_id: str, *, is_used: bool = False) -> list[str]:
        """Every row that an organization has, of every table, in an order of its own.

        Args:
            is_used: leave out what counts its API keys' uses, which is written now and then.
        """
        own = "SELECT id FROM api_keys WHERE organization_id = ?1"
        queries = (
            "SELECT * FROM organizations WHERE id = ?1",
            *(
                f"SELECT * FROM {table} WHERE organization_id = ?1"  # noqa: S608 - a fixed name
                for table in ("projects", "members", "api_keys", "organization_usage", "changes")
            ),
            *(
                f"SELECT * FROM {table} WHERE api_key_id IN ({own})"  # noqa: S608 - a fixed name
                for table in ("api_key_secrets", "api_key_usage")
                if not (is_used and table == "api_key_usage")
            ),
        )
        found = [repr(row) for query in queries for row in self.rows(query, organization_id)]
        return sorted(found)


def everything_of_an_organization() -> tuple[str, ...]:
    return tuple(ORGANIZATION_PERMISSIONS)


def code_of(answer: Response) -> str:
    """The stable name of a problem; empty when all is well."""
    try:
        told = answer.json()
    except json.JSONDecodeError:
        return ""
    return str(told.get("code", "")) if answer.status_code >= 400 else ""


def without_request_id(answer: Response) -> tuple[int, object]:
    """What an answer tells, but for what is different each time."""
    told = answer.json() if answer.content else {}
    told.pop("requestId", None)
    return answer.status_code, told


def an_unknown_secret(brand: str = "ac_live") -> str:
    """An API key in good form that was never issued."""
    return apikey.make(brand)


def an_unknown_id(kind: Literal["key", "org", "prj", "mem"]) -> str:
    return ids.new_id(kind, 1_700_000_000_000)


def mentioned(answer: Response, marks: Sequence[str]) -> list[str]:
    """Which of these texts an answer holds, in its body or its headers, in whatever case."""
    text = (answer.text + repr(answer.headers)).lower()
    return [mark for mark in marks if mark.lower() in text]
