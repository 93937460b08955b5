"""Norm tuning: each adapter has its own scale and shift in the base's normalisation layers.

    y = norm(x) * w' + b'          w' and b' start as copies of the base's

Paper: Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning"
(arXiv:2312.11420). Shapes: w' and b' are those of the base's own parameters, (hidden,) as a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Help

from .contract import Layers, LinearForm, Method, Params, Site, Structure, parse_layers
from .peft_fields import NORM_FIELDS

__all__ = ["NormTuning"]


@dataclass(frozen=True)
class NormTuning(Method):
    """Settings of norm tuning: `targets` are endings of paths (every norm where None); `layers` keeps some blocks."""

    title = "Norm tuning"
    paper = "arXiv:2312.11420"
    peft_type = "LN_TUNING"
    peft_fields = NORM_FIELDS
    lr = 1e-3  # on film reviews better than 3e-3 with two seeds (docs/performance.md)

    targets: Annotated[Sequence[str] | None, Help("endings of the norms' paths; every norm where unset")] = None
    layers: Layers = None

    def sites(self, base: Structure) -> list[Site]:
        sites = base.norms
        if self.targets is not None:
            sites = [s for s in sites if any(s.path == t or s.path.endswith("." + t) for t in self.targets)]
            if not sites:
                names = ", ".join(sorted({s.name for s in base.norms})) or "none"
                raise UsageError(f"norm targets {self.targets!r} match no norm of the base", f"Norms: {names}.")
        if not sites:
            raise UsageError("the base has no norm of one input with a weight of its own", "Choose LoRA.")
        if self.layers is not None:
            kept = parse_layers(self.layers, 1 + max(base.blocks.values(), default=-1))
            sites = [s for s in sites if s.layer in kept]
            if not sites:
                raise UsageError(f"layers {self.layers!r} hold none of the norms", "Name other layers.")
        return sites

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        own = site.module.named_parameters(recurse=False)
        return {name: value.detach().clone().float() for name, value in own}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(out_scale=params["weight"] + site.offset, shift=params.get("bias"))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        own = site.module.named_parameters(recurse=False)
        return {name: (f"ln_tuning_layers.{name}", tuple(value.shape)) for name, value in own}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"target_modules": [site.path for site in sites]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> NormTuning:
        return cls(targets=paths)
