"""BitFit: each adapter has its own biases in the base's linear layers and norms, and nothing else.

    y = base(x) + (b' - b)        b is the base's bias; b' starts as a copy of it

Paper: Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models" (arXiv:2106.10199). Shapes: b and b' are (out,). A layer without a bias can be given one of zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.targets import GROUPS
from inlay.values import Help

from .contract import Layers, LinearForm, Method, Params, Site, Structure, parse_layers, select_projections

__all__ = ["BitFit"]


@dataclass(frozen=True)
class BitFit(Method):
    """Settings of BitFit: `targets` are names of modules or groups (every linear layer and norm that has a bias where
    None), `layers` keeps some blocks; `add_bias` gives linear layers of the blocks that have no bias one of zeros,
    which no merge can write into the base.

    The learning rate is the paper's for small data.
    """

    title = "BitFit"
    paper = "arXiv:2106.10199"
    peft_type = "BITFIT"
    lr = 1e-3

    targets: Annotated[str | Sequence[str] | None, Help("module names or groups; all that have a bias where unset")] = (
        None
    )
    layers: Layers = None
    add_bias: Annotated[bool, Help("give linear layers without a bias one of zeros")] = False

    def sites(self, base: Structure) -> list[Site]:
        # To BitFit a norm is what a linear layer is: a module with a bias, behind which it adds something.
        norms = [replace(site, kind="linear") for site in base.norms]
        sites = [s for s in base.projections if s.path not in base.observed.unusable] + norms
        if self.targets is not None:
            targets = [self.targets] if isinstance(self.targets, str) else self.targets
            named = {path for target in targets for path in _named(base, sites, target)}
            sites = [site for site in sites if site.path in named]
        if self.layers is not None:
            kept = parse_layers(self.layers, 1 + max(base.blocks.values(), default=-1))
            sites = [site for site in sites if site.layer in kept]
            if not sites:
                raise UsageError(f"layers {self.layers!r} hold no target of BitFit", "Name other layers or targets.")
        bare = {site.path for site in base.projections if site.layer is not None} if self.add_bias else set()
        biased = [site for site in sites if _bias(site) is not None or site.path in bare]
        if not biased:
            where = "the base's layers have no biases" if self.targets is None else f"{self.targets!r} have no biases"
            raise UsageError(where, "Give linear layers one of zeros with add_bias=true.")
        return biased

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        bias = _bias(site)
        return {"bias": torch.zeros(site.out_features) if bias is None else bias.clone()}

    def form(self, params: Params, site: Site) -> LinearForm:
        bias = _bias(site)
        return LinearForm(shift=params["bias"] if bias is None else params["bias"] - bias.to(params["bias"].dtype))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"bias": ("bias", (site.out_features,))}

    def fields_beside(self, host: Method, sites: Sequence[Site]) -> Mapping[str, Any] | None:
        there = all(_bias(site) is not None for site in sites)
        return {"bias": "all"} if host.peft_bias and there else None

    @classmethod
    def read_beside(cls, config: Mapping[str, Any], keys: Collection[str]) -> Method | None:
        if config.get("bias") in (None, "none") or config.get("lora_bias"):
            return None
        targets = [key.removesuffix(".bias") for key in keys if key.endswith(".bias")]
        return cls(targets=targets) if targets else None

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "target_modules": [site.path for site in sites],
            "add_bias": any(_bias(site) is None for site in sites),
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> BitFit:
        return cls(targets=paths, add_bias=config.get("add_bias") or False)


def _bias(site: Site) -> Tensor | None:
    bias = getattr(site.module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _named(base: Structure, sites: Sequence[Site], target: str) -> list[str]:
    """The paths of the sites that a group, a whole path or the end of one names."""
    if target in GROUPS:
        return [site.path for site in select_projections(base, target)]
    paths = [site.path for site in sites]
    found = [target] if target in paths else [path for path in paths if path.endswith("." + target)]
    if not found:
        names = ", ".join(sorted({site.name for site in sites}))
        raise UsageError(f"BitFit's target {target!r} matches no module of the base", f"Candidates: {names}.")
    return found
