"""`coatcheck.server.authz.asked`: what of a question is the gateway's, and what its caller's."""

import json
import re
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.server import catalog as catalogs
from coatcheck.server.authz import asked
from coatcheck.server.authz.asked import DIALECTS, Misconfigured, Original
from coatcheck.server.authz.endpoint import header_value, refusal
from coatcheck.server.settings import Settings
from coatcheck.verifier.errors import MissingCredentials, VerifierError
from support.gateways import MAX_PROBLEM_LENGTH, REFUSALS

AUDIENCE = "https://api.example.com"
CATALOG = catalogs.without_file(Settings(issuer="http://127.0.0.1:8000", audience=AUDIENCE))
OURS = b"audience=https%3A%2F%2Fapi.example.com&for=envoy&scope=read+write"
#: What a caller can write into a request line that a gateway passes on.
CALLERS = st.lists(
    st.sampled_from(
        [
            *(b"/", b"?", b"&", b"=", b"path", b"&path=", b"?path=", b"%26path%3D", b"a", b"%"),
            *(b"audience=https://other.example", b"scope=", b"for=nginx", b"token=true", b";"),
            *(b"environment=test", b"\xc3\xa9", b"api_key=x", b"api%5fkey=x", b"%61pi_key=x"),
        ]
    ),
    max_size=12,
).map(lambda parts: b"/" + b"".join(parts))


def envoy(callers: bytes) -> tuple[asked.Parameters, Original]:
    """As Envoy asks: a fixed text, and the caller's path and query behind it."""
    text, inside = asked.where_parameters_are(b"", OURS + b"&path=" + callers, {})
    parameters = asked.parameters(text, CATALOG)
    return parameters, asked.original("GET", parameters.dialect, inside, {})


def behind(callers: bytes) -> tuple[asked.Parameters, Original]:
    """As Envoy asks with the caller's path behind ours."""
    path, _, query = callers.partition(b"?")
    lines = {asked.PARAMETERS_HEADER: [OURS]}
    text, inside = asked.where_parameters_are(path, query, lines)
    parameters = asked.parameters(text, CATALOG)
    return parameters, asked.original("GET", parameters.dialect, inside, {})


@pytest.mark.parametrize("ask", [envoy, behind])
@given(callers=CALLERS)
def test_nothing_of_the_caller_becomes_a_parameter(ask: object, callers: bytes) -> None:
    """Whatever path and query a caller sends, the gateway's parameters are the gateway's."""
    parameters, original = ask(callers)  # type: ignore[operator]

    assert parameters == asked.parameters(OURS, CATALOG)
    path, _, query = callers.partition(b"?")
    assert (original.path, original.query) == (path, query)


@given(callers=CALLERS)
def test_without_parameters_in_front_the_callers_never_count(callers: bytes) -> None:
    """A gateway that puts its caller's query where ours stands configures nothing by it."""
    path, _, query = callers.partition(b"?")
    with pytest.raises(Misconfigured):
        asked.where_parameters_are(path, query, {})


@given(callers=CALLERS)
def test_a_forgotten_path_denies(callers: bytes) -> None:
    """An address that does not end in &path= has its caller's path in its last parameter."""
    text, _ = asked.where_parameters_are(b"", b"audience=x&for=envoy" + callers, {})
    with pytest.raises(Misconfigured):
        asked.parameters(text, CATALOG)


@given(callers=CALLERS)
def test_what_is_sent_upstream_is_printable_and_holds_no_api_key(callers: bytes) -> None:
    """It goes into a header: no line break, no blank, nothing but ASCII."""
    _, original = envoy(callers)
    uri = original.clean_uri

    assert re.fullmatch(r"[\x21-\x7e]+", uri)
    if callers.isascii() and original.query and not original.has_credential:
        assert uri.encode() == callers
    names = uri.partition("?")[2].split("&")
    assert not {name.partition("=")[0] for name in names} & {"api_key", "%61pi_key", "api%5fkey"}


GOOD = {"audience": AUDIENCE, "for": "nginx"}
UNFIT: dict[str, tuple[str, str]] = {
    "nothing": ("", "for"),
    "no kind": (urlencode({"audience": AUDIENCE}), "for"),
    "an unknown kind": (urlencode(GOOD | {"for": "squid"}), "for"),
    "a kind in capitals": (urlencode(GOOD | {"for": "NGINX"}), "for"),
    "no audience": ("for=nginx", "audience"),
    "an empty audience": ("for=nginx&audience=", "audience"),
    "an unknown audience": (urlencode(GOOD | {"audience": "https://other.example"}), "audience"),
    "the management API": (urlencode(GOOD | {"audience": "http://127.0.0.1:8000/v1"}), "audience"),
    "an unknown parameter": (urlencode(GOOD | {"audiences": "x"}), "unknown"),
    "path in front": (urlencode({"path": "/x"} | GOOD), "unknown"),
    "twice": (urlencode(GOOD) + "&audience=" + AUDIENCE, "twice"),
    "twice in two spellings": (urlencode(GOOD) + "&%61udience=" + AUDIENCE, "twice"),
    "an empty scope": (urlencode(GOOD | {"scope": ""}), "scope"),
    "a malformed scope": (urlencode(GOOD | {"scope": 'a"b'}), "scope"),
    "doubled blanks": (urlencode(GOOD | {"scope": "a  b"}), "scope"),
    "an unknown environment": (urlencode(GOOD | {"environment": "moon"}), "environment"),
    "a token perhaps": (urlencode(GOOD | {"token": "1"}), "token"),
    "no UTF-8": (urlencode(GOOD) + "&scope=%FF", "UTF-8"),
    "too long": (urlencode(GOOD | {"scope": "a" * 5000}), "longer"),
}


