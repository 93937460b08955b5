"""One reader for each kind of file: a source's rows in their order, each with the line it starts on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any

from inlay.errors import DataError, UsageError

from .arrow import dataset_rows, parquet_rows
from .fields import kind_of
from .jsonlist import json_rows
from .sources import UNPACKING, Source, damaged, lines_of, misencoded

__all__ = ["SPLITS", "read"]

LONGEST_FIELD = 64 * 2**20
"""Characters in one field of a table; more is a broken file."""
SPLITS = ("paragraph", "line", "whole")
"""What is a row of a file of plain text."""

Values = tuple[int, dict[str, Any]]


def read(source: Source, split: str) -> Iterator[Values]:
    """Line (from 1) and values of each row; `split` says what is a row of plain text.

    Raises: DataError naming the file, and where it can the line, of bad content; UsageError where it cannot be opened.
    """
    readers: dict[str, Callable[[Source], Iterator[Values]]] = {
        "csv": _csv, "tsv": _csv, "jsonl": _jsonl, "json": json_rows, "parquet": parquet_rows,
        "dataset": dataset_rows, "text": {"paragraph": _paragraphs, "line": _lines, "whole": _whole}[split],
    }  # fmt: skip
    try:
        yield from readers[source.kind](source)
    except UnicodeDecodeError:
        raise misencoded(source) from None
    except UNPACKING:
        raise damaged(source) from None
    except OSError as error:
        raise UsageError(f"data file {source.name} cannot be read ({error.strerror or error})", "Check it.") from None


def _csv(source: Source) -> Iterator[Values]:
    lines = lines_of(source, "")
    head = next(lines, "")
    mark = "\t" if source.kind == "tsv" else max(",;\t", key=head.count)
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(_again(head, lines), delimiter=mark, strict=True)
    line, columns = 1, None
    try:
        for fields in reader:
            if columns is None:
                # An index that pandas wrote has no name, and neither has what stands behind a comma too many.
                columns = [name.strip() or f"column {n}" for n, name in enumerate(fields, 1)]
                if len(set(columns)) < len(columns):
                    raise DataError(f"{source.name}, line 1: column names are double", "Name each once.")
            elif fields:
                if len(fields) != len(columns):
                    what = f"{source.name}, line {line} has {len(fields)} fields where the header has {len(columns)}"
                    raise DataError(what, "Check its quotes and separators.")
                yield line, dict(zip(columns, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source.name}, line {line}: {error}", "Check its quotes.") from None


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _jsonl(source: Source) -> Iterator[Values]:
    for number, line in enumerate(lines_of(source), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source.name}, line {number} is not JSON ({error})", "Each line is one object.") from None
        except RecursionError:
            raise DataError(f"{source.name}, line {number} nests too deeply", "Each line is one flat object.") from None
        if not isinstance(value, dict):
            what = f"{source.name}, line {number} holds {kind_of(value)}"
            raise DataError(what, "Each line is one object; a file that is one list is called .json.")
        yield number, value


def _paragraphs(source: Source) -> Iterator[Values]:
    """Paragraphs, which blank lines part."""
    start, held = 1, []
    for number, line in enumerate(_again_blank(lines_of(source, None)), 1):
        if line.strip():
            start = number if not held else start
            held.append(line)
        elif held:
            yield start, {"text": "".join(held).rstrip("\n")}
            held = []


def _again_blank(lines: Iterator[str]) -> Iterator[str]:
    yield from lines
    yield ""


def _lines(source: Source) -> Iterator[Values]:
    for number, line in enumerate(lines_of(source, None), 1):
        if line.strip():
            yield number, {"text": line.rstrip("\n")}


def _whole(source: Source) -> Iterator[Values]:
    text = "".join(lines_of(source, None))
    if text.strip():
        yield 1, {"text": text.rstrip("\n")}
