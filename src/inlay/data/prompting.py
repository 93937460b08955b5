"""How rows become prompts for trained adapters: as in their training, but for what people say besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay.errors import DataError, FormatError, InlayError, UsageError
from inlay.formats.notes import NOTES, Notes, read_notes

from .choose import Columns, check_columns, check_names, choose_template
from .fields import names_in, parsed
from .places import PLACES
from .rows import Row
from .table import Table
from .template import Template

__all__ = ["Prompting", "adapted_template", "joined", "noted", "prompt_row", "prompting_for", "prompting_of"]

Verbalizer = Mapping[str, Sequence[str]] | None

COLUMN_FLAGS = {
    "label": ("text", "label"),
    "completion": ("prompt", "completion"),
    "number": ("text", "label"),
    "tags": ("text", "label"),
}
"""By a template's kind: what `--columns` calls the column of the words, and that of the answers."""


@dataclass(frozen=True)
class Prompting:
    """What an adapter's training did to each row: the template, the most tokens of a row, and the place of virtual
    tokens (one of `PLACES`).
    """

    template: Template
    max_length: int = 512
    virtual_at: str = "start"


def prompting_of(folders: Sequence[str | Path]) -> Prompting | None:
    """The prompting that the adapters in `folders` were trained with, with the least of their lengths; None where no
    adapter notes one.

    Raises: UsageError where templates or places differ; FormatError where an adapter's note is broken.
    """
    return joined([noted(read_notes(folder), folder) for folder in folders])


def joined(promptings: Sequence[Prompting | None]) -> Prompting | None:
    """The prompting of several adapters at once, as in `prompting_of`. Raises: UsageError."""
    found = [one for one in promptings if one is not None]
    if not found:
        return None
    if any(one.template != found[0].template for one in found):
        raise UsageError("the adapters were trained with different templates", "Use one at a time.")
    if any(one.virtual_at != found[0].virtual_at for one in found):
        raise UsageError("the adapters were trained with virtual tokens at different places", "Use one at a time.")
    return replace(found[0], max_length=min(one.max_length for one in found))


def prompting_for(
    table: Table, folders: Sequence[Path], template: str | None = None, verbalizer: Verbalizer = None,
    columns: Mapping[str, str] | None = None, answered: bool = True,
) -> Prompting:  # fmt: skip
    """The prompting for the rows of `table`: what is said here, else that of the adapters in `folders`, else what the
    table's columns suggest. Where rows need not be `answered`, the column of the answers may be missing.

    Raises: UsageError where what is said does not fit the adapters; DataError where the table lacks a column.
    """
    found, named = prompting_of(folders), dict(columns or {})
    if found is None:
        found = Prompting(choose_template(table, Columns(**named), template, verbalizer))
    else:
        own = adapted_template(found.template, table, template, verbalizer, named, answered)
        found = replace(found, template=own)
    try:
        check_columns(found.template, table, answered)
    except DataError as error:
        words, answers = COLUMN_FLAGS.get(found.template.kind, ("", ""))
        if not words or not folders:
            raise
        remedy = f"{error.remedy} Say which: --columns {words}=NAME" + (f",{answers}=NAME." if answered else ".")
        raise DataError(error.what, remedy) from None
    return found


def prompt_row(template: Template, words: str, where: str = "--prompt") -> Row:
    """A row whose first column in the template's prompt holds `words`; the rest are empty. Errors call it `where`."""
    if template.kind == "text":
        return Row({template.answer: words}, 0, where, 1)
    names = sorted(names_in(template.prompt), key=lambda name: template.prompt.index("{" + name + "}"))
    values: dict[str, Any] = {name: "" for name in names} | ({names[0]: words} if names else {})
    return Row(values, 0, where, 1)


