"""The service, put together: the only module that knows every room.

The form endpoints and the gateways' one are found by path before Starlette's router sees the
request; all other pages are ordinary Starlette.
"""

import asyncio
import gc
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from coatcheck.durations import LEEWAY, READY_TIMEOUT, USAGE_FLUSH
from coatcheck.server import (
    catalog_file,
    catalog_start,
    logs,
    metrics,
    pages,
    restore,
    sealing,
    setup,
    signing,
)
from coatcheck.server.alarms import Alarms
from coatcheck.server.authz.endpoint import VerifyEndpoint
from coatcheck.server.authz.gateways import Gateways
from coatcheck.server.catalog import Catalog
from coatcheck.server.changes import Actor
from coatcheck.server.feed import Feed
from coatcheck.server.inflight import InFlight
from coatcheck.server.inprocess import ManagementApi
from coatcheck.server.issue.exchange import Issuer
from coatcheck.server.issue.inspect import OwnTokens
from coatcheck.server.manage import forms
from coatcheck.server.manage.api.call import Office
from coatcheck.server.metrics import Board, Metrics
from coatcheck.server.metrics_page import MetricsPage
from coatcheck.server.oauth import metadata
from coatcheck.server.oauth.bridge import Bridge
from coatcheck.server.oauth.endpoint import Desk, FormEndpoint, TokenEndpoint
from coatcheck.server.oauth.introspect import Introspection, IntrospectionEndpoint
from coatcheck.server.oauth.revocations import RevocationsEndpoint
from coatcheck.server.oauth.revoke import Revocation, RevocationEndpoint
from coatcheck.server.oauth.wire import Receive, Reply, Scope, Send, json_reply
from coatcheck.server.own_verifier import OwnVerifier
from coatcheck.server.sealing import BadSealingKey
from coatcheck.server.settings import Settings
from coatcheck.server.signing import FEED_ALGORITHM, NoSigner, RingKeeper
from coatcheck.server.store import SchemaMismatch, Store, StoreUnavailable, open_store
from coatcheck.server.throttle import Throttle
from coatcheck.server.usage import Usage

_log = logging.getLogger(__name__)

#: Who rotates signing keys that are due, in the change log.
_ROTATION = Actor("service:rotation")

_PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src '{pages.STYLE_HASH}'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_SERVER_ERROR = {
    "error": "server_error",
    "error_description": "Something went wrong on our side. Try again.",
    "code": "server_error",
}


