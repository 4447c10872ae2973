"""Every way in which a verifier refuses, and how a test makes it happen.

    refused = issuer.credential_for("token_expired", scopes=["widgets:read"])
    answer = client.get("/widgets", headers=refused.headers)

Each credential is wrong in this one respect and good in all others, so that nothing else can be
what refuses it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from coatcheck import apikey, base62
from coatcheck.durations import LEEWAY_MAX

if TYPE_CHECKING:
    from coatcheck.testing.issuer import FakeIssuer

#: A name that nobody uses.
_ANOTHER: Final = "another"
#: Of networks that are for documentation (RFC 5737 §3).
_NETWORK, _ADDRESS_ELSEWHERE = "192.0.2.0/24", "203.0.113.7"


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that a verifier refuses.

    Attributes:
        headers: to send.
        query: the query string to send; empty: it does not matter.
        method: the HTTP method to use; None: any.
        client_address: where the request has to come from; None: from anywhere.
        model: the model that the request has to name; None: any.
        settings: what the verifier of your API needs for it, as its arguments; none: nothing.
    """

    headers: Mapping[str, str] = field(repr=False)
    query: str = field(default="", repr=False)
    method: str | None = None
    client_address: str | None = None
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)


Make = Callable[["FakeIssuer", tuple[str, ...]], Refused]


def _sent(credential: str, **further: Any) -> Refused:
    headers = {"Authorization": f"Bearer {credential}", **further.pop("headers", {})}
    return Refused(headers, **further)


def _token(**terms: Any) -> Make:
    """A token with these arguments of `FakeIssuer.token`."""
    return lambda issuer, scopes: _sent(issuer.token(scopes, **terms))


def _api_key(do: Callable[["FakeIssuer", str], object]) -> Make:
    """An API key to which this has happened."""

    def make(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
        api_key = issuer.api_key(scopes)
        do(issuer, api_key)
        return _sent(api_key, settings={"service_key": issuer.service_key})

    return make


def _refused_as(code: str) -> Make:
    return _api_key(lambda issuer, api_key: issuer.refuse(api_key, code))


def _missing(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return Refused({})


def _multiple(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return _sent(issuer.token(scopes), headers={"X-API-Key": issuer.token(scopes)})


def _from_future(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    # Beyond any leeway, and long enough that the test is over before it becomes good.
    ahead = issuer.now() + LEEWAY_MAX + 3600
    return _sent(issuer.token(scopes, iat=ahead, exp=ahead + 600))


def _wrong_environment(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    token = issuer.token(scopes, environment=_ANOTHER)
    return _sent(token, settings={"environment": issuer.environment})


def _bad_signature(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    signed, _, _ = issuer.token(scopes).rpartition(".")
    _, _, of_another = issuer.token(scopes).rpartition(".")
    return _sent(f"{signed}.{of_another}")


def _revoked(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    token = issuer.token(scopes)
    issuer.revoke(token)
    return _sent(token)


def _mistyped(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    api_key = issuer.api_key(scopes)
    last = base62.ALPHABET[(base62.ALPHABET.index(api_key[-1]) + 1) % len(base62.ALPHABET)]
    return _sent(api_key[:-1] + last)


def _unknown(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    api_key = apikey.make(apikey.prefix_for("ck", issuer.environment))
    return _sent(api_key, settings={"service_key": issuer.service_key})


def _in_query(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    query = urlencode({"api_key": issuer.api_key(scopes)})
    return Refused({}, query, settings={"service_key": issuer.service_key})


def _tokens_only(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return _sent(issuer.api_key(scopes), settings={"service_key": None})


def _address(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return _sent(issuer.token(scopes, cidrs=[_NETWORK]), client_address=_ADDRESS_ELSEWHERE)


def _role(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    # A role that the issuer does not name allows no method at all.
    return _sent(issuer.token(scopes, roles=[_ANOTHER]))


def _model(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return _sent(issuer.token(scopes, models=["this-one"]), model="another-one")


def _no_project(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    return _sent(issuer.token(scopes), headers={"X-Project-Id": "no id"})


def _wrong_project(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    token = issuer.token(scopes, project_id="prj_bound")
    return _sent(token, headers={"X-Project-Id": "prj_another"})


def _unavailable(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    token = issuer.token(scopes)
    issuer.down(for_long=True)
    return _sent(token)


def _stale(issuer: "FakeIssuer", scopes: tuple[str, ...]) -> Refused:
    issuer.stale_feed()
    return _sent(issuer.token(scopes), settings={"on_stale_feed": "refuse"})


#: For each code how it comes about.  What three of them do to the issuer, `up` undoes: with
#: `rate_limited`, `issuer_unavailable` and `stale_feed` the service itself is in trouble.
REFUSALS: Final[Mapping[str, Make]] = MappingProxyType(
    {
        "missing_credentials": _missing,
        "multiple_credentials": _multiple,
        "token_malformed": lambda issuer, scopes: _sent("neither-token-nor-key"),
        "token_expired": _token(expired=True),
        "token_from_future": _from_future,
        "wrong_audience": _token(audience="https://another.example.com"),
        "wrong_issuer": _token(iss="https://another.example.com"),
        "wrong_environment": _wrong_environment,
        "unknown_signing_key": _token(header={"kid": _ANOTHER}),
        "bad_signature": _bad_signature,
        "bad_algorithm": _token(header={"alg": "HS256"}),
        "wrong_type": _token(header={"typ": _ANOTHER}),
        "unknown_restriction": _token(must=[_ANOTHER]),
        "token_revoked": _revoked,
        "api_key_malformed": _mistyped,
        "api_key_unknown": _unknown,
        "api_key_revoked": _api_key(lambda issuer, api_key: issuer.revoke(api_key)),
        "api_key_expired": _api_key(lambda issuer, api_key: issuer.expire(api_key)),
        "api_key_disabled": _api_key(lambda issuer, api_key: issuer.disable(api_key)),
        "org_suspended": _refused_as("org_suspended"),
        "connector_only_in_query": _in_query,
        "tokens_only": _tokens_only,
        "insufficient_scope": lambda issuer, scopes: _sent(issuer.token()),
        "ip_not_allowed": _address,
        "role_not_allowed": _role,
        "model_not_allowed": _model,
        "project_required": _no_project,
        "wrong_project": _wrong_project,
        "quota_exceeded": _refused_as("quota_exceeded"),
        "rate_limited": _api_key(lambda issuer, api_key: issuer.throttle()),
        "issuer_unavailable": _unavailable,
        "stale_feed": _stale,
    }
)
