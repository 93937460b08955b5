"""Whether gradients flow through the quantized layers of a base: some libraries compute them forwards alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError

__all__ = ["check_gradients"]


def check_gradients(model: nn.Module) -> None:
    """Run a quantized layer of each kind forward and backward, on a few numbers, outside of any route.

    Raises: UsageError naming a layer that gives its input no gradient: what lies before it would not be trained, or not
    rightly, since gradients reach it through adapters alone.
    """
    known: set[tuple[type[Any], ...]] = set()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(getattr(module, "in_features", None), int):
            continue
        inner = getattr(weight, "act_quant_kwargs", None)
        kind = type(module), type(weight.data), type(inner)
        plain = type(weight.data) is Tensor and weight.is_floating_point()
        if plain or kind in known:
            continue
        known.add(kind)
        if (fault := _fault(module, weight, getattr(model, "dtype", torch.float32))) is not None:
            raise UsageError(
                f"{path} is quantized ({type(weight.data).__name__}) so that no gradient flows through it: {fault}",
                "Train on a base whose weights alone are quantized (int8 or 4 bits), or on an unquantized one.",
            )


def _fault(module: Any, weight: Tensor, dtype: torch.dtype) -> str | None:
    wide = dtype if dtype.is_floating_point else torch.float32
    with torch.enable_grad():
        x = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, wide).requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(module(x).float().sum(), x, allow_unused=True)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return str(error).partition("\n")[0][:120]
    return "it is zero" if gradient is None or not bool(gradient.any()) else None
