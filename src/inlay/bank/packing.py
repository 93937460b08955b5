"""Finds out what a base keeps apart: the segments of a packed row, a row and the padding before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from inlay.sites.backbone import cache_name
from inlay.sites.observe import attention_sites, uses_interface
from inlay.sites.structure import Structure

__all__ = ["isolates_segments", "padding_invariant", "probes", "reads_cache"]


Alone = Callable[..., AbstractContextManager[None]]
"""Opens a route of the plain base, for one row or for packed segments of the lengths that it is given."""


def isolates_segments(base: Structure, alone: Alone) -> bool:
    """Whether tiny segments give the same states alone, packed, and packed with other tokens between them: recurrent
    and convolutional mixers carry state across."""
    model: Any = base.model
    if len(base.stacks) > 1 or not uses_interface(base) or model.main_input_name != "input_ids":
        return False
    count = model.get_input_embeddings().num_embeddings
    first, second, third, last = (torch.arange(n, n + 5, device=model.device)[None] % count for n in (3, 8, 13, 18))
    stack: Any = next(iter(base.stacks))

    if not _hands_on(model, alone, first):
        return False

    def around(middle: Tensor) -> Tensor:
        """The states of what stands before and behind `middle`."""
        with alone([5] * 3):
            return _states(stack(input_ids=torch.cat([first, middle, last], 1)))[:, [*range(5), *range(10, 15)]]

    return _same(
        base,
        alone,
        lambda: _states(stack(input_ids=last)),
        lambda: around(second),
        lambda: around(third),
    )


def probes(base: Structure, alone: Alone) -> tuple[Callable[[bool], bool], Callable[[bool], bool]]:
    """`padding_invariant`, which is asked whether behind a prefix, and `reads_cache`, whether hidden, for one base."""
    return partial(padding_invariant, base, alone), partial(reads_cache, base, alone)


@torch.no_grad()
def _hands_on(model: Any, alone: Alone, ids: Tensor) -> bool:
    """Whether the model gives its backbone the ids that it is given, as those of text and images that embed them before
    do not, and whether it runs on them without a mask of its own."""
    try:
        with alone([ids.shape[1]]):
            model(input_ids=ids, use_cache=False)
    except Exception:  # whatever a base cannot do with a stream, padded rows have to do
        return False
    return True


def padding_invariant(base: Structure, alone: Alone, behind_prefix: bool) -> bool:
    """Whether a tiny row gives the same states with masked columns before it, whatever they hold, or behind it in an
    encoder, where new padding is put; behind cached keys and values if so asked."""
    model: Any = base.model
    stack: Any = next(iter(base.stacks))
    count = model.get_input_embeddings().num_embeddings
    row = torch.arange(3, 10, device=model.device)[None] % count  # so long that windows of a few tokens are in it
    length = row.shape[1]
    width, behind = (2 if behind_prefix else 0), len(base.stacks) == 2

    def beside(padding: list[Any], own: list[Any]) -> list[Any]:
        return [*own, *padding] if behind else [*padding, *own]

    def run(padding: int, filler: int = 1) -> Tensor:
        more: dict[str, Any] = {}
        if behind_prefix:
            more[cache_name(stack)] = _filled_cache(base, width)
        ids = torch.cat(beside([torch.full_like(row[:, :1], filler % count).expand(1, padding)], [row]), 1)
        mask = torch.tensor([[1] * width + beside([0] * padding, [1] * length)], device=model.device)
        if "position_ids" in inspect.signature(stack.forward).parameters:
            places = beside([0] * padding, list(range(width, width + length)))
            more["position_ids"] = torch.tensor([places], device=model.device)
        states = _states(stack(input_ids=ids, attention_mask=mask, **more))
        return states[:, :length] if behind else states[:, -length:]

    return _same(base, alone, lambda: run(0), lambda: run(3), lambda: run(3, filler=12))


def reads_cache(base: Structure, alone: Alone, hidden: bool = False) -> bool:
    """Whether cached keys and values change the states of a tiny row, in a base without the attention interface; False
    where it cannot run with them. If asked whether they can be `hidden`, whether those that are masked leave a single
    token as it is. What a base that takes no ids or no mask cannot do is said elsewhere."""
    stack: Any = base.stacks[-1]
    if not {"input_ids", "attention_mask"} <= {*inspect.signature(stack.forward).parameters}:
        return True
    model: Any = base.model
    count, device = model.get_input_embeddings().num_embeddings, next(stack.parameters()).device
    row = torch.tensor([[3] if hidden else [3, 4, 5]], device=device) % count
    mask = torch.tensor([[int(not hidden)] * 2 + [1] * row.shape[1]], device=device)
    ran: list[int] = []

    def run(seed: int) -> Tensor:
        more: dict[str, Any] = {cache_name(stack): _filled_cache(base, 2, seed)}
        if len(base.stacks) > 1:
            more = {name: EncoderDecoderCache(cache, DynamicCache()) for name, cache in more.items()}
            width = getattr(stack.config, "hidden_size", 0) or stack.config.d_model
            more["encoder_hidden_states"] = torch.ones(1, 2, width, device=device, dtype=next(stack.parameters()).dtype)
        states = _states(stack(input_ids=row, attention_mask=mask, **more))
        ran.append(seed)
        return states

    same = _same(base, alone, lambda: run(0), lambda: run(0), lambda: run(100))
    return same if hidden else not same and 100 in ran


def _filled_cache(base: Structure, width: int, seed: int = 0) -> DynamicCache:
    """`width` random keys and values of each layer."""
    model: Any = base.model
    cache = DynamicCache()
    for layer, site in enumerate(s for s in attention_sites(base) if s.stack != "encoder"):
        shape, generator = (1, site.heads, width), torch.Generator().manual_seed(seed + layer)
        k, v = (torch.randn(*shape, dim, generator=generator) for dim in (site.head_dim, site.value_dim))
        cache.update(k.to(model.device, model.dtype), v.to(model.device, model.dtype), layer)
    return cache


def _same(base: Structure, alone: Alone, *ways: Callable[[], Tensor]) -> bool:
    """Whether all ways, of which the later have the same shapes, give the same states but for rounding; False where
    the base cannot run one of them.

    Of the first way there may be fewer states: the last ones. Rounding differs with the shapes: in half precision by
    up to a sixth of the states of a trained base. What must not be seen is therefore changed while the shapes stay,
    and then hardly a bit may differ.
    """
    model: Any = base.model
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), alone():
            single, together, changed = (way() for way in ways)
    except Exception:  # whatever a base cannot do, the other way has to do
        return False
    finally:
        for module, training in modes:
            module.training = training
    precise = together.dtype in (torch.float32, torch.float64)
    return _apart(together, changed) < 1e-4 and _apart(single, together[:, -single.shape[1] :]) < (
        1e-3 if precise else 0.5
    )


def _apart(expected: Tensor, got: Tensor) -> float:
    """The norm of the difference, as a share of the expected one's."""
    return float((got.double() - expected.double()).norm() / (1e-6 + expected.double().norm()))


def _states(out: Any) -> Tensor:
    states: Tensor = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return states
