"""LoHa: the change of a weight as the Hadamard product of two low-rank products.

    y = W x + s ((A1 B1) o (A2 B2)) x        s = alpha / r

Papers: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
(arXiv:2108.06098); Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation" (arXiv:2309.14859).

Shapes: A1 and A2 are (out, r), B1 and B2 (r, in). The change has rank r^2 at most: it is the product of U (out, r^2),
whose columns are a1_i o a2_j, and D (r^2, in), whose rows are b1_i o b2_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from inlay.values import Count, Help, Positive

from .common import Patterned, Ranks, Scales, check_rank, patterned
from .contract import Layers, LinearForm, Params, Site, Targets
from .linear import LAYERS, TARGETS, LinearMethod, dense_form
from .peft_fields import Fields

__all__ = ["LoHa"]


@dataclass(frozen=True)
class LoHa(Patterned, LinearMethod):
    """Settings of LoHa, by HF PEFT's names and defaults: `r` is the rank of each product, `alpha` the scale;
    `rank_pattern` and `alpha_pattern` map a name or regular expression over the end of a module's path to its own.

    The learning rate is three times LoRA's, which did better on film reviews (docs/methods.md).
    """

    title = "LoHa"
    paper = "arXiv:2108.06098"
    peft_type = "LOHA"
    lr = 3e-3
    peft_fields = Fields(
        read={"r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, **TARGETS, **LAYERS},
        passed={"init_weights": True, "use_effective_conv2d": False},  # linear layers have no kernel
        refused={"rank_dropout": 0.0, "module_dropout": 0.0},
    )

    r: Annotated[Count, Help("rank of each of the two products; the change has r^2")] = 8
    alpha: Annotated[Positive, Help("scale of the product, divided by r")] = 8
    targets: Targets = "all-linear"
    layers: Layers = None
    rank_pattern: Ranks = field(default_factory=dict)
    alpha_pattern: Scales = field(default_factory=dict)

    def _shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        left, right = (site.out_features, self.rank(site)), (self.rank(site), site.in_features)
        return {"A1": left, "B1": right, "A2": left, "B2": right}

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        check_rank(self, self.rank(site), site)
        made = {name: torch.zeros(shape) for name, shape in self._shapes(site).items()}
        for name in ("A1", "B1", "A2"):
            torch.nn.init.kaiming_uniform_(made[name], a=math.sqrt(5), generator=generator)
        return made

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        form = self._product(*(params[name] for name in self._shapes(site)))
        assert form.down is not None and form.up is not None
        return {"down": form.down, "up": form.up}

    def _product(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> LinearForm:
        """U and D, or the change itself where they have more numbers."""
        if len(b1) ** 2 > min(len(a1), b1.shape[1]):
            return dense_form((a1 @ b1) * (a2 @ b2))
        return LinearForm((b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1))

    def form(self, params: Params, site: Site) -> LinearForm:
        scale = patterned(self.alpha_pattern, site.path, self.alpha) / self.rank(site)
        return LinearForm(params["down"], params["up"], scale)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends = {"A1": "hada_w1_a", "B1": "hada_w1_b", "A2": "hada_w2_a", "B2": "hada_w2_b"}
        return {name: (ends[name], shape) for name, shape in self._shapes(site).items()}
