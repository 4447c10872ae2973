"""Tokens and API keys of every release, which verify for ever.

A verifier that is newer than its issuer must go on accepting what the issuer makes.  Nothing is
ever removed from these files; a new release adds one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coatcheck import apikey
from coatcheck.verifier import Verifier

RELEASES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("*.json"))
}


def tokens() -> Iterator[Any]:
    for release, golden in RELEASES.items():
        for name, token in golden["tokens"].items():
            yield pytest.param(golden, token, id=f"{release} {name}")


@pytest.mark.parametrize(("golden", "token"), list(tokens()))
def test_a_token_of_a_release_verifies(golden: dict[str, Any], token: str) -> None:
    """At a moment when it was alive, with the key set of its day."""
    with Verifier(
        golden["issuer"],
        golden["audience"],
        token_types=("at+jwt", "JWT"),
        feed=None,
        clock=lambda: golden["issued_at"] + 60,
        fetch=lambda url: json.dumps(golden["jwks"]).encode(),
    ) as verifier:
        caller = verifier.verify_jwt(token)

    assert caller.allows("widgets:read")
    assert caller.allows("read", "PLACE/Site/42/THING/Battery/7")
    assert not caller.allows("read", "PLACE/Site/43/THING/Battery/7")


@pytest.mark.parametrize(
    "text", [key for golden in RELEASES.values() for key in golden["api_keys"]]
)
def test_an_api_key_of_a_release_is_one(text: str) -> None:
    """A key that a caller has kept for years still has the right form."""
    assert apikey.parse(text).text == text
