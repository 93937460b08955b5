"""GraLoRA: a LoRA of its own for each of k x k blocks of a weight.

    y_i = W_i x + s sum_j B_ij A_ij x_j        i, j = 1 ... k, each product of rank r / k; s = alpha / (r + hybrid_r)

Paper: Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning" (arXiv:2505.20355).

Shapes: A is (k, in / k, r), its last side cut into k parts, one for each i; B is (k, r, out / k), its middle side cut
into k parts, one for each j. As a whole it is a product of rank k r. With `hybrid_r` there is a LoRA of that rank over
the whole weight beside it: GA (hybrid_r, in), GB (out, hybrid_r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help, Positive

from .common import check_rank
from .contract import Dropout, Layers, LinearForm, Params, Site, Targets
from .linear import LAYERS, LinearMethod
from .peft_fields import Fields

__all__ = ["GraLoRA"]


@dataclass(frozen=True)
class GraLoRA(LinearMethod):
    """Settings of GraLoRA, by HF PEFT's names and defaults: `r` is the rank that a row of blocks has together,
    `gralora_k` the number of blocks on a side, `hybrid_r` the rank of a plain LoRA beside them. The learning rate is
    LoRA's, the best of three for it too.
    """

    title = "GraLoRA"
    paper = "arXiv:2505.20355"
    peft_type = "GRALORA"
    peft_bias = True
    renamed: ClassVar[Mapping[str, str]] = {"dropout": "gralora_dropout"}
    peft_fields = Fields(
        read={
            "r": 32, "alpha": 64, "gralora_k": 2, "hybrid_r": 0, "gralora_dropout": 0.0, "bias": "none",
            "target_modules": None, "modules_to_save": None, **LAYERS,
        },
        passed={"fan_in_fan_out": False, "init_weights": True},
    )  # fmt: skip

    r: Annotated[Count, Help("rank of a row of blocks, which share it; a multiple of gralora_k")] = 32
    alpha: Annotated[Positive, Help("scale of the products, divided by r + hybrid_r; 2r is usual")] = 64
    targets: Targets = "all-linear"
    layers: Layers = None
    gralora_k: Annotated[Count, Help("blocks on a side of a weight; 2 or 4")] = 2
    hybrid_r: Annotated[int, Ge(0), Le(2**31 - 1), Help("rank of a LoRA over the whole weight beside them")] = 0
    dropout: Dropout = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            what = f"GraLoRA's r is {self.r}, which its gralora_k of {self.gralora_k} does not divide"
            raise UsageError(what, "Choose a multiple.")

    def check_fit(self, sites: Sequence[Site]) -> None:
        for site in sites:
            check_rank(self, max(self.r, self.hybrid_r), site)
            k, shape = self.gralora_k, f"({site.out_features}, {site.in_features})"
            if site.in_features % k or site.out_features % k:
                what = f"GraLoRA's gralora_k is {k}, which does not divide both sides of {site.path} {shape}"
                raise UsageError(what, "Choose one that does.")

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        k = self.gralora_k
        shapes: dict[str, tuple[int, ...]] = {"A": (k, site.in_features // k, self.r)}
        shapes["B"] = k, self.r, site.out_features // k
        general = {"GA": (self.hybrid_r, site.in_features), "GB": (site.out_features, self.hybrid_r)}
        return {**shapes, **(general if self.hybrid_r else {})}

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        made = {name: torch.zeros(shape) for name, shape in self._shapes(site).items()}
        for own in (*made["A"].mT, *([made["GA"]] if self.hybrid_r else [])):  # (r, in / k) each
            torch.nn.init.kaiming_uniform_(own, a=math.sqrt(5), generator=generator)
        return made

    def derive(self, params: Params, site: Site | None) -> Params:
        """D (k r, in) and U (out, k r), whose units stand in the order (i, j, r / k)."""
        if site is None:
            return {}
        k, part = self.gralora_k, self.r // self.gralora_k
        eye = torch.eye(k, dtype=params["A"].dtype, device=params["A"].device)
        a = params["A"].view(k, -1, k, part)  # (j, in / k, i, r / k)
        b = params["B"].view(k, k, part, -1)  # (i, j, r / k, out / k)
        down = torch.einsum("jxip,jm->ijpmx", a, eye).reshape(k * self.r, site.in_features)
        up = torch.einsum("ijpy,im->myijp", b, eye).reshape(site.out_features, k * self.r)
        if self.hybrid_r:
            down, up = torch.cat([down, params["GA"]]), torch.cat([up, params["GB"]], 1)
        return {"down": down, "up": up}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["down"], params["up"], self.alpha / (self.r + self.hybrid_r))

    def form_dropout(self) -> float:
        return self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends = {"A": "gralora_A", "B": "gralora_B", "GA": "gralora_A_general.weight", "GB": "gralora_B_general.weight"}
        return {name: (ends[name], shape) for name, shape in self._shapes(site).items()}
