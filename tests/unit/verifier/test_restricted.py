"""Restrictions at a resource server: who is refused where, and what it has to know for that.

The restrictions themselves are in `tests/contract/test_restrictions.py`; here is what a request
brings along (address, method, project, model) and what the issuer's document tells.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from coatcheck import apikey
from coatcheck.durations import FEED_STALE
from coatcheck.feed_profile import TYPE
from coatcheck.scope import Scopes
from coatcheck.verifier import Principal, Verifier, VerifierError, product
from coatcheck.verifier.changes import Changes, UnfitFeed, read_source
from coatcheck.verifier.presented import presented, without_api_key
from coatcheck.verifier.product import UNTOLD
from support.tokens import (
    AUDIENCE,
    ISSUER,
    NOW,
    SetClock,
    as_json,
    changed,
    claims,
    key_set,
    signer,
)

API_KEY = apikey.make("ck_live")
FOREIGN = "sk-old-5f3a9c"
ROLES = {"viewer": ["GET"], "member": ["GET", "POST"]}
HERE, ELSEWHERE = "10.1.2.3", "192.0.2.7"
FOREVER_S = 10  # Longer than any test takes: what waits for it has failed.

#: The claims of a token that is narrowed on every axis.
NARROW: dict[str, object] = {
    "must": ["network", "project", "role", "models", "group"],
    "cidrs": ["10.0.0.0/8"],
    "project_id": "prj_1",
    "roles": ["viewer"],
    "models": ["small"],
    "group": "grp_1",
}


def token(**changes: object) -> str:
    return signer().token(claims(**changes))


def bearer(text: str, **more: str) -> list[tuple[str, str]]:
    named = [(name.replace("_", "-"), value) for name, value in more.items()]
    return [("Authorization", f"Bearer {text}"), *named]


def a_verifier(**changes: Any) -> Verifier:
    """One that follows no feed, and is told itself what the issuer's document would tell."""
    clock = SetClock()
    ordinary = {"feed": None, "roles": ROLES, "fetch": lambda _: key_set()}
    given = {**ordinary, "clock": clock, "monotonic": clock, **changes}
    return Verifier(ISSUER, AUDIENCE, **given)


@pytest.fixture
def verifier() -> Iterator[Verifier]:
    with a_verifier() as verifier:
        yield verifier


def refusal(verifier: Verifier, headers: Any, **more: Any) -> VerifierError:
    """The error, which both faces have to agree about."""
    with pytest.raises(VerifierError) as of_threads:
        verifier.authenticate(headers, **more)
    with pytest.raises(VerifierError) as of_loop:
        asyncio.run(verifier.authenticate_async(headers, **more))
    assert of_threads.value.headers == of_loop.value.headers
    assert of_threads.value.body == of_loop.value.body
    assert of_threads.value.protection == verifier.protection
    return of_threads.value


# --- each restriction, as a caller meets it

REFUSED: dict[str, tuple[dict[str, str], dict[str, object], int, str, str]] = {
    "another address": ({}, {"client_address": ELSEWHERE}, 403, "ip_not_allowed", "scope"),
    "unknown address": ({}, {"client_address": None}, 403, "ip_not_allowed", "scope"),
    "another method": ({}, {"method": "POST"}, 403, "role_not_allowed", "scope"),
    "unknown method": ({}, {"method": None}, 403, "role_not_allowed", "scope"),
    "another model": ({}, {"model": "huge"}, 403, "model_not_allowed", "scope"),
    "another project": ({"X_Project_Id": "prj_2"}, {}, 403, "wrong_project", "scope"),
    "no project": ({"X_Project_Id": "a b"}, {}, 400, "project_required", "request"),
}


@pytest.mark.parametrize(
    ("headers", "request_", "status", "code", "error"), REFUSED.values(), ids=REFUSED
)
def test_what_is_restricted_is_refused_with_its_own_code(
    verifier: Verifier,
    headers: dict[str, str],
    request_: dict[str, object],
    status: int,
    code: str,
    error: str,
) -> None:
    """RFC 6750 §3.1: no other token of the same API key would help, so the text says what does."""
    fitting = {"client_address": HERE, "method": "GET", "model": "small"}
    refused = refusal(verifier, bearer(token(**NARROW), **headers), **{**fitting, **request_})

    assert (refused.status, refused.code) == (status, code)
    assert refused.error == {"scope": "insufficient_scope", "request": "invalid_request"}[error]
    assert refused.challenge is not None
    assert f'error="{refused.error}", error_description="{refused.detail}"' in refused.challenge
    assert "scope=" not in refused.challenge
    assert refused.problem()["code"] == code


