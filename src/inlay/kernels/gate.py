"""The gated MLP with activation and product as one function, which saves its two inputs and nothing between them.

    y = down(silu(gate(x)) * up(x))

Paper: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .recomputed import Recomputed

__all__ = ["fused_gate"]

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fused_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module` if it looks like a gated MLP: gate_proj, up_proj, down_proj and an activation."""
    parts: Any = dict(module.named_children())
    if set(parts) != PARTS or [*module.parameters(recurse=False)]:
        return None

    def forward(x: Tensor) -> Tensor:
        gate, up, product = parts["gate_proj"](x), parts["up_proj"](x), _Product()
        return parts["down_proj"](product.tag(_Gate.apply(gate, up, product), gate, up))  # pyright: ignore

    return forward


class _Gate(torch.autograd.Function):
    """silu(gate) * up, both (..., width) and of one dtype."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.product = product
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        gate, up = ctx.saved_tensors
        made = gated_backward(grads[0], gate, up, ctx.product.silu(gate))
        ctx.product.release()
        return *made, None


class _Product(Recomputed):
    """silu(gate) * up once more; the first factor is held for the gradient of the second."""

    _silu: Tensor | None = None

    def compute(self, *sources: Tensor) -> Tensor:
        gate, up = sources
        return self.silu(gate) * up

    def silu(self, gate: Tensor) -> Tensor:
        if self._silu is None:
            self._silu = F.silu(gate)
        return self._silu

    def release(self) -> None:
        super().release()
        self._silu = None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, silu: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors; `silu`, which is silu(gate), is overwritten."""
    return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad)
