"""`coatcheck.scope`: grammar, one spelling, and what covers what.  RFC 6749 §3.3, RFC 3986 §2."""

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatcheck.scope import MAX_LENGTH, Grant, MalformedScope, Scopes, concrete, is_platform

ACTIONS = st.sampled_from(["*", "read", "write", "widgets:read", "coatcheck:operator"])
IDS = st.sampled_from(["42", "a", "PLACE", "x%20y", "%2A", "A.b_c~d-e"])
TYPES = st.sampled_from(["PLACE", "THING", "x%20y"])
SEGMENTS = IDS | st.sampled_from(["#", "*"])
FILTERS = st.none() | st.builds(
    lambda head, rest: (head, *rest), TYPES, st.lists(SEGMENTS, max_size=3)
)
GRANTS = st.builds(Grant, ACTIONS, FILTERS)
CONCRETE = st.builds(
    lambda action, head, rest: Grant(action, (head, *rest)),
    ACTIONS.filter(lambda action: action != "*"),
    TYPES,
    st.lists(IDS, max_size=3),
)
SCOPES = st.lists(GRANTS, max_size=4).map(lambda grants: Scopes(tuple(dict.fromkeys(grants))))

WELL_FORMED = {
    "a bare permission": ("widgets:read", Grant("widgets:read")),
    "every action": ("*", Grant("*")),
    "every action on one thing": ("*@PLACE/42", Grant("*", ("PLACE", "42"))),
    "a type alone": ("read@PLACE", Grant("read", ("PLACE",))),
    "nested": (
        "read@PLACE/Site/42/THING/Battery/#",
        Grant("read", ("PLACE", "Site", "42", "THING", "Battery", "#")),
    ),
    "both wildcards": ("read@PLACE/#/*", Grant("read", ("PLACE", "#", "*"))),
    "every unreserved character": ("read@a/A9._~-", Grant("read", ("a", "A9._~-"))),
    "percent-encoded": ("read@a/x%20y%2F%C3%A9", Grant("read", ("a", "x%20y%2F%C3%A9"))),
    "RFC 6749's first character": ("!", Grant("!")),
    "RFC 6749's last character": ("~", Grant("~")),
    "a URI": ("https://example.com/read", Grant("https://example.com/read")),
    "a platform permission": ("coatcheck:operator", Grant("coatcheck:operator")),
}


@pytest.mark.parametrize(("text", "grant"), WELL_FORMED.values(), ids=WELL_FORMED)
def test_a_well_formed_scope_is_read_and_written_back_alike(text: str, grant: Grant) -> None:
    """requests-oauthlib raises when the scope in the answer is spelled differently."""
    assert Grant.parse(text) == grant
    assert str(grant) == text


def test_a_lone_star_as_filter_says_the_same_as_no_filter() -> None:
    """There is one canonical form, so that two spellings cannot disagree."""
    assert Grant.parse("read@*") == Grant("read")
    assert str(Grant.parse("read@*")) == "read"


