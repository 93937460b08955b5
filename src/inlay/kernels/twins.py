"""Finds the modules of a base that have a fused twin, and puts the twins in their place for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .gate import fused_gate
from .norm import fused_norm

__all__ = ["find_twins", "in_place"]

Forward = Callable[[Tensor], Tensor]
KINDS: tuple[Callable[[nn.Module], Forward | None], ...] = (fused_norm, fused_gate)


def find_twins(model: nn.Module) -> dict[nn.Module, Forward]:
    """The fused forward of each module that has one. What a module looks like is only a guess: one of each class and
    shape is run beside its twin on random numbers, and all like it keep their own forward where the two differ.
    """
    twins: dict[nn.Module, Forward] = {}
    known: dict[object, bool] = {}
    for module in model.modules():
        twin = next((made for kind in KINDS if (made := kind(module)) is not None), None)
        if twin is None or "forward" in vars(module):
            continue
        key = (type(module), module.extra_repr(), tuple(p.shape for p in module.parameters()))
        if key not in known:
            known[key] = _alike(module, twin, getattr(model, "dtype", torch.float32))
        if known[key]:
            twins[module] = twin
    return twins


@contextmanager
def in_place(twins: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let each module run its twin's forward; its hooks and parameters stay its own."""
    changed = [module for module in twins if "forward" not in vars(module)]  # none where a call is entered again
    for module in changed:
        module.forward = twins[module]
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


@torch.no_grad()
def _alike(module: nn.Module, twin: Forward, dtype: torch.dtype) -> bool:
    """Whether both give the same but for the last bits; `dtype` is for modules whose weights are all quantized."""
    first = next(module.parameters())
    if first.device.type == "meta":
        return False
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    width = next(
        (w for m in module.modules() if isinstance(w := getattr(m, "in_features", None), int)), first.shape[-1]
    )
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(first.device, dtype)
    try:
        own = type(module).forward(module, x)
        got = twin(x)
    except Exception:  # a forward that wants something else, or parts of another kind
        return False
    if got.shape != own.shape or got.dtype != own.dtype:
        return False
    error = (got.double() - own.double()).norm() / (1e-12 + own.double().norm())
    return bool(error <= 4 * torch.finfo(own.dtype).eps)
