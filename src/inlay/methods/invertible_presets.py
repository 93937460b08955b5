"""Pfeiffer's and Houlsby's adapters with an invertible adapter, as MAD-X has them for languages.

Paper: Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"
(arXiv:2005.00052). AdapterHub calls them `seq_bn_inv` and `double_seq_bn_inv`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from inlay.values import Help, OneOf

from .bottleneck import Bottleneck
from .bottleneck_settings import Reduction
from .common import Activation
from .contract import Dropout, Layers, Method
from .houlsby import Houlsby
from .invertible import NETWORKS, Factor, Invertible, Undo
from .pfeiffer import Pfeiffer
from .preset import Preset

__all__ = ["HoulsbyInv", "PfeifferInv"]


@dataclass(frozen=True)
class _WithInvertible(Preset):
    """Settings of both parts, by AdapterHub's names; they share the non-linearity, and `layers` is for the bottlenecks
    alone."""

    paper = "arXiv:2005.00052"
    lr = 3e-4
    beside: ClassVar[type[Bottleneck]]

    reduction_factor: Reduction = 16
    non_linearity: Activation = "relu"
    inv_adapter: Annotated[str, OneOf(tuple(NETWORKS), "inv_adapter"), Help("the coupling")] = "nice"
    inv_adapter_reduction_factor: Factor = 2
    undo: Undo = True
    dropout: Dropout = 0.0
    layers: Layers = None

    def parts(self) -> list[Method]:
        bottleneck = self.beside(
            reduction_factor=self.reduction_factor, non_linearity=self.non_linearity, dropout=self.dropout,
            layers=self.layers,
        )  # fmt: skip
        coupling = Invertible(
            inv_adapter=self.inv_adapter, non_linearity=self.non_linearity,
            inv_adapter_reduction_factor=self.inv_adapter_reduction_factor, undo=self.undo,
        )  # fmt: skip
        return [bottleneck, coupling]


@dataclass(frozen=True)
class PfeifferInv(_WithInvertible):
    """One bottleneck a block."""

    title = "Pfeiffer adapter with an invertible one"
    beside = Pfeiffer


@dataclass(frozen=True)
class HoulsbyInv(_WithInvertible):
    """Two bottlenecks a block."""

    title = "Houlsby adapter with an invertible one"
    beside = Houlsby

    non_linearity: Activation = "swish"
