"""How a row becomes words: the kind of data, the template around its fields, the words for its labels."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inlay.errors import DataError, UsageError

from .table import Row, Table

__all__ = ["Columns", "Template", "choose_template", "parse_verbalizer"]

TEXT = ("text", "sentence", "review", "content", "input", "document")
LABEL = ("label", "labels", "sentiment", "class", "category", "target")
PROMPT = ("prompt", "question", "instruction", "input", "source")
COMPLETION = ("completion", "answer", "response", "output", "target")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that completes it.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Columns:
    """Column names that people give; None leaves the choice to the names that the file has."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None


@dataclass(frozen=True)
class Template:
    """`kind` is label, completion, messages or text. `prompt` is a format string over the columns; `answer` the column
    that is learned; `verbalizer` maps each label to the words that stand for it; `chat` wraps prompt and answer in the
    model's own chat template. It travels with the adapter.
    """

    kind: str
    prompt: str = ""
    answer: str = ""
    verbalizer: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Template:
        return cls(**stored)

    def prompt_of(self, row: Row) -> str:
        """The words before the answer."""
        values = {name: "" if value is None else value for name, value in row.values.items()}
        try:
            return self.prompt.format(**values)
        except (KeyError, IndexError) as error:
            raise DataError(f"{row.where} has no column {error}, which the template names", "Check it.") from None

    def content_of(self, row: Row) -> str:
        """What rows must not share across the held-out split: for labels the words to judge, else all words."""
        prompt = self.prompt_of(row)
        return prompt if self.kind == "label" else f"{prompt}\0{row.values.get(self.answer)}"

    def label_of(self, row: Row) -> str:
        """The row's label. Raises: DataError where the verbalizer has no words for it."""
        label = str(row.values.get(self.answer, "")).strip()
        if label not in self.verbalizer:
            known = ", ".join(map(repr, self.verbalizer))
            raise DataError(f"{row.where} has the label {label!r}", f"The verbalizer knows {known}.")
        return label

    def answer_of(self, row: Row) -> str:
        """The words to learn, with the space that parts them from the prompt where the prompt ends in none."""
        if self.kind == "label":
            return " " + self.verbalizer[self.label_of(row)][0]
        value = row.values.get(self.answer)
        if not isinstance(value, str):
            raise DataError(f"{row.where}: column {self.answer!r} holds no text", "Give words to learn.")
        return value


def parse_verbalizer(text: str) -> dict[str, list[str]]:
    """`0=negative,1=positive|great` to {"0": ["negative"], "1": ["positive", "great"]}."""
    words: dict[str, list[str]] = {}
    for entry in text.split(","):
        label, mark, listed = entry.partition("=")
        chosen = [word.strip() for word in listed.split("|") if word.strip()]
        if not mark or not chosen:
            raise UsageError(f"verbalizer entry {entry!r} cannot be read", "Write 0=negative,1=positive|great.")
        words[label.strip()] = chosen
    return words


def choose_template(
    table: Table, columns: Columns, template: str | None = None, verbalizer: Mapping[str, Sequence[str]] | None = None
) -> Template:
    """The template that fits the table's columns, or the one people gave (`chat` for the model's own chat template).

    Raises: UsageError naming the columns there are where nothing fits, and templates that show or lack the answer.
    """
    there = table.columns
    text, label = _pick(there, columns.text, TEXT), _pick(there, columns.label, LABEL)
    prompt, completion = _pick(there, columns.prompt, PROMPT), _pick(there, columns.completion, COMPLETION)
    messages = _pick(there, columns.messages, ("messages", "conversations"))
    chat, given = template == "chat", None if template in (None, "chat") else template.replace("\\n", "\n")
    if messages and not (columns.text or columns.prompt):
        return Template("messages", answer=messages, chat=True)
    if text and label and not (columns.prompt or columns.completion):
        words = dict(verbalizer) if verbalizer else _words_of(table, label)
        return _checked(Template("label", given or f"Text: {{{text}}}\nLabel:", label, words, chat), there)
    if prompt and completion and prompt != completion:
        if {"instruction", "input", "output"} <= set(there) and given is None:
            return Template("completion", ALPACA, "output", chat=chat)
        return _checked(Template("completion", given or f"{{{prompt}}}", completion, chat=chat), there)
    if (text and len(there) == 1) or columns.text:
        return Template("text", answer=text or "")
    listed = ", ".join(there) or "none"
    raise UsageError(
        f"the columns of {table.files[0]} ({listed}) are of no known kind",
        "Needed: text, label or prompt, completion or messages; name them with --columns text=NAME,label=NAME",
    )


def _pick(there: Sequence[str], named: str | None, usual: Sequence[str]) -> str | None:
    if named is not None:
        if named not in there:
            raise UsageError(f"there is no column {named!r}", f"Columns: {', '.join(there)}.")
        return named
    return next((name for wanted in usual for name in there if name.lower() == wanted), None)


def _words_of(table: Table, label: str) -> dict[str, list[str]]:
    """Each label stands for itself."""
    found = sorted({str(row.values.get(label, "")).strip() for row in table.rows})
    if len(found) > 100:
        raise UsageError(
            f"column {label!r} holds {len(found)} different labels", "Give a verbalizer, or other columns."
        )
    return {name: [name] for name in found if name}


def _checked(template: Template, there: Sequence[str]) -> Template:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template.prompt) if name is not None]
    except ValueError as error:
        raise UsageError(
            f"template {template.prompt!r} cannot be read ({error})", "Write {column} for a field."
        ) from None
    if not names:
        raise UsageError(f"template {template.prompt!r} names no column", f"Columns: {', '.join(there)}.")
    for name in names:
        if name not in there:
            raise UsageError(f"the template names {name!r}", f"Columns: {', '.join(there)}.")
    if template.answer in names:
        raise UsageError(f"the template shows the answer, column {template.answer!r}", "Take it out of the template.")
    return template
