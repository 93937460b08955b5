"""LoRA: a low-rank product beside a frozen weight.

    y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling

Papers: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685);
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732);
Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354).

Shapes: A is (r, in), B is (out, r). On an embedding `in` counts the rows of the table, and A's columns are looked up.
On the parameter of E experts, A is (E, r, in) and B (E, out, r): each expert has a product of its own. Where a start is
taken back (see `lora_starts`) there are A0 and B0 of the same shapes, which are not trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.parameters import select_experts, split_targets
from inlay.sites.targets import select_projections
from inlay.values import Count, Help, Positive

from .common import Patterned, Ranks, Scales, patterned
from .contract import Dropout, Layers, LinearForm, Method, Params, Site, Structure, Targets, Values
from .lora_starts import INSIDE, Starts
from .peft_fields import LORA_FIELDS, check_one_variant
from .starts import began_inside, doubled

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Starts, Patterned):
    """Settings of LoRA.

    `r` is the rank and `alpha` the scale (2r where None); `targets` are module names, groups or a regular expression,
    `layers` restricts them to some blocks; the patterns map a name or regular expression over the end of a module's
    path to its own r or alpha; `use_rslora` divides by sqrt(r); `dropout` is the share of x's entries that the product
    does not see in training; `loraplus_lr_ratio` is by how much faster B learns than A (with a lower rate than usual).
    `target_parameters` are parameters that hold a mixture's experts, which `targets` leave out but for "experts".
    `init` and the settings behind it say how A and B begin (`lora_starts.Starts`).
    """

    title = "LoRA"
    paper = "arXiv:2106.09685"
    peft_type = "LORA"
    peft_fields = LORA_FIELDS
    peft_bias = True
    untrained = frozenset({"A0", "B0"})

    r: Annotated[Count, Help("rank of the product; 4 to 32 is usual")] = 8
    alpha: Annotated[Positive | None, Help("scale of the product; 2r where unset")] = None
    targets: Targets = "all-linear"
    target_parameters: Annotated[
        Sequence[str],
        Help('parameters of experts, such as experts.down_proj; all by the target "experts"; all-linear has none'),
    ] = ()
    layers: Layers = None
    rank_pattern: Ranks = field(default_factory=dict)
    alpha_pattern: Scales = field(default_factory=dict)
    use_rslora: Annotated[bool, Help("divide by the root of r, which suits large ranks")] = False
    dropout: Dropout = 0.0
    loraplus_lr_ratio: Annotated[Positive, Help("by how much faster B learns than A (LoRA+); 16 in its paper")] = 1.0

    def sites(self, base: Structure) -> list[Site]:
        targets, every = split_targets(self.targets)
        if not every and not self.target_parameters:
            return select_projections(base, targets, self.layers)
        if any(getattr(type(self), name) is not getattr(LoRA, name) for name in ("create", "derive", "form")):
            raise UsageError(f"{self.title} does not act on parameters of experts", "Use LoRA, or leave them out.")
        if self.dropout:
            raise UsageError("LoRA has no dropout on parameters of experts", "Set it to 0, as HF PEFT asks for there.")
        experts = select_experts(base, self.target_parameters, every, self.layers)
        return [*(select_projections(base, targets, self.layers) if targets else []), *experts]

    def check_fit(self, sites: Sequence[Site]) -> None:
        super().check_fit(sites)
        self.check_start(sites)

    def alpha_at(self, site: Site) -> float:
        return patterned(self.alpha_pattern, site.path, 2 * self.r if self.alpha is None else self.alpha)

    def scale(self, site: Site) -> float:
        return self.alpha_at(site) / (math.sqrt(self.rank(site)) if self.use_rslora else self.rank(site))

    def rate(self, site: Site | None, key: str) -> float:
        return self.loraplus_lr_ratio if key == "B" and site is not None and not site.is_embedding else 1.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return self.fresh(site, generator)

    def derive(self, params: Params, site: Site | None) -> Params:
        """D (2r, in) and U (out, 2r) of what is left when the start is taken back."""
        if site is None or "A0" not in params:
            return {}
        a, b, a0, b0 = (params[name] for name in ("A", "B", "A0", "B0"))
        return {"down": torch.cat([a, a - a0]), "up": torch.cat([b - b0, b0], 1)}

    def form(self, params: Params, site: Site) -> LinearForm:
        down, up = (params.get(whole, params[own]) for whole, own in (("down", "A"), ("up", "B")))
        return LinearForm(down, up, self.scale(site) * site.table_scale)

    def form_dropout(self) -> float:
        return self.dropout

    def compacted(self, values: Values, sites: Sequence[Site]) -> tuple[Method, Values]:
        return (self.doubled(), self.without_start(values, sites)) if self.init in INSIDE else (self, values)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        r, stack = self.rank(site), (site.experts,) if site.experts else ()
        return {"A": (ends[0], (*stack, r, site.in_features)), "B": (ends[1], (*stack, site.out_features, r))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": self.r, "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout, "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": [site.path for site in sites if not site.experts],
            "fan_in_fan_out": bool(sites) and all(site.transposed and not site.experts for site in sites),
            "target_parameters": [site.path for site in sites if site.experts],
        }  # fmt: skip

    def beside_whole_base(
        self, config: Mapping[str, Any], values: Values, sites: Sequence[Site]
    ) -> tuple[Method, Values]:
        if not began_inside(config):
            return self, values
        return self.doubled(), {site.path: doubled(values[site.path], config, self, site) for site in sites}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and config.get("target_modules") != "dummy-target-modules"  # saved modules alone

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> LoRA:
        check_one_variant(config)
        experts = [path for path in config.get("target_parameters") or () if path in paths]
        return cls(
            r=config["r"], alpha=config["lora_alpha"], targets=[path for path in paths if path not in experts],
            target_parameters=experts, rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {}, use_rslora=config.get("use_rslora") or False,
            dropout=config.get("lora_dropout") or 0.0,
        )  # fmt: skip
