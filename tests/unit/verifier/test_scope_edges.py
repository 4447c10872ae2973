"""Scopes as the verifier reads them, to the character: what is one, and what is none.

RFC 6749 §3.3 (scope-token), RFC 3986 §2.1 and §2.3 (percent-encoding, unreserved).
"""

import dataclasses
import string

import pytest

from coatcheck import scope
from coatcheck.scope import Grant, MalformedScope, Scopes

UNRESERVED = string.ascii_letters + string.digits + "-._~"


def is_scope(text: str) -> bool:
    try:
        Grant.parse(text)
    except MalformedScope:
        return False
    return True


def test_an_action_consists_of_the_characters_of_the_rfc_but_for_our_three() -> None:
    """%x21 / %x23-5B / %x5D-7E, without `@`, `#` and `*`: every character, one by one."""
    allowed = {chr(code) for code in (0x21, *range(0x23, 0x5C), *range(0x5D, 0x7F))} - set("@#*")

    found = {chr(code) for code in range(0x200) if is_scope(f"a{chr(code)}b")}

    assert found - {"@"} == allowed  # `a@b` is an action and a filter.
    assert {letter for letter in allowed if is_scope(letter)} == allowed


def test_what_needs_no_encoding_is_never_encoded_and_all_else_always_is() -> None:
    """One spelling of each id: every byte, one by one."""
    encoded = {code for code in range(0x100) if is_scope(f"read@PLACE/%{code:02X}")}
    plain = {chr(code) for code in range(0x200) if is_scope(f"read@PLACE/{chr(code)}x")}

    assert encoded == set(range(0x100)) - set(map(ord, UNRESERVED))
    assert plain == set(UNRESERVED)
    assert not is_scope("read@PLACE/%4")
    assert not is_scope("read@PLACE/%20%41")


def test_a_scope_has_at_most_4096_characters() -> None:
    """Contract: a token is no longer, and nobody should wait for the parsing of more."""
    assert Scopes.parse("a" * 4096)
    with pytest.raises(MalformedScope, match="at most 4096"):
        Scopes.parse("a" * 4097)


def test_scopes_are_the_same_from_a_list_as_from_a_text() -> None:
    """Routes name them one by one; nothing that is no scope slips in that way."""
    assert Scopes.of(["write", "read@PLACE/*"]) == Scopes.parse("write read@PLACE/*")
    assert Scopes.of([]) == Scopes()
    for tokens in (["read", ""], ["a@b@c"], ["a" * 4096, "b"]):
        with pytest.raises(MalformedScope):
            Scopes.of(tokens)


def test_the_platforms_names_are_the_contracts() -> None:
    """Keys of resource servers carry this one; `*` covers none of them."""
    assert scope.RESOURCE_SERVER == "coatcheck:resource-server"
    assert scope.is_platform(scope.RESOURCE_SERVER)
    assert not Grant("*").covers(Grant(scope.RESOURCE_SERVER))


@pytest.mark.parametrize("value", [Grant("read"), Scopes.parse("read")], ids=["Grant", "Scopes"])
def test_what_was_granted_cannot_be_changed_afterwards(value: Grant | Scopes) -> None:
    """They are remembered, and shared by every request with the same scope."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, "admin")
    assert len({value, dataclasses.replace(value)}) == 1
