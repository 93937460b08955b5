"""Bottleneck adapters: a small network beside what the attention or the feed-forward part of each block adds.

    y' = y + s (U act(D z + d) + u)        z = y (Houlsby), norm(y + x), as the block would go on (Pfeiffer), or x

x is the residual stream that y is added to; the norm is that of a post-norm block, and absent elsewhere. Placement and
forward are those of AdapterHub's `adapters` 1.3.0, but for a gate's mean: it goes over a row's prompt where that is
known, over the row where it is not, and never over padding.

Paper of `drop_layers`: Rücklé et al. 2020, "AdapterDrop: On the Efficiency of Adapters in Transformers"
(arXiv:2010.11918): each step leaves out the adapters of the first n blocks, n uniform from 0 to `drop_layers`.
Shapes: D is (hidden / reduction_factor, hidden), d its bias; U is (hidden, hidden / reduction_factor), u its bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from inlay.errors import UsageError

from .bottleneck_forward import BottleneckForward
from .common import in_layers
from .contract import Site, Structure

__all__ = ["Bottleneck"]

KEYS = {
    "down": "adapter_down.weight", "down_bias": "adapter_down.bias", "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias", "norm_before": "adapter_norm_before.weight",
    "norm_before_bias": "adapter_norm_before.bias", "norm_after": "adapter_norm_after.weight",
    "norm_after_bias": "adapter_norm_after.bias", "gate": "gate.weight", "gate_bias": "gate.bias", "scale": "scaling",
}  # fmt: skip
FIRST = frozenset({"reduction_factor", "non_linearity", "mh_adapter", "output_adapter", "scaling", "dropout"})
"""Settings that every folder holds; the others are at their defaults where an older folder lacks them."""


def _normal(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.02


def _cut_normal(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=0.01, a=-0.02, b=0.02, generator=generator)


def _beside(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U starts at zero, D as torch's linear layers do."""
    bound = shape[1] ** -0.5 if name == "down" else 0.0
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


STARTS = {"bert": _normal, "houlsby": _cut_normal, "mam_adapter": _beside}


@dataclass(frozen=True)
class Bottleneck(BottleneckForward):
    """The base of bottleneck adapters, which differ in the defaults of their settings."""

    def sites(self, base: Structure) -> list[Site]:
        parts = {"attention": self.mh_adapter, "mlp": self.output_adapter, "cross-attention": self.cross_adapter}
        sites = in_layers([site for site in base.sublayers if parts[site.part]], self.layers, base)
        left_out = in_layers(sites, self.leave_out, base) if self.leave_out is not None else []
        left_out += [site for site in sites if self.use_gating and site.stack == "decoder"]  # whose rows have no prompt
        sites = [site for site in sites if site not in left_out]
        if not sites:
            raise UsageError(f"{self.title} finds no attention or feed-forward output to stand behind", "Choose LoRA.")
        if self.drop_layers and all((site.layer or 0) < self.drop_layers for site in sites):
            what = f"{self.title}'s drop_layers is {self.drop_layers}, and no block behind those has an adapter"
            raise UsageError(what, "Lower it: a step that leaves all of them out trains nothing.")
        return sites if self.original_ln_after else self._behind_norms(sites, base)

    def _behind_norms(self, sites: Sequence[Site], base: Structure) -> list[Site]:
        """The sites, with the norm of a post-norm block, behind which it goes on, in the place of the sublayer."""
        norms = {site.module: site for site in base.scales}
        if any(site.norm is not None for site in sites) and (self.reads != "behind" or self.residual_before_ln is True):
            what = f"{self.title} has no original_ln_after, and would lose the stream that this base's norms read"
            raise UsageError(what, "Set original_ln_before, and residual_before_ln to false.")
        return [site if site.norm is None else replace(norms[site.norm], part=site.part) for site in sites]

    def size(self, site: Site) -> int:
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(site.layer), factor.get("default", 0))
            if not factor:
                what = f"{self.title}'s reduction_factor has no number for block {site.layer}, nor a default"
                raise UsageError(what, "Add one, or leave the block out.")
        return max(1, int(site.out_features // factor))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        wide, small = site.out_features, self.size(site)
        found = {"down": (small, wide), "down_bias": (small,), "up": (wide, small), "up_bias": (wide,)}
        return {**found, **self.further_shapes(wide)}

    def further_shapes(self, wide: int) -> dict[str, tuple[int, ...]]:
        """Those of norms, the gate and a trained scale."""
        found: dict[str, tuple[int, ...]] = {}
        for norm in [name for name in ("before", "after") if getattr(self, f"ln_{name}")]:
            found |= {f"norm_{norm}": (wide,), f"norm_{norm}_bias": (wide,)}
        if self.use_gating:
            found |= {"gate": (1, wide), "gate_bias": (1,)}
        if isinstance(self.scaling, str):
            found["scale"] = (wide if self.scaling == "channel" else 1,)
        return found

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: self.drawn(name, shape, generator) for name, shape in self.shapes(site).items()}

    def drawn(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """A fresh parameter: norms change nothing, scales are 1 and biases 0."""
        if name.endswith("_bias"):
            return torch.zeros(shape)
        if name == "scale" or name.startswith("norm"):
            return torch.ones(shape)
        return STARTS["bert" if name == "gate" else self.init_weights](name, shape, generator)

    # ---- checkpoints

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (KEYS[name], shape) for name, shape in self.shapes(site).items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"target_modules": [site.path for site in sites]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Self:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if name in config or name in FIRST})
