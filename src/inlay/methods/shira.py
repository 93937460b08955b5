"""SHiRA: a few entries of a weight, chosen once, are trained.

    y = (W + S) x + bias        S is sparse

Paper: Bhardwaj et al. 2024, "Sparse High Rank Adapters" (arXiv:2406.13175).

Shapes: there are n = r (in + out) entries, as many numbers as LoRA has. `weight` (n,) holds what is added to them;
`indices` (2, n), their rows and columns, belong to the adapter and are never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.values import Count, Help, Seed

from .contract import Layers, Method, Params, Site, Targets
from .linear import DeltaMethod
from .peft_fields import Fields

__all__ = ["SHiRA"]


@dataclass(frozen=True)
class SHiRA(DeltaMethod):
    """Settings of SHiRA, by HF PEFT's names and defaults: `r` says how many entries are trained, `random_seed` which;
    without it they follow from the adapter's own seed. The learning rate is that of HF PEFT's best run on
    MetaMathQA; rates a third and three times as large did as well.
    """

    title = "SHiRA"
    paper = "arXiv:2406.13175"
    peft_type = "SHIRA"
    lr = 3e-4
    untrained = frozenset({"indices"})
    whole_numbers = untrained
    uncast = ("indices",)
    peft_fields = Fields(
        read={"r": 32, "random_seed": None, "target_modules": None, "modules_to_save": None},
        passed={"fan_in_fan_out": False, "init_weights": True, "mask_type": "random"},
    )

    r: Annotated[Count, Help("as many entries are trained as LoRA of this rank has numbers")] = 32
    targets: Targets = "all-linear"
    layers: Layers = None
    random_seed: Annotated[Seed | None, Help("which entries; by the adapter's seed where unset")] = None

    def _count(self, site: Site) -> int:
        return self.r * (site.in_features + site.out_features)

    def check_fit(self, sites: Sequence[Site]) -> None:
        if small := next((s for s in sites if self._count(s) > s.in_features * s.out_features), None):
            what = f"SHiRA's r is {self.r}: that is {self._count(small)} entries, and {small.path} has fewer"
            raise UsageError(what, "Choose a smaller r.")

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        own = generator if self.random_seed is None else torch.Generator().manual_seed(self.random_seed)
        chosen = torch.randperm(site.in_features * site.out_features, generator=own)[: self._count(site)].sort()[0]
        indices = torch.stack([chosen // site.in_features, chosen % site.in_features])
        return {"weight": torch.zeros(len(chosen)), "indices": indices.float()}

    def delta(self, params: Params, site: Site) -> Tensor:
        rows, columns = params["indices"].long().unbind()
        made = params["weight"].new_zeros(site.out_features, site.in_features)
        return made.index_put((rows, columns), params["weight"], accumulate=True)

    def beside_whole_base(
        self, config: Mapping[str, Any], values: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site]
    ) -> tuple[Method, Mapping[str, Mapping[str, Tensor]]]:
        """Raises: FormatError where an index is none of the weight's."""
        for site in sites:
            for own, size in zip(values[site.path]["indices"], (site.out_features, site.in_features), strict=True):
                if bool(((own < 0) | (own >= size) | (own != own.long())).any()):
                    what = f"shira_indices of {site.path} name entries that its weight does not have"
                    raise FormatError(what, "The adapter was trained on another base.")
        return self, values

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        n = self._count(site)
        return {"weight": ("shira_weight", (n,)), "indices": ("shira_indices", (2, n))}
