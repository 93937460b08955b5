"""Noise that depends on what a token is, not on where it stands in the batch: dropout masks, noise on embeddings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dropper", "NeftuneNoise", "Noise", "neftune"]


@dataclass(frozen=True)
class NeftuneNoise:
    """NEFTune's noise for a unit of `tokens`: uniform within `alpha` / sqrt(tokens x width), drawn from `seed`.

    Paper: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (arXiv:2310.05914).
    """

    seed: int
    alpha: float
    tokens: int


@dataclass(frozen=True)
class Noise:
    """For each row or segment of the batch: the step of its learner, its sample, and the noise on its embeddings."""

    steps: Sequence[int]
    samples: Sequence[int]
    neftune: Sequence[NeftuneNoise | None] = ()


def neftune(embedded: Tensor, places: Sequence[tuple[int, Tensor]], noise: Noise) -> Tensor:
    """Embeddings (rows, columns, width) with noise at the own tokens of each unit, `places` (row, columns)."""
    delta = torch.zeros_like(embedded)
    for (row, index), own, step, sample in zip(places, noise.neftune, noise.steps, noise.samples, strict=True):
        if own is not None and own.alpha:
            generator = _generator(f"{own.seed}//{step}/{sample}", embedded.device)
            drawn = torch.rand(own.tokens, embedded.shape[2], generator=generator, device=embedded.device)
            scale = own.alpha / math.sqrt(own.tokens * embedded.shape[2])
            delta[row, index[: own.tokens].to(delta.device)] = ((2 * drawn - 1) * scale).to(delta.dtype)
    return embedded + delta


@dataclass(frozen=True)
class Dropper:
    """Draws masks for one adapter at one site: `units` are (step, sample, first real token, tokens);
    the first is negative where the row has that many before the unit."""

    seed: int
    path: str
    units: Sequence[tuple[int, int, int, int]]

    def __call__(self, x: Tensor, p: float) -> Tensor:
        """x (rows, tokens, width) or (tokens, width) with a share `p` of its entries zero and the rest scaled up."""
        flat = x.reshape(-1, x.shape[-1])
        kept = torch.cat([self._drawn(unit, x, p) for unit in self.units])
        return (flat * kept).view(x.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape and dtype of `like` (tokens, width); zeros at padding."""
        return torch.cat([self._drawn(unit, like, None) for unit in self.units])

    def chance(self, like: Tensor, of_step: bool) -> Tensor:
        """Uniform numbers, float32 (tokens, 1) on the device of `like`: one for each unit, or `of_step` for each step,
        which all sites and samples share."""
        made = []
        for step, sample, _, tokens in self.units:
            name = f"{self.seed}//{step}/s" if of_step else f"{self.seed}/{self.path}/{step}/{sample}/r"
            made.append(torch.rand(1, 1, generator=_generator(name, like.device), device=like.device).expand(tokens, 1))
        return torch.cat(made)

    def _drawn(self, unit: tuple[int, int, int, int], x: Tensor, p: float | None) -> Tensor:
        """Masks of one unit; normal numbers where `p` is None."""
        step, sample, lead, tokens = unit
        generator = _generator(f"{self.seed}/{self.path}/{step}/{sample}" + "/n" * (p is None), x.device)
        draw, shape = torch.randn if p is None else torch.rand, (tokens - lead, x.shape[-1])
        drawn = draw(shape, generator=generator, device=x.device)
        kept = drawn.to(x.dtype) if p is None else (drawn >= p).to(x.dtype) / (1 - p)
        before = kept.new_full((max(lead, 0), x.shape[-1]), p is not None)
        return kept[-lead:] if lead < 0 else torch.cat([before, kept]) if lead else kept


def _generator(name: str, device: torch.device) -> torch.Generator:
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.Generator(device).manual_seed(number)
