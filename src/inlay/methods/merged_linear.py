"""LoRA on some of the equal parts of a fused weight, as loralib's MergedLinear has it.

    y_i = W_i x + s B_i A_i x        for each enabled part i of the rows of W;  s = alpha / r

A fused weight holds queries, keys and values one below the other, all of one width, which is looked at; a weight whose
name is given as a target is taken for as many equal parts as `enable_lora` is long. Each enabled part has an A and a B
of its own: A is (n r, in) for n of them, and B (n width, r).

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), and its package.
HF PEFT has no such layer: its checkpoint is that of one LoRA of rank n r whose B is zero elsewhere, as which it opens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.head_features import head_features
from inlay.values import Help

from .contract import LinearForm, Method, Params, Site, Structure, Targets, Values
from .lora import LoRA

__all__ = ["MergedLoRA"]


@dataclass(frozen=True)
class MergedLoRA(LoRA):
    """Settings of LoRA on parts of fused weights: those of LoRA, where r is the rank of each part. It begins with
    LoRA's learning rate, and was not measured here.
    """

    title = "LoRA on parts of fused weights"
    paper = "arXiv:2106.09685"
    begins_inside = False

    targets: Targets = "qkv"
    enable_lora: Annotated[
        Sequence[bool], Help("which of the equal parts of a fused weight: queries, keys and values")
    ] = (True, False, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.enable_lora):
            raise UsageError(f"enable_lora={list(self.enable_lora)} enables no part", "Enable one at least.")
        if self.init != "kaiming":
            raise UsageError(f"{self.title} has no init={self.init}", "Use init=kaiming.")

    def sites(self, base: Structure) -> list[Site]:
        n = len(self.enable_lora)
        sites = super().sites(base) if self.targets != "qkv" else _fused(base, super().sites(base), n)
        for site in sites:
            if site.is_embedding or site.out_features % n:
                what = f"{site.path} gives {site.out_features} numbers, which are not {n} equal parts"
                raise UsageError(what, "Name fused weights of parts of one width, or use LoRA.")
        return sites

    @property
    def parts_enabled(self) -> int:
        return sum(self.enable_lora)

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        n, r, width = self.parts_enabled, self.rank(site), site.out_features // len(self.enable_lora)
        a = torch.zeros(n * r, site.in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return {"A": a, "B": torch.zeros(n * width, r)}

    def derive(self, params: Params, site: Site | None) -> Params:
        """U (out, n r): each part's B in its own rows and columns."""
        return {} if site is None else {"up": self._spread(params["B"])}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["A"], params["up"], self.scale(site))

    def _spread(self, b: Tensor) -> Tensor:
        width, r = len(b) // self.parts_enabled, b.shape[1]
        blocks, number = [], 0
        for enabled in self.enable_lora:
            row = b.new_zeros(width, self.parts_enabled * r)
            if enabled:
                own = b[number * width : (number + 1) * width]
                row = torch.nn.functional.pad(own, (number * r, (self.parts_enabled - 1 - number) * r))
                number += 1
            blocks.append(row)
        return torch.cat(blocks)

    def compacted(self, values: Values, sites: Sequence[Site]) -> tuple[Method, Values]:
        """One LoRA of rank n r."""
        n = self.parts_enabled
        own: dict[str, Any] = {
            "r": n * self.r, "alpha": n * (2 * self.r if self.alpha is None else self.alpha),
            "rank_pattern": {re.escape(site.path): n * self.rank(site) for site in sites},
            "alpha_pattern": {re.escape(s.path): self.scale(s) * self._divisor(n * self.rank(s)) for s in sites},
        }  # fmt: skip
        kept = {name: getattr(self, name) for name in ("layers", "use_rslora", "dropout", "loraplus_lr_ratio")}
        lora = LoRA(targets=[site.path for site in sites], **kept, **own)
        return lora, {**values, **{s.path: {**values[s.path], "B": self._spread(values[s.path]["B"])} for s in sites}}

    def _divisor(self, r: int) -> float:
        return math.sqrt(r) if self.use_rslora else r

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False


def _fused(base: Structure, sites: list[Site], parts: int) -> list[Site]:
    """Those of `sites` that hold queries, keys and values. Raises: UsageError where none does, or they lie otherwise
    than one below the other in equal parts."""
    found = [site for site in sites if site.role == "qkv"]
    if not found:
        raise UsageError("this base has no fused queries, keys and values", "Use LoRA, or name targets.")
    if parts != 3:
        raise UsageError(f"enable_lora names {parts} parts of queries, keys and values", "Name three, or name targets.")
    seen = head_features(base)
    for site in found:
        own = next((one for one in seen if site.path in one.queries and site.path in one.keys), None)
        width = site.out_features // 3
        blocks = [] if own is None else [own.queries[site.path] >= 0, own.keys[site.path] < 0]
        if not blocks or not all(bool(of[:width].all() and not of[width:].any()) for of in blocks):
            what = f"{site.path} was not seen to hold queries, keys and values as three equal parts"
            raise UsageError(what, "Use LoRA, or name it as a target: equal parts of its rows are taken then.")
    return found
