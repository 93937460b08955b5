"""Where adapters rest: at padding of which a base has made zeros, so that its convolutions and states ignore it.

What an adapter adds to zeros, a bias, would be read by the tokens behind them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.batch.padded import PaddedLayout
from inlay.sites.observe import Base

__all__ = ["Resting", "resting_at", "rests"]

Resting = tuple[Tensor, Tensor]
"""Which vectors of an activation rest (rows, columns), and what the base has given there (n, width)."""


def rests(base: Base) -> frozenset[str]:
    """Paths of the linear layers in blocks that hold no attention through transformers' interface."""
    attend = {path for path, module in base.model.named_modules() if module in base.observed.heads}
    blocks = [f"{block}." for block in base.blocks if not any(f"{path}.".startswith(f"{block}.") for path in attend)]
    return frozenset(site.path for site in base.projections if site.path.startswith(tuple(blocks)))


def resting_at(layout: Any, x: Tensor | None, y: Tensor) -> Resting | None:
    """What of y (rows, columns, width), made of x, stays as it is whatever acts there; None where nothing does."""
    if not isinstance(layout, PaddedLayout) or x is None or x.ndim != 3 or len(x) != len(layout.blends):
        return None
    padding = layout.padding(x.shape[1])
    if padding is None:
        return None
    padding &= ~x.detach().any(-1)
    return padding, y.detach()[padding]
