"""Where each column of a widened row comes from: an own column, a virtual token or padding.

Two functions give that (B, width + L): the original column, -1 for padding, -2-j for virtual token j. `first` (B,) is
each row's first real column, `places` (B,) before which of its own tokens its `virtual` (B,) ones stand, `width` the
largest number of them. A third puts the virtual tokens in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.errors import UsageError

__all__ = ["decoder_source", "encoder_source", "has_virtual", "with_virtual"]


def decoder_source(first: Tensor, places: Tensor, virtual: Tensor, width: int, length: int) -> Tensor:
    """New padding goes before the rows, to whose ends more tokens are appended."""
    column = torch.arange(width + length, device=first.device)[None]
    lead = width - virtual
    start, end = (first + lead + places)[:, None], (first + places + width)[:, None]
    source = torch.where(column < end, column - lead[:, None], column - width)
    source = torch.where(column < lead[:, None], -1, source)
    return torch.where((column >= start) & (column < end), start - column - 2, source)


def encoder_source(first: Tensor, places: Tensor, virtual: Tensor, width: int, length: int) -> Tensor:
    """Nothing is ever appended to an encoder's rows: new padding goes behind them, where it moves no position."""
    column = torch.arange(width + length, device=first.device)[None]
    start = (first + places)[:, None]
    end = start + virtual[:, None]
    source = torch.where(column < start, column, column - virtual[:, None])
    source = torch.where(column >= length + virtual[:, None], -1, source)
    return torch.where((column >= start) & (column < end), start - column - 2, source)


def with_virtual(embedded: Tensor, source: Tensor, values: Sequence[Tensor | None]) -> Tensor:
    """Embeddings (B, W, hidden) with those of each row's virtual tokens, `values` (n, hidden), in their places.

    Raises: UsageError where the base embeds its rows in another shape.
    """
    if embedded.shape[:2] != source.shape:
        what = f"this base embeds {tuple(source.shape)} rows and tokens as {tuple(embedded.shape)}"
        raise UsageError(what, "Choose a method without virtual tokens, such as LoRA.")
    rows = []
    for row, own, places in zip(embedded.unbind(0), values, source, strict=True):
        at = (places < -1).nonzero()[:, 0]
        rows.append(row if own is None else row.index_copy(0, at, own.to(row.dtype)))
    return torch.stack(rows)


def has_virtual(states: Tensor, wide: int, own: tuple[Tensor, int] | None, uneven: bool) -> bool:
    """Whether states (B, tokens, ...) are those of `wide` columns; else they are of a row's `own` ones, which go on
    from a cache.

    Raises: UsageError where they are neither; or are (B, hidden), of the first column, where rows have virtual tokens
    of `uneven` numbers.
    """
    if states.ndim == 2 and uneven:
        what = "this base pools the first column, which is padding in rows with fewer virtual tokens"
        raise UsageError(what, "Run them in batches of their own.")
    if states.ndim > 2 and own is not None and states.shape[1] not in (wide, own[1]):
        what = f"this base makes {states.shape[1]} states of {wide} tokens, among which virtual ones cannot be told"
        raise UsageError(what, "Choose a method without virtual tokens, such as LoRA.")
    return states.ndim > 2 and states.shape[1] == wide
