"""AdaLoRA: a product in the form of a singular value decomposition, whose rank is shared out over the layers while it
is trained.

    y = W x + s B (E * (A x))        s = alpha / init_r; the penalty pulls A A^T and B^T B towards the identity

A budget of singular values E shrinks from init_r a layer to target_r a layer on average, between step `tinit` and the
last `tfinal` steps, as a cubic. Every `deltaT` steps the triplets (a row of A, an entry of E, a column of B) of least
importance get E = 0: the importance of a number is its sensitivity |p * gradient| times how uncertain that is, both
averaged over steps (beta1, beta2); that of a triplet is its E's plus the means of its A's and B's.

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (arXiv:2303.10512).
Steps, order and the scale's init_r + 1e-5 are HF PEFT's.

Shapes: A is (init_r, in), E (init_r, 1), B (out, init_r). A checkpoint holds the triplets whose E is not zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help, NonNegative, Positive

from .budget import Budget, pruned
from .common import check_rank, patterned
from .contract import Dropout, Layers, LinearForm, Method, Params, Site, Targets, Values
from .linear import LinearMethod
from .peft_fields import ADALORA_FIELDS

__all__ = ["AdaLoRA"]

Steps = Annotated[int, Ge(0)]
Average = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class AdaLoRA(LinearMethod):
    """Settings of AdaLoRA, by HF PEFT's names and defaults, but for the rank a checkpoint keeps of each layer,
    `kept_ranks`. The learning rate is LoRA's. Inlay's loop adds the penalty and shares the
    ranks out; a loop of your own has both in `inlay.training.acting.Acting(adapter, ())`.
    """

    title = "AdaLoRA"
    paper = "arXiv:2303.10512"
    peft_type = "ADALORA"
    peft_fields = ADALORA_FIELDS
    peft_bias = True
    renamed: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    changes_values = True

    target_r: Annotated[Count, Help("rank of a layer at the end, on average")] = 8
    init_r: Annotated[Count, Help("rank of each layer at first; half as much again as target_r is usual")] = 12
    alpha: Annotated[Positive, Help("scale of the product, divided by init_r")] = 8
    targets: Targets = "all-linear"
    layers: Layers = None
    dropout: Dropout = 0.0
    tinit: Annotated[Steps, Help("steps before the budget shrinks; a tenth of all is usual")] = 0
    tfinal: Annotated[Steps, Help("last steps, in which ranks stay")] = 0
    deltaT: Annotated[Count, Help("steps between two allocations")] = 1
    beta1: Annotated[Average, Help("how slowly the average of sensitivity moves")] = 0.85
    beta2: Annotated[Average, Help("how slowly the average of uncertainty moves")] = 0.85
    orth_reg_weight: Annotated[NonNegative, Help("weight of the penalty on factors that are not orthogonal")] = 0.5
    kept_ranks: Annotated[Mapping[str, Steps], Help("ranks that training has left, by the end of a path")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            what = f"AdaLoRA's target_r is {self.target_r}, more than its init_r, {self.init_r}"
            raise UsageError(what, "Ranks only shrink: use a larger init_r.")

    def check_fit(self, sites: Sequence[Site]) -> None:
        for site in sites:
            check_rank(self, self.rank(site), site)

    def check_steps(self, total: int) -> None:
        if self.tinit >= total - self.tfinal:
            what = f"AdaLoRA's tinit, {self.tinit}, and tfinal, {self.tfinal}, leave no step of {total} to shrink in"
            raise UsageError(what, "Use fewer, or train for more steps.")

    def rank(self, site: Site) -> int:
        return int(patterned(self.kept_ranks, site.path, self.init_r))

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        r = self.rank(site)
        a, b = torch.empty(r, site.in_features), torch.empty(site.out_features, r)
        for factor in (a, b):
            torch.nn.init.normal_(factor, std=0.02, generator=generator)
        return {"A": a, "E": torch.zeros(r, 1), "B": b}

    def form(self, params: Params, site: Site) -> LinearForm:
        return LinearForm(params["A"], params["B"], self.alpha / (self.init_r + 1e-5), middle=params["E"][:, 0])

    def form_dropout(self) -> float:
        return self.dropout

    # ---- training

    def penalty(self, values: Values) -> Tensor | None:
        """The mean over all A and B of |A A^T - I| and |B^T B - I| (Frobenius), times its weight."""
        factors = [value for own in values.values() for value in (own["A"], own["B"].t())]
        if not self.orth_reg_weight:
            return None
        grams = [factor @ factor.t() for factor in factors]
        apart = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orth_reg_weight * torch.stack(apart).mean()

    def after_step(self, values: Values, gradients: Values, step: int, total: int, state: dict[str, Tensor]) -> None:
        budget = Budget(values, self.target_r * len(values), self.tinit, total - self.tfinal, state)
        if step < budget.end or not state:
            budget.update(gradients, self.beta1, self.beta2)
        if step == budget.end or (self.tinit < step < budget.end and step % self.deltaT == 0):
            budget.allocate(step)
        if step >= budget.end:
            budget.hold()

    # ---- checkpoints

    def compacted(self, values: Values, sites: Sequence[Site]) -> tuple[Method, Values]:
        """Without the triplets whose E is zero, unless all of them are: then training has not begun."""
        kept = pruned(values)
        if kept is None:
            return self, values
        return replace(self, kept_ranks={re.escape(path): len(own["E"]) for path, own in kept.items()}), kept

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        r = self.rank(site)
        shapes = {"A": (r, site.in_features), "E": (r, 1), "B": (site.out_features, r)}
        return {name: (f"lora_{name}", shape) for name, shape in shapes.items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        ranks = {f"{site.path}.lora_E": [n < self.rank(site) for n in range(self.init_r)] for site in sites}
        more = {"rank_pattern": ranks if self.kept_ranks else None, "total_step": self.tinit + self.tfinal + 1}
        return super().to_peft(sites) | more

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> AdaLoRA:
        made: Any = super().from_peft(config, paths)
        ranks = {key.removesuffix(".lora_E"): sum(alive) for key, alive in (config.get("rank_pattern") or {}).items()}
        return replace(made, kept_ranks={re.escape(path): rank for path, rank in ranks.items()})
