"""MiSS: one small trained matrix, seen by every segment of the input alike.

    y = W x + S^T (sum of the segments of x)        standard: S (r, out)
    the same, S = [T T ...]                         mini: T (r, mini_r), repeated along `out`
    W' = W + W B + B, block by block                bat: B (r, r) for each r rows of W

Paper: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
(arXiv:2409.15371), which earlier versions call Bone.

Shapes: x (in,) is cut into segments of r, the last of which may be shorter. In a block of "bat", W (r, r) and B (r, r)
are multiplied; all blocks of the same rows share one B, and B is (out / r, r, r) as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.values import Count, Help, OneOf

from .contract import Dropout, Layers, LinearForm, Method, Params, Site, Targets
from .linear import LAYERS, TARGETS, LinearMethod, dense_form
from .peft_fields import Fields

__all__ = ["MiSS"]

VARIANTS = ("standard", "bat", "mini")


@dataclass(frozen=True)
class MiSS(LinearMethod):
    """Settings of MiSS, by HF PEFT's names and defaults, but for `variant`, which is its `init_weights`: `r` is the
    width of a segment, `mini_r` the width of what "mini" repeats. Only "standard" and "mini" have dropout.

    The learning rate is near a third of LoRA's: at LoRA's own, film reviews are not learned (docs/methods.md).
    """

    title = "MiSS"
    paper = "arXiv:2409.15371"
    peft_type = "MISS"
    lr = 3e-4
    peft_bias = True
    renamed: ClassVar[Mapping[str, str]] = {"dropout": "miss_dropout"}
    peft_fields = Fields(
        {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none", **TARGETS, **LAYERS}
    )

    r: Annotated[Count, Help("width of a segment of the input; 16 to 128 is usual")] = 64
    targets: Targets = "all-linear"
    layers: Layers = None
    variant: Annotated[str, OneOf(VARIANTS, "variant"), Help("what is shared: see the paper")] = "standard"
    mini_r: Annotated[Count, Help('width of what the variant "mini" repeats')] = 1
    dropout: Dropout = 0.0

    def _shape(self, site: Site) -> tuple[int, ...]:
        if self.variant == "bat":
            return site.out_features // self.r, self.r, self.r
        return self.r, self.mini_r if self.variant == "mini" else site.out_features

    def check_fit(self, sites: Sequence[Site]) -> None:
        for site in sites:
            shape, widths = f"({site.out_features}, {site.in_features})", [site.in_features, site.out_features]
            if self.r > site.in_features:
                what = f"MiSS's r is {self.r}, and {site.path} {shape} reads {site.in_features}"
                raise UsageError(what, "Choose a smaller r.")
            if self.variant == "bat" and any(width % self.r for width in widths):
                what = f"MiSS's r is {self.r}, which does not divide both sides of {site.path} {shape}"
                raise UsageError(what, 'The variant "bat" needs an r that does.')
            if self.variant == "mini" and site.out_features % self.mini_r:
                what = f"MiSS's mini_r is {self.mini_r}, which does not divide the {site.out_features} of {site.path}"
                raise UsageError(what, "Choose one that does.")

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        return {"block": torch.zeros(self._shape(site))}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        block = params["block"]
        if self.variant == "bat":
            form = dense_form(_bat(site.weight().to(block), block))
            assert form.down is not None and form.up is not None
            return {"down": form.down, "up": form.up}
        up = block.repeat(1, site.out_features // self.mini_r) if self.variant == "mini" else block
        eye = torch.eye(self.r, dtype=block.dtype, device=block.device)
        down = eye.repeat(1, -(-site.in_features // self.r))[:, : site.in_features].contiguous()
        return {"down": down, "up": up.t()}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["down"], params["up"])

    def form_dropout(self) -> float:
        return 0.0 if self.variant == "bat" else self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"block": ("miss_block", self._shape(site))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {**super().to_peft(sites), "init_weights": True if self.variant == "standard" else self.variant}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        start = config.get("init_weights", True)
        if start not in (True, False, None, "bat", "mini"):
            raise FormatError(f"the MiSS checkpoint sets init_weights to {start!r}", "Load it with peft.")
        variant = start if isinstance(start, str) else VARIANTS[0]
        return replace(super().from_peft(config, paths), variant=variant)  # pyright: ignore


def _bat(weight: Tensor, block: Tensor) -> Tensor:
    """The change (out, in) of W (out, in): W_ij B_i + B_i for each block (i, j) of it."""
    rows, r, _ = block.shape
    blocks = weight.reshape(rows, r, -1, r).transpose(1, 2)  # (rows, columns, r, r)
    made = blocks @ block[:, None] + block[:, None]
    return made.transpose(1, 2).reshape(weight.shape)
