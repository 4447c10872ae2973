"""ANY /authz/verify: may this request pass, and what shall the upstream know of its caller.

Raw ASGI, dispatched before Starlette's router: every request of an API comes by here.

1. Who asks is a gateway (`gateways`).
2. Its parameters and its caller's request are read (`asked`).
3. The caller's credential is verified as at any resource server (`own_verifier`).
4. The project that the request names and the scopes that it needs fit.
5. 204 (to Envoy 200) with what the upstream has to know, or the refusal that a resource server
   would give.

Every header of a yes is always there, empty when there is nothing to say: a gateway that copies
them replaces whatever its caller had sent under these names.

Source: RFC 6750 §3 (challenge, status), RFC 9728 §5.1, RFC 9457 §3 (problems), RFC 9110 §15.3.5
(204), §9.3.2 (HEAD), RFC 9112 §9.3 (bodies that are not read).
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

from coatcheck.restrictions import Situation
from coatcheck.scope import Scopes
from coatcheck.server import metrics
from coatcheck.server.authz import asked as asking
from coatcheck.server.authz.asked import Dialect, Misconfigured, Original, Parameters
from coatcheck.server.authz.gateways import Gateway, Gateways, NotAGateway
from coatcheck.server.catalog import Catalog
from coatcheck.server.inflight import InFlight
from coatcheck.server.metrics import Metrics
from coatcheck.server.oauth.wire import Reply, Scope
from coatcheck.server.own_verifier import OwnVerifier, Verified, product_of
from coatcheck.server.signing import NoSigner
from coatcheck.server.store import Found, Store, StoreUnavailable
from coatcheck.verifier import errors
from coatcheck.verifier.errors import Protection, VerifierError, resource_metadata_url
from coatcheck.verifier.presented import Presented, presented

_log = logging.getLogger(__name__)

_NOBODY: Final = Found(0, {})
_EXPECTED: Final = (VerifierError, Misconfigured, NotAGateway, StoreUnavailable, NoSigner)
_CLOSE: Final = (b"connection", b"close")
_BODIES: Final = frozenset((b"content-length", b"transfer-encoding"))
#: Configurations of gateways that are kept read.
_MOST_CONFIGURATIONS: Final = 256
_ALL_MODELS: Final = "*"


class Question(NamedTuple):
    """A gateway's question, read as a whole."""

    parameters: Parameters
    original: Original
    sent: Presented
    situation: Situation
    verifier: OwnVerifier


class _Read(NamedTuple):
    """What of a request is read before anybody is believed."""

    peer: str | None
    lines: asking.Lines
    parameters: Parameters | Misconfigured
    #: Path and query of the caller, if they were in the URL.
    inside: tuple[bytes, bytes] | None

    @property
    def dialect(self) -> Dialect | None:
        return self.parameters.dialect


