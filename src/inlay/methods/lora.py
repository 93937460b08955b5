"""LoRA: a low-rank product beside a frozen weight.

    y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling

Papers: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685);
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732);
Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354).

Shapes: A is (r, in), B is (out, r). On an embedding `in` counts the rows of the table, and A's columns are looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.values import Count, Help, Positive

from .contract import (
    Dropout,
    Layers,
    LinearForm,
    Method,
    Params,
    Site,
    Structure,
    Targets,
    check_pattern,
    select_projections,
)

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Method):
    """Settings of LoRA.

    `r` is the rank and `alpha` the scale (2r where None); `targets` are module names, groups or a regular expression,
    `layers` restricts them to some blocks; `rank_pattern` and `alpha_pattern` map a name or regular expression over
    the end of a module's path to its own r or alpha; `use_rslora` divides by sqrt(r);
    `dropout` is the share of x's entries that the low-rank branch does not see in training; `loraplus_lr_ratio` is
    by how much faster B learns than A (LoRA+; 16 in its paper, with a lower learning rate than usual).
    """

    title = "LoRA"
    paper = "arXiv:2106.09685"
    peft_type = "LORA"
    peft_bias = True

    r: Annotated[Count, Help("rank of the product; 4 to 32 is usual")] = 8
    alpha: Annotated[Positive | None, Help("scale of the product; 2r where unset")] = None
    targets: Targets = "all-linear"
    layers: Layers = None
    rank_pattern: Annotated[Mapping[str, Count], Help("other ranks, by the end of a module's path")] = field(
        default_factory=dict
    )
    alpha_pattern: Annotated[Mapping[str, Positive], Help("other scales, by the end of a module's path")] = field(
        default_factory=dict
    )
    use_rslora: Annotated[bool, Help("divide by the root of r, which suits large ranks")] = False
    dropout: Dropout = 0.0
    loraplus_lr_ratio: Annotated[Positive, Help("by how much faster B learns than A (LoRA+); 16 in its paper")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                check_pattern(pattern, f"LoRA's {name}")

    def sites(self, base: Structure) -> list[Site]:
        return select_projections(base, self.targets, self.layers)

    def check_fit(self, sites: Sequence[Site]) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(_matches(pattern, site.path) for site in sites):
                    raise UsageError(f"LoRA's {name} names {pattern!r}, which no target ends in", "Name a target.")
        for site in sites:
            r, most = self.rank(site), max(site.in_features, site.out_features)
            if r > most:
                shape = f"({site.out_features}, {site.in_features})"
                what = f"LoRA's r is {r}, more than {site.path} {shape} has rows or columns"
                raise UsageError(what, "4 to 32 is usual.")

    def rank(self, site: Site) -> int:
        return int(_patterned(self.rank_pattern, site.path, self.r))

    def scale(self, site: Site) -> float:
        r = self.rank(site)
        default = 2 * self.r if self.alpha is None else self.alpha
        return _patterned(self.alpha_pattern, site.path, default) / (math.sqrt(r) if self.use_rslora else r)

    def rate(self, site: Site | None, key: str) -> float:
        return self.loraplus_lr_ratio if key == "B" and site is not None and not site.is_embedding else 1.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        r = self.rank(site)
        a, b = torch.zeros(r, site.in_features), torch.zeros(site.out_features, r)
        if site.is_embedding:  # as the reference does: a table's columns start at zero
            torch.nn.init.normal_(b, generator=generator)
        else:
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return {"A": a, "B": b}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["A"], params["B"], self.scale(site) * site.table_scale)

    def form_dropout(self) -> float:
        return self.dropout

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        r = self.rank(site)
        return {"A": (ends[0], (r, site.in_features)), "B": (ends[1], (site.out_features, r))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": self.r,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": [site.path for site in sites],
            "fan_in_fan_out": all(site.transposed for site in sites),
        }

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and config.get("target_modules") != "dummy-target-modules"  # saved modules alone

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> LoRA:
        for name in ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication"):
            if config.get(name):
                raise FormatError(f"the LoRA checkpoint sets {name}, which is not supported", "Load it with peft.")
        return cls(
            r=config["r"],
            alpha=config["lora_alpha"],
            targets=paths,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=config.get("use_rslora") or False,
            dropout=config.get("lora_dropout") or 0.0,
        )


def _patterned(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of `path`, else `default`."""
    return next((v for p, v in patterns.items() if _matches(p, path)), default)


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
