"""PVeRA: VeRA whose inner vector is drawn anew for each token in training.

    y = W x + b * (B z)        z = m + e * exp(v / 2), with m and v the halves of d * (A x), and e standard normal

Outside of training z is m. Paper: Fillioux et al. 2025, "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation"
(arXiv:2512.07703).

Shapes: d is (2r,) and b (out,). A (2r, most in) and B (most out, r) are random, shared by all sites and never trained;
a site takes A's first `in` columns and B's first `out` rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from inlay.values import Count, Help

from .contract import Dropout, Layers, Params, Site, Targets, Tokens
from .linear import LAYERS, LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["PVeRA"]


@dataclass(frozen=True)
class PVeRA(LinearMethod):
    """Settings of PVeRA, by HF PEFT's names and defaults: `r` is the rank, `projection_prng_key` seeds the frozen
    matrices, which a checkpoint holds with `save_projection`; d starts at `d_initial`. The learning rate was not
    measured here: it is that of HF PEFT's best run on MetaMathQA.
    """

    title = "PVeRA"
    paper = "arXiv:2512.07703"
    peft_type = "PVERA"
    peft_bias = True
    lr = 3e-3
    renamed: ClassVar[Mapping[str, str]] = {"dropout": "pvera_dropout"}
    peft_fields = Fields(
        read={
            "r": 256, "projection_prng_key": 0, "save_projection": True, "d_initial": 0.1, "pvera_dropout": 0.0,
            "bias": "none", "target_modules": None, "modules_to_save": None, **LAYERS,
        },
        passed={"fan_in_fan_out": False, "init_weights": True, "generator_seed": None},  # which seeds training alone
        refused={"sample_at_inference": False},
    )  # fmt: skip

    r: Annotated[Count, Help("rank of the frozen matrices; 64 to 1024 is usual")] = 256
    targets: Targets = "all-linear"
    layers: Layers = None
    projection_prng_key: Annotated[int, Ge(0), Le(2**63 - 1), Help("seed of the frozen matrices")] = 0
    save_projection: Annotated[bool, Help("write the frozen matrices into checkpoints too")] = True
    d_initial: Annotated[float, Help("what the inner vector starts at")] = 0.1
    dropout: Dropout = 0.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((2 * self.r,), float(self.d_initial)), "b": torch.zeros(site.out_features)}

    def _shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
        wide = max(s.in_features for s in sites)
        return {"A": (2 * self.r, wide), "B": (max(s.out_features for s in sites), self.r)}

    def constants(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Kaiming uniform, A before B from one generator, as the reference draws them."""
        generator, made = torch.Generator().manual_seed(self.projection_prng_key), {}
        for name, (rows, columns) in self._shapes(sites).items():
            bound = math.sqrt(6 / columns)
            made[name] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return made

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        seen = tokens.dropout(x, self.dropout).to(y.dtype)
        mean, spread = ((seen @ params["A"][:, : site.in_features].t()) * params["d"]).chunk(2, -1)
        drawn = tokens.normal(mean)
        z = mean if drawn is None else mean + drawn * (spread / 2).exp()
        return y + params["b"] * (z @ params["B"][: site.out_features].t())

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        weight, down = site.weight(), params["d"][: self.r, None] * params["A"][: self.r, : site.in_features]
        made = params["b"][:, None] * (params["B"][: site.out_features] @ down)
        return merged_weight(site, weight + made.to(weight))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"d": ("pvera_lambda_d", (2 * self.r,)), "b": ("pvera_lambda_b", (site.out_features,))}

    def constant_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        if not self.save_projection:
            return {}
        return {name: (f"base_model.pvera_{name}", shape) for name, shape in self._shapes(sites).items()}
