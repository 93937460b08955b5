"""Gated LoRA: a low-rank product that a gate of each row lets through, more or less.

    y = W x + g s B A x        g = mean of sigmoid(w x + b) over a row's prompt, or the row where no prompt is known

AdapterHub's `adapters` 1.3.0 leaves alpha out where there is a gate: here s is 1 unless `alpha` is set, alpha / r then.

Paper: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning" (arXiv:2110.07577).
Shapes: A is (r, in), B is (out, r), w is (1, in), b is (1,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.sites.targets import select_projections
from inlay.values import Count, Help, Positive

from .common import check_rank
from .contract import Dropout, Layers, Method, Params, Site, Structure, Targets, Tokens

__all__ = ["GatedLoRA"]


@dataclass(frozen=True)
class GatedLoRA(Method):
    """Settings: those of LoRA that go with a gate; `dropout` is the share of x's entries that the product does not see
    in training. It acts in the encoder of an encoder-decoder, since a decoder's rows have no prompt; and it cannot be
    merged, since what it adds depends on the row."""

    title = "Gated LoRA"
    paper = "arXiv:2110.07577"
    peft_type = "GATED_LORA"
    lr = 1e-3  # LoRA's

    r: Annotated[Count, Help("rank of the product; 4 to 32 is usual")] = 8
    alpha: Annotated[Positive | None, Help("scale of the product; r where unset")] = None
    targets: Targets = "qv"
    layers: Layers = None
    dropout: Dropout = 0.0

    @property
    def causal(self) -> bool:
        return False

    def sites(self, base: Structure) -> list[Site]:
        sites = select_projections(base, self.targets, self.layers)
        sites = [site for site in sites if site.stack != "decoder"]
        if not sites:
            raise UsageError(f"{self.title}'s targets are in the decoder, whose rows have no prompt", "Choose LoRA.")
        if outside := next((site for site in sites if site.layer is None), None):
            what = f"{self.title} takes a row's mean, and {outside.path} outside of the blocks does not see whole rows"
            raise UsageError(what, "Leave it out of the targets.")
        return sites

    def check_fit(self, sites: Sequence[Site]) -> None:
        for site in sites:
            check_rank(self, self.r, site)

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        a = torch.zeros(self.r, site.in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        gate = torch.randn(1, site.in_features, generator=generator) * 0.02
        return {"A": a, "B": torch.zeros(site.out_features, self.r), "gate": gate, "gate_bias": torch.zeros(1)}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        gate = tokens.prompt_mean(torch.sigmoid(F.linear(x, params["gate"], params["gate_bias"])))
        low = F.linear(tokens.dropout(x, self.dropout), params["A"])
        return y + F.linear(low, params["B"]) * gate * (1.0 if self.alpha is None else self.alpha / self.r)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "A": ("lora_A.weight", (self.r, site.in_features)),
            "B": ("lora_B.weight", (site.out_features, self.r)),
            "gate": ("gate.weight", (1, site.in_features)),
            "gate_bias": ("gate.bias", (1,)),
        }

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        own = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        return {**own, "target_modules": [site.path for site in sites]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> GatedLoRA:
        return cls(r=config["r"], alpha=config["alpha"], targets=paths, dropout=config["dropout"])
