"""The formulas of tables and norms, read off their own forwards: what an adapter must do as they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .recorder import Call
from .site import plain_call

__all__ = ["norm_offset", "table_scale"]


def table_scale(table: nn.Module) -> float | None:
    """s where `table` gives s * weight[ids]; None where it gives something else or takes no ids.

    Shapes: ids (1, 2) of int64, the result (1, 2, width). It is computed on the CPU: on a GPU, a table that looks
    further than its end, as those of some positions do, would end every later computation of the process.
    """
    weight: Any = getattr(table, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        return 1.0
    rows, width = weight.shape
    precise = torch.promote_types(weight.dtype, torch.float32)
    column = torch.arange(1, rows + 1, dtype=precise)[:, None]
    ids = torch.tensor([[0, rows - 1]])
    held = {**dict(table.named_parameters()), **dict(table.named_buffers())}
    try:
        with torch.inference_mode(False), torch.no_grad():
            others = {name: value.cpu() for name, value in held.items() if name != "weight"}
            made = plain_call(table, {**others, "weight": column.expand(rows, width)}, ids)
    except Exception:  # it takes more than ids, or other ones
        return None
    if not isinstance(made, Tensor) or made.shape != (1, 2, width):
        return None
    scale = float(made[0, 0, 0])
    return scale if torch.allclose(made.to(precise), scale * column[ids[0]][None].expand_as(made), rtol=1e-3) else None


def norm_offset(norm: nn.Module, call: Call | None) -> float | None:
    """c where `norm` gives n(x) * (weight + c) + bias along x's last dimension; None where it is no such norm.

    Random x of shape (2, 3, width), and of the call's own rank where one was seen, is given to the norm's own forward.
    """
    if call is not None and (call.inputs != 1 or call.gives != "tensor"):
        return None
    weight: Any = norm.weight
    if weight.is_meta:
        return 0.0
    rank = len(call.input_shape) if call is not None and call.input_shape else 3
    generator = torch.Generator().manual_seed(0)
    width = int(weight.shape[0])
    x = torch.randn(*[2] * (rank - 1), width, generator=generator).to(weight.device)
    some = torch.randn(width, generator=generator).to(weight.device)
    bias = {"bias": torch.zeros_like(some)} if isinstance(getattr(norm, "bias", None), Tensor) else {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            none, one, made = (plain_call(norm, {"weight": w, **bias}, x) for w in (some * 0, some * 0 + 1, some))
            shifted = plain_call(norm, {"weight": some, "bias": some}, x) if bias else made + some
    except Exception:  # it takes more than x
        return None
    if not all(isinstance(y, Tensor) and y.shape == x.shape for y in (none, one, made, shifted)):
        return None
    normal = one - none
    offset = round(float((none * normal).sum() / (normal * normal).sum().clamp(min=1e-9)), 4)
    expected = normal * (some + offset)
    right = torch.allclose(made, expected, atol=1e-3) and torch.allclose(shifted, expected + some, atol=1e-3)
    return offset if right and bool(normal.any()) else None
