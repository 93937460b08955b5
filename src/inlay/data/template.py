"""How a row becomes words: the kind of data, the template around its fields, the words for its labels."""

from __future__ import annotations

import string
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inlay.errors import DataError, UsageError

from .table import Row, Table

__all__ = ["Columns", "Template", "choose_template", "parse_verbalizer"]

TEXT = ("text", "sentence", "review", "content", "input", "document")
LABEL = ("label", "labels", "sentiment", "class", "category", "target")
PROMPT = ("prompt", "question", "instruction", "input", "source")
COMPLETION = ("completion", "answer", "response", "output", "target")
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_SHORT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts that the Stanford Alpaca data (Taori et al. 2023) is used with."""


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
    model's own chat template, or in `jinja`; `short` is the prompt of rows that lack what only `prompt` names.
    It travels with the adapter.
    """

    kind: str
    prompt: str = ""
    answer: str = ""
    verbalizer: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat: bool = False
    jinja: str | None = None
    short: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Template:
        return cls(**stored)

    def prompt_of(self, row: Row) -> str:
        """The words before the answer."""
        values = {name: "" if value is None else value for name, value in row.values.items()}
        prompt = self.prompt
        if self.short and not any(values.get(name) for name in names_in(prompt) - names_in(self.short)):
            prompt = self.short
        try:
            return prompt.format(**values)
        except (KeyError, IndexError) as error:
            raise DataError(f"{row.where} has no column {error}, which the template names", "Check it.") from None

    def content_of(self, row: Row) -> str:
        """What rows must not share across the held-out split: for labels the words to judge, else all words."""
        prompt = self.prompt_of(row)
        return prompt if self.kind == "label" else f"{prompt}\0{row.values.get(self.answer)}"

    def label_of(self, row: Row) -> str:
        """The row's label. Raises: DataError where the verbalizer has no words for it."""
        label = label_name(row.values.get(self.answer, ""), self.verbalizer)
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


def names_in(prompt: str) -> set[str]:
    """The columns that a format string names. Raises: ValueError where it cannot be read."""
    return {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}


def label_name(value: Any, known: Container[str] = ()) -> str:
    """A label as words: 1, 1.0, True and "1" are the same one where `known` does not tell them apart."""
    name = str(value).strip()
    if name in known or isinstance(value, str):
        return name
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return str(int(value)) if not isinstance(value, bool) or str(int(value)) in known else name
    return name


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
    jinja = _jinja(template)
    chat = template == "chat" or jinja is not None
    given = None if template is None or chat else template.replace("\\n", "\n")
    if messages and not (columns.text or columns.prompt):
        return Template("messages", answer=messages, chat=True, jinja=jinja)
    if text and label and not (columns.prompt or columns.completion):
        words = dict(verbalizer) if verbalizer else _words_of(table, label)
        return _checked(Template("label", given or f"Text: {{{text}}}\nLabel:", label, words, chat, jinja), there)
    if prompt and completion and prompt != completion:
        if {"instruction", "output"} <= set(there) and given is None and columns.prompt is None:
            long = ALPACA if "input" in there else ALPACA_SHORT
            if chat:
                long, short = "{instruction}\n\n{input}" if "input" in there else "{instruction}", "{instruction}"
                return Template("completion", long, "output", chat=True, jinja=jinja, short=short)
            return Template("completion", long, "output", short=ALPACA_SHORT)
        return _checked(Template("completion", given or f"{{{prompt}}}", completion, chat=chat, jinja=jinja), there)
    if (text and len(there) == 1) or columns.text:
        return Template("text", answer=text or "")
    listed = ", ".join(there) or "none"
    raise UsageError(
        f"the columns of {table.files[0]} ({listed}) are of no known kind",
        "Needed: text, label or prompt, completion or messages; name them with --columns text=NAME,label=NAME",
    )


def _jinja(template: str | None) -> str | None:
    """The chat template in the file that was named, if one was."""
    if template is None or not template.endswith((".jinja", ".jinja2", ".j2")):
        return None
    try:
        return Path(template).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"chat template {template} cannot be read", "Name a text file.") from None


def _pick(there: Sequence[str], named: str | None, usual: Sequence[str]) -> str | None:
    if named is not None:
        if named not in there:
            raise UsageError(f"there is no column {named!r}", f"Columns: {', '.join(there)}.")
        return named
    return next((name for wanted in usual for name in there if name.lower() == wanted), None)


def _words_of(table: Table, label: str) -> dict[str, list[str]]:
    """Each label stands for itself."""
    found = sorted({label_name(row.values.get(label, "")) for row in table.rows})
    if len(found) > 100:
        raise UsageError(
            f"column {label!r} holds {len(found)} different labels", "Give a verbalizer, or other columns."
        )
    return {name: [name] for name in found if name}


def _checked(template: Template, there: Sequence[str]) -> Template:
    try:
        names = names_in(template.prompt)
    except ValueError as error:
        raise UsageError(
            f"template {template.prompt!r} cannot be read ({error})", "Write {column} for a field."
        ) from None
    if not names:
        raise UsageError(f"template {template.prompt!r} names no column", f"Columns: {', '.join(there)}.")
    for name in sorted(names):
        if name not in there:
            raise UsageError(f"the template names {name!r}", f"Columns: {', '.join(there)}.")
    if template.answer in names:
        raise UsageError(f"the template shows the answer, column {template.answer!r}", "Take it out of the template.")
    return template