class VerifyEndpoint:
    """Answers gateways.

    Args:
        root: the path, behind the issuer's own.
        verifier: makes the verifier of an audience and an environment.
        clock: seconds since the epoch.
    """

    name = "authz"

    def __init__(
        self,
        root: str,
        catalog: Catalog,
        store: Store,
        gateways: Gateways,
        verifier: Callable[[str, str | None], OwnVerifier],
        *,
        clock: Callable[[], float],
        counted: Metrics,
        in_flight: InFlight,
    ) -> None:
        self._root = root.encode("ascii")
        self._catalog = catalog
        self._store = store
        self._gateways = gateways
        self._product = product_of(catalog)
        self._clock = clock
        self._metrics = counted
        self._in_flight = in_flight
        # Few: an audience, an environment, and what operators wrote into their gateways.
        self._verifier = lru_cache(maxsize=None)(verifier)
        self._parameters = lru_cache(maxsize=_MOST_CONFIGURATIONS)(self._read_parameters)

    def is_at(self, scope: Scope) -> bool:
        """Whether a request comes here, by the bytes of its path."""
        path, root = _path(scope), self._root
        return path.startswith(root) and path[len(root) : len(root) + 1] in (b"", b"/")

    def reply_now(self, scope: Scope) -> Reply | None:
        """As `reply`.

        Returns:
            None if something has to be waited for; nothing has happened then.
        """
        read = self._read(scope)
        now = int(self._clock())
        try:
            # 1
            digest = self._gateways.digest(read.peer, read.lines)
            found = _NOBODY if digest is None else self._store.find_now((digest,))
            if found is None:
                return None
            gateway = self._gateways.recognized(read.peer, read.lines, digest, found, now)
            # 2
            question = self._question(scope, read, gateway)
            # 3
            caller = question.verifier.verified_now(question.sent, question.situation, now)
            if caller is None:
                return None
            reply = self._allowed(question, caller)
        except _EXPECTED as error:
            reply = self._refused(error, read)
        return self._sent(reply, scope)

    async def reply(self, scope: Scope) -> Reply:
        """The answer to one request, whatever happens.  What body it has is not read."""
        if self._in_flight.is_full:
            return self.shed(scope)
        read = self._read(scope)
        now = int(self._clock())
        with self._in_flight:
            try:
                # 1
                digest = self._gateways.digest(read.peer, read.lines)
                found = _NOBODY if digest is None else await self._store.find((digest,))
                gateway = self._gateways.recognized(read.peer, read.lines, digest, found, now)
                # 2
                question = self._question(scope, read, gateway)
                # 3
                caller = await question.verifier.verified(question.sent, question.situation, now)
                reply = self._allowed(question, caller)
            except _EXPECTED as error:
                reply = self._refused(error, read)
        return self._sent(reply, scope)

    def shed(self, scope: Scope) -> Reply:
        """The answer to a request for which there is no room."""
        self._metrics.count(metrics.REQUESTS_SHED, self.name)
        return self._closing(self._failed(_overloaded(), self._read(scope)), scope)

    # --- what is asked

    def _read(self, scope: Scope) -> _Read:
        lines = asking.lines_of(scope["headers"])
        peer = scope["client"][0] if scope.get("client") else None
        rest = _path(scope)[len(self._root) :]
        try:
            text, inside = asking.where_parameters_are(rest, scope["query_string"], lines)
            return _Read(peer, lines, self._parameters(text), inside)
        except Misconfigured as error:
            return _Read(peer, lines, error, None)

    def _read_parameters(self, text: bytes) -> Parameters:
        return asking.parameters(text, self._catalog)

    def _question(self, scope: Scope, read: _Read, gateway: Gateway) -> Question:
        """Step 2.  Raises Misconfigured, NotAGateway, and VerifierError for the credential."""
        parameters = read.parameters
        if isinstance(parameters, Misconfigured):
            raise parameters
        environment, record = parameters.environment, gateway.record
        if record is not None:
            # As in a token exchange: its own audiences, its own environment.
            if parameters.audience not in record.audiences or environment not in (
                None,
                record.environment,
            ):
                _log.info("refused %s as a gateway's: not of that audience", record.id)
                raise NotAGateway
            environment = record.environment
        original = asking.original(scope["method"], parameters.dialect, read.inside, read.lines)
        sent = presented(scope["headers"], original.query, self._product)
        situation = Situation(
            environment=environment,
            client_address=None if gateway.caller is None else str(gateway.caller),
            method=original.method,
            project_id=sent.project_id,
            roles=self._product.roles,
        )
        verifier = self._verifier(parameters.audience, environment)
        return Question(parameters, original, sent, situation, verifier)

    # --- what is answered

    def _allowed(self, question: Question, caller: Verified) -> Reply:
        """Steps 4 and 5.  Raises VerifierError."""
        parameters, original, claims = question.parameters, question.original, caller.own.claims
        # 4
        project_id = claims.get("project_id") or ""
        named = question.sent.project_id
        if named is not None:
            if project_id not in ("", named):
                raise errors.WrongProject
            project_id = named
        scopes = str(claims["scope"])
        if parameters.needed and Scopes.parse(scopes).missing(parameters.needed):
            raise errors.InsufficientScope(str(parameters.needed))
        # 5
        models = claims.get("models")
        headers = [
            (b"cache-control", b"no-store"),
            (b"x-coatcheck-key", header_value(claims["sub"])),
            (b"x-coatcheck-org", header_value(claims["org_id"])),
            (b"x-coatcheck-project", header_value(project_id)),
            (b"x-coatcheck-environment", header_value(claims["env"])),
            (b"x-coatcheck-scopes", header_value(scopes)),
            (b"x-coatcheck-method", caller.method.encode("ascii")),
            (b"x-coatcheck-roles", header_value(_words(claims.get("roles", ())))),
            (b"x-coatcheck-group", header_value(claims.get("group", ""))),
            (
                b"x-coatcheck-models",
                header_value(_ALL_MODELS if models is None else _models(models)),
            ),
            (b"x-coatcheck-uri", header_value(original.clean_uri)),
            (b"x-coatcheck-private", b"true" if original.has_credential else b""),
        ]
        if parameters.wants_token:
            headers.append((b"authorization", b"Bearer " + header_value(caller.token)))
        return Reply(parameters.dialect.allowed, b"", headers)

    def _refused(self, error: Exception, read: _Read) -> Reply:
        """The answer that is no 204; `error` is one of the expected ones."""
        if isinstance(error, NotAGateway):
            _log.info("refused at %s: %s is no gateway", self.name, read.peer)
            return _problem(HTTPStatus.FORBIDDEN, "not_a_gateway", _NOT_A_GATEWAY, read.dialect)
        if isinstance(error, Misconfigured):
            # The sentence is fixed text: nothing that was sent is in it.
            _log.warning("a gateway is misconfigured: %s", error.sentence)
            status = HTTPStatus(error.status)
            return _problem(status, "gateway_misconfigured", error.sentence, read.dialect)
        if not isinstance(error, VerifierError):
            _log.error("503 at %s: %s", self.name, error)
            return self._failed(_unavailable(), read)
        _log.info("refused at %s: %s", self.name, error.code)
        return self._failed(error, read)

    def _failed(self, error: VerifierError, read: _Read) -> Reply:
        """A refusal as a resource server gives it."""
        if isinstance(read.parameters, Parameters):
            error.protection = _protection(read.parameters.audience)
        return refusal(error.status, error.headers, error.body, error.code, read.dialect)

    def _sent(self, reply: Reply, scope: Scope) -> Reply:
        """Count it, and see to the body that may come with the request."""
        result = "failed" if reply.code in _OURS else "refused" if reply.code else "allowed"
        self._metrics.count(metrics.AUTHZ_REQUESTS, result, reply.code)
        return self._closing(reply, scope)

    def _closing(self, reply: Reply, scope: Scope) -> Reply:
        """RFC 9112 §9.3: what is not read must not be taken for the next request.

        Some gateways announce their caller's body and send none.
        """
        if any(name in _BODIES and value != b"0" for name, value in scope["headers"]):
            return reply._replace(headers=[*reply.headers, _CLOSE])
        return reply