def test_a_request_as_it_was_meant_passes_and_tells_what_binds_it(verifier: Verifier) -> None:
    """The application decides further by project, model and group."""
    who = verifier.authenticate(
        bearer(token(**NARROW), X_Project_Id="prj_1"),
        client_address=HERE,
        method="HEAD",
        model="small",
    )

    assert (who.project_id, who.require_project()) == ("prj_1", "prj_1")
    assert (who.roles, who.models, who.group) == (("viewer",), ("small",), "grp_1")
    assert who.allows_model("small") is True
    assert who.allows_model("huge") is False
    who.require_model("small")
    with pytest.raises(VerifierError) as refused:
        who.require_model("huge")
    assert (refused.value.code, refused.value.status) == ("model_not_allowed", 403)
    assert refused.value.protection == verifier.protection


def test_a_caller_that_nothing_binds_is_told_so(verifier: Verifier) -> None:
    """None means all of them; an empty list would mean none."""
    who = verifier.authenticate(bearer(token()))

    assert (who.roles, who.models, who.group, who.project_id) == ((), None, None, None)
    assert who.allows_model("any")
    who.require_model("any")


ODD: dict[str, object] = {"text": "small", "number": 7, "object": {}, "mixed": ["small", 7]}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_list_that_is_none_allows_nothing(verifier: Verifier, odd: object) -> None:
    """A token of another issuer may have claims of these names; none of them lets anybody in."""
    who = verifier.authenticate(bearer(token(models=odd, roles=odd, group=["grp_1"])))

    assert (who.roles, who.models, who.group) == ((), (), None)
    assert not who.allows_model("small")
    assert refusal(verifier, bearer(token(models=odd)), model="small").code == "model_not_allowed"


def test_one_token_is_looked_at_anew_for_each_request(verifier: Verifier) -> None:
    """Its signature is remembered; where it is used and for what, is not."""
    text = token(**NARROW)
    bound = bearer(text)
    for _ in range(2):
        assert verifier.authenticate(bound, client_address=HERE, method="GET")
        assert refusal(verifier, bound, client_address=ELSEWHERE, method="GET").status == 403
        assert refusal(verifier, bound, client_address=HERE, method="POST").status == 403
        other = bearer(text, X_Project_Id="prj_2")
        assert refusal(verifier, other, client_address=HERE, method="GET").status == 403

    assert verifier.status()["remembered_tokens"] == 1


def test_the_faces_for_bare_tokens_ask_the_same(verifier: Verifier) -> None:
    """Whoever carries tokens in a protocol of its own says what its requests are."""
    text = token(**NARROW)
    fitting: dict[str, Any] = {"client_address": HERE, "method": "GET", "project_id": "prj_1"}
    unfit: dict[str, dict[str, Any]] = {
        "ip_not_allowed": {"client_address": ELSEWHERE},
        "role_not_allowed": {"method": "DELETE"},
        "wrong_project": {"project_id": "prj_2"},
        "project_required": {"project_id": "a b"},
        "model_not_allowed": {"model": "huge"},
    }

    assert verifier.verify_jwt(text, **fitting, model="small").project_id == "prj_1"
    for code, other in unfit.items():
        with pytest.raises(VerifierError) as of_threads:
            verifier.verify_jwt(text, **{**fitting, **other})
        with pytest.raises(VerifierError) as of_loop:
            asyncio.run(verifier.verify_jwt_async(text, **{**fitting, **other}))
        assert of_threads.value.code == of_loop.value.code == code
        assert of_threads.value.protection == verifier.protection
    assert verifier.verify_jwt(token(), project_id="prj_2").project_id == "prj_2"
    assert asyncio.run(verifier.verify_jwt_async(token(), **fitting)).project_id == "prj_1"