def adapted_template(
    own: Template, table: Table, template: str | None, verbalizer: Verbalizer, columns: Mapping[str, str],
    answered: bool = True,
) -> Template:  # fmt: skip
    """An adapter's `own` template with other words, labels or names of columns, where people give some.

    Raises: UsageError where they do not fit it.
    """
    if own.task != "generate" and (verbalizer is not None or template == "chat"):
        said = "a chat template" if verbalizer is None else "a verbalizer"
        raise UsageError(f"{said} is for answers in words, and the adapter's task is {own.task}", "Leave it out.")
    if own.task != "generate" and template is not None:
        return check_names(replace(_with_columns(own, columns), prompt=template.replace("\\n", "\n")), table.columns)
    if template is not None:
        return _rewritten(own, table, template, verbalizer, dict(columns), answered)
    renamed = _with_columns(own, columns)
    return renamed if verbalizer is None else _with_verbalizer(renamed, verbalizer)


def noted(notes: Notes, folder: str | Path) -> Prompting | None:
    """The prompting in the notes of a folder's adapter; None where they name no template. Raises: FormatError."""
    path = Path(folder) / NOTES
    if not notes.template:
        return None
    if notes.virtual_tokens_at not in PLACES:
        raise FormatError(f"{path}: virtual_tokens_at is {notes.virtual_tokens_at!r}", "Save it again.")
    try:
        template = Template.from_dict(notes.template)
    except (InlayError, TypeError) as error:
        why = error.what if isinstance(error, InlayError) else str(error)
        raise FormatError(f"{path}: {why}", "Save the adapter again, or remove the file.") from None
    if template.kind in ("label", "tags") and not template.verbalizer:
        raise FormatError(f"{path}: the template names no labels", "Save the adapter again.")
    return Prompting(template, notes.max_length, notes.virtual_tokens_at)


def _rewritten(
    own: Template, table: Table, template: str, verbalizer: Verbalizer, named: dict[str, str], answered: bool
) -> Template:
    """The template people gave, for rows of the adapter's kind; the column of the answers need not be there."""
    if own.kind in COLUMN_FLAGS:
        words, answers = COLUMN_FLAGS[own.kind]
        for name in (own.text, *_only_column(template, table.columns)):
            if name in table.columns:
                named.setdefault(words, name)
        if not answered or own.answer in table.columns:
            named.setdefault(answers, own.answer)
        if not answered and named[answers] not in table.columns:
            table = replace(table, columns=(*table.columns, named[answers]))
    return choose_template(table, Columns(**named), template, verbalizer or own.verbalizer or None)


def _only_column(template: str, columns: Sequence[str]) -> list[str]:
    """The one column that a template names; [] where it names none or several."""
    with suppress(ValueError):  # choose_template says what is wrong with it
        found = [name for name in names_in(template) if name in columns]
        return found if len(found) == 1 else []
    return []


def _with_columns(own: Template, named: Mapping[str, str]) -> Template:
    """The template over columns of other names, as `--columns` gives them."""
    names = names_in(own.prompt)
    words = own.text or (next(iter(names)) if len(names) == 1 else "")
    for kind, name in named.items():
        if kind in ("text", "prompt") and words and words != own.answer:
            texts = {part: _with_field(getattr(own, part), words, name) for part in ("prompt", "short", "after")}
            own = replace(own, **texts, text=name if own.text else "")
        elif kind in ("text", "prompt") and own.kind != "text":
            raise UsageError(f"--columns {kind}={name} has no place in the adapter's template", "Give --template.")
        else:
            own = replace(own, answer=name)
    return own


def _with_field(template: str, old: str, new: str) -> str:
    """The template with its field `old` called `new`."""
    doubled = [(words.replace("{", "{{").replace("}", "}}"), name) for words, name in parsed(template)]
    named = [(words, new if name == old else name) for words, name in doubled]
    return "".join(words + ("" if name is None else f"{{{name}}}") for words, name in named)


def _with_verbalizer(own: Template, verbalizer: Mapping[str, Sequence[str]]) -> Template:
    if own.kind != "label":
        raise UsageError(f"the adapter was trained on {own.kind} rows, not on labels", "Leave --verbalizer out.")
    return replace(own, verbalizer=dict(verbalizer))
