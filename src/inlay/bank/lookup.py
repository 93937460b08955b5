"""What forwards ask of a bank: the route that holds here, and what its adapters put among and before the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.batch.forward import FORWARD
from inlay.batch.noise import Dropper
from inlay.batch.prefixes import KeysValues, Prefixes
from inlay.batch.route import Blend, Route
from inlay.errors import UsageError
from inlay.sites.backbone import Backbone
from inlay.sites.observe import attention_sites
from inlay.sites.site import Site
from inlay.sites.structure import Structure

from .adapter import Adapter, Part
from .routing import Routing

__all__ = ["Lookup"]


class Lookup:
    """`adapters` by name, and their routes; `padding_invariant(behind_prefix)` and `reads_cache()` find out once what
    the base does."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        padding_invariant: Callable[[bool], bool],
        reads_cache: Callable[[bool], bool],
    ) -> None:
        self.adapters, self.routing = adapters, Routing(adapters)
        self._padding_invariant, self._padding = padding_invariant, {}
        self._reads_cache = cache(reads_cache)

    def route_here(self) -> Route | None:
        return self.routing.current()

    def takes_padding(self, behind_prefix: bool) -> bool:
        if behind_prefix not in self._padding:
            self._padding[behind_prefix] = self._padding_invariant(behind_prefix)
        return self._padding[behind_prefix]

    def check_prefix_read(self, lengths: Sequence[int], ids: Tensor | None) -> None:
        """Raises: UsageError where the base's attention, which is not transformers', does not read a cached prefix, or
        cannot hide one from the single token of each row of `ids`, where their prefixes have unequal `lengths`."""
        if not self._reads_cache(False):
            what = "this base does not read keys and values before several tokens in its cache, where a prefix would be"
            raise UsageError(what, "Choose LoRA.")
        single = ids is not None and ids.shape[1] == 1
        if single and len(set(lengths)) > 1 and not self._reads_cache(True):
            what = "a single token of this base reads what is masked in the cache: one row's prefix is another's too"
            raise UsageError(what, "Give all rows one prefix.")

    def virtual_length(self, blend: Blend) -> int:
        return sum(self.adapters[name].virtual_length for name, _ in blend)

    def prefix_length(self, blend: Blend) -> int:
        return sum(self.adapters[name].prefix_length for name, _ in blend)

    def shift(self, backbone: Backbone, blend: Blend) -> int:
        """By how much a row's adapters move its positions. What takes no cache counts none: there HF PEFT's prefixes,
        which it hands over as a cache, move no positions, and neither do these."""
        counted = backbone.cache and backbone.part != "encoder" and self.prefix_length(blend)
        return sum(self.adapters[name].prefix_shift for name, _ in blend) if counted else 0

    def prefixes(
        self, backbone: Backbone, blends: Sequence[Blend], base: Structure, begins: Sequence[bool] | None = None
    ) -> Prefixes:
        """The prefixes of a call's rows; where it is said which of them it `begins`, the others have theirs."""
        lengths = [0 if backbone.part == "encoder" else self.prefix_length(b) for b in blends]
        shifts = [self.shift(backbone, b) for b in blends]
        if begins is not None:
            lengths = [n if new else 0 for n, new in zip(lengths, begins, strict=True)]
        sites = attention_sites(base) if any(lengths) else []
        heads = {site.module: site.value_heads for site in sites if site.value_heads}
        modules, attended = [site.module for site in sites], {b: any(self._attended(b)) for b in dict.fromkeys(blends)}
        counted = [attended[b] for b in blends]
        return Prefixes(blends, lengths, self.prefix_of, modules, shifts, self.prefix_factors, heads, counted)

    def _attended(self, blend: Blend) -> Iterator[Site]:
        """The attention modules that adapters of a row act on by their queries, which say where a token stands."""
        return (site for part in self._parts(blend) for site in part.attended)

    def virtual_of(self, blend: Blend) -> Tensor | None:
        """(n, hidden) embeddings of the virtual tokens of a row."""
        parts = [part for part in self._parts(blend) if part.method.virtual_length]
        found = [part.method.virtual(part.at("", None, _cache())) for part in parts]
        return torch.cat(found) if found else None

    def prefix_of(self, blend: Blend, module: nn.Module) -> KeysValues | None:
        """Keys and values before those of a row, at one attention module."""
        parts = [part for part in self._parts(blend) if part.method.prefix_length and module in part.order]
        found = [part.method.prefix(part.at("", None, _cache()), *part.order[module]) for part in parts]
        if not found:
            return None
        repeats = parts[0].order[module][0].repeats
        keys, values = (torch.cat(several, 1).repeat(repeats, 1, 1) for several in zip(*found, strict=True))
        return keys, values

    def prefix_factors(self, module: nn.Module) -> Tensor | None:
        """By what the rows of this forward multiply their keys and values at one attention module."""
        forward = FORWARD.get()
        found = None if forward is None else forward.inputs.get(("prefix gates", module))
        if found is None and forward is not None:
            parts = [part for blend in dict.fromkeys(forward.route.blends) for part in self._parts(blend)]
            if any(part.method.has("prefix_gates") and module in part.order for part in parts):
                raise UsageError("what gates a prefix was not seen in this forward", "Choose prefix tuning.")
        return found

    def watched(self, route: Route) -> dict[nn.Module, str]:
        """The attention modules whose queries adapters of the route act by, with their paths."""
        if "watched" not in route.cache:
            sites = [site for blend in dict.fromkeys(route.blends) for site in self._attended(blend)]
            route.cache["watched"] = {site.module: site.path for site in sites}
        return route.cache["watched"]

    def streamed(self, route: Route) -> bool:
        """Whether an adapter of the route reads the residual stream beside a sublayer."""
        if "streamed" not in route.cache:
            names = {name for blend in route.blends for name, _ in blend}
            names |= {used for name in names for used in self.adapters[name].uses}
            sites = (site for name in names for part in self.adapters[name].parts for site in part.sites.values())
            route.cache["streamed"] = any(site.kind == "sublayer" for site in sites)
        return route.cache["streamed"]

    def compute_shared(self, route: Route, cache: dict[Any, Any], drops: bool) -> None:
        """Compute what the parts' sites share before the backbone runs: once a forward, and in no block that is
        computed again. `drops` is as in `Forward`."""
        for blend in dict.fromkeys(route.blends):
            for name, _ in blend:
                adapter = self.adapters[name]
                if adapter.flats and any(part.shared for part in adapter.parts):
                    adapter.lay_out(None, cache)
                for part in adapter.parts:
                    if part.shared:
                        cache["drawn", part] = part.draw(_dropout(adapter, part, route, drops))
                        part.at("", None, cache)

    def _parts(self, blend: Blend) -> list[Part]:
        return [part for name, _ in blend for part in self.adapters[name].parts]


def _dropout(adapter: Adapter, part: Part, route: Route, drops: bool) -> Callable[[Tensor, float], Tensor] | None:
    """Dropout of what the sites of a part share, by masks that belong to the learner's step; None where nothing is
    dropped."""
    if route.noise is None:
        return F.dropout if drops else None
    row = next(row for row, blend in enumerate(route.blends) if adapter.name in dict(blend))
    step = route.noise.steps[row]
    return lambda x, p: Dropper(adapter.seed, part.key(""), [(step, -1, 0, len(x))])(x, p)


def _cache() -> dict[Any, Any]:
    forward = FORWARD.get()
    return {} if forward is None else forward.cache
