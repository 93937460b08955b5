"""LoKr: the change of a weight as the Kronecker product of two small matrices.

    y = W x + s (C kron D) x        s = alpha / r; C and D may be low-rank products themselves

Papers: Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter" (arXiv:2212.10650); Yeh et al.
2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (arXiv:2309.14859).

Shapes: out = l k and in = m n, each by the two factors that `decompose_factor` asks for, l <= k and m <= n. C is (l, m)
and D (k, n). Where r is less than half of a matrix's larger side, it is a product of rank r: D always, C with
`decompose_both`. x (m n,) is read as X (m, n), so that (C kron D) x is C X D^T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help, Positive

from .common import Ranks, Scales, check_named, check_patterns, patterned
from .contract import Layers, Params, Site, Targets, Tokens
from .linear import LAYERS, TARGETS, LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["LoKr"]


@dataclass(frozen=True)
class LoKr(LinearMethod):
    """Settings of LoKr, by HF PEFT's names and defaults: `decompose_factor` is the size of C (-1: near the root of
    each side), `decompose_both` lets C be a product too. The learning rate is that of HF PEFT's best
    run on MetaMathQA, and the best of three on film reviews (docs/methods.md).
    """

    title = "LoKr"
    paper = "arXiv:2309.14859"
    peft_type = "LOKR"
    lr = 3e-3
    peft_fields = Fields(
        read={
            "r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1, "rank_pattern": {},
            "alpha_pattern": {}, **TARGETS, **LAYERS,
        },
        passed={"init_weights": True, "use_effective_conv2d": False, "rank_dropout_scale": False},
        refused={"rank_dropout": 0.0, "module_dropout": 0.0},
    )  # fmt: skip

    r: Annotated[Count, Help("rank of a matrix that is a product; a small one is held whole")] = 8
    alpha: Annotated[Positive, Help("scale of the product, divided by r")] = 8
    targets: Targets = "all-linear"
    layers: Layers = None
    decompose_both: Annotated[bool, Help("let the smaller matrix be a product too")] = False
    decompose_factor: Annotated[int, Help("size of the smaller matrix; -1 is near the root of each side")] = -1
    rank_pattern: Ranks = field(default_factory=dict)
    alpha_pattern: Scales = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self, "rank_pattern", "alpha_pattern")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise UsageError(f"LoKr's decompose_factor is {self.decompose_factor}", "Give a size, or -1.")

    def check_fit(self, sites: Sequence[Site]) -> None:
        check_named(self, sites, "rank_pattern", "alpha_pattern")

    def _shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        (small, wide), (m, n) = (factors(size, self.decompose_factor) for size in (site.out_features, site.in_features))
        r, shapes = int(patterned(self.rank_pattern, site.path, self.r)), {}
        for name, rows, columns, may in (("C", small, m, self.decompose_both), ("D", wide, n, True)):
            if may and r < max(rows, columns) / 2:
                shapes |= {name + "a": (rows, r), name + "b": (r, columns)}
            else:
                shapes[name] = rows, columns
        return shapes

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape) for name, shape in self._shapes(site).items()}
        for name, value in made.items():
            if name not in ("C", "Ca"):
                torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        return made

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        c, scale = _whole(params, "C"), self._scale(site)
        low = x.to(y.dtype).reshape(len(x) * c.shape[1], -1)
        made = low @ params["D"].t() if "D" in params else (low @ params["Db"].t()) @ params["Da"].t()
        return y + scale * (c @ made.view(len(x), c.shape[1], made.shape[1])).flatten(1)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        delta = torch.kron(_whole(params, "C"), _whole(params, "D").contiguous()) * self._scale(site)
        return merged_weight(site, site.weight() + delta.to(site.weight()))

    def _scale(self, site: Site) -> float:
        return patterned(self.alpha_pattern, site.path, self.alpha) / patterned(self.rank_pattern, site.path, self.r)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends: dict[str, Any] = {"C": "lokr_w1", "Ca": "lokr_w1_a", "Cb": "lokr_w1_b"}
        ends |= {"D": "lokr_w2", "Da": "lokr_w2_a", "Db": "lokr_w2_b"}
        return {name: (ends[name], shape) for name, shape in self._shapes(site).items()}


def _whole(params: Params, name: str) -> Tensor:
    return params[name] if name in params else params[name + "a"] @ params[name + "b"]


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers, the smaller one first, whose product is `size`: `factor` where it divides; else, of the divisors up
    to it (-1: all), the largest that is not above the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    first = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= most)
    return first, size // first
