"""OFT: the input of a layer, rotated in blocks.

    y = W R x + bias        R is block-diagonal; each block (I + Q) (I - Q)^-1 for a skew-symmetric Q

Papers: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv:2306.07280); Qiu et al.
2025, "Orthogonal Finetuning Made Scalable" (arXiv:2506.19847), which rotates the input and makes blocks by a series.

Shapes: in = blocks * b. What is trained is the part of each Q above its diagonal, (blocks, b (b - 1) / 2), or (1, ...)
where `block_share` makes one block serve all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.kernels.rotations import cayley, neumann_cayley, rotated_by, skew
from inlay.values import Help

from .contract import Layers, Method, Params, Site, Targets, Tokens
from .linear import LAYERS, TARGETS, LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["OFT"]


@dataclass(frozen=True)
class OFT(LinearMethod):
    """Settings of OFT, by HF PEFT's names and defaults: either the size of a block, `oft_block_size`, or the number of
    blocks, `r`; the other is 0. What does not divide the width of an input is replaced by the nearest that does, as in
    HF PEFT. `use_cayley_neumann` makes rotations by `num_cayley_neumann_terms` of a series; they are orthogonal but for
    what is left out. Without it they are exact, and turn the other way.

    At 3e-3 it breaks down on film reviews, and 3e-4 did best (docs/methods.md).
    """

    title = "OFT"
    paper = "arXiv:2306.07280"
    peft_type = "OFT"
    lr = 3e-4
    peft_bias = True
    uncast = ("upper",)  # rotations begin as none: what they change is small
    peft_fields = Fields(
        read={
            "r": 0, "oft_block_size": 32, "block_share": False, "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5, "bias": "none", **TARGETS, **LAYERS,
        },
        passed={"fan_in_fan_out": False, "init_weights": True, "eps": 6e-5},  # eps is the bound of coft
        refused={"module_dropout": 0.0, "coft": False},
    )  # fmt: skip

    r: Annotated[int, Ge(0), Le(2**31 - 1), Help("number of blocks; 0 where oft_block_size says it")] = 0
    oft_block_size: Annotated[int, Ge(0), Le(2**31 - 1), Help("size of a block; 0 where r says it")] = 32
    targets: Targets = "all-linear"
    layers: Layers = None
    block_share: Annotated[bool, Help("rotate all blocks alike")] = False
    use_cayley_neumann: Annotated[bool, Help("make rotations by a series, which is faster")] = True
    num_cayley_neumann_terms: Annotated[int, Ge(1), Le(64), Help("terms of the series")] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r > 0) == (self.oft_block_size > 0):
            what = f"OFT's r is {self.r} and its oft_block_size {self.oft_block_size}"
            raise UsageError(what, "Set one of them, and the other to 0.")

    def _shape(self, site: Site) -> tuple[int, int]:
        size = nearest_divisor(site.in_features, self.oft_block_size or self.r)
        size = size if self.oft_block_size else site.in_features // size
        return 1 if self.block_share else site.in_features // size, size * (size - 1) // 2

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"upper": torch.zeros(self._shape(site))}

    def derive(self, params: Params, site: Site | None) -> Params:
        """The blocks of R, less the identity."""
        if site is None:
            return {}
        upper = params["upper"]
        q = skew(upper, size_of(upper.shape[1]))
        return {"turn": neumann_cayley(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        turned = rotated_by(x.to(y.dtype), params["turn"].to(y.dtype))
        return y + F.linear(turned, site.weight().to(y.dtype))

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        weight = site.weight()
        return merged_weight(site, weight + rotated_by(weight, params["turn"].to(weight).mT))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"upper": ("oft_R.weight", self._shape(site))}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        if "oft_block_size" not in config:
            raise UsageError("it lacks oft_block_size, as before PEFT 0.14: those rotations were others", "Train it.")
        return super().from_peft(config, paths)


def size_of(count: int) -> int:
    """The b of b (b - 1) / 2 numbers above a diagonal."""
    return (1 + round((1 + 8 * count) ** 0.5)) // 2


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of `width` that is nearest to `wanted`; the smaller one of two."""
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - wanted), n))
