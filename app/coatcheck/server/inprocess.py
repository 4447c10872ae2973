"""The management API behind our own verifier, without HTTP between the two.

    headers → presented → verified (`own_verifier`)
    → the caller's row, in the transaction of what it does → handler → answer

Source: RFC 6750 §2 and §3 (bearer tokens), RFC 9728 §5.1.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from coatcheck import client_address
from coatcheck.client_address import Network
from coatcheck.restrictions import Situation
from coatcheck.scope import Scopes
from coatcheck.server import logs
from coatcheck.server.changes import Actor
from coatcheck.server.manage.api.call import Office
from coatcheck.server.manage.api.dispatch import answer, match
from coatcheck.server.manage.api.wire import MAX_BODY_BYTES, Answer, Problem, Request
from coatcheck.server.manage.authority import Caller, bounds_of
from coatcheck.server.own_verifier import OwnVerifier, product_of
from coatcheck.server.signing import NoSigner
from coatcheck.server.store import Store, StoreUnavailable, Transaction
from coatcheck.verifier import errors
from coatcheck.verifier.errors import Protection, VerifierError
from coatcheck.verifier.presented import presented

_log = logging.getLogger(__name__)
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class ManagementApi:
    """`/v1`, as Starlette calls it.

    Args:
        root: the path below which it is: `/v1`, behind the issuer's own path.
        verifier: for its own audience.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        root: str,
        office: Office,
        store: Store,
        verifier: OwnVerifier,
        *,
        clock: Callable[[], float],
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._root = root
        self._office = office
        self._store = store
        self._verifier = verifier
        self._clock = clock
        self._trusted_proxies = trusted_proxies
        self._audience = office.catalog.management_audience
        self._product = product_of(office.catalog)
        self._protection = Protection(self._audience)

    async def __call__(self, http: HttpRequest) -> Response:
        now = int(self._clock())
        try:
            request = await self._read(http)
            # First: what is not there needs no credential.
            match(request)
            load = await self._authenticate(http, request, now)
            told = await asyncio.to_thread(
                answer, self._store, self._office, request, load, now=now
            )
        except Problem as problem:
            told = problem.answer(logs.request_id())
        except VerifierError as error:
            error.protection = self._protection
            _log.info("refused at the management API: %s", error.code)
            body = json.dumps(error.problem() | {"requestId": logs.request_id()})
            return Response(body, error.status, dict(_HEADERS | error.headers))
        except (StoreUnavailable, NoSigner) as error:
            _log.error("503 at the management API: %s", error)
            told = Problem(
                503,
                "unavailable",
                "The service cannot answer right now. Try again.",
                headers={"Retry-After": "1"},
            ).answer(logs.request_id())
        return self._response(told)

    def _response(self, told: Answer) -> Response:
        headers = dict(_HEADERS | {"Content-Type": "application/json"} | dict(told.headers))
        if told.body is None:
            del headers["Content-Type"]
            return Response(status_code=told.status, headers=headers)
        if told.body.get("code") == "insufficient_scope":
            # RFC 6750 §3.1: what the request would have needed.
            headers["WWW-Authenticate"] = (
                f'Bearer realm="{self._audience}", error="insufficient_scope",'
                f' scope="{told.body["scope"]}"'
            )
        return Response(json.dumps(told.body).encode(), told.status, headers)

    async def _read(self, http: HttpRequest) -> Request:
        """The request, once it has arrived.  Raises Problem."""
        body = b""
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise Problem(
                    413,
                    "body_too_large",
                    f"A body has at most {MAX_BODY_BYTES} bytes.",
                    headers={"Connection": "close"},
                )
        pairs = parse_qsl(http.url.query, keep_blank_values=True)
        query = dict(pairs)
        if len(query) != len(pairs):
            raise Problem(400, "invalid_input", "A parameter stands twice in the query.")
        headers = {name.lower(): value for name, value in http.headers.items()}
        peer = http.client.host if http.client else None
        forwarded_for = ",".join(http.headers.getlist("x-forwarded-for"))
        address = client_address.client_address(peer, forwarded_for, self._trusted_proxies)
        return Request(
            method=http.method,
            path=http.scope["path"].removeprefix(self._root),
            query=query,
            headers=headers,
            body=body,
            address=None if address is None else str(address),
            request_id=logs.request_id(),
        )

    async def _authenticate(
        self, http: HttpRequest, request: Request, now: int
    ) -> Callable[[Transaction], Caller]:
        """Who calls, for the transaction of what they do.

        Raises:
            VerifierError: no, several or unfit credentials.
            StoreUnavailable, NoSigner: nothing can be vouched for now.
        """
        sent = presented(http.headers.items(), http.url.query, self._product)
        if sent.place == "query":
            raise errors.ConnectorOnlyInQuery
        situation = Situation(
            client_address=request.address,
            method=request.method,
            project_id=sent.project_id,
            roles=self._product.roles,
        )
        own = (await self._verifier.verified(sent, situation, now)).own
        scopes = Scopes.parse(str(own.claims["scope"]))
        actor = Actor(own.api_key_id, request.address, request.request_id)

        def load(tx: Transaction) -> Caller:
            return self._caller(tx, own.api_key_id, scopes, actor)

        return load

    def _caller(self, tx: Transaction, api_key_id: str, scopes: Scopes, actor: Actor) -> Caller:
        row = tx.api_key(api_key_id)
        organization = None if row is None else tx.organization(row.organization_id)
        if row is None or organization is None:
            raise errors.ApiKeyUnknown
        credit_left = None
        if row.credit_limit is not None:
            usage = tx.usage([row.id]).get(row.id)
            spent = usage.credits if usage else 0
            credit_left = max(0, row.credit_limit - spent - tx.credit_given_by(row.id))
        bounds = bounds_of(
            row,
            scopes,
            self._office.catalog,
            of_operator=organization.is_operator,
            credit_left=credit_left,
        )
        return Caller(
            actor=actor,
            organization_id=row.organization_id,
            permissions=scopes,
            bounds=bounds,
            api_key_id=row.id,
            member_id=row.member_id,
            project_id=row.project_id,
        )
