"""The template language: words with {column} in them, and how a column's value becomes words.

`{name}` stands for a column of exactly that name, whatever signs it holds (dots, brackets, colons, spaces); `{{` and
`}}` are braces. There is nothing else, and a row's own words are never read as a template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from inlay.errors import DataError

__all__ = ["blank", "kind_of", "missing", "names_in", "parsed", "rendered", "tail_of"]


@lru_cache(maxsize=256)
def parsed(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of words and the column behind them; the last has None. Raises: ValueError saying which brace is wrong."""
    pairs: list[tuple[str, str | None]] = []
    words, at = "", 0
    while at < len(template):
        sign = template[at]
        if sign in "{}" and template[at : at + 2] == 2 * sign:
            words, at = words + sign, at + 2
        elif sign == "{":
            end = _closing(template, at)
            pairs.append((words, template[at + 1 : end]))
            words, at = "", end + 1
        elif sign == "}":
            raise ValueError(f"the }} at character {at + 1} closes nothing; write }}}} for a brace")
        else:
            words, at = words + sign, at + 1
    return (*pairs, (words, None))


def _closing(template: str, start: int) -> int:
    """Where the brace at `start` is closed."""
    depth = 0
    for at in range(start, len(template)):
        depth += (template[at] == "{") - (template[at] == "}")
        if not depth:
            if at == start + 1:
                raise ValueError(f"the {{}} at character {start + 1} names no column")
            return at
    raise ValueError(f"the {{ at character {start + 1} is never closed; write {{{{ for a brace")


def names_in(template: str) -> set[str]:
    """The columns that a template names. Raises: ValueError where it cannot be read."""
    return {name for _, name in parsed(template) if name is not None}


def tail_of(template: str) -> str:
    """The words behind the template's last column."""
    return parsed(template)[-1][0]


def missing(value: Any) -> bool:
    """Whether a value is null: None, or not a number."""
    return value is None or (isinstance(value, float) and value != value)


def blank(value: Any) -> bool:
    """Whether a value is null or holds nothing but whitespace."""
    return not value.strip() if isinstance(value, str) else missing(value)


def rendered(template: str, values: Mapping[str, Any], where: str, texts: frozenset[str] = frozenset()) -> str:
    """The template's words with a row's values in them: nulls are no words, numbers and dates are written out.

    Raises: DataError naming `where` for a column that the row lacks, for a number in a column of `texts`, and for
    what no column of words holds.
    """
    found = []
    for words, name in parsed(template):
        found.append(words)
        if name is None:
            break
        try:
            value = values[name]
        except KeyError:
            raise DataError(f"{where}: the row has no column {name!r}", "The template names it.") from None
        found.append(value if type(value) is str else _written(value, name, where, name in texts))
    return "".join(found)


def _written(value: Any, name: str, where: str, text: bool) -> str:
    if isinstance(value, str):
        return value
    if missing(value):
        return ""
    if text or isinstance(value, (list, tuple, dict, set, bytes)):
        raise DataError(f"{where}: column {name!r} holds {kind_of(value)}, no text", "Give words.")
    return str(value)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    kinds: dict[Any, str] = {
        type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list",
        dict: "an object", bytes: "bytes",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")
