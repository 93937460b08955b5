"""Directions that LoRA can begin in: of an orthogonal matrix, of a weight that its inputs' covariance turns, and of a
weight's gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .probes import drawn_svd

__all__ = ["corda", "lora_ga", "orthogonal"]

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def orthogonal(r: int, shape: tuple[int, int], generator: torch.Generator) -> Factors:
    """Random A and B of a weight (out, in) whose product is zero, since they are made of different rows of one
    orthogonal matrix (r, r)."""
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    a = torch.randn(shape[1], r // 2, generator=generator) @ q[0::2]
    b = torch.randn(shape[0], r // 2, generator=generator) @ q[1::2]
    return (a.t() / 10).contiguous(), b / 10


def corda(r: int, scale: float, weight: Tensor, covariance: Tensor, largest: bool) -> Factors:
    """r of the directions of W = U S (V^T C^-1), where U S V^T = W C, C (in, in) being the covariance of what the layer
    reads; it is damped until it can be inverted."""
    eye, damping = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device), 0.01
    while True:
        damped = covariance + eye * covariance.diagonal().mean() * damping
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, eye)) < 0.05 or damping > 1e6:
            break
        damping *= 2
    u, s, vt = torch.linalg.svd(weight.to(covariance) @ damped, full_matrices=False)
    chosen = slice(0, r) if largest else slice(len(s) - r, len(s))
    root = (s[chosen] / scale).sqrt()
    return root[:, None] * (vt @ inverse)[chosen], u[:, chosen] * root


def lora_ga(
    r: int, scale: float, weight: Tensor, gradient: Tensor, how: tuple[str, str, float], generator: torch.Generator
) -> Factors:
    """Directions of the first 2r singular vectors of the gradient (out, in), shared out between A and B; `how` is the
    direction, the scale and the gamma of `lora_starts.Starts`."""
    direction, scaling, gamma = how
    u, s, vt = drawn_svd(gradient, 4 * r, seed=int(torch.randint(2**31, (), generator=generator)))
    drawn = torch.randperm(2 * r, generator=generator)[:r].tolist()
    by_a = {"ArBr": [*range(1, 2 * r, 2)], "A2rBr": [*range(r, 2 * r)], "ArB2r": [*range(r)]}.get(direction, drawn)
    by_b = {"ArBr": [*range(0, 2 * r, 2)], "A2rBr": [*range(r)], "ArB2r": [*range(r, 2 * r)]}.get(direction, drawn)
    a, b = vt[by_a], u[:, by_b] * s[by_b]
    if scaling == "stable":
        b = b * (len(weight) ** 0.25 / math.sqrt(gamma))
    elif scaling == "weight_svd" and s[by_b[0]] > 0:
        b = b * (torch.linalg.matrix_norm(weight.to(b), 2) / s[by_b[0]])
    elif scaling == "gd_scale":
        a, b = a / scale, b / scale
    return a, b
