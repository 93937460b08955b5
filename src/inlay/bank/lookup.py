"""What forwards ask of a bank: the route that holds here, and what its adapters put among and before the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.batch.forward import FORWARD
from inlay.batch.prefixes import KeysValues
from inlay.batch.route import Blend, Route

from .adapter import Adapter, Part
from .routing import Routing

__all__ = ["Lookup"]


class Lookup:
    """`adapters` by name, and their routes; `padding_invariant(behind_prefix)` finds out once what the base does."""

    def __init__(self, adapters: Mapping[str, Adapter], padding_invariant: Callable[[bool], bool]) -> None:
        self.adapters, self.routing = adapters, Routing(adapters)
        self._padding_invariant, self._padding = padding_invariant, {}

    def route_here(self) -> Route | None:
        return self.routing.current()

    def takes_padding(self, behind_prefix: bool) -> bool:
        if behind_prefix not in self._padding:
            self._padding[behind_prefix] = self._padding_invariant(behind_prefix)
        return self._padding[behind_prefix]

    def virtual_length(self, blend: Blend) -> int:
        return sum(self.adapters[name].virtual_length for name, _ in blend)

    def prefix_length(self, blend: Blend) -> int:
        return sum(self.adapters[name].prefix_length for name, _ in blend)

    def virtual_of(self, blend: Blend) -> Tensor | None:
        """(n, hidden) embeddings of the virtual tokens of a row."""
        parts = [part for part in self._parts(blend) if part.method.virtual_length]
        found = [part.method.virtual(part.at("", None, _cache())) for part in parts]
        return torch.cat(found) if found else None

    def prefix_of(self, blend: Blend, module: nn.Module) -> KeysValues | None:
        """Keys and values before those of a row, at one attention module."""
        parts = [part for part in self._parts(blend) if part.method.prefix_length and module in part.order]
        found = [part.method.prefix(part.at("", None, _cache()), *part.order[module]) for part in parts]
        return (torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1)) if found else None

    def compute_shared(self, route: Route, cache: dict[Any, Any]) -> None:
        """Compute what the parts' sites share before the backbone runs: once a forward, and in no block that is
        computed again."""
        for blend in dict.fromkeys(route.blends):
            for name, _ in blend:
                adapter = self.adapters[name]
                if adapter.flats and any(part.shared for part in adapter.parts):
                    adapter.lay_out(None, cache)
                for part in adapter.parts:
                    if part.shared:
                        part.at("", None, cache)

    def _parts(self, blend: Blend) -> list[Part]:
        return [part for name, _ in blend for part in self.adapters[name].parts]


def _cache() -> dict[Any, Any]:
    forward = FORWARD.get()
    return {} if forward is None else forward.cache
