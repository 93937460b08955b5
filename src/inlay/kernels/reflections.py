"""Matrices with orthonormal rows as products of reflections: what is trained is free, and they stay orthonormal.

The same trajectories as `torch.nn.utils.parametrizations.orthogonal` with Householder reflections, whose base is a
whole (hidden, hidden) matrix where here it is r reflections.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormal_rows", "reflections_to"]


def orthonormal_rows(a: Tensor, base: Tensor) -> Tensor:
    """(-B H(A) [I; 0])^T, which has orthonormal rows (r, hidden) whatever `a` and `base` (r, hidden) are.

    Rows of `base` are the reflections of B. Row i of `a` is read behind entry i, which is 1; at zeros, H(A) [I; 0] is
    -[I; 0].
    """
    r, hidden = a.shape
    ones = torch.eye(hidden, r, dtype=a.dtype, device=a.device)
    return -_reflected(base, _reflected(a.triu(1) + ones.t(), ones)).t()


def reflections_to(rows: Tensor) -> Tensor:
    """Vectors (r, hidden) whose reflections, all in turn, take the first r unit vectors to orthonormal `rows`."""
    left, found = rows.clone(), []
    for index in range(len(rows)):
        vector = -left[index]
        vector[index] += 1
        found.append(vector)
        norm = vector @ vector
        left = left - (2 / norm if norm > 0 else norm) * (left @ vector)[:, None] * vector
    return torch.stack(found)


def _reflected(vectors: Tensor, x: Tensor) -> Tensor:
    """H_1 ... H_r x (hidden, n), where H_i = I - 2 v v^T / |v|^2 for row i of `vectors` (r, hidden).

    By the compact form of the product: I - V^T S^-1 V, S the upper half of V V^T with its diagonal halved.
    """
    inner = vectors @ vectors.t()
    half = inner.diagonal() / 2
    s = inner.triu(1) + torch.diag(torch.where(half > 0, half, 1))  # a vector of zeros reflects nothing
    return x - vectors.t() @ torch.linalg.solve_triangular(s, vectors @ x, upper=True)
