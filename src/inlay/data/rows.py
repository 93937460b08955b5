"""Rows of data: on disk as they were read, parsed when they are asked for, seen through views."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from inlay.errors import DataError

from .mapped import Growing

__all__ = ["Row", "Rows", "Store", "as_rows", "duplicates", "shuffled"]

DEEPEST = 100
"""Levels of lists and objects in a row: far more than data has, far less than parsers bear."""
CHUNK_ROWS = 4096
CHUNK_BYTES = 2**20
"""Rows are parsed in chunks of at most so many of them, and so many bytes unless one alone has more."""
PENDING = 2**18
"""Bytes of records that wait to be stored together."""

_record = json.JSONEncoder().encode
_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def _digest(values: dict[str, Any]) -> bytes:
    return hashlib.blake2b(_canonical(values).encode("ascii"), digest_size=16).digest()


@dataclass(frozen=True)
class Row:
    """One record: its values by column, its number in the table, and the file and line it starts on."""

    values: dict[str, Any]
    number: int
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def digest(self) -> bytes:
        """16 bytes, equal for rows of equal content."""
        return _digest(self.values)


class Source(Protocol):
    """Where rows come from. For the rows at `index` (n,): their digests V16, numbers int64 and rough sizes in bytes."""

    def __len__(self) -> int: ...
    def digests(self, index: np.ndarray) -> np.ndarray: ...
    def numbers(self, index: np.ndarray) -> np.ndarray: ...
    def sizes(self, index: np.ndarray) -> np.ndarray: ...
    def fetch(self, index: np.ndarray) -> list[Row]: ...


class Store:
    """Rows as JSON in a memory-mapped array, their numbers being their places; `add` them all, then take `rows`."""

    def __init__(self) -> None:
        self._records, self._ends = Growing("u1"), Growing("i8")
        self._lines, self._digests = Growing("i8"), Growing("V16")
        self._files: list[str] = []
        self._firsts: list[int] = []
        self._pending: list[tuple[str, int, bytes]] = []
        self._waiting, self._count = 0, 0

    def __len__(self) -> int:
        return self._count

    def add(self, values: dict[str, Any], file: str, line: int) -> None:
        """Append a row. Raises: DataError where it nests too deeply; InlayError where the disk is full."""
        try:
            record = _record(values)
            if record.count("[") + record.count("{") > DEEPEST and _depth(values) > DEEPEST:
                raise RecursionError
            digest = _digest(values)
        except RecursionError:
            raise DataError(f"{file}, line {line} nests too deeply", "Each row is one flat object.") from None
        if not self._files or self._files[-1] != file:
            self._files.append(file)
            self._firsts.append(self._count)
        self._pending.append((record, line, digest))
        self._count += 1
        self._waiting += len(record)
        if self._waiting > PENDING or len(self._pending) >= CHUNK_ROWS:
            self._keep()

    def _keep(self) -> None:
        if not self._pending:
            return
        records, lines, digests = zip(*self._pending, strict=True)
        before = len(self._records)
        sizes = np.fromiter(map(len, records), np.int64, len(records))
        self._ends.add(before + np.cumsum(sizes + 1))
        self._records.add((",".join(records) + ",").encode("ascii"))
        self._lines.add(np.array(lines, np.int64))
        self._digests.add(b"".join(digests))
        self._pending, self._waiting = [], 0

    def rows(self) -> Rows:
        """All that was added, in order. Nothing can be added any more."""
        self._keep()
        arrays = self._ends.done(), self._lines.done(), self._digests.done()
        return Rows(_Stored(self._records.buffer(), *arrays, self._files, self._firsts))


class _Stored:
    """What a `Store` holds in the end; record i ends, with its comma, at `ends[i]`."""

    def __init__(
        self, buffer: bytes | mmap.mmap, ends: np.ndarray, lines: np.ndarray, digests: np.ndarray,
        files: list[str], firsts: list[int],
    ) -> None:  # fmt: skip
        self._buffer, self._ends, self._lines, self._digests = buffer, ends, lines, digests
        self._files, self._firsts = files, np.array(firsts, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def digests(self, index: np.ndarray) -> np.ndarray:
        return self._digests[index]

    def numbers(self, index: np.ndarray) -> np.ndarray:
        return index.astype(np.int64)

    def sizes(self, index: np.ndarray) -> np.ndarray:
        return self._ends[index] - self._starts(index)

    def _starts(self, index: np.ndarray) -> np.ndarray:
        return np.where(index > 0, self._ends[index - 1], 0)

    def fetch(self, index: np.ndarray) -> list[Row]:
        starts, ends = self._starts(index), self._ends[index]
        if np.array_equal(starts[1:], ends[:-1]):
            text = self._buffer[int(starts[0]) : int(ends[-1])]
        else:
            text = b"".join([self._buffer[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        values = json.loads(f"[{text[:-1].decode('ascii')}]")
        files = [self._files[n] for n in (np.searchsorted(self._firsts, index, "right") - 1).tolist()]
        return list(map(Row, values, index.tolist(), files, self._lines[index].tolist()))


class _Held:
    """Rows that somebody made in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def digests(self, index: np.ndarray) -> np.ndarray:
        return np.array([row.digest for row in self.fetch(index)], "V16")

    def numbers(self, index: np.ndarray) -> np.ndarray:
        return np.array([row.number for row in self.fetch(index)], np.int64)

    def sizes(self, index: np.ndarray) -> np.ndarray:
        texts = ([v for v in row.values.values() if isinstance(v, str)] for row in self.fetch(index))
        return np.array([sum(map(len, own)) for own in texts], np.int64)

    def fetch(self, index: np.ndarray) -> list[Row]:
        return [self._rows[n] for n in index.tolist()]


