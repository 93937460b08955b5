"""Several tensors of one shape made into one by weights: task arithmetic, and what is left out or put to a vote first.

Papers: Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv:2212.04089); Yadav et al. 2023, "TIES-Merging:
Resolving Interference When Merging Models" (arXiv:2306.01708); Yu et al. 2024, "Language Models are Super Mario:
Absorbing Abilities from Homologous Models as a Free Lunch" (DARE, arXiv:2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rule", "Signs", "largest", "low_rank_factors", "thinned", "weighted"]

Rule = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
"""linear: the sum by weights; magnitude_prune and ties: of the largest numbers of each tensor; dare: of a random part
of them, scaled up; ties: where the tensors differ in sign, the mean of those of the winning one."""
Signs = Literal["total", "frequency"]
"""Which sign wins at a place: that of the sum, or that of most tensors."""


def weighted(
    rule: Rule, tensors: Sequence[Tensor], weights: Sequence[float], density: float = 1.0, signs: Signs = "total",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """One tensor of the shape of each of `tensors`, by `weights`. `density` is the share of each tensor's numbers that
    is kept; `generator` (on the CPU) draws which, where that is by chance."""
    if rule.startswith("dare"):
        kept = [thinned(tensor, density, generator) for tensor in tensors]
    elif rule == "linear":
        kept = list(tensors)
    else:
        kept = [largest(tensor, density) for tensor in tensors]
    stack = torch.stack(kept)
    scaled = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
    if not rule.endswith("ties"):
        return scaled.sum(0)
    total = (stack if signs == "total" else stack.sign()).sum(0)
    wins = stack.sign() == torch.where(total >= 0, 1.0, -1.0).to(stack.dtype)
    return (scaled * wins).sum(0) / wins.sum(0).clamp(min=1)


def largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with all but a share `density` of its numbers, the largest ones, set to zero."""
    if density >= 1:
        return tensor
    kept = torch.topk(tensor.abs().flatten(), int(density * tensor.numel()))[1]
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[kept] = True
    return torch.where(mask.view(tensor.shape), tensor, 0)


def thinned(tensor: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """`tensor` with each number kept by the chance `density`, and then divided by it."""
    if density >= 1:
        return tensor
    mask = torch.bernoulli(torch.full(tensor.shape, density, dtype=tensor.dtype), generator=generator)
    return tensor * mask.to(tensor.device) / density


def low_rank_factors(matrix: Tensor, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """D (rank, in) and U (out, rank) whose product is the closest to `matrix` (out, in) of that rank; zeros where the
    matrix has less. `clamp` cuts both at that quantile of their numbers."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    down, up = right[:rank], left[:, :rank] * values[:rank]
    if clamp is not None:
        end = torch.quantile(torch.cat([up.flatten(), down.flatten()]), clamp)
        down, up = down.clamp(-end, end), up.clamp(-end, end)
    lacking = rank - len(down)
    if lacking > 0:
        down = torch.cat([down, down.new_zeros(lacking, down.shape[1])])
        up = torch.cat([up, up.new_zeros(len(up), lacking)], 1)
    return down, up