@pytest.mark.parametrize(("text", "named"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_configuration_says_what_to_change(text: str, named: str) -> None:
    """Whoever reads it is the operator, who has nothing else to go by."""
    with pytest.raises(Misconfigured) as raised:
        asked.parameters(text.encode(), CATALOG)

    assert named in raised.value.sentence
    assert "x" * 20 not in raised.value.sentence


def test_what_denies_depends_on_the_kind_of_gateway() -> None:
    """Envoy may let requests pass on 500, so that neither it nor a stranger gets one."""
    for dialect in DIALECTS.values():
        error = Misconfigured("", dialect)
        assert error.status == (403 if dialect.name == "envoy" else 500)
        assert set(dialect.statuses.values()) <= {401, 403, 500}
    assert Misconfigured("").status == 403


URIS: dict[str, tuple[bytes, bool]] = {
    "plain": (b"/", True),
    "with a query": (b"/a?b=c&d", True),
    "beyond ASCII": ("/é".encode(), True),
    "of OPTIONS": (b"*", True),
    "absolute": (b"http://api.example.com/a", False),
    "without its slash": (b"a", False),
    "empty": (b"", False),
    "two values that were joined": (b"/a, /b", False),
    "a tab": (b"/a\tb", False),
    "a line break": (b"/a\nb", False),
    "a line break in the query": (b"/a?b\r\nX: y", False),
    "a blank in the query": (b"/a?b c", False),
}


@pytest.mark.parametrize(("uri", "is_good"), URIS.values(), ids=URIS)
@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_a_uri_is_one(kind: str, uri: bytes, is_good: bool) -> None:
    dialect = DIALECTS[kind]
    assert dialect.method is not None
    assert dialect.uri is not None
    lines = {dialect.method: [b"GET"], dialect.uri: [uri] if uri else []}
    try:
        original = asked.original("GET", dialect, None, lines)
    except Misconfigured:
        assert not is_good
    else:
        assert is_good
        assert original.path + (b"?" + original.query if original.query else b"") == uri


@pytest.mark.parametrize("method", [b"GET", b"PURGE", b"__INIT__", b"M-SEARCH", b"get"])
def test_any_token_is_a_method(method: bytes) -> None:
    """RFC 9110 §9.1: methods are the upstream's affair, and their letters' case counts."""
    lines = {b"x-original-method": [method], b"x-original-uri": [b"/"]}
    original = asked.original("POST", DIALECTS["nginx"], None, lines)

    assert original.method.encode() == method


@pytest.mark.parametrize("method", [b"GET, POST", b"", b"G\xc3\x89T", b"A" * 41, b"GET /"])
def test_what_is_no_method_denies(method: bytes) -> None:
    lines = {b"x-original-method": [method] if method else [], b"x-original-uri": [b"/"]}
    with pytest.raises(Misconfigured):
        asked.original("POST", DIALECTS["nginx"], None, lines)


@given(st.text(max_size=20))
def test_what_is_told_of_a_caller_cannot_end_its_line(text: str) -> None:
    """Facts are printable ASCII by their grammars; if one were not, nothing would be told."""
    try:
        written = header_value(text)
    except ValueError:
        assert re.search(r"[^ -~]", text)
    else:
        assert re.fullmatch(rb"[ -~]*", written)


def problem_told(error: VerifierError, kind: str | None) -> str | None:
    """The header that has the body."""
    dialect = None if kind is None else DIALECTS[kind]
    told = dict(refusal(error.status, error.headers, error.body, error.code, dialect).headers)
    problem = told.get(b"x-coatcheck-problem")
    return None if problem is None else problem.decode("ascii")


@given(st.text())
def test_a_problem_cannot_end_its_line(detail: str) -> None:
    """Whatever a sentence says: a gateway answers its caller with it, to the last letter."""
    error = MissingCredentials(detail)
    told = problem_told(error, "nginx")

    assert told is not None
    assert re.fullmatch(r"\{[ -~]*\}", told)
    assert told.encode() == error.body
    assert json.loads(told)["detail"] == detail


def test_a_problem_has_room_in_a_header() -> None:
    """Gateways bound all headers of an answer together, some by 4 KiB; openapi.yaml says 1024."""
    told = [problem_told(error, "nginx") or "" for error in REFUSALS.values()]

    assert 100 < min(map(len, told)) <= max(map(len, told)) <= MAX_PROBLEM_LENGTH
    for text, _ in UNFIT.values():
        with pytest.raises(Misconfigured) as raised:
            asked.parameters(text.encode(), CATALOG)
        assert len(raised.value.sentence) < MAX_PROBLEM_LENGTH / 2


def test_a_problem_stands_in_a_header_for_those_that_drop_bodies() -> None:
    """And for whoever does not say what it is, because that may be one of them."""
    error = MissingCredentials()
    told = {kind: problem_told(error, kind) is not None for kind in DIALECTS}

    assert told == {kind: kind == "nginx" for kind in DIALECTS}
    assert problem_told(error, None) == error.body.decode()
