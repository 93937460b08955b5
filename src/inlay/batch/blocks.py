"""Attention over a packed stream in blocks: segments of like length side by side, by plain matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.kernels.gather import Gather, Scatter, padded_index
from inlay.sites.attention import QKV, is_own

from .prefixes import Prefixes

__all__ = ["Blocks", "StreamMask", "attended"]

SHORT = 128
"""Keys below which a CPU's softmax in bfloat16 takes up to four times as long as one in float32 and two casts."""

LANES = 32
"""Numbers that a CPU takes at once; its gradient of a softmax over fewer takes four times as long in bfloat16."""


class StreamMask:
    """What the base's layers hand around in place of a mask: the rule, to be evaluated inside each segment."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.cache: dict[Any, Any] = {}


@dataclass
class _Block:
    """Segments of like length, attended together: `index` (b, n) tokens of the stream, `real` (b, n) which are not
    padding. Padding repeats its own segment's first token, so that no value ever crosses to another segment.
    """

    units: list[int]
    index: Tensor
    real: Tensor


class Blocks:
    """The blocks of a stream's segments of `lengths` tokens, which `prefixes` may stand before.

    A block holds queries as (shared heads * b, heads each * n, dim), and keys and values as (shared heads * b, n, dim),
    so that products need no copies: query heads that share keys are more queries of one product.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Prefixes, device: torch.device) -> None:
        self.prefixes = prefixes
        starts = [sum(lengths[:unit]) for unit in range(len(lengths))]
        self._blocks: list[_Block] = []
        for units in _like_lengths(lengths):
            begins, sizes = (torch.tensor([own[u] for u in units]) for own in (starts, lengths))
            index, real = padded_index(begins, sizes)
            self._blocks.append(_Block(units, index.to(device), real.to(device)))
        self._places: dict[tuple[int, int, bool], tuple[Tensor, Tensor, Tensor]] = {}

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: StreamMask, rest: dict[str, Any]
    ) -> Tensor:
        """(1, T, heads, dim) of q (1, heads, T, dim), k and v (1, shared heads, T, dim)."""
        shared = qkv[1].shape[1]
        pieces = []
        for number, (q, k, v) in enumerate(zip(*(self._cut(x, shared) for x in qkv), strict=True)):
            block = self._blocks[number]
            found = self.prefixes.of(module, block.units, *qkv[1:]) if self.prefixes.longest else None
            if found is not None:
                k, v = (torch.cat([f.transpose(0, 1).flatten(0, 1), x], 1) for f, x in zip(found, (k, v), strict=True))
            bias = self._bias(mask, number, k.shape[1], q.dtype)
            pieces.append(attended(plain, module, q, k, v, bias, rest).reshape(-1, v.shape[2]))
        return self._joined(pieces, qkv[0].shape[1], shared)

    # ---- rows of a tensor, which are the tokens of its heads, and their places in blocks

    def _cut(self, x: Tensor, shared: int) -> list[Tensor]:
        """(shared * b, heads / shared * n, dim) for each block, of x (1, heads, T, dim)."""
        heads, dim = x.shape[1], x.shape[3]
        by_token = not x.is_contiguous()
        index, home, _ = self._placed(heads, shared, by_token)
        rows = (x.transpose(1, 2) if by_token else x).reshape(-1, dim)
        taken: Tensor = Gather.apply(rows, index, home)  # pyright: ignore
        sizes = [block.index.numel() * heads for block in self._blocks]
        parts = [taken] if len(sizes) == 1 else taken.split(sizes)
        return [
            part.view(shared * len(b.units), -1, dim) for part, b in zip(parts, self._blocks, strict=True)
        ]  # fmt: skip

    def _joined(self, pieces: list[Tensor], heads: int, shared: int) -> Tensor:
        index, home, padding = self._placed(heads, shared, True)
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        rows: Tensor = Scatter.apply(joined, index, home, padding)  # pyright: ignore
        return rows.view(1, -1, heads, rows.shape[-1])

    def _placed(self, heads: int, shared: int, by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of a tensor with `heads` heads, tokens before heads or behind them: which row stands at each place of the
        blocks, laid end to end, at which place each row is real, and which places are not."""
        key = heads, shared, by_token
        if key not in self._places:
            tokens = sum(int(block.real.sum()) for block in self._blocks)
            device = self._blocks[0].index.device
            head = torch.arange(heads, device=device).view(shared, 1, heads // shared, 1)
            index, real = [], []
            for block in self._blocks:
                token = block.index[None, :, None]
                rows = token * heads + head if by_token else head * tokens + token
                index.append(rows.reshape(-1))
                real.append(block.real[None, :, None].expand_as(rows).reshape(-1))
            place, there = torch.cat(index), torch.cat(real)
            own = there.nonzero()[:, 0]
            home = torch.empty(len(own), dtype=torch.long, device=device).scatter_(0, place[own], own)
            self._places[key] = place, home, (~there).nonzero()[:, 0]
        return self._places[key]

    # ---- masks

    def _bias(self, mask: StreamMask, number: int, keys: int, dtype: torch.dtype) -> Tensor:
        """(b, 1, n, P + n) additive mask of a block, made once for all layers that share the rule and the width."""
        spot = number, keys, dtype
        if spot not in mask.cache:
            seen = self._seen(mask, self._blocks[number], keys)
            # A padded query keeps a key of its own, so that no row of the softmax is empty.
            mask.cache[spot] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask.cache[spot]

    def _seen(self, mask: StreamMask, block: _Block, keys: int) -> Tensor:
        size, device = block.index.shape[1], block.index.device
        width = keys - size
        q = torch.arange(size, device=device).view(1, 1, size, 1)
        k = torch.arange(-width, size, device=device).view(1, 1, 1, keys)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        lengths = torch.tensor([self.prefixes.lengths[u] for u in block.units], device=device)
        front = torch.arange(-width, 0, device=device)[None] >= -lengths[:, None]
        there = torch.cat([front, block.real], 1)[:, None, None]
        shift = lengths.view(-1, 1, 1, 1)
        before = mask.function(zero, zero, q + shift, k[..., :width] + shift)
        inside = mask.function(zero, zero, q, k[..., width:])
        rows = len(block.units)
        return torch.cat([before.expand(rows, 1, size, width), inside.expand(rows, 1, size, size)], -1) & there


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Segments in groups whose padding to the longest stays small."""
    order = sorted(range(len(lengths)), key=lambda u: -lengths[u])
    groups: list[list[int]] = []
    for unit in order:
        if groups and lengths[unit] * 1.5 + 16 >= lengths[groups[-1][0]]:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [sorted(group) for group in groups]


def attended(
    plain: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rest: dict[str, Any]
) -> Tensor:
    """Attention of one block, laid out like q; `bias` is (b, 1, n, keys)."""
    rows, _, size, keys = bias.shape
    shared = len(q) // rows
    if is_own(plain):  # the model's own: soft caps, sinks and whatever else it does
        heads = [x.view(shared, rows, -1, s, x.shape[2]) for x, s in ((q, size), (k, keys), (v, keys))]
        made = plain(module, *(x.transpose(0, 1).flatten(1, 2) for x in heads), bias, **rest)[0]
        return made.transpose(1, 2).unflatten(1, (shared, -1)).transpose(0, 1)
    scaling = rest.get("scaling")
    scores = (q * (q.shape[2] ** -0.5 if scaling is None else scaling)) @ k.transpose(1, 2)
    return _Softmax.apply(scores, bias) @ v  # pyright: ignore


class _Softmax(torch.autograd.Function):
    """Softmax of scores (shared heads * b, m, keys) + bias (b, 1, n, keys); nobody else needs the scores, and they are
    written into. Autograd on its own would copy gradients of all of them for the sum, twice."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, bias: Tensor) -> Tensor:
        rows, _, size, keys = bias.shape
        scores.view(len(scores) // rows, rows, -1, size, keys).add_(bias)
        if scores.dtype == torch.bfloat16 and keys < SHORT and not scores.is_cuda:
            weights = scores.float().softmax(-1).to(scores.dtype)
        else:
            weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (weights,) = ctx.saved_tensors
        grad, own = grads[0], weights.dtype
        if own == torch.bfloat16 and weights.shape[-1] < LANES and not grad.is_cuda:
            grad, weights = grad.float(), weights.float()
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, grad.dtype).to(own), None
