"""One place where an adapter can touch the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Site", "SiteKind", "bare", "is_conv1d", "plain_call"]

STOOD_IN = ("forward", "_call_impl")
"""Methods of modules that others may stand in for."""

SiteKind = Literal[
    "linear", "embedding", "norm", "sublayer", "block", "attention", "attended", "tokens", "head", "experts"
]  # fmt: skip
"""What a method sees there: "linear" x and y of a layer; "embedding" ids and the rows looked up; "norm" x and y of a
norm; "sublayer" what attention or MLP gives and the residual stream it is added to; "block" the residual stream behind
a block; "attention" queries, keys and values; "attended" what an attention module gives, with its queries; "tokens" a
row's embeddings, among which virtual ones can stand; "head" a whole module, with all its arguments; "experts" one
matrix for each expert of a mixture, held as one parameter."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True, eq=False)
class Site:
    """A module of the base, and what a method may know about it.

    `path` is the module's dotted name in the model; `layer` the index of its repeated block (None outside them);
    `part` says what it belongs to: "attention", "cross-attention", "mlp", "embedding", "head" or "norm";
    `role` the projection's place in it ("q", "k", "v", "qkv", "o", "in", "out" or ""); `stack` is "encoder",
    "decoder" or "" for models of one stack. `in_features` and `out_features` are the last dimensions of x and y; for
    an embedding, the number of rows and the width. `heads` and `head_dim` are those of keys (attention sites only).
    A norm's formula multiplies by its weight plus `offset`; a base multiplies what it looks up by `table_scale`.
    Where the kind is "experts", `path` is the parameter's and `module` holds it; `experts` counts its matrices, whose
    dimensions are `in_features` and `out_features`, and `stored_transposed` is whether it is stored as (E, in, out).
    `keys_of` is the path of another attention whose keys and values this one reads again, as in Gemma 3n; `repeats` is
    how many times all `heads` of a cache stand side by side where attention reads them, as in JetMoE. Where a layer
    computes attention several times, as DiffLlama's, `value_heads` are the heads of a cache's values that each of its
    calls reads; None where that cannot be told.
    """

    path: str
    kind: SiteKind
    module: nn.Module
    layer: int | None = None
    part: str = ""
    role: str = ""
    stack: str = ""
    in_features: int = 0
    out_features: int = 0
    heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    keys_of: str = ""
    repeats: int = 1
    value_heads: tuple[tuple[int, ...], ...] | None = ()
    offset: float = 0.0
    table_scale: float = 1.0
    experts: int = 0
    stored_transposed: bool = False
    norm: nn.Module | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The last component of the path, which is what target lists name."""
        return self.path.rpartition(".")[2]

    @property
    def is_embedding(self) -> bool:
        """Whether the module looks rows of a table up, so that x are token ids."""
        return isinstance(self.module, nn.Embedding)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.stored_transposed or is_conv1d(self.module)

    @property
    def quantized(self) -> bool:
        """Whether the module's weight is held in fewer bits than a number takes."""
        weight = getattr(self.module, "weight", None)
        return weight is not None and (type(weight.data) is not Tensor or not weight.is_floating_point())

    def weight(self) -> Tensor:
        """The frozen weight as (out, in) or (E, out, in), dequantized where it must be; read for merges and starts, not
        in forward."""
        weight: Any = getattr(self.module, self.name) if self.experts else self.module.weight
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        elif not self.experts and (scales := _row_scales(self.module)) is not None:
            weight = weight.detach() * scales[:, None].to(weight.device) / 127  # bitsandbytes' 8 bits
        elif hasattr(weight, "dequantize") and type(weight.data) is not Tensor:
            weight = weight.dequantize()
        assert isinstance(weight, Tensor)
        return weight.detach().mT if self.transposed else weight.detach()

    def normalised(self, x: Tensor) -> Tensor:
        """What a norm gives for x with weights of one and no bias, hooks left out."""
        return plain_call(self.module, self.neutral(), x)

    def neutral(self) -> dict[str, Tensor]:
        """A norm's own parameters, with which it neither scales nor shifts."""
        own = dict(self.module.named_parameters(recurse=False))
        neutral = {"weight": torch.full_like(own["weight"], 1 - self.offset)}
        if "bias" in own:
            neutral["bias"] = torch.zeros_like(own["bias"])
        return neutral


def _row_scales(module: Any) -> Tensor | None:
    """The largest number of each row of a weight (out, in) that bitsandbytes holds in 8 bits; it moves them in the
    first forward."""
    if getattr(module.weight, "SCB", None) is not None:
        return module.weight.SCB
    return getattr(getattr(module, "state", None), "SCB", None)


def plain_call(module: nn.Module, params: Mapping[str, Tensor], *args: Tensor) -> Tensor:
    """Run `module` on `args` without its hooks, with `params` in the place of its own."""
    return torch.func.functional_call(bare(module, {}), dict(params), args)


def bare(module: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """`module` without its hooks, with `params` in the place of some of its own; it shares all else with `module`."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    for method in STOOD_IN:
        made.__dict__.pop(method, None)  # what stands in for it holds on to `module`
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        made.__dict__[hooks] = type(module.__dict__[hooks])()
    made.__dict__["_parameters"] = {**module._parameters, **params}
    return made
