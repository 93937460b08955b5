"""Selective tuning ("sparse tuning"): an adapter has its own values of some of the base's own parameters: layers, heads
of attention, MLPs, norms.

    y = (W + dW) x + (b + db)        dW is zero but in the rows or columns that are chosen, and is held as those alone

The parameters are the differences, so that they begin at zeros and weight decay pulls towards the base. Training them
is training those numbers of the base with all others frozen.

Papers: Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning" (arXiv:1911.03090), for
layers; Touvron et al. 2022, "Three things everyone should know about Vision Transformers" (arXiv:2203.09795), for
attention alone.

Shapes: dW is (chosen rows, in), (out, chosen columns) or (out, in); db is (chosen rows,) or (out,); at norms both are
(hidden,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.sites.selecting import PartSite, select_parts
from inlay.values import Help

from .contract import LinearForm, Method, Params, Site, Structure
from .deltas import delta_form, delta_shapes

__all__ = ["Selective"]


@dataclass(frozen=True)
class Selective(Method):
    """Settings: `select` names parts of the base in words, clauses joined by ";". A clause has layers ("layers 8-11",
    "last 4", "first 2"; all where none are named), "encoder" or "decoder", and what is meant there: "attention",
    "cross-attention", "mlp", "norms", "heads 0,3"; whole blocks where nothing is.

    A head is its rows of the projections of queries, keys and values, with their biases, and its columns of the output
    projection; what heads share (that one's bias, latent attention's first projections) and what gates them stays as it
    is. Where several heads read the same keys and values, all of them are named, or "query heads 0" and "kv heads
    0" apart.

    The learning rate is that of full fine-tuning of small models; three times that did a little better.
    """

    title = "Selective tuning"
    paper = "arXiv:1911.03090"
    peft_type = "SELECTIVE"
    placed_by_settings = True
    lr = 1e-4

    select: Annotated[
        str, Help('parts in words: "layers 8-11 heads 0,3", "mlp of last 4", "layers 0,3 norms"; several joined by ";"')
    ] = "last 1"

    def sites(self, base: Structure) -> list[Site]:
        return [*select_parts(base, self.select)]

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self._shapes(site).items()}

    def form(self, params: Params, site: Site) -> LinearForm:
        assert isinstance(site, PartSite)
        return delta_form(site, params["weight"], params.get("bias"), site.rows, site.columns)

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, PartSite)
        return delta_shapes(site, site.rows, site.columns)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (f"selective_delta.{name}", shape) for name, shape in self._shapes(site).items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"select": self.select}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Selective:
        return cls(select=config["select"])
