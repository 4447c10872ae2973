"""From a request to its answer: route, caller, permission, handler; all in one transaction.

1. The route is found by path, then by method.
2. The caller is loaded as it is now, and its permission is checked.
3. A request that was done before is answered as it was then (`Idempotency-Key`).
4. The handler does it.
5. Whatever is refused becomes a problem, and nothing is written.

Source: RFC 9110 §15.5.6 (405 and Allow), §9.3.2 (HEAD).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from coatcheck.server.manage.api.call import Call, Office, Route, forbidden
from coatcheck.server.manage.api.routes import ROUTES
from coatcheck.server.manage.api.wire import Answer, Body, Problem, Query, Request, invalid
from coatcheck.server.manage.authority import Caller
from coatcheck.server.manage.errors import Beyond, Conflict, Invalid, NotFound
from coatcheck.server.sealing import BadSealingKey
from coatcheck.server.store import Store, Taken, Transaction
from coatcheck.server.store.tables import IdempotentRequest

#: How long a request is known by its Idempotency-Key, in seconds.
IDEMPOTENT_FOR: Final = 24 * 3600
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_ID: Final = re.compile(r"[a-z]{3}_")
_PARAMETER: Final = re.compile(r"\{([a-z]+)\}")

#: How the caller of a request is loaded, within the request's transaction.
LoadCaller = Callable[[Transaction], Caller]


class Match(NamedTuple):
    route: Route
    parameters: Mapping[str, str]


def answer(store: Store, office: Office, request: Request, load: LoadCaller, *, now: int) -> Answer:
    """The answer to one request.

    Args:
        load: the caller, as it is when the transaction begins.
        now: seconds since the epoch.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    try:
        # 1
        found = match(request)
        if found.route.ensures_signing_keys:
            # Before the rest, in a transaction of its own, and for whoever may do the rest only.
            with store.transaction(read_only=True) as tx:
                _require_permission(found.route, load(tx))
            office.ensure_signing_keys()
        with store.transaction(read_only=not found.route.writes) as tx:
            return _in_transaction(tx, office, request, found, load(tx), now)
    except (Problem, Invalid, NotFound, Conflict, Beyond, BadSealingKey, Taken) as error:
        # 5
        return problem_of(error).answer(request.request_id)


def match(request: Request) -> Match:
    """The route of a request.  Raises Problem: there is none, or none with this method."""
    allowed = []
    method = "GET" if request.method == "HEAD" else request.method
    for route in ROUTES:
        found = _pattern(route.path).fullmatch(request.path)
        if found is None:
            continue
        if route.method == method:
            return Match(route, found.groupdict())
        allowed.append(route.method)
    if not allowed:
        raise Problem(404, "not_found", "There is nothing here: the paths are in /docs.")
    if "GET" in allowed:
        allowed.append("HEAD")
    methods = ", ".join(sorted(set(allowed)))
    raise Problem(405, "method_not_allowed", f"Use {methods}.", headers={"Allow": methods})


def problem_of(error: Exception) -> Problem:
    """What a refusal of a use case looks like outside."""
    match error:
        case Problem():
            return error
        case Invalid():
            return invalid(((f"/{error.field}", error.message),))
        case NotFound():
            return Problem(404, "not_found", _sentence(error))
        case Conflict():
            return Problem(409, error.code, _sentence(error), more=error.evidence)
        case Beyond():
            errors = tuple((f"/{name}", "goes beyond your own") for name in error.fields)
            return Problem(403, "beyond_your_rights", _sentence(error), errors)
        case BadSealingKey():
            return Problem(
                503, "sealing_key_missing", "The sealing key is not at hand: tell the operator."
            )
        case _:
            return Problem(409, "conflict", "Somebody else did the same at this moment: try again.")


def _sentence(error: Exception) -> str:
    text = str(error)
    # An id stays as it is.
    begin = text[:1] if _ID.match(text) else text[:1].upper()
    return begin + text[1:] + ("" if text.endswith(".") else ".")


def _in_transaction(
    tx: Transaction, office: Office, request: Request, found: Match, caller: Caller, now: int
) -> Answer:
    route = found.route
    # 2
    _require_permission(route, caller)
    call = Call(office, tx, caller, request, found.parameters, now)
    if route.needs_bootstrap and caller.organization_id is not None:
        call.require_bootstrapped(call.organization())
    # 3
    key = request.headers.get("idempotency-key")
    if key is None or request.method != "POST":
        return _done(call, route)
    return _once(call, route, key)


def _done(call: Call, route: Route) -> Answer:
    """Step 4, and that no input was passed over."""
    answered = route.handler(call)
    # What somebody sent was meant: a misspelled parameter must not be taken for none.
    if Query not in call.was_read:
        call.query(Query)
    if Body not in call.was_read and call.request.method not in ("GET", "HEAD", "DELETE"):
        call.body(Body)
    return answered


def _require_permission(route: Route, caller: Caller) -> None:
    if route.permission is not None and not caller.may(route.permission):
        raise forbidden(route.permission)


def _once(call: Call, route: Route, key: str) -> Answer:
    """Do what was not done before; else say what was answered then, but for a secret."""
    if _IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise Problem(
            400,
            "invalid_idempotency_key",
            "An Idempotency-Key is 1 to 255 visible ASCII characters, such as a UUID.",
        )
    request = call.request
    parts = (call.caller.actor.id, request.method, request.path, key)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    digest = hashlib.sha256(request.body + repr(sorted(request.query.items())).encode()).hexdigest()
    before = call.tx.idempotent_request(name)
    if before is not None and before.at > call.now - IDEMPOTENT_FOR:
        if before.body_digest != digest:
            raise Problem(
                422,
                "idempotency_key_reused",
                "This Idempotency-Key was sent with another request before: use a new one.",
            )
        told, headers = json.loads(before.answer)
        return Answer(before.status, told, headers | {"Idempotency-Replayed": "true"})
    done = _done(call, route)
    told = done.body if done.replayed is None else done.replayed
    call.tx.forget_idempotent_requests(before_at=call.now - IDEMPOTENT_FOR)
    call.tx.add_idempotent_request(
        IdempotentRequest(
            id=name,
            body_digest=digest,
            status=done.status,
            answer=json.dumps((told, dict(done.headers))),
            at=call.now,
        )
    )
    return done


@lru_cache(maxsize=256)
def _pattern(path: str) -> re.Pattern[str]:
    """A path with parameters as a pattern; a parameter is one segment."""
    return re.compile(_PARAMETER.sub(r"(?P<\1>[^/]+)", path))
