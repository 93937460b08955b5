"""What the settings of several methods share: activations, and the blocks that are kept."""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn import functional as F

from inlay.values import Help, OneOf

from .contract import Layers, Site, Structure, parse_layers

__all__ = ["ACTIVATIONS", "Activation", "in_layers"]

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "silu": F.silu, "tanh": torch.tanh}
Activation = Annotated[str, OneOf(tuple(ACTIVATIONS), "non_linearity"), Help("between the two projections")]


def in_layers(sites: list[Site], layers: Layers, base: Structure) -> list[Site]:
    """Those of `sites` that stand in `layers`; all where they are None."""
    if layers is None:
        return sites
    kept = parse_layers(layers, 1 + max(base.blocks.values(), default=-1))
    return [site for site in sites if site.layer in kept]
