"""HRA: the input of a layer, mirrored in a few directions.

    y = W H_1 ... H_r x + bias        H_i = I - 2 u_i u_i^T / |u_i|^2

Paper: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation" (arXiv:2405.17484).

Shapes: u is (in, r), with unit columns V. The product of the reflections is I - V T V^T, with T (r, r) the inverse of
the upper triangle of V^T V whose diagonal is 1/2; so HRA is a product of rank r, of D = V^T and U = -W V T. With
`apply_GS` the columns are made orthonormal first, and T is 2 I.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help

from .contract import Layers, LinearForm, Params, Site, Targets
from .linear import LAYERS, TARGETS, LinearMethod
from .peft_fields import Fields

__all__ = ["HRA"]


@dataclass(frozen=True)
class HRA(LinearMethod):
    """Settings of HRA, by HF PEFT's names and defaults: `r` is the number of reflections, an even one, since they start
    in pairs that undo each other; `apply_GS` makes their directions orthonormal, in checkpoints alone.

    The learning rate is LoRA's; docs/methods.md has how others did.
    """

    title = "HRA"
    paper = "arXiv:2405.17484"
    peft_type = "HRA"
    peft_bias = True
    uncast = ("u",)  # the directions of a pair differ by little
    peft_fields = Fields(
        read={"r": 8, "apply_GS": False, "bias": "none", **TARGETS, **LAYERS}, passed={"init_weights": True}
    )

    r: Annotated[Count, Help("number of reflections, an even one; 8 to 32 is usual")] = 8
    targets: Targets = "all-linear"
    layers: Layers = None
    apply_GS: Annotated[bool, Help("make the directions of the reflections orthonormal")] = False

    def check_fit(self, sites: Sequence[Site]) -> None:
        if self.apply_GS:
            what = "HRA with apply_GS has no start that leaves the base as it is: orthonormal directions are no pairs"
            raise UsageError(what, "Leave it out; checkpoints that have it can be loaded and trained on.")
        if self.r % 2:
            raise UsageError(f"HRA's r is {self.r}, and reflections start in pairs", "Choose an even r.")
        if narrow := next((site for site in sites if self.r > site.in_features), None):
            what = f"HRA's r is {self.r}, and {narrow.path} reads {narrow.in_features} features"
            raise UsageError(what, "8 to 32 is usual.")

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        half = torch.empty(site.in_features, self.r // 2)
        torch.nn.init.kaiming_uniform_(half, a=math.sqrt(5), generator=generator)
        return {"u": half.repeat_interleave(2, dim=1)}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        u, weight = params["u"], site.weight().to(params["u"].dtype)
        with torch.autocast(u.device.type, enabled=False):  # pairs undo each other only in the dtype of u
            return _factors(u, weight, self.apply_GS)

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["down"], params["up"])

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"u": ("hra_u", (site.in_features, self.r))}


def _factors(u: Tensor, weight: Tensor, orthonormal: bool) -> dict[str, Tensor]:
    """D and U, of u (in, r) and W (out, in) of one dtype."""
    if orthonormal:
        units = torch.linalg.qr(u)[0]
        return {"down": units.t(), "up": -2 * weight @ units}
    units = u / u.norm(dim=0)
    inverse = (units.t() @ units).triu(1) + torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
    return {"down": units.t(), "up": torch.linalg.solve_triangular(inverse, -weight @ units, upper=True, left=False)}
