"""A stack of the base (the module that turns ids into hidden states), and how it numbers positions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.sites.hints import CACHES

__all__ = ["Stack", "cache_name", "describe"]


@dataclass(frozen=True, eq=False)
class Stack:
    """`part` is "encoder", "decoder" or ""; `counts` says what positions count where the caller gives none:
    "columns" (most models), "mask" (real tokens, by the mask) or "ids" (real tokens, by their ids); `first` is the
    position of the first token; `filler` a token id that is no padding; `cache` the name of the argument for a cache.
    """

    module: nn.Module
    signature: inspect.Signature
    part: str
    embedding: nn.Module
    pooler: nn.Module | None
    counts: str
    first: int
    filler: int
    cache: str

    @property
    def takes_positions(self) -> bool:
        return "position_ids" in self.signature.parameters

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        bound = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD and parameter.name in bound:
                bound.update(bound.pop(parameter.name))
        for name in CACHES:  # older names are still taken
            if name != self.cache and self.cache and bound.get(name) is not None:
                bound[self.cache] = bound.pop(name)
        return bound

    def plain_positions(self, ids: Tensor | None, mask: Tensor, past: int) -> Tensor:
        """(B, L) positions the base itself would give; `mask` is (B, past + L)."""
        length = mask.shape[1] - past
        if self.counts == "ids" and ids is not None:
            real = ids.ne(self.first - 1).long()
            return (real.cumsum(1) + past) * real + self.first - 1
        if self.counts == "mask":
            return (mask.cumsum(1) * mask - 1)[:, past:]
        columns = torch.arange(past, past + length, device=mask.device) + self.first
        return columns.expand(mask.shape[0], length)

    def real_positions(self, mask: Tensor, past: int) -> Tensor:
        """(B, L) positions that count real tokens only."""
        return ((mask.cumsum(1) - 1).clamp(min=0) + self.first)[:, past:]


def cache_name(module: nn.Module) -> str:
    """What `module` calls its cache; "" where it takes none."""
    return next((name for name in CACHES if name in inspect.signature(module.forward).parameters), "")


def describe(module: Any, part: str) -> Stack:
    """Read what `Stack` holds from the module."""
    counts, first = "columns", 0
    for child in module.modules():
        if isinstance(child, nn.Embedding) and "attention_mask" in inspect.signature(child.forward).parameters:
            counts = "mask"
        elif hasattr(child, "create_position_ids_from_input_ids"):
            counts, first = "ids", int(getattr(child, "padding_idx", 0)) + 1
    pooler = getattr(module, "pooler", None)
    padding = getattr(module.config, "pad_token_id", None)
    return Stack(
        module, inspect.signature(module.forward), part, module.get_input_embeddings(),
        pooler if isinstance(pooler, nn.Module) else None, counts, first, 1 if padding == 0 else 0,
        cache_name(module),
    )  # fmt: skip
