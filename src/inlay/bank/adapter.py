"""One adapter: its parts, each one method with its parameters at each site. It lives beside the base, never in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.formats.peft import CONSTANTS
from inlay.methods.contract import LinearForm, Method, Params, Site, Structure

from .flat import Flat, Key, whole_parameters
from .starting import Rows, begin_from_rows

__all__ = ["Adapter", "Part"]

Values = Mapping[str, Mapping[str, Tensor]]
"""Path of a site ("" for what all sites share, CONSTANTS for what is not trained) -> name of a tensor -> its value."""


class Part:
    """One method of an adapter: its sites, and float32 parameters (float64 over a float64 base) on the base's device.

    `params` maps the path of a site to its parameters by name; those that all sites share stand under "". `constants`
    are not trained."""

    def __init__(self, method: Method, index: int, sites: Sequence[Site], params: dict[str, dict[str, nn.Parameter]]):
        self.method, self.index, self.params = method, index, params
        self.sites: dict[str, Site] = {site.path: site for site in sites}
        self.attended = [site for site in sites if site.kind == "attended"]  # by whose queries it acts
        turns = {site.path: i for i, site in enumerate(sites)}
        found = [turns.get(site.keys_of, i) for i, site in enumerate(sites)]  # keys read again have their prefix there
        self.order: dict[nn.Module, tuple[Site, int]] = {
            s.module: (sites[n], n) for s, n in zip(sites, found, strict=True)
        }
        self.constants: Mapping[str, Tensor] = {}

    @property
    def shared(self) -> bool:
        """Whether the sites share parameters."""
        return "" in self.params

    def hold_constants(self, others: Iterable[Part]) -> None:
        """Take the constants that were read, or those that the settings say; where one of the `others` has the same,
        one copy serves both."""
        like = next(next(iter(self.sites.values())).module.parameters())
        wide = _precision(like)
        own = self.constants or self.method.constants(list(self.sites.values()))
        own = {name: c.to(like.device, wide if c.is_floating_point() else c.dtype) for name, c in own.items()}
        alike = (p.constants for p in others if own and p.constants.keys() == own.keys())
        self.constants = next((c for c in alike if all(torch.equal(c[name], own[name]) for name in own)), own)

    def key(self, path: str) -> str:
        """By what an adapter knows this part's parameters at `path`."""
        return path if not self.index else f"{self.index}:{path}"

    def at(self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any]) -> Params:
        """All that the method reads at a site, in the dtype of the computation; gradients reach the parameters.
        `cache` is that of one forward. Without gradients, what is cast and derived stays in it."""
        if torch.is_grad_enabled():
            return self._trained(path, dtype, cache)
        spot = self, path, dtype
        if spot not in cache:
            own = {**self._seen(path, dtype, cache), **self._cast(path, dtype, cache)}
            cache[spot] = self._derived(path, own)
        return cache[spot]

    def draw(self, dropout: Callable[[Tensor, float], Tensor] | None) -> Params:
        """What a step of training draws for what the sites share; nothing where there is no `dropout`."""
        return {} if dropout is None else self.method.draw(self.params[""], dropout)

    def form(self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any]) -> LinearForm:
        spot = self, path, dtype, "form"
        if torch.is_grad_enabled() or spot not in cache:
            made = self.method.form(self.at(path, dtype, cache), self.sites[path]).cast(dtype)
            return made if torch.is_grad_enabled() else cache.setdefault(spot, made)
        return cache[spot]

    def _trained(self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any]) -> Params:
        # Sites compute theirs anew, so that a block that is computed again does as much as it did at first.
        if not path and ("shared", self) in cache:
            return cache["shared", self]
        whole = cache.get(("whole", self, dtype))
        own = self._cast(path, dtype, cache, trained=whole is None)
        own = own if whole is None else {**own, **whole.get(path, {})}
        drawn: Params = {} if path else cache.get(("drawn", self), {})
        made = self._derived(path, {**self._seen(path, dtype, cache), **own, **drawn})
        if not path:
            cache["shared", self] = made
        return made

    def _seen(self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any]) -> Params:
        """What all sites share, as the site at `path` sees it."""
        if not path or not self.shared:
            return {}
        shared = self.at("", None if ("shared", self) in cache else dtype, cache)
        kept = self.method.exact if dtype is not None else shared
        return {name: v if name in kept or not v.is_floating_point() else v.to(dtype) for name, v in shared.items()}

    def _cast(
        self, path: str, dtype: torch.dtype | None, cache: dict[Any, Any], trained: bool = True
    ) -> dict[str, Tensor]:
        """Constants and parameters; without `trained`, only those of them that are not."""
        found = {name: p for name, p in self.params.get(path, {}).items() if trained or not p.requires_grad}
        kept = self.method.exact if dtype is not None else found
        own = {name: p if name in kept else p.to(dtype) for name, p in found.items()}
        return {**self._constants(dtype, cache), **own}

    def _constants(self, dtype: torch.dtype | None, cache: dict[Any, Any]) -> dict[str, Tensor]:
        """The constants in `dtype`, cast once a forward for all sites and all parts that hold the same ones."""
        cast: dict[str, Tensor] = {}
        for name, constant in self.constants.items():
            spot = "constant", constant, dtype
            if spot not in cache:
                cache[spot] = constant.to(dtype) if dtype and constant.is_floating_point() else constant
            cast[name] = cache[spot]
        return cast

    def _derived(self, path: str, own: dict[str, Tensor]) -> Params:
        return {**own, **self.method.derive(own, self.sites[path] if path else None)}


