"""Rotations made of skew-symmetric matrices, less the identity, so that what is nearly none keeps its digits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["butterfly", "cayley", "neumann_cayley", "rotated_by", "skew"]


def skew(upper: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices (n, size, size) whose parts above the diagonal are `upper` (n, size (size - 1) / 2),
    row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device).unbind()
    made = upper.new_zeros(len(upper), size, size)
    made = made.index_put((torch.arange(len(upper), device=upper.device)[:, None], rows, columns), upper)
    return made - made.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 - I for skew-symmetric Q (n, b, b)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, -2 * q, left=False)


def neumann_cayley(q: Tensor, terms: int) -> Tensor:
    """(I + Q) (I - Q)^-1 - I for skew-symmetric Q (n, b, b), by so many terms of its series I + 2 Q + 2 Q^2 + ...,
    whose last power is halved from the third on. Three terms are four, as in HF PEFT."""
    if terms < 3:
        return 2 * (terms - 1) * q
    made, power = 2 * q, q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ q
        made = made + 2 * power
    return made + power @ q


def rotated_by(x: Tensor, blocks: Tensor) -> Tensor:
    """x (n, in) through the block diagonal matrix of `blocks` (in / b, b, b), or of one (1, b, b) again and again, as
    row vectors: x R."""
    count, size = x.shape[1] // blocks.shape[-1], blocks.shape[-1]
    pieces = x.reshape(len(x), count, size)
    if len(blocks) == 1:
        return (pieces @ blocks[0]).reshape(x.shape)
    return torch.bmm(pieces.transpose(0, 1), blocks).transpose(0, 1).reshape(x.shape)


def butterfly(width: int, blocks: int, half: int, factors: int) -> list[int]:
    """The order of `width` features in one of several factors: in each of so many blocks, pieces of `half`, the even
    ones first; their own order where there is one factor."""
    if factors == 1:
        return list(range(width))
    size = width // blocks
    pieces = [range(start, start + half) for start in range(0, size, half)]
    order = [n for piece in (*pieces[::2], *pieces[1::2]) for n in piece]
    return [first + n for first in range(0, width, size) for n in order]
