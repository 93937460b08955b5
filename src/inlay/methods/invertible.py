"""Invertible adapters: a coupling changes what the first block reads, and is undone before the head.

    x' = C(x)  for what the embeddings give        h' = C^-1(h)  for what the output layer reads

Couplings are NICE's, as in the paper, or GLOW's; see `inlay.kernels.couplings`. NICE's forward, sizes and places are
those of AdapterHub's `adapters` 1.3.0, an encoder-decoder's before its encoder and its decoder's head. There only heads
of its own undo the coupling, not transformers' (`undo` false here), and the GLOW coupling takes no rows of tokens.

Paper: Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"
(arXiv:2005.00052).
Shapes: halves of hidden are a and b; a network of in to out features has D (in / inv_adapter_reduction_factor, in), d,
U (out, in / inv_adapter_reduction_factor), u. F is b to a, G is a to b; GLOW's S1 is a to 2 b, S2 is b to 2 a.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.kernels.couplings import glow, nice
from inlay.values import Help, OneOf, Positive

from .common import ACTIVATIONS, Activation
from .contract import Method, Params, Site, Structure, Tokens

__all__ = ["Factor", "Invertible", "Undo"]

Factor = Annotated[Positive, Help("what a network of the coupling reads, by its width inside")]
Undo = Annotated[bool, Help("undo the coupling before the output layer, where the base has one")]
NETWORKS = {"nice": ("F", "G"), "glow": ("s1", "s2")}
ENDS = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}


@dataclass(frozen=True)
class Invertible(Method):
    """Settings, by AdapterHub's names: `inv_adapter` is the coupling, whose networks are smaller than what they read by
    `inv_adapter_reduction_factor`."""

    title = "Invertible adapter"
    paper = "arXiv:2005.00052"
    peft_type = "INVERTIBLE"
    lr = 3e-4  # that of Pfeiffer adapters, beside which it stands
    placed_by_settings = True

    inv_adapter: Annotated[str, OneOf(tuple(NETWORKS), "inv_adapter"), Help("the coupling")] = "nice"
    inv_adapter_reduction_factor: Factor = 2
    non_linearity: Activation = "relu"
    undo: Undo = True

    def sites(self, base: Structure) -> list[Site]:
        inside = set(base.stacks[0].modules())
        calls = base.observed.calls
        blocks = [site for site in base.block_sites if site.module in inside and site.path in calls]
        first = min(blocks, key=lambda site: calls[site.path].turn, default=None)
        read = None if first is None else calls[first.path].input_shape
        if first is None or read is None or len(read) != 3 or read[-1] != first.out_features:
            raise UsageError(f"{self.title} finds no block that reads what the embeddings give", "Choose LoRA.")
        return [first, *(self._heads(base, first) if self.undo else [])]

    def _heads(self, base: Structure, first: Site) -> list[Site]:
        """The output layer, if the base has one."""
        try:
            layer = base.model.get_output_embeddings()  # pyright: ignore
        except (NotImplementedError, AttributeError):
            return []
        found = [site for site in base.projections if site.module is layer]
        for site in found:
            if why := base.observed.unusable.get(site.path):
                raise UsageError(f"{self.title} cannot be undone before {site.path}, which {why}", "Choose LoRA.")
            if site.in_features != first.out_features:
                what = f"the first block reads {first.out_features} features, {site.path} {site.in_features}"
                raise UsageError(f"{self.title} cannot be undone: {what}", "Choose LoRA.")
        return found

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """Of all networks."""
        one = sites[0].out_features // 2
        two = sites[0].out_features - one
        sizes = {"F": (two, one), "G": (one, two), "s1": (one, 2 * two), "s2": (two, 2 * one)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in NETWORKS[self.inv_adapter]:
            before, behind = sizes[name]
            inner = max(1, int(before // self.inv_adapter_reduction_factor))
            shapes |= {f"{name}_down": (inner, before), f"{name}_down_bias": (inner,)}
            shapes |= {f"{name}_up": (behind, inner), f"{name}_up_bias": (behind,)}
        return shapes

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shared_shapes(sites)
        drawn = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        return {name: torch.zeros_like(value) if value.ndim == 1 else value for name, value in drawn.items()}

    def input(self, params: Params, x: Tensor, site: Site, tokens: Tokens) -> Tensor:
        def network(name: str, x: Tensor) -> Tensor:
            low = F.linear(x, params[f"{name}_down"], params[f"{name}_down_bias"])
            return F.linear(ACTIVATIONS[self.non_linearity](low), params[f"{name}_up"], params[f"{name}_up_bias"])

        first, second = (lambda x, name=name: network(name, x) for name in NETWORKS[self.inv_adapter])
        return {"nice": nice, "glow": glow}[self.inv_adapter](x, first, second, undo=site.kind == "linear")

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        keys = {}
        for name, shape in self.shared_shapes(sites).items():
            network, _, end = name.partition("_")
            keys[name] = f"invertible_adapters.{network}.{ENDS[end]}", shape
        return keys

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Invertible:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
