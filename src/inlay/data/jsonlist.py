"""A .json file's list of rows, parsed item by item, so that neither the text nor the rows are in memory at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from inlay.errors import DataError

from .fields import kind_of
from .sources import Source, opened_text

__all__ = ["json_rows"]

BLOCK = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def json_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of `[{...}, ...]`, or of the only list in `{"name": [{...}, ...], ...}`. Raises: DataError."""
    with opened_text(source, None) as file:
        walk = _Walk(file)
        try:
            yield from _rows(walk, source)
            if walk.ahead():
                raise _Wrong("Extra data")
        except _Wrong as error:
            raise DataError(f"{source.name}, line {walk.line} is not JSON ({error})", "Check the file.") from None
        except RecursionError:
            raise DataError(f"{source.name}, line {walk.line} nests too deeply", "Give flat objects.") from None


def _rows(walk: _Walk, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    opening, lists = walk.ahead(), 0
    if opening == "[":
        yield from _items(walk, source)
        return
    if opening == "{":
        for _ in walk.members():
            if walk.ahead() != "[":
                walk.value()
                continue
            lists += 1
            if lists > 1:
                raise DataError(f"{source.name} holds several lists", "Give [{...}, ...].")
            yield from _items(walk, source)
    else:
        walk.value()
    if not lists:
        raise DataError(f"{source.name} holds no list of objects", "Give [{...}, ...].")


def _items(walk: _Walk, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in walk.items("]"):
        value = walk.value()
        if not isinstance(value, dict):
            what = f"{source.name}, line {line} holds {kind_of(value)}"
            raise DataError(what, "Each row is an object.")
        yield line, value


class _Wrong(ValueError):
    """What is not JSON, where the walk stands."""


class _Walk:
    """A place in a JSON text that is read in blocks; `line` is the line of that place."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0
        self._counted, self.line = 0, 1

    def _more(self) -> bool:
        """Read on; each time as much again as is there, so that a long value is not begun too often."""
        block = self._file.read(max(BLOCK, len(self._text) - self._at))
        self._text, self._at, self._counted = self._text[self._at :] + block, 0, self._counted - self._at
        if "\0" in block:
            raise _Wrong("a NUL byte")
        return bool(block)

    def ahead(self) -> str:
        """The next sign that is no space; the empty text at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._to(found.end() if found else self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _to(self, place: int) -> None:
        self.line += self._text.count("\n", self._at, place)
        self._at = place

    def take(self, signs: str) -> str:
        """Step over the next sign, which must be one of these."""
        found = self.ahead()
        if not found or found not in signs:
            raise _Wrong(f"Expecting {' or '.join(map(repr, signs))}")
        self._to(self._at + 1)
        return found

    def value(self) -> Any:
        self.ahead()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except ValueError as error:
                if not self._more():
                    raise _Wrong(getattr(error, "msg", str(error))) from None
                continue
            if end < len(self._text) or not self._more():  # a number could go on
                self._to(end)
                return value

    def items(self, closing: str) -> Iterator[int]:
        """Stands before each item of a list or an object, and yields its line; whoever asks takes the item."""
        self._to(self._at + 1)
        if self.ahead() == closing:
            self._to(self._at + 1)
            return
        while True:
            self.ahead()
            yield self.line
            if self.take("," + closing) == closing:
                return

    def members(self) -> Iterator[str]:
        """Stands before the value of each member of an object."""
        for _ in self.items("}"):
            if self.ahead() != '"':
                raise _Wrong("Expecting property name enclosed in double quotes")
            name = self.value()
            self.take(":")
            yield name
