"""The keys and values that a base computes for a text, at each of its attention layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.errors import UsageError

from .attention import QKV, handled_by
from .observe import Base, attention_sites, uses_interface
from .several import whole_values
from .site import Site
from .tiny import quietly

__all__ = ["keys_and_values"]

MISSES = (AssertionError, AttributeError, KeyError, TypeError, ValueError)
"""What bases raise that want more than ids."""
KeysValues = tuple[Tensor, Tensor]
"""Keys (heads, n, head_dim) and values (heads, n, value_dim)."""


def keys_and_values(base: Base, ids: Tensor) -> dict[nn.Module, KeysValues]:
    """For each attention module that keys and values can be put before, those that the base gives the row `ids` (n,).

    The caller sees to it that nothing acts beside the base. Raises: UsageError where the base cannot read so many
    tokens, or ids alone, or does not hand its keys out.
    """
    stack: Any = base.stacks[-1]
    given: dict[str, Any] = {"input_ids": ids[None].to(next(base.model.parameters()).device)}
    seen, own = _Seen(), not uses_interface(base)
    try:
        with quietly(stack), handled_by(seen):
            out = stack(**given, **({"use_cache": True} if own else {}))
    except (IndexError, RuntimeError) as error:  # what comes of positions beyond the last
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"the base cannot read {len(ids)} tokens at once ({why})", "Choose fewer.") from None
    except MISSES as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"the base cannot read tokens alone ({why})", "Start at random.") from None
    sites = attention_sites(base)
    found = dict(zip((site.module for site in sites), _cached(out), strict=False)) if own else seen.found(sites)
    if any(site.module not in found or found[site.module][0].shape[1] != len(ids) for site in sites):
        raise UsageError("the base does not hand out the keys of each layer, once", "Start at random.")
    return {site.module: _plain(found[site.module], site.repeats) for site in sites}


def _plain(pair: KeysValues, repeats: int) -> KeysValues:
    """The first of heads that are there `repeats` times, over and over."""
    keys, values = (heads[: len(heads) // repeats] for heads in pair)
    return keys, values


class _Seen:
    """A handler of attention that keeps the first row's keys and values, each time that a module attends."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, list[KeysValues]] = {}

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        self._calls.setdefault(module, []).append((qkv[1][0].clone(), qkv[2][0].clone()))
        return plain(module, *qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**call)

    def found(self, sites: Sequence[Site]) -> dict[nn.Module, KeysValues]:
        """Those of layers that ran once; where they compute attention several times, all heads of their values."""
        found: dict[nn.Module, KeysValues] = {}
        for site in sites:
            calls = self._calls.get(site.module, [])
            if site.value_heads and len(calls) == len(site.value_heads):
                found[site.module] = calls[0][0], whole_values(site.value_heads, [values for _, values in calls])
            elif len(calls) == 1:
                found[site.module] = calls[0]
        return found


def _cached(out: Any) -> Sequence[KeysValues]:
    """What each layer of the cache in `out` holds of its first row."""
    cache = getattr(out, "cache", None)
    cache = getattr(out, "past_key_values", None) if cache is None else cache
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in getattr(cache, "layers", ())]
