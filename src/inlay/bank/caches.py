"""By whom a cache was filled: what one route has put into it, another must not go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from inlay.batch.prompts import columns
from inlay.batch.route import Blend
from inlay.errors import UsageError
from inlay.sites.hints import CACHES

from .adapter import Adapter

__all__ = ["Filled", "check_cache", "entry", "filled_under", "tag_caches"]

TAG = "_inlay_filled_under"
"""The attribute of a cache that holds its `Filled`."""


@dataclass(frozen=True)
class Filled:
    """Under which blends a cache was filled, by which adapters, the lengths of its rows' prompts, and what the forwards
    that go on from it need not compute again: adapters as they were cast, derived and laid out.
    """

    blends: tuple[Blend, ...]
    adapters: Mapping[str, ref[Adapter]]
    prompts: tuple[int, ...] | None
    values: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Filled:
        return Filled(self.blends, self.adapters, self.prompts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self.blends, self.prompts)


def _plain(blends: tuple[Blend, ...], prompts: tuple[int, ...] | None) -> Filled:
    """What a pickle holds: whose adapters those were cannot be said any more."""
    return Filled(blends, {}, prompts)


def filled_under(cache: Any) -> Filled | None:
    """What is known of a cache that holds something; None where it is empty or the base's own."""
    return getattr(cache, TAG, None) if _holds(cache) else None


def check_cache(cache: Any, blends: Sequence[Blend], adapters: Mapping[str, Adapter]) -> None:
    """Raises: UsageError where other adapters than those of `blends`, or the base, have filled the cache."""
    if not _holds(cache):
        return
    filled = getattr(cache, TAG, None) or Filled(((),), {}, None)
    rows = max(len(blends), len(filled.blends))
    gone = any(known() is not adapters.get(name) for name, known in filled.adapters.items())
    if gone or _spread(blends, rows) != _spread(filled.blends, rows):
        raise UsageError("the cache was filled under another route", "Use a new cache for a new route.")


def tag_caches(
    given: Any,
    out: Any,
    blends: Sequence[Blend],
    adapters: Mapping[str, Adapter],
    prompts: tuple[int, ...] | None,
    values: dict[Any, Any],
) -> None:
    """Write down who has filled the cache that a forward was `given`, and those that it gives."""
    makers = {name: ref(adapters[name]) for blend in blends for name, _ in blend}
    for cache in (given, *_caches(out)):
        if cache is None or isinstance(cache, (tuple, list, Tensor)):
            continue
        before: Filled | None = getattr(cache, TAG, None)
        lengths = before.prompts if before is not None else prompts
        setattr(cache, TAG, Filled(tuple(blends), makers, lengths, {} if torch.is_grad_enabled() else values))


def entry(out: Any, name: str) -> Any:
    """What `out` holds under `name`; asking transformers' outputs for an older name as an attribute makes them warn."""
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def _caches(out: Any) -> Iterator[Any]:
    if isinstance(out, tuple):
        yield from (value for value in out if hasattr(value, "get_seq_length"))
    else:
        yield from (entry(out, name) for name in CACHES)


def _holds(cache: Any) -> bool:
    """Whether a cache holds keys, or the state of a recurrent layer."""
    if cache is None or columns(cache):
        return cache is not None
    try:
        return bool(cache.has_previous_state())
    except (AttributeError, ValueError, TypeError):
        return False


def _spread(blends: Sequence[Blend], rows: int) -> list[Blend]:
    return [blend for blend in blends for _ in range(max(1, rows // len(blends)))]
