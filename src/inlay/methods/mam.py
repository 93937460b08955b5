"""MAM: prefix tuning and a parallel adapter beside the feed-forward part, trained together.

Paper: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv:2110.04366); sizes are
those of AdapterHub's `adapters` 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Count, Help, Positive

from .bottleneck_settings import Reduction
from .common import Activation
from .contract import Dropout, Layers, Length, Method
from .parallel import Parallel
from .prefix import PrefixTuning
from .preset import Preset

__all__ = ["MAM"]


@dataclass(frozen=True)
class MAM(Preset):
    """Settings: `num_virtual_tokens` and `encoder_hidden_size` are those of prefix tuning, whose prefixes are trained
    through a network; the rest are those of the parallel adapter, which `layers` keeps to some blocks.
    """

    title = "MAM adapter"
    paper = "arXiv:2110.04366"
    lr = 3e-5  # its parallel adapter breaks down at 1e-4 where the stream is not normed; see `Parallel`

    num_virtual_tokens: Annotated[Length, Help("keys put before a row's own in each layer")] = 30
    encoder_hidden_size: Annotated[Count, Help("width of the network that the prefixes come from")] = 800
    reduction_factor: Reduction = 2
    non_linearity: Activation = "relu"
    scaling: Annotated[Positive, Help("by what the parallel adapter's output is multiplied")] = 4.0
    dropout: Dropout = 0.0
    layers: Layers = None

    def parts(self) -> list[Method]:
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=True,
            encoder_hidden_size=self.encoder_hidden_size,
        )
        parallel = Parallel(
            reduction_factor=self.reduction_factor,
            non_linearity=self.non_linearity,
            scaling=self.scaling,
            dropout=self.dropout,
            layers=self.layers,
        )
        return [prefix, parallel]