class Service:
    """The service as an ASGI application."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        clock: Callable[[], float],
        board: Board | None = None,
    ) -> None:
        """Read what it needs to start.

        Args:
            board: where workers of one service add up their metrics; None for one alone.

        Raises:
            NotInitialized, OtherDeployment, SchemaMismatch, StoreUnavailable, BadSealingKey,
                BadCatalog: why it cannot; the message says how to mend it.
        """
        setup.require_deployment(settings, store)
        sealing_keys = sealing.load(settings.keys_dir)
        self._store = store
        self._clock = clock
        self._catalog = catalog_file.of(settings)
        self._publication = settings.publication
        self._rotate_every_s = settings.rotate_every
        load_again = partial(sealing.load, settings.keys_dir)
        self._ring = RingKeeper(store, sealing_keys, self._publication, load_again)
        self._ring.at(store.head()).require_open()
        catalog_start.note(store, self._catalog, now=int(clock()))
        self._usage = Usage(store)
        self._alarms = Alarms(store)
        self._metrics = Metrics(board)
        self.in_flight = InFlight(settings.max_in_flight)
        issuer = Issuer(settings.issuer, self._catalog, self._ring, settings.token_lifetime_s)
        bridge = Bridge(issuer, [Introspection(None), Revocation(store)])
        throttle = Throttle(settings.guesses_per_minute)
        desk = Desk(
            bridge=bridge,
            store=store,
            throttle=throttle,
            usage=self._usage,
            alarms=self._alarms,
            clock=clock,
            trusted_proxies=settings.trusted_proxies,
            metrics=self._metrics,
            in_flight=self.in_flight,
        )
        own_tokens = OwnTokens(settings.issuer, tuple(self._catalog.audiences), self._ring)
        self._feed = Feed(settings.issuer, store, self._ring, clock)
        self._metrics_page = MetricsPage(
            self._metrics,
            self.in_flight,
            self._feed,
            self._ring,
            store,
            clock=clock,
            rotate_every_s=settings.rotate_every,
            told_to=settings.metrics_from,
        )
        self._look_at_schema: asyncio.Task[dict[str, str]] | None = None
        base = urlsplit(settings.issuer).path
        self.token = TokenEndpoint(desk)
        self.token_path = f"{base}/oauth/token"
        self.forms: Mapping[str, FormEndpoint | RevocationsEndpoint] = {
            self.token_path: self.token,
            f"{base}/oauth/introspect": IntrospectionEndpoint(desk, own_tokens),
            f"{base}/oauth/revoke": RevocationEndpoint(desk, own_tokens),
            f"{base}/oauth/revocations": RevocationsEndpoint(self._feed),
        }
        office = Office(
            settings.issuer,
            self._catalog,
            sealing_keys=load_again,
            seal_with=lambda tx: signing.sealing_key_for_copies(tx, load_again()),
            ensure_signing_keys=self._ensure_signing_keys,
        )
        verifier = partial(
            OwnVerifier,
            store=store,
            issuer=issuer,
            own_tokens=own_tokens,
            throttle=throttle,
            usage=self._usage,
            alarms=self._alarms,
        )
        self._management_root = f"{base}/v1"
        self._management = ManagementApi(
            self._management_root,
            office,
            store,
            verifier(self._catalog.management_audience),
            clock=clock,
            trusted_proxies=settings.trusted_proxies,
        )
        self.authz = VerifyEndpoint(
            f"{base}/authz/verify",
            self._catalog,
            store,
            Gateways(
                issuer,
                throttle=throttle,
                alarms=self._alarms,
                trusted_proxies=settings.trusted_proxies,
            ),
            # Like any resource server's: its caller's token may come from another node.
            lambda audience, environment: verifier(
                audience, environment=environment, leeway_s=LEEWAY
            ),
            clock=clock,
            counted=self._metrics,
            in_flight=self.in_flight,
        )
        self.pages = self._starlette(settings, base, bridge)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.pages(scope, receive, send)
            return
        form = self.forms.get(scope["path"])
        request_id = scope.get(logs.SCOPE_KEY) or logs.new_request_id()
        logs.begin_request(request_id)
        send = _named(send, request_id)
        try:
            if form is not None:
                reply = await form.reply(scope, receive)
                await reply.send(send)
            elif self.authz.is_at(scope):
                reply = await self.authz.reply(scope)
                await reply.send(send)
            elif self._is_management(scope["path"]):
                # Not by the router: it knows a few methods, and no line break in a path.
                answer = await self._management(Request(scope, receive))
                await answer(scope, receive, send)
            else:
                await self.pages(scope, receive, send)
        except Exception as error:
            # If the answer has begun, the connection breaks off here, as it should.
            with suppress(RuntimeError):
                await self._server_error(error, form).send(send)

    def _is_management(self, path: str) -> bool:
        root = self._management_root
        return path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/")

    def reply_now(self, scope: Scope, body: bytes) -> Reply | None:
        """The answer to a request that has arrived as a whole, without ASGI's ceremony.

        The listener asks here first: tasks, events and messages between it and the endpoint
        would cost as much as the signature.

        Returns:
            None if ASGI is needed: for another page, or because something has to be waited for.
        """
        is_token = scope["path"] == self.token_path
        if not is_token and not self.authz.is_at(scope):
            return None
        logs.begin_request(scope.get(logs.SCOPE_KEY))
        try:
            if is_token:
                return self.token.reply_now(scope, body)
            return self.authz.reply_now(scope)
        except Exception as error:
            return self._server_error(error, self.token if is_token else None)

    def shed_now(self, scope: Scope) -> Reply | None:
        """The answer to a request that arrived while `in_flight` is full.

        Returns:
            None if it is answered all the same: a key set, a feed, a revocation.
        """
        form = self.forms.get(scope["path"])
        if form is None and self.authz.is_at(scope):
            return self.authz.shed(scope)
        if not isinstance(form, FormEndpoint) or not form.may_be_shed:
            return None
        return form.shed()

    def _server_error(self, error: Exception, form: object) -> Reply:
        if form is self.token:
            self._metrics.token("other", "server_error", 0, failed=True)
        # The message of an exception may hold what somebody sent: kind and place alone are logged.
        _log.error("500: %s", type(error).__name__, exc_info=error)
        return json_reply(500, _SERVER_ERROR)

    def _starlette(self, settings: Settings, base: str, bridge: Bridge) -> Starlette:
        algorithms = sorted({one.algorithm for one in self._catalog.audiences.values()})
        document = metadata.metadata(settings.issuer, bridge.grant_types, algorithms)
        openapi = pages.openapi_text()
        refusal = pages.authorize_page(settings.issuer)

        async def authorize(request: Request) -> Response:
            return HTMLResponse(refusal, 400, _PAGE_HEADERS | {"Cache-Control": "no-store"})

        async def show_docs(request: Request) -> Response:
            # Rendered when first asked for: nobody waits for it at the start.
            page = await asyncio.to_thread(pages.render_docs, openapi, settings.issuer)
            return HTMLResponse(page, headers=_PAGE_HEADERS)

        async def show_openapi(request: Request) -> Response:
            return Response(openapi, media_type="application/yaml")

        async def home(request: Request) -> Response:
            return RedirectResponse(f"{base}/docs")

        async def healthz(request: Request) -> Response:
            return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})

        routes = [
            Route(f"{base}/oauth/authorize", authorize),
            Route(f"{base}/healthz", healthz),
            Route(f"{base}/readyz", self._readyz),
            Route(f"{base}/metrics", self._metrics_page.__call__),
            Route(f"{base}/openapi.yaml", show_openapi),
            Route(f"{base}/docs", show_docs),
            Route(f"{base}/", home),
        ]
        well_known: dict[str, Callable[[Request], object]] = dict.fromkeys(
            metadata.DOCUMENTS, metadata.MetadataEndpoint(document).__call__
        )
        well_known[metadata.COATCHECK] = metadata.CoatcheckEndpoint(
            settings.issuer,
            self._catalog,
            self._feed.url,
            self._ring,
            self._store,
            self._clock,
        ).__call__
        key_set = metadata.KeySetEndpoint(
            self._ring, self._store, self._clock, self._publication.max_age
        )

        async def show_key_set(request: Request) -> Response:
            self._metrics.count(metrics.JWKS_REQUESTS)
            return await key_set(request)

        well_known[metadata.KEY_SET] = show_key_set
        for name, endpoint in well_known.items():
            paths = metadata.paths_of(settings.issuer, name)
            routes.extend(Route(path, endpoint) for path in paths)
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _http_error},
            lifespan=self._lifespan,
        )
        # The redirect would make a client send its secret a second time.
        app.router.redirect_slashes = False
        return app

    def _ensure_signing_keys(self) -> None:
        """Make a signing key for each audience that has none.  Raises as `signing.begin_lines`."""
        lines = signing.first_lines({one.algorithm for one in self._catalog.audiences.values()})
        signing.begin_lines(self._ring, self._store, lines, _ROTATION, now=int(self._clock()))

    async def _readyz(self, request: Request) -> Response:
        checks = await self._checks()
        ready = all(answer == "ok" for answer in checks.values())
        return JSONResponse(
            {"status": "ready" if ready else "unavailable", "checks": checks},
            200 if ready else 503,
            {"Cache-Control": "no-store"} | ({} if ready else {"Retry-After": "1"}),
        )

    async def _checks(self) -> dict[str, str]:
        """What `readiness` says, within a time that whoever asks has.

        However many ask, one look is under way: a database that does not answer must not fill
        the threads that others need.
        """
        if self._look_at_schema is None or self._look_at_schema.done():
            look = asyncio.to_thread(_schema_checks, self._store)
            self._look_at_schema = asyncio.create_task(look)
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                checks = await asyncio.shield(self._look_at_schema)
        except TimeoutError:
            checks = _NO_DATABASE
        if checks is _NO_DATABASE:
            return checks
        return checks | _signing_checks(self._store, self._ring, self._catalog, int(self._clock()))

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        _on_signals(self._feed.stop)
        tasks = [
            asyncio.create_task(self._flush_usage()),
            asyncio.create_task(self._flush_metrics()),
            asyncio.create_task(self._feed.follow()),
            asyncio.create_task(self._rotate()),
        ]
        try:
            yield
        finally:
            self._feed.stop()
            for task in tasks:
                task.cancel()
            self._metrics_page.flush()
            await asyncio.to_thread(self._flush_counts)
            self._store.close()

    async def _flush_usage(self) -> None:
        while True:
            await asyncio.sleep(USAGE_FLUSH)
            await asyncio.to_thread(self._flush_counts)

    def _flush_counts(self) -> None:
        """Write what was counted and noticed in memory."""
        self._usage.flush()
        self._alarms.flush(int(self._clock()))

    async def _rotate(self) -> None:
        """Look now and then whether a signing key is due for a successor."""
        while True:
            # Nodes that were started together need not look together.
            await asyncio.sleep(self._publication.look * random.uniform(0.5, 1))  # noqa: S311
            await self.rotate_due()

    async def rotate_due(self) -> None:
        """Make a successor for each signing key that is due for one, if nobody else does.

        Whatever is in the way now is tried again at the next look: there is a day for it.
        """
        lines = signing.first_lines({one.algorithm for one in self._catalog.audiences.values()})
        try:
            self._ring.try_again()
            # Raises as well while this node's clock is wrong: it decides nothing then.
            self._ring.at(self._store.head())
            await asyncio.to_thread(self._ensure_signing_keys)
            await asyncio.to_thread(
                signing.rotate_due,
                self._ring,
                self._store,
                lines,
                _ROTATION,
                every_s=self._rotate_every_s,
                publication=self._publication,
                now=int(self._clock()),
            )
        except (StoreUnavailable, BadSealingKey) as error:
            _log.warning("signing keys are not rotated until this is mended: %s", error)
        except Exception as error:
            # Its text may hold anything; the task lives on.
            _log.error("signing keys are not rotated: %s", type(error).__name__)

    async def _flush_metrics(self) -> None:
        while True:
            self._metrics_page.flush()
            await asyncio.sleep(metrics.FLUSH)


def _on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` when the process is told to end, before the server's own handler.

    The server waits for its answers, and a long poll's may be half a minute away.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            signal.signal(number, _both(partial(loop.call_soon_threadsafe, stop), handler))


def _both(
    stop: Callable[[], object], handler: Callable[[int, FrameType | None], object]
) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        handler(number, frame)

    return handle


def readiness(store: Store, ring: RingKeeper, catalog: Catalog, now: int) -> dict[str, str]:
    """What the service needs to issue tokens, each `ok` or what is wrong with it."""
    checks = _schema_checks(store)
    if checks is _NO_DATABASE:
        return checks
    return checks | _signing_checks(store, ring, catalog, now)


#: The text of the error names the file; that is for the log and for doctor.
_NO_DATABASE = dict.fromkeys(("database", "schema", "signing_key"), "unavailable")


def _schema_checks(store: Store) -> dict[str, str]:
    """What asks the database, and may have to wait for it."""
    try:
        store.check_schema()
    except SchemaMismatch as error:
        return {"database": "ok", "schema": str(error)}
    except StoreUnavailable:
        return _NO_DATABASE
    return {"database": "ok", "schema": "ok"}


def _signing_checks(store: Store, ring: RingKeeper, catalog: Catalog, now: int) -> dict[str, str]:
    """What is known from memory, as on the token path, and in its thread."""
    checks = {"signing_key": "ok"}
    try:
        current = ring.at(store.head())
        for audience in catalog.audiences.values():
            current.signer(audience.algorithm, now)
        current.signer(FEED_ALGORITHM, now, "feed")
    except (NoSigner, StoreUnavailable) as error:
        checks["signing_key"] = str(error)
    return checks


def clock_of(settings: Settings) -> Callable[[], float]:
    """The clock of a deployment: the machine's, moved only by a setting for tests."""
    offset = settings.unsafe_clock_offset
    return time.time if offset == 0 else lambda: time.time() + offset


