"""The text of an answer while its tokens come, and where it ends. A token costs the same however long the answer is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from inlay.errors import UsageError

from .sampling import Sampling

__all__ = ["Answer", "Detokenizer", "StopStrings", "TextStream"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_BROKEN = 12
"""Tokens that are held back together while they end inside a character: a whole one has four at most."""
MOST_BYTES = 32
"""Tokens of single bytes, one after another, that are held back at most."""
CLEANED = frozenset(" .?!,'ntmsvre")
"""The characters that transformers' clean_up_tokenization reads and writes."""


class Detokenizer:
    """What decoding needs to know of a tokenizer, found once; `stream()` decodes one answer.

    The text is equal to `tokenizer.decode(ids, skip_special_tokens=True)`, in whatever pieces it comes. One exception:
    some tokenizers have tokens for single bytes, and `decode` gives up all characters of a run of them where one is
    broken; of a run of more than 32 the first are sent by then.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {at for at, token in added.items() if token.special}
        self.special = frozenset(special | set(tokenizer.all_special_ids))
        self.size = len(tokenizer)
        named = [(f"<0x{byte:02X}>", tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")) for byte in range(256)]
        self.bytes = frozenset(
            at for name, at in named if at is not None and tokenizer.convert_ids_to_tokens(at) == name
        )
        self.decode = _decode_of(tokenizer)
        self.clean = tokenizer.clean_up_tokenization if _cleans(tokenizer) else None

    def stream(self) -> TextStream:
        return TextStream(self)

    def special_id(self, text: str) -> int | None:
        """The special token that `text` names."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        known = token in self.special and self.tokenizer.convert_ids_to_tokens(token) == text
        return token if known else None

    def has_text(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's and is not skipped."""
        if token in self.special or not 0 <= token < self.size:
            return False
        return self.tokenizer.convert_ids_to_tokens(token) is not None


def _decode_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Ids to text without any cleaning; past transformers' wrapper where that only hands the call on."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind: Any = type(tokenizer)
    if issubclass(kind, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        backend = tokenizer.backend_tokenizer
        return lambda ids: backend.decode(ids, skip_special_tokens=False)
    whole: Callable[..., str] = tokenizer.decode
    return lambda ids: whole(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _cleans(tokenizer: Any) -> bool:
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return type(model).__name__ != "BPE" or bool(forced)


class TextStream:
    """Tokens of one answer to text. What is not yet sure is held back: a part of a character, a run of byte tokens.

    A piece is what the tokens add behind those of the piece before: alone they may lose a space, or a part of a
    character.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._of = detokenizer
        self._before: list[int] = []  # the tokens of the last piece
        self._known = ""  # their text
        self._held: list[int] = []
        self._uncleaned = ""

    def push(self, token: int) -> str:
        """The text that is sure with this token, often none."""
        return self._cleaned(self._pushed(token) if self._of.has_text(token) else "")

    def finish(self) -> str:
        """The rest, when no token comes any more."""
        text, self._held = self._added(self._held) if self._held else "", []
        return self._cleaned(text, last=True)

    def _pushed(self, token: int) -> str:
        held = self._held
        held.append(token)
        of_bytes = token in self._of.bytes
        if of_bytes and len(held) <= MOST_BYTES:
            return ""
        text = self._added(held)
        if text.endswith(BROKEN) and len(held) <= MOST_BROKEN + of_bytes * MOST_BYTES:
            return ""
        if text.endswith(BROKEN) and not of_bytes:
            return self._broken(text)
        if not text:
            return ""
        if of_bytes:  # what stands before stays the last piece: a run of bytes that begins inside another is another
            self._held = []
            return text
        self._before, self._held = held, []
        self._known = self._of.decode(held)
        return text

    def _added(self, tokens: Sequence[int]) -> str:
        return self._of.decode([*self._before, *tokens])[len(self._known) :]

    def _broken(self, text: str) -> str:
        """Of a long row of broken characters, those that no token behind them can change: bytes that went on with the
        character before them would make one sign of two."""
        for cut in range(len(self._held) - 1, 0, -1):
            first = self._added(self._held[:cut])
            if first + self._added(self._held[cut:]) == text:
                del self._held[:cut]
                return first
        return ""

    def _cleaned(self, text: str, last: bool = False) -> str:
        """transformers' cleaning changes runs of some characters, so a run is cleaned when it is over."""
        clean = self._of.clean
        if clean is None:
            return text
        text = self._uncleaned + text
        over = len(text)
        while not last and over and text[over - 1] in CLEANED:
            over -= 1
        self._uncleaned = text[over:]
        return clean(text[:over])


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces; text that may be the start of one is held back.

    The first is the one that is complete first, and the longest of those: so it does not depend on the pieces. (Knuth,
    Morris and Pratt 1977: each string's automaton sees each character once.)
    """

    def __init__(self, strings: Collection[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._borders = [_borders(string) for string in self._strings]
        self._states = [0] * len(self._strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is in front of any string; nothing once one is `found`."""
        if self.found is not None or not text:
            return ""
        if not self._strings:
            return text
        start = len(self._held)
        whole = self._held + text
        for at, character in enumerate(text, start + 1):
            for number, string in enumerate(self._strings):
                state = self._step(number, character)
                if state == len(string):
                    self.found, self._held = string, ""
                    return whole[: at - len(string)]
        held = max(self._states)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text

    def _step(self, number: int, character: str) -> int:
        """How much of a string stands at the end of the text, with one character more."""
        string, borders, state = self._strings[number], self._borders[number], self._states[number]
        while state and string[state] != character:
            state = borders[state - 1]
        self._states[number] = state + (string[state] == character)
        return self._states[number]


def _borders(string: str) -> list[int]:
    """For each start of a string, how long the longest shorter start is that it ends with."""
    borders = [0]
    for character in string[1:]:
        state = borders[-1]
        while state and string[state] != character:
            state = borders[state - 1]
        borders.append(state + (string[state] == character))
    return borders


class Answer:
    """One answer as its tokens come: its ids, its text, and why it ended.

    `finish_reason` is None while it goes on; "stop" where a token or a string ended it, which `stopped_by` then is and
    the text leaves out; "length" where it has all the tokens that it may have. `eos` are the tokens that end an answer
    of the model. Without a `detokenizer` there is no text.

    Raises: UsageError for stop strings without a `detokenizer`.
    """

    def __init__(self, sampling: Sampling, eos: Collection[int] = (), detokenizer: Detokenizer | None = None) -> None:
        if sampling.stop and detokenizer is None:
            raise UsageError(
                "stop strings are found in text, and no tokenizer is given", "Give stop_token_ids instead."
            )
        self.ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.stopped_by: int | str | None = None
        self._sampling, self._ends = sampling, sampling.ends(eos)
        self._stream = None if detokenizer is None else detokenizer.stream()
        self._stops = StopStrings(sampling.stop)
        self._pieces: list[str] = []
        # The text skips special tokens, so a string that is one is found by its id.
        named = {detokenizer.special_id(string): string for string in sampling.stop} if detokenizer else {}
        self._named = {token: string for token, string in named.items() if token is not None}
        self._ends |= self._named.keys()

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take the next token. The text that is sure with it: without any part of a stop string, often none."""
        assert self.finish_reason is None, "the answer has ended"
        self.ids.append(token)
        count, sampling = len(self.ids), self._sampling
        ended = token in self._ends and count > sampling.min_new_tokens
        text = "" if ended or self._stream is None else self._stream.push(token)
        given = self._stops.push(text) if count > sampling.min_new_tokens else text
        if ended or (count >= sampling.max_new_tokens and self._stops.found is None):
            given += self._rest()
        if self._stops.found is not None:
            self.finish_reason, self.stopped_by = "stop", self._stops.found
        elif ended:
            self.finish_reason, self.stopped_by = "stop", self._named.get(token, token)
        elif count >= sampling.max_new_tokens:
            self.finish_reason = "length"
        self._pieces.append(given)
        return given

    def finish(self) -> str:
        """The text that was held back, where the answer is left before its end."""
        rest = self._rest() if self.finish_reason is None else ""
        self._pieces.append(rest)
        return rest

    def _rest(self) -> str:
        if self._stream is None:
            return ""
        text = self._stops.push(self._stream.finish())
        return text + self._stops.finish()
