"""Texts that rows give different labels: a model can fit one of them at most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .rows import Row, as_rows
from .split import label_numbers

__all__ = ["conflict_notices"]


def conflict_notices(rows: Sequence[Row], keys: NDArray[np.uint64], labels: Sequence[str]) -> list[str]:
    """A sentence where equal texts have different labels; [] where none do.

    `keys` (n,) are the rows' keys by `split.content_key`, so that spaces and case do not tell texts apart; `labels`
    (n,) are the rows' labels.
    """
    pairs = np.unique(np.stack([keys, label_numbers(labels).astype(np.uint64)]), axis=1)
    texts, counts = np.unique(pairs[0], return_counts=True)
    double = texts[counts > 1]
    if not len(double):
        return []
    held = as_rows(rows).take(np.isin(keys, double))
    places = np.flatnonzero(np.isin(keys, double))[np.argsort(held.numbers)].tolist()
    first = places[0]
    other = next(place for place in places if keys[place] == keys[first] and labels[place] != labels[first])
    named = [f"{as_rows(rows)[place].where} ({labels[place]!r})" for place in (first, other)]
    texts_have = "1 text has" if len(double) == 1 else f"{len(double)} texts have"
    return [f"{texts_have} rows with different labels, such as {named[0]} and {named[1]}: only one can be learned"]