class Rows(Sequence[Row]):
    """Some rows of a source in some order. Items are parsed when they are asked for; slices and `take` are views."""

    def __init__(self, source: Source, index: np.ndarray | None = None) -> None:
        self._source = source
        small = np.int32 if len(source) < 2**31 else np.int64
        self._index = np.arange(len(source), dtype=small) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> Row: ...
    @overload
    def __getitem__(self, item: slice) -> Rows: ...
    def __getitem__(self, item: int | slice) -> Row | Rows:
        if isinstance(item, slice):
            return Rows(self._source, self._index[item])
        place = range(len(self))[item]
        return self._source.fetch(self._index[place : place + 1])[0]

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks():
            yield from chunk

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def digests(self) -> np.ndarray:
        """(n,) of dtype V16: 16 bytes for each row, equal for rows of equal content."""
        return self._source.digests(self._index)

    @property
    def numbers(self) -> np.ndarray:
        """(n,) int64: each row's number in its table."""
        return self._source.numbers(self._index)

    @property
    def size(self) -> int:
        """Roughly, in bytes."""
        return int(self._source.sizes(self._index).sum())

    def take(self, index: np.ndarray | Sequence[int]) -> Rows:
        """A view of the rows at these places (or, for an array of booleans, where it is true), in that order."""
        chosen = np.asarray(index)
        return Rows(self._source, self._index[chosen if chosen.size else chosen.astype(np.int64)])

    def numbered(self, numbers: Sequence[int] | np.ndarray) -> list[Row]:
        """The rows here that have one of these numbers in their table, in the order of the rows."""
        return list(self.take(np.isin(self.numbers, np.asarray(numbers, np.int64))))

    def chunks(self, most: int = CHUNK_ROWS) -> Iterator[list[Row]]:
        """All rows in order, parsed `most` at a time; fewer where they are long."""
        for start in range(0, len(self), most):
            index = self._index[start : start + most]
            part = np.cumsum(self._source.sizes(index)) // CHUNK_BYTES
            for piece in np.split(index, np.flatnonzero(np.diff(part)) + 1):
                yield self._source.fetch(piece)


def as_rows(rows: Sequence[Row]) -> Rows:
    """The rows as `Rows`, which they may be already."""
    return rows if isinstance(rows, Rows) else Rows(_Held(rows))


def duplicates(rows: Sequence[Row]) -> int:
    """How many rows have the content of an earlier one."""
    return len(rows) - len(np.unique(as_rows(rows).digests))


def shuffled(rows: Sequence[Row], seed: int) -> Rows:
    """The rows in an order that depends on the seed and their content alone; equal ones go by their numbers."""
    rows = as_rows(rows)
    words = np.frombuffer(rows.digests.tobytes(), "<u8").reshape(-1, 2)
    start = _mixed(np.array([seed % 2**64], np.uint64))
    return rows.take(np.lexsort((rows.numbers, _mixed(_mixed(words[:, 0] ^ start) ^ words[:, 1]))))


def _mixed(words: np.ndarray) -> np.ndarray:
    """Each of the uint64 hashed to another (the finalizer of SplitMix64)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _depth(value: Any) -> int:
    """Levels of lists and objects, counted without recursion, at most one more than `DEEPEST`."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple)))
        level = [x for each in inner for x in each]
        depth += 1
    return depth