def create() -> Service:
    """The service that the environment describes: what each worker process runs.

    Raises:
        As `Service`; also BadSettings.
    """
    _end_with_supervisor()
    settings = Settings.load(os.environ)
    clock = clock_of(settings)
    store = open_store(settings.database_url, clock)
    service = Service(settings, store, clock, metrics.shared())
    # Whoever restored a backup sees here where it ends.
    ended_at = forms.rfc3339(restore.last_change_at(store))
    _log.info("the change log %s ends at %d, %s", store.log(), store.head(), ended_at)
    # What was made until now stays for good: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    return service


def _end_with_supervisor() -> None:
    """End when the process that started this worker is gone, however it ended.

    A worker that stayed behind would hold the port, and the service could not come back.
    """
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return

    def wait() -> None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="coatcheck-supervisor", daemon=True).start()


def _named(send: Send, request_id: bytes) -> Send:
    """A way to send that names the request in its answer."""

    async def named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (logs.HEADER, request_id)]
        await send(message)

    return named


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {}) | {"Cache-Control": "no-store"}
    code, text = {
        404: ("not_found", "There is nothing here. The paths of this service are in /docs."),
        405: ("method_not_allowed", f"Use {headers.get('Allow', 'another method')}."),
    }.get(status, ("invalid_request", "The request cannot be answered."))
    body = {"error": "invalid_request", "error_description": text, "code": code}
    return JSONResponse(body, status, headers)
