"""How LoRA begins: at random, from the weight it stands beside, or from rows of data.

A start from inside of the weight is taken back, since the base stays as it is: with A0 and B0 the start,

    y = W x + s (B A - B0 A0) x,        B A - B0 A0 = (B - B0) A + B0 (A - A0)

whose right side is one product of rank 2r in which nothing is lost to rounding, and which is zero at first.

- kaiming, gaussian: A at random, B = 0 (Hu et al. 2021, arXiv:2106.09685).
- orthogonal: A and B at random, of different rows of an orthogonal matrix, so that B A = 0; r must be even.
- pissa: the largest singular values of W (Meng et al. 2024, arXiv:2404.02948); olora: its QR decomposition
  (Büyükakyüz 2024, arXiv:2406.01775).
- eva: A is the principal components of what the layer reads; ranks go where these explain most (Paischer et al. 2024,
  arXiv:2410.07170).
- corda: singular vectors of W C, C being the covariance of what the layer reads, the largest (ipm) or the smallest
  (kpm) ones (Yang et al. 2024, arXiv:2406.05223).
- lora_ga: singular vectors of the gradient of W, so that the first step is nearest to that of W itself (Wang et al.
  2024, arXiv:2407.05000).
- loftq: what quantization took from W; see loftq.py. Nothing is taken back there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.site import Site
from inlay.sites.structure import Structure
from inlay.values import Checked, Count, Help, OneOf, Positive

from .around import Probe, Values
from .directions import corda, lora_ga, orthogonal
from .eva import redistributed
from .loftq import FullWeights, loftq
from .probes import Components, Covariance, Gradient
from .starts import difference, doubled_settings, start_of

__all__ = ["INSIDE", "Starts"]

INSIDE = ("pissa", "olora", "corda", "lora_ga", "given")
"""Starts with A0 and B0."""
PLAIN = ("kaiming", "gaussian")
STARTS = (*PLAIN, "orthogonal", "eva", "loftq", *INSIDE)
DIRECTIONS, SCALES = ("ArBr", "A2rBr", "ArB2r", "random"), ("stable", "weight_svd", "gd_scale", "unit")

Made = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Starts(Checked):
    """The settings of LoRA's starts; see the module's docstring. Names behind the start's own are HF PEFT's."""

    title: ClassVar[str]
    lr: ClassVar[float]
    uncast: ClassVar[tuple[str, ...]]
    begins_inside: ClassVar[bool] = True
    """Whether A0 and B0 can be there."""

    init: Annotated[
        str, OneOf(STARTS, "init"), Help("how A and B begin; eva, corda and lora_ga see init_rows rows first")
    ] = "kaiming"
    init_rows: Annotated[Count, Help("rows of data that eva, corda and lora_ga see")] = 64
    eva_rho: Annotated[float, Ge(1), Help("EVA: how many times its r a layer's rank may become")] = 2.0
    eva_use_label_mask: Annotated[bool, Help("EVA: see the tokens of answers alone")] = True
    eva_whiten: Annotated[bool, Help("EVA: divide components by the root of their singular values")] = False
    eva_adjust_scaling_factors: Annotated[bool, Help("EVA: keep the scale of a layer whose rank changes")] = True
    corda_method: Annotated[
        str, OneOf(("ipm", "kpm"), "corda_method"), Help("CorDA: learn what the rows show (ipm), or spare it (kpm)")
    ] = "ipm"
    lora_ga_direction: Annotated[
        str, OneOf(DIRECTIONS, "lora_ga_direction"), Help("LoRA-GA: which singular vectors A and B get")
    ] = "ArB2r"
    lora_ga_scale: Annotated[str, OneOf(SCALES, "lora_ga_scale"), Help("LoRA-GA: how B is scaled")] = "stable"
    loftq_weights: Annotated[
        str | None, Help("LoftQ: folder of the base's whole weights; where the base was opened from, if unset")
    ] = None
    lora_ga_stable_gamma: Annotated[Positive, Help("LoRA-GA: the larger, the smaller a stable start")] = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init in INSIDE and not self.begins_inside:
            what = f"{self.title} cannot begin inside of the base's weight, as init={self.init} does"
            raise UsageError(what, "Use kaiming, gaussian, orthogonal or eva.")

    if TYPE_CHECKING:  # what LoRA has
        use_rslora: bool

        def rank(self, site: Site) -> int: ...
        def scale(self, site: Site) -> float: ...
        def alpha_at(self, site: Site) -> float: ...
        def create(self, site: Site, generator: torch.Generator) -> Made: ...

    @property
    def usual_rate(self) -> float:
        """Near a third of the usual one where the product is large at once: where B begins away from zero, and where it
        is divided by the root of r alone. At the usual rate film reviews are learned worse, or not (docs/methods.md).
        """
        return 0.3 * self.lr if self.use_rslora or self.init in INSIDE else self.lr

    @property
    def exact(self) -> tuple[str, ...]:
        """What is subtracted is not rounded before."""
        return ("A", "B", "A0", "B0", *self.uncast) if self.init in INSIDE else self.uncast

    def check_start(self, sites: Sequence[Site]) -> None:
        """Raises: UsageError naming a site where the start cannot be."""
        for site in () if self.init in PLAIN else sites:
            small, r = min(site.in_features, site.out_features), self.rank(site)
            if site.is_embedding or site.experts:
                what = f"init={self.init} begins from a linear layer, and {site.path} is none"
                raise UsageError(what, "Leave it out of the targets, or use init=kaiming.")
            if self.init == "orthogonal" and r % 2:
                raise UsageError(f"init=orthogonal needs an even rank, and that of {site.path} is {r}", "Use r=8.")
            if self.init == "loftq" and not site.quantized:
                what = f"init=loftq begins from what quantization took, and {site.path} is not quantized"
                raise UsageError(what, "Open the base with --quantize 4bit, or use another start.")
            if self.init == "lora_ga" and site.quantized:
                raise UsageError(f"init=lora_ga needs the gradient of {site.path}, which is quantized", "Use another.")
            most = small // 2 if self.init == "lora_ga" else small
            if self.init in ("pissa", "olora", "corda", "lora_ga") and r > most:
                what = f"init={self.init} has {most} directions for {site.path}, fewer than its rank {r}"
                raise UsageError(what, f"Use r={most} or less.")

    def fresh(self, site: Site, generator: torch.Generator) -> Made:
        """A (r, in) and B (out, r), with A0 and B0 where the start has them; (E, ...) for E experts."""
        self.check_start([site])
        if self.init in ("pissa", "olora"):
            b, a = start_of(self.init, self, site)
            return _inside(a, b)
        r, stack = self.rank(site), (site.experts,) if site.experts else ()
        a, b = torch.zeros(*stack, r, site.in_features), torch.zeros(*stack, site.out_features, r)
        if site.is_embedding:  # as the reference does: a table's columns start at zero
            torch.nn.init.normal_(b, generator=generator)
        elif self.init == "gaussian":
            torch.nn.init.normal_(a, std=1 / r, generator=generator)
        elif self.init == "orthogonal":
            a, b = orthogonal(r, (site.out_features, site.in_features), generator)
        else:
            torch.nn.init.kaiming_uniform_(a.view(-1, site.in_features), a=math.sqrt(5), generator=generator)
        return {"A": a, "B": b, **({"A0": torch.zeros_like(a), "B0": b.clone()} if self.init in INSIDE else {})}

    def begin_at_base(
        self, values: Values, sites: Sequence[Site], base: Structure, generator: torch.Generator
    ) -> tuple[Self, Values]:
        if self.init != "loftq":
            return self, values
        whole, begun = FullWeights(self.loftq_weights, base.model), dict(values)
        for site in sites:
            a, b = loftq(self.rank(site), self.scale(site), whole.of(site), site.weight())
            begun[site.path] = {**values[site.path], "A": a, "B": b}
        return self, begun

    @property
    def start_rows(self) -> int:
        return self.init_rows if self.init in ("eva", "corda", "lora_ga") else 0

    def probe(self, site: Site) -> Probe:
        self.check_start([site])
        if self.init == "eva":
            return Components(min(round(self.rank(site) * self.eva_rho), site.in_features), self.eva_use_label_mask)
        return Covariance() if self.init == "corda" else Gradient()

    def begin(
        self, sites: Sequence[Site], probes: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Self, dict[str, Made]]:
        if self.init == "eva":
            return self._from_components(sites, probes, generator)
        found = {site.path: self._found(site, probes[site.path], generator) for site in sites}
        made = {site.path: {**self.create(site, generator), **_inside(*found[site.path])} for site in sites}
        return replace(self, init="given"), made

    def _found(self, site: Site, probe: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not probe.seen:
            raise UsageError(f"no row went through {site.path}, which init={self.init} asks for", "Leave it out.")
        r, scale, weight = self.rank(site), self.scale(site), site.weight()
        if self.init == "corda":
            return corda(r, scale, weight, probe.matrix, self.corda_method == "ipm")
        how = self.lora_ga_direction, self.lora_ga_scale, self.lora_ga_stable_gamma
        return lora_ga(r, scale, weight, probe.matrix, how, generator)

    def _from_components(
        self, sites: Sequence[Site], probes: Mapping[str, Components], generator: torch.Generator
    ) -> tuple[Self, dict[str, Made]]:
        settings = redistributed(self, sites, probes)
        method, made = replace(self, init="kaiming", **settings), {}
        for site in (site for site in sites if site.path in settings["targets"]):
            found = probes[site.path]
            made[site.path] = method.create(site, generator)
            a = found.components[: method.rank(site)]
            made[site.path]["A"] = a / found.singular[: len(a), None].sqrt() if self.eva_whiten else a.clone()
        return method, made

    def doubled(self) -> Self:
        """The method of twice the rank and the same scale, which holds what began inside of the weight."""
        named: Any = self
        grown = {name: getattr(named, name) for name in ("r", "alpha", "rank_pattern", "alpha_pattern")}
        return replace(self, init="kaiming", **doubled_settings(**grown, root=named.use_rslora))

    def without_start(self, values: Values, sites: Sequence[Site]) -> Values:
        """The values of the `doubled` method at `sites`."""
        return {**values, **{site.path: difference(values[site.path]) for site in sites}}


def _inside(a: Tensor, b: Tensor) -> Made:
    """A and B that begin inside of the weight, with what is taken back."""
    return {"A": a.clone(), "B": b.clone(), "A0": a.clone(), "B0": b.clone()}
