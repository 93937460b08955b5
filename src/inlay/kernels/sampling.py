"""Draws one token of each row from its logits: all rows at once, whatever the settings of each.

A row's token is the inverse of its cumulated probabilities, in the order of the ids, at one uniform number. So it
depends on that row's logits and number alone, and noise in the logits moves a border between two tokens by no more than
itself. Nucleus sampling (top_p): Holtzman et al. 2020 (arXiv:1904.09751). top_k: Fan et al. 2018 (arXiv:1805.04833).
min_p: Nguyen et al. 2024 (arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["likeliest", "penalize", "pick", "token_weights"]

BLOCK = 256
"""Tokens whose weights are summed first, so that only one block of a row is cumulated token by token."""
LARGEST = 1024
"""Logits of a row that are sorted at first: few rows keep more tokens."""


def token_weights(logits: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """Probabilities of each row's tokens (rows, vocabulary) up to a factor: the likeliest has 1, what is cut off 0.

    `logits` (rows, vocabulary), float32 or float64, are finite or -inf, with one finite at least in each row. The
    limits act in this order, as transformers' warpers do. `top_k`, below 1 for none: tokens as likely as the k-th are
    kept with it. `top_p`, 1 for none: the likeliest tokens up to that share of what is left; of equally likely ones at
    its end those of the lowest ids. `min_p`, 0 for none: tokens of at least that share of the likeliest. Rows with a
    top_k or top_p take less time in front of the others.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    limited = [row for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if k > 0 or p < 1]
    if limited:
        first = limited == list(range(len(limited)))  # then they are no copy
        rows = slice(len(limited)) if first else torch.tensor(limited, device=logits.device)
        some = weights[rows]
        _cut(logits[rows], some, [top_k[row] for row in limited], [top_p[row] for row in limited])
        if not first:
            weights[rows] = some
    if any(min_p):
        least = torch.tensor([min_p], dtype=weights.dtype, device=weights.device).T
        weights.mul_(_at_least(weights, least))
    return weights


def pick(weights: Tensor, uniform: Sequence[float]) -> Tensor:
    """The token (rows,) of each row of `weights` (rows, vocabulary) at a number in [0, 1), counting by ids."""
    sums = _Sums(weights)
    target = torch.tensor([uniform], dtype=torch.float64, device=weights.device).T * sums.total
    return sums.first(target, passed=True)[:, 0]


