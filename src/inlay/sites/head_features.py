"""Which features of an attention's projections belong to which of its heads, seen in one tiny forward.

Layouts differ (q, k and v one after another, head by head, group by group), and no name says which it is. So it is
asked what each head's queries, keys and values depend on, and what depends on each head's output: gradients say both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import QKV, handled_by, unwatch, watch
from .observe import Base, first_tensor
from .site import Site
from .tiny import quietly, tiny_inputs

__all__ = ["MIXED", "HeadFeatures", "head_features"]

MIXED = -2
"""Of a feature on which several heads depend."""


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """One attention `site`, with `heads` of queries and `shared` heads of keys and values.

    By the path of a projection: `queries` and `keys` (keys and values) hold, for each output feature, the head that it
    belongs to; `outputs`, for each input feature, the head that it comes from. All are int64, -1 for a feature of no
    head and MIXED for one of several; a projection whose features are all of no head or of several is left out.
    """

    site: Site
    heads: int
    shared: int
    queries: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def group(self, head: int) -> set[int]:
        """The heads of queries that read the same keys and values as `head`."""
        each = self.heads // self.shared
        first = head // each * each
        return set(range(first, first + each))


def head_features(base: Base) -> list[HeadFeatures]:
    """One for each attention that goes through transformers' interface, in the order of calls; none where the base
    cannot be run or computes attention itself."""
    reader, sign = _Reader(base), nn.Module()
    with ExitStack() as stack:
        watch(sign)
        stack.callback(unwatch, sign)
        for module, path in reader.paths.items():
            for handle in (
                module.register_forward_pre_hook(partial(reader.entering, path), with_kwargs=True),
                module.register_forward_hook(partial(reader.leaving, path)),
            ):
                stack.callback(handle.remove)
        stack.enter_context(quietly(base.model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(handled_by(reader))
        for make in tiny_inputs(base.model):
            reader.forget()
            try:
                base.model(**make())
                return list(reader.found.values())
            except Exception:  # the next batch may have what this one lacks
                continue
    return []


class _Reader:
    """Cuts autograd's graph at each projection and at each attention, and asks it between two cuts."""

    def __init__(self, base: Base) -> None:
        self.attentions = base.attentions
        self.paths = {site.module: site.path for site in base.projections if "attention" in site.part}
        self.forget()

    def forget(self) -> None:
        self.found: dict[nn.Module, HeadFeatures] = {}
        self.given: dict[str, Tensor] = {}
        self.attended: tuple[nn.Module, Tensor] | None = None

    # ---- projections

    def entering(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if self.attended is None or x is None or not x.requires_grad:
            return
        attention, out = self.attended
        numbers = _numbers(x, out, x.shape[-1], lambda code: code, 2)
        if numbers is None:
            return
        heads = torch.arange(out.shape[-2])[:, None].expand(numbers.shape)
        told, owner = numbers >= 0, torch.full((x.shape[-1],), -1)
        owner[numbers[told]] = heads[told]
        if bool((numbers == MIXED).any()) or len(numbers[told].unique()) < int(told.sum()):
            owner[:] = MIXED  # a feature of several, or several of one
        self.found[attention].outputs[path] = owner
        self.attended = None

    def leaving(self, path: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> Tensor | None:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return None
        self.given[path] = y.detach().requires_grad_()
        return self.given[path]

    # ---- attention, as a handler

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        query, key, value = qkv
        out, weights = plain(module, *qkv, mask, **rest)
        site = self.attentions.get(module)
        if site is not None:
            queries = {path: owner for path, y in self.given.items() if (owner := _owner(query, y)) is not None}
            both = {path: (_owner(key, y), _owner(value, y)) for path, y in self.given.items()}
            keys = {path: owner for path, pair in both.items() if (owner := _joined(*pair)) is not None}
            self.found[module] = HeadFeatures(site, query.shape[1], key.shape[1], queries, keys)
            out = out.detach().requires_grad_()
            self.attended = module, out
        self.given = {}
        return out, weights

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**call)


def _owner(heads: Tensor, y: Tensor) -> Tensor | None:
    """For each feature of y (..., out), the head of `heads` (B, heads, n, dim) that depends on it; None where none has
    one of its own."""
    found = _numbers(heads, y, heads.shape[1], lambda code: code[:, None, None], 1)
    return None if found is None or not bool((found >= 0).any()) else found


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The owners by keys and by values of the features of one projection."""
    if one is None or other is None:
        return one if other is None else other
    mixed = (one == MIXED) | (other == MIXED) | ((one >= 0) & (other >= 0) & (one != other))
    return torch.where(mixed, MIXED, torch.maximum(one, other))


def _numbers(
    made: Tensor, source: Tensor, count: int, shaped: Callable[[Tensor], Tensor], kept: int, sure: float = 0.02
) -> Tensor | None:
    """For each feature of `source`, by its last `kept` dimensions, the one of `count` units of `made` that depends on
    it; -1 where none does and MIXED where several do. `shaped` gives a code (count,) the dimensions of `made`.

    A unit's number is read bit by bit: the gradient of the units whose bit is set is all of the gradient, or nothing.
    """
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made)

    def gradient(code: Tensor) -> Tensor | None:
        given = weights * shaped(code.to(made))
        (found,) = torch.autograd.grad(made, source, given, retain_graph=True, allow_unused=True)
        return found

    whole = gradient(torch.ones(count))
    if whole is None:
        return None
    others = tuple(range(whole.ndim - kept))
    square = whole.double().square().sum(others)
    number = torch.zeros(square.shape, dtype=torch.long, device=square.device)
    told = read = square > 0
    for bit in range((count - 1).bit_length()):
        part = gradient((torch.arange(count) >> bit) & 1)
        assert part is not None
        share = (part.double() * whole.double()).sum(others) / square
        number += (share > 0.5).long() << bit
        told = told & ((share.abs() < sure) | ((share - 1).abs() < sure))
    return torch.where(told, number, torch.where(read, MIXED, -1)).cpu()
