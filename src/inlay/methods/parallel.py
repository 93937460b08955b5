"""Parallel adapters: a bottleneck that reads the residual stream that a sublayer's output is added to.

    y' = y + s (U relu(D x + d) + u)        s = 4, or trained from 1

x is the residual stream before the block's attention or feed-forward part, as AdapterHub's `adapters` 1.3.0 gives it;
in post-norm blocks, as in the paper, that is what the part itself reads.

Paper: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv:2110.04366).
Shapes: D is (hidden / reduction_factor, hidden), d its bias; U is (hidden, hidden / reduction_factor), u its bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from inlay.values import Help, Positive

from .bottleneck import Bottleneck
from .bottleneck_settings import BehindAttention, InitWeights, Reduction, Scaling

__all__ = ["Parallel", "ScaledParallel"]


@dataclass(frozen=True)
class Parallel(Bottleneck):
    """One bottleneck a block, beside the feed-forward part; U starts at zero.

    Where the stream is not normed, as in decoders whose norms stand before the parts, film reviews are not learned at
    a rate of 1e-4 (docs/methods.md): there `ln_before` norms what is read, and without it the rate is low.
    """

    title = "Parallel adapter"
    paper = "arXiv:2110.04366"
    peft_type = "PARALLEL"
    lr = 1e-5

    reduction_factor: Reduction = 2
    mh_adapter: BehindAttention = False
    scaling: Scaling = 4.0
    is_parallel: Annotated[bool, Help("read the stream that the sublayer's output is added to")] = True
    init_weights: InitWeights = "mam_adapter"

    @property
    def usual_rate(self) -> float:
        return 1e-4 if self.ln_before else self.lr


@dataclass(frozen=True)
class ScaledParallel(Parallel):
    """A parallel adapter whose scale is trained, one number a block."""

    title = "Scaled parallel adapter"
    peft_type = "SCALED_PARALLEL"

    scaling: Annotated[Positive, Help("where the trained scale begins")] = 1.0

    def further_shapes(self, wide: int) -> dict[str, tuple[int, ...]]:
        return {**super().further_shapes(wide), "scale": (1,)}

    def drawn(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, float(self.scaling)) if name == "scale" else super().drawn(name, shape, generator)
