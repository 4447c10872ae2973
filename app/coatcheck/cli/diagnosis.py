"""What `coatcheck doctor` looks at, from the inside out: settings, database, keys, service, clocks.

Each check is told with its finding; the first local one that fails ends the local ones, because
the others would only repeat it.
"""

import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx2

from coatcheck.cli import catalogs
from coatcheck.cli.caller import TIMEOUT, issuer_url
from coatcheck.durations import CLOCK_DRIFT_MAX, Publication

if TYPE_CHECKING:
    from coatcheck.server.sealing import SealingKeys
    from coatcheck.server.signing import Line, Ring
    from coatcheck.server.store import Store

#: Seconds; the Date header has whole ones, and the answer takes a moment.
CLOCKS_APART = 10
DAY = 86_400


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
    from coatcheck.server import app, catalog_file, sealing, setup
    from coatcheck.server.settings import BadSettings, Settings, unknown_settings
    from coatcheck.server.signing import RingKeeper, first_lines, sealing_keys_in_use
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
        step = "catalog"
        catalog = catalog_file.of(settings)
        findings.append(Finding(step, True, catalogs.summary(settings, catalog)))
        step = "database"
        setup.require_deployment(settings, store)
        findings.append(Finding(step, True, "initialized, for this issuer"))
        step = "schema"
        store.check_schema()
        findings.append(Finding(step, True, "is this version's"))
        # A database that was put back by other means than `db restore` shows here.
        findings.append(Finding("change log", True, _end_of(store)))
        step = "database clock"
        findings.append(_database_clock(store.clock_drift_s()))
        step = "sealing key"
        sealing_keys = sealing.load(settings.keys_dir)
        text = f"{settings.keys_dir} is closed to other users"
        findings.append(Finding("keys directory", True, text))
        keeper = RingKeeper(store, sealing_keys, settings.publication)
        ring = keeper.at(store.head())
        ring.require_open()
        findings.append(Finding(step, True, "opens every signing key"))
        step = "signing keys"
        now = int(app.clock_of(settings)())
        text = app.readiness(store, keeper, catalog, now)["signing_key"]
        signing = " ".join(key.kid for key in ring.signing_keys if key.signs(now))
        findings.append(Finding(step, text == "ok", signing if text == "ok" else text))
        findings += _idle_sealing_keys(sealing_keys, sealing_keys_in_use(store))
        step = "rotation"
        lines = first_lines({one.algorithm for one in catalog.audiences.values()})
        findings += _overdue(ring, lines, settings.rotate_every, settings.publication, now)
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


def _end_of(store: "Store") -> str:
    from coatcheck.server.manage.forms import rfc3339

    with store.transaction(read_only=True) as tx:
        last = tx.last_change()
    return "empty" if last is None else f"ends at {last.seq}, {rfc3339(last.at)}"


def _database_clock(drift_s: float | None) -> Finding:
    if drift_s is None:
        return Finding("database clock", True, "is this machine's")
    text = f"this machine is {abs(drift_s):.1f} s {'ahead' if drift_s > 0 else 'behind'}"
    if abs(drift_s) > CLOCK_DRIFT_MAX:
        return Finding("database clock", False, f"{text}: set both by NTP; no token is issued here")
    return Finding("database clock", True, text)


def _idle_sealing_keys(sealing_keys: "SealingKeys", in_use: "Collection[str]") -> Iterator[Finding]:
    """Files that nothing is sealed with: left over from a replacement, or waiting for it."""
    newest_used = max((file.made_at for file in sealing_keys.files if file.id in in_use), default=0)
    for file in sealing_keys.files:
        if file.id in in_use:
            continue
        text = f"{file.path} seals nothing here: "
        if file.made_at > newest_used:
            text += "once every node has it, run coatcheck signing-keys reseal"
        else:
            text += "remove it from every node, and keep a copy with the backups of its time"
        yield Finding("sealing key", True, text)


def _overdue(
    ring: "Ring", lines: "Iterable[Line]", every_s: int, publication: Publication, now: int
) -> Iterator[Finding]:
    """Signing keys that sign for longer than they should, although the next one was due."""
    late = []
    for line in lines:
        # The service makes the next one as soon as it is due: a day later it has not run.
        signing_key = ring.due(line, every_s, publication.ahead, now - publication.ahead)
        if signing_key is not None:
            days = (now - signing_key.starts_at) // DAY
            late.append(f"{signing_key.kid} ({line[1]} for {line[0]}s) signs for {days} days")
    if late:
        text = (
            f"{'; '.join(late)}: a running service rotates by itself (COATCHECK_ROTATE_EVERY);"
            " without one: coatcheck signing-keys rotate"
        )
        yield Finding("rotation", False, text)
    elif every_s:
        yield Finding("rotation", True, f"no signing key signs for longer than {every_s // DAY} d")
    else:
        yield Finding("rotation", True, "only when told: COATCHECK_ROTATE_EVERY is 0")


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
