"""Which scripts a text is written in, by its letters. A script is no language: English and Turkish are both Latin."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

__all__ = ["scripts"]

NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "FULLWIDTH": "Latin", "HALFWIDTH": "Kana"}
"""What the first word of a letter's name in Unicode stands for, where it is not the script's own name."""


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """The share of all letters that each script has, the largest first; {} where there are no letters."""
    letters = Counter(character for text in texts for character in text if character.isalpha())
    found: Counter[str] = Counter()
    for character, count in letters.items():
        found[_script(character)] += count
    whole = sum(found.values())
    return {name: count / whole for name, count in found.most_common()}


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]
    return NAMES.get(first, first.capitalize())
