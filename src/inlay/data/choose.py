"""Which template fits a file's columns, and whether another file has the columns that a template needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay.errors import DataError, UsageError

from .fields import names_in, parsed
from .labels import classes
from .table import Table
from .template import Template

__all__ = ["LABEL", "SLOT", "TEXT", "Columns", "check_columns", "check_names", "choose_column", "choose_template"]

SLOT = "answer"
"""What stands for the answer in a template: {answer}."""
TEXT = ("text", "sentence", "review", "content", "input", "document")
LABEL = ("label", "labels", "sentiment", "class", "category", "target")
PROMPT = ("prompt", "question", "instruction", "input", "source")
COMPLETION = ("completion", "answer", "response", "output", "target")
MESSAGES = ("messages", "conversations")
MOST_LABELS = 100
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


def choose_template(
    table: Table, columns: Columns, template: str | None = None, verbalizer: Mapping[str, Sequence[str]] | None = None
) -> Template:
    """The template that fits the table's columns, or the one people gave (`chat` for the model's own chat template).

    {answer} in it is where the answer stands, unless a column of that name is there that is not the learned one:
    then it is that column, and the answer follows the prompt.
    Raises: UsageError naming the columns there are where nothing fits, and templates that show or lack the answer.
    """
    there = table.columns
    text, label = choose_column(there, columns.text, TEXT), choose_column(there, columns.label, LABEL)
    prompt = choose_column(there, columns.prompt, PROMPT)
    completion = choose_column(there, columns.completion, COMPLETION)
    messages = choose_column(there, columns.messages, MESSAGES)
    jinja = _jinja(template)
    chat = template == "chat" or jinja is not None
    given = None if template is None or chat else template.replace("\\n", "\n")
    if messages and not (columns.text or columns.prompt):
        return Template("messages", answer=messages, chat=True, jinja=jinja)
    if text and label and not (columns.prompt or columns.completion):
        words = dict(verbalizer) if verbalizer else _words_of(table, label)
        made = Template("label", given or f"Text: {{{text}}}\nLabel:", label, words, chat, jinja, text=text)
        return check_names(made, there)
    if prompt and completion and prompt != completion:
        return _completion(table, prompt, completion, given, (chat, jinja), columns.prompt is None)
    if (text and len(there) == 1) or columns.text:
        return Template("text", answer=text or "")
    listed = _listed(there)
    raise UsageError(
        f"the columns of {table.files[0]} ({listed}) are of no known kind",
        "Needed: text, label or prompt, completion or messages; name them with --columns text=NAME,label=NAME",
    )


def _completion(
    table: Table, prompt: str, completion: str, given: str | None, how: tuple[bool, str | None], guessed: bool
) -> Template:
    there, (chat, jinja) = table.columns, how
    if any(isinstance(table.rows[0].values.get(name), list) for name in (prompt, completion)):
        return check_names(Template("messages", f"{{{prompt}}}", completion, chat=True, jinja=jinja), there)
    if {"instruction", "output"} <= set(there) and given is None and guessed:
        long = ALPACA if "input" in there else ALPACA_SHORT
        if chat:
            long, short = "{instruction}\n\n{input}" if "input" in there else "{instruction}", "{instruction}"
            return Template("completion", long, "output", chat=True, jinja=jinja, short=short, text="instruction")
        return Template("completion", long, "output", short=ALPACA_SHORT, text="instruction")
    made = Template("completion", given or f"{{{prompt}}}", completion, chat=chat, jinja=jinja, text=prompt)
    return check_names(made, there)


def check_columns(template: Template, table: Table, answered: bool = True) -> None:
    """Raises: DataError naming the file and the column where the table lacks one that the template needs. Where rows
    need not be `answered`, the column that is learned may be missing.
    """
    names = names_in(template.short or template.prompt)
    if answered or not names:
        names |= names_in(template.after) | {template.answer}
    for name in sorted(names - {""}):
        if name not in table.columns:
            said = f"{', '.join(table.files)} has no column {name!r}, which the template needs"
            raise DataError(said, f"Its columns: {_listed(table.columns)}.")


def _listed(names: Sequence[str]) -> str:
    """The names on one line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names) or "none"


def _jinja(template: str | None) -> str | None:
    """The chat template in the file that was named, if one was."""
    if template is None or not template.endswith((".jinja", ".jinja2", ".j2")):
        return None
    try:
        return Path(template).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"chat template {template} cannot be read", "Name a text file.") from None


def choose_column(there: Sequence[str], named: str | None, usual: Sequence[str]) -> str | None:
    """The column that people `named`, or the first that has a usual name. Raises: UsageError."""
    if named is not None:
        if named not in there:
            raise UsageError(f"there is no column {named!r}", f"Columns: {_listed(there)}.")
        return named
    return next((name for wanted in usual for name in there if name.lower() == wanted), None)


def _words_of(table: Table, label: str) -> dict[str, list[str]]:
    """A verbalizer in which each label of the column stands for itself."""
    values = [row.values.get(label) for row in table.rows]
    try:
        found = classes(values)
    except TypeError:
        row = next(row for row in table.rows if isinstance(row.values.get(label), (list, tuple, dict, set, bytes)))
        kind = type(row.values[label]).__name__
        raise DataError(f"{row.where}: column {label!r}: a {kind} is no label", "Give words or numbers.") from None
    if len(found) > MOST_LABELS:
        raise UsageError(
            f"column {label!r} holds {len(found)} different labels", "Give a verbalizer, or other columns."
        )
    if not found:
        raise DataError(f"{table.files[0]}: no row has a label in column {label!r}", "Name another column.")
    return {name: [name] for name in found}


def check_names(template: Template, there: Sequence[str]) -> Template:
    """The template, cut at its slot. Raises: UsageError where it names other columns than those that are there."""
    listed = f"Columns: {_listed(there)}."
    try:
        pairs = parsed(template.prompt)
    except ValueError as error:
        raise UsageError(
            f"template {template.prompt!r} cannot be read ({error})", "Write {column} for a field."
        ) from None
    names = [name for _, name in pairs if name is not None]
    slots = [n for n, name in enumerate(names) if name == SLOT and (SLOT not in there or template.answer == SLOT)]
    if len(slots) > 1:
        raise UsageError("the template has more than one {answer}", "There is one answer: leave one.")
    if slots:
        template = replace(template, **_parts(pairs, slots[0]))
        names.remove(SLOT)
    if not names:
        raise UsageError(f"template {template.prompt!r} names no column", listed)
    for name in sorted(set(names)):
        if name not in there:
            close = difflib.get_close_matches(name, there, 1)
            hint = f" Did you mean {{{close[0]}}}?" if close else ""
            raise UsageError(f"the template names {name!r}", f"{listed}{hint} Only {{column}} stands for a field.")
    if template.answer in names:
        raise UsageError(
            f"the template shows the answer, column {template.answer!r}",
            "Take it out of the template; {answer} is the place of the answer.",
        )
    return template


def _parts(pairs: Sequence[tuple[str, str | None]], slot: int) -> dict[str, Any]:
    """The template before and behind its slot."""

    def written(some: Sequence[tuple[str, str | None]]) -> str:
        doubled = [(words.replace("{", "{{").replace("}", "}}"), name) for words, name in some]
        return "".join(words + ("" if name is None else f"{{{name}}}") for words, name in doubled)

    return {
        "prompt": written([*pairs[:slot], (pairs[slot][0], None)]),
        "after": written(pairs[slot + 1 :]),
        "slot": True,
    }
