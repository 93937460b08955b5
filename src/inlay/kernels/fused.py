"""Finds the modules of a base that have a fused forward: the same numbers, fewer copies and less memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .gate import fused_gate
from .norm import fused_norm
from .standin import StandIn

__all__ = ["Forward", "fused_modules"]

Forward = Callable[..., Tensor]
KINDS: tuple[Callable[[nn.Module], Forward | None], ...] = (fused_norm, fused_gate)


def fused_modules(model: nn.Module) -> dict[nn.Module, Forward]:
    """The fused forward of each module that has one. What a module looks like is only a guess: one of each class and
    shape runs its own and the fused forward on random numbers, and all like it keep their own where the two differ.
    """
    found: dict[nn.Module, Forward] = {}
    known: dict[object, bool] = {}
    for module in model.modules():
        fused = next((made for kind in KINDS if (made := kind(module)) is not None), None)
        if fused is None or not isinstance(vars(module).get("forward"), StandIn | None):
            continue
        key = (type(module), module.extra_repr(), tuple(p.shape for p in module.parameters()))
        if key not in known:
            known[key] = _alike(module, fused, getattr(model, "dtype", torch.float32))
        if known[key]:
            found[module] = fused
    return found


@torch.no_grad()
def _alike(module: nn.Module, fused: Forward, dtype: torch.dtype) -> bool:
    """Whether both give the same but for the last bits; `dtype` is for modules whose weights are all quantized."""
    first = next(module.parameters(), None)
    if first is None or first.device.type == "meta":
        return False
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    width = next(
        (w for m in module.modules() if isinstance(w := getattr(m, "in_features", None), int)), first.shape[-1]
    )
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(first.device, dtype)
    try:
        own = type(module).forward(module, x)
        got = fused(x)
    except Exception:  # a forward that wants something else, or parts of another kind
        return False
    if got.shape != own.shape or got.dtype != own.dtype:
        return False
    error = (got.double() - own.double()).norm() / (1e-12 + own.double().norm())
    return bool(error <= 4 * torch.finfo(own.dtype).eps)