class Adapter:
    """An adapter `name` of `parts`. `seed` sets its start and its dropout. Where it is trained as few flat tensors,
    `laid` holds them all, and `flats` too in training's forwards. `grouped` is whether an optimizer was given its
    parameters by their rates; `chosen` whether rows of data have changed its methods' settings; `fixed` whether its
    values stay as they are; `shares` what it does at each site, by `inlay.bank.plan`."""

    def __init__(self, name: str, parts: Sequence[Part], seed: int) -> None:
        self.name, self.parts, self.seed = name, list(parts), seed
        self.laid: Sequence[Flat] = ()
        self.flats: Sequence[Flat] = ()
        self.grouped, self.chosen, self.fixed, self.shares = False, False, False, dict[str, Any]()

    @classmethod
    def fresh(
        cls, name: str, methods: Sequence[Method], base: Structure, seed: int, rows: Rows | None = None
    ) -> Adapter:
        """New parameters for `methods`, drawn from `seed` or found in `rows`. Raises: UsageError where two of them
        write to one place, or rows are lacking."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for index, method in enumerate(methods):
            sites = method.sites(base)
            if method.start_rows:
                method, created = begin_from_rows(method, sites, base.model, rows, generator)
                sites = method.sites(base)
            else:
                created = {site.path: method.create(site, generator) for site in sites}
            created[""] = method.shared(sites, generator)
            method, begun = method.begin_at_base(created, sites, base, generator)
            filled = {path: values for path, values in begun.items() if values}
            parts.append(Part(method, index, sites, _parameters(method, filled, base)))
        _check_apart(name, parts)
        made = cls(name, parts, seed)
        made.chosen = any(method.start_rows for method in methods)
        return made

    @classmethod
    def of(cls, name: str, stored: Sequence[tuple[Method, Values]], base: Structure) -> Adapter:
        """An adapter of values that were read, in the shapes that the methods have here."""
        parts = []
        for index, (method, values) in enumerate(stored):
            own = {path: value for path, value in values.items() if path != CONSTANTS}
            part = Part(method, index, method.sites(base), _parameters(method, own, base))
            part.constants = values.get(CONSTANTS, {})
            parts.append(part)
        _check_apart(name, parts)
        return cls(name, parts, seed=0)

    # ---- what is trained

    @property
    def params(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of all parts: path of a site -> name -> value; those of later parts under "1:path"."""
        return {part.key(path): own for part in self.parts for path, own in part.params.items()}

    def by_rate(self) -> dict[float, dict[Key, nn.Parameter]]:
        """What is trained, by what its learning rate is multiplied with: more than one entry with LoRA+, for one."""
        groups: dict[float, dict[Key, nn.Parameter]] = {}
        for part in self.parts:
            for path, own in part.params.items():
                for name, parameter in own.items():
                    if parameter.requires_grad:
                        rate = part.method.rate(part.sites.get(path), name)
                        groups.setdefault(rate, {})[part.key(path), name] = parameter
        return groups

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable tensor, in the order of the base's modules."""
        for part in self.parts:
            for own in part.params.values():
                yield from (p for p in own.values() if p.requires_grad)

    def __len__(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ---- one part is the usual case

    @property
    def method(self) -> Method:
        """The method of the first part."""
        return self.parts[0].method

    @property
    def uses(self) -> set[str]:
        """The names of other adapters that its methods are over."""
        return {name for part in self.parts for name in part.method.uses}

    @property
    def methods(self) -> list[Method]:
        return [part.method for part in self.parts]

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of the first part."""
        return self.parts[0].sites

    @property
    def virtual_length(self) -> int:
        return sum(part.method.virtual_length for part in self.parts)

    @property
    def prefix_length(self) -> int:
        return sum(part.method.prefix_length for part in self.parts)

    @property
    def prefix_shift(self) -> int:
        """By how much a prefix moves the positions of a row's own tokens."""
        return sum(part.method.prefix_length for part in self.parts if part.method.moves_positions)

    # ---- trained as one tensor

    def lay_out(self, dtype: torch.dtype | None, cache: dict[Any, Any], together: Sequence[Adapter] = ()) -> None:
        """Cast the flat tensors of this adapter and of those `together` with it, whose flats have the same shapes, into
        `cache` (of one forward), where their parts find their parameters."""
        adapters = [self, *together]
        wholes = whole_parameters([adapter.flats for adapter in adapters], dtype)
        if any(part.method.exact for part in self.parts):
            uncast = whole_parameters([adapter.flats for adapter in adapters], None)
        else:
            uncast = wholes
        for adapter, whole, exact in zip(adapters, wholes, uncast, strict=True):
            for part in adapter.parts:
                kept = part.method.exact
                cache["whole", part, dtype] = {
                    path: {**whole[key], **{name: v for name, v in exact[key].items() if name in kept}}
                    for path, key in ((path, part.key(path)) for path in part.params)
                }

    @property
    def layout(self) -> tuple[tuple[Key, torch.Size], ...]:
        """The names and shapes in the flats: adapters that have the same can be laid out together."""
        return tuple(entry for flat in self.flats for entry in flat.shapes.items())


def _precision(like: Tensor) -> torch.dtype:
    """The dtype of an adapter beside the base's weight `like`."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _parameters(method: Method, values: Values, base: Structure) -> dict[str, dict[str, nn.Parameter]]:
    """`values` as parameters on the base's device."""
    like = next(base.model.parameters())

    def parameter(name: str, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(like.device, _precision(like)), requires_grad=name not in method.untrained)

    return {path: {key: parameter(key, value) for key, value in own.items()} for path, own in values.items()}


def _check_apart(name: str, parts: Sequence[Part]) -> None:
    """Parts may meet at a site, where the later one takes the output of the earlier. Two of one kind may not, and
    nothing may stand in a module that another part replaces, nor at it, unless it comes later and the module is one
    layer."""
    seen: dict[tuple[type[Method], str], int] = {}
    for part in parts:
        for path in part.sites:
            other = seen.setdefault((type(part.method), path), part.index)
            if other != part.index:
                what = f"parts {other} and {part.index} of {name!r} are both {part.method.title} at {path}"
                raise UsageError(what, "Leave one out, or give them other targets.")
            inside = None if type(part.method).whole is Method.whole else _inside(path, part, parts)
            if inside is not None:
                what = f"{part.method.title} of {name!r} replaces {path}, where {inside} acts"
                raise UsageError(what, "Leave one out, or give them other targets.")


def _inside(path: str, part: Part, parts: Sequence[Part]) -> str | None:
    """The title of another part that acts in the module `path`, or at it before `part` could replace it."""
    acting = ((p, s) for p in parts if p is not part for s in p.sites.values() if s.kind not in ("attention", "tokens"))
    layer = part.sites[path].kind != "head"
    for other, site in acting:
        behind = layer and site.path == path and other.index > part.index
        if f"{site.path}.".startswith(f"{path}.") and not behind:
            return other.method.title
    return None
