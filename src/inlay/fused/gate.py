"""The gated MLP with its activation and product as one function, which keeps its two inputs and nothing between.

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

__all__ = ["fused_gate"]

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fused_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module` if it looks like a gated MLP: gate_proj, up_proj, down_proj and an activation."""
    parts: Any = dict(module.named_children())
    if set(parts) != PARTS or [*module.parameters(recurse=False)]:
        return None

    def forward(x: Tensor) -> Tensor:
        return parts["down_proj"](_Gate.apply(parts["gate_proj"](x), parts["up_proj"](x)))  # pyright: ignore

    return forward


class _Gate(torch.autograd.Function):
    """silu(gate) * up, both (..., width) and of one dtype."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return gated_backward(grads[0], *ctx.saved_tensors)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up
