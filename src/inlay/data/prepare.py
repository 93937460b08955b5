"""One pass over many rows: the tokenizer's own threads encode them, and flat arrays on disk keep what they made."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, overload

import numpy as np

from inlay.errors import DataError, DroppedRow

from .encode import PIECE, Example
from .mapped import Growing
from .rows import Row, as_rows

__all__ = ["Examples", "Prepared", "RowsEncoder", "prepare", "token_counts"]

PARALLEL = "TOKENIZERS_PARALLELISM"
FEW = 64
SHORT = 2**16
"""Rows, and bytes in all, for which threads are not worth starting."""
TOGETHER = 1024
"""Rows that are encoded together: enough to keep threads busy; more would only take more memory."""


class RowsEncoder(Protocol):
    """What makes examples of rows."""

    def encode(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
        """For each row its examples, several where a long text is cut into pieces, or why it has none."""
        ...


class Examples(Sequence[Example]):
    """Examples in flat arrays, made when they are asked for; slices and `take` are views.

    Example i has the ids `ids[ends[i - 1] : ends[i]]` (int32), and their loss mask `masks[...]` of the same
    places (uint8, 0 or 1); `samples` (int64), `cuts` and `virtual_at` (int32) have one item each.
    """

    def __init__(
        self, ids: np.ndarray, masks: np.ndarray, ends: np.ndarray, samples: np.ndarray, cuts: np.ndarray,
        virtual_at: np.ndarray, index: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self._flat, self._ends = (ids, masks), ends
        self._each = samples, cuts, virtual_at
        small = np.int32 if len(ends) < 2**31 else np.int64
        self._index = np.arange(len(ends), dtype=small) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> Example: ...
    @overload
    def __getitem__(self, item: slice) -> Examples: ...
    def __getitem__(self, item: int | slice) -> Example | Examples:
        if isinstance(item, slice):
            return self.take(np.arange(len(self))[item])
        number = int(self._index[range(len(self))[item]])
        start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        ids, mask = (flat[start:end] for flat in self._flat)
        sample, cut, virtual_at = (int(each[number]) for each in self._each)
        return Example(tuple(ids.tolist()), tuple(mask.view(np.bool_).tolist()), sample, cut, virtual_at)

    def take(self, index: np.ndarray | Sequence[int]) -> Examples:
        """A view of the examples at these places (or, for an array of booleans, where it is true), in that order."""
        chosen = np.asarray(index)
        chosen = self._index[chosen if chosen.size else chosen.astype(np.int64)]
        return Examples(*self._flat, self._ends, *self._each, index=chosen)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: the tokens of each."""
        starts = np.where(self._index > 0, self._ends[self._index - 1], 0)
        return self._ends[self._index] - starts

    @property
    def samples(self) -> np.ndarray:
        """(n,) int64: the `sample` of each."""
        return self._each[0][self._index]

    @property
    def numbers(self) -> np.ndarray:
        """(n,) int64: the number of the row that each comes from."""
        return self.samples & ((1 << PIECE) - 1)


def token_counts(examples: Sequence[Example]) -> np.ndarray:
    """(n,) int64: the tokens of each."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.fromiter((len(example.ids) for example in examples), np.int64, len(examples))


@dataclass(frozen=True)
class Prepared:
    """Examples, and what became of the rows.

    `counts` holds rows, cut (rows with a shortened prompt), in pieces (rows of long texts, where there are any) and
    "dropped: <reason>".
    """

    examples: Examples
    counts: Counter[str]


def prepare(
    encoder: RowsEncoder, rows: Sequence[Row], on_progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """Encode all rows, some thousand at a time; `on_progress` hears how many of how many are done.

    Raises: DataError where no row is left to learn from, and as `encoder.encode` does; InlayError where the cache,
    which holds the arrays, has no room.
    """
    rows, made, done = as_rows(rows), _Made(), 0
    counts = Counter(rows=len(rows), cut=0)
    with _threads(len(rows) > FEW or rows.size > SHORT), _collecting() as collect:
        for chunk in rows.chunks(TOGETHER):
            made.add(encoder.encode(chunk), counts)
            done += len(chunk)
            collect()
            if on_progress is not None:
                on_progress(done, len(rows))
    examples = made.examples()
    if not len(examples):
        why = "; ".join(f"{n} {reason}" for reason, n in counts.items() if reason.startswith("dropped"))
        remedy = "Raise --max-length, check the columns; `inlay preview` shows a row."
        raise DataError(f"none of the {len(rows)} rows can be learned from ({why})", remedy)
    return Prepared(examples, counts)


class _Made:
    """The arrays of `Examples` while they grow."""

    def __init__(self) -> None:
        self._ids, self._masks, self._ends = Growing("i4"), Growing("u1"), Growing("i8")
        self._samples, self._cuts, self._virtual_at = Growing("i8"), Growing("i4"), Growing("i4")

    def add(self, encoded: Sequence[list[Example] | DroppedRow], counts: Counter[str]) -> None:
        found: list[Example] = []
        for each in encoded:
            if isinstance(each, DroppedRow):
                counts[f"dropped: {each.reason}"] += 1
                continue
            found += each
            counts["cut"] += each[0].cut > 0
            if len(each) > 1:
                counts["in pieces"] += 1
        if found:
            self._keep(found)

    def _keep(self, found: Sequence[Example]) -> None:
        count, before = len(found), len(self._ids)
        ends = np.cumsum(_column((len(example.ids) for example in found), np.int64, count))
        self._ends.add(before + ends)
        self._ids.add(_column(chain.from_iterable(example.ids for example in found), np.int32, int(ends[-1])))
        self._masks.add(b"".join([bytes(example.loss_mask) for example in found]))
        self._samples.add(_column((example.sample for example in found), np.int64, count))
        self._cuts.add(_column((example.cut for example in found), np.int32, count))
        self._virtual_at.add(_column((example.virtual_at for example in found), np.int32, count))

    def examples(self) -> Examples:
        arrays = self._ids, self._masks, self._ends, self._samples, self._cuts, self._virtual_at
        return Examples(*(array.done() for array in arrays))


def _column(values: Iterator[Any], dtype: Any, count: int) -> np.ndarray:
    return np.fromiter(values, dtype, count)


@contextmanager
def _collecting() -> Iterator[Callable[[], object]]:
    """Look for cycles when it is called for, among new objects alone: left to itself the collector walks over all that
    torch and transformers made, again and again, for a third of the time of a pass.
    """
    if not gc.isenabled():
        yield lambda: None
        return
    gc.disable()
    try:
        yield lambda: gc.collect(0)
    finally:
        gc.enable()


@contextmanager
def _threads(wanted: bool) -> Iterator[None]:
    """Let tokenizers use threads while nothing forks; after a fork they would hang, so commands switch them off."""
    before = os.environ.get(PARALLEL)
    if wanted:
        os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        if before is not None:
            os.environ[PARALLEL] = before
        else:
            os.environ.pop(PARALLEL, None)
