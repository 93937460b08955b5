"""The keys and values that a base computes for a text, at each of its attention layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError

from .attention import QKV, handled_by
from .observe import Base, attention_sites, uses_interface
from .tiny import in_eval

__all__ = ["keys_and_values"]

KeysValues = tuple[Tensor, Tensor]
"""Keys (heads, n, head_dim) and values (heads, n, value_dim)."""


@torch.no_grad()
def keys_and_values(base: Base, ids: Tensor) -> dict[nn.Module, KeysValues]:
    """For each attention module that keys and values can be put before, those that the base gives the row `ids` (n,).

    The caller sees to it that nothing acts beside the base. Raises: UsageError where the base cannot read so many
    tokens, or does not hand its keys out.
    """
    stack: Any = base.stacks[-1]
    given: dict[str, Any] = {"input_ids": ids[None].to(next(base.model.parameters()).device)}
    seen, own = _Seen(), not uses_interface(base)
    try:
        with in_eval(stack), handled_by(seen):
            out = stack(**given, **({"use_cache": True} if own else {}))
    except (IndexError, RuntimeError) as error:  # what comes of positions beyond the last
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"the base cannot read {len(ids)} tokens at once ({why})", "Choose fewer.") from None
    modules = [site.module for site in attention_sites(base)]
    found = dict(zip(modules, _cached(out), strict=False)) if own else seen.found
    if any(module not in found or found[module][0].shape[1] != len(ids) for module in modules):
        raise UsageError("the base does not hand out the keys of all its layers", "Start at random.")
    return found


class _Seen:
    """A handler of attention that keeps the first row's keys and values."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, KeysValues] = {}

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        self.found[module] = qkv[1][0].clone(), qkv[2][0].clone()
        return plain(module, *qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**call)


def _cached(out: Any) -> Sequence[KeysValues]:
    """What each layer of the cache in `out` holds of its first row."""
    cache = getattr(out, "cache", None)
    cache = getattr(out, "past_key_values", None) if cache is None else cache
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in getattr(cache, "layers", ())]
