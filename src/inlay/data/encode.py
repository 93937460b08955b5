"""Rows to token ids, with the tokens that bear loss; prompts are cut where they are too long, answers never."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import DataError, UsageError

from .chat import Chat, Turn, common, turns_of
from .table import Row
from .template import Template

__all__ = ["PLACES", "Choices", "Encoder", "Example", "Prepared"]

PLACES = ("start", "after-system", "before-answer")
CHECKED = 8
"""First conversations in which a chat template is looked at closely."""


@dataclass(frozen=True)
class Example:
    """`ids` (n,), and for each of them whether it is learned; `sample` is the row's number in its table, `cut` how
    many tokens of its prompt are left out, `place` before which token virtual ones stand.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    sample: int
    cut: int = 0
    place: int = 0


@dataclass(frozen=True)
class Choices:
    """A prompt, and the token ids of every word that may follow it, with the label each stands for."""

    prompt: tuple[int, ...]
    words: tuple[tuple[str, tuple[int, ...]], ...]
    label: str
    sample: int
    place: int = 0


@dataclass
class Prepared:
    """Examples, and what became of the rows: `counts` holds rows, cut, and those dropped by reason."""

    examples: list[Example]
    counts: Counter[str] = field(default_factory=Counter)


class Encoder:
    """Encodes rows of one template with one tokenizer, at most `max_length` tokens each.

    Virtual tokens go to `place`: start, after-system (behind a conversation's system turn, or a text's opening token)
    or before-answer.
    """

    def __init__(self, tokenizer: Any, template: Template, max_length: int, place: str = "start") -> None:
        if tokenizer is None:
            raise UsageError("the base has no tokenizer", "Name a base folder that holds one.")
        if max_length < 2:
            raise UsageError(f"the maximal length is {max_length} tokens", "Give 2 or more.")
        if place not in PLACES:
            raise UsageError(f"virtual tokens cannot stand at {place!r}", f"Choose {', '.join(PLACES)}.")
        self.tokenizer, self.template, self.max_length, self.place = tokenizer, template, max_length, place
        chats = template.chat or template.kind == "messages"
        self.chat = Chat(tokenizer, template.jinja) if chats else None
        self._checked = 0

    def examples(self, rows: Sequence[Row]) -> Prepared:
        """Encode rows; those without a learned token, or whose answer alone is too long, are dropped and counted."""
        prepared = Prepared([], Counter(rows=len(rows)))
        for row in rows:
            example = self.example(row)
            if len(example.ids) > self.max_length:
                prepared.counts["dropped: answer too long"] += 1
            elif not any(example.learned[1:]):
                prepared.counts["dropped: nothing to learn"] += 1
            else:
                prepared.counts["cut"] += example.cut > 0
                prepared.examples.append(example)
        if not prepared.examples:
            why = "; ".join(f"{n} {reason}" for reason, n in prepared.counts.items() if reason.startswith("dropped"))
            remedy = "Raise --max-length, check the columns; `inlay preview` shows a row."
            raise DataError(f"none of the {len(rows)} rows can be learned from ({why})", remedy)
        return prepared

    def example(self, row: Row) -> Example:
        if self.chat is not None:
            return self._conversation(row, self.turns(row))
        if self.template.kind == "text":
            ids = [*self._ids(self._text(row)), self._end()]
            cut = max(0, len(ids) - self.max_length)
            ids = ids[: self.max_length]
            return Example(tuple(ids), (True,) * len(ids), row.number, cut, self._opening(ids))
        prompt, answer = self.template.prompt_of(row), self.template.answer_of(row)
        ids = self._ids(prompt + answer)
        head = common(ids, self._ids(prompt))
        if ids[-1] != self._end():
            ids.append(self._end())
        return self._fitted(ids, [n >= head for n in range(len(ids))], row, self._opening(ids))

    def choices(self, row: Row) -> Choices:
        """The row's prompt and every candidate word after it."""
        words = [(label, word) for label, listed in self.template.verbalizer.items() for word in listed]
        system = 0
        if self.chat is not None:
            turns = self.turns(row)[:-1]
            opened = self.chat.text(turns, True, row.where)
            prompt = self._plain_ids(opened)
            joined = [self._plain_ids(opened + word) for _, word in words]
            system = self.chat.behind_system(turns, prompt)
        else:
            text = self.template.prompt_of(row)
            prompt = self._ids(text)
            joined = [self._ids(f"{text} {word}") for _, word in words]
            system = self._opening(prompt)
        head = min(common(ids, prompt) for ids in joined)
        longest = max(len(ids) - head for ids in joined)
        kept = self._shortened(joined[0][:head], self.max_length - longest)
        pieces = tuple((label, tuple(ids[head:])) for (label, _), ids in zip(words, joined, strict=True))
        if any(not ids for _, ids in pieces):
            raise DataError("a word of the verbalizer has no token of its own", "Choose other words.")
        place = {"start": 0, "before-answer": len(kept)}.get(self.place, min(system, len(kept)))
        return Choices(tuple(kept), pieces, self.template.label_of(row), row.number, place)

    def prompt(self, row: Row) -> tuple[list[int], int]:
        """What stands before the answer, for generation, and the place of virtual tokens in it."""
        if self.chat is not None:
            return self.asked(self.turns(row, answered=False), row.where)
        ids = self._ids(self.template.prompt_of(row))
        return self._asked(ids, self._opening(ids))

    def asked(self, turns: Sequence[Turn], where: str = "the conversation") -> tuple[list[int], int]:
        """As `prompt`, for a conversation that ends before an answer. Raises: UsageError where there is no chat."""
        chat = self.chat or Chat(self.tokenizer, self.template.jinja)
        ids = chat.ids(turns, True, where)
        return self._asked(ids, chat.behind_system(turns, ids))

    def _asked(self, ids: list[int], system: int) -> tuple[list[int], int]:
        kept = self._shortened(ids, self.max_length)
        return kept, {"start": 0, "before-answer": len(kept)}.get(self.place, max(0, system - len(ids) + len(kept)))

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens before the answer."""
        return self.prompt(row)[0]

    # ---- words

    def _text(self, row: Row) -> str:
        value = row.values.get(self.template.answer)
        if not isinstance(value, str):
            raise DataError(f"{row.where}: column {self.template.answer!r} holds no text", "Give words.")
        return value

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the base's tokenizer has no end-of-text token", "Set eos_token in its folder.")
        return self.tokenizer.eos_token_id

    def _opening(self, ids: Sequence[int]) -> int:
        """Tokens that open every text."""
        opens = self.place == "after-system" and ids and ids[0] in (self.tokenizer.bos_token_id, _cls(self.tokenizer))
        return 1 if opens and ids[0] is not None else 0

    # ---- conversations

    def turns(self, row: Row, answered: bool = True) -> list[Turn]:
        """The row as a conversation, with its answer or up to it."""
        if self.template.kind == "messages":
            turns = turns_of(row.values.get(self.template.answer), row.where, self.template.answer)
            return turns[:-1] if not answered and turns[-1][0] == "assistant" else turns
        asked = ("user", self.template.prompt_of(row))
        return [asked, ("assistant", self.template.answer_of(row).strip())] if answered else [asked]

    def _conversation(self, row: Row, turns: list[Turn]) -> Example:
        assert self.chat is not None
        rendered = self.chat.render(turns, row.where, self._checked < CHECKED)
        self._checked += 1
        return self._fitted(rendered.ids, rendered.learned, row, self.chat.behind_system(turns, rendered.ids))

    # ---- length

    def _fitted(self, ids: list[int], learned: list[bool], row: Row, system: int) -> Example:
        """Cut tokens in front of the first learned one, so that the whole fits, and find the virtual tokens' place."""
        excess = len(ids) - self.max_length
        head = learned.index(True) if True in learned else len(ids)
        cut = 0
        if excess > 0 and head - excess >= 1:
            front = self._shortened(ids[:head], head - excess)
            cut, ids, learned, head = excess, front + ids[head:], [False] * len(front) + learned[head:], len(front)
        place = {"start": 0, "before-answer": head}.get(self.place, max(0, system - cut))
        return Example(tuple(ids), tuple(learned), row.number, cut, place)

    def _shortened(self, prompt: list[int], length: int) -> list[int]:
        """At most `length` tokens of a prompt: for a template, the end of the row's text goes and the words after it
        stay; else the beginning goes, but for a first token that always opens a text."""
        excess = len(prompt) - length
        if excess <= 0:
            return prompt
        if self.template.kind == "label" and self.chat is None:
            tail = self.template.prompt.rpartition("}")[2]
            behind = len(self._plain_ids(tail)) if tail else 0
            if len(prompt) - behind - excess > 0:
                return prompt[: len(prompt) - behind - excess] + prompt[len(prompt) - behind :]
        first = 1 if prompt[0] == self.tokenizer.bos_token_id else 0
        return prompt[:first] + prompt[first + excess :]


def _cls(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "cls_token_id", None)
