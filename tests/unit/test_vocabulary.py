"""What scope-tokens mean at an audience.  RFC 6749 §3.3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.scope import Scopes
from coatcheck.vocabulary import ANYTHING, Vocabulary

SHOP = Vocabulary(
    permissions=("read", "write", "create", "delete", "coatcheck:operator"),
    named={
        "viewer": Scopes.parse("read"),
        "editor": Scopes.parse("write elsewhere"),
        "everything": Scopes.parse("*"),
    },
    implies={"write": ("create", "delete"), "create": ("read",), "read": ("read",)},
)

MEANT = {
    "a permission": ("delete", "delete"),
    "several, in their order": ("delete read", "delete read"),
    "with a filter": ("delete@PLACE/1", "delete@PLACE/1"),
    "another audience's": ("delete elsewhere", "delete"),
    "nothing at all": ("elsewhere", ""),
    "none": ("", ""),
    "an action that implies others, which imply more": ("write", "write create read delete"),
    "the same under a filter": (
        "write@PLACE/1",
        "write@PLACE/1 create@PLACE/1 read@PLACE/1 delete@PLACE/1",
    ),
    "a name": ("viewer", "read"),
    "a name for several, of which one is another audience's": (
        "editor",
        "write create read delete",
    ),
    "a name under a filter is no name": ("viewer@PLACE/1", ""),
    "everything, but for the platform's": ("*", "read write create delete"),
    "everything under a filter": (
        "*@PLACE/1",
        "read@PLACE/1 write@PLACE/1 create@PLACE/1 delete@PLACE/1",
    ),
    "a name for everything": ("everything", "read write create delete"),
    "the platform's, by its name": ("coatcheck:operator", "coatcheck:operator"),
}


@pytest.mark.parametrize(("told", "meant"), MEANT.values(), ids=MEANT)
def test_a_scope_is_spelled_out(told: str, meant: str) -> None:
    """Named scopes, implied actions and * become permissions, each once, in one order."""
    assert str(SHOP.expand(Scopes.parse(told))) == meant


def test_without_a_catalog_a_scope_means_itself() -> None:
    """Nothing is left out and nothing is added."""
    scopes = Scopes.parse("* a:b read@PLACE/# coatcheck:operator")

    assert ANYTHING.expand(scopes) is scopes


def test_names_count_where_any_permission_may_be_given() -> None:
    """A catalog may name scopes and list no permissions."""
    vocabulary = Vocabulary(None, {"viewer": Scopes.parse("read list")}, {"list": ("count",)})

    assert str(vocabulary.expand(Scopes.parse("viewer other *"))) == "read list count other *"


TOKENS = st.sampled_from(
    ["read", "write", "create", "delete", "elsewhere", "viewer", "editor", "everything", "*"]
)
SCOPES = st.lists(
    st.builds(lambda token, part: token + part, TOKENS, st.sampled_from(["", "@A/1", "@A/#"])),
    max_size=4,
    unique=True,
).map(Scopes.of)


@given(SCOPES)
def test_what_is_spelled_out_stays_so(scopes: Scopes) -> None:
    """Expanding twice is expanding once: a token's scope means what the key's did."""
    once = SHOP.expand(scopes)

    assert set(SHOP.expand(once)) == set(once)


@given(SCOPES, SCOPES)
def test_more_scopes_never_mean_less(scopes: Scopes, more: Scopes) -> None:
    """A union means what its parts mean together."""
    together = set(SHOP.expand(Scopes(tuple(dict.fromkeys((*scopes, *more))))))

    assert together == set(SHOP.expand(scopes)) | set(SHOP.expand(more))