# --- projects


@pytest.mark.parametrize("name", ["X-Project-Id", "x-project-id", "X-PROJECT-ID"])
def test_a_caller_that_is_not_bound_names_its_project(verifier: Verifier, name: str) -> None:
    """It is this request's choice: the remembered caller stays as it is."""
    text = token()
    before = verifier.authenticate(bearer(text))
    first = verifier.authenticate([*bearer(text), (name, "prj_1")])
    second = asyncio.run(verifier.authenticate_async([*bearer(text), (name, "prj_2")]))

    assert (first.require_project(), second.require_project()) == ("prj_1", "prj_2")
    assert replace(first, project_id=None) == before
    assert verifier.authenticate(bearer(text)) is before
    with pytest.raises(VerifierError) as refused:
        before.require_project()
    assert (refused.value.status, refused.value.code) == (400, "project_required")
    assert refused.value.protection == verifier.protection


def test_a_caller_that_is_bound_needs_not_name_its_project(verifier: Verifier) -> None:
    """Old callers go on as they are."""
    bound = token(must=["project"], project_id="prj_1")

    assert verifier.authenticate(bearer(bound)).require_project() == "prj_1"
    assert verifier.authenticate(bearer(bound, X_Project_Id="prj_1")).project_id == "prj_1"
    assert verifier.authenticate(bearer(bound, X_Project_Id="")).project_id == "prj_1"


def test_a_bound_project_counts_also_where_no_must_names_it(verifier: Verifier) -> None:
    """Another issuer's tokens; a principal is of one project."""
    headers = bearer(token(project_id="prj_1"), X_Project_Id="prj_2")

    assert refusal(verifier, headers).code == "wrong_project"


NO_PROJECTS: dict[str, list[str]] = {
    "two": ["prj_1", "prj_2"],
    "two in one": ["prj_1,prj_2"],
    "blank": ["prj 1"],
    "65 characters": ["p" * 65],
    "a path": ["../prj_1"],
    "a line break": ["prj_1\n"],
    "no ASCII": ["prj_ä"],
    "an API key and a dot": [f"{API_KEY}."],
}


@pytest.mark.parametrize("named", NO_PROJECTS.values(), ids=NO_PROJECTS)
def test_what_names_no_one_project_is_a_bad_request(verifier: Verifier, named: list[str]) -> None:
    """Ids end up in logs and queries; and the text repeats nothing, it may be a secret."""
    headers = [*bearer(token()), *(("X-Project-Id", text) for text in named)]
    refused = refusal(verifier, headers)

    assert (refused.status, refused.code) == (400, "project_required")
    assert named[0] not in refused.detail


def test_a_project_may_be_named_twice_and_be_64_characters_long(verifier: Verifier) -> None:
    """One and the same."""
    longest = "azAZ09_-" * 8
    headers = [
        (b"", b"x"),
        (b"x-project-id", longest.encode()),
        (b"X-Project-Id", longest.encode()),
    ]
    sent = [(b"authorization", b"Bearer " + token().encode()), *headers]

    assert verifier.authenticate(sent).project_id == longest


# --- proxies

PROXIES = ("10.0.0.0/8", "2001:db8::/32")
FORWARDED: dict[str, tuple[str | None, list[str], str | None]] = {
    "no proxy, nothing said": (ELSEWHERE, [], ELSEWHERE),
    "no proxy, something said": (ELSEWHERE, ["10.9.9.9"], ELSEWHERE),
    "a proxy": ("10.0.0.1", ["198.51.100.4"], "198.51.100.4"),
    "a proxy, with a port": ("10.0.0.1", ["198.51.100.4:4711"], "198.51.100.4"),
    "a proxy that says nothing": ("10.0.0.1", [], None),
    "a proxy that says nonsense": ("10.0.0.1", ["unknown"], None),
    "a lie before it": ("10.0.0.1", ["203.0.113.1, 198.51.100.4"], "198.51.100.4"),
    "several lines": ("2001:db8::9", ["203.0.113.1", "198.51.100.4, 10.0.0.2"], "198.51.100.4"),
    "nobody": (None, ["198.51.100.4"], None),
}


