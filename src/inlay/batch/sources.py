"""Where each column of a widened row comes from: an own column, a virtual token or padding.

Both functions give (B, width + L): the original column, -1 for padding, -2-j for virtual token j. `first` (B,) is each
row's first real column, `places` (B,) before which of its own tokens its `virtual` (B,) ones stand, `width` the largest
number of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decoder_source", "encoder_source"]


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