MALFORMED = {
    "nothing": "",
    "no action": "@PLACE/42",
    "an empty filter": "read@",
    "two at signs": "read@PLACE@42",
    "an empty segment": "read@PLACE//42",
    "a slash behind": "read@PLACE/",
    "a slash before": "read@/PLACE",
    "a wildcard as type": "read@#/42",
    "a star as type": "read@*/42",
    "a lone hash": "read@#",
    "a wildcard in a segment": "read@PLACE/4*",
    "a hash in a segment": "read@PLACE/4#",
    "a star in an action": "read*",
    "a hash in an action": "re#ad",
    "a quote": 'read"',
    "a backslash": "read\\",
    "a line feed": "read\n",
    "a tab": "read\t",
    "NUL": "read\0",
    "DEL": "read\x7f",
    "a letter beyond ASCII": "r\u00e9ad",
    "a letter beyond ASCII in an id": "read@PLACE/\u00e9",
    "a colon in an id": "read@PLACE/a:b",
    "a plus in an id": "read@PLACE/a+b",
    "small hexadecimal digits": "read@PLACE/%c3",
    "half an encoding": "read@PLACE/%2",
    "a bare percent": "read@PLACE/100%",
    "no hexadecimal digits": "read@PLACE/%GG",
    "an encoded letter": "read@PLACE/%41",
    "an encoded digit": "read@PLACE/%30",
    "an encoded dot": "read@PLACE/%2E",
    "an encoded hyphen": "read@PLACE/%2D",
    "an encoded underscore": "read@PLACE/%5F",
    "an encoded tilde": "read@PLACE/%7E",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_scope_is_refused(text: str) -> None:
    """RFC 6749 §3.3's grammar, and RFC 3986 §2.3: what is unreserved is never encoded."""
    with pytest.raises(MalformedScope) as refused:
        Grant.parse(text)

    assert len(text) < 4 or text not in str(refused.value)


@pytest.mark.parametrize("text", [" read", "read ", "read  write", "read\twrite", "read\u00a0b"])
def test_scopes_have_exactly_one_blank_between_them(text: str) -> None:
    """RFC 6749 §3.3: scope-token *( SP scope-token )."""
    with pytest.raises(MalformedScope):
        Scopes.parse(text)


def test_no_text_at_all_is_no_scope() -> None:
    """A token may have an empty scope claim; it covers nothing."""
    assert len(Scopes.parse("")) == 0
    assert not Scopes.parse("").covers(Grant("read"))


def test_a_scope_parameter_longer_than_a_token_is_refused() -> None:
    """The token has to fit into 4 KiB with it, and nobody should wait for the parsing."""
    Scopes.parse("a" * MAX_LENGTH)
    with pytest.raises(MalformedScope, match="at most"):
        Scopes.parse("a" * (MAX_LENGTH + 1))


def test_scopes_keep_their_order_and_lose_repetitions() -> None:
    """The answer says the set as it was asked."""
    assert str(Scopes.parse("b a b c@X a")) == "b a c@X"


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=12))
def test_an_id_percent_encoded_by_the_standard_library_is_canonical(text: str) -> None:
    """Callers build filters with the encoder they have; RFC 3986 §2.1 and §2.3 describe it."""
    encoded = quote(text, safe="", errors="replace")

    assert str(Grant.parse(f"read@PLACE/{encoded}")) == f"read@PLACE/{encoded}"


@settings(max_examples=200)
@given(st.text(max_size=12) | st.text("%0123456789ABCDEFabcdef/#*@.", max_size=12))
def test_what_is_accepted_is_its_own_canonical_form(text: str) -> None:
    """Texts are compared byte for byte: two spellings of one grant would disagree."""
    try:
        grant = Grant.parse(f"read@{text}")
    except MalformedScope:
        return

    assert Grant.parse(str(grant)) == grant
    assert str(grant) == f"read@{text}" or text == "*"


@settings(max_examples=100)
@given(SCOPES)
def test_scopes_survive_being_written_and_read(scopes: Scopes) -> None:
    """They travel through the database and the token as text."""
    assert Scopes.parse(str(scopes)) == scopes


# --- covers

COVERS = {
    "itself": ("read@PLACE/42", "read@PLACE/42", True),
    "everything covers a thing": ("read", "read@PLACE/42", True),
    "everything covers everything": ("read", "read", True),
    "a thing does not cover everything": ("read@PLACE/42", "read", False),
    "any one": ("read@PLACE/#", "read@PLACE/42", True),
    "any one, by a star": ("read@PLACE/*", "read@PLACE/42", True),
    "a wildcard by the other one": ("read@PLACE/#", "read@PLACE/*", True),
    "one is not any": ("read@PLACE/42", "read@PLACE/#", False),
    "nothing below it": ("read@PLACE/#", "read@PLACE/42/THING/7", False),
    "nothing above it": ("read@PLACE/#/THING/#", "read@PLACE/42", False),
    "the type alone is no prefix": ("read@PLACE", "read@PLACE/42", False),
    "another type": ("read@PLACE/#", "read@THING/42", False),
    "byte for byte": ("read@PLACE/a", "read@PLACE/A", False),
    "a wildcard in the middle": ("read@PLACE/#/THING/7", "read@PLACE/42/THING/7", True),
    "a wildcard in the middle, no more": ("read@PLACE/#/THING/7", "read@PLACE/42/THING/8", False),
    "no action implies another": ("write", "read", False),
    "no prefix of an action": ("widgets", "widgets:read", False),
    "every action": ("*", "widgets:read", True),
    "every action on a thing": ("*", "widgets:read@PLACE/42", True),
    "every action there": ("*@PLACE/#", "read@PLACE/42", True),
    "every action there only": ("*@PLACE/#", "read", False),
    "every action itself": ("*", "*", True),
    "one action is not every action": ("read", "*", False),
    "never a platform permission": ("*", "coatcheck:operator", False),
    "never the resource server's": ("*", "coatcheck:resource-server", False),
    "never one that will come": ("*", "coatcheck:whatever", False),
    "never a platform permission on a thing": ("*", "coatcheck:operator@X/1", False),
    "a platform permission by its name": ("coatcheck:operator", "coatcheck:operator", True),
    "not by another of them": ("coatcheck:operator", "coatcheck:resource-server", False),
    "a name that only resembles one": ("*", "coatcheckx:operator", True),
}


