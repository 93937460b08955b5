"""Words to tokens, many texts in one call, with the places where a text's parts begin among its tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from inlay.errors import UsageError

from .special import Controls, controls_of
from .tokens import Bare, Encoded, Joined, Tokens, common

__all__ = ["Tokens", "Words", "common"]

LONG = 50_000
CHUNK = 5000
"""Texts of more than `LONG` characters are tokenised in pieces of `CHUNK`: time must not grow faster than the text."""
TOGETHER = 64
"""Pieces that are tokenised at once."""
MARGIN = 256
"""Characters left over where a text is cut before it is tokenised, so that the cut does not show in what is kept."""
LEADS = ("\n", ".", "a")
"""A piece from the middle of a text is tokenised behind the first of these that makes no token together with it."""
WORD = "a"
HALVES = re.compile("[\ud800-\udfff]")
GENTLE = re.compile(r"(?<=\S)(?= [^\W_])")
CUT = re.compile(r"(?<=[^\W_])(?=[\W_])")
"""Where no usual tokenizer has a token across: before a space and a letter; else behind a letter, before a sign."""


class Words:
    """A tokenizer for whole rows. `opening` and `closing` are the ids that the tokenizer puts around each text, `end`
    is the id of its end-of-text token.

    It works on a copy of a fast tokenizer's core: truncation and padding that the tokenizer was saved with do not
    matter, and nothing here changes the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise UsageError("the base has no tokenizer", "Name a base folder that holds one.")
        self.tokenizer, self.controls = tokenizer, controls_of(tokenizer)
        self.core = _core(tokenizer, self.controls)
        self.opening, self.closing = self._around()
        self.prefixed = self.core is not None and self._adds_space()
        self.bos: int | None = tokenizer.bos_token_id
        self.cls: int | None = getattr(tokenizer, "cls_token_id", None)
        self._eos: int | None = tokenizer.eos_token_id  # asking a tokenizer takes as long as encoding a few words
        self._longest = 0

    @property
    def end(self) -> int:
        if self._eos is None:
            raise UsageError("the base's tokenizer has no end-of-text token", "Set eos_token in its folder.")
        return self._eos

    def ended(self, ids: list[int]) -> list[int]:
        """What follows the ids of a whole text: its end, and what the tokenizer closes texts with."""
        if ids and ids[-1] == self.end:
            return []
        return self.closing if self.closing and self.closing[-1] == self.end else [*self.closing, self.end]

    @property
    def longest(self) -> int:
        """Characters in the vocabulary's longest token, at least."""
        if not self._longest:
            self._longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        return self._longest

    def room(self, length: int) -> int:
        """How many characters are more than `length` tokens hold."""
        return length * self.longest + MARGIN

    # ---- many texts

    def encode(self, texts: Sequence[str], markup: bool = False) -> list[Tokens]:
        """Tokens of each text, without `opening` and `closing`. With `markup`, control tokens in a text that bear no
        marks are control tokens; else all are words.

        Very long texts are tokenised in pieces, parted between words: only a token across two pieces would differ.
        """
        if not markup:
            return self._batch(texts, False)
        found: list[Tokens | None] = [None] * len(texts)
        marked = [n for n, text in enumerate(texts) if self.controls.marked.search(text)]
        for n in marked:
            found[n] = self._joined(texts[n])
        rest = [n for n in range(len(texts)) if found[n] is None]
        for n, tokens in zip(rest, self._batch([texts[n] for n in rest], True), strict=True):
            found[n] = tokens
        return [tokens for tokens in found if tokens is not None]

    def heads(
        self, texts: Sequence[str], tokens: Sequence[Tokens], places: Sequence[Sequence[int]], markup: bool = False
    ) -> list[list[int]]:
        """For each text and each of its `places` (characters), how many tokens stand before it.

        Where a token begins there, between whitespace and words, the count is up to that token. Else it is the number
        of first tokens that the text shares with its part up to the place, tokenised alone.
        """
        found: list[list[int]] = []
        doubtful: list[tuple[int, int, int, int]] = []
        ends: list[str] = []
        for number, (text, whole, wanted) in enumerate(zip(texts, tokens, places, strict=True)):
            found.append([])
            for place in wanted:
                at = len(whole.ids) if place >= len(text) else self._clean(text, place, whole)
                if at is None:
                    start, first = self._from(text, place, whole) if markup else (0, 0)
                    doubtful.append((number, len(found[-1]), first, len(ends)))
                    ends.append(text[start:place])
                    at = 0
                found[-1].append(at)
        parts = self.encode(ends, markup) if ends else []
        for number, column, first, part in doubtful:
            found[number][column] = first + common(tokens[number].ids[first:], parts[part].ids)
        return found

    def opened(self, text: str, markup: bool = False) -> Tokens:
        """Tokens of a text that words will follow: the whitespace at its end is split as it is before a word."""
        if text[-1:].isspace():
            (tokens,) = self.encode([text + WORD], markup)
            at = self._clean(text + WORD, len(text), tokens)
            if at is not None:
                tokens.ids = tokens.ids[:at]
                return tokens
        return self.encode([text], markup)[0]

    # ---- inside

    def _batch(self, texts: Sequence[str], markup: bool) -> list[Tokens]:
        if any(len(text) > LONG for text in texts):
            return [self._long(t, markup) if len(t) > LONG else self._batch([t], markup)[0] for t in texts]
        if not texts:
            return []
        try:
            return self._tokenised(list(texts), markup)
        except TypeError:  # half a character (a lone surrogate), which no UTF-8 holds and no tokenizer takes
            return self._tokenised([HALVES.sub("\ufffd", text) for text in texts], markup)

    def _tokenised(self, texts: list[str], markup: bool) -> list[Tokens]:
        if self.core is None:
            listed = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not markup)["input_ids"]
            return [Bare(list(ids)) for ids in listed]
        self.core.encode_special_tokens = not markup
        return [Encoded(encoding) for encoding in self.core.encode_batch(texts, add_special_tokens=False)]

    def _long(self, text: str, markup: bool) -> Joined:
        joined, chunks, start = (
            Joined(self.controls, lambda words: self._batch([words], markup)[0]),
            self._chunks(text),
            0,
        )
        for first in range(0, len(chunks), TOGETHER):
            some = chunks[first : first + TOGETHER]
            goes_on = self.prefixed and first
            encoded = self._behind(some, markup) if goes_on else [tokens.ids for tokens in self._batch(some, markup)]
            if self.prefixed and not first:
                encoded[1:] = self._behind(some[1:], markup)
            for chunk, ids in zip(some, encoded, strict=True):
                joined.add(start, chunk, ids)
                start += len(chunk)
        return joined

    def _behind(self, texts: Sequence[str], markup: bool) -> list[list[int]]:
        """Ids of pieces from the middle of a text, for tokenizers that put a space before a text's first word."""
        found: list[list[int]] = [[] for _ in texts]
        left = list(range(len(texts)))
        for lead in LEADS:
            (opened,) = self._batch([lead], markup)
            for n, tokens in zip(left, self._batch([lead + texts[n] for n in left], markup), strict=True):
                if tokens.ids[: len(opened.ids)] == opened.ids:
                    found[n] = tokens.ids[len(opened.ids) :]
            left = [n for n in left if not found[n]]
        for n, tokens in zip(left, self._batch([texts[n] for n in left], markup), strict=True):
            found[n] = tokens.ids
        return found

    def _joined(self, text: str) -> Joined:
        """Tokens of a text in which some control tokens are control tokens and others, which bear marks, are words."""
        joined, start = Joined(self.controls, lambda words: self._batch([words], False)[0]), 0
        for match in self.controls.meant.finditer(text):
            self._add(joined, text[start : match.start()], start)
            joined.add(match.start(), match.group(), [self.tokenizer.convert_tokens_to_ids(match.group())])
            start = match.end()
        self._add(joined, text[start:], start)
        return joined

    def _add(self, joined: Joined, words: str, start: int) -> None:
        if not words:
            return
        bare = self.controls.bare(words)
        if start and self.prefixed and not self._prefixed_behind:
            joined.add(start, words, self._behind([bare], False)[0])
        else:
            joined.add(start, words, self._batch([bare], False)[0].ids)

    def _clean(self, text: str, place: int, whole: Tokens) -> int | None:
        """The number of the token that begins at `place`, where that holds whatever words follow: between whitespace
        and words. (Tokenizers split whitespace by what follows it; prompts are tokenised as if words did.)
        """
        if place <= 0:
            return 0
        if text[place - 1].isspace() == text[place].isspace():
            return None
        return whole.at(place) if self.core is not None else self._count_of(text[:place], whole.ids)

    def _count_of(self, text: str, ids: list[int]) -> int | None:
        """How many of the ids decode to `text`, for tokenizers without character offsets; None where no count does."""

        def decoded(count: int) -> str:
            return self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

        count = bisect_left(range(len(ids)), len(text), key=lambda count: len(decoded(count)))
        return count if decoded(count) == text else None

    def _from(self, text: str, place: int, whole: Tokens) -> tuple[int, int]:
        """The character and the token at which the last control token before `place` begins; no token spans it."""
        *_, last = [None, *self.controls.meant.finditer(text, 0, place)]
        at = None if last is None else whole.at(last.start())
        return (0, 0) if last is None or at is None else (last.start(), at)

    def _chunks(self, text: str) -> list[str]:
        chunks: list[str] = []
        start = 0
        while len(text) - start > 2 * CHUNK:
            end = self._cut(text, start + CHUNK)
            chunks.append(text[start:end])
            start = end
        return [*chunks, text[start:]]

    def _cut(self, text: str, end: int) -> int:
        """A place near `end`, before it, where two words part; no control token is broken."""
        for rule in (GENTLE, CUT):
            places = [match.start() for match in rule.finditer(text, end - CHUNK // 2, end)]
            for place in reversed(places):
                near = self.controls.any.finditer(text, max(0, place - MARGIN), place + MARGIN)
                if not any(match.start() < place < match.end() for match in near):
                    return place
        return end

    def _around(self) -> tuple[list[int], list[int]]:
        inner = self._batch(["a"], False)[0].ids
        whole = list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def _adds_space(self) -> bool:
        """Whether a text's first word gets a space in front that it does not have."""
        return self._batch(["a"], False)[0].ids == self._batch([" a"], False)[0].ids or self._first("a") in "▁Ġ "

    @property
    def _prefixed_behind(self) -> bool:
        """Whether a word right behind a control token gets one too."""
        if not self.controls.names:
            return True
        return self._batch([self.controls.names[0] + "a"], True)[0].ids[1:] == self._batch(["a"], False)[0].ids

    def _first(self, text: str) -> str:
        ids = self._batch([text], False)[0].ids
        return str(self.tokenizer.convert_ids_to_tokens(ids[0]))[:1] if ids else "a"


def _core(tokenizer: Any, controls: Controls) -> Any:
    """The tokenizer's own core without all that is done around texts; None where it has none, or does more than it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import AddedToken, Tokenizer, processors

    try:
        core = Tokenizer.from_str(backend.to_str())
    except Exception:  # a core of Python parts cannot be copied
        return None
    core.post_processor = processors.Sequence([])  # type: ignore[assignment]
    core.no_truncation()
    core.no_padding()
    flagged = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    core.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in controls.names if n not in flagged])
    texts = ["a", " Sentiment: good.\n\nNo  1,234 été 好"]
    ours = [encoding.ids for encoding in core.encode_batch(texts, add_special_tokens=False)]
    theirs = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return core if ours == theirs else None
