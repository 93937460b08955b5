"""How rows are put to adapters: as they were trained to read, but for what people say besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from inlay.data.fields import names_in, parsed
from inlay.data.table import Table
from inlay.data.template import Columns, Template, check_columns, choose_template
from inlay.errors import DataError, UsageError

from .carried import Carried, carried

__all__ = ["adapted", "reading_of"]

Words = Mapping[str, Sequence[str]] | None


def reading_of(
    table: Table, folders: Sequence[Path], template: str | None = None, verbalizer: Words = None,
    columns: Mapping[str, str] | None = None, answered: bool = True,
) -> Carried:  # fmt: skip
    """How rows are read: as said here, else as the adapters were trained to, else as the table's columns suggest.
    Where they are not `answered`, no column of answers is needed.

    Raises: UsageError where what is said does not fit the adapters; DataError where the table lacks a column.
    """
    found, named = carried(folders), dict(columns or {})
    if found is None:
        found = Carried(choose_template(table, Columns(**named), template, verbalizer))
    else:
        found = replace(found, template=adapted(found.template, table, template, verbalizer, named, answered))
    try:
        check_columns(found.template, table, answered)
    except DataError as error:
        words, learned = KINDS.get(found.template.kind, ("", ""))
        if not words or not folders:
            raise
        remedy = f"{error.remedy} Say which: --columns {words}=NAME" + (f",{learned}=NAME." if answered else ".")
        raise DataError(error.what, remedy) from None
    return found


KINDS = {"label": ("text", "label"), "completion": ("prompt", "completion")}
"""What `--columns` calls the column of words and the learned one."""


def adapted(
    own: Template, table: Table, template: str | None, verbalizer: Words, columns: Mapping[str, str],
    answered: bool = True,
) -> Template:  # fmt: skip
    """An adapter's `own` template with other words, labels or names of columns, where people give some.

    Raises: UsageError where they do not fit it.
    """
    if template is not None:
        return _rewritten(own, table, template, verbalizer, dict(columns), answered)
    renamed = _renamed(own, columns)
    return renamed if verbalizer is None else _reworded(renamed, verbalizer)


def _rewritten(
    own: Template, table: Table, template: str, verbalizer: Words, named: dict[str, str], answered: bool
) -> Template:
    """A template of other words for the same kind of rows; the learned column need not be there."""
    if own.kind in KINDS:
        words, learned = KINDS[own.kind]
        for name in (own.text, *_only(template, table.columns)):
            if name in table.columns:
                named.setdefault(words, name)
        if not answered or own.answer in table.columns:
            named.setdefault(learned, own.answer)
        if not answered and named[learned] not in table.columns:
            table = replace(table, columns=(*table.columns, named[learned]))
    return choose_template(table, Columns(**named), template, verbalizer or own.verbalizer or None)


def _only(template: str, there: Sequence[str]) -> list[str]:
    """The column that a template names, where it is one alone."""
    with suppress(ValueError):  # who reads it next says what is wrong with it
        found = [name for name in names_in(template) if name in there]
        return found if len(found) == 1 else []
    return []


def _renamed(own: Template, named: Mapping[str, str]) -> Template:
    """The template over columns of other names."""
    names = names_in(own.prompt)
    words = own.text or (next(iter(names)) if len(names) == 1 else "")
    for kind, name in named.items():
        if kind in ("text", "prompt") and words and words != own.answer:
            texts = {part: _with(getattr(own, part), words, name) for part in ("prompt", "short", "after")}
            own = replace(own, **texts, text=name if own.text else "")
        elif kind in ("text", "prompt") and own.kind != "text":
            raise UsageError(f"--columns {kind}={name} has no place in the adapter's template", "Give --template.")
        else:
            own = replace(own, answer=name)
    return own


def _with(template: str, old: str, new: str) -> str:
    """The template with one of its columns called otherwise."""
    doubled = [(words.replace("{", "{{").replace("}", "}}"), name) for words, name in parsed(template)]
    named = [(words, new if name == old else name) for words, name in doubled]
    return "".join(words + ("" if name is None else f"{{{name}}}") for words, name in named)


def _reworded(own: Template, verbalizer: Mapping[str, Sequence[str]]) -> Template:
    if own.kind != "label":
        raise UsageError(f"the adapter was trained on {own.kind} rows, not on labels", "Leave --verbalizer out.")
    return replace(own, verbalizer=dict(verbalizer))
