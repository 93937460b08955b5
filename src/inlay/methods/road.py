"""RoAd: the output of a layer, rotated and scaled in pairs of features.

    y'_1 = a cos(t) y_1 - a sin(t) y_2        y'_2 = a sin(t) y_1 + a cos(t) y_2        y = W x + bias

Paper: Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability" (arXiv:2409.00119).

Shapes: y (out,) is cut into groups of g features, and a feature of a group's first half is paired with the one g / 2
behind it. Angles t and scales a are (out / 2,), one of each a pair, in the variant "road_1"; (out,), one a feature, in
"road_2"; (2 out,), one for each of a feature's two terms, in "road_4": for each group g for the cosines, then g for the
sines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help, OneOf

from .contract import Layers, Params, Site, Targets, Tokens
from .linear import LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["RoAd"]

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""How many angles a feature has."""


@dataclass(frozen=True)
class RoAd(LinearMethod):
    """Settings of RoAd, by HF PEFT's names and defaults: `variant` says what shares an angle and a scale, `group_size`
    how far apart the features of a pair stand. It rotates the bias too. The learning rate is that of HF
    PEFT's best run on MetaMathQA, and the best of three on film reviews (docs/methods.md).
    """

    title = "RoAd"
    paper = "arXiv:2409.00119"
    peft_type = "ROAD"
    lr = 1e-3
    uncast = ("theta", "alpha")  # they begin at 0 and 1
    peft_fields = Fields(
        read={
            "variant": "road_1", "group_size": 64, "target_modules": None, "modules_to_save": None,
        },
        passed={"init_weights": True},
    )  # fmt: skip

    variant: Annotated[str, OneOf(tuple(SIZES), "variant"), Help("how many angles: see the paper")] = "road_1"
    group_size: Annotated[Count, Help("features in a group, an even number that divides the output")] = 64
    targets: Targets = "all-linear"
    layers: Layers = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise UsageError(f"RoAd's group_size is {self.group_size}", "Choose an even number.")

    def check_fit(self, sites: Sequence[Site]) -> None:
        if wrong := next((site for site in sites if site.out_features % self.group_size), None):
            what = f"RoAd's group_size is {self.group_size}, which does not divide the {wrong.out_features} features"
            raise UsageError(f"{what} of {wrong.path}", "Choose one that divides those of all targets.")

    def _size(self, site: Site) -> int:
        return int(site.out_features * SIZES[self.variant])

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        return {"theta": torch.zeros(self._size(site)), "alpha": torch.ones(self._size(site))}

    def derive(self, params: Params, site: Site | None) -> Params:
        """By what a feature and the one that it is paired with are multiplied, (groups, 2, g / 2) each."""
        if site is None:
            return {}
        half = self.group_size // 2
        theta, alpha = (params[name].view(-1, round(2 * SIZES[self.variant]), half) for name in ("theta", "alpha"))
        split = self.variant == "road_4"
        cos = (alpha * theta.cos())[:, : 2 if split else None]
        return {"own": cos, "paired": (alpha * theta.sin())[:, 2 if split else 0 :]}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        return self._turned(params, y)

    def _turned(self, params: Params, y: Tensor) -> Tensor:
        """y (n, out) through the rotations, in the dtype of the angles."""
        pairs = y.to(params["own"].dtype).reshape(len(y), -1, 2, self.group_size // 2)
        first, second = pairs.unbind(2)
        turned = torch.stack((-second, first), 2)
        return (pairs * params["own"] + turned * params["paired"]).reshape(y.shape).to(y.dtype)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        found, bias = merged_weight(site, self._turned(params, site.weight().t()).t()), site.module.bias
        return found if not isinstance(bias, Tensor) else {**found, "bias": self._turned(params, bias[None])[0]}

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        size = self._size(site)
        return {"theta": ("road_theta", (size,)), "alpha": ("road_alpha", (size,))}
