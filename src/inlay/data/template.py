"""How a row becomes words: the kind of data, the template around its fields, the words for its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from inlay.errors import DataError, DroppedRow, FormatError

from .fields import blank, missing, names_in, parsed, rendered
from .joins import parting
from .labels import label_key
from .table import Row
from .tasks import TASKS

__all__ = ["KINDS", "Template"]

KINDS = ("label", "completion", "messages", "text", "number", "tags")


@dataclass(frozen=True)
class Template:
    """`kind` is label, completion, messages, text, number or tags. `task` is generate where the model writes the
    answer, else what a head does: classify labels, regress numbers or tag words. `prompt` is a template over the
    columns, up to the answer (see `fields`); `answer` the column that is learned; `verbalizer` maps each label to the
    words that stand for it; `chat` wraps prompt and answer in the model's own chat template, or in `jinja`; `short` is
    the prompt of rows that lack what only `prompt` names. With `slot` the template says where the answer stands, and
    `after` is what follows it, which is learned and scored as well; without, the answer follows the prompt. `text` is
    the column that holds the words themselves, where a number would be a mistake. Rows of kind messages may have their
    first turns in the column that `prompt` names. It travels with the adapter.
    """

    kind: str
    prompt: str = ""
    answer: str = ""
    verbalizer: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat: bool = False
    jinja: str | None = None
    short: str = ""
    slot: bool = False
    after: str = ""
    text: str = ""
    task: str = "generate"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Template:
        """The template that `to_dict` wrote, now or in an earlier version. Raises: FormatError naming what is wrong."""
        known = {f.name for f in fields(cls)}
        if not isinstance(stored, Mapping) or "kind" not in stored or not set(stored) <= known:
            odd = sorted(set(map(str, stored)) - known) if isinstance(stored, Mapping) else []
            raise FormatError(
                f"the template is not known here ({', '.join(odd) or 'it names no kind'})", "Give --template."
            )
        for name, value in stored.items():
            if not _fits(name, value):
                raise FormatError(f"the template's {name} is {str(value)[:40]!r}", "Give --template.")
        return cls(**stored)

    def prompt_of(self, row: Row) -> str:
        """The words before the answer. Raises: DroppedRow where the row's text is null; DataError as `rendered`
        does.
        """
        prompt, values = self.prompt, row.values
        if self.short and all(blank(values.get(name)) for name in names_in(prompt) - names_in(self.short)):
            prompt = self.short
        words = rendered(prompt, values, row.where, self._texts)
        if self._texts and all(missing(values.get(name)) for name in self._texts):
            raise DroppedRow(row.where, "no text")
        return words

    @cached_property
    def _texts(self) -> frozenset[str]:
        names = self._names
        return frozenset({self.text} & names if self.text else names if len(names) == 1 else ())

    @cached_property
    def _names(self) -> set[str]:
        """The columns around the answer, on either side of it."""
        return names_in(self.prompt) | names_in(self.after)

    def wordless(self, row: Row) -> bool:
        """Whether the columns around the answer hold nothing but whitespace."""
        return all(blank(row.values.get(name)) for name in self._texts or self._names)

    def content_of(self, row: Row) -> str:
        """What rows must not share across the held-out split: for labels the words to judge, else all words."""
        if self.kind == "number":
            return self.prompt_of(row)
        if self.kind == "label":
            return self.prompt_of(row) + (f"\0{self.after_of(row)}" if names_in(self.after) else "")
        if self.kind == "completion" and not self.chat:
            return f"{self.prompt_of(row)}\0{row.values.get(self.answer)}"
        parts = [row.values.get(name) for name in (*sorted(names_in(self.prompt)), self.answer)]
        return json.dumps(parts, sort_keys=True, default=str)

    def label_of(self, row: Row) -> str:
        """The row's label, as the verbalizer calls it.

        Raises: DroppedRow where there is none; DataError where the verbalizer has no words for it, or it is no label.
        """
        try:
            value = row.values[self.answer]
        except KeyError:
            raise DataError(f"{row.where}: the row has no column {self.answer!r}", "It holds the labels.") from None
        if type(value) is str and value in self.verbalizer:
            return value
        try:
            key = label_key(value)
        except TypeError as error:
            raise DataError(f"{row.where}: column {self.answer!r}: a {error}", "Give words or numbers.") from None
        if key is None:
            raise DroppedRow(row.where, "no label")
        if key not in self._labels:
            known = ", ".join(map(repr, self.verbalizer))
            raise DataError(f"{row.where} has the label {str(value)!r}", f"The verbalizer knows {known}.")
        return self._labels[key]

    @cached_property
    def _labels(self) -> dict[str | None, str]:
        return {label_key(label): label for label in reversed(list(self.verbalizer))}

    def answer_of(self, row: Row, prompt: str | None = None) -> str:
        """The words to learn, with the space that parts them from the prompt where the answer just follows it.

        `prompt` saves finding the row's prompt again. Raises: DroppedRow where there are none, DataError.
        """
        if self.kind == "label":
            word = self.verbalizer[self.label_of(row)][0]
            return self._parting(row, prompt) + word
        if self.answer not in row.values:
            raise DataError(f"{row.where}: the row has no column {self.answer!r}", "It holds the answers.")
        value = row.values[self.answer]
        if blank(value):
            raise DroppedRow(
                row.where, "both sides empty" if self.kind == "completion" and self.wordless(row) else "no answer"
            )
        if not isinstance(value, str):
            raise DataError(f"{row.where}: column {self.answer!r} holds no text", "Give words to learn.")
        return value

    def after_of(self, row: Row) -> str:
        """The words behind the answer, learned with it."""
        return rendered(self.after, row.values, row.where, self._texts) if self.after else ""

    def candidates(self, row: Row, prompt: str | None = None) -> list[tuple[str, str]]:
        """Each label with each of its words, as they stand behind the prompt: with the space before and what
        follows.
        """
        before, after = self._parting(row, prompt), self.after_of(row)
        return [(label, f"{before}{word}{after}") for label, listed in self.verbalizer.items() for word in listed]

    def ending(self, word: str, prompt: str) -> str:
        """`word` as it stands behind the words `prompt`, for a template whose end names no column."""
        return ("" if self.slot or self.chat else parting(prompt)) + word + rendered(self.after, {}, "the template")

    def _parting(self, row: Row, prompt: str | None) -> str:
        if self.slot or self.chat:
            return ""
        return parting(self.prompt_of(row) if prompt is None else prompt)

    @property
    def authored(self) -> str:
        """All words that whoever made the template wrote, none of a row's."""
        said = [words for one in (self.prompt, self.short, self.after) for words, _ in parsed(one)]
        return "\0".join([*said, *(word for listed in self.verbalizer.values() for word in listed)])


def _fits(name: str, value: Any) -> bool:
    if name == "verbalizer":
        lists = value.values() if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else [None]
        return all(isinstance(one, (list, tuple)) and one and all(isinstance(w, str) for w in one) for one in lists)
    if name in ("chat", "slot"):
        return isinstance(value, bool)
    if name == "jinja":
        return value is None or isinstance(value, str)
    if name in ("prompt", "short", "after") and isinstance(value, str):
        try:
            parsed(value)
        except ValueError:
            return False
    known = {"kind": KINDS, "task": TASKS}.get(name)
    return isinstance(value, str) and (known is None or value in known)
