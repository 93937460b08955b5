"""Finds out what a base keeps apart: the segments of a packed row, a row and the padding before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from inlay.sites.probe import attention_sites, uses_interface
from inlay.stream.stack import cache_name

from .calls import Route

if TYPE_CHECKING:
    from .bank import Bank

__all__ = ["ignores_padding", "keeps_apart"]


def keeps_apart(bank: Bank) -> bool:
    """Compare two tiny segments packed and alone: recurrent and convolutional mixers carry state across."""
    model: Any = bank.model
    if len(bank.base.stacks) > 1 or not uses_interface(bank.base) or model.main_input_name != "input_ids":
        return False
    first = torch.tensor([[3, 4, 5, 6, 7]], device=model.device) % model.get_input_embeddings().num_embeddings
    both = torch.cat([first, first.flip(1)], 1)
    stack: Any = next(iter(bank.base.stacks))

    def packed() -> torch.Tensor:
        with bank._in_force(Route([(), ()], [5, 5])):
            return _states(stack(input_ids=both))

    return _same(bank, lambda: torch.cat([_states(stack(input_ids=i)) for i in (first, first.flip(1))], 1), packed)


def ignores_padding(bank: Bank, behind_prefix: bool) -> bool:
    """Compare a tiny row with and without masked columns before it, behind cached keys and values if so asked."""
    model: Any = bank.model
    stack: Any = next(iter(bank.base.stacks))
    row = torch.tensor([[3, 4, 5]], device=model.device) % model.get_input_embeddings().num_embeddings
    width = 2 if behind_prefix else 0

    def run(padding: int) -> torch.Tensor:
        more: dict[str, Any] = {}
        if behind_prefix:
            cache = more[cache_name(stack)] = DynamicCache()
            for layer, site in enumerate(attention_sites(bank.base)):
                shape, generator = (1, site.heads, width), torch.Generator().manual_seed(layer)
                k, v = (torch.randn(*shape, dim, generator=generator) for dim in (site.head_dim, site.value_dim))
                cache.update(k.to(model.device, model.dtype), v.to(model.device, model.dtype), layer)
        ids = torch.cat([torch.ones_like(row[:, :1]).expand(1, padding), row], 1)
        mask = torch.tensor([[1] * width + [0] * padding + [1] * 3], device=model.device)
        if "position_ids" in inspect.signature(stack.forward).parameters:
            places = [0] * padding + list(range(width, width + 3))
            more["position_ids"] = torch.tensor([places], device=model.device)
        return _states(stack(input_ids=ids, attention_mask=mask, **more))[:, -3:]

    return _same(bank, lambda: run(0), lambda: run(2))


def _same(bank: Bank, alone: Callable[[], torch.Tensor], together: Callable[[], torch.Tensor]) -> bool:
    """Whether both give the same states, but for noise; False where the base cannot run one of them."""
    model: Any = bank.model
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), bank._in_force(Route([()])):
            expected, got = alone().float(), together()
    except Exception:  # whatever a base cannot do, the other way has to do
        return False
    finally:
        for module, training in modes:
            module.training = training
    noise = 1e-3 if got.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((got.float() - expected).abs().max() <= noise * (1 + expected.abs().max()))


def _states(out: Any) -> torch.Tensor:
    states: torch.Tensor = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return states
