"""Finds out whether a base keeps the segments of a packed row apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from inlay.sites.probe import uses_interface

from .calls import Route

if TYPE_CHECKING:
    from .bank import Bank

__all__ = ["keeps_apart"]


def keeps_apart(bank: Bank) -> bool:
    """Compare two tiny segments packed and alone: recurrent and convolutional mixers carry state across."""
    model: Any = bank.model
    if len(bank.base.stacks) > 1 or not uses_interface(bank.base) or model.main_input_name != "input_ids":
        return False
    alone: list[torch.Tensor]
    first = torch.tensor([[3, 4, 5, 6, 7]], device=model.device) % model.get_input_embeddings().num_embeddings
    both = torch.cat([first, first.flip(1)], 1)
    stack: Any = next(iter(bank.base.stacks))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone = [_states(stack(input_ids=ids)) for ids in (first, first.flip(1))]
            with bank._in_force(Route([(), ()], [5, 5])):
                packed = _states(stack(input_ids=both))
    except Exception:  # whatever a base cannot do with a packed row, padded rows will do
        return False
    finally:
        for module, training in modes:
            module.training = training
    expected = torch.cat(alone, 1).float()
    noise = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((packed.float() - expected).abs().max() <= noise * (1 + expected.abs().max()))


def _states(out: Any) -> torch.Tensor:
    states: torch.Tensor = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return states
