"""VeRA: one frozen random pair of matrices for all sites, and two trained vectors at each.

    y = W x + b * (B (d * (A x)))        A and B are random, shared and never trained

Paper: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454).
Shapes: d is (r,) and b (out,). A is (r, most in), B (most out, r), sized for the largest site; a site takes A's first
`in` columns and B's first `out` rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help

from .contract import Dropout, Layers, LinearForm, Method, Params, Site, Structure, Targets, select_projections
from .peft_fields import VERA_FIELDS

__all__ = ["VeRA"]


@dataclass(frozen=True)
class VeRA(Method):
    """Settings of VeRA: `r` is the rank, `targets` and `layers` say where it acts; `projection_prng_key` seeds the two
    frozen matrices, which a checkpoint holds with `save_projection`; d starts at `d_initial` and b at zero; `dropout`
    is the share of x's entries that A does not see in training.

    Equal frozen matrices are held once, however many adapters use them. The learning rate is ten times
    LoRA's, as in the paper for instruction tuning, and the best of three on film reviews (docs/methods.md).
    """

    title = "VeRA"
    paper = "arXiv:2310.11454"
    peft_type = "VERA"
    peft_fields = VERA_FIELDS
    peft_bias = True
    lr = 1e-2

    r: Annotated[Count, Help("rank of the frozen matrices; 64 to 1024 is usual")] = 256
    targets: Targets = "all-linear"
    layers: Layers = None
    projection_prng_key: Annotated[int, Ge(0), Help("seed of the frozen matrices")] = 0
    save_projection: Annotated[bool, Help("write the frozen matrices into checkpoints too")] = True
    d_initial: Annotated[float, Help("what the inner vector starts at")] = 0.1
    dropout: Dropout = 0.0

    def sites(self, base: Structure) -> list[Site]:
        sites = select_projections(base, self.targets, self.layers)
        if table := next((site for site in sites if site.is_embedding), None):
            raise UsageError(
                f"VeRA cannot act on {table.path}, which is a table", "Name linear layers, or choose LoRA."
            )
        return sites

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.r,), float(self.d_initial)), "b": torch.zeros(site.out_features)}

    def _shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
        return {"A": (self.r, max(s.in_features for s in sites)), "B": (max(s.out_features for s in sites), self.r)}

    def constants(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Kaiming uniform, A before B from one generator, as the reference draws them."""
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        bounds = {name: math.sqrt(6 / columns) for name, (_, columns) in self._shapes(sites).items()}
        return {
            name: torch.empty(shape).uniform_(-bounds[name], bounds[name], generator=generator)
            for name, shape in self._shapes(sites).items()
        }

    def form(self, params: Params, site: Site) -> LinearForm:
        down, up = params["A"][:, : site.in_features], params["B"][: site.out_features]
        return LinearForm(down, up, middle=params["d"], outer=params["b"])

    def form_dropout(self) -> float:
        return self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"d": ("vera_lambda_d", (self.r,)), "b": ("vera_lambda_b", (site.out_features,))}

    def constant_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        if not self.save_projection:
            return {}
        return {name: (f"base_model.vera_{name}", shape) for name, shape in self._shapes(sites).items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": self.r,
            "projection_prng_key": self.projection_prng_key,
            "save_projection": self.save_projection,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "target_modules": [site.path for site in sites],
            "fan_in_fan_out": all(site.transposed for site in sites),
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> VeRA:
        return cls(
            r=config["r"],
            targets=paths,
            projection_prng_key=config["projection_prng_key"],
            save_projection=config.get("save_projection", True),
            d_initial=config.get("d_initial", 0.1),
            dropout=config.get("vera_dropout") or 0.0,
        )
