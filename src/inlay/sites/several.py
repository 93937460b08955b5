"""Layers that compute attention several times, each time with other heads of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

from .hints import CACHES
from .site import Site

__all__ = ["ValueHeads", "checked", "value_heads", "whole_values"]

ValueHeads = tuple[tuple[int, ...], ...]
"""For each time, the heads of a cache's values that it reads, in order."""


def checked(sites: Sequence[Site]) -> list[Site]:
    """The sites. Raises: UsageError where one computes attention several times, of what cannot be told."""
    if unknown := next((site.path for site in sites if site.value_heads is None), ""):
        what = f"{unknown} computes attention several times, and which heads of a prefix each reads cannot be told"
        raise UsageError(what, "Choose LoRA.")
    return list(sites)


def value_heads(module: Any, given: Mapping[str, Any], values: Sequence[Tensor]) -> ValueHeads | None:
    """Which heads of the cache that an attention was `given` each of the `values` (B, heads, n, dim) held, by the order
    in which it read them; None where it was given none that holds them, or read something else."""
    cache = next((given[name] for name in CACHES if hasattr(given.get(name), "layers")), None)
    layer = getattr(module, "layer_idx", None)
    if cache is None or not isinstance(layer, int) or layer >= len(cache.layers):
        return None
    whole = cache.layers[layer].values
    heads = [[_head(whole, v[:, i]) for i in range(v.shape[1])] for v in values]
    seen = [tuple(i for i in own if i is not None) for own in heads]
    complete = {i for own in seen for i in own} == set(range(whole.shape[1]))
    return tuple(seen) if complete and all(map(len, seen)) and [*map(len, seen)] == [*map(len, heads)] else None


def whole_values(heads: ValueHeads, values: Sequence[Tensor]) -> Tensor:
    """The inverse: the values (heads, n, dim) of a cache, of those (heads, n, dim) that each time read."""
    whole = values[0].new_empty(1 + max(max(own) for own in heads), *values[0].shape[1:])
    for own, value in zip(heads, values, strict=True):
        whole[list(own)] = value
    return whole


def _head(whole: Tensor, value: Tensor) -> int | None:
    """Which head of (B, heads, n, dim) is (B, n, dim)."""
    fits = whole.shape[2:] == value.shape[1:]
    return next((i for i in range(whole.shape[1]) if fits and torch.equal(whole[:, i], value)), None)