@pytest.mark.parametrize(("peer", "lines", "address"), FORWARDED.values(), ids=FORWARDED)
def test_the_caller_is_looked_for_behind_trusted_proxies(
    peer: str | None, lines: list[str], address: str | None
) -> None:
    """RFC 7239 §8.1: what a stranger writes into the header decides nothing."""
    text = token(must=["network"], cidrs=[address or "198.51.100.4"])
    headers = [*bearer(text), *(("X-Forwarded-For", line) for line in lines)]
    with a_verifier(trusted_proxies=PROXIES) as verifier:
        if address is None:
            assert refusal(verifier, headers, client_address=peer).code == "ip_not_allowed"
        else:
            assert verifier.authenticate(headers, client_address=peer)
            assert verifier.authenticate(iter(headers), client_address=peer)
            assert asyncio.run(verifier.authenticate_async(headers, client_address=peer))


def test_no_other_header_is_taken_for_what_proxies_say() -> None:
    """`Accept-Encoding` is as long; and a mapping holds the header as well."""
    text = token(must=["network"], cidrs=["198.51.100.4"])
    headers = [*bearer(text, X_Forwarded_For="198.51.100.4"), ("Accept-Encoding", "gzip")]
    with a_verifier(trusted_proxies="10.0.0.0/8") as verifier:
        assert verifier.authenticate(headers, client_address="10.0.0.1")
        assert verifier.authenticate(dict(headers), client_address="10.0.0.1")


def test_without_trusted_proxies_the_peer_counts(verifier: Verifier) -> None:
    """The header is anybody's."""
    text = token(must=["network"], cidrs=[HERE])
    headers = bearer(text, X_Forwarded_For=HERE)

    assert refusal(verifier, headers, client_address=ELSEWHERE).code == "ip_not_allowed"
    assert verifier.authenticate(headers, client_address=HERE)


def test_proxies_are_also_said_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """COATCHECK_TRUSTED_PROXIES, as for the server; an argument wins."""
    monkeypatch.setenv("COATCHECK_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,")
    headers = bearer(token(must=["network"], cidrs=[HERE]), X_Forwarded_For="10.1.2.3")
    named = bearer(token(must=["network"], cidrs=["198.51.100.4"]), X_Forwarded_For="198.51.100.4")

    with a_verifier() as verifier:
        assert verifier.authenticate(named, client_address="192.0.2.1")
    with a_verifier(trusted_proxies=()) as verifier:
        assert verifier.authenticate(headers, client_address=HERE)
        assert refusal(verifier, named, client_address="192.0.2.1").status == 403


@pytest.mark.parametrize(
    "networks", ["x", "10.0.0.1/8", ("10.0.0.0/8", ""), ("fe80::1%1",), ("a b",)]
)
def test_proxies_that_are_no_networks_are_told_at_once(networks: Any) -> None:
    """A typing error would otherwise let anybody, or nobody, say who is calling."""
    with pytest.raises(ValueError, match=r"trusted_proxies: networks such as 10\.0\.0\.0/8"):
        a_verifier(trusted_proxies=networks)


# --- the product's own header, and API keys of an older system


def a_principal(key: str) -> Principal:
    """What a host's own look-up may say of any key."""
    return Principal(
        key_id="key_1",
        org_id="org_1",
        project_id=None,
        environment="live",
        scopes=Scopes.parse("widgets:read"),
        method="api_key",
        expires_at=NOW + 600,
        token_id="",
        client_id=key,
        audience=AUDIENCE,
        claims={},
    )


def keeps_keys(**changes: Any) -> Verifier:
    """One that shows in `client_id` which API key it found."""
    return a_verifier(check_api_key=a_principal, **changes)


def test_a_credential_may_stand_in_the_products_own_header() -> None:
    """Nobody has to change a header; two different credentials stay two."""
    with keeps_keys(api_key_header="X-Acme-Key") as verifier:
        for name in ("X-Acme-Key", "x-acme-key", "X-ACME-KEY"):
            assert verifier.authenticate({name: API_KEY}).client_id == API_KEY
            assert verifier.authenticate([(name.encode(), token().encode())]).method == "jwt"
        both = {"X-Acme-Key": API_KEY, "X-API-Key": apikey.make("ck_live")}
        assert refusal(verifier, both).code == "multiple_credentials"
    with keeps_keys() as verifier:
        assert refusal(verifier, {"X-Acme-Key": API_KEY}).code == "missing_credentials"


