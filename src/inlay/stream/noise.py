"""Dropout masks that depend on what a token is, not on where it stands in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dropper", "Noise"]


@dataclass(frozen=True)
class Noise:
    """The step of training and the sample in each unit (row or segment) of the batch."""

    step: int
    samples: Sequence[int]


@dataclass(frozen=True)
class Dropper:
    """Draws masks for one adapter at one site: `units` are (sample, first real token, number of tokens)."""

    seed: int
    path: str
    step: int
    units: Sequence[tuple[int, int, int]]

    def __call__(self, x: Tensor, p: float) -> Tensor:
        """x (rows, tokens, width) or (tokens, width) with a share `p` of its entries zero and the rest scaled up."""
        flat = x.reshape(-1, x.shape[-1])
        kept = torch.cat([self._drawn(unit, x, p) for unit in self.units])
        return (flat * kept).view(x.shape)

    def _drawn(self, unit: tuple[int, int, int], x: Tensor, p: float) -> Tensor:
        sample, lead, tokens = unit
        name = f"{self.seed}/{self.path}/{self.step}/{sample}".encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
        generator = torch.Generator(x.device).manual_seed(number)
        drawn = torch.rand(tokens - lead, x.shape[-1], generator=generator, device=x.device)
        kept = (drawn >= p).to(x.dtype) / (1 - p)
        return kept if not lead else torch.cat([kept.new_ones(lead, x.shape[-1]), kept])
