"""Reads data files of any common kind into rows that remember where they stood."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import DataError, UsageError

from .readers import SPLITS, read
from .rows import Row, Rows, Store, duplicates, shuffled
from .sources import STDIN, Source, source_of

__all__ = ["Row", "Rows", "Table", "duplicates", "read_table", "shuffled"]

FEW_LINES = 4
"""Lines from which a text without a blank one is rather a list of them."""


@dataclass(frozen=True)
class Table:
    """`columns` in the order they appear in; `notices` says, in sentences, what people may not have meant."""

    columns: tuple[str, ...]
    rows: Rows
    files: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the content."""
        return hashlib.sha256(self.rows.digests.tobytes()).hexdigest()[:16]


def read_table(paths: str | Path | Sequence[str | Path], split: str = "paragraph") -> Table:
    """Rows of one or several files: .csv, .tsv, .jsonl, .json, .parquet, .txt, .md, those of text also as .gz, a folder
    that `datasets` saved, or `-` for standard input. Of plain text a row is a `split`: paragraph, line or whole.

    Raises: UsageError for a path that is missing or of unknown kind; DataError naming the file and line of bad content;
    InlayError where the cache, which holds the rows, has no room.
    """
    if split not in SPLITS:
        raise UsageError(f"text cannot be split by {split!r}", f"Choose {', '.join(SPLITS)}.")
    sources = _sources([paths] if isinstance(paths, (str, Path)) else list(paths))
    store, notices = Store(), []
    columns: dict[str, None] | None = None
    for source in sources:
        own = _stored(source, split, store)
        if columns is not None and columns.keys() != own.keys():
            what = f"the columns of {source.name} ({', '.join(own)}) are not those of {sources[0].name}"
            raise DataError(f"{what} ({', '.join(columns)})", "Give files with the same columns.")
        columns = columns or own
    rows = store.rows()
    if split == "paragraph" and (notice := _one_row(sources, rows)):
        notices.append(notice)
    return Table(tuple(columns or ()), rows, tuple(source.name for source in sources), tuple(notices))


def _sources(paths: Sequence[str | Path]) -> list[Source]:
    if not paths:
        raise UsageError("no data file is named", "Name one.")
    sources: dict[str, Source] = {}
    for path in paths:
        if str(path) in sources:
            raise UsageError(f"data file {path} is named twice", "Name each file once.")
        source = source_of(path)
        place = STDIN if source.held is not None else os.path.realpath(source.path)
        if place in sources:
            raise UsageError(f"data file {path} is named twice", "Name each file once.")
        sources[place] = source
    return list(sources.values())


def _stored(source: Source, split: str, store: Store) -> dict[str, None]:
    """Put a source's rows into the store; the columns that they have."""
    own: dict[str, None] = {}
    known, begun = own.keys(), len(store)
    for line, values in read(source, split):
        if not values.keys() <= known:
            own.update(dict.fromkeys(values))
        store.add(values, source.name, line)
    if len(store) == begun:
        raise DataError(f"{source.name} holds no rows", "Give a file with at least one.")
    return own


def _one_row(sources: Sequence[Source], rows: Rows) -> str:
    """What to say where a .txt without blank lines became one row."""
    if len(sources) != 1 or sources[0].path.name.lower().removesuffix(".gz")[-4:] != ".txt" or len(rows) != 1:
        return ""
    lines = rows[0].values["text"].count("\n") + 1
    return f"{sources[0].name} is one row of {lines} lines: --split line takes each line" if lines >= FEW_LINES else ""
