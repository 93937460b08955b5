"""Rows to token ids, with the tokens that bear loss; prompts are cut where they are too long, answers never."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import DataError, UsageError

from .table import Row
from .template import Template

__all__ = ["Choices", "Encoder", "Example", "Prepared"]


@dataclass(frozen=True)
class Example:
    """`ids` (n,), and for each of them whether it is learned; `sample` is the row's number in its table."""

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


@dataclass
class Prepared:
    """Examples, and what became of the rows: `counts` holds rows, cut, and those dropped by reason."""

    examples: list[Example]
    counts: Counter[str] = field(default_factory=Counter)


class Encoder:
    """Encodes rows of one template with one tokenizer, at most `max_length` tokens each."""

    def __init__(self, tokenizer: Any, template: Template, max_length: int) -> None:
        if tokenizer is None:
            raise UsageError("the base has no tokenizer", "Name a base folder that holds one.")
        if (template.chat or template.kind == "messages") and not getattr(tokenizer, "chat_template", None):
            raise UsageError("the base's tokenizer has no chat template", "Use prompt and completion columns.")
        if max_length < 2:
            raise UsageError(f"the maximal length is {max_length} tokens", "Give 2 or more.")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

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
            raise DataError(
                f"none of the {len(rows)} rows can be learned from", "Raise --max-length, check the columns."
            )
        return prepared

    def example(self, row: Row) -> Example:
        kind = self.template.kind
        if kind == "messages":
            return self._conversation(row)
        if kind == "text":
            ids = [*self._ids(self._text(row)), self._end()]
            return Example(tuple(ids[: self.max_length]), (True,) * min(len(ids), self.max_length), row.number)
        prompt = self._prompt(row)
        answer = self.template.answer_of(row)
        if self.template.chat:
            return self._conversation(row, [("user", self.template.prompt_of(row)), ("assistant", answer.strip())])
        ids = self._ids(prompt + answer)
        head = _common(ids, self._ids(prompt))
        if ids[-1] != self._end():
            ids.append(self._end())
        return self._fitted(ids, [n >= head for n in range(len(ids))], row)

    def choices(self, row: Row) -> Choices:
        """The row's prompt and every candidate word after it."""
        prompt = self._prompt(row)
        words = [(label, word) for label, listed in self.template.verbalizer.items() for word in listed]
        joined = [self._ids(f"{prompt} {word}") for _, word in words]
        head = min(_common(ids, self._ids(prompt)) for ids in joined)
        longest = max(len(ids) - head for ids in joined)
        kept = self._shortened(joined[0][:head], self.max_length - longest)
        pieces = tuple((label, tuple(ids[head:])) for (label, _), ids in zip(words, joined, strict=True))
        if any(not ids for _, ids in pieces):
            raise DataError("a word of the verbalizer has no token of its own", "Choose other words.")
        return Choices(tuple(kept), pieces, self.template.label_of(row), row.number)

    def prompt_ids(self, row: Row) -> list[int]:
        """What stands before the answer, for generation."""
        if self.template.kind == "messages":
            turns = self._turns(row)
            return self._rendered(turns[:-1] if turns[-1][0] == "assistant" else turns, True)
        if self.template.chat:
            return self._rendered([("user", self.template.prompt_of(row))], True)
        return self._shortened(self._ids(self._prompt(row)), self.max_length)

    # ---- words

    def _prompt(self, row: Row) -> str:
        return self.template.prompt_of(row)

    def _text(self, row: Row) -> str:
        value = row.values.get(self.template.answer)
        if not isinstance(value, str):
            raise DataError(f"{row.where}: column {self.template.answer!r} holds no text", "Give words.")
        return value

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the base's tokenizer has no end-of-text token", "Set eos_token in its folder.")
        return self.tokenizer.eos_token_id

    # ---- conversations

    def _turns(self, row: Row) -> list[tuple[str, str]]:
        """(role, content) of each message, in either of the usual layouts."""
        names = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
        turns = row.values.get(self.template.answer)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{row.where}: column {self.template.answer!r} holds no messages", "Give a list of them.")
        found = []
        for turn in turns:
            role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
            content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
            if not isinstance(role, str) or not isinstance(content, str):
                raise DataError(f"{row.where} holds a message without role and content", 'Give {"role", "content"}.')
            found.append((names.get(role, role), content))
        return found

    def _rendered(self, turns: Sequence[tuple[str, str]], opened: bool = False) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _conversation(self, row: Row, turns: list[tuple[str, str]] | None = None) -> Example:
        """Answers are found as what a rendering has beyond that of the turns before it."""
        turns = self._turns(row) if turns is None else turns
        ids = self._rendered(turns)
        learned = [False] * len(ids)
        for number, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            before, after = self._rendered(turns[:number], True), self._rendered(turns[: number + 1])
            if ids[: len(before)] != before or _common(ids, after) < len(after) - 1:
                raise DataError(
                    f"{row.where}: the chat template renders turn {number + 1} otherwise once others follow",
                    "Give one row for each answer, as prompt and completion.",
                )
            for place in range(len(before), min(len(after), len(ids))):
                learned[place] = True
        return self._fitted(ids, learned, row)

    # ---- length

    def _fitted(self, ids: list[int], learned: list[bool], row: Row) -> Example:
        """Cut tokens in front of the first learned one, so that the whole fits."""
        excess = len(ids) - self.max_length
        head = learned.index(True) if True in learned else len(ids)
        if excess <= 0 or head - excess < 1:
            return Example(tuple(ids), tuple(learned), row.number)
        front = self._shortened(ids[:head], head - excess)
        return Example(tuple(front + ids[head:]), (False,) * len(front) + tuple(learned[head:]), row.number, excess)

    def _shortened(self, prompt: list[int], length: int) -> list[int]:
        """At most `length` tokens of a prompt: for a template, the end of the row's text goes and the words after it
        stay; else the beginning goes, but for a first token that always opens a text."""
        excess = len(prompt) - length
        if excess <= 0:
            return prompt
        if self.template.kind == "label" and not self.template.chat:
            tail = self.template.prompt.rpartition("}")[2]
            behind = len(self.tokenizer(tail, add_special_tokens=False)["input_ids"]) if tail else 0
            if len(prompt) - behind - excess > 0:
                return prompt[: len(prompt) - behind - excess] + prompt[len(prompt) - behind :]
        first = 1 if prompt[0] == self.tokenizer.bos_token_id else 0
        return prompt[:first] + prompt[first + excess :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens a and b share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