def likeliest(logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of probabilities: of `ids` (rows,), and of the `count` likeliest tokens, with their ids (rows, count).

    They are in float32, or in float64 where `logits` (rows, vocabulary) are.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    best = scores.topk(min(count, scores.shape[1]))
    return scores.gather(1, ids[:, None])[:, 0], best.values, best.indices


def penalize(logits: Tensor, places: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """Lower, in place, the logits of tokens that were there before.

    `places` (n,) count through the flat `logits` (rows, vocabulary), each at most once; `counts` (n,) say how often
    each token stands in its row's answer, 0 where it stands in the prompt alone; `penalties` (3, n) are the repetition,
    the presence and the frequency penalty of each place's row. Repetition: Keskar et al. 2019 (arXiv:1909.05858).
    """
    flat = logits.view(-1)
    repetition, presence, frequency = penalties.to(logits.dtype)
    scores = flat[places]
    scores = torch.where(scores < 0, scores * repetition, scores / repetition)
    flat[places] = scores - frequency * counts - presence * (counts > 0)


def _cut(logits: Tensor, weights: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> None:
    """Take from `weights`, in place, what top_k and top_p cut off."""
    width = logits.shape[1]
    share = torch.tensor([top_p], dtype=torch.float64, device=logits.device).T
    most = torch.tensor([[min(k, width) if k > 0 else width for k in top_k]], device=logits.device).T
    total = weights.sum(-1, keepdim=True).double()
    most_values = LARGEST if width > 4 * LARGEST else width
    least, tied, open_ = _least_kept(logits, total, most, share, most_values)
    if most_values < width and bool(open_.any()):
        rows = open_.nonzero()[:, 0]
        some = logits if len(rows) == len(logits) else logits[rows]
        least[rows], tied[rows], _ = _least_kept(some, total[rows], most[rows], share[rows], width)
    weights.mul_(_at_least(logits, least))
    rows = (tied > 0).nonzero()[:, 0]
    if len(rows):
        _drop_ties(weights, logits, rows, least[rows], tied[rows])


def _least_kept(
    logits: Tensor, total: Tensor, most: Tensor, share: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From the `count` largest logits: the least that is kept (rows, 1); where only some of the tokens that have it are
    kept, how many, else 0 (rows,); and which rows need more logits than these to know (rows,)."""
    lowered = _largest_negated(logits, count)
    weights = (lowered[:, :1] - lowered).exp_()
    last = lowered.gather(1, most.clamp(max=count) - 1)
    inside = torch.searchsorted(lowered, last, right=True)
    limited = most < logits.shape[1]
    sums = _Sums(weights.mul_(_at_least(last, lowered)))
    reached = sums.first(share * torch.where(limited, sums.total, total), passed=False) + 1
    # A share of 1 keeps all, whatever rounding does to the sums.
    number = torch.where(share < 1, torch.minimum(inside, reached), inside)
    least = lowered.gather(1, number - 1)
    following = lowered.gather(1, number.clamp(max=count - 1))
    tied = torch.where((number < count) & (following == least), number - torch.searchsorted(lowered, least), 0)
    open_ = (number == count) | (limited & (inside == count))
    return -least, tied[:, 0], open_[:, 0]


def _largest_negated(logits: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each row, the largest first, negated: an ascending order, as searchsorted takes."""
    if logits.device.type != "cpu":
        return logits.topk(count).values.neg_()
    values = logits.numpy()
    if count < values.shape[1]:
        values = np.partition(values, values.shape[1] - count, axis=-1)[:, -count:]
    values = -values
    # torch's own sort moves an index along with each value and takes thirty times as long.
    values.sort(axis=-1)
    return torch.from_numpy(values)


def _at_least(values: Tensor, least: Tensor) -> Tensor:
    """1 where `values` are no less than `least`, else 0, in their dtype: multiplying is faster than choosing."""
    shape = torch.broadcast_shapes(values.shape, least.shape)
    return torch.ge(values, least, out=values.new_empty(shape))


def _drop_ties(weights: Tensor, logits: Tensor, rows: Tensor, least: Tensor, kept: Tensor) -> None:
    """Of the tokens of `rows` with the least logit that is kept, leave the first `kept` (rows,)."""
    row, token = (logits[rows] == least).nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(rows), device=rows.device))
    over = torch.arange(len(row), device=rows.device) - starts[row] >= kept[row]
    weights[rows[row[over]], token[over]] = 0


class _Sums:
    """Cumulated sums of the rows of `weights` (rows, n) in float64: of blocks, and of the tokens of one block."""

    def __init__(self, weights: Tensor) -> None:
        self.blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
        self.ends = self.blocks.sum(-1).double().cumsum(-1)
        self.total = self.ends[:, -1:].contiguous()

    def first(self, target: Tensor, passed: bool) -> Tensor:
        """Where a row's sum first reaches `target` (rows, 1), or has `passed` it; where it never does, its last place
        that has weight."""
        block = _first(self.ends, target, passed)
        before = torch.where(block > 0, self.ends.gather(1, (block - 1).clamp(min=0)), 0)
        tokens = self.blocks[torch.arange(len(block), device=block.device), block[:, 0]]
        return block * BLOCK + _first(tokens.double().cumsum(-1), target - before, passed)


def _first(ends: Tensor, target: Tensor, passed: bool) -> Tensor:
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, target, right=passed), last)
