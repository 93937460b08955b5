"""Adapter+: a bottleneck behind each feed-forward part that the block goes on with, scaled feature by feature.

    h' = h + s * (U act(D h + d) + u)        h = y + x, or its norm in post-norm blocks; s is one number a feature

Training leaves it out for a share of the rows (stochastic depth), so that blocks rely less on it. Defaults are those of
AdapterHub's `adapters` 1.3.0, which follow the paper's for image classification.

Paper: Steitz & Roth 2024, "Adapters Strike Back" (arXiv:2406.06820).
Shapes: s is (hidden,); the others are those of `inlay.methods.bottleneck`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Help, Share

from .bottleneck import Bottleneck
from .bottleneck_settings import BehindAttention, InitWeights, Reduction, Residual, Scaling
from .common import Activation

__all__ = ["AdapterPlus"]


@dataclass(frozen=True)
class AdapterPlus(Bottleneck):
    """One bottleneck a block, which the block goes on with."""

    title = "Adapter+"
    paper = "arXiv:2406.06820"
    peft_type = "ADAPTER_PLUS"
    lr = 1e-3  # the paper's

    reduction_factor: Reduction = 96
    non_linearity: Activation = "gelu"
    mh_adapter: BehindAttention = False
    scaling: Scaling = "channel"
    original_ln_before: Annotated[bool, Help("read the stream after the block's addition and norm")] = True
    original_ln_after: Annotated[bool, Help("the block's addition and norm come behind the adapter")] = False
    residual_before_ln: Residual = False
    init_weights: InitWeights = "houlsby"
    stochastic_depth: Annotated[Share, Help("share of rows for which training leaves an adapter out")] = 0.1
