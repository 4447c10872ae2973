"""Base62 over `0-9A-Za-z`: the one alphabet that every OAuth client sends unharmed.

Clients encode HTTP Basic credentials in four different ways; letters and digits come out the
same from all of them.  The order of the alphabet is ASCII order, so that fixed-width texts sort
like the numbers they stand for.
"""

import secrets
from typing import Final

ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# A random byte below 248 = 4 * 62 picks a letter without bias; the others are thrown away.
_UNBIASED: Final = 4 * 62
_LETTER_OF: Final = bytes(ord(ALPHABET[byte % 62]) for byte in range(256))
_REJECTED: Final = bytes(range(_UNBIASED, 256))
# Two digits at a time: a million ids may be made in one go.
_PAIRS: Final = tuple(first + second for first in ALPHABET for second in ALPHABET)


def encode(number: int, width: int) -> str:
    """`number` in base62, padded with zeros to `width` characters.

    Raises:
        ValueError: the number is negative or needs more than `width` characters.
    """
    if not 0 <= number < 62**width:
        raise ValueError(f"{number} does not fit into {width} base62 characters")
    text = ""
    # Eight digits fit into a machine word; Python divides longer integers far more slowly.
    for _ in range((width + 7) // 8):
        number, word = divmod(number, 62**8)
        word, low = divmod(word, 3844)
        word, next_low = divmod(word, 3844)
        high, next_high = divmod(word, 3844)
        text = _PAIRS[high] + _PAIRS[next_high] + _PAIRS[next_low] + _PAIRS[low] + text
    return text[-width:]


def random_text(length: int) -> str:
    """`length` characters, each drawn evenly from the alphabet by the system's generator."""
    letters = b""
    while len(letters) < length:
        drawn = secrets.token_bytes(length + 8)
        letters += drawn.translate(_LETTER_OF, _REJECTED)
    return letters[:length].decode("ascii")
