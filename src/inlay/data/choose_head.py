"""The template of rows whose answer a head gives: which columns hold words and answers, and which labels there are."""

from __future__ import annotations

from collections.abc import Iterable

from inlay.errors import DataError, DroppedRow, UsageError

from .choose import LABEL, TEXT, Columns, check_names, choose_column
from .labels import classes
from .rows import Row
from .table import Table
from .targets import tags_of, words_of
from .template import Template

__all__ = ["TAGS", "WORDS", "head_template"]

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")
NUMBERS = (*LABEL, "score", "rating", "stars", "value", "y")


def head_template(table: Table, task: str, columns: Columns, template: str | None = None) -> Template:
    """The template of a table for the `task` classify, regress or tag; labels and tags are those of its rows, sorted.

    Raises: UsageError where the columns do not fit; DataError where no row has an answer, or one is none.
    """
    there = table.columns
    if task == "tag":
        return _tags(table, columns, template)
    if template == "chat" or (template or "").endswith((".jinja", ".jinja2", ".j2")):
        raise UsageError(f"chat templates are for writing, and the task is {task}", "Give a template of columns.")
    text = choose_column(there, columns.text or columns.prompt, TEXT)
    answers = LABEL if task == "classify" else NUMBERS
    label = choose_column(there, columns.label or columns.completion, answers)
    if text is None or label is None:
        missing = "text" if text is None else "label"
        listed = ", ".join(there)
        raise UsageError(
            f"the task is {task}, and no column of {table.files[0]} ({listed}) is known as the {missing}",
            f"Say --columns {missing}=NAME; answers in words need --task generate and a base that writes text.",
        )
    words = template.replace("\\n", "\n") if template is not None else "{" + text + "}"
    kind = "label" if task == "classify" else "number"
    verbalizer = _labels(table, label) if task == "classify" else {}
    return check_names(Template(kind, words, label, verbalizer, text=text, task=task), there)


def _labels(table: Table, label: str) -> dict[str, list[str]]:
    try:
        found = classes(row.values.get(label) for row in table.rows)
    except TypeError as error:
        raise DataError(f"{table.files[0]}, column {label!r}: a {error}", "Give words or numbers.") from None
    if not found:
        raise DataError(f"{table.files[0]}: no row has a label in column {label!r}", "Name another column.")
    return {name: [name] for name in found}


def _tags(table: Table, columns: Columns, template: str | None) -> Template:
    there = table.columns
    words, tags = choose_column(there, columns.text, WORDS), choose_column(there, columns.label, TAGS)
    if template is not None:
        raise UsageError("a template has no place around words that are tagged", "Leave --template out.")
    if words is None or tags is None:
        raise UsageError(
            f"the task tag needs columns of tokens and tags; {table.files[0]} has {', '.join(there)}",
            "Say --columns text=NAME,label=NAME.",
        )
    found = sorted({tag for row in table.rows for tag in _own_tags(row, words, tags)})
    if not found:
        raise DataError(f"{table.files[0]}: no row has tags in column {tags!r}", "Name another column.")
    return Template("tags", "{" + words + "}", tags, {tag: [tag] for tag in found}, text=words, task="tag")


def _own_tags(row: Row, words: str, tags: str) -> Iterable[str]:
    try:
        return tags_of(row, tags, len(words_of(row, words)))
    except DroppedRow:  # which is counted where rows are encoded
        return ()
