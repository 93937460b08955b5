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
    """A text's token ids, and which of them a character is the first of."""

    ids: list[int]

    def at(self, place: int) -> int | None:
        """The token that begins with the character at `place`; None where none does, or nobody knows."""
        ...


class Encoded:
    """What the tokenizers library found."""

    def __init__(self, encoding: Any) -> None:
        self.ids: list[int] = encoding.ids
        self.encoding = encoding

    def at(self, place: int) -> int | None:
        token, chars = self.encoding.char_to_token(place), self.encoding.token_to_chars
        if token is None or chars(token)[0] != place:
            return None
        return token if not token or chars(token - 1)[1] <= place else None


class Joined:
    """Pieces of a text, or what stands between its control tokens: (first character, first token, marked words).
    Where a place within a piece is asked for, the piece is encoded once more: that is rare, and keeping all takes
    much memory.
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
    """Ids alone, of a tokenizer that tells no places."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def at(self, place: int) -> int | None:
        return None if place else 0
