"""The settings of bottleneck adapters, by the names and with the meanings of AdapterHub's `adapters` 1.3.0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from inlay.errors import UsageError
from inlay.values import From, Help, OneOf, Share

from .common import Activation
from .contract import Dropout, Layers, Method

__all__ = ["BehindAttention", "BottleneckSettings", "InitWeights", "Reads", "Reduction", "Residual", "Scaling"]

Reads = Literal["output", "stream", "behind"]


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _reduction(value: Any) -> float | dict[str, float]:
    if _is_factor(value):
        return float(value)
    if isinstance(value, Mapping) and value and all(map(_is_factor, value.values())):
        named = {str(block): float(factor) for block, factor in value.items()}
        if all(block.isdecimal() or block == "default" for block in named):
            return named
    raise ValueError('Give a number above 0, or numbers by block: {"0": 8, "default": 16}.')


def _scaling(value: Any) -> float | str:
    if isinstance(value, str) and value in ("learned", "channel"):
        return value
    if not _is_factor(value):
        raise ValueError('Give a number above 0, "learned" or "channel".')
    return float(value)


def _residual(value: Any) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value == "post_add"):
        return value
    raise ValueError('Give true, false or "post_add".')


Reduction = Annotated[
    float | Mapping[str, float],
    From(_reduction),
    Help('hidden size by bottleneck size; of blocks apart: {"0": 8, "default": 16}'),
]
BehindAttention = Annotated[bool, Help("one behind attention")]
Scaling = Annotated[
    float | str,
    From(_scaling),
    Help('by what the output is multiplied: a number, "learned" (one number from 1) or "channel" (one a feature)'),
]
Residual = Annotated[
    bool | str,
    From(_residual),
    Help('add to what the sublayer gives (true), to what is read (false), or to that before its norm ("post_add")'),
]
InitWeights = Annotated[str, OneOf(("bert", "houlsby", "mam_adapter"), "init_weights"), Help("how the weights start")]
DropLayers = Annotated[
    int, Ge(0), Le(4096), Help("each step of training leaves out the first 0 to this many blocks' adapters")
]
SEQUENTIAL = {
    "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "stochastic_depth": 0,
}  # fmt: skip
"""Settings that a parallel adapter has no use for, and what they are then."""


@dataclass(frozen=True)
class BottleneckSettings(Method):
    """`mh_adapter` puts an adapter behind attention, `output_adapter` behind the feed-forward part, `cross_adapter`
    behind cross-attention; `layers` keeps some blocks and `leave_out` leaves some out, both counted in each stack.

    A parallel adapter reads the stream x. Others read y, or with `original_ln_before` the stream behind the block's sum
    and norm. What they give is added to y, or, by `residual_before_ln`, to what they read; `ln_after` puts a norm
    behind them, and with `adapter_residual_before_ln` behind that sum. Without `original_ln_after`, the block goes on
    with just what that makes.
    """

    reduction_factor: Reduction = 16
    non_linearity: Activation = "relu"
    mh_adapter: BehindAttention = True
    output_adapter: Annotated[bool, Help("one behind the feed-forward part")] = True
    cross_adapter: Annotated[bool, Help("one behind cross-attention")] = False
    scaling: Scaling = 1.0
    dropout: Dropout = 0.0
    layers: Layers = None
    leave_out: Annotated[Layers, Help("blocks that have none, named as `layers` names those that do")] = None
    drop_layers: DropLayers = 0
    is_parallel: Annotated[bool, Help("read the stream that the sublayer's output is added to")] = False
    original_ln_before: Annotated[bool, Help("read the stream after the block's addition and norm")] = False
    original_ln_after: Annotated[bool, Help("the block's addition and norm come behind the adapter")] = True
    ln_before: Annotated[bool, Help("a norm of its own before the bottleneck")] = False
    ln_after: Annotated[bool, Help("a norm of its own behind the bottleneck")] = False
    residual_before_ln: Residual = True
    adapter_residual_before_ln: Annotated[bool, Help("add before the norm behind the bottleneck")] = False
    use_gating: Annotated[
        bool, Help("a trained gate for each row, as in UniPELT; none in decoders that attend to an encoder")
    ] = False
    init_weights: InitWeights = "bert"
    stochastic_depth: Annotated[Share, Help("share of rows for which training leaves an adapter out")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scaling", "reduction_factor"):
            if isinstance(value := getattr(self, name), int):
                object.__setattr__(self, name, float(value))
        useless = [name for name, value in SEQUENTIAL.items() if getattr(self, name) != value]
        if self.is_parallel and useless:
            what = f"{self.title} is parallel and sets {useless[0]} to {getattr(self, useless[0])!r}"
            raise UsageError(what, "Leave that out: it means something for sequential adapters alone.")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            what = f"{self.title}'s residual_before_ln is 'post_add' without original_ln_before"
            raise UsageError(what, "Set original_ln_before too, or leave it out.")

    @property
    def reads(self) -> Reads:
        """What D is applied to."""
        if self.is_parallel:
            return "stream"
        return "behind" if self.original_ln_before else "output"

    @property
    def adds(self) -> bool:
        """Whether all that an adapter does at a sublayer is to add something to y."""
        if self.ln_after and self.adapter_residual_before_ln:
            return False
        if self.original_ln_after:
            return self.reads != "behind" or self.residual_before_ln is True
        return self.reads == "behind" and self.residual_before_ln is not True  # what is left of x + y without x
