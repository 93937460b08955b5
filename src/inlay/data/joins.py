"""Whether a space parts an answer from the words before it: scripts that use spaces want one, others none."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

__all__ = ["parting"]

UNSPACED = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x19E0, 0x1AAF),
    (0x2E80, 0x312F), (0x3190, 0x9FFF), (0xA000, 0xA4CF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F), (0xFF00, 0xFF9F), (0xFFE0, 0xFFEF), (0x1B000, 0x1B16F), (0x1F200, 0x1F2FF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Thai and Lao, Tibetan, Myanmar, Khmer, Tai Le and New Tai Lue, Tai Tham; Han, Kana, Bopomofo and their signs
(Hangul's blocks between them left out), Yi, Myanmar's extensions, Tai Viet; compatibility and fullwidth forms; the
rest of Kana and Han.
"""


def parting(words: str) -> str:
    """The space that an answer behind `words` begins with, or nothing.

    There is none behind whitespace and behind scripts without spaces. Signs that many scripts share (“ … —, emoji) go
    with what stands before them; ASCII ones take a space.
    """
    for sign in reversed(words[-64:]):
        spaced = _spaced(sign)
        if spaced is not None:
            return " " if spaced else ""
    return " "


@lru_cache(maxsize=4096)
def _spaced(sign: str) -> bool | None:
    """Whether a script is written with spaces; None for signs of no script of their own."""
    if sign.isspace():
        return False
    code = ord(sign)
    if code < 0x80:
        return True
    if any(first <= code <= last for first, last in UNSPACED):
        return False
    return None if unicodedata.category(sign)[0] in "PSMC" else True