@pytest.mark.parametrize(("held", "asked", "covered"), COVERS.values(), ids=COVERS)
def test_what_covers_what(held: str, asked: str, covered: bool) -> None:
    """The contract's rules on filters, one by one."""
    assert Grant.parse(held).covers(Grant.parse(asked)) is covered


@settings(max_examples=100)
@given(GRANTS)
def test_a_grant_covers_itself(grant: Grant) -> None:
    """Asking for exactly what one has always works."""
    assert grant.covers(grant)


@settings(max_examples=500)
@given(GRANTS, GRANTS, GRANTS)
def test_covering_is_transitive(one: Grant, two: Grant, three: Grant) -> None:
    """Else a key made from a key made from a key could have more than the first one."""
    if one.covers(two) and two.covers(three):
        assert one.covers(three)


@settings(max_examples=500)
@given(GRANTS, GRANTS, CONCRETE)
def test_what_is_covered_allows_nothing_that_the_coverer_does_not(
    held: Grant, asked: Grant, call: Grant
) -> None:
    """The meaning of covering: every call that the narrower grant allows, the wider one does."""
    if held.covers(asked) and asked.covers(call):
        assert held.covers(call)


@settings(max_examples=200)
@given(SCOPES, GRANTS)
def test_one_grant_alone_has_to_cover(scopes: Scopes, asked: Grant) -> None:
    """Never by a union: two halves never make a whole."""
    assert scopes.covers(asked) == any(grant.covers(asked) for grant in scopes)


def test_two_halves_make_no_whole() -> None:
    """`read` here and `write` there is neither of them everywhere."""
    scopes = Scopes.parse("read@PLACE/1 read@PLACE/2 write")

    assert not scopes.covers(Grant.parse("read@PLACE/#"))
    assert not scopes.covers(Grant.parse("*"))


@settings(max_examples=200)
@given(SCOPES, SCOPES)
def test_missing_is_what_no_grant_covers(held: Scopes, asked: Scopes) -> None:
    """The refusal names it: nothing that is there, everything that is not."""
    missing = held.missing(asked)

    assert set(missing) <= set(asked)
    assert all(held.covers(grant) != (grant in missing.grants) for grant in asked)


@settings(max_examples=200)
@given(SCOPES)
def test_a_platform_permission_is_seen_by_its_name_alone(scopes: Scopes) -> None:
    """Only the operator may give one; `*` never is one."""
    expected = any(str(grant).startswith("coatcheck:") for grant in scopes)

    assert scopes.has_platform_permission is expected
    assert not is_platform("*")


# --- concrete


def test_a_call_on_a_resource_needs_exactly_that_grant() -> None:
    """What `Principal.require` asks for."""
    assert concrete("read", "PLACE/42") == Grant.parse("read@PLACE/42")
    assert concrete("read", None) == Grant("read")


NOT_CONCRETE = {
    "a hash": "PLACE/#",
    "a star": "PLACE/*",
    "a lone star": "*",
    "a wildcard within": "PLACE/4*2",
    "an at sign": "PLACE/a@b",
    "an empty segment": "PLACE//42",
    "an empty end": "PLACE/",
    "an empty start": "/PLACE",
    "nothing": "",
    "an id that was not encoded": "PLACE/a b",
    "another spelling": "PLACE/%41",
    "dots that climb, encoded": "PLACE/%2E%2E",
}


@pytest.mark.parametrize("resource", NOT_CONCRETE.values(), ids=NOT_CONCRETE)
def test_a_resource_of_a_call_names_one_thing(resource: str) -> None:
    """An id `*` from a request's path must not pass for every id."""
    with pytest.raises(MalformedScope):
        concrete("read", resource)
