"""UniPELT: prefix tuning, a bottleneck behind the feed-forward part and LoRA, each behind a gate of its own.

Paper: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning" (arXiv:2110.07577);
sizes are those of AdapterHub's `adapters` 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Count, Help

from .bottleneck_settings import Reduction
from .common import Activation
from .contract import Dropout, Layers, Length, Method, Targets
from .gated_lora import GatedLoRA
from .gated_prefix import GatedPrefix
from .pfeiffer import Pfeiffer
from .preset import Preset

__all__ = ["UniPELT"]


@dataclass(frozen=True)
class UniPELT(Preset):
    """Settings: `num_virtual_tokens` and `encoder_hidden_size` are those of prefix tuning, `reduction_factor` and
    `non_linearity` those of Pfeiffer's adapter, `r` and `targets` those of LoRA; `dropout` and `layers` are for the
    last two.
    """

    title = "UniPELT"
    paper = "arXiv:2110.07577"
    lr = 5e-4  # the paper's for all its parts together

    num_virtual_tokens: Annotated[Length, Help("keys put before a row's own in each layer")] = 10
    encoder_hidden_size: Annotated[Count, Help("width of the network that the prefixes come from")] = 512
    reduction_factor: Reduction = 16
    non_linearity: Activation = "relu"
    r: Annotated[Count, Help("rank of LoRA's product")] = 8
    targets: Targets = "qv"
    dropout: Dropout = 0.0
    layers: Layers = None

    def parts(self) -> list[Method]:
        return [
            GatedPrefix(num_virtual_tokens=self.num_virtual_tokens, encoder_hidden_size=self.encoder_hidden_size),
            Pfeiffer(
                reduction_factor=self.reduction_factor, non_linearity=self.non_linearity, dropout=self.dropout,
                layers=self.layers, use_gating=True,
            ),
            GatedLoRA(r=self.r, targets=self.targets, dropout=self.dropout, layers=self.layers),
        ]  # fmt: skip
