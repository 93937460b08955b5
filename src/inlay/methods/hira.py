"""HiRA: the weight itself, times a low-rank product entry by entry.

    y = W x + (W o B A) x + bias

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models" (ICLR
2025, openreview TwJrTz9cRS). Shapes: A is (r, in), B is (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from inlay.values import Count, Help

from .common import check_rank
from .contract import Dropout, Layers, Params, Site, Targets
from .linear import LAYERS, TARGETS, DeltaMethod
from .peft_fields import Fields

__all__ = ["HiRA"]


@dataclass(frozen=True)
class HiRA(DeltaMethod):
    """Settings of HiRA, by HF PEFT's names and defaults: `r` is the rank of the product. The learning rate was not
    measured here: it is that of HF PEFT's best run on MetaMathQA.
    """

    title = "HiRA"
    paper = "openreview.net/forum?id=TwJrTz9cRS"
    peft_type = "HIRA"
    lr = 4.5e-3
    renamed: ClassVar[Mapping[str, str]] = {"dropout": "hira_dropout"}
    peft_fields = Fields(
        read={"r": 32, "hira_dropout": 0.0, **TARGETS, **LAYERS},
        passed={"fan_in_fan_out": False, "init_weights": True, "rank_pattern": {}},  # HF PEFT 0.21 writes it, uses r
    )

    r: Annotated[Count, Help("rank of the product; 16 to 64 is usual")] = 32
    targets: Targets = "all-linear"
    layers: Layers = None
    dropout: Dropout = 0.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        check_rank(self, self.r, site)
        a = torch.empty(self.r, site.in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return {"A": a, "B": torch.zeros(site.out_features, self.r)}

    def delta(self, params: Params, site: Site) -> Tensor:
        return site.weight().to(params["A"]) * (params["B"] @ params["A"])

    def form_dropout(self) -> float:
        return self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"A": ("hira_A", (self.r, site.in_features)), "B": ("hira_B", (site.out_features, self.r))}
