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

from .bottleneck import BehindAttention, Bottleneck, Reads, Reduction
from .contract import Params, Site

__all__ = ["Parallel", "ScaledParallel"]


@dataclass(frozen=True)
class Parallel(Bottleneck):
    """One bottleneck a block, beside the feed-forward part; U starts at zero."""

    title = "Parallel adapter"
    paper = "arXiv:2110.04366"
    peft_type = "PARALLEL"
    lr = 3e-4

    reduction_factor: Reduction = 2
    mh_adapter: BehindAttention = False
    scaling: Annotated[Positive, Help("by what the adapter's output is multiplied")] = 4.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        wide, small = site.out_features, self.size(site)
        bound = wide**-0.5
        return {
            "down": torch.empty(small, wide).uniform_(-bound, bound, generator=generator),
            "down_bias": torch.zeros(small),
            "up": torch.zeros(wide, small),
            "up_bias": torch.zeros(wide),
        }

    def reads(self) -> Reads:
        return "stream"


@dataclass(frozen=True)
class ScaledParallel(Parallel):
    """A parallel adapter whose scale is trained, one number a block."""

    title = "Scaled parallel adapter"
    peft_type = "SCALED_PARALLEL"

    scaling: Annotated[Positive, Help("where the trained scale begins")] = 1.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {**super().create(site, generator), "scale": torch.full((1,), float(self.scaling))}

    def scale(self, params: Params) -> Tensor:
        return params["scale"]

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super().peft_keys(site), "scale": ("scaling", (1,))}
