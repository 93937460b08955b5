"""RMSNorm that saves its input and one number a token, where autograd would save five copies of its input.

    y = w * x / sqrt(mean(x^2) + eps)

Paper: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .recomputed import Recomputed

__all__ = ["epsilon", "fused_norm"]


def fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module` if it looks like an RMSNorm: one weight (width,), an epsilon, and nothing else."""
    weight, eps = getattr(module, "weight", None), epsilon(module)
    own = [*module.parameters(), *module.buffers(), *module.children()]
    if eps is None or len(own) != 1 or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight  # looked up at every call: norm tuning puts its own in place
        if weight.requires_grad or x.dtype != weight.dtype:
            return type(module).forward(module, x)  # pyright: ignore
        recomputed = _Normed()
        y, scale = _Norm.apply(x, weight, eps, recomputed)  # pyright: ignore
        return recomputed.tag(y, x, weight, scale)

    return forward


def epsilon(module: nn.Module) -> float | None:
    """What a norm adds under its root; None where no attribute says."""
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


class _Norm(torch.autograd.Function):
    """x (..., width) and the frozen weight (width,) of one dtype; statistics are in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, recomputed: _Normed) -> tuple[Tensor, Tensor]:
        y, scale = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.recomputed = recomputed
        return y, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        ctx.recomputed.release()
        return normed_backward(grads[0], *ctx.saved_tensors), None, None, None


class _Normed(Recomputed):
    def compute(self, *sources: Tensor) -> Tensor:
        x, weight, scale = sources
        return _weighted(x.to(scale.dtype), scale, x, weight)


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and what x was scaled by (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # at once: operations that mix dtypes take twice as long
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _weighted(wide, scale, x, weight), scale


def _weighted(wide: Tensor, scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """w * (x * scale), rounded where the reference rounds; `wide` is x in the dtype of `scale`."""
    return (wide * scale).mul_(weight) if wide is x else wide.mul_(scale).to(x.dtype).mul_(weight)


def normed_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    grad, wide = grad.to(scale.dtype) * weight.to(scale.dtype), x.to(scale.dtype)
    # What x's own length takes away: x * mean(grad * x) * scale^2, before all of it is scaled.
    share = (grad * wide).sum(-1, keepdim=True).mul_(scale.square() / x.shape[-1])
    return grad.addcmul_(wide, share, value=-1).mul_(scale).to(x.dtype)
