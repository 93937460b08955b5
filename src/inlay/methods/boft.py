"""BOFT: the input of a layer, rotated by a product of block rotations in permuted orders, and its output scaled.

    y = s o (W R x) + bias        R = B_m ... B_1, each a permuted block-diagonal rotation

Paper: Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (arXiv:2311.06243).

Shapes: what is trained is Q (m, in / b, b, b), of whose blocks the skew-symmetric parts make rotations
(I - Q) (I + Q)^-1, and s (out,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.kernels.rotations import butterfly, cayley, rotated_by
from inlay.values import Count, Help

from .contract import Layers, Params, Site, Targets, Tokens
from .linear import LAYERS, TARGETS, LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["BOFT"]

Size = Annotated[int, Ge(0), Le(2**31 - 1)]


@dataclass(frozen=True)
class BOFT(LinearMethod):
    """Settings of BOFT, by HF PEFT's names and defaults: the size of a block or the number of blocks, the other 0; and
    the number of factors, `boft_n_butterfly_factor`. HF PEFT takes one factor where it cannot build a CUDA extension
    of its own, and then opens no checkpoint of more. Three times LoRA's learning rate did best.
    """

    title = "BOFT"
    paper = "arXiv:2311.06243"
    peft_type = "BOFT"
    lr = 3e-3
    peft_bias = True
    uncast = ("Q", "s")  # they begin at 0 and 1
    peft_fields = Fields(
        read={
            "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "bias": "none",
            **TARGETS, **LAYERS,
        },
        passed={"fan_in_fan_out": False, "init_weights": True},
        refused={"boft_dropout": 0.0},
    )  # fmt: skip

    boft_block_size: Annotated[Size, Help("size of a block; 0 where boft_block_num says it")] = 4
    boft_block_num: Annotated[Size, Help("number of blocks; 0 where boft_block_size says it")] = 0
    targets: Targets = "all-linear"
    layers: Layers = None
    boft_n_butterfly_factor: Annotated[Count, Le(32), Help("number of factors")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size > 0) == (self.boft_block_num > 0):
            what = f"BOFT's boft_block_size is {self.boft_block_size} and its boft_block_num {self.boft_block_num}"
            raise UsageError(what, "Set one of them, and the other to 0.")

    def _size(self, site: Site) -> int:
        return self.boft_block_size or max(1, site.in_features // self.boft_block_num)

    def check_fit(self, sites: Sequence[Site]) -> None:
        more = self.boft_n_butterfly_factor - 1
        for site in sites:
            size, wide = self._size(site), site.in_features
            blocks = wide // size
            if wide % (self.boft_block_num or size):
                what = f"BOFT's blocks of {size} do not divide the {wide} features that {site.path} reads"
                raise UsageError(what, "Choose a size, or a number, that does.")
            if more and (blocks % 2**more or size % 2):
                what = f"BOFT's {blocks} blocks of {size} at {site.path} have no {more + 1} factors"
                raise UsageError(what, "More factors need blocks of even size, in multiples of 2^(factors - 1).")

    def _shape(self, site: Site) -> tuple[int, ...]:
        size = self._size(site)
        return self.boft_n_butterfly_factor, site.in_features // size, size, size

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        return {"Q": torch.zeros(self._shape(site)), "s": torch.ones(site.out_features)}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        q = params["Q"].flatten(0, 1)
        return {"turn": cayley((q - q.mT) / 2).view(params["Q"].shape)}

    def _change(self, x: Tensor, turn: Tensor) -> Tensor:
        """x R - x for rows x (n, in)."""
        at, size, count = x, turn.shape[-1], turn.shape[1]
        for number in reversed(range(len(turn))):
            order = torch.tensor(butterfly(x.shape[1], count >> number, size // 2, len(turn)), device=x.device)
            at = at + rotated_by(at[:, order.argsort()], turn[number])[:, order]
        return at - x if len(turn) > 1 else rotated_by(x, turn[0])

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        bias = getattr(site.module, "bias", None)
        made = y + F.linear(self._change(x.to(y.dtype), params["turn"].to(y.dtype)), site.weight().to(y.dtype))
        return made + (made if bias is None else made - bias) * (params["s"] - 1).to(y.dtype)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        weight, turn = site.weight().to(params["turn"]), params["turn"]
        whole = self._change(torch.eye(site.in_features, dtype=turn.dtype, device=turn.device), turn)  # R - I
        return merged_weight(site, (params["s"][:, None] * (weight + weight @ whole.t())).to(site.weight()))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"Q": ("boft_R", self._shape(site)), "s": ("boft_s", (site.out_features, 1))}

    def own_shape(self, name: str, value: Tensor) -> Tensor:
        return value.flatten() if name == "s" else value
