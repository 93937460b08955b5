"""A text's tokens, and which of them each of its characters begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .special import Controls

__all__ = ["Bare", "Encoded", "Joined", "Tokens", "common"]


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first tokens (or characters) a and b share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


class Tokens(Protocol):
    """A text's token ids, and which token begins at a character."""

    ids: list[int]

    def at(self, place: int) -> int | None:
        """The number of the token that begins at the character `place`; None where none does or that is not known."""
        ...


class Encoded:
    """Tokens with character offsets, as the tokenizers library gives them."""

    def __init__(self, encoding: Any) -> None:
        self.ids: list[int] = encoding.ids
        self.encoding = encoding

    def at(self, place: int) -> int | None:
        token, chars = self.encoding.char_to_token(place), self.encoding.token_to_chars
        if token is None or chars(token)[0] != place:
            return None
        return token if not token or chars(token - 1)[1] <= place else None


class Joined:
    """Tokens of a text that was tokenised in pieces; `parts` are each piece's first character, first token and words.

    A piece is tokenised again when a place inside it is asked for: that is rare, and all offsets take much memory.
    """

    def __init__(self, controls: Controls, encode: Callable[[str], Tokens]) -> None:
        self.ids: list[int] = []
        self.controls, self.encode = controls, encode
        self.parts: list[tuple[int, int, str]] = []

    def add(self, start: int, words: str, ids: Sequence[int]) -> None:
        self.parts.append((start, len(self.ids), words))
        self.ids += ids

    def at(self, place: int) -> int | None:
        for start, first, words in self.parts:
            if place == start:
                return first
            if start < place < start + len(words):
                tokens = self.encode(self.controls.bare(words))
                inner = tokens.at(len(self.controls.bare(words[: place - start])))
                fits = self.ids[first : first + len(tokens.ids)] == tokens.ids
                return first + inner if fits and inner is not None else None
        return len(self.ids)


class Bare:
    """Ids of a tokenizer that gives no character offsets."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def at(self, place: int) -> int | None:
        return None if place else 0
