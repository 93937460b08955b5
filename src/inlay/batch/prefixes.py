"""Prefix keys and values of the rows or segments of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .route import Blend

__all__ = ["Prefixes"]

KeysValues = tuple[Tensor, Tensor]
"""Keys (heads, n, head_dim) and values (heads, n, value_dim)."""


class Prefixes:
    """Looks up what each unit's adapters put before its keys; `find(blend, module)` computes it for one blend.

    `factors(module)` is what they are multiplied with, (2, units, longest), for keys and for values.
    `lengths` holds the number of prefix keys of each unit, `shifts` by how much they move its positions. A module that
    computes attention several times reads the heads of the prefix's values that `value_heads` says, time by time.
    `counted` are units without prefixes whose adapters read positions all the same.
    """

    def __init__(
        self,
        blends: Sequence[Blend],
        lengths: Sequence[int],
        find: Callable[[Blend, nn.Module], KeysValues | None],
        modules: Sequence[nn.Module] = (),
        shifts: Sequence[int] | None = None,
        factors: Callable[[nn.Module], Tensor | None] = lambda module: None,
        value_heads: Mapping[nn.Module, Sequence[Sequence[int]]] | None = None,
        counted: Sequence[bool] | None = None,
    ) -> None:
        self._factors, self._value_heads = factors, value_heads or {}
        self.counted = [False] * len(blends) if counted is None else list(counted)
        self._turns: dict[tuple[nn.Module, tuple[int, ...]], int] = {}
        self.shifts = list(lengths if shifts is None else shifts)
        self.blends, self.lengths, self._find, self._modules = list(blends), list(lengths), find, modules
        self._cache: dict[tuple[nn.Module, tuple[int, ...], int], KeysValues | None] = {}

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def all_layers(self, units: int, dtype: torch.dtype) -> list[KeysValues]:
        """(units, heads, P, dim) keys and values, in `dtype`, of every attention that takes a prefix, in turn."""
        layers = []
        for module in self._modules:
            found = (self._find(blend, module) for blend in self.blends if blend)
            like = next((kv for kv in found if kv is not None), None)
            if like is not None:  # an encoder's layers have none
                stacked = self._stack(module, range(units), like[0][None].to(dtype), like[1][None].to(dtype))
                assert stacked is not None
                layers.append(stacked)
        return layers

    def holds(self, module: nn.Module) -> bool:
        """Whether what stands at a module is known already, as in steps that go on from a cache."""
        return not torch.is_grad_enabled() and any(known is module for known, *_ in self._cache)

    def of(self, module: nn.Module, units: Sequence[int], k: Tensor, v: Tensor) -> KeysValues | None:
        """(units, heads, P, dim) keys and values, right-aligned, P the longest of `units`; None where none acts here.

        Without gradients the result is held, so that a decoding loop stacks once for each layer.
        """
        calls, turn = self._value_heads.get(module, ()), 0
        if calls:
            turn = self._turns.get((module, tuple(units)), 0)
            self._turns[module, tuple(units)] = (turn + 1) % len(calls)
        spot = (module, tuple(units), turn)
        if torch.is_grad_enabled() or spot not in self._cache:
            stacked = self._stack(module, units, k, v, list(calls[turn]) if calls else None)
            if torch.is_grad_enabled():
                return stacked
            self._cache[spot] = stacked
        return self._cache[spot]

    def _stack(
        self, module: nn.Module, units: Sequence[int], k: Tensor, v: Tensor, heads: list[int] | None = None
    ) -> KeysValues | None:
        longest = max(self.lengths[u] for u in units)
        kinds: dict[Blend, int] = {}
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for unit in units:
            blend = self.blends[unit]
            if blend in kinds:
                continue
            kinds[blend] = len(keys)
            found = self._find(blend, module) if self.lengths[unit] else None
            keys.append(_padded(None if found is None else found[0], longest, k))
            own = found if found is None or heads is None else (found[0], found[1][heads])
            values.append(_padded(None if own is None else own[1], longest, v))
        if not longest or not any(self._acts(module, blend) for blend in kinds):
            return None
        rows = torch.tensor([kinds[self.blends[u]] for u in units], device=k.device)
        found = torch.stack(keys).index_select(0, rows), torch.stack(values).index_select(0, rows)
        factors = self._factors(module)
        if factors is None:
            return found
        of_keys, of_values = factors[:, list(units), -longest:, None].unsqueeze(2).to(k.dtype)  # (units, 1, P, 1)
        return found[0] * of_keys, found[1] * of_values

    def _acts(self, module: nn.Module, blend: Blend) -> bool:
        return bool(blend) and self._find(blend, module) is not None


def _padded(values: Tensor | None, width: int, like: Tensor) -> Tensor:
    """(heads, n, dim) padded on the left with zeros to `width`; zeros alone where there is nothing."""
    if values is None:
        return like.new_zeros(like.shape[1], width, like.shape[3])
    return F.pad(values.to(like.dtype), (0, 0, width - values.shape[1], 0))
