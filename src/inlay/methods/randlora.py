"""RandLoRA: a sum of products of frozen random matrices, of full rank as a whole, with trained scales between them.

    y = W x + s sum_i B_i L_i A G_i x        s = alpha / r; L_i and G_i are diagonal; A and B are never trained

Paper: Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models" (arXiv:2502.00987).

Shapes: with k the smaller side of a weight and l the larger one, there are n = k / r bases, rounded up. A
(r, 1, most k) and B (most l, most n, r) are seen at all sites, which take their first entries. What is trained is
lambda (r, n) and gamma (n, k). Where `in` is the larger side, the two factors change places. A's rows (r n, k) stand in
the order (r, n) and B's columns (l, n r) in the order (n, r), as in HF PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from inlay.values import Count, Help, Positive

from .common import check_rank
from .contract import Dropout, Layers, LinearForm, Params, Site, Targets
from .linear import LAYERS, LinearMethod
from .peft_fields import Fields

__all__ = ["RandLoRA"]


@dataclass(frozen=True)
class RandLoRA(LinearMethod):
    """Settings of RandLoRA, by HF PEFT's names and defaults: `r` is the rank of one base, `alpha` the scale (20 r in
    the paper); `projection_prng_key` seeds the frozen matrices, which a checkpoint holds with `save_projection`;
    `sparse` and `very_sparse` make them of -1, 0 and 1, before they are scaled.

    At 3e-3 it breaks down on film reviews, and 3e-4 did best (docs/methods.md).
    """

    title = "RandLoRA"
    paper = "arXiv:2502.00987"
    peft_type = "RANDLORA"
    lr = 3e-4
    peft_bias = True
    renamed: ClassVar[Mapping[str, str]] = {"alpha": "randlora_alpha", "dropout": "randlora_dropout"}
    peft_fields = Fields(
        read={
            "r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "projection_prng_key": 0, "save_projection": True,
            "sparse": False, "very_sparse": False, "bias": "none", "target_modules": None, "modules_to_save": None,
            **LAYERS,
        },
        passed={"fan_in_fan_out": False, "init_weights": True},
    )  # fmt: skip

    r: Annotated[Count, Help("rank of one base; the smaller, the more is trained")] = 32
    alpha: Annotated[Positive, Help("scale of the sum, divided by r; 20 r in the paper")] = 640
    targets: Targets = "all-linear"
    layers: Layers = None
    projection_prng_key: Annotated[int, Ge(0), Le(2**63 - 1), Help("seed of the frozen matrices")] = 0
    save_projection: Annotated[bool, Help("write the frozen matrices into checkpoints too")] = True
    sparse: Annotated[bool, Help("of the entries of the frozen matrices, two in three are zero")] = False
    very_sparse: Annotated[bool, Help("all but one in the root of the width are")] = False
    dropout: Dropout = 0.0

    def _size(self, site: Site) -> tuple[int, int]:
        """The number of bases, and the smaller side."""
        return -(-min(site.in_features, site.out_features) // self.r), min(site.in_features, site.out_features)

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        check_rank(self, self.r, site)
        n, smaller = self._size(site)
        return {"lambda": torch.zeros(self.r, n), "gamma": torch.full((n, smaller), 1 / max(n, smaller))}

    def _shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, int, int]]:
        smaller, larger = sorted((max(s.in_features for s in sites), max(s.out_features for s in sites)))
        return {"A": (self.r, 1, smaller), "B": (larger, -(-smaller // self.r), self.r)}

    def constants(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """As the reference draws them: in bfloat16, A first, then B base by base."""
        generator, shapes = torch.Generator().manual_seed(self.projection_prng_key), self._shapes(sites)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(shapes["A"][2]) if self.very_sparse else 3))
            drawn = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
            made = {name: (u > 1 - share).float() - (u < share).float() for name, u in drawn.items()}
        else:
            rows, bases, r = shapes["B"]
            made = {"A": _kaiming(shapes["A"], generator)}
            made["B"] = torch.cat([_kaiming((rows, 1, r), generator) for _ in range(bases)], dim=1)
        return {name: value / value.std() for name, value in made.items()}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        (n, smaller), larger = self._size(site), max(site.in_features, site.out_features)
        a = params["lambda"][:, :, None] * params["A"][:, :, :smaller] * params["gamma"]  # (r, n, smaller)
        rows, columns = a.flatten(0, 1), params["B"][:larger, :n].flatten(1)
        return {"down": rows, "up": columns} if smaller == site.in_features else {"down": columns.t(), "up": rows.t()}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["down"], params["up"], self.alpha / self.r)

    def form_dropout(self) -> float:
        return self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        n, smaller = self._size(site)
        return {"lambda": ("randlora_lambda", (self.r, n)), "gamma": ("randlora_gamma", (n, smaller))}

    def constant_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        shapes = self._shapes(sites).items() if self.save_projection else ()
        return {name: (f"base_model.randlora_{name}", shape) for name, shape in shapes}

    def copied_keys(self, site: Site) -> dict[str, str]:
        return {"randlora_A": "A", "randlora_B": "B"} if self.save_projection else {}


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), math.sqrt(5), generator=generator)
