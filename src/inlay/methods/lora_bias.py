"""LoRA with a bias on B.

    y = W x + s (B A x + b)

HF PEFT's `lora_bias`: it makes LoRA of what was extracted from a whole fine-tuned model exact. A base's layer needs no
bias of its own, but for a merge.

Shapes: A is (r, in), B (out, r) and b (out,), which starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

from .contract import LinearForm, Params, Site, Structure
from .lora import LoRA

__all__ = ["LoRABias"]


@dataclass(frozen=True)
class LoRABias(LoRA):
    """Settings of LoRA with a bias: those of LoRA, whose learning rate it begins with."""

    title = "LoRA with a bias"
    paper = "arXiv:2106.09685"
    begins_inside = False  # as in HF PEFT, whose lora_bias takes no such start

    def sites(self, base: Structure) -> list[Site]:
        sites = super().sites(base)
        if table := next((site for site in sites if site.is_embedding), None):
            raise UsageError(f"{self.title} cannot act on {table.path}, a table", "Name linear layers, or use LoRA.")
        return sites

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {**super().create(site, generator), "bias": torch.zeros(site.out_features)}

    def form(self, params: Params, site: Site) -> LinearForm:
        return replace(super().form(params, site), shift=params["bias"] * self.scale(site))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super().peft_keys(site), "bias": ("lora_B.bias", (site.out_features,))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {k: v for k, v in super().to_peft(sites).items() if k != "target_parameters"} | {"lora_bias": True}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and bool(config.get("lora_bias"))