FOREIGN_KEYS: dict[str, tuple[str, str | None]] = {
    "as it is": (FOREIGN, None),
    "nothing but the prefix": ("sk-old-", None),
    "one dot": ("sk-old-a.b", None),
    "any printable character": ("sk-old-!~", None),
    "a control character": ("sk-old-\x7f", "token_malformed"),
    "512 characters": ("sk-old-" + "x" * 505, None),
    "513 characters": ("sk-old-" + "x" * 506, "token_malformed"),
    "a blank": ("sk-old-a b", "token_malformed"),
    "no ASCII": ("sk-old-ä", "token_malformed"),
    "two dots": ("sk-old-a.b.c", "token_malformed"),
    "another case": ("SK-old-a", "token_malformed"),
    "without a checksum": ("old_" + "x" * 38, None),
    "none of ours either": ("new_" + "x" * 38, "api_key_malformed"),
}


@pytest.mark.parametrize(("key", "code"), FOREIGN_KEYS.values(), ids=FOREIGN_KEYS)
def test_a_foreign_prefix_makes_an_api_key_by_form_alone(key: str, code: str | None) -> None:
    """What an older system made has no checksum of ours; two dots are a JWT's all the same."""
    with keeps_keys(foreign_prefixes=("sk-old-", "old_")) as verifier:
        if code is not None:
            assert refusal(verifier, {"X-API-Key": key}).code == code
        else:
            assert verifier.authenticate({"X-API-Key": key}).client_id == key
            assert presented({"Authorization": f"Bearer {key}"}, "", verifier._told.product)
    with keeps_keys() as verifier:
        assert refusal(verifier, {"X-API-Key": key}).status == 401


def test_what_the_hosts_own_look_up_says_holds_for_project_and_model() -> None:
    """One meaning, whoever vouches."""

    def narrow(key: str) -> Principal:
        return replace(a_principal(key), project_id="prj_1", models=("small",))

    headers = {"X-API-Key": API_KEY, "X-Project-Id": "prj_2"}
    with a_verifier(check_api_key=narrow) as verifier:
        assert refusal(verifier, headers).code == "wrong_project"
        assert refusal(verifier, {"X-API-Key": API_KEY}, model="huge").code == "model_not_allowed"
    with keeps_keys() as verifier:
        assert verifier.authenticate(headers).project_id == "prj_2"


