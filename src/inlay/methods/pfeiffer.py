"""Pfeiffer adapters: one bottleneck a block, behind the feed-forward part, reading the stream as the block would go on.

    y' = y + U act(D z + d) + u        z = norm(y + x), or y + x where the block has no norm behind

Paper: Pfeiffer et al. 2020, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (arXiv:2005.00247).
Shapes and settings are those of `inlay.methods.bottleneck`; AdapterHub calls it `seq_bn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Help

from .bottleneck import Bottleneck
from .bottleneck_settings import BehindAttention

__all__ = ["Pfeiffer"]


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """One bottleneck a block, with a relu."""

    title = "Pfeiffer adapter"
    paper = "arXiv:2005.00247"
    peft_type = "PFEIFFER"
    lr = 3e-4

    mh_adapter: BehindAttention = False
    original_ln_before: Annotated[bool, Help("read the stream after the block's addition and norm")] = True
