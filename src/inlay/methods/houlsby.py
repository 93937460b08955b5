"""Houlsby adapters: a bottleneck behind attention and one behind the feed-forward part, each reading what that gives.

    y' = y + U act(D y + d) + u

Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751). Shapes and settings are
those of `inlay.methods.bottleneck`; AdapterHub calls it `double_seq_bn`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bottleneck import Bottleneck
from .common import Activation

__all__ = ["Houlsby"]


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """Two bottlenecks a block, with a swish."""

    title = "Houlsby adapter"
    paper = "arXiv:1902.00751"
    peft_type = "HOULSBY"

    non_linearity: Activation = "swish"
