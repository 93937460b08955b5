"""IA³: learned vectors that rescale keys, values and the inner activations of the feed-forward network.

    y = l * (W x + b)            keys, values
    y = W (l * x) + b            the feed-forward's last projection, whose input is rescaled

Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(arXiv:2205.05638). Shapes: l is (out,) or, at a feed-forward site, (in,). Every l starts at one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Help

from .contract import Layers, LinearForm, Method, Params, Site, Structure, Targets, select_projections
from .peft_fields import IA3_FIELDS

__all__ = ["IA3"]


@dataclass(frozen=True)
class IA3(Method):
    """Settings of IA³: without `targets`, the key and value projections and the last projection of each MLP.

    `feedforward` names the targets whose input is rescaled; without it, those that are the MLP's output.
    """

    title = "IA³"
    paper = "arXiv:2205.05638"
    peft_type = "IA3"
    peft_fields = IA3_FIELDS
    lr = 0.01

    targets: Annotated[Targets | None, Help("module names or a group; keys, values and MLP outputs where unset")] = None
    feedforward: Annotated[Sequence[str] | None, Help("those rescaled at their input; MLP outputs where unset")] = None
    layers: Layers = None

    def sites(self, base: Structure) -> list[Site]:
        if self.targets is not None:
            return select_projections(base, self.targets, self.layers)
        last = {s.path for s in base.sublayers if s.part == "mlp"}
        sites = select_projections(base, "all-linear", self.layers)
        chosen = [s for s in sites if s.role in ("k", "v", "qkv") or s.path in last]
        if not chosen:
            raise UsageError("IA³ finds no key, value or feed-forward projection", "Name them with targets.")
        return chosen

    def scales_input(self, site: Site) -> bool:
        if self.feedforward is not None:
            return any(site.path == f or site.path.endswith("." + f) for f in self.feedforward)
        return site.part == "mlp"

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"l": torch.ones(site.in_features if self.scales_input(site) else site.out_features)}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(in_scale=params["l"]) if self.scales_input(site) else LinearForm(out_scale=params["l"])

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        shape = (1, site.in_features) if self.scales_input(site) else (site.out_features, 1)
        return {"l": ("ia3_l", shape)}

    def own_shape(self, name: str, value: Tensor) -> Tensor:
        return value.flatten()

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "target_modules": [site.path for site in sites],
            "feedforward_modules": [site.path for site in sites if self.scales_input(site)],
            "fan_in_fan_out": all(site.transposed for site in sites),
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> IA3:
        inner = config.get("feedforward_modules") or []
        if isinstance(inner, str):
            inner = [path for path in paths if re.fullmatch(inner, path)]
        return cls(targets=paths, feedforward=list(inner))