#: Codes that the operator has to do something about.
_OURS: Final = frozenset(("gateway_misconfigured", "issuer_unavailable"))
_NOT_A_GATEWAY: Final = (
    "This is for gateways: send the API key of a resource server of that audience in"
    " X-Coatcheck-Service-Key, or put the address of the gateway into COATCHECK_TRUSTED_PROXIES."
)


def _path(scope: Scope) -> bytes:
    """The path as it was sent, where the server tells it."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, code: str, dialect: Dialect | None
) -> Reply:
    """A refusal, told in what this kind of gateway can handle.

    Args:
        dialect: None: the gateway does not say what it is, and may be of any kind.
    """
    told = [
        *((name.lower().encode(), value.encode()) for name, value in headers.items()),
        (b"x-coatcheck-status", b"%d" % status),
    ]
    if dialect is None or dialect.statuses:
        # JSON as we write it is one line of ASCII.
        told.append((b"x-coatcheck-problem", header_value(body.decode())))
    answered = int(status) if dialect is None else dialect.statuses.get(status, int(status))
    return Reply(answered, body, told, code, code)


def _problem(status: HTTPStatus, code: str, detail: str, dialect: Dialect | None) -> Reply:
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
    }
    headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}
    return refusal(status, headers, json.dumps(body).encode(), code, dialect)


def _unavailable(detail: str = "The service cannot answer right now. Try again.") -> VerifierError:
    error = errors.IssuerUnavailable(1)
    error.detail = detail
    return error


def _overloaded() -> VerifierError:
    return _unavailable("Too many requests at once; this says nothing about the credential.")


@lru_cache(maxsize=_MOST_CONFIGURATIONS)
def _protection(audience: str) -> Protection:
    """What challenges say, as those of our verifier at that audience do."""
    return Protection(audience, resource_metadata_url(audience))


def _words(texts: object) -> str:
    assert isinstance(texts, tuple)  # noqa: S101 - the check made sure: it is in `must`
    return " ".join(texts)


def _models(names: object) -> str:
    """The models that may be used.  One whose name means all of them is written otherwise."""
    return " ".join("%2A" if name == _ALL_MODELS else name for name in _words(names).split())


def header_value(text: object) -> bytes:
    """A header value.  All that is told is printable ASCII, by the grammar of each of it.

    Raises:
        ValueError: this is not.  A fault of ours: nothing is answered then.
    """
    if not isinstance(text, str) or not (text.isascii() and text.isprintable()):
        raise ValueError("a header value is printable ASCII")
    return text.encode("ascii")
