"""Public ids: `key_…`, `org_…`: a UUIDv7 in base62 behind the name of its kind.

An id says nothing secret and sorts by the time it was made.  To a resource server it is opaque.

Source: RFC 9562 §5.7 (UUIDv7).
"""

import re
import secrets
from typing import Final, Literal

from coatcheck import base62

Kind = Literal["key", "org", "prj", "mem", "grp"]

#: 128 bits need 22 base62 characters.
WIDTH: Final = 22

_API_KEY_ID: Final = re.compile(r"key_[0-9A-Za-z]{22}")


def new_id(kind: Kind, now_ms: int) -> str:
    """A fresh id of this kind.

    Args:
        kind: the name before the underscore.
        now_ms: milliseconds since the epoch; becomes the sortable part.
    """
    random_a = secrets.randbits(12)
    random_b = secrets.randbits(62)
    # unix_ts_ms (48) | ver 7 (4) | rand_a (12) | var 10 (2) | rand_b (62)
    number = (now_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | random_a << 64 | 0b10 << 62 | random_b
    return f"{kind}_{base62.encode(number, WIDTH)}"


def is_api_key_id(text: str) -> bool:
    """Whether a text has the form of an API key's public id.

    A presented `client_id` that has not may well be the API key itself, typed into the wrong
    field: it must reach no log, metric or throttle.
    """
    return _API_KEY_ID.fullmatch(text) is not None
