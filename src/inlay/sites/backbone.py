"""The backbone of a base, the module that turns ids into hidden states, and how it numbers positions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .counting import find_rule
from .hints import CACHES
from .tiny import quietly

__all__ = ["Backbone", "cache_name", "describe", "observe_positions"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """`part` is "encoder", "decoder" or ""; `counts` says what positions count where the caller gives none:
    "columns" (most models), "mask" (real tokens, by the mask) or "ids" (real tokens, by their ids); `first` is the
    position of the first token; `padding` the id that is no real token where ids count; `filler` a token id that is no
    padding; `cache` the name of the argument for a cache; `embedding` is None where no ids are embedded.
    """

    module: nn.Module
    signature: inspect.Signature
    part: str
    embedding: nn.Module | None
    pooler: nn.Module | None
    counts: str
    first: int
    padding: int | None
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
            if name == "cache" and not hasattr(bound.get(name), "get_seq_length"):
                continue  # of pages, which attention alone reads
            if name != self.cache and self.cache and bound.get(name) is not None:
                bound[self.cache] = bound.pop(name)
        return bound

    def plain_positions(self, ids: Tensor | None, mask: Tensor, past: int) -> Tensor:
        """(B, L) positions the base itself would give; `mask` is (B, past + L)."""
        length = mask.shape[1] - past
        if self.counts == "ids" and ids is not None:
            real = torch.ones_like(ids) if self.padding is None else ids.ne(self.padding).long()
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


def describe(module: Any, part: str) -> Backbone:
    """Read what `Backbone` holds from the module's structure; nothing is run."""
    counts, first, padding = "columns", 0, None
    for child in module.modules():
        if isinstance(child, nn.Embedding) and "attention_mask" in inspect.signature(child.forward).parameters:
            counts = "mask"
        elif hasattr(child, "create_position_ids_from_input_ids"):
            counts, padding = "ids", int(getattr(child, "padding_idx", 0))
            first = padding + 1
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None  # images have patches
    pooler = getattr(module, "pooler", None)
    known = getattr(getattr(module, "config", None), "pad_token_id", None)
    embedding, pooler = (m if isinstance(m, nn.Module) else None for m in (embedding, pooler))
    return Backbone(
        module, inspect.signature(module.forward), part, embedding, pooler, counts, first, padding,
        next(i for i in range(3) if i not in (known, padding)), cache_name(module),
    )  # fmt: skip


def observe_positions(module: Any, part: str) -> Backbone:
    """`describe`, with the rule of positions as tiny forwards show it, where the module takes positions and ids."""
    backbone = describe(module, part)
    taken = backbone.signature.parameters
    if not backbone.takes_positions or "input_ids" not in taken or all(p.is_meta for p in module.parameters()):
        return backbone
    known = getattr(getattr(module, "config", None), "pad_token_id", None)
    own = [inner.padding_idx for inner in module.modules() if isinstance(inner, nn.Embedding)]
    rows = getattr(getattr(backbone.embedding, "weight", None), "shape", (0,))[0]
    paddings = [i for i in (known, backbone.padding, *own) if i is not None and 0 <= i < rows]
    try:
        with quietly(module):
            rule = find_rule(module, "attention_mask" in taken, paddings)
    except Exception:  # what cannot be seen, the structure has to say
        return backbone
    return backbone if rule is None else replace(backbone, counts=rule.counts, first=rule.first, padding=rule.padding)
