"""Which class a label means, however its file writes it, and the words that stand for classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from inlay.errors import UsageError

from .fields import blank

__all__ = ["RARE", "classes", "label_key", "label_notices", "parse_verbalizer"]

RARE = 0.01
"""A label of a smaller share of the rows gets a notice."""
CASES = 3
"""Groups of labels that differ in case only which a notice names before it counts the rest."""
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")


def label_key(value: Any) -> str | None:
    """What two labels share if they mean the same class; None where there is no label. Raises: TypeError for lists,
    objects.

    A number is its shortest form, and text that is a number is that number: 1, 1.0, "1" and "1.0" are one class in
    every kind of file, 007 is a word. true and false are 1 and 0, also as text in any case, since a CSV file can
    only write the word; `classes` gives them their name. Whitespace around a label is none of it. Null, NaN and
    blank text are no label.
    """
    if type(value) is str:
        return _text_key(value)
    if blank(value):
        return None
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, (list, tuple, dict, set, bytes)):
        raise TypeError(f"{type(value).__name__} is no label")
    return _text_key(str(value))


@lru_cache(maxsize=4096)
def _text_key(text: str) -> str | None:
    text = text.strip()
    if NUMBER.fullmatch(text):
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    return {"true": "1", "false": "0", "": None}.get(text.lower(), text)


def classes(values: Iterable[Any]) -> list[str]:
    """The names of the classes in a column, sorted. 0 and 1 are called false and true where the column never says
    them as numbers. Raises: TypeError as `label_key` does.
    """
    found: set[str] = set()
    numbers = False
    for value in values:
        key = label_key(value)
        if key is not None:
            found.add(key)
            numbers = numbers or (key in ("0", "1") and not _truth(value))
    names = {"0": "false", "1": "true"} if not numbers else {}
    return sorted(names.get(key, key) for key in found)


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def parse_verbalizer(text: str) -> dict[str, list[str]]:
    """`0=negative,1=positive|great` to {"0": ["negative"], "1": ["positive", "great"]}. Raises: UsageError."""
    words: dict[str, list[str]] = {}
    seen: dict[str | None, str] = {}
    for entry in text.split(","):
        label, mark, listed = entry.partition("=")
        label, chosen = label.strip(), [word.strip() for word in listed.split("|") if word.strip()]
        if not mark or not chosen or not label:
            raise UsageError(f"verbalizer entry {entry!r} cannot be read", "Write 0=negative,1=positive|great.")
        if seen.setdefault(label_key(label), label) != label or label in words:
            raise UsageError(f"the verbalizer names the label {label!r} twice", "Write 1=positive|great.")
        words[label] = chosen
    return words


def label_notices(counts: Mapping[str, int]) -> list[str]:
    """What people should know of the labels in their rows, a sentence each; `counts` are the rows of each label.

    Named are: labels that differ in case only, a label that all rows have, labels of less than `RARE` of the rows.
    """
    there = {label: count for label, count in counts.items() if count}
    notices = _case_notices(there)
    if len(there) == 1:
        return [f"every row has the label {next(iter(there))!r}: there is nothing to tell apart"]
    whole = sum(there.values())
    rare = {label: count for label, count in there.items() if count < RARE * whole}
    said = [f"label {label!r} has {count} of {whole} rows: hardly enough to learn it" for label, count in rare.items()]
    return notices + said


def _case_notices(labels: Iterable[str]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.casefold(), []).append(label)
    groups = [" and ".join(map(repr, own)) for own in alike.values() if len(own) > 1]
    if not groups:
        return []
    more = f", and {len(groups) - CASES} more such groups" if len(groups) > CASES else ""
    listed = "; ".join(groups[:CASES]) + more
    return [f"labels that differ in case only are classes of their own: {listed}. Write each one way if they are one"]
