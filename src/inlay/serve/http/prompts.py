"""Prompts as tokens: chats in the adapter's own template, completions as they are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from inlay.data.encode import Encoder
from inlay.data.messages import Talk
from inlay.data.prompting import Prompting, joined, noted, prompt_row
from inlay.data.targets import encoder_of
from inlay.data.template import Template
from inlay.data.words import Words
from inlay.errors import DataError, UsageError
from inlay.formats.notes import Notes
from inlay.serve.entries import AdapterInfo

from .limits import Limits
from .problems import Problem

__all__ = ["Prompt", "Prompts"]

PLAIN = Template("completion", "{prompt}", "completion")
CHAT = Template("messages", answer="messages", chat=True)
MOST = 64
"""Templates whose encoders are kept: each holds a copy of the tokenizer's core."""
NOTED = 4096
"""Folders whose notes are remembered."""
WHOLE = 1 << 20
"""Tokens that no prompt has: a server refuses what is too long, and cuts nothing."""
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A prompt's `ids`, the token before which virtual ones stand, and its words, where they were given as such."""

    ids: list[int]
    place: int = 0
    text: str | None = None


class Prompts:
    """Encodes for one thread at a time; `vocabulary` is how many token ids the base knows, `positions` how many tokens
    a row may have (None for any number), `writes` whether the base writes text.
    """

    def __init__(
        self, tokenizer: Any, limits: Limits, vocabulary: int, positions: int | None, writes: bool = True
    ) -> None:  # fmt: skip
        self.tokenizer, self.limits, self.vocabulary, self.positions = tokenizer, limits, vocabulary, positions
        self.writes = writes
        self._words: Words | None = None
        self._encoders: OrderedDict[Any, Encoder] = OrderedDict()
        self._noted: OrderedDict[Path, tuple[Any, Prompting | None]] = OrderedDict()
        self._lock = threading.RLock()

    def raw(self, given: str | list[int], infos: Sequence[AdapterInfo], special: bool = True) -> Prompt:
        """A prompt as it is: text (control tokens in it count), or ids. Raises: Problem."""
        with self._lock:
            found = self.prompting(infos)
            self._check_writes(found)
            if self._words is None:
                self._words = Words(self.tokenizer)
            words, ids = self._words, given
            if isinstance(ids, str):
                bos = self.tokenizer.bos_token
                opening = words.opening if special and not (bos and ids.startswith(bos)) else []
                ids = [*opening, *words.opened(ids, markup=True).ids]
            self._check(ids)
            return Prompt(ids, _place(found, ids, words), given if isinstance(given, str) else None)

    def chat(self, turns: Sequence[dict[str, Any]], infos: Sequence[AdapterInfo]) -> Prompt:
        """A conversation in the template that the adapters were trained with, else in the base's own.

        Raises: Problem where it has no place in the template.
        """
        with self._lock:
            found = self.prompting(infos)
            self._check_writes(found)
            prompting = Prompting(CHAT) if found is None else found
            template = prompting.template
            encoder = self.encoder(replace(prompting, max_length=WHOLE))
            try:
                if template.kind == "messages":
                    ids, place = encoder.asked(turns, "the request")
                else:
                    ids, place = self._single(encoder, template, turns)
            except (UsageError, DataError) as error:
                raise Problem(400, str(error), param="messages") from None
            self._check(ids)
            return Prompt(list(ids), place)

    def prompting(self, infos: Sequence[AdapterInfo]) -> Prompting | None:
        """What adapters, as they are loaded or else lie in their folders, were trained with; None where none says.

        Raises: InlayError.
        """
        return joined([self.noted(info.notes, info.path) for info in infos])

    def noted(self, notes: Notes, folder: Path) -> Prompting | None:
        """What the notes of one adapter say, read once. Raises: FormatError."""
        known = self._noted.get(folder)
        if known is None or known[0] is not notes:
            _keep(self._noted, folder, (notes, noted(notes, folder)), NOTED)
        return self._noted[folder][1]

    def encoder(self, prompting: Prompting, limit: int | None = None) -> Encoder:
        """The encoder of rows of a template, made once."""
        template = prompting.template
        key = (repr(template), prompting.max_length, prompting.virtual_at, limit)
        if key not in self._encoders:
            made = encoder_of(template)(
                self.tokenizer, template, prompting.max_length, prompting.virtual_at, limit, self.vocabulary
            )
            _keep(self._encoders, key, made, MOST)
        self._encoders.move_to_end(key)
        return self._encoders[key]

    def locked(self, do: Callable[[], T]) -> T:
        """What `do` gives while nobody else encodes."""
        with self._lock:
            return do()

    def answer_tokens(self, asked: int | None, prompt: Prompt, otherwise: int | None = None) -> int:
        """How many tokens an answer may have at most. Raises: Problem."""
        if asked is not None and asked < 0:
            raise Problem(400, f"max_tokens is {asked}. Give a whole number of 0 or more.", param="max_tokens")
        if asked is None:
            room = self.limits.max_answer if self.positions is None else self.positions - len(prompt.ids)
            return max(1, min(self.limits.max_answer, otherwise or room, room))
        if asked > self.limits.max_answer:
            said = f"max_tokens is {asked}, and this server writes {self.limits.max_answer} in an answer at most"
            raise Problem(400, said, param="max_tokens")
        return asked

    def _single(self, encoder: Encoder, template: Template, turns: Sequence[dict[str, Any]]) -> tuple[list[int], int]:
        """One user's words in a template of single prompts."""
        asked = turns[-1]
        opening = [turn for turn in turns[:-1] if turn["role"] == "system"] if template.chat else []
        if asked["role"] != "user" or len(turns) != 1 + len(opening) or len(opening) > 1:
            may = "one user message, behind a system message or alone" if template.chat else "one user message"
            raise UsageError("this adapter was trained on single prompts, not on conversations", f"Send {may}.")
        row = prompt_row(template, _words(asked), "the request")
        if opening:
            return encoder.asked([*opening, {"role": "user", "content": template.prompt_of(row)}], "the request")
        return encoder.prompt(row)

    def _check_writes(self, found: Prompting | None) -> None:
        if found is not None and found.template.task != "generate":
            task = found.template.task
            said = f"this adapter was trained to {task} with a head, and writes no text. Ask it at /v1/classify."
            raise Problem(400, said, param="model")
        if not self.writes:
            said = "the base that is served writes no text. Ask its adapters at /v1/classify."
            raise Problem(400, said, param="model")

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise Problem(400, "the prompt has no tokens. Give some words.", param="prompt")
        if len(ids) > self.limits.max_prompt:
            said = f"the prompt has {len(ids)} tokens, and this server takes {self.limits.max_prompt} at most"
            raise Problem(413, said, "context_length_exceeded", "prompt")
        if max(ids) >= self.vocabulary:
            said = f"the prompt holds the token {max(ids)}, and the base knows {self.vocabulary}"
            raise Problem(400, said, param="prompt")


def _words(turn: dict[str, Any]) -> str:
    return Talk.of([turn], "the request").messages[0].content


def _place(found: Prompting | None, ids: Sequence[int], words: Words) -> int:
    """Before which token of a raw prompt virtual ones stand, as in training."""
    at = "start" if found is None else found.virtual_at
    if at == "before-answer":
        return len(ids)
    return int(at == "after-system" and ids[0] in (words.bos, words.cls))


def _keep(store: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    store[key] = value
    store.move_to_end(key)
    while len(store) > most:
        store.popitem(last=False)
