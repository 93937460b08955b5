"""Control tokens in words: those that a template means, and those that merely stand in a row's text.

A text that mixes both has the second kind between two marks (`Controls.plain`), noncharacters that no text needs. A
pair of marks around a control token is taken off again; marks anywhere else are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["CLOSE", "OPEN", "Controls", "controls_of"]

OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKUP = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
"""What control tokens look like that a tokenizer does not call special."""


class Controls:
    """Finds the control tokens called `names` in words."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(sorted({name for name in names if name}, key=len, reverse=True))
        any_of = "|".join(map(re.escape, self.names)) or "(?!)"
        self.any = re.compile(any_of)
        self.meant = re.compile(f"(?<!{OPEN})(?:{any_of})")
        self.marked = re.compile(f"{OPEN}({any_of}){CLOSE}")

    def plain(self, words: str) -> str:
        """`words` with a mark on each side of every control token in them: they are ordinary text."""
        return self.any.sub(f"{OPEN}\\g<0>{CLOSE}", words) if self.any.search(words) else words

    def bare(self, words: str) -> str:
        """`words` without the marks."""
        return self.marked.sub("\\1", words) if OPEN in words else words

    def all_plain(self, value: Any) -> Any:
        """The same lists and objects with every string in them made `plain`, keys aside."""
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, dict):
            return {key: self.all_plain(inner) for key, inner in value.items()}
        return [self.all_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def controls_of(tokenizer: Any) -> Controls:
    """The tokenizer's special tokens, and its added ones that are written like <|this|>."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    looks = [name for name in tokenizer.get_added_vocab() if MARKUP.fullmatch(name)]
    return Controls([*tokenizer.all_special_tokens, *added, *looks])