UNFIT: dict[str, dict[str, object]] = {
    "roles in a list": {"roles": ["viewer"]},
    "methods in a text": {"roles": {"viewer": "GET"}},
    "a method that is none": {"roles": {"viewer": ["GET POST"]}},
    "a method that is no text": {"roles": {"viewer": [1]}},
    "a role without a name": {"roles": {"": ["GET"]}},
    "too many roles": {"roles": {str(number): ["GET"] for number in range(1001)}},
    "too many methods": {"roles": {"viewer": ["GET"] * 1001}},
    "a name that is too long": {"roles": {"v" * 257: ["GET"]}},
    "header of another type": {"api_key_header": ["X-Acme-Key"]},
    "header with a blank": {"api_key_header": "X Acme"},
    "empty header": {"api_key_header": ""},
    "header that is taken": {"api_key_header": "Authorization"},
    "header of projects": {"api_key_header": "X-Project-Id"},
    "cookies": {"api_key_header": "cookie"},
    "prefixes in a text": {"foreign_prefixes": "sk-old-"},
    "an empty prefix": {"foreign_prefixes": ["sk-old-", ""]},
    "a prefix with a blank": {"foreign_prefixes": ["sk old"]},
    "a prefix that is no text": {"foreign_prefixes": [7]},
    "a control character": {"foreign_prefixes": ["\x7f"]},
    "header of a proxy": {"api_key_header": "Proxy-Authorization"},
    "prefixes in an object": {"foreign_prefixes": {"sk-old-": 1}},
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_a_product_that_makes_no_sense_is_refused_from_anybody(unfit: dict[str, Any]) -> None:
    """As an argument when the verifier is made, in the issuer's document when it is read."""
    (name,) = unfit
    with pytest.raises(ValueError, match=f"^{name}: "):
        a_verifier(**unfit)
    with pytest.raises(UnfitFeed) as refused:
        read_source(document(**unfit), ISSUER)
    assert refused.value.kind == "unfit_product"


def test_a_product_may_be_large_and_use_every_character_of_a_name() -> None:
    """An issuer that allows more one day must not stop the verifiers of today."""
    roles = {f"{number}~!".rjust(256, "r"): ["AZ-az"] for number in range(1000)}
    told = {"roles": roles, "api_key_header": "x-AZaz09", "foreign_prefixes": ["!~"] * 1000}

    parts = product.read(told)
    assert len(parts["roles"]) == len(parts["foreign_prefixes"]) == 1000
    assert parts["api_key_header"] == "x-azaz09"


def test_a_product_that_was_read_cannot_be_changed() -> None:
    """All requests share it."""
    parts = product.read({"roles": {"viewer": ["GET", "GET"]}, "api_key_header": None})

    assert parts == {"roles": {"viewer": frozenset(("GET",))}, "api_key_header": None}
    with pytest.raises(TypeError):
        parts["roles"]["viewer"] = frozenset(("POST",))


# --- what the issuer's document tells

FEED_URL = f"{ISSUER}/oauth/revocations"
TOLD: dict[str, object] = {
    "roles": ROLES,
    "api_key_header": "X-Acme-Key",
    "foreign_prefixes": ["sk-old-"],
    "resource_types": [{"type": "THING", "segments": [], "within": []}] * 500,
}


def document(**changes: object) -> bytes:
    ordinary = {
        "issuer": ISSUER,
        "revocations_endpoint": FEED_URL,
        "revocation_keys": {"keys": [signer(kid="feed").jwk()]},
    }
    return as_json(changed(ordinary, changes))


def test_an_issuer_of_an_older_release_tells_nothing_of_its_product() -> None:
    """Which is fine: it has none of it."""
    assert read_source(document(), ISSUER).product == {}
    assert read_source(document(**TOLD), ISSUER).product == {
        "roles": {"viewer": frozenset(("GET",)), "member": frozenset(("GET", "POST"))},
        "api_key_header": "x-acme-key",
        "foreign_prefixes": ("sk-old-",),
    }


class Issuer:
    """Answers at once with what it is told to; a poll for news waits until the end.

    Attributes:
        may_answer: nothing is answered before it is set.
        documents: how often its document was read.
    """

    def __init__(self, clock: SetClock) -> None:
        self._clock = clock
        self.document: bytes | Exception = document(**TOLD)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.is_over = threading.Event()
        self.is_wanted = threading.Event()
        self.documents = 0

    def __call__(self, url: str) -> bytes:
        self.is_wanted.set()
        assert self.may_answer.wait(FOREVER_S)
        if url.endswith("jwks.json"):
            return key_set()
        if urlsplit(url).path.endswith("revocations"):
            if not url.endswith("wait=0"):
                self.is_over.wait(FOREVER_S)
            return self.feed()
        self.documents += 1
        if isinstance(self.document, Exception):
            raise self.document
        return self.document

    def feed(self) -> bytes:
        now = int(self._clock.now)
        said = {"iss": ISSUER, "aud": FEED_URL, "iat": now, "exp": now + FEED_STALE}
        said |= {"log": "log_1", "seq": 20, "entries": {}, "kids": ["first", "feed"]}
        return signer(kid="feed").token(said, typ=TYPE).encode()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def issuer(clock: SetClock) -> Iterator[Issuer]:
    issuer = Issuer(clock)
    yield issuer
    issuer.may_answer.set()
    issuer.is_over.set()


@contextmanager
def following(issuer: Issuer, clock: SetClock, **changes: Any) -> Iterator[Verifier]:
    given = {"feed": "auto", "roles": None, "fetch": issuer, "clock": clock, "monotonic": clock}
    with keeps_keys(**{**given, **changes}) as verifier:
        yield verifier


FIRST: dict[str, tuple[list[tuple[str, str]], str]] = {
    "the product's own header": ([("X-Acme-Key", API_KEY)], API_KEY),
    "a foreign prefix": ([("X-API-Key", FOREIGN)], FOREIGN),
    "both": ([("X-Acme-Key", FOREIGN)], FOREIGN),
}


@pytest.mark.parametrize("face", ["threads", "loop"])
@pytest.mark.parametrize(("headers", "key"), FIRST.values(), ids=FIRST)
def test_the_first_request_waits_for_what_it_may_look_like(
    issuer: Issuer, clock: SetClock, headers: list[tuple[str, str]], key: str, face: str
) -> None:
    """Nobody gets 401 because we have just started; the headers may be read only once."""
    issuer.may_answer.clear()
    with following(issuer, clock) as verifier:

        def call() -> Principal:
            if face == "threads":
                return verifier.authenticate(pair for pair in headers)
            return asyncio.run(verifier.authenticate_async(pair for pair in headers))

        found: list[Principal] = []
        caller = threading.Thread(target=lambda: found.append(call()))
        caller.start()
        assert issuer.is_wanted.wait(FOREVER_S)
        issuer.may_answer.set()
        caller.join(FOREVER_S)

        assert [who.client_id for who in found] == [key]
        assert refusal(verifier, {"X-Other": API_KEY}).code == "missing_credentials"


def test_a_credential_that_is_recognized_waits_for_nothing(issuer: Issuer, clock: SetClock) -> None:
    """A host that looks up keys itself needs no issuer for them."""
    issuer.may_answer.clear()
    with following(issuer, clock) as verifier:
        assert verifier.authenticate({"X-API-Key": API_KEY}).client_id == API_KEY
        assert not issuer.is_wanted.is_set()
        issuer.may_answer.set()


def test_what_the_arguments_say_need_not_be_waited_for(issuer: Issuer, clock: SetClock) -> None:
    """They win over the document, before it is read and after."""
    own: dict[str, Any] = {"api_key_header": "X-Own", "foreign_prefixes": ("own-",)}
    issuer.may_answer.clear()
    with following(issuer, clock, **own, roles={"viewer": ("POST",)}) as verifier:
        assert verifier.authenticate({"X-Own": "own-1"}).client_id == "own-1"
        assert refusal(verifier, {"X-Acme-Key": FOREIGN}).code == "missing_credentials"
        assert not issuer.is_wanted.is_set()
        issuer.may_answer.set()
        viewer = bearer(token(must=["role"], roles=["viewer"]))
        assert verifier.authenticate(viewer, method="POST")
        assert refusal(verifier, viewer, method="GET").code == "role_not_allowed"
        assert verifier.authenticate({"X-Own": "own-1"}).client_id == "own-1"
        assert refusal(verifier, {"X-Acme-Key": FOREIGN}).code == "missing_credentials"


@pytest.mark.parametrize("headers", [{}, {"X-Acme-Key": API_KEY}, {"X-API-Key": FOREIGN}])
def test_while_the_issuer_is_away_nobody_is_told_that_a_credential_is_missing(
    issuer: Issuer, clock: SetClock, headers: dict[str, str]
) -> None:
    """It may be where only the issuer could tell; 503 says to come back."""
    issuer.document = OSError()
    with following(issuer, clock) as verifier:
        assert verifier._changes is not None
        verifier._changes._first_load_timeout_s = 0.05
        refused = refusal(verifier, headers)

    assert (refused.status, refused.code) == (503, "issuer_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("face", ["threads", "loop"])
def test_the_first_token_is_held_against_roles_that_came_with_the_feed(
    issuer: Issuer, clock: SetClock, face: str
) -> None:
    """Before the document is read no role allows anything; that must be no one's answer."""
    headers = bearer(token(must=["role"], roles=["member"]))
    with following(issuer, clock) as verifier:
        if face == "threads":
            assert verifier.authenticate(headers, method="POST")
        else:
            assert asyncio.run(verifier.authenticate_async(headers, method="POST"))
        assert refusal(verifier, headers, method="DELETE").code == "role_not_allowed"
        assert verifier.status()["roles"] == ["member", "viewer"]


def test_a_first_token_without_a_request_of_its_own_waits_for_the_roles_as_well(
    issuer: Issuer, clock: SetClock
) -> None:
    """`verify_jwt` is the same check."""
    with following(issuer, clock) as verifier:
        assert verifier.verify_jwt(token(must=["role"], roles=["viewer"]), method="GET")


@pytest.fixture
def changes(issuer: Issuer, clock: SetClock) -> Iterator[Changes]:
    """A follower whose thread has not begun; `step` is what it would do."""
    issuer.is_over.set()
    changes = Changes(
        ISSUER, f"{ISSUER}/.well-known/coatcheck", issuer, clock=clock, monotonic=clock
    )
    yield changes
    changes.close()


def test_the_document_is_read_again_every_five_minutes(
    changes: Changes, issuer: Issuer, clock: SetClock
) -> None:
    """A catalog that was mended reaches resource servers that never restart."""
    assert not changes.is_told
    changes.step()
    assert changes.is_told
    issuer.document = document(roles={"viewer": ["GET", "POST"]})
    clock.now += 299
    changes.step()
    assert (issuer.documents, changes.product.api_key_header) == (1, "x-acme-key")
    clock.now += 1
    assert changes.step() == 0

    assert issuer.documents == 2
    assert changes.product == product.of({"viewer": frozenset(("GET", "POST"))})
    changes.step()
    assert issuer.documents == 2


LOST: dict[str, bytes | Exception] = {
    "away": OSError(),
    "a page": b"<html>",
    "another issuer's": document(issuer="https://other.example"),
    "half of it": document(roles=[]),
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_a_document_that_cannot_be_read_again_takes_nothing_away(
    changes: Changes, issuer: Issuer, clock: SetClock, lost: bytes | Exception
) -> None:
    """The feed goes on by what it said before, and it is not asked for at each poll."""
    changes.step()
    before = changes.product
    issuer.document = lost
    clock.now += 300

    assert changes.step() == changes.step() == 0
    assert changes.product is before
    assert changes.status().last_error is None
    assert issuer.documents == 2
    issuer.document = document()
    clock.now += 300
    changes.step()
    assert changes.product == UNTOLD


def test_a_first_document_that_makes_no_sense_is_no_start(changes: Changes, issuer: Issuer) -> None:
    """Half a catalog would let a role do what nobody meant."""
    issuer.document = document(roles=[])

    assert changes.step() > 0
    assert (changes.status().state, changes.status().last_error) == ("none", "unfit_product")
    assert not changes.is_told


def test_without_a_feed_nothing_is_fetched_but_the_key_set() -> None:
    """contract.md: what a resource server is not told then, it says itself."""
    urls: list[str] = []

    def fetch(url: str) -> bytes:
        urls.append(url)
        return key_set()

    with a_verifier(fetch=fetch, api_key_header="X-Acme-Key") as verifier:
        assert verifier.authenticate({"X-Acme-Key": token()})
        assert refusal(verifier, {}).code == "missing_credentials"
        viewer = bearer(token(must=["role"], roles=["viewer"]))
        assert verifier.authenticate(viewer, method="GET")
        assert verifier.status()["roles"] == ["member", "viewer"]
    assert urls == [f"{ISSUER}/.well-known/jwks.json"]


# --- an API key in a URL

QUERIES = {
    b"": b"",
    b"a=1&b=2": b"a=1&b=2",
    b"api_key=x": b"",
    b"a=%20+&api_key=x&b=&&c": b"a=%20+&b=&&c",
    b"api_key=x&api_key=y&a=1": b"a=1",
    b"%61pi%5Fkey=x&a": b"a",
    b"api_key": b"",
    b"API_KEY=x&api_keys=y&x=api_key": b"API_KEY=x&api_keys=y&x=api_key",
    b"a=1;api_key=x": b"a=1;api_key=x",
}


@pytest.mark.parametrize(("query", "left"), QUERIES.items())
def test_an_api_key_is_taken_out_of_a_query_and_nothing_else_is(query: bytes, left: bytes) -> None:
    """However it is spelled; every other byte stays for the application to read."""
    assert without_api_key(query) == left
