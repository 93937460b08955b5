"""Attention over a packed stream by torch's flash kernel: no blocks, no padding, no mask in memory.

Paper: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (arXiv:2307.08691).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["Rows", "Window", "fits", "flash", "window_of"]

Window = tuple[int, int]
"""How many tokens before and after its own place a token sees; -1 for all."""
NEEDED = {"scale", "window_size", "enable_gqa"}


def _kernel() -> Callable[..., Any] | None:
    """torch's own, where this torch has it with all that is needed here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(inspect.signature(varlen_attn).parameters) >= NEEDED else None


KERNEL = _kernel()


@dataclass
class Rows:
    """Segments of one stream: where each one's queries and keys begin (int32, one more than segments), and the longest.

    `order` (T_k,), where prefixes stand before keys, says which of the padded prefixes and keys, laid end to end, come
    one after the other.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    order: Tensor | None

    @staticmethod
    def of(lengths: Sequence[int], before: Sequence[int], device: torch.device) -> Rows:
        """Segments of `lengths` tokens with `before` prefix keys each."""
        whole = [n + p for n, p in zip(lengths, before, strict=True)]
        order, widest = [], max(before)
        for unit, (length, prefix) in enumerate(zip(lengths, before, strict=True)):
            order.append(torch.arange(prefix) + unit * widest + widest - prefix)
            order.append(torch.arange(length) + len(lengths) * widest + sum(lengths[:unit]))
        return Rows(
            _starts(lengths).to(device),
            _starts(whole).to(device),
            (max(lengths), max(whole)),
            torch.cat(order).to(device) if widest else None,
        )


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes such queries and values (..., dim)."""
    if KERNEL is None or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    right = q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return right and torch.cuda.get_device_capability(q.device) >= (8, 0)


def window_of(rule: Callable[..., Tensor], longest: int, device: torch.device) -> Window | None:
    """The window that a base's rule amounts to over `longest` tokens; None where it is none."""
    known: dict[Any, Window] = {causal_mask_function: (-1, 0), bidirectional_mask_function: (-1, -1)}
    if rule in known:
        return known[rule]
    q, k = torch.arange(longest, device=device)[:, None], torch.arange(longest, device=device)[None]
    zero = torch.zeros_like(q)
    seen = rule(zero, zero, q, k).expand(longest, longest)
    left, right = int(seen[-1].sum()) - 1, int(seen[0].sum()) - 1
    return (left, right) if torch.equal(seen, (k >= q - left) & (k <= q + right)) else None


def flash(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: Window, scaling: float | None, prefixes: Any = None
) -> Tensor:
    """(T, heads, dim) of q (T, heads, dim), k and v (T, shared heads, dim); `prefixes` are keys and values, each
    (segments, shared heads, P, dim), right-aligned. The last query of a segment stands beside its last key."""
    assert KERNEL is not None
    if prefixes is not None and rows.order is not None:
        k, v = (
            torch.cat([front.transpose(1, 2).flatten(0, 1), own]).index_select(0, rows.order)
            for front, own in zip(prefixes, (k, v), strict=True)
        )
        keys, widest = rows.keys, rows.longest[1]
    else:
        keys, widest = rows.queries, rows.longest[0]
    return KERNEL(
        q, k, v, rows.queries, keys, rows.longest[0], widest, scale=scaling, window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
