"""What `coatcheck doctor` looks at, from the inside out: settings, database, keys, service, clocks.

Each check is told with its finding; the first local one that fails ends the local ones, because
the others would only repeat it.
"""

import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx2

from coatcheck.cli.caller import TIMEOUT, issuer_url

if TYPE_CHECKING:
    from coatcheck.server.signing import Ring

#: Seconds; the Date header has whole ones, and the answer takes a moment.
CLOCKS_APART = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what came of it."""

    name: str
    ok: bool
    text: str
    unreachable: bool = False

    def to_json(self) -> dict[str, object]:
        return {"check": self.name, "ok": self.ok, "finding": self.text}


def run(issuer: str | None) -> list[Finding]:
    """All checks.  Without the service's packages, only those of the running service."""
    try:
        findings, ring = _local()
    except ModuleNotFoundError:
        findings, ring = [], None
    return findings + _remote(issuer_url(issuer), ring)


def _local() -> "tuple[list[Finding], Ring | None]":
    from coatcheck.server import app, catalog, sealing, setup
    from coatcheck.server.settings import BadSettings, Settings, unknown_settings
    from coatcheck.server.signing import RingKeeper
    from coatcheck.server.store import SchemaMismatch, StoreUnavailable, open_store

    findings = [
        Finding("settings", False, f"{name} is no setting of this version: check its spelling")
        for name in unknown_settings(os.environ)
    ]
    step = "settings"
    try:
        settings = Settings.load(os.environ)
        store = open_store(settings.database_url)
        findings.append(Finding(step, True, f"issuer {settings.issuer}"))
        step = "database"
        setup.require_deployment(settings, store)
        findings.append(Finding(step, True, "initialized, and its schema is this version's"))
        step = "sealing key"
        keeper = RingKeeper(store, sealing.load(settings.keys_dir))
        ring = keeper.at(store.head())
        ring.require_open()
        findings.append(Finding(step, True, "opens every signing key"))
        step = "signing keys"
        now = int(app.clock_of(settings)())
        text = app.readiness(store, keeper, catalog.without_file(settings), now)["signing_key"]
        signing = " ".join(key.kid for key in ring.signing_keys if key.signs(now))
        findings.append(Finding(step, text == "ok", signing if text == "ok" else text))
        store.close()
    except (
        BadSettings,
        setup.NotInitialized,
        setup.OtherDeployment,
        SchemaMismatch,
        StoreUnavailable,
        sealing.BadSealingKey,
        ValueError,
    ) as error:
        return [*findings, Finding(step, False, str(error))], None
    return findings, ring


def _remote(issuer: str, ring: "Ring | None") -> list[Finding]:
    findings = []
    step = "service"
    try:
        answer = httpx2.get(f"{issuer}/.well-known/oauth-authorization-server", timeout=TIMEOUT)
        document = answer.json()
        same = document["issuer"] == issuer
        text = f"answers at {issuer}" if same else "says another issuer: set COATCHECK_ISSUER to it"
        findings.append(Finding(step, same, text))
        step = "clocks"
        findings.append(_clocks(answer.headers.get("date")))
        step = "key set"
        served = {
            key["kid"] for key in httpx2.get(document["jwks_uri"], timeout=TIMEOUT).json()["keys"]
        }
    except httpx2.HTTPError as error:
        text = f"no answer from {issuer} ({type(error).__name__}): run coatcheck serve"
        return [*findings, Finding(step, False, text, unreachable=True)]
    except (ValueError, KeyError, TypeError):
        return [
            *findings,
            Finding(step, False, f"{issuer} is no Coatcheck: check COATCHECK_ISSUER"),
        ]
    if ring is not None:
        expected = {signing_key.kid for signing_key in ring.published(int(time.time()))}
        same = served == expected
        text = f"{len(served)} keys" if same else "not those of this database: compare settings"
        findings.append(Finding(step, same, text))
    return findings


def _clocks(date: str | None) -> Finding:
    if date is None:
        return Finding("clocks", True, "the service sends no Date to compare with")
    apart = abs(parsedate_to_datetime(date).timestamp() - time.time())
    text = f"{apart:.0f} s apart"
    if apart > CLOCKS_APART:
        return Finding("clocks", False, f"{text}: set both by NTP, tokens depend on it")
    return Finding("clocks", True, text)
