"""Bottleneck adapters: a small network beside what the attention or the feed-forward part of each block adds.

    y' = y + s U act(D z + d) + s u        z = y (Houlsby), or norm(y + x), as the block would go on (Pfeiffer)

x is the residual stream that y is added to; the norm is that of a post-norm block, and absent elsewhere. Placement and
forward are those of AdapterHub's `adapters` 1.3.0.

Papers: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751); Pfeiffer et al. 2020,
"AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (arXiv:2005.00247).
Shapes: D is (hidden / reduction_factor, hidden), d its bias; U is (hidden, hidden / reduction_factor), u its bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Help, Positive

from .common import ACTIVATIONS, Activation, in_layers
from .contract import BottleneckForm, Dropout, Layers, Method, Params, Site, Structure, Tokens

__all__ = ["BehindAttention", "Bottleneck", "Houlsby", "Pfeiffer", "Reads", "Reduction"]

Reduction = Annotated[Positive, Help("hidden size by bottleneck size")]
BehindAttention = Annotated[bool, Help("one behind attention")]
Reads = Literal["output", "stream", "behind"]
AfterNorm = Annotated[bool, Help("read the stream after the block's addition and norm")]


@dataclass(frozen=True)
class Bottleneck(Method):
    """Settings, by AdapterHub's names: `mh_adapter` puts an adapter behind attention, `output_adapter` behind the
    feed-forward part, `cross_adapter` behind cross-attention; `reduction_factor` is hidden size by bottleneck size;
    `scaling` multiplies what the adapter adds; `dropout` is the share of that which training drops; `layers` keeps some
    blocks.
    """

    reduction_factor: Reduction = 16
    non_linearity: Activation = "relu"
    mh_adapter: BehindAttention = True
    output_adapter: Annotated[bool, Help("one behind the feed-forward part")] = True
    cross_adapter: Annotated[bool, Help("one behind cross-attention")] = False
    scaling: Annotated[Positive, Help("by what the adapter's output is multiplied")] = 1.0
    dropout: Dropout = 0.0
    layers: Layers = None

    def sites(self, base: Structure) -> list[Site]:
        parts = {"attention": self.mh_adapter, "mlp": self.output_adapter, "cross-attention": self.cross_adapter}
        sites = [site for site in base.sublayers if parts[site.part]]
        sites = in_layers(sites, self.layers, base)
        if not sites:
            raise UsageError(f"{self.title} finds no attention or feed-forward output to stand behind", "Choose LoRA.")
        return sites

    def size(self, site: Site) -> int:
        return max(1, int(site.out_features // self.reduction_factor))

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        wide, small = site.out_features, self.size(site)
        return {
            "down": torch.randn(small, wide, generator=generator) * 0.02,
            "down_bias": torch.zeros(small),
            "up": torch.randn(wide, small, generator=generator) * 0.02,
            "up_bias": torch.zeros(wide),
        }

    def reads(self) -> Reads:
        """What D is applied to."""
        return "output"

    def scale(self, params: Params) -> Tensor | float:
        return self.scaling

    def bottleneck(self, params: Params, site: Site) -> BottleneckForm:
        return BottleneckForm(
            params["down"], params["down_bias"], params["up"], params["up_bias"],
            ACTIVATIONS[self.non_linearity], self.scale(params), self.reads(),
        )  # fmt: skip

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        form = self.bottleneck(params, site)
        return y + tokens.dropout(form.added(form.read(x, y, site)), self.dropout)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        wide, small = site.out_features, self.size(site)
        return {
            "down": ("adapter_down.weight", (small, wide)),
            "down_bias": ("adapter_down.bias", (small,)),
            "up": ("adapter_up.weight", (wide, small)),
            "up_bias": ("adapter_up.bias", (wide,)),
        }

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"target_modules": [site.path for site in sites]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Bottleneck:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Sequential(Bottleneck):
    """A bottleneck that reads what the sublayer gives, or with `original_ln_before` the stream after the block's
    addition and norm."""

    original_ln_before: AfterNorm = False

    def reads(self) -> Reads:
        return "behind" if self.original_ln_before else "output"


@dataclass(frozen=True)
class Houlsby(Sequential):
    """Bottlenecks behind attention and behind the feed-forward part, each reading its sublayer's output."""

    title = "Houlsby adapter"
    paper = "arXiv:1902.00751"
    peft_type = "HOULSBY"

    non_linearity: Activation = "swish"


@dataclass(frozen=True)
class Pfeiffer(Sequential):
    """One bottleneck a block, behind the feed-forward part, reading the stream as the block would go on."""

    title = "Pfeiffer adapter"
    paper = "arXiv:2005.00247"
    peft_type = "PFEIFFER"
    lr = 3e-4

    mh_adapter: BehindAttention = False
    original_ln_before: AfterNorm = True
